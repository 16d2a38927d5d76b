"""Raw documents -> documents, with the tokenizers of a bundle.

Threads read and decode the parts of documents a little ahead of the tokenizers, where a core is free for them. Contents of equal batch keys go through the
networks together. Each file is encoded once, however many documents use it. The batches depend only on the documents and their
order, never on timing, and so do the codes.
"""

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import numpy as np

from unitok.bundle import Bundle
from unitok.data.prepare.augment import versions
from unitok.data.prepare.recipe import SourceSpec, hash_fraction, make_options
from unitok.data.prepare.words import interleaved
from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError
from unitok.media import sniff_bytes
from unitok.modalities import Loaded, kind_of_content, modality_of, referred
from unitok.storage import Blob, Files, printable

WAITING_BYTES = 256 << 20  # decoded content that waits for a full batch
AHEAD = 128  # documents that are read and decoded ahead of the networks
HELD_BYTES = 256 << 20  # decoded content that they may hold
AT_ONCE = 8 << 20  # bytes of one item's content; what is beyond, such as the rest of a film, is decoded when it is taken
DECODERS = 2  # threads that read and decode


class RunAborted(UserError):
    """Ends the run, whatever the other documents are; `errors` lists the documents that failed before it."""

    errors: tuple[dict[str, str], ...] = ()


DocumentFactory = Callable[[], list[RawDocument]]
Job = tuple[str, str, SourceSpec, DocumentFactory]  # id, place for messages, the source's spec, what reads the item
Progress = Callable[[int, int, int, int], None]  # documents, files, bytes, failures


@dataclass
class MediaItem:
    """The content of a part while it is decoded (in a thread) and encoded (there, or in a batch).

    Args:
        name: the instance that encodes it. users: documents in progress that use it.
        key: identifies a file, which several documents may use; () for content that stands in the document itself.
        ready: set when `loaded` or `error` is there. queued: whether it has been put into a batch.
    """

    name: str
    key: tuple[str, ...] = ()
    users: int = 0
    ready: threading.Event = field(default_factory=threading.Event)
    loaded: Loaded = field(default_factory=lambda: Loaded(None))
    error: str = ""
    queued: bool = False
    codes: np.ndarray | None = None


@dataclass(frozen=True)
class Waiting:
    """A document whose parts are being decoded or encoded."""

    raw: RawDocument
    media: tuple[MediaItem, ...]
    spec: SourceSpec
    rejected: str = ""  # the filter that its texts break


Prepared = Callable[[], Iterator[Waiting]]  # gives the documents of an item; errors: what `_Work.prepare` raises


@dataclass
class Encoded:
    """Documents in order, and what was not made into documents.

    `errors`: what could not be used, with id, where and error. `filtered`: documents left out, by filter. `formats`: the documents'
    parts by instance and file format. `notes`: what items hold that was not used. `items`: items of the source that were tried.
    `skipped`: items that gave no document.
    """

    documents: list[Document] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    filtered: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    items: int = 0
    skipped: int = 0


class Encoder:
    """Reads, decodes, batches and encodes.

    Args:
        options: how content is read, by kind, for sources without options of their own: the fields of `Modality.Options`.
        seed: of random crops.
        overlap: decode while the networks run. Without it all is done in turn by one thread, which is faster where no core is free,
            because threads of one interpreter slow each other down.
        progress: is called with the numbers of new documents, files, bytes and failures.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: Mapping[str, Mapping[str, object]] | None = None,
        seed: int = 0,
        overlap: bool = True,
        progress: Progress | None = None,
    ):
        self.bundle, self.options, self.seed = bundle, options or {}, seed
        self.overlap, self.progress = overlap, progress or (lambda *_: None)

    def encode(self, raws: list[RawDocument]) -> tuple[list[Document], list[dict[str, str]]]:
        """Encode documents whose paths are local files. Returns: the documents, and an error record for each that failed."""
        done = self.run((raw.id, raw.where, SourceSpec(""), partial(_opened, raw)) for raw in raws)
        return done.documents, done.errors

    def run(self, makes: Iterable[Job]) -> Encoded:
        """Encode what `Source.read` gives: each item with its id, its place (for messages) and its source's spec."""
        work = _Work(self)
        with ThreadPoolExecutor(DECODERS) as pool:
            try:
                for id, where, prepared in _ahead(pool, makes, work) if self.overlap else _in_turn(makes, work):
                    work.take(id, where, prepared)
            except BaseException as error:
                work.stop()  # otherwise its threads would wait forever
                pool.shutdown(cancel_futures=True)
                if isinstance(error, RunAborted):
                    error.errors = tuple(r for r in work.results if isinstance(r, dict))
                raise
        return work.finish()


