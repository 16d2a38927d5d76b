"""Raw documents -> documents, with the tokenizers of a bundle.

Threads read and decode the parts of documents a little ahead of the tokenizers; what has equal batch keys goes through the
networks together. Each file is encoded once, however many documents use it. What is batched with what depends on the documents
and their order alone, never on timing, so the codes do not either.
"""

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from unitok.bundle import Bundle
from unitok.data.prepare.augment import versions
from unitok.data.prepare.recipe import SourceSpec, share
from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError
from unitok.media import sniff_bytes
from unitok.modalities import Loaded, kind_of_content, make_options
from unitok.storage import Blob, Files, printable

WAITING_BYTES = 256 << 20  # decoded content that waits for a full batch
AHEAD = 128  # documents that are read and decoded ahead of the networks
HELD_BYTES = 256 << 20  # decoded content that they may hold
DECODERS = 2  # threads that read and decode


class RunAborted(UserError):
    """Not one document's fault but the run's end; `errors` are the documents that failed before it."""

    errors: tuple[dict[str, str], ...] = ()


DocumentFactory = Callable[[], list[RawDocument]]
Progress = Callable[[int, int, int, int], None]  # documents, files, bytes, failures


@dataclass
class MediaItem:
    """The content of a part on its way: decoded in a thread, encoded alone there or in a batch.

    Args:
        name: the instance that it goes to. users: documents on their way that it belongs to.
        key: of a file, which many documents may use; () for content of the document itself.
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
    """A document whose parts are on their way."""

    raw: RawDocument
    media: tuple[MediaItem, ...]
    spec: SourceSpec
    rejected: str = ""  # the filter that its texts fail


@dataclass
class Encoded:
    """Documents in order; what could not be used, and why; how many each filter left out.

    `items` and `skipped` count items of a source, those tried and those that no document came of. `formats` counts the documents'
    parts by instance and file format, `notes` what items hold and was not used.
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
        options: how content is read, by kind, where a source does not say it: the fields of `Modality.Options`.
        seed: of random crops.
        overlap: decode while the networks run; without, they take turns, which is faster where no core is to spare: threads
            of one interpreter get in one another's way.
        progress: is given documents, files, bytes and failures as they come.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
        overlap: bool = True,
        progress: Progress | None = None,
    ):
        self.bundle, self.options, self.seed = bundle, options or {}, seed
        self.overlap, self.progress = overlap, progress or (lambda *_: None)

    def encode(self, raws: list[RawDocument]) -> tuple[list[Document], list[dict[str, str]]]:
        """Documents, and for each that could not be made, where and why. Paths are files of this machine."""
        done = self.run((raw.id, raw.where, SourceSpec(""), partial(_opened, raw)) for raw in raws)
        return done.documents, done.errors

    def run(self, makes: Iterable[tuple[str, str, SourceSpec, DocumentFactory]]) -> Encoded:
        """Documents from what `Source.read` gives, each with its id, its place in words and its source's spec."""
        work = _Work(self)
        with ThreadPoolExecutor(DECODERS) as pool:
            try:
                for id, where, future in _ahead(pool, makes, work):
                    work.take(id, where, future)
            except BaseException as error:
                work.stop()  # or its threads would wait for room
                pool.shutdown(cancel_futures=True)
                if isinstance(error, RunAborted):
                    error.errors = tuple(r for r in work.results if isinstance(r, dict))
                raise
        return work.finish()


def _opened(raw: RawDocument) -> list[RawDocument]:
    """A document whose paths are files of this machine, with what reads them."""
    files = Files("/")
    opened = (p if p.path is None else replace(p, file=Blob.of(files, str(p.path.absolute()))) for p in raw.content)
    return [replace(raw, content=tuple(opened))]


def _ahead(pool: ThreadPoolExecutor, makes: Iterable[Any], work: "_Work") -> Iterator[tuple[str, str, Future]]:
    """Futures in order, `AHEAD` of them under way."""
    waiting: deque[tuple[str, str, Future]] = deque()
    for number, (id, where, spec, make) in enumerate(makes):
        waiting.append((id, where, pool.submit(work.prepare, number, spec, make)))
        while len(waiting) >= AHEAD:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


