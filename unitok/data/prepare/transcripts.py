"""Transcripts: texts whose lines name a recording and say what is heard in it; and tables that name their recordings in ways of their own.

    metadata.csv           LJ001-0001|In 1831|In eighteen thirty-one      LJSpeech: name, text as printed, text as read
    train.txt              wavs/1.wav|The text.                           lists of recordings, without a header
    train.txt              wavs/1.wav|alice|The text.                     with a speaker, before or after the text
    train.list             wavs/1.wav|alice|EN|The text.                  with a speaker and a language; what comes after is not used
    84-121123.trans.txt    84-121123-0000 THE TEXT                        LibriSpeech
    results_10M_train.csv  videoid,contentUrl,duration,page_dir,name      WebVid, a table like MusicCaps' and Common Voice's

A file is one of these where the name at the beginning of its first line is that of audio (or an image) beside it or in a folder where
such files lie. Of texts (`.txt`) only those are looked into whose name has a word such as `train` or `filelist`. Lines become rows of the fields `audio` (or `image`), `text`, and perhaps `speaker`, `language` and `printed`.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from unitok.data.prepare.containers import DAMAGE, damage, opened
from unitok.data.prepare.fields import CAPTIONS, MEDIA_SUFFIXES, TEXT, names_media
from unitok.document import Part
from unitok.errors import UserError
from unitok.media import audio_seconds, promised
from unitok.modalities import modality_of
from unitok.storage import Blob, Files

#: Folders where recordings lie, relative to what names them.
_FOLDERS = ("", "wavs/", "wav/", "clips/", "audio/", "videos/", "video/")
#: Suffixes of recordings that are named without one.
_SUFFIXES = ("", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
_VIDEOS = (".mp4", ".webm", ".mkv")  # of videos, which WebVid's tables name without one
#: Names of fields for the start and the end of a stretch of a recording, in seconds; a `duration` may stand in place of the end.
_STRETCHES = (
    ("start", "end"),
    ("start_s", "end_s"),
    ("start_seconds", "end_seconds"),
    ("start_time", "end_time"),
    ("offset", ""),
)
#: Words in the name of a text that may be transcripts.
_LISTS = re.compile(
    r"(^|[^a-z])(train|training|val|valid|validation|dev|test|eval|metadata|file_?lists?|list|transcripts?|trans|captions?)([^a-z]|$)"
)

_HEAD = 1 << 16  # bytes by which a file is recognized
_SAMPLE = 100  # lines
MAX_LINE = 1 << 20  # bytes
MISSES = 20  # rows of a file without a recording, until no more are looked for if none had one

Fields = Mapping[str, object]
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
        return os.path.normpath(os.path.join(os.path.dirname(file), self.folder, name + self.suffix))

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
    return base.endswith((".csv", ".lst", ".list")) or (base.endswith(".txt") and _LISTS.search(base) is not None)


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
    separator = b" " if ".trans.txt" in name.lower() else b"|"
    if not lines or separator not in lines[0] or _is_header(lines[0]):
        return None
    named = [_decoded(line.partition(separator)[0]) for line in lines[:3]]
    where = find_recording(files, name, named[0])
    if where is None and len(named) > 1 and all(" " not in one and _is_media(one) for one in named):
        where = "", ""  # recordings that are missing, or that may not be reached
    return None if where is None else Layout(separator, _columns(lines, separator), *where)


def _is_header(line: bytes) -> bool:
    """Whether a line are the names of columns: the first one is that of a column that is read."""
    first = _decoded(line.partition(b"|")[0]).lower()
    return re.fullmatch(r"\w+", first) is not None and (first in ("id", *CAPTIONS) or names_media(first))


def _is_media(name: str) -> bool:
    return promised(name) in MEDIA_SUFFIXES


def find_recording(files: Files, file: str, named: str, first: tuple[str, str] = ("", "")) -> tuple[str, str] | None:
    """The folder and the suffix with which a name in a file is that of media. first: those that are tried first."""
    folders = [*_FOLDERS, os.path.relpath(".", os.path.dirname(file) or ".") + "/"]  # names may be relative to the source's top
    if files.remote is None:
        here = os.path.join(files.folder, os.path.dirname(file))
        folders += [os.path.relpath(root, here) + "/" for root in files.roots[1:]]
    suffixes = ("",) if promised(named) else _SUFFIXES
    for folder, suffix in [first, *((folder, suffix) for suffix in suffixes for folder in folders)]:
        path = os.path.normpath(os.path.join(os.path.dirname(file), folder, named + suffix))
        if _is_media(path) and not files.look(path).problem:
            return folder, suffix
    return None


def _columns(lines: list[bytes], separator: bytes) -> tuple[str, ...]:
    """What the columns after the recording's hold. Of two that have most of their words in common, the first is the text as printed; else
    the one with fewer different values (or shorter ones) is the speaker."""
    if separator != b"|":
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


# ---- Tables of recordings ---------------------------------------------------------------------------------------------

#: Columns besides those with the names of media that `Recordings` needs.
RECORDING_COLUMNS = ("ytid", "client_id", "videoid", "page_dir", "name")


def is_webvid(columns: Collection[str]) -> bool:
    """Whether a table is one of WebVid's."""
    return {"videoid", "name"} <= set(columns) and not any(names_media(name) for name in columns)


