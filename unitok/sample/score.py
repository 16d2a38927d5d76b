"""How likely documents are: log-probabilities of their ids, over what the grammar allows at each place."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.model.decoder import Decoder

CHUNK = 1024  # positions whose logits exist at once


@torch.inference_mode()
def log_probabilities(
    decoder: Decoder, grammar: Grammar, documents: list[np.ndarray], batch_ids: int = 8192
) -> list[np.ndarray]:
    """Documents' ids, bos first -> for each float64 [L - 1], nats: of every id but bos, given all before it.

    The softmax is over the ids that may stand there, so an id without a choice has 0. batch_ids: padding included, how
    many go through the model together. Errors: `UserError` for one that is malformed or longer than the decoder takes.
    """
    most = decoder.config.max_position_embeddings
    for i, ids in enumerate(documents):
        if len(ids) > most:
            raise UserError(f"document {i + 1} has {len(ids)} ids, the decoder takes {most}")
        grammar.follow(ids, complete=False)
    kinds = [grammar.targets(ids) for ids in documents]
    found: list[np.ndarray] = [np.zeros(0)] * len(documents)
    for batch in _batches([len(ids) for ids in documents], batch_ids):
        length = max(len(documents[i]) for i in batch)
        padded = torch.full((len(batch), length), grammar.vocab.pad)
        places = torch.zeros_like(padded)
        for row, i in enumerate(batch):
            padded[row, : len(documents[i])] = torch.from_numpy(documents[i])
            places[row, : len(documents[i])] = torch.from_numpy(grammar.places(documents[i]))
        hidden = decoder.hidden(padded.to(decoder.device), places=places.to(decoder.device))
        for row, i in enumerate(batch):
            targets = torch.from_numpy(documents[i][1:]).to(decoder.device)
            found[i] = _of_targets(decoder, grammar, hidden[row, : len(targets)], targets, kinds[i])
    return found


def _of_targets(decoder: Decoder, grammar: Grammar, hidden: Tensor, targets: Tensor, kinds: np.ndarray) -> np.ndarray:
    """hidden [L - 1, C], targets [L - 1] and the kinds of their legal sets -> [L - 1]."""
    out = torch.zeros(len(targets), dtype=torch.float64, device=hidden.device)
    for kind in np.unique(kinds):
        ids = torch.cat([torch.arange(a, b) for a, b in grammar.kinds[kind]]).to(hidden.device)
        if len(ids) == 1:
            continue
        head = decoder.lm_head.weight[ids]
        where = torch.from_numpy(np.flatnonzero(kinds == kind)).to(hidden.device)
        for some in where.split(CHUNK):
            logits = (hidden[some] @ head.T).double().log_softmax(-1)
            out[some] = logits.gather(-1, torch.searchsorted(ids, targets[some])[:, None])[:, 0]
    return out.cpu().numpy()


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
