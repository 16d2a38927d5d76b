"""What callers hand to tokenizers: made right where it has one meaning, else one line that names the argument.

Each check looks at all values once (the least and the greatest), which costs nothing beside the networks.
"""

import math
import warnings
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unitok.errors import UserError
from unitok.media import tensor_to_image

#: Integers that hold samples -> the largest (8 bits have no sign in WAV files).
_FULL_SCALE = {torch.uint8: 128.0, torch.int8: 128.0, torch.int16: 32768.0, torch.int32: 2147483648.0}
#: Largest sample of a waveform: lossy codecs go a little over 1, which is clipped as in files; what is beyond has another scale.
LOUDEST = 1.5
#: Largest sample that goes to the networks: resampling a signal that is clipped throughout swings out so far.
LOUDEST_RESAMPLED = 4.0
MOST_CHANNELS = 8  # of an array that stands the other way round


def as_tensor(name: str, given: Any, wanted: str) -> Tensor:
    """A tensor of an array's numbers; errors: `UserError` with `name`, and `wanted` to say what it takes."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, np.ndarray) and given.dtype.kind in "iufb" and given.dtype.itemsize <= 8:
        return torch.from_numpy(np.array(given, given.dtype.newbyteorder("=")))
    what = f"an array of {given.dtype}" if isinstance(given, np.ndarray) else f"a {type(given).__name__}"
    raise UserError(f"{name}: {what}; give a tensor or NumPy array, {wanted}")


def check_images(images: Any, weights: torch.dtype) -> Tensor:
    """-> float32 [B, 3, H, W] in [-1, 1]; uint8 in [0, 255] is scaled. weights: the model's dtype."""
    wanted = "float [B, 3, H, W] in [-1, 1] (prepare(image)[None] makes it of a PIL image, encode_file reads a file)"
    images = as_tensor("images", images, wanted)
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise UserError(f"images are [B, 3, H, W], got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        images = images.float().div_(127.5).sub_(1)
    images = _as_float("images", images, wanted, weights)
    check_range(images, 1.001, "images are in [-1, 1]")
    return images


def image_from_array(given: object, name: str) -> Image.Image:
    """Convert an array to an image: uint8 [H, W], [H, W, 1], [H, W, 3], [H, W, 4] or [3, H, W], or float [3, H, W] in [-1, 1]."""
    wanted = "an image is uint8 [H, W, 3] or float [3, H, W] in [-1, 1], audio is (array [C, T], Hz)"
    pixels = as_tensor(name, given, wanted)
    shape, channels_first = tuple(pixels.shape), pixels.ndim == 3 and pixels.shape[0] == 3
    if pixels.dtype == torch.uint8 and pixels.numel() and (pixels.ndim == 2 or shape[2:] in ((1,), (3,), (4,))):
        array = pixels.cpu().numpy()
        return Image.fromarray(array[..., 0] if shape[2:] == (1,) else array)
    if pixels.dtype == torch.uint8 and pixels.numel() and channels_first:
        return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))
    if not (pixels.dtype.is_floating_point and pixels.numel() and channels_first):
        raise UserError(f"{name}: an array of {str(pixels.dtype).removeprefix('torch.')} {list(shape)}; {wanted}")
    check_range(pixels, 1.001, f"{name}: a float image is in [-1, 1]")
    if pixels.min() >= 0:
        warnings.warn(
            f"{name}: no value of the array is below 0; a float image is in [-1, 1], of [0, 1] give 2 * x - 1", stacklevel=2
        )
    return tensor_to_image(pixels)


def check_samples(samples: Any, channels: int, weights: torch.dtype, empty: bool = False) -> Tensor:
    """-> float32 [B, channels, T] in [-1, 1]; integers are scaled by their range. empty: whether T may be 0."""
    wanted = f"float [B, {channels}, T] in [-1, 1] (prepare(waveform, rate)[None] makes it, encode_file reads a file)"
    samples = as_tensor("sounds", samples, wanted)
    if samples.ndim != 3 or samples.shape[1] != channels or not (samples.numel() or empty):
        raise UserError(f"sounds are [B, {channels}, T], got {tuple(samples.shape)}")
    samples = _as_float("sounds", _scaled("sounds", samples), wanted, weights)
    if samples.numel():
        check_range(samples, LOUDEST_RESAMPLED, "sounds are in [-1, 1]")
    return samples


