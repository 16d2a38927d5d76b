"""Encoder and decoder of the VQ-GAN: the architecture and names of taming-transformers, and a patch stem.

With `patch = 1` its checkpoints load and the outputs are equal (tests/tokenizers/test_parity.py). The stem folds `patch x
patch` pixels into channels (cf. the Haar patching of Cosmos-Tokenizer), which makes the full-resolution stages, most of the
cost, `patch ** 2` times cheaper. On CPU tensors are channels-last, which is faster with oneDNN; without gradients activations
are overwritten in place, and upsampling is merged with the convolution after it (benchmarks/image_tokenizer.py). Source: Esser
et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", taming/modules/diffusionmodules/model.py.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unitok.tokenizers.config import ImageTokenizerConfig


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _for_convolutions(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def copy_bias(given: nn.Conv2d, to: nn.Conv2d, repeats: int) -> None:
    """Let a convolution's bias be that of another one, repeated."""
    assert given.bias is not None
    assert to.bias is not None
    to.bias.copy_(given.bias.repeat(repeats))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(_silu(self.norm2(h)))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + h if torch.is_grad_enabled() else h.add_(shortcut)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, residual: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(part(h), "b c h w -> b 1 (h w) c") for part in (self.q, self.k, self.v))
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution that pads right and below only, as in taming."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbor, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self._merged(x)

    def _merged(self, x: Tensor) -> Tensor:
        """Upsampling and convolution in one. A 3x3 window of the doubled image covers only 2x2 different pixels, so four 2x2
        kernels, one per corner of a doubled pixel, do it with 4/9 of the work."""
        w = self.conv.weight
        w = torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2], w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2)
        w = torch.stack([w[..., 0], w[..., 1] + w[..., 2], w[..., 0] + w[..., 1], w[..., 2]], 3)  # [O, I, 4, 4]
        kernels = rearrange(w, "o i (a y) (b x) -> (a b o) i y x", a=2, b=2)
        bias = None if self.conv.bias is None else self.conv.bias.repeat(4)
        y = F.conv2d(x, _for_convolutions(kernels), bias, padding=1).unflatten(1, (4, -1))  # [B, 4, O, H + 1, W + 1]
        height, width = x.shape[-2:]
        out = x.new_empty(len(x), y.shape[2], 2 * height, 2 * width).contiguous(memory_format=torch.channels_last)
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            out[..., a::2, b::2] = y[:, 2 * a + b, :, a : a + height, b : b + width]
        return out


class _Level(nn.Module):
    """One resolution: `block` and `attn` lists of equal length (or no attention), then `downsample` or `upsample`."""

    def __init__(self, widths: list[int], attention: bool):
        super().__init__()
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.block = nn.ModuleList(ResnetBlock(i, o) for i, o in pairs)
        self.attn = nn.ModuleList(AttnBlock(w) for w in widths[1:] if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class _Middle(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)


class Encoder(nn.Module):
    """Encoder: pixels to latents. `resolution` only decides which levels have attention."""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        c, self.patch = config, config.patch
        self.conv_in = nn.Conv2d(3 * c.patch**2, c.ch, 3, padding=1)
        if c.group > 1:
            self.group_in = nn.Conv2d(c.group * 3 * c.patch**2, c.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width, side = c.ch, c.resolution // c.patch
        for i, mult in enumerate(c.ch_mult):
            level = _Level([width] + [c.ch * mult] * c.num_res_blocks, side in c.attn_resolutions)
            width = c.ch * mult
            if i < len(c.ch_mult) - 1:
                level.downsample = Downsample(width)
                side //= 2
            self.down.append(level)
        self.mid = _Middle(width)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, c.z_channels, 3, padding=1)

    @torch.no_grad()
    def start_group(self) -> None:
        """Let a group of equal frames give what one of them gives."""
        group = self.group_in.in_channels // self.conv_in.in_channels
        self.group_in.weight.copy_(self.conv_in.weight.repeat(1, group, 1, 1) / group)
        copy_bias(self.conv_in, self.group_in, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W], or `group` frames as [B, group * 3, H, W] -> [B, z_channels, H / f, W / f]."""
        stem = self.conv_in if x.shape[1] == 3 else self.group_in
        x = stem(_for_convolutions(F.pixel_unshuffle(x, self.patch)))
        for level in self.down:
            x = level(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x  # type: ignore[operator]
        return self.conv_out(_silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Decoder: latents to pixels, the encoder mirrored, with one more residual block per resolution."""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        c, self.patch = config, config.patch
        width, side = c.ch * c.ch_mult[-1], c.resolution // c.patch // 2 ** (len(c.ch_mult) - 1)
        self.conv_in = nn.Conv2d(c.z_channels, width, 3, padding=1)
        self.mid = _Middle(width)
        levels: list[nn.Module] = []
        for i, mult in reversed(list(enumerate(c.ch_mult))):
            level = _Level([width] + [c.ch * mult] * (c.num_res_blocks + 1), side in c.attn_resolutions)
            width = c.ch * mult
            if i > 0:
                level.upsample = Upsample(width)
                side *= 2
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)  # up.0 is the finest, as in taming
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 3 * c.patch**2, 3, padding=1)
        if c.group > 1:
            self.group_in = nn.Conv2d(2 * c.z_channels, c.ch * c.ch_mult[-1], 3, padding=1)
            self.group_out = nn.Conv2d(width, c.group * 3 * c.patch**2, 3, padding=1)

    @torch.no_grad()
    def start_group(self) -> None:
        """Let latents give a group of frames that each are what they gave alone, whatever was before."""
        group = self.group_out.out_channels // self.conv_out.out_channels
        for parameter in self.group_in.parameters():
            parameter.zero_()
        self.group_out.weight.copy_(self.conv_out.weight.repeat(group, 1, 1, 1))
        copy_bias(self.conv_out, self.group_out, group)

    def forward(self, z: Tensor, before: Tensor | None = None) -> Tensor:
        """[B, z_channels, h, w] -> [B, 3, h * f, w * f].

        before: the latents before those of a group of frames; its frames are then [B, group * 3, h * f, w * f].
        """
        x = self.conv_in(_for_convolutions(z))
        x = self.mid(x if before is None else x + self.group_in(_for_convolutions(torch.cat([before, z], 1))))
        for level in reversed(self.up):
            x = level(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x  # type: ignore[operator]
        out = self.conv_out if before is None else self.group_out
        return F.pixel_shuffle(out(_silu(self.norm_out(x))), self.patch)
