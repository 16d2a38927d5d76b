"""Holes: punching and mending are inverse, whatever is filled is well-formed, and filling is the naive loop over whole passes."""

import numpy as np
import pytest
import torch

from unitok.document import Document
from unitok.errors import UserError
from unitok.filling import follow_fills
from unitok.grammar import Grammar
from unitok.holes import find_holes, mend, punch, random_holes
from unitok.intervals import holds
from unitok.model import Decoder, DecoderConfig
from unitok.sample.engine import generate
from unitok.sample.running import Request


def _punched(vocab, document: Document, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    ids, placed = vocab.encode_placed(document)
    holes = random_holes(vocab, ids, placed, rng)
    return ids, punch(vocab, ids, holes)[0] if holes else ids


def test_mending_gives_back_every_document_bit_for_bit(vocab, random_document):
    grammar, with_holes = Grammar(vocab), 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        ids, punched = _punched(vocab, random_document(rng), rng)
        with_holes += len(punched) > len(ids)
        if len(punched) > len(ids):
            assert np.array_equal(mend(vocab, punched), ids)
            assert follow_fills(grammar, punched).state == "done"
    assert with_holes > 300


def test_every_target_of_a_filled_hole_is_allowed_and_says_where_it_goes(vocab, random_document):
    grammar = Grammar(vocab)
    sets = grammar.allowed_sets
    for seed in range(200):
        rng = np.random.default_rng(seed)
        _, punched = _punched(vocab, random_document(rng), rng)
        targets, positions = grammar.targets(punched), grammar.span_positions(punched)
        assert len(positions) == len(punched) == len(targets) + 1
        holes, start = find_holes(vocab, punched)
        for i in range(start, len(punched) - 1):
            assert holds(sets[targets[i]], int(punched[i + 1]))
        row = follow_fills(grammar, punched[: start + 1], complete=False) if holes else None
        for i in range(start + 1, len(punched)) if row else ():
            assert row.span_position == positions[i - 1]
            assert row.next_span_positions(1)[0] == positions[i] or holds(row._after_hole(), int(punched[i]))
            row.advance(int(punched[i]))


@pytest.fixture(scope="module")
def decoder(vocab) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(vocab.size, 64, 2, 96, 4, 4, 16, max_position_embeddings=512, span_positions=300)).eval()


def _requests(vocab, random_document, count: int, seed: int = 0) -> list[tuple[Request, int]]:
    """Requests to fill random holes, with the length of what they hold."""
    made = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        _, punched = _punched(vocab, random_document(rng), rng)
        holes, start = find_holes(vocab, punched)
        if holes and len(punched) < 400:
            made.append((Request(punched[: start + 1], None, 100 + len(punched), seed=number), len(punched) - start))
    return made


@pytest.mark.parametrize("count", [300, pytest.param(25_000, marks=pytest.mark.long)])
def test_whatever_is_filled_is_well_formed(vocab, random_document, decoder, count):
    grammar = Grammar(vocab)
    requests = [request for request, _ in _requests(vocab, random_document, count)]
    assert len(requests) > 0.8 * count
    for request, ids in zip(requests, generate(decoder, grammar, requests, batch_size=32), strict=True):
        whole = np.concatenate([request.prompt, ids])
        assert follow_fills(grammar, whole).state == "done"
        mended = mend(vocab, whole)
        grammar.check(mended)
        assert np.array_equal(vocab.encode(vocab.decode(mended)), mended)


def test_filling_is_the_naive_loop_over_whole_passes(vocab, random_document, decoder):
    grammar = Grammar(vocab)
    requests = [request for request, size in _requests(vocab, random_document, 40, seed=1) if size < 60][:12]
    greedy = {name: {"temperature": 0.0} for name in vocab.spans}
    from unitok.generation_config import SamplingParams

    filled = generate(decoder, grammar, requests, {name: SamplingParams(**given) for name, given in greedy.items()})
    for request, got in zip(requests, filled, strict=True):
        ids, state = request.prompt, follow_fills(grammar, request.prompt, complete=False)
        state = state.copy_for(request.max_new_tokens, None)
        while state.state != "done":
            positions = torch.from_numpy(grammar.span_positions(ids))[None]
            with torch.inference_mode():
                logits = decoder(torch.from_numpy(ids)[None], span_positions=positions)[0, -1].numpy()
            allowed = np.concatenate([np.arange(a, b) for a, b in state.allowed()])
            best = int(allowed[logits[allowed].argmax()])
            state.advance(best)
            ids = np.append(ids, best)
        assert ids[len(request.prompt) :].tolist() == got.tolist()


def test_what_is_no_document_with_holes_is_refused_with_its_position(vocab, random_document):
    grammar = Grammar(vocab)
    rng = np.random.default_rng(3)
    _, punched = _punched(vocab, random_document(rng), rng)
    holes, start = find_holes(vocab, punched)
    assert holes
    for ids, message in (
        (np.delete(punched, len(punched) - 1), "ends too early"),
        (np.insert(punched, start + 1, vocab.eos), "cannot stand here"),
        (np.insert(punched, 1, vocab.fills[9]), "numbered from 0"),
    ):
        with pytest.raises(UserError, match=message):
            follow_fills(grammar, ids)
