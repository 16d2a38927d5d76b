"""Video files: frames with their times, and audio. Read through PyAV (the extra `video`, with FFmpeg in its wheel); GIF, WebP and APNG by Pillow.

Frames are upright RGB images with square pixels, all of the size of the first one, in the order of their times, decoded one at a time: memory
does not grow with the video. Frame rates may vary; `sample_frames` takes what a viewer sees at equal distances. A file that is damaged in its
middle gives what comes before, and `VideoFile.problem` says where it ended.
"""

import io
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
from PIL import Image

from unitok.errors import UserError, first_line
from unitok.media.formats import promised
from unitok.media.image_files import MAX_PIXELS, open_image, to_rgb

REMEDY = "replace it or leave it out"
INSTALL = "reading it needs PyAV: pip install 'unitok-lm[video]'"
ANIMATIONS = ("GIF", "WEBP", "PNG")  # formats of Pillow that may hold several frames
SHORTEST = 0.02  # seconds, of a frame of an animation; a shorter one, also 0, is shown for `USUAL`, as browsers do
USUAL = 0.1
DIGITS = "0123456789"
MISSING = 0.5  # seconds by which a video may end before its header says so


class Frame(NamedTuple):
    """A frame: when it is first seen, and how long at least, in seconds."""

    time: float
    duration: float
    image: Image.Image


class VideoFile(AbstractContextManager):
    """An open video.

    name: for messages. format: of the file, such as MP4. size: (width, height) of its frames in pixels, as they are seen. rate: frames per
    second on average, 0 if it is not known. seconds: its length as the header says, 0 if that is not known. sample_rate: of its audio, Hz; 0
    without audio. bytes: of the file. problem: why it ended early; "" if it did not, or was not read to its end yet.
    """

    def __init__(self, name: str):
        self.name, self.format, self.size = name, "", (0, 0)
        self.rate = self.seconds = 0.0
        self.sample_rate, self.bytes, self.problem = 0, 0, ""

    def frames(self, start: float = 0.0) -> Iterator[Frame]:
        """Yield the frames, from the one that is seen at `start` seconds on. Errors: `UserError` if there is none."""
        first: tuple[int, int] | None = None
        for frame in self._decoded(start):
            first = first or frame.image.size
            yield frame if frame.image.size == first else frame._replace(image=frame.image.resize(first))
        if first is None and not start:
            raise UserError(f"{self.name}: no frame of it can be read{self.problem and f' ({self.problem})'}; {REMEDY}")

    def audio(self, start: float = 0.0, stop: float = math.inf) -> np.ndarray:
        """Return the audio from `start` to `stop` seconds, float32 [C, T] in [-1, 1] at `sample_rate`; what is missing is silent.

        T is that of the whole stretch where `stop` is given, else it ends with the audio.
        """
        raise UserError(f"{self.name}: a video without audio")

    def _decoded(self, start: float) -> Iterator[Frame]:
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""


def open_video(path: Path, data: bytes | None = None, rate: float = 8.0) -> VideoFile:
    """Open a video, an animation, or a folder of frames, one image each, in the order of their names (`2.png` before `10.png`).

    data: bytes of the file; `path` is then only its name. rate: frames per second of a folder. Errors: `UserError` that names the file.
    """
    if data is None and path.is_dir():
        return _Folder(path, rate)
    if data is None and not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    source: Any = io.BytesIO(data) if data is not None else path
    video: VideoFile | None = None
    with suppress(Exception):  # whatever Pillow raises: then PyAV says what is wrong
        video = _Animation(str(path), Image.open(source, formats=ANIMATIONS))
    if data is not None:
        source.seek(0)
    video = video or _Stream(str(path), source if data is not None else str(path))
    video.bytes = path.stat().st_size if data is None else len(data)
    return video


class _Animation(VideoFile):
    """A GIF, WebP or PNG."""

    def __init__(self, name: str, image: Image.Image):
        super().__init__(name)
        self._image = image
        self.format, self.size = image.format or "", image.size
        _check_size(name, image.size)

    def _decoded(self, start: float) -> Iterator[Frame]:
        time = 0.0
        for number in range(getattr(self._image, "n_frames", 1)):
            try:
                self._image.seek(number)
                image = to_rgb(self._image)
            except (OSError, SyntaxError, ValueError, EOFError) as error:
                self.problem = f"damaged after {time:.2f} s: {first_line(error)}"
                return
            duration = self._image.info.get("duration", 0) / 1000
            duration = duration if duration >= SHORTEST else USUAL
            if time + duration > start:
                yield Frame(time, duration, image)
            time += duration

    def close(self) -> None:
        self._image.close()


