"""Sets of tokens as half-open intervals [a, b): union, size, membership."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

#: A set of tokens: intervals [a, b), ascending and disjoint. It is small and hashable, so equal sets can share what is computed for them.
Intervals = tuple[tuple[int, int], ...]


def join_intervals(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """Return the union of intervals, which may overlap: sorted, with touching intervals joined, so that equal sets are equal tuples."""
    out: list[tuple[int, int]] = []
    for a, b in sorted(intervals):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return tuple(out)


def size_of(intervals: Iterable[tuple[int, int]]) -> int:
    """Return the number of tokens in a set."""
    return sum(b - a for a, b in intervals)


def run_of(intervals: Iterable[tuple[int, int]], ids: Sequence[int], start: int) -> int:
    """Return how many of the ids from index `start` on are in a set without a gap."""
    return next((i for i in range(start, len(ids)) if not holds(intervals, ids[i])), len(ids)) - start


@overload
def holds(intervals: Iterable[tuple[int, int]], ids: int) -> bool: ...
@overload
def holds(intervals: Iterable[tuple[int, int]], ids: np.ndarray) -> np.ndarray: ...
@overload
def holds(intervals: Iterable[tuple[int, int]], ids: "Tensor") -> "Tensor": ...
def holds(intervals: Iterable[tuple[int, int]], ids: "int | np.ndarray | Tensor") -> "bool | np.ndarray | Tensor":
    """Return which tokens are in a set: a bool for an int, a bool array or tensor of the same shape for an array or tensor."""
    inside = ids != ids
    for a, b in intervals:
        inside = inside | ((ids >= a) & (ids < b))
    return inside
