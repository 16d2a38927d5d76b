"""List the images or audio that a tokenizer is trained on: in folders, by patterns, and as JSON Lines, archives and recipes name them.

Files are chosen by their suffix and are not opened; only a file whose suffix tells nothing is looked into. The status of each is read,
which refuses links that leave the source: a million files take about a minute (51 microseconds per file on 2 cores). A file that is not what its suffix says is found when it is read.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unitok.data.prepare.containers import opened
from unitok.data.prepare.items import SourceItem
from unitok.data.prepare.listing import may_hold_many
from unitok.data.prepare.recipe import Filters, SourceSpec, hash_fraction, load_recipe
from unitok.data.prepare.sources import Source
from unitok.data.prepare.splits import folder_split_of, split_of
from unitok.errors import UserError
from unitok.media import promised, sniff
from unitok.media.formats import HEAD, promised_kind
from unitok.storage import is_remote

log = logging.getLogger("unitok")

#: Suffixes that `promised` does not know, of files that are neither images nor audio.
_OTHERS = frozenset(
    [
        "txt",
        "json",
        "jsonl",
        "ndjson",
        "csv",
        "tsv",
        "md",
        "xml",
        "html",
        "htm",
        "yaml",
        "yml",
        "log",
        "npy",
        "npz",
        "pt",
        "pth",
        "bin",
        "db",
        "index",
        "lab",
        "lrc",
        "srt",
        "vtt",
    ]
)
LONGEST_NAME = 4096  # longer texts in fields of media are base64


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A local file, or a member of an uncompressed tar archive.

    Args:
        path: of the file, or of the archive. member: name in the archive. start, length: bytes of the member.
    """

    path: str
    member: str = ""
    start: int = 0
    length: int = 0

    @property
    def label(self) -> Path:
        """What messages call it; its suffix is that of the content."""
        return Path(self.path, self.member) if self.member else Path(self.path)

    def head(self) -> bytes:
        """The first bytes, by which formats are recognized. Errors: `OSError`."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(min(HEAD, self.length) if self.member else HEAD)

    def read(self) -> bytes | None:
        """The bytes of a member; None for a file of its own. Errors: `UserError` for what is not a regular file; `OSError`."""
        if not os.path.isfile(self.path):  # a pipe would wait forever
            raise UserError(f"{self.path}: no such file")
        if not self.member:
            return None
        with open(self.path, "rb") as archive:
            archive.seek(self.start)
            return archive.read(self.length)


Listed = Iterator[tuple[str, MediaFile]]  # each with its split, or ""


def list_media(
    paths: str | Path | Sequence[str], kind: str, root: str = "", seed: int = 0, also: tuple[str, ...] = ()
) -> list[MediaFile]:
    """The files of one kind (`image`, `audio` or `video`), in a fixed order.

    Those of the splits `validation` and `test` are left out where a source has others. Links may not leave a source's folder.

    Args:
        paths: folders (all files in them), patterns (`photos/**/*.jpg`), JSON Lines files and tables that name files, tar archives,
            and recipes (`.yaml`) of these; a recipe's weights count, its filters and options do not.
        root: another folder that paths in JSON Lines files and tables may lead into; default: they must not leave their own.
        seed: chooses which files a recipe's weights leave out or repeat.
        also: further kinds.

    Errors: `UserError` for a path that does not exist, that is remote, or that has no such files, and where a recipe's weights leave out all.
    """
    files: list[MediaFile] = []
    for path in [str(paths)] if isinstance(paths, str | Path) else paths:
        for spec in _specs(path, root):
            copies, fraction = divmod(spec.weight, 1)
            folder, listed = _in_source(spec, (kind, *also))
            for file in dict.fromkeys(listed):
                name = os.path.relpath(file.label, folder)  # a copy of the source elsewhere gives the same
                again = fraction > 0 and hash_fraction(seed, "weight", name) < fraction
                files += [file] * (int(copies) + again)
    if not files:
        raise UserError(
            f"{paths}: no files are left: raise the weights in it" if paths else "path: give a folder, file or pattern"
        )
    return files


def _specs(path: str, root: str) -> list[SourceSpec]:
    """The sources of a recipe, or a path as the only one. Errors: `UserError` for what is not local."""
    recipe = path.endswith((".yaml", ".yml")) and os.path.isfile(path)
    specs = load_recipe(Path(path)) if recipe else [SourceSpec(path, root=root)]
    for spec in specs:
        if is_remote(spec.path):
            raise UserError(f"{spec.path}: tokenizers are trained on local files; copy it to this machine")
        if spec.filters != Filters():
            log.warning("%s: the recipe's filters hold for `unitok tokenize` alone", spec.path)
    return specs


def _in_source(spec: SourceSpec, kinds: tuple[str, ...]) -> tuple[str, list[MediaFile]]:
    """The folder of a source, and its files without those that it assigns to the splits `validation` and `test`; where it has no others, all.

    Errors: `UserError` where there are none.
    """
    source, skipped = Source(spec), Counter[str]()
    listed = list(_in_documents(source, kinds, skipped) if source.alone else _in_folders(source, kinds, skipped))
    split_by_file = {file: split for split, file in listed if split in ("validation", "test")}  # also of files listed twice
    if others := Counter(split_by_file.values()):
        counts = ", ".join(f"{count} files of the split {split}" for split, count in sorted(others.items()))
        if rest := [(split, file) for split, file in listed if file not in split_by_file]:
            listed = rest
            log.warning("%s: left out: %s; name such a folder itself to use it", spec.path, counts)
        else:
            log.warning("%s: it has no files of other splits: all are used (%s)", spec.path, counts)
    problems = "; ".join(f"{count} {what}" for what, count in skipped.most_common(3))
    if not listed:
        what = f"{spec.path}: no {' or '.join(kinds)} files in it"
        raise UserError(f"{what} ({problems})" if problems else what)
    if problems:
        log.warning("%s: left out: %s", spec.path, problems)
    return source.files.folder, [file for _, file in listed]


def _in_folders(source: Source, kinds: tuple[str, ...], skipped: Counter[str]) -> Listed:
    """The files of the kinds in a folder or of a pattern, and in the archives there; of a pattern in all files that name some."""
    for names, known in source.files.folders():
        for name in names:
            if source.pattern and not source.matches(name) and name not in known:
                continue
            holds_many = name.lower().endswith(".tar") or (source.pattern != "" and may_hold_many(name, set()))
            if not holds_many and not _may_be_media(name, kinds):
                continue
            if problem := (known.get(name) or source.files.look(name)).problem:
                skipped[f"files ({problem})"] += 1
            elif holds_many:
                inside = _in_documents(source, kinds, skipped, name)
                yield from ((split or split_of(name), file) for split, file in inside)
            elif _is_media(path := os.path.join(source.files.folder, name), kinds):
                yield folder_split_of(name), MediaFile(path)


def _in_documents(source: Source, kinds: tuple[str, ...], skipped: Counter[str], file: str = "") -> Listed:
    """The files of the kinds that one file names or holds; a file of such a kind itself.

    skipped: counts what is left out. file: the one file, relative to the source; default: the source is that file.
    """
    named: list[str] = []
    usable: dict[str, bool] = {}  # archives
    for item in source.items(named.append, file, groups=False):
        names, in_line = [*named, *(name for name, _, _ in item.members if item.kind == "files")], bool(named)
        named.clear()
        for name in names:
            if len(name) > LONGEST_NAME or name.startswith("data:") or promised_kind(name) not in ("", *kinds):
                continue
            try:
                path = str(source.files.local(name))
            except UserError as error:
                skipped[f"files ({error})"] += 1
                continue
            if _is_media(path, kinds):
                yield item.split, MediaFile(path)
        if item.kind == "member":
            yield from _members(source, item, kinds, usable, skipped)
        elif item.kind == "error":
            skipped["entries that cannot be read"] += 1
        elif item.kind == "row" and not in_line:
            skipped["rows of tables that name no file (only media in files and .tar archives are trained on)"] += 1


def _members(
    source: Source, item: SourceItem, kinds: tuple[str, ...], usable: dict[str, bool], skipped: Counter[str]
) -> Listed:
    if item.file not in usable:
        with opened(source.files, item.file) as (_, compressed):
            usable[item.file] = not compressed
    path = str(source.files.local(item.file))
    for name, start, length in item.members:
        if promised_kind(name) in kinds:
            if usable[item.file]:
                yield item.split, MediaFile(path, name, start, length)
            else:
                skipped["members of compressed archives (decompress them to train on them)"] += 1


def _may_be_media(name: str, kinds: tuple[str, ...]) -> bool:
    """Whether a file's suffix is one of a kind, or tells nothing."""
    promise = promised_kind(name)
    return promise in kinds or (not promise and os.path.splitext(name)[1].lower().removeprefix(".") not in _OTHERS)


def _is_media(path: str, kinds: tuple[str, ...]) -> bool:
    """Whether a file is of a kind by its suffix, or by its content where the suffix tells nothing."""
    if promised(path) or not _may_be_media(path, kinds):
        return _may_be_media(path, kinds)
    try:
        return os.path.isfile(path) and sniff(Path(path)) in kinds
    except (UserError, OSError):
        return False
