"""Transcripts: texts without a header whose lines name a recording, or an image, and say what is in it.

    metadata.csv           LJ001-0001|In 1831|In eighteen thirty-one      LJSpeech: name, text as printed, text as read
    train.txt              wavs/1.wav|The text.                           lists of recordings, without a header
    train.txt              wavs/1.wav|alice|The text.                     with a speaker, before or after the text
    train.list             wavs/1.wav|alice|EN|The text.                  with a speaker and a language; what comes after is not used
    84-121123.trans.txt    84-121123-0000 THE TEXT                        LibriSpeech
    Flickr8k.token.txt     1000.jpg#0 A child .                           Flickr8k, a tab between them (`#0`: the first caption)

A file is one of these where the name at the beginning of its first line is that of audio (or an image) beside it or in a folder where
such files lie. Of texts (`.txt`) only those are looked into whose name has a word such as `train` or `filelist`. Lines become rows of the fields `audio` (or `image`), `text`, and perhaps `speaker`, `language` and `printed`.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from unitok.data.prepare.containers import DAMAGE, damage, opened
from unitok.data.prepare.fields import CAPTIONS, TEXT, is_media, names_media
from unitok.errors import UserError
from unitok.media import promised
from unitok.storage import Files

#: Folders where recordings lie, relative to what names them.
_FOLDERS = ("", "wavs/", "wav/", "clips/", "audio/", "videos/", "video/")
#: Suffixes of recordings that are named without one.
_SUFFIXES = ("", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
#: Words in the name of a text that may be transcripts.
_LISTS = re.compile(
    r"(^|[^a-z])(train|training|val|valid|validation|dev|test|eval|metadata|file_?lists?|list|transcripts?|trans|captions?|tokens?)([^a-z]|$)"
)

_HEAD = 1 << 16  # bytes by which a file is recognized
_SAMPLE = 100  # lines
FEW = 32  # folders beside a file, in which what it names is looked for
MAX_LINE = 1 << 20  # bytes

Stretch = tuple[int, int]  # where a text is: start and length in bytes


@dataclass(frozen=True)
class Layout:
    """How the lines of transcripts are read.

    Args:
        separator: of the columns. columns: fields after the recording's. folder, suffix: what is added to the name of a recording.
    """

    separator: bytes
    columns: tuple[str, ...]
    folder: str
    suffix: str

    def recording(self, name: str, file: str) -> str:
        """The recording that a line of a file names, relative to the source."""
        return os.path.normpath(os.path.join(os.path.dirname(file), self.folder, _without_number(name) + self.suffix))

    def split(self, line: bytes) -> list[tuple[str, Stretch]] | None:
        """Where the fields of a line are, the recording's first; None where columns are missing. What is too much belongs to the last."""
        cells = line.split(self.separator, len(self.columns))
        if len(cells) <= len(self.columns):
            return None
        found, at = [], 0
        for name, cell in zip(("recording", *self.columns), cells, strict=True):
            found.append((name, (at, len(cell))))
            at += len(cell) + len(self.separator)
        return found


def may_be_transcripts(name: str) -> bool:
    """Whether a file may be transcripts by its name (without the suffix of its compression)."""
    base = name.rpartition("/")[2].lower()
    return base.endswith((".csv", ".tsv", ".lst", ".list")) or (base.endswith(".txt") and _LISTS.search(base) is not None)


