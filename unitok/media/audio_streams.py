"""Find the audio streams of a file, and check that they have the length that their headers declare.

libsndfile does not report missing data: of half a file it returns half, of two concatenated files the first, and for a variable
bit rate MP3 without a header it estimates the length. So chunk sizes, Ogg pages, MPEG frames and the last frame of FLAC are
checked here first. Each stream can be opened as a file of its own (`SourcePart`), with a corrected header if it was written
before the length was known.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from unitok.media.byte_source import BLOCK, ByteSource, Order
from unitok.media.flac import is_one_stream, last_sample
from unitok.media.mpeg import begins_stream, declared_size, find_mpeg, mpeg_frames, tag_size, walk_frames, xing_header
from unitok.media.wav import Pcm, find_pcm

#: Bytes by which a declared size may be wrong: some programs include the header or padding.
SLACK = 64
#: 32-bit sizes from here on mean "unknown": all ones, and what sox and others write to a pipe.
_UNKNOWN = 0x7FFFF000
#: Samples of the longest two blocks of Vorbis.
_VORBIS_TAIL = 2 * 8192
#: Samples to decode before Opus and MP3 are exact: half a second; the smallest frames that fill a bit reservoir of 511 bytes.
_OPUS_PREROLL, _MPEG_PREROLL = 24_000, 32 * 1152


@dataclass(frozen=True)
class Stream:
    """A stream in a source: bytes [start, stop) after a header `head`; and numbers of samples per channel. `preroll` and `tail`
    are for positions where libsndfile 1.2.2 seeks wrongly."""

    start: int
    stop: int
    head: bytes = b""
    frames: int = 0  # the length, if libsndfile cannot know it
    preroll: int = 0  # to decode before a position (bit reservoir of MP3, prediction of Opus)
    tail: int = 0  # at the end, where seeking goes wrong, as it does after the first seek (Vorbis)
    pcm: Pcm | None = None  # where its samples are, if they need no decoding


class CutOff(Exception):
    """A file ends before its audio does. declared, present: seconds; 0 if unknown. fraction: of the bytes that are present."""

    def __init__(self, declared: float = 0.0, present: float = 0.0, fraction: float = 0.0):
        self.declared, self.present, self.fraction = declared, present, fraction


def streams_of(source: ByteSource) -> list[Stream]:
    """Return the streams of a file in order; all of the file, for libsndfile to open, if its format is not known here. Errors:
    `CutOff`."""
    if pcm := find_pcm(source):
        return [Stream(0, source.size, pcm=pcm)]
    return _find_streams(source, source.read(0, 4096)) or [Stream(0, source.size)]


def _find_streams(source: ByteSource, head: bytes) -> list[Stream]:
    if head[:4] == b"OggS":
        return _ogg(source)
    if head[:4] == b"fLaC":
        return _flac(source, 0)
    for magic, extent in _EXTENTS.items():
        if head.startswith(magic):
            return _chunks(source, extent)
    if (at := find_mpeg(head)) is None:
        return []
    while size := tag_size(source.read(at, 32)):
        at += size
    return _flac(source, at) if source.read(at, 4) == b"fLaC" else _mpeg(source, at, source.size)


# ---- Chunks with sizes: WAV, AIFF, CAF, AU and others ---------------------------------------------------------------


@dataclass
class Extent:
    """The position and size in bytes of the samples in a container."""

    start: int
    size: int
    end: int = 0  # of the container; 0: the end of the samples
    open: bool = False  # written to a pipe, without a length
    head: bytes = b""  # corrected header up to the samples, if libsndfile would read no samples otherwise
    mpeg: bool = False  # the samples are an MP3 stream


#: (source, begin of a container, its latest possible end) -> its extent; None if it has no samples.
FindExtent = Callable[[ByteSource, int, int], Extent | None]


def _chunks(source: ByteSource, find_extent: FindExtent) -> list[Stream]:
    at, end, magic = 0, source.size, source.read(0, 4)
    streams: list[Stream] = []
    while (extent := find_extent(source, at, end)) and extent.start > at:
        size = max(0, extent.size)
        if (missing := extent.start + size - end) > SLACK:
            raise CutOff(fraction=max(0, size - missing) / max(1, size))
        stop = min(end, max(extent.end, extent.start + size))
        if extent.open and (following := source.find(source.read(at, 12), extent.start, end)) > 0:  # another one begins there
            end = following
            continue
        if extent.mpeg:
            streams += _mpeg(source, extent.start, min(stop, extent.start + size))
        elif magic == b"BW64":  # the later name of RF64
            streams.append(Stream(at + 4, stop, b"RF64"))
        else:
            streams.append(Stream(at + len(extent.head), stop, extent.head))
        more = source.read(stop, 5)  # perhaps after a padding byte
        if magic not in (more[:4], more[1:]) or stop < extent.start:
            break
        at, end = stop + (more[:4] != magic), source.size
    return [Stream(0, source.size)] if len(streams) == 1 and streams[0].start == 0 else streams


def _chunks_of_iff(source: ByteSource, position: int, order: Order) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name, begin and size of each chunk from a position on, in formats with a name and a 32-bit size before each."""
    while len(chunk := source.read(position, 8)) == 8:
        size = int.from_bytes(chunk[4:], order)
        yield chunk[:4], position + 8, size
        position += 8 + size + size % 2


