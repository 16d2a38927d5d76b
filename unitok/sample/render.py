"""From prompts to outputs, and outputs to files: text, PNG, WAV, `outputs.jsonl` and one page to look at."""

import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from tqdm import tqdm

from unitok import pages
from unitok.document import ROLES, Document, Part, RawDocument, format_raw_document
from unitok.errors import UserError
from unitok.grammar import Grammar, parse_plan
from unitok.media.formats import HEAD, image_format
from unitok.modalities import modality_of
from unitok.pretrained import whole_folder
from unitok.sample.engine import Request, generate
from unitok.sample.prompts import ReadFile
from unitok.sample.sampling import Settings
from unitok.sample.score import log_probabilities
from unitok.vocab import Vocab

if TYPE_CHECKING:
    from torch import Tensor

    from unitok.bundle import Unitok


@dataclass
class Output:
    """One continuation.

    Args:
        prompt: the Document that it continues. new: what was generated. ids: the new ids.
        score: by which it was the best, where there were several to choose from.
    """

    unitok: "Unitok" = field(repr=False)
    prompt: Document
    new: Document
    ids: np.ndarray
    index: int = 0
    score: float | None = None

    @property
    def document(self) -> Document:
        """Prompt and continuation together."""
        return Document(self.prompt.segments + self.new.segments, f"{self.index:06d}")

    @cached_property
    def _decoded(self) -> dict[int, Any]:
        return {}

    def content(self, i: int) -> Any:
        """The i-th generated segment, decoded (once): str, picture or sound, as `Unitok.decode_segment` gives it."""
        if i not in self._decoded:
            self._decoded[i] = self.unitok.decode_segment(self.new.segments[i])
        return self._decoded[i]

    def _of(self, modality: str) -> list[Any]:
        return [self.content(i) for i, segment in enumerate(self.new.segments) if segment.modality == modality]

    @property
    def text(self) -> str:
        """All generated text."""
        return "".join(self._of("text"))

    @property
    def images(self) -> "list[Tensor]":
        """Generated pictures, float [3, H, W] in [-1, 1]."""
        return self._of("image")

    @property
    def audios(self) -> "list[Tensor]":
        """Generated sounds, float [C, T] in [-1, 1] at the audio tokenizer's rate."""
        return self._of("audio")

    def save(self, folder: str | Path) -> RawDocument:
        """Write the whole document's files into a folder, generated text as .txt.

        Files that the prompt gave as a Path are copied as they are; all else of it is decoded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.index:06d}"
        parts: list[Part] = []
        for i, segment in enumerate(self.prompt.segments):
            if isinstance(segment.source, ReadFile) and (suffix := _suffix(segment.source, segment.modality)):
                copy = folder / f"{name}-prompt-{i}.{suffix}"
                shutil.copyfile(segment.source, copy)
                parts.append(Part(segment.modality, path=copy, role=segment.role, loss=False))
            else:
                one = self.unitok.write_document(Document((segment,)), folder, f"{name}-prompt-{i}")
                parts += [Part(p.type, p.text, p.path, p.role, False) for p in one.content]
        parts += self.unitok.write_document(
            self.new, folder, name, [self.content(i) for i in range(len(self.new.segments))]
        ).content
        if self.text:
            (folder / f"{name}.txt").write_text(self.text, encoding="utf-8")
        return RawDocument(name, tuple(parts))


def _suffix(path: str, modality: str) -> str:
    """For the copy of a file, by what is in it, whatever its name: `png`, `wav`; "" where it cannot be opened any more."""
    try:
        if modality == "image":
            with open(path, "rb") as file:
                name = image_format(file.read(HEAD), path)
        else:
            name = soundfile.info(path).format
    except (OSError, soundfile.LibsndfileError):
        return ""
    return {"JPEG": "jpg", "WAVEX": "wav"}.get(name, re.sub(r"\W", "", name).lower())


def check_count(name: str, value: Any, least: int) -> None:
    """Raise `UserError` for what is no integer of at least that."""
    if not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name} is {value!r}: it must be an integer of at least {least}")


@dataclass
class Task:
    """What to make of each prompt.

    Args:
        want: `free`, or a plan such as `text,image:8x12,audio:2s` (rows x columns of codes), also as a list.
        n: outputs for each prompt. max_ids: most new ids of each. seed: the same gives the same outputs.
        settings: by modality; a missing one has the defaults.
        negative: what guidance leads away from; without it, from no prompt at all.
        keep: the prompt's last picture or sound is a beginning: this share of its rows or frames stays, and it is continued.
        best_of: so many are made for each output, and of all of a prompt's the n best kept. best_by: `likelihood`, the mean
            log-probability of its ids, or `relevance`, how much likelier the prompt makes them.
        jacobi: places of an image that are guessed and read at once; outputs are then made one by one. 0: one place.
    """

    want: str | Sequence[str] = "free"
    n: int = 1
    seed: int = 0
    max_ids: int = 512
    settings: dict[str, Settings] = field(default_factory=dict)
    negative: Document | None = None
    keep: float | None = None
    best_of: int = 1
    best_by: str = "likelihood"
    jacobi: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("best_of", 1), ("seed", 0), ("max_ids", 1), ("jacobi", 0)):
            check_count(name.replace("_", " "), getattr(self, name), least)
        if isinstance(self.want, list | tuple):
            self.want = ",".join(map(str, self.want))
        if not isinstance(self.want, str):
            raise UserError(f"want is a {type(self.want).__name__}: write free, or a plan such as text,image:8x12,audio:2s")
        if self.best_by not in ("likelihood", "relevance"):
            raise UserError(f"best by {self.best_by!r}: choose one of likelihood, relevance")
        if self.keep is not None and not (isinstance(self.keep, int | float) and 0 < self.keep <= 1):
            raise UserError(f"keep is {self.keep!r}: it is a share, above 0 and at most 1")


@dataclass
class Pending:
    """One output to be made: its request, and what turns the ids into it.

    Args:
        index: number of the output. prompt: what stands before it. lead: ids of the begun picture or sound that belong to it.
    """

    index: int
    unitok: "Unitok"
    request: Request
    prompt: Document
    lead: np.ndarray
    role: str

    def finish(self, ids: Sequence[int] | np.ndarray) -> Output:
        """New ids -> the output."""
        ids = np.asarray(ids, np.int64)
        new = self.unitok.vocab.decode(np.concatenate([self.lead, ids]), role=self.role)
        return Output(self.unitok, self.prompt, new, ids, self.index)


def begin(unitok: "Unitok", prompts: list[Document], task: Task) -> list[Pending]:
    """n outputs for each prompt, still to be made."""
    vocab = unitok.vocab
    plan = parse_plan(str(task.want), vocab, unitok.audio.frame_rate if unitok.audio else None)
    negative = None if task.negative is None else vocab.encode(task.negative, eos=False)
    pending: list[Pending] = []
    repeated: Counter[bytes] = Counter()
    for prompt in prompts:
        ids, lead = vocab.encode(prompt, eos=False), np.zeros(0, np.int64)
        before, role = prompt, prompt.segments[-1].role if prompt.segments else "none"
        if task.keep is not None:
            before, ids, lead = _begun(unitok, prompt, task.keep)
        media = vocab.encode(Document(tuple(s for s in before.segments if s.modality != "text")), eos=False)
        for _ in range(task.n):
            row = repeated[ids.tobytes()]  # so that a prompt's outputs do not depend on what else is asked
            repeated[ids.tobytes()] += 1
            request = Request(ids, plan, task.max_ids, task.seed, row, negative=negative, media=media)
            pending.append(Pending(len(pending), unitok, request, before, lead, role))
    return pending


def _begun(unitok: "Unitok", prompt: Document, share: float) -> tuple[Document, np.ndarray, np.ndarray]:
    """-> what stands before the last picture or sound, all ids up to where it goes on, and those of them that are its own."""
    last = prompt.segments[-1] if prompt.segments else None
    span = unitok.vocab.spans.get(last.modality) if last else None
    if last is None or span is None or not span.begin:
        raise UserError("keep: the prompt must end with a picture or a sound, which is then continued")
    units = last.codes.shape[0] if span.header else last.codes.shape[-1]
    unit = last.codes.size // units
    ids, placed = unitok.vocab.encode_placed(prompt, eos=False)
    head = 1 + len(span.header)
    start = placed[-1].start + placed[-1].length - head - last.codes.size - bool(span.end)  # a role's id may stand first
    stop = start + head + max(1, round(share * units)) * unit
    return Document(prompt.segments[:-1], prompt.id), ids[:stop], ids[start:stop]


def generate_outputs(
    unitok: "Unitok", prompts: list[Document], task: Task, batch_size: int = 64, progress: bool = False
) -> list[Output]:
    """`Unitok.generate` on documents."""
    check_count("batch size", batch_size, 1)
    decoder, grammar = unitok.need("model"), Grammar(unitok.vocab)
    pending = begin(unitok, prompts, replace(task, n=task.n * task.best_of))
    with tqdm(total=len(pending), desc="sample", unit="output", disable=not progress, mininterval=1.0, delay=0.3) as bar:
        together = 1 if task.jacobi else batch_size
        made = generate(
            *(decoder, grammar, [one.request for one in pending], task.settings, together, task.jacobi),
            progress=lambda ids, done: bar.update(done),
        )
    outputs = [one.finish(ids) for one, ids in zip(pending, made, strict=True)]
    return outputs if task.best_of == 1 else _best(unitok, grammar, pending, outputs, task)


def _best(unitok: "Unitok", grammar: Grammar, pending: list[Pending], outputs: list[Output], task: Task) -> list[Output]:
    """The n best of each prompt's outputs, the best first, numbered anew."""
    vocab, decoder = unitok.vocab, unitok.need("model")
    wholes, alone, counts = [], [], []
    for one, output in zip(pending, outputs, strict=True):
        ids = output.ids[: len(output.ids) - int(len(output.ids) > 0 and output.ids[-1] == vocab.eos)]
        role, body = _begins(vocab, one, np.concatenate([one.lead, ids]))
        wholes.append(np.concatenate([one.request.prompt, ids]))
        alone.append(vocab.unconditional(np.concatenate([role, body])))
        counts.append(len(body))
    likely = log_probabilities(decoder, grammar, wholes)
    without = log_probabilities(decoder, grammar, alone) if task.best_by == "relevance" else [np.zeros(len(a)) for a in alone]
    for output, count, given, none in zip(outputs, counts, likely, without, strict=True):
        gain = given[len(given) - count :].sum() - none[len(none) - count :].sum()
        output.score = float(gain) / count if count else -math.inf
    kept = []
    for start in range(0, len(outputs), task.n * task.best_of):
        group = sorted(outputs[start : start + task.n * task.best_of], key=lambda output: -(output.score or 0.0))
        kept += group[: task.n]
    return [replace(output, index=i) for i, output in enumerate(kept)]