class Recordings:
    """Finds the recordings of rows that name them in ways of their own."""

    def __init__(self, files: Files):
        self.files = files
        self._found: dict[str, tuple[str, str]] = {}  # folder and suffix, by the file that holds the rows
        self._missed: Counter[str] = Counter()

    def completed(self, row: Fields, file: str) -> Fields:
        """A row of a file with the names of recordings as others have them: MusicCaps' `ytid` without a suffix is the field `wav`,
        WebVid's `videoid`, in the folder `page_dir`, the field `video`, its caption is `name`, and Common Voice's `path` lies in `clips/`.
        Errors: `UserError` where there is no such recording."""
        ytid, path = row.get("ytid"), row.get("path")
        if any(isinstance(value, Blob) for value in row.values()):
            return row
        if isinstance(ytid, str) and not any(names_media(name) and isinstance(value, str) for name, value in row.items()):
            where = self._find(file, ytid)
            if where is None:
                raise UserError(
                    f"ytid {ytid[:40]!r}: no recording of that name (.wav, .flac, …) beside the table, or in wav/ or audio/"
                )
            return {**row, "wav": where[0] + ytid + where[1]}
        if is_webvid(row.keys()):
            return self._of_webvid(row, file)
        if "client_id" in row and isinstance(path, str) and (where := self._find(file, path)):
            return {**row, "path": where[0] + path}
        return row

    def _of_webvid(self, row: Fields, file: str) -> Fields:
        id, folder = str(row["videoid"]), row.get("page_dir")
        names = [f"{folder}/{id}", id] if folder else [id]
        gave_up = self.files.remote is not None and self._missed[file] >= MISSES and file not in self._found
        for named in () if gave_up else (f"{name}{suffix}" for suffix in _VIDEOS for name in names):
            where = find_recording(self.files, file, named, self._found.get(file, ("", "")))
            if where is not None:
                self._found[file] = where
                return {**row, promised(named).removeprefix("a "): where[0] + named, TEXT: row["name"]}
        self._missed[file] += 1
        raise UserError(f"videoid {id[:40]!r}: no {names[0][:60]}.mp4 beside the table or in videos/")

    def _find(self, file: str, name: str) -> tuple[str, str] | None:
        if self._missed[file] >= MISSES and file not in self._found:
            return None  # to look again for each of a million rows of a server takes days
        where = find_recording(self.files, file, name, self._found.get(file, ("", "")))
        if where is not None:
            self._found[file] = where
        else:
            self._missed[file] += 1
        return where


