"""The plan of `unitok tokenize`: everything that its result depends on, written before any work is done.

`OUT/plan.json` holds the options, a digest of the listing and the number of documents. `OUT/.work/` holds the listing, an Arrow
table with one row per document, and the work in progress. A run that resumes reads the listing and not the sources' folders, so it
makes what the first run would have made. `.work` is removed when the data set is complete; `tokenize.log`, the lock, stays.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import pyarrow as pa

from unitok.bundle import Bundle
from unitok.data.prepare.encode import WAITING_BYTES
from unitok.data.prepare.items import GROUP, SourceItem
from unitok.data.prepare.objects import BOX
from unitok.data.prepare.recipe import SourceSpec, hash_fraction, load_recipe, make_options
from unitok.data.prepare.sources import Source
from unitok.errors import UserError
from unitok.files import read_json, write_json
from unitok.modalities import modalities
from unitok.storage import is_remote
from unitok.vocab import Vocab

log = logging.getLogger(__name__)

VERSION = 6
FIRST = 8  # documents of a source whose types are checked before any work
LISTED_AT_ONCE = 8192  # rows of the listing held in memory
_MEMBER = pa.struct([("name", pa.string()), ("start", pa.int64()), ("length", pa.int64())])
_PLAIN: dict[object, pa.DataType] = {str: pa.string(), int: pa.int64()}
_COLUMNS = {f.name: _PLAIN.get(f.type, pa.list_(_MEMBER)) for f in fields(SourceItem) if f.name != "named"}
LISTING = pa.schema({"source": pa.int16()} | _COLUMNS)


@dataclass(frozen=True)
class Plan:
    """What to tokenize, and how. The first three are enough for a single source.

    Args:
        source: a folder, file, pattern or URL; "" with a recipe. out: the data set's folder. bundle: the tokenizers' folder.
        documents_per_shard: documents per shard; 0: 4096, fewer for a small source, so that processes can divide the work.
        recipe: a YAML file with several sources, see `unitok.data.prepare.recipe`.
        spec: template, filters, options and the like of a single source; its path is `source`.
        options: how content is read, by kind, for sources without options of their own, as `SourceSpec.options`.
        validation: fraction of the documents that make the split `validation`, chosen by a hash of their groups; without a group,
            of the file that their line or row names, or else of their ids.
        threads: of the tokenizers in each process. Near ties of codes may depend on it, so the plan keeps it.
        seed: of random orders, crops and choices.
    """

    source: str
    out: str
    bundle: str
    documents_per_shard: int = 0
    device: str = "cpu"
    recipe: str = ""
    spec: SourceSpec = field(default_factory=lambda: SourceSpec(""))
    options: dict[str, dict[str, object]] = field(default_factory=dict)
    validation: float = 0.0
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.source) == bool(self.recipe):
            raise UserError("give a source or a recipe" + (", not both" if self.source else ""))
        if is_remote(self.out):
            raise UserError(f"{self.out}: shards are written to a local (or mounted) folder; copy them from there")
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
        """The name of the source in messages."""
        return self.recipe or self.source


class Run:
    """A plan that was written to its output folder.

    Attributes:
        options: `options` of `dataset.json`.
        plan: with the threads and documents per shard that were written.
        splits: rows of the listing by split.
        groups: groups of documents by split, where there are any.
        shards: split, first row and last row (exclusive) of each.
        left_out: what the listing left out, by what it is. renamed: documents whose id another document has.

    Errors: `UserError` for a plan of another version.
    """

    def __init__(self, plan: Plan):
        self.out = Path(plan.out)
        self.work = self.out / ".work"
        content = read_json(self.out / "plan.json", "nothing was planned")
        if content.get("version") != VERSION:
            raise UserError(
                f"{self.out}: begun by another version of unitok; finish it with that version, or choose another folder"
            )
        self.options: dict[str, object] = content["options"]
        self.groups: dict[str, int] = content["groups"]
        self.left_out: dict[str, int] = content["left_out"]
        self.renamed: int = content["renamed"]
        self.plan = replace(plan, threads=content["threads"], documents_per_shard=content["options"]["documents_per_shard"])
        self.splits: dict[str, int] = content["documents"]
        size = self.plan.documents_per_shard
        self.shards = [
            (split, start, min(start + size, count)) for split, count in self.splits.items() for start in range(0, count, size)
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
        """The file that is written after a shard: its entry for `dataset.json`, and the errors of what was skipped."""
        return self.work / f"{index:05d}.json"


def open_sources(plan: Plan, bundle: Bundle | None = None) -> list[Source]:
    """The sources of a plan; of several, each is named where its documents come from. bundle: that will encode them."""
    specs, types = plan.specs(), None if bundle is None else bundle.types
    boxes = bundle is not None and BOX in bundle.vocab.spans
    return [Source(spec, plan.seed, f"{spec.name}/" if len(specs) > 1 else "", types, boxes) for spec in specs]


# ---- Planning -------------------------------------------------------------------------------------------------------


def check_specs(sources: list[Source], bundle: Bundle) -> None:
    """Raise `UserError` where the bundle has no tokenizer for a type that a source names."""
    for source in sources:
        spec, where = source.spec, f"source {source.spec.name or source.spec.path}"
        if unknown := spec.types() - set(bundle.types):
            raise UserError(f"{where}: type {min(unknown)!r}; choose one of {', '.join(bundle.types)}")
        for kind, name in spec.instances.items():
            if name in bundle.vocab.spans and bundle.vocab.spans[name].kind != bundle.types[kind].kind:
                raise UserError(f"{where}: {name} is not a tokenizer for {kind}; choose another")
        for part in spec.template:
            type = str(part["type"])
            bundle.require(bundle.instance(spec.instances.get(type, type)))
            if (key := bundle.types[type].key) not in part:
                raise UserError(f"{where}: template: a part of type {type} needs a {key!r}")


def _check_types(source: Source, items: list[SourceItem], bundle: Bundle) -> None:
    """Raise `UserError` where the bundle has no tokenizer for a type that these documents have."""
    for make in source.read(items):
        try:
            types = sorted({part.type for raw in make() for part in raw.content})
        except Exception:  # reported when the run reads it
            continue
        for name in (name for name in types if not bundle.may_lack(name)):
            bundle.require(bundle.instance(source.spec.instances.get(name, name)))


def list_sources(plan: Plan, sources: list[Source], bundle: Bundle | None = None) -> Iterator[tuple[int, str, SourceItem]]:
    """List all sources in order, each item as often as the source's weight says. Yields: source number, split, item.

    bundle: which must have tokenizers for the first documents of every source. Errors: `UserError`.
    """
    listings = [source.items() for source in sources]
    if bundle is not None:
        firsts = [list(islice(items, FIRST)) for items in listings]
        for source, first in zip(sources, firsts, strict=True):
            _check_types(source, first, bundle)
        listings = [chain(first, items) for first, items in zip(firsts, listings, strict=True)]
    for number, (source, items) in enumerate(zip(sources, listings, strict=True)):
        weight = source.spec.weight
        for item in items:
            name = item.id or item.where
            copies = int(weight) + _chosen(weight % 1, plan.seed, "weight", name)
            apart = not item.split and _chosen(plan.validation, "validation", item.group or item.named or name)
            split = item.split or ("validation" if apart else "train")
            for copy in range(1 if item.error else copies):
                yield number, split, replace(item, id=f"{item.id}#{copy + 1}") if copy else item


def _chosen(fraction: float, *words: object) -> bool:
    """Whether what the words name is in a random fraction."""
    return fraction > 0 and hash_fraction(*words) < fraction


def options_of(plan: Plan, sources: list[Source], vocab: Vocab, documents_per_shard: int) -> dict[str, object]:
    """Everything that the result depends on besides the listing, as JSON values."""
    manifest = json.dumps(vocab.to_manifest(), sort_keys=True)
    described = []
    for source in sources:
        spec = source.spec
        given = {kind: plan.options.get(kind, {}) | spec.options.get(kind, {}) for kind in modalities()}
        content = {kind: asdict(make_options(kind, options, "options")) for kind, options in given.items()}
        moved = ("path", "root")  # may change without changing the result
        described.append({name: value for name, value in asdict(spec).items() if name not in moved})
        described[-1] |= {"group": spec.group or GROUP, "options": content}
    options = {
        "documents_per_shard": documents_per_shard,
        "validation": plan.validation,
        "seed": plan.seed,
        "sources": described,
        "batch": {kind: modality.BATCH for kind, modality in modalities().items()} | {"waiting_bytes": WAITING_BYTES},
        "vocabulary": hashlib.sha256(manifest.encode()).hexdigest(),
    }
    return json.loads(json.dumps(options))


def plan_diff(before: object, now: object, name: str = "") -> str:
    """The differences of two plans' options in words; "" for equal ones."""
    if before == now:
        return ""
    if name in ("vocabulary", "batch"):
        return "another bundle" if name == "vocabulary" else "another version of unitok"
    if isinstance(before, dict) and isinstance(now, dict):
        changes = (plan_diff(before.get(key), now.get(key), key) for key in dict.fromkeys([*before, *now]))
        return "; ".join(filter(None, changes))
    if name == "sources" and isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            return f"{len(before)} {name}, not {len(now)}"
        return "; ".join(filter(None, (plan_diff(*pair, name) for pair in zip(before, now))))
    return f"{name.replace('_', ' ')} {before}, not {now}"


