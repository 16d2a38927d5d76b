"""The next-id loop: requests on one cache, each at its own place in its own plan.

Every request has a state machine (`unitok.grammar.Row`) that says which ids may come, and one or more *contexts* in the cache:
its own and, while guidance holds, those that it is compared with (without condition or with a negative prompt, and in
three-way guidance with the prompt's pictures and sounds alone), each followed by the span's ids. Contexts come and go with
guidance, so a request that needs none costs nothing; all go through the model as one batch.

Where what may come next does not depend on what is drawn (the codes of an image whose grid is known, the levels within a
frame of sound), a whole stretch runs on the device, and ids are read once at its end; ids without a choice are not drawn
at all. Only rows of the head that some request may choose are multiplied. Random numbers belong to (seed, row, prompt), so
that an output does not depend on how many others there are.
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.grammar import Grammar, Intervals, Want
from unitok.model.decoder import Decoder
from unitok.model.inference import Cache, CudaGraphs, InferenceDecoder, arrange
from unitok.sample.jacobi import draw_ahead
from unitok.sample.menus import Menu, Menus
from unitok.sample.sampling import Knobs, Settings, guide, guide_three_ways, penalise_repetition

SHORT = 8  # contexts with at most so many unread ids go through the model together; prompts go apart


@dataclass
class Request:
    """What to go on from, and to what end.

    Args:
        prompt: ids, bos first, without a final eos.
        plan: what is wanted, or None for free.
        max_ids: most new ids, the closing eos included.
        seed, row: with the prompt, decide all of its random numbers.
        settings: by modality; a missing one has those of the session.
        negative: ids, bos first, that guidance leads away from; without it, bos alone.
        media: the prompt's pictures and sounds alone, for three-way guidance.
    """

    prompt: np.ndarray
    plan: list[Want] | None
    max_ids: int
    seed: int = 0
    row: int = 0
    settings: dict[str, Settings] = field(default_factory=dict)
    negative: np.ndarray | None = None
    media: np.ndarray | None = None


class Event(NamedTuple):
    """New ids of a request; `done` when these were its last."""

    request: Request
    ids: list[int]
    done: bool


class _Context:
    """A sequence in the cache: what has been read of it, and what has not."""

    def __init__(self, running: "_Running", kind: str, ids: np.ndarray, places: np.ndarray, start: int):
        self.running, self.kind, self.start = running, kind, start
        self.read = 0
        self.ids, self.places = ids.tolist(), places.tolist()  # not yet read


class _Running:
    """A request on its way."""

    def __init__(self, grammar: Grammar, request: Request, settings: dict[str, Settings], context: int):
        self.request, self.settings = request, settings | request.settings
        self.prompt = np.asarray(request.prompt)
        room = context - len(self.prompt)
        known = grammar.follow(self.prompt, complete=False)
        try:
            self.state = known.copy_for(min(request.max_ids, room), request.plan)
        except UserError as error:
            if room >= request.max_ids:
                raise
            raise UserError(f"a prompt of {len(self.prompt)} ids: the decoder takes {context} in all; {error}") from None
        self.state.bound()
        left = self.state.left or 0
        for name, ids in (("negative prompt", request.negative), ("prompt's pictures and sounds", request.media)):
            guided = any(s.guided if name[0] == "n" else s.guidance_media is not None for s in self.settings.values())
            if guided and ids is not None and len(ids) + self.state.into + left > context:
                less = "shorten it" if left == self.state.least else "shorten it, or lower --max-ids"
                after = left + self.state.into
                raise UserError(f"the {name}: {len(ids)} ids and up to {after} after them, the decoder takes {context}; {less}")
        self.new: list[int] = []
        self.reported = 0
        #: What its random numbers come from.
        self.key = (request.seed, request.row, zlib.crc32(self.prompt.astype("<i8").tobytes()))
        self.randoms = np.random.default_rng(self.key).random(left)
        self.own = _Context(self, "own", self.prompt, grammar.places(self.prompt), 0)
        self.contexts = [self.own]
        self.seen: Tensor | None = None  # bool [V], where there is a repetition penalty: ids that have come,
        self.noted = 0  # of the new ones so many
        self._force()

    def take(self, ids: list[int]) -> None:
        """Advance by ids that were drawn, and by all after them that have no choice."""
        place = self.state.take(ids)
        self.new += ids
        last = ids[-1:]
        for context in self.contexts:
            context.ids, context.places = list(last), [place]
        self._force()

    def _force(self) -> None:
        while (id := self.state.forced()) is not None:
            place = self.state.advance(id)
            self.new.append(id)
            for context in self.contexts:
                context.ids.append(id)
                context.places.append(place)

    @property
    def how(self) -> Settings:
        """The settings of what comes next: of the span that we are in, else of the plan's next, else of what stands bare."""
        state = self.state
        modality = state.modality or (state.plan[0].modality if state.plan else state.vocab.bare)
        return self.settings.get(modality or "", Settings())

    @property
    def span_start(self) -> int:
        """Where in the whole sequence the span that we are in began; the next position, between spans."""
        return len(self.prompt) + len(self.new) - self.state.into

    def wanted(self, grammar: Grammar) -> dict[str, np.ndarray]:
        """The contexts that guidance needs now, by kind: their ids before the span."""
        how = self.how
        if not how.guides(self.state.count):
            return {}
        alone = grammar.vocab.unconditional()
        none = alone if self.request.negative is None else np.asarray(self.request.negative)
        if how.guidance_media is None:
            return {"none": none}
        return {"media": alone if self.request.media is None else np.asarray(self.request.media), "none": none}

    def stretch(self, most: int) -> list[Intervals]:
        """The legal sets of the next ids that need not be read in between, while guidance is as it is now."""
        how, count = self.how, self.state.count
        sets = self.state.ahead(most)
        if how.guided:
            now = how.guides(count)
            changes = (i for i in range(1, len(sets)) if how.guides(count + i) != now)
            sets = sets[: next(changes, len(sets))]
        return sets


