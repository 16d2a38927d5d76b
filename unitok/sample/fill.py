"""Filling holes: in text at `___`, in an image under a mask, in audio and videos between two times; the rest stays as it is, bit for bit.

The decoder must have been trained to (`data.fill_rate`). It reads the content with its hole and what else the prompt holds, and writes
what belongs there (`unitok.holes`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unitok.bundle import Bundle
from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig, check_count
from unitok.grammar import Grammar
from unitok.holes import body_of, find_holes, mend, punch
from unitok.modalities import kind_accepting, kind_of_content, modality_of
from unitok.sample.engine import generate
from unitok.sample.outputs import Output, Outputs
from unitok.sample.prompts import read_one
from unitok.sample.requests import Draft, sampling_of
from unitok.sample.running import Request
from unitok.storage import Blob

BLANK = "___"  # or more of them


@dataclass(frozen=True)
class _Holed:
    """Content with holes as tokens.

    Args:
        ids: of the document up to the first `<fill_0>` of its second part. without: the same without the rest of the prompt.
        start: the position where the content begins. size: as `Segment.size`.
        finish: what turns decoded content into what is returned.
    """

    ids: np.ndarray
    without: np.ndarray
    start: int
    modality: str
    size: tuple[int, ...]
    finish: Callable[[Any], Any]


@dataclass
class FillDraft(Draft):
    """An output whose content is a prompt's with its holes filled."""

    holed: _Holed

    def finish(self, ids: Sequence[int] | np.ndarray) -> Output:
        """Return the output of new tokens."""
        holed, ids = self.holed, np.asarray(ids, np.int64)
        mended = mend(self.bundle.vocab, np.concatenate([holed.ids, ids]))
        whole = self.bundle.vocab.decode(mended[holed.start :]).segments[-1]
        segment = Segment(holed.modality, whole.codes, size=holed.size, facts=whole.facts)
        output = Output(self.bundle, self.prompt, Document((segment,)), ids, self.index)
        output.replace_content(0, holed.finish(self.bundle.decode(segment)))
        return output


def make_fill_drafts(
    bundle: Bundle, content: object, hole: object, prompt: object, config: GenerationConfig
) -> list[FillDraft]:
    """Return n drafts of `content` with its holes filled; see `Unitok.fill`. Errors: `UserError`."""
    before = Document(()) if prompt is None else read_one(bundle, prompt)
    is_text, most = _is_text(bundle, content), config.max_new_tokens
    if is_text and hole is not None:
        raise UserError(f"hole: a text has its holes as {BLANK}; leave it out")
    holed = _read_text(bundle, content, before) if is_text else _read_media(bundle, content, hole, before)
    if not is_text and "max_new_tokens" not in config.given():  # holes in media say how long their filling is
        most = bundle.inference.config.max_position_embeddings
    requests = [Request(holed.ids, None, most, config.seed, row) for row in range(config.n)]
    for request in requests:
        request.negative_prompt = request.media = holed.without
    return [
        FillDraft(index, bundle, request, before, np.zeros(0, np.int64), "none", holed)
        for index, request in enumerate(requests)
    ]


def fill_content(
    bundle: Bundle, content: object, hole: object, prompt: object, config: GenerationConfig, batch_size: int
) -> list[Output]:
    """Return n outputs of `content` with its holes filled; see `Unitok.fill`."""
    check_count("batch_size", batch_size, 1)
    drafts = make_fill_drafts(bundle, content, hole, prompt, config)
    requests = [draft.request for draft in drafts]
    filled = generate(bundle.inference, Grammar(bundle.vocab), requests, sampling_of(bundle, config), batch_size)
    return Outputs(draft.finish(ids) for draft, ids in zip(drafts, filled, strict=True))


def _is_text(bundle: Bundle, content: object) -> bool:
    kind = kind_accepting(content)
    return kind is not None and bundle.vocab.instance(kind) == bundle.vocab.bare


def _read_text(bundle: Bundle, content: object, before: Document) -> _Holed:
    """Text whose holes are written as `___`; the space before one belongs to what is filled in."""
    name = bundle.vocab.bare or ""
    pieces = re.split(f"{BLANK}+", str(content))
    if len(pieces) < 2:
        raise UserError(f"fill: no hole in the text; write {BLANK} where text is missing")
    tokenizer, r = bundle.require(name), bundle.vocab.body(name)[0]
    stand_in = next(code for code in range(r.size) if code not in r.illegal)
    codes: list[int] = []
    holes = []
    for number, piece in enumerate(pieces):
        piece = piece.rstrip(" ") if number + 1 < len(pieces) else piece
        codes += tokenizer.encode(piece) if piece else []
        if number + 1 < len(pieces):
            holes.append(len(codes))
            codes.append(stand_in)
    start = len(bundle.vocab.encode(before, eos=False))
    segment = Segment(name, np.array(codes), _role_of(before))
    places = [np.array([start + hole]) for hole in holes]
    return _holed(bundle, before, segment, places, start, str)


def _role_of(before: Document) -> str:
    """The role of what stands before, which the content has, too: so no token of a role stands between them."""
    return before.segments[-1].role if before.segments else "none"


def _read_media(bundle: Bundle, content: object, hole: object, before: Document) -> _Holed:
    """An image, audio or a video with one hole."""
    if isinstance(content, Path):
        if not content.is_file():
            raise UserError(f"{content}: no such file")
        blob = Blob.at(content)
        kind, where = kind_of_content(blob.head(), content.name), str(content)
    else:
        kind, where = kind_accepting(content), "fill"
    if kind is None:
        raise UserError(f"{where}: neither text with {BLANK}, nor an image, audio or a video")
    name = bundle.instance(kind)
    filling = modality_of(kind).filling(bundle.require(name), content, hole, where)
    (segment,) = bundle.read(filling.content, role=_role_of(before))
    document = Document((*before.segments, segment))
    ids, placed = bundle.vocab.encode_placed(document)
    start = placed[-1].start
    first, _, units = body_of(bundle.vocab, ids, start)
    places = first + np.flatnonzero(filling.missing(segment)[units])
    return _holed(bundle, before, segment, [places], start, filling.finish)


def _holed(
    bundle: Bundle,
    before: Document,
    segment: Segment,
    places: Sequence[np.ndarray],
    start: int,
    finish: Callable[[Any], Any],
) -> _Holed:
    """Punch holes at `places` into the document of a prompt and a segment."""
    punched = partial(_first_part, bundle)
    whole = punched(Document((*before.segments, segment)), places)
    alone = punched(Document((replace(segment, role="none"),)), [place - (start - 1) for place in places])
    return _Holed(whole, alone[:-1], start, segment.modality, segment.size, finish)


def _first_part(bundle: Bundle, document: Document, places: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens of a document with holes, up to the token that begins what belongs into the first one."""
    ids, _ = punch(bundle.vocab, bundle.vocab.encode(document), places)
    return ids[: find_holes(bundle.vocab, ids)[1] + 1]
