"""The audio tokenizer: SEANet around a residual quantizer, turning sounds into levels of codes and back.

[B, C, T] in [-1, 1] at `sample_rate` Hz -> int64 [B, K, N] at `frame_rate` Hz -> [B, C, T].
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from unitok.data.media import convert_audio, load_audio, save_audio
from unitok.errors import UserError
from unitok.pretrained import load_part, load_state, part_folder, save_part, state_fingerprint
from unitok.tokenizers.quantize import ResidualQuantizer
from unitok.tokenizers.seanet import SEANetDecoder, SEANetEncoder

#: A sound whose samples all stay below this (-80 dB) holds nothing.
SILENCE = 1e-4


@dataclass
class AudioTokenizerConfig:
    """Architecture of an audio tokenizer; the networks' names are EnCodec's.

    Args:
        sample_rate: Hz. channels: of the waveform (1 mono, 2 stereo).
        n_filters: channels of the first stage. dimension: channels of the latents.
        ratios: how much each stage shortens, from the latents' side. patch: samples that the stem folds into channels.
        n_residual_layers: residual blocks a stage. kernel_size: of the first and last convolutions.
        lstm: LSTM layers at frame rate. norm: `weight_norm` or `none`. causal: codes do not depend on later sound.
        true_skip: identity shortcuts in residual blocks. pad_mode: `reflect`, `constant` or `replicate`.
        num_codebooks: levels of residual codes. codebook_size: codes a level. codebook_dim: dimensions of a code.
        quantizer_dropout: train with a random number of levels, so that fewer decode well.
    """

    sample_rate: int = 8_000
    channels: int = 1
    n_filters: int = 128
    dimension: int = 128
    ratios: tuple[int, ...] = (4, 2)
    patch: int = 80
    n_residual_layers: int = 1
    kernel_size: int = 3
    lstm: int = 0
    norm: Literal["weight_norm", "none"] = "none"
    causal: bool = False
    true_skip: bool = True
    pad_mode: str = "constant"
    num_codebooks: int = 3
    codebook_size: int = 256
    codebook_dim: int = 32
    quantizer_dropout: bool = False


@dataclass
class AudioReconstruction:
    """What a forward pass gives: `samples` [B, C, T], `codes` [B, K, N] (None without quantisation), the quantizer's `losses`."""

    samples: Tensor
    codes: Tensor | None
    losses: dict[str, Tensor]


class AudioTokenizer(nn.Module):
    """A residual-quantized codec. `vectors`: latents in a training batch, for the revival of dead codes."""

    def __init__(self, config: AudioTokenizerConfig | None = None, vectors: int = 512):
        super().__init__()
        self.config = c = config or AudioTokenizerConfig()
        network: dict[str, Any] = {
            "channels": c.channels,
            "dimension": c.dimension,
            "n_filters": c.n_filters,
            "n_residual_layers": c.n_residual_layers,
            "ratios": tuple(c.ratios),
            "kernel_size": c.kernel_size,
            "last_kernel_size": c.kernel_size,
            "causal": c.causal,
            "true_skip": c.true_skip,
            "lstm": c.lstm,
            "norm": c.norm,
            "pad_mode": c.pad_mode,
            "patch": c.patch,
        }
        self.encoder, self.decoder = SEANetEncoder(**network), SEANetDecoder(**network)
        self.quantizer = ResidualQuantizer(
            c.dimension, c.num_codebooks, c.codebook_size, c.codebook_dim, vectors, dropout=c.quantizer_dropout
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
        """Frames a second, Hz."""
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
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, samples: Tensor, quantize: bool = True) -> AudioReconstruction:
        """[B, C, T] in [-1, 1] -> reconstruction; without `quantize` the latents pass as they are (warm-up)."""
        z = rearrange(self.encoder(samples), "b d n -> b n d")
        q = self.quantizer(z) if quantize else self.quantizer.pass_through(z)
        out = self.decoder(rearrange(q.latents, "b n d -> b d n"))[..., : samples.shape[-1]]
        return AudioReconstruction(out, None if q.codes is None else rearrange(q.codes, "b n k -> b k n"), q.losses)

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """[B, C, T] in [-1, 1] at `sample_rate` -> int64 [B, K, ceil(T / hop_length)]."""
        if samples.ndim != 3 or samples.shape[1] != self.config.channels:
            raise ValueError(f"sounds are [B, {self.config.channels}, T], got {tuple(samples.shape)}")
        z = self.encoder(samples.to(self.device))
        return rearrange(self.quantizer(rearrange(z, "b d n -> b n d")).codes, "b n k -> b k n")

    @torch.no_grad()
    def decode(self, codes: Tensor, length: int | None = None) -> Tensor:
        """int64 [B, k, N] (the first k <= K levels) -> [B, C, length or N * hop_length] in [-1, 1]."""
        latents = self.quantizer.lookup(rearrange(codes.to(self.device), "b k n -> b n k"))
        return self.decoder(rearrange(latents, "b n d -> b d n")).clamp(-1, 1)[..., :length]

    def prepare(self, samples: Tensor, rate: int, name: str = "a sound") -> Tensor:
        """[C, T] at `rate` Hz -> [channels, T'] at `sample_rate`, ready for `encode`; errors: `UserError` for silence."""
        converted = convert_audio(samples, rate, self.sample_rate, self.config.channels)
        if converted.abs().max() < SILENCE:
            raise UserError(f"{name}: silence; replace it or leave it out")
        return converted

    def encode_file(self, path: Path) -> tuple[Tensor, tuple[int]]:
        """A sound of any rate and channel count -> int64 [K, N] and its (length,) in samples at `sample_rate`."""
        samples = self.prepare(*load_audio(path), str(path))
        return self.encode(samples[None])[0], (samples.shape[-1],)

    def decode_file(self, codes: Tensor, path: Path, size: tuple[int, ...] = ()) -> None:
        """int64 [K, N] -> a WAV of `size` (length,) samples, or of all that the codes hold. Inverse of `encode_file`."""
        save_audio(path, self.decode(codes[None], size[0] if size else None)[0], self.sample_rate)

    def fingerprint(self) -> str:
        """Changes when the codes do: a hash of configuration and weights."""
        return state_fingerprint(self.config, self.state_dict())

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_part(folder, "audio tokenizer", self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, path: Path, device: str = "cpu") -> "AudioTokenizer":
        """Read its own folder or a bundle's; in eval mode."""
        folder = part_folder(path, "tokenizers/audio")
        config, state = load_part(folder, "audio tokenizer", AudioTokenizerConfig)
        model = cls(config)
        load_state(model, state, str(folder))
        return model.eval().to(device)
