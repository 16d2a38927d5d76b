"""Files <-> tensors: read and write images, audio and text of any common format; a bad file is an error of one line.

Images are float [3, H, W] in [-1, 1], sRGB, upright; audio is float [C, T] in [-1, 1] with a sample rate in Hz; text is str.
`formats` detects what a file is; `image_files` and `audio_files` open it. Import from here.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import soundfile
import soxr
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unitok.errors import UserError
from unitok.media.audio_files import AudioFile
from unitok.media.formats import find_media, promised, sniff, sniff_bytes, unread
from unitok.media.image_files import open_image, to_rgb, upright
from unitok.media.packed_audio import open_audio
from unitok.media.video_files import VideoFile, can_write_video, encode_gif, open_video, sample_frames, write_video

__all__ = [
    "AudioFile",
    "VideoFile",
    "can_write_video",
    "encode_gif",
    "find_media",
    "open_audio",
    "open_image",
    "open_video",
    "promised",
    "sample_frames",
    "sniff",
    "sniff_bytes",
    "to_rgb",
    "unread",
    "upright",
    "write_video",
]

#: Most samples that are decoded at once: 2 GB.
MAX_SAMPLES = 500_000_000


# ---- Images ---------------------------------------------------------------------------------------------------------


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert an image of any mode to float [3, H, W] in [-1, 1]."""
    array = np.asarray(to_rgb(image) if image.mode != "RGB" else image)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)


def tensor_to_image(pixels: Tensor) -> Image.Image:
    """Convert float [3, H, W] in [-1, 1] to an RGB image, rounded to 256 levels. Inverse of `image_to_tensor`."""
    array = pixels.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def load_image(path: Path) -> Tensor:
    """Read an image file as float [3, H, W] in [-1, 1]. Errors: `UserError` as for `open_image`."""
    return image_to_tensor(open_image(path))


