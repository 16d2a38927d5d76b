"""Audio files of any format, opened for reading in pieces, complete and with their true length.

libsndfile decodes what it can (`packed_audio` the rest); `audio_streams` corrects what it gets wrong from headers. Float samples beyond [-1, 1] are clipped, as
players do; floats of the magnitude of integers are an error.
"""

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import soundfile

from unitok.errors import UserError, first_line
from unitok.media.audio_streams import CutOff, Stream, streams_of
from unitok.media.byte_source import ByteSource, SourcePart
from unitok.media.formats import HEAD, unread
from unitok.media.wav import PcmReader

RATES = (100, 1_000_000)  # Hz, of audio; others are mistakes
MAX_HOURS = 12
MAX_LEVEL = 16.0  # float samples beyond this are integers that were stored as floats
_MISSING_MP3 = 2 * 1152  # samples per channel that may be missing at the end of an MP3: encoders and decoders count differently
REMEDY = "replace it or leave it out"

#: Number of files whose streams are cached, by device, inode, size and time of change.
CACHED = 4096
_cache: dict[tuple[int, int, int, int], list[Stream]] = {}


class _Decoder(soundfile.SoundFile):
    """A `SoundFile` that is read sequentially: soundfile would seek after each read, which makes MP3 and Opus lose their
    decoder state."""

    def seekable(self) -> bool:
        return False

    @property
    def can_seek(self) -> bool:
        """Whether `seek` works."""
        return super().seekable()


