"""The engine: one thread that generates for all clients at once. Requests join and leave between steps (continuous batching).

The thread does nothing but steps of the decoder: new tokens go to the clients as they are, and are decoded in the threads that wait for
them. A client that has left is noticed before the next step, and its slots are free from then on.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from unitok.bundle import Bundle
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.sample.engine import Session
from unitok.sample.prefixes import PrefixCache
from unitok.sample.requests import Draft
from unitok.sample.stream import AHEAD

log = logging.getLogger("unitok")


class BusyError(Exception):
    """The queue is full."""


@dataclass
class Job:
    """One output that a client waits for.

    Args:
        emit: is called by the engine's thread with new tokens and whether they were the last; after an error with None and True.
    """

    draft: Draft
    emit: Callable[[list[int] | None, bool], None]
    canceled: bool = False


class Engine:
    """Generates for any number of clients.

    Args:
        slots: outputs that are generated together. queue: outputs that may wait for a slot; more are refused.
    """

    def __init__(self, bundle: Bundle, slots: int = 16, queue: int = 64, prefixes: PrefixCache | None = None):
        self.bundle, self.slots, self.queue = bundle, slots, queue
        self.grammar, self.prefixes = Grammar(bundle.vocab), prefixes
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}  # by id of the request
        self.tokens = 0  # generated so far
        self.steps = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._session = self._new_session()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _new_session(self) -> Session:
        return Session(self.bundle.inference, self.grammar, ahead=AHEAD, prefixes=self.prefixes)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether it takes no more jobs."""
        return self._stopping

    def check(self, drafts: Iterable[Draft]) -> None:
        """Raise `UserError` for drafts that can never be generated. It takes time; `submit` does not check again."""
        drafts, most = list(drafts), self.slots + self.queue
        if len(drafts) > most:
            raise UserError(f"n: {len(drafts)} outputs are more than the {most} that this server can have in progress")
        self._session.check(draft.request for draft in drafts)

    def submit(self, jobs: Iterable[Job]) -> None:
        """Let jobs join, all or none. Errors: `BusyError`."""
        jobs = list(jobs)
        with self._changed:
            if self._stopping or len(self.waiting) + len(jobs) > self.queue + max(0, self.slots - len(self.running)):
                raise BusyError
            self.waiting += jobs
            self._changed.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Let jobs leave before they are done; jobs that are done already do not matter."""
        with self._changed:
            for job in jobs:
                job.canceled = True
            self._changed.notify()

    def stop(self) -> None:
        """Take no more jobs, and return when those that were taken are done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    # ---- The thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                if not self._admit():
                    return
                self._step()
            except Exception:  # whatever it is, the others must be served
                log.exception("a step failed; all its requests end")
                self._fail()

    def _step(self) -> None:
        for event in self._session.step():
            job = self.running[id(event.request)]
            self.tokens += len(event.ids)
            if event.done:
                del self.running[id(event.request)]
            if not job.canceled:
                job.emit(event.ids, event.done)
        self.steps += 1

    def _admit(self) -> bool:
        """Let those who left go, and those who wait join. Waits while there is nothing to do; False when there will be no more."""
        with self._changed:
            while True:
                for key, job in [(key, job) for key, job in self.running.items() if job.canceled]:
                    self._session.remove(job.draft.request)
                    del self.running[key]
                self.waiting = deque(job for job in self.waiting if not job.canceled)
                joining = []
                while self.waiting and len(self.running) < self.slots:
                    joining.append(self.waiting.popleft())
                    self.running[id(joining[-1].draft.request)] = joining[-1]
                if self.running:
                    break
                if self._stopping:
                    return False
                self._changed.wait()
        for job in joining:
            self._session.add(job.draft.request)
        return True

    def _fail(self) -> None:
        """End all running jobs with an error."""
        with self._changed:
            jobs, self.running = list(self.running.values()), {}
        for job in jobs:
            job.emit(None, True)
        self._session = self._new_session()
