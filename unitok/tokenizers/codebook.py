"""A learned codebook: nearest neighbors, moving averages, k-means initialization, revival of dead codes.

It is our own, because that of vector-quantize-pytorch can be initialized, updated and revived only through private methods, and
uses the global random state. One update gives the same codes as theirs (tests/tokenizers/test_parity.py).
"""

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 24  # most entries of the matrix of distances, vectors x codes, that is held at once
DEAD_BELOW = 0.1  # a code is dead if its (moving average) usage is below this fraction of uniform usage
SMOOTHING = 1e-5  # Laplace smoothing of usage counts, against division by 0


class Codebook(nn.Module):
    """`size` codes of `dim` dimensions, learned from vectors by moving averages (van den Oord et al. 2017, appendix A.1).

    Only `update` changes it, called once per whole batch, so a batch may be processed in parts or by several processes.
    Randomness comes from seeds alone. normalize: codes have length 1.

    Attributes (named as in vector-quantize-pytorch):
        embed: the codes, [size, dim]. cluster_size: moving average of the vectors per code and batch, [size]. embed_avg: moving
            average of the sum of the vectors of each code, [size, dim]. initted: whether the codebook was initialized.
    """

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor

    def __init__(self, size: int, dim: int, normalize: bool):
        super().__init__()
        self.size, self.normalize = size, normalize
        self.register_buffer("embed", torch.zeros(size, dim))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed_avg", torch.zeros(size, dim))
        self.register_buffer("initted", torch.tensor(False))

    def scaled(self, vectors: Tensor) -> Tensor:
        """Return vectors [..., dim], scaled to length 1 if codes have that."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the nearest code of each vector: [..., dim] -> int64 [...]."""
        return nearest(vectors, self.embed)

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors of codes: int64 [...] -> [..., dim]."""
        return F.embedding(codes, self.embed)

    @torch.no_grad()
    def set(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Replace all codes. codes: [size, dim]. counts: [size], usage of each (default: equal)."""
        counts = self.cluster_size.new_ones(len(codes)) if counts is None else counts.to(self.cluster_size)
        self.embed.copy_(self.scaled(codes.to(self.embed)))
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(self.embed * counts[:, None])  # sums: the first update then keeps the codes
        self.initted.fill_(True)

    @torch.no_grad()
    def init_from(self, codebook: "Codebook") -> None:
        """Begin with the codes of a codebook that is not larger. They count as often used, so for a hundred updates they hardly change, whatever
        the batches; the others repeat the first one and count as dead, until an update."""
        more, counts = self.size - codebook.size, codebook.cluster_size
        often = 1000 * counts / counts.mean().clamp_min(SMOOTHING)
        self.set(torch.cat([codebook.embed, codebook.embed[:1].expand(more, -1)]), F.pad(often.clamp_min(100), (0, more)))

    @torch.no_grad()
    def init_codebook(self, vectors: Tensor, seed: int = 0, iterations: int = 10) -> None:
        """Initialize the codes by k-means of vectors [N, dim]: Lloyd's algorithm from a random choice of them."""
        centers = _draw(vectors, self.size, torch.Generator(vectors.device).manual_seed(seed))
        counts = centers.new_ones(self.size)
        for _ in range(iterations):
            sums, counts = _sums(vectors, nearest(vectors, centers), self.size)
            means = self.scaled(sums / counts[:, None].clamp_min(1))
            centers = torch.where(counts[:, None] > 0, means, centers)
        self.set(centers, counts)

    @torch.no_grad()
    def update(self, vectors: Tensor, decay: float, seed: int = 0) -> int:
        """Update the moving averages with one batch of vectors [N, dim], and replace dead codes by some of them. Returns the
        number of codes that were replaced."""
        sums, counts = _sums(vectors, self.nearest(vectors), self.size)
        self.cluster_size.lerp_(counts, 1 - decay)
        self.embed_avg.lerp_(sums, 1 - decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + SMOOTHING) / (total + self.size * SMOOTHING) * total
        self.embed.copy_(self.scaled(self.embed_avg / smoothed[:, None]))
        return self._revive(vectors, torch.Generator(vectors.device).manual_seed(seed))

    def _revive(self, vectors: Tensor, generator: torch.Generator) -> int:
        uniform = len(vectors) / self.size  # initial count of a revived code; with less it would be dead again after one update
        dead = (self.cluster_size < DEAD_BELOW * uniform).nonzero().flatten()
        if len(dead) > len(vectors):  # revive as many as there are different vectors, the others later
            dead = dead[torch.randperm(len(dead), generator=generator, device=dead.device)[: len(vectors)]]
        drawn = self.scaled(_draw(vectors, len(dead), generator))
        self.embed[dead], self.cluster_size[dead], self.embed_avg[dead] = drawn, uniform, drawn * uniform
        return len(dead)


def fp32(x: Tensor) -> AbstractContextManager:
    """Leave autocast on the device of a tensor: codes are defined in float32."""
    return torch.autocast(x.device.type, enabled=False)


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest row of a codebook [K, d] for vectors [..., d], int64 [...], in fp32. `CHUNK` bounds the memory."""
    center = codebook.mean(0)  # subtracted, because small differences of large numbers are lost to rounding
    flat, codebook = vectors.reshape(-1, vectors.shape[-1]).float() - center, codebook - center
    half = codebook.square().sum(-1) / 2
    rows = max(1, CHUNK // len(codebook))
    with fp32(vectors):  # an update is under autocast, too
        parts = [_argmax(torch.addmm(half, part, codebook.T, beta=-1)) for part in flat.split(rows)]
    return torch.cat(parts).reshape(vectors.shape[:-1])


def _argmax(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)` of [N, K], int64 [N]. On a CPU NumPy's, which is eight times as fast (docs/notes.md) and equal."""
    return torch.from_numpy(scores.detach().numpy().argmax(-1)) if scores.device.type == "cpu" else scores.argmax(-1)


def _draw(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw vectors of [N, d] at random, [count, d]; without repetition if there are enough."""
    n = len(vectors)
    chosen = torch.randperm(n, generator=generator, device=vectors.device)[:count]
    if n < count:
        chosen = torch.randint(n, (count,), generator=generator, device=vectors.device)
    return vectors[chosen]


def _sums(vectors: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the sum [size, d] and the number [size] of the vectors of each code."""
    sums = vectors.new_zeros(size, vectors.shape[-1]).index_add_(0, codes, vectors)
    return sums, torch.bincount(codes, minlength=size).to(vectors)
