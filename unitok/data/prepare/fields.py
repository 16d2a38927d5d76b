"""Rows of named fields -> the parts of a document, by a template or by the names and content of the fields.

Rows are the members of a WebDataset sample by their suffix, the columns of a table, the keys of a line without `content`, and the
files of one base name by their suffix. A template names the fields that make the document, in the format of JSON Lines with fields
in braces:

    template:
      - {type: text, text: "Describe it.", role: user, loss: false}
      - {type: image, path: "{jpg}", role: user, loss: false}
      - {type: text, text: "{json.caption}", role: assistant}

Without one, a row's texts come first, then its images, then its audio. A field with a caption's name is text, whatever it begins
with; a field with a name of media (`image`, `audio_path`, …) holds media, or the row is a bad one. What is not used is reported.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from unitok.conversations import data_url
from unitok.data.prepare.objects import objects_of
from unitok.data.prepare.recipe import FIELD, SourceSpec, TemplatePart, part_keys, template_content
from unitok.document import Part
from unitok.errors import UserError
from unitok.media import promised, sniff_bytes, unread
from unitok.media.formats import promised_kind
from unitok.modalities import modalities, modality_of
from unitok.storage import FOLDER, MAX_TEXT, Blob

#: Names of fields that hold a caption, where there is no template.
CAPTIONS = ["txt", "text", "texts", "caption", "captions", "sentence", "transcription", "transcript", "prompt", "description"]

#: Names of fields that hold media (content, names of files, or data URLs), and of those that name their files.
_MEDIA = re.compile(r"(image|img|picture|photo|audio|sound|wav|video|clip)s?")
_FILES = re.compile(
    rf"({_MEDIA.pattern}_?)?(file_?names?|file_?paths?|paths?|files?)|(\w+_)?file_names?|{_MEDIA.pattern}|{_MEDIA.pattern}_names?"
)

#: Names of fields that hold a conversation, in other formats than those of `unitok.conversations`.
_CONVERSATIONS = ("conversations", "conversation", "messages", "dialogue", "dialog", "turns")

#: Longest name of a file, in characters.
MAX_NAME = 4096

#: What `promised` returns for the suffixes of media.
MEDIA_SUFFIXES = ("an image", "audio", "a video")

#: The kind of captions, and the key of their parts.
TEXT = "text"

Fields = Mapping[str, object]  # str, number, bool, None, Blob, or lists and dictionaries of them
Open = Callable[[str], Blob]  # opens the file that a text names
RowContent = tuple[list[Part], list[str]]  # the parts of a document, and notes on what of its row was not used


def is_media(name: str) -> bool:
    """Whether a name is one of an image, audio or a video by its suffix."""
    return promised(name) in MEDIA_SUFFIXES


def names_media(name: str) -> bool:
    """Whether a field's name is one of fields that hold images or audio, or name their files."""
    return _FILES.fullmatch(name.lower()) is not None or is_media(f".{name}")


def names_file(name: str, text: str) -> bool:
    """Whether the text of a field names a file of media: that of `image_path` does, that of `path` or `image_name` where its suffix is one of
    media."""
    title = name.lower().endswith(("_name", "_names")) and "file" not in name.lower()
    of_media = (_MEDIA.match(name.lower()) is not None and not title) or is_media(f".{name}")
    return names_media(name) and (of_media or is_media(text))


def read_fields(spec: SourceSpec, row: Fields, open_path: Open, files: bool = False, with_objects: bool = False) -> RowContent:
    """The document of a row, by its source's template or without one. Errors: `UserError` for content that does not fit.

    files: the row is files of one base name; where it has no media, any text in it is a document. with_objects: whether labeled boxes in
    its field `objects` are read.
    """
    if spec.template:
        return _fill_template(spec, row, open_path), [_unused(name) for name in _not_in_template(spec, row)]
    given = row.get("objects")
    if not given or not isinstance(given, list | Mapping):
        return _Reader(spec, open_path, files).read(row)
    content, notes = _Reader(spec, open_path, files).read({k: v for k, v in row.items() if k != "objects"})
    if not with_objects:
        return content, [*notes, "boxes are not used: the bundle has none (`unitok bundle BUNDLE --add box`)"]
    parts = given if isinstance(given, list) else objects_of(given)
    if not any(isinstance(part.file, Blob) for part in content):
        raise UserError("objects: no image that they are in")
    return [*content, *(_part(spec, part.type, part.value) for part in parts)], notes