def _row_bytes(number: int, split: str, item: SourceItem) -> bytes:
    """A row of a listing as bytes for its digest, without stamps, so that a copied folder is the same source."""
    members = [(name, start * (item.kind != "files"), length) for name, start, length in item.members]
    content = (item.id, item.where, item.kind, item.file, item.start, item.length, item.error)
    return repr((number, split, content, members, *([item.group] if item.group else []))).encode("utf-8", "surrogateescape")


def check_same(out: Path, plan: Plan, sources: list[Source], vocab: Vocab, digest: str = "") -> None:
    """Raise `UserError` with the differences where a folder has another plan. digest: of the listing; "": list the sources for it."""
    known = read_json(out / "plan.json", "nothing was planned", "options", "listing")
    options = options_of(plan, sources, vocab, plan.documents_per_shard or known["options"].get("documents_per_shard", 0))
    changes = plan_diff(known["options"], options)
    if not changes and not digest:
        running = hashlib.sha256()
        for row in list_sources(plan, sources):
            running.update(_row_bytes(*row))
        digest = running.hexdigest()
    if changes or digest != known["listing"]:
        raise UserError(f"{out}: was made with {changes or 'other files in its source'}; remove it or choose another folder")


def make_plan(plan: Plan, sources: list[Source], bundle: Bundle) -> None:
    """List the sources and write the plan.

    Errors: `UserError` where they hold nothing, or types without a tokenizer, and for a folder with another plan.
    """
    out = Path(plan.out)
    work = out / ".work"
    paths = [s.spec.path if "://" in s.spec.path else os.path.realpath(s.spec.path) for s in sources]
    old = read_json(out / "plan.json", "", "options", "listing", "device", "paths") if (out / "plan.json").exists() else None
    if old is not None:
        if old["device"] != plan.device.partition(":")[0]:
            raise UserError(f"{out}: was begun on {old['device']}; resume there, or choose another folder: codes may differ")
        check_same(out, plan, sources, bundle.vocab, old["listing"])
        if old["paths"] == paths and all((work / f"{split}.listing").exists() for split in old["documents"]):
            return  # files that changed since then are found when they are read
    for path in paths:
        if (Path(path) / "dataset.json").exists() and (Path(path) / "plan.json").exists():
            raise UserError(f"{path}: it is tokenized already; train on it, or give the files that it was made of")
    work.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with TemporaryDirectory(dir=work, prefix="listing") as folder:
        listed = _write_listing(Path(folder), plan, sources, digest, bundle)
        counts = listed.documents
        if not sum(counts.values()):
            raise UserError(f"{plan.name()}: no documents in it")
        if plan.validation and not counts["validation"]:
            log.warning("no documents for validation: %g is of those without a split of their own", plan.validation)
        elif plan.validation and not counts["train"]:
            log.warning(
                "no documents to train on: all are for validation (those that name one file, or are of one group, stay together)"
            )
        if old is not None:
            check_same(out, plan, sources, bundle.vocab, digest.hexdigest())
        for split in counts:
            (Path(folder) / split).replace(work / f"{split}.listing")
    size = plan.documents_per_shard or min(4096, max(64, -(-sum(counts.values()) // 32)))
    content = {
        "version": VERSION,
        "paths": paths,
        "options": old["options"] if old else options_of(plan, sources, bundle.vocab, size),
        "listing": digest.hexdigest(),
        "threads": old["threads"] if old else plan.threads,
        "device": plan.device.partition(":")[0],
        "documents": counts,
        "groups": listed.groups(),
        "left_out": dict(sum((source.left_out for source in sources), Counter())),
        "renamed": listed.renamed,
    }
    write_json(out / "plan.json", content, work)


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def _write_listing(folder: Path, plan: Plan, sources: list[Source], digest: _Digest, bundle: Bundle) -> "_Listed":
    """List the sources into one file per split. Returns: counts of what was listed."""
    listed = _Listed(sources, ["train", "validation"] if plan.validation else ["train"])
    rows: dict[str, list[dict[str, object]]] = {split: [] for split in listed.documents}
    writers: dict[str, pa.RecordBatchFileWriter] = {}
    with ExitStack() as opened:

        def write(split: str) -> None:
            if split not in writers:
                writers[split] = opened.enter_context(pa.ipc.new_file(str(folder / split), LISTING))
            writers[split].write_batch(pa.RecordBatch.from_pylist(rows[split], schema=LISTING))
            rows[split].clear()

        for number, split, item in list_sources(plan, sources, bundle):
            digest.update(_row_bytes(number, split, item))
            rows.setdefault(split, []).append(_to_row(number, listed.add(number, split, item)))
            if len(rows[split]) == LISTED_AT_ONCE:
                write(split)
        for split in rows:
            write(split)
    listed.check()
    return listed


class _Listed:
    """Counts of what was listed; ids that no two documents share: the second document of an id gets `~2`.

    Memory holds eight bytes of a hash for each id that a file gives, and for each group in each split; names of files are unique
    within one source.
    """

    def __init__(self, sources: list[Source], splits: list[str]):
        self.sources, self.documents, self.renamed = sources, Counter(dict.fromkeys(splits, 0)), 0
        self._ids: set[bytes] = set()
        self._next: dict[str, int] = {}  # of ids that came twice: the number to try next
        self._groups: dict[str, set[bytes]] = {}  # by split
        self._grouped: set[int] = set()  # sources with groups

    def add(self, number: int, split: str, item: SourceItem) -> SourceItem:
        """Count an item of source `number`. Returns: the item, with another id if its own is taken."""
        self.documents[split] += 1
        if item.group:
            self._groups.setdefault(split, set()).add(_hash(item.group))
            self._grouped.add(number)
        return self._unique(item)

    def _unique(self, item: SourceItem) -> SourceItem:
        if item.error or (item.kind == "files" and len(self.sources) == 1):
            return item
        number = self._next.get(item.id, 1)
        id = item.id if number == 1 else f"{item.id}~{number}"
        while (key := _hash(id)) in self._ids:
            number += 1
            id = f"{item.id}~{number}"
        self._ids.add(key)
        if number > 1:
            self._next[item.id] = number + 1
        self.renamed += number > 1
        return replace(item, id=id)

    def groups(self) -> dict[str, int]:
        """The number of groups by split; `divided`: those of several splits, because their lines or folders say so."""
        counts = {split: len(groups) for split, groups in self._groups.items()}
        divided = sum(counts.values()) - len(set().union(*self._groups.values()))
        return counts | ({"divided": divided} if divided else {})

    def check(self) -> None:
        """Raise `UserError` for a field of groups that no line or row has."""
        for number, source in enumerate(self.sources):
            group = source.spec.group
            if group and number not in self._grouped and any(self.documents.values()):
                raise UserError(
                    f"source {source.spec.name or source.spec.path}: no line or row has the field {group!r} (group)"
                )


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _to_row(number: int, item: SourceItem) -> dict[str, object]:
    members = [{"name": n, "start": s, "length": c} for n, s, c in item.members]
    return {"source": number} | vars(item) | {"members": members}


def _from_table(table: pa.Table) -> list[tuple[int, SourceItem]]:
    rows = table.to_pylist()
    return [
        (row.pop("source"), SourceItem(**row | {"members": tuple(tuple(m.values()) for m in row["members"])})) for row in rows
    ]


def sample_items(plan: Plan, sources: list[Source], count: int, bundle: Bundle) -> tuple[int, list[tuple[int, SourceItem]]]:
    """List the sources, with tokenizers of a bundle. Returns: the number of documents, and `count` of them (in order), spread evenly."""
    kept: list[tuple[int, SourceItem]] = []
    every = total = 1
    for total, (number, _, item) in enumerate(list_sources(plan, sources, bundle), 1):
        if (total - 1) % every == 0:
            kept.append((number, item))
            if len(kept) == 2 * count:
                kept, every = kept[::2], 2 * every
    if not kept:
        raise UserError(f"{plan.name()}: no documents in it")
    return total, list(islice(kept, 0, None, max(1, len(kept) // count)))
