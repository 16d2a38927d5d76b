"""Sources -> raw documents. `Source.items` lists what is there (`unitok.data.prepare.listing`); `Source.read` reads it.

- interleaved JSON Lines (`.jsonl`), a line a document (`unitok.document`), or lines of named fields; a `.json` list of the same;
- a folder that holds `documents.jsonl`: read through it alone;
- any other folder: first its files that hold many documents, then files of one base name (`cat.jpg`, `cat.txt`, `cat.json`),
  which are one document. A file that a line or a row names is no document of its own (ImageFolder, AudioFolder);
- WebDataset archives (`.tar`, also compressed): members of one base name, up to the first dot, are one document;
- Parquet and CSV files and Hugging Face data sets on disk, a row a document.

What a file is follows from its content and its role (`unitok.data.prepare.fields`); suffixes only say which files hold many
documents, and their content must agree. Only hidden files (`.name`) are passed over in silence.
"""

import json
import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa

from unitok.data.prepare.containers import DAMAGE, Table, damage, unpacked
from unitok.data.prepare.fields import Made, data_url, read_fields
from unitok.data.prepare.listing import SourceItem, list_items
from unitok.data.prepare.recipe import SourceSpec, arrange
from unitok.document import Part, RawDocument
from unitok.errors import UserError
from unitok.files import parse_json_line, read_json_lines
from unitok.interleaved import Types, raw_document
from unitok.media import load_text
from unitok.modalities import modalities
from unitok.storage import Blob, Folder, is_remote, kind_of_path, open_files

DocumentFactory = Callable[[], list[RawDocument]]


