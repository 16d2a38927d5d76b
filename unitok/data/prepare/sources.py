"""Sources -> raw documents. `Source.items` lists documents (`unitok.data.prepare.listing`); `Source.read` reads them.

- interleaved JSON Lines (`.jsonl`), one document per line (`unitok.interleaved`), lines of named fields, or conversations
  (`unitok.conversations`); a `.json` list of these;
- a folder that holds `documents.jsonl`: only the documents of that file;
- folders of modalities (`rgb/`, `depth/`, `caption/`, …), in which files of equal paths are one document (`unitok.data.prepare.aligned`);
- any other folder: first its files that hold many documents, then files of one base name (`cat.jpg`, `cat.txt`, `cat.json`),
  which are one document. A file that a line or a row names is not a document of its own (ImageFolder, AudioFolder);
- WebDataset archives (`.tar`, also compressed): members of one base name, up to the first dot, are one document;
- transcripts, whose lines name recordings, as LJSpeech and LibriSpeech have them (`unitok.data.prepare.transcripts`), one document per line;
- COCO's JSON files, whose images lie where COCO has them (`unitok.data.prepare.objects`), one document per image;
- Parquet and CSV files and Hugging Face data sets on disk, one document per row.

What a file is follows from its content and its role (`unitok.data.prepare.fields`). Suffixes only tell which files hold many
documents, and their content must agree. Only hidden files (`.name`) are left out without being counted.
"""

import json
import logging
import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO

import pyarrow as pa

from unitok.conversations import Media, data_url, is_conversation, read_conversation
from unitok.data.prepare.aligned import aligned_items, is_aligned, read_aligned
from unitok.data.prepare.containers import DAMAGE, Table, damage, unpacked
from unitok.data.prepare.fields import TEXT, Fields, RowContent, names_media, open_media, read_fields
from unitok.data.prepare.items import GROUP, ListingOptions, SourceItem
from unitok.data.prepare.listing import list_items
from unitok.data.prepare.objects import boxes_part, coco_parts
from unitok.data.prepare.recipe import SourceSpec, arrange
from unitok.data.prepare.recordings import Recordings, in_stretch, info_beside, with_speaker
from unitok.data.prepare.transcripts import read_transcript
from unitok.data.prepare.words import with_words
from unitok.document import Part, RawDocument
from unitok.errors import UserError
from unitok.files import parse_json_line
from unitok.interleaved import Types, raw_document
from unitok.media import promised
from unitok.modalities import modalities, modality_of
from unitok.storage import Blob, Folder, is_remote, kind_of_path, open_files

log = logging.getLogger("unitok")

DocumentFactory = Callable[[], list[RawDocument]]


