"""Images: a grid of VQ-GAN codes, row by row, after the numbers of its rows and columns.

A part with `"map": "labels"`, `"depth"`, `"edges"` or `"normals"` is a map (`unitok.media.maps`), which becomes an RGB image.

PyTorch is imported in functions, so that the command line knows the options without it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from markupsafe import Markup
from PIL import Image as Pillow
from PIL import ImageFilter, ImageOps

from unitok import pages
from unitok.document import Segment
from unitok.errors import UserError, first_line
from unitok.modalities import Loaded, Modality, Stream, register
from unitok.ranges import Span
from unitok.storage import Blob

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from unitok.tokenizers import ImageTokenizer

COLUMNS = 48  # largest width of an image in a terminal, in characters


@dataclass(frozen=True)
class ImageOptions:
    """How images are read.

    Args:
        area: largest number of pixels; larger images are shrunk. 0: the tokenizer's resolution squared.
        fit: `keep` all of each image in its aspect, `crop` its center square, or `resize` it to a distorted square.
        crops: additional documents per document with images, of random crops.
        crop_scale: smallest fraction of a side that a random crop has.
        flip: one additional document per document with images, mirrored; half of the random crops are mirrored, too.
        far: of maps of depth, the depth that is white, in the files' unit. 0: 65,535 for 16 bits, 255 for 8 bits, 1 for fractions.
    """

    area: int = 0
    fit: Literal["keep", "crop", "resize"] = "keep"
    crops: int = 0
    crop_scale: float = 0.5
    flip: bool = False
    far: float = 0.0

    def __post_init__(self) -> None:
        for name, value, good, must in (
            ("area", self.area, self.area >= 0, "at least 0"),
            ("crops", self.crops, self.crops >= 0, "at least 0"),
            ("crop_scale", self.crop_scale, 0 < self.crop_scale <= 1, "above 0 and at most 1"),
            ("far", self.far, 0 <= self.far < math.inf, "at least 0"),
        ):
            if not good:
                raise UserError(f"image: {name} is {value}; it must be {must}")
        if self.fit not in ("keep", "crop", "resize"):
            raise UserError(f"image: fit {self.fit!r}; choose keep, crop or resize")


@register
class Image(Modality["ImageTokenizer", "Tensor", ImageOptions]):
    """Content: float [3, H, W] in [-1, 1]. It is read from files that Pillow opens, and from `PIL.Image`."""

    kind = "image"
    keys = ("map",)
    Options = ImageOptions

    def tokenizer_class(self) -> "type[ImageTokenizer]":
        from unitok.tokenizers import ImageTokenizer

        return ImageTokenizer

    def untrained(self) -> "ImageTokenizer":
        import torch

        from unitok.tokenizers import ImageTokenizer, ImageTokenizerConfig

        model = ImageTokenizer(ImageTokenizerConfig(ch=64, ch_mult=(1,), z_channels=16, resolution=32, codebook_size=64))
        with torch.no_grad():
            latents = model.encoder(torch.randn(16, 3, 32, 32).clamp(-1, 1)).movedim(1, -1).flatten(1, 2)
            low = model.quantizer.project(latents).projected
        assert low is not None
        model.quantizer.init_codebook(low)  # of noise, so that many codes occur
        return model.eval()

    def declare(self, name: str, tokenizer: "ImageTokenizer") -> tuple[Span, dict[str, int], tuple[int, ...]]:
        from unitok.tokenizers.image import LONGEST_SIDE

        span = Span(name, (name,), f"<{name}>", f"</{name}>", ("grid", "grid"), tokenizer.fingerprint(), self.kind)
        return span, {"grid": LONGEST_SIDE, name: tokenizer.codebook_size}, ()

    def usage(self, name: str, tokenizer: "ImageTokenizer") -> dict[str, str]:
        side = tokenizer.config.resolution
        tokens = (side // tokenizer.stride) ** 2 + 4  # begin, rows, columns, end
        return {"an image" if name == self.kind else f"an {name}": f"{tokens:,} tokens ({side} x {side} pixels)"}

    def accepts(self, content: object) -> bool:
        return isinstance(content, Pillow.Image) or hasattr(type(content), "__array__")

    def view(self, given: Mapping[str, object], where: str) -> str:
        from unitok.media.maps import MAPS

        kind = given.get("map")
        if kind is not None and kind not in MAPS:
            raise UserError(f"{where}: map {kind!r}; choose one of {', '.join(MAPS)}")
        return "" if kind is None else f"map={kind}"

    def keys_of(self, view: str) -> dict[str, object]:
        kind = _split_view(view)[0]
        return {"map": kind} if kind else {}

    def views(self, options: ImageOptions) -> list[str]:
        return (["flip"] if options.flip else []) + [f"crop={n}" for n in range(1, options.crops + 1)]

    def load(
        self,
        tokenizer: "ImageTokenizer",
        content: object,
        options: ImageOptions,
        name: str,
        view: str = "",
        chance: float = 0.0,
    ) -> Loaded:
        from unitok.media import open_image, upright

        kind, variant = _split_view(view)
        if kind:
            from unitok.media.maps import read_map

            data = content.read() if isinstance(content, Blob) else content
            image = read_map(name, data, kind, options.far)  # type: ignore[arg-type]
            size = len(data) if isinstance(data, bytes) else 0
        elif isinstance(content, Pillow.Image):
            image, size = upright(content), 0
        elif not isinstance(content, Blob):
            from unitok.tokenizers.arguments import image_from_array

            image, size = image_from_array(content, name), 0
        else:
            assert isinstance(content, Blob)
            data = content.read()
            image, size = open_image(Path(name), data), len(data)
        try:
            format, facts = image.format or "", {"width": float(image.width), "height": float(image.height)}
            window = _WHOLE
            if variant.startswith("crop"):
                image, variant, window = _random_crop(image, options, chance)
            elif variant == "flip":
                image, window = image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT), (1.0, 0.0, 0.0, 1.0)
            if options.fit == "crop":
                window = _center_square(window, *image.size)
            fitted = tokenizer.fit(image, options.area or None, options.fit)
            image = _nearest(image, fitted, options.fit) if kind == "labels" else fitted
        except (OSError, SyntaxError) as error:  # Pillow reads the pixels of an open file only now
            raise UserError(f"{name}: cannot be read ({first_line(error)}); replace it or leave it out") from None
        view = "&".join(filter(None, (f"map={kind}" if kind else "", variant)))
        return Loaded(np.asarray(image), (image.height, image.width), view, format or kind, facts, bytes=size, window=window)

    def batch_key(self, tokenizer: "ImageTokenizer", loaded: Loaded) -> tuple[int, ...]:
        return tuple(-(-side // tokenizer.stride) for side in loaded.size)

    def encode(self, tokenizer: "ImageTokenizer", batch: list[Loaded]) -> list[np.ndarray]:
        import torch

        height, width = (side * tokenizer.stride for side in self.batch_key(tokenizer, batch[0]))
        padded = [
            np.pad(one.content, ((0, height - one.size[0]), (0, width - one.size[1]), (0, 0)), mode="edge") for one in batch
        ]
        pixels = torch.from_numpy(np.stack(padded)).permute(0, 3, 1, 2)
        return list(tokenizer.encode(pixels.contiguous().float().div_(127.5).sub_(1)).cpu().numpy())

    def filling(self, tokenizer: "ImageTokenizer", content: object, hole: object, where: str) -> "_ImageFilling":
        """hole: a mask, white where the image is to be made (or transparent, if it has an alpha channel), as a Path, image or array
        [H, W]; or pixels to add at the left, top, right and bottom."""
        image = _opened(content, where)
        if isinstance(hole, tuple | list) and len(hole) == 4 and all(isinstance(side, int) and side >= 0 for side in hole):
            left, top, right, bottom = hole
            pixels = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
            mask: np.ndarray = np.ones(pixels.shape[:2], bool)
            mask[top : top + image.height, left : left + image.width] = False
            image = Pillow.fromarray(pixels)
        elif hole is None or isinstance(hole, tuple | list):
            raise UserError(f"{where}: an image needs a mask, or pixels to add: (left, top, right, bottom)")
        else:
            mask = _mask_of(hole, where)
        if mask.shape[:2] != (image.height, image.width):
            raise UserError(
                f"{where}: a mask of {mask.shape[1]} x {mask.shape[0]} for an image of {image.width} x {image.height} pixels; "
                "they must be equal"
            )
        if not mask.any():
            raise UserError(f"{where}: a mask without a hole: nothing in it is white")
        return _ImageFilling(image, mask, tokenizer.stride)

    def decode(self, tokenizer: "ImageTokenizer", segment: Segment) -> "Tensor":
        import torch

        pixels = tokenizer.decode(torch.from_numpy(segment.codes)[None])[0].cpu()
        height, width = segment.size or pixels.shape[-2:]
        return pixels[:, :height, :width]

    def save(self, tokenizer: "ImageTokenizer", content: "Tensor", path: Path) -> Path:
        from unitok.media import save_image

        path = path.with_name(f"{path.name}.png")
        save_image(path, content)
        return path

    def save_map(self, content: "Tensor", path: Path, kind: str) -> None:
        from unitok.media.maps import SMOOTH, save_map

        save_map(path, ((content.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).cpu().numpy(), kind, smooth=SMOOTH)

    def stream(self, tokenizer: "ImageTokenizer", span: Span) -> "Stream[ImageTokenizer, Tensor]":
        return _ImageStream(self, tokenizer) if span.header else Stream(self, tokenizer)

    def html(self, tokenizer: "ImageTokenizer", content: "Tensor") -> Markup:
        from unitok.media import encode_png

        return pages.image(encode_png(content))

    def html_of_file(self, file: Path) -> Markup:
        return pages.image(file)

    def line(self, tokenizer: "ImageTokenizer", segment: Segment) -> str:
        return f"{segment.modality} {segment.size[1]} x {segment.size[0]}"

    def terminal(self, tokenizer: "ImageTokenizer", content: "Tensor", done: bool, colors: bool) -> tuple[str, bool]:
        if colors:
            return "".join(f"{line}\n" for line in half_blocks(content)), True
        height, width = content.shape[1:]
        return (f"[{self.kind}, {height} x {width} pixels]\n" if done else ""), False

    def log(self, board: "SummaryWriter", tag: str, tokenizer: "ImageTokenizer", content: "Tensor", step: int) -> None:
        board.add_image(tag, ((content.clamp(-1, 1) + 1) / 2).cpu(), step)


class _ImageStream(Stream["ImageTokenizer", "Tensor"]):
    """Returns all complete rows so far, whenever there are new ones."""

    rows = 0

    def begin(self, codes: np.ndarray) -> None:
        self.rows = len(codes)

    def push(self, codes: np.ndarray, done: bool) -> "Tensor | None":
        if not done and len(codes) <= self.rows:
            return None
        self.rows = len(codes)
        return self.modality.decode(self.tokenizer, Segment(self.modality.kind, codes))


@dataclass
class _ImageFilling:
    """An image, uint8 RGB, whose pixels in `mask` [H, W] are to be made."""

    content: Pillow.Image
    mask: np.ndarray
    stride: int

    def missing(self, segment: Segment) -> np.ndarray:
        """Every cell that the mask touches."""
        height, width = segment.size[:2]
        rows, columns = segment.codes.shape[-2:]
        whole = np.zeros((rows * self.stride, columns * self.stride), bool)
        y, x = np.nonzero(self.mask)
        whole[y * height // self.mask.shape[0], x * width // self.mask.shape[1]] = True
        return whole.reshape(rows, self.stride, columns, self.stride).any((1, 3)).reshape(-1)

    def finish(self, made: "Tensor") -> "Tensor":
        """The original's own pixels outside of the mask, blended over a few at the seam."""
        import torch
        import torch.nn.functional as F

        height, width = self.mask.shape
        if made.shape[1:] != self.mask.shape:
            made = F.interpolate(made[None].float(), (height, width), mode="bicubic")[0].clamp(-1, 1)
        seam = max(1, round(self.stride / 4 * (height * width / made[0].numel()) ** 0.5))
        soft = np.asarray(Pillow.fromarray(self.mask.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(seam)), np.float32)
        alpha = torch.from_numpy(np.where(self.mask, 1, np.minimum(2 * soft / 255, 1)).astype(np.float32))
        original = torch.from_numpy(np.asarray(self.content).copy()).permute(2, 0, 1).float() / 127.5 - 1
        return torch.where(alpha > 0, original + alpha * (made.float().cpu() - original), original)