class _Folder(VideoFile):
    """A folder of frames. Links in it are not followed; what is no image by its name is left out."""

    def __init__(self, path: Path, rate: float):
        super().__init__(str(path))
        try:
            names, self.size = _frames_in(path, path.stat().st_mtime_ns)
        except OSError as error:
            raise UserError(f"{path}: {first_line(error)}") from None
        self._frames = [path / name for name in names]
        self.format, self.rate, self.seconds = "FRAMES", rate, len(names) / rate

    def _decoded(self, start: float) -> Iterator[Frame]:
        for number in range(int(start * self.rate + 1e-6), len(self._frames)):
            try:
                image = open_image(self._frames[number])
                self.bytes += self._frames[number].stat().st_size
            except (UserError, OSError) as error:
                self.problem = f"damaged after {number / self.rate:.2f} s: {error}"
                return
            yield Frame(number / self.rate, 1 / self.rate, image)


@lru_cache(maxsize=64)
def _frames_in(path: Path, changed: int) -> tuple[list[str], tuple[int, int]]:
    """The names of the frames in a folder, and the size of the first one. changed: when the folder was. Errors: `UserError`, `OSError`."""
    with os.scandir(path) as entries:
        names = [e.name for e in entries if e.is_file(follow_symlinks=False) and promised(e.name) == "an image"]
    if not names:
        raise UserError(f"{path}: no images in this folder, so it is no video; {REMEDY}")
    names.sort(key=_by_number)
    return names, open_image(path / names[0]).size