class Source:
    """What a spec names, opened. Errors: `UserError` when there is no such path.

    Args:
        seed: of random orders. prefix: what comes before the places of its documents, where there are several sources.
        types: what parts may be, as `Bundle.types`; by default all kinds.
    """

    def __init__(self, spec: SourceSpec, seed: int = 0, prefix: str = "", types: Types | None = None):
        self.spec, self.seed, self.prefix, self.types = spec, seed, prefix, types
        path = spec.path.removeprefix("file://")
        folder, alone, self.pattern = path, "", ""
        steps = path.split("/")
        there = "" if "*" in path and is_remote(path) else kind_of_path(path)
        if not there and "*" in path:  # a name may hold one, too
            fixed = next(i for i, step in enumerate(steps) if "*" in step)
            folder = "/".join(steps[:fixed]) or ("/" if path.startswith("/") else ".")
            self.pattern = "/".join(steps[fixed:])
            there = kind_of_path(folder)
        if there == "file":
            folder, alone = os.path.split(path) if is_remote(path) else (str(Path(path).parent), Path(path).name)
        elif not there:
            raise UserError(f"{folder}: no such file or folder")
        self.files, self.alone = open_files(folder, spec.root), alone
        self.left_out: Counter[str] = Counter()  # by what it is, after `items`
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # of containers, which all threads read
        self._containers: dict[str, tuple[IO[bytes], IO[bytes], int]] = {}

    # ---- Listing -------------------------------------------------------------------------------------------------

    def items(self) -> Iterator[SourceItem]:
        """What is there, in a fixed order; memory holds the names of one folder, and of the files that lines and rows name."""
        self.left_out.clear()
        return list_items(self.files, self._folders(), self.left_out, bool(self.alone), bool(self.spec.template))

    def _folders(self) -> Callable[[], Iterable[Folder]]:
        """What lists the folders or files that may hold documents."""
        if self.pattern:
            return self._matching
        if self.alone:
            names = [self.alone]
        elif self.through_lines():
            names = ["documents.jsonl"]
        elif self.files.exists("dataset_dict.json"):
            names = [name for split in self._json("dataset_dict.json", "splits") for name in self._saved(f"{split}/")]
        elif self.files.exists("state.json") and self.files.exists("dataset_info.json"):
            names = self._saved()
        else:
            return self.files.folders
        return lambda: [(names, {})]

    def _matching(self) -> Iterator[Folder]:
        for names, known in self.files.folders():
            yield [n for n in names if fnmatch(n, self.pattern) or (n in known and known[n].problem)], known

    def through_lines(self) -> bool:
        """Whether its `documents.jsonl` alone says what is in it."""
        return not self.alone and not self.pattern and self.files.exists("documents.jsonl")

    def holds(self, path: Path) -> bool:
        """Whether a local path would be found when this source is listed."""
        if self.alone or self.files.remote is not None or self.files.exists("documents.jsonl"):
            return False
        return Path(os.path.realpath(path)).is_relative_to(self.files.folder)

    def _saved(self, inside: str = "") -> list[str]:
        """The files of a data set that `save_to_disk` wrote, in a folder of the source or in its top."""
        files = self._json(f"{inside}state.json", "_data_files")
        return [inside + f["filename"] for f in files if isinstance(f, dict) and isinstance(f.get("filename"), str)]

    def _json(self, name: str, key: str) -> list[Any]:
        """A list in one of the small files beside a data set of Hugging Face's."""
        try:
            return list(json.loads(self.files.read(name))[key])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.spec.path}/{name}: no list {key!r} in it: not as `save_to_disk` writes it") from None

    # ---- Reading -------------------------------------------------------------------------------------------------

    def read(self, items: Sequence[SourceItem]) -> Iterator[DocumentFactory]:
        """For each item in order a function that makes its raw documents; it raises `UserError` for what cannot be used."""
        readers = {"line": self._read_lines, "member": self._read_members, "row": self._read_rows}
        for (kind, _), run in groupby(items, key=lambda item: (item.kind, item.file)):
            if kind == "error":
                yield from (partial(_raise, item.error) for item in run)
            elif kind == "files":
                yield from (partial(self._make_of_files, item) for item in run)
            else:
                yield from readers[kind](list(run))

    def _made(self, item: SourceItem, made: Made) -> list[RawDocument]:
        parts, notes = made
        if not parts:
            raise UserError(f"{item.where}: nothing in it that a document is made of; a template says what is")
        return [RawDocument(item.id, arrange(self.spec, parts, item.id, self.seed), self.prefix + item.where, tuple(notes))]

    def _from_fields(self, item: SourceItem, row: dict[str, Any], files: bool = False) -> list[RawDocument]:
        """The document that a row of named fields makes, by the template or without one."""
        folder = os.path.dirname(item.file)
        try:
            made = read_fields(self.spec, row, lambda name: Blob.of(self.files, os.path.join(folder, name)), files)
        except UserError as error:
            said = str(error)
            raise UserError(said if said.startswith(item.where) else f"{item.where}: {said}") from None
        return self._made(item, made)

    def _make_of_files(self, item: SourceItem) -> list[RawDocument]:
        row = {
            os.path.splitext(name)[1].removeprefix(".") or name: Blob.of(self.files, name, stamp)
            for name, stamp, _ in item.members
        }
        return self._from_fields(item, row, files=True)

    def _read_lines(self, items: list[SourceItem]) -> Iterator[DocumentFactory]:
        file = self._container_of(items[0])
        last, line = -1, b""
        for item in items:
            if item.start != last:  # a document that is taken twice follows itself
                file.seek(item.start)
                last, line = item.start, file.read(item.length)
            yield partial(self._make_of_line, item, line)

    def _make_of_line(self, item: SourceItem, line: bytes) -> list[RawDocument]:
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{item.where}: not UTF-8 text (byte {error.start}); convert it, for example with iconv") from None
        row = parse_json_line(text, item.where)
        if isinstance(row, dict) and (self.spec.template or "content" not in row):
            return self._from_fields(item, row)
        raw = raw_document(row, Path(""), item.where, item.id, self.types)
        folder = os.path.dirname(item.file)
        named = [str(part.get("path", "")) for part in row["content"]]
        return self._made(item, ([self._with_file(*pair, folder, item.where) for pair in zip(raw.content, named)], []))

    def _with_file(self, part: Part, named: str, folder: str, where: str) -> Part:
        said = self.spec.says(part.type)
        said = {"role": said["role"] if part.role == "none" else part.role, "loss": part.loss and said["loss"]}
        if part.path is None:
            return replace(part, **said)
        if held := data_url(named, where):
            return replace(part, path=Path(where), file=held, **said)
        name = os.path.normpath(os.path.join(folder, part.path))
        return replace(part, path=Path(name), file=Blob.of(self.files, name), **said)

    def _read_members(self, items: list[SourceItem]) -> Iterator[DocumentFactory]:
        lock, file = self._locks[items[0].file], self._container_of(items[0])
        return (partial(self._make_of_members, item, file, lock) for item in items)

    def _make_of_members(self, item: SourceItem, file: IO[bytes], lock: threading.Lock) -> list[RawDocument]:
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
            suffix = PurePosixPath(name).name.partition(".")[2].lower() or "txt"
            blob = Blob(f"{item.file}/{name}", data, offset=start)
            row[suffix] = [*row[suffix], blob] if suffix in row else [blob]
        found = self._from_fields(item, {k: v if len(v) > 1 else v[0] for k, v in row.items()})
        kinds = Counter(PurePosixPath(name).suffix.lower() for name, _, _ in item.members)
        several = tuple(f"one key holds several {kind}" for kind, n in kinds.items() if n > 1)
        return [replace(raw, notes=raw.notes + several) for raw in found]

    def _read_rows(self, items: list[SourceItem]) -> Iterator[DocumentFactory]:
        self._container_of(items[0])
        wanted = deque(items)
        with closing(Table(self.files, items[0].file)) as table:
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
        yield from (partial(_raise, f"{item.where}: not there") for item in wanted)

    def _make_of_row(self, item: SourceItem, table: Table, batch: pa.RecordBatch, row: int) -> list[RawDocument]:
        return self._from_fields(item, table.fields(batch, row, f"{item.file}/{item.start}"))

    def _container_of(self, item: SourceItem) -> IO[bytes]:
        """The container of an item, unpacked; open until `close`. Errors: `UserError` when it is not as it was listed."""
        if item.file not in self._containers:
            packed = self.files.open(item.file)
            self._containers[item.file] = (packed, unpacked(packed), item.stamp)
            if self.files.stamp_of(packed, item.file)[1] != item.stamp:
                raise UserError(f"{item.file}: has changed since the run was planned; start with a new folder")
        return self._containers[item.file][1]

    def drop(self) -> dict[str, tuple[IO[bytes], IO[bytes], int]]:
        """Close what is open, without a look at whether it changed; -> what was open."""
        opened, self._containers = self._containers, {}
        for packed, file, _ in opened.values():
            file.close()
            packed.close()
        return opened

    def close(self) -> None:
        """After all that `read` gave was called; errors: `UserError` for a container that changed meanwhile: start anew."""
        for name, (_, _, stamp) in self.drop().items():
            if self.files.look(name).stamp != stamp:
                raise UserError(f"{name}: changed while it was read; start with a new folder")


def _raise(message: str) -> list[RawDocument]:
    raise UserError(message)


def read_texts(path: Path) -> Iterator[str]:
    """The strings of a corpus: the lines of a text file, or every text of an interleaved JSON Lines file."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder; give the text and .jsonl files in it")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        yield from (line.removesuffix("\r") for line in load_text(path).split("\n") if line.strip())
        return
    key = next(modality.key for modality in modalities().values() if modality.accepts(""))
    for number, row in read_json_lines(path):  # whatever its other parts are: there is no bundle yet that names them
        if isinstance(row, UserError):
            raise row
        parts = row.get("content") if isinstance(row, dict) else None
        if not isinstance(parts, list):
            raise UserError(f'{path.name}, line {number}: a document is {{"id": …, "content": [parts]}}')
        yield from (part[key] for part in parts if isinstance(part, dict) and isinstance(part.get(key), str) and part[key])