def info_beside(row: Fields) -> str | None:
    """The name of the JSON file with the caption of the recording of a line of audiocraft's manifests; None for another row."""
    path = row.get("path")
    is_line = isinstance(path, str) and {"sample_rate", "duration"} <= row.keys() and _is_media(path)
    return str(PurePosixPath(path).with_suffix(".json")) if is_line and isinstance(path, str) else None


def stretch_of(row: Fields) -> tuple[float, float | None] | None:
    """The stretch of its recording that a row is about, in seconds: `start` and `end`, or one of them, or `start` and `duration`; NeMo's
    `offset` and `duration`; MusicCaps' `start_s` and `end_s`. None: all of it, or no numbers. Errors: `UserError` for what is no stretch."""
    for first, last in _STRETCHES:
        start, end, duration = (_seconds(row.get(name)) for name in (first, last, "duration"))
        if (start is None and end is None) or _strange(row.get(first)) or _strange(row.get(last)):
            continue
        begin = start or 0.0
        stop = begin + duration if end is None and duration is not None else end
        if not 0 <= begin < (math.inf if stop is None else stop):
            raise UserError(f"{first}: {begin:g} to {stop or 0:g} s is no stretch of a recording")
        return begin, stop
    return None


def is_cut(recording: Blob, stretch: tuple[float, float | None]) -> bool:
    """Whether a recording is no longer than a stretch of it: MusicCaps' are usually stored so. Errors: `UserError`."""
    with recording.local() as path:
        seconds = audio_seconds(path or Path(recording.name), None if path else recording.read())
    return stretch[1] is not None and seconds <= stretch[1] - stretch[0] + 1


def with_speaker(parts: list[Part], row: Fields, speakers: str | Mapping[str, str]) -> tuple[list[Part], list[str]]:
    """The parts of a row with its field `speaker` as `SourceSpec.speakers` asks for it, and notes. Errors: `UserError`."""
    speaker = row.get("speaker")
    if speaker is None or speaker == "":
        return parts, []
    if not speakers:
        return parts, ["field 'speaker' is not used (speakers: name)"]
    if isinstance(speakers, Mapping):
        role = speakers.get(str(speaker))
        if role is None:
            raise UserError(f"speaker {str(speaker)[:40]!r} has no role; speakers names {', '.join(speakers)}")
        return [replace(part, role=role) for part in parts], []
    first = next((part for part in parts if isinstance(part.value, str) and part.value and part.file is None), None)
    return [replace(part, value=f"{speaker}: {part.value}") if part is first else part for part in parts], []


def in_stretch(parts: list[Part], row: Fields, folder: str) -> tuple[list[Part], list[str]]:
    """Parts of which the only recording is cut to the stretch that the row gives, if the row names its file; media in the row itself have
    been cut before. And notes. folder: of the row's file. Errors: `UserError`."""
    timed = [part for part in parts if part.file is not None and "start" in modality_of(part.type).keys]
    texts = [value for name, value in row.items() if names_media(name) and isinstance(value, str)]
    files = {os.path.normpath(os.path.join(folder, name)) for name in texts}
    if len(timed) != 1 or timed[0].file is None or timed[0].file.name not in files:
        return parts, []
    stretch = stretch_of(row)
    if stretch is None:
        unused = [name for names in _STRETCHES for name in names if _strange(row.get(name))]
        return parts, [f"field {name!r} is not used: no number of seconds" for name in unused]
    if "ytid" in row and is_cut(timed[0].file, stretch):
        return parts, []
    given = {"start": stretch[0]} | ({} if stretch[1] is None else {"end": stretch[1]})
    view = modality_of(timed[0].type).view(given, "start and end")
    return [replace(part, view=view) if part is timed[0] else part for part in parts], []


def _seconds(value: object) -> float | None:
    """A number of seconds, also as text; None for anything else."""
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return seconds if math.isfinite(seconds) and not isinstance(value, bool) else None


def _strange(value: object) -> bool:
    """Whether there is a value and it is no number of seconds; NaN is how pandas writes none."""
    return value not in (None, "") and value == value and _seconds(value) is None
