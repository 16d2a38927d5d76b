"""Configurations of image and audio tokenizers, as `config.json` and the YAML files of trainings hold them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from unitok.errors import UserError, check_range

#: Marks fields that were added after bundles had been written; their fingerprints stay the same (`unitok.pretrained.state_fingerprint`).
LATER = {"later": True}


def _checked(scales: Sequence[int]) -> tuple[int, ...]:
    """The numbers of values of FSQ's dimensions. Errors: `UserError` for none, and for fewer than three values."""
    if not scales or not all(isinstance(n, int) and n > 2 for n in scales):
        raise UserError(f"scales is {list(scales)}: give at least one dimension, each of 3 values or more")
    return tuple(scales)


@dataclass
class ImageTokenizerConfig:
    """Architecture of an image tokenizer; the first six fields have the names and meaning of taming-transformers.

    Args:
        ch: channels of the first stage, a multiple of 32.
        ch_mult: channels at each resolution as a multiple of `ch`; after each but the last the resolution is halved.
        num_res_blocks: residual blocks per resolution.
        attn_resolutions: resolutions (pixels after the patch stem, for an input of `resolution`) with attention.
        z_channels: channels of the latents.
        resolution: pixels per side of the training images.
        patch: pixels per side of the patches that the stem folds into channels; 1: the network of taming-transformers.
        encoder: `vqgan` (convolutions and attention: a code depends on the whole image) or `patch` (a code depends on its own
            patch of `stride` pixels per side alone, which makes codes easier to predict).
        quantizer: `vq` (one codebook, learned by moving averages), `fsq` (finite scalars), `lfq` (signs) or `simvq`
            (a frozen codebook behind a learned matrix).
        codebook_size: number of codes, for all but `fsq`; for `lfq` a power of two.
        codebook_dim: dimensions of a code, for `vq` and `simvq`; few dimensions keep the codebook in use.
        codebook_normalize: for `vq`, latents and codes have length 1.
        scales: number of values of each dimension, for `fsq`; the number of codes is their product.
        decodes: whether there is a decoder; some published tokenizers have none.
        group: frames of a video that share a grid of codes, after its first frame, which has its own; 1: every frame has one.
    """

    ch: int = 64
    ch_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    attn_resolutions: tuple[int, ...] = ()
    z_channels: int = 64
    resolution: int = 64
    patch: int = 4
    encoder: Literal["vqgan", "patch"] = "vqgan"
    quantizer: Literal["vq", "fsq", "lfq", "simvq"] = "vq"
    codebook_size: int = 512
    codebook_dim: int = 8
    codebook_normalize: bool = True
    scales: tuple[int, ...] = (8, 8, 8)
    decodes: bool = True
    group: int = field(default=1, metadata=LATER)

    def __post_init__(self) -> None:
        for name in ("resolution", "patch", "codebook_size", "codebook_dim", "group"):
            check_range(name, getattr(self, name), 1)
        if self.ch % 32:
            raise UserError(f"ch is {self.ch}: it must be a multiple of 32, the groups of group norm")
        if self.quantizer not in ("vq", "fsq", "lfq", "simvq"):
            raise UserError(f"quantizer is {self.quantizer}: choose vq, fsq, lfq or simvq")
        if self.encoder not in ("vqgan", "patch"):
            raise UserError(f"encoder is {self.encoder}: choose vqgan or patch")
        self.scales = _checked(self.scales)
        if self.quantizer == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise UserError(f"codebook_size is {self.codebook_size}: for lfq it must be a power of two")

    @property
    def stride(self) -> int:
        """Pixels per code along each side."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


@dataclass
class AudioTokenizerConfig:
    """Architecture of an audio tokenizer; the fields of the networks are named as in EnCodec.

    Args:
        sample_rate: Hz. channels: of the waveform; 1 is mono, 2 stereo.
        n_filters: channels of the first stage. dimension: channels of the latents.
        ratios: downsampling factor of each stage, the last stage of the encoder first; each stage doubles the channels.
        patch: samples that the stem folds into channels, or the hop of the STFT; 1, of samples: the network of EnCodec.
        domain: what the networks see: `samples`, or `spectrum` (log magnitudes of an STFT in, magnitudes and phases out; a window is four
            patches), which learns speech many times faster.
        encoder: `seanet` (convolutions: a code depends on what is around it) or `patch` (a code depends on its own frame alone, which
            makes codes easier to predict; it sees samples).
        n_residual_layers: residual blocks per stage. kernel_size, last_kernel_size, residual_kernel_size: of the first, the
            last and the residual convolutions. dilation_base, compress: of the residual blocks.
        lstm: number of LSTM layers, at the frame rate. norm: `weight_norm`, `time_group_norm` or `none`.
        causal: codes do not depend on later audio.
        true_skip: residual blocks have identity shortcuts. pad_mode: `reflect`, `constant` or `replicate`.
        quantizer: `rvq` (residual levels, learned by moving averages) or `fsq` (finite scalars: one level, and no codebook to learn).
        scales: number of values of each dimension, for `fsq`; the number of codes is their product.
        num_codebooks: number of residual levels; 1 for `fsq`. codebook_size: codes per level. codebook_dim:
            dimensions of a code; 0: those of the latents, without projections, as in EnCodec.
        codebook_normalize: codes have length 1, and each level has its own projections, as in DAC.
        quantizer_dropout: fraction of training items that are decoded from a random number of levels, so that the first levels
            alone decode well, too.
        normalize: divide audio by its loudness before encoding, and multiply after decoding. segment: seconds per segment that
            is encoded independently; 0: all audio at once. overlap: fraction of a segment that the next one encodes again.
    """

    sample_rate: int = 8_000
    channels: int = 1
    n_filters: int = 128
    dimension: int = 128
    ratios: tuple[int, ...] = (4, 2)
    patch: int = 80
    domain: Literal["samples", "spectrum"] = field(default="samples", metadata=LATER)
    encoder: Literal["seanet", "patch"] = "seanet"
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
    quantizer: Literal["rvq", "fsq"] = field(default="rvq", metadata=LATER)
    scales: tuple[int, ...] = field(default=(8, 5, 5, 5), metadata=LATER)
    num_codebooks: int = 3
    codebook_size: int = 256
    codebook_dim: int = 32
    codebook_normalize: bool = False
    quantizer_dropout: float = 0.0
    normalize: bool = False
    segment: float = 0.0
    overlap: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sample_rate", "channels", "patch", "num_codebooks", "codebook_size"):
            check_range(name, getattr(self, name), 1)
        if self.pad_mode not in ("reflect", "constant", "replicate"):
            raise UserError(f"pad_mode is {self.pad_mode}: choose reflect, constant or replicate")
        if self.domain not in ("samples", "spectrum"):
            raise UserError(f"domain is {self.domain}: choose samples or spectrum")
        if self.quantizer not in ("rvq", "fsq"):
            raise UserError(f"quantizer is {self.quantizer}: choose rvq or fsq")
        self.scales = _checked(self.scales)
        if self.quantizer == "fsq":
            self.num_codebooks, self.codebook_size = 1, math.prod(self.scales)
        if self.quantizer == "fsq" and (self.quantizer_dropout or self.codebook_normalize):
            raise UserError("quantizer_dropout and codebook_normalize are of quantizer rvq: fsq has one level and no codebook")
        if self.encoder not in ("seanet", "patch"):
            raise UserError(f"encoder is {self.encoder}: choose seanet or patch")
