"""Outputs while they are generated: text as it is written, an image row by row, audio in chunks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unitok.bundle import Bundle
from unitok.document import Document
from unitok.errors import UserError
from unitok.generation_config import NOT_IN_STREAMS, GenerationConfig, check_count
from unitok.grammar import Grammar
from unitok.modalities import Stream
from unitok.ranges import Span
from unitok.sample.engine import Session
from unitok.sample.outputs import Output
from unitok.sample.requests import Draft, make_drafts, sampling_of

AHEAD = 16  # tokens that are sampled before anyone looks


@dataclass
class Chunk:
    """A new part of an output.

    `content` depends on the modality: the new characters of a text; all rows of an image so far, float [3, h, w] in [-1, 1]; the new
    samples of audio, float [C, t] in [-1, 1], or all of them in one chunk where the tokenizer cannot stream.
    """

    index: int  # of the output
    span: int  # which of its segments, from 0
    modality: str  # of the segment
    content: Any
    done: bool  # whether the segment is complete


def check_stream(config: GenerationConfig) -> None:
    """Raise `UserError` for what a call asks of a stream and no stream can do. A bundle's own `best_of` and `jacobi_window` are off."""
    for name, off in NOT_IN_STREAMS.items():
        if getattr(config, name) > off:
            raise UserError(f"{name} is {getattr(config, name)}: a stream yields tokens as they are drawn, so it must be {off}")


def stream_outputs(
    bundle: Bundle, prompts: list[Document], config: GenerationConfig, batch_size: int = 64
) -> Iterator[Chunk | Output]:
    """Yield the chunks of all outputs as they come, and each `Output` after its last chunk. batch_size: outputs generated together.
    `best_of` and `jacobi_window` of `config` do not count.
    Errors: `UserError` as for `Unitok.generate`, before any work."""
    check_count("batch_size", batch_size, 1)
    drafts = make_drafts(bundle, prompts, config)
    session = Session(bundle.inference, Grammar(bundle.vocab), sampling_of(bundle, config), ahead=AHEAD)
    session.check(draft.request for draft in drafts)
    return stream_drafts(bundle, session, drafts, batch_size)


def stream_drafts(bundle: Bundle, session: Session, drafts: list[Draft], batch_size: int) -> Iterator[Chunk | Output]:
    """Yield the chunks of drafts as a session generates them, and each `Output` after its last chunk."""
    by_request, detokenizers = {id(draft.request): draft for draft in drafts}, dict[int, Detokenizer]()
    for events in session.run([draft.request for draft in drafts], batch_size):
        for event in events:
            key = id(event.request)
            draft = by_request[key]
            if key not in detokenizers:
                detokenizers[key] = Detokenizer(bundle, session.grammar, draft)
            yield from detokenizers[key].push(event.ids)
            if event.done:
                yield draft.finish(detokenizers.pop(key).ids)


class Detokenizer:
    """Incremental detokenizer of one output: takes new tokens, yields chunks."""

    def __init__(self, bundle: Bundle, grammar: Grammar, draft: Draft):
        self.bundle, self.index = bundle, draft.index
        self.state = grammar.follow(draft.request.prompt, complete=False).copy_for(None, draft.request.plan, draft.request.turn)
        self.ids: list[int] = []
        self.span = -1
        self.body: list[int] = []  # ids of the segment, without those that begin and end it
        self.stream: Stream[Any, Any] | None = None
        #: Where words are given between stretches of audio, these are decoded as one: by modality, the stream and the codes so far.
        self.joins = any(item.given for item in draft.request.plan or ())
        self.joined: dict[str, tuple[Stream[Any, Any], np.ndarray]] = {}
        if self.state.span is not None:  # an image or audio that the prompt began
            self._open(self.state.span.modality)
            self.body = draft.lead[1 + len(self.state.span.header) :].tolist()
            assert self.stream is not None
            self.stream.begin(self._codes(self.state.span, self.state.header))

    def _open(self, modality: str) -> None:
        self.span, self.body = self.span + 1, []
        if modality in self.joined:
            self.stream = self.joined[modality][0]
        else:
            self.stream = self.bundle.modality(modality).stream(self.bundle.require(modality), self.bundle.vocab.span(modality))

    def _codes(self, span: Span, header: Sequence[int]) -> np.ndarray:
        """Return the codes of the whole rows or frames so far."""
        return self.bundle.vocab.body_codes(span.modality, self.body, span.sides(header), whole=False)

    def push(self, ids: list[int]) -> Iterator[Chunk]:
        """Take new tokens."""
        grown = False
        for id in ids:
            self.ids.append(id)
            before, header, count = self.state.span, list(self.state.header), self.state.count
            self.state.advance(id)
            after = self.state.span
            if before is not None and after is not before:
                yield from self._chunk(before, header, True)
                grown = False
            if after is not None and after is not before:
                self._open(after.modality)
                count = 0
            if after is not None and self.state.count > count:
                self.body.append(id)
                grown = True
        if self.state.span is not None and grown:
            yield from self._chunk(self.state.span, self.state.header, False)

    def _chunk(self, span: Span, header: Sequence[int], done: bool) -> Iterator[Chunk]:
        """Yield what the codes so far add to the chunks before, if anything."""
        codes = self._codes(span, header)
        if self.stream is None or not (codes.size or done):
            return
        self.stream.facts = tuple(header[: span.facts])
        over = done
        if self.joins and span.begin:
            before = self.joined.get(span.modality)
            codes = codes if before is None else np.concatenate([before[1], codes], -1)
            if done:
                self.joined[span.modality], over = (self.stream, codes), not self.state.plan
        content = self.stream.push(codes, over)
        if content is not None:
            yield Chunk(self.index, self.span, span.modality, content, done)