class Session:
    """Requests that are generated together; new ones may join at any time.

    `step` draws at least one id for each that is running, and up to `ahead` where that needs no look in between: a server
    calls it in a loop, a viewer with a small `ahead`. jacobi: in an image of a request that runs alone, that many places are
    guessed and read in one pass (`unitok.sample.jacobi`); 0: one.
    """

    def __init__(
        self,
        decoder: Decoder | InferenceDecoder,
        grammar: Grammar,
        settings: dict[str, Settings] | None = None,
        ahead: int = 256,
        jacobi: int = 0,
    ):
        self.decoder = arrange(decoder) if isinstance(decoder, Decoder) else decoder
        self.grammar, self.settings, self.ahead, self.jacobi = grammar, settings or {}, ahead, jacobi
        self.passes = 0  # of the model, to draw ids
        self.running: list[_Running] = []
        self.contexts: list[_Context] = []  # by their place in the cache
        self.cache = self.decoder.new_cache(0, 0)
        self.hidden = torch.zeros(0, self.decoder.config.hidden_size, device=self.decoder.device, dtype=self.decoder.dtype)
        self.menus = Menus(self.decoder)
        self._finished: list[_Running] = []  # as they came: nothing was to be drawn
        self._wide = np.float32 if self.decoder.device.type == "mps" else np.float64  # which knows no float64
        self._graphs = CudaGraphs(self.decoder) if self.decoder.device.type == "cuda" else None

    def add(self, request: Request) -> None:
        """Let a request join. Errors: `UserError` for a prompt that is no beginning of a document or longer than the decoder
        takes, or a budget too small for the plan."""
        most = self.decoder.config.max_position_embeddings
        new = _Running(self.grammar, request, self.settings, most)
        if new.state.state == "done":
            self._finished.append(new)
            return
        self.running.append(new)
        self._enter(new.own)

    # ---- One step ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Draw ids for all that are running; -> what is new, request by request."""
        if self.running:
            self._enter_and_leave()
            self._make_room()
            self._read_waiting()
            sets = [r.stretch(self.ahead) for r in self.running]
            count = min(len(s) for s in sets)
            if self.jacobi and self._suits_jacobi(sets):
                ids, passes = draw_ahead(self, sets[0][0], count, self.jacobi)
                drawn = [ids]
            else:
                drawn, passes = self._draw([s[:count] for s in sets], count), count - 1
            self.passes += passes
            for r, ids in zip(self.running, drawn, strict=True):
                for context in r.contexts:
                    context.read += count - 1  # the last has yet to be read
                r.take(ids)
        ended = [r for r in self.running if r.state.state == "done"]
        events = []
        for r in [*self.running, *self._finished]:
            events.append(Event(r.request, r.new[r.reported :], r.state.state == "done"))
            r.reported = len(r.new)
        self.running = [r for r in self.running if r not in ended]
        self._finished = []
        for r in ended:
            for context in r.contexts:
                self._leave(context)
        return events

    @property
    def waiting(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self.running or self._finished)

    def _suits_jacobi(self, sets: list[list[Intervals]]) -> bool:
        """One request, in a body whose ids are all of one kind, and nothing that depends on what came."""
        alone = len(sets) == 1 and len(sets[0]) > 1 and len(set(sets[0])) == 1
        return alone and self.running[0].how.repetition_penalty == 1

    def _enter_and_leave(self) -> None:
        """See to it that each request has the contexts that guidance needs now."""
        for r in self.running:
            wanted, start = r.wanted(self.grammar), r.span_start
            for context in r.contexts[1:]:
                if context.kind not in wanted or context.start != start:
                    self._leave(context)
                    r.contexts.remove(context)
            known = {context.kind for context in r.contexts}
            for kind, before in wanted.items():
                if kind not in known:
                    span = np.concatenate([r.prompt, np.array(r.new, np.int64)])[start:]
                    inside = r.state.place if len(span) else 0
                    places = np.arange(1, len(span) + 1) if inside else np.zeros(len(span), np.int64)
                    ids = np.concatenate([before, span])
                    context = _Context(r, kind, ids, np.concatenate([self.grammar.places(before), places]), start)
                    r.contexts.append(context)
                    self._enter(context)

    def _enter(self, context: _Context) -> None:
        """The next place in the cache, so that contexts stand without gaps."""
        self.contexts.append(context)

    def _leave(self, context: _Context) -> None:
        """Its place is taken by the last context."""
        place, last = self.contexts.index(context), len(self.contexts) - 1
        moved = self.contexts.pop()
        if place != last:
            self.contexts[place] = moved
        if place != last and moved.read:
            self.cache.take(self.cache, last, place, moved.read)

    def _make_room(self) -> None:
        """A cache that holds all contexts to their ends."""
        length = max(c.read + len(c.ids) + (c.running.state.left or 0) for c in self.contexts) + SHORT
        contexts = len(self.contexts)
        if contexts > self.cache.contexts or length > self.cache.length:
            self.cache = self.cache.grown(max(contexts, self.cache.contexts), max(length, self.cache.length))
            self.hidden = torch.cat(
                [self.hidden, self.hidden.new_zeros(self.cache.contexts - len(self.hidden), *self.hidden.shape[1:])]
            )

    # ---- Reading -------------------------------------------------------------------------------------------------

    def _read_waiting(self) -> None:
        """Run the model on all ids that were not read; those of long prompts stand last."""
        lengths = [len(context.ids) for context in self.contexts]
        first_long = next((i for i, n in enumerate(lengths) if n > SHORT), len(lengths))
        short, long = self.contexts[:first_long], self.contexts[first_long:]
        if short:
            self.hidden[:first_long] = self._read(short, self.cache.part(0, first_long))
        same: dict[tuple[int, ...], list[_Context]] = {}
        for context in long:
            same.setdefault(tuple(context.ids), []).append(context)
        if len(same) < len(long) and not any(context.read for context in long):
            self._read_once(list(same.values()))
        elif long:
            self.hidden[first_long : len(lengths)] = self._read(long, self.cache.part(first_long, len(lengths)))

    def _read_once(self, groups: list[list[_Context]]) -> None:
        """Contexts of one prompt each: it is read for the first of them and copied to the others."""
        cache = self.decoder.new_cache(len(groups), max(len(group[0].ids) for group in groups))
        places = {id(context): place for place, context in enumerate(self.contexts)}
        hidden = self._read([group[0] for group in groups], cache)
        for i, group in enumerate(groups):
            length = group[0].read
            for context in group:
                context.read, context.ids, context.places = length, [], []
                self.cache.take(cache, i, places[id(context)], length)
                self.hidden[places[id(context)]] = hidden[i]

    def _read(self, part: list[_Context], cache: Cache) -> Tensor:
        """Hidden states [contexts, C] after all ids of contexts that stand in `cache`. They are padded on the right: what the
        padding writes is written over before it is looked at."""
        lengths = [len(context.ids) for context in part]
        longest = max(lengths)
        ids = np.full((len(part), longest), self.grammar.vocab.pad)
        places = np.zeros((len(part), longest), np.int64)
        positions = np.array([context.read for context in part])[:, None] + np.arange(longest)
        for i, context in enumerate(part):
            ids[i, : lengths[i]], places[i, : lengths[i]] = context.ids, context.places
            context.read += lengths[i]
            context.ids, context.places = [], []
        at = self._common([int(p) for p in positions[:, 0]], longest, cache)
        extent = min(int(positions.max()) + 1, cache.length)
        given = (self._send(x) for x in (ids, positions.clip(max=cache.length - 1), places))
        hidden = self.decoder.step(next(given), next(given), cache, extent, next(given), at)
        return hidden[torch.arange(len(part), device=hidden.device), self._send(np.array(lengths) - 1)]

    def _common(self, positions: list[int], longest: int, cache: Cache) -> int | None:
        """The position where all of them are, if it is one and the cache has room for the padding, too."""
        first = positions[0]
        return first if all(p == first for p in positions) and first + longest <= cache.length else None

    def _send(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.decoder.device, non_blocking=True)

    # ---- Drawing -------------------------------------------------------------------------------------------------

    def _draw(self, sets: list[list[Intervals]], count: int) -> list[list[int]]:
        """`count` ids for each running request, of its legal sets; the model runs on all but the last of them."""
        running, n = self.running, len(self.contexts)
        numbers = {id(r): i for i, r in enumerate(running)}
        owners = [numbers[id(context.running)] for context in self.contexts]
        in_order = owners == list(range(len(running)))
        owner = None if in_order else self._send(np.array(owners))
        own = None if in_order else self._send(np.array([self.contexts.index(r.own) for r in running]))
        guidance = self._guidance(count)
        knobs = Knobs([r.how for r in running], self.decoder.device)
        seen = self._seen() if knobs.penalises else None
        uniform = self._send(np.stack([r.randoms[len(r.new) : len(r.new) + count] for r in running], 1).astype(self._wide))
        read = np.array([context.read for context in self.contexts])
        at, extent, positions = self._common(read.tolist(), count, self.cache), int(read.max()), self._send(read[:, None])
        into = np.array([r.state.place for r in running])[owners]  # in text 0, which stays
        places = self._send(np.where(into > 0, into + 1 + np.arange(count)[:, None], 0)[:, :, None])
        chosen = torch.zeros((count, len(running)), dtype=torch.int64, device=self.decoder.device)
        for i in range(count):
            menu = self.menus.of_batch(tuple(s[i] for s in sets))
            hidden = self.hidden[:n]
            logits = menu.logits(hidden if own is None else hidden[own])
            if guidance is not None:
                logits = guidance.mix(logits, hidden, menu, i)
            if seen is not None:
                logits = penalise_repetition(logits, menu.among(seen), knobs.penalty[:, None])
            ids = chosen[i] = menu.name(knobs.choose(logits, uniform[i]))
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            if i + 1 < count:
                given = (ids if owner is None else ids[owner])[:, None]
                self.hidden[:n] = self._step(given, positions + i, extent + i + 1, places[i], None if at is None else at + i)
        return chosen.T.tolist()

    def _step(self, ids: Tensor, positions: Tensor, extent: int, places: Tensor, at: int | None) -> Tensor:
        """One id of each context -> hidden states [contexts, C]."""
        if self._graphs is not None:
            return self._graphs.step(ids, positions, self.cache, extent, places)[:, 0]
        return self.decoder.step(ids, positions, self.cache, extent, places, at)[:, 0]

    def _seen(self) -> Tensor:
        """bool [B, V]: ids that have come."""
        for r in self.running:
            if r.seen is None:
                r.seen = torch.zeros(self.grammar.vocab.size, dtype=torch.bool, device=self.decoder.device)
                r.seen[self._send(r.prompt)] = True
            r.seen[self._send(np.array(r.new[r.noted :], np.int64))] = True
            r.noted = len(r.new)
        return torch.stack([r.seen for r in self.running if r.seen is not None])

    def _guidance(self, count: int) -> "_Guidance | None":
        """The contexts that requests are compared with, and the scales of `count` ids; None where none has any."""
        if len(self.contexts) == len(self.running):
            return None
        place = {id(context): i for i, context in enumerate(self.contexts)}
        rows: dict[str, list[int]] = {"media": [], "none": []}
        scales = np.ones((2, count, len(self.running), 1), np.float32)
        for i, r in enumerate(self.running):
            mine = {context.kind: place[id(context)] for context in r.contexts}
            rows["none"].append(mine.get("none", mine["own"]))  # compared with itself, which changes nothing
            rows["media"].append(mine.get("media", mine.get("none", mine["own"])))
            if "none" in mine:
                for j in range(count):
                    scales[:, j, i, 0] = r.how.scales(r.state.count + j, r.state.total)
        three = any(context.kind == "media" for context in self.contexts)
        none, media = (self._send(np.array(rows[kind])) for kind in ("none", "media"))
        return _Guidance(none, media if three else None, self._send(scales))