def _opened(content: object, where: str) -> Pillow.Image:
    """An image of a prompt, upright and RGB."""
    from unitok.media import open_image, to_rgb
    from unitok.tokenizers.arguments import image_from_array

    if isinstance(content, Path):
        return open_image(content)
    return to_rgb(content if isinstance(content, Pillow.Image) else image_from_array(content, where))


def open_mask(name: str, data: bytes) -> Pillow.Image:
    """Read the file of a mask with its alpha channel. name: for messages. Errors: `UserError`."""
    from unitok.media import open_image

    open_image(Path(name), data)  # whose messages say what is wrong with the file
    return ImageOps.exif_transpose(Pillow.open(BytesIO(data)))


def _mask_of(mask: object, where: str) -> np.ndarray:
    """Where a mask is white, or transparent if it has an alpha channel; bool [H, W]. Errors: `UserError`."""
    if isinstance(mask, Path):
        if not mask.is_file():
            raise UserError(f"{mask}: {'not a file' if mask.exists() else 'no such file'}")
        mask = open_mask(str(mask), mask.read_bytes())
    if isinstance(mask, Pillow.Image):
        mask = mask.convert("RGBA") if "transparency" in mask.info else mask
        if "A" in mask.getbands() and np.asarray(mask.getchannel("A")).min() < 128:
            return np.asarray(mask.getchannel("A")) < 128
        return np.asarray(mask.convert("L")) >= 128
    values = np.asarray(mask)
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise UserError(f"{where}: a mask of shape {values.shape}; give [H, W], above 0 (True) where the image is to be made")
    return values > 0


