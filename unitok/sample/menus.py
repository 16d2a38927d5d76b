"""Legal sets as rows of the head: only those that some request may choose are multiplied, on the device."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unitok.grammar import Intervals, join_intervals
from unitok.model.inference import InferenceDecoder, Matrix

MENUS = 256  # batches' legal sets that are kept


class Menu(NamedTuple):
    """The rows of the head that a batch may choose from."""

    head: Matrix  # [n, C]
    size: int  # n
    ids: Tensor | int  # [n], or what to add to an index
    mask: Tensor | None  # bool [B, n]: which are not allowed; None: all are

    def name(self, index: Tensor) -> Tensor:
        """Indices in the menu -> ids."""
        return index + self.ids if isinstance(self.ids, int) else self.ids[index]

    def among(self, x: Tensor) -> Tensor:
        """[B, V] -> the menu's columns [B, n]."""
        return x[:, self.ids : self.ids + self.size] if isinstance(self.ids, int) else x[:, self.ids]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, C] -> [B, n] in fp32, those that are not allowed at -inf."""
        logits = self.head(hidden).float()
        return logits if self.mask is None else logits.masked_fill(self.mask, -torch.inf)


class Menus:
    """Menus of a decoder, made when they are first asked for."""

    def __init__(self, decoder: InferenceDecoder):
        self.decoder = decoder
        self._menus: dict[tuple[Intervals, ...], Menu] = {}
        self._heads: dict[Intervals, tuple[Matrix, Tensor | int, np.ndarray]] = {}

    def of_batch(self, allowed: tuple[Intervals, ...]) -> Menu:
        """What a batch with these legal sets chooses from: their union, and what is not allowed to whom."""
        if allowed not in self._menus:
            total = self.decoder.config.vocab_size
            union = allowed[0] if len(set(allowed)) == 1 else join_intervals({pair for pairs in allowed for pair in pairs})
            if sum(b - a for a, b in union) > total / 4:
                union = ((0, total),)  # one copy of the whole head for all large sets
            if len(self._menus) >= MENUS or sum(len(names) for _, _, names in self._heads.values()) > 4 * total:
                self._menus.clear()
                self._heads.clear()
            head, ids, names = self._head(union)
            mask = None
            if any(a != union for a in allowed):
                mask = self._send(~np.stack([_holds(a, names) for a in allowed]))
            self._menus[allowed] = Menu(head, len(names), ids, mask)
        return self._menus[allowed]

    def of(self, allowed: Intervals) -> Menu:
        """One legal set, exactly: nothing else is in it."""
        head, ids, names = self._head(allowed)
        return Menu(head, len(names), ids, None)

    def _head(self, union: Intervals) -> tuple[Matrix, Tensor | int, np.ndarray]:
        """The head's rows of some ids, the ids as a tensor or an offset, and as an array."""
        if union not in self._heads:
            names = np.concatenate([np.arange(a, b) for a, b in union])
            ids = union[0][0] if len(union) == 1 else self._send(names)
            rows = slice(*union[0]) if isinstance(ids, int) else ids
            self._heads[union] = self.decoder.head_of(rows), ids, names
        return self._heads[union]

    def _send(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.decoder.device)


def _holds(allowed: Intervals, ids: np.ndarray) -> np.ndarray:
    """bool, of the same shape: which ids are allowed."""
    inside = np.zeros(len(ids), bool)
    for a, b in allowed:
        inside |= (ids >= a) & (ids < b)
    return inside