def find_layout(files: Files, name: str) -> Layout | None:
    """The layout of a file of transcripts; None where it is none."""
    try:
        with opened(files, name) as (file, _):
            head = file.read(_HEAD)
    except UserError:
        return None
    except DAMAGE as error:
        damage(error, name)  # a disk or server that fails stops the run
        return None
    lines = [line.rstrip(b"\r") for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    lines = [line for line in (lines[:-1] if len(head) == _HEAD else lines) if line.strip()][:_SAMPLE]
    if not lines:
        return None
    separator = b" " if ".trans.txt" in name.lower() else b"|" if b"|" in lines[0] else b"\t"
    if separator not in lines[0] or _is_header(lines[0], separator):
        return None
    named = [_without_number(_decoded(line.partition(separator)[0])) for line in lines[:3]]
    where = find_recording(files, name, named[0], more=folders_beside(files, os.path.dirname(name)))
    if where is None and len(named) > 1 and all(" " not in one and is_media(one) for one in named):
        where = "", ""  # recordings that are missing, or that may not be reached
    return None if where is None else Layout(separator, _columns(lines, separator), *where)


def _is_header(line: bytes, separator: bytes) -> bool:
    """Whether a line are the names of columns: the first one is that of a column that is read."""
    first = _decoded(line.partition(separator)[0]).lower()
    return re.fullmatch(r"\w+", first) is not None and (first in ("id", *CAPTIONS) or names_media(first))


def _without_number(name: str) -> str:
    """A name of media without the number of its caption: `1000.jpg#0`."""
    return re.sub(r"(\.\w+)#\d+$", r"\1", name)


def folders_beside(files: Files, folder: str) -> list[str]:
    """The folders in a folder, and those beside it, as they are named from it; none where there are many, as one for each class."""
    inside = [f"{name}/" for name in files.subfolders(folder)]
    outside = ["../", *(f"../{name}/" for name in files.subfolders(os.path.dirname(folder)))] if folder else []
    return [*(inside if len(inside) <= FEW else []), *(outside if len(outside) <= FEW else [])]


def find_recording(
    files: Files, file: str, named: str, first: tuple[str, str] = ("", ""), more: Sequence[str] = ()
) -> tuple[str, str] | None:
    """The folder and the suffix with which a name in a file is that of media. first: those that are tried first. more: further folders."""
    top = os.path.relpath(".", os.path.dirname(file) or ".") + "/"  # names may be relative to the source's
    folders = [*_FOLDERS, *more, top]
    if files.remote is None:
        here = os.path.join(files.folder, os.path.dirname(file))
        folders += [os.path.relpath(root, here) + "/" for root in files.roots[1:]]
    suffixes = ("",) if promised(named) else _SUFFIXES
    for folder, suffix in [first, *((folder, suffix) for suffix in suffixes for folder in folders)]:
        path = os.path.normpath(os.path.join(os.path.dirname(file), folder, named + suffix))
        if is_media(path) and not files.look(path).problem:
            return folder, suffix
    return None


def _columns(lines: list[bytes], separator: bytes) -> tuple[str, ...]:
    """What the columns after the recording's hold. Of two that have most of their words in common, the first is the text as printed; else
    the one with fewer different values (or shorter ones) is the speaker."""
    if separator == b" ":
        return (TEXT,)
    counts = [line.count(separator) for line in lines]
    count = max(set(counts), key=counts.count)
    if count < 2:
        return (TEXT,)
    if count > 2:
        return ("speaker", "language", TEXT) if count == 3 else ("speaker", "language", TEXT, "rest")
    pairs = [[_decoded(cell).lower() for cell in line.split(separator)[1:]] for line in lines if line.count(separator) == 2]
    words = [(set(re.findall(r"\w+", first)), set(re.findall(r"\w+", second))) for first, second in pairs if second]
    if not words or 2 * sum(len(a & b) for a, b in words) >= sum(len(a) for a, _ in words):
        return "printed", TEXT
    sizes = [(len({pair[i] for pair in pairs}), sum(len(pair[i]) for pair in pairs)) for i in (0, 1)]
    return ("speaker", TEXT) if sizes[0] <= sizes[1] else (TEXT, "speaker")


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "replace").strip()


@dataclass(frozen=True)
class TranscriptLine:
    """A line of transcripts.

    Args:
        number: from 1. id: the name of its recording as written. recording: that relative to the source. fields: name, start and length in
            bytes each. row: their texts. problem: why the line is refused, or "".
    """

    number: int
    id: str = ""
    recording: str = ""
    fields: tuple[tuple[str, int, int], ...] = ()
    row: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def transcript_lines(files: Files, name: str, layout: Layout) -> Iterator[TranscriptLine]:
    """Yield the lines with content. Errors: `DAMAGE`."""
    at = 0
    with opened(files, name) as (file, _):
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            start, at = at, at + len(line)
            skipped = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
            content = line[skipped:].rstrip(b"\r\n")
            if not content.strip():
                continue
            parts = layout.split(content)
            if parts is None:
                columns = content.count(layout.separator) + 1
                yield TranscriptLine(number, problem=f"{columns} columns where {1 + len(layout.columns)} should be")
                continue
            (_, (first, length)), *rest = parts
            rest = [part for part in rest if part[0] != "rest"]
            if rest[0][0] == "printed" and not content[rest[-1][1][0] :].strip():  # LJSpeech's third column may be empty
                rest = [(TEXT, rest[0][1])]
            id = _decoded(content[first : first + length])
            fields = tuple((column, start + skipped + a, n) for column, (a, n) in rest)
            row = {column: _decoded(content[a : a + n]) for column, (a, n) in rest}
            yield TranscriptLine(number, id, layout.recording(id, name), fields, row)


def read_transcript(fields: list[tuple[str, bytes]]) -> dict[str, str]:
    """Decode the fields of a line. Errors: `UserError` for a text of another encoding, and without text."""
    row = {}
    for name, data in fields:
        try:
            row[name] = data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 text (byte {error.start}); convert it, for example with iconv") from None
    if not row[TEXT]:
        raise UserError("no text; fill it or leave the line out")
    return row