def text_of(blob: Blob) -> str:
    """A blob as UTF-8 text. Errors: `UserError`."""
    data = blob.read()
    if len(data) > MAX_TEXT:
        raise UserError(f"{blob.name}: {len(data)} bytes are too many for one text (limit {MAX_TEXT}); split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{blob.name}: not UTF-8 text (byte {error.start}); convert it, for example with iconv") from None


def unrecognized(data: bytes) -> str:
    """What content is that is neither image nor audio nor text, for messages."""
    if not data:
        return "an empty file"
    if data[257:262] == b"ustar":
        return "a tar archive: name it .tar to read what is in it"
    if not data.strip(b"\0"):
        return "nothing but zeros"
    if data[:4] == b"PAR1":
        return "a Parquet file: name it .parquet to read what is in it"
    return unread(data) or "neither an image nor audio nor UTF-8 text"


# ---- By the names and content of fields -------------------------------------------------------------------------------


class _Reader:
    """Sorts the fields of one row into texts, media, records (JSON) and the rest."""

    def __init__(self, spec: SourceSpec, open_path: Open, files: bool):
        self.spec, self.open_path, self.files = spec, open_path, files
        self.texts: list[str] = []
        self.media: dict[str, list[Part]] = {kind: [] for kind, modality in modalities().items() if not modality.inline}
        self.records: list[Blob] = []
        self.other_texts: list[tuple[str, Blob]] = []  # text in a field without a caption's name
        self.left: list[tuple[str, str]] = []  # fields with other content, and a message for each
        self.empty: list[str] = []  # fields for media or captions that hold nothing
        self.blank: list[str] = []  # captions of white space alone
        self.unread: list[str] = []  # fields of text without a name of captions or media

    def read(self, row: Fields) -> RowContent:
        """The parts of a row's document, and notes. Errors: `UserError`."""
        flat = list(_flat(row))
        for name, value in flat:
            if name.lower() in _CONVERSATIONS and isinstance(value, list):
                raise UserError(
                    f"{name}: no conversation of a format that is read: write it as `messages`, a list of objects with role and content"
                )
        for name, value in flat:
            for content in [value] if _is_numbers(value) else _listed(value):
                self._take(name, content)
            if (value is None or value == []) and self._role(name):
                self.empty.append(name)
        self._take_named_files(flat)
        return self._document()

    def _role(self, name: str) -> str:
        """`caption`, `media`, or "" for a field whose name leaves open what it holds."""
        suffix = _last(name).lower()
        return "caption" if suffix in CAPTIONS else "media" if names_media(suffix) else ""

    def _take(self, name: str, content: object) -> None:
        """Sort one value of a field. Errors: `UserError` for one that is not what the field's name says."""
        role = self._role(name)
        if isinstance(content, Blob):
            self._take_blob(name, content.loaded(), role)
        elif role == "caption" and isinstance(content, str):
            self._take_text(name, content)
        elif isinstance(content, str):
            self.unread.append(name)
        elif content is not None and any(map(_MEDIA.fullmatch, name.lower().split("."))):
            if "." in name and isinstance(content, int | float):
                return  # a property of media (`image.width`)
            kinds: dict[type, str] = {list: "a list of numbers", dict: "a record"}
            what = kinds.get(type(content)) or repr(content)[:40]
            raise UserError(f"{name}: {what}, where media should be: bytes, the path of a file, or a data URL")

    def _take_text(self, name: str, text: str) -> None:
        if text.strip():
            self.texts.append(text)
        else:
            self.blank.append(name)

    def _take_blob(self, name: str, blob: Blob, role: str, named: str = "") -> None:
        """named: as `_named`."""
        head = blob.head()
        if role == "caption":
            if not head or b"\0" in head:
                raise UserError(f"{blob.name}: {unrecognized(head)}")
            self._take_text(blob.name, text_of(blob))
            return
        kind = _kind_of(head, blob.name)
        if role == "media" and kind and kind not in self.media:  # SVG is known without its suffix here
            kind = sniff_bytes(head, "svg")
        what = promised(blob.name) or promised(f".{name}") or ("an image or audio" if role == "media" else "")
        if kind in self.media:
            kind = named or kind
            self.media[kind].append(_part(self.spec, kind, blob))
        elif kind and what:
            raise UserError(f"{blob.name}: {kind}, where {what} should be; replace it or leave it out")
        elif kind and _last(name).lower() == "json":
            self.records.append(blob)
        elif kind:
            self.other_texts.append((name, blob))
        else:
            problem = f"{blob.name}: {unrecognized(head)}"
            if role == "media":
                raise UserError(problem)
            self.left.append((name, problem))

    def _take_named_files(self, flat: list[tuple[str, object]]) -> None:
        """Read texts in fields with a name of media: data URLs, and names of files where the row does not hold media of their kind itself."""
        held = [kind for kind, parts in self.media.items() if parts]
        names: dict[str, list[str]] = {}  # by file: several fields may name one
        for name, value in flat:
            for text in _listed(value) if names_media(_last(name)) else ():
                if not isinstance(text, str):
                    continue
                if not text.strip():
                    self.empty.append(name)
                elif data := data_url(text, name):
                    self._take_blob(name, data, "media")
                elif names_file(_last(name), text) and not self._holds(held, name, text):
                    names.setdefault(text, []).append(name)
        for text, fields in names.items():
            blob = open_media(text, fields[0], self.open_path).loaded()
            kind = _kind_of(blob.head(), blob.name)
            for named, name in {self._named(field, kind): field for field in fields}.items():
                self._take_blob(f"{name}.{text.rpartition('.')[2]}" if "." in text else name, blob, "media", named)

    def _holds(self, held: list[str], field: str, name: str) -> bool:
        """Whether media of the kind that a file's name promises, or of any if it promises none, are among the kinds that the row holds."""
        kind = promised_kind(name)
        return (self._named(field, kind) or kind) in held if kind else bool(held)

    def _named(self, name: str, kind: str | None) -> str:
        """The kind that a field is named after, where a file of another kind holds it, too, as a video holds audio; else ""."""
        named = _last(name).lower()
        return named if named in self.media and kind in modality_of(named).also else ""

    def _document(self) -> RowContent:
        """Texts first, then media; one text for all captions. Errors: `UserError` where the row cannot be a document."""
        media = [part for parts in self.media.values() for part in parts]
        if self.left and not media:  # a caption whose media cannot be read
            raise UserError(self.left[0][1])
        if self.blank and not self.texts:
            raise UserError(f"{self.blank[0]}: no text in it; fill it or leave it out")
        unused = [name for name, _ in self.left]
        if media and not self.texts:
            self.texts = list(filter(None, (_caption(_json_of(record)) for record in self.records)))
            unused += ["json"] * bool(self.records and not self.texts)
            unused += [name for name in self.unread if not names_media(_last(name)) and not self.texts]
        if len(self.texts) > 1:  # one line per caption
            self.texts = ["\n".join(text.strip() for text in self.texts)]
        if media:
            self.texts = [text.strip() for text in self.texts]
            unused += [name for name, _ in self.other_texts]
        elif self.files:
            for _, blob in self.other_texts:
                self._take_text(blob.name, text_of(blob))
        if not media and not self.texts:  # of metadata alone its caption, or all of it
            self.texts = [_text_of_record(record) for record in self.records]
        notes = [_unused(name) for name in dict.fromkeys(unused)]
        notes += [f"field {name!r} is empty" for name in dict.fromkeys(self.empty + self.blank) if not media or "." not in name]
        return [*(_part(self.spec, TEXT, text) for text in self.texts), *media], notes


