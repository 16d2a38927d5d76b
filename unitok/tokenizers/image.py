"""The image tokenizer: a VQ-GAN that turns images into grids of codes and back.

[B, 3, H, W] in [-1, 1] -> int64 [B, h, w] -> [B, 3, H, W]; any H and W (padded by repeating the edge to whole codes).

Images larger than `ImageTokenizer.tile` are processed in overlapping tiles, so memory stays bounded. Each code comes from the
tile in whose middle it lies; pixels of neighboring tiles are blended over the overlap, so there are no seams.
"""

import itertools
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor

from unitok.errors import UserError
from unitok.media import crop_square, fit_image, image_to_tensor, open_image, save_image, stretch_image, to_rgb
from unitok.tokenizers.arguments import check_codes, check_images
from unitok.tokenizers.base import Reconstruction, Tokenizer
from unitok.tokenizers.config import ImageTokenizerConfig
from unitok.tokenizers.patch import ImagePatchEncoder
from unitok.tokenizers.quantize import build_quantizer
from unitok.tokenizers.vqgan import Decoder, Encoder

#: Longest side of an image in codes; the vocabulary has as many grid sizes.
LONGEST_SIDE = 64

#: How an image is brought to size: `keep` all of it (shrunk to an area, never enlarged), `crop` the center square, or
#: `resize` to a square, whatever its aspect ratio.
Fit = Literal["keep", "crop", "resize"]


