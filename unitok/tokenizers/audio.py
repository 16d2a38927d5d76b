"""The audio tokenizer: SEANet around a residual quantizer, turning sounds into levels of codes and back.

[B, C, T] in [-1, 1] at `sample_rate` Hz -> int64 [B, K, N] at `frame_rate` Hz -> [B, C, T].

Long sounds go through piece by piece, in memory that does not grow with them but for the codes:
- causal models stream: each layer keeps the end of what it has heard, and the codes are those of one piece;
- others see windows that overlap by the reach of their convolutions, so the codes are those of one piece, unless an LSTM
  hears further than that: then `WARM_SECONDS` more are heard on each side, and codes may differ (docs/tokenizers.md);
- models with `segment` cut every sound into segments that know nothing of one another, as EnCodec's 48 kHz model does.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from unitok.errors import UserError
from unitok.media import convert_audio, open_audio, read_audio_blocks, read_samples, write_audio_blocks
from unitok.memory import keep_large_blocks
from unitok.pretrained import load_part, load_state, make_config, part_folder, save_part, state_fingerprint
from unitok.tokenizers.arguments import check_codes, check_samples, check_waveform
from unitok.tokenizers.quantize import ResidualQuantizer
from unitok.tokenizers.seanet import Conv, ConvTranspose, SEANetDecoder, SEANetEncoder, State, fold_for_use

#: A sound whose samples all stay below this (-80 dB) holds nothing.
SILENCE = 1e-4
CHUNK_SECONDS = 8.0  # of sound that go through the networks at once
WARM_SECONDS = 1.0  # heard more on each side of a window where an LSTM is not causal
SEGMENTS = 8  # that go through the networks at once
SCALE_UNIT = 1e-6  # of a scale kept in `Segment.size`


@dataclass
class AudioTokenizerConfig:
    """Architecture of an audio tokenizer; the networks' names are EnCodec's.

    Args:
        sample_rate: Hz. channels: of the waveform (1 mono, 2 stereo).
        n_filters: channels of the first stage. dimension: channels of the latents.
        ratios: how much each stage shortens, from the latents' side. patch: samples that the stem folds into channels.
        n_residual_layers: residual blocks a stage. kernel_size, last_kernel_size, residual_kernel_size: of the first, the
            last and the residual convolutions. dilation_base, compress: of the residual blocks.
        lstm: LSTM layers at frame rate. norm: `weight_norm`, `time_group_norm` or `none`.
        causal: codes do not depend on later sound.
        true_skip: identity shortcuts in residual blocks. pad_mode: `reflect`, `constant` or `replicate`.
        num_codebooks: levels of residual codes. codebook_size: codes a level. codebook_dim: dimensions of a code; 0: the
            latents' own, without projections, as in EnCodec.
        codebook_normalise: codes of length 1 with projections of their own for each level, as in DAC.
        quantizer_dropout: share of the training items decoded from a random number of levels, so that fewer decode well.
        normalise: divide by the loudness before encoding, multiply after decoding. segment: seconds of the pieces that are
            coded on their own; 0 codes a sound as a whole. overlap: share of a segment that the next one codes again.
    """

    sample_rate: int = 8_000
    channels: int = 1
    n_filters: int = 128
    dimension: int = 128
    ratios: tuple[int, ...] = (4, 2)
    patch: int = 80
    n_residual_layers: int = 1
    kernel_size: int = 3
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2
    lstm: int = 0
    norm: Literal["weight_norm", "time_group_norm", "none"] = "none"
    causal: bool = False
    true_skip: bool = True
    pad_mode: str = "constant"
    num_codebooks: int = 3
    codebook_size: int = 256
    codebook_dim: int = 32
    codebook_normalise: bool = False
    quantizer_dropout: float = 0.0
    normalise: bool = False
    segment: float = 0.0
    overlap: float = 0.0


@dataclass
class AudioReconstruction:
    """What a forward pass gives: `samples` [B, C, T], `codes` [B, K, N] (None without quantisation), the quantizer's `losses`
    and the vectors `low` that it learns from."""

    samples: Tensor
    codes: Tensor | None
    losses: dict[str, Tensor]
    low: Tensor | None = None


class AudioTokenizer(nn.Module):
    """A residual-quantized codec."""

    def __init__(self, config: AudioTokenizerConfig | None = None):
        super().__init__()
        self.config = c = config or AudioTokenizerConfig()
        if c.causal and (c.norm == "time_group_norm" or c.normalise):
            raise UserError("causal: norm time_group_norm and normalise hear the whole sound; leave them or causal out")
        if not 0 <= c.overlap < 1:
            raise UserError(f"overlap {c.overlap:g}: it is a share of a segment, at least 0 and under 1")
        if c.codebook_normalise and not c.codebook_dim:
            raise UserError("codebook_normalise needs a codebook_dim of at least 1: each level has a space of its own")
        network: dict[str, Any] = {
            name: getattr(c, name)
            for name in (
                *("channels", "dimension", "n_filters", "n_residual_layers", "kernel_size", "last_kernel_size"),
                *("residual_kernel_size", "dilation_base", "compress", "causal", "true_skip", "lstm", "norm"),
                *("pad_mode", "patch"),
            )
        } | {"ratios": tuple(c.ratios)}
        self.encoder, self.decoder = SEANetEncoder(**network), SEANetDecoder(**network)
        self.quantizer = ResidualQuantizer(
            c.dimension, c.num_codebooks, c.codebook_size, c.codebook_dim, c.codebook_normalise, c.quantizer_dropout
        )

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return self.encoder.hop

    @property
    def frame_rate(self) -> float:
        """Frames a second, Hz (of a segment, where there are segments)."""
        return self.sample_rate / self.hop_length

    @property
    def num_codebooks(self) -> int:
        """Levels of codes."""
        return self.quantizer.levels

    @property
    def codebook_size(self) -> int:
        """Codes a level."""
        return self.quantizer.size

    @property
    def bitrate(self) -> float:
        """Bits a second with all levels."""
        return self.num_codebooks * math.log2(self.codebook_size) * self.frame_rate

    @property
    def latency(self) -> float:
        """Seconds of sound that a code of a causal model waits for: its own frame. For others, the whole sound."""
        return self.hop_length / self.sample_rate if self.config.causal else math.inf

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, samples: Tensor, quantize: bool = True) -> AudioReconstruction:
        """[B, C, T] in [-1, 1] -> reconstruction; without `quantize` the latents pass as they are (warm-up)."""
        scale = _loudness(samples) if self.config.normalise else 1.0
        z = rearrange(self.encoder(samples / scale), "b d n -> b n d")
        q = self.quantizer(z) if quantize else self.quantizer.pass_through(z)
        out = self.decoder(rearrange(q.latents, "b n d -> b d n"))[..., : samples.shape[-1]] * scale
        return AudioReconstruction(out, None if q.codes is None else rearrange(q.codes, "b n k -> b k n"), q.losses, q.low)

    # ---- Encoding ------------------------------------------------------------------------------------------------

    def encode(self, samples: Tensor, num_codebooks: int | None = None) -> Tensor:
        """[B, C, T] in [-1, 1] at `sample_rate` -> int64 [B, K or num_codebooks, N]; N is ceil(T / hop_length), of each segment.

        NumPy arrays and integers are taken, too. Errors: `UserError` for other shapes, types and ranges.
        """
        samples = check_samples(samples, self.config.channels, next(self.parameters()).dtype)
        return torch.cat([codes for codes, _ in self._encode_blocks([samples], num_codebooks)], -1)

    def scales(self, samples: Tensor) -> Tensor:
        """[B, C, T] -> the loudness that was divided out, [B, segments]; empty for models that do not normalise."""
        if not self.config.normalise:
            return samples.new_zeros(len(samples), 0)
        return torch.stack([_loudness(s)[:, 0, 0] for s in self._segments([samples])], -1)

    def size(self, samples: Tensor) -> tuple[int, ...]:
        """[C, T] -> what `Segment.size` keeps: the length in samples, then each segment's scale in millionths."""
        if not self.config.normalise:
            return (samples.shape[-1],)
        scales = self.scales(samples[None])[0]
        return (samples.shape[-1], *(int(s) for s in (scales / SCALE_UNIT).round()))

    @torch.no_grad()
    def _encode_blocks(self, blocks: Iterable[Tensor], levels: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """A sound [B, C, t] after [B, C, t] -> codes [B, K, n] and scales [B, segments] after one another."""
        self._check_levels(levels)
        keep_large_blocks()
        for latents, scales in self._latents(blocks):
            codes = self.quantizer.search(rearrange(latents, "b d n -> b n d"), levels)
            yield rearrange(codes, "b n k -> b k n"), scales

    def _latents(self, blocks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """-> latents [B, D, n] and scales [B, segments]."""
        c = self.config
        chunk = self._chunk(c.sample_rate)
        if c.segment:
            yield from self._segment_latents(blocks)
        elif c.normalise or c.norm == "time_group_norm":  # needs all of it
            whole = torch.cat([b.to(self.device) for b in blocks], -1)
            scale = _loudness(whole) if c.normalise else whole.new_ones(len(whole), 1, 1)
            yield self.encoder(whole / scale), scale[:, :, 0] if c.normalise else scale[:, :0, 0]
        elif c.causal:
            state: State = {}
            for piece, last in _cut(blocks, chunk):
                piece = piece.to(self.device)
                z = self.encoder.stream(piece, state, last) if state or not last else self.encoder(piece)
                yield z, z.new_zeros(len(z), 0)
        else:
            margin = -(-self._margin(self.encoder) // self.hop_length)  # frames
            for window, left, count in _windows(blocks, chunk, margin * self.hop_length, self.hop_length):
                z = self.encoder(window.to(self.device))[..., left // self.hop_length :]
                yield z[..., :count] if count else z, z.new_zeros(len(z), 0)

    def _segment_latents(self, blocks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        waiting: list[Tensor] = []

        def flush() -> tuple[Tensor, Tensor]:
            s = len(waiting)
            x = torch.cat(waiting).to(self.device)
            waiting.clear()
            scale = _loudness(x) if self.config.normalise else x.new_ones(len(x), 1, 1)
            z = rearrange(self.encoder(x / scale), "(s b) d n -> b d (s n)", s=s)
            scales = rearrange(scale[:, 0, 0], "(s b) -> b s", s=s)
            return z, scales if self.config.normalise else scales[:, :0]

        for segment in self._segments(blocks):
            if waiting and (len(waiting) == SEGMENTS or waiting[0].shape != segment.shape):
                yield flush()
            waiting.append(segment)
        if waiting:
            yield flush()

    def _segments(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pieces that are coded on their own, the last of which may be short."""
        if not self.config.segment:
            yield torch.cat(list(blocks), -1)
            return
        length, stride = self._segment_samples
        rest: Tensor | None = None
        for block in blocks:
            rest = block if rest is None else torch.cat([rest, block], -1)
            while rest.shape[-1] > length:  # more: the next one is not empty
                yield rest[..., :length]
                rest = rest[..., stride:]
        while rest is not None and rest.shape[-1]:
            yield rest[..., :length]
            rest = rest[..., stride:]

    @property
    def _segment_samples(self) -> tuple[int, int]:
        """Length of a segment, and from one's begin to the next's."""
        length = int(self.config.segment * self.sample_rate)
        return length, max(1, int((1 - self.config.overlap) * length))

    def _chunk(self, per_second: float) -> int:
        """`CHUNK_SECONDS` as a whole number of frames, in samples or frames."""
        frames = max(1, round(CHUNK_SECONDS * self.frame_rate))
        return frames * self.hop_length if per_second == self.sample_rate else frames

    def _margin(self, network: nn.Module) -> int:
        """Samples on each side of a window that the network hears, and a second more for an LSTM."""
        jump = 1 if network is self.encoder else self.hop_length
        jump *= self.config.patch if network is self.encoder else 1
        reach = jump
        for layer in network.modules():
            if isinstance(layer, Conv):
                reach += (layer.extent - 1) * jump
                jump *= layer.stride
            elif isinstance(layer, ConvTranspose):
                reach += 2 * jump
                jump //= layer.stride
        return reach // 2 + 1 + (round(WARM_SECONDS * self.sample_rate) if self.config.lstm else 0)

    def _check_levels(self, levels: int | None) -> None:
        if levels is not None and not 1 <= levels <= self.num_codebooks:
            raise UserError(f"num_codebooks {levels}: this tokenizer has 1 to {self.num_codebooks} levels")

    # ---- Decoding ------------------------------------------------------------------------------------------------

    def decode(self, codes: Tensor, length: int | None = None, scales: Tensor | None = None) -> Tensor:
        """int64 [B, k, N] (the first k <= K levels) -> [B, C, length or all that the codes hold] in [-1, 1].

        scales: [B, segments], as `scales` gave them; for models that normalise, 1 if left out. Errors: `UserError` for codes that
        are none.
        """
        codes = check_codes(codes, "[B, k, N]", self.codebook_size)
        self._check_levels(codes.shape[1])
        return torch.cat(list(self._decode_blocks(codes, scales, length)), -1)[..., :length]

    def restore(self, codes: Tensor, size: tuple[int, ...] = ()) -> Tensor:
        """int64 [K, N] and a `Segment.size` -> [C, T] in [-1, 1], of exactly that length and loudness."""
        return self.decode(codes[None], size[0] if size else None, self._scales_of(size))[0]

    def _scales_of(self, size: tuple[int, ...]) -> Tensor | None:
        return torch.tensor(size[1:])[None] * SCALE_UNIT if len(size) > 1 else None

    @torch.no_grad()
    def _decode_blocks(self, codes: Tensor, scales: Tensor | None = None, length: int | None = None) -> Iterator[Tensor]:
        """-> [B, C, t] after [B, C, t], in [-1, 1]."""
        keep_large_blocks()
        if scales is not None and scales.numel():
            scales = scales.to(self.device)
        else:
            scales = None
        for y in self._waveform(codes.to(self.device), scales, length):
            yield y.clamp(-1, 1)

    def _waveform(self, codes: Tensor, scales: Tensor | None, length: int | None) -> Iterator[Tensor]:
        c, chunk = self.config, self._chunk(self.frame_rate)
        if c.segment:
            yield from self._overlap_add(self._pieces(codes, length), scales)
        elif codes.shape[-1] <= chunk or c.norm == "time_group_norm":
            y = self.decoder(self._look_up(codes))
            yield y if scales is None else y * scales[:, :1, None]
        elif c.causal:
            state: State = {}
            for piece, last in _cut([codes], chunk):
                y = self.decoder.stream(self._look_up(piece), state, last)
                yield y if scales is None else y * scales[:, :1, None]
        else:
            margin = -(-self._margin(self.decoder) // self.hop_length)
            for window, left, count in _windows([codes], chunk, margin, 1):
                y = self.decoder(self._look_up(window))[..., left * self.hop_length :]
                y = y[..., : count * self.hop_length] if count else y
                yield y if scales is None else y * scales[:, :1, None]

    def _look_up(self, codes: Tensor) -> Tensor:
        return rearrange(self.quantizer.lookup(rearrange(codes, "b k n -> b n k")), "b n d -> b d n")

    def _pieces(self, codes: Tensor, length: int | None) -> list[Tensor]:
        """The codes of each segment of a sound of `length` samples; near its end more than one can be short."""
        whole, stride = self._segment_samples
        if length is not None:
            parts = [-(-min(whole, length - start) // self.hop_length) for start in range(0, length, stride)]
            if sum(parts) == codes.shape[-1]:
                return list(codes.split(parts, -1))
        return list(codes.split(-(-whole // self.hop_length), -1))

    def _overlap_add(self, pieces: list[Tensor], scales: Tensor | None) -> Iterator[Tensor]:
        """Segments weighted by triangles, so that one fades into the next; each block is final when it is given."""
        length, stride = self._segment_samples
        frames = -(-length // self.hop_length)
        ramp = torch.linspace(0, 1, frames * self.hop_length + 2, device=self.device)[1:-1]
        weight = 0.5 - (ramp - 0.5).abs()
        total, weights = None, weight.new_zeros(0)
        for first in range(0, len(pieces), SEGMENTS):
            some = pieces[first : first + SEGMENTS]
            whole = [p for p in some if p.shape[-1] == frames]
            decoded = list(self.decoder(self._look_up(torch.cat(whole))).chunk(len(whole))) if whole else []
            decoded += [self.decoder(self._look_up(p)) for p in some if p.shape[-1] != frames]
            for i, y in enumerate(decoded):
                if scales is not None:
                    y = y * scales[:, min(first + i, scales.shape[1] - 1), None, None]
                w = weight[: y.shape[-1]]
                y = y * w
                if total is not None:
                    shared = min(total.shape[-1], y.shape[-1])
                    y[..., :shared] += total[..., :shared]
                    w = w.clone()
                    w[:shared] += weights[:shared]
                    y = torch.cat([y, total[..., shared:]], -1)
                    w = torch.cat([w, weights[shared:]])
                if first + i + 1 < len(pieces):
                    yield y[..., :stride] / w[:stride]
                    total, weights = y[..., stride:], w[stride:]
                else:
                    yield y / w

    # ---- Streams -------------------------------------------------------------------------------------------------

    @property
    def can_stream(self) -> bool:
        """Whether audio comes out while codes come in: it is causal, and not coded in segments."""
        return self.config.causal and not self.config.segment

    def encode_stream(self, num_codebooks: int | None = None) -> "EncodeStream":
        """Codes while sound comes in (causal models); see `EncodeStream`."""
        self._check_levels(num_codebooks)
        return EncodeStream(self, num_codebooks)

    def decode_stream(self) -> "DecodeStream":
        """Sound while codes come in (causal models); see `DecodeStream`."""
        return DecodeStream(self)

    # ---- Files ---------------------------------------------------------------------------------------------------

    def prepare(self, samples: Tensor, rate: int, name: str = "a sound") -> Tensor:
        """[C, T] at `rate` Hz -> [channels, T'] at `sample_rate`, ready for `encode`.

        Also [T] and [T, C] as soundfile gives them, NumPy arrays, lists, and integers of 8, 16 and 32 bits. Errors: `UserError`
        with `name` for another shape or range, nothing in it, silence.
        """
        samples, rate = check_waveform(samples, rate, name)
        converted = convert_audio(samples, rate, self.sample_rate, self.config.channels)
        if converted.abs().max() >= SILENCE:
            return converted
        if samples.abs().max() < SILENCE:
            raise UserError(f"{name}: silence; replace it or leave it out")
        raise UserError(f"{name}: its channels, of opposite phase, cancel to silence when they are mixed; give one of them")

    def encode_file(
        self, path: Path, num_codebooks: int | None = None, data: bytes | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """A sound of any rate, length and channel count -> int64 [K, N] and its `Segment.size`.

        The file is read, resampled and encoded piece by piece. data: its bytes, where they are at hand already; `path` is
        then only its name. Errors: `UserError` for a file that is none, or silence.
        """
        length, peak = 0, 0.0

        def blocks() -> Iterator[Tensor]:
            nonlocal length, peak
            for block in read_audio_blocks(path, self.sample_rate, self.config.channels, CHUNK_SECONDS, data):
                length, peak = length + block.shape[-1], max(peak, float(block.abs().max()))
                yield block[None]

        parts = list(self._encode_blocks(blocks(), num_codebooks))
        if peak < SILENCE:
            raise UserError(f"{path}: {_why_silent(path, data)}")
        scales = torch.cat([scales[0] for _, scales in parts]).cpu()
        return torch.cat([codes[0] for codes, _ in parts], -1), (
            length,
            *(int(s) for s in (scales / SCALE_UNIT).round()),
        )

    def decode_file(self, codes: Tensor, path: Path, size: tuple[int, ...] = ()) -> None:
        """int64 [K, N] -> a WAV of `size`, or of all that the codes hold, written piece by piece. Inverse of `encode_file`."""
        length = size[0] if size else None
        blocks = (block[0] for block in self._decode_blocks(codes[None], self._scales_of(size), length))
        write_audio_blocks(path, blocks, self.sample_rate, self.config.channels, length)

    # ---- Folders -------------------------------------------------------------------------------------------------

    def for_use(self) -> "AudioTokenizer":
        """Itself in eval mode, its weights plain and laid out for inference (`fold_for_use`): the same codes, sooner."""
        fold_for_use(self)
        if self.config.norm == "weight_norm":
            self.config = replace(self.config, norm="none")
        return self.eval()

    def describe(self) -> dict[str, Any]:
        """Number of parameters, and the configuration."""
        return {"parameters": sum(p.numel() for p in self.parameters())} | asdict(self.config)

    def fingerprint(self) -> str:
        """Changes when the codes do: a hash of configuration and weights."""
        return state_fingerprint(self.config, self.state_dict())

    def save_pretrained(self, folder: Path, overwrite: bool = False) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_part(folder, "audio tokenizer", self.config, self.state_dict(), overwrite)

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> "AudioTokenizer":
        """An untrained one of a configuration in plain types. Errors: `UserError` that begins with `where`."""
        return cls(make_config(AudioTokenizerConfig, config, where))

    @classmethod
    def from_pretrained(cls, path: Path, device: str = "cpu") -> "AudioTokenizer":
        """Read its own folder or a bundle's; ready `for_use`."""
        folder = part_folder(path, "tokenizers/audio")
        config, state = load_part(folder, "audio tokenizer", AudioTokenizerConfig)
        model = cls(config)
        load_state(model, state, str(folder))
        return model.for_use().to(device)


class EncodeStream:
    """Codes while sound comes in, the same as of the whole sound; latency `AudioTokenizer.latency`, one frame.

    `push` as many samples as there are, then `finish` once.
    """

    def __init__(self, tokenizer: AudioTokenizer, num_codebooks: int | None = None):
        _check_streams(tokenizer)
        self.tokenizer, self.levels = tokenizer, num_codebooks
        self._state: State = {}
        self._shape: tuple[int, int] | None = None

    def push(self, samples: Tensor, last: bool = False) -> Tensor:
        """[B, C, t] -> the codes that are complete with them, int64 [B, K, n], n may be 0."""
        t = self.tokenizer
        samples = check_samples(samples, t.config.channels, next(t.parameters()).dtype, empty=True)
        self._shape = (samples.shape[0], samples.shape[1])
        with torch.no_grad():
            z = t.encoder.stream(samples.to(t.device), self._state, last)
            return rearrange(t.quantizer.search(rearrange(z, "b d n -> b n d"), self.levels), "b n k -> b k n")

    def finish(self) -> Tensor:
        """The codes of what is left, as if zeros (or what `pad_mode` says) completed the last frame."""
        if self._shape is None:
            raise ValueError("nothing was pushed")
        return self.push(torch.zeros(*self._shape, 0), last=True)


class DecodeStream:
    """Sound while codes come in, the same as of all the codes; each frame gives its `hop_length` samples at once.

    With `pad_mode: reflect` the first few frames wait until there is enough to reflect.
    """

    def __init__(self, tokenizer: AudioTokenizer):
        _check_streams(tokenizer)
        self.tokenizer = tokenizer
        self._state: State = {}
        self._shape: tuple[int, int] | None = None

    def push(self, codes: Tensor, last: bool = False) -> Tensor:
        """int64 [B, k, n] -> [B, C, t] in [-1, 1]."""
        t = self.tokenizer
        codes = check_codes(codes, "[B, k, n]", t.codebook_size, empty=True)
        self._shape = (codes.shape[0], codes.shape[1])
        with torch.no_grad():
            return t.decoder.stream(t._look_up(codes.to(t.device)), self._state, last).clamp(-1, 1)

    def finish(self) -> Tensor:
        """What was held back, [B, C, t]."""
        if self._shape is None:
            raise ValueError("nothing was pushed")
        return self.push(torch.zeros(*self._shape, 0, dtype=torch.long), last=True)


def _why_silent(path: Path, data: bytes | None) -> str:
    """What is wrong with a file that is silent once it is mixed to the model's channels."""
    with open_audio(path, data) as file:
        while (samples := read_samples(file, round(CHUNK_SECONDS * file.samplerate))).shape[-1]:
            if samples.abs().max() >= SILENCE:
                return "its channels, of opposite phase, cancel to silence when they are mixed; give one of them"
    return "silence; replace it or leave it out"


def _check_streams(tokenizer: AudioTokenizer) -> None:
    c = tokenizer.config
    if not c.causal or c.segment:
        why = "it codes segments" if c.segment else "it is not causal"
        raise UserError(f"this audio tokenizer cannot stream: {why}; choose one with causal: true and no segment")


def _loudness(samples: Tensor) -> Tensor:
    """Root mean square of the channels' mean, [B, C, T] -> [B, 1, 1], never 0."""
    return samples.mean(1, keepdim=True).square().mean(-1, keepdim=True).sqrt() + 1e-8


def _cut(blocks: Iterable[Tensor], length: int) -> Iterator[tuple[Tensor, bool]]:
    """Blocks [..., t] in pieces of at most `length`, each with whether it is the last."""
    held: Tensor | None = None
    for block in blocks:
        for piece in block.split(length, -1):
            if held is not None:
                yield held, False
            held = piece
    if held is not None:
        yield held, True


def _windows(blocks: Iterable[Tensor], length: int, margin: int, unit: int) -> Iterator[tuple[Tensor, int, int]]:
    """Windows over blocks [..., t]: each with what is before its core in it, and the units its core has (0: to the end).

    Cores of `length` (a multiple of `unit`) follow one another; windows reach `margin` (a multiple too) further on both
    sides where there is more.
    """
    held: Tensor | None = None
    left = 0
    for block in blocks:
        held = block if held is None else torch.cat([held, block], -1)
        while held.shape[-1] > left + length + margin:
            yield held[..., : left + length + margin], left, length // unit
            keep = max(0, left + length - margin)
            held, left = held[..., keep:], left + length - keep
    if held is not None and held.shape[-1] > left:
        yield held, left, 0
