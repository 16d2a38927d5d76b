"""Packing: documents into sequences of a fixed length, from one data set or a mixture of several.

The order is a pure function of (seed, epoch), so any process can make any batch. The documents of an epoch are shuffled, some lose
their condition (by chance), the rest is packed best-fit in groups, and the sequences are shuffled again. Sequences that are at least
eight documents long waste less than 1 % on padding. Long sequences cost no more attention, because documents do not see one another.
An epoch of a mixture has as many tokens as its data sets together, divided by weight. Each data set is drawn from in an endless
order in which every document comes once before any comes twice.
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

GROUP = 2048  # documents that are packed together: enough to fill rows well, few enough to keep the shuffle
CARRY = 256  # most documents of the emptiest rows that are packed again with the next group
FULL = 0.995  # rows at least this full are not packed again
LongDocuments = Literal["split", "cut", "drop", "error"]
log = logging.getLogger("unitok")


def pack(lengths: np.ndarray, sequence_length: int) -> list[list[int]]:
    """Pack documents into rows of at most `sequence_length` tokens (best fit, longest first). Returns: document indices per row."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        position = bisect_left(room, (length, -1))
        if position == len(room):
            rows.append([index])
            free, row = sequence_length - length, len(rows) - 1
        else:
            free, row = room.pop(position)
            rows[row].append(index)
            free -= length
        if free > 0:
            insort(room, (free, row))
    return rows


def pack_in_order(lengths: np.ndarray, sequence_length: int) -> list[np.ndarray]:
    """Pack documents in groups of `GROUP`, in the order given; rows that are not full are packed again with the next group.

    Returns: document indices per row.
    """
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


def _has_role_token(segments: Sequence[SegmentSpan], number: int) -> bool:
    """Whether a segment's tokens begin with that of its role, because the segment before has another role."""
    return segments[number].role != (segments[number - 1].role if number else "none")


