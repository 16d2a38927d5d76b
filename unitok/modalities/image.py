"""Images: a grid of VQ-GAN codes, row by row, after the numbers of its rows and columns.

PyTorch is imported in functions, so that the command line knows the options without it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from markupsafe import Markup
from PIL import Image as Pillow

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
    """

    area: int = 0
    fit: Literal["keep", "crop", "resize"] = "keep"
    crops: int = 0
    crop_scale: float = 0.5
    flip: bool = False

    def __post_init__(self) -> None:
        for name, value, good, must in (
            ("area", self.area, self.area >= 0, "at least 0"),
            ("crops", self.crops, self.crops >= 0, "at least 0"),
            ("crop_scale", self.crop_scale, 0 < self.crop_scale <= 1, "above 0 and at most 1"),
        ):
            if not good:
                raise UserError(f"image: {name} is {value}; it must be {must}")
        if self.fit not in ("keep", "crop", "resize"):
            raise UserError(f"image: fit {self.fit!r}; choose keep, crop or resize")


@register
class Image(Modality["ImageTokenizer", "Tensor", ImageOptions]):
    """Content: float [3, H, W] in [-1, 1]. It is read from files that Pillow opens, and from `PIL.Image`."""

    kind = "image"
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
        if isinstance(content, Pillow.Image):
            image, size = content, 0
        elif not isinstance(content, Blob):
            from unitok.tokenizers.arguments import image_from_array

            image, size = image_from_array(content, name), 0
        else:
            from unitok.media import open_image

            assert isinstance(content, Blob)
            data = content.read()
            image, size = open_image(Path(name), data), len(data)
        try:
            format, facts = image.format or "", {"width": float(image.width), "height": float(image.height)}
            if view.startswith("crop"):
                image, view = _random_crop(image, options, chance)
            elif view == "flip":
                image = image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
            image = tokenizer.fit(image, options.area or None, options.fit)
        except (OSError, SyntaxError) as error:  # Pillow reads the pixels of an open file only now
            raise UserError(f"{name}: cannot be read ({first_line(error)}); replace it or leave it out") from None
        return Loaded(np.asarray(image), (image.height, image.width), view, format, facts, bytes=size)

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


def _random_crop(image: Pillow.Image, options: ImageOptions, chance: float) -> tuple[Pillow.Image, str]:
    """A random part of an image with the same aspect ratio, and its position as a media fragment."""
    rng = np.random.default_rng(int(chance * 2**56))
    scale = rng.uniform(options.crop_scale, 1)
    width, height = (max(1, round(side * scale)) for side in image.size)
    x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    view = f"xywh={x},{y},{width},{height}"
    image = image.crop((x, y, x + width, y + height))
    if options.flip and rng.random() < 0.5:
        return image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT), f"{view}&flip"
    return image, view


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
