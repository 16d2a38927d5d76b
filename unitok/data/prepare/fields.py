"""Rows of named fields -> the parts of a document, by a template or by what the fields are called and hold.

Rows are the members of a WebDataset sample by their suffix, the columns of a table, the keys of a line without `content`, and the
files of one base name by their suffix. A template says which fields make the document, in the words of the JSON Lines format
with fields in braces:

    template:
      - {type: text, text: "Describe it.", role: user, loss: false}
      - {type: image, path: "{jpg}", role: user, loss: false}
      - {type: text, text: "{json.caption}", role: assistant}

Without one, a row's texts come first, then its images, then its audio. A caption is a caption, whatever its first letters are; a
field called as media are (`image`, `audio_path`, …) holds media or makes the row a bad one. What is not used is told, never passed
over.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unitok.data.prepare.recipe import FIELD, SourceSpec, template_content
from unitok.document import Part
from unitok.errors import UserError
from unitok.media import promised, sniff_bytes, unread
from unitok.modalities import modalities
from unitok.storage import MAX_TEXT, Blob

#: Fields that hold a caption, where no template says which do.
CAPTIONS = ["txt", "text", "texts", "caption", "captions", "sentence", "transcription", "transcript", "prompt", "description"]

#: Fields that hold media (content, names of files, or data URLs), and those that name their files.
_MEDIA = re.compile(r"(image|img|picture|photo|audio|sound|wav)s?")
_FILES = re.compile(rf"({_MEDIA.pattern}_?)?(file_?names?|file_?paths?|paths?|files?)|(\w+_)?file_names?|{_MEDIA.pattern}")

#: Fields that hold a conversation.
_CONVERSATIONS = ("conversations", "conversation", "messages", "dialogue", "dialog", "turns")

#: Longest name of a file, characters.
MAX_NAME = 4096

#: What `promised` says of the suffixes of media.
MEDIA_SUFFIXES = ("an image", "audio")

#: The kind of captions, and the key of their parts.
TEXT = "text"

Fields = Mapping[str, Any]  # str, number, bool, None, Blob, or lists and dictionaries of them
Open = Callable[[str], Blob]  # the file that a text names
Made = tuple[list[Part], list[str]]  # the parts of a document, and what of its row was not used, in words that are counted


def names_media(name: str) -> bool:
    """Whether a field is called as those that hold images or audio, or name their files, are."""
    return _FILES.fullmatch(name.lower()) is not None or promised(f".{name}") in MEDIA_SUFFIXES


def names_file(name: str, text: str) -> bool:
    """Whether the text of a field names a file of media: `image_path` names one, `path` where the suffix says so."""
    says = _MEDIA.match(name.lower()) is not None or promised(f".{name}") in MEDIA_SUFFIXES
    return names_media(name) and (says or promised(text) in MEDIA_SUFFIXES)


def read_fields(spec: SourceSpec, row: Fields, open_path: Open, files: bool = False) -> Made:
    """What a row makes, by its source's template or without one; errors: `UserError` for content that is not what it should be.

    files: the row is files of one base name: where it holds no media, any text in it is a document.
    """
    if spec.template:
        return _fill_template(spec, row, open_path), [_unused(name) for name in _not_in_template(spec, row)]
    return _Reader(spec, open_path, files).read(row)


def text_of(blob: Blob) -> str:
    """A blob as UTF-8 text; errors: `UserError`."""
    data = blob.read()
    if len(data) > MAX_TEXT:
        raise UserError(f"{blob.name}: {len(data)} bytes are too many for one text (limit {MAX_TEXT}); split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{blob.name}: not UTF-8 text (byte {error.start}); convert it, for example with iconv") from None


def unrecognized(data: bytes, name: str) -> str:
    """What is wrong with content that is neither image nor audio nor text."""
    if not data:
        return "an empty file"
    if data[257:262] == b"ustar":
        return "a tar archive: name it .tar to read what is in it"
    if not data.strip(b"\0"):
        return "nothing but zeros"
    if data[:4] == b"PAR1":
        return "a Parquet file: name it .parquet to read what is in it"
    return unread(data, name) or "neither an image nor a sound nor UTF-8 text"


# ---- By what fields are called and hold -------------------------------------------------------------------------------


class _Reader:
    """Sorts the fields of one row into texts, media, records (JSON) and what is left."""

    def __init__(self, spec: SourceSpec, open_path: Open, files: bool):
        self.spec, self.open_path, self.files = spec, open_path, files
        self.texts: list[str] = []
        self.media: dict[str, list[Part]] = {kind: [] for kind, modality in modalities().items() if not modality.inline}
        self.records: list[Blob] = []
        self.other_texts: list[tuple[str, Blob]] = []  # text that is no caption by its name
        self.left: list[tuple[str, str]] = []  # fields that hold something else, and what is wrong with it
        self.empty: list[str] = []  # fields for media or captions that hold nothing
        self.blank: list[str] = []  # captions that hold nothing but white space
        self.unread: list[str] = []  # fields of text that are called neither as captions nor as media are

    def read(self, row: Fields) -> Made:
        flat = list(_flat(row))
        for name, value in flat:
            if name.lower() in _CONVERSATIONS and isinstance(value, list):
                raise UserError(
                    f"{name}: a conversation, which is not read yet; write it as interleaved `content`, or name fields in a template"
                )
        for name, value in flat:
            for content in [value] if _is_numbers(value) else _listed(value):
                self._take(name, content)
            if (value is None or value == []) and self._role(name):
                self.empty.append(name)
        self._take_named_files(flat)
        return self._made()

    def _role(self, name: str) -> str:
        """`caption`, `media`, or "" for a field whose name does not say what it holds."""
        suffix = _last(name).lower()
        return "caption" if suffix in CAPTIONS else "media" if names_media(suffix) else ""

    def _take(self, name: str, content: Any) -> None:
        role = self._role(name)
        if isinstance(content, Blob):
            self._take_blob(name, content.loaded(), role)
        elif role == "caption" and isinstance(content, str):
            self._take_text(name, content)
        elif isinstance(content, str):
            self.unread.append(name)
        elif content is not None and any(map(_MEDIA.fullmatch, name.lower().split("."))):
            if "." in name and isinstance(content, int | float):
                return  # a number that is said of media (`image.width`), not in its place
            kinds: dict[type, str] = {list: "a list of numbers", dict: "a record"}
            what = kinds.get(type(content)) or repr(content)[:40]
            raise UserError(f"{name}: {what}; bytes, the path of a file, or a data URL are read as media")

    def _take_text(self, name: str, text: str) -> None:
        if text.strip():
            self.texts.append(text)
        else:
            self.blank.append(name)

    def _take_blob(self, name: str, blob: Blob, role: str) -> None:
        head = blob.head()
        if role == "caption":
            if not head or b"\0" in head:
                raise UserError(f"{blob.name}: {unrecognized(head, blob.name)}")
            self._take_text(blob.name, text_of(blob))
            return
        kind = sniff_bytes(head, blob.name)
        if role == "media" and kind and kind not in self.media:  # no suffix is needed to tell SVG from words here
            kind = sniff_bytes(head, "svg")
        what = promised(blob.name) or promised(f".{name}") or ("an image or audio" if role == "media" else "")
        if kind in self.media:
            self.media[kind].append(_part(self.spec, kind, blob))
        elif kind and what:
            raise UserError(f"{blob.name}: {kind}, where {what} should be; replace it or leave it out")
        elif kind and _last(name).lower() == "json":
            self.records.append(blob)
        elif kind:
            self.other_texts.append((name, blob))
        else:
            why = f"{blob.name}: {unrecognized(head, blob.name)}"
            if role == "media":
                raise UserError(why)
            self.left.append((name, why))

    def _take_named_files(self, flat: list[tuple[str, Any]]) -> None:
        """Texts in fields called as media are: names of files or data URLs, where the row does not hold the media itself."""
        held = any(self.media.values())
        names: dict[str, str] = {}  # a file that two fields name is one file
        for name, value in flat:
            for text in _listed(value) if names_media(_last(name)) else ():
                if not isinstance(text, str):
                    continue
                if not text.strip():
                    self.empty.append(name)
                elif data := data_url(text, name):
                    self._take_blob(name, data, "media")
                elif not held and names_file(_last(name), text):
                    names.setdefault(text, name)
        for text, name in names.items():
            if "://" in text:
                raise UserError(f"{name}: {text[:80]} is a URL, which is not followed: download it, and name the file")
            blob = _file(text, name, self.open_path).loaded()
            self._take_blob(f"{name}.{text.rpartition('.')[2]}" if "." in text else name, blob, "media")

    def _made(self) -> Made:
        found = [part for parts in self.media.values() for part in parts]
        if self.left and not found:  # nobody knows what a caption alone belongs to
            raise UserError(self.left[0][1])
        if self.blank and not self.texts:
            raise UserError(f"{self.blank[0]}: no text in it; fill it or leave it out")
        unused = [name for name, _ in self.left]
        if found and not self.texts:
            self.texts = list(filter(None, (_caption(_json_of(record)) for record in self.records)))
            unused += ["json"] * bool(self.records and not self.texts)
            unused += [name for name in self.unread if not names_media(_last(name)) and not self.texts]
        if len(self.texts) > 1:  # captions are told apart
            self.texts = ["\n".join(text.strip() for text in self.texts)]
        if found:
            self.texts = [text.strip() for text in self.texts]
            unused += [name for name, _ in self.other_texts]
        elif self.files:
            for _, blob in self.other_texts:
                self._take_text(blob.name, text_of(blob))
        if not found and not self.texts:  # metadata alone is what there is to read: its caption, or all of it
            self.texts = [_text_of_record(record) for record in self.records]
        notes = [_unused(name) for name in dict.fromkeys(unused)]
        notes += [f"field {name!r} is empty" for name in dict.fromkeys(self.empty + self.blank) if not found or "." not in name]
        return [*(_part(self.spec, TEXT, text) for text in self.texts), *found], notes


def _unused(name: str) -> str:
    return f"field {name!r} is not used"


def _flat(row: Fields, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Fields with those of records in them, which are named with a dot."""
    for name, value in row.items():
        if isinstance(value, Mapping) and depth:
            yield from ((f"{name}.{inner}", v) for inner, v in _flat(value, depth - 1))
        else:
            yield str(name), value


