"""What a modality is: the class that each kind's file derives from, and what its methods take and return."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeAlias, TypeVar

import numpy as np
from markupsafe import Markup

from unitok import pages
from unitok.document import Segment
from unitok.errors import UserError
from unitok.files import Json, read_json, write_json
from unitok.ranges import Span
from unitok.storage import Blob

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TokenizerLike(Protocol):
    """What every tokenizer has. What else it has is between the tokenizer and its modality."""

    @classmethod
    def from_pretrained(cls, path: Path, /, device: str = "cpu") -> Self:
        """Read its folder. Errors: `UserError`."""

    def save_pretrained(self, folder: Path, /, overwrite: bool = False) -> None:
        """Write its folder. Inverse of `from_pretrained`."""

    def fingerprint(self) -> str:
        """Return a text that changes when the codes do."""

    def describe(self) -> Mapping[str, object]:
        """Return what `unitok inspect` prints, as plain types."""


@dataclass
class Loaded:
    """Content that was decoded and can be encoded.

    Args:
        content: what `Modality.encode` takes: decoded, or a Blob that it reads in pieces.
        size: as `Segment.size`; `encode` may set it.
        view: which part or variant of the file it is, as a media fragment (`xywh=0,0,64,64`).
        format: of the file, such as PNG.
        facts: numbers for filters: `characters`, `width` and `height` (pixels), `seconds`.
        rejected: name of the filter that leaves it out.
        bytes: number of bytes that were read.
        window: left, top, right and bottom of the part of an image that it shows, as fractions of the image; left > right: mirrored.
        header: as `Segment.facts`.
        note: what of the file was not used.
    """

    content: Any
    size: tuple[int, ...] = ()
    view: str = ""
    format: str = ""
    facts: dict[str, float] = field(default_factory=dict)
    rejected: str = ""
    bytes: int = 0
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    header: tuple[int, ...] = ()
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Memory of the decoded content, in bytes."""
        return int(getattr(self.content, "nbytes", 0))


class Plain:
    """A tokenizer without weights, for a kind whose codes follow from its values. config: what they depend on, as JSON values."""

    def __init__(self, kind: str, **config: Json):
        self.kind, self.config = kind, config

    def fingerprint(self) -> str:
        """Return a text that changes when the codes do."""
        return json.dumps([self.kind, self.config], sort_keys=True)

    def save_pretrained(self, folder: Path, overwrite: bool = False) -> None:
        """Write `config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"unitok": 1, "kind": f"{self.kind} tokenizer", "config": self.config})

    @classmethod
    def from_pretrained(cls, folder: Path, device: str = "cpu") -> Self:
        """Read its folder. `device` changes nothing. Errors: `UserError`."""
        row = read_json(folder / "config.json", "build the bundle again", "kind", "config")
        return cls(row["kind"].removesuffix(" tokenizer"), **row["config"])

    def describe(self) -> dict[str, Json]:
        """Return its configuration."""
        return self.config


class Filling(Protocol):
    """Content with a hole."""

    #: What is encoded, as a piece of a prompt.
    content: Any

    def missing(self, segment: Segment) -> np.ndarray:
        """Return which units (cells of a grid, frames) of the encoded content are in the hole, bool [units]."""

    def finish(self, made: Any) -> Any:
        """Return the content whose hole is filled with what was decoded, and which is unchanged everywhere else."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a modality without options."""


TokenizerT = TypeVar("TokenizerT", bound=TokenizerLike)
ContentT = TypeVar("ContentT")
OptionsT = TypeVar("OptionsT")


