"""A request that is being generated: its position in its plan, its random numbers, and its slots in the cache."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from unitok.errors import UserError
from unitok.filling import follow_fills
from unitok.generation_config import SamplingParams
from unitok.grammar import Grammar, Row
from unitok.intervals import Intervals
from unitok.plan import PlanItem


@dataclass
class Request:
    """One output to generate. Prompt, seed and row decide all of its random numbers."""

    prompt: np.ndarray  # ids, bos first, without a final eos
    plan: list[PlanItem] | None  # None: free
    max_new_tokens: int  # the closing eos included
    seed: int = 0
    row: int = 0
    sampling: Mapping[str, SamplingParams] = field(default_factory=dict)  # by tokenizer; a missing one has the session's
    negative_prompt: np.ndarray | None = None  # ids, bos first, that guidance leads away from; None: bos alone
    turn: bool = False  # whether another role ends it, as eos does
    media: np.ndarray | None = None  # ids of the prompt's images and audio alone, for three-way guidance


DEFAULT = SamplingParams()


class Slot:
    """A sequence in the cache: how many of its ids the model has read, and the ids that it has not.

    kind: `own` is the request itself, `none` and `media` are what guidance compares it with. start: index of the id of the request
    at which this sequence joins it.
    """

    def __init__(self, running: "Running", kind: str, ids: np.ndarray, start: int):
        self.running, self.kind, self.start, self.read = running, kind, start, 0
        self.ids, self.span_positions = ids.tolist(), running.grammar.span_positions(ids).tolist()

    def skip(self, count: int) -> None:
        """Count the next tokens as read."""
        self.read += count
        self.ids, self.span_positions = self.ids[count:], self.span_positions[count:]

    def take_unread(self) -> tuple[list[int], list[int]]:
        """Return the unread ids with their span positions, and count them as read."""
        unread = self.ids, self.span_positions
        self.read += len(self.ids)
        self.ids, self.span_positions = [], []
        return unread


class Running:
    """A request that is being generated."""

    def __init__(self, grammar: Grammar, request: Request, sampling: Mapping[str, SamplingParams], max_length: int):
        self.grammar, self.request, self.sampling = grammar, request, {**sampling, **request.sampling}
        self.prompt = np.asarray(request.prompt)
        self.state = self._state_after_prompt(max_length)
        self.new: list[int] = []
        self.reported = 0  # how many new ids were returned by `Session.step`
        self.key = (request.seed, request.row, zlib.crc32(self.prompt.astype("<i8").tobytes()))  # seeds its random numbers
        self.randoms = np.random.default_rng(self.key).random(self.state.left or 0)
        self.slots = [Slot(self, "own", self.prompt, 0)]
        self._append_forced()

    def _state_after_prompt(self, max_length: int) -> Row:
        """Return the grammar's state after the prompt. Errors: `UserError` where a prompt and the plan exceed what the decoder takes."""
        request, lengths = self.request, {"a prompt": len(self.prompt)}
        if len(self.prompt) >= max_length:  # before its grammar is checked, which takes time
            raise UserError(f"a prompt of {len(self.prompt)} tokens: the decoder takes {max_length} in all; shorten it")
        filling = follow_fills(self.grammar, self.prompt, complete=False)
        known = filling or self.grammar.follow(self.prompt, complete=False)
        if any(params.guided for params in self.sampling.values()):  # what has begun follows these, too
            begun = known.into if known.span and known.span.begin else 0
            for name, ids in (("a negative prompt", request.negative_prompt), ("images and audio of a prompt", request.media)):
                if ids is not None:
                    lengths[name] = len(ids) + begun
        longest = max(lengths, key=lambda name: lengths[name])
        room = max_length - lengths[longest]
        taken = f"{longest} of {lengths[longest]} tokens: the decoder takes {max_length} in all"
        if room <= 0:
            raise UserError(f"{taken}; shorten it")
        try:
            state = known.copy_for(min(request.max_new_tokens, room), request.plan, request.turn)
        except UserError as error:
            if room >= request.max_new_tokens:
                raise
            raise UserError(f"{taken}; {error}") from None
        state.bound()
        return state

    def take(self, ids: list[int]) -> None:
        """Append sampled ids, and all ids after them that have no alternative."""
        position = self.state.take(ids)
        self.new += ids
        for slot in self.slots:
            slot.ids, slot.span_positions = ids[-1:], [position]
        self._append_forced()

    def _append_forced(self) -> None:
        while (id := self.state.forced()) is not None:
            position = self.state.advance(id)
            self.new.append(id)
            for slot in self.slots:
                slot.ids.append(id)
                slot.span_positions.append(position)

    @property
    def done(self) -> bool:
        """Whether the output is complete."""
        return self.state.state == "done"

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters of the next token: of the span that it belongs to, else of the next item of the plan, else of text."""
        coming = self.state.plan[0].modality if self.state.plan else self.grammar.vocab.bare
        return self.sampling.get(self.state.modality or coming or "", DEFAULT)

    def guidance_prompts(self) -> dict[str, np.ndarray | None]:
        """Return the prompts that guidance needs now, by the kind of their slot; None is bos alone."""
        if not self.params.guides(self.state.count):
            return {}
        none = {"none": self.request.negative_prompt}
        return none if self.params.media_guidance_scale is None else {"media": self.request.media} | none

    def stretch(self, most: int) -> list[Intervals]:
        """Return the allowed sets of the next tokens, as far as they do not depend on what is sampled and guidance stays as it is."""
        return self.state.ahead(min(most, self.params.same_guidance(self.state.count)))
