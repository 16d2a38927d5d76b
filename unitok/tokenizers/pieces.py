"""Signals of any length in pieces: consecutive blocks [..., t] are cut into pieces or windows of another length, and
added up."""

import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def batches(segments: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Yield consecutive segments of equal shape in lists of at most `most`."""
    for _, alike in itertools.groupby(segments, lambda segment: segment.shape):
        while some := list(itertools.islice(alike, most)):
            yield some


def cut(blocks: Iterable[Tensor], length: int) -> Iterator[tuple[Tensor, bool]]:
    """Yield blocks [..., t] in pieces of at most `length`, each with whether it is the last one."""
    held: Tensor | None = None
    for block in blocks:
        for piece in block.split(length, -1):
            if held is not None:
                yield held, False
            held = piece
    if held is not None:
        yield held, True


def windows(blocks: Iterable[Tensor], length: int, margin: int, unit: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield overlapping windows over consecutive blocks [..., t]: the window, the length of its left margin, and the number of
    units in its core (0: up to the end).

    Cores have `length` samples and do not overlap; windows extend `margin` beyond them on both sides. Both are multiples of
    `unit`.
    """
    held: Tensor | None = None
    left = 0
    for block in blocks:
        held = block if held is None else torch.cat([held, block], -1)
        while held.shape[-1] > left + length + margin:
            yield held[..., : left + length + margin], left, length // unit
            keep = max(0, left + length - margin)
            held, left = held[..., keep:], left + length - keep
    if held is not None and held.shape[-1] > left:
        yield held, left, 0


def add_signals(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of two signals [..., t] that begin together; the shorter one is padded with zeros."""
    longest = max(a.shape[-1], b.shape[-1])
    a, b = (F.pad(x, (0, longest - x.shape[-1])) for x in (a, b))
    return a + b
