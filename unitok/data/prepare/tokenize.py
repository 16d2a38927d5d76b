"""`unitok tokenize`: raw files -> token shards. And back: `unitok detokenize`.

The sources are listed once, in a fixed order (`plan`). `Worker.process(i)` makes shard i of its items (`worker`); processes of
this machine, of a SLURM array or of a Ray cluster call it (`launch`). So the result does not depend on their number, nor on how
often they were killed: complete shards are kept, and `dataset.json` is written last. Bad files are skipped, counted and listed in
`errors.jsonl`.
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

from tqdm import tqdm

from unitok.bundle import Bundle
from unitok.data.prepare.encode import Encoder, RunAborted
from unitok.data.prepare.launch import ERROR_RATE, JUDGED_AFTER, ErrorRateExceeded, Progress, launch
from unitok.data.prepare.plan import Plan, Run, check_same, check_specs, make_plan, open_sources, sample_items
from unitok.data.prepare.sources import Source
from unitok.data.prepare.summary import Estimate, most, reason, show_document, splits_in_words, summary, total
from unitok.data.prepare.worker import encode_items, full_disk, made, threads
from unitok.data.shards import DatasetInfo, TokenDataset, write_dataset_json, write_shard
from unitok.errors import UserError, visible
from unitok.files import atomic_write, json_line, lock, remove, remove_partials
from unitok.interleaved import format_raw_document

log = logging.getLogger("unitok")
REMEDY = "Start again with a higher max_error_rate to go on, or mend them and start with a new folder"
EXAMPLES = 3  # documents that a dry run shows


def tokenize(
    plan: Plan,
    workers: int = 1,
    max_error_rate: float | None = None,
    engine: str = "local",
    part: tuple[int, int] | None = None,
    progress: bool = False,
) -> DatasetInfo | None:
    """Run a plan. Returns: the content of `dataset.json`, or None where other runs have yet to finish their parts.

    Args:
        workers: processes (or Ray actors); 0: one per core or GPU, fewer for few documents.
        max_error_rate: stop where more than this fraction of the documents is bad; checked after the first hundred, and at the end.
            None: 0.1, and fewer than a hundred documents are never too bad.
        engine: `local` or `ray`.
        part: (i, n) for the i-th of n runs that divide the work, on one machine or many: shards i, i + n, i + 2n, …
        progress: show a progress bar and print the summary, which is logged otherwise.

    Errors: `UserError` for sources without a usable document, too many bad ones, an output folder that holds something else or
    that another run is using, and a full disk.
    """
    out, say = Path(plan.out), print if progress else log.info
    if part is not None and not 0 <= part[0] < part[1]:
        raise UserError(f"part {part[0]} of {part[1]}: it counts from 0 and stays below")
    bundle = Bundle.from_pretrained(plan.bundle, parts="tokenizers")
    sources = open_sources(plan, bundle)
    _check_folder(out, sources)
    for source in sources:
        if source.through_lines():
            say(f"{visible(source.spec.path)}: only documents.jsonl is read")
    if (out / "dataset.json").exists():
        check_same(out, plan, sources, bundle.vocab)
        shutil.rmtree(out / ".work", ignore_errors=True)  # of a run that was killed at its very end
        info = TokenDataset(out).info
        say(f"{out}: complete already, {info['documents']} documents")
        return info
    check_specs(sources, bundle)
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out, part) as log_file:
            (out / ".work").mkdir(exist_ok=True)
            with lock(out / ".work" / "planning"):
                make_plan(plan, sources, bundle)
            if part is None:
                remove_partials(out / ".work")
            run = Run(plan)
            indices = range(len(run.shards)) if part is None else range(part[0], len(run.shards), part[1])
            _make_shards(run, indices, workers, max_error_rate, engine, log_file, progress)
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
        if (out / "dataset.json").exists():  # another part finished the data set and cleaned up
            return TokenDataset(out).info
        raise


@contextmanager
def locked(out: Path, part: tuple[int, int] | None = None) -> Iterator[Path]:
    """Lock an output folder against a second run. Yields: the path of the log.

    part: (i, n) for the i-th of n runs that divide the work, which may run at the same time. Errors: `UserError` where another run
    is at work, and for a full disk. On file systems without locks nothing breaks either, because every file is replaced atomically.
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
    """Raise `UserError` for an output folder that is a file, that holds other files, or that is inside a source."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    for source in sources:
        if source.holds(out):
            raise UserError(f"{out}: is inside the source {source.spec.path} and would be read with it; choose another folder")
    begun = any((out / name).exists() for name in ("dataset.json", "plan.json"))
    files = out.iterdir() if out.exists() else ()
    if not begun and any(f.name not in (".work", "errors.jsonl") and f.suffix != ".log" for f in files):
        raise UserError(f"{out}: not empty, and not a data set; choose another folder")


def _make_shards(
    run: Run, indices: range, workers: int, max_error_rate: float | None, engine: str, log_file: Path, shown: bool
) -> None:
    """Make those of the shards `indices` that do not exist yet."""
    count = sum(run.shards[i][2] - run.shards[i][1] for i in indices)
    with Progress(count, max_error_rate, run, log_file, shown) as progress:
        todo = []
        for i in indices:
            if entry := made(run, i):
                progress.had(entry)
            else:
                todo.append(i)
        try:
            if todo:
                launch(run, todo, workers, engine, progress)
        except RunAborted as error:
            _, first = _write_errors(run, error.errors)
            hint = f"; the first: {first}; all are in {run.out / 'errors.jsonl'}. {REMEDY}"
            raise UserError(f"{error}{hint if first and isinstance(error, ErrorRateExceeded) else ''}") from None


def _write_errors(run: Run, more: tuple[dict[str, str], ...] = ()) -> tuple[Counter[str], str]:
    """Write `errors.jsonl`: the errors of all complete shards, and `more`. Returns: counts by reason, and the first message."""
    reasons: Counter[str] = Counter()
    first = ""
    with atomic_write(run.out / "errors.jsonl", run.work) as file:
        records = (run.record(i) for i in range(len(run.shards)))
        listed = (json.loads(record.read_text(encoding="utf-8"))[1] for record in records if record.exists())
        for error in chain(*listed, more):
            first = first or error["error"]
            reasons[reason(error["error"])] += 1
            file.write(json_line(error) + "\n")
    return reasons, first


def _close(run: Run, bundle: Bundle, max_error_rate: float | None, say: Callable[[str], None]) -> DatasetInfo:
    """Complete the data set after its last shard: check the error rate, write `dataset.json`, clean up, print a summary."""
    if (run.out / "dataset.json").exists():  # another part closed it meanwhile
        return TokenDataset(run.out).info
    reasons, first = _write_errors(run)
    entries = [entry for i in range(len(run.shards)) if (entry := made(run, i))]
    filtered = total(entry.get("filtered", {}) for entry in entries)
    usable = sum(entry["documents"] for entry in entries)
    tried, bad = sum(entry["items"] for entry in entries), sum(entry["skipped"] for entry in entries)
    judged = tried >= JUDGED_AFTER or max_error_rate is not None
    if usable == 0 or (judged and bad > (ERROR_RATE if max_error_rate is None else max_error_rate) * tried):
        others = f", {filtered.total()} were filtered out" if filtered else ""
        problem = f"{bad} of {tried} documents could not be used{others}{f'; the first: {first}' if first else ''}"
        listed = f"; all are in {run.out / 'errors.jsonl'}" if bad else ""
        if usable:
            raise UserError(f"{run.plan.name()}: {problem}{listed}. {REMEDY}")
        for path in [run.out / entry["file"] for entry in entries] + [run.out / "plan.json"]:
            remove(path)
        shutil.rmtree(run.work, ignore_errors=True)
        raise UserError(f"{run.plan.name()}: {problem if bad else 'all were filtered out'}{listed}")
    if not reasons:
        (run.out / "errors.jsonl").unlink()
    info = write_dataset_json(run.out, bundle.vocab, entries, run.options, run.work, run.groups)
    shutil.rmtree(run.work, ignore_errors=True)
    by_modality = ", ".join(f"{n} {m}" for m, n in info["tokens_by_modality"].items())
    say(f"{run.out}: {info['documents']} documents, {info['tokens']} tokens ({by_modality}), {len(entries)} shards")
    if line := splits_in_words(TokenDataset(run.out).documents_by_split(), run.groups):
        say(f"  splits      {line}")
    formats, notes = total(e.get("formats", {}) for e in entries), total(e.get("notes", {}) for e in entries)
    for line in summary(formats, filtered, run.left_out, notes, run.renamed):
        say(visible(line))
    if reasons:
        say(f"  bad         {bad:,} of {tried:,}, all listed in {run.out / 'errors.jsonl'}: {visible(most(reasons))}")
    return info


# ---- Estimates -----------------------------------------------------------------------------------


def estimate(plan: Plan, sample: int = 200) -> Estimate:
    """Estimate what a run would give, from a sample of documents spread over the sources; nothing is written."""
    bundle = Bundle.from_pretrained(plan.bundle, device=plan.device, parts="tokenizers")
    sources = open_sources(plan, bundle)
    check_specs(sources, bundle)
    listed, items = sample_items(plan, sources, sample, bundle)
    encoder = Encoder(bundle, plan.options, plan.seed)
    encode_items(encoder, sources, items[:1])  # to warm up
    with threads(plan.threads), TemporaryDirectory() as folder:
        began = time.perf_counter()
        encoded = encode_items(encoder, sources, items)
        entry = write_shard(Path(folder) / "sample.arrow", encoded.documents, bundle.vocab)
        seconds = time.perf_counter() - began
    scale = listed / len(items)
    left_out = total(source.left_out for source in sources)
    return Estimate(
        listed=listed,
        sample=len(items),
        documents=entry["documents"] * scale,
        tokens=entry["tokens"] * scale,
        tokens_by_modality={name: count * scale for name, count in entry["tokens_by_modality"].items()},
        bad=encoded.skipped / len(items),
        filtered=sum(encoded.filtered.values()) / len(items),
        hours=seconds * scale / 3600,
        gigabytes=entry["bytes"] * scale / 1e9,
        errors=[error["error"] for error in encoded.errors[:3]],
        more_errors=max(0, len(encoded.errors) - 3),
        examples=[show_document(bundle, document) for document in encoded.documents[:EXAMPLES]],
        summary=list(summary(encoded.formats, encoded.filtered, left_out, encoded.notes, 0)),
    )


# ---- Shards -> files -----------------------------------------------------------------------------------------------------------


def detokenize(data: Path, out: Path, bundle: Path, device: str = "cpu", limit: int = 0, progress: bool = False) -> int:
    """Shards -> files: write `documents.jsonl` with its images and audio. Inverse of `tokenize`. Returns: the number of documents.

    limit: most documents; 0: all. progress: show a progress bar. Errors: `UserError`.
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
