"""Ctrl-C (SIGINT) and SIGTERM during `unitok fit`: the step ends, a checkpoint is written, and a line says how to go on.

During training the handler only records the signal; `Checkpoints` checks it at the end of a step, in all processes. Before the first
step, and at a second signal, the run ends at once. Processes that read data ignore both signals (`data.modules`). Lightning's own
handlers do not fit: its Ctrl-C writes no checkpoint, and its SIGTERM waits, inside the handler, for processes that may be waiting for
this one.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import lightning as L

from unitok.training.run_folder import is_first_process

log = logging.getLogger(__name__)


class Interruption:
    """Records the signal that a run receives."""

    def __init__(self) -> None:
        self.signal = 0  # its number
        self.makes_steps = False  # whether `signal` is checked at the end of a step
        self.trainer: L.Trainer | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle both signals while the context is open."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def watch(self, trainer: L.Trainer) -> None:
        """Turn Lightning's own handling of SIGTERM off; its connector then calls the previous handler, which is ours."""
        self.trainer = trainer
        vars(trainer._signal_connector)["_sigterm_notifier_fn"] = lambda *_: None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            self._end_children()
            os._exit(128 + number)
        self.signal = number
        if self.makes_steps:
            if is_first_process():
                os.write(2, b"\nstopping after this step (once more: stop at once)\n")
            return
        self._end_children()
        self.end("stopped before the first step")

    def end(self, message: str) -> NoReturn:
        """Log a line and end this process with the exit code of the signal, 130 or 143.

        Processes that the run started end with 0: after another code their launcher would kill the first process.
        """
        if is_first_process():
            log.warning(message)
        started = self.trainer is not None and not self.trainer.is_global_zero
        raise SystemExit(0 if started else 128 + (self.signal or signal.SIGTERM))

    def _end_children(self) -> None:
        """Kill the processes that this one started for a run on several devices."""
        launcher = self.trainer.strategy.launcher if self.trainer else None
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
