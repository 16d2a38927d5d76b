"""Raw files -> raw documents: what `unitok tokenize` can read.

- an interleaved JSON Lines file (`unitok.document`);
- a folder that holds `documents.jsonl`: read through it alone;
- any other folder, walked in sorted order: an image or sound with a `.txt` beside it of the same base name is a pair
  (text, then the file); every other image, sound or text file is a document of its own.

Content decides what a file is, not its suffix. What cannot be used comes as a `UserError` in place of a document.
"""

from collections.abc import Iterator
from pathlib import Path

from unitok.data.media import load_text, sniff
from unitok.document import Part, RawDocument, read_raw_documents
from unitok.errors import UserError


def read_source(path: Path) -> Iterator[RawDocument | UserError]:
    """The documents of a file or folder in a fixed order; errors: `UserError` raised when there is no such path."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        yield from read_raw_documents(path)
    elif (path / "documents.jsonl").exists():
        yield from read_raw_documents(path / "documents.jsonl")
    else:
        yield from _read_folder(path)


def _read_folder(folder: Path) -> Iterator[RawDocument | UserError]:
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.startswith(".")]
    captions = {f.parent / f.stem: f for f in files if f.suffix == ".txt"}
    paired: set[Path] = set()
    documents: list[RawDocument | UserError] = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".txt":
            continue  # after the media, when it is known which have a partner
        try:
            kind = sniff(file)
        except OSError as error:
            documents.append(UserError(f"{name}: cannot be read ({error.strerror})"))
            continue
        if kind is None:
            documents.append(UserError(f"{name}: neither an image nor a sound nor UTF-8 text"))
            continue
        if kind == "text":
            documents.append(_text_document(file, name))
            continue
        media = Part(kind, path=file)
        stem = file.parent / file.stem
        if stem in captions:
            paired.add(stem)
            try:
                text = load_text(captions[stem]).strip()
            except UserError:
                documents.append(UserError(f"{captions[stem].relative_to(folder).as_posix()}: an empty or unreadable caption"))
                continue
            documents.append(RawDocument(name, (Part("text", text=text), media), name))
        else:
            documents.append(RawDocument(name, (media,), name))
    for stem in sorted(captions.keys() - paired):
        file = captions[stem]
        documents.append(_text_document(file, file.relative_to(folder).as_posix()))
    yield from documents


def _text_document(file: Path, name: str) -> RawDocument | UserError:
    try:
        return RawDocument(name, (Part("text", text=load_text(file)),), name)
    except UserError as error:
        return UserError(str(error).replace(str(file), name))


def read_texts(path: Path) -> Iterator[str]:
    """The strings of a corpus: the lines of a text file, or every text of an interleaved JSON Lines file."""
    path = Path(path)
    if path.suffix != ".jsonl":
        yield from (line for line in load_text(path).split("\n") if line.strip())
        return
    for document in read_raw_documents(path):
        if isinstance(document, UserError):
            raise document
        yield from (part.text for part in document.content if part.type == "text")
