"""What a vocabulary is declared with: ranges of ids, and how each modality lays out its span.

A declaration is refused unless every Document comes back from its ids exactly: a wrong one would be trained on for days before
anybody sees it. So one modality at most stands bare, and what ids mean follows from the begin id before them.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unitok.document import ROLES
from unitok.errors import UserError
from unitok.layouts import LAYOUTS, Interleaved

KINDS = ("special", "text", "grid", "codes")
ENDS = ("<bos>", "<eos>", "<pad>")


@dataclass(frozen=True)
class Range:
    """A stretch of ids `[offset, offset + size)` of one kind."""

    name: str
    kind: str  # `special`, `text`, `grid` (value n stands at offset + n - 1) or `codes`
    offset: int
    size: int
    level: int = 0  # of a residual codebook
    illegal: tuple[int, ...] = ()  # codes that no sequence may hold (SentencePiece's control pieces)
    permutation: tuple[int, ...] | None = None  # code c stands at `offset + permutation[c]`; None is the identity

    def __post_init__(self) -> None:
        where, codes = f"range {self.name!r}", (*self.illegal, *(self.permutation or ()))
        if any(type(n) is not int for n in (self.offset, self.size, self.level, *codes)):
            raise UserError(f"{where}: offset, size, level, illegal and permutation are whole numbers")
        if self.kind not in KINDS or not self.name or not isinstance(self.name, str):
            raise UserError(f"{where}: kind {self.kind!r}; a range has a name, and a kind of {', '.join(KINDS)}")
        if self.offset < 0 or self.size < 1:
            raise UserError(f"{where}: {self.size} ids at {self.offset}; it needs at least one, from 0 on")
        if any(not 0 <= code < self.size for code in self.illegal) or len(set(self.illegal)) == self.size:
            raise UserError(f"{where}: illegal codes are some of its {self.size}, not others and not all")
        if self.permutation is not None and sorted(self.permutation) != list(range(self.size)):
            raise UserError(f"{where}: its permutation does not hold each of 0 to {self.size - 1} once")
        if self.kind == "grid" and codes:
            raise UserError(f"{where}: a grid's values stand in their order, and all are legal")

    @property
    def stop(self) -> int:
        return self.offset + self.size

    def intervals(self) -> tuple[tuple[int, int], ...]:
        """The legal ids as half-open intervals."""
        holes = sorted(self.offset + (self.permutation[c] if self.permutation else c) for c in self.illegal)
        edges = [self.offset, *(edge for hole in holes for edge in (hole, hole + 1)), self.stop]
        return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """bool, of the same shape: which ids are legal here."""
        inside = np.zeros(np.shape(ids), bool)
        for a, b in self.intervals():
            inside |= (ids >= a) & (ids < b)
        return inside

    def interval(self, first: int, last: int) -> tuple[tuple[int, int], ...]:
        """The ids of a grid's values from `first` to `last`, as half-open intervals."""
        return ((self.offset + first - 1, self.offset + last),)

    def value(self, id: int) -> int:
        """The grid's value that an id says. Errors: `UserError` for another id."""
        return int(self.to_codes(np.array(id))) + 1

    @cached_property
    def _places(self) -> np.ndarray:
        """Code -> place in the range, where there is a permutation."""
        return np.asarray(self.permutation)

    def _illegal(self, codes: np.ndarray) -> np.ndarray:
        """bool, of the same shape: which codes no sequence may hold."""
        if len(self.illegal) > 8:
            return np.isin(codes, self.illegal)
        found = np.zeros(codes.shape, bool)
        for code in self.illegal:  # a few: faster than a search
            found |= codes == code
        return found

    def to_ids(self, codes: np.ndarray) -> np.ndarray:
        """Codes -> ids of the same shape; errors: `UserError` for a code outside `[0, size)` or illegal."""
        codes = np.asarray(codes, np.int64)
        if codes.size and (codes.min() < 0 or codes.max() >= self.size or (self.illegal and self._illegal(codes).any())):
            bad = codes[(codes < 0) | (codes >= self.size) | self._illegal(codes)].flat[0]
            raise UserError(f"code {bad} is not a legal code of {self.name!r} (size {self.size})")
        return self.offset + (self._places[codes] if self.permutation else codes)

    def to_codes(self, ids: np.ndarray) -> np.ndarray:
        """Ids -> codes of the same shape. Inverse of `to_ids`, with the same errors."""
        places = np.asarray(ids, np.int64) - self.offset
        if places.size and (places.min() < 0 or places.max() >= self.size):
            raise UserError(f"id {np.asarray(ids)[(places < 0) | (places >= self.size)].flat[0]} is not in {self.name!r}")
        codes = np.argsort(self._places)[places] if self.permutation else places
        if self.illegal and self._illegal(codes).any():
            raise UserError(f"id {np.asarray(ids)[self._illegal(codes)].flat[0]} is a control piece of {self.name!r}")
        return codes


