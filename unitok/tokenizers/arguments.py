"""Checks of the arguments of tokenizers: unambiguous values are converted, all others are refused in one line that names the
argument.

Each check looks at all values once (minimum and maximum), which costs little compared with the networks.
"""

import math
import warnings
from numbers import Real
from typing import SupportsFloat, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unitok.errors import UserError, type_of
from unitok.media import tensor_to_image
from unitok.media.audio_files import RATES

#: Integer types of samples -> the value that stands for 1.0 (8-bit samples in WAV files are unsigned).
_FULL_SCALE = {torch.uint8: 128.0, torch.int8: 128.0, torch.int16: 32768.0, torch.int32: 2147483648.0}
#: Largest sample of a waveform. Lossy codecs exceed 1 a little, which is clipped; larger values mean that the scale is another
#: one.
LOUDEST = 1.5
#: Largest sample that the networks take: resampling overshoots by up to this much where a signal is clipped throughout.
LOUDEST_RESAMPLED = 4.0
MOST_CHANNELS = 8  # of an array [T, C] that is transposed


def as_tensor(name: str, value: object, expected: str) -> Tensor:
    """Return a tensor as it is, and a NumPy array as a tensor. name, expected: for the message of the `UserError` for anything
    else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "iufb" and value.dtype.itemsize <= 8:
        return torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type_of(value)
    raise UserError(f"{name}: {what}; give a tensor or NumPy array, {expected}")


def check_images(images: object, weights: torch.dtype) -> Tensor:
    """Return images as float32 [B, 3, H, W] in [-1, 1]. Tensors and arrays of floats in [-1, 1] or uint8 in [0, 255] are taken.

    weights: the model's dtype. Errors: `UserError` for another type, shape or range, and for weights that are not float32.
    """
    expected = "float [B, 3, H, W] in [-1, 1] (prepare(image)[None] makes it from a PIL image, encode_file reads a file)"
    images = as_tensor("images", images, expected)
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise UserError(f"images are [B, 3, H, W], got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        images = images.float().div_(127.5).sub_(1)
    images = _as_float("images", images, expected, weights)
    check_range(images, 1.001, "images are in [-1, 1]")
    return images


def image_from_array(value: object, name: str) -> Image.Image:
    """Convert an array to an image: uint8 [H, W], [H, W, 1], [H, W, 3], [H, W, 4] or [3, H, W], or float [3, H, W] in [-1, 1]."""
    expected = "an image is uint8 [H, W, 3] or float [3, H, W] in [-1, 1], audio is (array [C, T], Hz)"
    pixels = as_tensor(name, value, expected)
    shape, channels_first = tuple(pixels.shape), pixels.ndim == 3 and pixels.shape[0] == 3
    if pixels.dtype == torch.uint8 and pixels.numel() and (pixels.ndim == 2 or shape[2:] in ((1,), (3,), (4,))):
        array = pixels.cpu().numpy()
        return Image.fromarray(array[..., 0] if shape[2:] == (1,) else array)
    if pixels.dtype == torch.uint8 and pixels.numel() and channels_first:
        return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))
    if not (pixels.dtype.is_floating_point and pixels.numel() and channels_first):
        raise UserError(f"{name}: an array of {str(pixels.dtype).removeprefix('torch.')} {list(shape)}; {expected}")
    check_range(pixels, 1.001, f"{name}: a float image is in [-1, 1]")
    if pixels.min() >= 0:
        warnings.warn(
            f"{name}: no value of the array is below 0; a float image is in [-1, 1], of [0, 1] give 2 * x - 1", stacklevel=2
        )
    return tensor_to_image(pixels)


def check_samples(samples: object, channels: int, weights: torch.dtype, empty: bool = False) -> Tensor:
    """Return audio as float32 [B, channels, T] in [-1, 1]. Tensors and arrays of floats in [-1, 1] or of integers, which are
    divided by the range of their type, are taken.

    weights: the model's dtype. empty: whether T may be 0. Errors: `UserError` as for `check_images`.
    """
    expected = f"float [B, {channels}, T] in [-1, 1] (prepare(waveform, rate)[None] makes it, encode_file reads a file)"
    samples = as_tensor("samples", samples, expected)
    if samples.ndim != 3 or samples.shape[1] != channels or not (samples.numel() or empty):
        raise UserError(f"samples are [B, {channels}, T], got {tuple(samples.shape)}")
    samples = _as_float("samples", _scaled(samples), expected, weights)
    if samples.numel():
        check_range(samples, LOUDEST_RESAMPLED, "samples are in [-1, 1]")
    return samples


def check_codes(codes: object, shape: str, size: int, empty: bool = False) -> Tensor:
    """Return codes as int64 in [0, size). shape: such as `[B, h, w]`, of which the number of dimensions is checked. empty:
    whether there may be no codes. Errors: `UserError` for another type, shape or range."""
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


def check_text(text: object) -> str:
    """Return a str that can be written as UTF-8. Errors: `UserError` for any other object."""
    if not isinstance(text, str):
        raise UserError(f"text: {type_of(text)}; give one str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"text: not UTF-8 (half of a surrogate pair at character {error.start}); mend it") from None
    return text


def check_text_codes(codes: object, size: int) -> list[int]:
    """Return codes in [0, size) as a list. Lists, tuples, arrays and tensors are taken. Errors: `UserError` as for
    `check_codes`."""
    if isinstance(codes, list | tuple):
        try:
            codes = np.asarray(codes, np.int64 if not codes else None)
        except (ValueError, OverflowError):
            raise UserError("codes are one list of integers") from None
    return check_codes(codes, "[N]", size, empty=True).tolist()


def check_waveform(samples: object, rate: object, name: str) -> tuple[Tensor, int]:
    """Return a waveform of any program as float32 [C, T] in [-1, 1], and its sample rate in Hz.

    [T] is mono. [T, C] of few channels, as soundfile returns it, is transposed. Integers are divided by the range of their
    type. Samples and rate may be given in either order. Errors: `UserError` that begins with `name`.
    """
    if _is_number(samples) and not _is_number(rate):
        samples, rate = rate, samples
    if not _is_number(rate) or not RATES[0] <= float(rate) <= RATES[1]:
        shown = f"{float(rate):g}" if _is_number(rate) else type_of(rate)
        raise UserError(
            f"{name}: its rate is {shown}; give (waveform [C, T], rate), with a rate from {RATES[0]} to {RATES[1]:,} Hz"
        )
    if isinstance(samples, list):
        try:
            samples = np.asarray(samples)
        except ValueError:  # rows of unequal length
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
    waveform = _as_float(name, _scaled(samples), "float [C, T] in [-1, 1]", torch.float32)
    check_range(waveform, LOUDEST, f"{name}: samples are in [-1, 1]")
    return waveform.clamp(-1, 1), round(float(rate))


def _is_number(value: object) -> TypeGuard[SupportsFloat]:
    return (isinstance(value, Real) and not isinstance(value, bool)) or (
        isinstance(value, Tensor | np.ndarray) and value.ndim == 0 and value.dtype not in (torch.bool, bool)
    )


def _scaled(samples: Tensor) -> Tensor:
    """Integer samples as floats in [-1, 1]; all others as they are."""
    if samples.dtype in _FULL_SCALE:
        offset = 128.0 if samples.dtype == torch.uint8 else 0.0
        return ((samples.double() - offset) / _FULL_SCALE[samples.dtype]).float()
    return samples


def _as_float(name: str, values: Tensor, expected: str, weights: torch.dtype) -> Tensor:
    """Floats of any size as float32, in which codes are defined."""
    if weights != torch.float32:
        dtype = str(weights).removeprefix("torch.")
        raise UserError(f"the tokenizer's weights are {dtype}, but its codes are defined in float32; call .float()")
    if not values.dtype.is_floating_point:
        raise UserError(f"{name}: {str(values.dtype).removeprefix('torch.')}; give {expected}")
    return values.float()


def check_range(values: Tensor, most: float, expected: str) -> None:
    """Raise `UserError`, which begins with `expected`, if a value is not finite or its magnitude exceeds `most`."""
    low, high = (float(x) for x in values.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{expected}, got values that are not finite numbers")
    if low < -most or high > most:
        raise UserError(f"{expected}, got up to {low if -low > high else high:g}")
