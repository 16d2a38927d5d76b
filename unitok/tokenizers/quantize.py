"""Quantizers behind one interface: latents [B, N, D] channel-last <-> codes.

The only file that touches vector-quantize-pytorch. Every flag that matters is passed by name, because its defaults
change between releases. Projections to the low dimension of the codebook are ours: with `codebook_dim != dim` and image
maps, release 1.32.0 projects the wrong axis when it decodes.

- `VectorQuantizer`: one codebook, l2-normalised, low-dimensional (Yu et al. 2022, "Vector-quantized Image Modeling with
  Improved VQGAN": what keeps a codebook in use), EMA updates, k-means start, dead codes revived relative to the batch.
- `FiniteScalarQuantizer`: FSQ (Mentzer et al. 2023), no codebook to collapse.
- `ResidualQuantizer`: a stack of codebooks for sound (Zeghidour et al. 2021, SoundStream), optional quantizer dropout.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, ResidualVQ, VectorQuantize


@dataclass
class Quantized:
    """What quantizing gives.

    latents: [B, N, D], straight-through. codes: int64 [B, N], or [B, N, K] with K levels. loss: scalar, to be added to
    the others with weight 1 (commitment; 0 where there is none).
    """

    latents: Tensor
    codes: Tensor | None
    loss: Tensor


class Quantizer(nn.Module):
    """What all quantizers do. `size`: codes a level; `levels`: levels of codes (1 but for residual ones)."""

    size: int
    levels: int = 1

    def forward(self, latents: Tensor) -> Quantized:
        """[B, N, D] -> `Quantized`; in training mode this also updates an EMA codebook, so call it once a step."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes as `Quantized.codes` -> latents [B, N, D]: exactly what quantizing to these codes gave."""
        raise NotImplementedError

    def pass_through(self, latents: Tensor) -> Tensor:
        """[B, N, D] through the projections alone, on the scale of the codebook: a warm-up without quantisation."""
        raise NotImplementedError


def _set_revival(layer: VectorQuantize, uniform_use: float) -> None:
    # A revived code starts at uniform use; with the library's default it would be dead again on the next step.
    layer._codebook.reset_cluster_size = uniform_use


class VectorQuantizer(Quantizer):
    """One l2-normalised codebook of `size` codes of `dim` dimensions for latents of `channels`.

    Args:
        vectors: latents in a training batch (batch x positions); a code used less than a tenth of `vectors / size`
            times a batch on (moving) average is replaced by a latent of the batch, as in Mimi's quantizer.
        decay: of the moving averages.
        commitment: weight of the commitment loss.
    """

    def __init__(
        self,
        channels: int,
        size: int = 512,
        dim: int = 8,
        vectors: int = 1024,
        decay: float = 0.95,
        commitment: float = 0.25,
    ):
        super().__init__()
        self.size = size
        self.project_in = nn.Linear(channels, dim)
        self.project_out = nn.Linear(dim, channels)
        self.quantize = VectorQuantize(
            dim=dim,
            codebook_size=size,
            decay=decay,
            use_cosine_sim=True,
            kmeans_init=True,
            kmeans_iters=10,
            threshold_ema_dead_code=0.1 * vectors / size,
            commitment_weight=commitment,
            rotation_trick=False,
        )
        _set_revival(self.quantize, vectors / size)

    def forward(self, latents: Tensor) -> Quantized:
        low = self.project_in(latents)
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes, loss = self.quantize(low.float())
        return Quantized(self.project_out(quantized.to(low.dtype)), codes, loss.sum())

    def lookup(self, codes: Tensor) -> Tensor:
        return self.project_out(self.quantize.get_codes_from_indices(codes))

    def pass_through(self, latents: Tensor) -> Tensor:
        return self.project_out(F.normalize(self.project_in(latents), dim=-1))


class FiniteScalarQuantizer(Quantizer):
    """FSQ: each of `len(scales)` dimensions is rounded to one of `scales[i]` values; the size is their product."""

    def __init__(self, channels: int, scales: tuple[int, ...] = (8, 8, 8)):
        super().__init__()
        self.project_in = nn.Linear(channels, len(scales))
        self.project_out = nn.Linear(len(scales), channels)
        self.quantize = FSQ(levels=list(scales))
        self.size = int(self.quantize.codebook_size)

    def forward(self, latents: Tensor) -> Quantized:
        low = self.project_in(latents)
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes = self.quantize(low.float())
        return Quantized(self.project_out(quantized.to(low.dtype)), codes.long(), low.new_zeros(()))

    def lookup(self, codes: Tensor) -> Tensor:
        return self.project_out(self.quantize.indices_to_codes(codes))

    def pass_through(self, latents: Tensor) -> Tensor:
        return self.project_out(self.project_in(latents).tanh())


class ResidualQuantizer(Quantizer):
    """`levels` codebooks of `size` codes of `dim` dimensions, each quantizing what the ones before left over.

    Args:
        vectors: latents in a training batch; see `VectorQuantizer`.
        dropout: whether each training batch uses a random number of the first levels, so that fewer decode well.
    """

    def __init__(
        self,
        channels: int,
        levels: int = 4,
        size: int = 256,
        dim: int = 16,
        vectors: int = 512,
        decay: float = 0.95,
        commitment: float = 0.25,
        dropout: bool = False,
    ):
        super().__init__()
        self.size, self.levels = size, levels
        self.project_in = nn.Linear(channels, dim)
        self.project_out = nn.Linear(dim, channels)
        self.quantize = ResidualVQ(
            dim=dim,
            num_quantizers=levels,
            codebook_size=size,
            decay=decay,
            kmeans_init=True,
            kmeans_iters=10,
            threshold_ema_dead_code=0.1 * vectors / size,
            commitment_weight=commitment,
            rotation_trick=False,
            quantize_dropout=dropout,
        )
        for layer in self.quantize.layers:
            _set_revival(layer, vectors / size)

    def forward(self, latents: Tensor) -> Quantized:
        low = self.project_in(latents)
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes, loss = self.quantize(low.float())
        return Quantized(self.project_out(quantized.to(low.dtype)), codes, loss.sum())

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 [B, N, k], k <= levels -> latents [B, N, D]: the sum over the levels given."""
        layers = self.quantize.layers[: codes.shape[-1]]
        return self.project_out(sum(layer.get_codes_from_indices(codes[..., i]) for i, layer in enumerate(layers)))

    def pass_through(self, latents: Tensor) -> Tensor:
        return self.project_out(self.project_in(latents))
