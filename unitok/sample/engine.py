"""The loop over next tokens: requests in one batch and one cache, each at its own position of its own plan.

Every request has a state machine (`unitok.grammar.Row`) and one or more *slots* of the cache: its own and, while guidance is on,
those of the sequences that it is compared with (no condition or a negative prompt; in three-way guidance also the prompt's images
and audio alone), each followed by the span's ids. All slots go through the model as one batch.

Where the allowed tokens of the next steps do not depend on what is sampled (the codes of an image of known size, the levels of a
frame), the whole stretch runs on the device, and ids are copied to the host once at its end. Tokens without an alternative are not
sampled. Random numbers belong to (seed, row, prompt), so an output does not depend on what else is in the batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unitok.generation_config import SamplingParams
from unitok.grammar import Grammar
from unitok.intervals import Intervals
from unitok.model.cache import Cache, common_start
from unitok.model.copies import GenerationDecoder, copy_for_generation
from unitok.model.decoder import Decoder
from unitok.model.native.decoder import PARAMS, NativeDecoder, Stretch
from unitok.sample.allowed import AllowedLogits, allowed_logits
from unitok.sample.draw import Draw, guided_logits
from unitok.sample.jacobi import draw_ahead
from unitok.sample.prefixes import PrefixCache
from unitok.sample.running import Request, Running, Slot
from unitok.sample.sampling import BatchedSamplingParams

LONG = 4096  # positions of each slot that are allocated at once
SHORT = 8  # slots with at most so many unread ids go through the model together; longer prompts go in a batch of their own


class Event(NamedTuple):
    """New ids of a request; `done` when these were its last."""

    request: Request
    ids: list[int]
    done: bool


class Session:
    """Requests that are generated together; new ones may join at any time.

    Args:
        decoder: a `Decoder` is copied with the weights that it has now (`copy_for_generation`).
        sampling: sampling parameters by tokenizer; a missing one has the defaults.
        ahead: most tokens that `step` samples for each request before it returns.
        jacobi_window: tokens of an image that are guessed and read in one pass, for a request that runs alone; 0: off.
        prefixes: where to find what was read before, and to keep what is read now.
    """

    def __init__(
        self,
        decoder: Decoder | GenerationDecoder,
        grammar: Grammar,
        sampling: Mapping[str, SamplingParams] | None = None,
        ahead: int = 256,
        jacobi_window: int = 0,
        prefixes: PrefixCache | None = None,
    ):
        self.prefixes = prefixes
        self.decoder = copy_for_generation(decoder) if isinstance(decoder, Decoder) else decoder
        self.grammar, self.sampling, self.ahead, self.jacobi_window = grammar, sampling or {}, ahead, jacobi_window
        self.passes = 0  # of the model, in sampling
        self.running: list[Running] = []
        self.slots: list[Slot] = []  # by their index in the cache
        self.cache = self.decoder.new_cache(0, 0)
        self.hidden = torch.zeros(0, self.decoder.config.hidden_size, device=self.decoder.device, dtype=self.decoder.dtype)
        self._allowed: dict[tuple[Intervals, ...], AllowedLogits] = {}
        self._wide = np.float32 if self.decoder.device.type == "mps" else np.float64  # MPS has no float64
        self._params: dict[tuple[SamplingParams, ...], BatchedSamplingParams] = {}

    def add(self, request: Request) -> None:
        """Let a request join. Errors: `UserError` for a prompt that is no beginning of a document or longer than the decoder
        takes, or `max_new_tokens` too small for the plan."""
        new = Running(self.grammar, request, self.sampling, self.decoder.config.max_position_embeddings)
        self.running.append(new)
        if not new.done:
            self.slots += new.slots

    @torch.inference_mode()
    def remove(self, request: Request) -> None:
        """Let a request leave before it is done; its slots are free."""
        for r in [r for r in self.running if r.request is request]:
            for slot in list(r.slots):
                self._leave(slot)
            self.running.remove(r)

    def check(self, requests: Iterable[Request]) -> None:
        """Raise the `UserError` that `add` would raise, for requests that join later."""
        for request in requests:
            Running(self.grammar, request, self.sampling, self.decoder.config.max_position_embeddings)

    def run(self, requests: list[Request], batch_size: int = 0) -> Iterator[list[Event]]:
        """Yield the events of each step until all requests are done. batch_size: requests that run together (0: all); the next one
        joins when one is done."""
        waiting = iter(requests)
        while True:
            while len(self.running) < (batch_size or len(requests)) and (following := next(waiting, None)) is not None:
                self.add(following)
            if not self.running:
                return
            yield self.step()

    # ---- One step ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Sample tokens for all running requests; return an event for each."""
        active = [r for r in self.running if not r.done]
        if active:
            self._update_slots(active)
            self._make_room()
            self._read_waiting()
            sets = [r.stretch(self.ahead) for r in active]
            count = min(map(len, sets))
            if self.jacobi_window and self._suits_jacobi(sets):
                sampled, passes = self._draw_ahead(active[0], sets[0][0], count)
            else:
                sampled, passes = self._draw(active, [s[:count] for s in sets], count), count - 1
            self.passes += passes
            for slot in self.slots:
                slot.read += count - 1  # the last has yet to be read
            for r, ids in zip(active, sampled, strict=True):
                r.take(ids)
        events = []
        for r in self.running:
            events.append(Event(r.request, r.new[r.reported :], r.done))
            r.reported = len(r.new)
        for slot in [slot for slot in self.slots if slot.running.done]:
            if self.prefixes and slot.kind == "own":
                index, r = self.slots.index(slot), slot.running
                read = np.concatenate([r.prompt, np.array(r.new, np.int64)])[: slot.read]
                self.prefixes.store(read, self.cache.part(index, index + 1), self.decoder)
            self._leave(slot)
        self.running = [r for r in self.running if not r.done]
        return events

    @property
    def waiting(self) -> bool:
        """Whether there are requests for `step`."""
        return bool(self.running)

    def _suits_jacobi(self, sets: list[list[Intervals]]) -> bool:
        """Whether one request runs, all its next tokens have the same allowed set, and nothing depends on tokens that came before."""
        alone = len(sets) == 1 and len(sets[0]) > 1 and len(set(sets[0])) == 1
        return alone and self.slots[0].running.params.repetition_penalty == 1

    def _update_slots(self, active: list[Running]) -> None:
        """Give each request the slots that guidance needs now, and no others."""
        for r in active:
            prompts, start = r.guidance_prompts(), len(r.prompt) + len(r.new) - r.state.into
            for slot in r.slots[1:]:
                if slot.kind not in prompts or slot.start != start:
                    self._leave(slot)
            known = {slot.kind for slot in r.slots}
            for kind, before in prompts.items():
                if kind not in known:
                    span = np.concatenate([r.prompt, np.array(r.new, np.int64)])[start:]
                    ids = self.grammar.vocab.unconditional(span) if before is None else np.concatenate([before, span])
                    r.slots.append(Slot(r, kind, ids, start))
                    self.slots.append(r.slots[-1])

    def _leave(self, slot: Slot) -> None:
        """Remove a slot; the last slot of the cache moves to its index, so that there are no gaps."""
        slot.running.slots.remove(slot)
        index, moved = self.slots.index(slot), self.slots.pop()
        if moved is not slot:
            self.slots[index] = moved
            if moved.read:
                self.cache.take(self.cache, len(self.slots), index, moved.read)

    def _make_room(self) -> None:
        """Grow the cache until it holds all slots to their ends."""
        length = max(slot.read + len(slot.ids) + (slot.running.state.left or 0) for slot in self.slots) + SHORT
        if length > LONG:  # then the cache grows as it is needed
            soon = max(slot.read + len(slot.ids) + self.ahead for slot in self.slots) + SHORT
            length = min(length, max(LONG, soon, 2 * self.cache.length if soon > self.cache.length else 0))
        if len(self.slots) > self.cache.slots or length > self.cache.length:
            self.cache = self.cache.grown(max(len(self.slots), self.cache.slots), max(length, self.cache.length))
            more = self.hidden.new_zeros(self.cache.slots - len(self.hidden), self.hidden.shape[1])
            self.hidden = torch.cat([self.hidden, more])
        for index, slot in enumerate(self.slots if self.prefixes else []):
            if self.prefixes and not slot.read and (known := self.prefixes.longest(slot.ids, self.decoder)):
                cache, shared = known
                if shared > SHORT:  # else equal prompts are better read together
                    self.cache.take(cache, 0, index, shared)
                    slot.skip(shared)

    # ---- Reading -------------------------------------------------------------------------------------------------

    def _read_waiting(self) -> None:
        """Run the model on all unread ids; slots with long prompts stand last."""
        lengths = [len(slot.ids) for slot in self.slots]
        first_long = next((i for i, n in enumerate(lengths) if n > SHORT), len(lengths))
        short, long = self.slots[:first_long], self.slots[first_long:]
        if short:
            self.hidden[:first_long] = self._read(short, self.cache.part(0, first_long))
        same: dict[tuple[int, ...], list[Slot]] = {}
        for slot in long:
            same.setdefault(tuple(slot.ids), []).append(slot)
        if len(same) < len(long) and not any(slot.read for slot in long):
            self._read_once(list(same.values()))
        elif long:
            self.hidden[first_long : len(lengths)] = self._read(long, self.cache.part(first_long, len(lengths)))

    def _read_once(self, groups: list[list[Slot]]) -> None:
        """Read each group of slots with equal prompts once, for its first slot, and copy the result to the others."""
        cache = self.decoder.new_cache(len(groups), max(len(group[0].ids) for group in groups))
        hidden = self._read([group[0] for group in groups], cache)
        index = {id(slot): i for i, slot in enumerate(self.slots)}
        for i, group in enumerate(groups):
            for slot in group:
                slot.take_unread()
                slot.read = group[0].read
                self.cache.take(cache, i, index[id(slot)], slot.read)
                self.hidden[index[id(slot)]] = hidden[i]

    def _read(self, slots: list[Slot], cache: Cache) -> Tensor:
        """Return hidden states [slots, C] after the last unread id of each slot of `cache`."""
        starts, unread = [slot.read for slot in slots], [slot.take_unread() for slot in slots]
        return self.decoder.read([ids for ids, _ in unread], [spans for _, spans in unread], starts, cache)

    def _send(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.decoder.device, non_blocking=True)

    # ---- Sampling ------------------------------------------------------------------------------------------------

    def _draw(self, active: list[Running], sets: list[list[Intervals]], count: int) -> list[list[int]]:
        """Sample `count` ids for each active request from its allowed sets; the model runs on all but the last of them."""
        numbers = {id(r): i for i, r in enumerate(active)}
        owners = np.array([numbers[id(slot.running)] for slot in self.slots])
        uniforms = np.stack([r.randoms[len(r.new) : len(r.new) + count] for r in active], 1)
        rows, scales = self._guidance(active, count)
        if isinstance(self.decoder, NativeDecoder):
            return self._draw_natively(self.decoder, active, sets, owners, uniforms, rows, scales)
        owner, uniform = self._send(owners), self._send(uniforms.astype(self._wide))
        compared, all_scales = [self._send(row) for row in rows], self._send(scales)
        kinds = tuple(r.params for r in active)
        if kinds not in self._params:
            self._params = {kinds: BatchedSamplingParams(list(kinds), self.decoder.device)}
        params = self._params[kinds]
        seen = self._send(self._seen(active)) if params.penalizes else None
        run, graphs = self._runner(count), self.decoder.graphs
        sampled = torch.zeros((count, len(active)), dtype=torch.int64, device=self.decoder.device)
        for i in range(count):
            now = tuple(s[i] for s in sets)
            draw = Draw(allowed_logits(self.decoder, now, self._allowed), params)
            given = (self.hidden, all_scales[i], uniform[i], *compared)
            if seen is not None:
                ids = draw.penalized(seen, *given)
            else:
                ids = draw(*given) if graphs is None else graphs(("draw", now, kinds), draw, *given, memory=draw)
            sampled[i] = ids
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            if i + 1 < count:
                self.hidden[: len(owner)] = run(ids[owner, None], i)[:, 0]
        return sampled.T.tolist()

    def _draw_natively(
        self,
        decoder: NativeDecoder,
        active: list[Running],
        sets: list[list[Intervals]],
        owners: np.ndarray,
        uniforms: np.ndarray,
        rows: list[np.ndarray],
        scales: np.ndarray,
    ) -> list[list[int]]:
        """`_draw` in one call of compiled code."""
        params = np.zeros(len(active), PARAMS)
        for row, r in zip(params, active, strict=True):
            p = r.params
            row["temperature"], row["top_p"], row["min_p"], row["penalty"] = (
                p.temperature,
                p.top_p,
                p.min_p,
                p.repetition_penalty,
            )
            row["top_k"] = min(p.top_k, 2**31 - 1)
        own, none, media = [*rows, *rows[-1:] * 2][:3]
        params["own"], params["none"], params["media"] = own, none, media
        seen = self._seen(active) if (params["penalty"] != 1).any() else None
        positions, span_positions = self._positions(len(uniforms))
        stretch = Stretch(
            owners.astype(np.int32),
            sets,
            params,
            scales,
            uniforms,
            positions.T,
            span_positions.T,
            seen,
            self.hidden,
        )
        sampled: list[list[int]] = decoder.sample(stretch, self.cache).T.tolist()
        return sampled

    def _draw_ahead(self, r: Running, allowed_set: Intervals, count: int) -> tuple[list[list[int]], int]:
        """Sample `count` ids of the only active request from one allowed set, by Jacobi iteration; also return the number of passes."""
        allowed, params = allowed_logits(self.decoder, (allowed_set,), self._allowed), r.params
        indices, all_scales = self._guidance([r], count)
        compared, scales = [self._send(row) for row in indices], self._send(all_scales)
        run = self._runner(count)

        def scores(hidden: Tensor, start: int) -> Tensor:
            """Hidden states [slots, W, C] -> scores [W, n] of the W tokens from index `start` of the stretch on."""
            width = hidden.shape[1]
            rows = [index * width + torch.arange(width, device=index.device) for index in compared]
            logits = guided_logits(allowed, hidden.flatten(0, 1), rows, scales[start : start + width, 0])
            if params.temperature == 0:
                return logits
            return BatchedSamplingParams([params] * width, logits.device).filter(logits) / params.temperature

        def predict(choices: Tensor, start: int) -> Tensor:
            return scores(run(allowed.ids[choices].expand(len(self.slots), -1), start), start + 1)

        size = (count, len(allowed.ids))
        noise = np.random.default_rng((*r.key, len(r.new))).gumbel(size=size) if params.temperature else np.zeros(size)
        columns = r.state.span.order.period(r.state.span.sides(r.state.header)) if r.state.span else 1
        first = scores(self.hidden[: len(self.slots), None], 0)
        choices, passes = draw_ahead(predict, first, self._send(noise.astype(np.float32)), columns, self.jacobi_window)
        return [allowed.ids[choices].tolist()], passes

    def _runner(self, count: int) -> Callable[[Tensor, int], Tensor]:
        """Return a function from ids [slots, W], which start at index i of a stretch of `count`, to hidden states [slots, W, C]."""
        positions, span_positions = self._positions(count)
        at, extent = common_start(positions, self.cache), int(positions[:, 0].max())
        all_positions, all_span_positions = self._send(positions), self._send(span_positions)

        def run(ids: Tensor, i: int) -> Tensor:
            stop = i + ids.shape[1]
            at_positions, span_positions = all_positions[:, i:stop], all_span_positions[:, i:stop]
            step = self.decoder.step if ids.shape[1] > 1 or isinstance(self.decoder, NativeDecoder) else self.decoder.step_once
            return step(ids, at_positions, self.cache, extent + stop, span_positions, None if at is None else at + i)

        return run

    def _positions(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and span positions of the next tokens of each slot, int64 [slots, count] each."""
        positions = np.array([slot.read for slot in self.slots])[:, None] + np.arange(count)
        return positions, np.stack([slot.running.state.next_span_positions(count) for slot in self.slots])

    def _seen(self, active: list[Running]) -> np.ndarray:
        """Return bool [B, V]: the tokens that have come, in the prompt or since."""
        seen = np.zeros((len(active), self.grammar.vocab.size), bool)
        for row, r in zip(seen, active, strict=True):
            row[np.concatenate([r.prompt, np.array(r.new, np.int64)])] = True
        return seen

    def _guidance(self, active: list[Running], count: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return indices of slots [B] (the requests' own and, as far as there are any, `none` and `media`), and scales [count, B, 2]."""
        index = {id(slot): i for i, slot in enumerate(self.slots)}
        rows: dict[str, list[int]] = {"own": [], "none": [], "media": []}
        scales = np.ones((count, len(active), 2), np.float32)
        for i, r in enumerate(active):
            by_kind = {slot.kind: index[id(slot)] for slot in r.slots}
            own = by_kind["own"]
            none = by_kind.get("none", own)  # without guidance a request is compared with itself, at scale 1
            for kind, row in (("own", own), ("none", none), ("media", by_kind.get("media", none))):
                rows[kind].append(row)
            if "none" in by_kind:
                params, before, total = r.params, r.state.count, r.state.total
                differing = 1 if params.guidance_schedule == "constant" else count
                scales[:, i] = [params.scales(before + j, total) for j in range(differing)]
        kinds = {slot.kind for slot in self.slots}
        return [np.array(row) for kind, row in rows.items() if kind in kinds], scales


def generate(
    decoder: Decoder | GenerationDecoder,
    grammar: Grammar,
    requests: Iterable[Request],
    sampling: Mapping[str, SamplingParams] | None = None,
    batch_size: int = 0,
    jacobi_window: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Return the new tokens of each request, without its prompt, with a closing eos; they are always well-formed.

    Args:
        sampling, jacobi_window: as for `Session`.
        batch_size: as for `Session.run`.
        progress: called after each step with the numbers of new tokens and of finished requests.

    Errors: `UserError` as `Session.add`'s, before any work.
    """
    requests = [replace(request) for request in requests]  # copies, because one may be given twice
    new: dict[int, list[int]] = {id(request): [] for request in requests}
    session = Session(decoder, grammar, sampling, jacobi_window=jacobi_window)
    session.check(requests[batch_size:] if batch_size else [])  # the others join before the first step
    for events in session.run(requests, batch_size):
        for event in events:
            new[id(event.request)] += event.ids
        if progress:
            progress(sum(len(event.ids) for event in events), sum(event.done for event in events))
    return [np.array(ids, np.int64) for ids in new.values()]
