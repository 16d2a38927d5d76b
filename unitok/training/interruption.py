"""Ctrl-C (SIGINT) and SIGTERM during `unitok fit`: the step ends, a checkpoint is written, and a line says how to go on.

While steps are made the handler only takes note; `Checkpoints` looks at the note at the end of a step, in all processes. Before
the first step, and at a second signal, the run ends at once. Processes that read data leave both signals to the trainer
(`data.modules`). Lightning's own answers do not fit: its Ctrl-C writes no checkpoint, and its SIGTERM waits, inside the
handler, for processes that may wait for this one.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import lightning as L

from unitok.training.run_folder import is_first_process


class Interruption:
    """Which signal came, if one did."""

    def __init__(self) -> None:
        self.signal = 0
        self.makes_steps = False  # whether the end of a step will look at `signal`
        self.trainer: L.Trainer | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take the two signals over."""
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def watch(self, trainer: L.Trainer) -> None:
        """Keep Lightning's answer to SIGTERM off."""
        self.trainer = trainer
        lightnings: Any = trainer._signal_connector
        lightnings._sigterm_notifier_fn = lambda *_: None  # it then calls the handler that it found, ours

    def _take(self, number: int, frame: Any) -> None:
        if self.signal:
            self._end_children()
            os._exit(128 + number)
        self.signal = number
        if self.makes_steps:
            if is_first_process():
                os.write(2, b"\nthis step is the last one (once more: stop at once)\n")
            return
        self._end_children()
        self.end("stopped before the first step")

    def end(self, told: str) -> NoReturn:
        """End this process with a line and the exit code of its signal: 130 or 143, and 0 for a process that another started
        (the run's first process would be killed for its sake)."""
        if is_first_process():
            print(told, file=sys.stderr)
        started_by_another = self.trainer is not None and not self.trainer.is_global_zero
        raise SystemExit(0 if started_by_another else 128 + (self.signal or signal.SIGTERM))

    def _end_children(self) -> None:
        """Processes of a run on several devices that this one started."""
        launcher = self.trainer.strategy.launcher if self.trainer else None
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
