"""WAV of 16-bit samples, the form of most short recordings, read as it stands in the file.

Opening a file in libsndfile costs more than all else that is done with a second of audio. It still reads every other WAV, and those with
chunks that are not known here, or that do not add up exactly.
"""

import struct
from dataclasses import dataclass

import numpy as np

from unitok.media.byte_source import ByteSource

MAX_CHANNELS = 1024  # as in libsndfile
_CHUNKS = 64  # of a file, at most
_WITHOUT_MEANING = (b"LIST", b"fact", b"bext", b"id3 ", b"JUNK")  # for samples


@dataclass(frozen=True)
class Pcm:
    """16-bit little-endian samples in bytes [start, start + size) of a source, those of all channels at one time side by side."""

    start: int
    size: int
    channels: int
    samplerate: int


def find_pcm(source: ByteSource) -> Pcm | None:
    """Return where the samples of a WAV are; None for other formats, for other samples, and where its sizes and chunks do not fit exactly."""
    head = source.read(0, 12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE" or int.from_bytes(head[4:8], "little") + 8 != source.size:
        return None
    position, form, data = 12, None, None
    for _ in range(_CHUNKS):
        if position == source.size:
            break
        chunk = source.read(position, 24)
        name, size = chunk[:4], int.from_bytes(chunk[4:8], "little")
        if name == b"fmt " and form is None and len(chunk) == 24 and size >= 16:
            form = struct.unpack("<HHIIHH", chunk[8:])
        elif name == b"data" and form is not None and data is None:
            data = position + 8, size
        elif name not in _WITHOUT_MEANING:
            return None
        position += 8 + size + size % 2
    if position != source.size or form is None or data is None:
        return None
    tag, channels, rate, _, width, bits = form
    plain = (tag, bits) == (1, 16) and 0 < channels <= MAX_CHANNELS and width == 2 * channels
    return Pcm(*data, channels, rate) if plain else None


class PcmReader:
    """The samples of a `Pcm`, with the methods of a `SoundFile` that are used here."""

    format, can_seek = "WAV", True

    def __init__(self, source: ByteSource, pcm: Pcm):
        self._source, self._pcm, self._at = source, pcm, 0
        self.samplerate, self.channels = pcm.samplerate, pcm.channels
        self.frames = pcm.size // (2 * pcm.channels)

    def seek(self, frame: int) -> None:
        """Go to a sample."""
        self._at = frame

    def read(self, count: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """Return the next samples, at most `count`, float32 [t, C]."""
        width = 2 * self.channels
        count = max(0, min(count, self.frames - self._at))
        data = self._source.read(self._pcm.start + self._at * width, count * width)
        samples = np.frombuffer(data, "<i2", len(data) // width * self.channels).reshape(-1, self.channels)
        self._at += len(samples)
        return samples * np.float32(1 / 32768)

    def close(self) -> None:
        """Nothing is open but the source."""
