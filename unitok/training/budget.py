"""How long to train: steps, minutes or tokens; and how much of the run is over, which learning rates and phases follow.

Minutes are a bound, with half as much again for a machine that slows down: a run is always brought to the low end of its schedule,
because weights at a full learning rate are worth little.
"""

import logging
import math
import time
from typing import Any

from unitok.errors import UserError

PROBE_SHARE = 0.06  # of the minutes, before the number of steps is fixed
REPLANS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25)  # shares of the run, or of the minutes, at which it is fixed anew
LATEST = 1.5  # times the minutes: by then the run is in the tail of its schedule
TAIL_STEPS = 5  # of which it then has at most
STRIDE = 0.1  # most of the schedule that a step may pass over: the last one always has a low learning rate
RESERVE_SECONDS = 2.0  # for the last checkpoint

log = logging.getLogger(__name__)


class Budget:
    """How long to train: a number of steps; minutes that become one after a probe; or tokens, which do when a step's are known.

    Machines do not keep their pace, so minutes are planned anew, from the pace of the last stretch, at each tenth of the run or of
    the minutes. Where a run is late, the rest of its schedule is fitted into half the minutes more; when those are gone, a few
    steps of the schedule's tail end it. The share of the run that is over never goes back.
    """

    def __init__(self, steps: int | None, minutes: float | None, tokens: float | None = None):
        if sum(length is not None for length in (steps, minutes, tokens)) != 1:
            raise UserError("give the length of the training as either steps, minutes or (for a decoder) tokens")
        if min(length for length in (steps, minutes, tokens) if length is not None) <= 0:
            raise UserError("the length of the training (steps, minutes or tokens) must be above 0")
        self.total, self.minutes, self.tokens = steps, minutes, tokens
        self.elapsed = 0.0  # seconds when the clock was last looked at, those of earlier processes included
        self._done = 0  # steps by then
        self.planned = (0, 0.0)  # step and share at which the plan was made
        self.next = REPLANS[0]  # when the plan is to be made again; LATEST: it is not
        self.ends = False  # whether the tail has begun because the minutes are over
        self._began = 0.0
        self._mark: tuple[int, float] | None = None  # step and seconds at which the stretch began

    def begin(self) -> None:
        """Start the clock."""
        self._began = time.monotonic() - self.elapsed

    def clock(self) -> float:
        """Seconds that were spent, those of earlier processes included."""
        return time.monotonic() - self._began

    def tick(self, done: int, elapsed: float) -> None:
        """After step `done`, with `elapsed` seconds spent: make the plan when the probe has seen enough, and when it is due anew."""
        step, self.elapsed = (elapsed - self.elapsed) / max(1, done - self._done), elapsed
        self._done = done
        if self.minutes is None or self.ends or self.over(done):
            return
        late = elapsed / (self.minutes * 60)
        if late >= LATEST:
            self._end(done, step)
            return
        slow = done <= 3 and late < self.next  # the first steps: caches, k-means, lazy initialization
        if self._mark is None or slow:
            self._mark = (done, elapsed)
            return
        if self.total is None:
            due = late >= PROBE_SHARE and (done - self._mark[0] >= 5 or late >= self.next)
        else:
            due = max(late, self.share(done)) >= self.next
        if due:
            self._plan(done)

    def _pace(self, done: int) -> float:
        """Seconds per step: of the last stretch, if it has any steps."""
        step, then = self._mark or (done, 0.0)
        return (self.elapsed - then) / (done - step) if done > step else self.elapsed / done

    def _plan(self, done: int) -> None:
        """Fit what is left of the schedule into the time that is left."""
        seconds = (self.minutes or 0.0) * 60
        in_time = self.elapsed < seconds
        left = max(1, int(((seconds - RESERVE_SECONDS if in_time else LATEST * seconds) - self.elapsed) / self._pace(done)))
        if self.total is None:
            self._set(done, left, max(self.share(done), done / (done + left)))
        else:
            if not in_time and left < self.total - done and self.next <= 1.0:
                told = "step %d: %.3g minutes are over: the rest of the schedule is cut to half as much again"
                log.warning(told, done, self.minutes)
            self._set(done, left if in_time else min(left, self.total - done), self.share(done))
        now = max(self.elapsed / seconds, self.planned[1])
        self.next = next((share for share in REPLANS if share > now), LATEST)

    def _end(self, done: int, pace: float) -> None:
        """The last few steps, at the end of the schedule; at `pace` seconds per step they take a tenth of the minutes at most."""
        steps = max(1, min(TAIL_STEPS, int(6 * (self.minutes or 0.0) / pace)))
        if self.total is not None:
            steps = min(steps, self.total - done)
        self.ends = True
        self._set(done, steps, self.share(done))
        log.warning(
            "step %d: %.3g minutes are over and half as much again: the run ends with %d %s of its schedule's tail",
            *(done, self.minutes, steps, "step" if steps == 1 else "steps"),
        )

    def _set(self, done: int, steps: int, share: float) -> None:
        self.total, self._mark = done + steps, (done, self.elapsed)
        self.planned = (done, max(share, 1 - STRIDE * steps))

    def set_ids(self, done: int, seen: int, a_step: int) -> None:
        """Where the length was given in tokens: the steps that are left, after `done` of them and `seen` tokens."""
        if self.tokens is not None:
            self.total = done + max(0, math.ceil((self.tokens - seen) / a_step))

    def eta_minutes(self, done: int, seconds_per_step: float) -> float | None:
        """At the present pace; None while the number of steps is not known."""
        return None if self.total is None else max(0, self.total - done) * seconds_per_step / 60

    def share(self, done: int) -> float:
        """Share of the run that is over, in [0, 1]: from where the plan was made in a line to its end; before, by the clock."""
        begun, share = self.planned
        if self.total is None:
            return max(share, min(PROBE_SHARE, self.elapsed / ((self.minutes or 1.0) * 60)))
        if self.over(done):
            return 1.0
        return share + (1 - share) * (done - begun) / (self.total - begun)

    def over(self, done: int) -> bool:
        return self.total is not None and done >= self.total

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        plan = {"total": self.total, "planned": self.planned, "next": self.next, "ends": self.ends}
        return plan | {"spent": self.elapsed, "minutes": self.minutes}

    def restore(self, state: dict[str, Any], done: int) -> None:
        """From a checkpoint of step `done`; a length that was asked for now wins over what it remembers."""
        self.elapsed, self._done = float(state["spent"]), done
        if self.minutes is None:
            return
        if self.minutes != state["minutes"]:
            self.planned = (done, min(1.0, self.elapsed / (self.minutes * 60)))
            return
        self.total, self.planned, self.next, self.ends = (state[name] for name in ("total", "planned", "next", "ends"))
