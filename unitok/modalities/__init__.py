"""Modalities: everything that depends on the kind of content, one file per kind.

A *kind* (text, image, audio) is what a file, or a part of a document, can be. An *instance* is one tokenizer of a kind under a name.
Most bundles have one instance per kind: `text`, `image` and `audio`. A bundle may also have `speech` and `music`, both of the kind
audio, each with token ranges of its own. The rest of unitok calls the methods of the modality and never compares its name, so a new
kind is one new file: here, or in any module that calls `register` (docs/add-a-modality.md). `load` decodes content (in a thread),
`batch_key` says what is encoded together, `encode` returns codes, and `decode` is the inverse.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from markupsafe import Markup

from unitok import pages
from unitok.errors import UserError
from unitok.modalities.base import (
    AnyModality,
    Filling,
    Loaded,
    Modality,
    NoOptions,
    Plain,
    Stream,
    TokenizerLike,
)
from unitok.vocab import Vocab

__all__ = [
    "AnyModality",
    "Filling",
    "Loaded",
    "Modality",
    "NoOptions",
    "Plain",
    "Stream",
    "TokenizerLike",
    "build_vocab",
    "kind_accepting",
    "kind_of_content",
    "modalities",
    "modality_of",
    "referred",
    "register",
    "types_of",
    "with_layers",
]

M = TypeVar("M", bound=type[AnyModality])
_REGISTRY: dict[str, AnyModality] = {}
_ORDER = ("text", "image", "audio", "box", "point", "video")  # in a vocabulary


def register(modality: M) -> M:
    """Class decorator: register a kind. Errors: `UserError` for a name that is taken, or no identifier."""
    if not modality.kind.isidentifier() or modality.kind in _REGISTRY:
        raise UserError(f"modality {modality.kind!r}: its kind is a new word of letters, digits and _")
    _REGISTRY[modality.kind] = modality()
    return modality


@cache
def _find_all() -> None:
    """Import all kinds and put them in order, whichever was imported first."""
    for _, name, _ in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{name}")
    for entry in entry_points(group=__name__):
        entry.load()
    for name in sorted(_REGISTRY, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)):
        _REGISTRY[name] = _REGISTRY.pop(name)


def modalities() -> Mapping[str, AnyModality]:
    """Return all kinds by name: those of this package, and those of installed packages with an entry point `unitok.modalities`."""
    _find_all()
    return _REGISTRY


def modality_of(kind: str) -> AnyModality:
    """Return the modality of a kind. Errors: `UserError` that lists the kinds."""
    known = modalities()
    if kind not in known:
        raise UserError(f"type {kind!r}; choose one of {', '.join(known)}")
    return known[kind]


def types_of(vocab: Vocab) -> dict[str, AnyModality]:
    """Return the types that a part of a document may have, with their modalities: names of a vocabulary's spans, and kinds."""
    return {name: modality_of(span.kind) for name, span in vocab.spans.items()} | dict(modalities())


def kind_of_content(head: bytes, name: str, first: str = "") -> str | None:
    """Return the kind of a file by its first 4,096 bytes and its name; None for text and for what no kind recognizes.

    first: the kind that is tried first.
    """
    order = [first, *modalities()] if first else list(modalities())
    found = (kind for kind in order if not modality_of(kind).inline and modality_of(kind).recognizes(head, name))
    return first if (kind := next(found, None)) and first and kind in modality_of(first).also else kind


def kind_accepting(content: object) -> str | None:
    """Return the kind that a Python object in a prompt is content of; None where there is none."""
    return next((kind for kind, modality in modalities().items() if modality.accepts(content)), None)


def referred(kinds: Sequence[str], number: int, value: object, where: str = "prompt") -> int | None:
    """Return the index of the content that content `number` is about: what it says, else the nearest before it, else the next, or None.

    kinds: of all content of a document. where: for messages. Errors: `UserError` for a number that no content has.
    """
    modality = modality_of(kinds[number])
    known = [i for i, kind in enumerate(kinds) if kind == modality.refers]
    named = modality.referred(value)
    if named is not None:
        if named >= len(known):
            raise UserError(
                f"{where}: {kinds[number]}: {modality.refers} {named} does not exist; the document has {len(known)}"
            )
        return known[named]
    before = [i for i in known if i < number]
    return before[-1] if before else known[0] if known else None


def with_layers(kinds: Sequence[str], contents: Sequence[object], figures: Sequence[pages.Figure]) -> list[pages.Figure]:
    """Return the figures of a document's contents, in which boxes and the like are drawn on what they are about."""
    layers: dict[int, list[Markup]] = {}
    for number, (kind, content) in enumerate(zip(kinds, contents, strict=True)):
        layer = modality_of(kind).overlay(content) if modality_of(kind).refers else Markup()
        about = referred(kinds, number, content) if layer else None
        if about is not None:
            layers.setdefault(about, []).append(layer)
    return [replace(figure, layers=layers.get(number, ())) for number, figure in enumerate(figures)]


def build_vocab(
    tokenizers: Mapping[str, TokenizerLike],
    kinds: Mapping[str, str] | None = None,
    onto: Vocab | None = None,
    layouts: Mapping[str, str] | None = None,
) -> Vocab:
    """Return the vocabulary of tokenizers.

    Args:
        tokenizers: by name, in the order of their ranges.
        kinds: kinds of the tokenizers whose names are not their kinds.
        onto: a vocabulary that theirs is appended to; its tokens keep their meaning.
        layouts: the layout (`unitok.layouts`) of those whose codes stand in another order than usual, by name.
    """
    vocab = Vocab.start() if onto is None else Vocab.from_manifest(onto.to_manifest())
    for name, tokenizer in tokenizers.items():
        span, sizes, never = modality_of((kinds or {}).get(name, name)).declare(name, tokenizer)
        vocab.add(replace(span, layout=(layouts or {}).get(name, span.layout)), sizes, never)
    return vocab
