"""Promises of the vocabulary: documents and ids are inverses, ids never move, mismatches name both sides."""

import json

import numpy as np
import pytest

from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.vocab import Range, Span, Vocab


def test_ids_decode_to_the_document_they_came_from(vocab, random_document):
    rng = np.random.default_rng(0)
    for _ in range(200):
        document = random_document(rng)
        ids, placed = vocab.encode_placed(document)
        assert vocab.decode(ids, placed).segments == document.merged().segments
        assert np.array_equal(vocab.encode(vocab.decode(ids)), ids)


def test_an_image_is_begin_rows_columns_codes_end(vocab):
    ids = vocab.encode(Document((Segment("image", [[3, 1, 4], [1, 5, 9]]),)))
    names = [vocab.name_of(i) for i in ids]
    assert names == ["<bos>", "<image>", "grid:2", "grid:3", *(f"image:{c}" for c in (3, 1, 4, 1, 5, 9)), "</image>", "<eos>"]


def test_audio_is_interleaved_frame_by_frame(vocab):
    ids = vocab.encode(Document((Segment("audio", [[1, 2], [3, 4], [5, 6]]),)))
    body = [vocab.name_of(i) for i in ids[2:-2]]
    assert body == ["audio.0:1", "audio.1:3", "audio.2:5", "audio.0:2", "audio.1:4", "audio.2:6"]


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
    grown.add(Span("box", ("box",), "<box>", "</box>"), [100])
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
    with pytest.raises(UserError, match="code 0 is not a legal code of 'text'"):
        vocab.encode(Document((Segment("text", [5, 0]),)))
    assert vocab.range("text").intervals() == ((257, 556),)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([0, 7, 556, 556, 620], "does not end"),
        ([0, 7, 556], "without its header"),
        ([0, 9, 684, 700, 716, 684, 10, 1], "not whole repetitions"),
        ([0, 9, 10, 1], "not whole repetitions"),
        ([0, 9, 684, 700, 716, 1], "without its end"),
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
    other = Vocab.build(text=300, image=128, audio=(3, 16), illegal_text=(0,))
    with pytest.raises(UserError, match=r"data has range 'image' of 64 ids at 620, the bundle has 'image' of 128"):
        other.check_covers(vocab, "the bundle", "data")
    (tmp_path / "vocab.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        Vocab.load(tmp_path / "vocab.json")


def test_no_span_is_empty():
    with pytest.raises(UserError, match="empty text segment"):
        Segment("text", [])
