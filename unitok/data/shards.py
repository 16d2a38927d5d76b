"""Token shards: a data set is a folder of Arrow files of tokenized documents, and `dataset.json`.

Shards are Arrow IPC files with one row per document; its `source` names the file (and line, member or row) it was made from.
Shards are memory-mapped, and polars, pandas and Hugging Face `datasets` open them unchanged. `dataset.json` is written last, so a
folder without it is incomplete. The bytes depend only on the documents, not on times, hosts or the number of workers.

A data set may be on a server that fsspec reaches: a shard is copied to a local cache when it is first needed.
"""

import hashlib
import json
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa

from unitok.document import Document
from unitok.errors import UserError, first_line
from unitok.files import atomic_write, read_json, write_json
from unitok.vocab import SegmentSpan, Vocab

if TYPE_CHECKING:
    from unitok.grammar import Grammar

VERSION = 2  # of dataset.json
SHARD_VERSION = 1  # of the shards
_TEXT, _INT, _INTS = pa.string(), pa.int32(), pa.list_(pa.int32())
_PLACE = {"modality": _TEXT, "start": _INT, "length": _INT}
_SPAN = pa.struct(_PLACE | {"role": _TEXT, "loss": pa.bool_(), "source": _TEXT, "size": _INTS})
SCHEMA = pa.schema(
    {"id": _TEXT, "tokens": _INTS, "spans": pa.list_(_SPAN), "source": _TEXT, "length": _INT},
    metadata={"unitok": str(SHARD_VERSION)},
)


class ShardInfo(TypedDict):
    """What `dataset.json` says of a shard. The keys that may be missing are written by `unitok tokenize`."""

    file: str
    documents: int
    tokens: int
    tokens_by_modality: dict[str, int]
    bytes: int
    sha256: str
    split: NotRequired[str]  # of a data set with several
    items: NotRequired[int]  # items of the sources that were tried
    skipped: NotRequired[int]  # those of them that gave no document
    filtered: NotRequired[dict[str, int]]  # documents left out, by filter
    formats: NotRequired[dict[str, int]]  # parts of documents, by tokenizer and file format
    notes: NotRequired[dict[str, int]]  # what items hold that was not used


class DatasetInfo(TypedDict):
    """The content of `dataset.json`."""

    version: int
    documents: int
    tokens: int
    tokens_by_modality: dict[str, int]
    groups: NotRequired[
        dict[str, int]
    ]  # groups by split, where documents have any; see `unitok.data.prepare.listing.SourceItem`
    options: dict[str, object]
    shards: list[ShardInfo]
    vocab: dict[str, object]


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:05d}.arrow"


def write_shard(path: Path, documents: Iterable[Document], vocab: Vocab, work: Path | None = None) -> ShardInfo:
    """Write a shard into a temporary file (in `work`, on the same disk) and rename it. Returns: its entry for `dataset.json`."""
    rows: dict[str, list] = {name: [] for name in SCHEMA.names}
    modalities: Counter[str] = Counter()
    for document in documents:
        ids, placed = vocab.encode_placed(document)
        rows["id"].append(document.id)
        rows["source"].append(document.source)
        rows["length"].append(len(ids))
        rows["tokens"].append(ids.astype(np.int32))
        rows["spans"].append([vars(p) | {"size": list(p.size)} for p in placed])
        for p in placed:
            modalities[p.modality] += p.length
    table = pa.table(rows, schema=SCHEMA)
    with atomic_write(path, work, binary=True) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))  # one batch: read without a copy
    return {
        "file": path.name,
        "documents": table.num_rows,
        "tokens": int(sum(rows["length"])),
        "tokens_by_modality": dict(sorted(modalities.items())),
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
    }


