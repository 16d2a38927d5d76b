"""Promises of the grammar: it lets through exactly what documents encode to, keeps to budgets, and trains the same sets."""

import numpy as np
import pytest

from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.plan import PlanItem, parse_plan
from unitok.span_positions import AXES, POSITION
from unitok.vocab import Span, Vocab

PLANS = ["free", "image", "audio", "text", "text,image:2x3,audio:2", "image,text,image", "audio:4,text", "audio,audio"]


def sample(row, rng, uniform_over_intervals):
    """Random legal ids until the row is done; by interval, so that rare ids come too, or uniformly."""
    ids = []
    while row.state != "done":
        allowed = row.allowed()
        assert allowed, "a row must always have a way to go on"
        if uniform_over_intervals:
            a, b = allowed[rng.integers(len(allowed))]
            ids.append(int(rng.integers(a, b)))
        else:
            ids.append(int(rng.choice(np.concatenate([np.arange(a, b) for a, b in allowed]))))
        row.advance(ids[-1])
    return ids


@pytest.mark.parametrize("plan", PLANS)
def test_whatever_is_sampled_is_what_some_document_encodes_to_within_its_budget(vocab, plan):
    grammar, rng = Grammar(vocab), np.random.default_rng(2)
    spans = 0
    for trial in range(150):
        budget = int(rng.integers(2, 70))
        try:
            row = grammar.row(budget, parse_plan(plan, vocab))
        except UserError:
            continue  # too small for the plan: said before anything is drawn
        ids = np.array([vocab.bos, *sample(row, rng, trial % 2 == 0)])
        if ids[-1] != vocab.eos:
            ids = np.append(ids, vocab.eos)
        assert len(ids) - 1 <= budget
        grammar.check(ids)
        document = vocab.decode(ids)
        assert np.array_equal(vocab.encode(document), ids)
        spans += len(document.segments)
        if plan != "free":
            wanted = [w.modality for w in parse_plan(plan, vocab)]
            assert [s.modality for s in document.segments] == wanted
            for item, segment in zip(parse_plan(plan, vocab), document.segments, strict=True):
                assert not item.grid or segment.codes.shape == item.grid
                assert not item.repeats or segment.codes.shape[-1] == item.repeats
    assert spans > 100


def test_every_document_is_accepted_and_every_single_corruption_of_structure_is_refused(vocab, random_document):
    grammar, rng = Grammar(vocab), np.random.default_rng(3)
    structural = {vocab.specials[n] for n in ("<image>", "</image>", "<audio>", "</audio>")}
    refused = 0
    for _ in range(100):
        ids = vocab.encode(random_document(rng))
        grammar.check(ids)
        for position in [i for i, id in enumerate(ids) if id in structural]:
            with pytest.raises(UserError, match=r"position \d+"):
                grammar.check(np.delete(ids, position))
            refused += 1
    assert refused > 50


def test_the_legal_set_of_every_target_is_the_state_machines(vocab, random_document):
    grammar, rng = Grammar(vocab), np.random.default_rng(4)
    kinds = set()
    for _ in range(150):
        ids = vocab.encode(random_document(rng))
        row, naive = grammar.row(), []
        for id in ids[1:].tolist():
            naive.append(row.allowed())
            row.advance(id)
        vectorised = [grammar.allowed_sets[k] for k in grammar.targets(ids)]
        assert vectorised == naive
        kinds |= set(naive)
    assert len(kinds) > 10  # the check had work to do


def test_an_image_without_a_size_fits_what_the_rest_of_the_plan_leaves(vocab):
    grammar = Grammar(vocab)
    row = grammar.row(40, parse_plan("image,audio:4", vocab))
    row.advance(vocab.specials["<image>"])
    ((start, stop),) = row.allowed()
    # of 40: begin, 2 sides, end; then audio of 2 + 4 * 3; then eos: 21 are left for codes
    assert stop - start == 21
    row.advance(vocab.range("grid").offset + 4)  # 5 rows
    ((start, stop),) = row.allowed()
    assert stop - start == 21 // 5


@pytest.mark.parametrize("bad", ["picture", "image:0x3", "image:3", "image:99x1", "audio:zero", "text,text", "image:2x3x4"])
def test_a_plan_that_makes_no_sense_is_one_clear_line(vocab, bad):
    with pytest.raises(UserError, match="modalit"):
        parse_plan(bad, vocab, {"audio": 12.5})


def test_seconds_become_frames_of_whatever_has_a_rate(vocab):
    assert parse_plan("audio:2s", vocab, {"audio": 12.5})[0].repeats == 25
    vocab = Vocab.start()
    for name in ("speech", "music"):
        vocab.add(Span(name, (name,), f"<{name}>", f"</{name}>", kind="audio"), {name: 8})
    rates = {"speech": 12.5, "music": 25.0}
    plan = parse_plan("speech:2s,music:1s", vocab, rates)
    assert plan == [PlanItem("speech", repeats=25), PlanItem("music", repeats=25)]
    ids = np.array([vocab.bos, *sample(Grammar(vocab).row(60, plan), np.random.default_rng(0), False), vocab.eos])
    assert [(s.modality, s.codes.shape) for s in vocab.decode(ids).segments] == [("speech", (1, 25)), ("music", (1, 25))]
    for item in ("speech:2s", "music:s"):
        with pytest.raises(UserError, match="write free, or a plan"):
            parse_plan(item, vocab, {"music": 25.0})


def test_places_count_from_the_begin_of_each_image_and_sound(vocab, random_document):
    grammar, rng = Grammar(vocab), np.random.default_rng(5)
    counted = 0
    for _ in range(60):
        ids, placed = vocab.encode_placed(random_document(rng))
        wanted = np.zeros(len(ids), np.int64)
        for p in placed:
            if p.modality != "text":
                start = p.start + (ids[p.start] in vocab.roles)
                wanted[start : p.start + p.length] = 1 + np.arange(p.start + p.length - start)
                counted += 1
        assert np.array_equal(grammar.span_positions(ids) & POSITION, wanted)
    assert counted > 30


@pytest.mark.parametrize("group", [0, 2])
def test_codes_know_their_frame_row_and_column(vocab, group):
    facts, vocab = (7, 5) if group else (7,), Vocab.from_manifest(vocab.to_manifest())
    vocab.add(
        Span("video", ("image",), "<video>", "</video>", ("fps", "frames", "grid", "grid"), facts=len(facts), group=group),
        {"fps": 60, "frames": 64},
    )
    grids = 3 if group else 5
    segments = (
        Segment("video", np.zeros((grids, 2, 4)), facts=facts),
        Segment("text", np.array([5, 6])),
        Segment("image", np.zeros((3, 2))),
        Segment("audio", np.zeros((3, 4))),
    )
    ids = vocab.encode(Document(segments))
    place = Grammar(vocab).span_positions(ids)
    found = [tuple(int(p) >> at & most for at, most in AXES) for p in place if p > POSITION]
    wanted = [(f, r, c) for f in range(1, grids + 1) for r in (1, 2) for c in range(1, 5)]
    wanted += [(grids + 1, 1, 1)]  # the end token, as if another frame began
    wanted += [(1, r, c) for r in (1, 2, 3) for c in (1, 2)] + [(2, 1, 1)]
    wanted += [(f, level, 1) for f in range(1, 5) for level in (1, 2, 3)] + [(5, 1, 1)]
    assert found == wanted
    row = Grammar(vocab).row()
    assert [0, *(row.advance(int(id)) for id in ids[1:-1])] == place[:-1].tolist()
