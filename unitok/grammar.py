"""What may come next: one state machine for each row, driven by the span declarations of the vocabulary.

Used four ways: sampling (what may be drawn), data validation (`check`), training (`targets`: the loss is over legal ids only) and
budgets (nothing is opened that the remaining length cannot close). A legal set is a tuple of half-open intervals of ids, small and
hashable. A row is free (any legal document) or follows a plan, a list of `PlanItem`s. The machine accepts exactly what `Vocab.encode`
gives: `encode(decode(ids)) == ids`. Which level comes where in a span, its layout knows (`unitok.layouts`).
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from unitok.document import ROLES
from unitok.errors import UserError
from unitok.intervals import Intervals, holds, join_intervals, size_of
from unitok.vocab import Span, Vocab


@dataclass(frozen=True)
class PlanItem:
    """One item of a plan: a modality, and how long: the grid's sides, or a number of repetitions, or free."""

    modality: str
    grid: tuple[int, ...] = ()
    repeats: int | None = None


def parse_plan(text: str, vocab: Vocab, rates: Mapping[str, float] | None = None) -> list[PlanItem] | None:
    """`free` -> None; `text,image:8x12,audio:2s` -> Wants. `rates`, frames per second by modality, turn seconds into frames.
    Errors: `UserError` that shows the form."""
    if text.strip() == "free":
        return None
    items = []
    for item in text.split(","):
        modality, _, length = item.strip().partition(":")
        modality = vocab.instance(modality)
        span, rate = vocab.span(modality), (rates or {}).get(modality)
        if not length:
            items.append(PlanItem(modality))
        elif span.header and re.fullmatch("x".join([r"[1-9]\d*"] * len(span.header)), length):
            grid = tuple(int(side) for side in length.split("x"))
            most = min(vocab.range(name).size for name in span.header)
            if max(grid) > most:
                raise UserError(f"modalities {item!r}: no side may be over {most} codes")
            items.append(PlanItem(modality, grid))
        elif rate and not span.header and re.fullmatch(r"\d+(\.\d+)?s", length):
            items.append(PlanItem(modality, repeats=max(1, round(float(length[:-1]) * rate))))
        elif not span.header and re.fullmatch(r"[1-9]\d*", length):
            items.append(PlanItem(modality, repeats=int(length)))
        else:
            raise UserError(f"modalities {item!r}: write free, or a plan such as text,image:8x12,audio:2s")
    for before, after in zip(items, items[1:], strict=False):
        if before.modality == after.modality == vocab.bare:
            raise UserError(f"modalities {text!r}: two {after.modality}s in a row are one; write it once")
    return items


