"""Losses of the tokenizers, each a small function; training sums them by name. All are means, in fp32."""

import math
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def gradient_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 between horizontal and vertical differences of neighboring pixels, so edges count as well as areas; scalar."""
    d = out.float() - target.float()
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def structure_loss(out: Tensor, target: Tensor) -> Tensor:
    """Multi-scale structural loss between images [B, 3, H, W] in [-1, 1]: 1 - SSIM, averaged over three scales; in [0, 2].

    Each scale halves the side of the one before. Windows are squares of 7 pixels, or of the side of a smaller image. (Zhao et al. 2017,
    "Loss Functions for Image Restoration with Neural Networks".)
    """
    a, b = (out.float() + 1) / 2, (target.float() + 1) / 2
    total = a.new_zeros(())
    for scale in range(3):
        if scale:
            if min(a.shape[-2:]) < 4:
                return total / scale
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        side = min(7, *a.shape[-2:])
        mean_a, mean_b, aa, bb, ab = F.avg_pool2d(torch.cat([a, b, a * a, b * b, a * b], 1), side, 1).chunk(5, 1)
        variance_a, variance_b = aa - mean_a.square(), bb - mean_b.square()
        luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a.square() + mean_b.square() + 0.01**2)
        contrast = (2 * (ab - mean_a * mean_b) + 0.03**2) / (variance_a + variance_b + 0.03**2)
        total = total + 1 - (luminance * contrast).mean()
    return total / 3


# ---- Adversarial ----------------------------------------------------------------------------------------------------

Logits = Tensor | list[Tensor]  # of one discriminator, or of one per scale


def _scales(*logits: Logits) -> Iterator[tuple[Tensor, ...]]:
    """The logits of each scale, in fp32."""
    lists = [each if isinstance(each, list) else [each] for each in logits]
    return (tuple(x.float() for x in row) for row in zip(*lists, strict=True))


def discriminator_loss(real: Logits, fake: Logits, kind: str = "hinge") -> Tensor:
    """The loss of a discriminator from its logits, averaged over scales; scalar.

    kind: `hinge` (Lim & Ye 2017), `non-saturating` (Goodfellow et al. 2014) or `least-squares` (Mao et al. 2017).
    """
    terms = {
        "hinge": lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(),
        "non-saturating": lambda r, f: F.softplus(-r).mean() + F.softplus(f).mean(),
        "least-squares": lambda r, f: (r - 1).square().mean() + f.square().mean(),
    }
    return 0.5 * torch.stack([terms[kind](r, f) for r, f in _scales(real, fake)]).mean()


def generator_loss(fake: Logits, kind: str = "hinge") -> Tensor:
    """The loss of a generator against `discriminator_loss` of the same kind, averaged over scales; scalar."""
    terms = {
        "hinge": lambda f: -f.mean(),
        "non-saturating": lambda f: F.softplus(-f).mean(),
        "least-squares": lambda f: (f - 1).square().mean(),
    }
    return torch.stack([terms[kind](f) for (f,) in _scales(fake)]).mean()


def lecam_loss(real: Logits, fake: Logits, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """LeCam regularization, for little data (Tseng et al. 2021); scalar. mean_real, mean_fake: moving averages of the logits."""
    terms = [F.relu(r - mean_fake).square().mean() + F.relu(mean_real - f).square().mean() for r, f in _scales(real, fake)]
    return torch.stack(terms).mean()


def feature_loss(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """L1 between a discriminator's features of fakes and of originals, each relative to the mean size of the original's; scalar."""
    pairs = zip(fake, real, strict=True)
    terms = [(f.float() - r.float()).abs().mean() / r.float().abs().mean().clamp_min(1e-3) for f, r in pairs]
    return torch.stack(terms).mean()


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """taming's weight of the adversarial loss, which gives it the gradient norm of the other losses at the decoder's last layer.

    At most 1e4; NaN becomes 0, where taming's may not be finite. No gradient flows through it.
    """
    (target,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
    (actual,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = target.float().norm() / (actual.float().norm() + 1e-4)
    return torch.nan_to_num(ratio, nan=0.0, posinf=1e4).clamp(0, 1e4).detach()


# ---- Audio ----------------------------------------------------------------------------------------------------------


def spectral_loss(out: Tensor, target: Tensor, windows: tuple[int, ...] = (128, 512, 1024)) -> Tensor:
    """Multi-resolution STFT loss of audio [B, C, T]: L1 of magnitudes and of log magnitudes, averaged over windows (in samples).

    Yamamoto et al. 2020, "Parallel WaveGAN", with L1 in place of the Frobenius ratio, which is undefined for silence. The hop is a
    quarter of the window.
    """
    total = out.new_zeros((), dtype=torch.float32)
    for window in windows:
        a, b = (_magnitudes(x, window) for x in (out, target))
        total = total + (a - b).abs().mean() + 0.1 * ((a + 1e-3).log() - (b + 1e-3).log()).abs().mean()
    return total / len(windows)


def mel_loss(
    out: Tensor, target: Tensor, sample_rate: int, windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
) -> Tensor:
    """Multi-scale log-mel loss of audio [B, C, T] at `sample_rate` Hz: L1 of log10 mel magnitudes, averaged over windows (in samples).

    The hop is a quarter of the window, with one mel band per 6.4 samples of window; magnitudes have a floor of 1e-4, so silence is
    finite. (Kumar et al. 2023, "High-Fidelity Audio Compression with Improved RVQGAN".)
    """
    total = out.new_zeros((), dtype=torch.float32)
    for window in windows:
        bank = mel_filters(sample_rate, window, max(5, round(window / 6.4))).to(out.device)
        a, b = ((bank @ _magnitudes(x, window)).log10() for x in (out, target))
        total = total + (a - b).abs().mean()
    return total / len(windows)


@cache
def mel_filters(sample_rate: int, window: int, bands: int) -> Tensor:
    """Triangular filters on O'Shaughnessy's mel scale, each with sum 1: [bands, window // 2 + 1]."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate / 2, window // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp_min(0)
    empty = filters.sum(-1) == 0  # narrower than the spacing of the bins: take the nearest bin
    filters[empty, (frequencies - edges[1:-1, None]).abs().argmin(-1)[empty]] = 1.0
    return filters / filters.sum(-1, keepdim=True)


def _magnitudes(samples: Tensor, window: int) -> Tensor:
    hann = torch.hann_window(window, device=samples.device)
    flat = samples.float().reshape(-1, samples.shape[-1])
    flat = F.pad(flat, (0, max(0, window - flat.shape[-1])))
    spectrum = torch.stft(flat, window, window // 4, window=hann, return_complex=True, normalized=True)
    return torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-8)
