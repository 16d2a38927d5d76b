"""Transcripts: texts whose lines name a recording and say what is heard in it; and tables that name their recordings in ways of their own.

    metadata.csv           LJ001-0001|In 1831|In eighteen thirty-one      LJSpeech: name, text as printed, text as read
    train.txt              wavs/1.wav|The text.                           lists of recordings, without a header
    train.txt              wavs/1.wav|alice|The text.                     with a speaker, perhaps also a language
    84-121123.trans.txt    84-121123-0000 THE TEXT                        LibriSpeech

A file is one of these where a name at the beginning of one of its first lines is that of audio (or an image) beside it or in a folder
where such files lie. Lines become rows of the fields `audio` (or `image`), `text`, and perhaps `speaker`, `language` and `printed`.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from unitok.data.prepare.containers import DAMAGE, damage, opened
from unitok.data.prepare.fields import MEDIA_SUFFIXES, TEXT
from unitok.document import Part
from unitok.errors import UserError
from unitok.media import audio_seconds, promised
from unitok.modalities import modality_of
from unitok.storage import Blob, Files

#: Folders where recordings lie, relative to what names them.
_FOLDERS = ("", "wavs/", "wav/", "clips/", "audio/")
#: Suffixes of recordings that are named without one.
_SUFFIXES = ("", ".wav", ".flac", ".mp3", ".ogg", ".opus")
#: Names of fields for the start and the end of a stretch of a recording, in seconds; NeMo and Lhotse write its length instead of its end.
_STRETCHES = (("start", "end"), ("start_s", "end_s"), ("start_seconds", "end_seconds"), ("start_time", "end_time"))
_OFFSET, _DURATION = "offset", "duration"

_HEAD = 1 << 16  # bytes by which a file is recognized
_SAMPLE = 100  # lines
FEW = 16  # largest number of texts without media of their names in a folder that are looked into

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


def is_transcripts_name(name: str) -> bool:
    """Whether a file may be transcripts by its name."""
    return name.lower().endswith((".txt", ".csv", ".lst", ".list"))


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
    separator = b" " if name.lower().endswith(".trans.txt") else b"|"
    for line in lines[:3]:
        named, found, _ = line.partition(separator)
        where = _find(files, name, _decoded(named)) if found else None
        if where is not None:
            return Layout(separator, _columns(lines, separator), *where)
    if lines and all(line.count(separator) and _is_media(_decoded(line.partition(separator)[0])) for line in lines[:3]):
        return Layout(separator, _columns(lines, separator), "", "")  # whose recordings are missing, or may not be reached
    return None


def _is_media(name: str) -> bool:
    return promised(name) in MEDIA_SUFFIXES


def _find(files: Files, file: str, named: str) -> tuple[str, str] | None:
    """The folder and the suffix with which a name is that of media."""
    top = os.path.relpath(".", os.path.dirname(file) or ".") + "/"  # names may be relative to the top of the source
    for suffix in _SUFFIXES if not promised(named) else ("",):
        for folder in (*_FOLDERS, top) if _is_media(named + suffix) else ():
            if not files.look(os.path.normpath(os.path.join(os.path.dirname(file), folder, named + suffix))).problem:
                return folder, suffix
    return None


def _columns(lines: list[bytes], separator: bytes) -> tuple[str, ...]:
    """What the columns after the recording's hold. Of two, the first is the text as printed where both have most of their words in
    common, else the speaker."""
    if separator != b"|":
        return (TEXT,)
    counts = [line.count(separator) for line in lines]
    count = max(set(counts), key=counts.count)
    if count < 2:
        return (TEXT,)
    if count > 2:
        return ("speaker", "language", TEXT)
    common = words = 0
    for line in (line for line, n in zip(lines, counts, strict=True) if n == 2):
        first, second = (set(re.findall(r"\w+", _decoded(text).lower())) for text in line.split(separator)[1:])
        if second:
            common, words = common + len(first & second), words + len(first)
    return ("printed", TEXT) if 2 * common >= words else ("speaker", TEXT)


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "replace").strip()


def transcript_lines(
    files: Files, name: str, layout: Layout
) -> Iterator[tuple[int, str, tuple[tuple[str, int, int], ...], str]]:
    """For each line with content its number, the name of its recording as written, and where its fields are in the file (name, start
    and length in bytes each, first the recording relative to the source); or why it is refused. Errors: `DAMAGE`."""
    at = 0
    with opened(files, name) as (file, _):
        for number, line in enumerate(iter(file.readline, b""), 1):
            start, at = at, at + len(line)
            skipped = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
            content = line[skipped:].rstrip(b"\r\n")
            if not content.strip():
                continue
            parts = layout.split(content)
            if parts is None:
                yield number, "", (), f"{content.count(layout.separator) + 1} columns where {1 + len(layout.columns)} should be"
                continue
            (_, (first, length)), *rest = parts
            named = _decoded(content[first : first + length])
            if rest[-1][1][1] == 0 and rest[0][0] == "printed":  # LJSpeech's third column may be empty
                rest = [(TEXT, rest[0][1])]
            members = tuple((field, start + skipped + a, n) for field, (a, n) in rest)
            yield number, named, ((layout.recording(named, name), 0, 0), *members), ""


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

#: Columns besides those with the names of media that `named_recording` needs.
RECORDING_COLUMNS = ("ytid", "client_id")


def named_recording(row: Fields, files: Files, file: str) -> str | None:
    """The recording of a row that names it in a way of its own, relative to the folder of the row's file: MusicCaps' `ytid` without a
    suffix, Common Voice's `path` in `clips/`. None: the row does not. Errors: `UserError` where there is no such recording."""
    name = row.get("ytid")
    if isinstance(name, str):
        where = _find(files, file, name)
        if where is None:
            raise UserError(
                f"ytid {name[:40]!r}: no recording of that name (.wav, .flac, …) beside the table, or in wavs/ or audio/"
            )
        return where[0] + name + where[1]
    path = row.get("path")
    if "client_id" in row and isinstance(path, str):
        where = _find(files, file, path)
        return None if where is None else where[0] + path
    return None


