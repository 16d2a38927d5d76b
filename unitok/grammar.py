"""What may come next: one state machine for each row, driven by the span declarations of the vocabulary.

Used four ways: sampling (what may be drawn), data validation (`check`), training (`targets`: the legal set of every
target, so that the loss is over legal ids only), and budgets (nothing is opened that the remaining length cannot close).
A legal set is a tuple of half-open intervals of ids; it is small and hashable, so a batch of rows shares few masks.

A row is free (any legal document) or follows a plan, a list of `Want`s. The machine accepts exactly what
`Vocab.encode` gives: whatever it let through, `encode(decode(ids)) == ids`.
"""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from unitok.document import ROLES
from unitok.errors import UserError
from unitok.intervals import Intervals, holds, join_intervals
from unitok.vocab import Span, Vocab


@dataclass(frozen=True)
class Want:
    """One item of a plan: a modality, and how long: the grid's sides, or a number of repetitions, or free."""

    modality: str
    grid: tuple[int, ...] = ()
    repeats: int | None = None


def parse_plan(text: str, vocab: Vocab, rates: Mapping[str, float] | None = None) -> list[Want] | None:
    """`free` -> None; `text,image:8x12,audio:2s` -> Wants; errors: `UserError` that shows the form.

    rates: frames per second, by modality, of those whose length may be said in seconds.
    """
    if text.strip() == "free":
        return None
    wants = []
    for item in text.split(","):
        modality, _, length = item.strip().partition(":")
        span = vocab.span(modality)
        if not length:
            wants.append(Want(modality))
        elif span.header and re.fullmatch("x".join([r"[1-9]\d*"] * len(span.header)), length):
            grid = tuple(int(side) for side in length.split("x"))
            most = min(vocab.range(name).size for name in span.header)
            if max(grid) > most:
                raise UserError(f"want {item!r}: no side may be over {most} codes")
            wants.append(Want(modality, grid))
        elif modality in (rates or {}) and re.fullmatch(r"\d+(\.\d+)?s", length):
            wants.append(Want(modality, repeats=max(1, round(float(length[:-1]) * (rates or {})[modality]))))
        elif not span.header and re.fullmatch(r"[1-9]\d*", length):
            wants.append(Want(modality, repeats=int(length)))
        else:
            raise UserError(f"want {item!r}: write free, or a plan such as text,image:8x12,audio:2s")
    for before, after in zip(wants, wants[1:], strict=False):
        if before.modality == after.modality and not vocab.span(after.modality).begin:
            raise UserError(f"want {text!r}: two {after.modality}s in a row are one; write it once")
    return wants


