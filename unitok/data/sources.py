"""Sources -> raw documents: what `unitok tokenize` can read, in two steps.

`Source.items()` lists what is there, in a fixed order and without reading more than it must: an `Item` says where one
document lies. `Source.read(items)` gives, for a stretch of that list, a function each that reads one item and makes the raw
documents; readers may call these in any thread. What a source holds:

- interleaved JSON Lines (`.jsonl`), a line a document (`unitok.document`); with a template, lines of named fields;
- a folder that holds `documents.jsonl`: read through it alone;
- any other folder: files of one base name (`cat.jpg`, `cat.txt`, `cat.json`) are one document;
- WebDataset archives (`.tar`, also compressed): members of one base name, up to the first dot, are one document;
- Parquet files (`.parquet`) and Hugging Face data sets on disk, a row a document.

Content decides what a file is, not its suffix; suffixes only say which files hold many documents, and their content must
agree. What cannot be used is listed with the reason, never passed over; hidden files (`.name`) alone are.
"""

import bz2
import gzip
import json
import lzma
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from unitok.data.files import MAX_BYTES, Blob, Files, Found, is_remote, printable
from unitok.data.media import load_text
from unitok.data.recipe import SourceSpec, arrange, default_parts, fill_template
from unitok.document import Part, RawDocument, parse_raw_document, read_raw_documents
from unitok.errors import UserError

#: Longest line of a JSON Lines file, bytes.
MAX_LINE = 64 << 20

Make = Callable[[], list[RawDocument]]


@dataclass(frozen=True)
class Item:
    """Where one document lies.

    Args:
        id: the document's. where: for people: file and line, member or row.
        kind: `files`, `line`, `member`, `row`, or `error` for what cannot be used.
        file: the container, relative to the source. stamp: the container's.
        start, length: bytes of a line; number of a row.
        members: files of one base name, or an archive's members: name, start (in a folder, the stamp) and length in bytes.
        error: why it cannot be used.
    """

    id: str
    where: str
    kind: str
    file: str = ""
    stamp: int = 0
    start: int = 0
    length: int = 0
    members: tuple[tuple[str, int, int], ...] = ()
    error: str = ""


def _refused(where: str, why: str) -> Item:
    return Item("", where, "error", error=f"{where}: {why}")


