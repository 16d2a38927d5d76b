"""`unitok eval documents`: how well a decoder predicts, writes and matches documents of your own.

A *direction* names what comes before a segment, and the segment: `text>image` is an image after text, `image+text>audio` is
audio after an image and text in any order; the first segment has its own name alone. Neighboring texts of equal role count as
one segment. Segments whose `loss` is false are read, but not scored. There are three measures, each per direction:

- **Bits per token** under the grammar (`unitok.sample.score`): -log2 of the probability of each token among those allowed at
  its position, markers such as `<image>` included, the end of the document not; for text also bits per character.
- **Texts**: if a document ends with text after something else, the decoder writes that text itself, by default greedily. Exact
  match, character error rate (CER) and word error rate (WER) against the text of the document: edit distance divided by the
  length of the reference, over all texts together (torchmetrics). Space around a text is ignored; case and punctuation count.
- **Retrieval by likelihood**: see `unitok.evaluate.retrieval`.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from torchmetrics.functional.text import char_error_rate, word_error_rate
from tqdm import tqdm

from unitok import pages
from unitok.api import Unitok
from unitok.data.shards import TokenDataset
from unitok.document import Document, RawDocument, Segment
from unitok.errors import UserError
from unitok.evaluate.directions import by_direction, direction_of
from unitok.evaluate.retrieval import DirectionRetrieval, measure_retrieval
from unitok.files import whole_folder, write_json, write_json_lines
from unitok.generation_config import SamplingParams
from unitok.grammar import Grammar
from unitok.plan import PlanItem
from unitok.sample.engine import generate
from unitok.sample.prompts import read_prompts
from unitok.sample.running import Request
from unitok.sample.score import score_documents
from unitok.storage import printable

log = logging.getLogger("unitok")

KIND = "document evaluation"  # kind of folder in `unitok.files`
GREEDY = SamplingParams(temperature=0.0)
RATES = (char_error_rate, word_error_rate)
BATCH_SIZE = 64  # texts that are written at once
SHOWN = 40  # documents on the page


@dataclass(frozen=True)
class SegmentBits:
    """One scored segment of a document. tokens: with markers. characters: length of a text; 0 for other content."""

    direction: str
    tokens: int
    bits: float
    characters: int = 0


@dataclass(frozen=True)
class WrittenText:
    """A text that the decoder wrote in place of the last segment of a document, and its errors. Rates are fractions, which may
    exceed 1."""

    direction: str
    reference: str
    generated: str
    character_error_rate: float
    word_error_rate: float

    @classmethod
    def compare(cls, direction: str, reference: str, generated: str) -> "WrittenText":
        """Compute the error rates of a generated text against a reference, which must not be empty."""
        return cls(direction, reference, generated, *(float(rate(generated, reference)) for rate in RATES))


@dataclass
class DocumentResult:
    """Scores of one document. text: None if the decoder wrote no text for it."""

    document: Document
    segments: list[SegmentBits]
    text: WrittenText | None = None

    @property
    def bits_per_token(self) -> float:
        """Bits per token of all scored segments together; 0 without any."""
        return sum(s.bits for s in self.segments) / max(1, sum(s.tokens for s in self.segments))

    def row(self) -> dict[str, object]:
        """Return plain types, for a line of `scores.jsonl`."""
        row = {"id": self.document.id, "bits_per_token": self.bits_per_token, "segments": [asdict(s) for s in self.segments]}
        return row if self.text is None else row | {"written": asdict(self.text)}


@dataclass(frozen=True)
class DirectionBits:
    """Scores of all segments of a direction. bits_per_character: None if the content is not text."""

    direction: str
    segments: int
    tokens: int
    bits_per_token: float
    bits_per_character: float | None

    @classmethod
    def of(cls, direction: str, segments: list[SegmentBits]) -> "DirectionBits":
        """Sum up segments, which are at least one."""
        bits, tokens, characters = (sum(getattr(s, name) for s in segments) for name in ("bits", "tokens", "characters"))
        return cls(direction, len(segments), tokens, bits / tokens, bits / characters if characters else None)


@dataclass(frozen=True)
class DirectionTexts:
    """Errors of all texts of a direction, as fractions; rates may exceed 1."""

    direction: str
    documents: int
    exact_match: float
    character_error_rate: float
    word_error_rate: float

    @classmethod
    def of(cls, direction: str, texts: list[WrittenText]) -> "DirectionTexts":
        """Sum up texts, which are at least one."""
        exact = float(np.mean([text.generated == text.reference for text in texts]))
        generated, references = [text.generated for text in texts], [text.reference for text in texts]
        return cls(direction, len(texts), exact, *(float(rate(generated, references)) for rate in RATES))


@dataclass
class DocumentScores:
    """Result of `evaluate_documents`. skipped: number of documents that are too long for the decoder. results: one per
    document, in order."""

    skipped: int
    bits: list[DirectionBits] = field(default_factory=list)
    texts: list[DirectionTexts] = field(default_factory=list)
    retrieval: list[DirectionRetrieval] = field(default_factory=list)
    results: list[DocumentResult] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """Return plain types, for `scores.json`: all but `results`, without the measures that no document has."""
        tables = {
            "bits": [asdict(row) for row in self.bits],
            "texts": [asdict(row) for row in self.texts],
            "retrieval": [asdict(row) for row in self.retrieval],
        }
        bits, tokens = (sum(getattr(s, name) for r in self.results for s in r.segments) for name in ("bits", "tokens"))
        totals = {"documents": len(self.results), "skipped": self.skipped, "bits_per_token": bits / max(1, tokens)}
        return {**totals, **{name: rows for name, rows in tables.items() if rows}}


def evaluate_documents(
    bundle: Unitok,
    documents: Sequence[Document],
    candidates: int = 16,
    max_new_tokens: int = 256,
    sampling: SamplingParams = GREEDY,
    seed: int = 0,
    progress: bool = False,
) -> DocumentScores:
    """Measure the decoder of a bundle on documents.

    Args:
        candidates: documents per group of the retrieval; 0: no retrieval.
        max_new_tokens: most tokens of a text that the decoder writes; 0: no texts.
        sampling: of these texts; greedy by default.
        seed: of sampling, and of the groups.

    Errors: `UserError` if the bundle has no decoder, or if all documents are too long for it.
    """
    vocab, longest = bundle.vocab, bundle.require("model").config.max_position_embeddings
    if candidates == 1 or candidates < 0:
        raise UserError(f"candidates {candidates}: at least 2, or 0 for no retrieval")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens}: at least 1, or 0 to write no texts")
    merged = [vocab.merged(document) for document in documents]
    fitting = [document for document in merged if len(vocab.encode(document)) <= longest]
    if not fitting:
        raise UserError(f"none of {len(documents)} documents has at most {longest} tokens, which the decoder takes")
    scores = DocumentScores(len(documents) - len(fitting))
    for score in score_documents(bundle, fitting):
        nats = [part.log_probability for part in score.parts]
        scores.results.append(DocumentResult(score.document, list(_segment_bits(bundle, score.document, nats))))
    if max_new_tokens:
        _write_texts(bundle, scores.results, max_new_tokens, sampling, seed, progress)
    scores.bits = [DirectionBits.of(*group) for group in by_direction(s for r in scores.results for s in r.segments)]
    scores.texts = [DirectionTexts.of(*group) for group in by_direction(r.text for r in scores.results if r.text)]
    if candidates:
        scores.retrieval = measure_retrieval(bundle, fitting, candidates, seed, progress)
    return scores


def _segment_bits(bundle: Unitok, document: Document, nats: Sequence[float]) -> Iterator[SegmentBits]:
    """Yield the scored segments of a merged document. nats: log-probability of each segment."""
    _, spans = bundle.vocab.encode_placed(document)
    for i, (segment, span, log_probability) in enumerate(zip(document.segments, spans, nats, strict=True)):
        if segment.loss:
            direction, characters = direction_of(document.segments[:i], segment), len(_text(bundle, segment) or "")
            yield SegmentBits(direction, span.length, -log_probability / math.log(2), characters)


def _text(bundle: Unitok, segment: Segment) -> str | None:
    """Return the text of a segment; None if its content is not text."""
    content = bundle.decode(segment) if bundle.modality(segment.modality).inline else None
    return content if isinstance(content, str) else None


# ---- Texts -----------------------------------------------------------------------------------------------------------


def _write_texts(
    bundle: Unitok, results: list[DocumentResult], max_new_tokens: int, sampling: SamplingParams, seed: int, progress: bool
) -> None:
    """Let the decoder write the last segment of each document that ends with text after something else."""
    requests: list[Request] = []
    pending: list[DocumentResult] = []
    for result in results:
        document, last = result.document, result.document.segments[-1]
        if len(document.segments) > 1 and last.loss and (_text(bundle, last) or "").strip():
            ids, spans = bundle.vocab.encode_placed(document, eos=False)
            prompt = ids[: -len(last.codes)]  # includes the token of the text's role, if the role changes
            assert spans[-1].start <= len(prompt) <= spans[-1].start + 1
            requests.append(Request(prompt, [PlanItem(last.modality)], max_new_tokens, seed, len(requests)))
            pending.append(result)
    by_tokenizer = dict.fromkeys(bundle.vocab.spans, sampling)
    with tqdm(total=len(requests), desc="write texts", unit="text", disable=not progress) as bar:
        written = generate(
            *(bundle.inference, Grammar(bundle.vocab), requests, by_tokenizer, BATCH_SIZE),
            progress=lambda tokens, done: bar.update(done),
        )
    for result, ids in zip(pending, written, strict=True):
        *before, last = result.document.segments
        generated = "".join(_text(bundle, segment) or "" for segment in bundle.vocab.decode(ids).segments).strip()
        reference = (_text(bundle, last) or "").strip()
        result.text = WrittenText.compare(direction_of(before, last), reference, generated)


# ---- Files -----------------------------------------------------------------------------------------------------------


def write_scores(scores: DocumentScores, bundle: Unitok, out: Path) -> None:
    """Write `scores.json`, `scores.jsonl` (a line per document) and `index.html`, with the documents of most bits per token
    first. Everything in `out` is replaced."""
    worst = sorted(scores.results, key=lambda result: -result.bits_per_token)
    with whole_folder(out, KIND, overwrite=True) as new:
        write_json_lines(new / "scores.jsonl", [result.row() for result in worst])
        pages.write_page(
            new / "index.html",
            "evaluation.html",
            title="Documents",
            scores=scores.summary(),
            heading="Documents, the worst first",
            articles=[_article(bundle, result) for result in worst[:SHOWN]],
        )
        write_json(new / "scores.json", scores.summary())


def _article(bundle: Unitok, result: DocumentResult) -> pages.Article:
    """Show the segments of a document with their bits, and the text that the decoder wrote."""
    figures, scored = [], iter(result.segments)
    for segment in result.document.segments:
        modality, tokenizer = bundle.modality(segment.modality), bundle.require(segment.modality)
        bits = next(scored) if segment.loss else None
        caption = f"{bits.direction}: {bits.bits / bits.tokens:.2f} bits per token" if bits else f"{segment.modality}: given"
        figures.append(pages.Figure(modality.html(tokenizer, bundle.decode(segment)), caption, "" if bits else "given"))
    if text := result.text:
        rates = f"written: CER {text.character_error_rate:.2f}, WER {text.word_error_rate:.2f}"
        figures.append(pages.Figure(pages.text(text.generated), rates, "new"))
    title = printable(result.document.id) or "document"
    return pages.Article(figures, f"{title}: {result.bits_per_token:.2f} bits per token")


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_documents(bundle: Unitok, data: str, count: int = 0, seed: int = 0, split: str = "", root: str = "") -> list[Document]:
    """Read documents for an evaluation.

    Args:
        data: a tokenized data set (a folder, or a URL that fsspec opens), an interleaved JSON Lines file, or a folder with a
            `documents.jsonl`. The bundle encodes the files that JSON Lines name.
        count: number of documents, drawn at random by `seed`; 0: all.
        split: of a data set; "": validation if it has one, else test; without either all, and a warning.
        root: folder that paths in JSON Lines must not leave; "": the file's own.

    Errors: `UserError` for data that cannot be read, that a `root` or `split` does not suit, or that was made with another vocabulary.
    """
    if count < 0:
        raise UserError(f"count {count}: at least 0 (all documents)")
    path = Path(data)
    if "://" in data or (path / "dataset.json").exists():
        if root:
            raise UserError(f"root {root}: {data} is a tokenized data set, which names no files; leave it out")
        dataset = TokenDataset(data if "://" in data else path)
        if chosen := split or next(filter(dataset.has, ("validation", "test")), ""):
            dataset = TokenDataset(data if "://" in data else path, chosen)
        else:
            log.warning(
                "%s: it has no split validation or test: documents that the decoder was trained on may be among them", data
            )
        bundle.vocab.check_covers(dataset.vocab, "the bundle", data)
        return [dataset.document(i) for i in _drawn(len(dataset), count, seed)]
    if split:
        raise UserError(f"split {split!r}: {data} is no tokenized data set; leave it out")
    return [bundle.read_raw(raw) for raw in read_raw_documents(bundle, path, count, seed, root)]


def read_raw_documents(bundle: Unitok, path: Path, count: int = 0, seed: int = 0, root: str = "") -> list[RawDocument]:
    """Read the documents of an interleaved JSON Lines file, or of a folder with a `documents.jsonl`. Arguments and errors as for `read_documents`."""
    if count < 0:
        raise UserError(f"count {count}: at least 0 (all documents)")
    file = path / "documents.jsonl" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not file.is_file():
        raise UserError(f"{path}: neither a tokenized data set (dataset.json) nor interleaved JSON Lines (documents.jsonl)")
    raws = read_prompts(file, root, bundle.types)
    return [raws[i] for i in _drawn(len(raws), count, seed)]


def _drawn(total: int, count: int, seed: int) -> list[int]:
    """Return `count` of the indices below `total`, in order, drawn by a seed; 0: all."""
    drawn = np.random.default_rng(seed).permutation(total)[: count or None]
    return sorted(int(i) for i in drawn)