@dataclass(frozen=True)
class Unit:
    """What is packed: a document, or one piece of a long one.

    Args:
        source: number of the data set. document: its index there.
        draw: how many documents of the data set were drawn before it, over all epochs.
        start, length: its first token and number of tokens; of a document that lost its condition, counted in what is left.
        span: number of the only segment that is left of a document that lost its condition; -1: all segments.
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
        datasets: the documents; all must belong to one vocabulary, or to prefixes of it.
        sequence_length: tokens per row, T.
        condition_dropout: fraction of documents that are replaced by their unconditional form, bos and one trained span.
        loss_weights, prompt_loss_weight, max_length, long_documents: see `TokenShards`.
        weights: of each data set, in proportion to its tokens in an epoch; default: each document once per epoch.
        vocab: its allowed sets are what `mask_index` counts; default: the largest vocabulary of the data sets.

    Attributes:
        longest: tokens of the longest document (or piece). mean_context: mean over all tokens of the length of their document.

    Errors: `UserError` for data sets of different vocabularies, too long documents (`long_documents="error"`), and no documents.
    """

    def __init__(
        self,
        datasets: TokenDataset | Sequence[TokenDataset],
        sequence_length: int,
        seed: int = 0,
        condition_dropout: float = 0.1,
        loss_weights: Mapping[str, float] | None = None,
        weights: Sequence[float] | None = None,
        max_length: int | None = None,
        long_documents: LongDocuments = "split",
        vocab: Vocab | None = None,
        prompt_loss_weight: Mapping[str, float] | None = None,
    ):
        self.datasets = [datasets] if isinstance(datasets, TokenDataset) else list(datasets)
        fullest = max(self.datasets, key=lambda d: d.vocab.size)
        self.vocab = vocab or fullest.vocab
        for d in self.datasets:
            self.vocab.check_covers(d.vocab, "the training data" if vocab else str(fullest.folder), str(d.folder))
        self.grammar = Grammar(self.vocab)
        self.sequence_length, self.seed, self.condition_dropout = sequence_length, seed, condition_dropout
        self.max_length = min(max_length or sequence_length, sequence_length)
        self._loss_weights = self._weight_table("loss_weights", loss_weights or {}, 1.0)
        of_prompts = self._weight_table("prompt_loss_weight", prompt_loss_weight or {}, 0.0)
        self._prompt_weights = self._loss_weights * of_prompts if prompt_loss_weight else None
        self._allowed = np.zeros((len(self.grammar.allowed_sets), self.vocab.size), bool)  # by mask index
        for number, intervals in enumerate(self.grammar.allowed_sets):
            for a, b in intervals:
                self._allowed[number, a:b] = True
        self._long: list[np.ndarray] = []  # bool [documents] per data set
        self._pieces = [self._split(d, long_documents) for d in self.datasets]
        self.longest = max(int(lengths.max()) for _, _, lengths in self._pieces)
        all_lengths = np.concatenate([lengths for _, _, lengths in self._pieces]).astype(np.int64)
        self.mean_context = int((all_lengths**2).sum() // all_lengths.sum())
        self._counts = self._documents_per_epoch(weights)
        self._epochs: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}

    def _weight_table(self, argument: str, weights: Mapping[str, float], default: float) -> np.ndarray:
        """float32 [V]: the weight of each token in the loss, of `weights` by name; `default` where none applies.

        Errors: `UserError` for a name that the vocabulary does not have.
        """
        table, known = np.full(self.vocab.size, default, np.float32), set[str]()
        for name, span in self.vocab.spans.items():
            for r in self.vocab.body(name):
                names = {span.kind or name, name, r.name}
                if given := [weights[n] for n in sorted(names) if n in weights]:
                    table[r.offset : r.stop] = math.prod(given)
                known |= names
        if unknown := ", ".join(sorted(set(weights) - known)):
            raise UserError(f"{argument}: the vocabulary has no {unknown}; it has {', '.join(sorted(known))}")
        return table

    def _split(self, dataset: TokenDataset, long_documents: LongDocuments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Divide documents into pieces. Returns: int64 each, the first piece of every document [documents + 1], and the start and
        length of every piece [pieces], in tokens."""
        lengths, longest = dataset.lengths(), self.max_length
        if len(lengths) != len(dataset) or (lengths < 2).any():
            raise UserError(f"{dataset.folder}: its shards do not match dataset.json; make the data set again")
        long = lengths > longest
        self._long.append(long)
        if long.any():
            problem = f"{dataset.folder}: {int(long.sum())} of {len(lengths)} documents have more than {longest} tokens"
            if long_documents == "error":
                remedy = "raise data.sequence_length (and max_length), or set data.long_documents to split, cut or drop"
                raise UserError(f"{problem}, the longest {lengths.max()}: {remedy}")
            done = {"split": "they are split into pieces", "cut": "they are cut off there", "drop": "they are left out"}
            log.warning("%s: %s", problem, done[long_documents])
        split = long & (long_documents == "split")
        counts = np.where(long & (long_documents == "drop"), 0, np.where(split, -(-lengths // longest), 1))
        first = np.concatenate([[0], np.cumsum(counts)])
        if first[-1] == 0:
            raise UserError(f"{dataset.folder}: no documents to train on" + (", all are too long" if len(lengths) else ""))
        document = np.repeat(np.arange(len(lengths)), counts)
        start = (np.arange(len(document)) - first[document]) * longest
        return first, start, np.minimum(lengths[document] - start, longest)

    def _documents_per_epoch(self, weights: Sequence[float] | None) -> list[int]:
        """The number of documents that an epoch draws from each data set."""
        sizes = [len(d) for d in self.datasets]
        if weights is None:
            return sizes
        if len(weights) != len(sizes) or min(weights) <= 0:
            raise UserError(f"weights {list(weights)}: each data set needs one, above 0")
        tokens = [int(lengths.sum()) for _, _, lengths in self._pieces]
        drawn = [sum(tokens) * weight / sum(weights) for weight in weights]
        return [max(1, round(d * size / n)) for d, size, n in zip(drawn, sizes, tokens, strict=True)]

    def _draw(self, source: int, epoch: int) -> np.ndarray:
        """int64 [n, 6]: the units of one data set in an epoch, with the fields of `Unit` as columns."""
        size, count = len(self.datasets[source]), self._counts[source]
        draws = np.arange(epoch * count, (epoch + 1) * count)
        documents, chances = np.empty(count, np.int64), np.empty((count, 2))
        for turn in np.unique(draws // size):
            of_turn = draws // size == turn
            positions = draws[of_turn] % size
            documents[of_turn] = np.random.default_rng((self.seed, source, int(turn))).permutation(size)[positions]
            chances[of_turn] = np.random.default_rng((self.seed, source, int(turn), 1)).random((size, 2))[positions]
        first, start, length = self._pieces[source]
        counts = first[documents + 1] - first[documents]
        document, draw = np.repeat(documents, counts), np.repeat(draws, counts)
        piece = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[document]
        columns = (np.full_like(draw, source), document, draw, start[piece], length[piece], np.full_like(draw, -1))
        units = np.stack(columns, axis=1)
        self._drop_conditions(source, units, np.repeat(chances, counts, axis=0))
        return units

    def _drop_conditions(self, source: int, units: np.ndarray, chances: np.ndarray) -> None:
        """Reduce a fraction (`condition_dropout`) of the units [n, 6] to one trained segment each, in place.

        Documents that are too long or without a trained segment stay whole. chances: [n, 2] in [0, 1), whether to, and to which.
        """
        dropped = np.flatnonzero((chances[:, 0] < self.condition_dropout) & ~self._long[source][units[:, 1]])
        for row, segments in zip(dropped.tolist(), self.datasets[source].placed_of(units[dropped, 1]), strict=True):
            trained = [number for number, p in enumerate(segments) if p.loss]
            if trained:
                number = trained[int(chances[row, 1] * len(trained))]
                units[row, 4] = 2 + segments[number].length - _has_role_token(segments, number)  # and bos, eos
                units[row, 5] = number

    def rows(self, epoch: int) -> list[list[Unit]]:
        """The rows of an epoch in order: a pure function of the arguments."""
        units, rows = self._packed(epoch)
        return [[Unit(*unit) for unit in units[row].tolist()] for row in rows]

    def _packed(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The units of an epoch, and its rows as indices into them. Two epochs are kept, because a batch may span both."""
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
        """The tokens [L] of a unit's document (of one that lost its condition, what is left), and the loss weight of each [L]."""
        dataset = self.datasets[unit.source]
        ids, placed = dataset.ids(unit.document), dataset.placed(unit.document)
        weights = np.zeros(len(ids), np.float32)
        ends = False  # whether the turn before is learned: then its end is, too, which is the next role's token or eos
        for number, p in enumerate(placed):
            weights[p.start : p.start + p.length] = p.loss
            if ends and _has_role_token(placed, number):
                weights[p.start] = 1.0
            ends = p.loss
        weights[-1] = ends
        prompt = weights == 0
        weights *= self._loss_weights[ids]
        if self._prompt_weights is not None:
            weights = np.where(prompt, self._prompt_weights[ids], weights)
        if unit.span < 0:
            return ids, weights
        p = placed[unit.span]
        span = slice(
            p.start + _has_role_token(placed, unit.span), p.start + p.length
        )  # the role's token belongs to the condition
        ids = np.append(self.vocab.unconditional(ids[span]), self.vocab.eos)
        return ids, np.concatenate([[0], weights[span], [0]]).astype(np.float32)

    def _annotated(self, unit: Unit) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A unit's tokens, loss weights and span positions, [length] each, and the mask index of every token but the first
        [length - 1].

        Errors: `UserError` for a damaged document.
        """
        dataset, piece = self.datasets[unit.source], slice(unit.start, unit.start + unit.length)
        problem = "its length is not that of the shard"
        try:
            ids, weights = self.document(unit)
            span_positions, mask_index = self.grammar.span_positions(ids), self.grammar.targets(ids)
            wrong = np.flatnonzero(~self._allowed[mask_index, ids[1:]])
            if len(wrong):
                problem = f"position {wrong[0] + 1}: {self.vocab.name_of(int(ids[wrong[0] + 1]))} cannot stand here"
            elif len(ids[piece]) == unit.length:
                return ids[piece], weights[piece], span_positions[piece], mask_index[piece][: unit.length - 1]
        except UserError:
            raise
        except (ValueError, IndexError, KeyError, TypeError) as error:  # what damaged tokens and spans may raise
            problem = first_line(error)
        raise UserError(
            f"{dataset.folder}: document {unit.document} is damaged ({problem}); check with `unitok inspect --verify`, and make "
            "the data set again"
        )

    def row(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """One packed sequence, arrays [T]; unused positions are padding (document -1, weight 0). Errors: `UserError` for damaged data."""
        units, rows = self._packed(epoch)
        return self._fill(Unit(*unit) for unit in units[rows[index]].tolist())

    def padding(self) -> dict[str, np.ndarray]:
        """A sequence of padding alone."""
        return self._fill(())

    def _fill(self, units: Iterable[Unit]) -> dict[str, np.ndarray]:
        t = self.sequence_length
        out: dict[str, np.ndarray] = {
            "ids": np.full(t, self.vocab.pad, np.int64),
            "targets": np.full(t, self.vocab.pad, np.int64),  # the next tokens
            "positions": np.zeros(t, np.int64),  # in the document
            "span_positions": np.zeros(t, np.int64),  # in the image or audio
            "documents": np.full(t, -1, np.int64),  # number in the row
            "weights": np.zeros(t, np.float32),  # of the targets' loss
            "mask_index": np.zeros(t, np.int64),  # of the targets: indices of the grammar's allowed sets
        }
        start = 0
        for number, unit in enumerate(units):
            ids, weights, span_positions, mask_index = self._annotated(unit)
            inputs, targets = slice(start, start + unit.length), slice(start, start + unit.length - 1)
            out["ids"][inputs] = ids
            out["positions"][inputs] = np.arange(unit.length)
            out["span_positions"][inputs] = span_positions
            out["documents"][inputs] = number
            out["targets"][targets] = ids[1:]  # the last token of a piece has no target: nothing is learned across documents
            out["weights"][targets] = weights[1:]
            out["mask_index"][targets] = mask_index
            start += unit.length
        return out

    def order(self, epoch: int) -> range:
        """The indices of an epoch's rows; they are shuffled already."""
        return range(len(self._packed(epoch)[1]))

    def __len__(self) -> int:
        """The number of rows of the first epoch; other epochs may have a few more or fewer."""
        return len(self.order(0))

    def content(self) -> str:
        """The number of documents and a digest of the shards, in words, to notice that the data changed."""
        shards = [shard["sha256"] for dataset in self.datasets for shard in dataset.shards]
        return f"{sum(map(len, self.datasets))} documents ({hashlib.sha256(repr(shards).encode()).hexdigest()[:8]})"

    def __getitem__(self, index: tuple[int, int]) -> dict[str, np.ndarray]:
        """The row of an (epoch, index)."""
        return self.row(*index)