class ImageTokenizer(Tokenizer):
    """A VQ-GAN's encoder, quantizer and decoder.

    Attributes:
        stride: pixels per code along each side. codebook_size: number of codes.
        tile: pixels per side of the largest square that is processed at once; its area also bounds batches.
        overlap: codes that neighboring tiles share.
    """

    kind = "image"
    Config = ImageTokenizerConfig
    config: ImageTokenizerConfig

    def __init__(self, config: ImageTokenizerConfig | None = None):
        super().__init__()
        self.config = c = config or ImageTokenizerConfig()
        self.encoder = ImagePatchEncoder(c) if c.encoder == "patch" else Encoder(c)
        self.decoder = Decoder(c) if c.decodes else None
        self.quantizer = build_quantizer(c)
        self.stride, self.codebook_size = c.stride, self.quantizer.size
        self.tile, self.overlap = 1024, 8

    def _latents(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, h, w, z_channels]."""
        h, w = (-side % self.stride for side in images.shape[-2:])
        padded = F.pad(images, (0, w, 0, h), mode="replicate") if h or w else images
        return rearrange(self.encoder(padded), "b c h w -> b h w c")

    def _pixels(self, latents: Tensor) -> Tensor:
        if self.decoder is None:
            raise UserError("this image tokenizer only encodes: its checkpoint has no decoder")
        return self.decoder(rearrange(latents, "b h w c -> b c h w"))

    def forward(self, images: Tensor, quantize: bool = True) -> Reconstruction:
        """Reconstruct images [B, 3, H, W] in [-1, 1]. quantize: False leaves the latents as they are (warm-up)."""
        z = self._latents(images)
        h = z.shape[1]
        flat = rearrange(z, "b h w c -> b (h w) c")
        q = self.quantizer(flat) if quantize else self.quantizer.project(flat)
        pixels = self._pixels(rearrange(q.latents, "b (h w) c -> b h w c", h=h))[..., : images.shape[2], : images.shape[3]]
        codes = None if q.codes is None else rearrange(q.codes, "b (h w) -> b h w", h=h)
        return Reconstruction(pixels, codes, q.losses, q.projected)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes of images: [B, 3, H, W] in [-1, 1] -> int64 [B, ceil(H / stride), ceil(W / stride)].

        Errors: `UserError` as for `check_images`.
        """
        images = check_images(images, self.dtype)
        if max(images.shape[-2:]) > self.tile:
            return torch.cat([self._encode_tiles(image[None]) for image in images])
        at_once = max(1, self.tile**2 // (images.shape[-2] * images.shape[-1]))
        return torch.cat([self._encode(part.to(self.device)) for part in images.split(at_once)])

    def _encode(self, images: Tensor) -> Tensor:
        z = self._latents(images)
        codes = self.quantizer.search(rearrange(z, "b h w c -> b (h w) c"))
        return rearrange(codes, "b (h w) -> b h w", h=z.shape[1])

    def _encode_tiles(self, image: Tensor) -> Tensor:
        """[1, 3, H, W] -> [1, h, w]: each code from the tile in whose middle it lies."""
        f = self.stride
        h, w = (-(-side // f) for side in image.shape[-2:])
        codes = torch.empty(1, h, w, dtype=torch.long, device=self.device)
        for (top, bottom), (left, right) in itertools.product(self._tiles(h), self._tiles(w)):
            tile = self._encode(image[..., top * f : bottom * f, left * f : right * f].to(self.device))
            up, back = (self.overlap // 2 if begin else 0 for begin in (top, left))
            codes[:, top + up : bottom, left + back : right] = tile[:, up:, back:]
        return codes

    def _tiles(self, length: int) -> list[tuple[int, int]]:
        """Intervals of codes, of at most `tile` pixels each, that cover [0, length); neighbors share at least `overlap`
        codes."""
        size = max(self.tile // self.stride, 2 * self.overlap)
        if length <= size:
            return [(0, length)]
        count = -(-(length - self.overlap) // (size - self.overlap))
        starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
        return [(start, start + size) for start in starts]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the images of codes: int64 [B, h, w] -> [B, 3, h * stride, w * stride] in [-1, 1].

        Errors: `UserError` for codes of another shape or range, and for a tokenizer without a decoder.
        """
        codes = check_codes(codes, "[B, h, w]", self.codebook_size)
        h, w = codes.shape[-2:]
        if max(h, w) * self.stride > self.tile:
            return torch.cat([self._decode_tiles(grid[None]) for grid in codes])
        at_once = max(1, self.tile**2 // (h * w * self.stride**2))
        return torch.cat([self._decode(part.to(self.device)) for part in codes.split(at_once)])

    def _decode(self, codes: Tensor) -> Tensor:
        latents = self.quantizer.lookup(rearrange(codes, "b h w -> b (h w)"))
        return self._pixels(rearrange(latents, "b (h w) c -> b h w c", h=codes.shape[1])).float().clamp(-1, 1)

    def _decode_tiles(self, codes: Tensor) -> Tensor:
        """[1, h, w] -> [1, 3, H, W]: weighted mean of the tiles, with weights that fall towards their borders."""
        f = self.stride
        h, w = codes.shape[-2:]
        pixels = torch.zeros(1, 3, h * f, w * f, device=self.device)
        weights = torch.zeros(h * f, w * f, device=self.device)
        for (top, bottom), (left, right) in itertools.product(self._tiles(h), self._tiles(w)):
            tile = self._decode(codes[:, top:bottom, left:right].to(self.device))
            weight = torch.outer(self._ramp(top, bottom, h), self._ramp(left, right, w))
            pixels[..., top * f : bottom * f, left * f : right * f] += tile * weight
            weights[top * f : bottom * f, left * f : right * f] += weight
        return pixels / weights

    def _ramp(self, begin: int, end: int, length: int) -> Tensor:
        """Weights of a tile's pixels along one side: they rise over the overlap where there is a neighbor."""
        ramp = torch.ones((end - begin) * self.stride, device=self.device)
        rise = (torch.arange(self.overlap * self.stride, device=self.device) + 0.5) / (self.overlap * self.stride)
        if begin:
            ramp[: len(rise)] = rise
        if end < length:
            ramp[-len(rise) :] = torch.minimum(ramp[-len(rise) :], rise.flip(0))
        return ramp

    def fit(self, image: Image, area: int | None = None, fit: Fit = "keep") -> Image:
        """Return an RGB image of a size that the tokenizer takes, from an image of any mode and size.

        area: number of pixels (default: `resolution ** 2`); with `keep` the largest number, and no side exceeds `LONGEST_SIDE`
        codes.
        Errors: `UserError` for an image without pixels.
        """
        area = area or self.config.resolution**2
        if 0 in image.size:
            raise UserError(f"an image of {image.width} x {image.height} pixels; replace it or leave it out")
        image = to_rgb(image) if image.mode != "RGB" else image
        if fit == "keep":
            return fit_image(image, area, LONGEST_SIDE * self.stride)
        side = min(max(1, round(area**0.5)), LONGEST_SIDE * self.stride)
        return crop_square(image, side) if fit == "crop" else stretch_image(image, side)

    def prepare(self, image: Image, area: int | None = None, fit: Fit = "keep") -> Tensor:
        """Return [3, H, W] in [-1, 1], of which `encode` takes batches, from an image of any mode and size. area, fit: as for
        `fit`."""
        return image_to_tensor(self.fit(to_rgb(image), area, fit))

    def encode_file(self, path: Path, area: int | None = None, fit: Fit = "keep") -> tuple[Tensor, tuple[int, int]]:
        """Return the codes of an image file, int64 [h, w], and its (height, width) in pixels before padding. area, fit: as for
        `fit`. Errors: `UserError` that names the file."""
        pixels = self.prepare(open_image(path), area, fit)
        return self.encode(pixels[None])[0], (pixels.shape[1], pixels.shape[2])

    def decode_file(self, codes: Tensor, path: Path, size: tuple[int, ...] = ()) -> None:
        """Write the image of codes, int64 [h, w], as PNG. size: (height, width) in pixels (default: all that the codes cover).
        Inverse of `encode_file`."""
        pixels = self.decode(codes[None])[0]
        height, width = size or pixels.shape[-2:]
        save_image(path, pixels[:, :height, :width])
