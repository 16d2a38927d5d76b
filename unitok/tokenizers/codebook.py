"""A learned codebook: nearest codes, moving averages, a start by k-means, revival of dead codes.

Ours, because vector-quantize-pytorch's is started, taught and revived only through its private parts, and draws from the global
random state; a step of learning gives the same codes (tests/tokenizers/test_parity.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 24  # entries of a matrix of similarities that exist at once, vectors x codes
DEAD_BELOW = 0.1  # a code used less than this share of the uniform use, on (moving) average, is dead
SMOOTHING = 1e-5  # Laplace's, of how often codes are used, so that an unused one is not divided by 0


class Codebook(nn.Module):
    """`size` codes of `dim` dimensions, learned from vectors by moving averages (van den Oord et al. 2017, appendix A.1).

    Only `update`, called once for each whole batch, changes it: a batch may come in parts, or be shared among processes. All that is
    random is drawn by a seed. normalize: codes have length 1.

    Attributes (vector-quantize-pytorch's names):
        embed: [size, dim]. cluster_size: [size], how often a code is used by a batch. embed_avg: [size, dim], sums of the vectors
            of each code. initted: whether it was started.
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
        """Vectors [..., dim], of length 1 where codes are."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def nearest(self, vectors: Tensor) -> Tensor:
        """[..., dim] -> int64 [...]."""
        return nearest(vectors, self.embed)

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 [...] -> [..., dim]."""
        return F.embedding(codes, self.embed)

    @torch.no_grad()
    def set(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Put codes [size, dim] in place, with how often each was used (default: alike)."""
        counts = torch.ones(len(codes), device=codes.device) if counts is None else counts
        self.embed.copy_(self.scaled(codes))
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(self.embed * counts[:, None])  # sums, so that the first update keeps the codes
        self.initted.fill_(True)

    @torch.no_grad()
    def init_codebook(self, vectors: Tensor, seed: int = 0, iterations: int = 10) -> None:
        """Begin with the k-means of vectors [N, dim], by Lloyd's algorithm from some of them."""
        centres = _draw(vectors, self.size, torch.Generator(vectors.device).manual_seed(seed))
        counts = centres.new_ones(self.size)
        for _ in range(iterations):
            sums, counts = _sums(vectors, nearest(vectors, centres), self.size)
            means = self.scaled(sums / counts[:, None].clamp_min(1))
            centres = torch.where(counts[:, None] > 0, means, centres)
        self.set(centres, counts)

    @torch.no_grad()
    def update(self, vectors: Tensor, decay: float, seed: int = 0) -> int:
        """Move the averages by one batch, vectors [N, dim], and put vectors in the place of dead codes; -> how many."""
        sums, counts = _sums(vectors, self.nearest(vectors), self.size)
        self.cluster_size.lerp_(counts, 1 - decay)
        self.embed_avg.lerp_(sums, 1 - decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + SMOOTHING) / (total + self.size * SMOOTHING) * total
        self.embed.copy_(self.scaled(self.embed_avg / smoothed[:, None]))
        return self._revive(vectors, torch.Generator(vectors.device).manual_seed(seed))

    def _revive(self, vectors: Tensor, generator: torch.Generator) -> int:
        uniform = len(vectors) / self.size  # where a revived code starts: with less it would be dead again on the next step
        dead = (self.cluster_size < DEAD_BELOW * uniform).nonzero().flatten()
        if len(dead) > len(vectors):  # the others' turn comes: a code twice would help nobody
            dead = dead[torch.randperm(len(dead), generator=generator, device=dead.device)[: len(vectors)]]
        drawn = self.scaled(_draw(vectors, len(dead), generator))
        self.embed[dead], self.cluster_size[dead], self.embed_avg[dead] = drawn, uniform, drawn * uniform
        return len(dead)


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """[..., d] and [K, d] -> int64 [...]: the row of the codebook at the smallest distance. Memory is bounded by `CHUNK`."""
    center = codebook.mean(0)  # far from it the difference of large numbers would be lost to rounding
    flat, codebook = vectors.reshape(-1, vectors.shape[-1]) - center, codebook - center
    half = codebook.square().sum(-1) / 2
    rows = max(1, CHUNK // len(codebook))
    parts = [torch.addmm(half, part, codebook.T, beta=-1).argmax(-1) for part in flat.split(rows)]
    return torch.cat(parts).reshape(vectors.shape[:-1])


def _draw(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Some of the vectors [N, d] at random, [count, d]; no one twice, unless there are fewer."""
    n = len(vectors)
    chosen = torch.randperm(n, generator=generator, device=vectors.device)[:count]
    if n < count:
        chosen = torch.randint(n, (count,), generator=generator, device=vectors.device)
    return vectors[chosen]


def _sums(vectors: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For every code the sum [size, d] and the number [size] of its vectors."""
    sums = vectors.new_zeros(size, vectors.shape[-1]).index_add_(0, codes, vectors)
    return sums, torch.bincount(codes, minlength=size).to(vectors)
