"""Several ids of an image in one pass: Jacobi iteration on draws whose random numbers are fixed beforehand.

Each id is the largest of score + Gumbel noise (Gumbel 1954), the noise drawn for every position before the first id, so an
image is a function of its noise, and sequential sampling evaluates that function from the left. Here a window of guesses is
read in one pass, as many new ones come out, and those are final whose predecessors had been guessed right (Wiggers and
Hoogeboom 2020, "Predictive sampling"; the window is that of Teng et al. 2024, "Speculative Jacobi decoding", the fixed noise
what So et al. 2025 call coupling). The ids are those of a window of 1, which is plain sampling, up to rounding: nothing of the
distribution changes. A place that was never read is guessed with the scores of the code above it and its own noise.

It pays for one image at a time, where a pass of 16 ids costs little more than one of 1, and on a model that has learnt:
what random weights say changes with every id.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unitok.sample.sampling import Knobs, guide, guide_three_ways

if TYPE_CHECKING:
    from unitok.grammar import Intervals
    from unitok.sample.engine import Session


def draw_ahead(session: "Session", allowed: "Intervals", count: int, window: int) -> tuple[list[int], int]:
    """The next `count` ids of the one request that is running, each of them from the same legal set; and the passes it took.

    The contexts' caches hold all of them but the last afterwards.
    """
    return _Jacobi(session, allowed, count, window).run()


class _Jacobi:
    def __init__(self, session: "Session", allowed: "Intervals", count: int, window: int):
        (running,) = session.running
        self.session, self.running, self.count, self.window = session, running, count, window
        self.menu, self.how, self.state = session.menus.of(allowed), running.how, running.state
        device = session.decoder.device
        rng = np.random.default_rng((*running.key, len(running.new)))
        noise = rng.gumbel(size=(count, self.menu.size)) if self.how.temperature else np.zeros((count, self.menu.size))
        self.noise = torch.from_numpy(noise.astype(np.float32)).to(device)
        self.columns = self.state.span.order.period(tuple(self.state.sides))
        #: What the draws of each place are made of, and the draws: final up to `done`, guesses up to `known`.
        self.scores = torch.zeros(count, self.menu.size, device=device)
        self.found = torch.zeros(count, dtype=torch.int64, device=device)
        self.done = self.known = 0

    def run(self) -> tuple[list[int], int]:
        """Passes until every place is final; -> the ids, and how many passes."""
        contexts = len(self.session.contexts)
        self._see(self.session.hidden[:contexts, None])
        passes = 0
        while self.done < self.count:
            width = min(self.window, self.count - self.done)
            self._guess(self.done + width - 1)
            self._see(self._read(self.done - 1, width))
            passes += 1
        return self.menu.name(self.found).tolist(), passes

    def _guess(self, stop: int) -> None:
        """Places up to `stop` that were never read: as if the code above stood there, or the one before."""
        while self.known < stop:
            back = self.columns if self.known >= self.columns else 1
            end = min(stop, self.known + back)
            new = slice(self.known, end)
            self.scores[new] = self.scores[self.known - back : end - back]
            self.found[new] = (self.scores[new] + self.noise[new]).argmax(-1)
            self.known = end

    def _read(self, start: int, width: int) -> Tensor:
        """Hidden states [contexts, width, C] after the ids from `start` on."""
        session, n = self.session, len(self.session.contexts)
        device = session.decoder.device
        ids = self.menu.name(self.found[start : start + width]).expand(n, -1)
        read = torch.tensor([context.read + start for context in session.contexts], device=device)
        positions = read[:, None] + torch.arange(width, device=device)
        place = self.state.place + 1 + start if self.state.place else 0
        places = (torch.arange(width, device=device) + place if place else torch.zeros(width, dtype=torch.int64)).expand(n, -1)
        at = int(read[0]) if n == 1 else None
        return session.decoder.step(ids, positions, session.cache, int(read.max()) + width, places.to(device), at)

    def _see(self, hidden: Tensor) -> None:
        """New draws for the places from `done` on, of hidden states [contexts, width, C] before them."""
        width = hidden.shape[1]
        scores = self._scores(hidden)
        here = slice(self.done, self.done + width)
        new = (scores + self.noise[here]).argmax(-1)
        right = int((new == self.found[here]).cumprod(0).sum()) if self.done else 0
        self.scores[here], self.found[here] = scores, new
        self.known = max(self.known, self.done + width)
        self.done += min(right + 1, width)  # the first wrong one was drawn after right ones: it is final, too

    def _scores(self, hidden: Tensor) -> Tensor:
        """[contexts, width, C] -> [width, n]: logits after guidance, filters and temperature."""
        place = {context.kind: i for i, context in enumerate(self.session.contexts)}
        logits = {kind: self.menu.logits(hidden[i]) for kind, i in place.items()}
        mixed, how = logits["own"], self.how
        if "none" in place:
            scales = [how.scales(self.state.count + self.done + j, self.state.total) for j in range(len(mixed))]
            scale, media_scale = torch.tensor(scales, device=mixed.device)[:, :, None].unbind(1)
            if "media" in place:
                mixed = guide_three_ways(mixed, logits["media"], logits["none"], scale, media_scale)
            else:
                mixed = guide(mixed, logits["none"], scale)
        if how.temperature == 0:
            return mixed
        return Knobs([how] * len(mixed), mixed.device).narrow(mixed) / how.temperature
