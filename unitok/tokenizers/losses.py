"""Losses of the tokenizers, each a small function with a name; training sums them by name. All in fp32, means over all."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gradient_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 between the horizontal and vertical differences of neighbouring pixels: edges count, not only areas."""
    d = out.float() - target.float()
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def structure_loss(out: Tensor, target: Tensor, scales: int = 3, window: int = 7) -> Tensor:
    """Multi-scale structural loss between pictures [B, 3, H, W] in [-1, 1]: 1 - SSIM, a mean over scales; in [0, 2].

    Each scale has half the side of the one before; windows are squares, cut to what a small picture has. A perceptual
    loss that needs no weights. (Zhao et al. 2017, "Loss Functions for Image Restoration with Neural Networks".)
    """
    a, b = (out.float() + 1) / 2, (target.float() + 1) / 2
    total = a.new_zeros(())
    for scale in range(scales):
        if scale:
            if min(a.shape[-2:]) < 4:
                return total / scale
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        side = min(window, *a.shape[-2:])
        mean_a, mean_b, aa, bb, ab = F.avg_pool2d(torch.cat([a, b, a * a, b * b, a * b], 1), side, 1).chunk(5, 1)
        variance_a, variance_b = aa - mean_a.square(), bb - mean_b.square()
        luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a.square() + mean_b.square() + 0.01**2)
        contrast = (2 * (ab - mean_a * mean_b) + 0.03**2) / (variance_a + variance_b + 0.03**2)
        total = total + 1 - (luminance * contrast).mean()
    return total / scales


# ---- Adversarial ----------------------------------------------------------------------------------------------------


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """What a discriminator minimises, on logits; scalar.

    kind: `hinge` (Lim & Ye 2017, "Geometric GAN") or `non-saturating` (Goodfellow et al. 2014).
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: str = "hinge") -> Tensor:
    """What a generator minimises against `discriminator_loss` of the same kind; scalar."""
    return -fake.float().mean() if kind == "hinge" else F.softplus(-fake.float()).mean()


def lecam_loss(real: Tensor, fake: Tensor, usual_real: Tensor, usual_fake: Tensor) -> Tensor:
    """Keeps logits near the moving averages of the other side's; for little data (Tseng et al. 2021, "LeCam"); scalar."""
    return F.relu(real.float() - usual_fake).square().mean() + F.relu(usual_real - fake.float()).square().mean()


def feature_loss(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """L1 between a discriminator's inner features of fakes and of originals, each relative to the size of the originals'."""
    pairs = zip(fake, real, strict=True)
    terms = [(f.float() - r.float()).abs().mean() / r.float().abs().mean().clamp_min(1e-3) for f, r in pairs]
    return torch.stack(terms).mean()


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_layer: Tensor, largest: float = 1e4) -> Tensor:
    """taming's weight of the adversarial loss: as much gradient at the decoder's last layer as the other losses have.

    Finite whatever the gradients are (theirs is not): not a number counts as 0. No gradient flows through it.
    """
    (wanted,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
    (actual,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = wanted.float().norm() / (actual.float().norm() + 1e-4)
    return torch.nan_to_num(ratio, nan=0.0, posinf=largest).clamp(0, largest).detach()


# ---- Sound ----------------------------------------------------------------------------------------------------------


def spectral_loss(out: Tensor, target: Tensor, windows: tuple[int, ...] = (128, 512, 1024)) -> Tensor:
    """Multi-resolution STFT loss between sounds [B, C, T]: L1 of magnitudes and of log magnitudes, a mean over windows.

    Window lengths in samples, hop a quarter. (Yamamoto et al. 2020, "Parallel WaveGAN", with L1 in place of the
    Frobenius ratio, which is undefined for silence.)
    """
    total = out.new_zeros((), dtype=torch.float32)
    for window in windows:
        a, b = (_magnitudes(x, window) for x in (out, target))
        total = total + (a - b).abs().mean() + 0.1 * ((a + 1e-3).log() - (b + 1e-3).log()).abs().mean()
    return total / len(windows)


def _magnitudes(samples: Tensor, window: int) -> Tensor:
    hann = torch.hann_window(window, device=samples.device)
    flat = samples.float().reshape(-1, samples.shape[-1])
    flat = F.pad(flat, (0, max(0, window - flat.shape[-1])))
    spectrum = torch.stft(flat, window, window // 4, window=hann, return_complex=True, normalized=True)
    return torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-8)
