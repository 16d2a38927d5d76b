"""Quantizers behind one interface: latents [B, N, D] channel-last <-> codes.

FSQ, LFQ and SimVQ are those of vector-quantize-pytorch, imported where they are used, because that takes as long as importing torch;
each option that matters is passed explicitly, because defaults change between releases. The projections to the low dimension of the
codes are ours: with `codebook_dim != dim` and image maps, its release 1.32.0 projects the wrong axis in decoding. All compute in fp32,
also under autocast: in bfloat16 the nearest code is often another.
"""

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.tokenizers.codebook import Codebook, fp32
from unitok.tokenizers.config import ImageTokenizerConfig

if TYPE_CHECKING:
    from vector_quantize_pytorch import FSQ, LFQ, SimVQ


def _straight_through(projected: Tensor, vectors: Tensor) -> Tensor:
    """Return `vectors`, with the gradient passed on to `projected`, from which they were quantized."""
    return projected + (vectors - projected).detach() if torch.is_grad_enabled() else vectors


@dataclass
class Quantized:
    """Result of quantization."""

    latents: Tensor  # [B, N, D], straight-through
    codes: Tensor | None  # int64 [B, N], or [B, N, K] with K levels; None without quantization
    losses: dict[str, Tensor]  # scalars, not weighted: `commitment`, `entropy`, `codebook`
    projected: Tensor  # vectors for `update`; without quantization, vectors for `init_codebook`
    first: Tensor | None = None  # in training, the latents of the first of several levels alone, [B, N, D], straight-through


