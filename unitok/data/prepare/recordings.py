"""Rows of tables, and lines, that name their recordings and images in ways of their own; stretches of recordings.

train.tsv              client_id, path, sentence                      Common Voice: recordings in clips/
musiccaps-public.csv   ytid, start_s, end_s, caption                  MusicCaps: no suffixes
results_10M_train.csv  videoid, contentUrl, duration, page_dir, name  WebVid: page_dir/videoid.mp4
results.csv            image_name| comment_number| comment            Flickr30k: images in a folder beside it
captions.txt           image,caption                                  Flickr8k, the same
"""

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from unitok.data.prepare.fields import CAPTIONS, TEXT, is_media, names_file, names_media
from unitok.data.prepare.transcripts import find_recording, folders_beside
from unitok.document import Part
from unitok.errors import UserError
from unitok.media import audio_seconds, promised
from unitok.modalities import modality_of
from unitok.storage import Blob, Files

_VIDEOS = (".mp4", ".webm", ".mkv")  # of videos, which WebVid's tables name without one
#: Names of fields for the start and the end of a stretch of a recording, in seconds; a `duration` may stand in place of the end.
_STRETCHES = (
    ("start", "end"),
    ("start_s", "end_s"),
    ("start_seconds", "end_seconds"),
    ("start_time", "end_time"),
    ("offset", ""),
)
MISSES = 20  # rows of a file without a recording, until no more are looked for if none had one

Fields = Mapping[str, object]

#: Columns besides those with the names of media that `Recordings` needs.
RECORDING_COLUMNS = ("ytid", "client_id", "videoid", "page_dir", "name")
COMMENT = "comment"  # Flickr30k's column of captions


def is_webvid(columns: Collection[str]) -> bool:
    """Whether a table is one of WebVid's."""
    return {"videoid", "name"} <= set(columns) and not any(names_media(name) for name in columns)


class Recordings:
    """Finds the recordings of rows that name them in ways of their own.

    trusting: the first row whose file is found tells where those of all rows lie, as on a server, where each look takes long.
    """

    def __init__(self, files: Files, trusting: bool = False):
        self.files, self.trusting = files, trusting or files.remote is not None
        self._found: dict[str, tuple[str, str]] = {}  # folder and suffix, by the file that holds the rows
        self._missed: Counter[str] = Counter()
        self._places: dict[str, str] = {}  # as `_place`, by the file that holds the rows
        self._folders = lru_cache(maxsize=1024)(self._folders_beside)

    def completed(self, row: Fields, file: str) -> Fields:
        """A row of a file with the names of recordings as others have them: MusicCaps' `ytid` without a suffix is the field `wav`,
        WebVid's `videoid`, in the folder `page_dir`, the field `video`, its caption is `name`, Common Voice's `path` lies in `clips/`, and
        Flickr30k's caption is `comment`. Errors: `UserError` where there is no such recording."""
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
        if "image_name" in row and isinstance(comment := row.get(COMMENT), str) and not set(CAPTIONS) & row.keys():
            row = {**{name: value for name, value in row.items() if name != COMMENT}, TEXT: comment.strip()}
        return self.placed(row, file)

    def placed(self, row: Fields, file: str) -> Fields:
        """A row whose files lie in a folder beside the one that holds the row, with the names of these folders before theirs."""
        named = {
            name: value.strip()
            for name, value in row.items()
            if isinstance(value, str) and len(value) < 1024 and is_media(value.strip())
            if names_media(name) and names_file(name, value.strip()) and "://" not in value
        }
        found = {name: place + value for name, value in named.items() if (place := self._place(file, value))}
        return {**row, **found} if found else row

    def _place(self, file: str, name: str) -> str:
        """The folder in which a file lies that a row of another file names, with a slash, relative to that; "" for beside it, or nowhere."""
        if self.trusting and (file in self._places or self._missed[file] >= MISSES):
            return self._places.get(file, "")
        folder = os.path.dirname(file)
        for place in ("", *self._folders(folder)):
            if not self.files.look(os.path.normpath(os.path.join(folder, place, name))).problem:
                self._places[file] = place
                return place
        self._missed[file] += 1
        return ""

    def _folders_beside(self, folder: str) -> list[str]:
        """Folders in which the files of a table in a folder may lie."""
        here = os.path.join(self.files.folder, folder)
        roots = [os.path.relpath(root, here) + "/" for root in self.files.roots[1:]] if self.files.remote is None else []
        return [*folders_beside(self.files, folder), *roots]

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
    is_line = isinstance(path, str) and {"sample_rate", "duration"} <= row.keys() and is_media(path)
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
