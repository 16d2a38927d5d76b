"""Several documents from one: variants and pieces of its content, as the options of its kinds ask for."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest

from unitok.bundle import Bundle
from unitok.document import RawDocument
from unitok.errors import UserError


def versions(bundle: Bundle, raw: RawDocument, options: Callable[[str], object], seconds: float = 0.0) -> Iterator[RawDocument]:
    """A document (or one per piece of its content), each followed by its variants; every one has an id of its own.

    raw: its parts' types are instances of the bundle. options: gives the options of an instance. seconds: of each of the stretches in which
    all its recordings and videos stand in turn; 0: one whole after the other.
    """
    raw = _in_turns(bundle, raw, options, seconds) if seconds else raw
    names = dict.fromkeys(part.type for part in raw.content if part.file is not None)
    for piece in _pieces(bundle, raw, names, options):
        yield piece
        for name in names:
            for view in bundle.modality(name).views(options(name)):
                content = tuple(
                    replace(p, view="&".join(filter(None, (p.view, view)))) if p.type == name else p for p in piece.content
                )
                yield replace(piece, id=f"{piece.id}#{view}", content=content)


def _in_turns(bundle: Bundle, raw: RawDocument, options: Callable[[str], object], seconds: float) -> RawDocument:
    """The first stretch of each recording and video, then the second of each, and so on, in the place of the first of them."""
    timed = [part for part in raw.content if part.file is not None and "start" in bundle.modality(part.type).keys]
    stretches, notes = [], list(raw.notes)
    for part in timed:
        assert part.file is not None
        modality, tokenizer = bundle.modality(part.type), bundle.require(part.type)
        views, left_out = modality.pieces(tokenizer, part.file, options(part.type), part.view, seconds)
        notes += [left_out] if left_out else []
        content = part.file.loaded()
        stretches.append([replace(part, view=view, file=content) for view in views or [part.view]])
    turns = [part for turn in zip_longest(*stretches) for part in turn if part is not None]
    first = raw.content.index(timed[0]) if timed else 0
    others = [[p for p in some if p not in timed] for some in (raw.content[:first], raw.content[first:])]
    return replace(raw, content=(*others[0], *turns, *others[1]), notes=tuple(notes))


def _pieces(
    bundle: Bundle, raw: RawDocument, names: dict[str, None], options: Callable[[str], object]
) -> Iterator[RawDocument]:
    """A document with one long part of a kind as one document per piece of it; any other document as it is."""
    for name in names:
        kind, spans = bundle.vocab.span(name).kind, bundle.vocab.spans
        parts = [p for p in raw.content if p.type in spans and spans[p.type].kind == kind]
        if len(parts) != 1 or parts[0].file is None:
            continue
        views, left_out = bundle.modality(name).pieces(bundle.require(name), parts[0].file, options(name), parts[0].view)
        if not views:
            continue
        if raw.cuts:
            raise UserError(f"{raw.where}: interleave words: a recording is one document; leave out --{kind}-segment")
        content_of_part, notes = parts[0].file.loaded(), (*raw.notes, left_out) if left_out else raw.notes
        for view in views:
            content = tuple(replace(p, view=view, file=content_of_part) if p is parts[0] else p for p in raw.content)
            yield replace(raw, id=f"{raw.id}#{view}", content=content, notes=notes)
        return
    yield raw
