"""Content as callers hand it over -> segments of a bundle's tokenizers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError, type_of
from unitok.modalities import AnyModality, Loaded, kind_accepting, kind_of_content, modality_of, referred
from unitok.storage import FOLDER, Blob
from unitok.vocab import Vocab


class Tokenizers(Protocol):
    """What of a `Bundle` is needed here."""

    vocab: Vocab

    @property
    def types(self) -> Mapping[str, AnyModality]:
        """The types that a part may have."""

    def require(self, name: str) -> Any:
        """Return a tokenizer by its name."""

    def modality(self, name: str) -> AnyModality:
        """Return the modality of a tokenizer."""

    def instance(self, type: str) -> str:
        """Return the name of the tokenizer that encodes content of a type."""


class ReadFile(str):
    """A `Segment.source` that was given to this process as a Path. Only such files may be copied into outputs: a name that came with
    a document, from a shard or from JSON, is a plain str."""

    __slots__ = ()


@dataclass(frozen=True)
class _Piece:
    """Content that is not encoded yet: the tokenizer's name, the content, its name for messages, and what its `Segment` says."""

    name: str
    content: object
    where: str
    role: str
    loss: bool
    source: str = ""
    view: str = ""


def read_contents(bundle: Tokenizers, contents: Sequence[object], role: str, loss: bool) -> list[Segment]:
    """Return the segments of pieces of content, in order; see `Bundle.read`."""
    pieces = [piece for content in contents for piece in _pieces(bundle, content, role, loss)]
    kinds = [bundle.vocab.span(piece.modality if isinstance(piece, Segment) else piece.name).kind for piece in pieces]
    loaded: list[Loaded | None] = [None] * len(pieces)
    segments: list[Segment | None] = [None] * len(pieces)
    for number in sorted(range(len(pieces)), key=lambda number: bool(modality_of(kinds[number]).refers)):
        piece, modality = pieces[number], modality_of(kinds[number])
        if isinstance(piece, Segment):
            segments[number] = piece
            facts = dict(zip(("height", "width"), map(float, piece.original or piece.size), strict=False))
            loaded[number] = Loaded(None, piece.size, facts=facts)
            continue
        value = piece.content
        if modality.refers:
            value = modality.check(value, piece.where)
            about = referred(kinds, number, value)
            value = modality.related(value, None if about is None else loaded[about], piece.where)
        segments[number], loaded[number] = _encode(bundle, replace(piece, content=value))
    return [segment for segment in segments if segment is not None]


def _pieces(bundle: Tokenizers, content: object, role: str, loss: bool) -> list[Segment | _Piece]:
    """The pieces of content, those that are encoded already as segments."""
    if isinstance(content, Document):
        return list(content.segments)
    if isinstance(content, Segment):
        return [content]
    if isinstance(content, RawDocument):
        return [_piece_of_part(bundle, part) for part in content.content]
    if isinstance(content, Part):
        return [_piece_of_part(bundle, content)]
    if isinstance(content, Path):
        return [_piece_of_file(bundle, content, role, loss)]
    kind = kind_accepting(content)
    if kind is None:
        known = "a str, Path, PIL.Image, array, (waveform [C, T], Hz), Document or Segment"
        raise UserError(f"prompt: {type_of(content)}; a piece of a prompt is {known}")
    name = bundle.instance(kind)
    bundle.require(name)
    return [_Piece(name, content, f"a prompt's {kind}", role, loss)]


def _piece_of_part(bundle: Tokenizers, part: Part) -> _Piece:
    if part.file is not None:
        return _piece_of_blob(bundle, part.file, part.file.name, part.role, part.loss, part.type, "", part.view)
    if part.path is not None:
        return _piece_of_file(bundle, part.path, part.role, part.loss, part.type, part.view)
    name = bundle.instance(part.type)
    bundle.require(name)
    if not (bundle.modality(name).inline or bundle.modality(name).accepts(part.value)):
        raise UserError(f"a part of type {part.type} holds {type_of(part.value)}; give it a path or content of its kind")
    return _Piece(name, part.value, f"a prompt's {part.type}", part.role, part.loss, view=part.view)


def _piece_of_file(bundle: Tokenizers, path: Path, role: str, loss: bool, type: str = "", view: str = "") -> _Piece:
    """type: of the part that names the file; "" where there is none."""
    frames = path.is_dir() and any(bundle.modality(name).recognizes(FOLDER, path.name) for name in bundle.vocab.spans)
    if not (path.is_file() or frames):
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    source = str(path) if type else ReadFile(path)
    return _piece_of_blob(bundle, Blob.at(path), str(path), role, loss, type, source, view)


def _piece_of_blob(
    bundle: Tokenizers, blob: Blob, where: str, role: str, loss: bool, type: str, source: str, view: str = ""
) -> _Piece:
    kind = kind_of_content(blob.head(), Path(where).name, bundle.types[type].kind if type in bundle.types else "")
    if kind is None and view:  # a NumPy file that the part's type reads
        kind = bundle.types[type].kind
    if kind is None:
        raise UserError(f"{where}: {'neither an image nor audio' if blob.head() else 'an empty file; replace it'}")
    name = bundle.instance(type or kind)
    if kind != (bundle.vocab.span(name).kind if name in bundle.vocab.spans else name):
        raise UserError(f"{where}: the part's type is {type}, the file is {kind}; give the file's type")
    bundle.require(name)
    return _Piece(name, blob, where, role, loss, source, view)


def load_contents(bundle: Tokenizers, contents: object) -> list[tuple[str, Any]]:
    """Return of each piece of content, or of a list of pieces, its tokenizer's name and what its modality encodes (`Loaded.content`), or its
    segment where it is encoded already. For what is not about other content. Errors: as for `Bundle.read`."""
    listed = contents if isinstance(contents, list) else [contents]
    pieces = [piece for content in listed for piece in _pieces(bundle, content, "none", True)]
    return [(p.modality, p) if isinstance(p, Segment) else (p.name, _load(bundle, p).content) for p in pieces]


def _load(bundle: Tokenizers, piece: _Piece) -> Loaded:
    modality = bundle.modality(piece.name)
    loaded = modality.load(bundle.require(piece.name), piece.content, modality.Options(), piece.where, piece.view)
    if loaded.rejected:
        raise UserError(f"{piece.where}: nothing to be encoded ({loaded.rejected.replace('_', ' ')})")
    return loaded


def _encode(bundle: Tokenizers, piece: _Piece) -> tuple[Segment, Loaded]:
    tokenizer, modality = bundle.require(piece.name), bundle.modality(piece.name)
    loaded = _load(bundle, piece)
    (codes,) = modality.encode(tokenizer, [loaded])
    original = tuple(int(loaded.facts[side]) for side in ("height", "width") if side in loaded.facts)
    return Segment(piece.name, codes, piece.role, piece.loss, piece.source, loaded.size, original, loaded.header), loaded
