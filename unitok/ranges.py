"""The declarations of a vocabulary: ranges of tokens, and the span of each modality.

Declarations are refused unless every document comes back exactly from its tokens: a mistake would cost days of training before
anybody saw it. So at most one modality is bare (its spans have no begin and end tokens), and in any other span the begin token says
what the tokens after it mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unitok.document import ROLES
from unitok.errors import UserError
from unitok.intervals import holds
from unitok.layouts import LAYOUTS, Interleaved

KINDS = ("special", "text", "grid", "codes")
ENDS = ("<bos>", "<eos>", "<pad>")


@dataclass(frozen=True)
class Range:
    """The tokens `[offset, offset + size)`, which stand for codes of one kind. Errors: `UserError` for values that do not fit together.

    Args:
        name: of the range.
        kind: `special`, `text`, `grid` (the side of a grid; n is the token offset + n - 1) or `codes`.
        offset: the first token.
        size: number of tokens.
        level: of a residual codebook.
        illegal: codes that are never allowed, such as SentencePiece's control pieces.
        permutation: code c is the token `offset + permutation[c]`; None: `offset + c`.
    """

    name: str
    kind: str
    offset: int
    size: int
    level: int = 0
    illegal: tuple[int, ...] = ()
    permutation: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        where, codes = f"range {self.name!r}", (*self.illegal, *(self.permutation or ()))
        if any(type(n) is not int for n in (self.offset, self.size, self.level, *codes)):
            raise UserError(f"{where}: offset, size, level, illegal and permutation are whole numbers")
        if self.kind not in KINDS or not self.name or not isinstance(self.name, str):
            raise UserError(f"{where}: kind {self.kind!r}; a range has a name, and a kind of {', '.join(KINDS)}")
        if self.offset < 0 or self.size < 1:
            raise UserError(f"{where}: {self.size} tokens at {self.offset}; it needs at least one, at 0 or above")
        if any(not 0 <= code < self.size for code in self.illegal) or len(set(self.illegal)) == self.size:
            raise UserError(f"{where}: illegal codes are among its {self.size} codes, and not all of them")
        if self.permutation is not None and sorted(self.permutation) != list(range(self.size)):
            raise UserError(f"{where}: its permutation does not hold each of 0 to {self.size - 1} once")
        if self.kind == "grid" and codes:
            raise UserError(f"{where}: a grid has neither illegal codes nor a permutation")

    @property
    def stop(self) -> int:
        """The token after the last one."""
        return self.offset + self.size

    def intervals(self) -> tuple[tuple[int, int], ...]:
        """Return the allowed tokens as half-open intervals."""
        holes = sorted(self.offset + (self.permutation[c] if self.permutation else c) for c in self.illegal)
        edges = [self.offset, *(edge for hole in holes for edge in (hole, hole + 1)), self.stop]
        return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Return which tokens are allowed ones of this range, as bool of the same shape."""
        return holds(self.intervals(), np.asarray(ids))

    def interval(self, first: int, last: int) -> tuple[tuple[int, int], ...]:
        """Return the tokens of the sides `first` to `last` of a grid, as half-open intervals."""
        return ((self.offset + first - 1, self.offset + last),)

    def value(self, id: int) -> int:
        """Return the side of a grid that a token stands for. Errors: `UserError` for a token of another range."""
        return int(self.to_codes(np.array(id))) + 1

    def values(self, ids: np.ndarray) -> np.ndarray:
        """Return the sides of a grid that tokens stand for, int64 of the same shape; of tokens of other ranges, any numbers."""
        return np.asarray(ids, np.int64) - self.offset + 1

    @cached_property
    def _positions(self) -> np.ndarray:
        """The position in the range of each code, where there is a permutation."""
        return np.asarray(self.permutation)

    def _illegal(self, codes: np.ndarray) -> np.ndarray:
        """Which codes are never allowed, as bool of the same shape."""
        if len(self.illegal) > 8:
            return np.isin(codes, self.illegal)
        hit = np.zeros(codes.shape, bool)
        for code in self.illegal:  # a few: faster than a search
            hit |= codes == code
        return hit

    def to_ids(self, codes: np.ndarray) -> np.ndarray:
        """Return the tokens of codes, int64 of the same shape. Errors: `UserError` for a code outside `[0, size)`, or never allowed."""
        codes = np.asarray(codes, np.int64)
        if codes.size and (codes.min() < 0 or codes.max() >= self.size or (self.illegal and self._illegal(codes).any())):
            bad = codes[(codes < 0) | (codes >= self.size) | self._illegal(codes)].flat[0]
            raise UserError(f"code {bad} is not an allowed code of {self.name!r} (size {self.size})")
        return self.offset + (self._positions[codes] if self.permutation else codes)

    def to_codes(self, ids: np.ndarray) -> np.ndarray:
        """Return the codes of tokens, int64 of the same shape. Inverse of `to_ids`, with the same errors."""
        positions = np.asarray(ids, np.int64) - self.offset
        if positions.size and (positions.min() < 0 or positions.max() >= self.size):
            outside = (positions < 0) | (positions >= self.size)
            raise UserError(f"token {np.asarray(ids)[outside].flat[0]} is not in {self.name!r}")
        codes: np.ndarray = np.argsort(self._positions)[positions] if self.permutation else positions
        if self.illegal and self._illegal(codes).any():
            raise UserError(f"token {np.asarray(ids)[self._illegal(codes)].flat[0]} of {self.name!r} is never allowed")
        return codes


