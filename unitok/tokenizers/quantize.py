"""Quantizers behind one interface: latents [B, N, D] channel-last <-> codes.

The only file that touches vector-quantize-pytorch. Every flag that matters is passed by name, because its defaults
change between releases. Projections to the low dimension of the codebook are ours: with `codebook_dim != dim` and image
maps, release 1.32.0 projects the wrong axis when it decodes.

- `VectorQuantizer`: one codebook; l2-normalised and low-dimensional by default (Yu et al. 2022, "Vector-quantized Image
  Modeling with Improved VQGAN": what keeps a codebook in use). Its codebook is not touched by `forward` but by `update`,
  once for each whole batch: EMA, k-means start, revival of dead codes relative to the batch. So a step may run forward
  as often as it likes, accumulate gradients over parts of a batch, or share a batch among processes.
- `FiniteScalarQuantizer`: FSQ (Mentzer et al. 2023), no codebook to collapse.
- `LookupFreeQuantizer`: LFQ (Yu et al. 2023, MAGVIT-v2), codes are signs; needs its entropy loss.
- `SimVectorQuantizer`: SimVQ (Zhu et al. 2024), a frozen codebook behind one learned matrix.
- `ResidualQuantizer`: a stack of codebooks for sound (Zeghidour et al. 2021, SoundStream), optional quantizer dropout.

All compute in fp32, also under autocast: in bfloat16 the nearest code is often another one.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize

#: Entries of a matrix of similarities that exist at once, vectors x codes.
CHUNK = 1 << 24
#: A code used less than this share of the uniform use, on (moving) average, is dead.
DEAD_BELOW = 0.1


@dataclass
class Quantized:
    """What quantizing gives.

    latents: [B, N, D], straight-through. codes: int64 [B, N], or [B, N, K] with K levels. losses: scalars by name, not
    weighted: `commitment`, `entropy`, `codebook`. low: the vectors that were quantized, for `Quantizer.update`.
    """

    latents: Tensor
    codes: Tensor | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    low: Tensor | None = None


class Quantizer(nn.Module):
    """What all quantizers do. `size`: codes a level; `levels`: levels of codes (1 but for residual ones).

    `learns_by_update`: whether `update` is to be called once for each batch, and `started` says something.
    """

    size: int
    levels: int = 1
    learns_by_update = False

    def forward(self, latents: Tensor) -> Quantized:
        """[B, N, D] -> `Quantized`."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes as `Quantized.codes` -> latents [B, N, D]: exactly what quantizing to these codes gave."""
        raise NotImplementedError

    def pass_through(self, latents: Tensor) -> Quantized:
        """[B, N, D] through the projections alone, on the scale of the codebook: a warm-up without quantisation."""
        raise NotImplementedError

    @property
    def started(self) -> bool:
        """Whether there is a codebook to quantize with."""
        return True

    def start(self, low: Tensor, seed: int = 0) -> None:
        """Begin the codebook from the vectors [N, dim] of several batches."""

    def update(self, low: Tensor, seed: int = 0) -> int:
        """Learn the codebook from the vectors [N, dim] of one whole batch; -> how many codes were revived."""
        return 0


def _fp32(x: Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False)


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """[..., d] and [K, d] -> int64 [...]: the row of the codebook at the smallest distance. Memory is bounded by `CHUNK`."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    half = codebook.square().sum(-1) / 2
    rows = max(1, CHUNK // len(codebook))
    parts = [torch.addmm(half, part, codebook.T, beta=-1).argmax(-1) for part in flat.split(rows)]
    return torch.cat(parts).reshape(vectors.shape[:-1])


def kmeans(vectors: Tensor, size: int, iterations: int = 10, normalise: bool = False) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: vectors [N, d] -> centres [size, d] and how many vectors each has. Draws the first centres at random."""
    chosen = torch.randperm(len(vectors), device=vectors.device)[:size]
    if len(vectors) < size:
        chosen = torch.randint(len(vectors), (size,), device=vectors.device)
    centres = vectors[chosen]
    counts = centres.new_ones(size)
    for _ in range(iterations):
        sums, counts = _sums(vectors, nearest(vectors, centres), size)
        means = sums / counts[:, None].clamp_min(1)
        means = F.normalize(means, dim=-1) if normalise else means
        centres = torch.where(counts[:, None] > 0, means, centres)
    return centres, counts