class Source:
    """What a spec names, opened. Errors: `UserError` when there is no such path.

    Args:
        seed: of random orders. prefix: what comes before the places of its documents, where there are several sources.
    """

    def __init__(self, spec: SourceSpec, seed: int = 0, prefix: str = ""):
        self.spec, self.seed, self.prefix = spec, seed, prefix
        path = spec.path
        folder, alone, self.pattern = path, "", ""
        steps = path.split("/")
        if "*" in path:
            fixed = next(i for i, step in enumerate(steps) if "*" in step)
            folder = "/".join(steps[:fixed]) or ("/" if path.startswith("/") else ".")
            self.pattern = "/".join(steps[fixed:])
        there = _whats_there(folder)
        if there == "file":
            folder, alone = (
                (folder.rpartition("/")[0], steps[-1]) if is_remote(path) else (str(Path(path).parent), Path(path).name)
            )
        elif not there:
            raise UserError(f"{folder}: no such file or folder")
        self.files, self.alone = Files(folder, spec.root), alone

    # ---- Listing -------------------------------------------------------------------------------------------------

    def items(self) -> Iterator[Item]:
        """What is there, in a fixed order; memory holds the names of one folder."""
        if self.alone:
            yield from self._items_of([self.files.look(self.alone)])
        elif self.pattern:
            yield from self._items_of(f for f in self.files.walk() if fnmatch(f.name, self.pattern))
        elif self.files.exists("documents.jsonl"):
            yield from self._items_of([self.files.look("documents.jsonl")])
        elif self.files.exists("dataset_dict.json"):
            splits = ", ".join(json.loads(self.files.read("dataset_dict.json")).get("splits", []))
            raise UserError(f"{self.spec.path}: a data set of several splits: name one of the folders {splits}")
        elif self.files.exists("state.json") and self.files.exists("dataset_info.json"):
            state = json.loads(self.files.read("state.json"))
            yield from self._items_of(self.files.look(d["filename"]) for d in state.get("_data_files", []))
        else:
            yield from self._items_of(self.files.walk())

    def _items_of(self, found: Iterable[Found]) -> Iterator[Item]:
        for _, group in groupby(found, key=lambda f: os.path.dirname(f.name)):
            waiting: dict[str, list[Found]] = {}  # a folder's files by base name, in order
            for f in group:
                if f.problem:
                    yield _refused(f.name, f.problem)
                elif lister := self._container(f):
                    yield from self._files_items(waiting)
                    yield from lister(f)
                else:
                    waiting.setdefault(os.path.splitext(f.name)[0], []).append(f)
            yield from self._files_items(waiting)

    def _container(self, f: Found) -> Callable[[Found], Iterator[Item]] | None:
        """How to list a file that holds many documents; None for one that holds a piece of content."""
        name = f.name.lower()
        plain = name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz")
        if plain.endswith((".tar", ".tgz")):
            return self._archive_items if self._head(f.name)[257:262] == b"ustar" else None
        if name.endswith(".parquet"):
            return self._table_items if self._head(f.name)[:4] == b"PAR1" else None
        if name.endswith(".arrow"):
            return self._table_items
        return self._line_items if plain.endswith((".jsonl", ".ndjson")) else None

    def _head(self, name: str) -> bytes:
        try:
            with closing(_unpacked(self.files.open(name))) as file:
                return file.read(512)
        except (UserError, OSError, EOFError, lzma.LZMAError):
            return b""

    def _files_items(self, waiting: dict[str, list[Found]]) -> Iterator[Item]:
        for stem, found in waiting.items():
            media = [f for f in found if not f.name.endswith((".txt", ".json"))]
            groups = [found] if media else [[f] for f in found]  # without media, each text is a document
            for group in groups:
                first = next((f for f in group if f in media), group[0])
                name = first.name if len(media) < 2 else stem
                yield Item(name, name, "files", members=tuple((f.name, f.stamp, f.size) for f in group))
        waiting.clear()

    def _line_items(self, f: Found) -> Iterator[Item]:
        name = PurePosixPath(f.name)
        with closing(_unpacked(self.files.open(f.name))) as file:
            at = number = 0
            while True:
                try:
                    line = file.readline(MAX_LINE)
                except (OSError, EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
                    yield _refused(f"{name}, after line {number}", f"damaged ({str(error)[:80]})")
                    return
                if not line:
                    return
                number += 1
                where, start = f"{f.name}, line {number}", at
                at += len(line)
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE)
                        at += len(line)
                    yield _refused(where, f"longer than {MAX_LINE} bytes")
                elif line.strip():
                    yield Item(_line_id(line, f"{name.stem}-{number}"), where, "line", f.name, f.stamp, start, len(line))

    def _archive_items(self, f: Found) -> Iterator[Item]:
        key, last = "", "its beginning"
        members: list[tuple[str, int, int]] = []

        def sample() -> Iterator[Item]:
            if members:
                yield Item(key, f"{f.name}, {key}", "member", f.name, f.stamp, members=tuple(members))
                members.clear()

        try:
            packed = self.files.open(f.name)
            file = _unpacked(packed)
            with closing(packed), closing(file), tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive:
                while member := archive.next():
                    archive.members.clear()  # type: ignore[attr-defined]  # or all of them would be kept
                    name = member.name.removeprefix("./")
                    last, where = printable(name), f"{f.name}, {printable(name)}"
                    base = name.rsplit("/", 1)[-1]
                    if why := _member_problem(member, name):
                        yield _refused(where, why)
                        if member.size > MAX_BYTES and file is not packed:
                            raise tarfile.ReadError("what is after it would have to be unpacked first")
                    elif member.isdir() or base.startswith("."):
                        continue
                    else:
                        mine = name[: len(name) - len(base)] + base.split(".", 1)[0]
                        if mine != key:
                            yield from sample()
                            key = mine
                        members.append((name, member.offset_data, member.size))
                file.seek(archive.offset)
                if any(file.read(512)):
                    raise tarfile.ReadError("a damaged header")
            yield from sample()
        except (tarfile.TarError, OSError, EOFError, ValueError, lzma.LZMAError) as error:
            yield from sample()
            yield _refused(f"{f.name}, after {last}", f"damaged: the rest cannot be read ({str(error)[:80]})")

    def _table_items(self, f: Found) -> Iterator[Item]:
        try:
            table = Table(self.files, f.name)
            ids = table.ids()
            for row in range(table.rows):
                yield Item(next(ids), f"{f.name}, row {row}", "row", f.name, f.stamp, row)
        except (pa.ArrowException, OSError) as error:
            yield _refused(f.name, f"not a readable table ({str(error).splitlines()[0][:100]})")

    # ---- Reading -------------------------------------------------------------------------------------------------

    def read(self, items: Sequence[Item]) -> Iterator[Make]:
        """For each item in order a function that makes its raw documents; it raises `UserError` for what cannot be used."""
        readers = {"files": self._read_files, "line": self._read_lines, "member": self._read_members, "row": self._read_rows}
        for (kind, _), run in groupby(items, key=lambda item: (item.kind, item.file)):
            if kind == "error":
                for item in run:
                    yield partial(_raise, item.error)
            else:
                yield from readers[kind](list(run))

    def _made(self, item: Item, parts: Sequence[Part]) -> list[RawDocument]:
        if not parts:
            raise UserError(f"{item.where}: nothing in it that a document is made of; a template says what is")
        return [RawDocument(item.id, arrange(self.spec, parts, item.id, self.seed), self.prefix + item.where)]

    def _from_fields(self, item: Item, row: dict[str, Any], strict: bool) -> list[RawDocument]:
        """The document that a row of named fields makes, by the template or without one."""
        folder = os.path.dirname(item.file)
        try:
            if self.spec.template:
                parts = fill_template(self.spec, row, lambda name: Blob.of(self.files, os.path.join(folder, name)))
            else:
                parts = default_parts(self.spec, row, strict)
        except UserError as error:
            said = str(error)
            raise UserError(said if said.startswith(item.where) else f"{item.where}: {said}") from None
        return self._made(item, parts)

    def _read_files(self, items: list[Item]) -> Iterator[Make]:
        def make(item: Item) -> list[RawDocument]:
            row = {
                os.path.splitext(name)[1].removeprefix(".") or name: Blob.of(self.files, name, stamp)
                for name, stamp, _ in item.members
            }
            return self._from_fields(item, row, strict=True)

        for item in items:
            yield partial(make, item)

    def _read_lines(self, items: list[Item]) -> Iterator[Make]:
        def make(item: Item, line: bytes) -> list[RawDocument]:
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{item.where}: not UTF-8 text (byte {error.start}); convert it, for example with iconv"
                ) from None
            if self.spec.template:
                row = _json_row(text, item.where)
                return self._from_fields(item, row, strict=False)
            raw = parse_raw_document(text, Path(""), item.where, item.id)
            folder = os.path.dirname(item.file)
            parts = [self._with_file(part, folder) for part in raw.content]
            return self._made(item, parts)

        with self._opened(items[0]) as file:
            for item in items:
                file.seek(item.start)
                line = file.read(item.length)
                yield partial(make, item, line)

    def _with_file(self, part: Part, folder: str) -> Part:
        role = self.spec.roles.get(part.type, "none") if part.role == "none" else part.role
        loss = part.loss and self.spec.loss.get(part.type, True)
        if part.path is None:
            return replace(part, role=role, loss=loss)
        name = os.path.normpath(os.path.join(folder, part.path)) if not part.path.is_absolute() else str(part.path)
        return replace(part, role=role, loss=loss, path=Path(name), file=Blob.of(self.files, name))

    def _read_members(self, items: list[Item]) -> Iterator[Make]:
        lock = threading.Lock()
        with self._opened(items[0]) as file:

            def content(item: Item, start: int, length: int) -> bytes:
                with lock:
                    file.seek(start)
                    data = file.read(length)
                if len(data) != length:
                    raise UserError(f"{item.where}: cut off")
                return data

            def make(item: Item, contents: list[tuple[str, bytes]]) -> list[RawDocument]:
                row: dict[str, Any] = {}
                for name, data in contents:
                    suffix = PurePosixPath(name).name.partition(".")[2] or "txt"
                    row[suffix] = Blob.held(f"{item.file}/{name}", data)
                return self._from_fields(item, row, strict=False)

            for item in items:
                try:
                    contents = [(name, content(item, start, length)) for name, start, length in item.members]
                except (UserError, OSError, EOFError, lzma.LZMAError) as error:
                    yield partial(_raise, f"{item.where}: cannot be read ({error})")
                    continue
                yield partial(make, item, contents)

    def _read_rows(self, items: list[Item]) -> Iterator[Make]:
        table = Table(self.files, items[0].file)
        if table.stamp != items[0].stamp:
            raise UserError(f"{items[0].file}: has changed since the run was planned; start with a new folder")

        def make(item: Item, batch: pa.RecordBatch, row: int) -> list[RawDocument]:
            return self._from_fields(item, table.fields(batch, row, f"{item.file}/{item.start}"), strict=False)

        wanted = iter(items)
        item = next(wanted, None)
        for first, batch in table.batches(items[0].start, items[-1].start + 1):
            while item is not None and item.start < first + batch.num_rows:
                yield partial(make, item, batch, item.start - first)
                item = next(wanted, None)

    @contextmanager
    def _opened(self, item: Item) -> Iterator[IO[bytes]]:
        """The container of an item; errors: `UserError` when it is not as it was listed, or changes: the run cannot go on."""
        with closing(self.files.open(item.file)) as file:
            if self.files.stamp_of(file, item.file)[1] != item.stamp:
                raise UserError(f"{item.file}: has changed since the run was planned; start with a new folder")
            yield _unpacked(file)
        if self.files.look(item.file).stamp != item.stamp:
            raise UserError(f"{item.file}: changed while it was read; start with a new folder")


