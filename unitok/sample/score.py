"""How likely documents are: log-probabilities of their ids, over what the grammar allows at each place."""

from collections.abc import Iterator

import numpy as np
import torch

from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.model.decoder import Decoder
from unitok.model.loss import next_id_loss


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
    found: list[np.ndarray] = [np.zeros(0)] * len(documents)
    for batch in _batches([len(ids) for ids in documents], batch_ids):
        length = max(len(documents[i]) for i in batch)
        padded = torch.full((len(batch), length), grammar.vocab.pad)
        places, kinds = torch.zeros_like(padded), torch.zeros_like(padded)[:, 1:]
        counts = torch.zeros(len(batch), length - 1)
        for row, i in enumerate(batch):
            ids = documents[i]
            padded[row, : len(ids)] = torch.from_numpy(ids)
            places[row, : len(ids)] = torch.from_numpy(grammar.places(ids))
            kinds[row, : len(ids) - 1] = torch.from_numpy(grammar.targets(ids))
            counts[row, : len(ids) - 1] = 1
        device = decoder.device
        hidden = decoder.hidden(padded.to(device), places=places.to(device))[:, :-1]
        targets = {"targets": padded[:, 1:].to(device), "kinds": kinds.to(device), "weights": counts.to(device)}
        loss = next_id_loss(hidden, decoder.lm_head.weight, targets, grammar.kinds)
        nats = torch.zeros(counts.numel(), dtype=torch.float64)
        nats[loss.index.cpu()] = -loss.nll.double().cpu()
        for row, i in enumerate(batch):
            found[i] = nats.view(counts.shape)[row, : len(documents[i]) - 1].numpy()
    return found


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
