"""Files that hold many documents: archives and tables; compressed files.

Damage is reported. What comes before it is still read, and so is what comes after it, where the format allows. A disk or server
that fails is not damage: it stops the run, because a temporary fault must not be listed as the end of a file.
"""

import bz2
import gzip
import io
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
from typing import IO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from unitok.data.prepare.fields import is_media, names_media
from unitok.errors import UserError, first_line
from unitok.storage import MAX_BYTES, Blob, Files, printable

#: What reading a damaged file raises.
_OF_BYTES = (EOFError, OSError, lzma.LZMAError, zlib.error)
DAMAGE = (*_OF_BYTES, tarfile.TarError, pa.ArrowException, ValueError, KeyError, AttributeError)


def damage(error: BaseException, where: str) -> str:
    """An error of `DAMAGE` in words. Errors: `UserError` where a disk or server failed, which is not damage."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
        raise UserError(f"{where}: cannot be read to its end ({error.strerror}); try again, or leave it out") from None
    return first_line(error)


def is_tar(head: bytes) -> bool:
    """Whether a file's first 512 bytes are the header of a tar archive's member, by its magic or (in old formats) its checksum."""
    try:
        return head[257:262] == b"ustar" or bool(tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape"))
    except tarfile.HeaderError:
        return False


def unpacked(file: IO[bytes]) -> IO[bytes]:
    """A file, decompressed if its first bytes are those of gzip, bzip2 or xz."""
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if head.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(file))
    return cast(IO[bytes], lzma.LZMAFile(file)) if head.startswith(b"\xfd7zXZ\x00") else file


def plain_name(name: str) -> str:
    """A file's name without the suffix of its compression."""
    return re.sub(r"\.(gz|bz2|xz)$", "", name, flags=re.IGNORECASE)


@contextmanager
def opened(files: Files, name: str) -> Iterator[tuple[IO[bytes], bool]]:
    """A file of a source, decompressed, and whether it was compressed."""
    with closing(files.open(name)) as packed, closing(unpacked(packed)) as file:
        yield file, file is not packed


# ---- Archives -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A file of an archive: its bytes are `[start, start + length)` of the decompressed archive; or the reason why it is refused."""

    name: str
    start: int = 0
    length: int = 0
    problem: str = ""


def list_members(file: IO[bytes], compressed: bool) -> Iterator[Member]:
    """The members of a tar in order, with refused members and damaged stretches; without folders and hidden files.

    Concatenated archives are read to the end of the last one. Errors: `DAMAGE` where the rest cannot be read.
    """
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", ignore_zeros=True) as archive:
        end = 0  # of the last member
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # or all of them would be kept
            if member.size < 0 or member.offset < end:
                raise tarfile.ReadError("a damaged header")
            if not compressed and not _empty(file, end, member.offset):
                yield Member("", problem=f"damaged: bytes {end} to {member.offset} are not a member")
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            name = member.name.removeprefix("./")
            if problem := _problem(member, name):
                yield Member(printable(name), problem=problem)
                if member.size > MAX_BYTES and compressed:
                    raise tarfile.ReadError("what comes after it cannot be reached without decompressing it")
            elif not member.isdir() and not name.rsplit("/", 1)[-1].startswith("."):
                yield Member(name, member.offset_data, member.size)
        if not compressed and not _empty(file, end, file.seek(0, os.SEEK_END)):
            raise tarfile.ReadError("what comes after it is not a member")


def _empty(file: IO[bytes], start: int, stop: int) -> bool:
    """Whether the bytes between members are zeros, or a global header (as in git's archives)."""
    while start < stop:
        file.seek(start)
        block = file.read(min(stop - start, 1 << 20))
        if not block or (any(block) and block[156:157] != b"g"):
            return not block
        start += len(block)
    return True


def _problem(member: tarfile.TarInfo, name: str) -> str:
    """The reason why a member is refused, or ""."""
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

#: Between the cells of a CSV file.
SEPARATORS = (",", "\t", ";", "|")


