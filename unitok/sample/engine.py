"""The next-id loop: batches of rows on one KV cache, each row at its own place in its own plan.

Every row has a state machine (`unitok.grammar.Row`) that says which ids may come; only the rows of the head that some
row may choose are multiplied. Rows of different prompt lengths share one cache that is written by position, without
left padding. With guidance, each row has a twin that reads the unconditional document, bos and the target span: both go
through the model as one doubled batch while some row is inside a guided span, and the twins cost nothing elsewhere.
Random numbers are drawn per row from (seed, row), so a row's output does not depend on how many others there are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unitok.grammar import Grammar, Intervals, Row, Want
from unitok.model.decoder import Decoder
from unitok.sample.sampling import Settings, draw, guide, keep_top_k, keep_top_p


@dataclass
class Request:
    """One row: what it goes on from, and to what end.

    Args:
        prompt: ids, bos first, without a final eos.
        plan: what is wanted, or None for free.
        max_ids: most new ids, the closing eos included.
        seed: with `row`, decides all of its random numbers.
    """

    prompt: np.ndarray
    plan: list[Want] | None
    max_ids: int
    seed: int = 0
    row: int = 0


@dataclass
class _Row:
    """A request on its way."""

    state: Row
    ids: list[int]
    randoms: np.ndarray
    new: int = 0
    twin: int = 0  # position of the last id that the twin has read; 0: bos alone
    place: int = 0  # of the last id in its image or sound; see `Grammar.places`


@torch.inference_mode()
def generate(
    decoder: Decoder,
    grammar: Grammar,
    requests: list[Request],
    settings: dict[str, Settings],
    progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """New ids of each request (without its prompt; a closing eos is kept), always well-formed.

    `settings` by modality; a missing one has the defaults. `progress` is called with the number of new ids a row.
    Errors: `UserError` for a prompt that is no beginning of a document, or a budget too small for its plan.
    """
    rows = []
    for request in requests:
        state = grammar.follow(request.prompt, complete=False)
        state = state.copy_for(request.max_ids, request.plan)
        randoms = np.random.default_rng((request.seed, request.row)).random(request.max_ids)
        rows.append(_Row(state, request.prompt.tolist(), randoms))
    guided = any(s.guidance != 1.0 for s in settings.values())
    longest = max((len(r.ids) + q.max_ids for r, q in zip(rows, requests, strict=True)), default=1)
    loop = _Loop(decoder, grammar, rows, settings, guided, longest)
    loop.prefill()
    step = 0
    while any(r.state.state != "done" for r in rows):
        loop.step()
        step += 1
        if progress:
            progress(step)
    return [np.array(r.ids[len(q.prompt) :], np.int64) for r, q in zip(rows, requests, strict=True)]


class _Loop:
    """The tensors of one batch."""

    def __init__(
        self, decoder: Decoder, grammar: Grammar, rows: list[_Row], settings: dict[str, Settings], guided: bool, longest: int
    ):
        self.decoder, self.grammar, self.rows, self.settings = decoder, grammar, rows, settings
        self.guided, self.count = guided, len(rows)
        self.cache = decoder.new_cache(self.count * (2 if guided else 1), longest + 1)
        self.hidden = torch.zeros(0)
        self.twin_hidden = torch.zeros(0)
        self._masks: dict[tuple[Intervals, Intervals], Tensor] = {}

    def prefill(self) -> None:
        """Read all prompts, padded on the right: what the padding writes is overwritten before it is looked at."""
        device = self.decoder.device
        length = max(len(r.ids) for r in self.rows)
        ids = torch.full((self.count, length), self.grammar.vocab.pad)
        for i, r in enumerate(self.rows):
            ids[i, : len(r.ids)] = torch.tensor(r.ids)
        positions = torch.arange(length).expand(self.count, -1)
        places = torch.zeros_like(ids)
        for i, r in enumerate(self.rows):
            known = torch.from_numpy(self.grammar.places(np.array(r.ids)))
            places[i, : len(r.ids)] = known
            r.place = int(known[-1]) if r.state.span else 0
        hidden = self.decoder.step(ids.to(device), positions.to(device), self.cache, length, places.to(device))
        last = torch.tensor([len(r.ids) - 1 for r in self.rows], device=device)
        self.hidden = hidden[torch.arange(self.count, device=device), last]
        self.twin_hidden = self.hidden
        if self.guided:  # every twin has read bos; the rows read it again, which changes nothing
            bos = torch.full((2 * self.count, 1), self.grammar.vocab.bos, device=device)
            self.bos_hidden = self.decoder.step(bos, torch.zeros_like(bos), self.cache, 1, torch.zeros_like(bos))[
                self.count :, 0
            ]
            self.twin_hidden = self.bos_hidden

    def step(self) -> None:
        """Choose one id for every row, and read it."""
        allowed = [r.state.allowed() for r in self.rows]
        union = _union(allowed)
        weight = torch.cat([self.decoder.lm_head.weight[a:b] for a, b in union])
        names = torch.cat([torch.arange(a, b) for a, b in union])
        mask = torch.stack([self._mask(a, union) for a in allowed]).to(weight.device)
        logits = (self.hidden @ weight.T).float().masked_fill(~mask, -torch.inf)
        how = [self.settings.get(self._modality(r, a), Settings()) for r, a in zip(self.rows, allowed, strict=True)]
        if self.guided and any(h.guidance != 1.0 for h in how):
            unconditional = (self.twin_hidden @ weight.T).float().masked_fill(~mask, -torch.inf)
            logits = guide(logits, unconditional, self._column([h.guidance for h in how])[:, None])
        logits = keep_top_k(logits, torch.tensor([h.top_k for h in how], device=logits.device))
        temperature = self._column([h.temperature for h in how])
        warm = logits / temperature.clamp_min(1e-6)[:, None]
        logits = torch.where(keep_top_p(warm, self._column([h.top_p for h in how])).isinf(), -torch.inf, logits)
        uniform = torch.tensor([r.randoms[min(r.new, len(r.randoms) - 1)] for r in self.rows], dtype=torch.float64)
        chosen = names[draw(logits.cpu(), temperature.cpu(), uniform)].tolist()
        self._take(chosen)

    def _modality(self, row: _Row, allowed: Intervals) -> str:
        """Whose settings hold: the span that the row is in, else that of the plan, else text's."""
        if row.state.modality:
            return row.state.modality
        return row.state.plan[0].modality if row.state.plan else "text"

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.decoder.device)

    def _mask(self, allowed: Intervals, union: Intervals) -> Tensor:
        """bool [number of ids in `union`]: which of them are allowed."""
        key = (allowed, union)
        if key not in self._masks:
            names = torch.cat([torch.arange(a, b) for a, b in union])
            mask = torch.zeros(len(names), dtype=torch.bool)
            for a, b in allowed:
                mask |= (names >= a) & (names < b)
            self._masks[key] = mask
        return self._masks[key]

    def _take(self, chosen: list[int]) -> None:
        """Advance every row by its id and run the model on it."""
        positions, twin_positions, places = [], [], []
        for r, id in zip(self.rows, chosen, strict=True):
            done = r.state.state == "done"
            before = r.state.span
            if not done:
                r.state.advance(id)
                r.ids.append(id)
                r.new += 1
            if before is not None and before.begin:
                r.place += 1  # its end, too, belongs to it
            else:
                r.place = int(r.state.span is not None and r.state.span.begin is not None)
            places.append(r.place)
            if r.state.span is None:
                r.place = 0
            positions.append(len(r.ids) - 1)
            if r.state.span is not before or r.state.span is None:
                r.twin = 0  # a span begins or ends: the twin starts again from bos
            if r.state.span is not None:
                r.twin += 1
            twin_positions.append(r.twin)
        if all(r.state.state == "done" for r in self.rows):
            return
        device = self.decoder.device
        needs_twins = self.guided and any(
            r.state.modality and self.settings.get(r.state.modality, Settings()).guidance != 1.0 for r in self.rows
        )
        ids, where = list(chosen), list(positions)
        if needs_twins:
            # A twin between spans only waits: it reads a bos at position 0, which changes nothing.
            ids += [id if t else self.grammar.vocab.bos for id, t in zip(chosen, twin_positions, strict=True)]
            where += twin_positions
            places += [p if t else 0 for p, t in zip(places, twin_positions, strict=True)]
        hidden = self.decoder.step(
            torch.tensor(ids, device=device)[:, None],
            torch.tensor(where, device=device)[:, None],
            self.cache,
            max(where) + 1,
            torch.tensor(places, device=device)[:, None],
        )[:, 0]
        self.hidden = hidden[: self.count]
        if self.guided:
            self.twin_hidden = hidden[self.count :] if needs_twins else self.bos_hidden


def _union(sets: list[Intervals]) -> Intervals:
    """The union of legal sets, as sorted disjoint intervals."""
    out: list[tuple[int, int]] = []
    for a, b in sorted({interval for intervals in sets for interval in intervals}):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return tuple(out)
