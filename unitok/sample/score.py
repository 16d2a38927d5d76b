"""How likely documents are: log-probabilities of their ids, over what the grammar allows at each place."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from unitok.bundle import Bundle
from unitok.document import Document
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.model.decoder import Decoder
from unitok.model.loss import next_id_loss


@torch.inference_mode()
def log_probabilities(
    decoder: Decoder, grammar: Grammar, documents: list[np.ndarray], batch_ids: int = 8192
) -> list[np.ndarray]:
    """Documents' ids, bos first -> for each float64 [L - 1], nats: of every id but bos, given all before it. An id without a
    choice has 0. batch_ids: how many go through the model together, padding included. Errors: `UserError` for a document that is
    malformed or longer than the decoder takes."""
    most = decoder.config.max_position_embeddings
    for i, ids in enumerate(documents):
        if len(ids) > most:
            raise UserError(f"document {i + 1} has {len(ids)} ids, the decoder takes {most}")
        grammar.follow(ids, complete=False)
    found: list[np.ndarray] = [np.zeros(0)] * len(documents)
    for batch in _batches([len(ids) for ids in documents], batch_ids):
        chosen = [documents[i] for i in batch]
        padded = _padded(chosen, decoder.device, grammar.vocab.pad)
        hidden = decoder.hidden(
            padded, span_positions=_padded([grammar.span_positions(ids) for ids in chosen], decoder.device)
        )[:, :-1]
        targets = {
            "targets": padded[:, 1:],
            "mask_index": _padded([grammar.targets(ids) for ids in chosen], decoder.device),
            "weights": _padded([np.ones(len(ids) - 1, np.float32) for ids in chosen], decoder.device),
        }
        loss = next_id_loss(hidden, decoder.lm_head.weight, targets, grammar.allowed_sets)
        nats = torch.zeros(padded[:, 1:].shape, dtype=torch.float64)
        nats.view(-1)[loss.index.cpu()] = -loss.nll.double().cpu()
        for row, i in zip(nats, batch, strict=True):
            found[i] = row[: len(documents[i]) - 1].numpy()
    return found


def _padded(rows: list[np.ndarray], device: torch.device, value: int = 0) -> torch.Tensor:
    """Rows [L] of several lengths -> [B, longest], filled up on the right."""
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value).to(device)


def _batches(lengths: list[int], batch_ids: int) -> Iterator[list[int]]:
    """Indices of documents of like lengths, so that little is padded."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > batch_ids:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass
class Score:
    """How likely a document is: for each segment its modality, ids (markers included) and log-probability in nats, given
    all before it; `loss` says which count."""

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
        total = {"log_probability": self.log_probability, "ids": self.ids, "bits_per_token": bits}
        return {"id": self.document.id} | total | {"parts": self.parts}


def score_documents(bundle: Bundle, documents: list[Document]) -> list[Score]:
    """Log-probabilities of documents, without their ends. Errors: `UserError` for one longer than the decoder takes."""
    encoded = [bundle.vocab.encode_placed(document, eos=False) for document in documents]
    found = log_probabilities(bundle.require("model"), Grammar(bundle.vocab), [ids for ids, _ in encoded])
    scores = []
    for document, (_, placed), nats in zip(documents, encoded, found, strict=True):
        sums = [float(nats[p.start - 1 : p.start - 1 + p.length].sum()) for p in placed]
        parts = [
            {"type": p.modality, "loss": p.loss, "ids": p.length, "log_probability": total}
            for p, total in zip(placed, sums, strict=True)
        ]
        scores.append(Score(document, parts))
    return scores