@dataclass(frozen=True)
class Span:
    """The tokens of one piece of content: begin, header, body, end. Errors: `UserError` for values that do not fit together.

    Args:
        modality: its name.
        body: names of the ranges of its levels, in order; one name for all levels where they are coordinates of one kind. Spans may share
            ranges where none of them is bare.
        begin: name of the special token that begins it. One modality, usually text, may be bare: without begin and end.
        end: name of the special token that ends it.
        header: names of the ranges of a grid's sides, one per side. Without a header the body holds any number of frames, at least one.
        facts: number of first values of the header that are no sides, such as the frames per second of a video.
        group: where the last fact counts frames, how many of them share one place of the grid's first side, after the first frame, which
            has its own; 0: the first side is in the header.
        fingerprint: of the tokenizer whose codes these are.
        kind: the kind of content (`unitok.modalities`) that it is an instance of; "": the one of its name.
        layout: order of the codes (`unitok.layouts`); "": `raster` with a header, `interleaved` without one.
        floors: for each level the level of the same unit whose code it is never below, its own where there is none: (0, 1, 0, 1) for
            boxes x0, y0, x1, y1. (): no level has one. Only for levels of one range.
    """

    modality: str
    body: tuple[str, ...]
    begin: str | None = None
    end: str | None = None
    header: tuple[str, ...] = ()
    fingerprint: str = ""
    kind: str = ""
    layout: str = ""
    floors: tuple[int, ...] = ()
    facts: int = 0
    group: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or self.modality)
        object.__setattr__(self, "layout", self.layout or ("raster" if self.header else "interleaved"))
        ends = [name for name in (self.begin, self.end) if name is not None]
        names = (self.modality, self.kind, self.layout, self.fingerprint, *self.body, *self.header, *ends)
        if not (isinstance(self.body, tuple) and isinstance(self.header, tuple) and all(isinstance(n, str) for n in names)):
            raise UserError(f"modality {self.modality!r}: body and header are tuples of names, and all names are strings")
        for name in (self.modality, self.kind):  # they become names of folders, of attributes and of flags
            if not name.isidentifier():
                raise UserError(f"modality {name!r}: letters, digits and _ make a name, and no digit begins it")
        if self.layout not in LAYOUTS or (self.layout == "raster") != bool(self.header):
            raise UserError(
                f"modality {self.modality!r}: layout {self.layout!r}; choose raster with a header, interleaved or delayed without"
            )

        if not 0 <= self.facts < max(1, len(self.header)):
            raise UserError(f"modality {self.modality!r}: {self.facts} facts; its header needs a side after them")
        if self.group and (type(self.group) is not int or self.group < 1 or not self.facts):
            raise UserError(f"modality {self.modality!r}: group {self.group!r}; it is at least 1, and a fact counts frames")

    @property
    def shared(self) -> bool:
        """Whether one range holds the codes of several levels; then only the position of a code says its level."""
        return len(self.body) > 1 and len(set(self.body)) == 1

    def sides(self, header: Sequence[int]) -> tuple[int, ...]:
        """Return the sides of the grid that the first values of a header tell."""
        if self.group and len(header) >= self.facts:
            return 1 + -(-(header[self.facts - 1] - 1) // self.group), *header[self.facts :]
        return tuple(header[self.facts :])

    @cached_property
    def order(self) -> Interleaved:
        """The layout of its codes, which knows their order."""
        return LAYOUTS[self.layout](len(self.body), len(self.header) - self.facts + bool(self.group))


def ids_by_level(ranges: Sequence[Range], rows: np.ndarray) -> np.ndarray:
    """Return the tokens of codes [K, N] of which row k is of range k, int64 [K, N]. Errors: `UserError` as for `Range.to_ids`."""
    first = ranges[0]
    if all(r is first for r in ranges):
        return first.to_ids(rows)
    alike = all(r.size == first.size and not r.illegal and not r.permutation for r in ranges)
    if alike and rows.size and rows.min() >= 0 and rows.max() < first.size:
        ids: np.ndarray = rows + np.array([[r.offset] for r in ranges])
        return ids
    return np.stack([r.to_ids(row) for r, row in zip(ranges, rows, strict=True)])


def check_declarations(ranges: list[Range], specials: dict[str, int], spans: dict[str, Span]) -> None:
    """Raise `UserError` for declarations with which some document would not come back exactly from its tokens."""
    _check_ranges(ranges)
    _check_specials(ranges, specials, bool(spans))
    users: dict[str | None, Span] = {}
    for modality, span in spans.items():
        _check_body(modality, span, {r.name: r for r in ranges})
        _check_ends(modality, span, specials)
        for name in (*span.body, span.begin, span.end):
            other = users.setdefault(name, span)
            if other is not span and not (name in span.body and span.begin and other.begin):
                what = f"share {name}" if name else "both have no begin and end"
                raise UserError(
                    f"{other.modality} and {modality} {what}: nobody could tell which of the two a token belongs to"
                )


def _check_ranges(ranges: list[Range]) -> None:
    names = [r.name for r in ranges]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"range {twice[0]!r} is declared twice; every range needs a name of its own")
    in_order = sorted(ranges, key=lambda r: r.offset)
    for a, b in zip(in_order, in_order[1:], strict=False):
        if a.stop > b.offset:
            raise UserError(f"ranges {a.name!r} and {b.name!r} overlap: token {b.offset} would mean two things")


