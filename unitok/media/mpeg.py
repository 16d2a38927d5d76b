"""MPEG audio (MP1, MP2, MP3): frames, the tags around them, and the Xing, Info or VBRI header with the number of frames.

A stream is a sequence of frames, whose headers give their sizes (ISO 11172-3 2.4.1.3, ISO 13818-3, and the "version 2.5" of
Fraunhofer for low rates).
"""

from collections.abc import Callable
from functools import cache

from unitok.media.byte_source import BLOCK

#: (Whether a frame has version 1, its layer) -> its bit rates in kbit/s (ISO 11172-3 2.4.2.3, ISO 13818-3 2.4.2.3).
_KBPS = {
    (True, 1): range(32, 449, 32),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    **dict.fromkeys(((False, 2), (False, 3)), (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)),
}


@cache
def mpeg_frames() -> dict[int, tuple[int, int, int]]:
    """Return (bytes, samples per channel, rate in Hz) of a frame by the second and third byte of its header, without the free
    format."""
    frames = {}
    for second in range(0xE0, 0x100):
        version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
        if version == 1 or layer == 4:  # reserved
            continue
        samples = 384 if layer == 1 else 1152 if layer == 2 or version == 3 else 576
        for third in range(256):
            bit_rate, sample_rate, padding = third >> 4, third >> 2 & 3, third >> 1 & 1
            if bit_rate in (0, 15) or sample_rate == 3:
                continue
            rate = (44_100, 48_000, 32_000)[sample_rate] >> {3: 0, 2: 1, 0: 2}[version]
            bits = 1000 * _KBPS[version == 3, layer][bit_rate - 1]
            size = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
            frames[second << 8 | third] = (size, samples, rate)
    return frames


def mpeg_chain(data: bytes, at: int, most: int) -> tuple[int, int]:
    """Return the number of consecutive frames of one layer and rate from `at` on, at most `most`, and their end, which may lie
    beyond the data."""
    frames, count, first = mpeg_frames(), 0, None
    while count < most and at + 4 <= len(data) and data[at] == 0xFF:
        second, third = data[at + 1], data[at + 2]
        frame = frames.get(second << 8 | third)
        same = (second & 0xFE, third & 0x0C)
        if frame is None or (first is not None and same != first):
            break
        first, at, count = same, at + frame[0], count + 1
    return count, at


def tag_size(head: bytes) -> int:
    """Return the size in bytes of the ID3v2 or APEv2 tag that `head` begins with, or 0."""
    if head[:3] == b"ID3" and 2 <= head[3] <= 4 and head[4] < 0xFF and max(head[6:10]) < 0x80:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return 10 + size + (10 if head[5] & 0x10 else 0)
    if head[:8] == b"APETAGEX" and len(head) >= 32:
        return 32 + int.from_bytes(head[12:16], "little")
    return 0


def find_mpeg(data: bytes) -> int | None:
    """Return the position where MPEG audio (or FLAC) begins in data, after tags and junk; None if there is none.

    A frame at the beginning must be followed by another one or be all of the data, a frame after junk by three.
    """
    at = 0
    while len(data) > at + 10 and (size := tag_size(data[at:])):
        at += size
    if at >= len(data) or data[at : at + 4] == b"fLaC":
        return at if at and data else None
    count, end = mpeg_chain(data, at, 3)
    if count > 1 or (count == 1 and end == len(data)) or (at and count and end > len(data) - 4):
        return at
    while 0 <= (at := data.find(b"\xff", at + 1)) < len(data) - 4:
        count, end = mpeg_chain(data, at, 4)
        if count > 3 or (count > 2 and end >= len(data) - 4):
            return at
    return None


def _side_bytes(frame: bytes) -> int:
    """Return the bytes of side information after a frame's header, which depend on its channels and version."""
    mono, old = frame[3] >> 6 == 3, not frame[1] & 8
    return (9 if old else 17) if mono else (17 if old else 32)


def declared_size(frame: bytes) -> tuple[int, int]:
    """Return the numbers of frames and bytes that the Xing, Info or VBRI header in a first frame declares; 0 if it does not."""
    if frame[36:40] == b"VBRI":
        return int.from_bytes(frame[50:54], "big"), int.from_bytes(frame[46:50], "big")
    at = 4 + _side_bytes(frame)
    if frame[at : at + 4] not in (b"Xing", b"Info"):
        return 0, 0
    flags, at = frame[at + 7], at + 8
    frames = int.from_bytes(frame[at : at + 4], "big") if flags & 1 else 0
    at += 4 * (flags & 1)
    return frames, int.from_bytes(frame[at : at + 4], "big") if flags & 2 else 0


def begins_stream(data: bytes) -> bool:
    """Whether another stream begins in the data after a stream, and not only a tag, or a last frame that the header did not
    count."""
    start = find_mpeg(data)
    if start is None:
        return False
    return start >= len(data) or declared_size(data[start : start + 192])[0] > 0 or mpeg_chain(data, start, 3)[0] > 2


def xing_header(frame: bytes, count: int, length: int) -> bytes:
    """Return a Xing header, a silent frame of its own, for `count` frames like `frame` with `length` bytes in total."""
    frames = mpeg_frames()
    second, third = frame[1] | 1, frame[2] & 0x0C  # without a checksum
    third = next(t | third for t in range(0x10, 0xF0, 0x10) if frames[second << 8 | t | third][0] >= 64)
    size = frames[second << 8 | third][0]
    head = bytes([0xFF, second, third, frame[3]]) + bytes(_side_bytes(frame)) + b"Xing\0\0\0\3"
    return (head + count.to_bytes(4, "big") + (length + size).to_bytes(4, "big")).ljust(size, b"\0")


def walk_frames(read: Callable[[int, int], bytes], start: int, stop: int) -> tuple[int, int, bool]:
    """Follow frames up to another stream, or to `stop`. Returns the position reached, the number of frames, and whether the
    last one is complete."""
    frames, at, count, base, block = mpeg_frames(), start, 0, 0, b""
    first: tuple[int, int] | None = None
    frame: tuple[int, int, int] | None = None
    marked = False
    while at < stop - 4:
        offset = at - base
        if offset + 192 > len(block) and base + len(block) < stop:
            base, block, offset = at, read(at, min(BLOCK, stop - at)), 0
            marked = b"Xing" in block or b"Info" in block
        second, third = block[offset + 1], block[offset + 2]
        frame = frames.get(second << 8 | third) if block[offset] == 0xFF else None
        first = first or (second & 0xFE, third & 0x0C)
        if frame is None or (second & 0xFE, third & 0x0C) != first:
            if tag_size(block[offset : offset + 32]) or mpeg_chain(block, offset, 3)[0] > 2:
                return at, count, True
            after_junk = find_mpeg(read(at + 1, min(BLOCK >> 4, stop - at - 1)))
            at += BLOCK >> 4 if after_junk is None else 1 + after_junk
            continue
        if marked and count and declared_size(block[offset : offset + 192])[0]:
            return at, count, True
        at += frame[0]
        count += 1
    return min(at, stop), count, frame is None or at <= stop
