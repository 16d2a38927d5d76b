"""The KV cache: keys and values of the positions that a decoder has read.

A slot is the room of one document in the cache. Letters as in `decoder.py`, and L for the positions of the cache.
"""

import numpy as np
import torch
from torch import Tensor

from unitok.model.decoder import DecoderConfig


class Cache:
    """Keys and values of past positions, each [layers, B, G, L, D], written in place.

    The B slots may be at different positions. What lies beyond a slot's position is never read, so a slot is rewound by writing again
    from an earlier position.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    @classmethod
    def empty(cls, c: DecoderConfig, slots: int, length: int, device: torch.device, dtype: torch.dtype) -> "Cache":
        """A cache of a decoder with so many slots, each of at most `length` positions."""
        shape = (c.num_hidden_layers, slots, c.num_key_value_heads, length, c.head_dim)
        return cls(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))

    @property
    def slots(self) -> int:
        """Number of slots, B."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Number of positions of each slot, L."""
        return self.keys.shape[3]

    def part(self, start: int, stop: int) -> "Cache":
        """The slots from `start` to `stop`, in the same memory."""
        return Cache(self.keys[:, start:stop], self.values[:, start:stop])

    def take(self, other: "Cache", source: int, target: int, length: int, count: int = 1) -> None:
        """Copy the first `length` positions of `count` slots of `other` from `source` on to those from `target` on.

        other: may be this cache, where the slots do not overlap.
        """
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, target : target + count, :, :length] = theirs[:, source : source + count, :, :length]

    def grown(self, slots: int, length: int) -> "Cache":
        """A larger cache with the same content."""
        old = (self.keys, self.values)
        new = [torch.zeros((k.shape[0], slots, k.shape[2], length, k.shape[4]), dtype=k.dtype, device=k.device) for k in old]
        for a, b in zip(old, new, strict=True):
            b[:, : a.shape[1], :, : a.shape[3]] = a
        return Cache(*new)


def common_start(positions: np.ndarray, cache: Cache) -> int | None:
    """Return the first of positions [slots, T] if all slots share it and the cache has room for all T; else None."""
    first = int(positions[0, 0])
    return first if (positions[:, 0] == first).all() and first + positions.shape[1] <= cache.length else None
