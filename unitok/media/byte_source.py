"""The bytes of a file, on disk or in memory, read at any place; and part of them as a file of its own."""

import io
from pathlib import Path
from typing import Literal

Order = Literal["little", "big"]

#: Bytes that are looked through at once.
BLOCK = 1 << 20


class ByteSource:
    """The bytes of a file: of `path`, or `data`."""

    def __init__(self, path: Path, data: bytes | None = None):
        self.file = open(path, "rb", buffering=0) if data is None else io.BytesIO(data)
        self.size = self.file.seek(0, io.SEEK_END)

    def read(self, start: int, size: int) -> bytes:
        if start >= self.size or size <= 0:
            return b""
        self.file.seek(start)
        return self.file.read(size)

    def number(self, start: int, size: int, order: Order = "little") -> int:
        return int.from_bytes(self.read(start, size), order)

    def find(self, what: bytes, start: int, stop: int) -> int:
        """Where `what` first begins in a stretch, or -1."""
        while start < stop:
            block = self.read(start, min(BLOCK, stop - start))
            if (at := block.find(what)) >= 0:
                return start + at
            if len(block) < len(what):
                break
            start += len(block) - len(what) + 1
        return -1


class Stretch(io.RawIOBase):
    """Part of a source as a file of its own, behind a header that is not in it. It can be sent to places that it does not have:
    damaged headers name such places."""

    def __init__(self, source: ByteSource, head: bytes, start: int, stop: int):
        self.source, self.head, self.start = source, head, start
        self.size = len(head) + stop - start
        self.at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def, override]
        size = max(0, min(len(buffer), self.size - self.at))
        behind = max(0, self.at - len(self.head))
        data = self.head[self.at : self.at + size]
        data += self.source.read(self.start + behind, size - len(data))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)
