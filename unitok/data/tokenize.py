"""`unitok tokenize`: raw files -> token shards. And back: `unitok detokenize`.

The shard is the unit. The sources are listed once, in a fixed order (`unitok.data.plan`); `process(run, i)` reads the items
of shard i, encodes them and writes the shard beside its place. So the result does not depend on the number of processes, nor
on how often they were killed: shards that are there whole are kept, and `dataset.json` comes last. Processes of this machine,
of a SLURM array or of a Ray cluster are launchers over that one function. Bad files are skipped, counted and listed in
`errors.jsonl` with what is wrong.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from unitok.bundle import TOKENIZERS, Unitok
from unitok.data.encode import Encoded, Encoder, Stop
from unitok.data.plan import Plan, Run, drop, fingerprint, locked, make_plan, open_sources, sample_items, write_whole
from unitok.data.shards import TokenDataset, shard_name, write_dataset_json, write_shard
from unitok.data.sources import Item, Source
from unitok.document import format_raw_document
from unitok.errors import UserError

JUDGED_AFTER = 100  # documents, before the share of bad ones is looked at
WORTH_A_PROCESS = 1000  # documents; another process takes seconds to start
COUNTS = ("documents", "files", "bytes", "failed", "ids", "stop")  # what workers tell while they work


class Worker:
    """Keeps a bundle's tokenizers loaded and makes one shard after another of a planned run.

    Args:
        plan: as it lies in its output folder. device: where its tokenizers run.
        progress: told of documents, files, bytes and failures as they come.
    """

    def __init__(self, plan: Plan, device: str = "", progress: Callable[[int, int, int, int], None] | None = None):
        self.run = Run(plan)
        self.unitok = Unitok.from_pretrained(plan.bundle, device=device or plan.device, parts=TOKENIZERS)
        self.encoder = Encoder(self.unitok, plan.image_area, plan.image_fit, plan.seed, progress=progress)

    def process(self, index: int) -> dict[str, Any]:
        """Make shard `index`; -> its entry for `dataset.json`. Deterministic; safe to repeat, and at the same time elsewhere."""
        run = self.run
        if made := _made(run, index):
            return made
        encoded = encode_items(self.encoder, run.sources, run.items(index))
        try:
            entry = write_shard(run.out / shard_name(index), encoded.documents, self.unitok.vocab, run.work)
            split = run.shards[index][0]
            entry |= {"split": split} if len(run.splits) > 1 else {}
            entry |= {"skipped": len(encoded.errors)} if encoded.errors else {}
            entry |= {"filtered": encoded.filtered} if encoded.filtered else {}
            write_whole(run.record(index), json.dumps([entry, encoded.errors], ensure_ascii=False), run.work)
        except OSError as error:
            raise _full(error, run.out) from None
        return entry


def encode_items(encoder: Encoder, sources: list[Source], items: Sequence[tuple[int, Item]]) -> Encoded:
    """Items of a listing, each with the number of its source -> documents."""

    def makes() -> Iterator[tuple]:
        for number, group in groupby(items, key=lambda numbered: numbered[0]):
            source, run = sources[number], [item for _, item in group]
            for item, make in zip(run, source.read(run), strict=True):
                yield item.id, source.prefix + item.where, source.spec, make

    return encoder.run(makes())


def _full(error: OSError, out: Path) -> Exception:
    """A full disk in words; any other error as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{out}: {error.strerror}; make room and start again: what is done is kept")
    return error


