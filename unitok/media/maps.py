"""Maps as images, and back: labels of classes in fixed colors, depth as gray, edges and normals as they are.

A map goes through an image tokenizer as RGB, so that decoding it means going back from colors that are a little wrong. Labels have the
256 colors of Pascal VOC's color map, and come back as the nearest color of those that may occur. Depth is gray: black is 0, white is
the largest depth.
"""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from unitok.errors import UserError, first_line

MAPS = ("labels", "depth", "edges", "normals")
SMOOTH = 1.0  # pixels, of label maps that a tokenizer decoded


@cache
def label_colors() -> np.ndarray:
    """Return the color of each label, uint8 [256, 3]: Pascal VOC's, whose bits are those of the label from the lowest on, in turns of red,
    green and blue from the highest bit down."""
    labels, colors = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((labels >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    return colors


def labels_to_rgb(labels: np.ndarray) -> np.ndarray:
    """Return the image of labels [H, W], uint8 [H, W, 3]. Errors: `UserError` for numbers that are no labels, 0 to 255."""
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.min() < 0 or labels.max() > 255 or (labels != labels.astype(np.uint8)).any():
        raise UserError(
            f"labels of {labels.shape} from {labels.min()} to {labels.max()}: a map is [H, W] of whole numbers, 0 to 255"
        )
    return label_colors()[labels.astype(np.uint8)]


def rgb_to_labels(pixels: np.ndarray, known: Sequence[int] = (), smooth: float = 0.0) -> np.ndarray:
    """Return the label whose color is nearest to each pixel, uint8 [H, W]. Inverse of `labels_to_rgb`.

    pixels: [H, W, 3] in [0, 255]. known: labels that may occur; the fewer, the more noise they bear. (): all 256. smooth: average the
    distance to each color around a pixel, by a Gaussian of that standard deviation in pixels: between two labels a tokenizer leaves pixels
    of a third one's color (`SMOOTH`).
    """
    labels = np.array(sorted(set(known)) if len(known) else range(256), np.uint8)
    colors, pixels = label_colors()[labels].astype(np.float32), np.asarray(pixels, np.float32)
    if not smooth:
        distances = (colors**2).sum(1) - 2 * pixels.reshape(-1, 3) @ colors.T
        return labels[distances.argmin(1)].reshape(pixels.shape[:2])
    from scipy.ndimage import gaussian_filter

    best, nearest = np.full(pixels.shape[:2], np.inf, np.float32), np.zeros(pixels.shape[:2], np.uint8)
    for label, color in zip(labels, colors, strict=True):  # one after the other: all distances of a large image would not fit
        distance = gaussian_filter(np.linalg.norm(pixels - color, axis=2), smooth)
        nearest[distance < best] = label
        best = np.minimum(best, distance)
    return nearest


def depth_to_rgb(depth: np.ndarray, far: float) -> np.ndarray:
    """Return the image of depths [H, W], uint8 [H, W, 3]. far: the depth that is white; what is farther is white, too."""
    gray = np.round(np.clip(np.asarray(depth, np.float64) / far, 0, 1) * 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def rgb_to_depth(pixels: np.ndarray, far: float) -> np.ndarray:
    """Return the depths of a image [H, W, 3] in [0, 255], float32 [H, W]. Inverse of `depth_to_rgb`, within far / 510."""
    return (np.asarray(pixels, np.float32).mean(axis=2) / 255 * far).astype(np.float32)


def read_map(name: str, content: bytes | Image.Image | np.ndarray, kind: str, far: float = 0.0) -> Image.Image:
    """Return a map as an RGB image.

    Args:
        name: of its file, for messages.
        content: the bytes of an image file (labels: a palette's, gray ones, or the colors of `label_colors`; depth: 8 or 16 bits) or of
            a NumPy file (`.npy`), an image, or an array [H, W].
        kind: one of `MAPS`.
        far: the depth that is white, in the file's unit; 0: 65,535 for 16 bits, 255 for 8 bits, 1 for fractions.

    Errors: `UserError` for content that is no such map.
    """
    values = _values(name, content, kind)
    try:
        if not values.size or values.dtype.kind not in "buif":
            raise UserError(f"a map of {values.dtype} of shape {values.shape}; it holds numbers")
        if kind == "labels":
            return Image.fromarray(_label_image(values))
        if kind == "depth":
            if values.ndim != 2:
                raise UserError(f"depth of shape {values.shape}: it is one number per pixel, 8 or 16 bits or fractions")
            if not np.isfinite(values).all() or values.min() < 0:
                raise UserError("depth that is negative or not a finite number")
            return Image.fromarray(depth_to_rgb(values, far or _largest(values)))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    values = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
    if values.dtype != np.uint8 or values.shape[2] != 3:
        raise UserError(f"{name}: {kind} as {values.dtype} of shape {values.shape}; give an image of 8 bits per channel")
    return Image.fromarray(values)


def map_values(name: str, content: bytes, kind: Literal["labels", "depth"], far: float = 0.0) -> np.ndarray:
    """Return a map as numbers [H, W]: labels, or depths in fractions of `far`. Arguments and errors as for `read_map`."""
    read_map(name, content, kind, far)  # raises what is wrong
    values = _values(name, content, kind)
    if kind == "depth":
        return np.minimum(values.astype(np.float32) / (far or _largest(values)), 1)
    if values.ndim == 2:
        return values.astype(np.uint8)
    colors = label_colors().astype(np.int64) @ [1 << 16, 1 << 8, 1]
    order = np.argsort(colors)
    return order[np.searchsorted(colors[order], values[..., :3].astype(np.int64) @ [1 << 16, 1 << 8, 1])].astype(np.uint8)


def _largest(depth: np.ndarray) -> float:
    """The depth that is white where none is given."""
    return 255.0 if depth.dtype == np.uint8 else 65535.0 if depth.dtype.kind in "iu" else 1.0


def _values(name: str, content: bytes | Image.Image | np.ndarray, kind: str) -> np.ndarray:
    """The numbers of a map, [H, W] or [H, W, 3]: of labels those of a palette, of other maps its colors."""
    if isinstance(content, np.ndarray):
        return content
    try:
        if isinstance(content, bytes):
            if content.startswith(b"\x93NUMPY"):
                return np.load(io.BytesIO(content), allow_pickle=False)
            content = Image.open(io.BytesIO(content))
        if content.mode in ("RGBA", "LA", "CMYK", "YCbCr", "LAB", "HSV"):
            content = content.convert("RGB")
        if content.mode == "P" and kind != "labels":
            content = content.convert("L" if kind == "depth" else "RGB")
        return np.asarray(content.convert("L") if content.mode == "1" else content)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable map ({first_line(error)}); replace it or leave it out") from None


def _label_image(values: np.ndarray) -> np.ndarray:
    if values.ndim == 2:
        return labels_to_rgb(values)
    colors = label_colors().astype(np.int64) @ [1 << 16, 1 << 8, 1]
    given = values[..., :3].astype(np.int64) @ [1 << 16, 1 << 8, 1]
    wrong = np.argwhere(~np.isin(given, colors))
    if len(wrong):
        y, x = wrong[0].tolist()
        raise UserError(
            f"the color {values[y, x].tolist()} at {x}, {y} is no label's: labels are numbers, a palette's, or Pascal VOC's colors"
        )
    return values[..., :3].astype(np.uint8)


def save_map(
    path: Path, pixels: np.ndarray, kind: str, labels: Sequence[int] = (), far: float = 65535.0, smooth: float = 0.0
) -> None:
    """Write the map that an image [H, W, 3] in [0, 255] shows: labels as a PNG with a palette, depth as a PNG of 16 bits, others as RGB.
    smooth: of labels, as in `rgb_to_labels`."""
    if kind == "labels":
        image = Image.fromarray(rgb_to_labels(pixels, labels, smooth), "P")
        image.putpalette(label_colors().reshape(-1).tolist())
    elif kind == "depth":
        image = Image.fromarray(np.round(rgb_to_depth(pixels, far)).clip(0, 65535).astype(np.uint16))
    else:
        image = Image.fromarray(np.round(pixels).clip(0, 255).astype(np.uint8))
    image.save(path)
