"""The texts of a corpus, to train a text tokenizer on."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from unitok.conversations import is_conversation, texts_of
from unitok.data.prepare.containers import plain_name
from unitok.data.prepare.fields import TEXT, is_media
from unitok.data.prepare.items import SourceItem
from unitok.data.prepare.listing import lists_documents
from unitok.data.prepare.recipe import SourceSpec, load_recipe
from unitok.data.prepare.sources import Source
from unitok.data.prepare.transcripts import may_be_transcripts
from unitok.document import RawDocument
from unitok.errors import UserError
from unitok.files import read_json_lines
from unitok.media import load_text
from unitok.storage import kind_of_path

log = logging.getLogger("unitok")

#: Suffixes of files, besides compressed ones, whose documents are read by a `Source` to train a text tokenizer.
_DOCUMENTS = (".tar", ".tgz", ".parquet", ".arrow", ".csv", ".tsv", ".json")


def read_texts(path: Path | str) -> Iterator[str]:
    """The texts of a corpus, to train a text tokenizer on: the lines of text files; of documents each text.

    path: a text file, a JSON Lines file, or whatever else `unitok tokenize` takes: a folder, a pattern, an archive, a table, or a
        recipe, whose weights, filters and roles do not matter here. Documents that cannot be read are logged.

    Errors: `UserError` for a path that does not exist or of which no document can be read; of a text or JSON Lines file also for
    content that is not what it should be.
    """
    name = str(path)
    suffix = PurePosixPath(plain_name(name)).suffix.lower()
    if suffix in (".yaml", ".yml"):
        for spec in load_recipe(Path(path)):
            yield from _texts_of_documents(Source(spec, media=False))
    elif "://" in name or kind_of_path(name) != "file" or plain_name(name) != name or suffix in _DOCUMENTS:
        yield from _texts_of_documents(Source(SourceSpec(name), media=False))
    elif suffix in (".jsonl", ".ndjson"):
        yield from _texts_of_lines(Path(path))
    elif may_be_transcripts(name) and lists_documents((listed := Source(SourceSpec(name), media=False)).files, listed.alone):
        yield from _texts_of_documents(listed)
    else:
        yield from _lines(load_text(Path(path)))


def _lines(text: str) -> Iterator[str]:
    return (line.removesuffix("\r") for line in text.split("\n") if line.strip())


def _texts_of_lines(path: Path) -> Iterator[str]:
    """The texts of a JSON Lines file; in lines with `content` whatever the other parts are: no bundle names them yet."""
    source, good, bad, first = Source(SourceSpec(str(path)), media=False), 0, 0, ""
    for number, row in read_json_lines(path):
        if isinstance(row, UserError):
            raise row
        where = f"{path.name}, line {number}"
        if isinstance(row, dict) and "content" not in row:
            if is_conversation(row):
                try:
                    texts = texts_of(row)
                except UserError as error:
                    bad, first = bad + 1, first or f"{where}: {error}"
                    continue
                good += 1
                yield from texts
                continue
            try:
                texts = _texts_in(source.from_fields(SourceItem("", where, "line", path.name), row))
            except UserError as error:
                bad, first = bad + 1, first or str(error)
                continue
            good += 1
            yield from texts
            continue
        good += 1
        parts = row.get("content") if isinstance(row, dict) else None
        if not isinstance(parts, list):
            raise UserError(f'{where}: a document is {{"id": …, "content": [parts]}}')
        values = (part.get(TEXT) for part in parts if isinstance(part, dict))
        yield from (value for value in values if isinstance(value, str) and value)
    _report_bad(str(path), good, bad, first)


def _texts_in(raws: Iterable[RawDocument]) -> list[str]:
    return [str(part.value) for raw in raws for part in raw.content if part.type == TEXT and part.value]


def _texts_of_documents(source: Source) -> Iterator[str]:
    """The texts of a source's documents; files of text by lines."""
    items, lines = [], []
    for item in source.items(groups=False):
        if item.kind == "transcript":
            lines.append(item)
            continue
        if item.kind not in ("files", "member", "aligned"):
            items.append(item)
            continue
        members = tuple(member for member in item.members if not is_media(member[0]))
        if members or not item.members:  # images and audio are not read
            items.append(replace(item, members=members))
    bad, first = 0, ""
    for item, make in zip(items, source.read(items), strict=True):
        try:
            values = _texts_in(make())
        except UserError as error:
            bad, first = bad + 1, first or str(error)
            continue
        for value in values:
            yield from _lines(value) if item.kind == "files" else [value]
    for _, read in source.transcripts(lines):
        try:
            yield read()[TEXT]
        except UserError as error:
            bad, first = bad + 1, first or str(error)
    source.drop()
    _report_bad(source.spec.path, len(items) + len(lines) - bad, bad, first)


def _report_bad(path: str, good: int, bad: int, first: str) -> None:
    """Log how many documents could not be read, with the first error. Errors: `UserError` where none could."""
    if bad and not good:
        raise UserError(f"{path}: none of its {bad} documents can be read; the first: {first}")
    if bad:
        log.warning("%s: %d documents could not be read; the first: %s", path, bad, first)
