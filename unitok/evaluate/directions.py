"""Directions of documents: what comes before a segment, and the segment."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

from unitok.document import Segment


class _Directed(Protocol):
    @property
    def direction(self) -> str: ...


T = TypeVar("T", bound=_Directed)


def direction_of(before: Iterable[Segment], segment: Segment) -> str:
    """`text>image` for an image after text, `image+text>audio` for audio after an image and text; the name alone where nothing
    comes before."""
    names = "+".join(dict.fromkeys(s.modality for s in before))
    return f"{names}>{segment.modality}" if names else segment.modality


def by_direction(items: Iterable[T]) -> list[tuple[str, list[T]]]:
    """Directions in alphabetical order, each with its items."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(item.direction, []).append(item)
    return sorted(groups.items(), key=lambda group: group[0])