def info_beside(row: Fields) -> str | None:
    """The name of the JSON file with the caption of the recording of a line of audiocraft's manifests; None for another row."""
    path = row.get("path")
    is_line = isinstance(path, str) and {"sample_rate", "duration"} <= row.keys() and _is_media(path)
    return str(PurePosixPath(path).with_suffix(".json")) if is_line and isinstance(path, str) else None


def stretch_of(row: Fields) -> tuple[float, float] | None:
    """The stretch of its recording that a row is about, in seconds: `start` and `end` (MusicCaps: `start_s` and `end_s`), or NeMo's
    `offset` and `duration`. None: all of it. Errors: `UserError` for what is no stretch."""
    for names in _STRETCHES:
        given = [row.get(name) for name in names]
        if all(value is not None and value != "" for value in given):
            start, end = (_seconds(value, name) for value, name in zip(given, names, strict=True))
            break
    else:
        if row.get(_OFFSET) in (None, "") or row.get(_DURATION) in (None, ""):
            return None
        names = (_OFFSET, _DURATION)
        start = _seconds(row[_OFFSET], _OFFSET)
        end = start + _seconds(row[_DURATION], _DURATION)
    if not 0 <= start < end:
        raise UserError(f"{' and '.join(names)}: {start:g} to {end:g} s is no stretch of a recording")
    return start, end


def is_cut(recording: Blob, stretch: tuple[float, float]) -> bool:
    """Whether a recording is no longer than a stretch of it: MusicCaps' are usually stored so. Errors: `UserError`."""
    with recording.local() as path:
        seconds = audio_seconds(path or Path(recording.name), None if path else recording.read())
    return seconds <= stretch[1] - stretch[0] + 1


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


def in_stretch(parts: list[Part], stretch: tuple[float, float] | None) -> list[Part]:
    """Parts of which the only recording is cut to a stretch; as they are without one. Errors: `UserError` for several recordings."""
    timed = [part for part in parts if part.file is not None and "start" in modality_of(part.type).keys]
    if stretch is None or not timed:
        return parts
    if len(timed) > 1:
        raise UserError(f"start and end: {len(timed)} recordings; give each in a line of its own")
    view = modality_of(timed[0].type).view({"start": stretch[0], "end": stretch[1]}, "start and end")
    return [replace(part, view=view) if part is timed[0] else part for part in parts]


def _seconds(value: object, name: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{name} {str(value)[:40]!r}: it must be seconds") from None
