"""Documents: what a model reads and writes, in reading order.

A `Document` is a list of `Segment`s, each one piece of content as codes. Before tokenization the same document is a
`RawDocument` of `Part`s, each a value or the path of a file (`unitok.interleaved` reads them). Imports nothing of ours but the error.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unitok.errors import UserError

ROLES = ("none", "system", "user", "assistant")


@dataclass(frozen=True)
class Segment:
    """One piece of content.

    Args:
        modality: `text`, `image`, `audio`, or another that the vocabulary declares.
        codes: int64; text [N], image [h, w], audio [K, N].
        role: who says it, one of `ROLES`. loss: whether training learns to write it, or only to read it.
        source: the file it came from, relative to the data set, or "".
        size: pixels (height, width) or samples (length,) before padding, so that decoding gives back exactly that.
    """

    modality: str
    codes: np.ndarray
    role: str = "none"
    loss: bool = True
    source: str = ""
    size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", np.asarray(self.codes, dtype=np.int64))
        if self.role not in ROLES:
            raise UserError(f"role {self.role!r}: choose one of {', '.join(ROLES)}")
        if self.codes.size == 0:
            raise UserError(f"an empty {self.modality} segment: no span may be empty")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        mine, theirs = ((s.modality, s.role, s.loss, s.source, s.size) for s in (self, other))
        return mine == theirs and np.array_equal(self.codes, other.codes)

    def __hash__(self) -> int:
        return hash((self.modality, self.role, self.codes.tobytes()))


@dataclass(frozen=True)
class Document:
    """Segments in reading order."""

    segments: tuple[Segment, ...]
    id: str = ""
    source: str = field(default="", compare=False)  # the file (and line, member or row) that it was made from

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))


@dataclass(frozen=True)
class Part:
    """One piece of raw content: a value that stands in the document itself, such as a text, or the path of a file.

    Args:
        type: a kind of content, or the name of one of a bundle's tokenizers. value: the content of a part without a file.
        file: a `unitok.storage.Blob` of the content where `path` is only its name: in an archive, a table, on a server.
        view: which part of it, in the words of W3C's media fragments: `t=10,20` (seconds), `crop=1` (a random one), `flip`.
    """

    type: str
    value: Any = ""
    path: Path | None = None
    role: str = "none"
    loss: bool = True
    file: Any = field(default=None, compare=False, repr=False)
    view: str = ""


@dataclass(frozen=True)
class RawDocument:
    """Parts in reading order. where: the file (and line) it was read from; notes: what of it was not used, in words counted."""

    id: str
    content: tuple[Part, ...] = field(default_factory=tuple)
    where: str = ""
    notes: tuple[str, ...] = ()
