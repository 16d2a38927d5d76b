"""The image tokenizer: a VQ-GAN that turns images into grids of codes and back.

[B, 3, H, W] in [-1, 1] -> int64 [B, h, w] -> [B, 3, H, W]; any H and W (padded by repeating the edge to whole codes).

Images larger than `ImageTokenizer.tile` are processed in overlapping tiles, so memory stays bounded. Each code comes from the
tile in whose middle it lies; pixels of neighboring tiles are blended over the overlap, so there are no seams.

A video is a grid for its first frame, which is an image, then one for every `group` frames (cf. Yu et al. 2024, "MAGVIT-v2", whose codes
are causal in the same way). A grid says nothing of later frames; decoding also looks at the grid before, and no further.
"""

import itertools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor

from unitok.errors import UserError, type_of
from unitok.media import crop_square, fit_image, image_to_tensor, open_image, save_image, stretch_image, to_rgb
from unitok.tokenizers.arguments import as_tensor, check_codes, check_images
from unitok.tokenizers.base import Reconstruction, Tokenizer, in_float32
from unitok.tokenizers.config import ImageTokenizerConfig
from unitok.tokenizers.patch import ImagePatchEncoder
from unitok.tokenizers.quantize import VectorQuantizer, build_quantizer
from unitok.tokenizers.vqgan import Decoder, Encoder

#: Longest side of an image in codes; the vocabulary has as many grid sizes.
LONGEST_SIDE = 64

TOGETHER = 32  # frames of videos that go through the networks together

#: How an image is brought to size: `keep` all of it (shrunk to an area, never enlarged), `crop` the center square, or
#: `resize` to a square, whatever its aspect ratio.
Fit = Literal["keep", "crop", "resize"]


