"""SEANet, EnCodec's convolutional encoder and decoder for sound, with a patch stem.

[B, C, T] -> encoder -> [B, dimension, N] -> (quantizer) -> decoder -> [B, C, N * hop], hop = patch * prod(ratios).
Arguments and module names are EnCodec's (`model.0.conv.conv`, ...), so that its weights load by name; with `patch = 1`
the outputs are equal (tests/tokenizers/test_parity.py).

Choices: the stem folds `patch` samples into channels before the first convolution and unfolds them after the last.
At full rate SEANet spends nearly all its time on few channels; behind the stem the same time buys wide layers at low
rates, which is what lets a codec learn in minutes on two cores (docs/notes.md).
Source: Defossez et al. 2022, "High Fidelity Neural Audio Compression"; encodec:encodec/modules/seanet.py.
"""

import math
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def _normed(layer: nn.Module, norm: str) -> nn.Module:
    return weight_norm(layer) if norm == "weight_norm" else layer


class _Wrapped(nn.Module):
    """Holds a convolution under the name `conv` or `convtr`, as EnCodec's checkpoints do."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__()
        setattr(self, name, layer)


class Conv(nn.Module):
    """Convolution over [B, C, T] that gives ceil(T / stride) frames: padded on the left only if `causal`."""

    def __init__(self, i: int, o: int, kernel: int, stride: int, dilation: int, causal: bool, norm: str, pad_mode: str):
        super().__init__()
        self.conv = _Wrapped("conv", _normed(nn.Conv1d(i, o, kernel, stride=stride, dilation=dilation), norm))
        self.stride, self.causal, self.pad_mode = stride, causal, pad_mode
        self.extent = (kernel - 1) * dilation + 1

    def forward(self, x: Tensor) -> Tensor:
        total = self.extent - self.stride
        extra = -x.shape[-1] % self.stride  # up to a whole number of frames
        left, right = (total, 0) if self.causal else (total - total // 2, total // 2)
        return self.conv.conv(_pad(x, left, right + extra, self.pad_mode))  # type: ignore[operator]


def _pad(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    """`F.pad`, also for sounds shorter than a reflection needs (zeros are added first and cut after, as in EnCodec)."""
    short = max(left, right) - x.shape[-1] + 1 if mode == "reflect" else 0
    if short <= 0:
        return F.pad(x, (left, right), mode)
    padded = F.pad(F.pad(x, (0, short)), (left, right), mode)
    return padded[..., : padded.shape[-1] - short]


class ConvTranspose(nn.Module):
    """Transposed convolution that gives exactly T * stride samples."""

    def __init__(self, i: int, o: int, kernel: int, stride: int, causal: bool, norm: str):
        super().__init__()
        self.convtr = _Wrapped("convtr", _normed(nn.ConvTranspose1d(i, o, kernel, stride=stride), norm))
        self.excess, self.causal = kernel - stride, causal

    def forward(self, x: Tensor) -> Tensor:
        y = self.convtr.convtr(x)  # type: ignore[operator]
        right = self.excess if self.causal else self.excess // 2
        return y[..., self.excess - right : y.shape[-1] - right]


class ResnetBlock(nn.Module):
    """ELU, dilated convolution to half the width, ELU, 1x1 back, around a shortcut (1x1, or the identity: `true_skip`)."""

    def __init__(self, dim: int, kernel: int, dilation: int, compress: int, true_skip: bool, **conv):
        super().__init__()
        hidden = dim // compress
        self.block = nn.Sequential(
            nn.ELU(),
            Conv(dim, hidden, kernel, 1, dilation, **conv),
            nn.ELU(),
            Conv(hidden, dim, 1, 1, 1, **conv),
        )
        self.shortcut = nn.Identity() if true_skip else Conv(dim, dim, 1, 1, 1, **conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class SLSTM(nn.Module):
    """LSTM over time with a skip: [B, C, T] -> [B, C, T]."""

    def __init__(self, dimension: int, layers: int):
        super().__init__()
        self.lstm = nn.LSTM(dimension, dimension, layers)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(rearrange(x, "b c t -> t b c"))
        return rearrange(y, "t b c -> b c t") + x


class SEANetEncoder(nn.Module):
    """Waveform to latents.

    Args:
        channels: of the waveform. dimension: channels of the latents. n_filters: channels of the first stage.
        ratios: how much each stage shortens, listed as in EnCodec from the latents' side; width doubles each time.
        n_residual_layers: residual blocks a stage, dilated by powers of `dilation_base`.
        kernel_size, last_kernel_size, residual_kernel_size: of the first, the last and the residual convolutions.
        norm: `weight_norm` or `none`. causal: pad on the left only, so that codes can stream.
        true_skip: identity shortcuts. compress: by how much residual blocks narrow. lstm: LSTM layers at frame rate.
        patch: samples that the stem folds into channels. pad_mode: `reflect`, `constant` or `replicate`.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        dimension: int = 128,
        n_filters: int = 32,
        n_residual_layers: int = 1,
        ratios: tuple[int, ...] = (8, 5, 4, 2),
        kernel_size: int = 7,
        last_kernel_size: int = 7,
        residual_kernel_size: int = 3,
        dilation_base: int = 2,
        causal: bool = False,
        true_skip: bool = False,
        compress: int = 2,
        lstm: int = 2,
        norm: str = "weight_norm",
        pad_mode: str = "reflect",
        patch: int = 1,
    ):
        super().__init__()
        self.patch, self.hop = patch, patch * math.prod(ratios)
        conv: dict[str, Any] = {"causal": causal, "norm": norm, "pad_mode": pad_mode}
        width = n_filters
        layers: list[nn.Module] = [Conv(channels * patch, width, kernel_size, 1, 1, **conv)]
        for ratio in reversed(ratios):
            layers += [
                ResnetBlock(width, residual_kernel_size, dilation_base**j, compress, true_skip, **conv)
                for j in range(n_residual_layers)
            ]
            layers += [nn.ELU(), Conv(width, width * 2, ratio * 2, ratio, 1, **conv)]
            width *= 2
        if lstm:
            layers.append(SLSTM(width, lstm))
        layers += [nn.ELU(), Conv(width, dimension, last_kernel_size, 1, 1, **conv)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, T] -> [B, dimension, ceil(T / hop)]; zeros complete the last patch."""
        x = F.pad(x, (0, -x.shape[-1] % self.patch))
        return self.model(rearrange(x, "b c (t p) -> b (c p) t", p=self.patch))


class SEANetDecoder(nn.Module):
    """Latents to waveform: the encoder mirrored. Arguments as for `SEANetEncoder`."""

    def __init__(
        self,
        *,
        channels: int = 1,
        dimension: int = 128,
        n_filters: int = 32,
        n_residual_layers: int = 1,
        ratios: tuple[int, ...] = (8, 5, 4, 2),
        kernel_size: int = 7,
        last_kernel_size: int = 7,
        residual_kernel_size: int = 3,
        dilation_base: int = 2,
        causal: bool = False,
        true_skip: bool = False,
        compress: int = 2,
        lstm: int = 2,
        norm: str = "weight_norm",
        pad_mode: str = "reflect",
        patch: int = 1,
    ):
        super().__init__()
        self.patch = patch
        conv: dict[str, Any] = {"causal": causal, "norm": norm, "pad_mode": pad_mode}
        width = n_filters * 2 ** len(ratios)
        layers: list[nn.Module] = [Conv(dimension, width, kernel_size, 1, 1, **conv)]
        if lstm:
            layers.append(SLSTM(width, lstm))
        for ratio in ratios:
            layers += [nn.ELU(), ConvTranspose(width, width // 2, ratio * 2, ratio, causal, norm)]
            width //= 2
            layers += [
                ResnetBlock(width, residual_kernel_size, dilation_base**j, compress, true_skip, **conv)
                for j in range(n_residual_layers)
            ]
        layers += [nn.ELU(), Conv(width, channels * patch, last_kernel_size, 1, 1, **conv)]
        self.model = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """[B, dimension, N] -> [B, channels, N * hop]."""
        return rearrange(self.model(z), "b (c p) t -> b c (t p)", p=self.patch)
