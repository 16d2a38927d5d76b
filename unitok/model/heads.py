"""Rows of the head for a set of tokens: logits are computed only for the tokens that are allowed."""

import torch
from torch import Tensor

from unitok.intervals import Intervals


def rows_of(weight: Tensor, intervals: Intervals) -> Tensor:
    """Head [V, C] -> its rows [n, C] for a set of n tokens, ascending; a view where the set is one interval."""
    return weight[slice(*intervals[0])] if len(intervals) == 1 else torch.cat([weight[a:b] for a, b in intervals])


def ids_of(intervals: Intervals, device: torch.device) -> Tensor:
    """The tokens of a set, ascending: int64 [n], one for each row of `rows_of`."""
    return torch.cat([torch.arange(a, b, device=device) for a, b in intervals])


def index_in(ids: Tensor, intervals: Intervals) -> Tensor:
    """Tokens of a set -> their index in it, in [0, n). Inverse of indexing `ids_of`."""
    index, before = ids - intervals[0][0], 0
    for (_, stop), (start, _) in zip(intervals, intervals[1:], strict=False):
        before += start - stop  # tokens between the two intervals
        index = torch.where(ids >= start, ids - intervals[0][0] - before, index)
    return index
