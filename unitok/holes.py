"""Holes: documents of which some content is missing, and what belongs there after them.

    <bos> a <fill_0> circle <image> 8 8 … <fill_1> <fill_1> … </image> <fill_0> red <fill_1> code code … <eos>

A run of text is one token `<fill_i>`; each code that is missing in an image or audio is one, so that no position moves, and the span
says how long a hole is. After the last span come `<fill_i>` and what belongs there, hole by hole: codes in their order, or text up to the
next `<fill_i>` or eos. Nothing is tokenized again: what is outside the holes keeps its tokens, and `mend` is the inverse of `punch`.

A span position in the second part is that of the place before the code to be predicted, as it is everywhere else: so the model knows
which code comes next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from unitok.errors import UserError
from unitok.location import located
from unitok.vocab import SegmentSpan, Vocab


@dataclass(frozen=True)
class Hole:
    """What is missing at one place.

    Args:
        modality: of the span that it is in.
        positions: int64 [n], positions of its fill tokens; of text one.
        levels: int64 [n], the level of each missing code; None: text, of any length.
        before: int64 [n], the span position before each missing code.
    """

    modality: str
    positions: np.ndarray
    levels: np.ndarray | None
    before: np.ndarray


def find_holes(vocab: Vocab, ids: np.ndarray) -> tuple[list[Hole], int]:
    """Return the holes of tokens [L] in the order of their numbers, and the position where what belongs there begins (L: nowhere).

    Errors: `UserError` for fill tokens that `punch` does not write.
    """
    ids = np.asarray(ids, np.int64)
    fills = vocab.fills
    at = np.flatnonzero((ids >= min(fills)) & (ids <= max(fills))) if fills else np.zeros(0, np.int64)
    at = at[np.isin(ids[at], fills)] if len(at) else at  # `isin` of all ids is slow, and few have a hole
    if not len(at):
        return [], len(ids)
    numbers = {id: number for number, id in enumerate(fills)}
    inside: dict[int, list[int]] = {}  # positions in images and audio, by number
    outside: dict[int, int] = {}  # positions of text, by number
    start, begin, spans = len(ids), -1, {vocab.specials[s.begin]: s for s in vocab.spans.values() if s.begin}
    ends = {vocab.specials[s.end] for s in vocab.spans.values() if s.end}
    bounds = np.flatnonzero(np.isin(ids, [*spans, *ends]))
    marks = sorted([*((int(i), 0) for i in bounds), *((int(i), 1) for i in at)])
    begins: dict[int, int] = {}
    for position, is_fill in marks:
        id = int(ids[position])
        if not is_fill:
            begin = position if id in spans else -1
        elif begin >= 0:
            inside.setdefault(numbers[id], []).append(position)
            if begins.setdefault(numbers[id], begin) != begin:
                raise UserError(f"position {position}: {vocab.name_of(id)} is in two spans")
        elif numbers[id] in inside or numbers[id] in outside:
            start = position
            break
        else:
            outside[numbers[id]] = position
    found = []
    for number in range(len(inside) + len(outside)):
        if number in outside and number not in inside:
            found.append(Hole(vocab.bare or "", np.array([outside[number]]), None, np.zeros(0, np.int64)))
        elif number in inside and number not in outside:
            found.append(_hole_in(vocab, ids, begins[number], np.array(inside[number])))
        else:
            raise UserError(f"<fill_{number}>: holes are numbered from 0, and each is at one place")
    return found, start


def _hole_in(vocab: Vocab, ids: np.ndarray, begin: int, places: np.ndarray) -> Hole:
    """The hole of fill tokens in the span that begins at `begin`."""
    span = next(s for s in vocab.spans.values() if s.begin and vocab.specials[s.begin] == ids[begin])
    first, levels, _ = body_of(vocab, ids, begin)
    sides = vocab.header_values(span, ids[begin + 1 : first])[1]
    if places[0] < first or places[-1] >= first + len(levels):
        raise UserError(f"position {places[0]}: a hole outside of the codes of {span.modality}")
    return Hole(span.modality, places, levels[places - first], located(span, places - begin, sides))


def body_of(vocab: Vocab, ids: np.ndarray, begin: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Return of the span that begins at a position: the position of its first code, and the level and the unit of each of its codes,
    int64 [n] each. Errors: `UserError` for a span that does not end where it must."""
    span = next(s for s in vocab.spans.values() if s.begin and vocab.specials[s.begin] == ids[begin])
    first = begin + 1 + len(span.header)
    sides = vocab.header_values(span, ids[begin + 1 : first])[1]
    ends = np.flatnonzero(ids[first:] == vocab.specials[span.end or ""])
    count = int(ends[0]) if len(ends) else 0
    units = prod(sides) if sides else count // len(span.body)
    if not count or span.order.length(units) != count:
        raise UserError(f"position {begin}: a {span.modality} span that does not end where it must")
    return first, *span.order.levels_and_units(units)