@dataclass
class Score:
    """How likely a document is: for each segment its modality, ids (markers included) and log-probability in nats, given
    all that stands before it; `loss` says which of them count."""

    document: Document
    parts: list[dict[str, Any]]

    @property
    def log_probability(self) -> float:
        """Nats, of all segments that count."""
        return sum(part["log_probability"] for part in self.parts if part["loss"])

    @property
    def ids(self) -> int:
        """How many ids these have."""
        return sum(part["ids"] for part in self.parts if part["loss"])

    def row(self) -> dict[str, Any]:
        """Plain types, for a line of `scores.jsonl`."""
        bits = -self.log_probability / math.log(2) / max(1, self.ids)
        total = {"log_probability": self.log_probability, "ids": self.ids, "bits_an_id": bits}
        return {"id": self.document.id} | total | {"parts": self.parts}


def score_documents(unitok: "Unitok", documents: list[Document]) -> list[Score]:
    """Log-probabilities of documents, without their ends. Errors: `UserError` for one longer than the decoder takes."""
    encoded = [unitok.vocab.encode_placed(document, eos=False) for document in documents]
    found = log_probabilities(unitok.need("model"), Grammar(unitok.vocab), [ids for ids, _ in encoded])
    scores = []
    for document, (_, placed), nats in zip(documents, encoded, found, strict=True):
        parts = [
            {
                "type": p.modality,
                "loss": p.loss,
                "ids": p.length,
                "log_probability": float(nats[p.start - 1 : p.start - 1 + p.length].sum()),
            }
            for p in placed
        ]
        scores.append(Score(document, parts))
    return scores