class Table:
    """Rows of named columns: Parquet, Arrow as Hugging Face `datasets` saves it, or CSV (a header, then text)."""

    BATCH = 32  # rows held at once
    BLOCK = 64 << 20  # bytes of a CSV file that are parsed at once: no row may be longer

    def __init__(self, files: Files, name: str):
        self.files, self.name = files, name
        self.bad_rows: list[tuple[str, str]] = []  # of CSV: what is wrong with it, and its text
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
        """A CSV file; its separator is the most frequent one of the header: comma, tab, semicolon or bar.

        Between tabs quotes are mostly parts of texts, as in Common Voice, where one at the start of a sentence ends nowhere. So they enclose only
        whole cells there, unless a cell that they enclose has tabs or line breaks in it.
        """
        with closing(unpacked(self._file)) as file:
            data = file.read()

        def note(row: pa_csv.InvalidRow) -> str:
            problem = f"{row.actual_columns} columns where the header has {row.expected_columns}"
            self.bad_rows.append((f"{problem} ({row.text[:80]!r})", row.text))
            return "skip"

        head = data.partition(b"\n")[0]
        separator = max(SEPARATORS, key=lambda c: head.count(c.encode()))
        first = head.decode("utf-8-sig", "replace").partition(separator)[0].strip('" ')
        if re.search(r"\w\.\w+$", first) and is_media(first):
            raise UserError(
                f"{self.name}: its first line names {printable(first)}: put the names of its columns above, such as file_name,text"
            )
        literal = separator == "\t" and all(line.count(b"\t") == head.count(b"\t") for line in io.BytesIO(data) if b'"' in line)
        parse_options = pa_csv.ParseOptions(
            delimiter=separator, quote_char=False if literal else '"', newlines_in_values=True, invalid_row_handler=note
        )
        read_options = pa_csv.ReadOptions(block_size=self.BLOCK)
        with pa_csv.open_csv(pa.py_buffer(data), read_options=read_options, parse_options=parse_options) as reader:
            kinds = {name: pa.string() for name in reader.schema.names}
        self.bad_rows.clear()
        convert = pa_csv.ConvertOptions(column_types=kinds, strings_can_be_null=False)
        table = pa_csv.read_csv(pa.py_buffer(data), read_options, parse_options, convert)
        names = table.column_names
        if literal:
            table, names = pa.table([*map(_unquoted, table.columns)], names=names), _unquoted(pa.array(names)).to_pylist()
        return table.rename_columns([name.strip() for name in names])

    def close(self) -> None:
        """Close the file; rows that were read stay valid."""
        self._file.close()

    def listed(self, names_media: Callable[[str], bool], group: str = "") -> Iterator[tuple[str, dict[str, object]]]:
        """For each row the document's id (of a column `id`, `key` or `__key__`, or else file and row), and the columns that
        `names_media` chooses by name, of those of text; and the column `group`, or of a `group` with dots that of the record."""
        texts = {f.name for f in self.schema if _holds_text(f.type)}
        numbers = {f.name for f in self.schema if pa.types.is_integer(f.type)}
        ids = [name for name in ("id", "__key__", "key") if name in texts | numbers][:1]
        grouped = group if group in self.schema.names else group.partition(".")[0]
        named = [name for name in self.schema.names if name == grouped or (name in texts and names_media(name))]
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

    def stretches(
        self, start: int, stop: int, texts_only: bool = False
    ) -> Iterator[tuple[int, int, Callable[[], Iterator[pa.RecordBatch]]]]:
        """The parts of the table that hold the rows `start` to `stop`: first row, number of rows, and what reads a few at a time.

        texts_only: leave out columns with names of media, unless they hold texts.
        """
        columns = [f.name for f in self.schema if not (texts_only and names_media(f.name)) or _holds_text(f.type)]
        if self._parquet is None:
            part = self._table.select(columns).slice(start, stop - start)
            yield start, part.num_rows, partial(_validated, part.to_batches(max_chunksize=self.BATCH))
            return
        first = 0
        for group in range(self._parquet.metadata.num_row_groups):
            count = self._parquet.metadata.row_group(group).num_rows
            if first < stop and first + count > start:
                yield first, count, partial(self._parquet.iter_batches, self.BATCH, [group], columns, use_threads=False)
            first += count

    def fields(self, batch: pa.RecordBatch, row: int, where: str) -> dict[str, object]:
        """A row as named fields: images and audio as blobs, class labels by their names."""
        return {
            name: self._value(batch.column(i)[row].as_py(), f"{where}/{name}", self.features.get(name))
            for i, name in enumerate(batch.schema.names)
        }

    def _value(self, value: object, where: str, feature: object) -> object:
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


def _holds_text(type: pa.DataType) -> bool:
    """Whether a column's values are texts, also where it is a table's column of categories."""
    type = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)


def _unquoted(cells: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Texts without the quotes that enclose the whole of them."""
    inner = pc.replace_substring(pc.utf8_slice_codeunits(cells, 1, -1), '""', '"')
    return pc.if_else(pc.match_substring_regex(cells, '^"(?:[^"]|"")*"$'), inner, cells)


def _validated(batches: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        batch.validate(full=True)  # because Arrow files are mapped into memory unchecked
        yield batch


def _features(text: bytes) -> dict[str, object]:
    """The types of columns (`features`) that Hugging Face `datasets` adds to a schema."""
    value = json.loads(text)
    for key in ("info", "features"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
