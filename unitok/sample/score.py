"""How likely documents are: log-probabilities of their tokens, among those that the grammar allows at each position."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from unitok import pages
from unitok.bundle import Bundle
from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.model.decoder import Decoder
from unitok.model.loss import next_id_loss


@torch.inference_mode()
def log_probabilities(
    decoder: Decoder, grammar: Grammar, documents: list[np.ndarray], batch_ids: int = 8192
) -> list[np.ndarray]:
    """Return log-probabilities in nats, float64 [L - 1], for the ids [L] of each document: of every id after bos, given all before it.

    A token without an alternative has 0. batch_ids: tokens that go through the model together, padding included. Errors: `UserError`
    for a document that is malformed or longer than the decoder takes.
    """
    longest = decoder.config.max_position_embeddings
    for i, ids in enumerate(documents):
        if len(ids) > longest:
            raise UserError(f"document {i + 1} has {len(ids)} tokens, the decoder takes {longest}")
        grammar.follow(ids, complete=False)
    results: list[np.ndarray] = [np.zeros(0)] * len(documents)
    for batch in _batches([len(ids) for ids in documents], batch_ids):
        chosen = [documents[i] for i in batch]
        padded = _padded(chosen, decoder.device, grammar.vocab.pad)
        positions = _padded([grammar.span_positions(ids) for ids in chosen], decoder.device)
        hidden = decoder.hidden(padded, span_positions=positions)[:, :-1]
        targets = {
            "targets": padded[:, 1:],
            "mask_index": _padded([grammar.targets(ids) for ids in chosen], decoder.device),
            "weights": _padded([np.ones(len(ids) - 1, np.float32) for ids in chosen], decoder.device),
        }
        loss = next_id_loss(hidden, decoder.lm_head.weight, targets, grammar.allowed_sets)
        nats = torch.zeros(padded[:, 1:].shape, dtype=torch.float64)
        nats.view(-1)[loss.index.cpu()] = -loss.nll.double().cpu()
        for row, i in zip(nats, batch, strict=True):
            results[i] = row[: len(documents[i]) - 1].numpy()
    return results


def _padded(rows: list[np.ndarray], device: torch.device, value: int = 0) -> torch.Tensor:
    """Rows [L] of several lengths -> [B, longest], padded on the right."""
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value).to(device)


def _batches(lengths: list[int], batch_ids: int) -> Iterator[list[int]]:
    """Yield indices of documents of similar lengths, so that there is little padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > batch_ids:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass(frozen=True)
class SegmentScore:
    """How likely one segment is, given all before it. tokens: how many it has, markers included. log_probability: in nats.
    loss: whether it counts in the document's score."""

    type: str  # name of its tokenizer
    loss: bool
    tokens: int
    log_probability: float


@dataclass(frozen=True)
class Score:
    """How likely a document is, segment by segment. Segments with `loss=False` are given: they do not count."""

    bundle: Bundle = field(repr=False)
    document: Document
    parts: list[SegmentScore]

    @property
    def log_probability(self) -> float:
        """Log-probability of all segments that count, in nats."""
        return sum(part.log_probability for part in self.parts if part.loss)

    @property
    def tokens(self) -> int:
        """Number of tokens of these segments."""
        return sum(part.tokens for part in self.parts if part.loss)

    @property
    def bits_per_token(self) -> float:
        """Negative log-probability in bits, per token."""
        return -self.log_probability / math.log(2) / max(1, self.tokens)

    def row(self) -> dict[str, object]:
        """Return plain types, for a line of `scores.jsonl`."""
        total = {"log_probability": self.log_probability, "tokens": self.tokens, "bits_per_token": self.bits_per_token}
        return {"id": self.document.id, **total, "parts": [vars(part) for part in self.parts]}

    def __repr__(self) -> str:
        name = f" {self.document.id!r}" if self.document.id else ""
        kinds = ", ".join(part.type for part in self.parts)
        numbers = f"{self.log_probability:.2f} nats, {self.tokens} tokens, {self.bits_per_token:.3f} bits per token"
        return f"<Score{name}: {numbers} ({kinds})>"

    def _repr_html_(self) -> str:
        """Show each segment with its score in a notebook; those that do not count are gray."""
        segments = self.bundle.vocab.merged(self.document).segments
        return pages.fragment([_figure(self.bundle, s, part) for s, part in zip(segments, self.parts, strict=True)])


def _figure(bundle: Bundle, segment: Segment, part: SegmentScore) -> pages.Figure:
    content = bundle.modality(segment.modality).html(bundle.require(segment.modality), bundle.decode(segment))
    caption = f"{part.log_probability:.2f} nats, {part.tokens} tokens"
    return pages.Figure(content, caption, "new" if part.loss else "given")


def score_documents(bundle: Bundle, documents: list[Document]) -> list[Score]:
    """Score documents, without the eos at their ends. Errors: `UserError` for one longer than the decoder takes."""
    encoded = [bundle.vocab.encode_placed(document, eos=False) for document in documents]
    results = log_probabilities(bundle.require("model"), Grammar(bundle.vocab), [ids for ids, _ in encoded])
    scores = []
    for document, (_, spans), nats in zip(documents, encoded, results, strict=True):
        sums = [float(nats[span.start - 1 : span.start - 1 + span.length].sum()) for span in spans]
        parts = [SegmentScore(s.modality, s.loss, s.length, total) for s, total in zip(spans, sums, strict=True)]
        scores.append(Score(bundle, document, parts))
    return scores