def _check_specials(ranges: list[Range], specials: dict[str, int], used: bool) -> None:
    size = max((r.stop for r in ranges), default=0)
    owners: dict[int, str] = {}
    for name, id in specials.items():
        if type(id) is not int or not 0 <= id < size:
            raise UserError(f"special {name} is token {id!r}; the vocabulary has the tokens 0 to {size - 1}")
        if id in owners:
            raise UserError(f"specials {owners[id]} and {name} are both token {id}")
        owners[id] = name
        for r in ranges:
            if r.kind != "special" and r.offset <= id < r.stop and r.holds(np.array(id)):
                raise UserError(f"special {name} is token {id}, which is also an allowed one of {r.name!r}")
    if used and (missing := [name for name in ENDS if name not in specials]):
        raise UserError(f"no special token {missing[0]}, which every vocabulary needs")
    if 0 < len(roles := [role for role in ROLES if f"<{role}>" in specials]) < len(ROLES):
        raise UserError(f"special tokens for the roles {', '.join(roles)} alone; give all of {', '.join(ROLES)} one, or none")


def _check_body(modality: str, span: Span, ranges: dict[str, Range]) -> None:
    if not modality or span.modality != modality:
        raise UserError(f"modality {modality!r} declares a span of {span.modality!r}")
    if absent := [name for name in (*span.body, *span.header) if name not in ranges]:
        raise UserError(f"{modality}: no range {absent[0]!r}; there are {', '.join(ranges)}")
    if wrong := [name for name in span.header if ranges[name].kind != "grid"]:
        raise UserError(f"{modality}: its header names {wrong[0]!r}, whose values are no sides of a grid")
    body = [ranges[name] for name in span.body]
    kind = "codes" if span.begin else "text"
    if span.shared and span.layout != "interleaved":
        raise UserError(f"{modality}: levels of one range need the layout interleaved, where each has a place of its own")
    if span.floors and not (
        span.shared and len(span.floors) == len(body) and all(0 <= f <= level for level, f in enumerate(span.floors))
    ):
        raise UserError(f"{modality}: floors name for each level of one range a level that is not after it")
    if span.floors and (body[0].illegal or body[0].permutation):
        raise UserError(f"{modality}: codes with floors are in order, without illegal ones or a permutation")
    if not body or any(r.kind != kind for r in body):
        raise UserError(f"{modality}: its body is one range of kind {kind!r} for each level, and at least one")
    if [r.level for r in body] != ([0] * len(body) if span.shared else list(range(len(body)))):
        raise UserError(f"{modality}: its body has the levels {[r.level for r in body]}, not 0 to {len(body) - 1} in order")


def _check_ends(modality: str, span: Span, specials: dict[str, int]) -> None:
    if not span.begin and not span.end and not span.header and len(span.body) == 1:
        return
    if not span.begin or not span.end or span.begin == span.end:
        raise UserError(
            f"{modality}: needs a begin and an end token, two different ones; only one range without a header may have neither"
        )
    for name in (span.begin, span.end):
        if name not in specials:
            raise UserError(f"{modality}: {name} has no special token")
        if name in (*ENDS, *(f"<{role}>" for role in ROLES)):
            raise UserError(f"{modality}: {name} has another meaning; choose another name")
