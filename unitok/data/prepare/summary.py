"""What a tokenization read, left out and could not use, in words; and documents as lines of text."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from unitok.bundle import Bundle
from unitok.data.prepare.plan import Plan
from unitok.document import Document
from unitok.modalities import modalities

#: Reasons that are told, of many.
MOST = 5

SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
TIMES = ((3600, "hours"), (60, "minutes"), (1, "s"))


def total(entries: Iterable[Mapping[str, Any]], name: str) -> Counter[str]:
    """The sum of one of the counts that shards' entries hold."""
    return sum((Counter(entry.get(name, {})) for entry in entries), Counter())


Counts = Mapping[str, int]


def summary(formats: Counts, filtered: Counts, left_out: Counts, notes: Counts, renamed: int) -> Iterator[str]:
    """Lines that say by kind what was read and what was not.

    Args:
        formats: parts of documents by type and format, such as `image PNG`. filtered: documents by the filter that left them out.
        left_out: files that are no documents. notes: what rows hold and was not used. renamed: documents whose id another has.
    """
    by_name: dict[str, dict[str, int]] = {}
    for name, count in formats.items():
        instance, _, form = name.partition(" ")
        by_name.setdefault(instance, {})[form] = count
    if by_name:
        kinds = modalities()
        told = (
            f"{sum(forms.values()):,} {kinds[name].plural if name in kinds else name}"
            + (f" ({', '.join(f'{form} {count:,}' for form, count in forms.items())})" if any(forms) else "")
            for name, forms in by_name.items()
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


def show_document(bundle: Bundle, document: Document) -> str:
    """A document as one line: what its codes decode to, for a person to see that it was read right."""
    lines = (
        ("" if segment.role == "none" else f"{segment.role}: ")
        + bundle.modality(segment.modality).line(bundle.require(segment.modality), segment)
        for segment in document.segments
    )
    return f"{document.source!r}: {', '.join(lines)}"


def estimate_lines(plan: Plan, found: Mapping[str, Any]) -> Iterator[str]:
    """An estimate (`unitok.data.prepare.tokenize.estimate`) in words."""

    def unit(value: float, units: Iterable[tuple[float, str]]) -> str:
        size, name = next((size, name) for size, name in units if value >= size or size == 1)
        return f"{value / size:.3g} {name}"

    by = ", ".join(f"{n:,.0f} {name.removesuffix('_ids')}" for name, n in found.items() if name.endswith("_ids"))
    yield f"{plan.name()}: {found['listed']:,.0f} documents listed; from {found['sample']:.0f} of them, about:"
    yield f"  documents   {found['documents']:,.0f} ({found['bad']:.1%} bad, {found['filtered']:.1%} filtered out)"
    yield from (f"    bad       {error}" for error in found["errors"])
    yield from (f"{line} (of the sample)" for line in found["summary"])
    yield from (f"  decoded     {example}" for example in found["examples"])
    yield f"  ids         {found['ids']:,.0f} ({by})"
    yield f"  disk        {unit(found['gigabytes'] * 1e9, SIZES)}"
    yield f"  time        {unit(found['hours'] * 3600, TIMES)} of one process with {plan.threads} threads on {plan.device}"
