"""Span positions (`unitok.span_positions`) of the tokens of a document, from the declarations of a vocabulary."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from unitok.ranges import Span
from unitok.span_positions import AXES
from unitok.vocab import Vocab

Positions = TypeVar("Positions", int, np.ndarray)


def located(span: Span, positions: Positions, sides: Sequence[Positions] | Sequence[int]) -> Positions:
    """Return positions in a span, from 1, with frame, row and column. sides: of the grid, as far as the header tells them."""
    index = positions - 2 - len(span.header)  # of the code in the body
    if not sides:
        frame, row = index // len(span.body), index % len(span.body)
        column = 0 * row
    else:
        columns, rows = sides[-1], sides[-2] if len(sides) > 1 else 1
        cell = index // len(span.body)
        row, column = cell // columns, cell % columns
        frame, row = row // rows, row % rows
    axes = sum(((n + 1) & most) << at for (at, most), n in zip(AXES, (frame, row, column), strict=True))
    return positions + (index >= 0) * axes


def locate_all(vocab: Vocab, ids: np.ndarray, spans: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the positions of the tokens [L] of a document with frame, row and column. spans: the number of the span around each token.
    positions: in it, 0 outside."""
    out = positions.copy()
    for number, span in enumerate(vocab.spans.values()):
        chosen = np.flatnonzero((spans == number) & (positions > 0)) if span.begin else ()
        if len(chosen):
            at = positions[chosen]
            stop = chosen - at + 2 + len(span.header)  # of the header; one that is cut off tells nothing, but then nothing asks
            last = range(min(2, len(span.header) - span.facts), 0, -1)
            sides = [vocab.range(span.header[-k]).values(ids[np.minimum(stop - k, len(ids) - 1)]) for k in last]
            out[chosen] = located(span, at, [np.maximum(side, 1) for side in sides])
    return out
