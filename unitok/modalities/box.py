"""Boxes and points in an image: coordinates as codes of one range, after the image that they belong to or before it.

One convention, everywhere: x before y, the upper left corner before the lower right one, both in the box; coordinates are fractions
of the width and height of the *original* image, upright as its EXIF says, so that neither resizing nor padding changes them. A crop or
a mirrored variant of the image changes them with it. In JSON they may be pixels of the original image, from 0 at its left (upper) edge
to its width (height) at the other.

    {"type": "box", "boxes": [[12, 30, 200, 180]], "unit": "pixel"}      {"type": "point", "points": [[0.5, 0.25]]}

They belong to the nearest image before them, else the next, or to the one that `image` says, counted from 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from markupsafe import Markup

from unitok import pages
from unitok.document import Segment
from unitok.errors import UserError
from unitok.modalities import Loaded, Modality, NoOptions, Plain, register
from unitok.ranges import Span

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BINS = 1000  # codes of a coordinate
VISIBLE = 0.5  # smallest part of a box that a crop must show; else the cropped document is left out
UNITS = ("fraction", "pixel")


@dataclass(frozen=True)
class Boxes:
    """Boxes [[x0, y0, x1, y1]] of an image as callers give them. Errors: `UserError` for what is none.

    Args:
        rows: at least one; float [N, 4], of points [N, 2].
        unit: `fraction` of the image's width and height, or `pixel` of the original image.
        image: which image of the document, counted from 0; None: the nearest one before, else the next.
        size: width and height of the image that pixels are of, where a file says it; None: those of the image itself.
    """

    rows: Any
    unit: str = "fraction"
    image: int | None = None
    size: tuple[float, float] | None = None
    columns: ClassVar[int] = 4
    name: ClassVar[str] = "box"

    def __post_init__(self) -> None:
        form = "[x0, y0, x1, y1]" if self.columns == 4 else "[x, y]"
        given = self.rows.tolist() if isinstance(self.rows, np.ndarray) else self.rows
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise UserError(f"no {self.name} in it; give a list of {form}")
        for row in given:
            wrong = not isinstance(row, Sequence) or isinstance(row, str) or len(row) != self.columns
            if wrong or any(isinstance(v, bool) or not isinstance(v, Real) or not math.isfinite(v) for v in row):
                raise UserError(f"{self.name} {str(row)[:60]}: it is {form}, {self.columns} numbers")
            if self.columns == 4 and (row[2] < row[0] or row[3] < row[1]):
                raise UserError(f"{self.name} {str(row)[:60]}: {form} with x1 >= x0 and y1 >= y0 (not x, y, width, height)")
        if self.unit not in UNITS:
            raise UserError(f"unit {self.unit!r}; choose one of {', '.join(UNITS)}")
        if self.image is not None and (type(self.image) is not int or self.image < 0):
            raise UserError(f"image {self.image!r}: the number of an image in the document, counted from 0")
        object.__setattr__(self, "rows", np.asarray(given, np.float64))

    def in_image(self, image: Loaded | None, where: str) -> np.ndarray:
        """Return them as fractions of what is encoded of an image; float [N, columns], none where a crop does not show them all.

        image: None where there is none. Errors: `UserError` for pixels without an image, and for coordinates outside of it.
        """
        rows, size = np.asarray(self.rows), (1.0, 1.0)
        if self.unit == "pixel":
            if image is None or "width" not in image.facts:
                raise UserError(
                    f"{where}: a {self.name} in pixels needs its image in the document; give fractions of its sides"
                )
            size = self._size(image, where)
        sides, over = np.tile(size, self.columns // 2), 1.0 if self.unit == "pixel" else 1e-6  # a pixel, as files round
        outside = ((rows < -over) | (rows > sides + over)).any(1)
        if outside.any():
            bad, limits = rows[outside][0].tolist(), f"{size[0]:g} x {size[1]:g} pixels" if self.unit == "pixel" else "0 to 1"
            raise UserError(f"{where}: {self.name} {bad} ({self.unit}s) leaves its image, {limits}; correct it, or its unit")
        fractions: np.ndarray = (rows / sides).clip(0, 1)
        return fractions if image is None else self._in_window(fractions, image.window)

    def _in_window(self, rows: np.ndarray, window: tuple[float, float, float, float]) -> np.ndarray:
        """Fractions of an image as fractions of a window of it; none where the window does not show them all."""
        left, top, right, bottom = window
        x, y = (rows[:, 0::2] - left) / (right - left), (rows[:, 1::2] - top) / (bottom - top)
        seen = np.empty_like(rows)
        seen[:, 0::2], seen[:, 1::2] = np.sort(x, 1), np.sort(y, 1)  # a mirrored image swaps left and right
        low, high = seen[:, :2], seen[:, -2:]
        lengths, overlap = high - low, np.minimum(high, 1) - np.maximum(low, 0)
        visible = np.where(lengths > 1e-9, overlap.clip(0) / lengths.clip(1e-9), overlap >= -1e-9).prod(1)
        return seen.clip(0, 1) if (visible >= VISIBLE).all() else seen[:0]

    def _size(self, image: Loaded, where: str) -> tuple[float, float]:
        """Width and height of the image that pixels are of. Errors: `UserError` for an image of another shape."""
        size = image.facts["width"], image.facts["height"]
        given = self.size or size
        if abs(given[0] * size[1] - given[1] * size[0]) > max(*given, *size):  # more than a pixel
            raise UserError(
                f"{where}: a {self.name} in an image of {given[0]:g} x {given[1]:g} pixels, but the file has {size[0]:g} x "
                f"{size[1]:g} (upright, as its EXIF says); correct the size and the {self.name}"
            )
        return given


class Points(Boxes):
    """Points [[x, y]] of an image; see `Boxes`."""

    columns = 2
    name = "point"


@register
class Box(Modality[Plain, np.ndarray, NoOptions]):
    """Content: float [N, 4], x0, y0, x1, y1 as fractions of the image's width and height."""

    kind = "box"
    key = "boxes"
    keys = ("unit", "image")
    refers = "image"
    Content: ClassVar[type[Boxes]] = Boxes

    @property
    def plural(self) -> str:
        return f"{self.kind}es" if self.kind.endswith("x") else f"{self.kind}s"

    def untrained(self) -> Plain:
        return Plain(self.kind, bins=BINS)

    def declare(self, name: str, tokenizer: Plain) -> tuple[Span, dict[str, int], tuple[int, ...]]:
        """<box> x0 y0 x1 y1 … </box>: all coordinates from one range, which points share."""
        columns, bins = self.Content.columns, _bins(tokenizer)
        floors = (0, 1, 0, 1) if columns == 4 else ()
        place = "place" if bins == BINS else f"place{bins}"
        span = Span(name, (place,) * columns, f"<{name}>", f"</{name}>", (), tokenizer.fingerprint(), self.kind, "", floors)
        return span, {place: bins}, ()

    def accepts(self, content: object) -> bool:
        return type(content) is self.Content

    def check(self, value: object, where: str) -> Boxes:
        if type(value) is self.Content:
            return value
        given = value if isinstance(value, Mapping) else {self.key: value}
        rows, unit = given.get(self.key), given.get("unit", "fraction")
        try:
            return self.Content(rows, unit, given.get("image"))  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def row(self, value: object) -> dict[str, object]:
        if isinstance(value, Boxes):
            about = {} if value.image is None else {"image": value.image}
            return {self.key: value.rows.tolist()} | ({} if value.unit == "fraction" else {"unit": value.unit}) | about
        return {self.key: np.asarray(value).round(6).tolist()}

    def referred(self, value: object) -> int | None:
        return value.image if isinstance(value, Boxes) else None

    def related(self, value: object, about: Loaded | None, where: str) -> object:
        assert isinstance(value, Boxes)
        return value.in_image(about, where)

    def load(
        self, tokenizer: Plain, content: object, options: NoOptions, name: str, view: str = "", chance: float = 0.0
    ) -> Loaded:
        rows = content.in_image(None, name) if isinstance(content, Boxes) else np.asarray(content)
        rejected = "" if len(rows) else f"{self.kind} outside of the crop"
        return Loaded(rows, facts={self.plural: len(rows)}, rejected=rejected)

    def encode(self, tokenizer: Plain, batch: list[Loaded]) -> list[np.ndarray]:
        most = _bins(tokenizer) - 1
        return [np.round(one.content * most).astype(np.int64).T for one in batch]

    def decode(self, tokenizer: Plain, segment: Segment) -> np.ndarray:
        decoded: np.ndarray = segment.codes.T / (_bins(tokenizer) - 1)
        return decoded

    def line(self, tokenizer: Plain, segment: Segment) -> str:
        rows = (" ".join(f"{v:.3f}".rstrip("0").rstrip(".") for v in row) for row in self.decode(tokenizer, segment)[:4])
        return f"{segment.modality} {'; '.join(rows)}{'; …' if segment.codes.shape[1] > 4 else ''}"

    def html(self, tokenizer: Plain, content: np.ndarray) -> Markup:
        return pages.text("; ".join(", ".join(f"{v:.3f}" for v in row) for row in np.asarray(content)))

    def overlay(self, content: np.ndarray) -> Markup:
        return pages.boxes(np.asarray(content).tolist())

    def terminal(self, tokenizer: Plain, content: np.ndarray, done: bool, colors: bool) -> tuple[str, bool]:
        rows = "; ".join(" ".join(f"{v:.3f}" for v in row) for row in np.asarray(content))
        return (f"[{self.kind} {rows}]\n" if done else ""), False

    def log(self, board: "SummaryWriter", tag: str, tokenizer: Plain, content: np.ndarray, step: int) -> None:
        board.add_text(tag, str(np.asarray(content).round(3).tolist()), step)


@register
class Point(Box):
    """Content: float [N, 2], x, y as fractions of the image's width and height."""

    kind = "point"
    key = "points"
    Content = Points


def _bins(tokenizer: Plain) -> int:
    bins = tokenizer.config.get("bins", BINS)
    if not isinstance(bins, int) or bins < 2:
        raise UserError(f"{tokenizer.kind}: bins is {bins}; it must be at least 2")
    return bins


def in_pixels(rows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return fractions [N, 4] or [N, 2] as pixels of an image of (height, width)."""
    scaled: np.ndarray = rows * np.tile(size[::-1], rows.shape[1] // 2)
    return scaled
