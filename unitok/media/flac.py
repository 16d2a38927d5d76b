"""FLAC: which samples the frames of a stream hold (RFC 9639). Headers alone are read, nothing is decoded."""

from unitok.media.byte_source import ByteSource

_REACH = 1 << 16
_PROBES = 12


def last_sample(source: ByteSource, start: int, stop: int, block: int) -> int:
    """Samples up to the end of the last frame that begins in bytes [start, stop) behind STREAMINFO; 0 where there is none.

    block: samples of a frame, where all have as many.
    """
    first = _first_frame(source, start)
    like, reach = source.read(first, 4), _REACH
    while len(like) == 4:
        data = source.read(max(first, stop - reach), min(reach, stop - first))
        at = len(data)
        while (at := data.rfind(like[:2], 0, at)) >= 0:
            if end := _frame_end(data[at : at + 16], like, block):
                return end
        if reach >= stop - first:
            return 0
        reach *= 16
    return 0


def rises(source: ByteSource, start: int, stop: int, block: int) -> bool:
    """Whether the samples that frames hold rise through bytes [start, stop): where they do not, another stream begins."""
    first = _first_frame(source, start)
    like, ends = source.read(first, 4), []
    for part in range(_PROBES):
        place, at = first + (stop - first) * part // _PROBES, -1
        data = source.read(place, min(_REACH, stop - place))
        while like and (at := data.find(like[:2], at + 1)) >= 0:
            if end := _frame_end(data[at : at + 16], like, block):
                ends.append(end)
                break
    return ends == sorted(ends)


def _first_frame(source: ByteSource, place: int) -> int:
    """Where the metadata blocks end that follow STREAMINFO."""
    last = source.read(place - 38, 1)[:1] >= b"\x80"
    while not last and len(block := source.read(place, 4)) == 4:
        last = block[0] >= 0x80
        place += 4 + int.from_bytes(block[1:], "big")
    return place


def _frame_end(header: bytes, like: bytes, block: int) -> int:
    """First sample behind a frame, by its header; 0 where none begins that is like the first one, or its checksum is wrong."""
    if len(header) < 8 or header[:2] != like[:2] or (header[2] ^ like[2] | header[3] ^ like[3]) & 15:  # rate, depth
        return 0
    size, lead = header[2] >> 4, header[4]
    extra = 0 if lead < 0x80 else 7 - (lead ^ 0xFF).bit_length()  # bytes that follow, coded as in UTF-8
    if size == 0 or extra > 6 or 0x80 <= lead < 0xC0:
        return 0
    number, at = lead & (1 << 6 - extra) - 1 if extra else lead, 5 + extra
    for byte in header[5:at]:
        number = number << 6 | byte & 0x3F
    if size in (6, 7):
        length = int.from_bytes(header[at : at + size - 5], "big") + 1
        at += size - 5
    else:
        length = 192 if size == 1 else 576 << size - 2 if size < 6 else 1 << size
    at += {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if at >= len(header) or _crc8(header[:at]) != header[at]:
        return 0
    return (number if header[1] & 1 else number * block) + length


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    return crc