def _last(name: str) -> str:
    """The suffix of a name with dots, such as `json.caption`, or all of another one."""
    return name.rpartition(".")[2]


def _listed(value: Any) -> list[Any]:
    """The entries of a list, or a value that is none as the only one."""
    return value if isinstance(value, list) else [value]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float | list)


def data_url(text: str, name: str) -> Blob | None:
    """The content of a data URL, or of base64 alone; None where a text is neither. Errors: `UserError` for a broken one."""
    told, _, coded = text.partition(";base64,") if text.startswith("data:") else ("", "", text)
    if not told and (len(text) < 64 or not re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text)):
        return None
    try:
        data = base64.b64decode("".join(coded.split()), validate=True)
    except binascii.Error:
        data = b""
    if told and not data:
        raise UserError(f"{name}: a data URL that is not base64; mend it")
    media = [kind for kind, modality in modalities().items() if not modality.inline]
    known = data and sniff_bytes(data[:4096]) in media
    place = int.from_bytes(hashlib.sha256(data).digest()[:7], "big")  # tells it from another one in a field of the same name
    return Blob(name, data, offset=place) if told or known else None


def _text_of_record(record: Blob) -> str:
    """The caption of JSON that stands alone, or all of it; errors: `UserError` for lists of records, which speak of other files."""
    text = text_of(record)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if caption := _caption(content):
        return caption
    fields = content if isinstance(content, dict) else {"its entries": content}
    lists = [k for k, v in fields.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    if lists:
        raise UserError(
            f"{record.name}: lists of records ({', '.join(lists[:4])}), which are not read; convert it to JSON Lines"
        )
    return text


def _caption(record: Any) -> str:
    found = [record[name] for name in CAPTIONS if isinstance(record, dict) and isinstance(record.get(name), str)]
    return next((text for text in found if text.strip()), "")


# ---- By a template ----------------------------------------------------------------------------------------------------


def _not_in_template(spec: SourceSpec, row: Fields) -> list[str]:
    """Fields that hold content which no part of the template names."""
    named = [name.lower() for entry in spec.template for name in re.findall(FIELD, template_content(entry))]
    return [
        name
        for name, value in row.items()
        if any(isinstance(v, Blob) for v in _listed(value)[:1])
        and not any(used == name.lower() or used.startswith(f"{name.lower()}.") for used in named)
    ]


def _fill_template(spec: SourceSpec, row: Fields, open_path: Open) -> list[Part]:
    """The parts that a source's template makes of a row."""
    parts = []
    for entry in spec.template:
        pattern, optional = template_content(entry), entry.get("optional", False)
        alone = pattern.strip().removeprefix("{").removesuffix("}")
        contents: Sequence[Any]
        if TEXT in entry:
            contents = _fill_text(pattern, row, optional)
        elif "path" in entry:
            contents = _files_of(_find(alone, row, optional), alone, open_path)
        else:
            contents = [_find(alone, row, optional)]
        if not contents or any(c is None or c == "" for c in contents):
            if optional:
                continue
            raise UserError(f"nothing in {pattern}; say `optional: true` if that may be")
        said = {key: entry[key] for key in ("role", "loss") if key in entry}
        parts += [_part(spec, entry["type"], content, **said) for content in contents]
    return parts


def _fill_text(pattern: str, row: Fields, optional: bool) -> list[str | None]:
    """A text with its fields filled in; a text that is one field, and that field a list, gives several."""
    alone = re.fullmatch(FIELD, pattern)
    value = _find(alone[1], row, optional) if alone else None
    if alone and isinstance(value, list):
        return [_text_of(v, f"{alone[1]}, one of a list") for v in value]
    found = {name: _text_of(_find(name, row, optional), name) for name in re.findall(FIELD, pattern)}
    return [None if None in found.values() else re.sub(FIELD, lambda m: found[m[1]] or "", pattern)]


def _find(name: str, row: Any, optional: bool = False) -> Any:
    """A field by its name, `json.caption` for one inside another; errors: `UserError` when there is none (optional: None)."""
    if isinstance(row, Blob):
        row = _json_of(row)
    if isinstance(row, Mapping):
        if name in row or name.lower() in row:  # suffixes of archives are lowercase
            return row[name if name in row else name.lower()]
        for cut in (i for i, c in enumerate(name) if c == "."):
            if name[:cut] in row:
                return _find(name[cut + 1 :], row[name[:cut]], optional)
    if optional:
        return None
    known = ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else "no fields"
    raise UserError(f"no field {name!r}; there are {known}")


def _json_of(blob: Blob) -> Any:
    try:
        return json.loads(blob.read())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{blob.name}: not JSON") from None


def _text_of(value: Any, name: str) -> str | None:
    if isinstance(value, Blob):
        return text_of(value).strip()
    if isinstance(value, Mapping | list):
        several = "a list; a part whose text is this field alone gives a text for each"
        what = several if isinstance(value, list) else "a record: name one of its fields with a dot"
        raise UserError(f"{{{name}}} is {what}")
    return None if value is None else str(value)


def _files_of(value: Any, name: str, open_path: Open) -> list[Blob | None]:
    read = (_file(v, name, open_path) if isinstance(v, str) and v else v for v in _listed(value))
    return [v if isinstance(v, Blob) else None for v in read]


def _file(text: str, name: str, open_path: Open) -> Blob:
    """What the text of a field gives: a data URL's content, or the file of that name."""
    if held := data_url(text, name):
        return held
    if len(text) > MAX_NAME:
        raise UserError(f"{name}: {len(text)} characters, which name no file and are no data URL of an image or audio")
    return open_path(text)


def _part(spec: SourceSpec, type: str, content: Any, **said: Any) -> Part:
    held = {"path": Path(content.name), "file": content} if isinstance(content, Blob) else {"value": content}
    return Part(type, **held, **(spec.says(type) | said))