class Row:
    """The state of one row. `left` is how many ids may still come, the closing eos included.

    `allowed()` gives the legal set, `advance(id)` takes one. With `left=None` there is no budget.
    """

    def __init__(self, grammar: "Grammar", left: int | None = None, plan: list[Want] | None = None):
        self.grammar, self.vocab, self.left = grammar, grammar.vocab, left
        self.plan = None if plan is None else list(plan)
        self.role = 0  # index in ROLES
        self.state = "start"  # start (after bos), told (after a role), open (between spans), in (inside one), done
        self.span: Span | None = None  # the one we are in
        self.sides: list[int] = []  # header values read
        self.count = 0  # ids of the body so far
        self.place = 0  # how far into its image or sound the last id stands, as `Grammar.places` says
        if left is not None and left < self.least:
            raise UserError(f"a budget of {left} ids is too small: the plan needs at least {self.least}")
        if self.plan == []:
            self.state = "done"

    def copy(self) -> "Row":
        """The same, to go on with apart."""
        row = copy.copy(self)
        row.sides, row.plan = list(self.sides), None if self.plan is None else list(self.plan)
        return row

    def copy_for(self, left: int | None, plan: list[Want] | None) -> "Row":
        """The same place in the sequence, with another budget and plan from here on.

        Text that stands here is taken as finished. A begun image or sound is what a plan of that modality begins with; it is
        finished first where the plan begins with something else.
        """
        row = Row(self.grammar)
        row.role, row.state, row.span = self.role, self.state, self.span
        row.sides, row.count, row.place = list(self.sides), self.count, self.place
        row.left, row.plan = left, None if plan is None else list(plan)
        if row.span and not row.span.begin:
            row.state, row.span, row.count = "open", None, 0
        elif row.span and row.plan is not None:
            row._plan_begun(row.span, row.plan)
        if row.plan == []:
            row.state = "done"
        if left is not None and left < row.least:
            raise UserError(f"a budget of {left} ids is too small: at least {row.least} are needed; raise --max-ids")
        return row

    def _plan_begun(self, span: Span, plan: list[Want]) -> None:
        """Put the begun span first; errors: `UserError` where the plan wants it otherwise than it was begun."""
        if not plan or plan[0].modality != span.modality:
            plan.insert(0, Want(span.modality))
        want = plan[0]
        begun = "x".join(str(side) for side in self.sides)
        if want.grid and tuple(self.sides) != want.grid[: len(self.sides)]:
            raise UserError(f"the plan wants {'x'.join(map(str, want.grid))} codes, the {span.modality} was begun with {begun}")
        if want.repeats and self.count > want.repeats * len(span.body):
            so_far = -(-self.count // len(span.body))
            raise UserError(
                f"the plan wants {want.repeats} frames of {span.modality}, {so_far} are there already; ask for more"
            )

    # ---- Costs: the least number of ids to a legal end -----------------------------------------------------------

    def _span_cost(self, want: Want) -> int:
        span = self.vocab.span(want.modality)
        frame = {"begin": bool(span.begin), "header": len(span.header), "end": bool(span.end)}
        repeats = math.prod(want.grid) if want.grid else (want.repeats or 1)
        return sum(frame.values()) + repeats * len(span.body)

    @property
    def least(self) -> int:
        """Ids from here to the end, at least."""
        if self.state == "done":
            return 0
        if self.state == "in" and self.span:
            return self._body_left() + self._after()
        if self.plan is None:
            return (0 if self.state == "open" else self.grammar.least_span) + 1  # content where it is due, and eos
        return sum(self._span_cost(w) for w in self.plan) + 1

    def _after(self) -> int:
        """After the span that we are in: the rest of the plan, and eos."""
        return 1 + sum(self._span_cost(w) for w in (self.plan or [])[1:])

    def _body_left(self) -> int:
        """Ids to the end of the span that we are in, at least."""
        span = self.span
        assert span is not None
        want, body = self._want(), len(span.body)
        if span.header:
            missing = len(span.header) - len(self.sides)
            sides = want.grid if want.grid else (*self.sides, *[1] * missing)
            return missing + math.prod(sides) * body - self.count + bool(span.end)
        whole = (want.repeats or 1) * body
        return max(whole - self.count, -self.count % body) + bool(span.end)

    def _want(self) -> Want:
        return self.plan[0] if self.plan else Want(self.span.modality if self.span else "")

    # ---- The legal set -------------------------------------------------------------------------------------------

    def allowed(self) -> Intervals:
        """Which ids may come next; (pad,) alone once the row is done."""
        pad = self.vocab.pad
        if self.state == "done":
            return ((pad, pad + 1),)
        if self.state == "in" and self.span:
            return self._allowed_inside()
        return self._allowed_open()

    def _fits(self, cost: int) -> bool:
        return self.left is None or cost <= self.left

    def _allowed_open(self) -> Intervals:
        """Between spans."""
        ids: list[tuple[int, int]] = []
        free = self.plan is None
        items = [Want(m) for m in self.vocab.spans] if self.plan is None else self.plan[:1]
        rest = 1 if free else 1 + sum(self._span_cost(w) for w in (self.plan or [])[1:])
        for want in items:
            if self._fits(self._span_cost(want) + rest):
                ids += self.grammar.openings[want.modality]
        if free and self.state in ("start", "open") and self._fits(self.grammar.least_span + 2):
            roles = self.vocab.roles
            ids += [(id, id + 1) for i, id in enumerate(roles) if i != self.role]
        if free and self.state == "open":
            ids.append((self.vocab.eos, self.vocab.eos + 1))
        return join_intervals(ids)

    def _allowed_inside(self) -> Intervals:
        span, want = self.span, self._want()
        assert span is not None
        if span.header and len(self.sides) < len(span.header):
            return self._allowed_side(span, want)
        body, total = len(span.body), self.total
        if self.count == total and span.end:
            id = self.vocab.specials[span.end]
            return ((id, id + 1),)
        ids: list[tuple[int, int]] = []
        more = total is None or self.count < total
        at_edge = (self.count % body == 0 and self.count > 0 and total is None) or self.count == total
        # At an edge one more repetition must fit whole; inside one it always does, that was seen to at its start.
        if more and (not at_edge or self._fits(body + bool(span.end) + self._after())):
            ids += self.grammar.bodies[span.modality][self.count % body]
        if at_edge:
            ids += self._allowed_leaving(span)
        return join_intervals(ids)

    @property
    def total(self) -> int | None:
        """Ids of the body of the span that we are in; None where that is open, and between spans."""
        span = self.span
        if self.state != "in" or span is None or len(self.sides) < len(span.header):
            return None
        if span.header:
            return math.prod(self.sides) * len(span.body)
        repeats = self._want().repeats
        return repeats * len(span.body) if repeats else None

    def forced(self) -> int | None:
        """The one id that may come, or None where there is a choice or nothing comes any more."""
        allowed = self.allowed()
        alone = self.state != "done" and len(allowed) == 1 and allowed[0][1] - allowed[0][0] == 1
        return allowed[0][0] if alone else None

    def bound(self) -> None:
        """Where the plan leaves nothing open, let `left` be just what it takes."""
        known = self.plan is not None and all(want.grid or want.repeats for want in self.plan[bool(self.total) :])
        if known and self.left is not None:
            self.left = min(self.left, self.least)

    def ahead(self, most: int) -> list[Intervals]:
        """The legal sets of the next ids, at most `most`: up to and with the first on which what follows depends.

        In an image of known size, for one, all codes that are left, whichever will be drawn.
        """
        allowed, known = self.allowed(), self._known_body(most)
        if not known or self.span is None:
            return [allowed]
        sets = self.grammar.sets[self.span.modality]
        return [sets[(self.count + i) % len(sets)] for i in range(known)]

    def _known_body(self, most: int) -> int:
        """How many of the next ids are of the body whatever they are, at most `most`."""
        span = self.span
        if self.state != "in" or span is None or (span.header and len(self.sides) < len(span.header)):
            return 0
        total = self.total
        if total is not None:
            return min(total - self.count, most)
        if self.count % len(span.body):  # within a frame
            return min(-self.count % len(span.body), most)
        return 0

    def _allowed_side(self, span: Span, want: Want) -> Intervals:
        number = len(self.sides)
        r = self.vocab.range(span.header[number])
        if want.grid:
            return ((r.offset + want.grid[number] - 1, r.offset + want.grid[number]),)
        most = r.size
        if self.left is not None:
            fixed = (len(span.header) - number) + bool(span.end) + self._after()
            most = min(most, (self.left - fixed) // (math.prod(self.sides) * len(span.body)))
        return ((r.offset, r.offset + most),)

    def _allowed_leaving(self, span: Span) -> list[tuple[int, int]]:
        """What ends a span whose end may come here."""
        if span.end:
            id = self.vocab.specials[span.end]
            return [(id, id + 1)]
        # A bare span ends by what follows it: the next item of the plan, or anything when free.
        if self.plan is None:
            after = Row(self.grammar)
            after.state, after.role, after.left = "open", self.role, self.left
            return [i for i in after.allowed() if i not in self.grammar.bodies[span.modality][0]]
        if len(self.plan) > 1:
            return list(self.grammar.openings[self.plan[1].modality])
        return [(self.vocab.eos, self.vocab.eos + 1)]

    # ---- Taking ids ----------------------------------------------------------------------------------------------

    def take(self, ids: list[int]) -> None:
        """`advance` by each of some ids; at once where they are codes of a body that is known."""
        if len(ids) > 1 and self._known_body(len(ids)) == len(ids):
            self.count += len(ids)
            self.place += len(ids) if self.span and self.span.begin else 0
            if self.left is not None:
                self.left -= len(ids)
            return
        for id in ids:
            self.advance(id)

    def advance(self, id: int) -> None:
        """Take `id`, which must be in `allowed()`."""
        if self.state == "done":
            return
        inside = self.span is not None and self.span.begin is not None
        self._advance(id)
        if inside:
            self.place += 1  # its end, too, belongs to a span
        else:
            self.place = int(self.span is not None and self.span.begin is not None)

    def _advance(self, id: int) -> None:
        vocab = self.vocab
        if self.left is not None:
            self.left -= 1
        if self.state == "in" and self.span:
            span = self.span
            if span.header and len(self.sides) < len(span.header):
                self.sides.append(id - vocab.range(span.header[len(self.sides)]).offset + 1)
                return
            if span.end and id == vocab.specials[span.end]:
                self._leave()
                return
            if holds(self.grammar.bodies[span.modality][self.count % len(span.body)], id):
                self.count += 1
                return
            self._leave()  # a bare span, ended by what comes now
            if self.state == "done":
                return
        if id == vocab.eos:
            self.state = "done"
        elif id in vocab.roles:
            self.role, self.state = vocab.roles.index(id), "told"
        else:
            self._enter(id)

    def _enter(self, id: int) -> None:
        for modality, intervals in self.grammar.openings.items():
            if holds(intervals, id):
                self.span, self.state, self.sides = self.vocab.spans[modality], "in", []
                self.count = 0 if self.span.begin else 1
                return
        raise AssertionError(f"id {id} ({self.vocab.name_of(id)}) opens nothing")

    def _leave(self) -> None:
        self.span, self.state, self.count = None, "open", 0
        if self.plan is not None:
            self.plan.pop(0)
            if not self.plan:
                self.state = "done"

    @property
    def modality(self) -> str | None:
        """Of the span that we are in, or None between spans."""
        return self.span.modality if self.span else None

    @property
    def into(self) -> int:
        """Ids of the span that we are in, so far."""
        if self.span is None:
            return 0
        return self.place if self.span.begin else self.count


class Grammar:
    """The grammar of a vocabulary; rows start from `row()`."""

    def __init__(self, vocab: Vocab):
        self.vocab = vocab
        #: By modality: the legal ids of each place of its repeating body, also as legal sets; and what opens a span of it.
        self.bodies = {m: [list(r.intervals()) for r in vocab.body(m)] for m in vocab.spans}
        self.sets = {m: [join_intervals(intervals) for intervals in body] for m, body in self.bodies.items()}
        self.openings = {
            m: [(vocab.specials[s.begin], vocab.specials[s.begin] + 1)] if s.begin else self.bodies[m][0]
            for m, s in vocab.spans.items()
        }
        #: Ids of the shortest span that there is.
        self.least_span = min(
            (bool(s.begin) + len(s.header) + len(s.body) + bool(s.end) for s in vocab.spans.values()), default=0
        )
        self._kinds: dict[Intervals, int] = {}
        self._table = self._compile()

    def row(self, left: int | None = None, plan: list[Want] | None = None) -> Row:
        """A row that stands after bos."""
        return Row(self, left, plan)

    def follow(self, ids: np.ndarray, complete: bool = True) -> Row:
        """The state after a document's ids, bos first; errors: `UserError` at the first id that cannot stand there.

        `complete`: whether the ids must end with a whole document (a final eos).
        """
        row = self.row()
        if len(ids) == 0 or ids[0] != self.vocab.bos:
            raise UserError("position 0: a document begins with <bos>")
        for position, id in enumerate(ids[1:].tolist(), 1):
            if row.state == "done" or not holds(row.allowed(), id):
                raise UserError(f"position {position}: {self.vocab.name_of(id)} cannot stand here")
            row.advance(id)
        if complete and row.state != "done":
            raise UserError(f"position {len(ids)}: the document ends too early")
        return row

    def check(self, ids: np.ndarray) -> None:
        """Raise `UserError` unless `ids` is a whole, well-formed document."""
        self.follow(ids)

    # ---- Training: the legal set of every target, without a budget -----------------------------------------------

    @property
    def kinds(self) -> list[Intervals]:
        """The legal sets that occur in training; `targets` gives indices into this list."""
        return list(self._kinds)

    def _kind(self, intervals: Intervals) -> int:
        return self._kinds.setdefault(intervals, len(self._kinds))

    def _compile(self) -> np.ndarray:
        """[3 + modalities + 1 edges, roles, V]: the kind of a target, by what came before it.

        Axis 0: 0 after bos, 1 after a role, 2 elsewhere, 3+ right after the begin id of modality m (whose first
        repetition cannot yet end). Targets in a body or header have the same kind wherever they stand.
        """
        vocab = self.vocab
        table = np.zeros((3 + len(vocab.spans), len(ROLES), vocab.size), np.int16)
        for role in range(len(ROLES)):
            row = Row(self)
            row.role = role
            for axis, state in enumerate(("start", "told", "open")):
                row.state = state
                table[axis, role, :] = self._kind(row.allowed())
            for m, (modality, span) in enumerate(vocab.spans.items()):
                for axis in (0, 1, 2, 3 + m):
                    self._compile_span(table[axis, role], row, modality, span, first=axis == 3 + m)
        return table

    def _compile_span(self, table: np.ndarray, row: Row, modality: str, span: Span, first: bool) -> None:
        if not span.begin:
            return  # bare spans open and go on like anything between spans
        row.state, row.span, row.sides = "in", span, []
        for name in span.header:
            r = self.vocab.range(name)
            table[r.offset : r.stop] = self._kind(row.allowed())
            row.sides.append(1)
        row.sides = [2] * len(span.header)  # a grid in the middle, with codes to come
        for place, intervals in enumerate(self.bodies[modality]):
            row.count = place if first or place else len(span.body)
            if span.header:
                row.count = 1
            kind = self._kind(row.allowed())
            for a, b in intervals:
                table[a:b] = kind
        if span.end:
            row.sides, row.count = [1] * len(span.header), len(span.body)
            table[self.vocab.specials[span.end]] = self._kind(row.allowed())
        row.span, row.state, row.count = None, "open", 0

    def targets(self, ids: np.ndarray) -> np.ndarray:
        """A document's ids [L], bos first -> int16 [L - 1]: the kind of each target ids[1:], in one vectorised pass."""
        vocab = self.vocab
        before, after = np.asarray(ids[:-1]), np.asarray(ids[1:])
        axis = np.full(len(before), 2)
        axis[before == vocab.bos] = 0
        role = np.zeros(len(before), np.int64)
        roles = np.isin(before, vocab.roles)
        if roles.any():
            axis[roles] = 1
            where = np.maximum.accumulate(np.where(roles, np.arange(len(before)), -1))
            index = {id: i for i, id in enumerate(vocab.roles)}
            role = np.array([index[int(before[w])] if w >= 0 else 0 for w in where])
        for m, span in enumerate(vocab.spans.values()):
            if span.begin:
                axis[before == vocab.specials[span.begin]] = 3 + m
        return self._table[axis, role, after]

    def places(self, ids: np.ndarray) -> np.ndarray:
        """A document's ids [L] -> int64 [L]: how far into its image or sound each stands (its begin is 1), 0 elsewhere."""
        ids = np.asarray(ids)
        specials, spans = self.vocab.specials, [s for s in self.vocab.spans.values() if s.begin]
        index = np.arange(len(ids))
        begins = np.isin(ids, [specials[s.begin] for s in spans if s.begin])
        ends = np.isin(ids, [specials[s.end] for s in spans if s.end])
        begin = np.maximum.accumulate(np.where(begins, index, -1))
        end = np.maximum.accumulate(np.where(ends, index, -1))
        end_before = np.concatenate([[-1], end[:-1]])  # the end itself still belongs to its span
        return np.where(begin > end_before, index - begin + 1, 0)