class AudioFile(AbstractContextManager):
    """An open audio file; several consecutive streams are read as one.

    frames: samples per channel. samplerate: Hz. format: soundfile's name. name: for messages.
    """

    _integers = False  # whether the file holds integers, so that every sample is a number in [-1, 1]

    def __init__(self, name: str, source: ByteSource, streams: list[Stream]):
        self.name, self._source, self._streams = name, source, streams
        self._files = [self._open(stream) for stream in streams]
        self._integers = all(isinstance(f, PcmReader) for f in self._files)
        self._lengths = [s.frames or f.frames for s, f in zip(streams, self._files)]
        self.frames = sum(self._lengths)
        first = self._files[0]
        self.samplerate, self.channels, self.format = int(first.samplerate), first.channels, first.format
        self._position, self._positions = 0, [0] * len(streams)  # of all streams together, and of each decoder
        for file in self._files[1:]:
            if (file.samplerate, file.channels) != (self.samplerate, self.channels):
                raise UserError(
                    f"{name}: its streams differ ({self.samplerate} Hz, {self.channels} channels; then {file.samplerate} "
                    f"Hz, {file.channels}); convert it, for example with ffmpeg -i {Path(name).name} {Path(name).stem}.wav"
                )

    def _open(self, stream: Stream) -> _Decoder | PcmReader:
        if stream.pcm is not None:
            return PcmReader(self._source, stream.pcm)
        file, whole = self._source.file, (stream.start, stream.stop, stream.head) == (0, self._source.size, b"")
        if not whole or isinstance(file, io.BytesIO):
            return _Decoder(SourcePart(self._source, stream.head, stream.start, stream.stop))
        file.seek(0)  # pass the descriptor: it is fastest, and hides the suffix
        return _Decoder(file.fileno(), closefd=False)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        for file in self._files:
            file.close()
        self._source.close()

    def seek(self, frame: int) -> None:
        """Go to a sample, exactly, in any format."""
        self._position = min(max(0, frame), self.frames)

    def read(self, frames: int = -1) -> np.ndarray:
        """Read the next `frames` samples (default: all that remain), float32 [t, C]. Errors: `UserError` for damaged files, and
        for samples that are not in the range of audio."""
        left = self.frames - self._position
        left = left if frames < 0 else min(frames, left)
        blocks = list(self._blocks(left))
        samples = blocks[0] if len(blocks) == 1 else np.concatenate([np.zeros((0, self.channels), np.float32), *blocks])
        if self._integers:
            return samples
        level = max(float(samples.max(initial=0.0)), -float(samples.min(initial=0.0)))
        if not np.isfinite(level):
            raise UserError(f"{self.name}: samples that are not finite numbers; {REMEDY}")
        if level > MAX_LEVEL:
            raise UserError(
                f"{self.name}: float samples up to {level:.6g}, beyond [-1, 1]; scale them, 16-bit ones by 1 / 32768"
            )
        return samples if level <= 1 else samples.clip(-1, 1)

    def _blocks(self, left: int) -> Iterator[np.ndarray]:
        first = 0
        for number, length in enumerate(self._lengths):
            start = self._position - first
            if left and start < length:
                count = min(left, length - start)
                yield self._read(number, start, count)
                left, self._position = left - count, self._position + count
            first += length

    def _read(self, number: int, start: int, count: int) -> np.ndarray:
        """Read samples [start, start + count) of one stream."""
        try:
            if self._positions[number] != start:
                self._seek(number, start)
            samples = self._files[number].read(count, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
            raise UserError(f"{self.name}: damaged audio ({_reason(error)}); {REMEDY}") from None
        self._positions[number] = start + len(samples)
        if (missing := count - len(samples)) == 0:
            return samples
        if missing > _MISSING_MP3 or self._files[number].format != "MP3":
            decoded = self._position + len(samples)
            raise UserError(_cut_off(self.name, self.frames / self.samplerate, decoded / self.samplerate))
        self._positions[number] = -1
        return np.concatenate([samples, np.zeros((missing, self.channels), np.float32)])

    def _seek(self, number: int, start: int) -> None:
        """Go to a sample of one stream. Where seeking in libsndfile is not exact, decode from an earlier position."""
        stream, file, at = self._streams[number], self._files[number], self._positions[number]
        before = max(0, min(start - stream.preroll, self._lengths[number] - stream.tail)) if file.can_seek else 0
        if not before <= at <= start:
            if stream.tail or not file.can_seek:
                file.close()
                file = self._files[number] = self._open(stream)
            if before:
                file.seek(before)
            elif not stream.tail and file.can_seek:
                file.seek(0)
            at = before
        while (left := start - at) > 0:
            at += len(file.read(min(left, 1 << 16), dtype="float32")) or left
        self._positions[number] = start


def _reason(error: BaseException) -> str:
    return error.error_string if isinstance(error, soundfile.LibsndfileError) else first_line(error)


def _cut_off(name: str, declared: float, present: float) -> str:
    """Return the message for a file that ends before its audio does. declared, present: seconds; 0 if unknown."""
    lengths = f"its header says {declared:.2f} s, {present:.2f} s can be decoded" if declared else "its end is missing"
    lengths += f", {present:.2f} s can be decoded" if present and not declared else ""
    return f"{name}: audio that is cut off: {lengths}; {REMEDY}"


def open_unpacked(path: Path, data: bytes | None = None) -> AudioFile:
    """Open an audio file that libsndfile reads. data: bytes of the file; `path` is then only its name. Errors: `UserError` for
    a missing file, another content, audio without samples, audio that is cut off, and a rate that is none of audio (`RATES`)."""
    name = str(path)
    try:
        source = ByteSource(path, data)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    try:
        file = AudioFile(name, source, _streams_of(source, data is None))
        if not RATES[0] <= file.samplerate <= RATES[1]:
            raise UserError(f"{name}: its header says {file.samplerate} Hz, which is no rate of audio; {REMEDY}")
        if file.frames == 0:
            raise UserError(f"{name}: audio of zero length; {REMEDY}")
        if file.frames > MAX_HOURS * 3600 * file.samplerate:
            raise UserError(f"{name}: audio of more than {MAX_HOURS} hours; cut it into parts")
        if file.format == "FLAC":
            _check_end(file)
        return file
    except BaseException as error:
        message = _open_error(name, source, error)
        source.close()
        if message:
            raise UserError(message) from None
        raise


def _streams_of(source: ByteSource, on_disk: bool) -> list[Stream]:
    """Return the streams of a file; cached for files on disk, which training opens repeatedly."""
    if not on_disk:
        return streams_of(source)
    stat = os.fstat(source.file.fileno())
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    streams = _cache.get(key)
    if streams is None:
        streams = streams_of(source)
        if len(_cache) >= CACHED:
            _cache.clear()
        _cache[key] = streams
    return streams


def _check_end(file: AudioFile) -> None:
    """Raise `CutOff` for FLAC whose last frame is incomplete."""
    file.seek(file.frames - 1)
    try:
        file.read(1)
    except UserError:
        raise CutOff from None
    file.seek(0)


def _open_error(name: str, source: ByteSource, error: BaseException) -> str:
    """Return the message for a file that cannot be opened; "" for an error that has a message of its own."""
    unreadable = (soundfile.LibsndfileError, RuntimeError, TypeError)
    if isinstance(error, (CutOff, *unreadable)) and (what := unread(source.read(0, HEAD))):
        return f"{name}: {what}"
    if isinstance(error, CutOff):
        declared, present = error.declared, error.present
        if error.fraction:
            try:
                rest = AudioFile(name, source, [Stream(0, source.size)])
                present = rest.frames / rest.samplerate
            except unreadable:  # libsndfile does not open some formats that are cut off
                present = 0.0
            declared = present / error.fraction
        return _cut_off(name, declared, present)
    return f"{name}: not readable audio ({_reason(error)}); {REMEDY}" if isinstance(error, unreadable) else ""
