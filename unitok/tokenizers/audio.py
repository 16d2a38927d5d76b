"""The audio tokenizer: SEANet around a quantizer, residual or of finite scalars, which turns audio into levels of codes and back.

[B, C, T] in [-1, 1] at `sample_rate` Hz -> int64 [B, K, N] at `frame_rate` Hz -> [B, C, T].

Long audio is processed in pieces, so memory grows only with the codes. Causal models stream; models with `segment` encode
independent segments, as EnCodec's 48 kHz model does; all others process windows that overlap by the receptive field of their
convolutions. The codes are those of the whole, unless a non-causal LSTM depends on more than its window: windows then have
`WARM_SECONDS` more on each side, and codes may differ (docs/tokenizers.md).
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn

from unitok.errors import UserError
from unitok.media import convert_audio, open_audio, peak, read_audio_blocks, read_samples, write_audio_blocks
from unitok.tokenizers.arguments import check_codes, check_samples, check_waveform
from unitok.tokenizers.base import Reconstruction, Tokenizer, in_float32
from unitok.tokenizers.config import AudioTokenizerConfig
from unitok.tokenizers.patch import AudioPatchEncoder
from unitok.tokenizers.pieces import add_signals, batches, cut, windows
from unitok.tokenizers.quantize import FiniteScalarFrames, ResidualQuantizer
from unitok.tokenizers.seanet import Conv, ConvTranspose, SEANetDecoder, SEANetEncoder, fold_weights
from unitok.tokenizers.stems import PatchHead, PatchStem, State

#: Audio whose samples all stay below this (-80 dB) counts as silence.
SILENCE = 1e-4
CHUNK_SECONDS = 8.0  # audio that is processed at once
CHUNKS_ELSEWHERE = 8  # of these, on a device that is no CPU: short ones leave a GPU idle
WARM_SECONDS = 1.0  # added on each side of a window if there is an LSTM that is not causal
SEGMENTS = 8  # segments that are processed at once
SCALE_UNIT = 1e-6  # unit of the scales in `Segment.size`


class AudioTokenizer(Tokenizer):
    """A residual-quantized codec.

    Attributes:
        sample_rate: Hz. hop_length: samples per frame. frame_rate: frames per second (within a segment, if there are segments).
        num_codebooks: number of levels. codebook_size: codes per level. bitrate: bits per second with all levels.
        can_stream: whether it encodes and decodes incrementally. latency: of encoding and decoding in streams, in seconds: a frame, and with
            spectra the overlap of its windows (with `pad_mode: reflect` the first frames come later); infinite without streams.
    """

    kind = "audio"
    Config = AudioTokenizerConfig
    config: AudioTokenizerConfig

    def __init__(self, config: AudioTokenizerConfig | None = None):
        super().__init__()
        self.config = c = config or AudioTokenizerConfig()
        if c.causal and (c.norm == "time_group_norm" or c.normalize):
            raise UserError("causal: norm time_group_norm and normalize need all of the audio; leave them or causal out")
        if not 0 <= c.overlap < 1:
            raise UserError(f"overlap {c.overlap:g}: it is a fraction of a segment, at least 0 and below 1")
        if c.codebook_normalize and not c.codebook_dim:
            raise UserError("codebook_normalize needs a codebook_dim of at least 1: each level has its own space")
        self.encoder = AudioPatchEncoder(c) if c.encoder == "patch" else SEANetEncoder(c)
        self.decoder = SEANetDecoder(c)
        self.quantizer: ResidualQuantizer | FiniteScalarFrames = (
            FiniteScalarFrames(c.dimension, tuple(c.scales))
            if c.quantizer == "fsq"
            else ResidualQuantizer(
                c.dimension, c.num_codebooks, c.codebook_size, c.codebook_dim, c.codebook_normalize, c.quantizer_dropout
            )
        )
        self.sample_rate, self.hop_length = c.sample_rate, self.encoder.hop
        self.frame_rate = self.sample_rate / self.hop_length
        self.num_codebooks, self.codebook_size = self.quantizer.levels, self.quantizer.size
        self.bitrate = self.num_codebooks * math.log2(self.codebook_size) * self.frame_rate
        self.can_stream = c.causal and not c.segment
        self.latency = (self.hop_length + self.decoder.head.reach) / self.sample_rate if self.can_stream else math.inf

    def forward(self, samples: Tensor, quantize: bool = True) -> Reconstruction:
        """Reconstruct audio [B, C, T] in [-1, 1]. quantize: False leaves the latents as they are (warm-up)."""
        x, scales = self._normalized(samples)
        z = rearrange(self.encoder(x), "b d n -> b n d")
        q = self.quantizer(z) if quantize else self.quantizer.project(z)
        out = _scaled(self.decoder(rearrange(q.latents, "b n d -> b d n"))[..., : samples.shape[-1]], scales)
        codes = None if q.codes is None else rearrange(q.codes, "b n k -> b k n")
        return Reconstruction(out, codes, q.losses, q.projected, q.first)

    # ---- Encoding ------------------------------------------------------------------------------------------------

    @in_float32
    def encode(self, samples: Tensor, num_codebooks: int | None = None) -> Tensor:
        """Return the codes of audio: [B, C, T] at `sample_rate` -> int64 [B, K, N], N = ceil(T / hop_length) per segment.

        num_codebooks: K, the first levels (default: all). Errors: `UserError` as for `check_samples`, and for another number of
        levels.
        """
        samples = check_samples(samples, self.config.channels, self.dtype)
        return torch.cat([codes for codes, _ in self._encode_blocks([samples], num_codebooks)], -1)

    def padded_length(self, length: int) -> int:
        """Return the length to which audio may be padded with zeros and keep its codes: whole patches, to which the encoder pads it, too. With
        `normalize` and `segment` it is the length itself, on which loudness and the last segment depend."""
        patch = self.hop_length if self.config.encoder == "patch" else self.config.patch
        return length if self.config.normalize or self.config.segment else -(-length // patch) * patch

    def scales(self, samples: Tensor) -> Tensor:
        """Return the loudness by which each segment of audio [B, C, T] is divided, [B, segments]; [B, 0] without
        `normalize`."""
        segments = self._segments([samples]) if self.config.normalize else [samples]
        return torch.cat([self._normalized(segment)[1] for segment in segments], -1)

    def size(self, samples: Tensor) -> tuple[int, ...]:
        """Return the `Segment.size` of audio [C, T]: the length in samples, then the scale of each segment in millionths."""
        return _size(samples.shape[-1], self.scales(samples[None])[0] if self.config.normalize else None)

    @torch.no_grad()
    def _encode_blocks(self, blocks: Iterable[Tensor], levels: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield codes [B, K, n] and scales [B, segments] of consecutive blocks of audio [B, C, t]."""
        self._check_levels(levels)
        c = self.config
        if self.can_stream:
            stream = self.encode_stream(levels)
            for piece, last in cut(blocks, self._chunk * self.hop_length):
                yield stream._push(piece, last), piece.new_zeros(len(piece), 0)
        elif c.segment or c.normalize or c.norm == "time_group_norm":  # needs all of the audio, or of a segment
            for some in batches(self._segments(blocks), SEGMENTS):
                x, scales = self._normalized(torch.cat(some).to(self.device))
                codes = rearrange(self._search(self.encoder(x), levels), "(s b) k n -> b k (s n)", s=len(some))
                yield codes, rearrange(scales, "(s b) one -> b (s one)", s=len(some))
        else:
            margin = -(-self._margin(self.encoder) // self.hop_length)  # frames
            length = self._chunk * self.hop_length
            for window, left, count in windows(blocks, length, margin * self.hop_length, self.hop_length):
                z = self.encoder(window.to(self.device))[..., left // self.hop_length :]
                yield self._search(z[..., :count] if count else z, levels), z.new_zeros(len(z), 0)

    def _search(self, latents: Tensor, levels: int | None) -> Tensor:
        """[B, D, n] -> codes [B, K, n]."""
        return rearrange(self.quantizer.search(rearrange(latents, "b d n -> b n d"), levels), "b n k -> b k n")

    def _normalized(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return audio [B, C, T] divided by its loudness, and the loudness [B, 1]; without `normalize` as it is, and [B, 0]."""
        if not self.config.normalize:
            return samples, samples.new_zeros(len(samples), 0)
        loudness = samples.mean(1, keepdim=True).square().mean(-1, keepdim=True).sqrt() + 1e-8
        return samples / loudness, loudness[:, 0]

    def _segments(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the segments that are encoded independently; the last one may be short."""
        if not self.config.segment:
            yield torch.cat(list(blocks), -1)
            return
        length, stride = self._segment_samples
        rest: Tensor | None = None
        for block in blocks:
            rest = block if rest is None else torch.cat([rest, block], -1)
            while rest.shape[-1] > length:  # not >=: another segment follows only if it is not empty
                yield rest[..., :length]
                rest = rest[..., stride:]
        while rest is not None and rest.shape[-1]:
            yield rest[..., :length]
            rest = rest[..., stride:]

    @property
    def _segment_samples(self) -> tuple[int, int]:
        """Samples per segment, and from the begin of one to the begin of the next."""
        length = int(self.config.segment * self.sample_rate)
        return length, max(1, int((1 - self.config.overlap) * length))

    @property
    def _chunk(self) -> int:
        """What is processed at once, as a whole number of frames."""
        seconds = CHUNK_SECONDS * (1 if self.device.type == "cpu" else CHUNKS_ELSEWHERE)
        return max(1, round(seconds * self.frame_rate))

    def _margin(self, network: nn.Module) -> int:
        """Samples on each side of a window that its core depends on, and `WARM_SECONDS` more for an LSTM."""
        jump = self.config.patch if network is self.encoder else self.hop_length
        reach = jump
        for layer in network.modules():
            if isinstance(layer, PatchStem | PatchHead):
                reach += layer.reach
            elif isinstance(layer, Conv):
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

    @in_float32
    def decode(self, codes: Tensor, length: int | None = None, scales: Tensor | None = None) -> Tensor:
        """Return the audio of codes: int64 [B, k, N], the first k <= K levels -> [B, C, T] in [-1, 1].

        length: T in samples (default: all that the codes cover). scales: [B, segments], as `scales` returns them (default: 1).
        Errors: `UserError` for codes of another shape or range.
        """
        codes = check_codes(codes, "[B, k, N]", self.codebook_size)
        self._check_levels(codes.shape[1])
        scales = codes.new_zeros(1, 0) if scales is None else scales
        return torch.cat(list(self._decode_blocks(codes, scales, length)), -1)[..., :length]

    def restore(self, codes: Tensor, size: tuple[int, ...] = ()) -> Tensor:
        """Return the audio [C, T] in [-1, 1] of codes int64 [K, N], with the length and loudness of a `Segment.size`."""
        return self.decode(codes[None], size[0] if size else None, _scales_of(size))[0]

    @torch.no_grad()
    def _decode_blocks(self, codes: Tensor, scales: Tensor, length: int | None = None) -> Iterator[Tensor]:
        """Yield consecutive blocks of audio [B, C, t] in [-1, 1]."""
        codes, scales = codes.to(self.device), scales.to(self.device)
        blocks = self._overlap_add(self._pieces(codes, length), scales) if self.config.segment else self._waveform(codes)
        for y in blocks:
            yield (y if self.config.segment else _scaled(y, scales)).clamp(-1, 1)

    def _waveform(self, codes: Tensor) -> Iterator[Tensor]:
        if codes.shape[-1] <= self._chunk or self.config.norm == "time_group_norm":
            yield self.decoder(self._look_up(codes))
        elif self.can_stream:
            stream = self.decode_stream()
            yield from (stream._push(piece, last) for piece, last in cut([codes], self._chunk))
        else:
            margin = -(-self._margin(self.decoder) // self.hop_length)
            for window, left, count in windows([codes], self._chunk, margin, 1):
                y = self.decoder(self._look_up(window))[..., left * self.hop_length :]
                yield y[..., : count * self.hop_length] if count else y

    def _look_up(self, codes: Tensor) -> Tensor:
        return rearrange(self.quantizer.lookup(rearrange(codes, "b k n -> b n k")), "b n d -> b d n")

    def _pieces(self, codes: Tensor, length: int | None) -> list[Tensor]:
        """Return the codes of each segment of audio of `length` samples; near its end more than one can be short."""
        whole, stride = self._segment_samples
        if length is not None:
            parts = [-(-min(whole, length - start) // self.hop_length) for start in range(0, length, stride)]
            if sum(parts) == codes.shape[-1]:
                return list(codes.split(parts, -1))
        return list(codes.split(-(-whole // self.hop_length), -1))

    def _overlap_add(self, pieces: list[Tensor], scales: Tensor) -> Iterator[Tensor]:
        """Yield blocks of audio from decoded segments, which are cross-faded with triangular weights."""
        length, stride = self._segment_samples
        frames = -(-length // self.hop_length)
        ramp = torch.linspace(0, 1, frames * self.hop_length + 2, device=self.device)[1:-1]
        weight = 0.5 - (ramp - 0.5).abs()
        total, weights = weight.new_zeros(0), weight.new_zeros(0)
        for first in range(0, len(pieces), SEGMENTS):
            some = pieces[first : first + SEGMENTS]
            whole = [p for p in some if p.shape[-1] == frames]
            decoded = list(self.decoder(self._look_up(torch.cat(whole))).chunk(len(whole))) if whole else []
            decoded += [self.decoder(self._look_up(p)) for p in some if p.shape[-1] != frames]
            for i, y in enumerate(decoded, first):
                w = weight[: y.shape[-1]]
                y = _scaled(y, scales[:, min(i, scales.shape[1] - 1) :]) * w
                total, weights = add_signals(total, y), add_signals(weights, w)
                stop = stride if i + 1 < len(pieces) else total.shape[-1]
                yield total[..., :stop] / weights[:stop]
                total, weights = total[..., stop:], weights[stop:]

    # ---- Streams -------------------------------------------------------------------------------------------------

    def encode_stream(self, num_codebooks: int | None = None) -> "EncodeStream":
        """Return an `EncodeStream`, which encodes incrementally. Errors: `UserError` for models that cannot stream."""
        self._check_levels(num_codebooks)
        return EncodeStream(self, num_codebooks)

    def decode_stream(self) -> "DecodeStream":
        """Return a `DecodeStream`, which decodes incrementally. Errors: `UserError` for models that cannot stream."""
        return DecodeStream(self)

    # ---- Files ---------------------------------------------------------------------------------------------------

    def prepare(self, samples: object, rate: object, name: str = "audio") -> Tensor:
        """Return [channels, T] at `sample_rate`, of which `encode` takes batches, from a waveform [C, T'] at `rate` Hz.

        samples, rate: as for `check_waveform`, which also takes other layouts and integers. name: for messages. Errors:
        `UserError` for another shape or range, for no samples, and for silence.
        """
        return self.convert(*check_waveform(samples, rate, name), name)

    def convert(self, waveform: Tensor, rate: int, name: str = "audio") -> Tensor:
        """Return what `prepare` does of float32 [C, T'] in [-1, 1], such as the samples of a file. Errors: `UserError` for silence."""
        converted = convert_audio(waveform, rate, self.sample_rate, self.config.channels)
        if peak(converted) < SILENCE:
            raise _silent(name, [waveform])
        return converted

    @in_float32
    def encode_file(
        self, path: Path, num_codebooks: int | None = None, data: bytes | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Return the codes of an audio file of any rate, length and number of channels, int64 [K, N], and its `Segment.size`.

        It is read in pieces. data: bytes of the file; `path` is then only its name. Errors: `UserError` for what cannot be read, and silence.
        """
        length, loudest = 0, 0.0

        def blocks() -> Iterator[Tensor]:
            nonlocal length, loudest
            for block in read_audio_blocks(path, self.sample_rate, self.config.channels, CHUNK_SECONDS, data):
                length, loudest = length + block.shape[-1], max(loudest, peak(block))
                yield block[None]

        parts = list(self._encode_blocks(blocks(), num_codebooks))
        if loudest < SILENCE:
            with open_audio(path, data) as file:
                step = round(CHUNK_SECONDS * file.samplerate)
                raise _silent(str(path), (read_samples(file, step) for _ in range(0, file.frames, step)))
        codes, scales = (torch.cat([part[0] for part in several], -1) for several in zip(*parts, strict=True))
        return codes, _size(length, scales.cpu())

    @in_float32
    def encode_shifted(self, blocks: Iterable[Tensor], shifts: int) -> Tensor:
        """Return the codes of audio that is late by 0, 1/S, … (S - 1)/S of a frame, int64 [S, K, N]; S = `shifts`.

        blocks: of the audio, [C, t] each. There are as many frames as without a delay; what it moves beyond them is left out.
        """
        hop = self.hop_length

        def delayed() -> Iterator[Tensor]:
            before = torch.zeros(self.config.channels, hop)
            for block in blocks:
                before = torch.cat([before[:, -hop:], block], -1)
                ends = (before.shape[-1] - hop * k // shifts for k in range(shifts))
                yield torch.stack([before[:, end - block.shape[-1] : end] for end in ends])

        return torch.cat([codes for codes, _ in self._encode_blocks(delayed())], -1)

    @in_float32
    def decode_file(self, codes: Tensor, path: Path, size: tuple[int, ...] = ()) -> None:
        """Write the audio of codes, int64 [K, N], as WAV, in pieces. size: a `Segment.size` (default: all that the codes
        cover). Inverse of `encode_file`."""
        length = size[0] if size else None
        blocks = (block[0] for block in self._decode_blocks(codes[None], _scales_of(size), length))
        write_audio_blocks(path, blocks, self.sample_rate, self.config.channels, length)

    def first_levels(self, count: int) -> "AudioTokenizer":
        """Return a copy that has only the first `count` levels.

        How good it is depends on how it was trained: EnCodec, and codecs with `quantizer_dropout`, decode well from any number. Errors:
        `UserError` for another number of levels.
        """
        self._check_levels(count)
        quantizer = self.quantizer.first_levels(count) if isinstance(self.quantizer, ResidualQuantizer) else self.quantizer
        codec = copy.deepcopy(self, {id(self.quantizer): quantizer})
        codec.config = replace(self.config, num_codebooks=count)
        codec.num_codebooks = count
        codec.bitrate = self.bitrate * count / self.num_codebooks
        return codec

    def prepare_for_inference(self) -> Self:
        """Return the tokenizer itself in eval mode, with weight norm folded into plain weights in the layout for inference:
        equal codes, faster."""
        fold_weights(self)
        if self.config.norm == "weight_norm":
            self.config = replace(self.config, norm="none")
        return self.eval()


class _Stream:
    """Incremental processing: `push` once per piece, then `finish`. A subclass checks and processes a piece."""

    _check: Callable[[Tensor], Tensor]
    _push: Callable[[Tensor, bool], Tensor]

    def __init__(self, tokenizer: AudioTokenizer):
        if not tokenizer.can_stream:
            why = "it codes segments" if tokenizer.config.segment else "it is not causal"
            raise UserError(f"this audio tokenizer cannot stream: {why}; choose one with causal: true and no segment")
        self.tokenizer = tokenizer
        self._state: State = {}
        self._empty: Tensor | None = None  # a piece of no length, in the shape and type of those that came

    @torch.no_grad()
    def push(self, piece: Tensor, last: bool = False) -> Tensor:
        """Process a piece. Returns the output that is complete with it. last: whether it is the last piece."""
        piece = self._check(piece)
        self._empty = piece[..., :0]
        with torch.autocast(self.tokenizer.device.type, enabled=False):
            return self._push(piece, last)

    def finish(self) -> Tensor:
        """Return the rest of the output. Errors: `ValueError` if nothing was pushed."""
        if self._empty is None:
            raise ValueError("nothing was pushed")
        return self.push(self._empty, last=True)


class EncodeStream(_Stream):
    """Encodes audio incrementally, with the codes of the whole: pieces [B, C, t] -> int64 [B, K, n], where n may be 0. The
    latency is one frame."""

    def __init__(self, tokenizer: AudioTokenizer, num_codebooks: int | None = None):
        super().__init__(tokenizer)
        self.levels = num_codebooks

    def _check(self, piece: Tensor) -> Tensor:
        return check_samples(piece, self.tokenizer.config.channels, self.tokenizer.dtype, empty=True)

    def _push(self, piece: Tensor, last: bool) -> Tensor:
        t = self.tokenizer
        return t._search(t.encoder.stream(piece.to(t.device), self._state, last), self.levels)


class DecodeStream(_Stream):
    """Decodes codes incrementally, with the audio of the whole: int64 [B, k, n] -> [B, C, t] in [-1, 1], `hop_length` samples per frame.

    With `pad_mode: reflect` the first frames are returned when there are enough samples to reflect; with `domain: spectrum` samples come
    three patches late.
    """

    def _check(self, piece: Tensor) -> Tensor:
        return check_codes(piece, "[B, k, n]", self.tokenizer.codebook_size, empty=True)

    def _push(self, piece: Tensor, last: bool) -> Tensor:
        t = self.tokenizer
        return t.decoder.stream(t._look_up(piece.to(t.device)), self._state, last).clamp(-1, 1)


def _size(length: int, scales: Tensor | None) -> tuple[int, ...]:
    """Return the `Segment.size` of a length in samples and scales [segments]."""
    return length, *(() if scales is None else map(int, (scales / SCALE_UNIT).round()))


def _scales_of(size: tuple[int, ...]) -> Tensor:
    """Return the scales [1, segments] of a `Segment.size`."""
    return torch.tensor(size[1:])[None] * SCALE_UNIT


def _scaled(samples: Tensor, scales: Tensor) -> Tensor:
    """Multiply audio [B, C, T] by scales [B, 1]; for [B, 0] return it as it is."""
    return samples * scales[:, :1, None] if scales.numel() else samples


def _silent(name: str, blocks: Iterable[Tensor]) -> UserError:
    """Return the error for audio that is silent after mixing to the model's channels. blocks: [C, t], the audio before."""
    if any(peak(block) >= SILENCE for block in blocks):
        return UserError(f"{name}: its channels have opposite phase and cancel to silence when mixed; give one of them")
    return UserError(f"{name}: silence; replace it or leave it out")
