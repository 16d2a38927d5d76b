"""List the documents of a source without reading their content: one `SourceItem` per document.

Files that hold many documents (JSON Lines, JSON lists, archives, tables) are listed item by item; files of one base name are one
document. Damage is an item of its own, with the reason.
"""

import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath

from unitok.data.prepare.containers import DAMAGE, SEPARATORS, Table, damage, is_tar, list_members, opened, plain_name
from unitok.data.prepare.fields import CAPTIONS, names_media
from unitok.data.prepare.items import Claims, ListingOptions, SourceItem
from unitok.data.prepare.objects import coco_folders, coco_images, is_coco, may_be_coco
from unitok.data.prepare.recordings import COMMENT, RECORDING_COLUMNS, is_webvid
from unitok.data.prepare.splits import describes_data_set, folder_split_of, group_of_id, split_of
from unitok.data.prepare.transcripts import Layout, find_layout, may_be_transcripts, transcript_lines
from unitok.errors import UserError, is_utf8
from unitok.storage import MAX_BYTES, FileInfo, Files, Folder, printable

#: Suffixes of texts, some of which are transcripts.
_TEXTS = (".txt", ".lst", ".list")

#: Longest line of a JSON Lines file, in bytes.
MAX_LINE = 64 << 20


def _refused(where: str, problem: str) -> SourceItem:
    return SourceItem("", where, "error", error=f"{where}: {problem}")


def _broken(where: str, f: FileInfo, error: BaseException, what: str = "damaged: the rest cannot be read") -> SourceItem:
    """The item for an error (of `DAMAGE`) in a file that holds many documents: all of it is lost, or all after `where`."""
    if isinstance(error, UserError):
        return SourceItem("", f.name, "error", error=str(error))
    return _refused(where, f"{what} ({damage(error, f.name)})")


def list_items(
    files: Files, folders: Callable[[], Iterable[Folder]], left_out: Counter[str], options: ListingOptions
) -> Iterator[SourceItem]:
    """List files that hold many documents, then the other files. Names are read twice, to know first which files lines name.

    left_out: counts what is left out, by what it is.
    """
    splits: set[str] = set()
    many: list[FileInfo] = []
    for names, known in folders():
        stems = _stems_of_media(names)
        splits.update(folder_split_of(name) for name in names[:1])
        for name in names:
            if not may_hold_many(name, stems) or (f := known.get(name) or files.look(name)).problem:
                continue
            if not plain_name(name).lower().endswith(_TEXTS) or lists_documents(files, name):
                many.append(f)
                splits.add(split_of(name))
    has_splits = len(splits - {""}) > 1 and "train" in splits
    claims = Claims(files, has_splits, options)
    listed = set()
    for f in many:
        if list_it := _lister(files, f.name):
            listed.add(f.name)
            if list_it is _table_items and not options.template and _unused_table(files, f.name):
                left_out["tables without a column that is read"] += 1
                continue
            for item in list_it(files, f, claims):
                if item.error and item.where == f.name and re.search(r"(^|/)metadata\.|\.[ct]sv(\.|$)", f.name.lower()):
                    raise UserError(f"{item.error}; mend it: its captions of the files beside it would be lost")
                yield claims.describe(item, f.name)
    found = single = 0  # files that lines name, and others
    for names, known in folders():
        loose = []
        named = {os.path.splitext(name)[0] for name in names if name in claims}
        for name in names:
            if name in listed:
                continue
            if describes_data_set(name) and not options.alone:
                left_out["files that describe a data set"] += 1
            elif name not in claims and os.path.splitext(name)[0] in named:
                left_out["files of the same base name as one that a line or row names"] += 1
            elif name not in claims:
                f = known.get(name) or files.look(name)
                if f.problem:
                    yield _refused(f.name, f.problem)
                else:
                    loose.append(f)
            else:
                found += 1
        single += len(loose)
        for item in _files_items(loose, has_splits):
            stem = item.group or os.path.splitext(item.id)[0]
            group = group_of_id(stem, options.group_separator)
            yield replace(item, group=group) if group else item
    if len(claims) and single and not found and files.remote is None and len(files.roots) == 1:
        left_out[
            "names of files in lines or rows, none of them in the source: its files are used without what is said there"
        ] = len(claims)