def _kind_of(head: bytes, name: str) -> str | None:
    """The kind of a file, or of what has a folder for a file, as a video of frames has."""
    if head != FOLDER:
        return sniff_bytes(head, name)
    return next((kind for kind, modality in modalities().items() if modality.recognizes(head, name)), None)


def _unused(name: str) -> str:
    return f"field {name!r} is not used"


def _flat(row: Fields, depth: int = 3) -> Iterator[tuple[str, object]]:
    """Fields, and the fields of records in them, which are named with a dot."""
    for name, value in row.items():
        if isinstance(value, Mapping) and depth:
            yield from ((f"{name}.{inner}", v) for inner, v in _flat(value, depth - 1))
        else:
            yield str(name), value


def _last(name: str) -> str:
    """The last step of a name with dots, such as `json.caption`; all of a name without."""
    return name.rpartition(".")[2]


def _listed(value: object) -> list[object]:
    """A list as it is; another value as a list of one."""
    return value if isinstance(value, list) else [value]


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float | list)


def _text_of_record(record: Blob) -> str:
    """The caption in a JSON document, or all of its text. Errors: `UserError` for lists of records, which describe other files."""
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


def _caption(record: object) -> str:
    """The first text in a record's fields for captions, or ""."""
    texts = [record[name] for name in CAPTIONS if isinstance(record, dict) and isinstance(record.get(name), str)]
    return next((text for text in texts if text.strip()), "")


# ---- By a template ----------------------------------------------------------------------------------------------------


def _not_in_template(spec: SourceSpec, row: Fields) -> list[str]:
    """Fields with content that no part of the template names."""
    named = [name.lower() for entry in spec.template for name in re.findall(FIELD, template_content(entry))]
    return [
        name
        for name, value in row.items()
        if any(isinstance(v, Blob) for v in _listed(value)[:1])
        and not any(used == name.lower() or used.startswith(f"{name.lower()}.") for used in named)
    ]


