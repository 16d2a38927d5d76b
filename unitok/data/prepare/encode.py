"""Raw documents -> documents, with the tokenizers of a bundle.

Threads read files and decode them to pixels and samples, a little ahead of the tokenizers; pictures of equal size (in codes)
and sounds of equal length go through the networks together. Each file is encoded once, however many documents use it. What
is batched with what depends on the documents and their order alone, never on timing, so the codes do not either.
"""

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unitok.bundle import Bundle
from unitok.data.prepare.augment import clip, random_crop, versions
from unitok.data.prepare.recipe import SourceSpec, share
from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError
from unitok.media import open_audio, open_image, read_clip
from unitok.storage import Blob, Files, printable
from unitok.tokenizers.audio import SILENCE
from unitok.tokenizers.image import Fit

BATCH = 64  # pictures, or seconds of sound, encoded at once
LONG_SOUND = 60.0  # seconds; longer sounds are read and encoded piece by piece
WAITING_BYTES = 256 << 20  # pixels and samples that wait for a full batch
AHEAD = 2 * BATCH  # documents that are read and decoded ahead of the networks
HELD_BYTES = 256 << 20  # pixels and samples that they may hold


class Stop(UserError):
    """Not one document's fault but the run's end; `errors` are the documents that failed before it."""

    def __init__(self, message: str, errors: tuple[dict[str, str], ...] = ()):
        super().__init__(message, errors)
        self.errors = errors

    def __str__(self) -> str:
        return str(self.args[0])


Make = Callable[[], list[RawDocument]]
Progress = Callable[[int, int, int, int], None]  # documents, files, bytes, failures


@dataclass
class Medium:
    """A picture or sound on its way: decoded in a thread, encoded in a batch."""

    ready: threading.Event = field(default_factory=threading.Event)
    error: str = ""
    content: Any = None  # uint8 [H, W, 3], float [C, T], or the Blob of a long sound
    size: tuple[int, ...] = ()  # as `Segment.size`
    shape: tuple[int, int] = (0, 0)  # width and height in pixels as it came
    seconds: float = 0.0
    format: str = ""
    rejected: str = ""  # why it is left out and counted, where that is no fault of the file
    view: str = ""
    bytes: int = 0
    key: tuple[str, ...] = ()
    users: int = 0  # documents on their way that it belongs to
    queued: bool = False
    codes: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of what was decoded."""
        return 0 if self.content is None or isinstance(self.content, Blob) else self.content.nbytes


@dataclass(frozen=True)
class Pending:
    """A document whose pictures and sounds are on their way: for each part its text's codes, or its medium."""

    raw: RawDocument
    parts: tuple[np.ndarray | Medium, ...]
    spec: SourceSpec
    rejected: str = ""  # the filter that its texts fail

    @property
    def media(self) -> list[Medium]:
        """Its pictures and sounds."""
        return [p for p in self.parts if isinstance(p, Medium)]


