"""Which tokens may come next where holes are filled: the state machine for the second part of a document with holes (`unitok.holes`)."""

import copy

import numpy as np

from unitok.errors import UserError
from unitok.grammar import Grammar, Row
from unitok.holes import Hole, find_holes
from unitok.intervals import Intervals, holds, join_intervals
from unitok.plan import PlanItem


class FillRow(Row):
    """The state of a document with holes after its first part and some tokens of the second.

    holes: of the first part. left: how many tokens may still come, the final eos included; None for no limit.
    """

    def __init__(self, grammar: Grammar, holes: list[Hole], left: int | None = None):
        self.holes, self.number = holes, -1  # of the hole that is being filled
        self._taken = 0
        super().__init__(grammar)
        self.state, self.left = "open", left

    @property
    def hole(self) -> Hole | None:
        """The hole that is being filled; None before the first one."""
        return self.holes[self.number] if 0 <= self.number < len(self.holes) else None

    def copy(self) -> "FillRow":
        return copy.copy(self)

    def copy_for(self, left: int | None, plan: list[PlanItem] | None, turn: bool = False) -> "FillRow":
        """Return a copy with another budget. Errors: `UserError` where the holes need more, and for a plan, which holes do not have."""
        row = self.copy()
        row.left = left
        if plan is not None or turn:
            raise UserError("holes are filled without a plan: leave out modalities")
        if left is not None and left < row.least:
            raise UserError(
                f"a budget of {left} tokens is too small: the holes need at least {row.least}; raise max_new_tokens"
            )
        return row

    @property
    def into(self) -> int:
        """Number of tokens of the second part so far."""
        return self._taken

    @property
    def total(self) -> int | None:
        """Codes of the hole; None for text."""
        return None if self.hole is None or self.hole.levels is None else len(self.hole.levels)

    @property
    def modality(self) -> str | None:
        """Of the hole."""
        return self.hole.modality if self.hole else None

    @property
    def span_position(self) -> int:
        """The span position of the last token: that before the code that comes next."""
        hole = self.hole
        return 0 if hole is None or self.count >= len(hole.before) else int(hole.before[self.count])

    def next_span_positions(self, count: int) -> np.ndarray:
        """Return the span positions of the next `count` tokens, int64 [count]."""
        out = np.zeros(count, np.int64)
        if self.hole is not None:
            known = self.hole.before[self.count + 1 : self.count + 1 + count]
            out[: len(known)] = known
        return out

    @property
    def least(self) -> int:
        """The smallest number of tokens to the end, eos included."""
        if self.state == "done":
            return 0
        hole, here = self.hole, 0
        if hole is not None:
            here = max(0, 1 - self.count) if hole.levels is None else len(hole.levels) - self.count
        return here + sum(1 + (1 if h.levels is None else len(h.levels)) for h in self.holes[self.number + 1 :]) + 1

    def bound(self) -> None:
        """Lower `left` to what the holes take, where none of those to come is text."""
        if self.left is not None and all(h.levels is not None for h in self.holes[max(self.number, 0) :]):
            self.left = min(self.left, self.least)

    def allowed(self) -> Intervals:
        if self.state == "done":
            return ((self.vocab.pad, self.vocab.pad + 1),)
        hole = self.hole
        if hole is not None and hole.levels is not None and self.count < len(hole.levels):
            return self.grammar.bodies[hole.modality][int(hole.levels[self.count])]
        after = self._after_hole()
        if hole is None or hole.levels is not None:
            return after
        text = self.grammar.bodies[hole.modality][0]
        if self.left is not None and self.least + bool(self.count) > self.left:
            return after
        return join_intervals([*text, *(after if self.count else ())])

    def _after_hole(self) -> Intervals:
        """The token that ends the hole: that of the next one, or eos."""
        following = self.number + 1
        id = self.vocab.fills[following] if following < len(self.holes) else self.vocab.eos
        return ((id, id + 1),)

    def ahead(self, most: int) -> list[Intervals]:
        hole = self.hole
        if hole is None or hole.levels is None or self.count >= len(hole.levels):
            return [self.allowed()]
        body = self.grammar.bodies[hole.modality]
        return [body[level] for level in hole.levels[self.count : self.count + most].tolist()]

    def _fixed_steps(self, most: int) -> int:
        hole = self.hole
        return 0 if hole is None or hole.levels is None else min(most, len(hole.levels) - self.count)

    def take(self, ids: list[int]) -> int:
        for id in ids:
            self.advance(id)
        return self.span_position

    def advance(self, id: int) -> int:
        if self.state == "done":
            return 0
        self._taken += 1
        self.left = None if self.left is None else self.left - 1
        if holds(self._after_hole(), id) and self._may_leave():
            self.number, self.count = self.number + 1, 0
            if self.number == len(self.holes):
                self.state = "done"
        else:
            self.count += 1
        return self.span_position

    def _may_leave(self) -> bool:
        hole = self.hole
        return hole is None or (self.count > 0 if hole.levels is None else self.count == len(hole.levels))


def follow_fills(grammar: Grammar, ids: np.ndarray, complete: bool = True) -> FillRow | None:
    """Return the state after the tokens [L] of a document with holes; None for one without.

    complete: whether they must end with eos. Errors: `UserError` with the position of the first token that is not allowed.
    """
    vocab = grammar.vocab
    holes, start = find_holes(vocab, ids)
    if not holes:
        return None
    whole = np.asarray(ids[:start], np.int64).copy()
    for hole in holes:  # any content that may stand there
        levels = [0] if hole.levels is None else hole.levels.tolist()
        whole[hole.positions] = [grammar.bodies[hole.modality][level][0][0] for level in levels]
    grammar.follow(np.append(whole, vocab.eos))
    row = FillRow(grammar, holes)
    for position, id in enumerate(np.asarray(ids[start:]).tolist(), start):
        if row.state == "done" or not holds(row.allowed(), id):
            raise UserError(f"position {position}: {vocab.name_of(id)} cannot stand here")
        row.advance(id)
    if complete and row.state != "done":
        raise UserError(f"position {len(ids)}: the document ends too early")
    return row
