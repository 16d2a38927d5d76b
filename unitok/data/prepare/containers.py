"""Files that hold many documents: archives and tables; and compressed files.

Damage is told, and what comes before it is given, and after it where a container goes on. A disk or server that fails is not
damage: it stops the run, or a passing fault would be planned as the end of the file.
"""

import bz2
import gzip
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from unitok.errors import UserError, first_line
from unitok.storage import MAX_BYTES, Blob, Files, printable

#: What reading a damaged file raises.
_OF_BYTES = (EOFError, OSError, lzma.LZMAError, zlib.error)
DAMAGE = (*_OF_BYTES, tarfile.TarError, pa.ArrowException, ValueError, KeyError, AttributeError)


def damage(error: BaseException, where: str) -> str:
    """What an error of `DAMAGE` says; errors: `UserError` where it is no damage, but a disk or server that fails."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
        raise UserError(f"{where}: cannot be read to its end ({error.strerror}); try again, or leave it out") from None
    return first_line(error)


def is_tar(head: bytes) -> bool:
    """Whether a file's first 512 bytes are the header of an archive's member, by its magic or (in old formats) its checksum."""
    try:
        return head[257:262] == b"ustar" or bool(tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape"))
    except tarfile.HeaderError:
        return False


def unpacked(file: IO[bytes]) -> IO[bytes]:
    """A file, decompressed if its first bytes say that it is compressed."""
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if head.startswith(b"BZh"):
        return bz2.BZ2File(file)  # type: ignore[return-value]
    return lzma.LZMAFile(file) if head.startswith(b"\xfd7zXZ\x00") else file  # type: ignore[return-value]


def plain_name(name: str) -> str:
    """A file's name without the suffix that says how it is compressed."""
    return re.sub(r"\.(gz|bz2|xz)$", "", name, flags=re.IGNORECASE)


@contextmanager
def opened(files: Files, name: str) -> Iterator[tuple[IO[bytes], bool]]:
    """A file of a source, unpacked, and whether it was compressed."""
    with closing(files.open(name)) as packed, closing(unpacked(packed)) as file:
        yield file, file is not packed


# ---- Archives -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A file of an archive: its bytes are `[start, start + length)` of the unpacked archive; or why it is refused."""

    name: str
    start: int = 0
    length: int = 0
    problem: str = ""


def list_members(file: IO[bytes], compressed: bool) -> Iterator[Member]:
    """The members of a tar in order, those refused and damaged stretches too; folders and hidden files are left out.

    Archives that were put one after another are read to the last one. Errors: `DAMAGE` where the rest cannot be read.
    """
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", ignore_zeros=True) as archive:
        at = 0  # where the last member ended
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # or all of them would be kept
            if member.size < 0 or member.offset < at:
                raise tarfile.ReadError("a damaged header")
            if not compressed and not _empty(file, at, member.offset):
                yield Member("", problem=f"damaged: bytes {at} to {member.offset} are no member")
            at = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            name = member.name.removeprefix("./")
            if why := _problem(member, name):
                yield Member(printable(name), problem=why)
                if member.size > MAX_BYTES and compressed:
                    raise tarfile.ReadError("what is after it would have to be unpacked first")
            elif not member.isdir() and not name.rsplit("/", 1)[-1].startswith("."):
                yield Member(name, member.offset_data, member.size)
        if not compressed and not _empty(file, at, file.seek(0, os.SEEK_END)):
            raise tarfile.ReadError("what is after it is no member")


def _empty(file: IO[bytes], start: int, stop: int) -> bool:
    """Whether bytes between members are zeros, or a header that holds for all (as of git's archives)."""
    while start < stop:
        file.seek(start)
        block = file.read(min(stop - start, 1 << 20))
        if not block or (any(block) and block[156:157] != b"g"):
            return not block
        start += len(block)
    return True


def _problem(member: tarfile.TarInfo, name: str) -> str:
    if printable(name) != name:
        return "its name is not UTF-8: refused"
    if name.startswith("/") or ".." in name.split("/"):
        return "leaves the archive: refused"
    if member.issym() or member.islnk():
        return "a link: not followed"
    if not member.isdir() and (not member.isfile() or member.issparse()):
        return "neither a file nor a folder"
    return f"{member.size} bytes are too many (limit {MAX_BYTES})" if member.size > MAX_BYTES else ""


# ---- Tables ---------------------------------------------------------------------------------------------------------


