"""`unitok eval audio-tokenizer`: how well audio comes back, by number of levels, and what the codebooks do.

Published numbers differ by their definitions: here audio is compared at the tokenizer's rate with what the tokenizer got (mixed
and resampled), over its whole length, and a number is the mean over files. SI-SDR is in dB with the mean removed, positive is
better (audiocraft and DAC print its negative). The log-mel distance is `mel_loss`, the STFT distance `spectral_loss`, with their
default windows. STOI (Taal et al. 2011, not extended) is pystoi's, from `STOI_SECONDS` on. Codebook use is the share of a
level's codes that occurs at all. The real-time factor is seconds of audio per second of work.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from unitok import pages
from unitok.bundle import load_trained_part
from unitok.evaluate.tokenizer import Measured, evaluate_tokenizer, means, timed
from unitok.media import draw_spectrogram, encode_png, encode_wav, load_audio
from unitok.training.losses import mel_loss, spectral_loss
from unitok.training.monitor import codebook_statistics

SHOWN_SECONDS = 10.0
STOI_SECONDS = 0.5
SI_SDR_RANGE = (-50.0, 100.0)  # dB; what is beyond, such as of an exact copy, counts as the limit


def sound_scores(out: Tensor, target: Tensor, rate: int) -> dict[str, float | None]:
    """Scores of one audio against another, [C, T] in [-1, 1]; STOI is None where it cannot be had."""
    si_sdr = scale_invariant_signal_distortion_ratio(out, target, zero_mean=True).clamp(*SI_SDR_RANGE).mean()
    return {
        "si_sdr_db": float(si_sdr),
        "mel_distance": float(mel_loss(out[None], target[None], rate)),
        "stft_distance": float(spectral_loss(out[None], target[None])),
        "stoi": _stoi(out, target, rate),
    }


def _stoi(out: Tensor, target: Tensor, rate: int) -> float | None:
    try:
        from pystoi import stoi
    except ImportError:
        return None
    if target.shape[-1] < STOI_SECONDS * rate:
        return None
    return float(stoi(target.mean(0).numpy(), out.mean(0).numpy(), rate, extended=False))


def evaluate_audio_tokenizer(
    tokenizer: Path,
    sounds: Path,
    out: Path,
    seconds: float = 0.0,
    limit: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure; writes `scores.json`, `sounds.jsonl` (a line per file) and `index.html`; returns the scores.

    seconds: of each file, from its beginning; 0: all. Errors: `UserError` as `evaluate_tokenizer`'s.
    """
    measure = _AudioMeasure(load_trained_part("audio", tokenizer)[0].to(device), seconds)
    return evaluate_tokenizer(measure, sounds, out, limit, 1, overwrite, progress)


class _AudioMeasure:
    kind = "audio"
    listing = "sounds.jsonl"
    shown = 20

    def __init__(self, model: Any, seconds: float):
        self.model = model
        self.length = round(seconds * model.sample_rate) or None
        self.codes: list[Tensor] = []
        self.seconds: dict[str, float] = {}

    def read(self, path: Path) -> Tensor:
        return self.model.prepare(*load_audio(path), str(path))[:, : self.length]

    def measure(self, batch: Tensor) -> list[Measured]:
        (samples,), model = batch, self.model
        with timed(self.seconds, "encode"):
            codes = model.encode(batch)[0]
        size = model.size(samples)
        with timed(self.seconds, "decode"):
            again = model.restore(codes, size)
        self.codes.append(codes.cpu())
        audio = [samples, *(model.restore(codes[:k], size).cpu() for k in range(1, model.num_codebooks)), again.cpu()]
        levels = [sound_scores(level, samples, model.sample_rate) for level in audio[1:]]
        row = {"seconds": samples.shape[-1] / model.sample_rate, "levels": levels}
        return [Measured(row, levels[-1]["si_sdr_db"] or 0.0, lambda: self._figures(audio, levels))]

    def _figures(self, audio: list[Tensor], levels: list[dict[str, Any]]) -> list[pages.Figure]:
        rate, last = self.model.sample_rate, len(levels)
        figures = []
        for k in sorted({0, 1, math.ceil(last / 2), last}):
            samples = audio[k][:, : round(SHOWN_SECONDS * rate)]
            element = pages.image(encode_png(draw_spectrogram(samples, rate))) + pages.audio(encode_wav(samples, rate))
            decibels = f"{k} level{'s' if k > 1 else ''}: {levels[k - 1]['si_sdr_db']:.1f} dB"
            figures.append(pages.Figure(element, decibels if k else "original"))
        return figures

    def scores(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        model, codes = self.model, torch.cat(self.codes, -1)
        seconds = sum(row["seconds"] for row in rows)
        by_levels = []
        for k in range(model.num_codebooks):
            level: dict[str, Any] = {"levels": k + 1, "bits_per_second": model.bitrate / model.num_codebooks * (k + 1)}
            level |= means([row["levels"][k] for row in rows], rows[0]["levels"][k])
            level |= {f"codebook_{name}": value for name, value in codebook_statistics(codes[k], model.codebook_size).items()}
            by_levels.append(level)
        return {
            "sounds": len(rows),
            "seconds": seconds,
            "sample_rate": model.sample_rate,
            "frame_rate": model.frame_rate,
            "codebook_size": model.codebook_size,
            "ids_per_second": model.frame_rate * model.num_codebooks,
            "bits_per_second": model.bitrate,
            "real_time_factor_encode": seconds / self.seconds["encode"],
            "real_time_factor_decode": seconds / self.seconds["decode"],
            "by_levels": by_levels,
        }
