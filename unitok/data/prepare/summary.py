"""Summaries of a tokenization in words: what was read, left out and could not be used; documents as lines of text."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from unitok.bundle import Bundle
from unitok.data.prepare.plan import Plan
from unitok.document import Document
from unitok.modalities import modalities

#: Most reasons that are listed.
MOST = 5

SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
TIMES = ((3600, "hours"), (60, "minutes"), (1, "s"))


Counts = Mapping[str, int]


def total(counts: Iterable[Counts]) -> Counter[str]:
    """The sum of counts, by name."""
    return sum((Counter(one) for one in counts), Counter[str]())


def summary(formats: Counts, filtered: Counts, left_out: Counts, notes: Counts, renamed: int) -> Iterator[str]:
    """Lines about what was read, by kind, and what was not.

    Args:
        formats: parts of documents by type and format, such as `image PNG`. filtered: documents left out, by filter.
        left_out: files that are not documents. notes: what rows hold that was not used. renamed: documents whose id another has.
    """
    by_name: dict[str, dict[str, int]] = {}
    for name, count in formats.items():
        instance, _, form = name.partition(" ")
        by_name.setdefault(instance, {})[form] = count
    if by_name:
        kinds = modalities()
        read = (
            f"{sum(forms.values()):,} {kinds[name].plural if name in kinds else name}"
            + (f" ({', '.join(f'{form} {count:,}' for form, count in forms.items())})" if any(forms) else "")
            for name, forms in by_name.items()
        )
        yield f"  read        {'; '.join(read)}"
    if filtered or left_out:
        counts = (f"{count:,} {name}" for name, count in (*filtered.items(), *left_out.items()))
        yield f"  left out    {'; '.join(counts)}"
    if notes:
        yield f"  of rows     {most(notes)}"
    if renamed:
        yield f"  same ids    {renamed:,} documents have the id of another document, followed by ~2, ~3, …"


@dataclass(frozen=True)
class Estimate:
    """What a run would give, from a sample of its documents.

    Args:
        listed: documents in the sources. sample: how many of them were tokenized. documents: that the listed ones become.
        bad, filtered: fractions of the listed. hours: of one process. gigabytes: of shards.
        errors: messages for some of the bad ones; more_errors: the number of others. examples: some documents, decoded. summary: lines about the sample.
    """

    listed: int
    sample: int
    documents: float
    tokens: float
    tokens_by_modality: dict[str, float]
    bad: float
    filtered: float
    hours: float
    gigabytes: float
    errors: list[str]
    more_errors: int
    examples: list[str]
    summary: list[str]


def splits_in_words(documents: Counts, groups: Counts) -> str:
    """Documents by split, with groups: `900 train (120 groups), 28 validation (4 groups)`; "" for one split without groups."""
    if len(documents) < 2 and not groups:
        return ""
    sides = (f"{n} {split}" + (f" ({groups[split]} groups)" if split in groups else "") for split, n in documents.items())
    divided = groups.get("divided", 0)
    more = f"; {divided} groups are in several splits, as their fields `split` or their folders say" if divided else ""
    return ", ".join(sides) + more


def reason(error: str) -> str:
    """The reason in an error message, without the file's name and the remedy."""
    return re.sub(r"^([^:]*[./,][^:]*: )+", "", error).partition(";")[0]


def most(counts: Mapping[str, int]) -> str:
    """The most frequent of some reasons, each with its count."""
    frequent = Counter(counts).most_common(MOST)
    more = f"; {len(counts) - MOST} others" if len(counts) > MOST else ""
    return "; ".join(f"{name} ({count:,})" for name, count in frequent) + more


def show_document(bundle: Bundle, document: Document) -> str:
    """A document as one line: what its codes decode to, to check by eye that it was read right."""
    lines = (
        ("" if segment.role == "none" else f"{segment.role}: ")
        + bundle.modality(segment.modality).line(bundle.require(segment.modality), segment)
        for segment in document.segments
    )
    return f"{document.source!r}: {', '.join(lines)}"


def estimate_lines(plan: Plan, estimate: Estimate) -> Iterator[str]:
    """An estimate (`unitok.data.prepare.tokenize.estimate`) in words."""

    def unit(value: float, units: Iterable[tuple[float, str]]) -> str:
        size, name = next((size, name) for size, name in units if value >= size or size == 1)
        return f"{value / size:.3g} {name}"

    by_modality = ", ".join(f"{n:,.0f} {name}" for name, n in estimate.tokens_by_modality.items())
    yield f"{plan.name()}: {estimate.listed:,.0f} documents listed; estimated from {estimate.sample:.0f} of them:"
    yield f"  documents   {estimate.documents:,.0f} ({estimate.bad:.1%} bad, {estimate.filtered:.1%} filtered out)"
    yield from (f"    bad       {error}" for error in estimate.errors)
    if estimate.more_errors:
        yield f"    bad       and {estimate.more_errors} more of the sample"
    yield from (f"{line} (of the sample)" for line in estimate.summary)
    yield from (f"  decoded     {example}" for example in estimate.examples)
    yield f"  tokens      {estimate.tokens:,.0f} ({by_modality})"
    yield f"  disk        {unit(estimate.gigabytes * 1e9, SIZES)}"
    yield f"  time        {unit(estimate.hours * 3600, TIMES)} of one process with {plan.threads} threads on {plan.device}"
