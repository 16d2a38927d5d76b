"""Token shards: a data set is a folder of Arrow files of tokenized documents, and `dataset.json`.

Shards are Arrow IPC files, a row a document; `source` is the file, and line, member or row, that it was made from. They are
memory-mapped, and polars, pandas and Hugging Face `datasets` open them as they are. `dataset.json` is written last, so a folder
without it is not whole. Bytes depend only on the documents: no times, hosts or worker counts.

A data set may lie where fsspec reaches it: a shard is copied to a local cache when it is first asked for.
"""

import hashlib
import json
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from unitok.document import Document
from unitok.errors import UserError, first_line
from unitok.files import atomic_write, read_json, write_json
from unitok.vocab import SegmentSpan, Vocab

VERSION = 1
_TEXT, _INT, _INTS = pa.string(), pa.int32(), pa.list_(pa.int32())
_PLACE = {"modality": _TEXT, "start": _INT, "length": _INT}
_SPAN = pa.struct(_PLACE | {"role": _TEXT, "loss": pa.bool_(), "source": _TEXT, "size": _INTS})
SCHEMA = pa.schema(
    {"id": _TEXT, "tokens": _INTS, "spans": pa.list_(_SPAN), "source": _TEXT, "length": _INT},
    metadata={"unitok": str(VERSION)},
)


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.arrow"


def write_shard(path: Path, documents: Iterable[Document], vocab: Vocab, work: Path | None = None) -> dict:
    """Write a shard beside its place (in `work`, on the same disk) and rename it; -> its entry for `dataset.json`."""
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
        "ids": int(sum(rows["length"])),
        "ids_by_modality": dict(sorted(modalities.items())),
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
    }


