"""Packing: documents into rows of a fixed length, from one data set or a mixture of several.

The order is a pure function of (seed, epoch): the documents of an epoch are shuffled, some by chance lose their condition, what is
left is packed best-fit in groups, and the rows are shuffled again; so any process can make any batch. Rows of at least eight
documents waste less than 1 %; long rows cost no more attention, because documents do not see one another. An epoch of a mixture
holds as many ids as its data sets together, shared out by weight, each drawn in an endless order in which every document comes once
before any comes twice.
"""

import hashlib
import logging
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from unitok.data.shards import TokenDataset
from unitok.errors import UserError, first_line
from unitok.grammar import Grammar
from unitok.vocab import SegmentSpan, Vocab

GROUP = 2048  # documents that are packed together: enough for tight rows, few enough to keep the shuffle
CARRY = 256  # documents of the emptiest rows that are packed again with the next group, at most
FULL = 0.995  # rows at least this full are not
LongDocuments = Literal["split", "cut", "drop", "error"]
log = logging.getLogger("unitok")


def pack(lengths: np.ndarray, sequence_length: int) -> list[list[int]]:
    """Indices of documents, packed into rows of at most `sequence_length` ids (best fit, longest first)."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free ids, row), sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[index])
        at = bisect_left(room, (need, -1))
        if at == len(room):
            rows.append([index])
            free, row = sequence_length - need, len(rows) - 1
        else:
            free, row = room.pop(at)
            rows[row].append(index)
            free -= need
        if free > 0:
            insort(room, (free, row))
    return rows


def pack_in_order(lengths: np.ndarray, sequence_length: int) -> list[np.ndarray]:
    """Rows of document indices, packed in groups of `GROUP` in the order given; what leaves room goes on to the next group."""
    rows: list[np.ndarray] = []
    left, start = np.zeros(0, np.int64), 0
    while start < len(lengths):
        stop = min(start + GROUP - len(left), len(lengths))
        group = np.concatenate([left, np.arange(start, stop)])
        start = stop
        packed = [group[row] for row in pack(lengths[group], sequence_length)]
        packed.sort(key=lambda row: -int(lengths[row].sum()))
        left = np.zeros(0, np.int64)
        while (
            start < len(lengths) and lengths[packed[-1]].sum() < FULL * sequence_length and len(left) + len(packed[-1]) <= CARRY
        ):
            left = np.concatenate([packed.pop(), left])
            if not packed:
                break
        rows += packed
    return rows


def _says_role(segments: Sequence[SegmentSpan], number: int) -> bool:
    """Whether a segment's ids begin with that of its role, because it is another than the one before."""
    return segments[number].role != (segments[number - 1].role if number else "none")


@dataclass(frozen=True)
class Unit:
    """What is packed: a document, or one piece of a long one.

    Args:
        source: which data set. document: its index there.
        draw: how many documents of the data set were drawn before it, over all epochs.
        start, length: which of its ids; of a document without its condition, of those that are left.
        span: number of the only segment that is left of a document without its condition; -1: all are.
    """

    source: int
    document: int
    draw: int
    start: int
    length: int
    span: int = -1


