"""Quantizers behind one interface: latents [B, N, D] channel-last <-> codes.

FSQ, LFQ and SimVQ are vector-quantize-pytorch's; every flag that matters is passed by name, because its defaults change between
releases. Projections to the low dimension of the codes are ours: with `codebook_dim != dim` and image maps, release 1.32.0
projects the wrong axis when it decodes. All compute in fp32, also under autocast: in bfloat16 the nearest code is often another.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, SimVQ

from unitok.tokenizers.codebook import Codebook
from unitok.tokenizers.config import ImageTokenizerConfig


def _fp32(x: Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False)


def _straight_through(projected: Tensor, vectors: Tensor) -> Tensor:
    """The vectors, with the gradient of what was quantized to them."""
    return projected + (vectors - projected).detach() if torch.is_grad_enabled() else vectors


@dataclass
class Quantized:
    """What quantizing gives."""

    latents: Tensor  # [B, N, D], straight-through
    codes: Tensor | None  # int64 [B, N], or [B, N, K] with K levels; None without quantisation
    losses: dict[str, Tensor]  # scalars, not weighted: `commitment`, `entropy`, `codebook`
    projected: Tensor  # what `update` learns from; without quantisation, what `init_codebook` begins with


class Quantizer(nn.Module):
    """Projections around something that quantizes, `quantize` of vector-quantize-pytorch unless a subclass has its own.

    size: codes per level.
    """

    levels = 1  # of codes
    ema_updated = False  # whether `update` is to be called once for each batch, and `started` says something
    bounded = False  # whether vectors lie in [-1, 1], where a pass without quantisation puts them, too
    decay = 0.95  # of the moving averages of a learned codebook, for each `update`
    project_in: Any
    project_out: Any
    quantize: Any

    def __init__(self, channels: int, dim: int, size: int):
        super().__init__()
        self.size = size
        self.project_in, self.project_out = nn.Linear(channels, dim), nn.Linear(dim, channels)

    def forward(self, latents: Tensor) -> Quantized:
        """[B, N, D] -> `Quantized`."""
        with _fp32(latents):
            projected = self._project(latents)
            vectors, codes, losses = self._quantize(projected)
            return Quantized(self.project_out(vectors), codes, losses, projected.detach())

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes as `Quantized.codes` -> latents [B, N, D]: exactly what quantizing to these codes gave."""
        with _fp32(codes):
            return self.project_out(self._vectors(codes))

    def project(self, latents: Tensor) -> Quantized:
        """[B, N, D] through the projections alone, on the scale of the codebook: a warm-up without quantisation."""
        with _fp32(latents):
            projected = self._project(latents)
            return Quantized(self.project_out(projected.tanh() if self.bounded else projected), None, {}, projected.detach())

    def _project(self, latents: Tensor) -> Tensor:
        return self.project_in(latents.float())

    def _quantize(self, projected: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """[B, N, dim] -> the vectors of the codes, straight-through; the codes [B, N]; the losses."""
        raise NotImplementedError

    def _vectors(self, codes: Tensor) -> Tensor:
        return self.quantize.indices_to_codes(codes)

    @property
    def started(self) -> bool:
        """Whether there is a codebook to quantize with."""
        return True

    def init_codebook(self, projected: Tensor, seed: int = 0) -> None:
        """Begin the codebook from the vectors [..., dim] of several batches."""

    def update(self, projected: Tensor, seed: int = 0) -> int:
        """Learn the codebook from the vectors [..., dim] of one whole batch; -> how many codes were revived."""
        return 0


class VectorQuantizer(Quantizer):
    """One learned `Codebook` of `size` codes of `dim` dimensions for latents of `channels`.

    Low dimensions and length 1 (`normalize`) keep it in use (Yu et al. 2022, "Vector-quantized Image Modeling with Improved VQGAN").
    entropy_temperature: not 0: of an entropy loss (cf. Open-MAGVIT2, IBQ): vectors should be sure of their codes, and use all alike.
    """

    ema_updated = True

    def __init__(self, channels: int, size: int = 512, dim: int = 8, normalize: bool = True):
        super().__init__(channels, dim, size)
        self.codebook = Codebook(size, dim, normalize)
        self.entropy_temperature = 0.0

    @property
    def started(self) -> bool:
        return bool(self.codebook.initted)

    def _project(self, latents: Tensor) -> Tensor:
        return self.codebook.scaled(super()._project(latents))

    def _quantize(self, projected: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        codes = self.codebook.nearest(projected.detach())
        vectors = self._vectors(codes)
        losses = {"commitment": F.mse_loss(projected, vectors)}
        if self.entropy_temperature:
            losses["entropy"] = self._entropy(projected)
        return _straight_through(projected, vectors), codes, losses

    def _entropy(self, projected: Tensor) -> Tensor:
        codes = self.codebook.embed
        logits = projected.reshape(-1, projected.shape[-1]) @ codes.T - codes.square().sum(-1) / 2
        log_p = (logits / self.entropy_temperature).log_softmax(-1)
        mean = log_p.exp().mean(0)
        return -(log_p.exp() * log_p).sum(-1).mean() + (mean * mean.clamp_min(1e-9).log()).sum()

    def _vectors(self, codes: Tensor) -> Tensor:
        return self.codebook.lookup(codes)

    def init_codebook(self, projected: Tensor, seed: int = 0) -> None:
        self.codebook.init_codebook(projected.reshape(-1, projected.shape[-1]), seed)

    def update(self, projected: Tensor, seed: int = 0) -> int:
        if not self.started:
            self.init_codebook(projected, seed)
        return self.codebook.update(projected.reshape(-1, projected.shape[-1]), self.decay, seed)


class FiniteScalarQuantizer(Quantizer):
    """FSQ (Mentzer et al. 2023): dimension i is rounded to one of `scales[i]` values; there is no codebook to collapse."""

    bounded = True

    def __init__(self, channels: int, scales: tuple[int, ...] = (8, 8, 8)):
        quantize = FSQ(levels=list(scales))
        super().__init__(channels, len(scales), int(quantize.codebook_size))
        self.quantize = quantize

    def _quantize(self, projected: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        vectors, codes = self.quantize(projected)
        return vectors, codes.long(), {}


class LookupFreeQuantizer(Quantizer):
    """LFQ (Yu et al. 2023, MAGVIT-v2): a code is the signs of log2(`size`) dimensions; needs its entropy loss."""

    bounded = True

    def __init__(self, channels: int, size: int = 512):
        dim = size.bit_length() - 1
        super().__init__(channels, dim, size)
        weights = {"entropy_loss_weight": 1.0, "commitment_loss_weight": 1.0, "diversity_gamma": 1.0}
        self.quantize = LFQ(dim=dim, codebook_size=size, **weights)

    def _quantize(self, projected: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        (vectors, codes, _), parts = self.quantize(projected, return_loss_breakdown=True)
        losses = {"commitment": parts.commitment, "entropy": parts.per_sample_entropy - parts.batch_entropy}
        return vectors, codes.long(), losses if self.training else {}


class SimVectorQuantizer(Quantizer):
    """SimVQ (Zhu et al. 2024): `size` random codes of `dim` dimensions that stay as they are, moved together by one learned matrix."""

    def __init__(self, channels: int, size: int = 512, dim: int = 8):
        super().__init__(channels, dim, size)
        weights = {"input_to_quantize_commit_loss_weight": 0.25, "commitment_weight": 1.0}
        self.quantize = SimVQ(dim=dim, codebook_size=size, rotation_trick=False, **weights)

    def _quantize(self, projected: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        vectors, codes, loss = self.quantize(projected)
        return vectors, codes, {"codebook": loss}


def build_quantizer(config: ImageTokenizerConfig) -> Quantizer:
    """The quantizer that the configuration of an image tokenizer asks for."""
    c = config
    if c.quantizer == "fsq":
        return FiniteScalarQuantizer(c.z_channels, tuple(c.scales))
    if c.quantizer == "lfq":
        return LookupFreeQuantizer(c.z_channels, c.codebook_size)
    if c.quantizer == "simvq":
        return SimVectorQuantizer(c.z_channels, c.codebook_size, c.codebook_dim)
    return VectorQuantizer(c.z_channels, c.codebook_size, c.codebook_dim, c.codebook_normalize)


class ResidualQuantizer(Quantizer):
    """`levels` codebooks of `size` codes, each quantizing what the ones before left over (Zeghidour et al. 2021, SoundStream).

    Not normalized, the levels share a space of `dim` dimensions (0: the latents' own, without projections, as EnCodec).
    Normalised, each level has projections of its own (dim > 0) into one where latents and codes have length 1, as DAC has.

    dropout: share of the training items, as in DAC, decoded from a random number of the first levels, so that fewer decode well.
    """

    ema_updated = True

    def __init__(
        self, channels: int, levels: int = 4, size: int = 256, dim: int = 16, normalize: bool = False, dropout: float = 0.0
    ):
        nn.Module.__init__(self)
        self.size, self.levels, self.normalize, self.dropout = size, levels, normalize, float(dropout)
        spaces = levels if normalize else 1
        self.project_in = nn.ModuleList([nn.Linear(channels, dim) if dim else nn.Identity() for _ in range(spaces)])
        self.project_out = nn.ModuleList([nn.Linear(dim, channels) if dim else nn.Identity() for _ in range(spaces)])
        self.layers: Any = nn.ModuleList([Codebook(size, dim or channels, normalize) for _ in range(levels)])

    @property
    def started(self) -> bool:
        return all(bool(layer.initted) for layer in self.layers)

    def forward(self, latents: Tensor, levels: int | None = None) -> Quantized:
        """[B, N, D] -> `Quantized` by the first `levels` (default all). `projected`: [B, N, levels * d], each level's vectors."""
        return self._take_apart(latents, levels)

    @torch.no_grad()
    def search(self, latents: Tensor, levels: int | None = None) -> Tensor:
        """[B, N, D] -> codes alone, int64 [B, N, levels]."""
        codes = self._take_apart(latents, levels).codes
        assert codes is not None
        return codes

    def project(self, latents: Tensor) -> Quantized:
        return self._take_apart(latents, quantize=False)

    @torch.no_grad()
    def init_codebook(self, projected: Tensor, seed: int = 0) -> None:
        """Begin the codebooks, one level after the other, from latents [..., D] that passed without quantisation."""
        self._take_apart(projected.reshape(1, -1, projected.shape[-1]), start=seed)

    def _take_apart(
        self, latents: Tensor, levels: int | None = None, quantize: bool = True, start: int | None = None
    ) -> Quantized:
        """Level by level. quantize: False lets vectors stand for themselves. start: seed by which the codebooks begin on the way."""
        levels = levels or self.levels
        with _fp32(latents):
            latents = latents.float()
            shared = latents if self.normalize else self.project_in[0](latents)
            kept = self._kept(latents, levels) if quantize or self.normalize else None
            residual, total = shared, torch.zeros_like(shared)
            codes: list[Any] = []
            lows, commitment = [], shared.new_zeros(())
            for k, layer in enumerate(self.layers[:levels]):
                projected = layer.scaled(self.project_in[k](residual)) if self.normalize else residual
                if start is not None:
                    layer.init_codebook(projected.flatten(0, 1), start + k)
                codes.append(layer.nearest(projected.detach()) if quantize else None)
                vectors = layer.lookup(codes[-1]) if quantize else projected
                commitment = commitment + F.mse_loss(projected, vectors)
                lows.append(projected.detach())
                out = self.project_out[k](_straight_through(projected, vectors)) if self.normalize else vectors
                total = total + (out if kept is None else out * (kept > k))
                residual = residual - out.detach()
            if not self.normalize:
                total = self.project_out[0](_straight_through(shared, total))
            if not quantize:
                return Quantized(total, None, {}, latents.detach())
            return Quantized(total, torch.stack(codes, -1), {"commitment": commitment}, torch.cat(lows, -1))

    def _kept(self, latents: Tensor, levels: int) -> Tensor | None:
        """How many levels each item is decoded from, [B, 1, 1], where some are left out."""
        if not self.training or not self.dropout or not torch.is_grad_enabled():
            return None
        b = len(latents)
        fewer = torch.randint(1, levels + 1, (b,), device=latents.device)
        dropped = torch.rand(b, device=latents.device) < self.dropout
        return torch.where(dropped, fewer, levels)[:, None, None]

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 [B, N, k], k <= levels -> latents [B, N, D]: the sum over the levels given."""
        with _fp32(codes):
            rows = [self.layers[k].lookup(level) for k, level in enumerate(codes.unbind(-1))]
            if self.normalize:
                rows = [self.project_out[k](row) for k, row in enumerate(rows)]
            total = sum(rows[1:], rows[0])
            return total if self.normalize else self.project_out[0](total)

    def update(self, projected: Tensor, seed: int = 0) -> int:
        parts = projected.reshape(-1, projected.shape[-1]).chunk(self.levels, -1)
        return sum(self.layers[k].update(part, self.decay, seed + k) for k, part in enumerate(parts))
