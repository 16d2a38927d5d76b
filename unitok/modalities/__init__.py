"""Modalities: everything that depends on what kind of content a piece is, one file per kind.

A *kind* (text, image, audio) is what a file, or a part of a document, can be. An *instance* is one tokenizer of a kind under a
name: most bundles hold `text`, `image` and `audio`; one may hold `speech` and `music`, both of the kind audio, each with
ranges of its own. The rest of unitok asks the modality and never compares its name, so a new kind is one new file: here, or in
any module that calls `register` (docs/add-a-modality.md).

Content goes through the same four steps wherever it comes from, a data set or a prompt: `load` decodes it (in a thread),
`batch_key` says what may be encoded together, `encode` gives codes, and `decode` is its inverse.
"""

import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from markupsafe import Markup

from unitok import pages
from unitok.document import Segment
from unitok.errors import UserError
from unitok.files import read_json, write_json
from unitok.ranges import Span
from unitok.storage import Blob
from unitok.vocab import Vocab


@dataclass
class Loaded:
    """Content that was decoded and can be encoded."""

    content: Any  # what `Modality.encode` takes, in memory, or a Blob that it reads in pieces
    size: tuple[int, ...] = ()  # as `Segment.size`; `encode` may set it
    view: str = ""  # the part of the file that it is, as a media fragment (`xywh=0,0,64,64`)
    format: str = ""  # of the file, such as PNG
    facts: dict[str, float] = field(default_factory=dict)  # for filters: `characters`, `width`, `height`, `seconds`
    rejected: str = ""  # the filter that leaves it out, where nothing is wrong with it
    bytes: int = 0  # of the file that were read

    @property
    def nbytes(self) -> int:
        """Memory that the decoded content takes."""
        return getattr(self.content, "nbytes", 0)