# ---- Files that hold many documents -----------------------------------------------------------------------------------


_Lister = Callable[[Files, FileInfo, Claims], Iterator[SourceItem]]


def may_hold_many(name: str, beside: set[str]) -> bool:
    """Whether a file's name suggests that it holds many documents. beside: base names of the media files of its folder."""
    plain = plain_name(name)
    if plain.lower().endswith(".json"):
        return os.path.splitext(plain)[0] not in beside and not describes_data_set(name)
    if plain.lower().endswith(_TEXTS):
        return os.path.splitext(plain)[0] not in beside and may_be_transcripts(plain)
    return plain.lower().endswith((".tar", ".tgz", ".parquet", ".arrow", ".jsonl", ".ndjson", ".csv", ".tsv"))


def _lister(files: Files, name: str) -> _Lister | None:
    """The function that lists a file that may hold many documents; None where its content shows that it does not."""
    plain = plain_name(name).lower()
    if plain.endswith((".tar", ".tgz")):
        head = _head(files, name)
        return _archive_items if is_tar(head) else None
    if name.lower().endswith(".parquet"):
        return _table_items if _head(files, name)[:4] == b"PAR1" else None
    if plain.endswith(".json"):
        head = _head(files, name)
        if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", head):
            return _list_items
        if may_be_coco(head) and not _is_lines(files, name) and is_coco(_head(files, name, MAX_BYTES)):
            return _coco_items
        return _line_items if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and _is_lines(files, name) else None
    if may_be_transcripts(plain) and (layout := find_layout(files, name)):
        return partial(_transcript_items, layout)
    if plain.endswith((".jsonl", ".ndjson")):
        return _line_items
    return _table_items if plain.endswith((".csv", ".tsv", ".arrow", ".parquet")) or _has_header(files, name) else None


def lists_documents(files: Files, name: str) -> bool:
    """Whether a text lists documents: a line for each, without a header or below one."""
    return find_layout(files, name) is not None or _has_header(files, name)


def _has_header(files: Files, name: str) -> bool:
    """Whether a text is a table by its first line: names of columns, one of media and one of captions among them."""
    line = _head(files, name, 4096).partition(b"\n")[0].decode("utf-8-sig", "replace")
    cells = [cell.strip(' "\r').lower() for cell in line.split(max(SEPARATORS, key=line.count))]
    return any(map(names_media, cells)) and not {COMMENT, *CAPTIONS}.isdisjoint(cells)


def _head(files: Files, name: str, size: int = 512) -> bytes:
    """The first bytes of a file, decompressed; none of one that cannot be read."""
    try:
        with opened(files, name) as (file, _):
            return file.read(size)
    except UserError:
        return b""
    except DAMAGE as error:
        damage(error, name)  # a disk or server that fails stops the run
        return b""


def _is_lines(files: Files, name: str) -> bool:
    """Whether a JSON file is an object on each of its first two lines, as `datasets` reads them."""
    try:
        with opened(files, name) as (file, _):
            lines = (line for line in iter(partial(file.readline, MAX_LINE), b"") if line.strip())
            first = [json.loads(line) for line, _ in zip(lines, range(2))]
    except (UserError, RecursionError, *DAMAGE):
        return False
    return len(first) == 2 and all(isinstance(row, dict) for row in first)


def _line_items(files: Files, f: FileInfo, claims: Claims) -> Iterator[SourceItem]:
    stem = PurePosixPath(f.name).stem
    at = number = 0
    try:
        with opened(files, f.name) as (file, _):
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
                    id = _line_id(line, f"{stem}-{number}", f.name, claims)
                    yield SourceItem(id, where, "line", f.name, f.stamp, start, len(line))
    except DAMAGE as error:
        yield _broken(f"{f.name}, after line {number}", f, error)


