"""Token shards: a data set is a folder of Arrow files of tokenized documents, and `dataset.json`.

`shard-00000.arrow` … are Arrow IPC files, a row a document: `id`, `tokens`, and `spans` (modality, start, length, role,
loss, source, size). They are memory-mapped, and polars, pandas and Hugging Face `datasets` open them as they are.
`dataset.json` holds version, vocabulary manifest, counts and the shards with their sha256; it is written last, so a
folder without it is not whole. Bytes depend only on the documents: no times, hosts or worker counts.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from unitok.document import Document
from unitok.errors import UserError, read_json
from unitok.vocab import Placed, Vocab

VERSION = 1
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        (
            "spans",
            pa.list_(
                pa.struct(
                    [
                        ("modality", pa.string()),
                        ("start", pa.int32()),
                        ("length", pa.int32()),
                        ("role", pa.string()),
                        ("loss", pa.bool_()),
                        ("source", pa.string()),
                        ("size", pa.list_(pa.int32())),
                    ]
                )
            ),
        ),
    ],
    metadata={"unitok": str(VERSION)},
)


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.arrow"


def write_shard(path: Path, documents: Iterable[Document], vocab: Vocab) -> dict:
    """Write a shard beside its place and rename it; -> its entry for `dataset.json`."""
    rows: dict[str, list] = {"id": [], "tokens": [], "spans": []}
    modalities: dict[str, int] = {}
    for document in documents:
        ids, placed = vocab.encode_placed(document)
        rows["id"].append(document.id)
        rows["tokens"].append(ids.astype(np.int32))
        rows["spans"].append([asdict(p) | {"size": list(p.size)} for p in placed])
        for p in placed:
            modalities[p.modality] = modalities.get(p.modality, 0) + p.length
    table = pa.table(rows, schema=SCHEMA)
    partial = path.with_name(path.name + ".partial")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))  # one batch: read without a copy
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    partial.replace(path)
    return {
        "file": path.name,
        "documents": table.num_rows,
        "ids": int(sum(len(t) for t in rows["tokens"])),
        "ids_by_modality": dict(sorted(modalities.items())),
        "sha256": digest,
    }


def write_dataset_json(folder: Path, vocab: Vocab, shards: list[dict], options: dict) -> dict:
    """Close a data set: write `dataset.json` atomically; -> what it holds."""
    by_modality: dict[str, int] = {}
    for shard in shards:
        for name, count in shard["ids_by_modality"].items():
            by_modality[name] = by_modality.get(name, 0) + count
    content = {
        "version": VERSION,
        "documents": sum(s["documents"] for s in shards),
        "ids": sum(s["ids"] for s in shards),
        "ids_by_modality": dict(sorted(by_modality.items())),
        "options": options,
        "shards": shards,
        "vocab": vocab.to_manifest(),
    }
    partial = folder / "dataset.json.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(folder / "dataset.json")
    return content


class TokenDataset:
    """Random access to the documents of a data set, memory-mapped.

    Args:
        folder: a data set's folder; errors: `UserError` when it has no `dataset.json` or another version.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        path = self.folder / "dataset.json"
        self.info = read_json(path, "make a data set with `unitok tokenize`")
        if self.info.get("version") != VERSION:
            raise UserError(f"{path}: version {self.info.get('version')}; this unitok reads version {VERSION}")
        self.vocab = Vocab.from_manifest(self.info["vocab"])
        self._tables = [self._open(shard) for shard in self.info["shards"]]
        self._starts = np.cumsum([0] + [t.num_rows for t in self._tables])
        columns = [t.column("tokens").combine_chunks() for t in self._tables]
        self._tokens = [c.values.to_numpy() for c in columns]
        self._offsets = [c.offsets.to_numpy() for c in columns]

    def _open(self, shard: dict) -> pa.Table:
        path = self.folder / shard["file"]
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, though dataset.json lists it; make the data set again") from None
        except pa.ArrowInvalid:
            raise UserError(f"{path}: not an Arrow file; make the data set again") from None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def lengths(self) -> np.ndarray:
        """int64 [documents]: number of ids of each."""
        return np.concatenate([np.diff(o) for o in self._offsets] or [np.zeros(0)]).astype(np.int64)

    def ids(self, index: int) -> np.ndarray:
        """int64 [L]: the ids of a document, bos to eos."""
        shard, row = self._place(index)
        a, b = self._offsets[shard][row : row + 2]
        return self._tokens[shard][a:b].astype(np.int64)

    def placed(self, index: int) -> list[Placed]:
        """Where the segments of a document stand."""
        shard, row = self._place(index)
        spans = self._tables[shard].column("spans")[row].as_py()
        return [Placed(**(s | {"size": tuple(s["size"])})) for s in spans]

    def document(self, index: int) -> Document:
        """A document with its codes. Inverse of what `write_shard` wrote."""
        shard, row = self._place(index)
        read = self.vocab.decode(self.ids(index), self.placed(index))
        return Document(read.segments, self._tables[shard].column("id")[row].as_py())

    def verify(self) -> list[str]:
        """Problems found by checksums and grammar, as sentences; an empty list is a good data set."""
        from unitok.grammar import Grammar

        problems = []
        for shard in self.info["shards"]:
            if hashlib.sha256((self.folder / shard["file"]).read_bytes()).hexdigest() != shard["sha256"]:
                problems.append(f"{shard['file']}: the checksum differs from dataset.json")
        grammar = Grammar(self.vocab)
        for i in range(len(self)):
            try:
                grammar.check(self.ids(i))
            except UserError as error:
                problems.append(f"document {i}: {error}")
        return problems