class _Guidance(NamedTuple):
    """What each request is compared with: places of contexts [B], and scales [2, count, B, 1]."""

    none: Tensor
    media: Tensor | None
    scales: Tensor

    def mix(self, own: Tensor, hidden: Tensor, menu: Menu, i: int) -> Tensor:
        """Logits [B, n] of the requests themselves -> guided ones."""
        without = menu.logits(hidden[self.none])
        if self.media is None:
            return guide(own, without, self.scales[0, i])
        return guide_three_ways(own, menu.logits(hidden[self.media]), without, self.scales[0, i], self.scales[1, i])


def check_requests(session: Session, requests: Iterable[Request]) -> None:
    """Raise the `UserError` that `Session.add` would, for requests that join later."""
    for request in requests:
        _Running(session.grammar, request, session.settings, session.decoder.config.max_position_embeddings)


def generate(
    decoder: Decoder | InferenceDecoder,
    grammar: Grammar,
    requests: Iterable[Request],
    settings: dict[str, Settings] | None = None,
    batch_size: int = 0,
    jacobi: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """New ids of each request (without its prompt; a closing eos is kept), always well-formed.

    `settings` by modality; a missing one has the defaults. batch_size: how many run together, the next joins when one is
    done; 0: all. jacobi: as for `Session`. `progress` is called with the numbers of new ids and of finished requests.
    Errors: `UserError` for a prompt that is no beginning of a document, or a budget too small for its plan, before any work.
    """
    requests = [replace(request) for request in requests]  # each its own, also where one is given twice
    session = Session(decoder, grammar, settings, jacobi=jacobi)
    check_requests(session, requests[batch_size:] if batch_size else [])
    new: dict[int, list[int]] = {id(request): [] for request in requests}
    waiting = iter(requests)
    unfinished, running = len(requests), 0
    while unfinished:
        while running < (batch_size or len(requests)) and (following := next(waiting, None)) is not None:
            session.add(following)
            running += 1
        events = session.step()
        for event in events:
            new[id(event.request)] += event.ids
            running -= event.done
            unfinished -= event.done
        if progress:
            progress(sum(len(event.ids) for event in events), sum(event.done for event in events))
    return [np.array(new[id(request)], np.int64) for request in requests]
