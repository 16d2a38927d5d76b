"""Outputs while they grow: text as it is written, an image row by row, audio in chunks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from unitok.bundle import Bundle
from unitok.grammar import Grammar
from unitok.modalities import Stream
from unitok.sample.engine import Session
from unitok.sample.outputs import Output
from unitok.sample.requests import Draft, check_count

AHEAD = 16  # ids that are drawn before anyone looks


@dataclass
class Chunk:
    """Something new of an output. `content` is what its modality gives: the new characters of a text; all rows of an image so far,
    float [3, h, w] in [-1, 1]; the new samples of audio, float [C, t] in [-1, 1], in one chunk where the tokenizer cannot stream."""

    index: int  # which output
    span: int  # which of its segments, from 0
    modality: str  # of the segment
    content: Any
    done: bool  # whether the segment is complete


def stream(bundle: Bundle, drafts: list[Draft], settings: dict[str, Any], batch_size: int = 64) -> Iterator[Chunk | Output]:
    """Pieces of all outputs as they come; after the last one of each the whole `Output`. So many are made together.
    Errors: `UserError` as for `Unitok.generate`, before any work."""
    check_count("batch size", batch_size, 1)
    session = Session(bundle.inference, Grammar(bundle.vocab), settings, ahead=AHEAD)
    session.check(one.request for one in drafts)
    return _stream(bundle, session, drafts, batch_size)


def _stream(bundle: Bundle, session: Session, drafts: list[Draft], batch_size: int) -> Iterator[Chunk | Output]:
    by_request, watchers = {id(one.request): one for one in drafts}, dict[int, _Watcher]()
    for events in session.run([one.request for one in drafts], batch_size):
        for event in events:
            key = id(event.request)
            one = by_request[key]
            if key not in watchers:
                watchers[key] = _Watcher(bundle, session.grammar, one)
            yield from watchers[key].see(event.ids)
            if event.done:
                yield one.finish(watchers.pop(key).ids)


class _Watcher:
    """Follows the ids of one output, and gives the content that they add."""

    def __init__(self, bundle: Bundle, grammar: Grammar, one: Draft):
        self.bundle, self.index = bundle, one.index
        self.state = grammar.follow(one.request.prompt, complete=False).copy_for(None, one.request.plan)
        self.ids: list[int] = []
        self.span = -1
        self.body: list[int] = []  # ids of the segment, without those that begin and end it
        self.stream: Stream | None = None
        if self.state.span is not None:  # a begun image or audio
            self._open(self.state.span.modality)
            self.body = one.lead[1 + len(self.state.span.header) :].tolist()
            assert self.stream is not None
            self.stream.begin(self._codes(self.state.span.modality, tuple(self.state.sides)))

    def _open(self, modality: str) -> None:
        self.span, self.body = self.span + 1, []
        self.stream = self.bundle.modality(modality).stream(self.bundle.require(modality), self.bundle.vocab.span(modality))

    def _codes(self, modality: str, sides: tuple[int, ...]) -> np.ndarray:
        """The whole rows or frames so far."""
        return self.bundle.vocab.body_codes(modality, self.body, sides, whole=False)

    def see(self, ids: list[int]) -> Iterator[Chunk]:
        """Take new ids."""
        grown = False
        for id in ids:
            self.ids.append(id)
            before, modality, count = self.state.span, self.state.modality, self.state.count
            sides = tuple(self.state.sides)
            self.state.advance(id)
            after = self.state.span
            if before is not None and after is not before:
                yield from self._tell(modality or "", sides, True)
                grown = False
            if after is not None and after is not before:
                self._open(after.modality)
                count = 0
            if after is not None and self.state.count > count:
                self.body.append(id)
                grown = True
        if self.state.span is not None and grown:
            yield from self._tell(self.state.span.modality, tuple(self.state.sides), False)

    def _tell(self, modality: str, sides: tuple[int, ...], done: bool) -> Iterator[Chunk]:
        """What the codes so far add to what was given."""
        codes = self._codes(modality, sides)
        content = self.stream.push(codes, done) if self.stream is not None and (codes.size or done) else None
        if content is not None:
            yield Chunk(self.index, self.span, modality, content, done)