def save_image(file: Path | IO[bytes], pixels: Tensor | np.ndarray) -> None:
    """Write float [3, H, W] in [-1, 1], or uint8 [H, W, 3], as PNG. Inverse of `load_image`."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else tensor_to_image(pixels)
    image.save(file, format="PNG", compress_level=4)


def encode_png(pixels: Tensor) -> bytes:
    """Return the bytes of the PNG file that `save_image` writes."""
    buffer = io.BytesIO()
    save_image(buffer, pixels)
    return buffer.getvalue()


def fit_image(image: Image.Image, area: int, longest: int) -> Image.Image:
    """Shrink an image, with its aspect ratio, to at most `area` pixels and `longest` pixels per side. It is never enlarged."""
    scale = min(1.0, (area / (image.width * image.height)) ** 0.5, longest / max(image.size))
    if scale == 1.0:
        return image
    width, height = (max(1, min(longest, round(side * scale))) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def crop_square(image: Image.Image, side: int) -> Image.Image:
    """Return the center square of an image, scaled to `side` pixels per side."""
    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def stretch_image(image: Image.Image, side: int) -> Image.Image:
    """Scale an image to a square of `side` pixels per side, whatever its aspect ratio."""
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)


# ---- Audio ----------------------------------------------------------------------------------------------------------


def read_samples(file: AudioFile, frames: int = -1, start: int | None = None) -> Tensor:
    """Read the next `frames` samples of an open file (default: all), or those from `start` on, float [C, t]. Errors:
    `UserError` as for `AudioFile.read`."""
    if start is not None:
        file.seek(start)
    return torch.from_numpy(np.ascontiguousarray(file.read(frames).T))


def load_audio(path: Path) -> tuple[Tensor, int]:
    """Read an audio file as float [C, T] in [-1, 1], and its sample rate in Hz. Errors: `UserError` as for `open_audio`, and
    for samples that are not finite."""
    with open_audio(path) as file:
        return read_clip(file, str(path)), file.samplerate


def read_clip(file: AudioFile, name: str, clip: tuple[float, float] | None = None) -> Tensor:
    """Read all samples of an open file, or those of `clip`, (start, stop) in seconds, float [C, T]. name: for messages. Errors:
    `UserError` as for `load_audio`."""
    start, stop = (0, file.frames) if clip is None else (round(seconds * file.samplerate) for seconds in clip)
    if (stop - start) * file.channels > MAX_SAMPLES:
        raise UserError(f"{name}: {stop - start} samples of {file.channels} channels are too many to read at once")
    file.name = name
    samples = read_samples(file, stop - start, start)
    if not samples.shape[-1]:
        raise UserError(f"{name}: audio of zero length; replace it or leave it out")
    return samples


def read_audio_blocks(path: Path, to_rate: int, channels: int, seconds: float, data: bytes | None = None) -> Iterator[Tensor]:
    """Yield an audio file in blocks of about `seconds`, [channels, t] at `to_rate` Hz; together they are the result of
    `load_audio` and `convert_audio`.

    Memory does not grow with the file. data: bytes of the file; `path` is then only its name. Errors: `UserError` as for
    `load_audio`.
    """
    with open_audio(path, data) as file:
        rate, step = file.samplerate, max(1, round(seconds * file.samplerate))
        resampler = soxr.ResampleStream(rate, to_rate, channels, dtype="float32") if rate != to_rate else None
        left = max(1, round(file.frames * to_rate / rate))
        for start in range(0, file.frames, step):
            block = mix_channels(read_samples(file, step), channels)
            if resampler is not None:
                last = start + step >= file.frames
                block = torch.from_numpy(resampler.resample_chunk(block.T.contiguous().numpy(), last=last).T.copy())
                block = torch.nn.functional.pad(block, (0, left - block.shape[-1])) if last else block  # also cuts
            left -= block.shape[-1]
            if block.shape[-1]:
                yield block.contiguous()


def peak(samples: Tensor) -> float:
    """Return the largest magnitude of samples of any shape."""
    low, high = samples.aminmax()
    return max(-float(low), float(high))


def mix_channels(samples: Tensor, channels: int) -> Tensor:
    """Mix audio [C, T] to [channels, T]: to mono by the mean, from mono by repetition; an equal number stays as it is."""
    if samples.shape[0] == channels:
        return samples
    return samples.mean(0, keepdim=True).expand(channels, -1)


def convert_audio(samples: Tensor, rate: int, to_rate: int, channels: int) -> Tensor:
    """Resample and mix audio: [C, T] at `rate` Hz -> [channels, T'] at `to_rate` Hz. Channels as for `mix_channels`."""
    samples = mix_channels(samples, channels)
    if rate != to_rate and samples.shape[-1]:
        length = max(1, round(samples.shape[-1] * to_rate / rate))
        resampled = torch.from_numpy(soxr.resample(samples.T.numpy(), rate, to_rate).T.copy())
        samples = torch.nn.functional.pad(resampled, (0, length - resampled.shape[-1]))  # also cuts
    return samples.contiguous()


def save_audio(file: Path | IO[bytes], samples: Tensor | np.ndarray, rate: int) -> None:
    """Write float [C, T] at `rate` Hz as 16-bit WAV, clipped to [-1, 1]. Inverse of `load_audio`."""
    array = samples.detach().float().cpu().numpy() if isinstance(samples, Tensor) else samples
    soundfile.write(file, np.clip(array.T, -1, 1), rate, subtype="PCM_16", format="WAV")


def encode_wav(samples: Tensor, rate: int) -> bytes:
    """Return the bytes of the WAV file that `save_audio` writes."""
    buffer = io.BytesIO()
    save_audio(buffer, samples, rate)
    return buffer.getvalue()


def write_audio_blocks(path: Path, blocks: Iterable[Tensor], rate: int, channels: int, length: int | None = None) -> None:
    """Write consecutive blocks [channels, t] as one 16-bit WAV of at most `length` samples, clipped to [-1, 1]."""
    with soundfile.SoundFile(path, "w", rate, channels, subtype="PCM_16", format="WAV") as file:
        for block in blocks:
            block = block if length is None else block[:, : max(0, length - file.frames)]
            file.write(np.clip(block.detach().float().cpu().numpy().T, -1, 1))


def audio_seconds(path: Path, data: bytes | None = None) -> float:
    """Return the length of an audio file in seconds. data: bytes of the file; `path` is then only its name. Errors: `UserError`
    as for `open_audio`."""
    with open_audio(path, data) as file:
        return file.frames / file.samplerate


def draw_spectrogram(samples: Tensor, rate: int, height: int = 96) -> Tensor:
    """Draw a spectrogram of audio [C, T] at `rate` Hz: an image [3, height, W] in [-1, 1] of 125 columns per second, low
    frequencies at the bottom, with a range of 80 dB from black to white."""
    window, hop = 4 * height, max(1, round(rate / 125))
    mono = samples.detach().float().cpu().mean(0)
    mono = torch.nn.functional.pad(mono, (0, max(0, window - mono.shape[-1])))
    spectrum = torch.stft(mono, window, hop, window=torch.hann_window(window), return_complex=True).abs()[1:]
    bands = spectrum.reshape(height, -1, spectrum.shape[-1]).mean(1)
    decibels = 20 * (bands / (window / 4)).clamp_min(1e-6).log10()  # 0 dB: a sine of amplitude 1
    shade = ((decibels + 80) / 80).clamp(0, 1).flip(0)
    colors = torch.stack([shade * 2, shade * 2 - 0.6, 1.4 * shade * (1 - shade) + shade**3]).clamp(0, 1)
    return colors * 2 - 1


# ---- Text -----------------------------------------------------------------------------------------------------------


def load_text(path: Path) -> str:
    """Read a UTF-8 file, without its byte order mark. Errors: `UserError` for a missing file, another encoding, and a file
    without text."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it, for example with iconv") from None
    if not text.strip():
        raise UserError(f"{path}: no text in it; fill it or leave it out")
    return text


def save_text(path: Path, text: str) -> None:
    """Write a text as UTF-8. Inverse of `load_text`."""
    Path(path).write_bytes(text.encode("utf-8"))