def write_dataset_json(
    folder: Path,
    vocab: Vocab,
    shards: list[ShardInfo],
    options: dict[str, object],
    work: Path | None = None,
    groups: dict[str, int] | None = None,
) -> DatasetInfo:
    """Complete a data set: write `dataset.json` into a temporary file (in `work`) and rename it. Returns: its content."""
    by_modality = sum((Counter(shard["tokens_by_modality"]) for shard in shards), Counter[str]())
    content: DatasetInfo = {
        "version": VERSION,
        "documents": sum(s["documents"] for s in shards),
        "tokens": sum(s["tokens"] for s in shards),
        "tokens_by_modality": dict(sorted(by_modality.items())),
        "options": options,
        "shards": shards,
        "vocab": vocab.to_manifest(),
    }
    if groups:
        content["groups"] = groups
    write_json(folder / "dataset.json", content, work)
    return content


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenDataset:
    """Random access to the documents of a data set, memory-mapped; a shard is opened when it is first needed.

    Args:
        folder: a data set's folder, or a URL of one that fsspec opens.
        split: `train` or `validation` of a data set with splits; "": all of it.
        cache: where copies of a remote data set's shards are kept; default: the user's cache folder.

    Errors: `UserError` where `dataset.json` is missing or has another version, or where a shard or the split is missing.
    """

    OPEN = 512  # shards that are kept open
    KEYS = ("vocab", "shards", "documents", "tokens", "tokens_by_modality")

    def __init__(self, folder: Path | str, split: str = "", cache: Path | None = None):
        self.remote = _Remote(str(folder), cache) if "://" in str(folder) else None
        self.folder = Path(folder)
        self.info: DatasetInfo = _read_info(f"{folder}/dataset.json", self.remote.content if self.remote else None)
        for shard in self.info["shards"]:  # nobody's dataset.json may name a file outside its folder
            if not re.fullmatch(r"shard-\d{5,}\.arrow", str(shard.get("file"))):
                raise UserError(f"{folder}/dataset.json: {str(shard.get('file'))[:80]!r} is not the name of a shard")
        self.vocab = Vocab.from_manifest(self.info["vocab"])
        self.shards = [s for s in self.info["shards"] if not split or s.get("split", "train") == split]
        if split and not self.shards:
            splits = ", ".join(self.documents_by_split())
            raise UserError(f"{folder}: it has no split {split!r}; its splits are {splits}")
        if self.remote is None:
            for shard in self.shards:
                self._path(shard)
        self._starts = np.cumsum([0] + [s["documents"] for s in self.shards])
        self._open: OrderedDict[int, pa.Table] = OrderedDict()

    def has(self, split: str) -> bool:
        """Whether the data set has this split."""
        return split in self.documents_by_split()

    def documents_by_split(self) -> dict[str, int]:
        """The number of documents of each split, in the order of the shards; a data set without splits is all `train`."""
        counts: Counter[str] = Counter()
        for shard in self.info["shards"]:
            counts[shard.get("split", "train")] += shard["documents"]
        return dict(counts)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}  # another process maps the files itself

    def _path(self, shard: ShardInfo) -> Path:
        """A shard's file, or its local copy. Errors: `UserError` where it does not exist."""
        path = self.remote.fetch(shard) if self.remote else self.folder / shard["file"]
        if not path.exists():
            raise UserError(f"{path}: no such file, though dataset.json lists it; make the data set again")
        return path

    def _table(self, number: int) -> pa.Table:
        if number not in self._open:
            path = self._path(self.shards[number])
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            except pa.ArrowInvalid:
                raise UserError(f"{path}: not an Arrow file; make the data set again") from None
            if table.column_names != SCHEMA.names:
                raise UserError(f"{path}: not a shard of version {SHARD_VERSION}; make the data set again")
            self._open[number] = table
            while len(self._open) > self.OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _row(self, index: int) -> tuple[pa.Table, int]:
        """The table of a document's shard, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._table(shard), index - int(self._starts[shard])

    def lengths(self) -> np.ndarray:
        """int32 [documents]: tokens per document. Of a remote data set only this column is read."""
        columns = [self._column(number, "length").to_numpy() for number in range(len(self.shards))]
        return np.concatenate([np.zeros(0, np.int32), *columns], dtype=np.int32, casting="same_kind")

    def _column(self, number: int, name: str) -> pa.ChunkedArray:
        """A column of a shard. Of a remote shard that is not in the cache, only this column is read."""
        remote = self.remote if number not in self._open else None
        column = remote.column(self.shards[number], name) if remote else None
        return self._table(number).column(name) if column is None else column

    def ids(self, index: int) -> np.ndarray:
        """int64 [L]: the tokens of a document, from bos to eos."""
        table, row = self._row(index)
        return table.column("tokens")[row].values.to_numpy().astype(np.int64)

    def placed(self, index: int) -> list[SegmentSpan]:
        """The spans of a document's segments: where each begins, how long it is, and what it came from."""
        table, row = self._row(index)
        return _placed(table.column("spans")[row].as_py())

    def placed_of(self, indices: np.ndarray) -> list[list[SegmentSpan]]:
        """`placed` of several documents. Of a remote data set only this column is read."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        placed: list[list[SegmentSpan]] = [[]] * len(indices)
        for number in np.unique(shards).tolist():
            positions = np.flatnonzero(shards == number)
            rows = self._column(number, "spans").take(pa.array(indices[positions] - self._starts[number])).to_pylist()
            for position, spans in zip(positions.tolist(), rows, strict=True):
                placed[position] = _placed(spans)
        return placed

    def document(self, index: int) -> Document:
        """A document with its codes. Inverse of `write_shard`."""
        table, row = self._row(index)
        segments = self.vocab.decode(self.ids(index), self.placed(index)).segments
        return Document(segments, table.column("id")[row].as_py(), table.column("source")[row].as_py())

    def shuffled(self, seed: int = 0, epoch: int = 0, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[int]:
        """Indices of an epoch in random order, for one of `world` processes.

        Each document comes once per epoch in one of the processes; their numbers of documents differ by at most one.
        start: how many documents this process had already; an interrupted epoch goes on exactly there.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        yield from map(int, order[rank::world][start:])

    def verify(self) -> list[str]:
        """Check checksums, counts, the grammar and spans. Returns: the problems, one sentence each; none for a good data set."""
        from unitok.grammar import Grammar

        problems = []
        grammar = Grammar(self.vocab)
        counted: Counter[str] = Counter()
        for number, shard in enumerate(self.shards):
            try:
                if _sha256(self._path(shard)) != shard["sha256"]:
                    problems.append(f"{shard['file']}: the checksum differs from dataset.json")
                rows = self._table(number).num_rows
            except UserError as error:
                problems.append(str(error))
                continue
            if rows != shard["documents"]:
                problems.append(f"{shard['file']}: it has {rows} documents, dataset.json says {shard['documents']}")
                continue
            tokens = 0
            for i in range(int(self._starts[number]), int(self._starts[number + 1])):
                tokens += len(self.ids(i))
                try:
                    problems += self._verify_document(i, grammar, counted)
                except (UserError, ValueError) as error:
                    problems.append(f"{shard['file']}, document {i}: {error}")
            if tokens != shard["tokens"]:
                problems.append(f"{shard['file']}: it has {tokens} tokens, dataset.json says {shard['tokens']}")
        listed = sum((Counter(shard["tokens_by_modality"]) for shard in self.shards), Counter[str]())
        if not problems and counted != listed:
            problems.append(f"dataset.json: it says tokens_by_modality {dict(listed)}, the shards have {dict(counted)}")
        return problems

    def _verify_document(self, index: int, grammar: "Grammar", counted: Counter[str]) -> Iterator[str]:
        """Problems of one document; its tokens by modality are added to `counted`. Errors: `UserError`, `ValueError`."""
        ids = self.ids(index)
        grammar.check(ids)
        for p in self.placed(index):
            counted[p.modality] += p.length
        if not np.array_equal(self.vocab.encode(self.document(index)), ids):
            yield f"document {index}: its spans do not match its tokens"