class Plain:
    """A tokenizer without weights: what a kind needs whose codes follow from its values. `config`: of that, as JSON can say it."""

    def __init__(self, kind: str, **config: Any):
        self.kind, self.config = kind, config

    def fingerprint(self) -> str:
        """Changes when the codes do."""
        return json.dumps([self.kind, self.config], sort_keys=True)

    def save_pretrained(self, folder: Path, overwrite: bool = False) -> None:
        """Write `config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"unitok": 1, "kind": f"{self.kind} tokenizer", "config": self.config})

    @classmethod
    def from_pretrained(cls, folder: Path, device: str = "cpu") -> "Plain":
        """Read its folder. Errors: `UserError`."""
        found = read_json(folder / "config.json", "build the bundle again", "kind", "config")
        return cls(found["kind"].removesuffix(" tokenizer"), **found["config"])

    def describe(self) -> dict[str, Any]:
        """Its configuration."""
        return self.config


@dataclass(frozen=True)
class NoOptions:
    """A modality whose content is read in one way."""


class Modality:
    """One kind of content. A subclass sets `kind` and overrides what differs from plain values in a document. `tokenizer` is an
    instance's tokenizer throughout, an object of `tokenizer_class()`."""

    kind: ClassVar[str]
    #: Key of a part that holds the content: `path` names a file; any other holds the value itself.
    key: ClassVar[str] = "path"
    #: Dataclass of how content is read: flags `--KIND-FIELD` of `unitok tokenize`, and `KIND: {FIELD: …}` in recipes.
    Options: ClassVar[type] = NoOptions
    #: Seconds or items that are encoded together, in the unit of `cost`.
    BATCH: ClassVar[float] = 64.0

    @property
    def inline(self) -> bool:
        """Whether the content stands in the document itself, not in a file."""
        return self.key != "path"

    @property
    def plural(self) -> str:
        """The kind's name, of several."""
        return f"{self.kind}s"

    # ---- Declaring -----------------------------------------------------------------------------------------------

    def tokenizer_class(self) -> Any:
        """The class of its tokenizers."""
        return Plain

    def untrained(self) -> Any:
        """A tiny tokenizer with random weights, for trials and tests; of kinds without weights the tokenizer as it is."""
        return Plain(self.kind)

    def declare(self, name: str, tokenizer: Any) -> tuple[Span, dict[str, int], tuple[int, ...]]:
        """The span of an instance, the sizes of its ranges by name, and the codes that may not occur."""
        raise NotImplementedError

    def rate(self, tokenizer: Any) -> float | None:
        """Frames per second; None for content that takes no time."""
        return None

    def describe(self, tokenizer: Any) -> dict[str, Any]:
        """What `unitok inspect` says of a tokenizer."""
        return tokenizer.describe()

    def usage(self, name: str, tokenizer: Any) -> dict[str, str]:
        """How many tokens content of an instance takes, in words, by what content it is."""
        return {}

    # ---- Reading -------------------------------------------------------------------------------------------------

    def accepts(self, content: Any) -> bool:
        """Whether a Python object in a prompt is content of this kind."""
        return False

    def recognizes(self, head: bytes, name: str) -> bool:
        """Whether a file can be content of this kind, by its first 4,096 bytes and its name."""
        from unitok.media.formats import sniff_bytes  # imports PyTorch

        return sniff_bytes(head, name) == self.kind

    def check(self, value: Any, where: str) -> Any:
        """A value from a document's JSON, as `load` takes it. Errors: `UserError` that begins with `where`."""
        return value

    def views(self, options: Any) -> list[str]:
        """Variants of which each makes another document: `flip`, `crop=1`."""
        return []

    def pieces(self, tokenizer: Any, content: Blob, options: Any) -> tuple[list[str], str]:
        """Parts of long content, each a document of its own, or nothing; and what is left out of them, in words."""
        return [], ""

    def load(self, tokenizer: Any, content: Any, options: Any, name: str, view: str = "", chance: float = 0.0) -> Loaded:
        """Decode content: a Blob, a value that `check` gave, or an object that it `accepts`. name: for messages. view: the variant
        or part of it. chance: in [0, 1), decides what is random. Errors: `UserError`."""
        return Loaded(content)

    def batch_key(self, tokenizer: Any, loaded: Loaded) -> tuple[int, ...] | None:
        """Contents of equal keys can be encoded in one batch. None: each is encoded alone, in the thread that decoded it."""
        return None

    def cost(self, tokenizer: Any, loaded: Loaded) -> float:
        """Its share of a batch, which is full at `BATCH`."""
        return 1.0

    def encode(self, tokenizer: Any, batch: list[Loaded]) -> list[np.ndarray]:
        """Codes of each, in the shape that the span's layout takes. Contents have equal batch keys."""
        raise NotImplementedError

    # ---- Writing -------------------------------------------------------------------------------------------------

    def decode(self, tokenizer: Any, segment: Segment) -> Any:
        """Content of a segment's codes. Inverse of `encode`."""
        raise NotImplementedError

    def save(self, tokenizer: Any, content: Any, path: Path) -> Path | None:
        """Write content into a file, `path` with a suffix of its own; its path. None where it stands in the document."""
        return None

    def stream(self, tokenizer: Any, span: Span) -> "Stream":
        """What gives the content of a span while its codes come in."""
        return Stream(self, tokenizer)

    def html(self, tokenizer: Any, content: Any) -> Markup:
        """Content as an HTML element."""
        return pages.text(json.dumps(content))

    def html_of_file(self, file: Path) -> Markup:
        """The HTML element for a file that `save` wrote beside the page."""
        raise NotImplementedError

    def line(self, tokenizer: Any, segment: Segment) -> str:
        """A segment in a few words, for a list."""
        return f"{segment.modality} {self.decode(tokenizer, segment)!r}"

    def terminal(self, tokenizer: Any, content: Any, done: bool, colors: bool) -> tuple[str, bool]:
        """What a terminal shows of a chunk of a stream, and whether it takes the last one's place. colors: whether it can draw."""
        return (f"{content}\n" if done else ""), False

    def log(self, board: Any, tag: str, tokenizer: Any, content: Any, step: int) -> None:
        """Put content into TensorBoard."""
        board.add_text(tag, str(content), step)