def _opened(raw: RawDocument) -> list[RawDocument]:
    """A document whose paths are local files, with the blobs that read them."""
    files = Files("/")
    opened = (p if p.path is None else replace(p, file=Blob.of(files, str(p.path.absolute()))) for p in raw.content)
    return [replace(raw, content=tuple(opened))]


def _ahead(pool: ThreadPoolExecutor, makes: Iterable[Job], work: "_Work") -> Iterator[tuple[str, str, Prepared]]:
    """What gives each item's documents, in order, with up to `AHEAD` items in progress."""
    waiting: deque[tuple[str, str, Prepared]] = deque()
    for number, (id, where, spec, make) in enumerate(makes):
        waiting.append((id, where, pool.submit(work.prepare, number, spec, make).result))
        while len(waiting) >= AHEAD:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _in_turn(makes: Iterable[Job], work: "_Work") -> Iterator[tuple[str, str, Prepared]]:
    """The same where nothing is decoded ahead."""
    for number, (id, where, spec, make) in enumerate(makes):
        yield id, where, partial(work.prepare, number, spec, make)


class _Work:
    """The documents of one call of `Encoder.run`."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.bundle = encoder, encoder.bundle
        self.media: dict[tuple[str, ...], MediaItem] = {}
        self.options: dict[tuple[int, str], object] = {}  # by source and instance
        self.instances: dict[tuple[int, str], str] = {}  # by source and type of a part
        self.lock = threading.Lock()
        self.results: list[Waiting | dict[str, str]] = []
        self.filtered: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.batches: dict[tuple, list[MediaItem]] = defaultdict(list)
        self.waiting_bytes = 0  # of the contents in the batches
        self.held_bytes = 0  # bytes that are decoded and not yet taken
        self.room = threading.Condition(self.lock)
        self.stopped = False
        self.items = self.skipped = 0  # items taken so far, and those of them that gave no document

    # ---- In threads: read, decode --------------------------------------------------------------------------------

    def prepare(self, number: int, spec: SourceSpec, make: DocumentFactory) -> Iterator[Waiting]:
        """Read item `number` and decode its content, of a long one its beginning. Errors: `UserError` for an item that cannot be used.

        Back-pressure: while decoded content exceeds `HELD_BYTES`, only the next item in order may proceed.
        """
        with self.room:
            self.room.wait_for(lambda: self.held_bytes < HELD_BYTES or number <= self.items or self.stopped)
            if self.stopped:
                raise RunAborted("stopped")
        used: list[MediaItem] = []
        begun: list[Waiting] = []
        try:
            rest = (waiting for raw in make() for waiting in self._prepare(spec, raw, used))
            while sum(media_item.loaded.nbytes for media_item in used) < AT_ONCE and (waiting := next(rest, None)):
                begun.append(waiting)
        except BaseException:
            self._release(used)
            raise
        return chain(begun, rest)

    def stop(self) -> None:
        """Let waiting threads end; nothing more is prepared."""
        with self.room:
            self.stopped = True
            self.room.notify_all()

    def _prepare(self, spec: SourceSpec, raw: RawDocument, used: list[MediaItem]) -> Iterator[Waiting]:
        """The versions of a document. Content that stands in it is read first; its files only where that passes the filters."""
        types = [self._instance(spec, part, raw.where) for part in raw.content]
        if any(part.type != type for part, type in zip(raw.content, types, strict=True)):
            raw = replace(raw, content=tuple(replace(p, type=type) for p, type in zip(raw.content, types, strict=True)))
        options = partial(self._options, spec)
        for version in versions(self.bundle, raw, options, spec.turn_seconds):
            media: dict[int, MediaItem] = {}
            facts = Counter({"characters": 0.0})
            about = [number for number, part in enumerate(version.content) if self.bundle.modality(part.type).refers]
            for number, part in enumerate(version.content):
                if part.file is None and number not in about:
                    media[number] = MediaItem(part.type)
                    self._load(media[number], part.value, options(part.type), version.where, part.view)
                    facts.update(media[number].loaded.facts)
            rejected = spec.filters.reject(facts)
            for number, part in enumerate(() if rejected else version.content):
                if part.file is not None:
                    media[number] = self._media_item(spec, part, version.id, options(part.type), used)
            for number in () if rejected else about:
                media[number] = self._related(version.content, number, media, options, version.where)
            slim = tuple(replace(part, file=None, value="") for part in version.content)  # so that its content is not kept
            parts = tuple(media[number] for number in sorted(media)) if not rejected else ()
            yield Waiting(replace(version, content=slim), parts, spec, rejected)

    def _instance(self, spec: SourceSpec, part: Part, where: str) -> str:
        """The tokenizer of a part. Errors: `UserError` for a part that only its document lacks, `RunAborted` where the bundle has none."""
        if (name := self.instances.get((id(spec), part.type))) is not None:
            return name
        try:
            name = self.bundle.instance(spec.instances.get(part.type, part.type))
            self.bundle.require(name)
        except UserError as error:
            if part.file is not None and self.bundle.may_lack(part.type):  # such as videos between images
                raise UserError(f"{where}: {error}") from None
            raise RunAborted(str(error)) from None
        self.instances[id(spec), part.type] = name
        return name

    def _options(self, spec: SourceSpec, name: str) -> object:
        """How a source's content for an instance is read."""
        if (made := self.options.get((id(spec), name))) is None:
            kind = self.bundle.modality(name).kind
            given = {**self.encoder.options.get(kind, {}), **spec.options.get(kind, {})}
            made = self.options[id(spec), name] = make_options(kind, given, f"source {spec.name}")
        return made

    def _media_item(self, spec: SourceSpec, part: Part, document: str, options: object, used: list[MediaItem]) -> MediaItem:
        """The content of a file; it is decoded here unless another document needed it before."""
        assert part.file is not None
        variant = any(part.view.endswith(view) for view in self.bundle.modality(part.type).views(options))
        own = document if variant else ""  # random crops differ between the documents of a file, not between its images
        key = (str(id(spec)), part.type, part.file.name, str(part.file.offset), part.view, own)
        with self.lock:
            known = self.media.get(key)
            media_item = known or self.media.setdefault(key, MediaItem(part.type, key))
            media_item.users += 1
            used.append(media_item)
        if known is None:
            chance = hash_fraction(self.encoder.seed, own or part.file.name)
            self._load(media_item, part.file, options, part.file.name, part.view, chance)
            with self.lock:
                self.held_bytes += media_item.loaded.nbytes
            media_item.ready.set()
        return media_item

    def _related(
        self, content: Sequence[Part], number: int, media: Mapping[int, MediaItem], options: Callable[[str], object], where: str
    ) -> MediaItem:
        """Content that is about other content of its document, which is loaded by now or by another thread."""
        part, kinds = content[number], [self.bundle.modality(part.type).kind for part in content]
        item, modality = MediaItem(part.type), modality_of(kinds[number])
        try:
            value = modality.check(part.value, where)
            index = referred(kinds, number, value, where)
            other = None if index is None else media[index]
            if other is not None and other.key:
                other.ready.wait()
            if other is not None and other.error:
                item.error = other.error
            else:
                related = modality.related(value, None if other is None else other.loaded, where)
                self._load(item, related, options(part.type), where, part.view)
        except UserError as error:
            item.error = str(error)
        return item

    def _load(
        self, media_item: MediaItem, content: object, options: object, name: str, view: str = "", chance: float = 0.0
    ) -> None:
        """Decode content, and encode it if it is encoded alone. An error is kept for all documents that use the content."""
        modality, tokenizer = self.bundle.modality(media_item.name), self.bundle.require(media_item.name)
        try:
            kind = None
            if isinstance(content, Blob):
                kind = kind_of_content(content.head(), name, modality.kind) or sniff_bytes(content.head(), name)
            elif not modality.refers:
                content = modality.check(content, name)
            if kind not in (None, modality.kind):
                raise UserError(f"{name}: the part's type is {media_item.name}, but the file is {kind}; correct the type")
            media_item.loaded = modality.load(tokenizer, content, options, name, view, chance)
            if not media_item.loaded.rejected and modality.batch_key(tokenizer, media_item.loaded) is None:
                [media_item.codes] = modality.encode(tokenizer, [media_item.loaded])
                media_item.loaded.content = None
        except UserError as error:
            media_item.error = str(error)
        except Exception as bug:  # a bug must not end a run of a billion files
            media_item.error = printable(f"{name}: {type(bug).__name__}: {bug}")

    # ---- In order: filter, batch, encode -------------------------------------------------------------------------

    def take(self, id: str, where: str, prepared: Prepared) -> None:
        """Take the next item in order: filter its documents, and put their content into batches."""
        files = size = good = bad = 0
        notes: set[str] = set()
        try:
            for waiting in prepared():
                shared = [media_item for media_item in waiting.media if media_item.key]
                for media_item in shared:
                    media_item.ready.wait()
                notes.update(waiting.raw.notes, (m.loaded.note for m in shared if m.loaded.note))
                error_message = next((media_item.error for media_item in waiting.media if media_item.error), "")
                if error_message:
                    bad += 1
                    self.results.append({"id": waiting.raw.id, "where": waiting.raw.where, "error": error_message})
                elif name := waiting.rejected or _filtered(waiting):
                    self.filtered[name] += 1
                else:
                    for media_item in waiting.media:
                        if not media_item.queued:
                            files, size = files + bool(media_item.key), size + media_item.loaded.bytes
                            self._queue(media_item)
                    self.results.append(waiting)
                good += not error_message
                self._release(shared)
        except RunAborted:
            raise
        except Exception as error:  # a UserError, or a bug, which must not end a run of a billion files
            message = str(error) if isinstance(error, UserError) else f"{where}: {type(error).__name__}: {error}"
            self.results.append({"id": printable(id), "where": where, "error": printable(message)})
            bad += 1
        self.notes.update(notes)
        self._taken(files, size, int(bad > 0 and not good))

    def _taken(self, files: int, size: int, failed: int) -> None:
        """Count one more item."""
        self.skipped += failed
        with self.room:
            self.items += 1
            self.room.notify_all()
        self.encoder.progress(1, files, size, failed)

    def _release(self, media: list[MediaItem]) -> None:
        """End a document's use of its contents; those that no other document needs, and that no batch holds, are dropped."""
        with self.room:
            self.room.notify_all()
            for media_item in media:
                media_item.users -= 1
                if not media_item.users and not media_item.queued:
                    self.held_bytes -= media_item.loaded.nbytes
                    media_item.loaded.content = None
                    self.media.pop(media_item.key, None)

    def _queue(self, media_item: MediaItem) -> None:
        """Put content into its batch. A full batch is encoded; so is the largest one while `WAITING_BYTES` are exceeded."""
        media_item.queued = True
        with self.room:
            self.held_bytes -= media_item.loaded.nbytes if media_item.key else 0
            self.room.notify_all()
        if media_item.codes is not None:
            return
        modality, tokenizer = self.bundle.modality(media_item.name), self.bundle.require(media_item.name)
        key = (media_item.name, modality.batch_key(tokenizer, media_item.loaded))
        self.batches[key].append(media_item)
        self.waiting_bytes += media_item.loaded.nbytes
        if len(self.batches[key]) * modality.cost(tokenizer, media_item.loaded) >= modality.BATCH:
            self._flush(key)
        while self.waiting_bytes > WAITING_BYTES:
            self._flush(max(self.batches, key=lambda k: sum(m.loaded.nbytes for m in self.batches[k])))

    def _flush(self, key: tuple) -> None:
        """Encode a batch."""
        batch = self.batches.pop(key)
        self.waiting_bytes -= sum(media_item.loaded.nbytes for media_item in batch)
        try:
            codes = self.bundle.modality(key[0]).encode(
                self.bundle.require(key[0]), [media_item.loaded for media_item in batch]
            )
            for media_item, one in zip(batch, codes, strict=True):
                media_item.codes = one
        except UserError as error:  # of a long file, which is read while it is encoded
            for media_item in batch:
                media_item.error = str(error)
        for media_item in batch:
            media_item.loaded.content = None

    def finish(self) -> Encoded:
        """Encode the remaining batches. Returns: all documents."""
        for key in list(self.batches):
            self._flush(key)
        done = Encoded(filtered=dict(sorted(self.filtered.items())), notes=dict(sorted(self.notes.items())))
        formats: Counter[str] = Counter()
        for result in self.results:
            if isinstance(result, dict):
                done.errors.append(result)
                continue
            try:
                segments = tuple(map(_segment, result.raw.content, result.media))
                if result.raw.cuts:
                    segments = tuple(interleaved(self.bundle, segments, result.raw.cuts))
                for segment in segments:
                    self.bundle.vocab.check_codes(segment)
                done.documents.append(Document(segments, result.raw.id, result.raw.where))
                formats.update(f"{media_item.name} {media_item.loaded.format}".strip() for media_item in result.media)
            except UserError as error:
                done.errors.append({"id": result.raw.id, "where": result.raw.where, "error": printable(str(error))})
                self.skipped += 1
        done.items, done.skipped = self.items, min(self.skipped, self.items)
        done.formats = dict(sorted(formats.items()))
        return done


def _segment(part: Part, media_item: MediaItem) -> Segment:
    if media_item.codes is None:
        raise UserError(media_item.error)
    source = part.path.as_posix() if part.path else ""
    source = f"{source}#{media_item.loaded.view}" if media_item.loaded.view else source
    loaded = media_item.loaded
    return Segment(media_item.name, media_item.codes, part.role, part.loss, source, loaded.size, facts=loaded.header)


def _filtered(waiting: Waiting) -> str:
    """The name of the filter that a document's content breaks, or ""."""
    rejected = next((media_item.loaded.rejected for media_item in waiting.media if media_item.loaded.rejected), "")
    files = [media_item for media_item in waiting.media if media_item.key]
    return rejected or next(filter(None, (waiting.spec.filters.reject(media_item.loaded.facts) for media_item in files)), "")
