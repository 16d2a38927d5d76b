"""Packing: documents into rows of a fixed length, and rows into batches.

The order is a pure function of (seed, epoch): the documents of an epoch are shuffled, packed best-fit in groups, and the
rows shuffled again; so any process can make any batch, and a position in the data is a count of rows. A document longer
than a row is cut at the row's length.

A batch holds, for every position: the id, the target (the next id), its position in its document, its place in its image
or sound, the document's number in the row, the target's loss weight, and the target's kind (an index into the grammar's legal sets).
"""

from bisect import bisect_left, insort

import numpy as np
import torch

from unitok.data.shards import TokenDataset
from unitok.grammar import Grammar

GROUP = 2048  # documents that are packed together: enough for tight rows, few enough to keep the shuffle


def pack(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Indices of documents, packed into rows of at most `row_length` ids (best fit, longest first)."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free ids, row), sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        need = min(int(lengths[index]), row_length)
        at = bisect_left(room, (need, -1))
        if at == len(room):
            rows.append([index])
            free, row = row_length - need, len(rows) - 1
        else:
            free, row = room.pop(at)
            rows[row].append(index)
            free -= need
        if free > 0:
            insort(room, (free, row))
    return rows


def epoch_rows(lengths: np.ndarray, row_length: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of an epoch in order, each an array of document indices: a pure function of its arguments."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    rows = []
    for start in range(0, len(order), GROUP):
        group = order[start : start + GROUP]
        rows += [group[row] for row in pack(lengths[group], row_length)]
    return [rows[i] for i in rng.permutation(len(rows))]


class PackedDataset(torch.utils.data.Dataset):
    """Rows of packed documents by (epoch, index).

    Args:
        dataset: the documents.
        row_length: ids a row, T.
        seed: of the order and of condition dropping.
        drop_condition: share of documents that are replaced by their unconditional form, bos and one trained span.
        weights: by modality, factors on the loss.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        row_length: int,
        seed: int = 0,
        drop_condition: float = 0.1,
        weights: dict[str, float] | None = None,
    ):
        self.dataset, self.vocab, self.row_length = dataset, dataset.vocab, row_length
        self.grammar = Grammar(dataset.vocab)
        self.seed, self.drop_condition, self.weights = seed, drop_condition, weights or {}
        self.lengths = dataset.lengths()
        self._epoch = -1
        self._rows: list[np.ndarray] = []

    def rows(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch, kept for the last one asked for."""
        if epoch != self._epoch:
            self._rows, self._epoch = epoch_rows(self.lengths, self.row_length, self.seed, epoch), epoch
        return self._rows

    def document(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [L] and the loss weight of each id [L], the condition dropped for some by chance of (seed, epoch, index)."""
        ids = self.dataset.ids(index)
        placed = self.dataset.placed(index)
        weights = np.zeros(len(ids), np.float32)
        for p in placed:
            weights[p.start : p.start + p.length] = p.loss * self.weights.get(p.modality, 1.0)
        weights[-1] = placed[-1].loss  # eos
        rng = np.random.default_rng((self.seed, epoch, index))
        if rng.random() < self.drop_condition:
            trained = [p for p in placed if p.loss]
            if trained:
                p = trained[int(rng.integers(len(trained)))]
                said = int(ids[p.start] in self.vocab.roles)  # a change of role belongs to the condition
                span = slice(p.start + said, p.start + p.length)
                ids = np.append(self.vocab.unconditional(ids[span]), self.vocab.eos)
                weights = np.concatenate([[0], weights[span], [0]]).astype(np.float32)
        return ids, weights

    def row(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """One row of a batch; what is over is padding: document number -1, weight 0."""
        t = self.row_length
        out: dict[str, np.ndarray] = {
            "ids": np.full(t, self.vocab.pad, np.int64),
            "targets": np.full(t, self.vocab.pad, np.int64),
            "positions": np.zeros(t, np.int64),
            "places": np.zeros(t, np.int64),
            "documents": np.full(t, -1, np.int64),
            "weights": np.zeros(t, np.float32),
            "kinds": np.zeros(t, np.int64),
        }
        at = 0
        for number, document in enumerate(self.rows(epoch)[index].tolist()):
            ids, weights = self.document(document, epoch)
            ids, weights = ids[: t - at], weights[: t - at]
            n = len(ids)
            out["ids"][at : at + n] = ids
            out["positions"][at : at + n] = np.arange(n)
            out["places"][at : at + n] = self.grammar.places(ids)
            out["documents"][at : at + n] = number
            out["targets"][at : at + n - 1] = ids[1:]
            out["weights"][at : at + n - 1] = weights[1:]
            out["kinds"][at : at + n - 1] = self.grammar.targets(ids)
            at += n
        return out

    def order(self, epoch: int) -> range:
        """The rows of an epoch stand in their order already."""
        return range(len(self.rows(epoch)))

    def __len__(self) -> int:
        """Rows of the first epoch; other epochs may have a few more or less."""
        return len(self.rows(0))

    def __getitem__(self, place: tuple[int, int]) -> dict[str, np.ndarray]:
        return self.row(*place)
