"""FLAC: the number of samples in a stream, from the headers of its frames (RFC 9639). Nothing is decoded."""

from unitok.media.byte_source import ByteSource

_REACH = 1 << 16
_PROBES = 12


def last_sample(source: ByteSource, start: int, stop: int, block: int) -> int:
    """Return the number of samples up to the end of the last frame that begins in bytes [start, stop), where `start` is the end
    of STREAMINFO; 0 if there is no frame.

    block: samples per frame, if all have the same number.
    """
    first = _first_frame(source, start)
    model, reach = source.read(first, 4), _REACH
    while len(model) == 4:
        data = source.read(max(first, stop - reach), min(reach, stop - first))
        at = len(data)
        while (at := data.rfind(model[:2], 0, at)) >= 0:
            if end := _frame_end(data[at : at + 16], model, block):
                return end
        if reach >= stop - first:
            return 0
        reach *= 16
    return 0


def is_one_stream(source: ByteSource, start: int, stop: int, block: int) -> bool:
    """Whether the sample numbers of frames increase throughout bytes [start, stop); if not, a second stream begins there."""
    first = _first_frame(source, start)
    model, ends = source.read(first, 4), []
    for part in range(_PROBES):
        position, at = first + (stop - first) * part // _PROBES, -1
        data = source.read(position, min(_REACH, stop - position))
        while model and (at := data.find(model[:2], at + 1)) >= 0:
            if end := _frame_end(data[at : at + 16], model, block):
                ends.append(end)
                break
    return ends == sorted(ends)


def _first_frame(source: ByteSource, position: int) -> int:
    """Return the end of the metadata blocks. position: the end of STREAMINFO."""
    last = source.read(position - 38, 1)[:1] >= b"\x80"
    while not last and len(block := source.read(position, 4)) == 4:
        last = block[0] >= 0x80
        position += 4 + int.from_bytes(block[1:], "big")
    return position


def _frame_end(header: bytes, model: bytes, block: int) -> int:
    """Return the number of the first sample after a frame, from its header; 0 if no frame with the rate and depth of `model`,
    the first header of the stream, begins here, or if its checksum is wrong."""
    if len(header) < 8 or header[:2] != model[:2] or (header[2] ^ model[2] | header[3] ^ model[3]) & 15:  # rate, depth
        return 0
    size, lead = header[2] >> 4, header[4]
    extra = 0 if lead < 0x80 else 7 - (lead ^ 0xFF).bit_length()  # bytes that follow, encoded as in UTF-8
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
