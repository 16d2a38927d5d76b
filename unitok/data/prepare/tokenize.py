"""`unitok tokenize`: raw files -> token shards. And back: `unitok detokenize`.

The sources are listed once, in a fixed order (`plan`); `Worker.process(i)` makes shard i of its items (`worker`), called by
processes of this machine, of a SLURM array or of a Ray cluster (`launch`). So the result does not depend on their number, nor on
how often they were killed: shards that are there whole are kept, and `dataset.json` comes last. Bad files are skipped, counted
and listed in `errors.jsonl`.
"""

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from unitok.bundle import Bundle
from unitok.data.prepare.encode import Encoder, RunAborted
from unitok.data.prepare.launch import ERROR_RATE, JUDGED_AFTER, ErrorRateExceeded, Progress, launch
from unitok.data.prepare.plan import Plan, Run, check_same, make_plan, open_sources, sample_items
from unitok.data.prepare.sources import Source
from unitok.data.prepare.summary import most, reason, show_document, summary, total
from unitok.data.prepare.worker import encode_items, full_disk, made, threads
from unitok.data.shards import TokenDataset, write_dataset_json, write_shard
from unitok.errors import UserError, visible
from unitok.files import atomic_write, json_line, lock, remove, remove_partials
from unitok.interleaved import format_raw_document

log = logging.getLogger("unitok")
MORE = "Start again with a higher max_error_rate to go on, or mend them and start with a new folder"
EXAMPLES = 3  # documents that a dry run shows