class Source:
    """A source, opened. Errors: `UserError` where its path does not exist.

    Args:
        seed: of random orders. prefix: of the `source` of its documents, to tell several sources apart.
        types: the types that parts may have, as `Bundle.types`; default: all kinds. boxes: whether boxes of other formats are read as such.
        media: whether fields with names of media are read, where no template names them; else a row may be no document.
    """

    def __init__(
        self,
        spec: SourceSpec,
        seed: int = 0,
        prefix: str = "",
        types: Types | None = None,
        boxes: bool = False,
        media: bool = True,
    ):
        self.spec, self.seed, self.prefix, self.types, self.boxes = spec, seed, prefix, types, boxes
        self._texts_only = not (media or spec.template or spec.by_words)
        path = spec.path.removeprefix("file://")
        folder, alone, self.pattern = path, "", ""
        steps = path.split("/")
        path_kind = "" if "*" in path and is_remote(path) else kind_of_path(path)
        if not path_kind and "*" in path:  # a name may hold an asterisk, too
            fixed = next(i for i, step in enumerate(steps) if "*" in step)
            folder = "/".join(steps[:fixed]) or ("/" if path.startswith("/") else ".")
            self.pattern = "/".join(steps[fixed:])
            path_kind = kind_of_path(folder)
        if path_kind == "file":
            folder, alone = os.path.split(path) if is_remote(path) else (str(Path(path).parent), Path(path).name)
        elif not path_kind:
            raise UserError(f"{folder}: no such file or folder")
        self.files, self.alone = open_files(folder, spec.root, alone), alone
        self._recordings = Recordings(self.files)
        self.left_out: Counter[str] = Counter()  # counts by what it is, after `items`
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # of containers, which several threads read
        self._containers: dict[str, tuple[IO[bytes], IO[bytes], int]] = {}

    # ---- Listing -------------------------------------------------------------------------------------------------

    def items(self, on_file: Callable[[str], None] | None = None, file: str = "", groups: bool = True) -> Iterator[SourceItem]:
        """List the documents in a fixed order. Memory holds the names of one folder, and hashes of those that lines and rows name.

        on_file: see `ListingOptions`. file: list only this file of the source, whatever its pattern is. groups: whether fields name
            groups, so that a field that cannot is an error.
        """
        self.left_out.clear()
        spec = self.spec
        if not (file or self.alone or self.pattern or spec.template or self.through_lines()) and is_aligned(self.files):
            return iter(aligned_items(self.files, self.left_out, spec.group_separator))
        group = (spec.group or GROUP) if groups else ""
        options = ListingOptions(bool(self.alone), bool(spec.template), group, spec.group_separator, on_file)
        folders = (lambda: [([file], {})]) if file else self._folders()
        return list_items(self.files, folders, self.left_out, options)

    def _folders(self) -> Callable[[], Iterable[Folder]]:
        """The function that lists the folders and files that may hold documents."""
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
        beside = 0
        for names, known in self.files.folders():
            chosen = [n for n in names if self.matches(n) or (n in known and known[n].problem)]
            yield chosen, known
            stems, rest = {os.path.splitext(n)[0] for n in chosen}, set(names).difference(chosen)
            beside += sum(os.path.splitext(n)[0] in stems for n in rest if n.lower().endswith((".txt", ".json")))
        if beside:  # set, as names are read twice
            self.left_out["texts of the same base names as files of the pattern, which does not match them"] = beside

    def matches(self, name: str) -> bool:
        """Whether a name matches the pattern, where `*` stands for any characters, and `**/` for any folders or none."""
        return fnmatch(name, self.pattern) or fnmatch(name, self.pattern.replace("**/", ""))

    def through_lines(self) -> bool:
        """Whether it is a folder of which only `documents.jsonl` is read."""
        return not self.alone and not self.pattern and self.files.exists("documents.jsonl")

    def holds(self, path: Path) -> bool:
        """Whether a local path is inside this source, so that listing it would find files there."""
        if self.alone or self.files.remote is not None or self.files.exists("documents.jsonl"):
            return False
        return Path(os.path.realpath(path)).is_relative_to(self.files.folder)

    def _saved(self, inside: str = "") -> list[str]:
        """The files of a data set that `save_to_disk` wrote, in a folder (`inside`) of the source or at its top."""
        files = self._json(f"{inside}state.json", "_data_files")
        return [inside + f["filename"] for f in files if isinstance(f, dict) and isinstance(f.get("filename"), str)]

    def _json(self, name: str, key: str) -> list[object]:
        """A list in one of the small files beside a Hugging Face data set."""
        try:
            return list(json.loads(self.files.read(name))[key])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.spec.path}/{name}: no list {key!r} in it; it is not as `save_to_disk` writes it") from None

    # ---- Reading -------------------------------------------------------------------------------------------------

    def read(self, items: Sequence[SourceItem]) -> Iterator[DocumentFactory]:
        """For each item in order, a function that makes its raw documents, or raises `UserError` where it cannot be used."""
        readers = {"line": self._read_lines, "member": self._read_members, "row": self._read_rows, "coco": self._read_coco}
        readers["transcript"] = self._read_transcripts
        for (kind, _), run in groupby(items, key=lambda item: (item.kind, item.file)):
            if kind == "error":
                yield from (partial(_raise, item.error) for item in run)
            elif kind == "files":
                yield from (partial(self._make_of_files, item) for item in run)
            elif kind == "aligned":
                yield from (partial(self._make_of_aligned, item) for item in run)
            else:
                yield from readers[kind](list(run))

    def _document(self, item: SourceItem, content: RowContent, cuts: tuple[float, ...] = ()) -> list[RawDocument]:
        parts, notes = content
        if not parts:
            raise UserError(f"{item.where}: it has nothing to make a document of; name its fields in a template")
        arranged = arrange(self.spec, parts, item.id, self.seed)
        document = RawDocument(item.id, arranged, self.prefix + item.where, tuple(notes), cuts)
        if self.spec.order != ("both",) or len(parts) < 2:
            return [document]
        if any(part.role != "none" or not part.loss or modality_of(part.type).refers for part in document.content):
            raise UserError(
                f"{item.where}: order both: parts with roles, boxes and what is not learned stay in their order; leave it out"
            )
        turned = (arranged[-1], *arranged[:-1]) if cuts else arranged[::-1]  # words stay in their order
        return [document, replace(document, id=f"{item.id}#backwards", content=turned, notes=())]

    def from_fields(self, item: SourceItem, row: Fields, files: bool = False) -> list[RawDocument]:
        """The document of a row of named fields, by the template or without one."""
        folder = os.path.dirname(item.file)
        row = self._completed(row, item)
        cuts: tuple[float, ...] = ()

        def open_path(name: str) -> Blob:
            return Blob.of(self.files, os.path.normpath(os.path.join(folder, name)))

        def make(media: Media) -> Part:
            """What a conversation names or holds."""
            if media.text:  # boxes
                return boxes_part(media.content, media.text) if self.boxes else Part(TEXT, media.text)
            if media.kind not in (known := modalities() if self.types is None else self.types):
                raise UserError(f"{media.kind}: no such content here; there is {', '.join(known)}")
            if known[media.kind].inline:
                return Part(media.kind, known[media.kind].check(media.content, item.where))
            blob = open_media(media.content, media.kind, open_path)
            return Part(media.kind, path=Path(blob.name), file=blob)

        try:
            if not self.spec.template and is_conversation(row):
                if self.spec.by_words:
                    raise UserError("interleave words: a conversation has no words with times; leave it out")
                if self.spec.order:
                    raise UserError("order: the parts of a conversation stay in their order; leave it out")
                parts = read_conversation(row, make, self.spec.mask_history)
                content: RowContent = ([replace(p, loss=p.loss and self.spec.defaults(p.type)[1]) for p in parts], [])
            else:
                read = {name: value for name, value in row.items() if not (self._texts_only and names_media(name))}
                parts, notes = read_fields(self.spec, read, open_path, files, self.boxes)
                if not parts and len(read) < len(row):
                    return []
                if not self.spec.template:
                    parts, of_stretch = in_stretch(parts, row, folder)
                    parts, of_speaker = with_speaker(parts, row, self.spec.speakers)
                    notes = [*notes, *of_stretch, *of_speaker]
                if self.spec.by_words:
                    parts, cuts = with_words(parts, row, self.spec)
                content = parts, notes
        except UserError as error:
            message = str(error)
            raise UserError(message if message.startswith(item.where) else f"{item.where}: {message}") from None
        return self._document(item, content, cuts)

    def _completed(self, row: Fields, item: SourceItem) -> Fields:
        """A row with the files that it names in a way of its own. Errors: `UserError`."""
        if self.spec.template:
            return self._recordings.placed(row, item.file)
        try:
            row = self._recordings.completed(row, item.file)
        except UserError as error:
            if self._texts_only:
                return row
            raise UserError(f"{item.where}: {error}") from None
        info = info_beside(row)
        path = os.path.normpath(os.path.join(os.path.dirname(item.file), info)) if info else ""
        return {**row, "json": Blob.of(self.files, path)} if path and self.files.exists(path) else row

    def _make_of_aligned(self, item: SourceItem) -> list[RawDocument]:
        if self.spec.by_words:
            raise UserError(f"{item.where}: interleave words: folders of modalities have no words with times; leave it out")
        return self._document(item, (read_aligned(self.spec, self.files, item), []))

    def _make_of_files(self, item: SourceItem) -> list[RawDocument]:
        row: dict[str, list[Blob]] = {}
        for name, stamp, _ in item.members:
            row.setdefault(os.path.splitext(name)[1].removeprefix(".") or name, []).append(Blob.of(self.files, name, stamp))
        return self.from_fields(item, _single(row), files=True)

    def _read_lines(self, items: list[SourceItem]) -> Iterator[DocumentFactory]:
        file = self._container_of(items[0])
        last, line = -1, b""
        for item in items:
            if item.start != last:  # a document that is taken twice comes twice in a row
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
            return self.from_fields(item, row)
        if self.spec.by_words:
            raise UserError(
                f"{item.where}: interleave words: it is for fields `audio` and `words`, and this line has `content`"
            )
        raw = raw_document(row, Path(""), item.where, item.id, self.types)
        folder = os.path.dirname(item.file)
        named = [str(part.get("path", "")) for part in row["content"]]
        parts = [self._with_file(*pair, folder, item.where) for pair in zip(raw.content, named)]
        return self._document(item, (parts, []))

    def _with_file(self, part: Part, named: str, folder: str, where: str) -> Part:
        """A part of a line with the source's role and loss, and with what reads its file."""
        role, loss = self.spec.defaults(part.type)
        part = replace(part, role=role if part.role == "none" else part.role, loss=part.loss and loss)
        if part.path is None:
            return part
        if content := data_url(named, where):
            return replace(part, path=Path(where), file=content)
        name = os.path.normpath(os.path.join(folder, part.path))
        return replace(part, path=Path(name), file=Blob.of(self.files, name))

    def _read_members(self, items: list[SourceItem]) -> Iterator[DocumentFactory]:
        lock, file = self._locks[items[0].file], self._container_of(items[0])
        if file is self._containers[items[0].file][0]:
            for item in items:
                yield partial(self._make_of_members, item, partial(_members, item, file, lock))
            return
        for item in items:  # forward and in this thread: to go back in a compressed file is to begin again
            try:
                contents = _members(item, file, lock)
            except UserError as error:
                yield partial(_raise, str(error))
            else:
                yield partial(self._make_of_members, item, partial(list, contents))

    def _make_of_members(self, item: SourceItem, read: Callable[[], list[bytes]]) -> list[RawDocument]:
        row: dict[str, list[Blob]] = {}
        for (name, start, _), data in zip(item.members, read(), strict=True):
            suffix = PurePosixPath(name).name.partition(".")[2].lower() or "txt"
            blob = Blob(f"{item.file}/{name}", data, offset=start)
            row.setdefault(suffix, []).append(blob)
        documents = self.from_fields(item, _single(row))
        suffixes = Counter(PurePosixPath(name).suffix.lower() for name, _, _ in item.members)
        notes = tuple(f"one key holds several {suffix}" for suffix, n in suffixes.items() if n > 1)
        return [replace(raw, notes=raw.notes + notes) for raw in documents]

    def _read_coco(self, items: list[SourceItem]) -> Iterator[DocumentFactory]:
        lock, file = self._locks[items[0].file], self._seekable(items[0])
        for item in items:
            yield partial(self._make_of_coco, item, partial(_members, item, file, lock))

    def transcripts(self, items: Iterable[SourceItem]) -> Iterator[tuple[SourceItem, Callable[[], dict[str, str]]]]:
        """Each line of transcripts with a function that returns its fields, without its recording, or raises `UserError`."""
        for item in items:
            fields = replace(item, members=item.members[1:])
            yield item, partial(_row_of_transcript, fields, self._seekable(item), self._locks[item.file])

    def _read_transcripts(self, items: list[SourceItem]) -> Iterator[DocumentFactory]:
        return (partial(self._make_of_transcript, item, read) for item, read in self.transcripts(items))

    def _make_of_transcript(self, item: SourceItem, read: Callable[[], dict[str, str]]) -> list[RawDocument]:
        recording = item.members[0][0]
        kind = promised(recording).removeprefix("an ").removeprefix("a ")
        return self.from_fields(replace(item, file=""), {kind: Blob.of(self.files, recording), **read()})

    def _make_of_coco(self, item: SourceItem, read: Callable[[], list[bytes]]) -> list[RawDocument]:
        records = read()
        listed = [record for (name, *_), record in zip(item.members, records, strict=True) if name == "categories"]
        try:
            captions, objects = coco_parts(records[: len(records) - len(listed)], b"".join(listed))
        except UserError as error:
            raise UserError(f"{item.where}: {error}") from None
        row = {"img": Blob.of(self.files, item.members[0][0]), "captions": captions, "objects": objects}
        return self.from_fields(replace(item, file=""), row)

    def _read_rows(self, items: list[SourceItem]) -> Iterator[DocumentFactory]:
        self._container_of(items[0])
        remaining = deque(items)
        with closing(Table(self.files, items[0].file)) as table:
            for first, count, batches in table.stretches(items[0].start, items[-1].start + 1, self._texts_only):
                end = first + count
                try:
                    for batch in batches():
                        while remaining and remaining[0].start < first + batch.num_rows:
                            item = remaining.popleft()
                            yield partial(self._make_of_row, item, table, batch, item.start - first)
                        first += batch.num_rows
                except DAMAGE as error:
                    reason = damage(error, items[0].file)
                    while remaining and remaining[0].start < end:
                        yield partial(_raise, f"{remaining.popleft().where}: damaged ({reason})")
        yield from (partial(_raise, f"{item.where}: the table has no such row") for item in remaining)

    def _make_of_row(self, item: SourceItem, table: Table, batch: pa.RecordBatch, row: int) -> list[RawDocument]:
        return self.from_fields(item, table.fields(batch, row, f"{item.file}/{item.start}"))

    def _seekable(self, item: SourceItem) -> IO[bytes]:
        """The decompressed file that holds an item, in which to go back is not to begin again."""
        file, (packed, _, stamp) = self._container_of(item), self._containers[item.file]
        if file is packed or isinstance(file, BytesIO):
            return file
        self._containers[item.file] = packed, BytesIO(file.read()), stamp
        return self._containers[item.file][1]

    def _container_of(self, item: SourceItem) -> IO[bytes]:
        """The decompressed file that holds an item, open until `close`. Errors: `UserError` where it changed since it was listed."""
        if item.file not in self._containers:
            packed = self.files.open(item.file)
            self._containers[item.file] = (packed, unpacked(packed), item.stamp)
            if self.files.stamp_of(packed, item.file)[1] != item.stamp:
                raise UserError(f"{item.file}: has changed since the run was planned; start with a new folder")
        return self._containers[item.file][1]

    def drop(self) -> dict[str, tuple[IO[bytes], IO[bytes], int]]:
        """Close all containers, whether or not they changed. Returns: those that were open."""
        opened, self._containers = self._containers, {}
        for packed, file, _ in opened.values():
            file.close()
            packed.close()
        return opened

    def close(self) -> None:
        """Close all containers, after the functions of `read` were called. Errors: `UserError` for one that changed meanwhile."""
        for name, (_, _, stamp) in self.drop().items():
            if self.files.look(name).stamp != stamp:
                raise UserError(f"{name}: changed while it was read; start with a new folder")