def _riff(source: ByteSource, at: int, stop: int) -> Extent | None:
    order: Order = "big" if source.read(at, 4) == b"RIFX" else "little"
    form, wide, tag = source.number(at + 4, 4, order), 0, 0
    for name, start, size in _chunks_of_iff(source, at + 12, order):
        if name == b"ds64":
            form, wide = source.number(start, 8), source.number(start + 8, 8)
        elif name == b"fmt ":
            tag = source.number(start, 2, order)
        elif name == b"data":
            end = at + 8 + form if 0 < form < _UNKNOWN or wide else 0
            size = wide if wide and size == 0xFFFFFFFF else size
            head = b""
            if not size and stop > start and not re.match(rb"[ -~]{4}", source.read(start, 4)):  # no chunk follows
                head = source.read(at, 4) + b"\xff" * 4 + source.read(at + 8, start - at - 12) + b"\xff" * 4
            unknown = bool(head) or (size >= _UNKNOWN and not wide and start + size > stop + SLACK)
            if unknown:
                size, end = stop - start, stop
            return Extent(start, size, end, unknown, head, tag in (0x50, 0x55))
    return None


def _iff(source: ByteSource, at: int, stop: int) -> Extent | None:
    form = source.number(at + 4, 4, "big")
    for name, start, size in _chunks_of_iff(source, at + 12, "big"):
        if name in (b"SSND", b"BODY"):
            skip = 8 if name == b"SSND" else 0
            if not 0 < form < _UNKNOWN:  # libsndfile reads to the end
                return Extent(start + skip, stop - start - skip, stop, open=True)
            return Extent(start + skip, max(0, size - skip), at + 8 + form)
    return None


def _caf(source: ByteSource, at: int, stop: int) -> Extent | None:
    position, extent = at + 8, None
    while len(chunk := source.read(position, 12)) == 12 and chunk[:4] != b"caff":
        size = int.from_bytes(chunk[4:], "big", signed=True)
        if chunk[:4] == b"data":
            if size < 0:
                size = stop - position - 12
                head = source.read(at, position + 4 - at) + size.to_bytes(8, "big") + bytes(4)
                return Extent(position + 16, size - 4, open=True, head=head)
            extent = Extent(position + 16, size - 4)
        elif size < 0:
            break
        position += 12 + size
        if extent:
            extent.end = position
    return extent


