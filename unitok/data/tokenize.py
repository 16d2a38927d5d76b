"""`unitok tokenize`: raw files -> token shards. And back: `unitok detokenize`.

The shard is the unit. The source is listed once, in a fixed order; `process_shard(plan, i)` reads the raw documents of
shard i, encodes each file once however many of them use it, and writes the shard beside its place. So the result does
not depend on the number of workers, and a run that was stopped goes on: shards that are there whole are kept.
Bad files are skipped, counted and listed in `errors.jsonl` with what is wrong; `dataset.json` comes last.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from unitok.bundle import Unitok
from unitok.data.media import audio_seconds, load_audio, open_image
from unitok.data.shards import TokenDataset, shard_name, write_dataset_json, write_shard
from unitok.data.sources import read_source
from unitok.document import Document, Part, RawDocument, Segment, format_raw_document
from unitok.errors import UserError
from unitok.tokenizers.image import Fit

BATCH = 64  # files encoded at once
LONG_SOUND = 60.0  # seconds; longer sounds are read and encoded piece by piece


@dataclass(frozen=True)
class Plan:
    """All that a shard depends on, besides the files themselves."""

    source: str
    out: str
    bundle: str
    shard_size: int = 4096
    image_area: int = 0  # pixels; 0: the image tokenizer's resolution squared
    device: str = "cpu"
    image_fit: Fit = "keep"  # see ImageTokenizer.prepare


class Encoder:
    """Raw documents -> documents, with the tokenizers of a bundle. Files are encoded in batches, each file once."""

    def __init__(self, unitok: Unitok, image_area: int = 0, image_fit: Fit = "keep"):
        self.unitok, self.image_area, self.image_fit = unitok, image_area, image_fit

    def encode(self, raws: list[RawDocument], folder: Path | None = None) -> tuple[list[Document], list[dict]]:
        """-> documents, and for each that could not be made, where and why. Sources are named relative to `folder`, if any."""
        wanted = {(p.type, p.path) for raw in raws for p in raw.content if p.path is not None}
        media: dict[tuple[str, Path], tuple[Tensor, tuple[int, ...]] | str] = {}
        for kind, encode in (("image", self._encode_images), ("audio", self._encode_sounds)):
            media |= encode(sorted(path for k, path in wanted if k == kind))
        documents, errors = [], []
        for raw in raws:
            try:
                segments = tuple(self._segment(part, media, folder) for part in raw.content)
                documents.append(Document(segments, raw.id))
            except UserError as error:
                errors.append({"id": raw.id, "where": raw.where, "error": str(error)})
        return documents, errors

    def _segment(self, part: Part, media: dict, folder: Path | None) -> Segment:
        if part.path is None:
            codes = self.unitok.need("text").encode(part.text)
            return Segment("text", codes, part.role, part.loss)
        found = media[part.type, part.path]
        if isinstance(found, str):
            raise UserError(found)
        codes, size = found
        source = part.path.relative_to(folder) if folder and part.path.is_relative_to(folder) else part.path
        return Segment(part.type, codes.numpy(), part.role, part.loss, source.as_posix(), size)

    def _encode_images(self, paths: list[Path]) -> dict:
        """Pictures of equal size go through the tokenizer together."""
        if not paths:
            return {}
        tokenizer = self.unitok.need("image")
        out: dict = {}
        waiting: dict[tuple[int, int], list[tuple[Path, Tensor]]] = defaultdict(list)

        def flush(size: tuple[int, int]) -> None:
            batch = waiting.pop(size)
            codes = tokenizer.encode(torch.stack([pixels for _, pixels in batch])).cpu()
            out.update({("image", path): (c, size) for (path, _), c in zip(batch, codes, strict=True)})

        for path in paths:
            try:
                pixels = tokenizer.prepare(open_image(path), self.image_area or None, self.image_fit)
            except UserError as error:
                out["image", path] = str(error)
                continue
            size = (pixels.shape[1], pixels.shape[2])
            waiting[size].append((path, pixels))
            if len(waiting[size]) == BATCH:
                flush(size)
        for size in list(waiting):
            flush(size)
        return out

    def _encode_sounds(self, paths: list[Path]) -> dict:
        """Sounds of equal length go through the tokenizer together."""
        if not paths:
            return {}
        tokenizer = self.unitok.need("audio")
        out: dict = {}
        waiting: dict[int, list[tuple[Path, Tensor]]] = defaultdict(list)

        def flush(length: int) -> None:
            batch = waiting.pop(length)
            codes = tokenizer.encode(torch.stack([samples for _, samples in batch])).cpu()
            out.update({("audio", p): (c, tokenizer.size(samples)) for (p, samples), c in zip(batch, codes, strict=True)})

        for path in paths:
            try:
                if audio_seconds(path) > LONG_SOUND:
                    codes, size = tokenizer.encode_file(path)
                    out["audio", path] = (codes.cpu(), size)
                    continue
                samples = tokenizer.prepare(*load_audio(path), str(path))
            except UserError as error:
                out["audio", path] = str(error)
                continue
            length = samples.shape[-1]
            waiting[length].append((path, samples))
            if len(waiting[length]) * length >= BATCH * tokenizer.sample_rate:
                flush(length)
        for length in list(waiting):
            flush(length)
        return out


@cache
def _listing(source: str) -> list[RawDocument | UserError]:
    return list(read_source(Path(source)))


@cache
def _encoder(bundle: str, image_area: int, image_fit: Fit, device: str) -> Encoder:
    return Encoder(Unitok.from_pretrained(bundle, device=device, parts=("text", "image", "audio")), image_area, image_fit)


def _folder_of(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def process_shard(plan: Plan, index: int, threads: int = 0) -> tuple[dict, list[dict]]:
    """Make shard `index`; -> its entry for `dataset.json`, and what was skipped. Deterministic; safe to repeat."""
    if threads:
        torch.set_num_threads(threads)
    out = Path(plan.out)
    record = out / f"{shard_name(index)}.partial.json"
    if record.exists() and (out / shard_name(index)).exists():  # made by a run that was stopped
        entry, errors = json.loads(record.read_text())
        if hashlib.sha256((out / shard_name(index)).read_bytes()).hexdigest() == entry["sha256"]:
            return entry, errors
        record.unlink()
    items = _listing(plan.source)[index * plan.shard_size : (index + 1) * plan.shard_size]
    raws = [item for item in items if isinstance(item, RawDocument)]
    encoder = _encoder(plan.bundle, plan.image_area, plan.image_fit, plan.device)
    documents, failed = encoder.encode(raws, _folder_of(Path(plan.source)))
    errors = [{"id": "", "where": "", "error": str(item)} for item in items if isinstance(item, UserError)] + failed
    entry = write_shard(out / shard_name(index), documents, encoder.unitok.vocab)
    torn = record.with_suffix(".torn")
    torn.write_text(json.dumps([entry, errors]))
    torn.replace(record)
    return entry, errors


def tokenize(plan: Plan, workers: int = 1, max_error_rate: float = 1.0) -> dict:
    """Run a plan; -> the content of `dataset.json`.

    Errors: `UserError` for a source without a usable document, for more bad ones than `max_error_rate` (a share), and
    for an output folder that holds something else.
    """
    out = Path(plan.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    _listing.cache_clear()
    _encoder.cache_clear()
    options = {k: v for k, v in asdict(plan).items() if k in ("shard_size", "image_area", "image_fit")}
    fingerprint = _fingerprint(plan)
    if (out / "dataset.json").exists():
        info = TokenDataset(out).info
        if not (out / "plan.json").exists() or json.loads((out / "plan.json").read_text()).get("fingerprint") != fingerprint:
            raise UserError(f"{out}: holds a data set made from another source, bundle or options; choose another folder")
        print(f"{out}: complete already, {info['documents']} documents")
        return info
    if out.exists() and any(out.iterdir()) and not (out / "plan.json").exists():
        raise UserError(f"{out}: not empty and no data set; choose another folder")
    created = not out.exists()
    listing = _listing(plan.source)
    if not listing:
        raise UserError(f"{plan.source}: no documents in it")
    unitok = _encoder(plan.bundle, plan.image_area, plan.image_fit, plan.device).unitok
    for kind in sorted({p.type for raw in listing if isinstance(raw, RawDocument) for p in raw.content}):
        unitok.need(kind)  # what the bundle lacks is said before anything is written
    out.mkdir(parents=True, exist_ok=True)
    _write_plan(out, plan, fingerprint)
    count = -(-len(listing) // plan.shard_size)
    workers = max(1, min(workers, count))
    shards, errors = [], []
    with tqdm(total=len(listing), desc="tokenize", unit="document", mininterval=1.0) as bar:
        for entry, failed in _run(plan, count, workers):
            shards.append(entry)
            errors += failed
            bar.update(entry["documents"] + len(failed))
    usable = sum(s["documents"] for s in shards)
    if usable == 0 or len(errors) > max_error_rate * len(listing):
        _clean(out, shards)
        (out / "plan.json").unlink()
        if created:
            out.rmdir()
        first = f"; the first: {errors[0]['error']}" if errors else ""
        raise UserError(f"{plan.source}: {len(errors)} of {len(listing)} documents could not be used{first}")
    if errors:
        (out / "errors.jsonl").write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in errors))
        print(f"{len(errors)} of {len(listing)} documents were skipped; see {out / 'errors.jsonl'}")
    info = write_dataset_json(
        out, _encoder(plan.bundle, plan.image_area, plan.image_fit, plan.device).unitok.vocab, shards, options
    )
    for pattern in ("*.partial.json", "*.torn", "*.partial"):
        for leftover in out.glob(pattern):
            leftover.unlink()
    by = ", ".join(f"{n} {m}" for m, n in info["ids_by_modality"].items())
    print(f"{out}: {info['documents']} documents, {info['ids']} ids ({by}), {count} shards")
    return info


def _run(plan: Plan, count: int, workers: int) -> Iterator[tuple[dict, list[dict]]]:
    if workers == 1:
        for i in range(count):
            yield process_shard(plan, i)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(process_shard, [plan] * count, range(count), [threads] * count)


def _fingerprint(plan: Plan) -> str:
    """Of everything that the result depends on: the listing, the vocabulary with its tokenizers, the options."""
    digest = hashlib.sha256()
    folder = _folder_of(Path(plan.source))
    for item in _listing(plan.source):
        if isinstance(item, UserError):
            digest.update(str(item).encode())
            continue
        for p in item.content:
            size = p.path.stat().st_size if p.path and p.path.exists() else -1
            name = p.path.relative_to(folder).as_posix() if p.path and p.path.is_relative_to(folder) else str(p.path)
            digest.update(repr((item.id, p.type, p.text, p.role, p.loss, name, size)).encode())
    vocab = _encoder(plan.bundle, plan.image_area, plan.image_fit, plan.device).unitok.vocab
    digest.update(json.dumps([vocab.to_manifest(), plan.shard_size, plan.image_area, plan.image_fit]).encode())
    return digest.hexdigest()


def _write_plan(out: Path, plan: Plan, fingerprint: str) -> None:
    path = out / "plan.json"
    if path.exists() and json.loads(path.read_text()).get("fingerprint") != fingerprint:
        raise UserError(f"{out}: was begun with another source, bundle or options; remove it or choose another folder")
    content = {
        "fingerprint": fingerprint,
        "shard_size": plan.shard_size,
        "image_area": plan.image_area,
        "image_fit": plan.image_fit,
    }
    partial = out / "plan.json.partial"
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(path)


def _clean(out: Path, shards: list[dict]) -> None:
    for shard in shards:
        (out / shard["file"]).unlink(missing_ok=True)
        (out / f"{shard['file']}.partial.json").unlink(missing_ok=True)


def detokenize(data: Path, out: Path, bundle: Path, device: str = "cpu", limit: int = 0) -> int:
    """Shards -> files: `documents.jsonl` with its images and sounds in `out`; -> number of documents. Inverse of `tokenize`."""
    dataset = TokenDataset(data)
    unitok = Unitok.from_pretrained(bundle, device=device, parts=("text", "image", "audio"))
    unitok.vocab.check_covers(dataset.vocab, str(bundle), str(data))
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    count = min(len(dataset), limit or len(dataset))
    lines = []
    for i in tqdm(range(count), desc="detokenize", unit="document", mininterval=1.0):
        raw = unitok.write_document(dataset.document(i), out, f"{i:06d}")
        lines.append(format_raw_document(raw, out))
    (out / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return count
