"""Files <-> tensors: any image, any sound, any text, and one clear line for a file that is not what it should be.

Content decides what a file is, not its suffix. Images come out as float [3, H, W] in [-1, 1], sRGB, upright; sounds as
float [C, T] in [-1, 1] with their rate in Hz; text as str. Pillow and soundfile do the reading; what is ours is the care
around them: EXIF rotation, transparency over white, 16-bit and CMYK, truncated and empty files.

Imports nothing of ours but the error; anyone may import this.
"""

import io
import os
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unitok.errors import UserError, first_line

#: Larger pictures are refused before they are decompressed (a 20 kB PNG can hold gigabytes).
MAX_PIXELS = 200_000_000

#: Samples of a sound that are decoded at once, at most: 2 GB.
MAX_SAMPLES = 500_000_000
#: Bytes by which a sound's header may be wrong: some programs count themselves, or the padding.
_HEADER = 64
#: Longest sound, hours.
MAX_HOURS = 12

#: Formats that Pillow opens by running another program, or that are not pictures.
_REFUSED_FORMATS = {"EPS", "PDF", "WMF", "FPX", "MIC", "MPEG", "HDF5", "GRIB", "BUFR"}

_AUDIO_MAGIC = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"RF64", b"caff")
_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"P5", b"P6", b"\x00\x00\x01\x00")


def sniff(path: Path) -> str | None:
    """`"image"`, `"audio"`, `"text"` or None for what a file's first bytes say it is; errors: a file that cannot be read."""
    with open(path, "rb") as file:
        return sniff_bytes(file.read(4096))


def sniff_bytes(head: bytes) -> str | None:
    """What a file is, as `sniff`, from its first 4096 bytes."""
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image"
    if head.startswith(_AUDIO_MAGIC) or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):  # MPEG layer 3
        return "audio"
    if head.startswith(_IMAGE_MAGIC) or head[4:12] in (b"ftypavif", b"ftypheic"):
        return "image"
    if not head or b"\x00" in head:
        return None
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not merely a character cut off at the end of what was read
            return None
    return "text"


#: Suffixes of files that hold something else than text.
_PROMISES = {
    "a picture": "jpg jpeg jpe jfif png gif webp bmp tif tiff heic heif avif ico svg",
    "a sound": "wav flac ogg oga opus mp3 m4a aac aif aiff au caf",
    "a video": "mp4 m4v mkv mov avi webm mpg mpeg",
    "an archive or a table": "tar tgz zip gz bz2 xz zst 7z rar parquet arrow",
    "a document": "pdf doc docx ppt pptx xls xlsx epub",
}
_PROMISED = {suffix: what for what, suffixes in _PROMISES.items() for suffix in suffixes.split()}


def promised(name: str) -> str:
    """What a file's name says that is in it, where that is not text: `a picture`, `a sound`; or ""."""
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return _PROMISED.get(suffix.lower(), "") if dot else ""


