"""Promises of the vocabulary: documents and ids are inverses, ids never move, mismatches name both sides."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from vocabularies import make_vocab

from unitok.document import ROLES, Document, Segment
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.modalities import build_vocab
from unitok.vocab import Range, Span, Vocab


def test_ids_decode_to_the_document_they_came_from(vocab, random_document):
    rng = np.random.default_rng(0)
    for _ in range(200):
        document = random_document(rng)
        ids, placed = vocab.encode_placed(document)
        assert vocab.decode(ids, placed).segments == vocab.merged(document).segments
        assert np.array_equal(vocab.encode(vocab.decode(ids)), ids)


def test_an_image_is_begin_rows_columns_codes_end(vocab):
    ids = vocab.encode(Document((Segment("image", [[3, 1, 4], [1, 5, 9]]),)))
    names = [vocab.name_of(i) for i in ids]
    assert names == ["<bos>", "<image>", "grid:2", "grid:3", *(f"image:{c}" for c in (3, 1, 4, 1, 5, 9)), "</image>", "<eos>"]


def test_audio_is_interleaved_frame_by_frame(vocab):
    ids = vocab.encode(Document((Segment("audio", [[1, 2], [3, 4], [5, 6]]),)))
    body = [vocab.name_of(i) for i in ids[2:-2]]
    assert body == ["audio.0:1", "audio.1:3", "audio.2:5", "audio.0:2", "audio.1:4", "audio.2:6"]


def test_a_token_has_one_name_also_where_codes_stand_in_another_order(vocab):
    r = vocab.range("image")
    ranges = [replace(each, permutation=tuple(range(r.size))[::-1]) if each is r else each for each in vocab.ranges]
    other = Vocab(ranges, vocab.specials, vocab.spans)
    assert other.name_of(r.offset) == f"image:{r.size - 1}"
    assert [f"<{other.name_of(id)}>" for id in range(r.offset, r.stop)] == other.names()[r.offset : r.stop]


def test_roles_are_said_when_they_change_and_read_back(vocab):
    document = Document((Segment("text", [5], "user"), Segment("text", [6], "user"), Segment("text", [7], "assistant")))
    ids = vocab.encode(document)
    assert [vocab.name_of(i) for i in ids] == ["<bos>", "<user>", "text:5", "text:6", "<assistant>", "text:7", "<eos>"]
    assert [s.role for s in vocab.decode(ids).segments] == ["user", "assistant"]


def test_ranges_stand_in_the_declared_order_and_do_not_overlap(vocab):
    assert [r.name for r in vocab.ranges] == ["special", "text", "grid", "image", "audio.0", "audio.1", "audio.2"]
    assert vocab.ranges[0].size == 256
    assert all(a.stop == b.offset for a, b in zip(vocab.ranges, vocab.ranges[1:], strict=False))


def test_a_new_modality_moves_no_old_id(vocab):
    grown = Vocab.from_manifest(vocab.to_manifest())
    grown.add(Span("box", ("box",), "<box>", "</box>"), {"box": 100})
    document = Document((Segment("text", [9]), Segment("image", [[1]]), Segment("audio", [[1], [2], [3]])))
    assert np.array_equal(grown.encode(document), vocab.encode(document))
    grown.check_covers(vocab, "the grown one", "the old one")
    boxes = Document((Segment("box", [4, 2, 4, 2]),))
    assert np.array_equal(grown.decode(grown.encode(boxes)).segments[0].codes, [[4, 2, 4, 2]])


def test_a_permuted_range_is_exact_both_ways():
    order = tuple(int(i) for i in np.random.default_rng(1).permutation(50))
    r = Range("image", "codes", 1000, 50, permutation=order)
    codes = np.arange(50)
    assert sorted(r.to_ids(codes)) == list(range(1000, 1050))
    assert np.array_equal(r.to_codes(r.to_ids(codes)), codes)


def test_control_pieces_are_never_legal(vocab):
    with pytest.raises(UserError, match="code 0 is not an allowed code of 'text'"):
        vocab.encode(Document((Segment("text", [5, 0]),)))
    assert vocab.range("text").intervals() == ((257, 556),)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([0, 7, 556, 556, 620], "does not end"),
        ([0, 7, 556], "without its header"),
        ([0, 9, 684, 700, 716, 684, 10, 1], "not whole repetitions"),
        ([0, 9, 10, 1], "not whole repetitions"),
        ([0, 9, 684, 700, 716, 1], "does not end"),
        ([0, 620, 1], "cannot stand here"),
    ],
)
def test_ids_that_no_document_encodes_to_are_refused_with_their_position(vocab, ids, says):
    assert vocab.specials["<image>"] != vocab.specials["<audio>"]
    renamed = {7: vocab.specials["<image>"], 9: vocab.specials["<audio>"], 10: vocab.specials["</audio>"]}
    with pytest.raises(UserError, match=says):
        vocab.decode(np.array([renamed.get(i, i) for i in ids]))


def test_the_manifest_survives_json_and_a_mismatch_names_both_sides(vocab, tmp_path):
    vocab.save(tmp_path / "vocab.json")
    assert Vocab.load(tmp_path / "vocab.json") == vocab
    other = make_vocab(text=300, image=128, audio=(3, 16), illegal_text=(0,))
    with pytest.raises(UserError, match=r"data has range 'image' of 64 tokens at 620, the bundle has 'image' of 128"):
        other.check_covers(vocab, "the bundle", "data")
    (tmp_path / "vocab.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        Vocab.load(tmp_path / "vocab.json")


def test_no_span_is_empty():
    with pytest.raises(UserError, match="empty text segment"):
        Segment("text", [])


# ---- Declarations: exact, or refused --------------------------------------------------------------------------------


def random_vocab(rng: np.random.Generator) -> Vocab:
    """Ranges, specials and spans of a few ids each, so that they often collide, and are often fine."""

    def some(*choices):
        return choices[rng.integers(len(choices))]

    roles = [f"<{role}>" for role in ROLES[: some(0, 4, 4, 4, 2)]]
    ends = ["<bos>", "<eos>", "<pad>", "<a>", "</a>", "<b>", "</b>"][: some(7, 7, 7, 7, 5)]
    specials = {name: int(id) for name, id in zip(roles + ends, rng.permutation(12), strict=False)}
    if rng.random() < 0.1:
        specials[some(*ends)] = some(3, 12, 14, 99, -1)
    ranges, at = [Range("special", "special", 0, 12)], 12
    for name in ("text", "grid", "x", "y", "y2")[: some(4, 5, 5)]:
        size = some(1, 3, 5, 7) if rng.random() < 0.95 else 0
        kind = name if name in ("text", "grid") else "codes"
        illegal = (int(rng.integers(size)),) if size > 1 and name != "grid" and rng.random() < 0.3 else ()
        order = tuple(int(i) for i in rng.permutation(size)) if kind == "codes" and rng.random() < 0.3 else None
        ranges.append(Range(some(*[name] * 40, "x"), kind, at - (rng.random() < 0.02), size, int(name == "y2"), illegal, order))
        at += size + some(0, 0, 2)
    spans = {"text": Span("text", some(*[("text",)] * 9, ("x",)), *some(*[(None, None)] * 9, ("<a>", "</a>")))}
    spans["x"] = Span(
        "x",
        some(*[("x",)] * 9, ("grid",)),
        "<a>",
        some(*["</a>"] * 9, None),
        some((), ("grid",), ("grid", "grid"), (), ("grid", "grid"), ("x",)),
    )
    body = some(*[("y", "y2")] * 6, ("y",), ("y",), ("y2", "y"), ("x",), ("y", "y"), ())
    ends = some(*[("<b>", "</b>")] * 9, ("<b>", "<b>"), ("<a>", "</a>"), (None, None), ("<bos>", "</b>"))
    grid = ("grid", "grid")
    header, layout = some(*[((), ""), ((), "delayed"), (grid, "")] * 3, (("y",), ""), (grid, "delayed"))
    spans["y"] = Span("y", body, *ends, header, layout=layout)
    return Vocab(ranges, specials, {m: spans[m] for m in ("text", "x", "y") if rng.random() < 0.9})


def document_of(vocab: Vocab, rng: np.random.Generator) -> Document:
    """A random document of all that the vocabulary declares; its shapes are those that `decode` gives back."""

    def codes(name, *shape):
        r = vocab.range(name)
        return rng.choice([c for c in range(r.size) if c not in r.illegal], shape)

    roles = ROLES if vocab.roles else ROLES[:1]
    segments = []
    for _ in range(int(rng.integers(1, 5))):
        span = list(vocab.spans.values())[rng.integers(len(vocab.spans))]
        length = int(rng.integers(1, 4))
        shape = [int(rng.integers(1, vocab.range(name).size + 1)) for name in span.header]
        rows = [codes(name, *(shape or [length])) for name in span.body]
        content = rows[0] if len(rows) == 1 and (span.header or not span.begin) else np.stack(rows)
        segments.append(Segment(span.modality, content, str(rng.choice(roles))))
    return Document(tuple(segments))


def test_declarations_are_exact_or_refused():
    rng, accepted, refused, made = np.random.default_rng(8), 0, set(), set()
    for _ in range(1200):
        try:
            vocab = random_vocab(rng)
        except UserError as error:
            refused.add(" ".join(w for w in str(error).split() if w.isalpha())[:40])
            continue
        if not vocab.spans:
            continue
        accepted += 1
        bodies = [name for span in vocab.spans.values() for name in span.body]
        made |= {(span.layout, len(span.body)) for span in vocab.spans.values()} | {len(set(bodies)) < len(bodies)}
        grammar = Grammar(vocab)
        assert Vocab.from_manifest(json.loads(json.dumps(vocab.to_manifest()))) == vocab
        for _ in range(3):
            document = document_of(vocab, rng)
            ids = vocab.encode(document)
            assert vocab.decode(ids).segments == vocab.merged(document).segments
            grammar.check(ids)
            row, naive = grammar.row(), []
            for id in ids[1:].tolist():
                naive.append(row.allowed())
                row.advance(id)
            assert [grammar.allowed_sets[k] for k in grammar.targets(ids)] == naive
    assert accepted > 100
    assert made == {(m, k) for m in ("raster", "interleaved", "delayed") for k in (1, 2)} | {True, False}
    assert len(refused) > 12


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a.b", "1st", "a b", ""])
def test_the_name_of_a_modality_is_an_identifier(vocab, name):
    with pytest.raises(UserError, match=r"^modality .* make a name"):
        Span(name, ("box",), "<box>", "</box>")
    manifest = vocab.to_manifest()
    manifest["spans"][0]["modality"] = name
    with pytest.raises(UserError, match=r"^modality .* make a name"):
        Vocab.from_manifest(manifest)


@pytest.mark.parametrize(
    ("span", "sizes", "says"),
    [
        (Span("image", ("image2",), "<image2>", "</image2>"), {"image2": 9}, "declared already"),
        (Span("image2", ("image",), "<image2>", "</image2>"), {"image": 9}, "range 'image' is declared twice"),
        (Span("bins", ("bins",)), {"bins": 9}, "text and bins both have no begin and end"),
        (Span("bins", ("text",)), {}, "text and bins share text"),
        (Span("bins", ("text",), "<bins>", "</bins>"), {}, "one range of kind 'codes'"),
        (Span("box", ("box",), "<box>", "<box>"), {"box": 9}, "two different ones"),
        (Span("box", ("box",), "<box>"), {"box": 9}, "a begin and an end token"),
        (Span("box", ("box",), "<image>", "</box>"), {"box": 9}, "image and box share <image>"),
        (Span("box", ("box",), "<bos>", "</box>"), {"box": 9}, "<bos> has another meaning"),
        (Span("box", ("box",), "<box>", "</box>", ("rows",)), {"box": 9}, "no range 'rows'; there are special, text"),
        (Span("box", ("box",), "<box>", "</box>", ("image",)), {"box": 9}, "no sides of a grid"),
        (Span("box", ("box",), "<box>", "</box>", ("grid",)), {"box": 9, "grid": 9}, "range 'grid' is declared twice"),
        (Span("box", ("box",), "<box>", "</box>"), {"box": 0}, "0 tokens at"),
        (Span("box", ("box",), "<box>", "</box>"), {"box": -3}, "-3 tokens at"),
        (Span("box", ("box",), "<box>", "</box>"), {"box": 2.5}, "whole numbers"),
        (Span("box", ("box",), "<box>", "</box>"), {"box": 9, "bin": 9}, "neither its header nor its body names 'bin'"),
        (Span("box", ("audio.1",), "<box>", "</box>"), {}, r"has the levels \[1\], not 0 to 0"),
        (Span("box", (), "<box>", "</box>"), {}, "at least one"),
    ],
)
def test_a_declaration_that_is_refused_leaves_the_vocabulary_as_it_was(vocab, span, sizes, says):
    before = vocab.to_manifest()
    with pytest.raises(UserError, match=says):
        vocab.add(span, sizes)
    assert vocab.to_manifest() == before


def test_a_grid_of_several_levels_comes_back_and_the_grammar_agrees(vocab):
    vocab = Vocab.from_manifest(vocab.to_manifest())
    vocab.add(Span("rq", ("rq.0", "rq.1"), "<rq>", "</rq>", ("grid", "grid")), {"rq.0": 9, "rq.1": 5})
    codes = np.stack([np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3) % 5])
    ids = vocab.encode(Document((Segment("rq", codes),)))
    cells = [name for c in range(6) for name in (f"rq.0:{c}", f"rq.1:{c % 5}")]
    assert [vocab.name_of(i) for i in ids[1:-1]] == ["<rq>", "grid:2", "grid:3", *cells, "</rq>"]
    Grammar(vocab).check(ids)
    assert np.array_equal(vocab.decode(ids).segments[0].codes, codes)
    with pytest.raises(UserError, match=r"rq codes need 2 levels and 2 dimensions, got \(2, 3\)"):
        vocab.encode(Document((Segment("rq", codes[0]),)))


def test_a_span_may_share_the_codes_of_another(vocab):
    """What an id is of follows from the begin id before it."""
    grown = Vocab.from_manifest(vocab.to_manifest())
    grown.add(Span("clip", ("image",), "<clip>", "</clip>", ("grid", "grid")), {})
    assert grown.ranges == vocab.ranges
    grammar, codes = Grammar(grown), [[3, 1, 4], [1, 5, 9]]
    clip, image = (Document((Segment("text", [5]), Segment(m, codes))) for m in ("clip", "image"))
    both = [grown.encode(document) for document in (clip, image)]
    assert np.array_equal(both[0][5:-2], both[1][5:-2])
    for document, ids in zip((clip, image), both, strict=True):
        grammar.check(ids)
        assert grown.decode(ids).segments == document.segments
        crossed = np.where(ids == grown.specials["</clip>"], grown.specials["</image>"], ids)
        assert np.array_equal(crossed, ids) == (document is image)
        if document is clip:
            with pytest.raises(UserError, match="</image> cannot stand here"):
                grammar.check(crossed)
            with pytest.raises(UserError, match="a clip span that does not end"):
                grown.decode(crossed)
    grown.check_covers(vocab, "the grown one", "the old one")


def test_instances_of_one_kind_have_ranges_and_markers_of_their_own():
    def codec(levels, size):
        return SimpleNamespace(num_codebooks=levels, codebook_size=size, fingerprint=lambda: f"{levels} x {size}")

    parts = {"speech": codec(1, 8), "music": codec(2, 4)}
    vocab = build_vocab(parts, {"speech": "audio", "music": "audio"})
    assert {name: span.kind for name, span in vocab.spans.items()} == {"speech": "audio", "music": "audio"}
    document = Document((Segment("speech", [[7, 0, 3]]), Segment("music", [[3, 1], [0, 2]]), Segment("speech", [[1]])))
    ids = vocab.encode(document)
    Grammar(vocab).check(ids)
    assert vocab.decode(ids).segments == document.segments
    assert len({r.name for name in parts for r in vocab.body(name)}) == 3
    assert len({vocab.specials[f"<{end}{name}>"] for name in parts for end in ("", "/")}) == 4


def test_special_ids_never_land_on_anothers():
    """Onto an imported layout, whose special ids are few and whose markers lie among its text."""
    ranges = [Range("special", "special", 0, 4), Range("text", "text", 4, 20, illegal=(3, 4))]
    specials = {"<bos>": 0, "<eos>": 1, "<pad>": 2, "<x>": 7, "</x>": 8}
    imported = Vocab(ranges, specials, {"text": Span("text", ("text",))})
    with pytest.raises(UserError, match="no special token is free for </audio>"):
        imported.add(Span("audio", ("a", "b"), "<audio>", "</audio>"), {"a": 8, "b": 8})
    ids = imported.encode(Document((Segment("text", [1, 2, 5]),)))
    assert np.array_equal(imported.decode(ids).segments[0].codes, [1, 2, 5])
    with pytest.raises(UserError, match="role 'user': this vocabulary has no tokens for roles"):
        imported.encode(Document((Segment("text", [1], "user"),)))
    with pytest.raises(UserError, match="special <x> is token 9, which is also an allowed one of 'text'"):
        Vocab(ranges, specials | {"<x>": 9})


def test_codes_of_another_shape_are_refused(vocab):
    for modality, codes, says in (
        ("image", np.zeros((65, 2)), r"\(65, 2\): the largest grid is 64 x 64"),
        ("image", np.zeros(4), "need 2 dimensions"),
        ("audio", np.zeros((2, 4)), r"need 3 levels, got \(2, 4\)"),
        ("audio", np.zeros(3), r"need 3 levels, got \(3,\)"),
    ):
        with pytest.raises(UserError, match=says):
            vocab.encode(Document((Segment(modality, codes),)))


def test_a_broken_vocabulary_file_is_one_line(vocab, tmp_path):
    whole, file = vocab.to_manifest(), tmp_path / "vocab.json"
    broken = [[], "text", 3, None, {}, whole | {"version": 2}, {"version": 1}, whole | {"ranges": 3}, whole | {"spans": {}}]
    broken += [whole | {"specials": [1]}, whole | {"specials": {"<bos>": "0"}}, whole | {"ranges": [{"name": "x"}]}]
    broken += [
        whole | {"ranges": [whole["ranges"][0] | {"offset": "0"}]},
        whole | {"ranges": [*whole["ranges"], whole["ranges"][1]]},
    ]
    broken += [
        whole | {"spans": [*whole["spans"], whole["spans"][0]]},
        whole | {"spans": [whole["spans"][0] | {"body": "text"}]},
    ]
    for manifest in broken:
        file.write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="vocab.json: ") as told:
            Vocab.load(file)
        assert "\n" not in str(told.value)
    file.write_text("{")
    with pytest.raises(UserError, match="vocab.json: not JSON"):
        Vocab.load(file)
    with pytest.raises(UserError, match="no such file"):
        Vocab.load(tmp_path / "none.json")
