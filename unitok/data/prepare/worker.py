"""One shard: a stretch of a plan's listing, read, encoded, written beside its place and renamed."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from unitok.bundle import Bundle
from unitok.data.prepare.encode import Encoded, Encoder, Progress
from unitok.data.prepare.listing import SourceItem
from unitok.data.prepare.plan import Plan, Run, open_sources
from unitok.data.prepare.sources import Source
from unitok.data.shards import shard_name, write_shard
from unitok.errors import UserError
from unitok.files import is_full_disk, write_json

#: Seconds after which a thread must let another have the interpreter. At Python's own 5 ms, each of a network's many operations
#: may wait so long for a thread that decodes: an encoder of pictures took 3.5 times as long (docs/notes.md).
SWITCH = 5e-4

#: Counts of `Encoded` by name that a shard's entry holds, where there are any.
COUNTED = ("filtered", "formats", "notes")


class Worker:
    """Keeps a bundle's tokenizers loaded and makes one shard after another of a planned run.

    device: where its tokenizers run; by default where the plan says. progress, overlap: see `Encoder`.
    """

    def __init__(self, plan: Plan, device: str = "", progress: Progress | None = None, overlap: bool = True):
        self.run = Run(plan)
        self.bundle = Bundle.from_pretrained(plan.bundle, device=device or plan.device, parts="tokenizers")
        self.sources = open_sources(plan, self.bundle.types)
        self.encoder = Encoder(self.bundle, plan.options, plan.seed, overlap=overlap, progress=progress)

    def process(self, index: int) -> dict[str, Any]:
        """DocumentFactory shard `index`; -> its entry for `dataset.json`. Deterministic; safe to repeat, and at the same time elsewhere."""
        return made(self.run, index) or self.write(index, self.encode(index))

    def process_all(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        """DocumentFactory one shard after another; each is written while the next one is read and encoded."""
        writing: Future | None = None
        with ThreadPoolExecutor(1) as writer:
            for index in indices:
                encoded = self.encode(index)
                if writing is not None:
                    yield writing.result()
                writing = writer.submit(self.write, index, encoded)
            if writing is not None:
                yield writing.result()

    def encode(self, index: int) -> Encoded:
        """The documents of a shard."""
        return encode_items(self.encoder, self.sources, self.run.items(index))

    def write(self, index: int, encoded: Encoded) -> dict[str, Any]:
        """Write a shard, then its record; errors: `UserError` for a full disk."""
        run = self.run
        try:
            entry = write_shard(run.out / shard_name(index), encoded.documents, self.bundle.vocab, run.work)
            entry |= {"split": run.shards[index][0]} if len(run.splits) > 1 else {}
            entry |= {"items": encoded.items, "skipped": encoded.skipped}
            entry |= {key: counts for key in COUNTED if (counts := getattr(encoded, key))}
            write_json(run.record(index), [entry, encoded.errors], run.work)
        except OSError as error:
            raise full_disk(error, run.out) from None
        return entry


def encode_items(encoder: Encoder, sources: list[Source], items: Sequence[tuple[int, SourceItem]]) -> Encoded:
    """Items of a listing, each with the number of its source -> documents."""

    def makes() -> Iterator[tuple]:
        for number, group in groupby(items, key=lambda numbered: numbered[0]):
            source, run = sources[number], [item for _, item in group]
            for item, make in zip(run, source.read(run), strict=True):
                yield item.id, source.prefix + item.where, source.spec, make

    try:
        encoded = encoder.run(makes())
    except BaseException:
        for source in sources:
            source.drop()
        raise
    for source in sources:
        source.close()
    return encoded


def made(run: Run, index: int) -> dict[str, Any] | None:
    """The entry of a shard that an earlier run finished."""
    try:
        entry = json.loads(run.record(index).read_text())[0]
        same = (run.out / entry["file"]).stat().st_size == entry["bytes"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return entry if same else None


def full_disk(error: OSError, out: Path) -> Exception:
    """A full disk in words; any other error as it is."""
    said = f"{out}: {error.strerror}; make room and start again: what is done is kept"
    return UserError(said) if is_full_disk(error) else error


@contextmanager
def threads(count: int) -> Iterator[None]:
    """The networks use so many threads inside, and wait little for those that decode files."""
    before = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(count)
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        sys.setswitchinterval(before[1])