class Modality(Generic[TokenizerT, ContentT, OptionsT]):
    """One kind of content: `class Dice(Modality[Plain, list[int], NoOptions])`.

    The type parameters are the class of its tokenizers, the type of decoded content (what `decode` returns, and `save` and `html`
    take), and the dataclass of its options. A subclass sets `kind`, and overrides the methods whose defaults do not fit; the defaults
    are for values that stand in the document itself, with a tokenizer without weights. The argument `tokenizer` is always one
    instance's, of the class `tokenizer_class()`.
    """

    kind: ClassVar[str]
    #: Key of a part that holds the content. `path` names a file; any other key holds the value itself.
    key: ClassVar[str] = "path"
    #: Further keys that a part may have. Content that stands in the document is then `{key: …, further: …}` for `check` and `row`.
    keys: ClassVar[tuple[str, ...]] = ()
    #: Kinds of files that hold such content besides their own, as videos hold audio: read so where a part's type asks for it.
    also: ClassVar[tuple[str, ...]] = ()
    #: Kind of the content that this content is about, as boxes are about an image; "": it is about nothing else.
    refers: ClassVar[str] = ""
    #: Dataclass of how content is read. Its fields are flags `--KIND-FIELD` of `unitok tokenize`, and `KIND: {FIELD: …}` in recipes.
    Options: ClassVar[type] = NoOptions
    #: How much content is encoded together, in the unit of `cost`.
    BATCH: ClassVar[float] = 64.0

    @property
    def inline(self) -> bool:
        """Whether the document itself holds the content, not a file."""
        return self.key != "path"

    @property
    def plural(self) -> str:
        """The plural of the kind's name, for messages and folders."""
        return f"{self.kind}s"

    def tokenizer_class(self) -> type[TokenizerLike]:
        """Return the class of its tokenizers."""
        return Plain

    def untrained(self) -> TokenizerLike:
        """Return a tiny tokenizer with random weights, for trials and tests; of a kind without weights the usual one."""
        return Plain(self.kind)

    def declare(self, name: str, tokenizer: TokenizerT) -> tuple[Span, dict[str, int], tuple[int, ...]]:
        """Return the span of the instance `name`, the sizes of its ranges by name, and the codes that are never allowed."""
        raise NotImplementedError

    def rate(self, tokenizer: TokenizerT) -> float | None:
        """Return the frames per second; None for content without duration."""
        return None

    def describe(self, tokenizer: TokenizerT) -> Mapping[str, object]:
        """Return what `unitok inspect` prints about a tokenizer, as plain types."""
        return tokenizer.describe()

    def usage(self, name: str, tokenizer: TokenizerT) -> dict[str, str]:
        """Return how many tokens content of the instance `name` takes, such as `{"an image": "260 tokens (64 x 64 pixels)"}`."""
        return {}

    # ---- Reading -------------------------------------------------------------------------------------------------

    def accepts(self, content: object) -> bool:
        """Return whether a Python object in a prompt is content of this kind."""
        return False

    def recognizes(self, head: bytes, name: str) -> bool:
        """Return whether a file can be content of this kind, by its first 4,096 bytes and its name."""
        from unitok.media.formats import sniff_bytes  # imports PyTorch

        return sniff_bytes(head, name) == self.kind

    def check(self, value: object, where: str) -> object:
        """Return a value from a document's JSON as `load` takes it. Errors: `UserError` that begins with `where`."""
        return value

    def row(self, value: object) -> dict[str, object]:
        """Return the keys of a part that holds a value. Inverse of `check`."""
        return {self.key: value}

    def view(self, given: Mapping[str, object], where: str) -> str:
        """Return the further keys of a part with a file as a media fragment, such as `map=labels`. Errors: `UserError` that begins with `where`."""
        return ""

    def keys_of(self, view: str) -> dict[str, object]:
        """Return the further keys that a view stands for. Inverse of `view`."""
        return {}

    def referred(self, value: object) -> int | None:
        """Return the number of the content that a value is about among the document's content of that kind; None: the nearest one."""
        return None

    def related(self, value: object, about: Loaded | None, where: str) -> object:
        """Return a value in terms of the content that it is about; None where there is none. Errors: `UserError` that begins with `where`."""
        return value

    def views(self, options: OptionsT) -> list[str]:
        """Return the variants that each become an additional document, such as `flip` and `crop=1`."""
        return []

    def pieces(
        self, tokenizer: TokenizerT, content: Blob, options: OptionsT, view: str = "", seconds: float = 0.0
    ) -> tuple[list[str], str]:
        """Return the parts of long content (or of a view), of `seconds` or as the options say, as media fragments, and what they leave out.
        No parts: it is short enough."""
        return [], ""

    def load(
        self, tokenizer: TokenizerT, content: object, options: OptionsT, name: str, view: str = "", chance: float = 0.0
    ) -> Loaded:
        """Decode content.

        Args:
            tokenizer: that will encode it.
            content: a Blob, a value that `check` returned, or an object that the modality `accepts`.
            options: how it is read.
            name: of the content, for messages.
            view: which part or variant of it, as `views` and `pieces` return them.
            chance: a random number in [0, 1) that decides whatever is random.

        Errors: `UserError` for content that cannot be read.
        """
        return Loaded(content)

    def batch_key(self, tokenizer: TokenizerT, loaded: Loaded) -> tuple[int, ...] | None:
        """Return a key; contents of equal keys can be encoded together. None: it is encoded alone, in the thread that decoded it."""
        return None

    def cost(self, tokenizer: TokenizerT, loaded: Loaded) -> float:
        """Return how much of a batch it takes; a batch is full at `BATCH`."""
        return 1.0

    def encode(self, tokenizer: TokenizerT, batch: list[Loaded]) -> list[np.ndarray]:
        """Return the codes of each content, int64 in the shape of `Segment.codes`. All contents have the same batch key."""
        raise NotImplementedError

    def cut(self, tokenizer: TokenizerT, segment: Segment, times: Sequence[float]) -> list[Segment | None]:
        """Cut a segment at `times`, in seconds: one more than these, None where there are no codes. Errors: `UserError`."""
        raise UserError(f"{segment.modality}: {self.kind} cannot be cut by time")

    def filling(self, tokenizer: TokenizerT, content: object, hole: object, where: str) -> "Filling":
        """Return content with a hole that the decoder shall fill. Errors: `UserError` for a hole that it cannot have."""
        raise UserError(f"{where}: {self.kind} has no holes to fill")

    # ---- Writing -------------------------------------------------------------------------------------------------

    def decode(self, tokenizer: TokenizerT, segment: Segment) -> ContentT:
        """Return the content of a segment's codes. Inverse of `encode`."""
        raise NotImplementedError

    def save(self, tokenizer: TokenizerT, content: ContentT, path: Path) -> Path | None:
        """Write content into a file, and return its path: `path` with a suffix. None: the document itself holds the content."""
        return None

    def save_map(self, content: ContentT, path: Path, kind: str) -> None:
        """Write content as the map that it shows, one of `unitok.media.maps.MAPS`; nothing where it shows none."""

    def stream(self, tokenizer: TokenizerT, span: Span) -> "Stream[TokenizerT, ContentT]":
        """Return a decoder that takes a span's codes while they are generated."""
        return Stream(self, tokenizer)

    def html(self, tokenizer: TokenizerT, content: ContentT) -> Markup:
        """Return content as an HTML element."""
        return pages.text(json.dumps(content))

    def overlay(self, content: ContentT) -> Markup:
        """Return a layer that shows content on the content that it is about; "": it is shown by itself."""
        return Markup()

    def html_of_file(self, file: Path) -> Markup:
        """Return the HTML element of a file that `save` wrote beside the page."""
        raise NotImplementedError

    def line(self, tokenizer: TokenizerT, segment: Segment) -> str:
        """Return a segment in a few words, for a list."""
        return f"{segment.modality} {self.decode(tokenizer, segment)!r}"

    def terminal(self, tokenizer: TokenizerT, content: ContentT, done: bool, colors: bool) -> tuple[str, bool]:
        """Return what a terminal prints for a chunk of a stream, and whether that replaces what it printed for the last chunk.

        done: whether the span is complete. colors: whether the terminal shows colors.
        """
        return (f"{content}\n" if done else ""), False

    def log(self, board: "SummaryWriter", tag: str, tokenizer: TokenizerT, content: ContentT, step: int) -> None:
        """Write content to TensorBoard."""
        board.add_text(tag, str(content), step)


#: A modality, whatever its types are.
AnyModality: TypeAlias = Modality[Any, Any, Any]


class Stream(Generic[TokenizerT, ContentT]):
    """Decodes a span while it is generated. This one returns the content once, when the span is complete.

    facts: what the span's header says before the sides of a grid.
    """

    facts: tuple[int, ...] = ()

    def __init__(self, modality: Modality[TokenizerT, ContentT, Any], tokenizer: TokenizerT):
        self.modality, self.tokenizer = modality, tokenizer

    def begin(self, codes: np.ndarray) -> None:
        """Take the codes that the prompt held already: they are not returned as new."""

    def push(self, codes: np.ndarray, done: bool) -> ContentT | None:
        """Return new content, or None.

        codes: all complete units (frames, rows) of the span so far, in the shape of `Segment.codes`. done: whether the span is complete.
        """
        return self.modality.decode(self.tokenizer, Segment(self.modality.kind, codes, facts=self.facts)) if done else None