def write_dataset_json(folder: Path, vocab: Vocab, shards: list[dict], options: dict, work: Path | None = None) -> dict:
    """Close a data set: write `dataset.json` beside its place (in `work`) and rename it; -> what it holds."""
    by_modality = sum((Counter(shard["ids_by_modality"]) for shard in shards), Counter[str]())
    content = {
        "version": VERSION,
        "documents": sum(s["documents"] for s in shards),
        "ids": sum(s["ids"] for s in shards),
        "ids_by_modality": dict(sorted(by_modality.items())),
        "options": options,
        "shards": shards,
        "vocab": vocab.to_manifest(),
    }
    write_json(folder / "dataset.json", content, work)
    return content


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenDataset:
    """Random access to the documents of a data set, memory-mapped; shards are opened when they are first needed.

    Args:
        folder: a data set's folder, or a URL of one that fsspec opens.
        split: `train` or `validation` of a data set that was split; "": all of it.
        cache: where copies of a remote data set's shards are kept; by default under the user's cache folder.

    Errors: `UserError` when it has no `dataset.json`, another version, or lacks a shard or the split.
    """

    OPEN = 512  # shards that are kept open

    def __init__(self, folder: Path | str, split: str = "", cache: Path | None = None):
        self.remote = _Remote(str(folder), cache) if "://" in str(folder) else None
        self.folder = Path(folder)
        path = f"{folder}/dataset.json"
        keys = ("version", "vocab", "shards", "documents", "ids", "ids_by_modality")
        self.info = self.remote.info if self.remote else read_json(Path(path), "make a data set with `unitok tokenize`", *keys)
        if self.info.get("version") != VERSION:
            raise UserError(f"{path}: version {self.info.get('version')}; this unitok reads version {VERSION}")
        for shard in self.info["shards"]:  # a name from elsewhere must not lead anywhere else
            if not re.fullmatch(r"shard-\d{5,}\.arrow", str(shard.get("file"))):
                raise UserError(f"{path}: {str(shard.get('file'))[:80]!r} is no shard's name")
        self.vocab = Vocab.from_manifest(self.info["vocab"])
        self.shards: list[dict] = [s for s in self.info["shards"] if not split or s.get("split", "train") == split]
        if split and not self.shards:
            there = sorted({s.get("split", "train") for s in self.info["shards"]})
            raise UserError(f"{folder}: no split {split!r} in it; there is {', '.join(there)}")
        if self.remote is None:
            for shard in self.shards:
                self._path(shard)
        self._starts = np.cumsum([0] + [s["documents"] for s in self.shards])
        self._open: OrderedDict[int, pa.Table] = OrderedDict()

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return any(s.get("split", "train") == split for s in self.info["shards"])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}  # another process maps the files itself

    def _path(self, shard: dict) -> Path:
        """A shard's file, or its local copy; errors: `UserError` where it is not there."""
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
                raise UserError(f"{path}: not a shard of version {VERSION}; make the data set again")
            self._open[number] = table
            while len(self._open) > self.OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, index: int) -> tuple[pa.Table, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._table(shard), index - int(self._starts[shard])

    def lengths(self) -> np.ndarray:
        """int64 [documents]: number of ids of each. Of a remote data set this column alone is read."""
        columns = [self._column(number, "length").to_numpy() for number in range(len(self.shards))]
        return np.concatenate([np.zeros(0, np.int64), *columns], dtype=np.int64)

    def _column(self, number: int, name: str) -> pa.ChunkedArray:
        """A column of a shard; of a remote data set's the rest is not read."""
        column = self.remote.column(self.shards[number], name) if self.remote and number not in self._open else None
        return self._table(number).column(name) if column is None else column

    def ids(self, index: int) -> np.ndarray:
        """int64 [L]: the ids of a document, bos to eos."""
        table, row = self._place(index)
        return table.column("tokens")[row].values.to_numpy().astype(np.int64)

    def placed(self, index: int) -> list[SegmentSpan]:
        """Where the segments of a document stand."""
        table, row = self._place(index)
        return _placed(table.column("spans")[row].as_py())

    def placed_of(self, indices: np.ndarray) -> list[list[SegmentSpan]]:
        """`placed` of several documents; of a remote data set nothing else is read."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        found: list[list[SegmentSpan]] = [[]] * len(indices)
        for number in np.unique(shards).tolist():
            where = np.flatnonzero(shards == number)
            rows = self._column(number, "spans").take(pa.array(indices[where] - self._starts[number])).to_pylist()
            for at, spans in zip(where.tolist(), rows, strict=True):
                found[at] = _placed(spans)
        return found

    def document(self, index: int) -> Document:
        """A document with its codes. Inverse of what `write_shard` wrote."""
        table, row = self._place(index)
        read = self.vocab.decode(self.ids(index), self.placed(index))
        return Document(read.segments, table.column("id")[row].as_py(), table.column("source")[row].as_py())

    def shuffled(self, seed: int = 0, epoch: int = 0, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[int]:
        """Indices of an epoch in random order, for one of `world` processes: each document once, at most one process has one more.

        start: how many this process had already; an interrupted epoch goes on exactly there.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        yield from map(int, order[rank::world][start:])

    def verify(self) -> list[str]:
        """Problems found by checksums, grammar and counts, as sentences; an empty list is a good data set."""
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
                problems.append(f"{shard['file']}: {rows} documents, dataset.json says {shard['documents']}")
                continue
            ids = 0
            for i in range(int(self._starts[number]), int(self._starts[number + 1])):
                ids += len(self.ids(i))
                try:
                    problems += self._verify_document(i, grammar, counted)
                except (UserError, ValueError) as error:
                    problems.append(f"{shard['file']}, document {i}: {error}")
            if ids != shard["ids"]:
                problems.append(f"{shard['file']}: {ids} ids, dataset.json says {shard['ids']}")
        listed = sum((Counter(shard["ids_by_modality"]) for shard in self.shards), Counter[str]())
        if not problems and counted != listed:
            problems.append(f"dataset.json: ids by modality are {dict(counted)}, it says {dict(listed)}")
        return problems

    def _verify_document(self, index: int, grammar: Any, counted: Counter[str]) -> Iterator[str]:
        ids = self.ids(index)
        grammar.check(ids)
        for p in self.placed(index):
            counted[p.modality] += p.length
        if not np.array_equal(self.vocab.encode(self.document(index)), ids):
            yield f"document {index}: its spans do not say what its ids do"


def _placed(spans: list[dict]) -> list[SegmentSpan]:
    return [SegmentSpan(**(s | {"size": tuple(s["size"])})) for s in spans]


class _Remote:
    """A data set's folder on a server, and a local cache of its shards."""

    def __init__(self, url: str, cache: Path | None):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.fs, self.folder = fsspec.core.url_to_fs(self.url)
            text = self.fs.cat_file(f"{self.folder}/dataset.json")
            self.info = json.loads(text)
        except FileNotFoundError:
            raise UserError(f"{url}/dataset.json: no such file; make a data set with `unitok tokenize`") from None
        except Exception as error:  # every file system of fsspec has its own
            raise UserError(f"{url}: cannot be read ({first_line(error)})") from None
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unitok"
        self.cache = Path(cache or home) / hashlib.sha256(text).hexdigest()[:16]  # of its content, wherever it lies

    def fetch(self, shard: dict) -> Path:
        """A shard's copy; it is whole or not there, also where several processes ask at once."""
        path, where = self.cache / shard["file"], f"{self.url}/{shard['file']}"
        if path.exists():
            return path
        self.cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, staging=self.cache, binary=True) as file:
            try:
                self.fs.get_file(f"{self.folder}/{shard['file']}", file.name)
            except Exception as error:  # every file system of fsspec has its own
                raise UserError(f"{where}: cannot be read ({first_line(error)}); try again") from None
            if _sha256(Path(file.name)) != shard["sha256"]:
                raise UserError(f"{where}: came damaged: its checksum differs from dataset.json; try again")
        return path

    def column(self, shard: dict, name: str) -> pa.ChunkedArray | None:
        """One column, without the rest; None where the shard is at hand."""
        if (self.cache / shard["file"]).exists():
            return None
        with self.fs.open(f"{self.folder}/{shard['file']}", "rb") as file:
            options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name)])
            return pa.ipc.open_file(pa.PythonFile(file, mode="r"), options=options).read_all().column(name)