class PackedDataset(torch.utils.data.Dataset):
    """Rows of packed documents by (epoch, index).

    Args:
        datasets: the documents; all must belong to one vocabulary, or to beginnings of it.
        sequence_length: ids a row, T.
        condition_dropout: share of documents that are replaced by their unconditional form, bos and one trained span.
        weights: factors on the loss (`loss_weights`), max_length, long_documents: see `TokenShards`.
        shares: of the ids of an epoch, for each data set, in any unit; default: what there is, each document once.
        vocab: whose legal sets `kinds` index; default: the largest of the data sets'.
    """

    def __init__(
        self,
        datasets: TokenDataset | Sequence[TokenDataset],
        sequence_length: int,
        seed: int = 0,
        condition_dropout: float = 0.1,
        weights: Mapping[str, float] | None = None,
        shares: Sequence[float] | None = None,
        max_length: int | None = None,
        long_documents: LongDocuments = "split",
        vocab: Vocab | None = None,
    ):
        self.datasets = [datasets] if isinstance(datasets, TokenDataset) else list(datasets)
        fullest = max(self.datasets, key=lambda d: d.vocab.size)
        self.vocab = vocab or fullest.vocab
        for d in self.datasets:
            self.vocab.check_covers(d.vocab, "the training data" if vocab else str(fullest.folder), str(d.folder))
        self.grammar = Grammar(self.vocab)
        self.sequence_length, self.seed, self.condition_dropout = sequence_length, seed, condition_dropout
        self.max_length = min(max_length or sequence_length, sequence_length)
        self._factors = self._factor_table(weights or {})
        self._allowed = np.zeros((len(self.grammar.allowed_sets), self.vocab.size), bool)  # which ids each kind allows
        for kind, intervals in enumerate(self.grammar.allowed_sets):
            for a, b in intervals:
                self._allowed[kind, a:b] = True
        self._long: list[np.ndarray] = []  # bool [documents] each
        self._pieces = [self._split(d, long_documents) for d in self.datasets]
        self.longest = max(int(lengths.max()) for _, _, lengths in self._pieces)
        every = np.concatenate([lengths for _, _, lengths in self._pieces]).astype(np.int64)
        self.mean_context = int((every**2).sum() // every.sum())  # mean over all ids of the length of their document
        self._counts = self._documents_an_epoch(shares)
        self._epochs: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}

    def _factor_table(self, weights: Mapping[str, float]) -> np.ndarray:
        """float32 [V]: the factor on the loss of each code's id. Errors: `UserError` for a weight of what there is not."""
        table, known = np.ones(self.vocab.size, np.float32), set[str]()
        for name, span in self.vocab.spans.items():
            for r in self.vocab.body(name):
                names = {span.kind or name, name, r.name}
                table[r.offset : r.stop] = math.prod(weights.get(n, 1.0) for n in sorted(names))
                known |= names
        if unknown := ", ".join(sorted(set(weights) - known)):
            raise UserError(f"loss_weights: no {unknown} in the vocabulary; there is {', '.join(sorted(known))}")
        return table

    def _split(self, dataset: TokenDataset, how: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 each: first piece of every document [documents + 1], and each piece's start and length [pieces]."""
        lengths, most = dataset.lengths(), self.max_length
        if len(lengths) != len(dataset) or (lengths < 2).any():
            raise UserError(f"{dataset.folder}: its shards are not what dataset.json says; make the data set again")
        long = lengths > most
        self._long.append(long)
        if long.any():
            number = int(long.sum())
            said = f"{dataset.folder}: {number} of {len(lengths)} documents have more than {most} ids"
            if how == "error":
                mend = "raise data.sequence_length (and max_length), or set data.long_documents to split, cut or drop"
                raise UserError(f"{said}, the longest {lengths.max()}: {mend}")
            does = {"split": "split into pieces", "cut": "cut off there", "drop": "left out"}[how]
            log.warning("%s: %d %s", said, number, does)
        counts = np.where(long & (how == "drop"), 0, np.where(long & (how == "split"), -(-lengths // most), 1))
        first = np.concatenate([[0], np.cumsum(counts)])
        if first[-1] == 0:
            raise UserError(f"{dataset.folder}: no documents to train on" + (", all are too long" if len(lengths) else ""))
        document = np.repeat(np.arange(len(lengths)), counts)
        start = (np.arange(len(document)) - first[document]) * most
        return first, start, np.minimum(lengths[document] - start, most)

    def _documents_an_epoch(self, shares: Sequence[float] | None) -> list[int]:
        """How many documents of each data set an epoch draws."""
        sizes = [len(d) for d in self.datasets]
        if shares is None:
            return sizes
        if len(shares) != len(sizes) or min(shares) <= 0:
            raise UserError(f"weights {list(shares)}: each data set needs one, above 0")
        ids = [int(lengths.sum()) for _, _, lengths in self._pieces]
        wanted = [sum(ids) * share / sum(shares) for share in shares]
        return [max(1, round(w * size / n)) for w, size, n in zip(wanted, sizes, ids, strict=True)]

    def _draw(self, source: int, epoch: int) -> np.ndarray:
        """The units of one data set in an epoch, [n, 6] as in `Unit`."""
        size, count = len(self.datasets[source]), self._counts[source]
        draws = np.arange(epoch * count, (epoch + 1) * count)
        documents, chances = np.empty(count, np.int64), np.empty((count, 2))
        for turn in np.unique(draws // size):
            here, span_positions = draws // size == turn, draws[draws // size == turn] % size
            documents[here] = np.random.default_rng((self.seed, source, int(turn))).permutation(size)[span_positions]
            chances[here] = np.random.default_rng((self.seed, source, int(turn), 1)).random((size, 2))[span_positions]
        first, start, length = self._pieces[source]
        counts = first[documents + 1] - first[documents]
        document, draw = np.repeat(documents, counts), np.repeat(draws, counts)
        piece = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[document]
        columns = (np.full_like(draw, source), document, draw, start[piece], length[piece], np.full_like(draw, -1))
        units = np.stack(columns, axis=1)
        self._drop_conditions(source, units, np.repeat(chances, counts, axis=0))
        return units

    def _drop_conditions(self, source: int, units: np.ndarray, chances: np.ndarray) -> None:
        """Leave one trained segment in a share of the units [n, 6], but for documents that are too long or have none.

        chances: [n, 2] in [0, 1), whether and which.
        """
        dropped = np.flatnonzero((chances[:, 0] < self.condition_dropout) & ~self._long[source][units[:, 1]])
        for at, segments in zip(dropped.tolist(), self.datasets[source].placed_of(units[dropped, 1]), strict=True):
            trained = [number for number, p in enumerate(segments) if p.loss]
            if trained:
                number = trained[int(chances[at, 1] * len(trained))]
                units[at, 4] = 2 + segments[number].length - _says_role(segments, number)  # and bos, eos
                units[at, 5] = number

    def rows(self, epoch: int) -> list[list[Unit]]:
        """The rows of an epoch in order: a pure function of the arguments."""
        units, rows = self._packed(epoch)
        return [[Unit(*unit) for unit in units[row].tolist()] for row in rows]

    def _packed(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The units of an epoch, and its rows as indices into them; kept for two epochs, because a batch may end one."""
        if epoch not in self._epochs:
            rng = np.random.default_rng((self.seed, epoch))
            units = np.concatenate([self._draw(source, epoch) for source in range(len(self.datasets))])
            units = units[rng.permutation(len(units))]
            rows = pack_in_order(units[:, 4], self.sequence_length)
            self._epochs[epoch] = units, [rows[i] for i in rng.permutation(len(rows))]
            while len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]

    def document(self, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
        """All ids [L] of a unit's document, or what is left of it, and the loss weight of each [L]."""
        dataset = self.datasets[unit.source]
        ids, placed = dataset.ids(unit.document), dataset.placed(unit.document)
        weights = np.zeros(len(ids), np.float32)
        for p in placed:
            weights[p.start : p.start + p.length] = p.loss
        weights[-1] = placed[-1].loss  # eos
        weights *= self._factors[ids]
        if unit.span < 0:
            return ids, weights
        p = placed[unit.span]
        span = slice(p.start + _says_role(placed, unit.span), p.start + p.length)  # a change of role belongs to the condition
        ids = np.append(self.vocab.unconditional(ids[span]), self.vocab.eos)
        return ids, np.concatenate([[0], weights[span], [0]]).astype(np.float32)

    def _annotated(self, unit: Unit) -> tuple[np.ndarray, ...]:
        """Of a unit's ids: ids, loss weights, span_positions, [length] each, and the kinds of all targets but the first, [length - 1].

        Errors: `UserError` for a document that nothing encodes to.
        """
        dataset, piece = self.datasets[unit.source], slice(unit.start, unit.start + unit.length)
        problem = "its length is not what the shard says"
        try:
            ids, weights = self.document(unit)
            span_positions, kinds = self.grammar.span_positions(ids), self.grammar.targets(ids)
            wrong = np.flatnonzero(~self._allowed[kinds, ids[1:]])
            if len(wrong):
                problem = f"position {wrong[0] + 1}: {self.vocab.name_of(int(ids[wrong[0] + 1]))} cannot stand here"
            elif len(ids[piece]) == unit.length:
                return ids[piece], weights[piece], span_positions[piece], kinds[piece][: unit.length - 1]
        except UserError:
            raise
        except (ValueError, IndexError, KeyError, TypeError) as error:  # what reading damaged ids and spans may end in
            problem = first_line(error)
        raise UserError(
            f"{dataset.folder}: document {unit.document} is damaged ({problem}); look with `unitok inspect --verify`, and make the "
            "data set again"
        )

    def row(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """One row of a batch; what is over is padding: document number -1, weight 0. Errors: `UserError` for damaged documents."""
        units, rows = self._packed(epoch)
        return self._fill(Unit(*unit) for unit in units[rows[index]].tolist())

    def padding(self) -> dict[str, np.ndarray]:
        """A row without documents."""
        return self._fill(())

    def _fill(self, units: Iterable[Unit]) -> dict[str, np.ndarray]:
        t = self.sequence_length
        out: dict[str, np.ndarray] = {
            "ids": np.full(t, self.vocab.pad, np.int64),
            "targets": np.full(t, self.vocab.pad, np.int64),  # the next ids
            "positions": np.zeros(t, np.int64),  # in the document
            "span_positions": np.zeros(t, np.int64),  # in the image or sound
            "documents": np.full(t, -1, np.int64),  # number in the row
            "weights": np.zeros(t, np.float32),  # of the targets' loss
            "mask_index": np.zeros(t, np.int64),  # of the targets: indices of the grammar's legal sets
        }
        at = 0
        for number, unit in enumerate(units):
            ids, weights, span_positions, kinds = self._annotated(unit)
            here, targets = slice(at, at + unit.length), slice(at, at + unit.length - 1)
            out["ids"][here] = ids
            out["positions"][here] = np.arange(unit.length)
            out["span_positions"][here] = span_positions
            out["documents"][here] = number
            out["targets"][targets] = ids[1:]  # the last of a piece has none: across documents nothing is learnt
            out["weights"][targets] = weights[1:]
            out["mask_index"][targets] = kinds
            at += unit.length
        return out

    def order(self, epoch: int) -> range:
        """The rows of an epoch stand in their order already."""
        return range(len(self._packed(epoch)[1]))

    def __len__(self) -> int:
        """Rows of the first epoch; other epochs may have a few more or less."""
        return len(self.order(0))

    def content(self) -> str:
        """What is there: a number, and a digest of the data sets' shards."""
        shards = [shard["sha256"] for dataset in self.datasets for shard in dataset.shards]
        return f"{sum(map(len, self.datasets))} documents ({hashlib.sha256(repr(shards).encode()).hexdigest()[:8]})"

    def __getitem__(self, place: tuple[int, int]) -> dict[str, np.ndarray]:
        return self.row(*place)
