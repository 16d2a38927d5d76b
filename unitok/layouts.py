"""Layouts: the order in which the codes of a span's body stand, one token each. No other file computes with levels.

K is the number of levels (codebooks), N that of *units*, which have a code per level: frames, cells of a grid, pieces of text.
`count` is how many codes of the body have come. `units` is N, or None while it is open: then the body may end, or begin to end,
wherever another unit may begin. `sides` are those of a grid, from its header; () without one.
"""

from bisect import bisect
from functools import lru_cache
from math import prod

import numpy as np

from unitok.errors import UserError


class Interleaved:
    """Unit by unit: codes [K, N]. With one level, codes of any shape, which come back as [1, N]."""

    delay = 0  # steps that each level is later than the one before

    def __init__(self, levels: int, dimensions: int = 0):
        self.levels, self.dimensions = levels, dimensions
        self._steps = [self.prefix(step) for step in range(levels)]  # where the first ones begin; later ones hold all levels

    def by_level(self, codes: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
        """Codes as [K, N], and their sides. Errors: `UserError` for another shape."""
        rows = codes.reshape(1, -1) if self.levels == 1 else codes
        if rows.ndim != 2 or len(rows) != self.levels:
            raise UserError(f"codes need {self.levels} levels, got {codes.shape}")
        return rows, ()

    def flatten(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes -> the same in order, and the level of each, [K * N] both."""
        rows = self.by_level(codes)[0]
        levels, units = _order(self.levels, rows.shape[1], self.delay)
        return (rows[levels, units] if self.delay else rows.T.reshape(-1)), levels

    def unflatten(self, codes: np.ndarray, levels: np.ndarray, sides: tuple[int, ...] = ()) -> np.ndarray:
        """Inverse of `flatten`. Errors: `UserError` for what no codes flatten to."""
        units = prod(sides) if sides else max(1, len(codes) // self.levels)
        if self.levels == 1 and len(codes) == units:
            return codes.reshape(sides or (1, -1))
        if not np.array_equal(levels, _order(self.levels, units, self.delay)[0]):
            raise UserError(f"{len(codes)} codes, not whole repetitions of {self.levels} in order")
        return self.partial(codes, levels, sides)

    def partial(self, codes: np.ndarray, levels: np.ndarray, sides: tuple[int, ...] = ()) -> np.ndarray:
        """Whole units (rows of a grid) of a body's first codes [n], of levels [n], in the shape that `unflatten` gives."""
        rows = [codes[levels == level] for level in range(self.levels)]
        whole = min(map(len, rows)) // prod(sides[1:]) * prod(sides[1:])
        shaped = np.stack([row[:whole] for row in rows]).reshape(self.levels, -1, *sides[1:])
        return shaped[0] if sides and self.levels == 1 else shaped

    def length(self, units: int) -> int:
        """Codes of so many units."""
        return units * self.levels

    def prefix(self, units: int) -> int:
        """Codes that stand before the first one of another unit."""
        return sum(max(0, units - level * self.delay) for level in range(self.levels))

    def begun(self, codes: np.ndarray, share: float) -> int:
        """How many codes of a body begin it with a share of its units (rows of a grid), at least one."""
        rows, sides = self.by_level(codes)
        along, *across = sides or rows.shape[1:]
        return self.prefix(max(1, round(share * along)) * prod(across))

    def period(self, sides: tuple[int, ...]) -> int:
        """Codes from one to its like in the unit before, in a grid in the row above."""
        return self.length(sides[-1] if sides else 1)

    def _at(self, count: int) -> tuple[int, int]:
        """The step that the next code stands in, and its level, where N is open."""
        if count >= self._steps[-1]:
            steps, level = divmod(count - self._steps[-1], self.levels)
            return self.levels - 1 + steps, level
        step = bisect(self._steps, count) - 1
        return step, count - self._steps[step]

    def fewest(self, count: int) -> int:
        """N, at least, where it is open: one unit, and all that have begun."""
        step, level = self._at(count)
        return max(1, step + (level > 0))

    def least(self, count: int, units: int | None = None) -> int:
        """Codes that are still to come, at least; where it is 0 the body may end."""
        return self.length(self.fewest(count) if units is None else units) - count

    def choices(self, count: int, units: int | None = None) -> dict[int, int | None]:
        """The levels that the next code may be of, and `units` as it is known after each."""
        if units is not None:
            if not self.delay:
                return {count % self.levels: units} if count < self.length(units) else {}
            return dict.fromkeys(_order_of_few(self.levels, units, self.delay)[0][count : count + 1].tolist(), units)
        step, level = self._at(count)
        tail = self.delay and self.levels > 1 and count and level == 0
        return {0: None, 1: step} if tail else {level: None}

    def until_choice(self, count: int) -> int:
        """Codes until another unit may begin or not, where N is open."""
        step, level = self._at(count)
        return self.prefix(step + 1) - count if level or not count else 0

    def is_choice(self, counts: np.ndarray) -> np.ndarray:
        """bool, of the same shape: whether another unit may begin there or not, where N is open."""
        first = self._steps[-1]
        starts = np.isin(np.arange(first + self.levels), self._steps)
        return (counts > 0) & starts[np.minimum(counts, first) + np.maximum(counts - first, 0) % self.levels]


class Raster(Interleaved):
    """A grid behind a header, cell by cell: codes [h, w] (or with other numbers of sides), of several levels [K, h, w]."""

    def by_level(self, codes: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
        grid = codes[None] if self.levels == 1 else codes
        if grid.ndim != 1 + self.dimensions or len(grid) != self.levels:
            levels = f"{self.levels} levels and " if self.levels > 1 else ""
            raise UserError(f"codes need {levels}{self.dimensions} dimensions, got {codes.shape}")
        return grid.reshape(self.levels, -1), grid.shape[1:]


class Delayed(Interleaved):
    """Level k is k steps late (Copet et al. 2023, "MusicGen", section 2.2), without padding: codes [K, N].

    At step t stand the levels k with 0 <= t - k < N in order. At step N level 1 stands in place of level 0, which tells N.
    """

    delay = 1


def _order(levels: int, units: int, delay: int) -> tuple[np.ndarray, np.ndarray]:
    """The level and the unit of each code, int64 [K * N] both."""
    if not delay or levels == 1:
        return np.tile(np.arange(levels), units), np.repeat(np.arange(units), levels)
    level, unit = (x.ravel() for x in np.mgrid[:levels, :units])
    order = np.argsort(unit + delay * level, kind="stable")
    return level[order], unit[order]


@lru_cache(16)
def _order_of_few(levels: int, units: int, delay: int) -> tuple[np.ndarray, np.ndarray]:
    """The same, kept: of plans, whose positions are asked for one by one."""
    return _order(levels, units, delay)


LAYOUTS: dict[str, type[Interleaved]] = {"raster": Raster, "interleaved": Interleaved, "delayed": Delayed}