def check_codes(codes: Any, shape: str, size: int, empty: bool = False) -> Tensor:
    """-> int64 codes in [0, size) of a shape such as `[B, h, w]`. empty: whether there may be none."""
    codes = as_tensor("codes", codes, f"int64 {shape}")
    if codes.ndim != shape.count(",") + 1 or not (codes.numel() or empty):
        raise UserError(f"codes are {shape}, got {tuple(codes.shape)}")
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise UserError(f"codes are integers, int64 {shape}, got {str(codes.dtype).removeprefix('torch.')}")
    codes = codes.long()
    if codes.numel():
        low, high = (int(x) for x in codes.aminmax())
        if low < 0 or high >= size:
            raise UserError(f"codes are in [0, {size}), got {low if low < 0 else high}")
    return codes


def check_text(text: Any) -> str:
    """-> str that can be written as UTF-8."""
    if not isinstance(text, str):
        raise UserError(f"text: a {type(text).__name__}; give one str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"text: not UTF-8 (half of a surrogate pair at character {error.start}); mend it") from None
    return text


def check_text_codes(codes: Any, size: int) -> list[int]:
    """-> list of codes in [0, size)."""
    if isinstance(codes, list | tuple):
        try:
            codes = np.asarray(codes, np.int64 if not codes else None)
        except (ValueError, OverflowError):
            raise UserError("codes are one list of integers") from None
    return check_codes(codes, "[N]", size, empty=True).tolist()


def check_waveform(samples: Any, rate: Any, name: str) -> tuple[Tensor, int]:
    """A waveform as other programs give it -> float32 [C, T] in [-1, 1] and its rate in Hz; errors: `UserError` with `name`.

    [T] is mono; [T, C] of few channels, as soundfile gives it, is turned; integers are scaled by their range; samples and
    rate may change places.
    """
    if _is_number(samples) and not _is_number(rate):
        samples, rate = rate, samples
    if not _is_number(rate) or not 1 <= float(rate) < math.inf:
        told = f"{float(rate):g}" if _is_number(rate) else f"a {type(rate).__name__}"
        raise UserError(f"{name}: its rate is {told}; give (waveform [C, T], Hz)")
    if isinstance(samples, list):
        try:
            samples = np.asarray(samples)
        except ValueError:  # of rows that are not equally long
            raise UserError(f"{name}: a list of unequal rows; give (waveform [C, T], Hz)") from None
    samples = as_tensor(name, samples, "(waveform [C, T], Hz)").detach().cpu()
    if samples.ndim == 1:
        samples = samples[None]
    if samples.ndim == 2 and samples.shape[1] <= MOST_CHANNELS < samples.shape[0]:
        samples = samples.T
    if samples.ndim != 2 or samples.shape[0] > max(2, samples.shape[1]):
        raise UserError(f"{name}: a waveform is [C, T], channels first, got {tuple(samples.shape)}")
    if not samples.numel():
        raise UserError(f"{name}: zero length, {tuple(samples.shape)}; replace it or leave it out")
    samples = _as_float(name, _scaled(name, samples), "float [C, T] in [-1, 1]", torch.float32)
    check_range(samples, LOUDEST, f"{name}: samples are in [-1, 1]")
    return samples.clamp(-1, 1), round(float(rate))


def _is_number(value: Any) -> bool:
    return (isinstance(value, Real) and not isinstance(value, bool)) or (
        isinstance(value, Tensor | np.ndarray) and value.ndim == 0 and value.dtype not in (torch.bool, bool)
    )


def _scaled(name: str, samples: Tensor) -> Tensor:
    """Integer samples as floats in [-1, 1]."""
    if samples.dtype in _FULL_SCALE:
        offset = 128.0 if samples.dtype == torch.uint8 else 0.0
        return ((samples.double() - offset) / _FULL_SCALE[samples.dtype]).float()
    return samples


def _as_float(name: str, values: Tensor, wanted: str, weights: torch.dtype) -> Tensor:
    """Any floats as float32, which is what codes are defined by."""
    if weights != torch.float32:
        dtype = str(weights).removeprefix("torch.")
        raise UserError(f"the tokenizer's weights are {dtype}: its codes are those of float32; call .float()")
    if not values.dtype.is_floating_point:
        raise UserError(f"{name}: {str(values.dtype).removeprefix('torch.')}; give {wanted}")
    return values.float()


def check_range(values: Tensor, most: float, expected: str) -> None:
    """Raise `UserError` that begins with what is expected, where a value is not finite or its size is over `most`."""
    low, high = (float(x) for x in values.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{expected}, got values that are not finite numbers")
    if low < -most or high > most:
        raise UserError(f"{expected}, got up to {low if -low > high else high:g}")
