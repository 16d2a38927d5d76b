"""Discriminators with the parameter names of taming-transformers (images) and EnCodec (audio), so their weights load."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from unitok.errors import UserError


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] -> logits [B, 1, h, w] of overlapping patches, positive for real.

    Group norm is the default, because small machines have small batches; with `norm="batch"` it is taming's network
    (taming/modules/discriminator/model.py; Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks").

    Args:
        width: channels of the first layer. layers: layers after the first; each doubles the width, up to 8 times.
        norm: `group` (`width` is then a multiple of 4) or `batch`.
    """

    def __init__(self, width: int = 32, layers: int = 2, norm: str = "group"):
        super().__init__()
        if norm == "group" and width % 4:
            raise UserError(f"gan.width {width}: with gan.norm group it must be a multiple of 4")
        sequence: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = width
        for n in range(1, layers + 1):
            after = width * min(2**n, 8)
            sequence += [
                nn.Conv2d(before, after, 4, stride=2 if n < layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(8, after),
                nn.LeakyReLU(0.2),
            ]
            before = after
        sequence.append(nn.Conv2d(before, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*sequence)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.main(pixels)

    def with_features(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the output of each activation, for feature matching."""
        features: list[Tensor] = []
        x = pixels
        for layer in self.main:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                features.append(x)
        return x, features


class _ScaleDiscriminator(nn.Module):
    """Discriminator of one STFT, with real and imaginary parts as channels: audio [B, C, T] -> logits [B, 1, t, f]."""

    hann: Tensor

    def __init__(self, channels: int, filters: int, window: int):
        super().__init__()
        self.window = window
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        shapes = [(2 * channels, filters, (3, 9), (1, 1), 1)]
        shapes += [(filters, filters, (3, 9), (1, 2), dilation) for dilation in (1, 2, 4)]
        shapes += [(filters, filters, (3, 3), (1, 1), 1)]
        self.convs = nn.ModuleList([_named_conv(*shape, normed=i > 0) for i, shape in enumerate(shapes)])
        self.conv_post = _named_conv(filters, 1, (3, 3), (1, 1), 1, normed=True)

    def forward(self, samples: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the output of each activation."""
        b, c, _ = samples.shape
        flat = F.pad(samples, (0, max(0, self.window - samples.shape[-1]))).flatten(0, 1).float()
        with torch.autocast(samples.device.type, enabled=False):
            z = torch.stft(flat, self.window, self.window // 4, window=self.hann, center=False, return_complex=True)
            z = z / self.hann.square().sum().sqrt()
        x = torch.cat([part.unflatten(0, (b, c)).transpose(-1, -2) for part in (z.real, z.imag)], 1)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        return self.conv_post(x), features


def _named_conv(i: int, o: int, kernel: tuple[int, int], stride: tuple[int, int], dilation: int, normed: bool) -> nn.Module:
    padding = ((kernel[0] - 1) * dilation // 2, (kernel[1] - 1) // 2)
    layer = nn.Conv2d(i, o, kernel, stride=stride, dilation=(dilation, 1), padding=padding)
    return nn.Sequential(OrderedDict(conv=weight_norm(layer) if normed else layer))


class STFTDiscriminator(nn.Module):
    """EnCodec's multi-scale STFT discriminator: audio [B, C, T] -> a list of logits, one tensor per window, positive for real.

    audiocraft's default windows are 2048, 1024, 512, 256, 128. Source: Defossez et al. 2022; encodec:encodec/msstftd.py.

    Args:
        channels: of the waveform. filters: channels of the layers. windows: of the STFTs, in samples; the hop is a quarter.
    """

    def __init__(self, channels: int = 1, filters: int = 32, windows: tuple[int, ...] = (1024, 2048, 512)):
        super().__init__()
        self.discriminators = nn.ModuleList([_ScaleDiscriminator(channels, filters, window) for window in windows])

    def forward(self, samples: Tensor) -> list[Tensor]:
        return self.with_features(samples)[0]

    def with_features(self, samples: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of each scale, and the output of each activation, for feature matching."""
        results = [discriminator(samples) for discriminator in self.discriminators]
        return [logits for logits, _ in results], [feature for _, features in results for feature in features]
