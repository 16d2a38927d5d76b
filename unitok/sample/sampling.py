"""Sampling as small pure functions over logits [B, V]. Tokens that are not allowed are at -inf throughout."""

import torch
from torch import Tensor

from unitok.generation_config import SamplingParams


def guide(
    conditional: Tensor, unconditional: Tensor, scale: Tensor, media: Tensor | None = None, media_scale: Tensor | None = None
) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on log-probabilities: u + scale (c - u), or with `media`
    u + media_scale (m - u) + scale (c - m). Logits [B, n], scales [B, 1] -> [B, n]; what is at -inf in `conditional` stays there."""
    c, u = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    if media is None or media_scale is None:
        mixed = torch.where(scale == 1, c, u + scale * (c - u))
    else:
        m = media.log_softmax(-1)
        mixed = u + media_scale * (m - u) + scale * (c - m)
    return torch.where(conditional.isinf(), conditional, mixed)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Return log-probabilities [B, V], multiplied by penalty [B, 1] where a token was `seen` (bool [B, V])."""
    logits = logits.log_softmax(-1)
    return torch.where(seen & logits.isfinite(), logits * penalty, logits)


def keep_top_k(logits: Tensor, k: Tensor, largest: int | None = None) -> Tensor:
    """Set all but the k[b] likeliest tokens of each row to -inf; k [B], 0 keeps all. largest: the largest k, where it is known."""
    largest = int(k.max()) if largest is None else largest
    if largest == 0:
        return logits
    largest = min(largest, logits.shape[-1])
    threshold = logits.topk(largest, -1).values.gather(-1, (k.clamp(1, largest) - 1)[:, None])
    return logits.masked_fill((logits < threshold) & (k > 0)[:, None], -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Set all but the likeliest tokens that together reach probability p[b] to -inf (the likeliest always stays); p [B]."""
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, probabilities.cumsum(-1) - probabilities >= p[:, None])
    return logits.masked_fill(drop & (p[:, None] < 1), -torch.inf)


def keep_min_p(logits: Tensor, fraction: Tensor) -> Tensor:
    """Set tokens of less than fraction[b] of the likeliest one's probability to -inf; fraction [B], 0 keeps all (Nguyen et al. 2024)."""
    least = logits.amax(-1, keepdim=True) + fraction.log()[:, None]
    return logits.masked_fill(logits < least, -torch.inf)


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution at `uniform` [B] in [0, 1), in that tensor's precision:
    float64, where the device has it. temperature [B], 0 is argmax."""
    likeliest = logits.argmax(-1)
    probabilities = (logits.to(uniform.dtype) / temperature.clamp_min(1e-6)[:, None]).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    ids = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    # Rounding must never choose a token of probability 0.
    ids = torch.where(probabilities.gather(-1, ids.clamp(max=logits.shape[-1] - 1)[:, None])[:, 0] > 0, ids, likeliest)
    return torch.where(temperature == 0, likeliest, ids)


class BatchedSamplingParams:
    """Sampling parameters of a batch of rows as tensors [B], and which of them have an effect."""

    def __init__(self, rows: list[SamplingParams], device: torch.device):
        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(row, name) for row in rows], dtype=dtype, device=device)

        self.temperature, self.top_k = column("temperature"), column("top_k", torch.int64)
        self.top_p, self.min_p = column("top_p"), column("min_p")
        self.repetition_penalty = column("repetition_penalty")
        self.penalizes = any(row.repetition_penalty != 1 for row in rows)
        self._greedy = all(row.temperature == 0 for row in rows)
        self.largest_k = max(row.top_k for row in rows)
        self.any_p, self.any_min_p = any(row.top_p < 1 for row in rows), any(row.min_p > 0 for row in rows)

    def filter(self, logits: Tensor) -> Tensor:
        """Set all tokens that the filters remove to -inf; [B, n]. top-k looks at the logits, the others at the tempered ones."""
        if self.largest_k:
            logits = keep_top_k(logits, self.top_k, self.largest_k)
        if self.any_p or self.any_min_p:
            kept = logits / self.temperature.clamp_min(1e-6)[:, None]
            kept = keep_top_p(kept, self.top_p) if self.any_p else kept
            kept = keep_min_p(kept, self.min_p) if self.any_min_p else kept
            logits = logits.masked_fill(kept.isinf(), -torch.inf)
        return logits

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Sample one token per row, after guidance and penalty; `uniform` float64 [B] in [0, 1)."""
        if self._greedy:
            return logits.argmax(-1)
        return draw(self.filter(logits), self.temperature, uniform)
