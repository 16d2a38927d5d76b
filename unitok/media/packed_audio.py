"""Any audio file: what libsndfile reads, and through PyAV (extra `video`) M4A, AAC, WMA, AC-3, WavPack, …, and the audio of videos."""

import io
import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from unitok.errors import UserError
from unitok.media.audio_files import MAX_HOURS, RATES, REMEDY, AudioFile, open_unpacked
from unitok.media.formats import HEAD, holds_packed_audio
from unitok.media.video_files import Container

WITHOUT_LENGTH = ("aac", "ac3", "eac3", "amr", "loas", "mp3")  # formats of FFmpeg whose lengths it guesses from bit rates
MISSING = 0.2  # seconds of a stretch that may be missing: headers round, and encoders fill up


class PackedAudio(AudioFile):
    """The audio of a file that FFmpeg reads, with the methods of `AudioFile`. source: a path, or the bytes of the file."""

    def __init__(self, name: str, source: str | io.BytesIO):
        self._packed, self._container = source, Container(name, source, "readable audio")
        try:
            self.name, self.format = name, self._container.format.upper()
            self.samplerate, self.channels = self._container.sample_rate, self._container.channels
            if self._container.audio_stream is None:
                raise UserError(f"{name}: no audio in it; {REMEDY}")
            if not RATES[0] <= self.samplerate <= RATES[1]:
                raise UserError(f"{name}: its header says {self.samplerate} Hz, which is no rate of audio; {REMEDY}")
            self._position = self._read_to = 0
            self._further: Iterator[np.ndarray] = iter(())  # from `_read_to` on
            self.frames = round(self._seconds() * self.samplerate)
            if self.frames == 0:
                raise UserError(f"{name}: audio of zero length; {REMEDY}")
            if self.frames > MAX_HOURS * 3600 * self.samplerate:
                raise UserError(f"{name}: audio of more than {MAX_HOURS} hours; cut it into parts")
        except BaseException:
            self.close()
            raise

    def _seconds(self) -> float:
        """The length of the audio: what the file says, or what the times of its packets say, or else their sum, which takes reading."""
        stream, file = self._container.audio_stream, self._container.file
        assert stream is not None
        base = float(stream.time_base or 0)
        if stream.duration and file.format.name not in WITHOUT_LENGTH:
            return float(stream.duration * base)
        total, last = 0, 0.0
        with suppress(*self._container.errors):  # reading says where it is damaged
            for packet in file.demux(stream):
                total += packet.duration or 0
                if packet.pts is not None:
                    last = max(last, float((packet.pts + (packet.duration or 0)) * base) - self._container.begin)
        return last or float(total * base)

    def _blocks(self, left: int) -> Iterator[np.ndarray]:
        rate, stop = self.samplerate, self._position + left
        if self._position != self._read_to or not self._position:
            self._further, self._read_to = self._from(self._position), self._position
        while self._position < stop:
            block = next(self._further, None)
            if block is None:
                if stop - self._position > MISSING * rate:
                    lengths = f"{self._position / rate:.2f} of {self.frames / rate:.2f} s can be decoded"
                    raise UserError(f"{self.name}: {self._container.problem or f'audio that is cut off: {lengths}'}; {REMEDY}")
                block = np.zeros((self.channels, stop - self._position), np.float32)
            now, later = np.split(block, [stop - self._position], 1)
            if later.size:
                self._further = itertools.chain([later], self._further)
            self._position = self._read_to = self._position + now.shape[1]
            yield now.T

    def _from(self, position: int) -> Iterator[np.ndarray]:
        """The audio from a sample on, the same as in one reading of all: where times are not those of samples, the file is decoded to there."""
        stream = self._container.audio_stream
        assert stream is not None
        if position and (1 / (stream.time_base or 1)) % self.samplerate == 0:
            yield from self._container.blocks(position / self.samplerate)
            return
        self.close()  # a decoder that has read before begins differently
        if isinstance(self._packed, io.BytesIO):
            self._packed.seek(0)
        self._container = Container(self.name, self._packed, "readable audio")
        for block in self._container.blocks(0.0):
            skipped = min(position, block.shape[1])
            position -= skipped
            yield block[:, skipped:]

    def close(self) -> None:
        """Close the file."""
        self._container.file.close()


def open_audio(path: Path, data: bytes | None = None) -> AudioFile:
    """Open an audio file, or a video for its audio, for reading in pieces. data: bytes of the file; `path` is then only its name.

    Errors: `UserError` for a missing file, another content, audio without samples, audio that is cut off, and a rate that is none of audio.
    """
    head = data[:HEAD] if data is not None else _head_of(path)
    if holds_packed_audio(head, str(path)):
        return PackedAudio(str(path), str(path) if data is None else io.BytesIO(data))
    return open_unpacked(path, data)


def _head_of(path: Path) -> bytes:
    """The first bytes of a file; none of one that cannot be read, as opening it says."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(HEAD)
    except OSError:
        return b""
