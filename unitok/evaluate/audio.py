"""`unitok eval audio-tokenizer`: quality of reconstructed audio by number of levels, and use of the codebooks.

Published numbers differ by their definitions. Here: the reconstruction is compared with the tokenizer's input (mixed and
resampled) at the tokenizer's sample rate, over the whole length; scores are means over files. SI-SDR is in dB with the mean
removed, higher is better (audiocraft and DAC print its negative). The log-mel distance is `mel_loss` and the STFT distance
`spectral_loss`, with their default windows. STOI (Taal et al. 2011, not extended) is pystoi's, for audio of at least
`STOI_SECONDS`. Codebook usage is the fraction of a level's codes that occur at all. The real-time factor is seconds of audio
per second of computation.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from unitok import pages
from unitok.bundle import load_trained_part
from unitok.errors import UserError
from unitok.evaluate.tokenizer import Measured, Row, evaluate_tokenizer, means, timed
from unitok.media import draw_spectrogram, encode_png, encode_wav, load_audio
from unitok.tokenizers import AudioTokenizer
from unitok.training.losses import mel_loss, spectral_loss
from unitok.training.monitor import codebook_statistics

SHOWN_SECONDS = 10.0
STOI_SECONDS = 0.5
SI_SDR_RANGE = (-50.0, 100.0)  # dB; values beyond, such as that of an exact copy, are clamped

Scores = dict[str, float | None]


def audio_scores(out: Tensor, target: Tensor, rate: int) -> Scores:
    """Scores of a reconstruction against its original, both [C, T] in [-1, 1] at `rate` Hz. STOI is None without pystoi, and
    for audio that is too short."""
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
    audio: Path,
    out: Path,
    seconds: float = 0.0,
    limit: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> Row:
    """Measure an audio tokenizer on the audio files in a folder. Writes `scores.json`, `audio.jsonl` (a line per file) and
    `index.html`; returns the scores.

    tokenizer: a bundle, a tokenizer's folder, or a run. seconds: measured of each file, from its beginning; 0: all of it.
    Errors: `UserError` as `evaluate_tokenizer`'s.
    """
    model = load_trained_part("audio", tokenizer)[0].to(device)
    return evaluate_tokenizer(_AudioMeasure(model, seconds), audio, out, limit, 1, overwrite, progress)


class _AudioMeasure:
    kind = "audio"
    also: tuple[str, ...] = ()
    listing = "audio.jsonl"
    shown = 20

    def __init__(self, model: AudioTokenizer, seconds: float):
        if seconds < 0:
            raise UserError(f"seconds {seconds:g}: at least 0 (all of each file)")
        self.model = model
        self.length = round(seconds * model.sample_rate) or None
        self.codes: list[Tensor] = []
        self.seconds: list[float] = []  # of each file
        self.levels: list[list[Scores]] = []  # of each file, with 1, 2, … levels
        self.times: dict[str, float] = {}  # seconds of computation

    def read(self, path: Path) -> Tensor:
        return self.model.prepare(*load_audio(path), str(path))[:, : self.length]

    def measure(self, batch: Tensor) -> list[Measured]:
        (samples,), model = batch, self.model
        with timed(self.times, "encode"):
            codes = model.encode(batch)[0]
        size = model.size(samples)
        with timed(self.times, "decode"):
            decoded = model.restore(codes, size)
        self.codes.append(codes.cpu())
        audio = [samples, *(model.restore(codes[:k], size).cpu() for k in range(1, model.num_codebooks)), decoded.cpu()]
        levels = [audio_scores(level, samples, model.sample_rate) for level in audio[1:]]
        self.seconds.append(samples.shape[-1] / model.sample_rate)
        self.levels.append(levels)
        row: Row = {"seconds": self.seconds[-1], "levels": levels}
        return [Measured(row, -(levels[-1]["mel_distance"] or 0.0), lambda: self._figures(audio, levels))]

    def _figures(self, audio: list[Tensor], levels: list[Scores]) -> list[pages.Figure]:
        """The original and a few numbers of levels, as spectrograms with players. audio: the original, then by levels."""
        rate, last = self.model.sample_rate, len(levels)
        figures = []
        for k in sorted({0, 1, math.ceil(last / 2), last}):
            samples = audio[k][:, : round(SHOWN_SECONDS * rate)]
            element = pages.image(encode_png(draw_spectrogram(samples, rate))) + pages.audio(encode_wav(samples, rate))
            scores = levels[k - 1]
            distance = f"{k} level{'s' if k > 1 else ''}: log-mel {scores['mel_distance']:.2f}, {scores['si_sdr_db']:.1f} dB"
            figures.append(pages.Figure(element, distance if k else "original"))
        return figures

    def scores(self) -> Row:
        model, codes = self.model, torch.cat(self.codes, -1)
        by_levels: list[Row] = []
        for k in range(model.num_codebooks):
            scores = means([levels[k] for levels in self.levels], self.levels[0][k])
            codebook = {f"codebook_{name}": value for name, value in codebook_statistics(codes[k], model.codebook_size).items()}
            bits = model.bitrate / model.num_codebooks * (k + 1)
            by_levels.append({"levels": k + 1, "bits_per_second": bits, **scores, **codebook})
        return {
            "files": len(self.levels),
            "seconds": sum(self.seconds),
            "sample_rate": model.sample_rate,
            "frame_rate": model.frame_rate,
            "codebook_size": model.codebook_size,
            "tokens_per_second": model.frame_rate * model.num_codebooks,
            "bits_per_second": model.bitrate,
            "real_time_factor_encode": sum(self.seconds) / self.times["encode"],
            "real_time_factor_decode": sum(self.seconds) / self.times["decode"],
            "by_levels": by_levels,
        }