Window = tuple[float, float, float, float]  # as in `Loaded.window`
_WHOLE: Window = (0.0, 0.0, 1.0, 1.0)


def _split_view(view: str) -> tuple[str, str]:
    """The map that a view names, "" for none, and the rest of the view."""
    first, _, rest = view.partition("&")
    return (first.removeprefix("map="), rest) if first.startswith("map=") else ("", view)


def _center_square(window: Window, width: int, height: int) -> Window:
    """The window of the center square of what a window of width x height pixels shows."""
    left, top, right, bottom = window
    dx, dy = (max(0.0, (1 - min(width, height) / side) / 2) for side in (width, height))
    wide, high = right - left, bottom - top
    return left + dx * wide, top + dy * high, right - dx * wide, bottom - dy * high


def _nearest(image: Pillow.Image, fitted: Pillow.Image, fit: str) -> Pillow.Image:
    """An image as `fitted` shows it, but without colors in between."""
    if fit == "crop":
        return ImageOps.fit(image, fitted.size, Pillow.Resampling.NEAREST)
    return image.resize(fitted.size, Pillow.Resampling.NEAREST)


def _random_crop(image: Pillow.Image, options: ImageOptions, chance: float) -> tuple[Pillow.Image, str, Window]:
    """A random part of an image with the same aspect ratio, its position as a media fragment, and its window."""
    rng = np.random.default_rng(int(chance * 2**56))
    scale = rng.uniform(options.crop_scale, 1)
    width, height = (max(1, round(side * scale)) for side in image.size)
    x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    view = f"xywh={x},{y},{width},{height}"
    left, top, right, bottom = x / image.width, y / image.height, (x + width) / image.width, (y + height) / image.height
    image = image.crop((x, y, x + width, y + height))
    if options.flip and rng.random() < 0.5:
        return image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT), f"{view}&flip", (right, top, left, bottom)
    return image, view, (left, top, right, bottom)


def half_blocks(pixels: "Tensor") -> list[str]:
    """Return an image, float [3, h, w] in [-1, 1], as lines for a terminal; each character shows two pixels, one above the other."""
    import torch.nn.functional as F

    h, w = pixels.shape[1:]
    columns = min(COLUMNS, w)
    rows = max(2, 2 * round(columns * h / w / 2))
    small = F.interpolate(pixels[None].float(), (rows, columns), mode="bilinear", antialias=True)[0]
    values = ((small.clamp(-1, 1) + 1) * 127.5).round().int().permute(1, 2, 0).tolist()
    lines = []
    for above, below in zip(values[::2], values[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m\N{UPPER HALF BLOCK}"
            for a, b in zip(above, below, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return lines