def _w64(source: ByteSource, at: int, stop: int) -> Extent | None:
    form, position = source.number(at + 16, 8), at + 40
    while len(chunk := source.read(position, 24)) == 24:
        size = int.from_bytes(chunk[16:], "little")
        if chunk[:4] == b"data" and size < 1 << 62:
            return Extent(position + 24, size - 24, at + form)
        if chunk[:4] == b"data":
            size = stop - position
            head = source.read(at, 16) + (stop - at).to_bytes(8, "little") + source.read(at + 24, position - at - 8)
            return Extent(position + 24, size - 24, open=True, head=head + size.to_bytes(8, "little"))
        position += max(24, -(-size // 8) * 8)
    return None


def _au(source: ByteSource, at: int, stop: int) -> Extent | None:
    order: Order = "big" if source.read(at, 1) == b"." else "little"
    start, size = at + source.number(at + 4, 4, order), source.number(at + 8, 4, order)
    return Extent(start, stop - start if size >= _UNKNOWN else size, open=size >= _UNKNOWN)


def _nist(source: ByteSource, at: int, stop: int) -> Extent | None:
    head = source.read(at, 1024)
    fields = [re.search(rb"%b -i (\d+)" % name, head) for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    count, channels, width = (int(m[1]) if m else 1 for m in fields)
    size = re.match(rb"NIST_1A\n *(\d+)\n", head)
    return Extent(at + int(size[1]), count * channels * width) if size and fields[0] else None


def _fixed(header: int, size: Callable[[ByteSource, int], int]) -> FindExtent:
    return lambda source, at, stop: Extent(at + header, size(source, at))


def _sds(source: ByteSource, at: int, stop: int) -> Extent | None:
    """MIDI sample dump: packets of 127 bytes with 120 bytes of samples, of 7 bits each."""
    bits, length = source.number(at + 6, 1), sum(b << 7 * i for i, b in enumerate(source.read(at + 10, 3)))
    return Extent(at + 21, -(-length // (120 // -(-bits // 7))) * 127) if 0 < bits <= 28 else None


_EXTENTS: dict[bytes, FindExtent] = {
    **dict.fromkeys((b"RIFF", b"RIFX", b"RF64", b"BW64"), _riff),
    b"FORM": _iff,
    b"caff": _caf,
    b"riff": _w64,
    b".snd": _au,
    b"dns.": _au,
    b"NIST_1A": _nist,
    b"\xf0\x7e": _sds,
    b"\x01\x04": _fixed(42, lambda s, at: 2 * s.number(at + 30, 4) * (1 + s.number(at + 21, 1))),  # MPC2K
    b"ALawSoundFile": _fixed(32, lambda s, at: s.number(at + 18, 4, "big")),
    b"2BIT": _fixed(
        128, lambda s, at: s.number(at + 26, 4, "big") * (s.number(at + 14, 2, "big") // 8) * (1 + (s.read(at + 12, 1) > b"\0"))
    ),
}


# ---- Ogg ------------------------------------------------------------------------------------------------------------


@dataclass
class _Link:
    """One of a chain of Ogg streams: its begin in bytes, its rate in Hz, and the samples up to its last page and the page
    before."""

    start: int
    rate: int
    vorbis: bool
    before: int = 0
    length: int = 0


def _ogg(source: ByteSource) -> list[Stream]:
    """Return one stream per link of a chain of Ogg streams (RFC 3533). Each must have a complete last page."""
    links: list[_Link] = []
    unfinished: set[bytes] = set()
    at, first = 0, False
    while at < source.size:
        page = source.read(at, 282)
        if page[:4] != b"OggS" or len(page) < 27:
            if (at := source.find(b"OggS\0", at + 1, source.size)) < 0:  # junk at the end
                break
            continue
        stop = at + 27 + page[26] + sum(page[27 : 27 + page[26]])
        serial, flags, position = page[14:18], page[5], int.from_bytes(page[6:14], "little", signed=True)
        if flags & 2:  # the first page of a stream; those of multiplexed streams are adjacent
            packet = page[27 + page[26] :]
            vorbis = packet[:7] == b"\x01vorbis"
            if not first:
                if unfinished:
                    break
                rate = int.from_bytes(packet[12:16], "little") if vorbis else 48_000 if packet[:8] == b"OpusHead" else 0
                links.append(_Link(at, rate, vorbis))
            unfinished.add(serial)
        first = bool(flags & 2)
        if stop > source.size:
            unfinished.add(serial)
            break
        if links and position > links[-1].length:
            links[-1].before, links[-1].length = links[-1].length, position
        if flags & 4:
            unfinished.discard(serial)
        at = stop
    if unfinished:
        raise CutOff(present=sum(link.length / link.rate for link in links if link.rate))
    stops = [*(link.start for link in links[1:]), source.size]
    tails = [_VORBIS_TAIL + link.length - link.before if link.vorbis else 0 for link in links]
    return [
        Stream(k.start, stop, preroll=0 if tail else _OPUS_PREROLL, tail=tail) for k, stop, tail in zip(links, stops, tails)
    ]


# ---- FLAC -----------------------------------------------------------------------------------------------------------


def _flac(source: ByteSource, at: int) -> list[Stream]:
    """Return consecutive FLAC streams; the length of one that was written to a pipe comes from its last frame (RFC 9639)."""
    info = source.read(at + 8, 34)
    rate = int.from_bytes(info[10:13], "big") >> 4
    total = int.from_bytes(info[13:18], "big") & (1 << 36) - 1
    block, following = int.from_bytes(info[:2], "big"), -1
    present = last_sample(source, at + 42, source.size, block)
    if present != total or not is_one_stream(source, at + 42, source.size, block):  # perhaps because another stream follows
        following = source.find(b"fLaC\0\0\0\x22", at + 42, source.size)
    stop = source.size if following < 0 else following
    present = present if following < 0 else last_sample(source, at + 42, stop, block)
    if total and present < total:
        raise CutOff(total / max(1, rate), present / max(1, rate))
    if not total and not present:
        raise CutOff()
    bits = int.from_bytes(info[13:18], "big") | present
    head = b"" if total else source.read(at, 21) + bits.to_bytes(5, "big")
    return [Stream(at + len(head), stop, head), *(_flac(source, following) if following >= 0 else [])]


# ---- MPEG -----------------------------------------------------------------------------------------------------------


def _mpeg(source: ByteSource, start: int, stop: int) -> list[Stream]:
    """Return consecutive MPEG audio streams. If a stream has no Xing, Info or VBRI header that fits, its frames are counted,
    and it gets a Xing header."""
    at = start
    while size := tag_size(source.read(at, 32)):
        at += size
    junk = find_mpeg(source.read(at, BLOCK >> 4))
    if junk is None:
        return []
    at += junk
    end = _without_tags(source, at, stop)
    frame = source.read(at, 192)
    size, samples, rate = mpeg_frames()[frame[1] << 8 | frame[2]]
    frames, length = declared_size(frame)
    if frames and length > size and at + length <= end:
        rest = at + length
        if not begins_stream(source.read(rest, min(8192, end - rest))):
            return [Stream(*((0, stop) if start == 0 else (at, rest)), preroll=_MPEG_PREROLL)]
        return [Stream(at, rest, preroll=_MPEG_PREROLL), *_mpeg(source, rest, stop)]
    last, count, complete = walk_frames(source.read, at, end)
    count -= bool(frames)  # the frame of the header has no audio
    if frames > count + 1 or not complete:
        raise CutOff(frames * samples / rate, (count - (not complete)) * samples / rate)
    following = _mpeg(source, last, stop) if end - last > 4 else []
    head, length = b"", 0
    if not frames or count > frames + 1:
        if frame[1] & 6 != 2:  # layers I and II
            length = count * samples
        else:
            at += size if frames else 0
            head = xing_header(source.read(at, 4), count, last - at)
    return [Stream(at, last, head, length, _MPEG_PREROLL), *following]


def _without_tags(source: ByteSource, start: int, stop: int) -> int:
    """Return the end of the audio before tags at the end of a file: ID3v1, APEv2, Lyrics3."""
    while True:
        tail = source.read(max(start, stop - 160), min(160, stop - start))
        if tail[-128:-125] == b"TAG":
            stop -= 128
        elif tail[-32:-24] == b"APETAGEX":
            stop -= max(32, int.from_bytes(tail[-20:-16], "little")) + 32 * (tail[-9] >> 7)
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            stop -= int(tail[-15:-9]) + 15
        else:
            return max(start, stop)
