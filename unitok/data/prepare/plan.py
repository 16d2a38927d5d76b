"""The plan of `unitok tokenize`: everything that its result depends on, written down before any work is done.

`OUT/plan.json` holds the options, a digest of the listing and the number of documents; `OUT/.work/` the listing, an Arrow table
with a row per document, and what is under way. A run that goes on reads the listing and not the sources' folders, so it makes
what the first one would have made. `.work` is gone when the data set is whole; `tokenize.log`, the lock, stays.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from unitok.data.prepare.encode import WAITING_BYTES
from unitok.data.prepare.listing import SourceItem
from unitok.data.prepare.recipe import SourceSpec, load_recipe, share
from unitok.data.prepare.sources import Source
from unitok.errors import UserError
from unitok.files import read_json, write_json
from unitok.interleaved import Types
from unitok.modalities import make_options, modalities
from unitok.storage import is_remote
from unitok.vocab import Vocab

VERSION = 4
LISTED_AT_ONCE = 8192  # rows of the listing held in memory
_MEMBER = pa.struct([("name", pa.string()), ("start", pa.int64()), ("length", pa.int64())])
_PLAIN: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64()}
_COLUMNS = {f.name: _PLAIN.get(f.type, pa.list_(_MEMBER)) for f in fields(SourceItem)}
LISTING = pa.schema({"source": pa.int16()} | _COLUMNS)


@dataclass(frozen=True)
class Plan:
    """What is to be tokenized, and how. The first three are enough for a single source.

    Args:
        source: a folder, file, pattern or URL; "" with a recipe. out: the data set's folder. bundle: the tokenizers'.
        documents_per_shard: documents per shard; 0: 4096, fewer for a small source, so that there is something to share out.
        recipe: a YAML file with several sources, see `unitok.data.prepare.recipe`.
        spec: template, filters, options and the like of a single source; its path is `source`.
        options: how content is read, by kind, where a source does not say it, as `SourceSpec.options`.
        validation: fraction of the documents, chosen by a hash of their ids, that make the split `validation`.
        threads: of the tokenizers in each process; the codes may depend on it in near ties, so a plan keeps it.
        seed: of random orders, crops and choices.
    """

    source: str
    out: str
    bundle: str
    documents_per_shard: int = 0
    device: str = "cpu"
    recipe: str = ""
    spec: SourceSpec = field(default_factory=lambda: SourceSpec(""))
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation: float = 0.0
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.source) == bool(self.recipe):
            raise UserError("give a source or a recipe" + (", not both" if self.source else ""))
        if is_remote(self.out):
            raise UserError(f"{self.out}: shards are written to a local folder (or one that is mounted); copy them from there")
        for name, least in (("documents_per_shard", 0), ("threads", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: at least {least}")
        if not 0 <= self.validation < 1:
            raise UserError(f"validation {self.validation:g}: a fraction of the documents, at least 0 and under 1")
        for kind, given in self.options.items():
            make_options(kind, given, "options")

    def specs(self) -> list[SourceSpec]:
        """The sources with their options."""
        return load_recipe(Path(self.recipe)) if self.recipe else [replace(self.spec, path=self.source)]

    def name(self) -> str:
        """What messages call the source."""
        return self.recipe or self.source


class Run:
    """A plan that lies in its output folder, open to be worked at.

    Attributes:
        options: what `dataset.json` says of them.
        plan: with the threads and the shard size that were written down.
        splits: rows of the listing by split.
        shards: of each, the split, and its first and last row (exclusive).
        left_out: what the listing left out, by what it is; `renamed`: documents whose id another has.

    Errors: `UserError` for a plan of another version.
    """

    def __init__(self, plan: Plan):
        self.out = Path(plan.out)
        self.work = self.out / ".work"
        content = read_json(self.out / "plan.json", "nothing was planned")
        if content.get("version") != VERSION:
            raise UserError(f"{self.out}: begun by another version of unitok; finish it with that, or choose another folder")
        self.options: dict[str, Any] = content["options"]
        self.left_out: dict[str, int] = content["left_out"]
        self.renamed: int = content["renamed"]
        self.plan = replace(plan, threads=content["threads"], documents_per_shard=content["options"]["documents_per_shard"])
        self.splits: dict[str, int] = content["documents"]
        self.shards = [
            (split, start, min(start + self.plan.documents_per_shard, count))
            for split, count in self.splits.items()
            for start in range(0, count, self.plan.documents_per_shard)
        ]

    @cached_property
    def _tables(self) -> dict[str, pa.Table]:
        paths = {split: self.work / f"{split}.listing" for split in self.splits}
        return {split: pa.ipc.open_file(pa.memory_map(str(path))).read_all() for split, path in paths.items()}

    def items(self, index: int) -> list[tuple[int, SourceItem]]:
        """The items of a shard, each with the number of its source."""
        split, start, stop = self.shards[index]
        return _from_table(self._tables[split].slice(start, stop - start))

    def record(self, index: int) -> Path:
        """Where a shard that is whole is written down: its entry for `dataset.json`, and what was skipped."""
        return self.work / f"{index:05d}.json"


def open_sources(plan: Plan, types: Types | None = None) -> list[Source]:
    """The sources of a plan; with several, their names come before what is in them. types: as `Bundle.types`."""
    specs = plan.specs()
    return [Source(spec, plan.seed, f"{spec.name}/" if len(specs) > 1 else "", types) for spec in specs]


# ---- Planning -------------------------------------------------------------------------------------------------------


def list_sources(plan: Plan, sources: list[Source]) -> Iterator[tuple[int, str, SourceItem]]:
    """Number of the source, split, item: all of every source in order, as often as its weight says."""
    for number, source in enumerate(sources):
        weight = source.spec.weight
        for item in source.items():
            copies = int(weight) + (share(plan.seed, "weight", item.id or item.where) < weight % 1)
            split = "validation" if share("validation", item.id or item.where) < plan.validation else "train"
            split = item.split or split
            for copy in range(1 if item.error else copies):
                yield number, split, replace(item, id=f"{item.id}#{copy + 1}") if copy else item


def options_of(plan: Plan, sources: list[Source], vocab: Vocab, documents_per_shard: int) -> dict[str, Any]:
    """Everything that the result depends on besides the listing, as plain types."""
    manifest = json.dumps(vocab.to_manifest(), sort_keys=True)
    described = []
    for source in sources:
        spec = source.spec
        given = {kind: plan.options.get(kind, {}) | spec.options.get(kind, {}) for kind in modalities()}
        read = {kind: asdict(make_options(kind, options, "options")) for kind, options in given.items()}
        said = {name: value for name, value in asdict(spec).items() if name not in ("path", "root")}  # wherever it lies
        described.append(said | {"options": read})
    options = {
        "documents_per_shard": documents_per_shard,
        "validation": plan.validation,
        "seed": plan.seed,
        "sources": described,
        "batch": {kind: modality.BATCH for kind, modality in modalities().items()} | {"waiting_bytes": WAITING_BYTES},
        "vocabulary": hashlib.sha256(manifest.encode()).hexdigest(),
    }
    return json.loads(json.dumps(options))


def difference(before: Any, now: Any, name: str = "") -> str:
    """What options have that others have not, in words; "" for equal ones."""
    if before == now:
        return ""
    if name in ("vocabulary", "batch"):
        return "another bundle" if name == "vocabulary" else "another version of unitok"
    if isinstance(before, dict) and isinstance(now, dict):
        found = (difference(before.get(key), now.get(key), key) for key in dict.fromkeys([*before, *now]))
        return "; ".join(filter(None, found))
    if name == "sources":
        if len(before) != len(now):
            return f"{len(before)} {name}, not {len(now)}"
        return "; ".join(filter(None, (difference(*pair, name) for pair in zip(before, now))))
    return f"{name.replace('_', ' ')} {before}, not {now}"


def _row_bytes(number: int, split: str, item: SourceItem) -> bytes:
    """A row of a listing as bytes for its digest; stamps do not count, so that a copied folder is the same source."""
    members = [(name, start * (item.kind != "files"), length) for name, start, length in item.members]
    place = (item.id, item.where, item.kind, item.file, item.start, item.length, item.error)
    return repr((number, split, place, members)).encode("utf-8", "surrogateescape")


def check_same(out: Path, plan: Plan, sources: list[Source], vocab: Vocab, digest: str = "") -> None:
    """Errors: `UserError` where the plan in a folder is another one, with what differs. digest: of the listing, made if ""."""
    known = read_json(out / "plan.json", "nothing was planned", "options", "listing")
    mine = options_of(plan, sources, vocab, plan.documents_per_shard or known["options"].get("documents_per_shard", 0))
    why = difference(known["options"], mine)
    if not why and not digest:
        running = hashlib.sha256()
        for row in list_sources(plan, sources):
            running.update(_row_bytes(*row))
        digest = running.hexdigest()
    if why or digest != known["listing"]:
        raise UserError(f"{out}: was made with {why or 'other files in its source'}; remove it or choose another folder")


def make_plan(plan: Plan, sources: list[Source], vocab: Vocab) -> None:
    """List the sources and write the plan; errors: `UserError` when there is nothing in them, and for another plan's folder."""
    out = Path(plan.out)
    work = out / ".work"
    paths = [s.spec.path if "://" in s.spec.path else os.path.realpath(s.spec.path) for s in sources]
    old = read_json(out / "plan.json", "", "options", "listing", "device", "paths") if (out / "plan.json").exists() else None
    if old is not None:
        if old["device"] != plan.device.partition(":")[0]:
            raise UserError(f"{out}: was begun on {old['device']}; go on there, or choose another folder: codes may differ")
        check_same(out, plan, sources, vocab, old["listing"])
        if old["paths"] == paths and all((work / f"{split}.listing").exists() for split in old["documents"]):
            return  # as it was listed then: what has changed since is found when it is read
    work.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with TemporaryDirectory(dir=work, prefix="listing") as folder:
        counts, renamed = _write_listing(Path(folder), plan, sources, digest)
        if not sum(counts.values()):
            raise UserError(f"{plan.name()}: no documents in it")
        if old is not None:
            check_same(out, plan, sources, vocab, digest.hexdigest())
        for split in counts:
            (Path(folder) / split).replace(work / f"{split}.listing")
    size = plan.documents_per_shard or min(4096, max(64, -(-sum(counts.values()) // 32)))
    content = {
        "version": VERSION,
        "paths": paths,
        "options": old["options"] if old else options_of(plan, sources, vocab, size),
        "listing": digest.hexdigest(),
        "threads": old["threads"] if old else plan.threads,
        "device": plan.device.partition(":")[0],
        "documents": counts,
        "left_out": dict(sum((source.left_out for source in sources), Counter())),
        "renamed": renamed,
    }
    write_json(out / "plan.json", content, work)


def _write_listing(folder: Path, plan: Plan, sources: list[Source], digest: Any) -> tuple[dict[str, int], int]:
    """List the sources into a file for each split; -> how many documents each has, and how many got another id."""
    counts = Counter({"train": 0, "validation": 0} if plan.validation else {"train": 0})
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in counts}
    writers: dict[str, pa.RecordBatchFileWriter] = {}
    ids = _Ids(several=len(sources) > 1)
    with ExitStack() as opened:

        def write(split: str) -> None:
            if split not in writers:
                writers[split] = opened.enter_context(pa.ipc.new_file(str(folder / split), LISTING))
            writers[split].write_batch(pa.RecordBatch.from_pylist(rows[split], schema=LISTING))
            rows[split].clear()

        for number, split, item in list_sources(plan, sources):
            digest.update(_row_bytes(number, split, item))
            counts[split] += 1
            rows.setdefault(split, []).append(_to_row(number, ids.unique(item)))
            if len(rows[split]) == LISTED_AT_ONCE:
                write(split)
        for split in rows:
            write(split)
    return dict(counts), ids.renamed


class _Ids:
    """Ids that no two documents share: the second of one gets `~2`.

    Memory holds eight bytes of a hash for each id that a file gives; names of files are unique within one source.
    """

    def __init__(self, several: bool):
        self.several, self.renamed = several, 0
        self._seen: set[bytes] = set()
        self._next: dict[str, int] = {}  # of ids that came twice: the number to try next

    def unique(self, item: SourceItem) -> SourceItem:
        """An item, by another id if its own is taken."""
        if item.error or (item.kind == "files" and not self.several):
            return item
        number = self._next.get(item.id, 1)
        id = item.id if number == 1 else f"{item.id}~{number}"
        while (key := hashlib.blake2b(id.encode("utf-8", "surrogateescape"), digest_size=8).digest()) in self._seen:
            number += 1
            id = f"{item.id}~{number}"
        self._seen.add(key)
        if number > 1:
            self._next[item.id] = number + 1
        self.renamed += number > 1
        return replace(item, id=id)


def _to_row(number: int, item: SourceItem) -> dict[str, Any]:
    members = [{"name": n, "start": s, "length": c} for n, s, c in item.members]
    return {"source": number} | vars(item) | {"members": members}


def _from_table(table: pa.Table) -> list[tuple[int, SourceItem]]:
    rows = table.to_pylist()
    return [
        (row.pop("source"), SourceItem(**row | {"members": tuple(tuple(m.values()) for m in row["members"])})) for row in rows
    ]


def sample_items(plan: Plan, sources: list[Source], count: int) -> tuple[int, list[tuple[int, SourceItem]]]:
    """Number of documents, and `count` of them (in order) spread evenly over the sources."""
    kept: list[tuple[int, SourceItem]] = []
    every = total = 1
    for total, (number, _, item) in enumerate(list_sources(plan, sources), 1):
        if (total - 1) % every == 0:
            kept.append((number, item))
            if len(kept) == 2 * count:
                kept, every = kept[::2], 2 * every
    if not kept:
        raise UserError(f"{plan.name()}: no documents in it")
    return total, list(islice(kept, 0, None, max(1, len(kept) // count)))
