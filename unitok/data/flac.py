"""FLAC: where a stream's last frame ends, in samples (RFC 9639). Headers alone are read, nothing is decoded."""

from unitok.data.byte_source import ByteSource


def flac_length(source: ByteSource, start: int, stop: int, block: int) -> int:
    """Samples up to the end of the last frame that begins in a stretch; 0 where there is none."""
    first = source.find(b"\xff", _first_frame(source, start), stop)
    sync = source.read(first, 2)
    reach = 1 << 16
    while True:
        data = source.read(max(first, stop - reach), min(reach, stop - first))
        at = len(data)
        while (at := data.rfind(sync, 0, at)) >= 0:
            if end := _frame_end(data[at : at + 16], block):
                return end
        if reach >= stop - first:
            return 0
        reach *= 16


def _first_frame(source: ByteSource, place: int) -> int:
    """Where the metadata blocks end that follow STREAMINFO."""
    last = source.read(place - 38, 1)[:1] >= b"\x80"
    while not last and len(block := source.read(place, 4)) == 4:
        last = block[0] >= 0x80
        place += 4 + int.from_bytes(block[1:], "big")
    return place


def _frame_end(header: bytes, block: int) -> int:
    """First sample behind a frame, by its header; 0 where none begins, or its checksum is wrong."""
    if len(header) < 6 or header[0] != 0xFF or header[1] & 0xFC != 0xF8:
        return 0
    lead = header[4]
    extra = 0 if lead < 0x80 else 8 - (lead ^ 0xFF).bit_length() - 1
    if extra < 0 or extra > 6:
        return 0
    number = lead & (1 << 6 - extra) - 1 if extra else lead
    for byte in header[5 : 5 + extra]:
        number = number << 6 | byte & 0x3F
    at, size = 5 + extra, header[2] >> 4
    if size == 6:
        length, at = header[at] + 1, at + 1
    elif size == 7:
        length, at = int.from_bytes(header[at : at + 2], "big") + 1, at + 2
    else:
        length = 192 if size == 1 else 576 << size - 2 if size < 6 else 1 << size
    at += {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if size == 0 or _crc8(header[:at]) != header[at]:
        return 0
    return (number if header[1] & 1 else number * block) + length


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    return crc
