"""Packing: documents into sequences of a fixed length, from one data set or a mixture of several.

The order is a pure function of (seed, epoch, part, index), so any process can make any batch. An epoch is divided into parts of about
65,536 documents, each with an equal fraction of every data set: a part is drawn, some of its documents lose their condition (by chance), the
rest is packed best-fit, and its rows are shuffled. Nothing but the lengths of documents is held for a whole data set, and to go on
anywhere takes the packing of one part. Sequences that are at least eight documents long waste less than 1 % on padding. Long sequences
cost no more attention, because documents do not see one another. An epoch of a mixture has as many tokens as its data sets together,
divided by weight. Each data set is drawn from in an endless order in which every document comes once before any comes twice.
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from unitok.data.best_fit import pack
from unitok.data.order import chances_of, shuffled
from unitok.data.shards import TokenDataset
from unitok.document import Document
from unitok.errors import UserError, check_range, first_line
from unitok.grammar import Grammar
from unitok.holes import punch, random_holes
from unitok.vocab import SegmentSpan, Vocab

PART = 1 << 16  # documents that are drawn and packed together, about
_ROW_BITS = 32  # of an index: the row in its part; above it the part
MAX_WEIGHT = 1e6  # of a data set, and of tokens in the loss
LongDocuments = Literal["split", "cut", "drop", "error"]
log = logging.getLogger("unitok")


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
        holed: 1 for a document with random holes, which is trained to fill them; then `length` is that with what belongs there.
        media: 1 where the images and audio before that segment are left, too, as three-way guidance sees them.
    """

    source: int
    document: int
    draw: int
    start: int
    length: int
    span: int = -1
    holed: int = 0
    media: int = 0


class Pieces:
    """The documents of a data set in pieces; one piece each where none is too long.

    Args:
        lengths: int32 [pieces], tokens of each piece. long: bool [documents], which are too long; None: none is.
        firsts: int64 [documents + 1], the first piece of each document; None: each has one.
    """

    def __init__(self, lengths: np.ndarray, long: np.ndarray | None = None, firsts: np.ndarray | None = None):
        self.lengths, self.long, self.firsts = lengths, long, firsts
        self.tokens = self.squares = 0  # sums of lengths, and of their squares
        for start in range(0, len(lengths), PART):
            block = lengths[start : start + PART].astype(np.int64)
            self.tokens, self.squares = self.tokens + int(block.sum()), self.squares + int(block @ block)

    def first(self, documents: np.ndarray) -> np.ndarray:
        """The first pieces of documents [N]."""
        return documents if self.firsts is None else self.firsts[documents]

    def count(self, documents: np.ndarray) -> np.ndarray:
        """Number of pieces of documents [N]."""
        return np.ones_like(documents) if self.firsts is None else self.firsts[documents + 1] - self.firsts[documents]


