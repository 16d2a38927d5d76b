"""Sets of tokens as half-open intervals, and what is asked of them."""

from collections.abc import Iterable
from typing import Any

#: A set of tokens: intervals [a, b), ascending and apart. It is small and hashable, so equal sets can share what is made of them.
Intervals = tuple[tuple[int, int], ...]


def join_intervals(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """Sorted, with touching intervals joined, so that equal sets are equal tuples."""
    out: list[tuple[int, int]] = []
    for a, b in sorted(intervals):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return tuple(out)


def size_of(intervals: Iterable[tuple[int, int]]) -> int:
    """How many tokens there are in a set."""
    return sum(b - a for a, b in intervals)


def holds(intervals: Iterable[tuple[int, int]], ids: Any) -> Any:
    """Which ids are in a set: bool of an int; of an array or a tensor one of its shape."""
    found = False
    for a, b in intervals:
        found = found | ((ids >= a) & (ids < b))
    return found
