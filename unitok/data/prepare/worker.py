"""Make one shard: read and encode a stretch of the plan's listing, write it into a temporary file and rename it."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch

from unitok.bundle import Bundle
from unitok.data.prepare.encode import Encoded, Encoder, Job, Progress
from unitok.data.prepare.items import SourceItem
from unitok.data.prepare.plan import Plan, Run, open_sources
from unitok.data.prepare.sources import Source
from unitok.data.shards import ShardInfo, shard_name, write_shard
from unitok.errors import UserError
from unitok.files import is_full_disk, write_json

#: Seconds after which a thread must yield the interpreter. With Python's default of 5 ms, each of a network's many operations
#: may wait that long for a decoding thread: an image encoder took 3.5 times as long (docs/notes.md).
SWITCH = 5e-4


class Worker:
    """Keeps a bundle's tokenizers loaded and makes shards of a planned run, one after another.

    device: where its tokenizers run; default: the plan's device. progress, overlap: see `Encoder`.
    """

    def __init__(self, plan: Plan, device: str = "", progress: Progress | None = None, overlap: bool = True):
        self.run = Run(plan)
        self.bundle = Bundle.from_pretrained(plan.bundle, device=device or plan.device, parts="tokenizers")
        self.sources = open_sources(plan, self.bundle)
        self.encoder = Encoder(self.bundle, plan.options, plan.seed, overlap=overlap, progress=progress)

    def process(self, index: int) -> ShardInfo:
        """Make shard `index`, if it does not exist yet. Returns: its entry for `dataset.json`.

        Deterministic, and safe to repeat, also in several processes at the same time.
        """
        return made(self.run, index) or self.write(index, self.encode(index))

    def process_all(self, indices: Iterable[int]) -> Iterator[ShardInfo]:
        """Make one shard after another; each is written while the next one is read and encoded."""
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

    def write(self, index: int, encoded: Encoded) -> ShardInfo:
        """Write a shard, then its record. Errors: `UserError` for a full disk."""
        run = self.run
        try:
            entry = write_shard(run.out / shard_name(index), encoded.documents, self.bundle.vocab, run.work)
            if len(run.splits) > 1:
                entry["split"] = run.shards[index][0]
            entry["items"], entry["skipped"] = encoded.items, encoded.skipped
            if encoded.filtered:
                entry["filtered"] = encoded.filtered
            if encoded.formats:
                entry["formats"] = encoded.formats
            if encoded.notes:
                entry["notes"] = encoded.notes
            write_json(run.record(index), [entry, encoded.errors], run.work)
        except OSError as error:
            raise full_disk(error, run.out) from None
        return entry


def encode_items(encoder: Encoder, sources: list[Source], items: Sequence[tuple[int, SourceItem]]) -> Encoded:
    """Encode items of a listing, each given with the number of its source."""

    def makes() -> Iterator[Job]:
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


def made(run: Run, index: int) -> ShardInfo | None:
    """The entry of a shard that exists already; None for one that has yet to be made."""
    try:
        entry: ShardInfo = json.loads(run.record(index).read_text())[0]
        same = (run.out / entry["file"]).stat().st_size == entry["bytes"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return entry if same else None


def full_disk(error: OSError, out: Path) -> Exception:
    """A `UserError` for a full disk; any other error unchanged."""
    message = f"{out}: {error.strerror}; make room and start again: what is done is kept"
    return UserError(message) if is_full_disk(error) else error


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let networks use this many threads, and wait only briefly for threads that decode files."""
    before = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(count)
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        sys.setswitchinterval(before[1])
