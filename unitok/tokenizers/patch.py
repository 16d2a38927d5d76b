"""Encoders that see single patches: squares of pixels, or frames of samples.

Equal patches have equal codes wherever they stand, so a decoder of tokens need not learn how its neighbors change a code. With
convolutions, group norms or attention a code depends on much else, most of which is noise to whoever predicts it (docs/notes.md).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unitok.tokenizers.config import AudioTokenizerConfig, ImageTokenizerConfig
from unitok.tokenizers.stems import State


class _Block(nn.Module):
    """A residual MLP on each patch: [..., C] -> [..., C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1, self.fc2 = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.silu(self.fc1(self.norm(x))))


class _PatchEncoder(nn.Module):
    """A linear stem, `patch_in`, of patches [..., values], and a residual MLP to latents [..., dimension]."""

    def __init__(self, values: int, width: int, blocks: int, dimension: int):
        super().__init__()
        self.patch_in = nn.Linear(values, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.norm_out = nn.LayerNorm(width)
        self.latent_out = nn.Linear(width, dimension)

    def latents(self, patches: Tensor) -> Tensor:
        """[..., width], from the stem -> [..., dimension]."""
        return self.latent_out(self.norm_out(self.blocks(patches)))


class ImagePatchEncoder(_PatchEncoder):
    """Latents that each depend on one square of `stride x stride` pixels."""

    def __init__(self, config: ImageTokenizerConfig):
        self.stride, width = config.stride, config.ch * config.ch_mult[-1]
        super().__init__(3 * self.stride**2, width, config.num_res_blocks + 2, config.z_channels)
        if config.group > 1:
            self.group_in = nn.Linear(config.group * 3 * self.stride**2, width)

    @torch.no_grad()
    def start_group(self) -> None:
        """Let a group of equal frames give what one of them gives."""
        group = self.group_in.in_features // self.patch_in.in_features
        self.group_in.weight.copy_(self.patch_in.weight.repeat(1, group) / group)
        self.group_in.bias.copy_(self.patch_in.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W], or `group` frames as [B, group * 3, H, W] -> [B, z_channels, H / stride, W / stride]."""
        patches = rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=self.stride, q=self.stride)
        stem = self.patch_in if x.shape[1] == 3 else self.group_in
        return rearrange(self.latents(stem(patches)), "b h w c -> b c h w")


class AudioPatchEncoder(_PatchEncoder):
    """Latents that each depend on one frame of `hop` samples."""

    def __init__(self, config: AudioTokenizerConfig):
        self.hop = config.patch * math.prod(config.ratios)
        super().__init__(config.channels * self.hop, config.n_filters, config.n_residual_layers + 1, config.dimension)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, T] -> [B, dimension, ceil(T / hop)]; the last frame is padded with zeros."""
        frames = rearrange(F.pad(x, (0, -x.shape[-1] % self.hop)), "b c (n p) -> b n (c p)", p=self.hop)
        return rearrange(self.latents(self.patch_in(frames)), "b n d -> b d n")

    def stream(self, x: Tensor, state: State, last: bool = False) -> Tensor:
        """Return the latents [B, dimension, n] that are complete with the next samples [B, channels, t]."""
        x = torch.cat([*state[self], x], -1) if self in state else x
        whole = x.shape[-1] if last else x.shape[-1] - x.shape[-1] % self.hop
        state[self] = (x[..., whole:].clone(),)
        return self(x[..., :whole])
