"""PatchGAN, which judges overlapping patches of a picture and not the whole, and what training keeps about it.

Names and layout are taming-transformers' `NLayerDiscriminator`, so that its weights load by name. Choice: group norm
in place of batch norm by default, because batches on small machines are small; `norm="batch"` is taming's network.
Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks";
taming-transformers:taming/modules/discriminator/model.py.
"""

import torch
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """[B, 3, H, W] -> logits [B, 1, h, w], positive for real.

    Args:
        width: channels of the first layer. layers: strided layers after the first; each doubles the width, up to 8 times.
        norm: `group` or `batch`.
    """

    def __init__(self, width: int = 32, layers: int = 2, norm: str = "group"):
        super().__init__()
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
        """Logits, and what each activation gave, for feature matching."""
        features: list[Tensor] = []
        x = pixels
        for layer in self.main:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                features.append(x)
        return x, features


class LogitAverages(nn.Module):
    """Moving averages of a discriminator's logits on originals and fakes, for LeCam: scalars `real` and `fake`."""

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Move towards the means of one batch, scalars."""
        self.real.lerp_(real, 1 - self.decay)
        self.fake.lerp_(fake, 1 - self.decay)
