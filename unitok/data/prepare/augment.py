"""Several documents from one: variants and pieces of its content, as the options of its kinds ask for."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest

from unitok.bundle import Bundle
from unitok.document import Part, RawDocument
from unitok.errors import UserError

MOST_TURNS = 64  # of a document; what is longer becomes several


def versions(bundle: Bundle, raw: RawDocument, options: Callable[[str], object], seconds: float = 0.0) -> Iterator[RawDocument]:
    """A document (or one per piece of its content), each followed by its variants; every one has an id of its own.

    raw: its parts' types are instances of the bundle. options: gives the options of an instance. seconds: of each of the stretches in which
    neighboring recordings and videos stand in turn; 0: one whole after the other.
    """
    names = dict.fromkeys(part.type for part in raw.content if part.file is not None)
    turns = list(_in_turns(bundle, raw, options, seconds)) if seconds else []
    for piece in turns or _pieces(bundle, raw, names, options):
        yield piece
        for name in names:
            for view in bundle.modality(name).views(options(name)):
                content = tuple(
                    replace(p, view="&".join(filter(None, (p.view, view)))) if p.type == name else p for p in piece.content
                )
                yield replace(piece, id=f"{piece.id}#{view}", content=content)


def _in_turns(bundle: Bundle, raw: RawDocument, options: Callable[[str], object], seconds: float) -> Iterator[RawDocument]:
    """A document in which the first run of neighboring recordings and videos, one of each type and all of one role, stands in turn: the first
    stretch of each, then the second of each. A long one becomes several documents; one without such a run gives nothing."""
    timed = [part.file is not None and "start" in bundle.modality(part.type).keys for part in raw.content]
    for start in range(len(timed)):
        stop = start
        while stop < len(timed) and timed[stop] and _together(raw.content[start], raw.content[stop]):
            stop += 1
        run = raw.content[start:stop]
        if len(run) > 1 and len({part.type for part in run}) == len(run):
            break
    else:
        return
    stretches, notes = [], list(raw.notes)
    for part in run:
        assert part.file is not None
        modality, tokenizer = bundle.modality(part.type), bundle.require(part.type)
        views, left_out = modality.pieces(tokenizer, part.file, options(part.type), part.view, seconds)
        notes += [left_out] if left_out else []
        content = part.file.loaded()
        stretches.append([replace(part, view=view, file=content) for view in views or [part.view]])
    turns = [[part for part in turn if part is not None] for turn in zip_longest(*stretches)]
    for first in range(0, len(turns), MOST_TURNS):
        some = [part for turn in turns[first : first + MOST_TURNS] for part in turn]
        name = f"{raw.id}#{first // MOST_TURNS}" if len(turns) > MOST_TURNS else raw.id
        yield replace(raw, id=name, content=(*raw.content[:start], *some, *raw.content[stop:]), notes=tuple(notes))


def _together(a: Part, b: Part) -> bool:
    """Whether two parts are said by the same and learned alike."""
    return (a.role, a.loss) == (b.role, b.loss)


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