class ImageTokenizer(Tokenizer):
    """A VQ-GAN's encoder, quantizer and decoder.

    Attributes:
        stride: pixels per code along each side. codebook_size: number of codes.
        tile: pixels per side of the largest square that is processed at once; its area also bounds batches.
        overlap: codes that neighboring tiles share.
        group: frames of a video that share a grid, after the first.
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
        self.stride, self.group, self.codebook_size = c.stride, c.group, self.quantizer.size
        self.tile, self.overlap = 1024, 8

    @torch.no_grad()
    def init_from(self, trained: "ImageTokenizer", where: str) -> None:
        """Take the weights of another image tokenizer, whose groups and codebook may be smaller.

        Groups of frames begin with what it does for one frame; further codes are drawn from data in the first step of training.
        where: for messages. Errors: `UserError` for another architecture.
        """
        given, own = trained.config, self.config
        free = ("group", "codebook_size") if own.quantizer == "vq" else ("group",)
        differ = [f.name for f in fields(own) if f.name not in free and getattr(given, f.name) != getattr(own, f.name)]
        if differ or given.group not in (1, own.group) or given.codebook_size > own.codebook_size:
            which = ", ".join(differ) or f"group {given.group}, codebook_size {given.codebook_size}"
            raise UserError(f"{where}: its weights do not fit a tokenizer of another {which}")
        state = self.state_dict()
        for name, value in trained.state_dict().items():
            if state[name].shape == value.shape:
                state[name].copy_(value)
        if isinstance(self.quantizer, VectorQuantizer) and isinstance(trained.quantizer, VectorQuantizer):
            self.quantizer.codebook.init_from(trained.quantizer.codebook)
        if own.group > given.group:
            self.encoder.start_group()
            if self.decoder is not None:
                self.decoder.start_group()

    def steps(self, frames: int) -> int:
        """The number of grids of a video of that many frames."""
        return 1 + -(-(frames - 1) // self.group)

    def _padded(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] whose sides are whole codes."""
        h, w = (-side % self.stride for side in images.shape[-2:])
        return F.pad(images, (0, w, 0, h), mode="replicate") if h or w else images

    def _latents(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], or [B, group * 3, H, W] -> [B, h, w, z_channels]."""
        return rearrange(self.encoder(self._padded(images)), "b c h w -> b h w c")

    def _pixels(self, latents: Tensor, before: Tensor | None = None) -> Tensor:
        """Latents [B, h, w, z_channels], of a group of frames with those of the grid before it -> [B, 3 or group * 3, H, W]."""
        if self.decoder is None:
            raise UserError("this image tokenizer only encodes: its checkpoint has no decoder")
        return self.decoder(*(rearrange(z, "b h w c -> b c h w") for z in (latents, before) if z is not None))

    def forward(self, images: Tensor, quantize: bool = True) -> Reconstruction:
        """Reconstruct images [B, 3, H, W] or videos [B, F, 3, H, W] of whole groups, in [-1, 1]. quantize: False leaves the latents as they
        are (warm-up)."""
        videos = images if images.ndim == 5 else images[:, None]
        (frames, _, height, width), g = videos.shape[1:], self.group
        if (frames - 1) % g:
            raise UserError(
                f"videos of {frames} frames: give the first one and groups of {g}, such as {1 + (self.steps(frames) - 1) * g}"
            )
        later = rearrange(videos[:, 1:], "b (n g) c h w -> (b n) (g c) h w", g=g)
        parts = [self._latents(part) for part in (videos[:, 0], later) if len(part)]
        z = torch.cat([rearrange(part, "(b n) h w c -> b n h w c", b=len(videos)) for part in parts], 1)
        flat = rearrange(z, "b n h w c -> b (n h w) c")
        q = self.quantizer(flat) if quantize else self.quantizer.project(flat)
        grids = rearrange(q.latents, "b (n h w) c -> b n h w c", n=z.shape[1], h=z.shape[2])
        signal = self._pixels(grids[:, 0])
        if frames > 1:
            before = grids[:, :-1].flatten(0, 1) if g > 1 else None
            groups = self._pixels(grids[:, 1:].flatten(0, 1), before)
            signal = torch.cat([signal[:, None], rearrange(groups, "(b n) (g c) h w -> b (n g) c h w", b=len(videos), g=g)], 1)
        codes = None if q.codes is None else q.codes.reshape(z.shape[:-1])
        if images.ndim == 4 and codes is not None:
            codes = codes[:, 0]
        return Reconstruction(signal[..., :height, :width], codes, q.losses, q.projected)

    @in_float32
    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes of images: [B, 3, H, W] in [-1, 1] -> int64 [B, ceil(H / stride), ceil(W / stride)].

        Errors: `UserError` as for `check_images`.
        """
        return self._encode_all(check_images(images, self.dtype))

    @in_float32
    @torch.no_grad()
    def encode_videos(self, videos: Sequence[Tensor]) -> list[Tensor]:
        """Return the codes of videos whose grids have equal sides: of each, [F, 3, H, W] in [-1, 1] -> int64 [steps(F), h, w].

        The last group of a video is filled up with its last frame. Errors: `UserError` as for `check_images`, and for grids of several sizes.
        """
        tensors = [as_tensor("videos", video, "[F, 3, H, W]") for video in videos]
        if sizes := {tuple(video.shape[1:]) for video in tensors if video.ndim != 4 or not len(video)}:
            raise UserError(f"videos are [F, 3, H, W] of at least one frame, got {[*sizes]}")
        if len({tuple(-(-side // self.stride) for side in video.shape[-2:]) for video in tensors}) > 1:
            raise UserError("videos whose grids of codes have several sizes: encode each size by itself")
        stacks = [stack for video in tensors for stack in self._stacks(video)]
        grids: dict[int, Tensor] = {}
        for size in {len(stack) for stack in stacks}:
            chosen = [number for number, stack in enumerate(stacks) if len(stack) == size]
            for first in range(0, len(chosen), max(1, TOGETHER // size)):
                some = chosen[first : first + max(1, TOGETHER // size)]
                frames = [self._padded(check_images(stacks[number], self.dtype)) for number in some]
                grids |= dict(zip(some, self._encode_all(torch.stack(frames).flatten(1, 2)), strict=True))
        counts = [self.steps(len(video)) for video in tensors]
        return list(torch.stack([grids[number] for number in range(len(stacks))]).split(counts)) if stacks else []

    def _stacks(self, frames: Tensor) -> list[Tensor]:
        """The frames [F, 3, H, W] that each grid of a video stands for, [1 or group, 3, H, W]."""
        missing = -(len(frames) - 1) % self.group
        whole = torch.cat([frames[1:], frames[-1:].expand(missing, -1, -1, -1)])
        return [frames[:1], *whole.split(self.group)] if len(whole) else [frames[:1]]

    def _encode_all(self, images: Tensor) -> Tensor:
        """[B, 3 or group * 3, H, W] -> int64 [B, h, w], a few images at a time."""
        if max(images.shape[-2:]) > self.tile:
            return torch.cat([self._encode_tiles(image[None]) for image in images])
        at_once = max(1, 3 * self.tile**2 // images[0].numel())
        return torch.cat([self._encode(part.to(self.device)) for part in images.split(at_once)])

    def _encode(self, images: Tensor) -> Tensor:
        z = self._latents(images)
        codes = self.quantizer.search(rearrange(z, "b h w c -> b (h w) c"))
        return rearrange(codes, "b (h w) -> b h w", h=z.shape[1])

    def _encode_tiles(self, image: Tensor) -> Tensor:
        """[1, C, H, W] -> [1, h, w]: each code from the tile in whose middle it lies."""
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

    @in_float32
    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the images of codes: int64 [B, h, w] -> [B, 3, h * stride, w * stride] in [-1, 1].

        Errors: `UserError` for codes of another shape or range, and for a tokenizer without a decoder.
        """
        return self._decode_all(check_codes(codes, "[B, h, w]", self.codebook_size)[:, None])

    @in_float32
    @torch.no_grad()
    def decode_video(self, codes: Tensor, frames: int | None = None, start: int = 0) -> Tensor:
        """Return the frames of a video's codes: int64 [S, h, w] -> [F, 3, h * stride, w * stride] in [-1, 1], on the CPU.

        frames: how many it has; default: all that the codes cover. start: the first grid to decode, for a part of a long video.
        Errors: `UserError` as for `decode`.
        """
        codes = check_codes(codes, "[S, h, w]", self.codebook_size)
        if not 0 <= start < len(codes):
            raise UserError(f"start {start}: the video has {len(codes)} grids")
        parts = [] if start else [self._decode_all(codes[:1, None]).cpu()]
        pairs = torch.stack([codes[:-1], codes[1:]], 1)[max(0, start - 1) :]
        for some in pairs.split(max(1, TOGETHER // self.group)) if len(pairs) else ():
            parts.append(
                rearrange(self._decode_all(some if self.group > 1 else some[:, 1:]).cpu(), "n (g c) h w -> (n g) c h w", c=3)
            )
        first = start and 1 + (start - 1) * self.group
        return torch.cat(parts)[: None if frames is None else max(0, frames - first)]

    def _decode_all(self, codes: Tensor) -> Tensor:
        """[B, 1, h, w], or [B, 2, h, w] with the grid before that of each group -> [B, 3 or group * 3, H, W], a few at a time."""
        h, w = codes.shape[-2:]
        if max(h, w) * self.stride > self.tile:
            return torch.cat([self._decode_tiles(grid[None]) for grid in codes])
        channels = self.group if codes.shape[1] > 1 else 1
        at_once = max(1, self.tile**2 // (channels * h * w * self.stride**2))
        return torch.cat([self._decode(part.to(self.device)) for part in codes.split(at_once)])

    def _decode(self, codes: Tensor) -> Tensor:
        latents = self.quantizer.lookup(rearrange(codes, "b n h w -> b (n h w)"))
        *before, own = rearrange(latents, "b (n h w) c -> n b h w c", n=codes.shape[1], h=codes.shape[2])
        return self._pixels(own, *before).float().clamp(-1, 1)

    def _decode_tiles(self, codes: Tensor) -> Tensor:
        """[1, n, h, w] -> [1, C, H, W]: weighted mean of the tiles, with weights that fall towards their borders."""
        f = self.stride
        h, w = codes.shape[-2:]
        pixels = torch.zeros(1, 3 * (self.group if codes.shape[1] > 1 else 1), h * f, w * f, device=self.device)
        weights = torch.zeros(h * f, w * f, device=self.device)
        for (top, bottom), (left, right) in itertools.product(self._tiles(h), self._tiles(w)):
            tile = self._decode(codes[..., top:bottom, left:right].to(self.device))
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
        if 0 in _checked(image).size:
            raise UserError(f"an image of {image.width} x {image.height} pixels; replace it or leave it out")
        image = to_rgb(image) if image.mode != "RGB" else image
        if fit == "keep":
            return fit_image(image, area, LONGEST_SIDE * self.stride)
        side = min(max(1, round(area**0.5)), LONGEST_SIDE * self.stride)
        return crop_square(image, side) if fit == "crop" else stretch_image(image, side)

    def prepare(self, image: Image, area: int | None = None, fit: Fit = "keep") -> Tensor:
        """Return [3, H, W] in [-1, 1], of which `encode` takes batches, from an image of any mode and size. area, fit: as for
        `fit`."""
        return image_to_tensor(self.fit(to_rgb(_checked(image)), area, fit))

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


def _checked(image: object) -> Image:
    """Errors: `UserError` for what is no PIL image."""
    if not isinstance(image, Image):
        raise UserError(f"image: {type_of(image)}; give a PIL image (encode_file reads a file, encode takes tensors)")
    return image
