"""Logits of the tokens that some request of a batch may sample, and of no others."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unitok.intervals import Intervals, holds, join_intervals, size_of
from unitok.model.copies import GenerationDecoder
from unitok.model.heads import ids_of

CACHED = 256  # combinations of sets that are kept, at most


class AllowedLogits(NamedTuple):
    """The rows of lm_head for the n tokens that any request of a batch may sample."""

    union: Intervals  # the n tokens
    ids: Tensor  # int64 [n]
    head: Callable[[Tensor], Tensor]  # hidden states [N, C] -> logits [N, n]
    mask: Tensor | None  # bool [B, n]: what each request may not sample; None: each may sample all n

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, C] -> logits [B, n] in fp32, -inf where a token is not allowed."""
        logits = self.head(hidden).float()
        return logits if self.mask is None else logits.masked_fill(self.mask, -torch.inf)


def allowed_logits(
    decoder: GenerationDecoder, sets: tuple[Intervals, ...], cache: dict[tuple[Intervals, ...], AllowedLogits]
) -> AllowedLogits:
    """Return the `AllowedLogits` of requests that may sample from these sets, one per request. cache: of this decoder alone."""
    if sets not in cache:
        total = decoder.config.vocab_size
        union = join_intervals({pair for allowed in sets for pair in allowed})
        if len(union) > 1 and size_of(union) > total / 4:
            union = ((0, total),)  # one copy of the whole head for all large sets but ranges
        if len(cache) >= CACHED or sum(map(size_of, {known.union for known in cache.values()})) > 4 * total:
            cache.clear()
        same = next((known for known in cache.values() if known.union == union), None)
        ids = same.ids if same else ids_of(union, decoder.device)
        head = same.head if same else decoder.head_of(union)
        mask = torch.stack([~holds(allowed, ids) for allowed in sets]) if any(allowed != union for allowed in sets) else None
        cache[sets] = AllowedLogits(union, ids, head, mask)
    return cache[sets]
