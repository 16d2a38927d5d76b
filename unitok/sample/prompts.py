"""Prompts as callers give them -> Documents: pieces of content, lists of pieces, batches, and files of prompts."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from pathlib import Path

from unitok.bundle import Bundle
from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError, type_of, visible
from unitok.interleaved import Types, read_raw_documents
from unitok.media import sniff
from unitok.modalities import kind_accepting, modality_of
from unitok.storage import Files

_PIECES = "a str, Path, PIL.Image, array, (waveform [C, T], Hz), Document or Segment"


def is_piece(value: object) -> bool:
    """Whether a value is one piece of a prompt, and not a list of pieces."""
    if isinstance(value, tuple):  # a waveform and its rate, in any order
        numbers = [isinstance(v, Real) for v in value]
        waveform = value[numbers.index(False)] if len(value) == 2 and sum(numbers) == 1 else None
        return isinstance(waveform, list) or _is_array(waveform)
    known = isinstance(value, str | bytes | os.PathLike | Document | RawDocument | Part | Segment)
    return known or _is_array(value) or kind_accepting(value) is not None


def _is_array(value: object) -> bool:
    """Whether a value is an array or a PIL image; a list of numbers counts, too, so that its message says what it lacks."""
    numbers = isinstance(value, list) and bool(value) and isinstance(value[0], Real)
    return numbers or hasattr(type(value), "__array__") or hasattr(type(value), "__array_interface__")


def read_prompts_of(bundle: Bundle, prompt: object) -> list[Document]:
    """Return the Document of each prompt: of one piece, of a list of pieces, or of each list in a list of lists (`Prompts`)."""
    if is_piece(prompt):
        return [_read_pieces(bundle, [prompt])]
    pieces = _items(prompt, "prompt")
    nested = [piece for piece in pieces if isinstance(piece, list) and not is_piece(piece)]
    if nested and len(nested) < len(pieces):
        raise UserError("prompt: pieces and lists of pieces are mixed; a batch is a list of lists of pieces")
    return [_read_pieces(bundle, one) for one in nested or [pieces]]


def read_one(bundle: Bundle, prompt: object, argument: str = "prompt") -> Document:
    """Return the Document of one prompt, a piece or a list of pieces (`Prompt`). Errors: `UserError` that begins with the argument's name."""
    with naming(argument):
        documents = read_prompts_of(bundle, prompt)
        if len(documents) != 1:
            raise UserError(f"prompt: a batch of {len(documents)} prompts; give one")
    return documents[0]


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Raise a `UserError` about a prompt again as one that begins with the name of an argument."""
    try:
        yield
    except UserError as error:
        if argument == "prompt":
            raise
        message = str(error)
        named = message.removeprefix("prompt") if message.startswith(("prompt:", "prompt is")) else f": {message}"
        raise UserError(argument + named) from None


def read_documents(bundle: Bundle, documents: object) -> list[Document]:
    """Return documents: of one piece, or of each item in a list, which is a Document, a piece or a list of pieces."""
    items = [documents] if is_piece(documents) else _items(documents, "documents")
    return [item if isinstance(item, Document) else read_one(bundle, item, "documents") for item in items]


def _items(values: object, name: str) -> list[object]:
    if not isinstance(values, list | tuple):
        raise UserError(f"{name}: {type_of(values)}; give {_PIECES}, a list of these, or a list of such lists")
    if not values:
        raise UserError(f"{name} is an empty {type(values).__name__}")
    return list(values)


def _read_pieces(bundle: Bundle, pieces: Sequence[object]) -> Document:
    for piece in pieces:
        warn_of_file_name(piece)
        for text in _texts(piece):
            warn_of_unknown_words(bundle, text)
    return Document(tuple(bundle.read(*pieces)))


def warn_of_file_name(text: object) -> None:
    """Warn where a text is the name of an image or audio file that exists."""
    if not isinstance(text, str) or len(text) >= 1024 or "\0" in text or not os.path.isfile(text):
        return
    if (kind := sniff(Path(text))) is not None and not modality_of(kind).inline:
        warnings.warn(
            f"the text {visible(text)!r} of the prompt names an {kind} file; Path({visible(text)!r}) reads it", stacklevel=2
        )


def _texts(piece: object) -> list[str]:
    """The texts of a piece that are written out."""
    if isinstance(piece, RawDocument):
        return [text for part in piece.content for text in _texts(part)]
    text = piece.value if isinstance(piece, Part) else piece
    return [text] if isinstance(text, str) else []


def warn_of_unknown_words(bundle: Bundle, text: str) -> None:
    """Warn where a text has words that a bundle with a small world of its own (`Bundle.facts`) never read."""
    world = bundle.facts.get("world")
    if not isinstance(world, dict) or not isinstance(words := world.get("words"), list):
        return
    unknown = [word for word in words_of(text) if word not in words]
    if unknown:
        named = ", ".join(visible(word if len(word) <= 40 else f"{word[:39]}…") for word in unknown[:5])
        warnings.warn(
            f"this bundle never read {named}: what it makes of the prompt is a guess; it knows texts such as "
            f"{visible(str(world.get('example')))!r} (all of its words: README.md of the bundle, and `unitok doctor`)",
            stacklevel=2,
        )


def words_of(text: str) -> list[str]:
    """The different words of a text in lower case, in its order, without punctuation."""
    return [*dict.fromkeys(re.findall(r"[^\W_]+", text.lower()))]


def read_prompts(path: Path, root: str = "", types: Types | None = None) -> list[RawDocument]:
    """Read a file of prompts, interleaved JSON Lines.

    root: folder that no path in it may leave (default: the folder of `path`). Errors: `UserError` for a bad line or a file outside.
    """
    prompts = []
    files: Files | None = None
    for raw in read_raw_documents(path, types):
        if isinstance(raw, UserError):
            raise raw
        files = files or Files(str(path.parent), root)
        prompts.append(replace(raw, content=tuple(_resolved(part, raw.where, path.parent, files) for part in raw.content)))
    if not prompts:
        raise UserError(f"{path}: no prompts in it")
    return prompts


def _resolved(part: Part, where: str, folder: Path, files: Files) -> Part:
    """Return the part with the real path of its file, which must be inside the root."""
    if part.path is None:
        return part
    name = str(part.path.relative_to(folder) if part.path.is_relative_to(folder) else part.path)
    if problem := files.look(name).problem:
        raise UserError(f"{where}: {name}: {problem}")
    return replace(part, path=files.local(name))
