"""Losses of the tokenizers, each a small function with a name; training sums them by name. All in fp32, means over all."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 + L2 between pictures [B, 3, H, W] in [-1, 1]."""
    difference = out.float() - target.float()
    return difference.abs().mean() + difference.square().mean()


def gradient_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 between the horizontal and vertical differences of neighbouring pixels: edges count, not only areas."""
    d = out.float() - target.float()
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss on logits (Lim & Ye 2017, "Geometric GAN"); scalar."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """What a generator minimises against the hinge; scalar."""
    return -fake.float().mean()


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
