"""Rows of the head for a set of tokens: logits are computed only for tokens that may come."""

import torch
from torch import Tensor

from unitok.intervals import Intervals


def rows_of(weight: Tensor, intervals: Intervals) -> Tensor:
    """Head [V, C] -> its rows [n, C] for a set of n tokens, ascending; of one interval a view."""
    return weight[slice(*intervals[0])] if len(intervals) == 1 else torch.cat([weight[a:b] for a, b in intervals])


def ids_of(intervals: Intervals, device: torch.device) -> Tensor:
    """The tokens of a set, ascending: int64 [n]. What `rows_of` is of."""
    return torch.cat([torch.arange(a, b, device=device) for a, b in intervals])


def index_in(ids: Tensor, intervals: Intervals) -> Tensor:
    """Tokens of a set -> where they stand in it, in [0, n). Inverse of indexing `ids_of`."""
    index, before = ids - intervals[0][0], 0
    for (_, stop), (start, _) in zip(intervals, intervals[1:], strict=False):
        before += start - stop  # ids between the two
        index = torch.where(ids >= start, ids - intervals[0][0] - before, index)
    return index