def _whats_there(path: str) -> str:
    """`file`, `folder` or "" for nothing."""
    if not is_remote(path):
        return "folder" if Path(path).is_dir() else "file" if Path(path).exists() else ""
    files = Files(path)
    try:
        return "file" if files.remote.isfile(files.folder) else "folder" if files.remote.exists(files.folder) else ""
    except Exception as error:  # every file system of fsspec has its own
        raise UserError(f"{path}: cannot be reached ({str(error).splitlines()[0][:120]})") from None


def _raise(message: str) -> list[RawDocument]:
    raise UserError(message)


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    """A file, decompressed if its first bytes say that it is compressed."""
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if head.startswith(b"BZh"):
        return bz2.BZ2File(file)  # type: ignore[return-value]
    return lzma.LZMAFile(file) if head.startswith(b"\xfd7zXZ\x00") else file  # type: ignore[return-value]


def _member_problem(member: tarfile.TarInfo, name: str) -> str:
    if printable(name) != name:
        return "its name is not UTF-8: refused"
    if name.startswith("/") or ".." in name.split("/"):
        return "leaves the archive: refused"
    if member.issym() or member.islnk():
        return "a link: not followed"
    if not member.isdir() and (not member.isfile() or member.issparse()):
        return "neither a file nor a folder"
    return f"{member.size} bytes are too many (limit {MAX_BYTES})" if member.size > MAX_BYTES else ""