def _begins(vocab: Vocab, one: Pending, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An output's ids -> the id of the role that holds where its first span begins (none has no id), and the ids from there on."""
    start = next((i for i, id in enumerate(ids.tolist()) if id not in vocab.roles), len(ids))
    name = ROLES[vocab.roles.index(int(ids[start - 1]))] if start else one.role
    return np.array([] if name == "none" else [vocab.specials[f"<{name}>"]], np.int64), ids[start:]


def save_outputs(outputs: list[Output], folder: Path, title: str = "unitok sample", overwrite: bool = False) -> None:
    """Write all outputs into a folder: their files, `outputs.jsonl` (a line is the whole document) and `index.html`.

    Earlier outputs in it go, other files stay. Errors: `UserError` where something else lies there, unless `overwrite` is set.
    """
    with whole_folder(folder, "sample output", overwrite) as new:
        raws = [output.save(new) for output in outputs]
        lead, articles = "Gray: given. Blue: generated.", [_article(raw) for raw in raws]
        pages.write_page(new / "index.html", "articles.html", title=title, lead=lead, articles=articles)
        lines = "".join(format_raw_document(raw, new) + "\n" for raw in raws)
        (new / "outputs.jsonl").write_text(lines, encoding="utf-8")


def _article(raw: RawDocument) -> pages.Article:
    figures = []
    for part in raw.content:
        modality = modality_of(part.type)
        element = modality.html(None, part.text) if part.path is None else modality.html_of_file(part.path)
        figures.append(pages.Figure(element, kind="new" if part.loss else "given"))
    return pages.Article(figures)


def settings_from(options: dict[str, Any]) -> dict[str, Settings]:
    """Flags -> settings: `temperature` holds for all modalities, `image_temperature` for one; errors name the flag."""
    names = [f.name for f in fields(Settings)]
    common = {name: options[name] for name in names if options.get(name) is not None}
    Settings(**common)
    out = {}
    for modality in ("text", "image", "audio"):
        own = {name: value for name in names if (value := options.get(f"{modality}_{name}")) is not None}
        try:
            out[modality] = Settings(**common | own)
        except UserError as error:
            raise UserError(str(error).replace("--", f"--{modality}-", 1)) from None
    return out