def _fill_template(spec: SourceSpec, row: Fields, open_path: Open) -> list[Part]:
    """The parts of a row by its source's template. Errors: `UserError`."""
    parts = []
    for entry in spec.template:
        pattern, optional = template_content(entry), bool(entry.get("optional", False))
        alone = pattern.strip().removeprefix("{").removesuffix("}")
        contents: Sequence[object]
        if TEXT in entry:
            contents = _fill_text(pattern, row, optional)
        elif "path" in entry:
            contents = _files_of(_find(alone, row, optional), alone, open_path)
        else:
            contents = [_find(alone, row, optional)]
        if not contents or any(c is None or c == "" for c in contents):
            if optional:
                continue
            raise UserError(f"nothing in {pattern}; set `optional: true` for a part that may be missing")
        view = _view_of(entry, row)
        parts += [replace(_part(spec, str(entry["type"]), content, entry), view=view) for content in contents]
    return parts


def _view_of(entry: TemplatePart, row: Fields) -> str:
    """Which part or variant of its content a template's part asks for, such as `map: labels` or `start: "{begin}"`."""
    given = {key: entry[key] for key in part_keys(str(entry["type"])) if key in entry}
    filled = {k: _fill_text(v, row, False)[0] if isinstance(v, str) else v for k, v in given.items()}
    modality = next((m for m in modalities().values() if not m.inline and filled.keys() <= set(m.keys)), None)
    return modality.view(filled, "template") if modality and filled else ""


def _fill_text(pattern: str, row: Fields, optional: bool) -> list[str | None]:
    """A text with its fields filled in; a text that is one field, and that field a list, gives several."""
    alone = re.fullmatch(FIELD, pattern)
    value = _find(alone[1], row, optional) if alone else None
    if alone and isinstance(value, list):
        return [_text_of(v, f"{alone[1]}, one of a list") for v in value]
    texts = {name: _text_of(_find(name, row, optional), name) for name in re.findall(FIELD, pattern)}
    return [None if None in texts.values() else re.sub(FIELD, lambda m: texts[m[1]] or "", pattern)]


def _find(name: str, row: object, optional: bool = False) -> object:
    """A field by its name, `json.caption` for one inside another. Errors: `UserError` where there is none (optional: None)."""
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
    raise UserError(f"no field {name!r}; the fields are {known}")


def _json_of(blob: Blob) -> object:
    try:
        return json.loads(blob.read())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{blob.name}: not JSON") from None


def _text_of(value: object, name: str) -> str | None:
    if isinstance(value, Blob):
        return text_of(value).strip()
    if isinstance(value, Mapping | list):
        several = "a list; a part whose text is this field alone gives one text per entry"
        what = several if isinstance(value, list) else "a record: name one of its fields with a dot"
        raise UserError(f"{{{name}}} is {what}")
    return None if value is None else str(value)


def _files_of(value: object, name: str, open_path: Open) -> list[Blob | None]:
    contents = (_file(v, name, open_path) if isinstance(v, str) and v else v for v in _listed(value))
    return [content if isinstance(content, Blob) else None for content in contents]


def _file(text: str, name: str, open_path: Open) -> Blob:
    """The content that the text of a field names: of a data URL, or of a file."""
    if content := data_url(text, name):
        return content
    if len(text) > MAX_NAME:
        raise UserError(f"{name}: {len(text)} characters, which name no file and are no data URL of an image or audio")
    return open_path(text)


def open_media(content: object, name: str, open_path: Open) -> Blob:
    """The content of a file, a data URL or a cell of a table. name: for messages. Errors: `UserError`."""
    if isinstance(content, Blob):
        return content
    if not isinstance(content, str) or not content:
        raise UserError(f"{name}: {str(content)[:40]!r} is neither the name of a file nor a data URL")
    if "://" in content:
        raise UserError(f"{name}: {content[:80]} is a URL, which is not followed: download it, and name the file")
    return _file(content, name, open_path)


def _part(spec: SourceSpec, type: str, content: object, entry: TemplatePart | None = None) -> Part:
    """A part with the role and loss of its template's entry, or those of its source."""
    role, loss = spec.defaults(type)
    role, loss = (str(entry.get("role", role)), bool(entry.get("loss", loss))) if entry else (role, loss)
    if isinstance(content, Blob):
        return Part(type, path=Path(content.name), file=content, role=role, loss=loss)
    return Part(type, content, role=role, loss=loss)