def _placed(spans: list[dict]) -> list[SegmentSpan]:
    return [SegmentSpan(**(s | {"size": tuple(s["size"])})) for s in spans]


def _read_info(path: str, content: bytes | None) -> DatasetInfo:
    """`dataset.json`: the file of this path, or what a server gave as its content. Errors: `UserError`."""
    if content is None:
        info = read_json(Path(path), "make a data set with `unitok tokenize`", "version")
    else:
        try:
            info = dict(json.loads(content))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a JSON object ({first_line(error)})") from None
    if info.get("version") != VERSION:
        again = "; tokenize its sources again" if info.get("version") == 1 else ""
        raise UserError(f"{path}: data set version {info.get('version')}, but this unitok reads version {VERSION}{again}")
    if missing := [key for key in TokenDataset.KEYS if key not in info]:
        raise UserError(f"{path}: has no {', '.join(missing)}; it is damaged, or another program's")
    return cast(DatasetInfo, info)


class _Remote:
    """A data set's folder on a server, with a local cache of its shards."""

    def __init__(self, url: str, cache: Path | None):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.fs, self.folder = fsspec.core.url_to_fs(self.url)
            self.content = self.fs.cat_file(f"{self.folder}/dataset.json")
        except FileNotFoundError:
            raise UserError(f"{url}/dataset.json: no such file; make a data set with `unitok tokenize`") from None
        except Exception as error:  # every file system of fsspec has its own
            raise UserError(f"{url}: cannot be read ({first_line(error)})") from None
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unitok"
        self.cache = (
            Path(cache or home) / hashlib.sha256(self.content).hexdigest()[:16]
        )  # the same data set elsewhere shares it

    def fetch(self, shard: ShardInfo) -> Path:
        """The local copy of a shard, which is made if need be; several processes may ask at once. Errors: `UserError`."""
        path, url = self.cache / shard["file"], f"{self.url}/{shard['file']}"
        if path.exists():
            return path
        self.cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, staging=self.cache, binary=True) as file:
            try:
                self.fs.get_file(f"{self.folder}/{shard['file']}", file.name)
            except Exception as error:  # every file system of fsspec has its own
                raise UserError(f"{url}: cannot be read ({first_line(error)}); try again") from None
            if _sha256(Path(file.name)) != shard["sha256"]:
                raise UserError(f"{url}: the download is damaged (its checksum differs from dataset.json); try again")
        return path

    def column(self, shard: ShardInfo, name: str) -> pa.ChunkedArray | None:
        """One column of a shard, read without the others; None where the cache has the shard."""
        if (self.cache / shard["file"]).exists():
            return None
        with self.fs.open(f"{self.folder}/{shard['file']}", "rb") as file:
            options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name)])
            return pa.ipc.open_file(pa.PythonFile(file, mode="r"), options=options).read_all().column(name)
