"""Processes that tokenize: this one, several of this machine, or the actors of a Ray cluster; and the progress of them all.

A launcher calls `Worker.process` for a list of shards, in any order, as often as it must. Nothing here decides what is in a
shard.
"""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import takewhile
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from unitok.data.encode import Stop
from unitok.data.plan import Plan, Run, write_whole
from unitok.data.worker import Worker, threads
from unitok.errors import UserError

JUDGED_AFTER = 100  # documents, before the share of bad ones is looked at
WORTH_A_PROCESS = 1000  # documents; another process takes seconds to start
COUNTS = ("documents", "files", "bytes", "failed", "ids", "stop")  # what workers tell while they work
MORE = "Start again with a higher --max-error-rate to go on, or mend them and start with a new folder"


def launch(run: Run, todo: list[int], workers: int, engine: str, progress: "Progress") -> None:
    """Make the shards `todo`. workers: 0 for one on each core (or GPU), fewer where there is little to do.

    Errors: `Stop` for too many bad documents; `UserError` for what else a user can mend.
    """
    workers = workers or min(_devices(run.plan.device), -(-progress.total // WORTH_A_PROCESS))
    workers = max(1, min(workers, len(todo)))
    if engine not in ("local", "ray"):
        raise UserError(f"--engine {engine}: choose local or ray")
    if engine == "ray":
        _run_ray(run, todo, workers, progress)
    elif workers == 1:
        _run_here(run, todo, progress)
    else:
        _run_local(run, todo, workers, progress)


def _devices(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1 if device == "cpu" else 1


class Progress:
    """A bar with files, ids and bytes a second, failures and time left; stops a run with too many bad documents."""

    def __init__(self, total: int, max_error_rate: float, run: Run, log: Path):
        self.total = total
        self.bar = tqdm(total=total, desc="tokenize", unit="document", mininterval=1.0, smoothing=0.05)
        self.max_error_rate, self.run, self.log = max_error_rate, run, log
        self.counts = dict.fromkeys(COUNTS, 0)
        self.before = dict.fromkeys(COUNTS, 0)
        self.began = self.told = time.monotonic()

    def __enter__(self) -> "Progress":
        self._write(f"{self.bar.total} documents in {len(self.run.shards)} shards")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.bar.close()
        self._write(f"stopped: {error}" if error else f"done: {self._rates()}")
        if isinstance(error, Stop):
            records = [r for i in range(len(self.run.shards)) if (r := self.run.record(i)).exists()]
            errors = [e for record in records for e in json.loads(record.read_text())[1]] + list(error.errors)
            text = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in errors)
            write_whole(self.run.out / "errors.jsonl", text, self.run.work)

    def had(self, entry: dict[str, Any]) -> None:
        """A shard that was there before."""
        self.before["documents"] += entry["documents"] + entry.get("skipped", 0)
        self.before["failed"] += entry.get("skipped", 0)
        self.bar.update(entry["documents"] + entry.get("skipped", 0))

    def add(self, **more: int) -> None:
        """What came since the last call; errors: `Stop` for too many bad documents."""
        for name, count in more.items():
            self.counts[name] += count
        self.bar.update(more.get("documents", 0))
        if time.monotonic() - self.told > 1:
            self.bar.set_postfix_str(self._rates())
            if int(time.monotonic() - self.began) // 60 != int(self.told - self.began) // 60:
                self._write(f"{self.bar.n} of {self.bar.total}: {self._rates()}")
            self.told = time.monotonic()
        bad, tried = (self.counts[name] + self.before[name] for name in ("failed", "documents"))
        if tried >= JUDGED_AFTER and bad > self.max_error_rate * tried:
            raise Stop(
                f"{self.run.plan.name()}: {bad} of {tried} documents could not be used, over --max-error-rate "
                f"{self.max_error_rate:g}; see {self.run.out / 'errors.jsonl'}. {MORE}"
            )

    def _rates(self) -> str:
        seconds = max(1e-3, time.monotonic() - self.began)
        files, size, ids = (self.counts[name] / seconds for name in ("files", "bytes", "ids"))
        return f"{files:.0f} files/s, {ids:.0f} ids/s, {size / 1e6:.1f} MB/s, {self.counts['failed'] + self.before['failed']} failed"

    def _write(self, line: str) -> None:
        with open(self.log, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


# ---- Launchers ------------------------------------------------------------------------------------------------------


def _run_here(run: Run, todo: list[int], progress: Progress) -> None:
    """One shard after another, in this process."""
    with threads(run.plan.threads):
        worker = Worker(run.plan, progress=lambda d, f, b, e: progress.add(documents=d, files=f, bytes=b, failed=e))
        for entry in worker.process_all(todo):
            progress.add(ids=entry["ids"])


def _run_local(run: Run, todo: list[int], workers: int, progress: Progress) -> None:
    """Processes of this machine, each of which takes the next shard when it has encoded one."""
    context = get_context("spawn")
    counts, begun, taken = context.Array("q", len(COUNTS)), context.Value("q", 0), context.Value("q", 0)
    seen = [0] * len(COUNTS)

    def tell() -> None:
        now = [counts[i] for i in range(len(COUNTS))]
        more = dict(zip(COUNTS, (a - b for a, b in zip(now, seen, strict=True)), strict=True))
        seen[:] = now
        progress.add(**more)

    given = (run.plan, todo, counts, begun, taken)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=given) as pool:
        running = {pool.submit(_serve) for _ in range(workers)}
        try:
            while running:
                done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                tell()
        except BaseException as error:
            counts[COUNTS.index("stop")] = 1
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"{run.out}: a worker process died (out of memory?); start again to go on, with fewer --workers if it "
                    "happens again"
                ) from None
            if isinstance(error, Stop):
                wait(running, timeout=60)
                stopped = [future.exception() for future in running if future.done()]
                errors = [e for stop in stopped if isinstance(stop, Stop) for e in stop.errors]
                raise Stop(str(error), tuple(errors)) from None
            raise


_work: Callable[[], None] | None = None  # what a process of `_run_local` does


def _serve() -> None:
    assert _work is not None
    _work()


def _start_worker(plan: Plan, todo: list[int], counts: Any, begun: Any, taken: Any) -> None:
    """A process of `_run_local` begins: it ends with its parent, and keeps its tokenizers."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    device = f"cuda:{_next(begun) % torch.cuda.device_count()}" if plan.device == "cuda" else plan.device

    def add(*more: int) -> None:
        """Documents, files, bytes, failures, ids that came."""
        with counts:
            for i, count in enumerate(more):
                counts[i] += count
            if counts[COUNTS.index("stop")]:
                raise Stop("stopped")

    worker = Worker(plan, device, add)

    def work() -> None:
        mine = takewhile(lambda i: i < len(todo), iter(lambda: _next(taken), -1))
        with threads(worker.run.plan.threads):
            for entry in worker.process_all(todo[i] for i in mine):
                add(0, 0, 0, 0, entry["ids"])

    _work = work


def _next(counter: Any) -> int:
    """The next number; no other process gets it."""
    with counter:
        counter.value += 1
        return counter.value - 1


def _run_ray(run: Run, todo: list[int], workers: int, progress: Progress) -> None:
    """Actors of a Ray cluster that keep the tokenizers loaded; one that dies is started again, and its shard made again."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray: Ray is not installed; `pip install 'unitok[ray]'`") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)

    class Actor:
        def __init__(self, plan: Plan):
            self.worker = Worker(plan)

        def process(self, index: int) -> dict[str, Any]:
            with threads(self.worker.run.plan.threads):
                return self.worker.process(index)

    gpus = 1 if run.plan.device == "cuda" else 0
    remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(Actor)
    absolute = replace(run.plan, out=str(run.out.absolute()), bundle=str(Path(run.plan.bundle).absolute()))
    actors: list[Any] = [remote.remote(_absolute(absolute)) for _ in range(workers)]
    left, busy = iter(todo), dict[Any, Any]()
    try:
        for actor in actors:
            if (index := next(left, None)) is not None:
                busy[actor.process.remote(index)] = actor
        while busy:
            (done,), _ = ray.wait(list(busy), num_returns=1)
            actor = busy.pop(done)
            try:
                entry = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UserError) else error) from None
            skipped = entry.get("skipped", 0)
            progress.add(documents=entry["documents"] + skipped, failed=skipped, ids=entry["ids"], bytes=entry["bytes"])
            if (index := next(left, None)) is not None:
                busy[actor.process.remote(index)] = actor
    finally:
        for actor in actors:
            ray.kill(actor)


def _absolute(plan: Plan) -> Plan:
    """The same with paths that hold in any working folder."""

    def full(path: str) -> str:
        return path if not path or "://" in path else str(Path(path).absolute())

    return replace(plan, source=full(plan.source), recipe=full(plan.recipe))
