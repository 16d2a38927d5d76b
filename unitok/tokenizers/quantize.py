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
- `ResidualQuantizer`: a stack of codebooks for sound (Zeghidour et al. 2021, SoundStream), taught like the first, each
  level on what the ones before left over; Euclidean as in EnCodec, or l2-normalised as in DAC; quantizer dropout.

All compute in fp32, also under autocast: in bfloat16 the nearest code is often another one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize

#: Entries of a matrix of similarities that exist at once, vectors x codes.
CHUNK = 1 << 24
#: A code used less than this share of the uniform use, on (moving) average, is dead.
DEAD_BELOW = 0.1


@dataclass
class Quantized:
    """What quantizing gives.

    latents: [B, N, D], straight-through. codes: int64 [B, N], or [B, N, K] with K levels. losses: scalars by name, not
    weighted: `commitment`, `entropy`, `codebook`. low: what `Quantizer.update` learns from, or, of a pass without
    quantisation, what `Quantizer.start` begins with.
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
    """[..., d] and [K, d] -> int64 [...]: the row of the codebook at the smallest distance. Memory is bounded by `CHUNK`.

    Distances are taken from the codebook's mean: far from it the difference of large numbers would be lost to rounding.
    """
    centre = codebook.mean(0)
    flat, codebook = vectors.reshape(-1, vectors.shape[-1]) - centre, codebook - centre
    half = codebook.square().sum(-1) / 2
    rows = max(1, CHUNK // len(codebook))
    parts = [torch.addmm(half, part, codebook.T, beta=-1).argmax(-1) for part in flat.split(rows)]
    return torch.cat(parts).reshape(vectors.shape[:-1])


def kmeans(
    vectors: Tensor, size: int, generator: torch.Generator | None = None, iterations: int = 10, normalise: bool = False
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: vectors [N, d] -> centres [size, d] and how many vectors each has. Draws the first centres at random."""
    centres = _draw(vectors, size, generator)
    counts = centres.new_ones(size)
    for _ in range(iterations):
        sums, counts = _sums(vectors, nearest(vectors, centres), size)
        means = sums / counts[:, None].clamp_min(1)
        means = F.normalize(means, dim=-1) if normalise else means
        centres = torch.where(counts[:, None] > 0, means, centres)
    return centres, counts


