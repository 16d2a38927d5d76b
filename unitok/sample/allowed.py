"""Logits of the tokens that some request of a batch may sample, and of no others."""

from typing import NamedTuple

import torch
from torch import Tensor

from unitok.intervals import Intervals, holds, join_intervals, size_of
from unitok.model.heads import ids_of
from unitok.model.inference import InferenceDecoder, Matrix

KEPT = 256  # combinations of sets


class AllowedLogits(NamedTuple):
    """The part of lm_head for a batch's tokens, `union`: the n of its sets together."""

    union: Intervals
    ids: Tensor  # int64 [n]
    head: Matrix  # [n, C]
    mask: Tensor | None  # bool [B, n]: what each request may not sample; None: all may sample all

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, C] -> [B, n] in fp32, those that are not allowed at -inf."""
        logits = self.head(hidden).float()
        return logits if self.mask is None else logits.masked_fill(self.mask, -torch.inf)


def allowed_logits(
    decoder: InferenceDecoder, sets: tuple[Intervals, ...], kept: dict[tuple[Intervals, ...], AllowedLogits]
) -> AllowedLogits:
    """Of requests that may sample from these sets. What is made is put into `kept`, which is to hold one decoder's alone."""
    if sets not in kept:
        total = decoder.config.vocab_size
        union = join_intervals({pair for allowed in sets for pair in allowed})
        if len(union) > 1 and size_of(union) > total / 4:
            union = ((0, total),)  # one copy of the whole head for all large sets but ranges
        if len(kept) >= KEPT or sum(map(size_of, {known.union for known in kept.values()})) > 4 * total:
            kept.clear()
        same = next((known for known in kept.values() if known.union == union), None)
        ids = same.ids if same else ids_of(union, decoder.device)
        head = same.head if same else decoder.head_of(union)
        mask = torch.stack([~holds(allowed, ids) for allowed in sets]) if any(allowed != union for allowed in sets) else None
        kept[sets] = AllowedLogits(union, ids, head, mask)
    return kept[sets]