def _list_items(files: Files, f: FileInfo, claims: Claims) -> Iterator[SourceItem]:
    """The objects of a JSON file that is a list of them; each is an item like a line."""
    stem, decoder = PurePosixPath(f.name).stem, json.JSONDecoder()
    at = number = 0
    try:
        with opened(files, f.name) as (file, _):
            text = file.read(MAX_BYTES).decode(
                "latin-1"
            )  # one character per byte, so that positions in the text are those in the file
        at = text.index("[") + 1
        while True:
            at = re.compile(r"[\s,]*").match(text, at).end()  # type: ignore[union-attr]
            if text.startswith("]", at):
                return
            number += 1
            _, end = decoder.raw_decode(text, at)
            line = text[at:end].encode("latin-1")
            id = _line_id(line, f"{stem}-{number}", f.name, claims)
            yield SourceItem(id, f"{f.name}, entry {number}", "line", f.name, f.stamp, at, end - at)
            at = end
    except (*DAMAGE, RecursionError) as error:
        yield _broken(f"{f.name}, entry {number}", f, error, "not JSON: the rest cannot be read")


def _coco_items(files: Files, f: FileInfo, claims: Claims) -> Iterator[SourceItem]:
    """The images of a COCO file; each is an item whose members are the records of it, of its annotations, and of all categories."""
    try:
        with opened(files, f.name) as (file, _):
            images = list(coco_images(file.read(MAX_BYTES).decode("latin-1")))
        beside, some = os.path.dirname(f.name), [named for named, _ in images[:100]]
        lie_in = (
            one for one in coco_folders(f.name) if any(not files.look(os.path.join(one, named)).problem for named in some)
        )
        folder = next(lie_in, beside)
        for number, (named, records) in enumerate(images, 1):
            name = os.path.normpath(os.path.join(folder, named))
            claims.claim(name)
            members, where = ((name, *records[0][1:]), *records[1:]), f"{f.name}, image {number}"
            yield SourceItem(PurePosixPath(named).stem, where, "coco", f.name, f.stamp, members=members)
    except UserError as error:
        yield _refused(f.name, str(error))
    except (*DAMAGE, RecursionError) as error:
        yield _broken(f.name, f, error, "not JSON as COCO writes it")


def _transcript_items(layout: Layout, files: Files, f: FileInfo, claims: Claims) -> Iterator[SourceItem]:
    """The lines of transcripts; each is an item whose members are its recording and the fields of the line."""
    number = 0
    try:
        for line in transcript_lines(files, f.name, layout):
            number, where = line.number, f"{f.name}, line {line.number}"
            if line.problem:
                yield _refused(where, line.problem)
                continue
            claims.read(line.row, f.name)
            claims.claim(line.recording)
            members = ((line.recording, 0, 0), *line.fields)
            yield SourceItem(printable(line.id), where, "transcript", f.name, f.stamp, members=members)
    except DAMAGE as error:
        yield _broken(f"{f.name}, after line {number}", f, error)