def _by_number(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts names as people number them: `2.png` before `10.png`."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if part[:1] in DIGITS and part else (-1, part) for part in parts], name


class Container:
    """A file that FFmpeg reads: its streams, and the audio in it.

    Args:
        what: what the file should be, for messages.

    Attributes:
        format: of the file. video, audio_stream: its first streams; None where it has none. channels, sample_rate: of its audio, Hz; 0 without.
        begin: when it begins, in seconds. problem: why reading ended early. errors: what reading may raise.
    """

    def __init__(self, name: str, source: str | io.BytesIO, what: str):
        try:
            import av
        except ImportError:
            raise UserError(f"{name}: {INSTALL}") from None
        self._av, self.name, self.problem = av, name, ""
        self.errors = (av.FFmpegError, ValueError)  # that reading raises
        try:
            self.file = av.open(source, "r", metadata_errors="ignore")
        except self.errors as error:
            raise UserError(f"{name}: not {what} ({reason_of(error)}); {REMEDY}") from None
        names = self.file.format.name.split(",")  # of one demuxer, such as matroska,webm
        suffix = Path(name).suffix.lower().removeprefix(".")
        self.format = suffix if suffix in names else names[0]
        covers = av.stream.Disposition.attached_pic
        shown = next((s for s in self.file.streams.video if not s.disposition & covers), None)
        self.video: Any = shown if shown and shown.codec_context is not None else None
        self.audio_stream = next((s for s in self.file.streams.audio if s.codec_context is not None), None)
        context = self.audio_stream.codec_context if self.audio_stream else None
        self.sample_rate, self.channels = (context.sample_rate, len(context.layout.channels)) if context else (0, 0)
        self.begin = (
            float((self.audio_stream.start_time or 0) * (self.audio_stream.time_base or 0)) if self.audio_stream else 0.0
        )

    def seek(self, stream: Any, start: float) -> None:
        """Go to the last key frame at or before `start` seconds, with a decoder that knows nothing."""
        base = stream.time_base or Fraction(1, 1000)
        self.file.seek(round(start / base) + (stream.start_time or 0) if start else (stream.start_time or 0), stream=stream)

    def blocks(self, start: float) -> Iterator[np.ndarray]:
        """Yield the audio from `start` seconds after `begin` on, float32 [C, t] in [-1, 1]; where times leave a gap it is silent."""
        stream, rate, length = self.audio_stream, self.sample_rate, 0  # samples so far
        assert stream is not None
        to_float = self._av.AudioResampler(format="fltp", layout=stream.codec_context.layout, rate=rate)
        try:
            self.seek(stream, max(0.0, start - 0.1))  # decoders need a little before
            for frame in self.file.decode(stream):
                begin = (start if frame.time is None else frame.time - self.begin) - start
                samples = np.concatenate([part.to_ndarray() for part in to_float.resample(frame)], -1)
                at = round(begin * rate)
                if length and abs(at - length) < 0.02 * rate:  # times are rounded
                    at = length
                samples, gap = samples[:, max(0, length - at) :], max(0, at - length)
                length += gap + samples.shape[1]
                while gap:  # as many blocks as somebody wants
                    yield np.zeros((self.channels, min(gap, rate)), np.float32)
                    gap -= min(gap, rate)
                if samples.shape[1]:
                    yield np.nan_to_num(samples).clip(-1, 1)
        except self.errors as error:
            self.problem = self.problem or f"audio damaged after {start + length / rate:.2f} s: {reason_of(error)}"

    def audio(self, start: float, stop: float) -> np.ndarray:
        """Return the audio from `start` to `stop` seconds after `begin`, float32 [C, T] in [-1, 1]; it may end earlier."""
        parts, length = [np.zeros((self.channels, 0), np.float32)], 0
        most = (stop - start) * self.sample_rate
        for block in self.blocks(start):
            parts.append(block)
            length += block.shape[1]
            if length >= most:
                break
        return np.concatenate(parts, -1)[:, : round(most) if math.isfinite(stop) else None]


class _Stream(VideoFile):
    """What FFmpeg reads."""

    def __init__(self, name: str, source: str | io.BytesIO):
        super().__init__(name)
        self._container = container = Container(name, source, "a readable video")
        self._video = container.video
        if self._video is None:
            container.file.close()
            kind = "only audio" if container.audio_stream else "no stream that can be decoded"
            raise UserError(f"{name}: no video in it, {kind}; {REMEDY}")
        self.format, self.sample_rate = container.format, container.sample_rate
        self.rate = float(self._video.average_rate or 0)
        self.seconds = float((self._video.duration or 0) * (self._video.time_base or 0)) or (container.file.duration or 0) / 1e6
        self._begin = container.begin
        context = self._video.codec_context
        try:
            _check_size(name, (context.width, context.height))
            first = next(self._decoded(0.0), None)  # rotation is a fact of frames
        except UserError:
            self.close()
            raise
        self.size = first.image.size if first else (context.width, context.height)

    def _decoded(self, start: float) -> Iterator[Frame]:
        usual = 1 / self.rate if self.rate else 0.04
        waiting: Frame | None = None  # until the next one says how long it is seen
        try:
            self._container.seek(self._video, start)
            for frame in self._container.file.decode(self._video):
                after = 0.0 if waiting is None else waiting.time + usual
                time = after if frame.time is None else max(0.0, frame.time - self._begin)
                if waiting is not None and time > waiting.time:
                    if time > start:
                        yield waiting._replace(duration=time - waiting.time)
                    waiting = None
                if waiting is None:  # of several frames at one time the first
                    waiting = Frame(time, usual, self._upright(frame))
        except self._container.errors as error:
            at = f"after {waiting.time + usual:.2f} s" if waiting else "from its begin on"
            self.problem = f"damaged {at}: {reason_of(error)}"
        if waiting is None:
            return
        yield waiting
        end = waiting.time + waiting.duration
        if not self.problem and end < self.seconds - MISSING:
            self.problem = f"cut off: it ends at {end:.2f} s, its header says {self.seconds:.2f} s"

    def _upright(self, frame: Any) -> Image.Image:
        """A frame as it is seen: with square pixels, and turned as the file says."""
        ratio = self._video.sample_aspect_ratio or Fraction(1)
        width = max(1, round(frame.width * ratio)) if 0.1 < ratio < 10 else frame.width
        _check_size(self.name, (width, frame.height))
        image = frame.to_image(width=width, height=frame.height)
        return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image

    def audio(self, start: float = 0.0, stop: float = math.inf) -> np.ndarray:
        if self._container.audio_stream is None:
            return super().audio()
        samples = self._container.audio(start, stop)
        self.problem = self.problem or self._container.problem
        missing = round((stop - start) * self.sample_rate) - samples.shape[1] if math.isfinite(stop) else 0
        return np.pad(samples, ((0, 0), (0, max(0, missing))))

    def close(self) -> None:
        self._container.file.close()


def _check_size(name: str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{name}: frames of {size[0]} x {size[1]} pixels are too large; scale it down or leave it out")


def reason_of(error: Exception) -> str:
    """Return what FFmpeg says, in a few words."""
    return first_line(error).split(":")[0].removeprefix("[Errno ").split("] ")[-1]


# ---- Frames at equal distances --------------------------------------------------------------------------------------


def sample_frames(frames: Iterable[Frame], rate: float, start: float = 0.0, stop: float = math.inf) -> Iterator[Image.Image]:
    """Yield what a viewer sees at `rate` frames per second: for each interval from `start` on the frame in its middle.

    The video ends with its last frame or at `stop`, in seconds, rounded to whole intervals, of which there is at least one. A slow video
    repeats frames, a fast one loses some.
    """
    count = 0
    shown: Frame | None = None
    for frame in frames:
        if shown is not None:
            while (middle := start + (count + 0.5) / rate) < min(frame.time, stop):
                yield shown.image
                count += 1
            if middle >= stop:
                break
        shown = frame
    if shown is None:
        return
    end = min(shown.time + shown.duration, stop)
    while start + (count + 0.5) / rate <= end + 1e-6 or not count:
        yield shown.image
        count += 1


# ---- Writing --------------------------------------------------------------------------------------------------------


def write_video(
    path: Path, frames: Iterable[np.ndarray], rate: float, audio: np.ndarray | None = None, sample_rate: int = 0
) -> None:
    """Write frames, uint8 [H, W, 3], as MP4 (H.264, or VP9 where a side is odd) or, by the suffix, as WebM or GIF.

    rate: frames per second. audio: float [C, T] in [-1, 1] at `sample_rate` Hz, written beside them; a GIF has none. Errors: `UserError`.
    """
    if path.suffix == ".gif":
        _write_gif(path, frames, rate)
        return
    try:
        import av
    except ImportError:
        raise UserError(f"{path}: writing videos needs PyAV: pip install 'unitok-lm[video]'; a GIF does not") from None
    pixels = iter(frames)
    first = next(pixels)
    height, width = first.shape[:2]
    even = height % 2 == width % 2 == 0
    codec = "libx264" if path.suffix == ".mp4" and even and "libx264" in av.codecs_available else "libvpx-vp9"
    with av.open(str(path), "w") as file:
        quality = {"crf": "12"} if codec == "libx264" else {"crf": "12", "b": "0", "row-mt": "1", "cpu-used": "4"}
        video: Any = file.add_stream(codec, rate=Fraction(rate).limit_denominator(1000), options=quality)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound: Any = None
        if audio is not None and audio.shape[1]:
            to_rate = 48_000 if path.suffix == ".webm" else _aac_rate(sample_rate)
            layout = {1: "mono", 2: "stereo"}.get(len(audio))
            audio, layout = (audio, layout) if layout else (audio.mean(0, keepdims=True), "mono")
            sound = file.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=to_rate, layout=layout)
        for image in _chain(first, pixels):
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        file.mux(video.encode(None))
        if sound is not None and audio is not None:
            resampled = soxr.resample(audio.T, sample_rate, to_rate).T if sample_rate != to_rate else audio
            whole = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(resampled, np.float32).clip(-1, 1), format="fltp", layout=sound.layout.name
            )
            whole.sample_rate, whole.pts, whole.time_base = to_rate, 0, Fraction(1, to_rate)
            file.mux(sound.encode(whole))
            file.mux(sound.encode(None))


def encode_gif(frames: Iterable[np.ndarray], rate: float) -> bytes:
    """Return the bytes of the GIF that `write_video` writes."""
    buffer = io.BytesIO()
    _write_gif(buffer, frames, rate)
    return buffer.getvalue()


def can_write_video() -> bool:
    """Return whether PyAV is there, without which only GIFs are written."""
    return find_spec("av") is not None


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _aac_rate(rate: int) -> int:
    """The lowest sample rate of AAC that is at least `rate`."""
    rates = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 64_000, 88_200, 96_000)
    return next((known for known in rates if known >= rate), rates[-1])


def _write_gif(file: Path | io.BytesIO, frames: Iterable[np.ndarray], rate: float) -> None:
    """Write a GIF, whose times are in hundredths of a second: the durations of its frames differ so that their sum does not drift."""
    images = [Image.fromarray(frame) for frame in frames]
    ends = [round(100 * (i + 1) / rate) for i in range(len(images))]
    durations = [10 * (b - a) for a, b in zip([0, *ends], ends, strict=False)]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)