class Row:
    """The state of one row: `allowed()` gives the legal set, `advance(id)` takes one of it. `left` is how many ids may still come,
    the closing eos included; None is no budget."""

    def __init__(self, grammar: "Grammar", left: int | None = None, plan: list[PlanItem] | None = None):
        self.grammar, self.vocab = grammar, grammar.vocab
        self.role = 0  # index in ROLES
        self.state = "start"  # start (after bos), told (after a role), open (between spans), in (inside one), done
        self.span: Span | None = None  # the one we are in
        self.sides: list[int] = []  # header values read
        self.count = 0  # ids of the body so far
        self.frames: int | None = None  # of the body, once its codes tell
        self._bind(left, plan)

    def _bind(self, left: int | None, plan: list[PlanItem] | None) -> None:
        self.left, self.plan = left, None if plan is None else list(plan)
        if self.plan == []:
            self.state = "done"
        if left is not None and left < self.least:
            raise UserError(f"a budget of {left} ids is too small: at least {self.least} are needed; raise max_new_tokens")

    def copy(self) -> "Row":
        """The same, to go on with apart."""
        row = copy.copy(self)
        row.sides, row.plan = list(self.sides), None if self.plan is None else list(self.plan)
        return row

    def copy_for(self, left: int | None, plan: list[PlanItem] | None) -> "Row":
        """The same place in the sequence, with another budget and plan from here on. Text that stands here is taken as finished;
        a begun image or sound is what a plan of that modality begins with, and is finished first before any other."""
        row = self.copy()
        if row.span and not row.span.begin:
            row.state, row.span, row.count = "open", None, 0
        elif row.span and row.units and row.count > row.span.order.prefix(row.units):
            row.frames = row.units  # its codes say so, too
        row._bind(left, plan if plan is None or row.span is None else row._plan_begun(row.span, plan))
        return row

    def _plan_begun(self, span: Span, plan: list[PlanItem]) -> list[PlanItem]:
        """A plan with the begun span first; errors: `UserError` where the plan wants it otherwise than it was begun."""
        if not plan or plan[0].modality != span.modality:
            plan = [PlanItem(span.modality), *plan]
        item, there = plan[0], self.frames or span.order.fewest(self.count)
        if item.grid and tuple(self.sides) != item.grid[: len(self.sides)]:
            wanted, begun = ("x".join(map(str, sides)) for sides in (item.grid, self.sides))
            raise UserError(f"the plan wants {wanted} codes, the {span.modality} was begun with {begun}")
        if item.repeats and (item.repeats != there if self.frames else item.repeats < there):
            raise UserError(f"the plan wants {item.repeats} frames of {span.modality}, {there} are there already; change it")
        return plan

    # ---- Where we are --------------------------------------------------------------------------------------------

    @property
    def modality(self) -> str | None:
        """Of the span that we are in, or None between spans."""
        return self.span.modality if self.span else None

    @property
    def into(self) -> int:
        """Ids of the span that we are in, so far."""
        return bool(self.span.begin) + len(self.sides) + self.count if self.span else 0

    @property
    def place(self) -> int:
        """The same in an image or sound, as `Grammar.span_positions` says of the last id; 0 in text and between spans."""
        return self.into if self.span and self.span.begin else 0

    @property
    def units(self) -> int | None:
        """Frames, or cells of the grid, of the span that we are in; None where that is open, and between spans."""
        if self.span is None or len(self.sides) < len(self.span.header):
            return None
        return prod(self.sides) if self.sides else self._next_item().repeats or self.frames

    @property
    def total(self) -> int | None:
        """Ids of the body of the span that we are in; None where that is open, and between spans."""
        return None if self.span is None or self.units is None else self.span.order.length(self.units)

    # ---- Costs: the least number of ids to a legal end -----------------------------------------------------------

    @property
    def least(self) -> int:
        """Ids from here to the end, at least."""
        if self.state == "done":
            return 0
        if self.span:
            return self._span_left(self.span) + self._after()
        if self.plan is None:
            return (0 if self.state == "open" else self.grammar.least_span) + 1  # content where it is due, and eos
        return sum(self.grammar.cost(item) for item in self.plan) + 1

    def _after(self) -> int:
        """Ids after the span that we are in or that comes, at least: the rest of the plan, and eos."""
        return 1 + sum(self.grammar.cost(item) for item in (self.plan or [])[1:])

    def _span_left(self, span: Span) -> int:
        """Ids to the end of the span that we are in, at least."""
        missing = len(span.header) - len(self.sides)
        units = prod(self._next_item().grid or (*self.sides, *[1] * missing)) if span.header else self.units
        return missing + span.order.least(self.count, units) + bool(span.end)

    def _next_item(self) -> PlanItem:
        return self.plan[0] if self.plan else PlanItem("")

    # ---- The legal set -------------------------------------------------------------------------------------------

    def allowed(self) -> Intervals:
        """Which ids may come next; (pad,) alone once the row is done."""
        if self.state == "done":
            return ((self.vocab.pad, self.vocab.pad + 1),)
        return join_intervals(self._allowed_inside(self.span) if self.span else self._allowed_open())

    def _allowed_open(self) -> list[tuple[int, int]]:
        """Between spans."""
        ids: list[tuple[int, int]] = []
        for item in self.grammar.free if self.plan is None else self.plan[:1]:
            if self.left is None or self.grammar.cost(item) + self._after() <= self.left:
                ids += self.grammar.openings[item.modality]
        if self.plan is None and self.state != "told" and (self.left is None or self.grammar.least_span + 2 <= self.left):
            ids += [(id, id + 1) for i, id in enumerate(self.vocab.roles) if i != self.role]
        if self.plan is None and self.state == "open":
            ids.append((self.vocab.eos, self.vocab.eos + 1))
        return ids

    def _allowed_inside(self, span: Span) -> list[tuple[int, int]]:
        if len(self.sides) < len(span.header):
            return self._allowed_side(span)
        ids: list[tuple[int, int]] = []
        units = self.units
        for level, known in span.order.choices(self.count, units).items():
            whole = 1 + span.order.least(self.count + 1, known) + bool(span.end)
            if self.left is None or whole + self._after() <= self.left:
                ids += self.grammar.bodies[span.modality][level]
        if span.order.least(self.count, units) == 0:
            ids += self._allowed_leaving(span)
        return ids

    def _allowed_side(self, span: Span) -> list[tuple[int, int]]:
        number, grid = len(self.sides), self._next_item().grid
        r = self.vocab.range(span.header[number])
        least, most = (grid[number], grid[number]) if grid else (1, r.size)
        if self.left is not None:
            fixed = len(span.header) - number + bool(span.end) + self._after()
            most = min(most, (self.left - fixed) // span.order.length(prod(self.sides)))
        return list(r.interval(least, most))

    def _allowed_leaving(self, span: Span) -> list[tuple[int, int]]:
        """What ends a span whose end may come here: its end id, a bare span what comes after it."""
        if span.end:
            return list(self.grammar.closings[span.modality])
        after = self.copy()
        after._leave()
        return [(self.vocab.eos, self.vocab.eos + 1)] if after.state == "done" else after._allowed_open()

    def forced(self) -> int | None:
        """The one id that may come, or None where there is a choice or nothing comes any more."""
        allowed = self.allowed()
        return allowed[0][0] if self.state != "done" and size_of(allowed) == 1 else None

    def bound(self) -> None:
        """Where the plan leaves nothing open, let `left` be just what it takes."""
        known = self.plan is not None and all(item.grid or item.repeats for item in self.plan[bool(self.units) :])
        if known and self.left is not None:
            self.left = min(self.left, self.least)

    def ahead(self, most: int) -> list[Intervals]:
        """The legal sets of the next ids, at most `most`: up to and with the first on which what follows depends. In an image of
        known size these are all codes that are left."""
        known = self._known_body(most)
        if not known or self.span is None:
            return [self.allowed()]
        body, order, units = self.grammar.bodies[self.span.modality], self.span.order, self.units
        return [body[level] for i in range(known) for level in order.choices(self.count + i, units)]

    def _known_body(self, most: int) -> int:
        """How many of the next ids are of the body whatever they are, at most `most`."""
        if self.span is None or len(self.sides) < len(self.span.header):
            return 0
        total = self.total
        return min(self.span.order.until_choice(self.count) if total is None else total - self.count, most)

    # ---- Taking ids ----------------------------------------------------------------------------------------------

    def take(self, ids: list[int]) -> int:
        """`advance` by each of some ids, at least one; at once where they are codes of a body that is known."""
        if len(ids) > 1 and self._known_body(len(ids)) == len(ids):
            self.count += len(ids)
            if self.left is not None:
                self.left -= len(ids)
            return self.place
        return [self.advance(id) for id in ids][-1]

    def advance(self, id: int) -> int:
        """Take `id`, which must be in `allowed()`. Returns its place, as `Grammar.span_positions` says."""
        if self.state == "done":
            return 0
        if self.left is not None:
            self.left -= 1
        place = self.place
        self._advance(id)
        return place + 1 if place else self.place

    def _advance(self, id: int) -> None:
        span, units = self.span, self.units
        if span:
            if len(self.sides) < len(span.header):
                self.sides.append(self.vocab.range(span.header[len(self.sides)]).value(id))
                return
            for level, known in span.order.choices(self.count, units).items():
                if holds(self.grammar.bodies[span.modality][level], id):
                    self.count += 1
                    if units is None:
                        self.frames = known
                    return
            self._leave()
            if span.end or self.state == "done":
                return  # else a bare span, ended by what comes now
        if id == self.vocab.eos:
            self.state = "done"
        elif id in self.vocab.roles:
            self.role, self.state = self.vocab.roles.index(id), "told"
        else:
            modality = next(m for m, intervals in self.grammar.openings.items() if holds(intervals, id))
            self.span, self.state, self.sides, self.frames = self.vocab.spans[modality], "in", [], None
            self.count = 0 if self.span.begin else 1

    def _leave(self) -> None:
        self.span, self.state, self.count = None, "open", 0
        if self.plan is not None:
            self.plan.pop(0)
            if not self.plan:
                self.state = "done"


class Grammar:
    """The grammar of a vocabulary; rows start from `row()`."""

    def __init__(self, vocab: Vocab):
        self.vocab = vocab
        #: By modality: the legal ids of each level of its body, what opens a span of it, and what closes it.
        self.bodies = {m: [r.intervals() for r in vocab.body(m)] for m in vocab.spans}
        self.openings = {m: self._special(s.begin) or self.bodies[m][0] for m, s in vocab.spans.items()}
        self.closings = {m: self._special(s.end) for m, s in vocab.spans.items()}
        self.free = [PlanItem(m) for m in vocab.spans]
        self.least_span = min(map(self.cost, self.free), default=0)
        #: By id: the number of the role that it is, of the span that it begins, of the one that it ends; else -1.
        self._roles, self._begins, self._ends = np.full((3, vocab.size), -1)
        self._roles[list(vocab.roles)] = np.arange(len(vocab.roles))
        for number, span in enumerate(vocab.spans.values()):
            for marks, name in ((self._begins, span.begin), (self._ends, span.end)):
                marks[[a for a, _ in self._special(name)]] = number
        self._kinds: dict[Intervals, int] = {}
        self._table = self._compile()

    def _special(self, name: str | None) -> Intervals:
        return ((self.vocab.specials[name], self.vocab.specials[name] + 1),) if name else ()

    def cost(self, item: PlanItem) -> int:
        """Ids of a span, at least."""
        span = self.vocab.span(item.modality)
        units = prod(item.grid) if item.grid else item.repeats or 1
        return bool(span.begin) + len(span.header) + span.order.length(units) + bool(span.end)

    def row(self, left: int | None = None, plan: list[PlanItem] | None = None) -> Row:
        """A row that stands after bos."""
        return Row(self, left, plan)

    def follow(self, ids: np.ndarray, complete: bool = True) -> Row:
        """The state after a document's ids, bos first. `complete`: whether they must end with a final eos. Errors: `UserError` at
        the first id that cannot stand there."""
        row = self.row()
        if len(ids) == 0 or ids[0] != self.vocab.bos:
            raise UserError("position 0: a document begins with <bos>")
        position, known = 1, np.asarray(ids).tolist()
        while position < len(known):
            sets = row.ahead(len(known) - position)
            coming = known[position : position + len(sets)]
            for id, allowed in zip(coming, sets, strict=True):
                if row.state == "done" or not holds(allowed, id):
                    raise UserError(f"position {position}: {self.vocab.name_of(id)} cannot stand here")
                position += 1
            row.take(coming)
        if complete and row.state != "done":
            raise UserError(f"position {len(ids)}: the document ends too early")
        return row

    def check(self, ids: np.ndarray) -> None:
        """Raise `UserError` unless `ids` is a whole, well-formed document."""
        self.follow(ids)

    # ---- Training: the legal set of every target, without a budget -----------------------------------------------

    @property
    def allowed_sets(self) -> list[Intervals]:
        """The legal sets that occur in training; `targets` gives indices into this list."""
        return list(self._kinds)

    def _kind(self, intervals: Intervals) -> int:
        return self._kinds.setdefault(intervals, len(self._kinds))

    def _compile(self) -> np.ndarray:
        """[3 x roles + 2 x modalities, V]: the kind of a target. Axis 0: between spans after bos, after a role and elsewhere, for
        each role; then in each span, where its layout leaves no choice, and where another unit may begin or not."""
        spans, between = list(self.vocab.spans.values()), 3 * len(ROLES)
        table = np.zeros((between + 2 * len(spans), self.vocab.size), np.int16)
        for role in range(len(ROLES)):
            row = Row(self)
            row.role = role
            for number, state in enumerate(("start", "told", "open")):
                row.state = state
                table[3 * role + number] = self._kind(row.allowed())
            for number, span in enumerate(spans if role == 0 else []):  # no role changes what stands in them
                self._compile_span(table[between + 2 * number :], span)
        return table

    def _compile_span(self, table: np.ndarray, span: Span) -> None:
        """Fill a span's two rows. An id that never stands in it gets a kind that does not allow it."""
        if not span.begin:
            return  # bare spans open and go on like anything between spans
        row = Row(self)
        row.span, row.count = span, span.order.prefix(1)
        table[:2] = self._kind(self.closings[span.modality])
        header = [self.vocab.range(name).intervals() for name in span.header]
        filled = [(table[:2], intervals) for intervals in (*header, *self.bodies[span.modality])]
        for rows, intervals in filled if span.header else [*filled, (table[1:2], row.allowed())]:
            for a, b in intervals:
                rows[:, a:b] = self._kind(intervals)

    def targets(self, ids: np.ndarray) -> np.ndarray:
        """A document's ids [L], bos first -> int16 [L - 1]: the kind of each target ids[1:], in one vectorised pass."""
        ids = np.asarray(ids)
        before, after = ids[:-1], ids[1:]
        roles = self._roles[before]
        last = np.maximum.accumulate(np.where(roles >= 0, np.arange(len(before)), 0))
        axis = np.where(before == self.vocab.bos, 0, np.where(roles >= 0, 1, 2)) + 3 * np.maximum(roles[last], 0)
        numbers, span_positions = (x[1:] for x in self._inside(ids))
        for number, span in enumerate(self.vocab.spans.values()):
            here = np.flatnonzero((numbers == number) & (span_positions > 1))  # its begin stands between spans
            counts = span_positions[here] - 2 - len(span.header)
            axis[here] = 3 * len(ROLES) + 2 * number + (span.order.is_choice(counts) if not span.header else 0)
        return self._table[axis, after]

    def _inside(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A document's ids [L] -> int64 [L] each: the number of the image or sound's span, and `span_positions`."""
        index = np.arange(len(ids))
        begin, end = (np.maximum.accumulate(np.where(m[ids] >= 0, index, -1)) for m in (self._begins, self._ends))
        inside = begin > np.concatenate([[-1], end[:-1]])  # the end itself still belongs to its span
        return self._begins[ids[begin]], np.where(inside, index - begin + 1, 0)

    def span_positions(self, ids: np.ndarray) -> np.ndarray:
        """A document's ids [L] -> int64 [L]: how far into its image or sound each stands (its begin is 1), 0 elsewhere."""
        return self._inside(np.asarray(ids))[1]