@dataclass(frozen=True)
class Span:
    """How a modality lays out its ids. Without a header its body holds any number of units, at least one."""

    modality: str  # its name
    body: tuple[str, ...]  # ranges of its levels, by name and in order; spans may share them, where none of them is bare
    begin: str | None = None  # name of a special id; one span may have no begin and end, text's
    end: str | None = None
    header: tuple[str, ...] = ()  # names of grid ranges, one for each side
    fingerprint: str = ""  # of the tokenizer whose codes these are
    kind: str = ""  # which modality it is an instance of (`unitok.modalities`); "" for one of its own name
    layout: str = ""  # order of the codes (`unitok.layouts`); "" for `raster` with a header, `interleaved` without one

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or self.modality)
        object.__setattr__(self, "layout", self.layout or ("raster" if self.header else "interleaved"))
        ends = [name for name in (self.begin, self.end) if name is not None]
        names = (self.modality, self.kind, self.layout, self.fingerprint, *self.body, *self.header, *ends)
        if not (isinstance(self.body, tuple) and isinstance(self.header, tuple) and all(isinstance(n, str) for n in names)):
            raise UserError(f"modality {self.modality!r}: body and header are tuples of names, and all names are strings")
        if self.layout not in LAYOUTS or (self.layout == "raster") != bool(self.header):
            raise UserError(
                f"modality {self.modality!r}: layout {self.layout!r}; choose raster with a header, interleaved or delayed without"
            )

    @cached_property
    def order(self) -> Interleaved:
        """The layout of its codes."""
        return LAYOUTS[self.layout](len(self.body), len(self.header))


def check_declarations(ranges: list[Range], specials: dict[str, int], spans: dict[str, Span]) -> None:
    """Raise `UserError` for a vocabulary by which some Document would not come back from its ids as it was."""
    _check_ranges(ranges)
    _check_specials(ranges, specials, bool(spans))
    users: dict[str | None, Span] = {}
    for modality, span in spans.items():
        _check_body(modality, span, {r.name: r for r in ranges})
        _check_ends(modality, span, specials)
        for name in (*span.body, span.begin, span.end):
            other = users.setdefault(name, span)
            if other is not span and not (name in span.body and span.begin and other.begin):
                what = f"share {name}" if name else "both stand bare"
                raise UserError(f"{other.modality} and {modality} {what}: an id could not tell which of the two it is of")


def _check_ranges(ranges: list[Range]) -> None:
    names = [r.name for r in ranges]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"range {twice[0]!r} is declared twice; every range needs a name of its own")
    in_order = sorted(ranges, key=lambda r: r.offset)
    for a, b in zip(in_order, in_order[1:], strict=False):
        if a.stop > b.offset:
            raise UserError(f"ranges {a.name!r} and {b.name!r} overlap: id {b.offset} would mean two things")


def _check_specials(ranges: list[Range], specials: dict[str, int], used: bool) -> None:
    size = max((r.stop for r in ranges), default=0)
    owners: dict[int, str] = {}
    for name, id in specials.items():
        if type(id) is not int or not 0 <= id < size:
            raise UserError(f"special {name} is id {id!r}; the vocabulary's ids are 0 to {size - 1}")
        if id in owners:
            raise UserError(f"specials {owners[id]} and {name} are both id {id}")
        owners[id] = name
        for r in ranges:
            if r.kind != "special" and r.offset <= id < r.stop and r.holds(np.array(id)):
                raise UserError(f"special {name} is id {id}, which is also a legal one of {r.name!r}")
    if used and (missing := [name for name in ENDS if name not in specials]):
        raise UserError(f"no special id {missing[0]}, which every vocabulary needs")
    if 0 < len(roles := [role for role in ROLES if f"<{role}>" in specials]) < len(ROLES):
        raise UserError(f"special ids for the roles {', '.join(roles)} alone; all of {', '.join(ROLES)} have one, or none")


def _check_body(modality: str, span: Span, ranges: dict[str, Range]) -> None:
    if not modality or span.modality != modality:
        raise UserError(f"modality {modality!r} declares a span of {span.modality!r}")
    if absent := [name for name in (*span.body, *span.header) if name not in ranges]:
        raise UserError(f"{modality}: no range {absent[0]!r}; there are {', '.join(ranges)}")
    if strange := [name for name in span.header if ranges[name].kind != "grid"]:
        raise UserError(f"{modality}: its header names {strange[0]!r}, whose values are no sides of a grid")
    body = [ranges[name] for name in span.body]
    kind = "codes" if span.begin else "text"
    if not body or any(r.kind != kind for r in body):
        raise UserError(f"{modality}: its body is one range of kind {kind!r} for each level, and at least one")
    if [r.level for r in body] != list(range(len(body))):
        raise UserError(f"{modality}: its body has the levels {[r.level for r in body]}, not 0 to {len(body) - 1} in order")


def _check_ends(modality: str, span: Span, specials: dict[str, int]) -> None:
    if not span.begin and not span.end and not span.header and len(span.body) == 1:
        return
    if not span.begin or not span.end or span.begin == span.end:
        raise UserError(
            f"{modality}: needs a begin and an end id, two different ones; one range without a header may stand bare"
        )
    for name in (span.begin, span.end):
        if name not in specials:
            raise UserError(f"{modality}: {name} has no special id")
        if name in (*ENDS, *(f"<{role}>" for role in ROLES)):
            raise UserError(f"{modality}: {name} means something else: take a name of its own")
