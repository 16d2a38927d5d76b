"""Pipelines of stages: commands that a user could type, each in a process of its own, which frees its memory; and functions.

`state.json` lists the finished stages: a pipeline that is started again continues with the stage that was interrupted, and a training
continues from its newest checkpoint.
"""

import ctypes
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypedDict, cast

from unitok.errors import UserError
from unitok.files import read_json, write_json
from unitok.hardware import fast_bfloat16

SAVE_SECONDS = 10  # between two writes of state.json: the time that a killed pipeline may lose


class State(TypedDict, total=False):
    """What `state.json` keeps. options: of the pipeline; minutes: of each training."""

    options: dict[str, float]
    done: list[str]
    seconds: dict[str, float]
    peak_memory_gb: float
    minutes: dict[str, float]
    precision: str


class Pipeline:
    """Runs stages in a folder and keeps in `state.json` which are done.

    Args:
        out: folder to write. kind: what it is called in messages. minutes: that it should take, to say how far it is.
        options: what must be the same when it is started again.
    """

    def __init__(self, out: Path, kind: str, minutes: float, options: Mapping[str, float]):
        self.out, self.kind, self.minutes = out, kind, minutes
        self.file = out / "state.json"
        self.state = State(options=dict(options), done=[], seconds={}, peak_memory_gb=0.0, minutes={})
        if self.file.exists():
            self.state = cast(State, read_json(self.file, "", *self.state))
            if self.state["options"] != options:
                earlier = ", ".join(f"{name} {value:g}" for name, value in self.state["options"].items())
                raise UserError(f"{out}: has a {kind} with other options ({earlier}); choose another folder, or remove it")
        elif out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: not empty and not a {kind}; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        self.precision = self._precision()

    def _precision(self) -> str:
        if "precision" not in self.state:
            self.state["precision"] = "bf16-mixed" if fast_bfloat16() else "32-true"
        return self.state["precision"]

    @property
    def seconds(self) -> float:
        """Time spent so far, over all restarts."""
        return sum(self.state["seconds"].values())

    def stage(self, name: str, *commands: list[str] | Callable[[], None]) -> None:
        """Run a stage unless it is done. commands: arguments of `unitok`, or functions."""
        if name in self.state["done"]:
            print(f"== {name}: already done")
            return
        print(f"== {name} ({self.seconds:.0f} s of {self.minutes * 60:.0f} s spent)", flush=True)
        began, before = time.monotonic(), self.state["seconds"].get(name, 0.0)

        def save() -> None:
            self.state["seconds"][name] = before + time.monotonic() - began
            write_json(self.file, self.state)

        for command in commands:
            if callable(command):
                command()
            else:
                self._run(command, save)
            save()
        self.state["done"].append(name)
        write_json(self.file, self.state)

    def _run(self, command: list[str], save: Callable[[], None]) -> None:
        """Run one command as a process; save the state while it runs, and note the peak memory of the largest process so far."""
        process = subprocess.Popen([sys.executable, "-m", "unitok", *command], preexec_fn=_die_with_parent)
        while process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(SAVE_SECONDS)
            save()
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        self.state["peak_memory_gb"] = max(self.state["peak_memory_gb"], largest)
        if process.returncode != 0:
            raise UserError(f"the command `unitok {' '.join(command)}` failed with exit code {process.returncode}")

    def minutes_for(self, name: str, minutes: float) -> str:
        """The minutes of a training. They are decided once, because a restart must not change its schedule."""
        self.state["minutes"].setdefault(name, round(minutes, 3))
        return str(self.state["minutes"][name])


def _die_with_parent() -> None:
    """On Linux, end this process when the pipeline that started it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
