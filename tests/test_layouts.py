"""Promises of layouts: codes and their order are inverses, and the grammar knows of each exactly what loops over all orders say."""

from itertools import pairwise

import numpy as np
import pytest

from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.layouts import Delayed, Interleaved, Raster
from unitok.plan import PlanItem
from unitok.vocab import Span, Vocab

MAKE = {"raster": Raster, "interleaved": Interleaved, "delayed": Delayed}
LAYOUTS = [("raster", 1), ("raster", 3), ("interleaved", 1), ("interleaved", 3), *(("delayed", k) for k in (1, 2, 3, 4))]
OPEN = [(name, levels) for name, levels in LAYOUTS if name != "raster"]


def naive_order(name: str, levels: int, units: int) -> list[tuple[int, int]]:
    """(level, unit) of each code, as the layouts are described."""
    if name == "delayed":
        steps = range(units + levels - 1)
        return [(level, step - level) for step in steps for level in range(levels) if 0 <= step - level < units]
    return [(level, unit) for unit in range(units) for level in range(levels)]


def levels_of(name: str, levels: int, units: int) -> tuple[int, ...]:
    return tuple(level for level, _ in naive_order(name, levels, units))


def add_span(vocab: Vocab, name: str, layout: str, levels: int, size: int, sides: int = 3) -> None:
    body = tuple(f"{name}.{level}" for level in range(levels))
    header = ("grid", "grid") if layout == "raster" else ()
    span = Span(name, body, f"<{name}>", f"</{name}>", header, layout=layout)
    vocab.add(span, dict.fromkeys(header, sides) | dict.fromkeys(body, size))


def every_layout() -> Vocab:
    """Text, a span of each layout, and two that share the codes of one."""
    vocab = Vocab.start()
    vocab.add(Span("text", ("text",)), {"text": 6}, (2,))
    for layout, levels in LAYOUTS:
        add_span(vocab, f"{layout}{levels}", layout, levels, 4)
    vocab.add(Span("clip", ("raster1.0",), "<clip>", "</clip>", ("grid", "grid", "grid")), {})
    vocab.add(Span("strip", ("raster1.0",), "<strip>", "</strip>"), {})
    return vocab


def random_codes(vocab: Vocab, name: str, rng: np.random.Generator) -> np.ndarray:
    span = vocab.span(name)
    shape = tuple(rng.integers(1, 4, len(span.header))) if span.header else (int(rng.integers(1, 7)),)
    if not span.begin:
        return rng.integers(3, 6, shape)
    return rng.integers(0, 4, shape if span.header and len(span.body) == 1 else (len(span.body), *shape))


def random_document(vocab: Vocab, rng: np.random.Generator) -> Document:
    names = rng.choice(list(vocab.spans), rng.integers(1, 6))
    return Document(tuple(Segment(str(n), random_codes(vocab, n, rng), str(rng.choice(["none", "user"]))) for n in names))


# ---- Codes and their order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "levels"), LAYOUTS)
@pytest.mark.parametrize("units", [1, 2, 3, 4, 6])
def test_codes_stand_in_the_order_that_the_layout_says_and_come_back(name, levels, units):
    if name == "raster":
        layout, sides, shape = Raster(levels, 2), (units, 2), (levels, units, 2)[levels == 1 :]
        order, row = naive_order(name, levels, 2 * units), 2
    else:
        layout, sides, shape = MAKE[name](levels), (), (levels, units)
        order, row = naive_order(name, levels, units), 1
    codes = np.arange(100, 100 + np.prod(shape)).reshape(shape)
    by_level = codes.reshape(levels, -1)
    rows = layout.by_level(codes)[0]
    flat, each = layout.flatten(rows), layout.levels_and_units(rows.shape[1])[0]
    assert list(zip(flat.tolist(), each.tolist(), strict=True)) == [(by_level[k, n], k) for k, n in order]
    assert np.array_equal(layout.unflatten(flat, each, sides), codes)
    for count in range(1, len(flat) + 1):
        whole = 0  # units of which all levels have come
        while {(k, whole) for k in range(levels)} <= set(order[:count]):
            whole += 1
        rows = whole // row
        first = codes[:, :rows] if levels > 1 or name != "raster" else codes[:rows]
        assert np.array_equal(layout.partial(flat[:count], each[:count], sides), first)
    shorter = [
        len(naive_order(name, levels, n))
        for n in range(1, units)
        if levels_of(name, levels, n) == levels_of(name, levels, units)[: n * levels]
    ]
    for count in set(range(len(flat))) - set(() if name == "raster" else shorter):
        with pytest.raises(UserError, match="not whole repetitions"):
            layout.unflatten(flat[:count], each[:count], sides)