class Quantizer(nn.Module):
    """Projections around a quantizer: the module `quantize` of vector-quantize-pytorch, unless a subclass has its own.

    size: codes per level.
    """

    levels = 1  # number of codes per latent
    ema_updated = False  # whether the codebook needs `init_codebook` before use, and `update` once per batch
    bounded = False  # whether vectors lie in [-1, 1]; `project` then maps them there, too
    decay = 0.95  # of the moving averages of a learned codebook, per `update`
    project_in: nn.Module
    project_out: nn.Module
    quantize: "FSQ | LFQ | SimVQ"

    def __init__(self, channels: int, dim: int, size: int):
        super().__init__()
        self.size = size
        self.project_in, self.project_out = nn.Linear(channels, dim), nn.Linear(dim, channels)

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize latents [B, N, D]."""
        with fp32(latents):
            projected = self._project(latents)
            vectors, codes, losses = self._quantize(projected)
            return Quantized(self.project_out(vectors), codes, losses, projected.detach())

    @torch.no_grad()
    def search(self, latents: Tensor) -> Tensor:
        """Return the codes of latents [B, N, D] alone, int64 [B, N]."""
        with fp32(latents):
            return self._codes(self._project(latents))

    def _codes(self, projected: Tensor) -> Tensor:
        """Codes [B, N] of projected latents [B, N, dim]."""
        return self._quantize(projected)[1]

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the latents [B, N, D] of codes as in `Quantized.codes`, exactly those that quantization gave."""
        with fp32(codes):
            return self.project_out(self._vectors(codes))

    def project(self, latents: Tensor) -> Quantized:
        """Pass latents [B, N, D] through the projections without quantizing them, on the scale of the codebook (warm-up)."""
        with fp32(latents):
            projected = self._project(latents)
            return Quantized(self.project_out(projected.tanh() if self.bounded else projected), None, {}, projected.detach())

    def _project(self, latents: Tensor) -> Tensor:
        return self.project_in(latents.float())

    def _quantize(self, projected: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """[B, N, dim] -> vectors of the codes, straight-through; codes [B, N]; losses."""
        raise NotImplementedError

    def _vectors(self, codes: Tensor) -> Tensor:
        return self.quantize.indices_to_codes(codes)

    @property
    def codebooks(self) -> list[Codebook]:
        """The learned codebook of each of several levels."""
        return []

    @property
    def started(self) -> bool:
        """Whether the codebook is initialized, so that it can quantize."""
        return True

    def init_codebook(self, projected: Tensor, seed: int = 0) -> None:
        """Initialize the codebook from vectors [..., dim] of several batches."""

    def update(self, projected: Tensor, seed: int = 0) -> int:
        """Update the codebook with the vectors [..., dim] of one whole batch. Returns the number of codes that were revived."""
        return 0


class VectorQuantizer(Quantizer):
    """One learned `Codebook` of `size` codes of `dim` dimensions for latents of `channels`.

    Few dimensions and length 1 (`normalize`) keep the codebook in use (Yu et al. 2022, "Vector-quantized Image Modeling with
    Improved VQGAN"). entropy_temperature: of an entropy loss, which favors confident choices of codes and uniform usage (cf.
    Open-MAGVIT2, IBQ); 0: no such loss.
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

    def _codes(self, projected: Tensor) -> Tensor:
        return self.codebook.nearest(projected)

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
    """FSQ (Mentzer et al. 2023): dimension i is rounded to one of `scales[i]` values; no codebook is learned, so none
    collapses."""

    bounded = True

    def __init__(self, channels: int, scales: tuple[int, ...] = (8, 8, 8)):
        from vector_quantize_pytorch import FSQ

        quantize = FSQ(levels=list(scales))
        super().__init__(channels, len(scales), int(quantize.codebook_size))
        self.quantize = quantize

    def _quantize(self, projected: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        vectors, codes = self.quantize(projected)
        return vectors, codes.long(), {}


class FiniteScalarFrames(FiniteScalarQuantizer):
    """FSQ as a residual quantizer of a single level: codes are [B, N, 1]."""

    def forward(self, latents: Tensor, levels: int | None = None) -> Quantized:
        q = super().forward(latents)
        assert q.codes is not None
        return replace(q, codes=q.codes[..., None], first=q.latents if self.training else None)

    @torch.no_grad()
    def search(self, latents: Tensor, levels: int | None = None) -> Tensor:
        return super().search(latents)[..., None]

    def lookup(self, codes: Tensor) -> Tensor:
        return super().lookup(codes[..., 0])


class LookupFreeQuantizer(Quantizer):
    """LFQ (Yu et al. 2023, MAGVIT-v2): a code consists of the signs of log2(`size`) dimensions; it needs the entropy loss."""

    bounded = True

    def __init__(self, channels: int, size: int = 512):
        from vector_quantize_pytorch import LFQ

        dim = size.bit_length() - 1
        super().__init__(channels, dim, size)
        weights = {"entropy_loss_weight": 1.0, "commitment_loss_weight": 1.0, "diversity_gamma": 1.0}
        self.quantize = LFQ(dim=dim, codebook_size=size, **weights)

    def _quantize(self, projected: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        (vectors, codes, _), parts = self.quantize(projected, return_loss_breakdown=True)
        losses = {"commitment": parts.commitment, "entropy": parts.per_sample_entropy - parts.batch_entropy}
        return vectors, codes.long(), losses if self.training else {}


class SimVectorQuantizer(Quantizer):
    """SimVQ (Zhu et al. 2024): `size` frozen random codes of `dim` dimensions, transformed by one learned matrix."""

    def __init__(self, channels: int, size: int = 512, dim: int = 8):
        from vector_quantize_pytorch import SimVQ

        super().__init__(channels, dim, size)
        weights = {"input_to_quantize_commit_loss_weight": 0.25, "commitment_weight": 1.0}
        self.quantize = SimVQ(dim=dim, codebook_size=size, rotation_trick=False, **weights)

    def _quantize(self, projected: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        vectors, codes, loss = self.quantize(projected)
        return vectors, codes, {"codebook": loss}


def build_quantizer(config: ImageTokenizerConfig) -> Quantizer:
    """Return the quantizer of an image tokenizer's configuration."""
    c = config
    if c.quantizer == "fsq":
        return FiniteScalarQuantizer(c.z_channels, tuple(c.scales))
    if c.quantizer == "lfq":
        return LookupFreeQuantizer(c.z_channels, c.codebook_size)
    if c.quantizer == "simvq":
        return SimVectorQuantizer(c.z_channels, c.codebook_size, c.codebook_dim)
    return VectorQuantizer(c.z_channels, c.codebook_size, c.codebook_dim, c.codebook_normalize)


class ResidualQuantizer(Quantizer):
    """`levels` codebooks of `size` codes; each quantizes the residual of those before (Zeghidour et al. 2021, SoundStream).

    Without `normalize` the levels share a space of `dim` dimensions (0: that of the latents, without projections, as in
    EnCodec). With it each level has its own projections (dim > 0) to a space where latents and codes have length 1, as in DAC.

    dropout: fraction of training items that are decoded from a random number of the first levels, as in DAC.
    """

    ema_updated = True
    project_in: nn.ModuleList
    project_out: nn.ModuleList

    def __init__(
        self, channels: int, levels: int = 4, size: int = 256, dim: int = 16, normalize: bool = False, dropout: float = 0.0
    ):
        nn.Module.__init__(self)
        self.size, self.levels, self.normalize, self.dropout = size, levels, normalize, float(dropout)
        spaces = levels if normalize else 1
        self.project_in = nn.ModuleList([nn.Linear(channels, dim) if dim else nn.Identity() for _ in range(spaces)])
        self.project_out = nn.ModuleList([nn.Linear(dim, channels) if dim else nn.Identity() for _ in range(spaces)])
        self.layers = nn.ModuleList([Codebook(size, dim or channels, normalize) for _ in range(levels)])

    def first_levels(self, count: int) -> "ResidualQuantizer":
        """Return a copy that has only the first `count` levels."""
        first = copy.deepcopy(self)
        first.levels, first.layers = count, first.layers[:count]
        if self.normalize:
            first.project_in, first.project_out = first.project_in[:count], first.project_out[:count]
        return first

    @property
    def codebooks(self) -> list[Codebook]:
        return [layer for layer in self.layers if isinstance(layer, Codebook)]

    @property
    def started(self) -> bool:
        return all(bool(codebook.initted) for codebook in self.codebooks)

    def forward(self, latents: Tensor, levels: int | None = None) -> Quantized:
        """Quantize latents [B, N, D] by the first `levels` (default: all). `Quantized.projected` is [B, N, levels * d], the
        vectors of each level."""
        return self._decompose(latents, levels)

    @torch.no_grad()
    def search(self, latents: Tensor, levels: int | None = None) -> Tensor:
        """Return the codes of latents [B, N, D] alone, int64 [B, N, levels]: those of `forward`, without losses and vectors."""
        with fp32(latents):
            residual = latents.float() if self.normalize else self.project_in[0](latents.float())
            codes: list[Tensor] = []
            for k, codebook in enumerate(self.codebooks[: levels or self.levels]):
                if k:
                    vectors = self.codebooks[k - 1].lookup(codes[-1])
                    residual = residual - (self.project_out[k - 1](vectors) if self.normalize else vectors)
                projected = codebook.scaled(self.project_in[k](residual)) if self.normalize else residual
                codes.append(codebook.nearest(projected))
            return torch.stack(codes, -1)

    def project(self, latents: Tensor) -> Quantized:
        return self._decompose(latents, quantize=False)

    @torch.no_grad()
    def init_codebook(self, projected: Tensor, seed: int = 0) -> None:
        """Initialize the codebooks, level by level, from latents [..., D] that were not quantized."""
        self._decompose(projected.reshape(1, -1, projected.shape[-1]), init_seed=seed)

    def _decompose(
        self, latents: Tensor, levels: int | None = None, quantize: bool = True, init_seed: int | None = None
    ) -> Quantized:
        """Quantize level by level. quantize: False leaves vectors as they are. init_seed: initialize each codebook before its
        use."""
        levels = levels or self.levels
        with fp32(latents):
            latents = latents.float()
            shared = latents if self.normalize else self.project_in[0](latents)
            kept = self._kept(latents, levels) if quantize or self.normalize else None
            residual, total = shared, torch.zeros_like(shared)
            codes: list[Tensor] = []
            first: Tensor | None = None
            vectors_of_levels, commitment = [], shared.new_zeros(())
            for k, codebook in enumerate(self.codebooks[:levels]):
                projected = codebook.scaled(self.project_in[k](residual)) if self.normalize else residual
                if init_seed is not None:
                    codebook.init_codebook(projected.flatten(0, 1), init_seed + k)
                vectors = projected
                if quantize:
                    codes.append(codebook.nearest(projected.detach()))
                    vectors = codebook.lookup(codes[-1])
                commitment = commitment + F.mse_loss(projected, vectors)
                vectors_of_levels.append(projected.detach())
                out = self.project_out[k](_straight_through(projected, vectors)) if self.normalize else vectors
                if not k and quantize and self.training and torch.is_grad_enabled():
                    first = out if self.normalize else self.project_out[0](_straight_through(projected, vectors))
                total = total + (out if kept is None else out * (kept > k))
                residual = residual - out.detach()
            if not self.normalize:
                total = self.project_out[0](_straight_through(shared, total))
            if not quantize:
                return Quantized(total, None, {}, latents.detach())
            losses, projected = {"commitment": commitment}, torch.cat(vectors_of_levels, -1)
            return Quantized(total, torch.stack(codes, -1), losses, projected, first)

    def _kept(self, latents: Tensor, levels: int) -> Tensor | None:
        """Number of levels that each item is decoded from, [B, 1, 1]; None for all of them."""
        if not self.training or not self.dropout or not torch.is_grad_enabled():
            return None
        b = len(latents)
        fewer = torch.randint(1, levels + 1, (b,), device=latents.device)
        dropped = torch.rand(b, device=latents.device) < self.dropout
        return torch.where(dropped, fewer, levels)[:, None, None]

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the latents [B, N, D] of codes int64 [B, N, k], k <= levels: the sum over the first k levels."""
        with fp32(codes):
            rows = [codebook.lookup(level) for codebook, level in zip(self.codebooks, codes.unbind(-1))]
            if self.normalize:
                rows = [self.project_out[k](row) for k, row in enumerate(rows)]
            total = sum(rows[1:], rows[0])
            return total if self.normalize else self.project_out[0](total)

    def update(self, projected: Tensor, seed: int = 0) -> int:
        parts = projected.reshape(-1, projected.shape[-1]).chunk(self.levels, -1)
        return sum(self.codebooks[k].update(part, self.decay, seed + k) for k, part in enumerate(parts))