class PackedDataset(torch.utils.data.Dataset):
    """Rows of packed documents by (epoch, index), an index of `order`.

    Args:
        datasets: the documents; all must belong to one vocabulary, or to prefixes of it.
        sequence_length: tokens per row, T.
        condition_dropout: fraction of documents that are replaced by their unconditional form, bos and one trained span.
        fill_rate: fraction of the others that get random holes, and are trained to fill them alone (`unitok.holes`).
        loss_weights, prompt_loss_weight, max_length, long_documents: see `TokenShards`.
        weights: of each data set, in proportion to its tokens in an epoch; default: each document once per epoch.
        vocab: its allowed sets are what `mask_index` counts; default: the largest vocabulary of the data sets.

    Attributes:
        longest: tokens of the longest document (or piece). mean_context: mean over all tokens of the length of their document.
        parts: of each epoch.

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
        fill_rate: float = 0.0,
    ):
        self.datasets = [datasets] if isinstance(datasets, TokenDataset) else list(datasets)
        fullest = max(self.datasets, key=lambda d: d.vocab.size)
        self.vocab = vocab or fullest.vocab
        for d in self.datasets:
            self.vocab.check_covers(d.vocab, "the training data" if vocab else str(fullest.folder), str(d.folder))
        self.grammar = Grammar(self.vocab)
        self.sequence_length, self.seed = sequence_length, seed
        self.condition_dropout, self.fill_rate = condition_dropout, fill_rate
        self.max_length = min(max_length or sequence_length, sequence_length)
        self._loss_weights = self._weight_table("loss_weights", loss_weights or {}, 1.0)
        of_prompts = self._weight_table("prompt_loss_weight", prompt_loss_weight or {}, 0.0)
        self._prompt_weights = self._loss_weights * of_prompts if prompt_loss_weight else None
        self._allowed = np.zeros((len(self.grammar.allowed_sets), self.vocab.size), bool)  # by mask index
        for number, intervals in enumerate(self.grammar.allowed_sets):
            for a, b in intervals:
                self._allowed[number, a:b] = True
        self._pieces = [self._split(d, long_documents) for d in self.datasets]
        self.longest = max(int(pieces.lengths.max()) for pieces in self._pieces)
        tokens = [pieces.tokens for pieces in self._pieces]
        self.mean_context = sum(pieces.squares for pieces in self._pieces) // sum(tokens)
        self._counts = self._documents_per_epoch(tokens, weights)
        self.parts = max(1, -(-sum(self._counts) // PART))
        self._packed_parts: dict[tuple[int, int], tuple[np.ndarray, list[np.ndarray]]] = {}

    def _weight_table(self, argument: str, weights: Mapping[str, float], default: float) -> np.ndarray:
        """float32 [V]: the weight of each token in the loss, of `weights` by name; `default` where none applies.

        Errors: `UserError` for a name that the vocabulary does not have, and for a weight below 0.
        """
        for name, weight in weights.items():
            check_range(f"{argument}.{name}", weight, 0, MAX_WEIGHT)
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

    def _split(self, dataset: TokenDataset, long_documents: LongDocuments) -> "Pieces":
        """Divide documents into pieces."""
        lengths, longest = dataset.lengths(), self.max_length
        if len(lengths) != len(dataset) or (lengths < 2).any():
            raise UserError(f"{dataset.folder}: its shards do not match dataset.json; make the data set again")
        long = lengths > longest
        if not long.any():
            if not len(lengths):
                raise UserError(f"{dataset.folder}: no documents to train on")
            return Pieces(lengths)
        problem = f"{dataset.folder}: {int(long.sum())} of {len(lengths)} documents have more than {longest} tokens"
        if long_documents == "error":
            remedy = "raise data.sequence_length (and max_length), or set data.long_documents to split, cut or drop"
            raise UserError(f"{problem}, the longest {lengths.max()}: {remedy}")
        done = {"split": "they are split into pieces", "cut": "they are cut off there", "drop": "they are left out"}
        log.warning("%s: %s", problem, done[long_documents])
        if long_documents == "cut":
            return Pieces(np.minimum(lengths, longest, dtype=np.int32), long)
        counts = -(-lengths // longest) if long_documents == "split" else (~long).astype(np.int32)
        firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if firsts[-1] == 0:
            raise UserError(f"{dataset.folder}: no documents to train on, all are too long")
        document = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
        starts = (np.arange(len(document)) - firsts[document]) * longest
        return Pieces(np.minimum(lengths[document] - starts, longest).astype(np.int32), long, firsts)

    def _documents_per_epoch(self, tokens: list[int], weights: Sequence[float] | None) -> list[int]:
        """The number of documents that an epoch draws from each data set."""
        sizes = [len(d) for d in self.datasets]
        if weights is None:
            return sizes
        if len(weights) != len(sizes) or not all(0 < weight <= MAX_WEIGHT for weight in weights):
            raise UserError(f"weights {list(weights)}: each data set needs one, above 0 and at most {MAX_WEIGHT:g}")
        drawn = [sum(tokens) * weight / sum(weights) for weight in weights]
        return [max(1, round(d * size / n)) for d, size, n in zip(drawn, sizes, tokens, strict=True)]

    def _draw(self, source: int, epoch: int, part: int) -> np.ndarray:
        """int64 [n, 8]: the units of one data set in a part of an epoch, with the fields of `Unit` as columns."""
        size, count, pieces = len(self.datasets[source]), self._counts[source], self._pieces[source]
        draws = epoch * count + np.arange(count * part // self.parts, count * (part + 1) // self.parts)
        documents, chances = np.empty(len(draws), np.int64), np.empty((len(draws), 2))
        chances_of_holes = np.empty(len(draws))
        for turn in np.unique(draws // size).tolist():
            of_turn = draws // size == turn
            positions = draws[of_turn] % size
            documents[of_turn] = shuffled(positions, size, (self.seed, source, turn))
            chances[of_turn] = chances_of(positions, (self.seed, source, turn, 1))
            chances_of_holes[of_turn] = chances_of(positions, (self.seed, source, turn, 2))[:, 0]
        counts = pieces.count(documents)
        document, draw = np.repeat(documents, counts), np.repeat(draws, counts)
        piece = pieces.first(document) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = (piece - pieces.first(document)) * self.max_length
        none = np.full_like(draw, -1)
        units = np.stack((none + 1 + source, document, draw, starts, pieces.lengths[piece], none, none + 1, none + 1), axis=1)
        self._drop_conditions(source, units, np.repeat(chances, counts, axis=0))
        self._punch(source, units, np.repeat(chances_of_holes, counts))
        return units

    def _drop_conditions(self, source: int, units: np.ndarray, chances: np.ndarray) -> None:
        """Reduce a fraction (`condition_dropout`) of the units [n, 8] to one trained segment each, in place; where it is an image or audio
        and others stand before it, half of the time to it and these, without texts.

        Documents that are too long or without a trained segment stay whole. chances: [n, 2] in [0, 1), whether to, and to which.
        """
        long = self._pieces[source].long
        whole = False if long is None else long[units[:, 1]]
        dropped = np.flatnonzero((chances[:, 0] < self.condition_dropout) & ~np.asarray(whole))
        if not len(dropped):
            return
        for row, segments in zip(dropped.tolist(), self.datasets[source].placed_of(units[dropped, 1]), strict=True):
            trained = [number for number, p in enumerate(segments) if p.loss]
            if trained:
                choice = chances[row, 1] * len(trained)
                number = trained[int(choice)]
                kept = self._media_until(segments, number) if choice % 1 < 0.5 else []
                units[row, 4] = 2 + segments[number].length - _has_role_token(segments, number)  # and bos, eos
                units[row, 5] = number
                if kept:
                    bare = sum(segments[n].length - _has_role_token(segments, n) for n in kept)
                    roles = ["none", *(segments[n].role for n in kept)]
                    units[row, 4] = 2 + bare + sum(a != b for a, b in itertools.pairwise(roles))
                    units[row, 7] = 1

    def _media_until(self, segments: Sequence[SegmentSpan], number: int) -> list[int]:
        """The numbers of the images and audio up to a segment that is one (not of boxes or points), if others and a text stand before
        it; else none."""
        spans = [self.vocab.span(p.modality) for p in segments[: number + 1]]
        found = [n for n, span in enumerate(spans) if span.begin]
        return found if 1 < len(found) <= number and found[-1] == number and not spans[number].floors else []

    def _punch(self, source: int, units: np.ndarray, chances: np.ndarray) -> None:
        """Give a fraction (`fill_rate`) of the units [n, 8] holes, in place; not to those without a condition, nor to what is too long
        or becomes so. chances: [n] in [0, 1)."""
        long = self._pieces[source].long
        whole = np.zeros(len(units), bool) if long is None else long[units[:, 1]]
        for row in np.flatnonzero((chances < self.fill_rate) & (units[:, 5] < 0) & ~whole).tolist():
            made = self._with_holes(Unit(*units[row].tolist()))
            if made is not None and len(made[0]) <= self.max_length:
                units[row, 4], units[row, 6] = len(made[0]), 1

    def _with_holes(self, unit: Unit) -> tuple[np.ndarray, np.ndarray] | None:
        """The tokens [L] of a unit's document with holes, and the loss weight of each; None where it has no place for a hole.

        As often as documents lose their condition, what has no hole is left out. Only what fills the holes is learned.
        """
        ids, weights = self.document(replace(unit, holed=0))
        placed = self.datasets[unit.source].placed(unit.document)
        rng = np.random.default_rng((self.seed, unit.source, unit.draw, 3))
        holes = random_holes(self.vocab, ids, placed, rng)
        if not holes:
            return None
        if rng.random() < self.condition_dropout:
            keep = np.zeros(len(ids), bool)
            keep[[0, -1]] = True
            for number, p in enumerate(placed):
                if any(p.start <= hole[0] < p.start + p.length for hole in holes):
                    keep[p.start + _has_role_token(placed, number) : p.start + p.length] = True
            after = np.cumsum(keep) - 1
            ids, weights, holes = ids[keep], weights[keep], [after[hole] for hole in holes]
        made, origin = punch(self.vocab, ids, holes)
        start = len(made) - 1 - sum(1 + len(hole) for hole in holes)
        learned = np.where(origin >= 0, weights[origin], 0).astype(np.float32)
        learned[:start] = 0
        bare = self.vocab.body(self.vocab.bare)[0] if self.vocab.bare else None
        ends = start + np.cumsum([1 + len(hole) for hole in holes])  # what follows a hole's content
        in_text = [bare is not None and bool(bare.holds(ids[hole[:1]])[0]) for hole in holes]
        learned[ends] = learned[ends - 1] * in_text  # where text ends is learned, too, as much as its last token
        return made, learned

    def rows(self, epoch: int) -> list[list[Unit]]:
        """The rows of an epoch in order: a pure function of the arguments."""
        parts = [self._packed(epoch, part) for part in range(self.parts)]
        return [[Unit(*unit) for unit in units[row].tolist()] for units, rows in parts for row in rows]

    def _packed(self, epoch: int, part: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The units of a part, and its rows as indices into them. Two parts are kept, because a batch may span both."""
        if (epoch, part) not in self._packed_parts:
            rng = np.random.default_rng((self.seed, epoch, part))
            units = np.concatenate([self._draw(source, epoch, part) for source in range(len(self.datasets))])
            units = units[rng.permutation(len(units))]
            rows = pack(units[:, 4], self.sequence_length)
            self._packed_parts[epoch, part] = units, [rows[i] for i in rng.permutation(len(rows))]
            while len(self._packed_parts) > 2:
                del self._packed_parts[next(iter(self._packed_parts))]
        return self._packed_parts[epoch, part]

    def document(self, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [L] of a unit's document (of one that lost its condition, what is left), and the loss weight of each [L]."""
        if unit.holed and (made := self._with_holes(unit)) is not None:
            return made
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
        if unit.media:
            segments = dataset.document(unit.document).segments
            kept = [segments[n] for n in self._media_until(placed, unit.span)]
            learned = weights[p.start + _has_role_token(placed, unit.span) : p.start + p.length]
            ids = self.vocab.encode(Document(tuple(kept)))
            return ids, np.concatenate([np.zeros(len(ids) - len(learned) - 1), learned, [0]]).astype(np.float32)
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
        units, rows = self._packed(epoch, index >> _ROW_BITS)
        return self._fill(Unit(*unit) for unit in units[rows[index & ((1 << _ROW_BITS) - 1)]].tolist())

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

    def order(self, epoch: int, part: int | None = None) -> list[int]:
        """The indices of the rows of a part, or of all parts of an epoch; they are shuffled already."""
        parts = range(self.parts) if part is None else [part]
        return [(p << _ROW_BITS) + row for p in parts for row in range(len(self._packed(epoch, p)[1]))]

    def content(self) -> str:
        """The number of documents and a digest of the shards, in words, to notice that the data changed."""
        shards = [shard["sha256"] for dataset in self.datasets for shard in dataset.shards]
        return f"{sum(map(len, self.datasets))} documents ({hashlib.sha256(repr(shards).encode()).hexdigest()[:8]})"

    def __getitem__(self, index: tuple[int, int]) -> dict[str, np.ndarray]:
        """The row of an (epoch, index)."""
        return self.row(*index)