def _draw(vectors: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Some of the vectors [N, d] at random, [count, d]; no one twice, unless there are fewer."""
    n = len(vectors)
    chosen = torch.randperm(n, generator=generator, device=vectors.device)[:count]
    if n < count:
        chosen = torch.randint(n, (count,), generator=generator, device=vectors.device)
    return vectors[chosen]


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _sums(vectors: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For every code the sum [size, d] and the number [size] of its vectors."""
    sums = vectors.new_zeros(size, vectors.shape[-1]).index_add_(0, codes, vectors)
    return sums, torch.bincount(codes, minlength=size).to(vectors)


def make_codebook(dim: int, size: int, normalise: bool) -> VectorQuantize:
    """The library's codebook, which the functions here start and teach."""
    return VectorQuantize(
        dim=dim,
        codebook_size=size,
        use_cosine_sim=normalise,
        kmeans_init=True,
        threshold_ema_dead_code=0,  # `update_codebook` revives
        rotation_trick=False,
        sync_codebook=False,
    )


def set_codebook(quantize: VectorQuantize, codes: Tensor, counts: Tensor | None = None) -> None:
    """Put a codebook [size, dim] in place, with how often each code was used (default: alike)."""
    book: Any = quantize._codebook
    counts = torch.ones(len(codes), device=codes.device) if counts is None else counts
    book.embed.copy_((F.normalize(codes, dim=-1) if quantize.use_cosine_sim else codes)[None])
    book.cluster_size.copy_(counts[None])
    book.embed_avg.copy_(book.embed * counts[None, :, None])  # sums, so that the first update keeps the codes
    book.initted.fill_(True)


def start_codebook(quantize: VectorQuantize, vectors: Tensor, seed: int) -> None:
    """Begin a codebook, by k-means, from vectors [N, dim]."""
    generator = _generator(seed, vectors.device)
    centres, counts = kmeans(vectors, quantize.codebook_size, generator, normalise=quantize.use_cosine_sim)
    set_codebook(quantize, centres, counts)


def update_codebook(quantize: VectorQuantize, vectors: Tensor, codes: Tensor, decay: float, seed: int) -> int:
    """Move the moving averages by one batch, vectors [N, dim] and their codes [N], and revive what is dead; -> how many."""
    book: Any = quantize._codebook
    size = quantize.codebook_size
    sums, counts = _sums(vectors, codes, size)
    book.cluster_size.lerp_(counts[None], 1 - decay)
    book.embed_avg.lerp_(sums[None], 1 - decay)
    book.update_ema()
    uniform = len(vectors) / size  # where a revived code starts: with less it would be dead again on the next step
    dead = (book.cluster_size[0] < DEAD_BELOW * uniform).nonzero().flatten()
    generator = _generator(seed, vectors.device)
    if len(dead) > len(vectors):  # the others' turn comes: a code twice would help nobody
        dead = dead[torch.randperm(len(dead), generator=generator, device=dead.device)[: len(vectors)]]
    drawn = _draw(vectors, len(dead), generator)
    drawn = F.normalize(drawn, dim=-1) if quantize.use_cosine_sim else drawn
    book.embed[0, dead], book.cluster_size[0, dead], book.embed_avg[0, dead] = drawn, uniform, drawn * uniform
    return len(dead)


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
        self.quantize = make_codebook(dim, size, normalise)

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
        with _fp32(codes):
            return self.project_out(F.embedding(codes, self.codebook))

    def pass_through(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            low = self._project(latents)
            return Quantized(self.project_out(low), None, {}, low.detach())

    @torch.no_grad()
    def start(self, low: Tensor, seed: int = 0) -> None:
        start_codebook(self.quantize, low.reshape(-1, low.shape[-1]), seed)

    @torch.no_grad()
    def set_codebook(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Put a codebook [size, dim] in place, with how often each code was used (default: alike)."""
        set_codebook(self.quantize, codes, counts)

    @torch.no_grad()
    def update(self, low: Tensor, seed: int = 0) -> int:
        vectors = low.reshape(-1, low.shape[-1])
        if not self.started:
            self.start(vectors, seed)
        return update_codebook(self.quantize, vectors, nearest(vectors, self.codebook), self.decay, seed)


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
        with _fp32(codes):
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
        with _fp32(codes):
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
        with _fp32(codes):
            return self.project_out(self.quantize.indices_to_codes(codes))

    def pass_through(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            return Quantized(self.project_out(self.project_in(latents.float())), None)


class ResidualQuantizer(Quantizer):
    """`levels` codebooks of `size` codes of `dim` dimensions, each quantizing what the ones before left over.

    Not normalised, the levels share a space of `dim` dimensions (0: the latents' own, without projections, as EnCodec).
    Normalised, each level has projections of its own into one where latents and codes have length 1, as DAC has.

    Args:
        dropout: share of the training items that are decoded from a random number of the first levels, so that fewer
            levels decode well. (Zeghidour et al. 2021; by item as in DAC.)

    Attributes:
        decay: of the moving averages, for each `update`.
    """

    learns_by_update = True

    def __init__(
        self, channels: int, levels: int = 4, size: int = 256, dim: int = 16, normalise: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        self.size, self.levels, self.normalise, self.dropout = size, levels, normalise, float(dropout)
        self.decay = 0.95
        if normalise and not dim:
            raise ValueError("normalised levels need dimensions of their own: dim > 0")
        spaces = levels if normalise else 1
        self.project_in = nn.ModuleList([nn.Linear(channels, dim) if dim else nn.Identity() for _ in range(spaces)])
        self.project_out = nn.ModuleList([nn.Linear(dim, channels) if dim else nn.Identity() for _ in range(spaces)])
        self.layers = nn.ModuleList([make_codebook(dim or channels, size, normalise) for _ in range(levels)])

    def codebook(self, level: int) -> Tensor:
        """[size, dim]."""
        layer: Any = self.layers[level]
        return layer._codebook.embed[0]

    @property
    def started(self) -> bool:
        return all(bool(layer._codebook.initted) for layer in self.layers)  # type: ignore[union-attr]

    def forward(self, latents: Tensor, levels: int | None = None) -> Quantized:
        """[B, N, D] -> `Quantized` by the first `levels` (default all). `low`: [B, N, levels * d], each level's vectors."""
        with _fp32(latents):
            return self._quantize(latents.float(), levels or self.levels, lambda low, k: nearest(low, self.codebook(k)))

    def pass_through(self, latents: Tensor) -> Quantized:
        with _fp32(latents):
            latents = latents.float()
            if not self.normalise:
                return Quantized(self.project_out[0](self.project_in[0](latents)), None, {}, latents.detach())
            return Quantized(self._quantize(latents, self.levels, None).latents, None, {}, latents.detach())

    def _quantize(self, latents: Tensor, levels: int, choose: Callable[[Tensor, int], Tensor] | None) -> Quantized:
        """`choose`: vectors [B, N, d] and a level -> codes [B, N]; None lets the vectors be their own codes."""
        kept = self._kept(latents, levels)
        spread = latents if self.normalise else self.project_in[0](latents)
        residual, total = spread, torch.zeros_like(spread)
        codes: list[Tensor] = []
        lows: list[Tensor] = []
        commitment = latents.new_zeros(())
        for k in range(levels):
            low = F.normalize(self.project_in[k](residual), dim=-1) if self.normalise else residual
            vectors = low
            if choose is not None:
                codes.append(choose(low.detach(), k))
                vectors = F.embedding(codes[-1], self.codebook(k))
                commitment = commitment + F.mse_loss(low, vectors)
                lows.append(low.detach())
            out = self.project_out[k](low + (vectors - low).detach()) if self.normalise else vectors
            total = total + (out if kept is None else out * (kept > k))
            residual = residual - out.detach()
        if not self.normalise:
            total = self.project_out[0](spread + (total - spread).detach())
        if not codes:
            return Quantized(total, None, {}, latents.detach())
        return Quantized(total, torch.stack(codes, -1), {"commitment": commitment}, torch.cat(lows, -1))

    def search(self, latents: Tensor, levels: int | None = None) -> Tensor:
        """[B, N, D] -> codes alone, int64 [B, N, levels]: `forward` without what training wants."""
        with _fp32(latents), torch.no_grad():
            residual = latents.float() if self.normalise else self.project_in[0](latents.float())
            codes = []
            for k in range(levels or self.levels):
                low = F.normalize(self.project_in[k](residual), dim=-1) if self.normalise else residual
                codes.append(nearest(low, self.codebook(k)))
                vectors = F.embedding(codes[-1], self.codebook(k))
                residual = residual - (self.project_out[k](vectors) if self.normalise else vectors)
            return torch.stack(codes, -1)

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
            rows = [F.embedding(level, self.codebook(k)) for k, level in enumerate(codes.unbind(-1))]
            if self.normalise:
                rows = [self.project_out[k](row) for k, row in enumerate(rows)]
            total = rows[0]
            for row in rows[1:]:
                total = total + row
            return total if self.normalise else self.project_out[0](total)

    @torch.no_grad()
    def start(self, low: Tensor, seed: int = 0) -> None:
        """Begin the codebooks, one level after the other, from latents [N, D] that passed without quantisation."""
        residual = low.reshape(-1, low.shape[-1]).float()
        residual = residual if self.normalise else self.project_in[0](residual)
        for k in range(self.levels):
            vectors = F.normalize(self.project_in[k](residual), dim=-1) if self.normalise else residual
            start_codebook(self.layers[k], vectors, seed + k)  # type: ignore[arg-type]
            chosen = F.embedding(nearest(vectors, self.codebook(k)), self.codebook(k))
            residual = residual - (self.project_out[k](chosen) if self.normalise else chosen)

    @torch.no_grad()
    def update(self, low: Tensor, seed: int = 0) -> int:
        revived = 0
        for k, vectors in enumerate(low.reshape(-1, low.shape[-1]).chunk(self.levels, -1)):
            codes = nearest(vectors, self.codebook(k))
            revived += update_codebook(self.layers[k], vectors, codes, self.decay, seed + k)  # type: ignore[arg-type]
        return revived