def _made(run: Run, index: int) -> dict[str, Any] | None:
    """The entry of a shard that an earlier run finished."""
    try:
        entry = json.loads(run.record(index).read_text())[0]
        same = (run.out / entry["file"]).stat().st_size == entry["bytes"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return entry if same else None


# ---- The verb -------------------------------------------------------------------------------------------------------


def tokenize(
    plan: Plan,
    workers: int = 1,
    max_error_rate: float = 1.0,
    engine: str = "local",
    part: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
    """Run a plan; -> the content of `dataset.json`, or None where other runs have yet to finish their parts.

    Args:
        workers: processes (or Ray actors); 0: one for each core, or each GPU, but not for a handful of documents.
        max_error_rate: share of bad documents, over which it stops; looked at after the first hundred.
        engine: `local` or `ray`.
        part: (i, n) for the i-th of n runs that share the work, on one machine or many: shards i, i + n, i + 2n, …

    Errors: `UserError` for a source without a usable document, too many bad ones, an output folder that holds something
    else or that another run works at, and a full disk.
    """
    out = Path(plan.out)
    if part is not None and not 0 <= part[0] < part[1]:
        raise UserError(f"--shard-index {part[0]} of --num-shards {part[1]}: it counts from 0 and stays below")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    sources = open_sources(plan)
    unitok = Unitok.from_pretrained(plan.bundle, parts=TOKENIZERS)
    if (out / "dataset.json").exists():
        return _complete_already(plan, unitok)
    planned = (out / "plan.json").exists()
    if out.exists() and not planned and any(f.name != ".work" and f.suffix != ".log" for f in out.iterdir()):
        raise UserError(f"{out}: not empty and no data set; choose another folder")
    _check_parts(sources, unitok)
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out, part) as log:
            try:
                (out / ".work").mkdir(exist_ok=True)
                with _alone(out / ".work" / "planning"):
                    make_plan(plan, unitok.vocab)
            except OSError as error:
                raise _full(error, out) from None
            if part is None:
                drop((out / ".work").glob("*.partial"))
            return _work(Run(plan), unitok, workers, max_error_rate, engine, part, log)
    except UserError:
        if created and not any((out / ".work").glob("*.json")):
            shutil.rmtree(out, ignore_errors=True)
        raise


def _work(
    run: Run, unitok: Unitok, workers: int, max_error_rate: float, engine: str, part: tuple[int, int] | None, log: Path
) -> dict[str, Any] | None:
    mine = range(len(run.shards)) if part is None else range(part[0], len(run.shards), part[1])
    made = {i: entry for i in mine if (entry := _made(run, i))}
    todo = [i for i in mine if i not in made]
    total = sum(run.shards[i][2] - run.shards[i][1] for i in mine)
    workers = workers or min(_devices(run.plan.device), -(-total // WORTH_A_PROCESS))
    workers = max(1, min(workers, len(todo)))
    launch = {"local": _run_here if workers == 1 else _run_local, "ray": _run_ray}.get(engine)
    if launch is None:
        raise UserError(f"--engine {engine}: choose local or ray")
    with _Progress(total, max_error_rate, run, log) as progress:
        for entry in made.values():
            progress.had(entry)
        if todo:
            launch(run, todo, workers, progress)
    if any(_made(run, i) is None for i in range(len(run.shards))):
        print(f"{run.out}: part {part[0] if part else 0} done; the others have yet to finish")
        return None
    with _alone(run.work / "planning"):
        if (run.out / "dataset.json").exists():  # another part closed it meanwhile
            return TokenDataset(run.out).info
        return _close(run, unitok, max_error_rate)


def _close(run: Run, unitok: Unitok, max_error_rate: float) -> dict[str, Any]:
    """All shards are there: write what closes the data set, and clean up."""
    entries, bad = [], 0
    try:
        partial = run.work / "errors.jsonl"
        with open(partial, "w") as file:
            for i in range(len(run.shards)):
                entry, errors = json.loads(run.record(i).read_text())
                entries.append(entry)
                bad += len(errors)
                file.writelines(json.dumps(e, ensure_ascii=False) + "\n" for e in errors)
        partial.replace(run.out / "errors.jsonl")
    except OSError as error:
        raise _full(error, run.out) from None
    usable = sum(e["documents"] for e in entries)
    tried = usable + bad
    if usable == 0 or bad > max_error_rate * tried:
        first = open(run.out / "errors.jsonl").readline()
        said = f"; the first: {json.loads(first)['error']}" if first else ""
        what = "all were filtered out" if not bad else f"{bad} of {tried} documents could not be used{said}"
        if usable == 0:
            shutil.rmtree(run.out)
            raise UserError(f"{run.plan.name()}: {what}")
        raise UserError(f"{run.plan.name()}: {what}; see {run.out / 'errors.jsonl'}. {MORE}")
    if bad:
        print(f"{bad} of {tried} documents were skipped; see {run.out / 'errors.jsonl'}")
    else:
        (run.out / "errors.jsonl").unlink()
    options = {"shard_size": run.plan.shard_size} | run.plan.options()
    info = write_dataset_json(run.out, unitok.vocab, entries, options, run.work)
    shutil.rmtree(run.work)
    by = ", ".join(f"{n} {m}" for m, n in info["ids_by_modality"].items())
    print(f"{run.out}: {info['documents']} documents, {info['ids']} ids ({by}), {len(entries)} shards")
    return info


MORE = "Start again with a higher --max-error-rate to go on, or mend them and start with a new folder"


def _complete_already(plan: Plan, unitok: Unitok) -> dict[str, Any]:
    out = Path(plan.out)
    info = TokenDataset(out).info
    known = json.loads((out / "plan.json").read_text()) if (out / "plan.json").exists() else {}
    if known.get("fingerprint") != fingerprint(plan, unitok.vocab):
        raise UserError(f"{out}: holds a data set made from another source, bundle or options; choose another folder")
    shutil.rmtree(out / ".work", ignore_errors=True)  # of a run that was killed at its very end
    print(f"{out}: complete already, {info['documents']} documents")
    return info


def _check_parts(sources: list[Source], unitok: Unitok) -> None:
    """What the bundle lacks for the first documents is said before anything is written."""
    for source in sources:
        for item, _ in zip(source.items(), range(8)):
            if item.kind == "error":
                continue
            for make in source.read([item]):
                try:
                    kinds = sorted({part.type for raw in make() for part in raw.content})
                except Exception:  # told when it is read in its turn
                    continue
                for kind in kinds:
                    unitok.need(kind)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One of several processes at a time; the others wait."""
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except FileNotFoundError:  # the folder is gone: another process closed the data set
        yield


def _devices(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1 if device == "cpu" else 1


class _Progress:
    """A bar with files, ids and bytes a second, failures and time left; stops a run with too many bad documents."""

    def __init__(self, total: int, max_error_rate: float, run: Run, log: Path):
        self.bar = tqdm(total=total, desc="tokenize", unit="document", mininterval=1.0, smoothing=0.05)
        self.max_error_rate, self.run, self.log = max_error_rate, run, log
        self.counts = dict.fromkeys(COUNTS, 0)
        self.before = dict.fromkeys(COUNTS, 0)
        self.began = self.told = time.monotonic()

    def __enter__(self) -> "_Progress":
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


def _run_here(run: Run, todo: list[int], workers: int, progress: _Progress) -> None:
    """One shard after another, in this process."""
    with _threads(run.plan.threads):
        worker = Worker(run.plan, progress=lambda d, f, b, e: progress.add(documents=d, files=f, bytes=b, failed=e))
        for index in todo:
            progress.add(ids=worker.process(index)["ids"])


def _run_local(run: Run, todo: list[int], workers: int, progress: _Progress) -> None:
    """Processes of this machine, which take the next shard when they are done with one."""
    context = get_context("spawn")
    counts, number = context.Array("q", len(COUNTS)), context.Value("i", 0)
    seen = [0] * len(COUNTS)

    def tell() -> None:
        now = [counts[i] for i in range(len(COUNTS))]
        more = dict(zip(COUNTS, (a - b for a, b in zip(now, seen, strict=True)), strict=True))
        seen[:] = now
        progress.add(**more)

    given = (run.plan, counts, number)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=given) as pool:
        waiting: set[Future] = set()
        left = iter(todo)
        try:
            while True:
                while len(waiting) < 2 * workers and (index := next(left, None)) is not None:
                    waiting.add(pool.submit(_process, index))
                if not waiting:
                    break
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                tell()
            tell()
        except BaseException as error:
            counts[COUNTS.index("stop")] = 1
            for future in waiting:
                future.cancel()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"{run.out}: a worker process died (out of memory?); start again to go on, with fewer --workers if it "
                    "happens again"
                ) from None
            if isinstance(error, Stop):
                wait(waiting, timeout=60)
                stopped = [f.exception() for f in waiting if f.done() and not f.cancelled()]
                errors = [e for stop in stopped if isinstance(stop, Stop) for e in stop.errors]
                raise Stop(str(error), tuple(errors)) from None
            raise


_worker: Worker | None = None


def _start_worker(plan: Plan, counts: Any, number: Any) -> None:
    """A process of `_run_local` begins: it ends with its parent, and keeps its tokenizers."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    with number:
        mine = number.value
        number.value += 1
    device = f"cuda:{mine % torch.cuda.device_count()}" if plan.device == "cuda" else plan.device
    torch.set_num_threads(Run(plan).plan.threads)

    def progress(documents: int, files: int, size: int, failed: int) -> None:
        with counts:
            for i, more in enumerate((documents, files, size, failed)):
                counts[i] += more
            if counts[COUNTS.index("stop")]:
                raise Stop("stopped")

    _worker = Worker(plan, device, progress)
    _worker.counts = counts  # type: ignore[attr-defined]


def _process(index: int) -> None:
    assert _worker is not None
    entry = _worker.process(index)
    counts = _worker.counts  # type: ignore[attr-defined]
    with counts:
        counts[COUNTS.index("ids")] += entry["ids"]


def _run_ray(run: Run, todo: list[int], workers: int, progress: _Progress) -> None:
    """Actors of a Ray cluster that keep the tokenizers loaded; one that dies is started again, and its shard made again."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray: Ray is not installed; `pip install 'unitok[ray]'`") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)

    class Actor:
        def __init__(self, plan: Plan):
            torch.set_num_threads(Run(plan).plan.threads)
            self.worker = Worker(plan)

        def process(self, index: int) -> dict[str, Any]:
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


# ---- Before: how much will it be? -----------------------------------------------------------------------------------


def estimate(plan: Plan, sample: int = 200) -> dict[str, float]:
    """What a run would give, from a sample of its documents spread over the sources; nothing is written.

    -> `listed` documents, `documents` that they become, `ids`, `bad` and `filtered` (shares of the listed), `hours` of one
    process, `gigabytes` of shards.
    """
    sources = open_sources(plan)
    unitok = Unitok.from_pretrained(plan.bundle, device=plan.device, parts=TOKENIZERS)
    _check_parts(sources, unitok)
    listed, items = sample_items(plan, sources, sample)
    encoder = Encoder(unitok, plan.image_area, plan.image_fit, plan.seed)
    encode_items(encoder, sources, items[:1])  # for warming up
    with _threads(plan.threads), TemporaryDirectory() as folder:
        began = time.perf_counter()
        encoded = encode_items(encoder, sources, items)
        entry = write_shard(Path(folder) / "sample.arrow", encoded.documents, unitok.vocab)
        seconds = time.perf_counter() - began
    more = listed / len(items)
    return {
        "listed": listed,
        "sample": len(items),
        "documents": entry["documents"] * more,
        "ids": entry["ids"] * more,
        "bad": len(encoded.errors) / len(items),
        "filtered": sum(encoded.filtered.values()) / len(items),
        "hours": seconds * more / 3600,
        "gigabytes": entry["bytes"] * more / 1e9,
    } | {f"{modality}_ids": count * more for modality, count in entry["ids_by_modality"].items()}


def print_estimate(plan: Plan, found: dict[str, float]) -> None:
    """An estimate in words."""
    by = ", ".join(f"{n:,.0f} {name.removesuffix('_ids')}" for name, n in found.items() if name.endswith("_ids"))
    hours = found["hours"]
    time_needed = (
        f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
    )
    print(f"{plan.name()}: {found['listed']:,.0f} documents listed; from {found['sample']:.0f} of them, about:")
    print(f"  documents   {found['documents']:,.0f} ({found['bad']:.1%} bad, {found['filtered']:.1%} filtered out)")
    print(f"  ids         {found['ids']:,.0f} ({by})")
    print(f"  disk        {found['gigabytes']:.3g} GB")
    print(f"  time        {time_needed} of one process with {plan.threads} threads on {plan.device}")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- Back -----------------------------------------------------------------------------------------------------------


def detokenize(data: Path, out: Path, bundle: Path, device: str = "cpu", limit: int = 0) -> int:
    """Shards -> files: `documents.jsonl` with its images and sounds in `out`; -> number of documents. Inverse of `tokenize`."""
    dataset = TokenDataset(data)
    unitok = Unitok.from_pretrained(bundle, device=device, parts=("text", "image", "audio"))
    unitok.vocab.check_covers(dataset.vocab, str(bundle), str(data))
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    count = min(len(dataset), limit or len(dataset))
    with open(out / "documents.jsonl.partial", "w") as file:
        for i in tqdm(range(count), desc="detokenize", unit="document", mininterval=1.0):
            raw = unitok.write_document(dataset.document(i), out, f"{i:06d}")
            file.write(format_raw_document(raw, out) + "\n")
    (out / "documents.jsonl.partial").replace(out / "documents.jsonl")
    return count