def tokenize(
    plan: Plan,
    workers: int = 1,
    max_error_rate: float | None = None,
    engine: str = "local",
    part: tuple[int, int] | None = None,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Run a plan; -> the content of `dataset.json`, or None where other runs have yet to finish their parts.

    Args:
        workers: processes (or Ray actors); 0: one for each core, or each GPU, but not for a handful of documents.
        max_error_rate: fraction of bad documents, over which it stops; looked at after the first hundred, and at the end.
            None: a tenth, and fewer than a hundred documents are not judged.
        engine: `local` or `ray`.
        part: (i, n) for the i-th of n runs that share the work, on one machine or many: shards i, i + n, i + 2n, …
        progress: show a bar, and print what was read; else that is logged.

    Errors: `UserError` for a source without a usable document, too many bad ones, an output folder that holds something
    else or that another run works at, and a full disk.
    """
    out, say = Path(plan.out), print if progress else log.info
    if part is not None and not 0 <= part[0] < part[1]:
        raise UserError(f"part {part[0]} of {part[1]}: it counts from 0 and stays below")
    bundle = Bundle.from_pretrained(plan.bundle, parts="tokenizers")
    sources = open_sources(plan, bundle.types)
    _check_folder(out, sources)
    for source in sources:
        if source.through_lines():
            say(f"{visible(source.spec.path)}: read through its documents.jsonl alone")
    if (out / "dataset.json").exists():
        check_same(out, plan, sources, bundle.vocab)
        shutil.rmtree(out / ".work", ignore_errors=True)  # of a run that was killed at its very end
        info = TokenDataset(out).info
        say(f"{out}: complete already, {info['documents']} documents")
        return info
    _check_types(sources, bundle)
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out, part) as log_file:
            (out / ".work").mkdir(exist_ok=True)
            with lock(out / ".work" / "planning"):
                make_plan(plan, sources, bundle.vocab)
            if part is None:
                remove_partials(out / ".work")
            run = Run(plan)
            mine = range(len(run.shards)) if part is None else range(part[0], len(run.shards), part[1])
            _make_shards(run, mine, workers, max_error_rate, engine, log_file, progress)
            if any(made(run, i) is None for i in range(len(run.shards))):
                say(f"{out}: part {part[0] if part else 0} done; the others have yet to finish")
                return None
            with lock(run.work / "planning"):
                return _close(run, bundle, max_error_rate, say)
    except UserError:
        if created and not (out / "plan.json").exists() and not (out / "errors.jsonl").exists():
            shutil.rmtree(out, ignore_errors=True)
        raise
    except FileNotFoundError:
        if (out / "dataset.json").exists():  # another part did the last of it, and cleaned up
            return TokenDataset(out).info
        raise


@contextmanager
def locked(out: Path, part: tuple[int, int] | None = None) -> Iterator[Path]:
    """Keep a second run off; -> the log. `part`: (i, n) for the i-th of n runs that share the work, which may overlap.

    Errors: `UserError` when another run is at work, and for a full disk. Without locks nothing breaks, either: what is written is
    whole or not there.
    """
    busy = f"{out}: another `unitok tokenize` is at work on it; wait for it or choose another folder"
    with ExitStack() as held:
        log = out / "tokenize.log"
        held.enter_context(lock(log, busy, shared=part is not None))
        if part is not None:
            log = out / f"tokenize-{part[0]:05d}-of-{part[1]:05d}.log"
            held.enter_context(lock(log, busy))
        try:
            yield log
        except OSError as error:
            raise full_disk(error, out) from None


def _check_folder(out: Path, sources: list[Source]) -> None:
    """Errors: `UserError` where an output folder is none, holds what no run left there, or lies in a source."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    for source in sources:
        if source.holds(out):
            raise UserError(f"{out}: lies in the source {source.spec.path}, which would be read with it; choose another folder")
    begun = any((out / name).exists() for name in ("dataset.json", "plan.json"))
    there = out.iterdir() if out.exists() else ()
    if not begun and any(f.name not in (".work", "errors.jsonl") and f.suffix != ".log" for f in there):
        raise UserError(f"{out}: not empty and no data set; choose another folder")


def _check_types(sources: list[Source], bundle: Bundle) -> None:
    """Errors: `UserError` for what the bundle lacks for what sources name, and for their first documents."""
    for source in sources:
        spec, where = source.spec, f"source {source.spec.name or source.spec.path}"
        if unknown := spec.types() - set(bundle.types):
            raise UserError(f"{where}: type {min(unknown)!r}; choose of {', '.join(bundle.types)}")
        for kind, name in spec.instances.items():
            if name in bundle.vocab.spans and bundle.vocab.spans[name].kind != bundle.types[kind].kind:
                raise UserError(f"{where}: {name} is no tokenizer for {kind}; choose another")
        for part in spec.template:
            bundle.require(bundle.instance(spec.instances.get(part["type"], part["type"])))
            if (key := bundle.types[part["type"]].key) not in part:
                raise UserError(f"{where}: template: a part of type {part['type']} needs a {key!r}")
        first = [item for item, _ in zip(source.items(), range(8))]
        for make in source.read(first):
            try:
                types = sorted({part.type for raw in make() for part in raw.content})
            except Exception:  # told when it is read in its turn
                continue
            for name in types:
                bundle.require(bundle.instance(spec.instances.get(name, name)))


def _make_shards(
    run: Run, mine: range, workers: int, max_error_rate: float | None, engine: str, log_file: Path, shown: bool
) -> None:
    """DocumentFactory the shards that are not there yet."""
    total = sum(run.shards[i][2] - run.shards[i][1] for i in mine)
    with Progress(total, max_error_rate, run, log_file, shown) as progress:
        todo = []
        for i in mine:
            if entry := made(run, i):
                progress.had(entry)
            else:
                todo.append(i)
        try:
            if todo:
                launch(run, todo, workers, engine, progress)
        except RunAborted as error:
            _, first = _write_errors(run, error.errors)
            more = f"; the first: {first}; all are in {run.out / 'errors.jsonl'}. {MORE}"
            raise UserError(f"{error}{more if first and isinstance(error, ErrorRateExceeded) else ''}") from None


def _write_errors(run: Run, more: tuple[dict[str, str], ...] = ()) -> tuple[Counter[str], str]:
    """List what could not be used of the shards that are there, and `more`; -> how often for which reason, and the first."""
    why: Counter[str] = Counter()
    first = ""
    with atomic_write(run.out / "errors.jsonl", run.work) as file:
        records = (run.record(i) for i in range(len(run.shards)))
        listed = (json.loads(record.read_text(encoding="utf-8"))[1] for record in records if record.exists())
        for error in chain(*listed, more):
            first = first or error["error"]
            why[reason(error["error"])] += 1
            file.write(json_line(error) + "\n")
    return why, first


def _close(run: Run, bundle: Bundle, max_error_rate: float | None, say: Callable[[str], None]) -> dict[str, Any]:
    """All shards are there: write what closes the data set, and clean up."""
    if (run.out / "dataset.json").exists():  # another part closed it meanwhile
        return TokenDataset(run.out).info
    why, first = _write_errors(run)
    entries = [entry for i in range(len(run.shards)) if (entry := made(run, i))]
    usable, tried, bad = (sum(e[name] for e in entries) for name in ("documents", "items", "skipped"))
    judged = tried >= JUDGED_AFTER or max_error_rate is not None
    if usable == 0 or (judged and bad > (ERROR_RATE if max_error_rate is None else max_error_rate) * tried):
        left_out = total(entries, "filtered").total()
        filtered = f", {left_out} were filtered out" if left_out else ""
        said = f"{bad} of {tried} documents could not be used{filtered}{f'; the first: {first}' if first else ''}"
        listed = f"; all are in {run.out / 'errors.jsonl'}" if bad else ""
        if usable:
            raise UserError(f"{run.plan.name()}: {said}{listed}. {MORE}")
        for path in [run.out / e["file"] for e in entries] + [run.out / "plan.json"]:
            remove(path)
        shutil.rmtree(run.work, ignore_errors=True)
        raise UserError(f"{run.plan.name()}: {said if bad else 'all were filtered out'}{listed}")
    if not why:
        (run.out / "errors.jsonl").unlink()
    info = write_dataset_json(run.out, bundle.vocab, entries, run.options, run.work)
    shutil.rmtree(run.work, ignore_errors=True)
    by = ", ".join(f"{n} {m}" for m, n in info["ids_by_modality"].items())
    splits = "".join(
        f", {sum(e['documents'] for e in entries if e['split'] == s)} {s}" for s in run.splits if len(run.splits) > 1
    )
    say(f"{run.out}: {info['documents']} documents{splits}, {info['ids']} ids ({by}), {len(entries)} shards")
    read = {name: total(entries, name) for name in ("formats", "filtered", "notes")}
    for line in summary(read["formats"], read["filtered"], run.left_out, read["notes"], run.renamed):
        say(visible(line))
    if why:
        say(f"  bad         {bad:,} of {tried:,}, all listed in {run.out / 'errors.jsonl'}: {visible(most(why))}")
    return info


# ---- Before: how much will it be? -----------------------------------------------------------------------------------


def estimate(plan: Plan, sample: int = 200) -> dict[str, Any]:
    """What a run would give, from a sample of its documents spread over the sources; nothing is written.

    -> `listed` documents, `documents` that they become, `ids`, `bad` and `filtered` (shares of the listed), `hours` of one
    process, `gigabytes` of shards, `errors`: what is wrong with some of the bad ones, `examples`: some documents decoded, and
    `summary`: what was read of the sample.
    """
    bundle = Bundle.from_pretrained(plan.bundle, device=plan.device, parts="tokenizers")
    sources = open_sources(plan, bundle.types)
    _check_types(sources, bundle)
    listed, items = sample_items(plan, sources, sample)
    encoder = Encoder(bundle, plan.options, plan.seed)
    encode_items(encoder, sources, items[:1])  # for warming up
    with threads(plan.threads), TemporaryDirectory() as folder:
        began = time.perf_counter()
        encoded = encode_items(encoder, sources, items)
        entry = write_shard(Path(folder) / "sample.arrow", encoded.documents, bundle.vocab)
        seconds = time.perf_counter() - began
    more = listed / len(items)
    left_out = sum((source.left_out for source in sources), Counter())
    return {
        "listed": listed,
        "sample": len(items),
        "documents": entry["documents"] * more,
        "ids": entry["ids"] * more,
        "bad": encoded.skipped / len(items),
        "filtered": sum(encoded.filtered.values()) / len(items),
        "hours": seconds * more / 3600,
        "gigabytes": entry["bytes"] * more / 1e9,
        "errors": [error["error"] for error in encoded.errors[:3]],
        "examples": [show_document(bundle, document) for document in encoded.documents[:EXAMPLES]],
        "summary": list(summary(encoded.formats, encoded.filtered, left_out, encoded.notes, 0)),
    } | {f"{modality}_ids": count * more for modality, count in entry["ids_by_modality"].items()}


# ---- Back -----------------------------------------------------------------------------------------------------------


def detokenize(data: Path, out: Path, bundle: Path, device: str = "cpu", limit: int = 0, progress: bool = False) -> int:
    """Shards -> files: `documents.jsonl` with its images and audio in `out`; -> number of documents. Inverse of `tokenize`.

    limit: documents, at most; 0: all. progress: show a bar.
    """
    if limit < 0:
        raise UserError(f"limit {limit}: at least 1, or 0 for all")
    dataset = TokenDataset(data)
    parts = Bundle.from_pretrained(bundle, device=device, parts="tokenizers")
    parts.vocab.check_covers(dataset.vocab, str(bundle), str(data))
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    count = min(len(dataset), limit or len(dataset))
    with atomic_write(out / "documents.jsonl") as file:
        for i in tqdm(range(count), desc="detokenize", unit="document", mininterval=1.0, disable=not progress):
            try:
                raw = parts.write_document(dataset.document(i), out, f"{i:06d}")
            except ValueError as error:
                raise UserError(f"{data}: document {i}: {error}; `unitok inspect {data} --verify` checks all of it") from None
            file.write(format_raw_document(raw, out, parts.types) + "\n")
    return count
