"""Interleaved documents in JSON Lines: one document per line, its parts in reading order.

    {"id": "7", "content": [{"type": "text", "text": "a dog"}, {"type": "image", "path": "dog.png", "loss": true}]}

A part's type is a kind of content (`unitok.modalities`), or the name of one of a bundle's tokenizers. Its modality says which key
holds the content: `path` names a file, relative to the JSON Lines file; any other key holds the content itself. `role` and `loss` are
optional.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from unitok.document import ROLES, Part, RawDocument
from unitok.errors import UserError, is_utf8
from unitok.files import json_line, read_json_lines
from unitok.modalities import AnyModality, modalities

Types = Mapping[str, AnyModality]


def raw_document(row: object, folder: Path, where: str, default_id: str, types: Types | None = None) -> RawDocument:
    """Return the document that the JSON object of a line describes.

    Args:
        row: the object.
        folder: that paths are relative to.
        where: the file and line, for messages.
        default_id: the id of a document without one.
        types: modalities by the types that a part may have; None: all kinds of content.

    Errors: `UserError` that says what is wrong, and in which part.
    """
    if not isinstance(row, dict) or not isinstance(row.get("content"), list) or not row["content"]:
        raise UserError(f'{where}: a document is {{"id": …, "content": [parts]}} with at least one part')
    known = modalities() if types is None else types
    parts = tuple(_part(part, folder, f"{where}, part {number}", known) for number, part in enumerate(row["content"], 1))
    return RawDocument(default_id if row.get("id") is None else str(row["id"]), parts, where)


def _part(part: object, folder: Path, where: str, types: Types) -> Part:
    name = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(name, str) or name not in types:
        raise UserError(f"{where}: type {name!r}; choose one of {', '.join(types)}")
    key, role, loss = types[name].key, part.get("role", "none"), part.get("loss", True)
    if role not in ROLES:
        raise UserError(f"{where}: role {role!r}; choose one of {', '.join(ROLES)}")
    if not isinstance(loss, bool):
        raise UserError(f"{where}: loss {loss!r}; it is true or false")
    modality = types[name]
    if unknown := set(part) - {"type", key, "role", "loss", *modality.keys}:
        keys = ", ".join(("type", key, *modality.keys, "role", "loss"))
        raise UserError(f"{where}: {', '.join(sorted(unknown))}: unknown; a part of type {name} has {keys}")
    value = part.get(key)
    further = {key: part[key] for key in modality.keys if key in part}
    if modality.inline:
        return Part(name, modality.check({key: value, **further} if modality.keys else value, where), role=role, loss=loss)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: an empty or missing {key!r}; fill it or remove the part")
    if "://" in value:
        raise UserError(f"{where}: {value[:80]} is a URL, which is not followed; download it, and name the file")
    if not is_utf8(value):
        raise UserError(f"{where}: {key!r} is not UTF-8 text (half of a surrogate pair); correct it")
    return Part(name, path=folder / value, role=role, loss=loss, view=modality.view(further, where))


def format_raw_document(document: RawDocument, folder: Path, types: Types | None = None) -> str:
    """Return a document as one line of a JSON Lines file in `folder`, without a line end. Inverse of `raw_document`."""
    known = modalities() if types is None else types
    content: list[dict[str, object]] = []
    for part in document.content:
        name = part.path and str(part.path.relative_to(folder) if part.path.is_relative_to(folder) else part.path)
        modality = known[part.type]
        row: dict[str, object] = {"type": part.type}
        row |= modality.row(part.value) if name is None else {modality.key: name, **modality.keys_of(part.view)}
        row |= {} if part.role == "none" else {"role": part.role}
        row |= {} if part.loss else {"loss": False}
        content.append(row)
    return json_line({"id": document.id, "content": content})


def read_raw_documents(path: Path, types: Types | None = None) -> Iterator[RawDocument | UserError]:
    """Yield the documents of an interleaved JSON Lines file in order; for a bad line the `UserError` that says what is wrong."""
    for number, row in read_json_lines(path):
        try:
            if isinstance(row, UserError):
                raise row
            yield raw_document(row, path.parent, f"{path.name}, line {number}", f"{path.stem}-{number}", types)
        except UserError as error:
            yield error
