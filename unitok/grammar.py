"""Which tokens may come next in a document: a state machine per sequence, driven by the vocabulary's span declarations.

Sampling draws from the allowed tokens only. Data validation checks documents (`Grammar.check`). Training computes the loss over the allowed
tokens of each position (`Grammar.targets`). Budgets make sure that no span is opened that the remaining length cannot close.

A set of allowed tokens is a tuple of half-open intervals [a, b). A sequence is free (any well-formed document) or follows a plan, a list
of `PlanItem`s. The machine accepts exactly what `Vocab.encode` returns. Levels of codes stand where the layout has them (`unitok.layouts`).
"""

import copy
from math import prod

import numpy as np

from unitok.document import ROLES
from unitok.errors import UserError
from unitok.holes import Hole, find_holes, span_positions_of_fills, split_fills
from unitok.intervals import Intervals, holds, join_intervals, run_of, size_of
from unitok.location import locate_all, located
from unitok.plan import PlanItem
from unitok.ranges import Span
from unitok.vocab import Vocab


class Row:
    """The state of one sequence after some tokens. `allowed()` returns the tokens that may come next, `advance(id)` takes one of them.

    left: how many tokens may still come, the final eos included; None for no limit. plan: the spans to come; None for a free document.
    turn: whether the token of another role ends the sequence, too, and not only eos.
    """

    def __init__(self, grammar: "Grammar", left: int | None = None, plan: list[PlanItem] | None = None, turn: bool = False):
        self.grammar, self.vocab, self.turn = grammar, grammar.vocab, turn
        self.role = 0  # index in ROLES
        self.state = "start"  # start (after bos), role (after a role), open (between spans), in (inside one), done
        self.span: Span | None = None  # the span that the next token belongs to; None between spans
        self.header: list[int] = []  # values that the header has given so far
        self.count = 0  # tokens of the body so far
        self.frames: int | None = None  # of the body, once the codes have fixed their number
        self.unit: list[int] = []  # tokens of the unit that has begun, in spans with floors
        self._bind(left, plan)

    def _bind(self, left: int | None, plan: list[PlanItem] | None) -> None:
        self.left, self.plan = left, None if plan is None else list(plan)
        if self.plan == []:
            self.state = "done"
        if left is not None and left < self.least:
            raise UserError(
                f"a budget of {max(left, 0)} tokens is too small: at least {self.least} are needed; raise max_new_tokens or ask for less"
            )

    def copy(self) -> "Row":
        """Return an independent copy."""
        row = copy.copy(self)
        row.header, row.unit, row.plan = list(self.header), list(self.unit), None if self.plan is None else list(self.plan)
        return row

    def copy_for(self, left: int | None, plan: list[PlanItem] | None, turn: bool = False) -> "Row":
        """Return a copy with another budget, plan and `turn` from here on.

        Text that ends here is finished. An unfinished image or audio is completed first: it is the plan's first item where that has its
        modality, else it comes before the plan. Errors: `UserError` where the plan contradicts what has begun."""
        row = self.copy()
        row.turn = turn
        if row.span and not row.span.begin:
            row.state, row.span, row.count = "open", None, 0
        elif row.span and row.units and row.count > row.span.order.prefix(row.units):
            row.frames = row.units  # the codes have fixed it, too
        row._bind(left, plan if plan is None or row.span is None else row._plan_begun(row.span, plan))
        return row

    def _plan_begun(self, span: Span, plan: list[PlanItem]) -> list[PlanItem]:
        """The plan with the unfinished span first. Errors: `UserError` where the plan gives it another size."""
        if not plan or plan[0].modality != span.modality:
            plan = [PlanItem(span.modality), *plan]
        item, existing = plan[0], self.frames or span.order.fewest(self.count)
        if item.grid and tuple(self.header) != item.grid[: len(self.header)]:
            planned, begun = ("x".join(map(str, values)) for values in (item.grid, self.header))
            raise UserError(f"the plan wants {planned} codes, the {span.modality} was begun with {begun}")
        if item.repeats and (item.repeats != existing if self.frames else item.repeats < existing):
            raise UserError(
                f"the plan wants {item.repeats} frames of {span.modality}, the prompt has {existing}; change the plan"
            )
        return plan

    # ---- Position ------------------------------------------------------------------------------------------------

    @property
    def modality(self) -> str | None:
        """The modality of the current span; None between spans."""
        return self.span.modality if self.span else None

    @property
    def into(self) -> int:
        """Number of tokens of the current span so far; 0 between spans."""
        return bool(self.span.begin) + len(self.header) + self.count if self.span else 0

    @property
    def span_position(self) -> int:
        """Where the last token is in an image or audio, as `Grammar.span_positions` gives it; 0 in text and between spans."""
        return located(self.span, self.into, self.span.sides(self.header)) if self.span and self.span.begin else 0

    def next_span_positions(self, count: int) -> np.ndarray:
        """Return the span positions of the next `count` tokens, as far as they stay in the span; int64 [count]."""
        if self.span is None or not self.span.begin:
            return np.zeros(count, np.int64)
        return located(self.span, self.into + 1 + np.arange(count), self.span.sides(self.header))

    @property
    def units(self) -> int | None:
        """Frames, or cells of the grid, that the current span will have; None where their number is open, and between spans."""
        if self.span is None or len(self.header) < len(self.span.header):
            return None
        return prod(self.span.sides(self.header)) if self.header else self._next_item().repeats or self.frames

    @property
    def total(self) -> int | None:
        """Tokens that the current span's body will have; None where their number is open, and between spans."""
        return None if self.span is None or self.units is None else self.span.order.length(self.units)

    # ---- Costs: the smallest number of tokens to the end of the document -----------------------------------------

    @property
    def least(self) -> int:
        """The smallest number of tokens from here to the end of the document, eos included."""
        if self.state == "done":
            return 0
        if self.span:
            return self._span_left(self.span) + self._after()
        if self.plan is None:
            return (0 if self.state == "open" else self.grammar.least_span) + 1  # a document has a span at least, and eos
        return sum(item.cost(self.vocab) for item in self.plan) + 1

    def _after(self) -> int:
        """The smallest number of tokens after the current or next span: the rest of the plan, and eos."""
        return 1 + sum(item.cost(self.vocab) for item in (self.plan or [])[1:])

    def _span_left(self, span: Span) -> int:
        """The smallest number of tokens to the end of the current span."""
        missing = len(span.header) - len(self.header)
        units = prod(span.sides(self._next_item().grid or (*self.header, *[1] * missing))) if span.header else self.units
        return missing + span.order.least(self.count, units) + bool(span.end)

    def _next_item(self) -> PlanItem:
        return self.plan[0] if self.plan else PlanItem("")

    # ---- Allowed tokens ------------------------------------------------------------------------------------------

    def allowed(self) -> Intervals:
        """Return the tokens that may come next; pad alone once the document is complete."""
        if self.state == "done":
            return ((self.vocab.pad, self.vocab.pad + 1),)
        return join_intervals(self._allowed_inside(self.span) if self.span else self._allowed_open())

    def _allowed_open(self) -> list[tuple[int, int]]:
        """Between spans: tokens that open one, roles, eos."""
        ids: list[tuple[int, int]] = []
        for item in self.grammar.free if self.plan is None else self.plan[:1]:
            if self.left is None or item.cost(self.vocab) + self._after() <= self.left:
                ids += item.opening or self.grammar.openings[item.modality]
        room = self.left is None or self.grammar.least_span + 2 <= self.left
        if self.plan is None and self.state != "role" and room and not self.turn:
            ids += self._other_roles()
        if self.plan is None and self.state == "open":
            ids += self._allowed_last()
        return ids

    def _other_roles(self) -> list[tuple[int, int]]:
        return [(id, id + 1) for i, id in enumerate(self.vocab.roles) if i != self.role]

    def _allowed_last(self) -> list[tuple[int, int]]:
        """Tokens that end the sequence: eos, and of one turn the next role."""
        return [(self.vocab.eos, self.vocab.eos + 1), *(self._other_roles() if self.turn else [])]

    def _allowed_inside(self, span: Span) -> list[tuple[int, int]]:
        if len(self.header) < len(span.header):
            return self._allowed_header(span)
        ids: list[tuple[int, int]] = []
        units = self.units
        for level, known in span.order.choices(self.count, units).items():
            whole = 1 + span.order.least(self.count + 1, known) + bool(span.end)
            if self.left is None or whole + self._after() <= self.left:
                ids += self._codes(span, level)
        if span.order.least(self.count, units) == 0:
            ids += self._allowed_leaving(span)
        return ids

    def _codes(self, span: Span, level: int) -> Intervals:
        """The tokens of a level's codes that are not below their floor; of a given text the next one."""
        if given := self._next_item().given:
            return ((given[self.count], given[self.count] + 1),)
        floor = span.floors[level] if span.floors else level
        body = self.grammar.bodies[span.modality][level]
        return body if floor == level else ((self.unit[floor], body[-1][1]),)

    def _allowed_header(self, span: Span) -> list[tuple[int, int]]:
        number, grid = len(self.header), self._next_item().grid
        r = self.vocab.range(span.header[number])
        least, most = (grid[number], grid[number]) if grid else (1, r.size)
        counts_frames = bool(span.group) and number == span.facts - 1
        if self.left is not None and (counts_frames or number >= span.facts):
            fixed = len(span.header) - number + bool(span.end) + self._after()
            room = (self.left - fixed) // span.order.length(prod(span.sides(self.header)))
            most = min(most, 1 + (room - 1) * span.group if counts_frames else room)
        return list(r.interval(least, most))

    def _allowed_leaving(self, span: Span) -> list[tuple[int, int]]:
        """Tokens that end the current span, where it may end: its end token; for bare text, whatever may follow it."""
        if span.end:
            return list(self.grammar.closings[span.modality])
        after = self.copy()
        after._leave()
        return self._allowed_last() if after.state == "done" else after._allowed_open()

    def forced(self) -> int | None:
        """Return the only token that may come; None where there is a choice, or where the document is complete."""
        allowed = self.allowed()
        return allowed[0][0] if self.state != "done" and size_of(allowed) == 1 else None

    def bound(self) -> None:
        """Lower `left` to what the plan takes, where the plan fixes the size of every span."""
        known = self.plan is not None and all(item.grid or item.repeats for item in self.plan[bool(self.units) :])
        if known and self.left is not None:
            self.left = min(self.left, self.least)

    def ahead(self, most: int) -> list[Intervals]:
        """Return the allowed sets of the next steps, at least one and at most `most`, that do not depend on what is sampled in between.

        So these steps can run without a look at the sampled tokens. In an image of known size they are all of its remaining codes.
        """
        known = self._fixed_steps(most)
        if not known or self.span is None:
            return [self.allowed()]
        body, order, units = self.grammar.bodies[self.span.modality], self.span.order, self.units
        return [body[level] for i in range(known) for level in order.choices(self.count + i, units)]

    def _fixed_steps(self, most: int) -> int:
        """How many of the next tokens, at most `most`, are codes of the body at levels that are known already."""
        if self.span is None or self.span.floors or self._next_item().given or len(self.header) < len(self.span.header):
            return 0
        total = self.total
        return min(self.span.order.until_choice(self.count) if total is None else total - self.count, most)

    # ---- Taking tokens -------------------------------------------------------------------------------------------

    def take(self, ids: list[int]) -> int:
        """Take several tokens, at least one, as `advance` does; return the last one's span position."""
        if len(ids) > 1 and self._fixed_steps(len(ids)) == len(ids):
            self.count += len(ids)
            if self.left is not None:
                self.left -= len(ids)
            return self.span_position
        return [self.advance(id) for id in ids][-1]

    def advance(self, id: int) -> int:
        """Take the token `id`, which must be in `allowed()`; return its span position, as `Grammar.span_positions` gives it."""
        if self.state == "done":
            return 0
        if self.left is not None:
            self.left -= 1
        span, header, position = self.span, self.header, self.into + 1
        self._advance(id)
        return located(span, position, span.sides(header)) if span and span.begin else self.span_position

    def _advance(self, id: int) -> None:
        span, units = self.span, self.units
        if span:
            if len(self.header) < len(span.header):
                self.header.append(self.vocab.range(span.header[len(self.header)]).value(id))
                return
            for level, known in span.order.choices(self.count, units).items():
                if holds(self.grammar.bodies[span.modality][level], id):
                    self.count += 1
                    if span.floors:
                        self.unit = [*self.unit, id] if self.count % len(span.floors) else []
                    if units is None:
                        self.frames = known
                    return
            self._leave()
            if span.end or self.state == "done":
                return  # else `id` does not belong to the bare span that it ends
        if id == self.vocab.eos or (self.turn and id in self.vocab.roles):
            self.state = "done"
        elif id in self.vocab.roles:
            self.role, self.state = self.vocab.roles.index(id), "role"
        else:
            modality = next(m for m, intervals in self.grammar.openings.items() if holds(intervals, id))
            self.span, self.state, self.header, self.frames, self.unit = self.vocab.spans[modality], "in", [], None, []
            self.count = 0 if self.span.begin else 1

    def _leave(self) -> None:
        self.span, self.state, self.count = None, "open", 0
        if self.plan is not None:
            self.plan.pop(0)
            if not self.plan:
                self.state = "done"


