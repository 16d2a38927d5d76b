"""A request on its way: its place in its plan, its random numbers, and its slots in the cache."""

import zlib
from dataclasses import dataclass, field

import numpy as np

from unitok.errors import UserError
from unitok.grammar import Grammar, PlanItem, Row
from unitok.intervals import Intervals
from unitok.sample.sampling import SamplingParams


@dataclass
class Request:
    """What to go on from, and to what end. Prompt, seed and row decide all of its random numbers."""

    prompt: np.ndarray  # ids, bos first, without a final eos
    plan: list[PlanItem] | None  # None: free
    max_new_tokens: int  # most new ids, the closing eos included
    seed: int = 0
    row: int = 0
    settings: dict[str, SamplingParams] = field(default_factory=dict)  # by modality; a missing one has those of the session
    negative_prompt: np.ndarray | None = None  # ids, bos first, that guidance leads away from; without it, bos alone
    media: np.ndarray | None = None  # the prompt's images and audio alone, for three-way guidance


class Slot:
    """A sequence in the cache: how many of its ids have been read, and which have not. `start`: of the span that follows."""

    def __init__(self, running: "Running", kind: str, ids: np.ndarray, start: int):
        self.running, self.kind, self.start, self.read = running, kind, start, 0
        self.ids, self.span_positions = ids.tolist(), running.grammar.span_positions(ids).tolist()

    def take_unread(self) -> tuple[list[int], list[int]]:
        """Its unread ids with their span_positions, which count as read from now on."""
        unread = self.ids, self.span_positions
        self.read += len(self.ids)
        self.ids, self.span_positions = [], []
        return unread


class Running:
    """A request on its way."""

    def __init__(self, grammar: Grammar, request: Request, settings: dict[str, SamplingParams], longest: int):
        self.grammar, self.request, self.settings = grammar, request, settings | request.settings
        self.prompt = np.asarray(request.prompt)
        self.state = self._begin(longest)
        self.new: list[int] = []
        self.reported = 0
        #: What its random numbers come from.
        self.key = (request.seed, request.row, zlib.crc32(self.prompt.astype("<i8").tobytes()))
        self.randoms = np.random.default_rng(self.key).random(self.state.left or 0)
        self.slots = [Slot(self, "own", self.prompt, 0)]
        self._force()

    def _begin(self, longest: int) -> Row:
        """The state after the prompt; errors: `UserError` where it and what is wanted are longer than the decoder takes."""
        request, room = self.request, longest - len(self.prompt)
        known = self.grammar.follow(self.prompt, complete=False)
        try:
            state = known.copy_for(min(request.max_new_tokens, room), request.plan)
        except UserError as error:
            if room >= request.max_new_tokens:
                raise
            raise UserError(f"a prompt of {len(self.prompt)} ids: the decoder takes {longest} in all; {error}") from None
        state.bound()
        after = (state.left or 0) + state.into
        guided = any(each.guided for each in self.settings.values())
        for name, ids in (("negative prompt", request.negative_prompt), ("prompt's images and audio", request.media)):
            if guided and ids is not None and len(ids) + after > longest:
                less = "shorten it" if state.left == state.least else "shorten it, or lower max_new_tokens"
                raise UserError(f"the {name}: {len(ids)} ids and up to {after} after them, the decoder takes {longest}; {less}")
        return state

    def take(self, ids: list[int]) -> None:
        """Advance by ids that were drawn, and by all after them that have no choice."""
        place = self.state.take(ids)
        self.new += ids
        for slot in self.slots:
            slot.ids, slot.span_positions = ids[-1:], [place]
        self._force()

    def _force(self) -> None:
        while (id := self.state.forced()) is not None:
            place = self.state.advance(id)
            self.new.append(id)
            for slot in self.slots:
                slot.ids.append(id)
                slot.span_positions.append(place)

    @property
    def done(self) -> bool:
        """Whether nothing comes any more."""
        return self.state.state == "done"

    @property
    def params(self) -> SamplingParams:
        """The settings of what comes next: those of the span that we are in, else of the plan's next, else of the bare span."""
        coming = self.state.plan[0].modality if self.state.plan else self.grammar.vocab.bare
        return self.settings.get(self.state.modality or coming or "", SamplingParams())

    def guidance_prompts(self) -> dict[str, np.ndarray | None]:
        """What stands before the span in the slots that guidance needs now, by their kind; None is bos alone."""
        if not self.params.guides(self.state.count):
            return {}
        none = {"none": self.request.negative_prompt}
        return none if self.params.media_guidance_scale is None else {"media": self.request.media} | none

    def stretch(self, most: int) -> list[Intervals]:
        """The legal sets of the next ids that need not be read in between, while guidance is as it is now."""
        params, count = self.params, self.state.count
        sets = self.state.ahead(most)
        if params.guided:
            now = params.guides(count)
            changes = (i for i in range(1, len(sets)) if params.guides(count + i) != now)
            sets = sets[: next(changes, len(sets))]
        return sets