def punch(vocab: Vocab, ids: np.ndarray, holes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a document [L] with holes, and for each the position that it comes from, -1 for fill tokens.

    holes: positions of the tokens that are missing, for each hole in the order of the document: a run of text, or codes of one image or
        audio. Errors: `UserError` for more holes than there are fill tokens.
    """
    if len(holes) > len(vocab.fills):
        raise UserError(f"{len(holes)} holes: there are tokens for {len(vocab.fills)}")
    bare = vocab.body(vocab.bare)[0] if vocab.bare else None
    out, origin = ids.copy(), np.arange(len(ids))
    keep, inserted, sources = np.ones(len(ids), bool), [], []
    keep[-1] = False  # eos stands after what belongs there
    for number, hole in enumerate(holes):
        fill = vocab.fills[number]
        out[hole], origin[hole] = fill, -1
        if bare is not None and bare.holds(ids[hole[:1]])[0]:
            keep[hole[1:]] = False
        inserted.append(np.concatenate([[fill], ids[hole]]))
        sources.append(np.concatenate([[-1], hole]))
    made = np.concatenate([out[keep], *inserted, ids[-1:]])
    return made.astype(np.int64), np.concatenate([origin[keep], *sources, [len(ids) - 1]]).astype(np.int64)


def split_fills(vocab: Vocab, ids: np.ndarray, start: int, count: int | None) -> list[np.ndarray]:
    """Return what belongs into each of `count` holes (None: as far as it goes), of tokens [L] whose second part begins at `start`.

    Errors: `UserError` for another number of pieces.
    """
    rest = ids[start:]
    rest = rest[:-1] if len(rest) and rest[-1] == vocab.eos else rest
    firsts = np.flatnonzero(np.isin(rest, vocab.fills))
    if len(firsts) != (len(firsts) if count is None else count) or rest[firsts].tolist() != list(vocab.fills[: len(firsts)]):
        raise UserError(f"position {start}: {len(firsts)} pieces for {count} holes")
    return [rest[a + 1 : b] for a, b in zip(firsts, [*firsts[1:], len(rest)], strict=True)]


def mend(vocab: Vocab, ids: np.ndarray) -> np.ndarray:
    """Return the document of tokens [L] with holes, each filled with what belongs there. Inverse of `punch`. Errors: `UserError`."""
    ids = np.asarray(ids, np.int64)
    holes, start = find_holes(vocab, ids)
    pieces = [ids[i : i + 1] for i in range(start)]
    for number, (hole, content) in enumerate(zip(holes, split_fills(vocab, ids, start, len(holes)), strict=True)):
        if hole.levels is None:
            pieces[int(hole.positions[0])] = content
        elif len(content) != len(hole.positions):
            raise UserError(f"<fill_{number}>: {len(content)} codes for a hole of {len(hole.positions)}")
        else:
            for place, code in zip(hole.positions.tolist(), content, strict=True):
                pieces[place] = np.array([code])
    return np.concatenate([*pieces, [vocab.eos]]).astype(np.int64)


def span_positions_of_fills(vocab: Vocab, ids: np.ndarray, holes: Sequence[Hole], start: int) -> np.ndarray:
    """Return the span positions of the tokens [L] from `start` on, int64 [L - start]."""
    out = np.zeros(len(ids) - start, np.int64)
    firsts = np.flatnonzero(np.isin(ids[start:], vocab.fills))
    for hole, first in zip(holes, firsts.tolist(), strict=False):
        if hole.levels is not None:
            known = hole.before[: len(out) - first]
            out[first : first + len(known)] = known
    return out


def random_holes(
    vocab: Vocab, ids: np.ndarray, placed: Sequence[SegmentSpan], rng: np.random.Generator, most: int = 2
) -> list[np.ndarray]:
    """Return random holes in a document [L], for `punch`: runs of text, rectangles of images, stretches of audio, in learned segments.

    placed: its segments. most: of holes, each in another segment.
    """
    learned = [number for number, p in enumerate(placed) if p.loss]
    chosen = sorted(rng.permutation(len(learned))[: int(rng.integers(1, most + 1))].tolist())
    holes = []
    for p in (placed[learned[i]] for i in chosen):
        span = vocab.span(p.modality)
        if not span.begin:
            text = np.flatnonzero(vocab.body(p.modality)[0].holds(ids[p.start : p.start + p.length])) + p.start
            count = int(rng.integers(1, max(1, len(text) // 2) + 1))
            at = int(rng.integers(len(text) - count + 1))
            holes.append(text[at : at + count])
        elif not span.floors:
            begin = p.start + int(ids[p.start] != vocab.specials[span.begin])  # after the token of a role
            first, _, units = body_of(vocab, ids, begin)
            sides = vocab.header_values(span, ids[begin + 1 : first])[1]
            inside = np.isin(units, np.flatnonzero(_random_block(sides or (int(units[-1]) + 1,), rng)))
            holes.append(first + np.flatnonzero(inside))
    return holes


def _random_block(sides: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A random block of a grid, as bool [prod(sides)]."""
    block = np.ones(sides, bool)
    for axis, side in enumerate(sides):
        length = int(rng.integers(1, side + 1))
        at = int(rng.integers(side - length + 1))
        outside = np.ones(side, bool)
        outside[at : at + length] = False
        block[(slice(None),) * axis + (outside,)] = False
    return block.reshape(-1)
