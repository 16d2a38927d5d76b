"""Outputs while they grow: text as it is written, a picture row by row, sound in chunks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unitok.document import Segment
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.sample.engine import Session, check_requests

if TYPE_CHECKING:
    from unitok.bundle import Unitok
    from unitok.sample.render import Output, Pending

AHEAD = 16  # ids that are drawn before anyone looks
CHUNK_SECONDS = 0.25  # of sound, at least, in one piece


@dataclass
class Piece:
    """Something new of an output.

    Args:
        index: which output. span: which of its segments, from 0. modality: of that segment.
        content: text: the new characters, str. Picture: all of its rows so far, float [3, h, w] in [-1, 1], when there are new
            ones. Sound: the new
            samples, float [C, t] in [-1, 1]; one chunk at its end where the tokenizer cannot stream (`causal: false`).
        done: whether the segment is complete.
    """

    index: int
    span: int
    modality: str
    content: Any
    done: bool


def stream(
    unitok: "Unitok", pending: "list[Pending]", settings: dict[str, Any], batch_size: int = 64
) -> "Iterator[Piece | Output]":
    """Pieces of all outputs as they come; after the last one of each the whole `Output`. So many are made together.

    Errors: `UserError` as for `Unitok.generate`, before any work.
    """
    from unitok.sample.render import check_count

    check_count("batch size", batch_size, 1)
    session = Session(unitok.need("model"), Grammar(unitok.vocab), settings, ahead=AHEAD)
    check_requests(session, (one.request for one in pending))
    return _stream(unitok, session, pending, batch_size)


def _stream(unitok: "Unitok", session: Session, pending: "list[Pending]", batch_size: int) -> "Iterator[Piece | Output]":
    watchers: dict[int, tuple[Pending, _Watcher]] = {}
    waiting = iter(pending)
    while True:
        while len(watchers) < batch_size and (one := next(waiting, None)) is not None:
            session.add(one.request)
            watchers[id(one.request)] = (one, _Watcher(unitok, session.grammar, one))
        if not session.waiting:
            return
        for event in session.step():
            one, watcher = watchers[id(event.request)]
            yield from watcher.see(event.ids)
            if event.done:
                del watchers[id(event.request)]
                yield one.finish(watcher.ids)


class _Watcher:
    """Follows the ids of one output and tells what they add."""

    def __init__(self, unitok: "Unitok", grammar: Grammar, one: "Pending"):
        self.unitok, self.index = unitok, one.index
        self.state = grammar.follow(one.request.prompt, complete=False).copy_for(None, one.request.plan)
        self.ids: list[int] = []
        self.span = -1
        self.body: list[int] = []  # ids of the segment, without those that begin and end it
        self.said = ""
        self.sound: Any = None
        self.told = 0  # rows of a picture, frames of a sound
        if self.state.span is not None:  # a begun picture or sound
            self._open()
            self.body = one.lead[1 + len(self.state.span.header) :].tolist()
            self.told = len(self._codes(self.state.span.modality)) if self.state.sides else 0

    def _open(self) -> None:
        self.span += 1
        self.body, self.said, self.sound, self.told = [], "", None, 0

    def see(self, ids: list[int]) -> Iterator[Piece]:
        """Take new ids."""
        grown = False
        for id in ids:
            self.ids.append(id)
            before, modality, count = self.state.span, self.state.modality, self.state.count
            self.state.advance(id)
            after = self.state.span
            if before is not None and after is not before:
                yield from self._tell(modality or "", True)
                grown = False
            if after is not None and after is not before:
                self._open()
                count = 0
            if after is not None and self.state.count > count:
                self.body.append(id)
                grown = True
        if self.state.span is not None and grown:
            yield from self._tell(self.state.span.modality, False)

    def _tell(self, modality: str, done: bool) -> Iterator[Piece]:
        """What the codes so far add to what was told."""
        codes = self._codes(modality)
        content = {"text": self._text, "image": self._picture, "audio": self._sound}[modality](codes, done)
        if content is not None:
            yield Piece(self.index, self.span, modality, content, done)

    def _codes(self, modality: str) -> np.ndarray:
        """The whole frames or rows so far."""
        return self.unitok.vocab.body_codes(modality, self.body, tuple(self.state.sides), whole=False)

    def _text(self, codes: np.ndarray, done: bool) -> str | None:
        whole = self.unitok.need("text").decode(codes.tolist())
        whole = whole if done else whole.rstrip("\ufffd")  # half a character
        new, self.said = whole[len(self.said) :], whole
        return new if new or done else None

    def _picture(self, codes: np.ndarray, done: bool) -> torch.Tensor | None:
        if not self.state.sides:  # a vocabulary whose pictures do not tell their size: whole or not at all
            return self.unitok.decode_segment(Segment("image", codes)) if done else None
        if not done and len(codes) <= self.told:
            return None
        self.told = len(codes)
        return self.unitok.need("image").decode(torch.from_numpy(codes)[None])[0].cpu()

    def _sound(self, codes: np.ndarray, done: bool) -> torch.Tensor | None:
        tokenizer, frames = self.unitok.need("audio"), torch.from_numpy(codes)
        if self.sound is None:
            try:
                self.sound = tokenizer.decode_stream()
            except UserError:
                self.sound = False
        if self.sound is False:
            return tokenizer.decode(frames[None])[0].cpu() if done else None
        new = frames[:, self.told :]
        if not done and new.shape[1] < CHUNK_SECONDS * tokenizer.frame_rate:
            return None
        self.told = frames.shape[1]
        return self.sound.push(new[None], done)[0].cpu()