def _sums(vectors: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For every code the sum [size, d] and the number [size] of its vectors."""
    sums = vectors.new_zeros(size, vectors.shape[-1]).index_add_(0, codes, vectors)
    return sums, torch.bincount(codes, minlength=size).to(vectors)


class VectorQuantizer(Quantizer):
    """One codebook of `size` codes of `dim` dimensions for latents of `channels`.

    Args:
        normalise: latents and codes have length 1, so that the nearest code is the one of the smallest angle.

    Attributes:
        decay: of the moving averages, for each `update`.
        entropy_temperature: if not 0, an entropy loss is computed, at this temperature (cf. Open-MAGVIT2, IBQ): each
            vector should be sure of its code, and the batch should use all codes alike.
    """

    learns_by_update = True

    def __init__(self, channels: int, size: int = 512, dim: int = 8, normalise: bool = True):
        super().__init__()
        self.size, self.normalise = size, normalise
        self.decay, self.entropy_temperature = 0.95, 0.0
        self.project_in = nn.Linear(channels, dim)
        self.project_out = nn.Linear(dim, channels)
        self.quantize = VectorQuantize(
            dim=dim,
            codebook_size=size,
            use_cosine_sim=normalise,
            kmeans_init=True,
            threshold_ema_dead_code=1,  # set by every update
            rotation_trick=False,
            sync_codebook=False,
        )

    @property
    def codebook(self) -> Tensor:
        """[size, dim]."""
        return self.quantize._codebook.embed[0]

    @property
    def started(self) -> bool:
        return bool(self.quantize._codebook.initted)

    def _project(self, latents: Tensor) -> Tensor:
        low = self.project_in(latents.float())
        return F.normalize(low, dim=-1) if self.normalise else low

    def forward(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            low = self._project(latents)
            codes = nearest(low.detach(), self.codebook)
            vectors = F.embedding(codes, self.codebook)
            losses = {"commitment": F.mse_loss(low, vectors)}
            if self.entropy_temperature:
                losses["entropy"] = self._entropy(low)
            return Quantized(self.project_out(low + (vectors - low).detach()), codes, losses, low.detach())

    def _entropy(self, low: Tensor) -> Tensor:
        logits = low.reshape(-1, low.shape[-1]) @ self.codebook.T - self.codebook.square().sum(-1) / 2
        log_p = (logits / self.entropy_temperature).log_softmax(-1)
        mean = log_p.exp().mean(0)
        return -(log_p.exp() * log_p).sum(-1).mean() + (mean * mean.clamp_min(1e-9).log()).sum()

    def lookup(self, codes: Tensor) -> Tensor:
        return self.project_out(F.embedding(codes, self.codebook))

    def pass_through(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            low = self._project(latents)
            return Quantized(self.project_out(low), None, {}, low.detach())

    @torch.no_grad()
    def start(self, low: Tensor, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            centres, counts = kmeans(low.reshape(-1, low.shape[-1]), self.size, normalise=self.normalise)
        self.set_codebook(centres, counts)

    @torch.no_grad()
    def set_codebook(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Put a codebook [size, dim] in place, with how often each code was used (default: alike)."""
        book = self.quantize._codebook
        counts = torch.ones(self.size) if counts is None else counts
        book.embed.copy_((F.normalize(codes, dim=-1) if self.normalise else codes)[None])
        book.cluster_size.copy_(counts[None])
        book.embed_avg.copy_(book.embed * counts[None, :, None])  # sums, so that the first update keeps the codes
        book.initted.fill_(True)

    @torch.no_grad()
    def update(self, low: Tensor, seed: int = 0) -> int:
        vectors, book = low.reshape(-1, low.shape[-1]), self.quantize._codebook
        if not self.started:
            self.start(vectors, seed)
        sums, counts = _sums(vectors, nearest(vectors, self.codebook), self.size)
        book.cluster_size.lerp_(counts[None], 1 - self.decay)
        book.embed_avg.lerp_(sums[None], 1 - self.decay)
        book.update_ema()
        # A revived code starts at uniform use; with the library's default it would be dead again on the next step.
        book.reset_cluster_size = len(vectors) / self.size
        book.threshold_ema_dead_code = DEAD_BELOW * book.reset_cluster_size
        dead = int((book.cluster_size < book.threshold_ema_dead_code).sum())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            book.expire_codes_(vectors[None])
        return min(dead, len(vectors))


class FiniteScalarQuantizer(Quantizer):
    """FSQ: each of `len(scales)` dimensions is rounded to one of `scales[i]` values; the size is their product."""

    def __init__(self, channels: int, scales: tuple[int, ...] = (8, 8, 8)):
        super().__init__()
        self.project_in = nn.Linear(channels, len(scales))
        self.project_out = nn.Linear(len(scales), channels)
        self.quantize = FSQ(levels=list(scales))
        self.size = int(self.quantize.codebook_size)

    def forward(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            quantized, codes = self.quantize(self.project_in(latents.float()))
            return Quantized(self.project_out(quantized), codes.long())

    def lookup(self, codes: Tensor) -> Tensor:
        return self.project_out(self.quantize.indices_to_codes(codes))

    def pass_through(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            return Quantized(self.project_out(self.project_in(latents.float()).tanh()), None)


class LookupFreeQuantizer(Quantizer):
    """LFQ: a code is the signs of log2(`size`) dimensions."""

    def __init__(self, channels: int, size: int = 512):
        super().__init__()
        self.size = size
        dim = size.bit_length() - 1
        self.project_in = nn.Linear(channels, dim)
        self.project_out = nn.Linear(dim, channels)
        self.quantize = LFQ(
            dim=dim, codebook_size=size, entropy_loss_weight=1.0, commitment_loss_weight=1.0, diversity_gamma=1.0
        )

    def forward(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            low = self.project_in(latents.float())
            (quantized, codes, _), parts = self.quantize(low, return_loss_breakdown=True)
            losses = {"commitment": parts.commitment, "entropy": parts.per_sample_entropy - parts.batch_entropy}
            return Quantized(self.project_out(quantized), codes.long(), losses if self.training else {})

    def lookup(self, codes: Tensor) -> Tensor:
        return self.project_out(self.quantize.indices_to_codes(codes))

    def pass_through(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            return Quantized(self.project_out(self.project_in(latents.float()).tanh()), None)


class SimVectorQuantizer(Quantizer):
    """SimVQ: `size` random codes of `dim` dimensions that stay as they are, moved together by one learned matrix."""

    def __init__(self, channels: int, size: int = 512, dim: int = 8):
        super().__init__()
        self.size = size
        self.project_in = nn.Linear(channels, dim)
        self.project_out = nn.Linear(dim, channels)
        self.quantize = SimVQ(
            dim=dim,
            codebook_size=size,
            rotation_trick=False,
            input_to_quantize_commit_loss_weight=0.25,
            commitment_weight=1.0,
        )

    def forward(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            quantized, codes, loss = self.quantize(self.project_in(latents.float()))
            return Quantized(self.project_out(quantized), codes, {"codebook": loss})

    def lookup(self, codes: Tensor) -> Tensor:
        return self.project_out(self.quantize.indices_to_codes(codes))

    def pass_through(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            return Quantized(self.project_out(self.project_in(latents.float())), None)


class ResidualQuantizer(Quantizer):
    """`levels` codebooks of `size` codes of `dim` dimensions, each quantizing what the ones before left over.

    In training mode `forward` also updates the codebooks, so it is to be called once a step.

    Args:
        vectors: latents in a training batch (batch x positions); a code used less than a tenth of `vectors / size`
            times a batch on (moving) average is replaced by a latent of the batch, as in Mimi's quantizer.
        decay: of the moving averages.
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
            threshold_ema_dead_code=DEAD_BELOW * vectors / size,
            commitment_weight=1.0,
            rotation_trick=False,
            quantize_dropout=dropout,
        )
        for layer in self.quantize.layers:
            # A revived code starts at uniform use; with the library's default it would be dead again on the next step.
            layer._codebook.reset_cluster_size = vectors / size

    @property
    def started(self) -> bool:
        return all(bool(layer._codebook.initted) for layer in self.quantize.layers)

    def forward(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            quantized, codes, loss = self.quantize(self.project_in(latents.float()))
            return Quantized(self.project_out(quantized), codes, {"commitment": loss.sum()})

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 [B, N, k], k <= levels -> latents [B, N, D]: the sum over the levels given."""
        layers = self.quantize.layers[: codes.shape[-1]]
        return self.project_out(sum(layer.get_codes_from_indices(codes[..., i]) for i, layer in enumerate(layers)))

    def pass_through(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            return Quantized(self.project_out(self.project_in(latents.float())), None)