class Table:
    """A Parquet file, an Arrow file as Hugging Face `datasets` saves it, or CSV (a header, then text): rows of named columns."""

    BATCH = 32  # rows held at once

    def __init__(self, files: Files, name: str):
        self.files, self.name = files, name
        self.bad_rows: list[tuple[str, str]] = []  # of CSV: why each is none, and its text
        self._file = file = files.open(name)
        plain = name.lower()
        self._parquet = pq.ParquetFile(file) if plain.endswith(".parquet") else None
        if self._parquet is not None:
            self.rows, self.schema = self._parquet.metadata.num_rows, self._parquet.schema_arrow
        else:
            self._table = self._read_arrow() if plain.endswith(".arrow") else self._read_csv()
            self.rows, self.schema = self._table.num_rows, self._table.schema
        self.features = _features((self.schema.metadata or {}).get(b"huggingface", b"{}"))

    def _read_arrow(self) -> pa.Table:
        local = self.files.remote is None
        source = pa.memory_map(str(self.files.local(self.name))) if local else pa.PythonFile(self._file, mode="r")
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_file(source).read_all()

    def _read_csv(self) -> pa.Table:
        """A header, then text; the separator is the header's most frequent of comma, tab, semicolon, bar."""
        with closing(unpacked(self._file)) as file:
            data = file.read()

        def note(row: pa_csv.InvalidRow) -> str:
            why = f"{row.actual_columns} columns where the header has {row.expected_columns}"
            self.bad_rows.append((f"{why} ({row.text[:80]!r})", row.text))
            return "skip"

        head = data.partition(b"\n")[0]
        separator = max(",", "\t", ";", "|", key=lambda c: head.count(c.encode()))
        how = pa_csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=note)
        with pa_csv.open_csv(pa.py_buffer(data), parse_options=how) as reader:
            kinds = {name: pa.string() for name in reader.schema.names}
        self.bad_rows.clear()
        convert = pa_csv.ConvertOptions(column_types=kinds, strings_can_be_null=False)
        return pa_csv.read_csv(pa.py_buffer(data), parse_options=how, convert_options=convert)

    def close(self) -> None:
        """Rows that were given stay good."""
        self._file.close()

    def listed(self, names_media: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
        """For each row the document's id (a column `id`, `key` or `__key__`, or else file and row), and the columns of text
        that name files."""
        texts = {f.name for f in self.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)}
        whole = {f.name for f in self.schema if pa.types.is_integer(f.type)}
        ids = [name for name in ("id", "__key__", "key") if name in texts | whole][:1]
        named = [name for name in self.schema.names if name in texts and names_media(name)]
        columns = [*dict.fromkeys(ids + named)]
        if not columns:
            yield from ((f"{self.name}/{row}", {}) for row in range(self.rows))
            return
        if self._parquet is not None:
            batches = self._parquet.iter_batches(8192, columns=columns, use_threads=False)
        else:
            batches = self._table.select(columns).to_batches()
        for row, cells in enumerate(cells for batch in batches for cells in batch.to_pylist()):
            id = cells[ids[0]] if ids else None
            yield f"{self.name}/{row}" if id is None else str(id), {name: cells[name] for name in named}

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, Callable[[], Iterator[pa.RecordBatch]]]]:
        """What holds the rows `start` to `stop`: number of the first row, how many, and what reads them a few at a time."""
        if self._parquet is None:
            part = self._table.slice(start, stop - start)
            yield start, part.num_rows, partial(_validated, part.to_batches(max_chunksize=self.BATCH))
            return
        at = 0
        for group in range(self._parquet.metadata.num_row_groups):
            count = self._parquet.metadata.row_group(group).num_rows
            if at < stop and at + count > start:
                yield at, count, partial(self._parquet.iter_batches, self.BATCH, [group], use_threads=False)
            at += count

    def fields(self, batch: pa.RecordBatch, row: int, where: str) -> dict[str, Any]:
        """A row as named fields: pictures and sounds as blobs, class labels by their names."""
        return {
            name: self._value(batch.column(i)[row].as_py(), f"{where}/{name}", self.features.get(name))
            for i, name in enumerate(batch.schema.names)
        }

    def _value(self, value: Any, where: str, feature: Any) -> Any:
        if isinstance(value, bytes):
            return Blob(where, value)
        if isinstance(value, list):
            several = feature if isinstance(feature, list) else [feature.get("feature")] if isinstance(feature, dict) else []
            inner = several[0] if several else None
            return [self._value(v, f"{where}/{i}", inner) for i, v in enumerate(value)]
        if isinstance(value, dict):
            if {"bytes"} < set(value) <= {"bytes", "path", "sampling_rate"}:
                if value["bytes"] is not None:
                    return Blob(where, value["bytes"])
                beside = os.path.normpath(os.path.join(os.path.dirname(self.name), value.get("path") or ""))
                return Blob.of(self.files, beside) if value.get("path") else None
            return {k: self._value(v, f"{where}/{k}", None) for k, v in value.items()}
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(value, int) and value >= 0:
            return feature["names"][value] if feature.get("names") else value
        return value


def _validated(batches: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        batch.validate(full=True)  # Arrow files are mapped as they are
        yield batch


def _features(text: bytes) -> dict[str, Any]:
    """The kinds of columns that Hugging Face `datasets` writes beside a schema."""
    found = json.loads(text)
    for key in ("info", "features"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
