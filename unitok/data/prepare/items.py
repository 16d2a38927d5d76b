"""What listing a source gives: one `SourceItem` per document, by what lines and rows say of files, splits and groups."""

import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from unitok.conversations import files_of
from unitok.data.prepare.fields import names_file, names_media
from unitok.data.prepare.recordings import Recordings
from unitok.data.prepare.splits import folder_split_of, group_of_id, split_of
from unitok.errors import UserError, is_utf8
from unitok.storage import Files

#: The field that names a document's group, where the source names none.
GROUP = "group"


@dataclass(frozen=True)
class SourceItem:
    """Where one document is.

    Args:
        where: file and line, member or row, for messages.
        kind: `files`, `line`, `member`, `row`, or `error` for what cannot be used.
        file, stamp: the file that holds it among others, relative to the source.
        start, length: bytes of a line; number of a row.
        members: files of one base name, or an archive's members: name, start (in a folder, the stamp) and length in bytes.
        split: `train`, `validation` or `test`, where a field or the name of a file or folder says so.
        group: documents of one group are never divided between `train` and `validation`; "": the document is its own.
        named: the first file that a line or row names; documents without a group that name the same one are a group.
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
    split: str = ""
    group: str = ""
    named: str = ""


@dataclass(frozen=True)
class ListingOptions:
    """How a source is listed.

    Args:
        alone: the source is one file. template: the source has a template, so every table is read.
        group, group_separator: as `SourceSpec.group`, `SourceSpec.group_separator`.
        on_file: is called with every file that a line or row names, relative to the source, before the item of that line.
    """

    alone: bool = False
    template: bool = False
    group: str = GROUP
    group_separator: str = ""
    on_file: Callable[[str], None] | None = None


class Claims:
    """What lines and rows say: the files that they name; split and group of the last one.

    Args:
        files: the source's. has_splits: whether names of folders are those of splits.
    """

    def __init__(self, files: Files, has_splits: bool, options: ListingOptions):
        self.files, self.has_splits, self.options = files, has_splits, options
        self.folder = "" if files.remote else files.folder  # for names that are absolute
        self._recordings = Recordings(files, trusting=True)
        self._names: set[int] = set()
        self._split, self._group, self._folder_splits, self._no_group = "", "", set[str](), ""
        self._first = ""  # of the files that the line or row names

    def read(self, row: Mapping[str, object], file: str) -> None:
        """Note what a line or row of a file says: its fields `split` and `group`, and the files that it names."""
        self._split = split_of(f"{row.get('split')}/")  # `test-clean` is a test, too
        try:
            self._group = _group_in(row, self.options.group)
        except UserError as error:
            self._no_group = str(error)
        with suppress(UserError):  # which is reported when the row is read
            row = self._recordings.completed(row, file)
        for name in files_in(row):
            self.claim(os.path.join(os.path.dirname(file), name))

    def claim(self, path: str) -> None:
        """Note that a file names another. path: relative to the source, or absolute."""
        path = os.path.normpath(path).removeprefix(self.folder + "/")
        self._first = self._first or path
        self._names.add(hash(unicodedata.normalize("NFC", path)))
        self._folder_splits.add(folder_split_of(path))
        if self.options.on_file:
            self.options.on_file(path)

    def describe(self, item: SourceItem, file: str) -> SourceItem:
        """The item of the line or row that was just read, with its group and split.

        The split is that of its field, else of the folders of the files that it names, else of the name of `file`.

        Errors: `UserError` for a group that is neither a text nor a whole number: ignoring it would divide the group.
        """
        if self._no_group:
            raise UserError(f"{item.where}: {self._no_group}")
        split, group, folder_splits, named = self._split, self._group, self._folder_splits, self._first
        self._split, self._group, self._folder_splits, self._first = "", "", set(), ""
        if not split and self.has_splits:
            split = next(iter(folder_splits)) if len(folder_splits) == 1 and "" not in folder_splits else split_of(file)
        return replace(item, split=split, group=group or group_of_id(item.id, self.options.group_separator), named=named)

    def __len__(self) -> int:
        """The number of names."""
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return bool(self._names) and hash(unicodedata.normalize("NFC", os.path.normpath(name))) in self._names


def _group_in(row: Mapping[str, object], field: str) -> str:
    """The group that a line or row names, or ""; a field of a record in it is named with a dot. Numbers count as their digits.

    Errors: `UserError` for a value that is none.
    """
    value: object = row
    for step in [field] if field in row else field.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    if value is None or value != value:  # NaN: how pandas writes no value among numbers
        return ""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if not isinstance(value, str | int) or not is_utf8(str(value)):
        raise UserError(
            f"{field} {str(value)[:40]!r}: a group is a text or a whole number; mend it, or name another field as `group`"
        )
    return str(value)


def files_in(row: Mapping[str, object]) -> Iterator[str]:
    """The files that a line or row names."""
    yield from files_of(row)
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        if name == "content":
            yield from (v["path"] for v in values if isinstance(v, dict) and isinstance(v.get("path"), str))
        elif names_media(name):
            yield from (v for v in values if isinstance(v, str) and len(v) < 4096 and names_file(name, v))
            yield from (v["path"] for v in values if isinstance(v, dict) and isinstance(v.get("path"), str))
