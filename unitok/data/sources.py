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

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa

from unitok.data.containers import DAMAGE, Table, damage, list_members, unpacked
from unitok.data.files import Blob, Files, Found, is_remote, printable
from unitok.data.media import load_text
from unitok.data.recipe import FILES, SourceSpec, arrange, default_parts, fill_template
from unitok.document import Part, RawDocument, is_utf8, parse_line, raw_document, read_raw_documents
from unitok.errors import UserError, first_line

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
        self._containers: dict[str, tuple[IO[bytes], IO[bytes], int]] = {}

    # ---- Listing -------------------------------------------------------------------------------------------------

    def items(self) -> Iterator[Item]:
        """What is there, in a fixed order; memory holds the names of one folder."""
        if self.alone:
            yield from self._items_of([self.files.look(self.alone)])
        elif self.pattern:
            yield from self._items_of(f for f in self.files.walk() if fnmatch(f.name, self.pattern) or f.problem)
        elif self.through_lines():
            yield from self._items_of([self.files.look("documents.jsonl")])
        elif self.files.exists("dataset_dict.json"):
            splits = ", ".join(self._json("dataset_dict.json", "splits"))
            raise UserError(f"{self.spec.path}: a data set of several splits: name one of the folders {splits}")
        elif self.files.exists("state.json") and self.files.exists("dataset_info.json"):
            names = [d.get("filename", "") for d in self._json("state.json", "_data_files") if isinstance(d, dict)]
            yield from self._items_of(map(self.files.look, names))
        else:
            yield from self._items_of(self.files.walk())

    def through_lines(self) -> bool:
        """Whether its `documents.jsonl` alone says what is in it."""
        return not self.alone and not self.pattern and self.files.exists("documents.jsonl")

    def holds(self, path: Path) -> bool:
        """Whether a local path would be found when this source is listed."""
        if self.alone or self.files.remote is not None or self.files.exists("documents.jsonl"):
            return False
        return Path(os.path.realpath(path)).is_relative_to(self.files.folder)

    def _json(self, name: str, key: str) -> list[Any]:
        """A list in one of the small files beside a data set of Hugging Face's."""
        try:
            return list(json.loads(self.files.read(name))[key])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.spec.path}/{name}: no list {key!r} in it: not as `save_to_disk` writes it") from None

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
            with closing(self.files.open(name)) as packed:
                return unpacked(packed).read(512)
        except (UserError, *DAMAGE):
            return b""

    def _files_items(self, waiting: dict[str, list[Found]]) -> Iterator[Item]:
        for stem, found in waiting.items():
            media = [f for f in found if not f.name.lower().endswith((".txt", ".json"))]
            groups = [found] if media else [[f] for f in found]  # without media, each text is a document
            for group in groups:
                first = next((f for f in group if f in media), group[0])
                name = first.name if len(media) < 2 else stem
                yield Item(name, name, "files", members=tuple((f.name, f.stamp, f.size) for f in group))
        waiting.clear()

    def _line_items(self, f: Found) -> Iterator[Item]:
        name = PurePosixPath(f.name)
        at = number = 0
        try:
            with closing(self.files.open(f.name)) as packed, closing(unpacked(packed)) as file:
                while line := file.readline(MAX_LINE):
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
        except UserError as error:
            yield Item("", f.name, "error", error=str(error))
        except DAMAGE as error:
            yield _refused(f"{name}, after line {number}", f"damaged: the rest cannot be read ({damage(error, f.name)})")

    def _archive_items(self, f: Found) -> Iterator[Item]:
        key, last = "", "its beginning"
        members: list[tuple[str, int, int]] = []

        def sample() -> Iterator[Item]:
            if members:
                yield Item(key, f"{f.name}, {key}", "member", f.name, f.stamp, members=tuple(members))
                members.clear()

        try:
            with closing(self.files.open(f.name)) as packed, closing(unpacked(packed)) as file:
                for member in list_members(file, compressed=file is not packed):
                    last = member.name or last
                    if member.problem:
                        yield _refused(f"{f.name}, {member.name or f'after {last}'}", member.problem)
                        continue
                    inside, slash, base = member.name.rpartition("/")
                    mine = inside + slash + base.split(".", 1)[0]
                    if mine != key:
                        yield from sample()
                        key = mine
                    members.append((member.name, member.start, member.length))
            yield from sample()
        except UserError as error:
            yield Item("", f.name, "error", error=str(error))
        except DAMAGE as error:
            yield from sample()
            yield _refused(f"{f.name}, after {last}", f"damaged: the rest cannot be read ({damage(error, f.name)})")

    def _table_items(self, f: Found) -> Iterator[Item]:
        try:
            table = Table(self.files, f.name)
            ids = table.ids()
            for row in range(table.rows):
                yield Item(printable(next(ids)), f"{f.name}, row {row}", "row", f.name, f.stamp, row)
        except UserError as error:
            yield Item("", f.name, "error", error=str(error))
        except DAMAGE as error:
            yield _refused(f.name, f"not a readable table ({damage(error, f.name)})")

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
        for item in items:
            yield partial(self._make_of_files, item)

    def _make_of_files(self, item: Item) -> list[RawDocument]:
        row = {
            os.path.splitext(name)[1].removeprefix(".") or name: Blob.of(self.files, name, stamp)
            for name, stamp, _ in item.members
        }
        return self._from_fields(item, row, strict=True)

    def _read_lines(self, items: list[Item]) -> Iterator[Make]:
        file = self._container_of(items[0])
        last, line = -1, b""
        for item in items:
            if item.start != last:  # a document that is taken twice follows itself
                file.seek(item.start)
                last, line = item.start, file.read(item.length)
            yield partial(self._make_of_line, item, line)

    def _make_of_line(self, item: Item, line: bytes) -> list[RawDocument]:
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{item.where}: not UTF-8 text (byte {error.start}); convert it, for example with iconv") from None
        row = parse_line(text, item.where)
        if isinstance(row, dict) and (self.spec.template or "content" not in row):
            return self._from_fields(item, self._with_files(row, item), strict=False)
        raw = raw_document(row, Path(""), item.where, item.id)
        folder = os.path.dirname(item.file)
        return self._made(item, [self._with_file(part, folder) for part in raw.content])

    def _with_files(self, row: dict[str, Any], item: Item) -> dict[str, Any]:
        """A line's fields, those that are called as files are with what reads them; for lines without a template."""
        if self.spec.template:
            return row  # it says which are files

        def opened(value: Any) -> Any:
            name = os.path.join(os.path.dirname(item.file), value) if isinstance(value, str) else ""
            return [opened(v) for v in value] if isinstance(value, list) else Blob.of(self.files, name) if name else value

        return {key: opened(value) if key in FILES else value for key, value in row.items()}

    def _with_file(self, part: Part, folder: str) -> Part:
        role = self.spec.roles.get(part.type, "none") if part.role == "none" else part.role
        loss = part.loss and self.spec.loss.get(part.type, True)
        if part.path is None:
            return replace(part, role=role, loss=loss)
        name = os.path.normpath(os.path.join(folder, part.path)) if not part.path.is_absolute() else str(part.path)
        return replace(part, role=role, loss=loss, path=Path(name), file=Blob.of(self.files, name))

    def _read_members(self, items: list[Item]) -> Iterator[Make]:
        lock, file = threading.Lock(), self._container_of(items[0])
        for item in items:
            yield partial(self._make_of_members, item, file, lock)

    def _make_of_members(self, item: Item, file: IO[bytes], lock: threading.Lock) -> list[RawDocument]:
        row: dict[str, Any] = {}
        for name, start, length in item.members:
            try:
                with lock:
                    file.seek(start)
                    data = file.read(length)
            except DAMAGE as error:
                raise UserError(f"{item.where}: cannot be read ({damage(error, item.where)})") from None
            if len(data) != length:
                raise UserError(f"{item.where}: cut off")
            suffix = PurePosixPath(name).name.partition(".")[2] or "txt"
            blob = replace(Blob.held(f"{item.file}/{name}", data), place=start)
            row[suffix] = [*row[suffix], blob] if suffix in row else [blob]
        return self._from_fields(item, {k: v if len(v) > 1 else v[0] for k, v in row.items()}, strict=False)

    def _read_rows(self, items: list[Item]) -> Iterator[Make]:
        self._container_of(items[0])
        table = Table(self.files, items[0].file)
        wanted = deque(items)
        for at, count, batches in table.stretches(items[0].start, items[-1].start + 1):
            first, end = at, at + count
            try:
                for batch in batches():
                    while wanted and wanted[0].start < first + batch.num_rows:
                        item = wanted.popleft()
                        yield partial(self._make_of_row, item, table, batch, item.start - first)
                    first += batch.num_rows
            except DAMAGE as error:
                why = damage(error, items[0].file)
                while wanted and wanted[0].start < end:
                    yield partial(_raise, f"{wanted.popleft().where}: damaged ({why})")
        for item in wanted:
            yield partial(_raise, f"{item.where}: not there")

    def _make_of_row(self, item: Item, table: Table, batch: pa.RecordBatch, row: int) -> list[RawDocument]:
        return self._from_fields(item, table.fields(batch, row, f"{item.file}/{item.start}"), strict=False)

    def _container_of(self, item: Item) -> IO[bytes]:
        """The container of an item, unpacked; open until `close`. Errors: `UserError` when it is not as it was listed."""
        if item.file not in self._containers:
            packed = self.files.open(item.file)
            self._containers[item.file] = (packed, unpacked(packed), item.stamp)
            if self.files.stamp_of(packed, item.file)[1] != item.stamp:
                raise UserError(f"{item.file}: has changed since the run was planned; start with a new folder")
        return self._containers[item.file][1]

    def close(self) -> None:
        """After all that `read` gave was called; errors: `UserError` for a container that changed meanwhile: start anew."""
        opened, self._containers = self._containers, {}
        for packed, file, _ in opened.values():
            file.close()
            packed.close()
        for name, (_, _, stamp) in opened.items():
            if self.files.look(name).stamp != stamp:
                raise UserError(f"{name}: changed while it was read; start with a new folder")


def _whats_there(path: str) -> str:
    """`file`, `folder` or "" for nothing."""
    if not is_remote(path):
        return "folder" if Path(path).is_dir() else "file" if Path(path).exists() else ""
    try:
        files = Files(path)
        return "file" if files.remote.isfile(files.folder) else "folder" if files.remote.exists(files.folder) else ""
    except UserError:
        raise
    except Exception as error:  # every file system of fsspec has its own
        raise UserError(f"{path}: cannot be reached ({first_line(error)})") from None


def _raise(message: str) -> list[RawDocument]:
    raise UserError(message)


def _line_id(line: bytes, default: str) -> str:
    """The `id` of a line; whether the line is good is seen when it is read."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return default
    found = str(row.get("id", default)) if isinstance(row, dict) else default
    return found if is_utf8(found) else default


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
    source.close()


def read_texts(path: Path) -> Iterator[str]:
    """The strings of a corpus: the lines of a text file, or every text of an interleaved JSON Lines file."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder; give the text and .jsonl files in it")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        yield from (line.removesuffix("\r") for line in load_text(path).split("\n") if line.strip())
        return
    for document in read_raw_documents(path):
        if isinstance(document, UserError):
            raise document
        yield from (part.text for part in document.content if part.type == "text")