def find_media(folder: Path, kind: str) -> tuple[list[Path], list[Path]]:
    """The files of one kind under a folder, sorted; and those that are empty, of which nothing says what they were to be."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.startswith(".")]
    return [f for f in files if sniff(f) == kind], [f for f in files if f.stat().st_size == 0]


# ---- Images ---------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, upright: EXIF rotation applied, transparency over white, 16-bit and float scaled to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, np.float32)
        top = 65535.0 if image.mode != "F" or values.max(initial=0) > 255 else (255.0 if values.max(initial=0) > 1 else 1.0)
        image = Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@cache
def _formats() -> list[str]:
    """What Pillow may take a file for: it tries one after the other, so the usual ones come first."""
    Image.init()
    usual = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF") if name in Image.ID]
    return [*usual, *(name for name in Image.ID if name not in _REFUSED_FORMATS.union(usual))]


def open_image(path: Path, data: bytes | None = None) -> Image.Image:
    """A file as an upright RGB picture; errors: `UserError` naming the file and what is wrong with it.

    data: its bytes, where they are at hand already.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on odd metadata and sizes: the checks here decide
            with Image.open(path if data is None else io.BytesIO(data), formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{path}: {image.width} x {image.height} pixels are too many (limit {MAX_PIXELS})")
                image.load()
                rgb = to_rgb(image)
                rgb.format = image.format  # which is lost on the way
                return rgb
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for bad files
        why = "damaged, or of an unknown format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(f"{path}: not a readable image ({why}); replace it or leave it out") from None


def image_to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> float [3, H, W] in [-1, 1]."""
    array = np.asarray(to_rgb(image) if image.mode != "RGB" else image)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)


def tensor_to_image(pixels: Tensor) -> Image.Image:
    """float [3, H, W] in [-1, 1] -> RGB picture. Inverse of `image_to_tensor`, to the nearest of 256 levels."""
    array = pixels.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def load_image(path: Path) -> Tensor:
    """float [3, H, W] in [-1, 1]."""
    return image_to_tensor(open_image(path))


def save_image(path: Path, pixels: Tensor | np.ndarray) -> None:
    """Write float [3, H, W] in [-1, 1], or uint8 [H, W, 3], as PNG. Inverse of `load_image`."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else tensor_to_image(pixels)
    image.save(path, format="PNG", compress_level=4)


def fit_image(image: Image.Image, area: int, longest: int) -> Image.Image:
    """Shrink a picture, keeping its aspect, until it has at most `area` pixels and no side over `longest`; never enlarge."""
    scale = min(1.0, (area / (image.width * image.height)) ** 0.5, longest / max(image.size))
    if scale == 1.0:
        return image
    width, height = (max(1, min(longest, round(side * scale))) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def crop_square(image: Image.Image, side: int) -> Image.Image:
    """The centre of a picture, scaled so that its shorter side is `side` pixels."""
    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def stretch_image(image: Image.Image, side: int) -> Image.Image:
    """The whole picture as a square of `side` pixels, whatever its aspect."""
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)


# ---- Sounds ---------------------------------------------------------------------------------------------------------


def open_audio(path: Path, data: bytes | None = None) -> soundfile.SoundFile:
    """A sound file (or its bytes), open to be read in pieces; errors: `UserError` for no file, no sound, no samples."""
    try:
        file = soundfile.SoundFile(path if data is None else io.BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        if isinstance(path, str | Path) and data is None and not Path(path).exists():
            raise UserError(f"{path}: no such file") from None
        raise UserError(f"{path}: not a readable sound ({first_line(error)}); replace it or leave it out") from None
    if file.frames == 0:
        file.close()
        raise UserError(f"{path}: a sound of zero length; replace it or leave it out")
    if file.frames > MAX_HOURS * 3600 * file.samplerate:
        file.close()
        raise UserError(f"{path}: a sound of more than {MAX_HOURS} hours; cut it")
    if missing := _cut_off(path, data):
        file.close()
        raise UserError(f"{path}: a sound that is cut off: {missing} bytes of it are missing; replace it or leave it out")
    return file


def _cut_off(path: Path, data: bytes | None) -> int:
    """Bytes that a WAV or AIFF file lacks of what its header promises: libsndfile reads the rest without a word."""
    if data is None:
        with open(path, "rb") as file:
            head, there = file.read(8), os.fstat(file.fileno()).st_size
    else:
        head, there = data[:8], len(data)
    if head[:4] not in (b"RIFF", b"FORM"):
        return 0
    size = int.from_bytes(head[4:], "little" if head[:4] == b"RIFF" else "big")
    if size >= 0x7FFFF000:  # of a stream: unknown when the header was written
        return 0
    missing = size + 8 - there
    return missing if missing > _HEADER else 0


def read_samples(file: soundfile.SoundFile, frames: int = -1, start: int | None = None, name: str = "") -> Tensor:
    """The next samples of an open file, or those from `start` on, float [C, t]; errors: `UserError` for damaged or not
    finite samples. name: what the file is called in them."""
    try:
        if start is not None:
            file.seek(start)
        samples = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UserError(f"{name or file.name}: damaged sound ({first_line(error)}); replace it or leave it out") from None
    if not np.isfinite(samples).all():
        raise UserError(f"{name or file.name}: samples that are not finite numbers; replace it or leave it out")
    return torch.from_numpy(np.ascontiguousarray(samples.T))


def load_audio(path: Path) -> tuple[Tensor, int]:
    """float [C, T] in [-1, 1] and its rate in Hz; errors: `UserError` for no file, no sound, no samples, not finite."""
    with open_audio(path) as file:
        return read_clip(file, str(path)), int(file.samplerate)


def read_clip(file: soundfile.SoundFile, name: str, clip: tuple[float, float] | None = None) -> Tensor:
    """All of an open file, or what lies from one second to another, float [C, T]; errors as `load_audio`'s."""
    start, stop = (0, file.frames) if clip is None else (round(seconds * file.samplerate) for seconds in clip)
    if (stop - start) * file.channels > MAX_SAMPLES:
        raise UserError(f"{name}: {stop - start} samples of {file.channels} channels are too many to be read at once")
    samples = read_samples(file, -1 if clip is None else stop - start, start or None, name)
    if not samples.shape[-1]:
        raise UserError(f"{name}: a sound of zero length; replace it or leave it out")
    return samples


def read_audio_blocks(path: Path, to_rate: int, channels: int, seconds: float, data: bytes | None = None) -> Iterator[Tensor]:
    """A file in pieces of about `seconds`, [channels, t] at `to_rate` Hz: what `load_audio` and `convert_audio` give at once.

    Memory does not grow with the file. data: its bytes, where they are at hand already; `path` is then only its name.
    Errors as `load_audio`'s.
    """
    with open_audio(path, data) as file:
        rate = int(file.samplerate)
        resampler = soxr.ResampleStream(rate, to_rate, channels, dtype="float32") if rate != to_rate else None
        read = written = 0
        while True:
            block = read_samples(file, max(1, round(seconds * rate)), name=str(path))
            read += block.shape[-1]
            last = not block.shape[-1]
            if last and not read:
                raise UserError(f"{path}: a sound of zero length; replace it or leave it out")
            if resampler is not None:
                mixed = mix_channels(block, channels) if not last else block.new_zeros(channels, 0)
                block = torch.from_numpy(resampler.resample_chunk(mixed.T.contiguous().numpy(), last=last).T.copy())
                if last:
                    length = max(1, round(read * to_rate / rate))
                    block = torch.nn.functional.pad(block, (0, max(0, length - written - block.shape[-1])))
                    block = block[:, : length - written]
            elif not last:
                block = mix_channels(block, channels)
            written += block.shape[-1]
            if block.shape[-1]:
                yield block.contiguous()
            if last:
                return


def mix_channels(samples: Tensor, channels: int) -> Tensor:
    """[C, T] -> [channels, T]: mono is the mean of the channels, more are repeated; equal counts stay."""
    if samples.shape[0] == channels:
        return samples
    return samples.mean(0, keepdim=True).expand(channels, -1)


def convert_audio(samples: Tensor, rate: int, to_rate: int, channels: int) -> Tensor:
    """[C, T] at `rate` Hz -> [channels, T'] at `to_rate` Hz; mono is the mean of the channels, more are repeated."""
    samples = mix_channels(samples, channels)
    if rate != to_rate and not samples.shape[-1]:
        return samples
    if rate != to_rate:
        length = max(1, round(samples.shape[-1] * to_rate / rate))
        resampled = torch.from_numpy(soxr.resample(samples.T.numpy(), rate, to_rate).T.copy())
        samples = torch.nn.functional.pad(resampled, (0, max(0, length - resampled.shape[-1])))[:, :length]
    return samples.contiguous()


def save_audio(path: Path, samples: Tensor | np.ndarray, rate: int) -> None:
    """Write float [C, T] in [-1, 1] at `rate` Hz as 16-bit WAV; what is beyond [-1, 1] is clipped. Inverse of `load_audio`."""
    array = samples.detach().float().cpu().numpy() if isinstance(samples, Tensor) else samples
    soundfile.write(path, np.clip(array.T, -1, 1), rate, subtype="PCM_16", format="WAV")


def encode_wav(samples: Tensor, rate: int) -> bytes:
    """float [C, T] in [-1, 1] at `rate` Hz -> the bytes of a 16-bit WAV file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.detach().float().cpu().clamp(-1, 1).numpy().T, rate, subtype="PCM_16", format="WAV")
    return buffer.getvalue()


def write_audio_blocks(path: Path, blocks: Iterable[Tensor], rate: int, channels: int, length: int | None = None) -> None:
    """Write [channels, t] after [channels, t] as one 16-bit WAV of at most `length` samples. As `save_audio` does at once."""
    with soundfile.SoundFile(path, "w", rate, channels, subtype="PCM_16", format="WAV") as file:
        for block in blocks:
            block = block if length is None else block[:, : max(0, length - file.frames)]
            file.write(np.clip(block.detach().float().cpu().numpy().T, -1, 1))


def audio_seconds(path: Path, data: bytes | None = None) -> float:
    """How long a sound is; errors as `load_audio`'s."""
    with open_audio(path, data) as file:
        return file.frames / file.samplerate


def draw_spectrogram(samples: Tensor, rate: int, height: int = 96) -> Tensor:
    """[C, T] at `rate` Hz -> a picture [3, height, W] in [-1, 1], W 125 a second: low tones below, 80 dB from black to white."""
    window, hop = 4 * height, max(1, round(rate / 125))
    mono = samples.detach().float().cpu().mean(0)
    mono = torch.nn.functional.pad(mono, (0, max(0, window - mono.shape[-1])))
    spectrum = torch.stft(mono, window, hop, window=torch.hann_window(window), return_complex=True).abs()[1:]
    bands = spectrum.reshape(height, -1, spectrum.shape[-1]).mean(1)
    decibels = 20 * (bands / (window / 4)).clamp_min(1e-6).log10()  # 0 dB: a sine of amplitude 1
    shade = ((decibels + 80) / 80).clamp(0, 1).flip(0)
    colours = torch.stack([shade * 2, shade * 2 - 0.6, 1.4 * shade * (1 - shade) + shade**3]).clamp(0, 1)
    return colours * 2 - 1


# ---- Text -----------------------------------------------------------------------------------------------------------


def load_text(path: Path) -> str:
    """A UTF-8 file as it is (line ends kept, a byte order mark left out).

    Errors: `UserError` for no file, another encoding, nothing in it.
    """
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
    """Write UTF-8 as it is. Inverse of `load_text`."""
    Path(path).write_bytes(text.encode("utf-8"))


def encode_png(pixels: Tensor) -> bytes:
    """float [3, H, W] in [-1, 1] -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    tensor_to_image(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