def _line_id(line: bytes, default: str) -> str:
    """The `id` of a line; whether the line is good is seen when it is read."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return default
    found = str(row.get("id", default)) if isinstance(row, dict) else default
    return found if printable(found) == found else default


def _json_row(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({str(error)[:80]}); mend or remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a line is a record of named fields")
    return row


class Table:
    """A Parquet file, or an Arrow file as Hugging Face `datasets` saves it: rows of named columns."""

    BATCH = 32  # rows held at once

    def __init__(self, files: Files, name: str):
        self.files, self.name = files, name
        file = files.open(name)
        self.stamp = files.stamp_of(file, name)[1]
        self._parquet = pq.ParquetFile(file) if name.lower().endswith(".parquet") else None
        if self._parquet is not None:
            self.rows, self.schema = self._parquet.metadata.num_rows, self._parquet.schema_arrow
        else:
            source = pa.memory_map(str(files.local(name))) if files.remote is None else pa.PythonFile(file, mode="r")
            try:
                self._table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                self._table = pa.ipc.open_file(source).read_all()
            self.rows, self.schema = self._table.num_rows, self._table.schema
        told = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
        self.features: dict[str, Any] = (told.get("info") or {}).get("features") or {}

    def ids(self) -> Iterator[str]:
        """The documents' ids: a column `id`, `key` or `__key__`, or else file and row."""
        named = [n for n in ("id", "__key__", "key") if n in self.schema.names]
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
        named = [n for n in named if any(of(self.schema.field(n).type) for of in kinds)]
        if not named:
            yield from (f"{self.name}/{row}" for row in range(self.rows))
            return
        row = 0
        for _, batch in self.batches(0, self.rows, named[:1]):
            for value in batch.column(0).to_pylist():
                yield f"{self.name}/{row}" if value is None else str(value)
                row += 1

    def batches(self, start: int, stop: int, columns: list[str] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Rows `start` to `stop` and their neighbours: number of the first, and a few of them, after one another."""
        if self._parquet is None:
            part = self._table.slice(start, stop - start)
            batches = (part.select(columns) if columns else part).to_batches(max_chunksize=self.BATCH)
            first = start
        else:
            groups: list[int] = []
            first = at = 0
            for group in range(self._parquet.metadata.num_row_groups):
                count = self._parquet.metadata.row_group(group).num_rows
                if at < stop and at + count > start:
                    first = first if groups else at
                    groups.append(group)
                at += count
            size = self.BATCH if columns is None else 8192
            batches = self._parquet.iter_batches(size, groups, columns, use_threads=False)
        for batch in batches:
            yield first, batch
            first += batch.num_rows

    def fields(self, batch: pa.RecordBatch, row: int, where: str) -> dict[str, Any]:
        """A row as named fields: pictures and sounds as blobs, class labels by their names."""
        return {
            name: self._value(batch.column(i)[row].as_py(), f"{where}/{name}", self.features.get(name))
            for i, name in enumerate(batch.schema.names)
        }

    def _value(self, value: Any, where: str, feature: Any) -> Any:
        if isinstance(value, bytes):
            return Blob.held(where, value)
        if isinstance(value, list):
            inner = feature[0] if isinstance(feature, list) and feature else (feature or {}).get("feature") if feature else None
            return [self._value(v, f"{where}/{i}", inner) for i, v in enumerate(value)]
        if isinstance(value, dict):
            if set(value) == {"bytes", "path"}:
                if value["bytes"] is not None:
                    return Blob.held(where, value["bytes"])
                if value["path"]:
                    return Blob.of(self.files, os.path.join(os.path.dirname(self.name), value["path"]))
                return None
            return {k: self._value(v, f"{where}/{k}", None) for k, v in value.items()}
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(value, int) and value >= 0:
            return feature["names"][value] if feature.get("names") else value
        return value


# ---- Whole sources, for the library ----------------------------------------------------------------------------------


def read_source(path: Path) -> Iterator[RawDocument | UserError]:
    """The documents of a file or folder in a fixed order; what cannot be used comes as the `UserError` that says why."""
    source = Source(SourceSpec(str(path)))
    for item in source.items():
        for make in source.read([item]):
            try:
                yield from make()
            except UserError as error:
                yield error


def read_texts(path: Path) -> Iterator[str]:
    """The strings of a corpus: the lines of a text file, or every text of an interleaved JSON Lines file."""
    path = Path(path)
    if path.suffix != ".jsonl":
        yield from (line for line in load_text(path).split("\n") if line.strip())
        return
    for document in read_raw_documents(path):
        if isinstance(document, UserError):
            raise document
        yield from (part.text for part in document.content if part.type == "text")
