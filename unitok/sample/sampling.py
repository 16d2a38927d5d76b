"""Sampling as small pure functions over logits [B, V]. Ids that must not come are at -inf throughout."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """How the ids of one modality are drawn.

    Args:
        temperature: 0 takes the likeliest id; below 1 sharpens.
        top_k: only the k likeliest ids; 0 for all.
        top_p: only the likeliest ids that together have this probability; 1 for all.
        guidance: s in u + s (c - u), between logits without (u) and with the condition (c); 1 is none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on log-probabilities; scale [B, 1]. Ids at -inf stay there.

    On log-probabilities rather than logits, so that the shift of each softmax does not matter.
    """
    c, u = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    mixed = u + scale * (c - u)
    return torch.where(conditional.isinf(), conditional, torch.where(scale == 1, c, mixed))


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """All but the k[b] likeliest ids of each row to -inf; k [B], 0 keeps all."""
    if not (k > 0).any():
        return logits
    ordered = logits.sort(-1, descending=True).values
    last = torch.where(k > 0, k, logits.shape[-1]).clamp(max=logits.shape[-1])
    threshold = ordered.gather(-1, last[:, None] - 1)
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """All but the likeliest ids that together reach probability p[b] to -inf (the likeliest always stays); p [B]."""
    if not (p < 1).any():
        return logits
    ordered, order = logits.sort(-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p[:, None])
    return logits.masked_fill(drop & (p[:, None] < 1), -torch.inf)


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """One id a row by inverting the cumulative distribution at `uniform` [B] in [0, 1); temperature [B], 0 is argmax."""
    likeliest = logits.argmax(-1)
    probabilities = (logits.double() / temperature.clamp_min(1e-6)[:, None]).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    ids = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    # Rounding must never choose an id of probability 0.
    ids = torch.where(probabilities.gather(-1, ids.clamp(max=logits.shape[-1] - 1)[:, None])[:, 0] > 0, ids, likeliest)
    return torch.where(temperature == 0, likeliest, ids)
