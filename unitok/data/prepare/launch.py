"""Run workers in this process, in several of this machine, or as actors of a Ray cluster. The shards do not depend on it."""

import logging
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from unitok.data.prepare.encode import RunAborted
from unitok.data.prepare.plan import Plan, Run
from unitok.data.prepare.worker import Worker, threads
from unitok.data.shards import ShardInfo
from unitok.errors import UserError, first_line
from unitok.hardware import keep_large_blocks
from unitok.storage import is_remote

ERROR_RATE = 0.1  # default of max_error_rate
JUDGED_AFTER = 100  # documents, before the fraction of bad ones is checked
DOCUMENTS_PER_PROCESS = 1000  # at least, because a process takes seconds to start
RETRIES = 3  # of an actor that dies, and of its shard
REPORT_SECONDS = 0.5  # between two messages of a worker about its progress
COUNTS = ("documents", "files", "bytes", "failed", "tokens")  # what workers report


class ErrorRateExceeded(RunAborted):
    """More documents than `max_error_rate` allows could not be used."""


def launch(run: Run, todo: list[int], workers: int, engine: str, progress: "Progress") -> None:
    """Make the shards `todo`.

    workers: processes; 0: one per core (or GPU), fewer for few documents; with Ray, of the cluster. Errors: `ErrorRateExceeded`;
    `UserError` for anything else that a user can mend.
    """
    if engine not in ("local", "ray"):
        raise UserError(f"engine {engine}: choose local or ray")
    devices = 1 << 30 if engine == "ray" else _devices(run.plan.device)
    workers = workers or min(devices, -(-progress.total // DOCUMENTS_PER_PROCESS))
    workers = max(1, min(workers, len(todo)))
    overlap = run.plan.device != "cpu" or any(is_remote(spec.path) for spec in run.plan.specs())
    if engine == "ray":
        _run_ray(run, todo, workers, overlap, progress)
    elif workers == 1:
        _run_here(run, todo, overlap or devices > 1, progress)
    else:
        _run_local(run, todo, workers, overlap or workers < devices, progress)


def _devices(device: str) -> int:
    """The number of GPUs, or of cores that this process may use."""
    if device == "cuda":
        return torch.cuda.device_count()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return allowed if device == "cpu" else 1


class Progress:
    """Counts the work in a log and (if `shown`) a progress bar with rates; stops a run with too many bad documents."""

    def __init__(self, total: int, max_error_rate: float | None, run: Run, log: Path, shown: bool):
        self.total = total
        self.bar = tqdm(total=total, desc="tokenize", unit="document", mininterval=1.0, smoothing=0.05, disable=not shown)
        self.max_error_rate = ERROR_RATE if max_error_rate is None else max_error_rate
        self.run, self.log = run, log
        self.counts = dict.fromkeys(COUNTS, 0)
        self.before = dict.fromkeys(COUNTS, 0)
        self.began = self.reported = time.monotonic()

    def __enter__(self) -> "Progress":
        self._write(f"{self.total} documents in {len(self.run.shards)} shards")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        self._write(f"stopped: {str(error) or kind.__name__}" if kind else f"done: {self._rates()}")

    def had(self, entry: ShardInfo) -> None:
        """Count a shard that an earlier run made."""
        self.before["documents"] += entry["items"]
        self.before["failed"] += entry["skipped"]
        self.bar.update(entry["items"])

    def add(self, *more: int) -> None:
        """Add what was done since the last call, in the order of `COUNTS`. Errors: `ErrorRateExceeded`."""
        for name, count in zip(COUNTS, more):
            self.counts[name] += count
        self.bar.update(more[0])
        bad, tried = (self.counts[name] + self.before[name] for name in ("failed", "documents"))
        if time.monotonic() - self.reported > 1:
            self.bar.set_postfix_str(self._rates())
            if int(time.monotonic() - self.began) // 60 != int(self.reported - self.began) // 60:
                self._write(f"{tried} of {self.total}: {self._rates()}")
            self.reported = time.monotonic()
        if tried >= JUDGED_AFTER and bad > self.max_error_rate * tried:
            over = f"over max_error_rate {self.max_error_rate:g}"
            raise ErrorRateExceeded(f"{self.run.plan.name()}: {bad} of {tried} documents could not be used, {over}")

    def _rates(self) -> str:
        seconds = max(1e-3, time.monotonic() - self.began)
        files, size, tokens = (self.counts[name] / seconds for name in ("files", "bytes", "tokens"))
        failed = self.counts["failed"] + self.before["failed"]
        return f"{files:.0f} files/s, {tokens:.0f} tokens/s, {size / 1e6:.1f} MB/s, {failed} failed"

    def _write(self, line: str) -> None:
        with suppress(OSError), open(self.log, "a") as file:  # a full disk is reported elsewhere
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


# ---- Launchers ------------------------------------------------------------------------------------------------------


def _run_here(run: Run, todo: list[int], overlap: bool, progress: Progress) -> None:
    with threads(run.plan.threads):
        for entry in Worker(run.plan, "", progress.add, overlap).process_all(todo):
            progress.add(0, 0, 0, 0, entry["tokens"])


def _run_local(run: Run, todo: list[int], workers: int, overlap: bool, progress: Progress) -> None:
    """Start processes on this machine. Each asks for shards and reports its work through a pipe; one that dies ends the run."""
    context = get_context("spawn")
    remaining = iter(todo)
    running: dict[Connection, BaseProcess] = {}
    try:
        with _interrupts_ignored():  # Ctrl-C is for this process
            for number in range(workers):
                pipe, other_end = context.Pipe()
                running[pipe] = context.Process(target=_serve, args=(other_end, run.plan, number, overlap), daemon=True)
                running[pipe].start()
                other_end.close()
        pipes = set(running)
        while pipes:
            for pipe in [pipe for pipe in connection.wait(pipes) if isinstance(pipe, Connection)]:
                try:
                    message = pipe.recv()
                    if message == "next":
                        pipe.send(next(remaining, None))
                except (EOFError, ConnectionError):
                    remedy = "start again to go on, with fewer workers if it happens again"
                    raise UserError(f"{run.out}: a worker process died (out of memory?); {remedy}") from None
                if message == "done":
                    pipes.discard(pipe)
                elif isinstance(message, Exception):
                    raise message
                elif message != "next":
                    progress.add(*message)
    except RunAborted as error:
        error.errors = (*error.errors, *_errors_of(pipes))
        raise
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _errors_of(pipes: set[Connection]) -> Iterator[dict[str, str]]:
    """Stop the workers. Yields: the errors in the shards that they were making."""
    for pipe in pipes:
        with suppress(OSError, EOFError):
            pipe.send(None)
    for pipe in pipes:
        with suppress(OSError, EOFError):
            while pipe.poll(60) and (message := pipe.recv()) != "done":
                if isinstance(message, RunAborted):
                    yield from message.errors
                    break


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start processes that never see Ctrl-C; one that comes meanwhile reaches this process afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, plan: Plan, number: int, overlap: bool) -> None:
    """A worker process of `_run_local`: makes the shards that its parent names, and ends when the parent does."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # as the command line does
    keep_large_blocks()
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    counts, reported = [0] * len(COUNTS), time.monotonic()

    def report(*more: int, now: bool = False) -> None:
        nonlocal reported
        for i, count in enumerate(more):
            counts[i] += count
        if now or time.monotonic() - reported > REPORT_SECONDS:
            pipe.send(tuple(counts))
            counts[:], reported = [0] * len(COUNTS), time.monotonic()
        if pipe.poll():  # while a shard is made, the parent sends only the order to stop
            raise RunAborted("stopped")

    def assigned() -> Iterator[int]:
        pipe.send("next")
        while (index := pipe.recv()) is not None:
            yield index
            pipe.send("next")

    try:
        device = f"cuda:{number % torch.cuda.device_count()}" if plan.device == "cuda" else plan.device
        worker = Worker(plan, device, report, overlap)
        with threads(worker.run.plan.threads):
            for entry in worker.process_all(assigned()):
                report(0, 0, 0, 0, entry["tokens"], now=True)
        pipe.send("done")
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(traceback.format_exc())  # the parent shows it
        with suppress(OSError):  # a parent that was interrupted is gone
            pipe.send(error)


def _run_ray(run: Run, todo: list[int], workers: int, overlap: bool, progress: Progress) -> None:
    """Start actors on a Ray cluster; one that dies is started again, and so is its shard."""
    try:
        import ray
    except ImportError:
        raise UserError("engine ray: Ray is not installed; pip install 'unitok-lm[ray]'") from None

    class Actor:
        def __init__(self, plan: Plan):
            keep_large_blocks()
            self.worker = Worker(plan, overlap=overlap)  # an actor on a CPU has one core

        def ready(self) -> None:
            """Returns when the tokenizers are loaded."""

        def process(self, index: int) -> ShardInfo:
            with threads(self.worker.run.plan.threads):
                return self.worker.process(index)

    actors: list[Any] = []
    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        kind = "GPU" if run.plan.device == "cuda" else "CPU"
        available = int(ray.cluster_resources().get(kind, 0))
        if not available:
            raise UserError(f"engine ray: the cluster has no {kind}")
        remote: Any = ray.remote(num_cpus=1, num_gpus=kind == "GPU", max_restarts=RETRIES, max_task_retries=RETRIES)(Actor)
        actors += [remote.remote(_absolute(run.plan)) for _ in range(min(workers, available))]
        remaining = iter(todo)
        busy = {actor.ready.remote(): actor for actor in actors}  # only an actor that is ready gets a shard
        while busy:
            (done,), _ = ray.wait(list(busy), num_returns=1)
            actor = busy.pop(done)
            if (entry := ray.get(done)) is not None:
                progress.add(entry["items"], 0, 0, entry["skipped"], entry["tokens"])
            if (index := next(remaining, None)) is not None:
                busy[actor.process.remote(index)] = actor
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise UserError(f"engine ray: {first_line(error)}; start again to go on") from None
    finally:
        for actor in actors:
            ray.kill(actor)


def _absolute(plan: Plan) -> Plan:
    """The plan with absolute paths, which are valid in any working folder."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if path and "://" not in path else path

    spec = replace(plan.spec, root=absolute(plan.spec.root))
    source, recipe, out, bundle = map(absolute, (plan.source, plan.recipe, plan.out, plan.bundle))
    return replace(plan, spec=spec, source=source, recipe=recipe, out=out, bundle=bundle)