def _single(row: dict[str, list[Blob]]) -> dict[str, object]:
    """Files by suffix, as fields: one alone is no list."""
    return {suffix: blobs if len(blobs) > 1 else blobs[0] for suffix, blobs in row.items()}


def _members(item: SourceItem, file: IO[bytes], lock: threading.Lock) -> list[bytes]:
    """The contents of an archive's members that are one document. Errors: `UserError` for a damaged archive."""
    contents = []
    for _, start, length in item.members:
        try:
            with lock:
                file.seek(start)
                contents.append(file.read(length))
        except DAMAGE as error:
            raise UserError(f"{item.where}: cannot be read ({damage(error, item.where)})") from None
        if len(contents[-1]) != length:
            raise UserError(f"{item.where}: cut off")
    return contents


def _row_of_transcript(fields: SourceItem, file: IO[bytes], lock: threading.Lock) -> dict[str, str]:
    """The texts of a line's fields, which are the members of the item. Errors: `UserError`."""
    contents = _members(fields, file, lock)
    try:
        return read_transcript([(name, data) for (name, *_), data in zip(fields.members, contents, strict=True)])
    except UserError as error:
        raise UserError(f"{fields.where}: {error}") from None


def _raise(message: str) -> list[RawDocument]:
    raise UserError(message)
