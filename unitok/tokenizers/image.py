"""The image tokenizer: a VQ-GAN that turns pictures into grids of codes and back.

[B, 3, H, W] in [-1, 1] -> int64 [B, h, w] -> [B, 3, H, W]; any H and W (padded by repeating the edge to whole codes).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn

from unitok.data.media import fit_image, image_to_tensor, open_image, save_image, to_rgb
from unitok.errors import UserError
from unitok.pretrained import load_part, load_state, part_folder, save_part, state_fingerprint
from unitok.tokenizers.quantize import FiniteScalarQuantizer, Quantized, Quantizer, VectorQuantizer
from unitok.tokenizers.vqgan import Decoder, Encoder, downsampling

#: Longest side of a picture in codes; the vocabulary has as many grid sizes.
LONGEST_SIDE = 64


@dataclass
class ImageTokenizerConfig:
    """Architecture of an image tokenizer; the first group has taming-transformers' names and meaning.

    Args:
        ch: channels of the first stage, a multiple of 32.
        ch_mult: width of each resolution as a multiple of `ch`; each but the last is followed by a halving.
        num_res_blocks: residual blocks a resolution.
        attn_resolutions: resolutions (pixels after the patch stem, for an input of `resolution`) with attention.
        z_channels: channels of the latents.
        resolution: side of the pictures it is trained on, pixels.
        patch: side of the pixel patches that the stem folds into channels (1: taming's network as it is).
        quantizer: `vq` (one l2-normalised codebook) or `fsq` (finite scalars).
        codebook_size: codes, for `vq`.
        codebook_dim: dimensions of a code, for `vq`; low, so that the codebook stays in use.
        scales: values of each dimension, for `fsq`; the number of codes is their product.
    """

    ch: int = 64
    ch_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    attn_resolutions: tuple[int, ...] = ()
    z_channels: int = 64
    resolution: int = 64
    patch: int = 4
    quantizer: Literal["vq", "fsq"] = "vq"
    codebook_size: int = 512
    codebook_dim: int = 8
    scales: tuple[int, ...] = (8, 8, 8)

    def __post_init__(self) -> None:
        if self.ch % 32:
            raise UserError(f"ch is {self.ch}: it must be a multiple of 32, the groups of group norm")


@dataclass
class ImageReconstruction:
    """What a forward pass gives: `pixels` [B, 3, H, W], `codes` [B, h, w] (None without quantisation), `commitment`."""

    pixels: Tensor
    codes: Tensor | None
    commitment: Tensor


class ImageTokenizer(nn.Module):
    """A VQ-GAN's encoder, quantizer and decoder.

    Args:
        config: the architecture.
        vectors: latents in a training batch, for the revival of dead codes; of no matter after training.
    """

    def __init__(self, config: ImageTokenizerConfig | None = None, vectors: int = 1024):
        super().__init__()
        self.config = c = config or ImageTokenizerConfig()
        network: dict[str, Any] = {
            "ch": c.ch,
            "ch_mult": tuple(c.ch_mult),
            "num_res_blocks": c.num_res_blocks,
            "attn_resolutions": tuple(c.attn_resolutions),
            "z_channels": c.z_channels,
            "resolution": c.resolution,
            "patch": c.patch,
        }
        self.encoder, self.decoder = Encoder(**network), Decoder(**network)
        self.quantizer: Quantizer
        if c.quantizer == "vq":
            self.quantizer = VectorQuantizer(c.z_channels, c.codebook_size, c.codebook_dim, vectors)
        else:
            self.quantizer = FiniteScalarQuantizer(c.z_channels, tuple(c.scales))
        self.stride = downsampling(tuple(c.ch_mult), c.patch)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.quantizer.size

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _latents(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, h, w, z_channels]."""
        h, w = (-side % self.stride for side in images.shape[-2:])
        padded = F.pad(images, (0, w, 0, h), mode="replicate") if h or w else images
        return rearrange(self.encoder(padded), "b c h w -> b h w c")

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(rearrange(latents, "b h w c -> b c h w"))

    def forward(self, images: Tensor, quantize: bool = True) -> ImageReconstruction:
        """[B, 3, H, W] in [-1, 1] -> reconstruction; without `quantize` the latents pass as they are (warm-up)."""
        z = self._latents(images)
        h = z.shape[1]
        flat = rearrange(z, "b h w c -> b (h w) c")
        q = self.quantizer(flat) if quantize else Quantized(self.quantizer.pass_through(flat), None, z.new_zeros(()))
        pixels = self._pixels(rearrange(q.latents, "b (h w) c -> b h w c", h=h))[..., : images.shape[2], : images.shape[3]]
        codes = None if q.codes is None else rearrange(q.codes, "b (h w) -> b h w", h=h)
        return ImageReconstruction(pixels, codes, q.loss)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> int64 [B, ceil(H / stride), ceil(W / stride)]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are [B, 3, H, W], got {tuple(images.shape)}")
        z = self._latents(images.to(self.device))
        codes = self.quantizer(rearrange(z, "b h w c -> b (h w) c")).codes
        return rearrange(codes, "b (h w) -> b h w", h=z.shape[1])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """int64 [B, h, w] -> [B, 3, h * stride, w * stride] in [-1, 1]."""
        latents = self.quantizer.lookup(rearrange(codes.to(self.device), "b h w -> b (h w)"))
        return self._pixels(rearrange(latents, "b (h w) c -> b h w c", h=codes.shape[1])).clamp(-1, 1)

    def prepare(self, image: Image, area: int | None = None) -> Tensor:
        """A picture of any mode and size -> [3, H, W] in [-1, 1], ready for `encode`.

        It is shrunk, keeping its aspect, to at most `area` pixels (default: `resolution ** 2`).
        """
        return image_to_tensor(fit_image(to_rgb(image), area or self.config.resolution**2, LONGEST_SIDE * self.stride))

    def encode_file(self, path: Path, area: int | None = None) -> tuple[Tensor, tuple[int, int]]:
        """A picture of any size -> int64 [h, w] and its (height, width) in pixels before padding; see `prepare`."""
        pixels = self.prepare(open_image(path), area)
        return self.encode(pixels[None])[0], (pixels.shape[1], pixels.shape[2])

    def decode_file(self, codes: Tensor, path: Path, size: tuple[int, ...] = ()) -> None:
        """int64 [h, w] -> a PNG of `size` (height, width) pixels, or of all that the codes hold. Inverse of `encode_file`."""
        pixels = self.decode(codes[None])[0]
        height, width = size or pixels.shape[-2:]
        save_image(path, pixels[:, :height, :width])

    def fingerprint(self) -> str:
        """Changes when the codes do: a hash of configuration and weights."""
        return state_fingerprint(self.config, self.state_dict())

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_part(folder, "image tokenizer", self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, path: Path, device: str = "cpu") -> "ImageTokenizer":
        """Read its own folder or a bundle's; in eval mode."""
        folder = part_folder(path, "tokenizers/image")
        config, state = load_part(folder, "image tokenizer", ImageTokenizerConfig)
        model = cls(config)
        load_state(model, state, str(folder))
        return model.eval().to(device)
