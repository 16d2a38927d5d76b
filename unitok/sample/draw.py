"""Drawing the next token of each request of a batch from its hidden state: head, guidance, filters, draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unitok.hardware import has_triton
from unitok.sample.allowed import AllowedLogits
from unitok.sample.sampling import BatchedSamplingParams, guide, penalize_repetition

FUSED = 8192  # allowed tokens up to which one kernel draws on a GPU


@dataclass(frozen=True)
class Draw:
    """How a token is drawn: what is allowed, and the parameters of each of B requests."""

    allowed: AllowedLogits
    params: BatchedSamplingParams

    def __call__(self, hidden: Tensor, scales: Tensor, uniform: Tensor, *compared: Tensor) -> Tensor:
        """Hidden states [slots, C] -> ids [B]. scales, compared: as `Session._guidance` returns them, for one token. uniform: [B]."""
        if hidden.is_cuda and has_triton() and len(self.allowed.ids) <= FUSED:
            from unitok.sample.triton_draw import draw_fused

            logits = self.allowed.head(hidden[torch.cat(compared)])
            return self.allowed.ids[draw_fused(logits, self.allowed.mask, scales, uniform, self.params)]
        return self.allowed.ids[self.params.sample(guided_logits(self.allowed, hidden, compared, scales), uniform)]

    def penalized(self, seen: Tensor, hidden: Tensor, scales: Tensor, uniform: Tensor, *compared: Tensor) -> Tensor:
        """The same with `repetition_penalty`. seen: bool [B, V], the tokens that have come."""
        logits = guided_logits(self.allowed, hidden, compared, scales)
        logits = penalize_repetition(logits, seen[:, self.allowed.ids], self.params.repetition_penalty[:, None])
        return self.allowed.ids[self.params.sample(logits, uniform)]


def guided_logits(allowed: AllowedLogits, hidden: Tensor, compared: Sequence[Tensor], scales: Tensor) -> Tensor:
    """Hidden states [slots, C] -> logits [B, n] after guidance. compared, scales: as for `Draw`."""
    own, *others = (allowed.logits(hidden[index]) for index in compared)
    if not others:
        return own
    scale, media_scale = scales[:, :1], scales[:, 1:]
    return guide(own, others[0], scale, others[1] if len(others) > 1 else None, media_scale)
