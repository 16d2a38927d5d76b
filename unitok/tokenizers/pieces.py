"""Signals of any length, piece by piece: blocks [..., t] that come one after the other, cut anew."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def batches(segments: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Segments that follow one another and have equal shapes, `most` at a time."""
    for _, alike in itertools.groupby(segments, lambda segment: segment.shape):
        while some := list(itertools.islice(alike, most)):
            yield some


def cut(blocks: Iterable[Tensor], length: int) -> Iterator[tuple[Tensor, bool]]:
    """Blocks [..., t] in pieces of at most `length`, each with whether it is the last."""
    held: Tensor | None = None
    for block in blocks:
        for piece in block.split(length, -1):
            if held is not None:
                yield held, False
            held = piece
    if held is not None:
        yield held, True


def windows(blocks: Iterable[Tensor], length: int, margin: int, unit: int) -> Iterator[tuple[Tensor, int, int]]:
    """Windows over blocks [..., t]: each with what is before its core in it, and the units its core has (0: to the end).

    Cores of `length` follow one another; windows reach `margin` further on both sides. Both are multiples of `unit`.
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