def _line_id(line: bytes, default: str, file: str, claims: Claims) -> str:
    """The `id` of a line, or the default; `claims` notes what else it says. A bad line is reported when it is read, not here."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return default
    if not isinstance(row, dict):
        return default
    claims.read(row, file)
    id = default if row.get("id") is None else str(row["id"])
    return id if is_utf8(id) else default


def _archive_items(files: Files, f: FileInfo, claims: Claims) -> Iterator[SourceItem]:
    """The samples of an archive. All of it is read before the first item, because a key may come again at its end."""
    samples: dict[str, list[tuple[str, int, int]]] = {}
    apart: set[str] = set()
    bad: list[SourceItem] = []
    key, last = None, "its beginning"
    try:
        with opened(files, f.name) as (file, compressed):
            for member in list_members(file, compressed):
                last = member.name or last
                if member.problem:
                    bad.append(_refused(f"{f.name}, {member.name or f'after {last}'}", member.problem))
                    continue
                inside, slash, base = member.name.rpartition("/")
                sample = inside + slash + base.split(".", 1)[0]
                if sample != key and sample in samples:
                    apart.add(sample)
                key = sample
                samples.setdefault(sample, []).append((member.name, member.start, member.length))
    except DAMAGE as error:
        bad.append(_broken(f"{f.name}, after {last}", f, error))
    for key, members in samples.items():
        where = f"{f.name}, {key}"
        if key in apart:
            yield _refused(where, "its members are apart, with other keys in between; sort the archive (tar --sort=name)")
        else:
            yield SourceItem(key, where, "member", f.name, f.stamp, members=tuple(members))
    yield from bad


def _table_items(files: Files, f: FileInfo, claims: Claims) -> Iterator[SourceItem]:
    try:
        with closing(Table(files, f.name)) as table:
            group = claims.options.group
            for row, (id, named) in enumerate(
                table.listed(lambda name: names_media(name) or name in ("split", *RECORDING_COLUMNS), group)
            ):
                claims.read(named, f.name)
                yield SourceItem(printable(id), f"{f.name}, row {row}", "row", f.name, f.stamp, row)
            for problem, text in table.bad_rows:
                for cell in re.split(r"[,;|\t]", text):
                    claims.claim(os.path.join(os.path.dirname(f.name), cell.strip(' "')))
                yield _refused(f"{f.name}, a row", problem)
    except DAMAGE as error:
        yield _broken(f.name, f, error, "not a readable table")


def _unused_table(files: Files, name: str) -> bool:
    """Whether a CSV file has no column that is read, such as one of statistics. Errors are reported when it is listed."""
    if not plain_name(name).lower().endswith((".csv", ".tsv")):
        return False
    try:
        with closing(Table(files, name)) as table:
            columns = set(table.schema.names)
            return not (is_webvid(columns) or any(column.lower() in CAPTIONS or names_media(column) for column in columns))
    except (UserError, *DAMAGE):
        return False


# ---- Files of one base name -------------------------------------------------------------------------------------------


def _stems_of_media(names: Iterable[str]) -> set[str]:
    """Base names of the files of a folder whose suffix is not one of text or metadata."""
    return {os.path.splitext(n)[0] for n in names if not (n.lower().endswith((*_TEXTS, ".json")) or may_hold_many(n, set()))}


def _files_items(infos: list[FileInfo], has_splits: bool) -> Iterator[SourceItem]:
    """The files of one folder as items: those of one base name are one item, `cat.jpg` and `cat.jpg.txt` too; two of them where
    `cat.png` has a `cat.png.txt`, too.

    Without media each text is an item; texts of one base name are a group.
    """
    names = {f.name for f in infos}
    described = {stem for name in names if (stem := os.path.splitext(name)[0]) in names}
    several = Counter(os.path.splitext(name)[0] for name in described)
    by_stem: dict[str, list[FileInfo]] = defaultdict(list)
    for f in infos:
        stem = os.path.splitext(f.name)[0]
        whole = stem if stem in names else f.name
        stem = os.path.splitext(whole)[0]
        by_stem[unicodedata.normalize("NFC", whole if whole in described and several[stem] > 1 else stem)].append(f)
    for stem, same_stem in by_stem.items():
        media = [f for f in same_stem if not f.name.lower().endswith((".txt", ".json"))]
        documents = [same_stem] if media else [[f] for f in same_stem]
        for document in documents:
            first = next((f for f in document if f in media), document[0])
            name = first.name if len(media) < 2 else stem
            members = tuple((f.name, f.stamp, f.size) for f in document)
            group = stem if len(documents) > 1 else ""
            split = folder_split_of(name) if has_splits else ""
            yield SourceItem(name, name, "files", members=members, split=split, group=group)
