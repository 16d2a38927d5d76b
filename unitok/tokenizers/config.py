"""Architectures of the tokenizers that are networks, as plain values: what their `config.json` and the YAML of a training hold."""

from dataclasses import dataclass
from typing import Literal

from unitok.errors import UserError


@dataclass
class ImageTokenizerConfig:
    """Architecture of an image tokenizer; the first group has taming-transformers' names and meaning.

    Args:
        ch: channels of the first stage, a multiple of 32.
        ch_mult: width of each resolution as a multiple of `ch`; each but the last is followed by a halving.
        num_res_blocks: residual blocks a resolution.
        attn_resolutions: resolutions (pixels after the patch stem, for an input of `resolution`) with attention.
        z_channels: channels of the latents.
        resolution: side of the images it is trained on, pixels.
        patch: side of the pixel patches that the stem folds into channels (1: taming's network as it is).
        quantizer: `vq` (one codebook, learned by moving averages), `fsq` (finite scalars), `lfq` (signs) or `simvq`
            (a frozen codebook behind a learned matrix).
        codebook_size: codes, for all but `fsq`; for `lfq` a power of two.
        codebook_dim: dimensions of a code, for `vq` and `simvq`; low, so that the codebook stays in use.
        codebook_normalize: for `vq`, latents and codes of length 1.
        scales: values of each dimension, for `fsq`; the number of codes is their product.
        decodes: whether there is a decoder; some published tokenizers come without.
    """

    ch: int = 64
    ch_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    attn_resolutions: tuple[int, ...] = ()
    z_channels: int = 64
    resolution: int = 64
    patch: int = 4
    quantizer: Literal["vq", "fsq", "lfq", "simvq"] = "vq"
    codebook_size: int = 512
    codebook_dim: int = 8
    codebook_normalize: bool = True
    scales: tuple[int, ...] = (8, 8, 8)
    decodes: bool = True

    def __post_init__(self) -> None:
        if self.ch % 32:
            raise UserError(f"ch is {self.ch}: it must be a multiple of 32, the groups of group norm")
        if self.quantizer not in ("vq", "fsq", "lfq", "simvq"):
            raise UserError(f"quantizer is {self.quantizer}: choose vq, fsq, lfq or simvq")
        if self.quantizer == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise UserError(f"codebook_size is {self.codebook_size}: for lfq it must be a power of two")

    @property
    def stride(self) -> int:
        """Pixels a code along each side."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


@dataclass
class AudioTokenizerConfig:
    """Architecture of an audio tokenizer; the networks' names are EnCodec's.

    Args:
        sample_rate: Hz. channels: of the waveform (1 mono, 2 stereo).
        n_filters: channels of the first stage. dimension: channels of the latents.
        ratios: how much each stage shortens, from the latents' side; width doubles each time. patch: samples that the stem folds into channels.
        n_residual_layers: residual blocks a stage. kernel_size, last_kernel_size, residual_kernel_size: of the first, the
            last and the residual convolutions. dilation_base, compress: of the residual blocks.
        lstm: LSTM layers at frame rate. norm: `weight_norm`, `time_group_norm` or `none`.
        causal: codes do not depend on later audio.
        true_skip: identity shortcuts in residual blocks. pad_mode: `reflect`, `constant` or `replicate`.
        num_codebooks: levels of residual codes. codebook_size: codes a level. codebook_dim: dimensions of a code; 0: the
            latents' own, without projections, as in EnCodec.
        codebook_normalize: codes of length 1 with projections of their own for each level, as in DAC.
        quantizer_dropout: share of the training items decoded from a random number of levels, so that fewer decode well.
        normalize: divide by the loudness before encoding, multiply after decoding. segment: seconds of the pieces that are
            coded on their own; 0 codes it as a whole. overlap: share of a segment that the next one codes again.
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
    codebook_normalize: bool = False
    quantizer_dropout: float = 0.0
    normalize: bool = False
    segment: float = 0.0
    overlap: float = 0.0
