"""The shared vocabulary: ranges of tokens, the span of each modality, and documents <-> tokens.

Only this file and `ranges.py` turn codes into tokens and back. Ranges are appended and never moved, so a modality can be added while
every old token keeps its meaning. They are, in this order: 256 special tokens, text pieces, grid sizes of images, image codes, one
range per level of audio codes, then whatever is added. Each modality declares its span once. Grammar, data validation, loss masks,
sampling and decoding all read that declaration:

    text   piece piece …                                     (bare: without begin and end)
    image  <image> rows columns code … </image>              (rows x columns codes, row by row)
    audio  <audio> (level 0 … level K-1) per frame … </audio>

A document is `<bos>`, its spans, `<eos>`. Where the role changes, the token of the new role stands before the span. Neighboring bare
segments of equal role and loss are one span. `ids` are arrays of tokens, int64 [L]. This file does not import PyTorch, which processes
that only read data sets do without.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from unitok.document import ROLES, Document, Segment
from unitok.errors import UserError, type_of
from unitok.files import read_json
from unitok.ranges import Range, Span, check_declarations, ids_by_level

SPECIAL_COUNT = 256
_FIXED = ("<bos>", "<eos>", "<pad>", *(f"<{role}>" for role in ROLES))
_FILLS = tuple(f"<fill_{i}>" for i in range(16))
GRID_SIZES = 64  # largest side of a grid, in codes
VERSION = 1  # of manifests


@dataclass(frozen=True)
class SegmentSpan:
    """Where a segment is in a sequence of tokens, and what tokens cannot say about it.

    Args:
        modality: of the segment.
        start: position of its first token, of its role's token where that stands before it.
        length: number of its tokens.
        role, loss, source, size: as in `Segment`.
    """

    modality: str
    start: int
    length: int
    role: str = "none"
    loss: bool = True
    source: str = ""
    size: tuple[int, ...] = ()


@dataclass
class Vocab:
    """Ranges, special tokens by name, and span declarations by modality; `unitok.modalities.build_vocab` makes one.

    Errors: `UserError` for declarations with which `decode(encode(document))` would differ from some document.
    """

    ranges: list[Range] = field(default_factory=list)
    specials: dict[str, int] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bodies: dict[str, tuple[Range, ...]] = {}  # what `body` has looked up
        check_declarations(self.ranges, self.specials, self.spans)

    # ---- Making --------------------------------------------------------------------------------------------------

    @classmethod
    def start(cls) -> "Vocab":
        """Return a vocabulary of the special tokens alone."""
        vocab = cls([Range("special", "special", 0, SPECIAL_COUNT)])
        for name in (*_FIXED, *_FILLS, *(f"<{end}{m}>" for m in ("image", "audio", "video", "box") for end in ("", "/"))):
            vocab.specials[name] = len(vocab.specials)
        return vocab

    def add(self, span: Span, sizes: dict[str, int], illegal: tuple[int, ...] = ()) -> None:
        """Append a modality.

        Args:
            span: its declaration. Begin and end tokens with new names get free special tokens.
            sizes: number of codes of each new range that its header and body name. Ranges of grid sizes are shared between modalities.
            illegal: codes of its body that are never allowed.

        Errors: `UserError` for a declaration that is not reversible; the vocabulary stays as it was.
        """
        if span.modality in self.spans:
            raise UserError(f"modality {span.modality!r} is declared already; an old one never changes")
        if unnamed := [name for name in sizes if name not in (*span.header, *span.body)]:
            raise UserError(f"{span.modality}: neither its header nor its body names {unnamed[0]!r}")
        ranges, specials = list(self.ranges), dict(self.specials)
        for name, size in sizes.items():
            known = next((r for r in ranges if r.name == name), None)
            if known and known.size == size and (name in span.header or span.begin):
                continue
            kind = "grid" if name in span.header else "codes" if span.begin else "text"
            level = span.body.index(name) if name in span.body else 0
            stop = max((r.stop for r in ranges), default=0)
            ranges.append(Range(name, kind, stop, size, level, illegal if name in span.body else ()))
        new = [name for name in (span.begin, span.end) if name and name not in specials]
        taken = set(specials.values())
        free = [id for r in self.ranges if r.kind == "special" for id in range(r.offset, r.stop) if id not in taken]
        if len(free) < len(new):
            raise UserError(
                f"{span.modality}: no special token is free for {new[len(free)]}: the vocabulary uses all {len(taken)}"
            )
        specials |= dict(zip(new, free, strict=False))
        grown = Vocab(ranges, specials, self.spans | {span.modality: span})
        self.ranges, self.specials, self.spans = grown.ranges, grown.specials, grown.spans
        self._bodies = {}

    # ---- Lookup --------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of tokens, V."""
        return max((r.stop for r in self.ranges), default=0)

    def range(self, name: str) -> Range:
        """Return the range of that name."""
        return next(r for r in self.ranges if r.name == name)

    def body(self, modality: str) -> tuple[Range, ...]:
        """Return the ranges of the codes in a span of that modality, one per level."""
        if modality not in self._bodies:
            self._bodies[modality] = tuple(self.range(name) for name in self.span(modality).body)
        return self._bodies[modality]

    def span(self, modality: str) -> Span:
        """Return the declaration of a modality. Errors: `UserError` that lists the existing ones."""
        if modality not in self.spans:
            raise UserError(f"no modality {modality!r} in this vocabulary; it has {', '.join(self.spans) or 'none'}")
        return self.spans[modality]

    def names(self) -> list[str]:
        """Return a name for each token, all different: of special tokens their own, of others `<RANGE:CODE>`, of grids `<RANGE:SIDE>`."""
        names = [""] * self.size
        for r in self.ranges:
            for code, position in enumerate(r.permutation or range(r.size)):
                names[r.offset + position] = f"<{r.name}:{code + (r.kind == 'grid')}>"
        for name, id in self.specials.items():
            names[id] = name
        return names

    @property
    def bare(self) -> str | None:
        """The modality whose span has no begin and end tokens, usually text; None where every span has them."""
        return next((m for m, span in self.spans.items() if not span.begin), None)

    def instance(self, type: str) -> str:
        """Return the modality that content of a type belongs to: the one of that name, or the only one of that kind; `type` itself
        where there is none. Errors: `UserError` where there are several of the kind."""
        names = [type] if type in self.spans else [name for name, span in self.spans.items() if span.kind == type]
        if len(names) > 1:
            raise UserError(f"the bundle has several tokenizers for {type}: {', '.join(names)}; say which")
        return names[0] if names else type

    @property
    def bos(self) -> int:
        """The token that begins a document."""
        return self.specials["<bos>"]

    @property
    def eos(self) -> int:
        """The token that ends a document."""
        return self.specials["<eos>"]

    @property
    def pad(self) -> int:
        """The token that fills batches; no document holds it."""
        return self.specials["<pad>"]

    @property
    def fills(self) -> tuple[int, ...]:
        """The tokens `<fill_0>`, `<fill_1>`, … that stand for missing content (`unitok.holes`)."""
        return tuple(self.specials[name] for name in _FILLS if name in self.specials)

    @property
    def roles(self) -> tuple[int, ...]:
        """The tokens of `ROLES`, in that order; () where the vocabulary has none."""
        return tuple(self.specials[f"<{role}>"] for role in ROLES if f"<{role}>" in self.specials)

    def name_of(self, id: int) -> str:
        """Return a readable name of a token: `<image>`, `text:17` (code 17), `audio.2:5` (level 2, code 5), `grid:8` (8 codes)."""
        for name, special in self.specials.items():
            if special == id:
                return name
        for r in self.ranges:
            if r.kind != "special" and r.offset <= id < r.stop:
                position = id - r.offset
                return f"{r.name}:{(r.permutation.index(position) if r.permutation else position) + (r.kind == 'grid')}"
        return f"<reserved_{id}>"

    # ---- Documents <-> tokens ------------------------------------------------------------------------------------

    def merged(self, document: Document) -> Document:
        """Return the document with neighboring bare segments of equal role and loss as one: tokens cannot tell them apart."""
        out: list[Segment] = []
        bare = self.bare
        for s in document.segments:
            last = out[-1] if out else None
            if last and last.modality == s.modality == bare and (last.role, last.loss) == (s.role, s.loss):
                s = Segment(s.modality, np.concatenate([last.codes, s.codes]), s.role, s.loss, last.source)
                out.pop()
            out.append(s)
        return Document(tuple(out), document.id, document.source)

    def check_codes(self, segment: Segment) -> None:
        """Raise `UserError` for codes that the segment's modality does not have."""
        size = min(r.size for r in self.body(segment.modality))
        if segment.codes.min() < 0 or segment.codes.max() >= size or self.span(segment.modality).floors:
            self._span_ids(segment)

    def _span_ids(self, segment: Segment) -> np.ndarray:
        """All tokens of a segment's span, int64 [L]."""
        span, body = self.span(segment.modality), self.body(segment.modality)
        try:
            rows, sides = span.order.by_level(segment.codes)
        except UserError as error:
            raise UserError(f"{segment.modality} {error}") from None
        header = [self.range(name) for name in span.header]
        if len(segment.facts) != span.facts:
            raise UserError(f"{segment.modality}: {len(segment.facts)} facts where its header has {span.facts}")
        if any(not 0 < fact <= r.size for fact, r in zip(segment.facts, header, strict=False)):
            most = ", ".join(f"{r.name} from 1 to {r.size}" for r in header[: span.facts])
            raise UserError(f"{segment.modality}: facts {segment.facts}; its header has {most}")
        if span.group and span.sides(segment.facts)[0] != sides[0]:
            raise UserError(f"{segment.modality}: {sides[0]} grids of codes for {segment.facts[-1]} frames")
        own = sides[bool(span.group) :]  # that the header names
        if any(side > r.size for side, r in zip(own, header[span.facts :], strict=True)):
            most = " x ".join(str(r.size) for r in header[span.facts :])
            raise UserError(f"{segment.modality} codes of {segment.codes.shape}: the largest grid is {most}")
        if span.floors:
            _check_floors(span, span.order.flatten(rows))
        ids = span.order.flatten(ids_by_level(body, rows))
        values = [r.interval(value, value)[0][0] for value, r in zip((*segment.facts, *own), header, strict=True)]
        begin, end = ([self.specials[name]] if name else [] for name in (span.begin, span.end))
        return np.concatenate([np.array(begin + values, np.int64), ids, np.array(end, np.int64)])

    def body_codes(
        self, modality: str, ids: np.ndarray | list[int], sides: tuple[int, ...] = (), whole: bool = True
    ) -> np.ndarray:
        """Return the codes of a span's body, int64 in the shape of `Segment.codes`.

        Args:
            modality: of the span.
            ids: tokens of the body.
            sides: of the grid, from the header.
            whole: whether the body is complete. Else the codes are those of its complete frames or rows.

        Errors: `UserError` for tokens that are not such a body.
        """
        span, ids = self.span(modality), np.asarray(ids, np.int64)
        codes, levels, body = np.zeros(len(ids), np.int64), np.full(len(ids), -1), self.body(modality)
        if len(body) == 1 or span.shared:
            codes, levels = body[0].to_codes(ids), np.arange(len(ids)) % len(body)
            if span.floors:
                _check_floors(span, codes)
        for level, r in enumerate(body if len(set(span.body)) > 1 else ()):
            chosen = (ids >= r.offset) & (ids < r.stop)
            codes[chosen], levels[chosen] = r.to_codes(ids[chosen]), level
        read = (span.order.unflatten if whole else span.order.partial)(codes, levels, sides)
        return read if span.begin else read[0]

    def encode_placed(self, document: Document, bos: bool = True, eos: bool = True) -> tuple[np.ndarray, list[SegmentSpan]]:
        """Return a document's tokens, int64 [L], and where each of its segments is, once bare neighbors are merged.

        bos, eos: whether the tokens begin with bos and end with eos.
        """
        pieces = [np.array([self.bos])] if bos else []
        placed: list[SegmentSpan] = []
        at, role = len(pieces), "none"
        for segment in self.merged(document).segments:
            ids = self._span_ids(segment)
            if segment.role != role:
                role = segment.role
                if f"<{role}>" not in self.specials:
                    raise UserError(f"role {role!r}: this vocabulary has no tokens for roles")
                ids = np.concatenate([[self.specials[f"<{role}>"]], ids])
            pieces.append(ids)
            placed.append(SegmentSpan(segment.modality, at, len(ids), role, segment.loss, segment.source, tuple(segment.size)))
            at += len(ids)
        if eos:
            pieces.append(np.array([self.eos]))
        return np.concatenate(pieces or [np.zeros(0)]).astype(np.int64, copy=False), placed

    def encode(self, document: Document, bos: bool = True, eos: bool = True) -> np.ndarray:
        """Return a document's tokens, int64 [L]. bos, eos: whether they begin with bos and end with eos."""
        return self.encode_placed(document, bos, eos)[0]

    def decode(self, ids: np.ndarray, placed: list[SegmentSpan] | None = None, role: str = "none") -> Document:
        """Return the document of tokens [L]. Inverse of `encode` and `encode_placed`.

        Args:
            ids: the tokens, with or without bos and eos.
            placed: where the segments are; gives back what tokens cannot say (loss, source, size).
            role: at the first token, where these tokens continue others.

        Errors: `UserError` with the position of the first token that is not allowed.
        """
        ids = np.asarray(ids, np.int64)
        if placed is None:
            return self.merged(Document(tuple(self._read(ids, 0, len(ids), role))))
        segments = []
        for p in placed:
            (read,) = self._read(ids, p.start, p.start + p.length)
            segments.append(Segment(p.modality, read.codes, p.role, p.loss, p.source, tuple(p.size), facts=read.facts))
        return Document(tuple(segments))

    def _read(self, ids: np.ndarray, start: int, stop: int, role: str = "none") -> Iterator[Segment]:
        """The segments of the tokens from `start` to `stop`."""
        begins = {self.specials[s.begin]: s for s in self.spans.values() if s.begin}
        bare = self.bare
        text = self.body(bare)[0] if bare else None
        roles = dict(zip(self.roles, ROLES, strict=False))
        at = start
        while at < stop:
            id = int(ids[at])
            if (id == self.bos and at == start) or (id == self.eos and at == stop - 1):
                at += 1
            elif id in roles:
                role = roles[id]
                at += 1
            elif id in begins:
                segment, at = self._read_span(ids, at, stop, begins[id], role)
                yield segment
            elif bare and text and text.holds(ids[at]):
                others = np.flatnonzero(~text.holds(ids[at:stop]))
                end = at + int(others[0]) if len(others) else stop
                yield Segment(bare, self.body_codes(bare, ids[at:end]), role)
                at = end
            else:
                raise UserError(f"position {at}: {self.name_of(id)} cannot stand here")

    def _read_span(self, ids: np.ndarray, at: int, stop: int, span: Span, role: str) -> tuple[Segment, int]:
        """The segment whose begin token is at `at`, and the position after its end token."""
        first = at + 1 + len(span.header)
        if first > stop:
            raise UserError(f"position {at}: a {span.modality} span without its header")
        facts, sides = self.header_values(span, ids[at + 1 : first])
        most = first + span.order.length(prod(sides)) + 1 if sides else stop
        ends = np.flatnonzero(ids[first : min(most, stop)] == self.specials[span.end or ""])
        if len(ends) == 0:
            raise UserError(f"position {at}: a {span.modality} span that does not end where it must")
        last = first + int(ends[0])
        try:
            return Segment(span.modality, self.body_codes(span.modality, ids[first:last], sides), role, facts=facts), last + 1
        except UserError as error:
            raise UserError(f"position {at}: a {span.modality} span of {error}") from None

    def header_values(self, span: Span, ids: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the facts and the sides that the tokens of a span's header stand for. Errors: `UserError` for other tokens."""
        values = tuple(self.range(name).value(int(id)) for name, id in zip(span.header, ids, strict=True))
        return values[: span.facts], span.sides(values)

    def unconditional(self, span_ids: np.ndarray | tuple[int, ...] = ()) -> np.ndarray:
        """Return the tokens of a span without its condition, bos and the span: for condition dropout and classifier-free guidance."""
        return np.concatenate([[self.bos], np.asarray(span_ids, np.int64)])

    # ---- The manifest --------------------------------------------------------------------------------------------

    def to_manifest(self) -> dict[str, object]:
        """Return the vocabulary as plain types, for `vocab.json`, shards and checkpoints."""
        return {
            "version": VERSION,
            "ranges": [asdict(r) for r in self.ranges],
            "specials": self.specials,
            "spans": [asdict(s) for s in self.spans.values()],
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, object]) -> "Vocab":
        """Inverse of `to_manifest`. Errors: `UserError` for another version, and for what is no manifest."""
        if not isinstance(manifest, Mapping):
            raise UserError(f"{type_of(manifest)} where a vocabulary's ranges, specials and spans should be")
        if manifest.get("version") != VERSION:
            raise UserError(f"a vocabulary of version {manifest.get('version')}; this unitok reads version {VERSION}")

        def tuples(row: Mapping[str, object]) -> dict[str, Any]:
            return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}

        try:
            rows, parts, specials = (manifest[key] for key in ("ranges", "spans", "specials"))
            if not (isinstance(rows, list) and isinstance(parts, list) and isinstance(specials, dict)):
                raise UserError("not a vocabulary manifest: its ranges and spans are lists, its specials an object")
            ranges, spans = [Range(**tuples(row)) for row in rows], [Span(**tuples(part)) for part in parts]
            if len({s.modality for s in spans}) < len(spans):
                raise UserError("a modality is declared twice")
            return cls(ranges, dict(specials), {s.modality: s for s in spans})
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"not a vocabulary manifest ({type(error).__name__}: {error})") from None

    def save(self, path: Path) -> None:
        """Write `vocab.json`."""
        Path(path).write_text(json.dumps(self.to_manifest(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Vocab":
        """Read `vocab.json`. Inverse of `save`. Errors: `UserError` naming the file."""
        try:
            return cls.from_manifest(read_json(path, "a vocabulary is made with its bundle"))
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    def check_covers(self, older: "Vocab", mine: str, theirs: str) -> None:
        """Raise `UserError` unless every token of `older` means the same here. mine, theirs: names of the two for the message."""
        for a, b in zip(older.ranges, [*self.ranges, None][: len(older.ranges)], strict=False):
            if a != b:
                raise UserError(
                    f"the vocabularies differ: {theirs} has range {a.name!r} of {a.size} tokens at {a.offset}, "
                    f"{mine} has {f'{b.name!r} of {b.size} at {b.offset}' if b else 'no such range'}; use the bundle "
                    f"that made the data"
                )
        if len(older.ranges) > len(self.ranges):
            raise UserError(
                f"the vocabularies differ: {theirs} has ranges that {mine} lacks; use the bundle that made the data"
            )
        for name, id in older.specials.items():
            if self.specials.get(name) != id:
                raise UserError(
                    f"the vocabularies differ: {name} is token {id} in {theirs}, {self.specials.get(name)} in {mine}"
                )
        for modality, span in older.spans.items():
            other = self.spans.get(modality)
            if other != span:
                raise UserError(
                    f"the vocabularies differ in {modality}: tokenizer {span.fingerprint[:12] or '(none)'} in {theirs}, "
                    f"{(other.fingerprint[:12] or '(none)') if other else 'absent'} in {mine}; use the bundle that made the data"
                )


def _check_floors(span: Span, codes: np.ndarray) -> None:
    """Raise `UserError` for codes [n] of a body with floors, in order, of which one is below its floor."""
    index = np.arange(len(codes))
    of_unit = index % len(span.floors)
    floors = codes[index - of_unit + np.array(span.floors)[of_unit]]
    if len(low := np.flatnonzero(codes < floors)):
        raise UserError(f"{span.modality}: code {codes[low[0]]} is below {floors[low[0]]}, its unit's least")
