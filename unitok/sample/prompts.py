"""What people hand to `Unitok.generate` and its like, made into batches of lists of parts, settings and names that exist."""

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

from unitok.bundle import Bundle
from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError, visible
from unitok.interleaved import Types, read_raw_documents
from unitok.media import sniff
from unitok.modalities import modality_of
from unitok.sample.sampling import SamplingParams
from unitok.storage import Files

#: One piece of a prompt: str (text), Path (a file), PIL.Image, (waveform [C, T], Hz), or a Document; or a list of pieces.
Prompt = Any


def batch_of(prompt: Any) -> list[list[Any]]:
    """A part alone, the parts of a prompt, or a list of such lists -> lists of parts. Errors: `UserError`."""
    if is_part(prompt):
        return [[prompt]]
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise UserError(f"prompt: a {type(prompt).__name__}; give a part, a list of parts, or a list of such lists for a batch")
    parts = list(prompt)
    nested = [isinstance(part, list) for part in parts]
    if any(nested) and not all(nested):
        raise UserError("prompt: parts and lists of parts are mixed; a batch is a list of lists of parts")
    return parts if parts and nested[0] else [parts]


def is_part(value: Any) -> bool:
    """Whether it is one piece of a prompt, not a list of them; an array counts as one, so that it is told what it lacks."""
    if isinstance(value, tuple):
        number = [isinstance(v, Real) for v in value]
        waveform = value[number.index(False)] if len(value) == 2 and sum(number) == 1 else None
        return isinstance(waveform, list) or _is_array(waveform)
    return isinstance(value, str | bytes | os.PathLike | Document | RawDocument | Part | Segment) or _is_array(value)


def _is_array(value: Any) -> bool:
    """Also a list of numbers, and a PIL image."""
    plain = isinstance(value, list) and bool(value) and isinstance(value[0], Real)
    return plain or hasattr(type(value), "__array__") or hasattr(type(value), "__array_interface__")


def read_prompts_of(bundle: Bundle, prompt: Prompt) -> list[Document]:
    """The Documents of a part, of the parts of a prompt, or of a batch of such lists."""
    return [_read_all(bundle, parts) for parts in batch_of(prompt)]


def read_one(bundle: Bundle, prompt: Prompt) -> Document:
    """The Document of one prompt."""
    batch = batch_of(prompt)
    if len(batch) != 1:
        raise UserError(f"prompt: {len(batch)} lists of parts; read one after the other")
    return _read_all(bundle, batch[0])


def _read_all(bundle: Bundle, parts: list[Any]) -> Document:
    for part in parts:
        hint_at_file(part)
    return Document(tuple(segment for part in parts for segment in bundle.read(part)))


def hint_at_file(text: Any) -> None:
    """Warn where a text is the name of an image or audio file."""
    if not isinstance(text, str) or len(text) >= 1024 or "\0" in text or not os.path.isfile(text):
        return
    if (kind := sniff(Path(text))) is not None and not modality_of(kind).inline:
        warnings.warn(
            f"the text {visible(text)!r} of the prompt names an {kind} file; Path({visible(text)!r}) reads it", stacklevel=2
        )


def check_names(given: Iterable[str], names: list[str], where: str) -> None:
    """Raise `UserError` for a name that does not exist, with the nearest that does and where settings go."""
    for name in given:
        if name in names:
            continue
        if name in (f.name for f in fields(SamplingParams)):
            told = f"it is one of the settings: settings={{'image': SamplingParams({name}=VALUE)}}, from unitok.sample.sampling"
        else:
            near = get_close_matches(str(name), names, 1, 0.4)
            told = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"{where}: no {name!r}; {told}")


def read_prompts(path: Path, root: str = "", types: Types | None = None) -> list[RawDocument]:
    """Prompts of an interleaved JSON Lines file; a bad line is an error, and so is a file that leaves the folder of `path`, or `root`."""
    raws = []
    files: Files | None = None
    for raw in read_raw_documents(path, types):
        if isinstance(raw, UserError):
            raise raw
        files = files or Files(str(path.parent), root)
        raws.append(replace(raw, content=tuple(_inside(part, raw.where, path.parent, files) for part in raw.content)))
    if not raws:
        raise UserError(f"{path}: no prompts in it")
    return raws


def _inside(part: Part, where: str, folder: Path, files: Files) -> Part:
    """The part with the true path of its file. Errors: `UserError` for one that sources refuse, too."""
    if part.path is None:
        return part
    name = str(part.path.relative_to(folder) if part.path.is_relative_to(folder) else part.path)
    if problem := files.look(name).problem:
        raise UserError(f"{where}: {name}: {problem}")
    return replace(part, path=files.local(name))