class Stream:
    """Content of a span while it grows; this one gives it once, when it is complete."""

    def __init__(self, modality: Modality, tokenizer: Any):
        self.modality, self.tokenizer = modality, tokenizer

    def begin(self, codes: np.ndarray) -> None:
        """Take note of codes that the prompt brought: they are no news."""

    def push(self, codes: np.ndarray, done: bool) -> Any:
        """New content, or None. codes: all whole units so far, in the shape of `Segment.codes`. done: whether these are all."""
        return self.modality.decode(self.tokenizer, Segment(self.modality.kind, codes)) if done else None


M = TypeVar("M", bound=type[Modality])
_REGISTRY: dict[str, Modality] = {}
_ORDER = ("text", "image", "audio")  # as they stand in a vocabulary


def register(modality: M) -> M:
    """Class decorator: make a kind known. Errors: `UserError` for a name that is taken or cannot be one."""
    if not modality.kind.isidentifier() or modality.kind in _REGISTRY:
        raise UserError(f"modality {modality.kind!r}: its kind is a new word of letters, digits and _")
    _REGISTRY[modality.kind] = modality()
    return modality


@cache
def _find_all() -> None:
    """Import all kinds and put them in order, also where one of them was imported by itself before."""
    for _, name, _ in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{name}")
    for entry in entry_points(group=__name__):
        entry.load()
    for name in sorted(_REGISTRY, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)):
        _REGISTRY[name] = _REGISTRY.pop(name)


def modalities() -> Mapping[str, Modality]:
    """All kinds by name: those of this package, and those that installed packages name in the entry point `unitok.modalities`."""
    _find_all()
    return _REGISTRY


def modality_of(kind: str) -> Modality:
    """The modality of a kind. Errors: `UserError` with those that there are."""
    known = modalities()
    if kind not in known:
        raise UserError(f"type {kind!r}; choose one of {', '.join(known)}")
    return known[kind]


def types_of(vocab: Vocab) -> dict[str, Modality]:
    """What a part of a document may be: names of a vocabulary's spans, and kinds."""
    return {name: modality_of(span.kind) for name, span in vocab.spans.items()} | dict(modalities())


def kind_of_content(head: bytes, name: str, wanted: str = "") -> str | None:
    """The kind of a file by its first bytes and name: `wanted` if it can be that, else the first that it can; None for text."""
    order = [wanted, *modalities()] if wanted else list(modalities())
    return next((kind for kind in order if not modality_of(kind).inline and modality_of(kind).recognizes(head, name)), None)


def kind_accepting(content: Any) -> str | None:
    """The kind that a Python object in a prompt is content of."""
    return next((kind for kind, modality in modalities().items() if modality.accepts(content)), None)


def build_vocab(tokenizers: Mapping[str, Any], kinds: Mapping[str, str] | None = None, onto: Vocab | None = None) -> Vocab:
    """The vocabulary of some instances, in their order; or `onto`, with ranges for them appended, so that no old id moves. kinds: of
    the instances whose names are not their kinds."""
    vocab = Vocab.start() if onto is None else Vocab.from_manifest(onto.to_manifest())
    for name, tokenizer in tokenizers.items():
        vocab.add(*modality_of((kinds or {}).get(name, name)).declare(name, tokenizer))
    return vocab


def make_options(kind: str, given: Mapping[str, Any], where: str) -> Any:
    """A kind's options from plain values. Errors: `UserError` naming the one that does not exist or does not fit."""
    options = modality_of(kind).Options
    known = {f.name: f for f in fields(options)}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{where}: {kind} has no option {name!r}; it has {', '.join(known) or 'none'}")
        expected = type(known[name].default)
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise UserError(f"{where}: {kind} {name} is {value!r}; it is a {expected.__name__}")
    return options(**given)