class Grammar:
    """The grammar of a vocabulary. `row()` starts a sequence."""

    def __init__(self, vocab: Vocab):
        self.vocab = vocab
        #: By modality: the allowed tokens of each level of its body, those that open a span of it, and those that close it.
        self.bodies = {m: [r.intervals() for r in vocab.body(m)] for m in vocab.spans}
        self.openings = {m: self._special(s.begin) or self.bodies[m][0] for m, s in vocab.spans.items()}
        self.closings = {m: self._special(s.end) for m, s in vocab.spans.items()}
        self.free = [PlanItem(m) for m in vocab.spans]
        self.least_span = min((item.cost(vocab) for item in self.free), default=0)
        fills = tuple((id, id + 1) for id in vocab.fills)
        text = self.bodies[vocab.bare][0] if vocab.bare else ()
        #: What may stand where a hole begins or ends, and in a hole in text.
        self.between_fills = join_intervals([*fills, (vocab.eos, vocab.eos + 1)]) if fills else ()
        self.text_fills = join_intervals([*self.between_fills, *text]) if fills else ()
        #: By token: the index of the role that it is, of the span that it begins, of the span that it ends; -1 elsewhere.
        self._roles, self._begins, self._ends = np.full((3, vocab.size), -1)
        self._roles[list(vocab.roles)] = np.arange(len(vocab.roles))
        for number, span in enumerate(vocab.spans.values()):
            for marks, name in ((self._begins, span.begin), (self._ends, span.end)):
                marks[[a for a, _ in self._special(name)]] = number
        self._index: dict[Intervals, int] = {}  # of each allowed set in `allowed_sets`
        self._table = self._compile()
        for intervals in filter(None, (self.between_fills, self.text_fills)):
            self._index_of(intervals)

    def _special(self, name: str | None) -> Intervals:
        return ((self.vocab.specials[name], self.vocab.specials[name] + 1),) if name else ()

    def row(self, left: int | None = None, plan: list[PlanItem] | None = None) -> Row:
        """Return the state after bos; `left` and `plan` as for `Row`."""
        return Row(self, left, plan)

    def follow(self, ids: np.ndarray, complete: bool = True) -> Row:
        """Return the state after the tokens of a document [L], bos first.

        complete: whether they must end with eos. Errors: `UserError` with the position of the first token that is not allowed.
        """
        row = self.row()
        if len(ids) == 0 or ids[0] != self.vocab.bos:
            raise UserError("position 0: a document begins with <bos>")
        position, given = 1, np.asarray(ids).tolist()
        while position < len(given):
            if row.span and not row.span.begin and (run := run_of(self.bodies[row.span.modality][0], given, position)):
                row.count, position = row.count + run, position + run  # bare text
                continue
            sets = row.ahead(len(given) - position)
            coming = given[position : position + len(sets)]
            for id, allowed in zip(coming, sets, strict=True):
                if row.state == "done" or not holds(allowed, id):
                    raise UserError(f"position {position}: {self.vocab.name_of(id)} cannot stand here")
                position += 1
            row.take(coming)
        if complete and row.state != "done":
            raise UserError(f"position {len(ids)}: the document ends too early")
        return row

    def check(self, ids: np.ndarray) -> None:
        """Raise `UserError` unless the tokens [L] are a complete, well-formed document."""
        self.follow(ids)

    # ---- Training: the allowed set of every target, without a budget ---------------------------------------------

    @property
    def allowed_sets(self) -> list[Intervals]:
        """The sets of allowed tokens that occur in training; `targets` returns indices into this list."""
        return list(self._index)

    def _index_of(self, intervals: Intervals) -> int:
        return self._index.setdefault(intervals, len(self._index))

    def _compile(self) -> np.ndarray:
        """int16 [3 x roles + 2 x modalities, V]: the mask index of a target, by where it stands and by which token it is.

        Rows 0 to 3 x roles - 1: between spans; for each role after bos, after a role, elsewhere. Then two rows per modality: inside its
        span where the layout leaves no choice, and where another unit may begin or the span may end.
        """
        spans, between = list(self.vocab.spans.values()), 3 * len(ROLES)
        table = np.zeros((between + 2 * len(spans), self.vocab.size), np.int16)
        for role in range(len(ROLES)):
            row = Row(self)
            row.role = role
            for number, state in enumerate(("start", "role", "open")):
                row.state = state
                table[3 * role + number] = self._index_of(row.allowed())
            for number, span in enumerate(spans if role == 0 else []):  # roles do not matter inside spans
                self._compile_span(table[between + 2 * number :], span)
        return table

    def _compile_span(self, table: np.ndarray, span: Span) -> None:
        """Fill the two rows of a span. A token that cannot stand in it gets the index of a set without it."""
        if not span.begin:
            return  # tokens of bare spans are read like those between spans
        row = Row(self)
        row.span, row.count = span, span.order.prefix(1)
        table[:2] = self._index_of(self.closings[span.modality])
        header = (self.vocab.range(name).intervals() for name in span.header)
        filled = [(table[:2], intervals) for intervals in (*header, *self.bodies[span.modality])]
        for rows, intervals in filled if span.header else [*filled, (table[1:2], row.allowed())]:
            for a, b in intervals:
                rows[:, a:b] = self._index_of(intervals)

    def targets(self, ids: np.ndarray) -> np.ndarray:
        """Return the mask index of each target: for tokens [L] of a document, bos first, int16 [L - 1] into `allowed_sets` for ids[1:]."""
        ids = np.asarray(ids)
        holes, start = find_holes(self.vocab, ids)
        if holes:
            return self._targets_of_fills(ids, holes, start)
        before, after = ids[:-1], ids[1:]
        roles = self._roles[before]
        last = np.maximum.accumulate(np.where(roles >= 0, np.arange(len(before)), 0))
        axis = np.where(before == self.vocab.bos, 0, np.where(roles >= 0, 1, 2)) + 3 * np.maximum(roles[last], 0)
        numbers, span_positions = (x[1:] for x in self._inside(ids))
        for number, span in enumerate(self.vocab.spans.values()):
            inside = np.flatnonzero((numbers == number) & (span_positions > 1))  # the begin token stands between spans
            counts = span_positions[inside] - 2 - len(span.header)
            axis[inside] = 3 * len(ROLES) + 2 * number + (span.order.is_choice(counts) if not span.header else 0)
        targets: np.ndarray = self._table[axis, after]
        return targets

    def _inside(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For tokens [L] of a document, int64 [L] each: the index of the modality of the image or audio around it, and `span_positions`."""
        index = np.arange(len(ids))
        begin, end = (np.maximum.accumulate(np.where(m[ids] >= 0, index, -1)) for m in (self._begins, self._ends))
        inside = begin > np.concatenate([[-1], end[:-1]])  # the end token still belongs to its span
        return self._begins[ids[begin]], np.where(inside, index - begin + 1, 0)

    def _targets_of_fills(self, ids: np.ndarray, holes: list[Hole], start: int) -> np.ndarray:
        """`targets` of a document with holes, whose second part begins at `start`."""
        first = np.isin(ids[:start], self.vocab.fills)
        whole = np.append(np.where(first, self.vocab.eos, ids[:start]), self.vocab.eos)  # fill tokens are not learned there
        between, text = self._index_of(self.between_fills), self._index_of(self.text_fills)
        targets = np.full(len(ids), between, np.int16)
        targets[1:start] = np.where(first[1:], between, self.targets(whole)[: start - 1])
        stop = start
        for hole, content in zip(holes, split_fills(self.vocab, ids, start, None), strict=False):
            at, stop = stop + 1, stop + 1 + len(content)
            if hole.levels is None:
                targets[at : stop + 1] = text
            else:
                bodies = self.bodies[hole.modality]
                targets[at:stop] = [self._index_of(bodies[level]) for level in hole.levels[: len(content)].tolist()]
        return targets[1:]

    def span_positions(self, ids: np.ndarray) -> np.ndarray:
        """Return where each token is in its image or audio: for tokens [L] int64 [L], as `unitok.span_positions` says; text and roles are 0.

        Where holes are filled, it is that of the place before the code that comes next."""
        holes, start = find_holes(self.vocab, ids := np.asarray(ids))
        inside = locate_all(self.vocab, ids, *self._inside(ids[:start] if holes else ids))
        return np.concatenate([inside, span_positions_of_fills(self.vocab, ids, holes, start)]) if holes else inside
