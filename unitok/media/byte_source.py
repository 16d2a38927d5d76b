"""Random access to the bytes of a file, on disk or in memory; and a part of them as a file of its own."""

import io
import os
from functools import cached_property
from pathlib import Path
from typing import IO, Literal

from unitok.storage import SMALL

Order = Literal["little", "big"]

#: Bytes that are searched at once.
BLOCK = 1 << 20


class ByteSource:
    """The bytes of the file at `path`, or `data`. size: number of bytes. Errors: `OSError`."""

    def __init__(self, path: Path, data: bytes | None = None):
        self.data = data
        if data is None:
            self.file = open(path, "rb", buffering=0)
        self.size = len(data) if data is not None else self.file.seek(0, io.SEEK_END)

    @cached_property
    def file(self) -> IO[bytes]:
        """The bytes as a file, which libraries read."""
        assert self.data is not None
        return _in_memory(self.data)

    def close(self) -> None:
        """Close the file, if there is one."""
        if "file" in self.__dict__:
            self.file.close()

    def read(self, start: int, size: int) -> bytes:
        """Return bytes [start, start + size), or fewer at the end of the file."""
        if start >= self.size or size <= 0:
            return b""
        if self.data is not None:
            return self.data[start : start + size]
        self.file.seek(start)
        data = self.file.read(size)
        while len(data) < size and (more := self.file.read(size - len(data))):  # the system may give less at a time
            data += more
        return data

    def number(self, start: int, size: int, order: Order = "little") -> int:
        """Return the unsigned integer in bytes [start, start + size)."""
        return int.from_bytes(self.read(start, size), order)

    def find(self, pattern: bytes, start: int, stop: int) -> int:
        """Return the first position of `pattern` in bytes [start, stop), or -1."""
        while start < stop:
            block = self.read(start, min(BLOCK, stop - start))
            if (at := block.find(pattern)) >= 0:
                return start + at
            if len(block) < len(pattern):
                break
            start += len(block) - len(pattern) + 1
        return -1


def _in_memory(data: bytes) -> IO[bytes]:
    """Bytes as a file: few of them with a descriptor, where the system has such files, so that libraries read them without calling Python."""
    if len(data) > SMALL or not hasattr(os, "memfd_create"):
        return io.BytesIO(data)
    file = open(os.memfd_create("unitok"), "r+b", buffering=0)
    file.write(data)
    return file


class SourcePart(io.RawIOBase):
    """Bytes [start, stop) of a source as a file of its own, after a header `head`. As damaged headers name positions beyond the
    end, `seek` goes there, too."""

    def __init__(self, source: ByteSource, head: bytes, start: int, stop: int):
        self.source, self.head, self.start = source, head, start
        self.size = len(head) + stop - start
        self.position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def, override]
        size = max(0, min(len(buffer), self.size - self.position))
        behind_head = max(0, self.position - len(self.head))
        data = self.head[self.position : self.position + size]
        data += self.source.read(self.start + behind_head, size - len(data))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
