"""Audio: frames of RVQ codes, all levels of a frame one after the other.

PyTorch is imported in functions, so that the command line knows the options without it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from unitok import pages
from unitok.document import Segment
from unitok.errors import UserError
from unitok.modalities import Loaded, Modality, Stream, register
from unitok.ranges import Span
from unitok.storage import Blob

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from unitok.tokenizers import AudioTokenizer

LONG = 60.0  # seconds; longer audio is read and encoded in pieces
CHUNK_SECONDS = 0.25  # smallest chunk of a stream
ROUNDING = 0.1  # seconds; a stretch that ends so much after the audio ends with it
SEAM = 0.005  # seconds over which what was made is blended with what was there


@dataclass(frozen=True)
class AudioOptions:
    """How audio is read.

    Args:
        segment: seconds; a document whose only audio is longer becomes one document per segment of that length. 0: whole audio.
    """

    segment: float = 0.0

    def __post_init__(self) -> None:
        if self.segment < 0:
            raise UserError(f"audio: segment {self.segment:g}; give seconds, or 0 for whole audio")


@register
class Audio(Modality["AudioTokenizer", "Tensor", AudioOptions]):
    """Content: float [C, T] in [-1, 1] at the tokenizer's sample rate. It is read from files that libsndfile opens, and from
    (waveform [C, T], Hz)."""

    kind = "audio"
    plural = "audio"
    keys = ("start", "end")
    also = ("video",)
    Options = AudioOptions

    def tokenizer_class(self) -> "type[AudioTokenizer]":
        from unitok.tokenizers import AudioTokenizer

        return AudioTokenizer

    def untrained(self) -> "AudioTokenizer":
        import torch

        from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig

        model = AudioTokenizer(AudioTokenizerConfig(n_filters=16, dimension=32, codebook_size=32, codebook_dim=8))
        with torch.no_grad():
            latents = model.encoder(torch.randn(16, 1, 8000).clamp(-1, 1)).movedim(1, -1)
            low = model.quantizer.project(latents).projected
        assert low is not None
        model.quantizer.init_codebook(low)  # of noise, so that many codes occur
        return model.eval()

    def declare(self, name: str, tokenizer: "AudioTokenizer") -> tuple[Span, dict[str, int], tuple[int, ...]]:
        levels = tuple(f"{name}.{k}" for k in range(tokenizer.num_codebooks))
        span = Span(name, levels, f"<{name}>", f"</{name}>", fingerprint=tokenizer.fingerprint(), kind=self.kind)
        return span, dict.fromkeys(levels, tokenizer.codebook_size), ()

    def rate(self, tokenizer: "AudioTokenizer") -> float:
        return tokenizer.frame_rate

    def usage(self, name: str, tokenizer: "AudioTokenizer") -> dict[str, str]:
        rate, levels = tokenizer.frame_rate, tokenizer.num_codebooks
        what = "a second" if name == self.kind else f"1 s of {name}"
        return {what: f"{rate * levels:g} tokens ({rate:g} frames of {levels} levels)"}

    def accepts(self, content: object) -> bool:
        return isinstance(content, tuple) and len(content) == 2  # the tokenizer checks the two

    def view(self, given: Mapping[str, object], where: str) -> str:
        return stretch_view(given, where)

    def keys_of(self, view: str) -> dict[str, object]:
        stretch = stretch_of(view)
        return {} if stretch is None else {key: t for key, t in zip(self.keys, stretch, strict=True) if t is not None}

    def pieces(
        self, tokenizer: "AudioTokenizer", content: Blob, options: AudioOptions, view: str = "", seconds: float = 0.0
    ) -> tuple[list[str], str]:
        if not (seconds or options.segment):
            return [], ""
        if seconds and seconds * tokenizer.frame_rate < 1:
            raise UserError(f"interleave {seconds:g}s: shorter than a frame of {self.kind}, {1 / tokenizer.frame_rate:.3g} s")
        from unitok.media import audio_seconds

        with content.local() as path:
            whole = audio_seconds(path or Path(content.name), None if path else content.read())
        first, stop = _within(stretch_of(view), whole, content.name) or (0.0, whole)
        length, rate, left_out = seconds or options.segment, tokenizer.frame_rate, ""
        if stop - first <= length:
            return [], ""
        if seconds:  # at frames: together they are as many as those of the whole
            starts = [first + frame / rate for frame in stretch_starts(math.ceil((stop - first) * rate), seconds * rate)]
        else:
            starts = [first + number * length for number in range(math.ceil((stop - first) / length))]
        ends = [*starts[1:], stop]
        if stop - starts[-1] < 1 / rate:
            starts, left_out = starts[:-1], "the rest of the audio is shorter than a frame"
        return [f"t={a:.10g},{b:.10g}" for a, b in zip(starts, ends, strict=False)], left_out

    def load(
        self,
        tokenizer: "AudioTokenizer",
        content: object,
        options: AudioOptions,
        name: str,
        view: str = "",
        chance: float = 0.0,
    ) -> Loaded:
        from unitok.media import open_audio, peak, read_clip
        from unitok.tokenizers.audio import SILENCE

        if isinstance(content, tuple):
            waveform, sample_rate = content
            samples = tokenizer.prepare(waveform, sample_rate, name)
            return Loaded(samples, tokenizer.size(samples), facts={"seconds": samples.shape[-1] / tokenizer.sample_rate})
        assert isinstance(content, Blob)
        stretch = stretch_of(view)
        with content.local() as path:  # without a path, the bytes are in memory
            data = None if path else content.read()
            size = (path.stat().st_size if path else len(data or b"")) if stretch is None else 0
            with open_audio(path or Path(name), data) as file:
                whole = file.frames / file.samplerate
                piece = _within(stretch, whole, name)
                seconds = whole if piece is None else piece[1] - piece[0]
                loaded = Loaded(content, (), view, file.format, {"seconds": seconds}, bytes=size)
                if seconds > LONG and piece is None:
                    return loaded
                samples = read_clip(file, name, piece)
                if piece is not None and peak(samples) < SILENCE:  # of a recording that is not silent
                    loaded.content, loaded.rejected = None, "silent_segments"
                    return loaded
                loaded.content = tokenizer.convert(samples, file.samplerate, name)
        loaded.size = tokenizer.size(loaded.content)
        return loaded

    def cut(self, tokenizer: "AudioTokenizer", segment: Segment, times: Sequence[float]) -> list[Segment | None]:
        if tokenizer.config.segment:
            raise UserError(
                f"{segment.modality}: its tokenizer encodes segments of {tokenizer.config.segment:g} s, which are not cut"
            )
        count, rate = segment.codes.shape[1], tokenizer.frame_rate
        edges = np.maximum.accumulate([0, *(min(round(time * rate), count) for time in times), count]).tolist()
        hop, length = tokenizer.hop_length, segment.size[0] if segment.size else count * tokenizer.hop_length
        file, _, view = segment.source.partition("#")
        start, _ = stretch_of(view) or (0.0, None)

        def part(a: int, b: int) -> Segment | None:
            within = f"{file}#t={start + a / rate:.10g},{start + b / rate:.10g}" if file else ""
            size = (min(b * hop, length) - a * hop, *segment.size[1:])
            return replace(segment, codes=segment.codes[:, a:b], source=within, size=size) if b > a else None

        return [part(a, b) for a, b in itertools.pairwise(edges)]

    def filling(self, tokenizer: "AudioTokenizer", content: object, hole: object, where: str) -> "_AudioFilling":
        """hole: (start, stop) in seconds."""
        from unitok.media import load_audio

        opened: Any = load_audio(content) if isinstance(content, Path) else content
        waveform, sample_rate = opened
        samples = tokenizer.prepare(waveform, sample_rate, where)
        seconds = samples.shape[-1] / tokenizer.sample_rate
        start, stop = checked_stretch(hole, seconds, where, self.kind)
        return _AudioFilling((samples, tokenizer.sample_rate), start, stop, tokenizer.frame_rate)

    def batch_key(self, tokenizer: "AudioTokenizer", loaded: Loaded) -> tuple[int, ...]:
        return (-1 if isinstance(loaded.content, Blob) else tokenizer.padded_length(loaded.content.shape[-1]),)

    def cost(self, tokenizer: "AudioTokenizer", loaded: Loaded) -> float:
        return self.BATCH if isinstance(loaded.content, Blob) else loaded.content.shape[-1] / tokenizer.sample_rate

    def encode(self, tokenizer: "AudioTokenizer", batch: list[Loaded]) -> list[np.ndarray]:
        import torch
        import torch.nn.functional as F

        if isinstance(batch[0].content, Blob):
            return [_encode_long(tokenizer, one) for one in batch]
        (length,) = self.batch_key(tokenizer, batch[0])
        missing = [length - one.content.shape[-1] for one in batch]
        samples = [F.pad(one.content, (0, n)) if n else one.content for one, n in zip(batch, missing, strict=True)]
        return list(tokenizer.encode(torch.stack(samples)).cpu().numpy())

    def decode(self, tokenizer: "AudioTokenizer", segment: Segment) -> "Tensor":
        import torch

        return tokenizer.restore(torch.from_numpy(segment.codes), segment.size).cpu()

    def save(self, tokenizer: "AudioTokenizer", content: "Tensor", path: Path) -> Path:
        from unitok.media import save_audio

        path = path.with_name(f"{path.name}.wav")
        save_audio(path, content, tokenizer.sample_rate)
        return path

    def stream(self, tokenizer: "AudioTokenizer", span: Span) -> "Stream[AudioTokenizer, Tensor]":
        return _AudioStream(self, tokenizer) if tokenizer.can_stream else Stream(self, tokenizer)

    def html(self, tokenizer: "AudioTokenizer", content: "Tensor") -> Markup:
        from unitok.media import encode_wav

        return pages.audio(encode_wav(content, tokenizer.sample_rate))

    def html_of_file(self, file: Path) -> Markup:
        return pages.audio(file)

    def line(self, tokenizer: "AudioTokenizer", segment: Segment) -> str:
        return f"{segment.modality} {segment.size[0] / tokenizer.sample_rate:.2f} s"

    def terminal(self, tokenizer: "AudioTokenizer", content: "Tensor", done: bool, colors: bool) -> tuple[str, bool]:
        return f"\N{EIGHTH NOTE} {content.shape[-1] / tokenizer.sample_rate:.2f} s ", False

    def log(self, board: "SummaryWriter", tag: str, tokenizer: "AudioTokenizer", content: "Tensor", step: int) -> None:
        board.add_audio(tag, content.mean(0).clamp(-1, 1).cpu(), step, tokenizer.sample_rate)


class _AudioStream(Stream["AudioTokenizer", "Tensor"]):
    """Returns the new samples in chunks; for causal tokenizers."""

    def __init__(self, modality: Audio, tokenizer: "AudioTokenizer"):
        super().__init__(modality, tokenizer)
        self.frames, self.decoder = 0, tokenizer.decode_stream()

    def push(self, codes: np.ndarray, done: bool) -> "Tensor | None":
        import torch

        new = torch.from_numpy(codes[:, self.frames :])
        if not done and new.shape[1] < CHUNK_SECONDS * self.tokenizer.frame_rate:
            return None
        self.frames = codes.shape[1]
        return self.decoder.push(new[None], done)[0].cpu()


def _encode_long(tokenizer: "AudioTokenizer", loaded: Loaded) -> np.ndarray:
    """The codes of a file that is encoded in pieces; sets `loaded.size`."""
    blob: Blob = loaded.content
    with blob.local() as path:
        codes, loaded.size = tokenizer.encode_file(path or Path(blob.name), data=None if path else blob.read())
    return codes.cpu().numpy()


def stretch_view(given: Mapping[str, object], where: str) -> str:
    """Return the keys `start` and `end`, in seconds, as a media fragment. Errors: `UserError` that begins with `where`."""
    if not given:
        return ""
    start, end = given.get("start", 0.0), given.get("end")
    try:
        first, last = float(start), math.inf if end is None else float(end)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{where}: start {start!r}, end {end!r}: they are seconds") from None
    if not 0 <= first < last:
        raise UserError(
            f"{where}: start {first:g}, end {last:g}: no stretch of a recording; both are seconds, and start is the smaller"
        )
    return f"t={first:.10g}," + ("" if end is None else f"{last:.10g}")


def stretch_of(view: str) -> tuple[float, float | None] | None:
    """The start and the end in seconds that a view names (None: the audio's own end); None for all of it."""
    start, _, stop = view.removeprefix("t=").partition(",")
    return (float(start), float(stop) if stop else None) if view else None


def checked_stretch(hole: object, seconds: float, where: str, kind: str) -> tuple[float, float]:
    """Return the hole (start, stop), in seconds, of content that is so many seconds long; it stops where that ends. Errors: `UserError`."""
    if not isinstance(hole, tuple | list) or len(hole) != 2 or not all(isinstance(t, int | float) for t in hole):
        raise UserError(f"{where}: {kind} needs a stretch to fill: (start, stop) in seconds")
    start, stop = hole
    if not 0 <= start < stop or start >= seconds:
        raise UserError(f"{where}: {start:g} to {stop:g} s of {kind} of {seconds:.3g} s; the stretch must be in it")
    return float(start), float(min(stop, seconds))


def stretch_starts(count: int, length: float) -> list[int]:
    """Return where stretches of `length` units begin among `count`: whole numbers that do not drift from the multiples of `length`, at least 1."""
    return list(itertools.takewhile(lambda start: start < count, (round(number * length) for number in itertools.count())))


def touched(count: int, rate: float, start: float, stop: float) -> np.ndarray:
    """Which of `count` frames, `rate` per second, a stretch touches, from `start` to `stop` in seconds: bool [count]."""
    frames = np.arange(count)
    inside: np.ndarray = (frames + 1 > start * rate + 1e-6) & (frames < stop * rate - 1e-6)
    return inside


def _within(stretch: tuple[float, float | None] | None, whole: float, name: str) -> tuple[float, float] | None:
    """A stretch of audio of `whole` seconds, with its end. Errors: `UserError` for one that ends after the audio."""
    if stretch is None:
        return None
    start, end = stretch[0], whole if stretch[1] is None else stretch[1]
    if start >= whole or end > whole + ROUNDING:
        raise UserError(f"{name}: no stretch from {start:g} to {end:g} s: the audio is {whole:.3g} s long")
    return start, min(end, whole)


@dataclass
class _AudioFilling:
    """Samples [C, T] and their rate in Hz, of which `start` to `stop`, in seconds, are to be made. frame_rate: frames per second."""

    content: "tuple[Tensor, int]"
    start: float
    stop: float
    frame_rate: float

    def missing(self, segment: Segment) -> np.ndarray:
        """Every frame that the stretch touches."""
        return touched(segment.codes.shape[-1], self.frame_rate, self.start, self.stop)

    def finish(self, made: "Tensor") -> "Tensor":
        """The original's own samples outside of the stretch, blended over 5 ms at its ends."""
        import torch

        samples, rate = self.content
        made = made[:, : samples.shape[-1]]
        t = torch.arange(made.shape[-1]) / rate
        alpha = 1 - torch.maximum(self.start - t, t - self.stop).clamp(0, SEAM) / SEAM
        original = samples[:, : made.shape[-1]]
        return torch.where(alpha > 0, original + alpha * (made.cpu() - original), original)