@dataclass
class Encoded:
    """Documents in order; what could not be used, and why; how many each filter left out.

    One item of a source may become several documents: `items` and `skipped` count items, those tried and those of which
    nothing could be used. `formats` counts the documents' parts by type and file format, `notes` what items hold and was not used.
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
        image_area, image_fit: see `ImageTokenizer.prepare`; 0 is the tokenizer's resolution squared.
        seed: of random crops. decoders: threads that read and decode.
        overlap: decode while the networks run; without, they take turns, which is faster where no core is to spare: threads
            of one interpreter get in one another's way.
        progress: told of documents, files, bytes and failures as they come.
    """

    def __init__(
        self,
        unitok: Bundle,
        image_area: int = 0,
        image_fit: Fit = "keep",
        seed: int = 0,
        decoders: int = 2,
        overlap: bool = True,
        progress: Progress | None = None,
    ):
        self.unitok, self.image_area, self.image_fit, self.seed = unitok, image_area, image_fit, seed
        self.decoders, self.overlap, self.progress = decoders, overlap, progress or (lambda *_: None)

    def encode(self, raws: list[RawDocument], folder: Path | None = None) -> tuple[list[Document], list[dict[str, str]]]:
        """-> documents, and for each that could not be made, where and why. Sources are named relative to `folder`, if any."""
        spec = SourceSpec(str(folder or ""))
        done = self.run((raw.id, raw.where, spec, partial(_named, raw, folder)) for raw in raws)
        return done.documents, done.errors

    def run(self, makes: Iterable[tuple[str, str, SourceSpec, Make]]) -> Encoded:
        """Documents from what `Source.read` gives, each with its id, its place in words and its source's spec."""
        work = _Work(self)
        with ThreadPoolExecutor(self.decoders) as pool:
            try:
                for id, where, future in _ahead(pool, makes, work):
                    work.take(id, where, future)
            except BaseException as error:
                work.stop()  # or its threads would wait for room
                pool.shutdown(cancel_futures=True)
                if isinstance(error, Stop):
                    raise type(error)(str(error), tuple(r for r in work.results if isinstance(r, dict))) from None
                raise
        return work.finish()


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
        self.encoder, self.unitok = encoder, encoder.unitok
        self.media: dict[tuple[str, ...], Medium] = {}
        self.lock = threading.Lock()
        self.results: list[Pending | dict[str, str]] = []
        self.filtered: dict[str, int] = defaultdict(int)
        self.notes: dict[str, int] = defaultdict(int)
        self.waiting: dict[tuple, list[Medium]] = defaultdict(list)
        self.waiting_bytes = 0
        self.held = 0  # bytes of pixels and samples that are decoded and not yet taken
        self.room = threading.Condition(self.lock)
        self.stopped = False
        self.quiet = threading.Event()  # cleared while the networks run and nothing is to be decoded
        self.quiet.set()
        self.items = self.skipped = 0  # taken so far, and those of them of which nothing could be used

    # ---- In threads: read, decode --------------------------------------------------------------------------------

    def prepare(self, number: int, spec: SourceSpec, make: Make) -> list[Pending]:
        """Read item `number`, and decode its pictures and sounds; errors: `UserError` for an item that cannot be used.

        While much is held that was decoded already, only the item that is to be taken next goes on.
        """
        self.quiet.wait()
        with self.room:
            self.room.wait_for(lambda: self.held < HELD_BYTES or number <= self.items or self.stopped)
            if self.stopped:
                raise Stop("stopped")
        pending: list[Pending] = []
        grabbed: list[Medium] = []
        try:
            self._prepare(spec, make, pending, grabbed)
        except BaseException:
            self._release(grabbed)
            raise
        return pending

    def stop(self) -> None:
        """Nothing more is to be prepared."""
        self.quiet.set()
        with self.room:
            self.stopped = True
            self.room.notify_all()

    def _prepare(self, spec: SourceSpec, make: Make, pending: list[Pending], grabbed: list[Medium]) -> None:
        audio = self.unitok.audio
        frame = 0.0 if audio is None else audio.hop_length / audio.sample_rate
        for raw in make():
            for version in versions(spec, raw, frame):
                rejected = spec.filters.of_texts(sum(len(p.value) for p in version.content if p.type == "text"))
                parts = () if rejected else tuple(self._part(spec, part, version.id, grabbed) for part in version.content)
                slim = tuple(replace(part, file=None, value="") for part in version.content)  # or all of it would stay
                pending.append(Pending(replace(version, content=slim), parts, spec, rejected))

    def _part(self, spec: SourceSpec, part: Part, document: str, grabbed: list[Medium]) -> np.ndarray | Medium:
        try:
            tokenizer = self.unitok.require(part.type)
        except UserError as error:
            raise Stop(str(error)) from None
        if part.type == "text":
            return np.asarray(tokenizer.encode(part.value), np.int32)
        own = document if part.view.startswith("crop") else ""  # no two documents share a random crop
        key = (str(id(spec)), part.type, part.file.name, str(part.file.place), part.view, own)
        with self.lock:
            known = self.media.get(key)
            medium = known or self.media.setdefault(key, Medium(view=part.view, key=key))
            medium.users += 1
            grabbed.append(medium)
        if known is not None:
            return known
        try:
            if part.type == "image":
                self._decode_image(medium, part.file, spec, own)
            else:
                self._decode_sound(medium, part.file)
        except UserError as error:
            medium.error = str(error)
        except Exception as bug:  # what no one thought of: every document that it belongs to says the same
            medium.error = printable(f"{part.path}: {type(bug).__name__}: {bug}")
        finally:
            with self.lock:
                self.held += medium.nbytes
            medium.ready.set()
        return medium

    def _decode_image(self, medium: Medium, blob: Blob, spec: SourceSpec, own: str) -> None:
        data = blob.read()
        image = open_image(Path(blob.name), data)
        medium.bytes, medium.shape, medium.format = len(data), image.size, image.format or ""
        if medium.view.startswith("crop"):
            image, medium.view = random_crop(image, spec, share(self.encoder.seed, own, blob.name))
        elif medium.view == "flip":
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = self.unitok.require("image").fit(image, self.encoder.image_area or None, self.encoder.image_fit)
        medium.content, medium.size = np.asarray(image), (image.height, image.width)

    def _decode_sound(self, medium: Medium, blob: Blob) -> None:
        tokenizer = self.unitok.require("audio")
        piece = clip(medium.view)
        with blob.local() as path:  # without a path, the bytes are in memory
            data = None if path else blob.read()
            medium.bytes = (path.stat().st_size if path else len(data or b"")) if piece is None else 0
            try:
                with open_audio(path or Path(blob.name), data) as file:
                    medium.format = file.format
                    medium.seconds = file.frames / file.samplerate if piece is None else piece[1] - piece[0]
                    if medium.seconds > LONG_SOUND and piece is None:
                        medium.content = blob
                        return
                    samples = read_clip(file, blob.name, piece)
                    if piece is not None and samples.abs().max() < SILENCE:  # of a recording that is not silent as a whole
                        medium.rejected = "silent_segments"
                        return
                    samples = tokenizer.prepare(samples, file.samplerate, blob.name)
            except UserError as error:
                raise UserError(str(error).replace(str(path), blob.name) if path else str(error)) from None
        medium.content, medium.size = samples, tokenizer.size(samples)

    # ---- In order: filter, batch, encode -------------------------------------------------------------------------

    def take(self, id: str, where: str, future: Future) -> None:
        """The next item: its documents wait for their codes."""
        try:
            found = future.result()
        except Stop:
            raise
        except Exception as error:  # a UserError; or what no one thought of, which must not end a run of a billion files
            said = str(error) if isinstance(error, UserError) else f"{where}: {type(error).__name__}: {error}"
            self.results.append({"id": printable(id), "where": where, "error": printable(said)})
            self._taken(0, 0, 1)
            return
        files = size = bad = 0
        for note in {note for pending in found for note in pending.raw.notes}:
            self.notes[note] += 1
        for pending in found:
            for medium in pending.media:
                medium.ready.wait()
            if why := next((medium.error for medium in pending.media if medium.error), ""):
                self.results.append({"id": pending.raw.id, "where": pending.raw.where, "error": why})
                bad += 1
            elif name := pending.rejected or _filtered(pending):
                self.filtered[name] += 1
            else:
                for medium in (m for m in pending.media if not m.queued):
                    files, size = files + 1, size + medium.bytes
                    self._queue(medium)
                self.results.append(pending)
            self._release(pending.media)
        self._taken(files, size, int(0 < bad == len(found)))

    def _taken(self, files: int, size: int, failed: int) -> None:
        """An item more is done with."""
        self.skipped += failed
        with self.room:
            self.items += 1
            self.room.notify_all()
        self.encoder.progress(1, files, size, failed)

    def _release(self, media: list[Medium]) -> None:
        """A document is done with; what no other one on its way needs, and was not encoded, is forgotten."""
        with self.room:
            self.room.notify_all()
            for medium in media:
                medium.users -= 1
                if not medium.users and not medium.queued:
                    self.held -= medium.nbytes
                    medium.content = None
                    self.media.pop(medium.key, None)

    def _queue(self, medium: Medium) -> None:
        medium.queued = True
        with self.room:
            self.held -= medium.nbytes
            self.room.notify_all()
        if isinstance(medium.content, Blob):
            self._encode_long(medium)
            return
        if isinstance(medium.content, np.ndarray):
            stride = self.unitok.require("image").stride
            h, w = medium.size
            medium.content = np.pad(medium.content, ((0, -h % stride), (0, -w % stride), (0, 0)), mode="edge")
            key: tuple = ("image", *medium.content.shape[:2])
            full = len(self.waiting[key]) + 1 >= BATCH
        else:
            key = ("audio", medium.content.shape[-1])
            full = (len(self.waiting[key]) + 1) * key[1] >= BATCH * self.unitok.require("audio").sample_rate
        self.waiting_bytes += medium.content.nbytes
        self.waiting[key].append(medium)
        if full:
            self._flush(key)
        while self.waiting_bytes > WAITING_BYTES:
            self._flush(max(self.waiting, key=lambda k: len(self.waiting[k]) * int(np.prod(k[1:]))))

    def _flush(self, key: tuple) -> None:
        batch = self.waiting.pop(key)
        self.waiting_bytes -= sum(m.content.nbytes for m in batch)
        if not self.encoder.overlap:
            self.quiet.clear()
        if key[0] == "image":
            pixels = torch.from_numpy(np.stack([m.content for m in batch])).permute(0, 3, 1, 2)
            codes = self.unitok.require("image").encode(pixels.contiguous().float().div_(127.5).sub_(1)).cpu()
        else:
            codes = self.unitok.require("audio").encode(torch.stack([m.content for m in batch])).cpu()
        for medium, one in zip(batch, codes, strict=True):
            medium.content, medium.codes = None, one
        self.quiet.set()

    def _encode_long(self, medium: Medium) -> None:
        blob: Blob = medium.content
        medium.content = None
        path: Path | None = None
        try:
            with blob.local() as path:
                data = None if path else blob.read()
                codes, medium.size = self.unitok.require("audio").encode_file(path or Path(blob.name), data=data)
            medium.codes = codes.cpu()
        except UserError as error:
            medium.error = str(error).replace(str(path), blob.name) if path else str(error)

    def finish(self) -> Encoded:
        """Encode what still waits; -> all documents."""
        for key in list(self.waiting):
            self._flush(key)
        done = Encoded(filtered=dict(sorted(self.filtered.items())), notes=dict(sorted(self.notes.items())))
        formats: Counter[str] = Counter()
        for result in self.results:
            if isinstance(result, dict):
                done.errors.append(result)
                continue
            try:
                segments = tuple(map(_segment, result.raw.content, result.parts))
                done.documents.append(Document(segments, result.raw.id, result.raw.where))
                formats.update(map(_format, result.raw.content, result.parts))
            except UserError as error:
                done.errors.append({"id": result.raw.id, "where": result.raw.where, "error": printable(str(error))})
                self.skipped += 1
        done.items, done.skipped = self.items, min(self.skipped, self.items)
        done.formats = dict(sorted(formats.items()))
        return done


