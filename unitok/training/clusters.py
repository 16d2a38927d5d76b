"""What the first level of a speech tokenizer is taught: a teacher's features, or the cluster of each frame's MFCCs, roughly the phone.

SpeechTokenizer (Zhang et al. 2024) teaches its first level HuBERT's features. HuBERT itself began from clusters of MFCCs (Hsu et al. 2021,
section 3.1), which need no other model.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.data.features import RATE
from unitok.errors import UserError
from unitok.tokenizers.codebook import Codebook
from unitok.training.losses import mel_filters

COEFFICIENTS = 13
BANDS = 40
WINDOW = 0.032  # seconds
DECAY = 0.9  # of the clusters' moving averages, per batch


class FeatureDistillation(nn.Module):
    """A linear map from latents [B, N, dimension], one per `seconds`, to a teacher's features [B, M, size] at `features.RATE` per second.

    classes: features are probabilities of classes, say of phones; all 0 where the class is not known.
    """

    def __init__(self, dimension: int, size: int, seconds: float, classes: bool = False):
        super().__init__()
        self.seconds, self.classes = seconds, classes
        self.head = nn.Linear(dimension, size)
        self._checked = False

    def loss(self, latents: Tensor, features: Tensor) -> Tensor:
        """Of classes, the cross-entropy in nats; else the mean of -log sigmoid(c) over features; c is the cosine, over time, of a feature
        and its prediction: SpeechTokenizer's distillation along the dimensions of the features (Zhang et al. 2024, section 3.2).

        Errors: `UserError` for classes whose probabilities are negative or sum to more than 1.
        """
        targets = averaged(features, latents.shape[1], self.seconds * RATE)
        predictions = self.head(latents.float())
        assert predictions.shape == targets.shape, f"features {list(targets.shape)}, predictions {list(predictions.shape)}"
        if self.classes:
            known = targets.sum(-1)
            if not self._checked and (features.min() < 0 or features.sum(-1).max() > 1.01):
                raise UserError("semantic_classes: features are not probabilities (from 0 on, with a sum of at most 1)")
            self._checked = True  # of one batch: a look at the values waits for a GPU
            return -(targets * predictions.log_softmax(-1)).sum() / known.sum().clamp_min(1e-3)
        return -F.logsigmoid(F.cosine_similarity(predictions, targets, dim=1)).mean()


def averaged(features: Tensor, count: int, width: float) -> Tensor:
    """Average features [B, M, size] over `count` intervals of `width` features each -> [B, count, size]; beyond their end they are zero."""
    edges = torch.arange(count + 1, device=features.device) * width
    features = F.pad(features, (0, 0, 0, max(0, math.ceil(count * width) + 1 - features.shape[1])))
    whole = edges.long()
    before = F.pad(features.cumsum(1), (0, 0, 1, 0))[:, whole]  # the sum of all features before each edge …
    sums = before + (edges - whole)[:, None] * features[:, whole]  # … and of the part of the one that it cuts
    return sums.diff(dim=1) / width


class PhoneClusters(nn.Module):
    """Clusters of MFCCs, learned online, and a linear classifier of them from latents [B, N, dimension] at one frame per `hop` samples.

    Errors: `UserError` for frames that are longer than a phone.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, sample_rate: int, hop: int, dimension: int, clusters: int):
        super().__init__()
        if hop / sample_rate > 0.1:
            raise UserError(
                f"semantic: frames of {hop / sample_rate:.2g} s are longer than a phone; use more frames per second"
            )
        self.sample_rate, self.hop = sample_rate, hop
        self.window = 1 << math.ceil(math.log2(max(hop, WINDOW * sample_rate)))
        size = 2 * COEFFICIENTS
        self.codebook = Codebook(clusters, size, normalize=False)
        self.head = nn.Linear(dimension, clusters)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    @torch.no_grad()
    def features(self, samples: Tensor) -> Tensor:
        """MFCCs of audio [B, C, T] and their differences over two frames, [B, N, 26], without each item's mean; N = ceil(T / hop)."""
        mono = samples.float().mean(1)
        count = -(-mono.shape[-1] // self.hop)
        before = (self.window - self.hop) // 2
        mono = F.pad(mono, (before, max(0, (count - 1) * self.hop + self.window - before - mono.shape[-1])))
        frames = mono.unfold(-1, self.window, self.hop)[:, :count] * torch.hann_window(self.window, device=mono.device)
        power = torch.fft.rfft(frames).abs().square()
        bands = (power @ mel_filters(self.sample_rate, self.window, BANDS).to(power).T).clamp_min(1e-8).log()
        cepstrum = bands @ _cosines(BANDS, COEFFICIENTS).to(bands)
        ahead, behind = torch.cat([cepstrum[:, 1:], cepstrum[:, -1:]], 1), torch.cat([cepstrum[:, :1], cepstrum[:, :-1]], 1)
        differences = ahead - behind
        return torch.cat([cepstrum - cepstrum.mean(1, keepdim=True), differences], -1)

    @torch.no_grad()
    def learn(self, features: Tensor, seed: int) -> None:
        """Update the clusters with the features [n, 26] of one batch."""
        if not self.codebook.initted:
            self.mean.copy_(features.mean(0))
            self.std.copy_(features.std(0).clamp_min(1e-3))
            self.codebook.init_codebook((features - self.mean) / self.std, seed)
        else:
            self.codebook.update((features - self.mean) / self.std, DECAY, seed)

    def loss(self, latents: Tensor, samples: Tensor) -> Tensor:
        """The cross-entropy of the clusters of audio [B, C, T], given latents [B, N, dimension]; scalar, in nats."""
        targets = self.codebook.nearest((self.features(samples) - self.mean) / self.std)
        return F.cross_entropy(self.head(latents.float()).flatten(0, 1), targets[:, : latents.shape[1]].flatten())


def _cosines(bands: int, coefficients: int) -> Tensor:
    """The orthonormal DCT-II without its mean: [bands, coefficients]."""
    k = torch.arange(1, coefficients + 1)
    n = torch.arange(bands)[:, None] + 0.5
    return (math.pi / bands * n * k).cos() * math.sqrt(2 / bands)
