"""Documents: what a model reads and writes, in reading order; and the interleaved file format they come from.

A `Document` is a list of `Segment`s, each one piece of content as codes. Before tokenization the same document is a
`RawDocument` of `Part`s, each a text or the path of a file: a line of an interleaved JSON Lines file,

    {"id": "7", "content": [{"type": "text", "text": "a dog"}, {"type": "image", "path": "dog.png", "loss": true}]}

with an optional `role` and `loss` on each part and paths relative to the file. Imports nothing of ours but the error.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unitok.errors import UserError, first_line, is_utf8

ROLES = ("none", "system", "user", "assistant")
PART_TYPES = ("text", "image", "audio")


@dataclass(frozen=True)
class Segment:
    """One piece of content.

    Args:
        modality: `text`, `image`, `audio`, or another that the vocabulary declares.
        codes: int64; text [N], image [h, w], audio [K, N].
        role: who says it, one of `ROLES`.
        loss: whether training learns to write it, or only to read it.
        source: the file it came from, relative to the data set, or "".
        size: pixels (height, width) or samples (length,) before padding, so that decoding gives back exactly that.
    """

    modality: str
    codes: np.ndarray
    role: str = "none"
    loss: bool = True
    source: str = ""
    size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", np.asarray(self.codes, dtype=np.int64))
        if self.role not in ROLES:
            raise UserError(f"role {self.role!r}: choose one of {', '.join(ROLES)}")
        if self.codes.size == 0:
            raise UserError(f"an empty {self.modality} segment: no span may be empty")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        mine, theirs = ((s.modality, s.role, s.loss, s.source, s.size) for s in (self, other))
        return mine == theirs and np.array_equal(self.codes, other.codes)

    def __hash__(self) -> int:
        return hash((self.modality, self.role, self.codes.tobytes()))


@dataclass(frozen=True)
class Document:
    """Segments in reading order."""

    segments: tuple[Segment, ...]
    id: str = ""
    source: str = field(default="", compare=False)  # the file (and line, member or row) that it was made from

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))


@dataclass(frozen=True)
class Part:
    """One piece of raw content: a text, or the path of an image or a sound.

    Args:
        file: what gives the content where `path` is only its name: in an archive, a table, on a server
            (`unitok.storage.Blob`).
        view: which part of it, in the words of W3C's media fragments: `t=10,20` (seconds), `crop=1` (a random one), `flip`.
    """

    type: str
    text: str = ""
    path: Path | None = None
    role: str = "none"
    loss: bool = True
    file: Any = field(default=None, compare=False, repr=False)
    view: str = ""


@dataclass(frozen=True)
class RawDocument:
    """Parts in reading order.

    Args:
        where: the file (and line) that it was read from, for messages.
        notes: what of that was not used, in words that are counted.
    """

    id: str
    content: tuple[Part, ...] = field(default_factory=tuple)
    where: str = ""
    notes: tuple[str, ...] = ()


def parse_line(line: str, where: str) -> Any:
    """One line of a JSON Lines file; errors: `UserError` with `where`."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); mend or remove the line") from None
    except ValueError as error:  # a number of too many digits
        raise UserError(f"{where}: not JSON ({first_line(error)}); mend or remove the line") from None
    except RecursionError:
        raise UserError(f"{where}: JSON in too many brackets; mend or remove the line") from None


def parse_raw_document(line: str, folder: Path, where: str, default_id: str) -> RawDocument:
    """One line of an interleaved JSON Lines file; paths are taken relative to `folder`; errors: `UserError` with `where`."""
    return raw_document(parse_line(line, where), folder, where, default_id)


def raw_document(row: Any, folder: Path, where: str, default_id: str) -> RawDocument:
    """A document from what a line holds; as `parse_raw_document`."""
    if not isinstance(row, dict) or not isinstance(row.get("content"), list) or not row["content"]:
        raise UserError(f'{where}: a document is {{"id": …, "content": [parts]}} with at least one part')
    parts = []
    for number, part in enumerate(row["content"], 1):
        here = f"{where}, part {number}"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PART_TYPES:
            raise UserError(f"{here}: type {kind!r}; choose one of {', '.join(PART_TYPES)}")
        role, loss = part.get("role", "none"), part.get("loss", True)
        if role not in ROLES:
            raise UserError(f"{here}: role {role!r}; choose one of {', '.join(ROLES)}")
        if not isinstance(loss, bool):
            raise UserError(f"{here}: loss {loss!r}; it is true or false")
        key = "text" if kind == "text" else "path"
        if unknown := set(part) - {"type", key, "role", "loss"}:
            raise UserError(f"{here}: {', '.join(sorted(unknown))}: unknown; it may say type, {key}, role, loss")
        value = part.get(key)
        if not isinstance(value, str) or not value:
            raise UserError(f"{here}: an empty or missing {key!r}; fill it or remove the part")
        if kind != "text" and "://" in value:
            raise UserError(f"{here}: {value[:80]} is a URL, which is not followed: download it, and name the file")
        if not is_utf8(value):
            raise UserError(f"{here}: {key!r} is not UTF-8 text (half of a surrogate pair); mend it")
        if kind == "text":
            parts.append(Part(kind, text=value, role=role, loss=loss))
        else:
            parts.append(Part(kind, path=folder / value, role=role, loss=loss))
    return RawDocument(default_id if row.get("id") is None else str(row["id"]), tuple(parts), where)


#: Where `str.splitlines` ends a line although JSON does not; and halves of surrogate pairs, which UTF-8 cannot hold.
_UNSAFE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def json_line(value: Any) -> str:
    """A line of a JSON Lines file, without its end: readable text, and one line for every reader. Inverse of `json.loads`."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def format_raw_document(document: RawDocument, folder: Path) -> str:
    """One line of an interleaved JSON Lines file in `folder`, without a line end. Inverse of `parse_raw_document`."""
    content = []
    for part in document.content:
        row: dict = {"type": part.type}
        if part.path is None:
            row["text"] = part.text
        else:
            row["path"] = str(part.path.relative_to(folder) if part.path.is_relative_to(folder) else part.path)
        row |= {} if part.role == "none" else {"role": part.role}
        row |= {} if part.loss else {"loss": False}
        content.append(row)
    return json_line({"id": document.id, "content": content})


def read_raw_documents(path: Path) -> Iterator[RawDocument | UserError]:
    """The documents of an interleaved JSON Lines file in order; a bad line comes as the `UserError` that says why."""
    try:
        file = open(path, encoding="utf-8-sig", errors="strict")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    with file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield parse_raw_document(line, path.parent, f"{path.name}, line {number}", f"{path.stem}-{number}")
                except UserError as error:
                    yield error
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; convert it, for example with iconv") from None