class _Work:
    """The documents of one call of `Encoder.run`."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.bundle = encoder, encoder.bundle
        self.media: dict[tuple[str, ...], MediaItem] = {}
        self.lock = threading.Lock()
        self.results: list[Waiting | dict[str, str]] = []
        self.filtered: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.batches: dict[tuple, list[MediaItem]] = defaultdict(list)
        self.waiting_bytes = 0  # of what is in the batches
        self.held = 0  # bytes that are decoded and not yet taken
        self.room = threading.Condition(self.lock)
        self.stopped = False
        self.quiet = threading.Event()  # cleared while the networks run and nothing is to be decoded
        self.quiet.set()
        self.items = self.skipped = 0  # taken so far, and those of them of which nothing could be used

    # ---- In threads: read, decode --------------------------------------------------------------------------------

    def prepare(self, number: int, spec: SourceSpec, make: DocumentFactory) -> list[Waiting]:
        """Read item `number`, and decode its content; errors: `UserError` for an item that cannot be used.

        While much is held that was decoded already, only the item that is to be taken next goes on.
        """
        self.quiet.wait()
        with self.room:
            self.room.wait_for(lambda: self.held < HELD_BYTES or number <= self.items or self.stopped)
            if self.stopped:
                raise RunAborted("stopped")
        grabbed: list[MediaItem] = []
        try:
            return [waiting for raw in make() for waiting in self._prepare(spec, raw, grabbed)]
        except BaseException:
            self._release(grabbed)
            raise

    def stop(self) -> None:
        """Nothing more is to be prepared."""
        self.quiet.set()
        with self.room:
            self.stopped = True
            self.room.notify_all()

    def _prepare(self, spec: SourceSpec, raw: RawDocument, grabbed: list[MediaItem]) -> Iterator[Waiting]:
        """The versions of a document: what stands in it is read first, and its files only where that passes the filters."""
        try:
            named = tuple(replace(p, type=self.bundle.instance(spec.instances.get(p.type, p.type))) for p in raw.content)
            for name in {part.type for part in named}:
                self.bundle.require(name)
        except UserError as error:
            raise RunAborted(str(error)) from None

        def options(name: str) -> Any:
            kind = self.bundle.modality(name).kind
            said = {**self.encoder.options.get(kind, {}), **spec.options.get(kind, {})}
            return make_options(kind, said, f"source {spec.name}")

        for version in versions(self.bundle, replace(raw, content=named), options):
            media: dict[int, MediaItem] = {}
            facts = Counter({"characters": 0.0})
            for at, part in enumerate(version.content):
                if part.file is None:
                    media[at] = MediaItem(part.type)
                    self._load(media[at], part.value, options(part.type), version.where, part.view)
                    facts.update(media[at].loaded.facts)
            rejected = spec.filters.reject(facts)
            for at, part in enumerate(() if rejected else version.content):
                if part.file is not None:
                    media[at] = self._medium_of(spec, part, version.id, options(part.type), grabbed)
            slim = tuple(replace(part, file=None, value="") for part in version.content)  # or all of it would stay
            parts = tuple(media[at] for at in sorted(media)) if not rejected else ()
            yield Waiting(replace(version, content=slim), parts, spec, rejected)

    def _medium_of(self, spec: SourceSpec, part: Part, document: str, options: Any, grabbed: list[MediaItem]) -> MediaItem:
        """The content of a file, decoded unless another document had it decoded."""
        assert part.file is not None
        variant = part.view in self.bundle.modality(part.type).views(options)
        own = document if variant else ""  # what is random in a variant is its document's own
        key = (str(id(spec)), part.type, part.file.name, str(part.file.place), part.view, own)
        with self.lock:
            known = self.media.get(key)
            medium = known or self.media.setdefault(key, MediaItem(part.type, key))
            medium.users += 1
            grabbed.append(medium)
        if known is None:
            chance = share(self.encoder.seed, own, part.file.name)
            self._load(medium, part.file, options, part.file.name, part.view, chance)
            with self.lock:
                self.held += medium.loaded.nbytes
            medium.ready.set()
        return medium

    def _load(self, medium: MediaItem, content: Any, options: Any, name: str, view: str = "", chance: float = 0.0) -> None:
        """Decode content, and encode it if it is encoded alone; what goes wrong is said by all documents that it belongs to."""
        modality, tokenizer = self.bundle.modality(medium.name), self.bundle.require(medium.name)
        try:
            found = None
            if isinstance(content, Blob):
                found = kind_of_content(content.head(), name, modality.kind) or sniff_bytes(content.head(), name)
            else:
                content = modality.check(content, name)
            if found not in (None, modality.kind):
                raise UserError(f"{name}: the part's type is {medium.name}, the file is {found}; give the type that it has")
            medium.loaded = modality.load(tokenizer, content, options, name, view, chance)
            if not medium.loaded.rejected and modality.batch_key(tokenizer, medium.loaded) is None:
                [medium.codes] = modality.encode(tokenizer, [medium.loaded])
                medium.loaded.content = None
        except UserError as error:
            medium.error = str(error)
        except Exception as bug:  # what no one thought of
            medium.error = printable(f"{name}: {type(bug).__name__}: {bug}")

    # ---- In order: filter, batch, encode -------------------------------------------------------------------------

    def take(self, id: str, where: str, future: Future) -> None:
        """The next item: its documents wait for their codes."""
        try:
            found: list[Waiting] = future.result()
        except RunAborted:
            raise
        except Exception as error:  # a UserError; or what no one thought of, which must not end a run of a billion files
            message = str(error) if isinstance(error, UserError) else f"{where}: {type(error).__name__}: {error}"
            self.results.append({"id": printable(id), "where": where, "error": printable(message)})
            self._taken(0, 0, 1)
            return
        files = size = bad = 0
        self.notes.update({note for waiting in found for note in waiting.raw.notes})
        for waiting in found:
            shared = [medium for medium in waiting.media if medium.key]
            for medium in shared:
                medium.ready.wait()
            if why := next((medium.error for medium in waiting.media if medium.error), ""):
                self.results.append({"id": waiting.raw.id, "where": waiting.raw.where, "error": why})
                bad += 1
            elif name := waiting.rejected or _filtered(waiting, shared):
                self.filtered[name] += 1
            else:
                for medium in waiting.media:
                    if not medium.queued:
                        files, size = files + bool(medium.key), size + medium.loaded.bytes
                        self._queue(medium)
                self.results.append(waiting)
            self._release(shared)
        self._taken(files, size, int(0 < bad == len(found)))

    def _taken(self, files: int, size: int, failed: int) -> None:
        """An item more is done with."""
        self.skipped += failed
        with self.room:
            self.items += 1
            self.room.notify_all()
        self.encoder.progress(1, files, size, failed)

    def _release(self, media: list[MediaItem]) -> None:
        """A document is done with; what no other one on its way needs, and was not encoded, is forgotten."""
        with self.room:
            self.room.notify_all()
            for medium in media:
                medium.users -= 1
                if not medium.users and not medium.queued:
                    self.held -= medium.loaded.nbytes
                    medium.loaded.content = None
                    self.media.pop(medium.key, None)

    def _queue(self, medium: MediaItem) -> None:
        """Put a medium into its batch; a batch that is full is encoded, and the largest while much waits."""
        medium.queued = True
        with self.room:
            self.held -= medium.loaded.nbytes if medium.key else 0
            self.room.notify_all()
        if medium.codes is not None:
            return
        modality, tokenizer = self.bundle.modality(medium.name), self.bundle.require(medium.name)
        key = (medium.name, modality.batch_key(tokenizer, medium.loaded))
        self.batches[key].append(medium)
        self.waiting_bytes += medium.loaded.nbytes
        if len(self.batches[key]) * modality.cost(tokenizer, medium.loaded) >= modality.BATCH:
            self._flush(key)
        while self.waiting_bytes > WAITING_BYTES:
            self._flush(max(self.batches, key=lambda k: sum(m.loaded.nbytes for m in self.batches[k])))

    def _flush(self, key: tuple) -> None:
        """Encode a batch."""
        batch = self.batches.pop(key)
        self.waiting_bytes -= sum(medium.loaded.nbytes for medium in batch)
        if not self.encoder.overlap:
            self.quiet.clear()
        try:
            codes = self.bundle.modality(key[0]).encode(self.bundle.require(key[0]), [medium.loaded for medium in batch])
            for medium, one in zip(batch, codes, strict=True):
                medium.codes = one
        except UserError as error:  # of a file that is read while it is encoded
            for medium in batch:
                medium.error = str(error)
        for medium in batch:
            medium.loaded.content = None
        self.quiet.set()

    def finish(self) -> Encoded:
        """Encode what still waits; -> all documents."""
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
                for segment in segments:
                    self.bundle.vocab.check_codes(segment)
                done.documents.append(Document(segments, result.raw.id, result.raw.where))
                formats.update(f"{medium.name} {medium.loaded.format}".strip() for medium in result.media)
            except UserError as error:
                done.errors.append({"id": result.raw.id, "where": result.raw.where, "error": printable(str(error))})
                self.skipped += 1
        done.items, done.skipped = self.items, min(self.skipped, self.items)
        done.formats = dict(sorted(formats.items()))
        return done


def _segment(part: Part, medium: MediaItem) -> Segment:
    if medium.codes is None:
        raise UserError(medium.error)
    source = part.path.as_posix() if part.path else ""
    source = f"{source}#{medium.loaded.view}" if medium.loaded.view else source
    return Segment(medium.name, medium.codes, part.role, part.loss, source, medium.loaded.size)


def _filtered(waiting: Waiting, files: list[MediaItem]) -> str:
    """The name of the filter that a file of a document fails, or ""."""
    why = next((medium.loaded.rejected for medium in files if medium.loaded.rejected), "")
    return why or next(filter(None, (waiting.spec.filters.reject(medium.loaded.facts) for medium in files)), "")