@pytest.mark.parametrize(("name", "levels"), OPEN)
def test_a_share_of_a_span_is_all_codes_before_another_unit(name, levels):
    layout = MAKE[name](levels)
    for kept in range(1, 6):
        order = naive_order(name, levels, 9)
        expected = next(i for i, (_, unit) in enumerate(order) if unit == kept)
        assert layout.begun(np.zeros((levels, 9)), kept / 9) == layout.prefix(kept) == expected
    assert Raster(2, 2).begun(np.zeros((2, 4, 3)), 0.5) == 2 * 2 * 3
    assert Raster(1, 2).begun(np.zeros((4, 3)), 0.01) == 3
    assert (Raster(2, 2).period((4, 3)), layout.period(())) == (6, levels)


# ---- The grammar of a layout: all that it lets through, against all that there is ------------------------------------


def bodies(row, vocab: Vocab) -> set[tuple[int, ...]]:
    """All ways to go on to the end, each code's level (a vocabulary with one code per level)."""
    found, ways = set(), [(row, ())]
    levels = {r.offset: r.level for r in vocab.ranges if r.kind == "codes"}
    while ways:
        here, so_far = ways.pop()
        if here.state == "done":
            found.add(so_far)
            continue
        ids = [id for a, b in here.allowed() for id in range(a, b)]
        assert ids, "a row must always have a way to go on"
        for id in ids:
            there = here.copy()
            there.advance(id)
            ways.append((there, (*so_far, levels[id]) if id in levels else so_far))
    return found


@pytest.mark.parametrize(("name", "levels"), OPEN)
def test_the_grammar_lets_through_every_whole_span_that_fits_and_nothing_else(name, levels):
    vocab = Vocab.start()
    add_span(vocab, "x", name, levels, 1)
    grammar, orders = Grammar(vocab), {n: levels_of(name, levels, n) for n in range(1, 22)}
    for budget in range(3 + levels, 24):  # begin, codes, end, eos
        fitting = {order for order in orders.values() if len(order) + 3 <= budget}
        assert bodies(grammar.row(budget, [PlanItem("x")]), vocab) == fitting
        if budget >= 5 + 3 * levels:
            pairs = {order + orders[2] for order in fitting if len(order) + 5 + 2 * levels <= budget}
            assert bodies(grammar.row(budget, [PlanItem("x"), PlanItem("x", repeats=2)]), vocab) == pairs
    for n, order in orders.items():
        assert bodies(grammar.row(None, [PlanItem("x", repeats=n)]), vocab) == {order}
        with pytest.raises(UserError, match="is too small"):
            grammar.row(len(order) + 2, [PlanItem("x", repeats=n)])


@pytest.mark.parametrize(("name", "levels"), OPEN)
def test_a_begun_span_goes_on_in_every_way_that_fits_it_and_in_no_other(name, levels):
    vocab = Vocab.start()
    add_span(vocab, "x", name, levels, 1)
    grammar, orders = Grammar(vocab), {n: levels_of(name, levels, n) for n in range(1, 9)}
    refused = 0
    for n in range(1, 6):
        ids = vocab.encode(Document((Segment("x", np.zeros((levels, n))),)))
        planned = grammar.row(None, [PlanItem("x", repeats=n)])
        for count in range(len(orders[n]) + 1):
            planned.advance(int(ids[1 + count]))  # its begin, then codes
            prefix, followed = orders[n][:count], grammar.follow(ids[: 2 + count], complete=False)
            rest = {m: order[count:] for m, order in orders.items() if order[:count] == prefix}
            budget = 2 + max(len(order) for m, order in rest.items() if m < 7)
            for row in (followed, planned):
                free = bodies(row.copy_for(budget, [PlanItem("x")]), vocab)
                assert free == {order for order in rest.values() if len(order) + 2 <= budget}
                for m in orders:
                    if m in rest:
                        assert bodies(row.copy_for(None, [PlanItem("x", repeats=m)]), vocab) == {rest[m]}
                        assert row.copy_for(None, [PlanItem("x", repeats=m)]).least == len(rest[m]) + 2
                    else:
                        refused += 1
                        with pytest.raises(UserError, match=f"the plan wants {m} frames of x, "):
                            row.copy_for(None, [PlanItem("x", repeats=m)])
    assert refused > 20


