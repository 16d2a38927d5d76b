"""Layouts: the order of the codes in a span's body, one token per code. No other file computes with levels.

K is the number of levels (codebooks). N is the number of *units*, each of which has one code per level: frames of audio, cells of a
grid, pieces of text. `count` is the number of the body's codes so far. `units` is N, or None while N is open; then the body may end,
or begin to end, wherever another unit may begin. `sides` are the sides of a grid, from its header; () without a header.
"""

from bisect import bisect
from functools import lru_cache
from math import prod

import numpy as np

from unitok.errors import UserError


class Interleaved:
    """All levels of a unit, then those of the next one: codes [K, N]. With one level codes of any shape, which come back as [1, N].

    levels: K. dimensions: number of a grid's sides, 0 without a header.
    """

    delay = 0  # steps by which each level is later than the level before

    def __init__(self, levels: int, dimensions: int = 0):
        self.levels, self.dimensions = levels, dimensions
        # Where the first K steps begin; later steps hold all levels.
        self._steps = [self.prefix(step) for step in range(levels)]
        self._starts = np.isin(np.arange(self._steps[-1] + levels), self._steps)

    def by_level(self, codes: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
        """Return codes as [K, N], and the sides of their grid. Errors: `UserError` for another shape."""
        rows = codes.reshape(1, -1) if self.levels == 1 else codes
        if rows.ndim != 2 or len(rows) != self.levels:
            raise UserError(f"codes need {self.levels} levels, got {codes.shape}")
        return rows, ()

    def flatten(self, rows: np.ndarray) -> np.ndarray:
        """Return what `by_level` gives, codes or their tokens [K, N], in order; int64 [K * N]. For the level of each see `levels_and_units`."""
        return rows[_order(self.levels, rows.shape[1], self.delay)] if self.delay else rows.T.reshape(-1)

    def unflatten(self, codes: np.ndarray, levels: np.ndarray, sides: tuple[int, ...] = ()) -> np.ndarray:
        """Inverse of `flatten`. Errors: `UserError` for codes and levels that `flatten` does not return."""
        units = prod(sides) if sides else max(1, len(codes) // self.levels)
        if self.levels == 1 and len(codes) == units:
            return codes.reshape(sides or (1, -1))
        if not np.array_equal(levels, _order(self.levels, units, self.delay)[0]):
            raise UserError(f"{len(codes)} codes, not whole repetitions of {self.levels} in order")
        return self.partial(codes, levels, sides)

    def partial(self, codes: np.ndarray, levels: np.ndarray, sides: tuple[int, ...] = ()) -> np.ndarray:
        """Return the complete units (of a grid: rows) of a body's first codes [n] and their levels [n], in the shape of `unflatten`."""
        rows = [codes[levels == level] for level in range(self.levels)]
        whole = min(map(len, rows)) // prod(sides[1:]) * prod(sides[1:])
        shaped = np.stack([row[:whole] for row in rows]).reshape(self.levels, -1, *sides[1:])
        return shaped[0] if sides and self.levels == 1 else shaped

    def levels_and_units(self, units: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the level and the unit of each code of a body, int64 [K * N] both."""
        return _order(self.levels, units, self.delay)

    def length(self, units: int) -> int:
        """Return the number of codes of that many units."""
        return units * self.levels

    def prefix(self, units: int) -> int:
        """Return the number of codes before the first code of unit number `units`, counted from 0."""
        return sum(max(0, units - level * self.delay) for level in range(self.levels))

    def begun(self, codes: np.ndarray, fraction: float) -> int:
        """Return the number of codes that hold the first `fraction` of the units (of a grid: rows), at least one of them."""
        rows, sides = self.by_level(codes)
        along, *across = sides or rows.shape[1:]
        return self.prefix(max(1, round(fraction * along)) * prod(across))

    def period(self, sides: tuple[int, ...]) -> int:
        """Return the distance in codes to the same level in the unit before; in a grid, to the cell in the row above."""
        return self.length(sides[-1] if sides else 1)

    def _at(self, count: int) -> tuple[int, int]:
        """The step of the next code, and its index in that step, while N is open."""
        if count >= self._steps[-1]:
            steps, level = divmod(count - self._steps[-1], self.levels)
            return self.levels - 1 + steps, level
        step = bisect(self._steps, count) - 1
        return step, count - self._steps[step]

    def fewest(self, count: int) -> int:
        """Return the smallest possible N while it is open: all units that have begun, at least one."""
        step, level = self._at(count)
        return max(1, step + (level > 0))

    def least(self, count: int, units: int | None = None) -> int:
        """Return the smallest number of codes still to come; where it is 0, the body may end."""
        return self.length(self.fewest(count) if units is None else units) - count

    def choices(self, count: int, units: int | None = None) -> dict[int, int | None]:
        """Return the levels that the next code may have, each with the `units` that are known after it; {} at the end of the body."""
        if units is not None:
            if not self.delay:
                return {count % self.levels: units} if count < self.length(units) else {}
            return dict.fromkeys(_order_of_few(self.levels, units, self.delay)[0][count : count + 1].tolist(), units)
        step, level = self._at(count)
        tail = self.delay and self.levels > 1 and count and level == 0
        return {0: None, 1: step} if tail else {level: None}

    def until_choice(self, count: int) -> int:
        """Return the number of codes until another unit may begin or the body may end, while N is open."""
        step, level = self._at(count)
        return self.prefix(step + 1) - count if level or not count else 0

    def is_choice(self, counts: np.ndarray) -> np.ndarray:
        """Return where another unit may begin or the body may end, while N is open, as bool of the same shape."""
        first = self._steps[-1]
        choices: np.ndarray = (counts > 0) & self._starts[
            np.minimum(counts, first) + np.maximum(counts - first, 0) % self.levels
        ]
        return choices


class Raster(Interleaved):
    """A grid after a header, row by row: codes [h, w] of one level, [K, h, w] of several; a grid may have other numbers of sides."""

    def by_level(self, codes: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
        grid = codes[None] if self.levels == 1 else codes
        if grid.ndim != 1 + self.dimensions or len(grid) != self.levels:
            levels = f"{self.levels} levels and " if self.levels > 1 else ""
            raise UserError(f"codes need {levels}{self.dimensions} dimensions, got {codes.shape}")
        return grid.reshape(self.levels, -1), grid.shape[1:]


class Delayed(Interleaved):
    """Level k is k steps late (Copet et al. 2023, "MusicGen", section 2.2), without padding: codes [K, N].

    Step t holds, in order, level k of unit t - k for all k with 0 <= t - k < N. Step N begins with level 1 instead of level 0, which
    fixes N.
    """

    delay = 1


def _order(levels: int, units: int, delay: int) -> tuple[np.ndarray, np.ndarray]:
    """The level and the unit of each code in order, int64 [K * N] both."""
    if not delay or levels == 1:
        return np.tile(np.arange(levels), units), np.repeat(np.arange(units), levels)
    level, unit = (x.ravel() for x in np.mgrid[:levels, :units])
    order = np.argsort(unit + delay * level, kind="stable")
    return level[order], unit[order]


@lru_cache(16)
def _order_of_few(levels: int, units: int, delay: int) -> tuple[np.ndarray, np.ndarray]:
    """The same from a cache, for sampling, which asks for one position after the other."""
    return _order(levels, units, delay)


LAYOUTS: dict[str, type[Interleaved]] = {"raster": Raster, "interleaved": Interleaved, "delayed": Delayed}
