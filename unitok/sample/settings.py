"""SamplingParams of how ids are drawn, by themselves: the command line makes its flags of them without PyTorch."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from unitok.errors import UserError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class SamplingParams:
    """How the ids of one modality are drawn.

    Args:
        temperature: 0 takes the likeliest id; below 1 sharpens; 1 samples as is.
        top_k: only the k likeliest ids; 0 for all.
        top_p: only the likeliest ids that together have this probability; 1 for all.
        min_p: only ids of at least this share of the likeliest one's probability; 0 for all.
        repetition_penalty: log-probabilities of ids that have come, in the prompt or since, are multiplied by it (after
            Keskar et al. 2019, "CTRL"); 1 is none.
        guidance_scale: scale s of classifier-free guidance, u + s (c - u), between log-probabilities without (u) and with the
            condition (c); 1 is none.
        media_guidance_scale: scale of the prompt's images and audio in three-way guidance (Brooks et al. 2023, "InstructPix2Pix", as
            Chameleon does it), u + media_guidance_scale (m - u) + guidance (c - m), where m sees only these of the prompt.
        guidance_start: guidance holds from this id of a span's body on; 0 is the first after begin and header.
        guidance_stop: guidance holds up to before this id of a span's body; without it, to the end.
        guidance_schedule: `constant`, or growing from 1 at the start to the full scale at the end of that interval, `linear`
            or like a `cosine`; in a span whose length is not known it is constant.

    Errors: `UserError` for values that make no sense, which begins with the field's name.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    guidance_scale: float = 1.0
    media_guidance_scale: float | None = None
    guidance_start: int = 0
    guidance_stop: int | None = None
    guidance_schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, Real) or (value is None and name in ("media_guidance_scale", "guidance_stop"))
            if name != "guidance_schedule" and not number:
                raise UserError(f"{name} {value!r}: it must be a number")
        for name, good, must in (
            ("temperature", 0 <= self.temperature < math.inf, "it must be 0 or more"),
            ("top_k", self.top_k >= 0, "it must be 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "it must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "it must be at least 0 and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "it must be above 0; 1 is none"),
            ("guidance_scale", math.isfinite(self.guidance_scale), "it must be a number; 1 is none"),
            ("media_guidance_scale", math.isfinite(self.media_guidance_scale or 0), "it must be a number"),
            ("guidance_start", self.guidance_start >= 0, "it must be 0 or more"),
            ("guidance_stop", self.guidance_stop is None or self.guidance_stop > 0, "it must be above 0"),
            (
                "guidance_schedule",
                self.guidance_schedule in get_args(Schedule),
                f"choose one of {', '.join(get_args(Schedule))}",
            ),
        ):
            if not good:
                raise UserError(f"{name} {getattr(self, name)}: {must}")

    @property
    def guided(self) -> bool:
        """Whether there is any guidance."""
        return self.guidance_scale != 1.0 or self.media_guidance_scale is not None

    def guides(self, count: int) -> bool:
        """Whether guidance holds for the id after `count` ones of a span's body."""
        return self.guided and self.guidance_start <= count and (self.guidance_stop is None or count < self.guidance_stop)

    def scales(self, count: int, total: int | None) -> tuple[float, float]:
        """`guidance` and `media_guidance_scale` as they are there, by the schedule; `total`: ids of the span's body."""
        stop = total if self.guidance_stop is None else min(self.guidance_stop, total or self.guidance_stop)
        share = 1.0  # of guidance that holds there
        if self.guidance_schedule != "constant" and stop is not None and stop > self.guidance_start + 1:
            share = (count - self.guidance_start) / (stop - 1 - self.guidance_start)
            share = share if self.guidance_schedule == "linear" else (1 - math.cos(math.pi * share)) / 2
        media = 1.0 if self.media_guidance_scale is None else self.media_guidance_scale
        return 1 + share * (self.guidance_scale - 1), 1 + share * (media - 1)