def test_every_layout_comes_back_and_its_legal_sets_are_the_state_machines():
    vocab, rng = every_layout(), np.random.default_rng(6)
    grammar, kinds = Grammar(vocab), set()
    assert Vocab.from_manifest(vocab.to_manifest()) == vocab
    for _ in range(300):
        document = random_document(vocab, rng)
        ids = vocab.encode(document)
        assert vocab.decode(ids).segments == vocab.merged(document).segments
        grammar.check(ids)
        row, naive, span_positions = grammar.row(), [], [0]
        for id in ids[1:].tolist():
            naive.append(row.allowed())
            span_positions.append(row.advance(id))
        assert [grammar.allowed_sets[k] for k in grammar.targets(ids)] == naive
        assert grammar.span_positions(ids).tolist() == span_positions
        kinds |= set(naive)
    assert len(kinds) > 30


def test_a_code_too_few_too_many_or_in_anothers_place_is_refused_and_marked():
    vocab, rng = every_layout(), np.random.default_rng(7)
    grammar, refused, marked = Grammar(vocab), 0, 0
    for _ in range(60):
        name = str(rng.choice([m for m, span in vocab.spans.items() if span.begin]))
        ids = vocab.encode(Document((Segment(name, random_codes(vocab, name, rng)),)))
        at = int(rng.integers(2, len(ids) - 2))
        swapped = ids.copy()
        swapped[[at, at + 1]] = ids[[at + 1, at]]
        for damaged in (np.delete(ids, at), np.insert(ids, at, vocab.bos), swapped):
            try:
                document = vocab.decode(damaged)
            except UserError:
                with pytest.raises(UserError, match=r"position \d+"):
                    grammar.check(damaged)
                refused += 1
            else:
                assert np.array_equal(vocab.encode(document), damaged)
                grammar.check(damaged)
        inserted = np.insert(ids, at, vocab.bos)  # what packing looks at
        legal = [
            any(a <= id < b for a, b in grammar.allowed_sets[k])
            for k, id in zip(grammar.targets(inserted), inserted[1:], strict=True)
        ]
        marked += not all(legal)
    assert refused > 100
    assert marked == 60


@pytest.mark.parametrize("budget", [None, 60])
def test_what_is_known_ahead_is_what_comes_and_taking_at_once_is_taking_one_by_one(budget):
    vocab, rng = every_layout(), np.random.default_rng(8)
    grammar, stretches = Grammar(vocab), 0
    for _ in range(150):
        plan = [PlanItem(str(m)) for m in rng.choice(list(vocab.spans), 3)]
        plan = [item for before, item in pairwise([None, *plan]) if item != before]
        plan = [
            PlanItem(w.modality, repeats=3) if rng.random() < 0.3 and not vocab.span(w.modality).header else w for w in plan
        ]
        row, ids = grammar.row(budget, plan), [vocab.bos]
        while row.state != "done" and len(ids) < 300:
            sets, one = row.ahead(7), row.copy()
            drawn = [int(rng.choice([id for a, b in intervals for id in range(a, b)])) for intervals in sets]
            for id, intervals in zip(drawn, sets, strict=True):
                assert one.allowed() == intervals
                place = one.advance(id)
            assert row.take(drawn) == place
            assert vars(row) | {"grammar": None} == vars(one) | {"grammar": None}
            ids += drawn
            assert place == grammar.span_positions(np.array(ids))[-1]
            stretches += len(sets) > 1
        if row.state == "done":
            ids += [vocab.eos] if ids[-1] != vocab.eos else []
            grammar.check(np.array(ids))
            assert [s.modality for s in vocab.decode(np.array(ids)).segments] == [item.modality for item in plan]
    assert stretches > 200


# ---- Declaring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "header"), [("raster", ()), ("delayed", ("grid", "grid")), ("interleaved", ("grid",)), ("spiral", ())]
)
def test_a_layout_that_does_not_fit_its_span_is_refused(layout, header):
    with pytest.raises(UserError, match="choose raster with a header, interleaved or delayed without"):
        Span("x", ("x",), "<x>", "</x>", header, layout=layout)


def test_a_manifest_without_layouts_is_read_as_it_was_meant(vocab):
    old = vocab.to_manifest()
    old["spans"] = [{key: value for key, value in span.items() if key not in ("layout", "kind")} for span in old["spans"]]
    assert Vocab.from_manifest(old) == vocab
    assert [span.layout for span in vocab.spans.values()] == ["interleaved", "raster", "interleaved"]
