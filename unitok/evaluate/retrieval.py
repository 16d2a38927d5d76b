"""Retrieval by likelihood: whether a decoder prefers the parts of a document that belong together.

Documents of a direction and of equal roles are put into groups of at most `candidates`: with other roles a target would be known by
its role. In each group all conditions (what comes before the last
segment) are joined with all targets (the last segments); a join that is itself one of the documents is kept out of a group, so
that a caption of two images never counts as wrong. Given a condition, which target is likeliest; given a target, which
condition makes it likeliest. Recall@1 is the fraction that is right; candidates whose scores are equal share the place. Targets
are ranked by log p(target | condition), and by `pmi` (pointwise mutual information), which subtracts log p(target), so that a
target is not preferred because it is short or common. For conditions the two agree.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
from tqdm import tqdm

from unitok.bundle import Bundle
from unitok.document import Document, Segment
from unitok.evaluate.directions import by_direction, direction_of
from unitok.grammar import Grammar
from unitok.sample.score import log_probabilities

TIE = 1e-3  # nats; candidates whose scores differ by less share the place


@dataclass(frozen=True)
class DirectionRetrieval:
    """Recall@1, in [0, 1], of choosing one side of a direction among the candidates of a group, given the other side.

    Args:
        documents: how many were chosen for. left_out: how many were not, because they are too long together with another one's
            part, or have no other candidate.
        recall_at_1_logprob, recall_at_1_pmi, chance: None if all were left out; chance: recall@1 of choosing at random.
    """

    direction: str
    given: str
    choose: str
    documents: int
    left_out: int
    recall_at_1_logprob: float | None
    recall_at_1_pmi: float | None
    chance: float | None


@dataclass(frozen=True)
class _Pair:
    """A document as its condition, all segments but the last, and its target, the last one; with the tokens of both."""

    direction: str
    segments: tuple[Segment, ...]
    condition: np.ndarray
    target: np.ndarray


def measure_retrieval(
    bundle: Bundle, documents: list[Document], candidates: int, seed: int, progress: bool
) -> list[DirectionRetrieval]:
    """Return recall@1 for both sides of each direction. Documents of one segment, or whose last one has no loss, have none."""
    pairs = [_pair(bundle, document) for document in documents if len(document.segments) > 1 and document.segments[-1].loss]
    longest = bundle.require("model").config.max_position_embeddings
    totals = {direction: len(of) for direction, of in by_direction(pairs)}
    groups = [
        (direction, group)
        for direction, of in by_direction(pairs)
        for same in _by_roles(of)
        for group in _groups(_exchangeable(same, longest), candidates, seed)
    ]
    hits: dict[str, list[np.ndarray]] = {direction: [] for direction in totals}
    for direction, group in tqdm(groups, desc="retrieve", unit="group", disable=not progress):
        hits[direction].append(_hits(bundle, group))
    rows = []
    for direction, of_groups in hits.items():
        before, _, after = direction.rpartition(">")
        count = sum(of_group.shape[1] for of_group in of_groups)
        left_out, chance = totals[direction] - count, len(of_groups) / count if count else None
        target, target_pmi, condition = np.concatenate(of_groups, 1).mean(1).tolist() if count else [None] * 3
        rows.append(DirectionRetrieval(direction, before, after, count, left_out, target, target_pmi, chance))
        rows.append(DirectionRetrieval(direction, after, before, count, left_out, condition, condition, chance))
    return rows


def _by_roles(pairs: list[_Pair]) -> list[list[_Pair]]:
    """Divide pairs by the roles of the condition, where they change, and the role of the target."""
    divided: dict[tuple[str, ...], list[_Pair]] = {}
    for pair in pairs:
        *before, last = (segment.role for segment in pair.segments)
        divided.setdefault((*(role for role, _ in groupby(before)), last), []).append(pair)
    return list(divided.values())


def _pair(bundle: Bundle, document: Document) -> _Pair:
    *before, last = document.segments
    ids, condition = (bundle.vocab.encode(Document(tuple(part)), eos=False) for part in (document.segments, before))
    return _Pair(direction_of(before, last), document.segments, condition, ids[len(condition) :])


def _exchangeable(pairs: list[_Pair], longest: int) -> list[_Pair]:
    """Leave out the pairs with the longest parts, until any condition with any target has at most `longest` tokens."""
    pairs = sorted(pairs, key=lambda pair: max(len(pair.condition), len(pair.target)))
    while pairs and max(len(p.condition) for p in pairs) + max(len(p.target) for p in pairs) > longest:
        pairs.pop()
    return pairs


def _groups(pairs: list[_Pair], size: int, seed: int) -> list[list[_Pair]]:
    """Divide pairs at random into groups of 2 to `size`, in which no condition and target of two pairs are a third pair."""
    groups: list[list[_Pair]] = [[] for _ in range(-(-len(pairs) // size))]
    known = {(pair.condition.tobytes(), pair.target.tobytes()) for pair in pairs}

    def clash(a: _Pair, b: _Pair) -> bool:
        return not known.isdisjoint((x.condition.tobytes(), y.target.tobytes()) for x, y in ((a, b), (b, a)))

    for i in np.random.default_rng(seed).permutation(len(pairs)):
        fitting = [group for group in groups if len(group) < size and not any(clash(pairs[i], other) for other in group)]
        if fitting:
            min(fitting, key=len).append(pairs[i])
        else:
            groups.append([pairs[i]])
    return [group for group in groups if len(group) > 1]


def _hits(bundle: Bundle, group: list[_Pair]) -> np.ndarray:
    """Return [3, pairs]: 1 where the true candidate scores highest: the target by log-probability, the target by pmi, the
    condition."""
    decoder, grammar, vocab = bundle.require("model"), Grammar(bundle.vocab), bundle.vocab
    joined = [vocab.encode(Document((*a.segments[:-1], b.segments[-1])), eos=False) for a in group for b in group]
    starts = [len(a.condition) - 1 for a in group for _ in group]
    nats = log_probabilities(decoder, grammar, joined)
    given = np.array([one[start:].sum() for one, start in zip(nats, starts, strict=True)]).reshape(len(group), -1)
    targets = [vocab.encode(Document((pair.segments[-1],)), eos=False) for pair in group]
    alone = np.array([one.sum() for one in log_probabilities(decoder, grammar, targets)])
    return np.stack([_first(given), _first(given - alone), _first(given.T)])


def _first(scores: np.ndarray) -> np.ndarray:
    """Return [n] for scores [n, n] with the true candidates on the diagonal: 1 where it is the best of its row, 1/k if it is
    one of k."""
    best = scores >= scores.max(1, keepdims=True) - TIE
    return best.diagonal() / best.sum(1)
