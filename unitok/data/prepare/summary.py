"""What a tokenization read, left out and could not use, in words; and documents as lines of text."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from unitok.bundle import Bundle
from unitok.document import Document

_PLURAL = {"image": "images", "text": "texts"}

#: Reasons that are told, of many.
MOST = 5


def total(entries: Iterable[Mapping[str, Any]], name: str) -> Counter[str]:
    """The sum of one of the counts that shards' entries hold."""
    return sum((Counter(entry.get(name, {})) for entry in entries), Counter())


def summary(
    formats: Mapping[str, int], filtered: Mapping[str, int], left_out: Mapping[str, int], notes: Mapping[str, int], renamed: int
) -> Iterator[str]:
    """Lines that say by kind what was read and what was not.

    Args:
        formats: parts of documents by type and format, such as `image PNG`. filtered: documents by the filter that left them out.
        left_out: files that are no documents. notes: what rows hold and was not used. renamed: documents whose id another has.
    """
    by_type: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for name, count in formats.items():
        kind, _, form = name.partition(" ")
        counts[kind] += count
        by_type.setdefault(kind, []).append(f"{form or 'text'} {count:,}")
    if counts:
        told = (
            f"{count:,} {_PLURAL.get(kind, kind)}" + (f" ({', '.join(by_type[kind])})" if kind != "text" else "")
            for kind, count in counts.items()
        )
        yield f"  read        {'; '.join(told)}"
    if filtered or left_out:
        told = (f"{count:,} {name}" for name, count in (*filtered.items(), *left_out.items()))
        yield f"  left out    {'; '.join(told)}"
    if notes:
        yield f"  of rows     {most(notes)}"
    if renamed:
        yield f"  same ids    {renamed:,} documents have the id of another one, and ~2, ~3, … after it"


def reason(error: str) -> str:
    """What an error says of a file, without the file's name and what to do."""
    return re.sub(r"^([^:]*[./,][^:]*: )+", "", error).partition(";")[0]


def most(counts: Mapping[str, int]) -> str:
    """The most frequent of some reasons, each with how often it was given."""
    frequent = Counter(counts).most_common(MOST)
    more = f"; {len(counts) - MOST} others" if len(counts) > MOST else ""
    return "; ".join(f"{name} ({count:,})" for name, count in frequent) + more


def show_document(unitok: Bundle, document: Document) -> str:
    """A document as one line: what its codes decode to, for a person to see that it was read right."""
    parts = []
    for segment in document.segments:
        role = "" if segment.role == "none" else f"{segment.role}: "
        if segment.modality == "text":
            text = unitok.decode(segment)
            parts.append(role + repr(text if len(text) <= 100 else f"{text[:100]}…"))
        elif segment.modality == "image":
            parts.append(f"{role}image {segment.size[1]} x {segment.size[0]}")
        else:
            parts.append(f"{role}{segment.modality} {segment.size[0] / unitok.require('audio').sample_rate:.2f} s")
    return f"{document.source!r}: {', '.join(parts)}"
