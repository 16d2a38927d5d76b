"""How long to train: steps, minutes or tokens; and the progress of the run, from which learning rates and phases follow.

Minutes are a limit, with half as much again for a machine that slows down. A run always reaches the low end of its schedule, because
weights at a full learning rate are worth little.
"""

import logging
import math
import time
from typing import TypedDict

from unitok.errors import UserError

PROBE_FRACTION = 0.06  # of the minutes, after which the number of steps is planned
#: Fractions of the run or of the minutes, whichever is larger, at which the number of steps is planned again.
REPLANS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25)
LATEST = 1.5  # times the minutes: by then the run is in the tail of its schedule
TAIL_STEPS = 5  # most steps of that tail
STRIDE = 0.1  # most progress that one step may make at the end: the last step always has a low learning rate
RESERVE_SECONDS = 2.0  # for the last checkpoint

log = logging.getLogger(__name__)


class BudgetState(TypedDict):
    """A budget in a checkpoint."""

    total: int | None
    planned: tuple[int, float]
    next: float
    ends: bool
    spent: float
    minutes: float | None


class Budget:
    """The length of a run: steps; minutes, which become steps after a probe; or tokens, which become steps when training starts.

    The pace of a machine changes, so the steps for given minutes are planned again at each tenth of the run or of the minutes, from
    the pace since the last plan. A run that is late fits the rest of its schedule into half of the minutes more; when those are over,
    a few steps of the schedule's tail end it. Progress never goes back.
    """

    def __init__(self, steps: int | None, minutes: float | None, tokens: float | None = None):
        if sum(length is not None for length in (steps, minutes, tokens)) != 1:
            given = {"steps": steps, "minutes": minutes, "tokens": tokens}
            now = " and ".join(f"{name} {value:g}" for name, value in given.items() if value is not None) or "none of them"
            raise UserError(
                f"give the length of the training as one of steps, minutes and tokens, and null for the others; now: {now}"
            )
        if min(length for length in (steps, minutes, tokens) if length is not None) <= 0:
            raise UserError("the length of the training (steps, minutes or tokens) must be above 0")
        self.total, self.minutes, self.tokens = steps, minutes, tokens
        self.elapsed = 0.0  # seconds at the last `tick`, including those of earlier processes
        self._done = 0  # steps at the last `tick`
        self.planned = (0, 0.0)  # step and progress at the last plan
        self.next = REPLANS[0]  # fraction at which to plan again; LATEST: never
        self.ends = False  # whether the tail has begun because the minutes are over
        self._began = 0.0
        self._mark: tuple[int, float] | None = None  # step and seconds from which the pace is measured

    def begin(self) -> None:
        """Start the clock."""
        self._began = time.monotonic() - self.elapsed

    def clock(self) -> float:
        """Seconds spent, including those of earlier processes."""
        return time.monotonic() - self._began

    def tick(self, done: int, elapsed: float) -> None:
        """Plan the number of steps if that is due. done: steps done. elapsed: seconds spent."""
        step_seconds, self.elapsed = (elapsed - self.elapsed) / max(1, done - self._done), elapsed
        self._done = done
        if self.minutes is None or self.ends or self.over(done):
            return
        late = elapsed / (self.minutes * 60)
        if late >= LATEST:
            self._end(done, step_seconds)
            return
        slow = done <= 3 and late < self.next  # the first steps are slow: caches, k-means, lazy initialization
        if self._mark is None or slow:
            self._mark = (done, elapsed)
            return
        if self.total is None:
            due = late >= PROBE_FRACTION and (done - self._mark[0] >= 5 or late >= self.next)
        else:
            due = max(late, self.progress(done)) >= self.next
        if due:
            self._plan(done)

    def _pace(self, done: int) -> float:
        """Seconds per step since the mark, or since the start of the run if no step was made since the mark."""
        step, seconds = self._mark or (done, 0.0)
        return (self.elapsed - seconds) / (done - step) if done > step else self.elapsed / done

    def _plan(self, done: int) -> None:
        """Fit the rest of the schedule into the rest of the time."""
        seconds = (self.minutes or 0.0) * 60
        in_time = self.elapsed < seconds
        left = max(1, int(((seconds - RESERVE_SECONDS if in_time else LATEST * seconds) - self.elapsed) / self._pace(done)))
        if self.total is None:
            self._set(done, left, max(self.progress(done), done / (done + left)))
        else:
            if not in_time and left < self.total - done and self.next <= 1.0:
                text = "step %d: the %.3g minutes are over; the rest of the schedule is fitted into half as much time again"
                log.warning(text, done, self.minutes)
            self._set(done, left if in_time else min(left, self.total - done), self.progress(done))
        now = max(self.elapsed / seconds, self.planned[1])
        self.next = next((fraction for fraction in REPLANS if fraction > now), LATEST)

    def _end(self, done: int, seconds_per_step: float) -> None:
        """Plan the last few steps, at the end of the schedule; they take a tenth of the minutes at most."""
        steps = max(1, min(TAIL_STEPS, int(6 * (self.minutes or 0.0) / seconds_per_step)))
        if self.total is not None:
            steps = min(steps, self.total - done)
        self.ends = True
        self._set(done, steps, self.progress(done))
        log.warning(
            "step %d: the %.3g minutes and half as much again are over; the run ends with %d %s of its schedule's tail",
            *(done, self.minutes, steps, "step" if steps == 1 else "steps"),
        )

    def _set(self, done: int, steps: int, progress: float) -> None:
        self.total, self._mark = done + steps, (done, self.elapsed)
        self.planned = (done, max(progress, 1 - STRIDE * steps))

    def set_tokens(self, done: int, seen: int, per_step: int) -> None:
        """Turn a length in tokens into steps. done: steps done. seen: tokens trained on. per_step: tokens per step."""
        if self.tokens is not None:
            self.total = done + max(0, math.ceil((self.tokens - seen) / per_step))

    def eta_minutes(self, done: int, seconds_per_step: float) -> float | None:
        """Minutes that are left at this pace; None while the number of steps is not known."""
        return None if self.total is None else max(0, self.total - done) * seconds_per_step / 60

    def progress(self, done: int) -> float:
        """Fraction of the run that is done, in [0, 1]: linear in steps from the last plan to the end; before a plan, by the clock."""
        begun, progress = self.planned
        if self.total is None:
            return max(progress, min(PROBE_FRACTION, self.elapsed / ((self.minutes or 1.0) * 60)))
        if self.over(done):
            return 1.0
        return progress + (1 - progress) * (done - begun) / (self.total - begun)

    def over(self, done: int) -> bool:
        """Whether `done` steps are the whole run."""
        return self.total is not None and done >= self.total

    def state(self) -> BudgetState:
        """The plan and the time spent, for a checkpoint."""
        return {
            "total": self.total,
            "planned": self.planned,
            "next": self.next,
            "ends": self.ends,
            "spent": self.elapsed,
            "minutes": self.minutes,
        }

    def restore(self, state: BudgetState, done: int) -> None:
        """Go on from a checkpoint of step `done`; a length that is configured now wins over the checkpoint's."""
        self.elapsed, self._done = float(state["spent"]), done
        if self.minutes is None:
            return
        if self.minutes != state["minutes"]:
            self.planned = (done, min(1.0, self.elapsed / (self.minutes * 60)))
            return
        self.total, self.planned, self.next, self.ends = state["total"], state["planned"], state["next"], state["ends"]
