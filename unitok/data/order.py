"""Random orders and chances that are computed for any position alone, without those before it."""

from collections.abc import Sequence

import numpy as np


def shuffled(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Where a random permutation of `size` things takes positions [N], computed for these alone; int64 [N]. key: decides the permutation.

    A Feistel network of eight rounds (Luby and Rackoff 1988), repeated for what it takes out of range (Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out, outside = positions.astype(np.uint64), np.arange(len(positions))
    while len(outside):
        left, right = out[outside] >> half, out[outside] & mask
        for round_key in np.random.default_rng(key).integers(0, 1 << 63, 8, dtype=np.uint64):
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        out[outside] = left << half | right
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def chances_of(positions: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """Two random numbers in [0, 1) for each position [N] -> [N, 2]. key: decides them."""
    keys = np.random.default_rng(key).integers(0, 1 << 63, 2, dtype=np.uint64)
    return (_mixed(positions.astype(np.uint64)[:, None] ^ keys) >> np.uint64(11)) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's hash of uint64 (Steele, Lea and Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
