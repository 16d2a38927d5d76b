"""Audio files, open to be read in pieces: of any format that libsndfile reads, whole, and at their true length.

libsndfile decodes; what its headers do not tell it right is found by `audio_streams`. Float samples beyond [-1, 1] are
clipped as a player does; numbers of the size of integers are an error.
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
from unitok.media.byte_source import ByteSource, Stretch
from unitok.media.formats import HEAD, unread

MAX_HOURS = 12
MAX_LEVEL = 16.0  # float samples over this are integers that somebody stored as floats
_FRAMES_LOST = 2 * 1152  # samples per channel that an MP3 may lack at its end: encoders and decoders count differently
REMEDY = "replace it or leave it out"

#: Files whose streams are remembered, by device, inode, size and time of change.
KNOWN = 4096
_known: dict[tuple[int, int, int, int], list[Stream]] = {}


class _Decoder(soundfile.SoundFile):
    """A sound file that is only read on: soundfile seeks after each read, where MP3 and Opus lose what they build upon."""

    def seekable(self) -> bool:
        return False


class AudioFile(AbstractContextManager):
    """An open audio file: one stream, or several that follow one another, as one.

    frames: samples per channel. samplerate: Hz. format: as soundfile calls it. name: for messages.
    """

    def __init__(self, name: str, source: ByteSource, streams: list[Stream]):
        self.name, self._source, self._streams = name, source, streams
        self._files = [self._open(stream) for stream in streams]
        self._lengths = [s.frames or f.frames for s, f in zip(streams, self._files)]
        self.frames = sum(self._lengths)
        first = self._files[0]
        self.samplerate, self.channels, self.format = int(first.samplerate), first.channels, first.format
        self._at, self._tells = 0, [0] * len(streams)
        for file in self._files[1:]:
            if (file.samplerate, file.channels) != (self.samplerate, self.channels):
                raise UserError(
                    f"{name}: audio whose parts differ ({self.samplerate} Hz, {self.channels} channels; then {file.samplerate} "
                    f"Hz, {file.channels}); convert it, for example with ffmpeg -i {Path(name).name} {Path(name).stem}.wav"
                )

    def _open(self, stream: Stream) -> _Decoder:
        file, whole = self._source.file, (stream.start, stream.stop, stream.head) == (0, self._source.size, b"")
        if not whole or isinstance(file, io.BytesIO):
            return _Decoder(Stretch(self._source, stream.head, stream.start, stream.stop))
        file.seek(0)  # by its descriptor: that is fastest, and the suffix says nothing
        return _Decoder(file.fileno(), closefd=False)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; it cannot be read any more."""
        for file in self._files:
            file.close()
        self._source.file.close()

    def seek(self, frame: int) -> None:
        """Make `frame` the next one that is read, in any format."""
        self._at = min(max(0, frame), self.frames)

    def read(self, frames: int = -1) -> np.ndarray:
        """The next samples (default: all the rest), float32 [t, C]; errors: `UserError` for damage, for levels of no audio."""
        left = self.frames - self._at
        left = left if frames < 0 else min(frames, left)
        blocks = list(self._blocks(left))
        samples = blocks[0] if len(blocks) == 1 else np.concatenate([np.zeros((0, self.channels), np.float32), *blocks])
        level = max(float(samples.max(initial=0.0)), -float(samples.min(initial=0.0)))
        if not np.isfinite(level):
            raise UserError(f"{self.name}: samples that are not finite numbers; {REMEDY}")
        if level > MAX_LEVEL:
            raise UserError(
                f"{self.name}: samples up to {level:.6g}, where floats are in [-1, 1]; divide them, 16-bit ones by 32768"
            )
        return samples if level <= 1 else samples.clip(-1, 1)

    def _blocks(self, left: int) -> Iterator[np.ndarray]:
        first = 0
        for number, length in enumerate(self._lengths):
            start = self._at - first
            if left and start < length:
                wanted = min(left, length - start)
                yield self._read(number, start, wanted)
                left, self._at = left - wanted, self._at + wanted
            first += length

    def _read(self, number: int, start: int, wanted: int) -> np.ndarray:
        """Samples [start, start + wanted) of one stream."""
        try:
            if self._tells[number] != start:
                self._seek(number, start)
            samples = self._files[number].read(wanted, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise UserError(f"{self.name}: damaged sound ({_reason(error)}); {REMEDY}") from None
        self._tells[number] = start + len(samples)
        if (lost := wanted - len(samples)) == 0:
            return samples
        if lost > _FRAMES_LOST or self._files[number].format != "MP3":
            raise UserError(_cut_off(self.name, self.frames / self.samplerate, (self._at + len(samples)) / self.samplerate))
        self._tells[number] = -1
        return np.concatenate([samples, np.zeros((lost, self.channels), np.float32)])

    def _seek(self, number: int, start: int) -> None:
        """Go to a sample of one stream; where libsndfile's seeks are not exact, decode up to it from before."""
        stream, file, at = self._streams[number], self._files[number], self._tells[number]
        can_seek = soundfile.SoundFile.seekable(file)
        before = max(0, min(start - stream.preroll, self._lengths[number] - stream.tail)) if can_seek else 0
        if not before <= at <= start:
            if stream.tail or not can_seek:
                file.close()
                file = self._files[number] = self._open(stream)
            if before:
                file.seek(before)
            elif not stream.tail and can_seek:
                file.seek(0)
            at = before
        while (left := start - at) > 0:
            at += len(file.read(min(left, 1 << 16), dtype="float32")) or left
        self._tells[number] = start


def _reason(error: BaseException) -> str:
    return error.error_string if isinstance(error, soundfile.LibsndfileError) else first_line(error)


def _cut_off(name: str, promised: float, there: float) -> str:
    """That a file ends before its audio does; seconds, 0 for what is not known."""
    says = f"it promises {promised:.2f} s, {there:.2f} s of it decode" if promised else "its end is missing"
    says += f", {there:.2f} s of it decode" if there and not promised else ""
    return f"{name}: a sound that is cut off: {says}; {REMEDY}"


def open_audio(path: Path, data: bytes | None = None) -> AudioFile:
    """An audio file, or its bytes, to be read in pieces; errors: `UserError` for no file, no audio, no samples, less than promised."""
    name = str(path)
    try:
        source = ByteSource(path, data)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    try:
        file = AudioFile(name, source, _streams_of(source, data is None))
        if file.frames == 0:
            raise UserError(f"{name}: a sound of zero length; {REMEDY}")
        if file.frames > MAX_HOURS * 3600 * file.samplerate:
            raise UserError(f"{name}: a sound of more than {MAX_HOURS} hours; cut it")
        if file.format == "FLAC":
            _check_end(file)
        return file
    except BaseException as error:
        message = _why(name, source, error)
        source.file.close()
        if message:
            raise UserError(message) from None
        raise


def _streams_of(source: ByteSource, on_disk: bool) -> list[Stream]:
    """The streams of a file; remembered for files on disk, which training opens again and again."""
    if not on_disk:
        return streams_of(source)
    stat = os.fstat(source.file.fileno())
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    found = _known.get(key)
    if found is None:
        found = streams_of(source)
        if len(_known) >= KNOWN:
            _known.clear()
        _known[key] = found
    return found


def _check_end(file: AudioFile) -> None:
    """Errors: `CutOff` for FLAC whose last frame is there in part."""
    file.seek(file.frames - 1)
    try:
        file.read(1)
    except UserError:
        raise CutOff from None
    file.seek(0)


def _why(name: str, source: ByteSource, error: BaseException) -> str:
    """What is wrong with a file that does not open; "" for an error that says so itself."""
    unreadable = (soundfile.LibsndfileError, RuntimeError, TypeError)
    if isinstance(error, (CutOff, *unreadable)) and (what := unread(source.read(0, HEAD), name)):
        return f"{name}: {what}"
    if isinstance(error, CutOff):
        promised, there = error.promised, error.there
        if error.share:
            try:
                rest = AudioFile(name, source, [Stream(0, source.size)])
                there = rest.frames / rest.samplerate
            except unreadable:  # libsndfile does not open some formats that are cut off
                there = 0.0
            promised = there / error.share
        return _cut_off(name, promised, there)
    return f"{name}: not a readable sound ({_reason(error)}); {REMEDY}" if isinstance(error, unreadable) else ""
