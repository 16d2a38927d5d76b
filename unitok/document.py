"""Documents: what a model reads and writes, in reading order.

A `Document` is a sequence of `Segment`s; each holds one piece of content as codes. Before tokenization the same document is a
`RawDocument` of `Part`s; each holds a value or the path of a file (`unitok.interleaved` reads them).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unitok.errors import UserError

if TYPE_CHECKING:
    from unitok.storage import Blob

ROLES = ("none", "system", "user", "assistant")


@dataclass(frozen=True)
class Segment:
    """One piece of content as codes. Errors: `UserError` for no codes, and for a role that does not exist.

    Args:
        modality: the name of a span of the vocabulary: `text`, `image`, `audio`, or another one.
        codes: int64: [N] of text, [h, w] of an image, [K, N] of audio with K levels.
        facts: what the header of its span says before the sides of a grid (`Span.facts`).
        role: who says it, one of `ROLES`.
        loss: whether training learns to write it; else the model only reads it.
        source: the file that it was made from, relative to the data set; "" where there is none.
        size: (height, width) in pixels or (length,) in samples before padding, so that decoding gives back exactly that.
        original: (height, width) in pixels of an image before it was shrunk, for boxes; () where that is not known. Data sets do not hold it.
    """

    modality: str
    codes: np.ndarray
    role: str = "none"
    loss: bool = True
    source: str = ""
    size: tuple[int, ...] = ()
    original: tuple[int, ...] = field(default=(), compare=False, repr=False)
    facts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", np.asarray(self.codes, dtype=np.int64))
        if self.role not in ROLES:
            raise UserError(f"role {self.role!r}: choose one of {', '.join(ROLES)}")
        if self.codes.size == 0:
            raise UserError(f"an empty {self.modality} segment: give it at least one code")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        mine, theirs = ((s.modality, s.role, s.loss, s.source, s.size, s.facts) for s in (self, other))
        return mine == theirs and np.array_equal(self.codes, other.codes)

    def __hash__(self) -> int:
        return hash((self.modality, self.role, self.codes.tobytes()))


@dataclass(frozen=True)
class Document:
    """Segments in reading order.

    Args:
        segments: the content.
        id: a name for people and files.
        source: the file (and line, member or row) that it was made from; documents that differ only there are equal.
    """

    segments: tuple[Segment, ...]
    id: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))


@dataclass(frozen=True)
class Part:
    """One piece of raw content: a value that the document itself holds, such as a text, or the path of a file.

    Args:
        type: a kind of content, or the name of one of a bundle's tokenizers.
        value: the content of a part without a file: a str, or what the modality takes.
        path: the file of a part with one.
        role, loss: as in `Segment`.
        file: how to read the content where `path` is only its name: in an archive, in a table, on a server.
        view: which part or variant of the content, written as W3C media fragments: `t=10,20` (seconds), `crop=1` (random), `flip`.
    """

    type: str
    value: object = ""
    path: Path | None = None
    role: str = "none"
    loss: bool = True
    file: "Blob | None" = field(default=None, compare=False, repr=False)
    view: str = ""


@dataclass(frozen=True)
class RawDocument:
    """Parts in reading order.

    Args:
        id: a name for people and files.
        content: the parts.
        where: the file (and line) that it was read from, for messages.
        notes: what of it was not used, such as `the rest of the audio is shorter than a frame`.
        cuts: seconds at which its only recording is cut, so that its texts and stretches of it stand in turn (`unitok.data.prepare.words`).
    """

    id: str
    content: tuple[Part, ...] = field(default_factory=tuple)
    where: str = ""
    notes: tuple[str, ...] = ()
    cuts: tuple[float, ...] = ()