def _named(raw: RawDocument, folder: Path | None) -> list[RawDocument]:
    """A document whose paths are files of this machine, with what reads them; sources relative to `folder`."""

    def opened(part: Part) -> Part:
        if part.path is None or part.file is not None:
            return part
        path = part.path.absolute()
        name = path.relative_to(folder.absolute()) if folder and path.is_relative_to(folder.absolute()) else part.path
        return replace(part, path=name, file=Blob(name.as_posix(), fetch=lambda: Files("/").read(str(path))))

    return [replace(raw, content=tuple(map(opened, raw.content)))]


def _segment(part: Part, found: np.ndarray | Medium) -> Segment:
    if isinstance(found, np.ndarray):
        return Segment("text", found, part.role, part.loss)
    if found.codes is None:
        raise UserError(found.error)
    source = part.path.as_posix() if part.path else ""
    source = f"{source}#{found.view}" if found.view else source
    return Segment(part.type, found.codes.numpy(), part.role, part.loss, source, found.size)


def _format(part: Part, found: np.ndarray | Medium) -> str:
    return f"{part.type} {found.format}" if isinstance(found, Medium) else part.type


def _filtered(pending: Pending) -> str:
    """The name of the filter that an image or audio of a document fails, or ""."""
    if why := next((m.rejected for m in pending.media if m.rejected), ""):
        return why
    filters = pending.spec.filters
    for part, found in zip(pending.raw.content, pending.parts, strict=True):
        if isinstance(found, Medium):
            name = filters.of_image(*found.shape) if part.type == "image" else filters.of_audio(found.seconds)
            if name:
                return name
    return ""
