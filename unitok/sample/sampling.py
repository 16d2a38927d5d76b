"""Sampling as small pure functions over logits [B, V]. Ids that must not come are at -inf throughout."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from unitok.errors import UserError

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Settings:
    """How the ids of one modality are drawn.

    Args:
        temperature: 0 takes the likeliest id; below 1 sharpens.
        top_k: only the k likeliest ids; 0 for all.
        top_p: only the likeliest ids that together have this probability; 1 for all.
        min_p: only ids of at least this share of the likeliest one's probability; 0 for all.
        repetition_penalty: log-probabilities of ids that have come, in the prompt or since, are multiplied by it (after
            Keskar et al. 2019, "CTRL"); 1 is none.
        guidance: s in u + s (c - u), between log-probabilities without (u) and with the condition (c); 1 is none.
        guidance_media: with it, guidance has three ways (Brooks et al. 2023, "InstructPix2Pix", as Chameleon does it):
            u + guidance_media (m - u) + guidance (c - m), where m sees of the prompt only pictures and sounds.
        guidance_start, guidance_stop: guidance holds from this id of a span's body up to before that one, where 0 is the first
            after begin and header; None is the end.
        guidance_schedule: `constant`, or growing from 1 at the start to the full scale at the end of that interval, `linear`
            or like a `cosine`; in a span whose length is not known it is constant.

    Errors: `UserError` for values that make no sense, which begins with the field's name.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    guidance: float = 1.0
    guidance_media: float | None = None
    guidance_start: int = 0
    guidance_stop: int | None = None
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, Real) or (value is None and name in ("guidance_media", "guidance_stop"))
            if name != "guidance_schedule" and not number:
                raise UserError(f"{name} {value!r}: it must be a number")
        for name, good, must in (
            ("temperature", 0 <= self.temperature < math.inf, "it must be 0 or more"),
            ("top_k", self.top_k >= 0, "it must be 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "it must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "it must be at least 0 and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "it must be above 0; 1 is none"),
            ("guidance", math.isfinite(self.guidance), "it must be a number; 1 is none"),
            ("guidance_media", math.isfinite(self.guidance_media or 0), "it must be a number"),
            ("guidance_start", self.guidance_start >= 0, "it must be 0 or more"),
            ("guidance_stop", self.guidance_stop is None or self.guidance_stop > 0, "it must be above 0"),
            ("guidance_schedule", self.guidance_schedule in SCHEDULES, f"choose one of {', '.join(SCHEDULES)}"),
        ):
            if not good:
                raise UserError(f"{name} {getattr(self, name)}: {must}")

    @property
    def guided(self) -> bool:
        """Whether there is any guidance."""
        return self.guidance != 1.0 or self.guidance_media is not None

    def guides(self, count: int) -> bool:
        """Whether guidance holds for the id after `count` ones of a span's body."""
        return self.guided and self.guidance_start <= count and (self.guidance_stop is None or count < self.guidance_stop)

    def scales(self, count: int, total: int | None) -> tuple[float, float]:
        """`guidance` and `guidance_media` as they are there, by the schedule; `total`: ids of the span's body."""
        share = self._share(count, total)
        media = 1.0 if self.guidance_media is None else self.guidance_media
        return 1 + share * (self.guidance - 1), 1 + share * (media - 1)

    def _share(self, count: int, total: int | None) -> float:
        """How much of guidance holds there, 0 to 1."""
        stop = total if self.guidance_stop is None else min(self.guidance_stop, total or self.guidance_stop)
        if self.guidance_schedule == "constant" or stop is None or stop <= self.guidance_start + 1:
            return 1.0
        share = (count - self.guidance_start) / (stop - 1 - self.guidance_start)
        return share if self.guidance_schedule == "linear" else (1 - math.cos(math.pi * share)) / 2


def guide(
    conditional: Tensor, unconditional: Tensor, scale: Tensor, media: Tensor | None = None, media_scale: Tensor | None = None
) -> Tensor:
    """u + scale (c - u), or with `media` u + media_scale (m - u) + scale (c - m), of log-probabilities [B, n]; scales [B, 1].

    Classifier-free guidance (Ho & Salimans 2022), on log-probabilities rather than logits, so that the shift of each softmax
    does not matter. Ids at -inf stay there.
    """
    c, u = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    if media is None or media_scale is None:
        mixed = torch.where(scale == 1, c, u + scale * (c - u))
    else:
        m = media.log_softmax(-1)
        mixed = u + media_scale * (m - u) + scale * (c - m)
    return torch.where(conditional.isinf(), conditional, mixed)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Log-probabilities [B, V], those of ids that were `seen` (bool [B, V]) multiplied by penalty [B, 1]."""
    logits = logits.log_softmax(-1)
    return torch.where(seen & logits.isfinite(), logits * penalty, logits)


def keep_top_k(logits: Tensor, k: Tensor, most: int | None = None) -> Tensor:
    """All but the k[b] likeliest ids of each row to -inf; k [B], 0 keeps all. most: the largest k, where it is known."""
    most = int(k.max()) if most is None else most
    if most == 0:
        return logits
    most = min(most, logits.shape[-1])
    threshold = logits.topk(most, -1).values.gather(-1, (k.clamp(1, most) - 1)[:, None])
    return logits.masked_fill((logits < threshold) & (k > 0)[:, None], -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """All but the likeliest ids that together reach probability p[b] to -inf (the likeliest always stays); p [B]."""
    ordered, order = logits.sort(-1, descending=True)
    shares = ordered.softmax(-1)
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, shares.cumsum(-1) - shares >= p[:, None])
    return logits.masked_fill(drop & (p[:, None] < 1), -torch.inf)


def keep_min_p(logits: Tensor, share: Tensor) -> Tensor:
    """Ids of less than share[b] of the likeliest one's probability to -inf; share [B], 0 keeps all (Nguyen et al. 2024)."""
    least = logits.amax(-1, keepdim=True) + share.log()[:, None]
    return logits.masked_fill(logits < least, -torch.inf)


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """One id a row by inverting the cumulative distribution at `uniform` [B] in [0, 1); temperature [B], 0 is argmax.

    In the precision of `uniform`: float64, where the device knows it.
    """
    likeliest = logits.argmax(-1)
    probabilities = (logits.to(uniform.dtype) / temperature.clamp_min(1e-6)[:, None]).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    ids = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    # Rounding must never choose an id of probability 0.
    ids = torch.where(probabilities.gather(-1, ids.clamp(max=logits.shape[-1] - 1)[:, None])[:, 0] > 0, ids, likeliest)
    return torch.where(temperature == 0, likeliest, ids)


class BatchedSamplingParams:
    """The settings of a batch of rows as tensors [B], and which of them do anything."""

    def __init__(self, rows: list[Settings], device: torch.device):
        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(row, name) for row in rows], dtype=dtype, device=device)

        self.temperature, self.top_k = column("temperature"), column("top_k", torch.int64)
        self.top_p, self.min_p = column("top_p"), column("min_p")
        self.repetition_penalty = column("repetition_penalty")
        self.penalises = any(row.repetition_penalty != 1 for row in rows)
        self._greedy = all(row.temperature == 0 for row in rows)
        self._largest_k = max(row.top_k for row in rows)
        self._any_p, self._any_min_p = any(row.top_p < 1 for row in rows), any(row.min_p > 0 for row in rows)

    def filter(self, logits: Tensor) -> Tensor:
        """All ids that the filters take away to -inf; [B, n]. top-k looks at the logits, the others at what is drawn from."""
        if self._largest_k:
            logits = keep_top_k(logits, self.top_k, self._largest_k)
        if self._any_p or self._any_min_p:
            kept = logits / self.temperature.clamp_min(1e-6)[:, None]
            kept = keep_top_p(kept, self.top_p) if self._any_p else kept
            kept = keep_min_p(kept, self.min_p) if self._any_min_p else kept
            logits = logits.masked_fill(kept.isinf(), -torch.inf)
        return logits

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One id a row, by all settings but guidance and penalty; `uniform` float64 [B] in [0, 1)."""
        if self._greedy:
            return logits.argmax(-1)
        return draw(self.filter(logits), self.temperature, uniform)
