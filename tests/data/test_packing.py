"""Promises of packing and of the order of data: nothing lost, little wasted, a pure function of (seed, epoch, index)."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from vocabularies import make_vocab

from unitok.data.best_fit import pack
from unitok.data.loading import EndlessBatches
from unitok.data.packing import PackedDataset, shuffled
from unitok.data.shards import TokenDataset, write_dataset_json, write_shard
from unitok.document import Document, Segment
from unitok.errors import UserError


def mixed_lengths(seed=0):
    """Like scenes: captions, captions with an image, images with audio; and a few long stories."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.integers(18, 170, 9000), rng.integers(170, 1000, 600)])[rng.permutation(9600)]


@pytest.mark.parametrize("sequence_length", [1024, 4096])
def test_packing_places_every_document_once_and_wastes_less_than_a_hundredth(sequence_length):
    lengths = mixed_lengths()
    rows = pack(lengths, sequence_length)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert max(lengths[row].sum() for row in rows) <= sequence_length
    assert 1 - lengths.sum() / (sequence_length * len(rows)) < 0.01


def best_fit(lengths, sequence_length):
    """Sums of rows: one document after the other, longest first, goes into the fullest row that has room."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, row in enumerate(rows) if row + length <= sequence_length]
        if fitting:
            rows[max(fitting, key=lambda i: rows[i])] += length
        else:
            rows.append(length)
    return sorted(rows)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_those_of_best_fit(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(8, 60))
    lengths = rng.integers(1, length + 1, int(rng.integers(1, 200)))
    rows = pack(lengths, length)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert sorted(lengths[row].sum() for row in rows) == best_fit(lengths.tolist(), length)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 65_537])
def test_a_shuffled_order_is_a_permutation_of_its_key_computed_piece_by_piece(size):
    whole = shuffled(np.arange(size), size, (1, 2))
    assert sorted(whole.tolist()) == list(range(size))
    assert np.array_equal(shuffled(np.arange(size)[size // 3 :], size, (1, 2)), whole[size // 3 :])
    if size >= 64:
        other = shuffled(np.arange(size), size, (1, 3))
        assert (whole == other).mean() < 0.1
        assert abs(np.corrcoef(whole, np.arange(size))[0, 1]) < 0.3
        assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.3


class Numbers:
    """Ten samples an epoch, in two parts of six and four."""

    parts = 2

    def __init__(self):
        self.asked = []

    def order(self, epoch, part):
        self.asked.append((epoch, part))
        return np.random.default_rng(epoch).permutation(10).tolist()[6 * part : 6 + 4 * part]

    def __getitem__(self, place):
        return place


@pytest.mark.parametrize(("processes", "start"), [(1, 0), (2, 0), (4, 8), (1, 23)])
def test_any_number_of_processes_from_any_sample_sees_the_same_stream(processes, start):
    stream = [batch[0] for batch in itertools.islice(EndlessBatches(Numbers(), 1), 60)]
    assert sorted(i for _, i in stream[:10]) == list(range(10))
    parts = [iter(EndlessBatches(Numbers(), 2, start, rank, processes)) for rank in range(processes)]
    seen = []
    for _ in range(3):
        batch = [next(p) for p in parts]
        seen += [batch[rank][i] for i in range(2) for rank in range(processes)]
    assert seen == stream[start : start + len(seen)]


def test_going_on_asks_for_no_part_before_the_one_that_it_goes_on_in():
    whole = EndlessBatches(Numbers(), 1)
    stream = [batch[0] for batch in itertools.islice(whole, 60)]
    for start in (0, 5, 6, 37, 59):
        part, data = whole.part_of(start), Numbers()
        assert part.sample <= start < part.sample + 6
        found = [batch[0] for batch in itertools.islice(EndlessBatches(data, 1, start, known=part), 60 - start)]
        assert found == stream[start:]
        assert data.asked[0] == (part.epoch, part.part)


@pytest.fixture(scope="module")
def token_folder(tmp_path_factory):

    vocab, rng = make_vocab(text=300, image=64, audio=(3, 16), illegal_text=(0,)), np.random.default_rng(7)
    documents = []
    for i in range(40):
        prompt = Segment("text", rng.integers(1, 300, int(rng.integers(2, 9))), loss=False)
        image = Segment("image", rng.integers(0, 64, (3, 3)))
        audio = Segment("audio", rng.integers(0, 16, (3, 4)), loss=bool(i % 2))
        documents.append(Document((prompt, image, audio), f"d{i}"))
    folder = tmp_path_factory.mktemp("tokens")
    shards = [write_shard(folder / f"shard-0000{k}.arrow", documents[k * 20 : k * 20 + 20], vocab) for k in range(2)]
    write_dataset_json(folder, vocab, shards, {})
    return folder, documents


def test_shards_give_back_the_documents(token_folder):
    folder, documents = token_folder
    dataset = TokenDataset(folder)
    assert [dataset.document(i) for i in range(40)] == documents
    assert dataset.verify() == []


def test_a_batch_says_what_every_position_is(token_folder):
    folder, _ = token_folder
    data = PackedDataset(TokenDataset(folder), 96, seed=3, condition_dropout=0.0)
    vocab, seen = data.vocab, 0
    for index in data.order(0):
        row = data[0, index]
        at = 0
        for number, unit in enumerate(data.rows(0)[index]):
            ids, placed = data.datasets[0].ids(unit.document), data.datasets[0].placed(unit.document)
            n = len(ids)
            here = slice(at, at + n)
            assert np.array_equal(row["ids"][here], ids)
            assert np.array_equal(row["targets"][at : at + n - 1], ids[1:])
            assert np.array_equal(row["positions"][here], np.arange(n))
            assert (row["documents"][here] == number).all()
            wanted = [next((p.loss for p in placed if p.start <= t < p.start + p.length), placed[-1].loss) for t in range(1, n)]
            assert np.array_equal(row["weights"][at : at + n - 1], np.float32(wanted))
            assert row["weights"][at + n - 1] == 0  # across documents nothing is learnt
            allowed = [data.grammar.allowed_sets[k] for k in row["mask_index"][at : at + n - 1]]
            assert all(any(a <= t < b for a, b in intervals) for t, intervals in zip(ids[1:], allowed, strict=True))
            at += n
            seen += 1
        assert (row["documents"][at:] == -1).all()
        assert row["weights"][at:].sum() == 0
        assert (row["ids"][at:] == vocab.pad).all()
    assert seen == 40


def test_a_dropped_condition_is_bos_the_target_span_and_eos(token_folder):
    data = PackedDataset(TokenDataset(token_folder[0]), 96, seed=3, condition_dropout=1.0)
    vocab = data.vocab
    for unit in itertools.chain(*data.rows(0)):
        ids, weights = data.document(unit)
        assert len(ids) == unit.length  # the room that it was packed into
        *before, segment = vocab.decode(ids).segments
        assert [s.modality for s in before] == ["image"] * unit.media
        assert segment.modality in ("image", "audio")
        assert ids[0] == vocab.bos
        assert ids[-1] == vocab.eos
        learned = len(vocab.encode(Document((replace(segment, role="none"),)))) - 2
        assert weights[-1 - learned : -1].min() == 1
        assert weights[: -1 - learned].max() == 0
        data.grammar.check(ids)


@pytest.mark.parametrize("roles", [("none",) * 3, ("user", "user", "assistant"), ("assistant", "user", "assistant")])
def test_half_of_the_dropped_conditions_of_edits_keep_their_image_as_three_way_guidance_sees_it(tmp_path, vocab, roles):
    rng, documents = np.random.default_rng(0), []
    for _ in range(400):
        image, text = Segment("image", rng.integers(0, 64, (2, 3)), roles[0], False), rng.integers(1, 300, 5)
        edited = Segment("image", rng.integers(0, 64, (2, 3)), roles[2])
        documents.append(Document((image, Segment("text", text, roles[1], False), edited)))
    write_dataset_json(tmp_path, vocab, [write_shard(tmp_path / "shard-00000.arrow", documents, vocab)], {})
    data = PackedDataset(TokenDataset(tmp_path), 256, condition_dropout=1.0)
    units = list(itertools.chain(*data.rows(0)))
    assert 150 < sum(unit.media for unit in units) < 250
    for unit in units:
        first, _, last = documents[unit.document].segments
        ids, weights = data.document(unit)
        assert len(ids) == unit.length
        assert weights.sum() == len(vocab.encode(Document((replace(last, role="none"),)))) - 2  # the edited image alone
        if unit.media:
            before = vocab.encode(Document((first,)), eos=False)  # what a request is compared with
            before = np.append(before, [vocab.specials["<assistant>"]] if roles[0] == "user" else [])
            assert ids[: len(before)].tolist() == before.tolist()
            assert [s.codes.tolist() for s in vocab.decode(ids).segments] == [first.codes.tolist(), last.codes.tolist()]
        data.grammar.check(ids)
    row = data[0, 0]
    assert row["weights"].sum() > 0


def test_rows_waste_less_than_a_hundredth_also_where_conditions_are_dropped(tmp_path, vocab):
    """With roles, whose ids go with the condition; a share of the documents, other ones in each epoch, one segment of them."""
    rng, documents = np.random.default_rng(0), []
    for _ in range(3000):
        asked = Segment("text", rng.integers(1, 300, int(rng.integers(4, 50))), "user", False)
        answers = [Segment("image", rng.integers(0, 64, rng.integers(2, 7, 2)), "assistant")]
        answers += [Segment("audio", rng.integers(0, 16, (3, int(rng.integers(1, 12)))), "assistant")] * int(rng.integers(2))
        documents.append(Document((asked, *answers)))
    write_dataset_json(tmp_path, vocab, [write_shard(tmp_path / "shard-00000.arrow", documents, vocab)], {})
    data = PackedDataset(TokenDataset(tmp_path), 1024, condition_dropout=0.1)
    shortened = []
    for epoch in (0, 1):
        rows = data.rows(epoch)
        assert 1 - sum(unit.length for row in rows for unit in row) / (1024 * len(rows)) < 0.01
        assert np.mean([len(row) for row in rows]) > 8
        for index in (0, 7):
            row = data[epoch, index]
            assert (row["documents"] >= 0).sum() == sum(unit.length for unit in rows[index])
        units = list(itertools.chain(*rows))
        assert sorted(u.document for u in units) == list(range(3000))
        shortened.append({u.document for u in units if u.span >= 0})
        for unit in units[:300]:
            left = data.vocab.decode(data.document(unit)[0]).segments
            wanted = documents[unit.document].segments if unit.span < 0 else [documents[unit.document].segments[unit.span]]
            wanted = documents[unit.document].segments[1:] if unit.media else wanted
            assert [s.codes.tolist() for s in left] == [s.codes.tolist() for s in wanted]
            assert unit.span != 0  # what carries no loss is a condition
    assert all(250 < len(each) < 350 for each in shortened)
    assert 10 < len(shortened[0] & shortened[1]) < 60


def test_a_damaged_document_is_named_in_one_line(tmp_path, vocab):
    documents = [Document((Segment("image", np.full((3, 3), 5)),)) for _ in range(4)]
    shard = write_shard(tmp_path / "shard-00000.arrow", documents, vocab)
    write_dataset_json(tmp_path, vocab, [shard], {})
    good = (tmp_path / "shard-00000.arrow").read_bytes()
    code = np.int32(vocab.range("image").offset + 5).tobytes()
    for damage in (vocab.pad, 10**6, -(2**31)):
        content = good.replace(code, np.int32(damage).tobytes(), 1)
        assert content != good
        (tmp_path / "shard-00000.arrow").write_bytes(content)
        data = PackedDataset(TokenDataset(tmp_path), 64)
        with pytest.raises(UserError, match=rf"{tmp_path}: document 0 is damaged \(.*\); check with") as told:
            [data[0, index] for index in data.order(0)]
        assert "\n" not in str(told.value)
    (tmp_path / "shard-00000.arrow").write_bytes(good)
    write_dataset_json(tmp_path, vocab, [shard | {"documents": 5}], {})
    with pytest.raises(UserError, match="its shards do not match dataset.json"):
        PackedDataset(TokenDataset(tmp_path), 64)


def test_the_order_is_a_pure_function_of_seed_and_epoch(token_folder):
    dataset = TokenDataset(token_folder[0])
    one, same, other = (PackedDataset(dataset, 96, seed=seed) for seed in (1, 1, 2))
    assert one.rows(2) == same.rows(2)
    same.rows(5)  # whatever was asked for before
    assert one.rows(3) == same.rows(3)
    assert one.rows(2) != one.rows(3)
    assert one.rows(2) != other.rows(2)
    for index in one.order(1):
        for key, value in one[1, index].items():
            assert np.array_equal(value, same[1, index][key])


def test_parts_of_an_epoch_hold_every_document_once(token_folder, other_folder, monkeypatch):
    monkeypatch.setattr("unitok.data.packing.PART", 16)
    sets = [TokenDataset(token_folder[0]), TokenDataset(other_folder)]
    data, same = PackedDataset(sets, 256), PackedDataset(sets, 256)
    assert data.parts == 4
    units = list(itertools.chain(*data.rows(1)))
    assert sorted((u.source, u.document) for u in units) == [(0, i) for i in range(40)] + [(1, i) for i in range(10)]
    orders = [data.order(1, part) for part in range(4)]
    assert data.order(1) == list(itertools.chain(*orders))
    for part in orders:
        held = [unit for index in part for unit in units_of(data, 1, index)]
        assert len([u for u in held if u.source == 0]) == 10  # each data set has its share in each part
        assert len([u for u in held if u.source == 1]) in (2, 3)
    index = orders[3][-1]
    for key, value in same[1, index].items():  # as the first that is asked for
        assert np.array_equal(value, data[1, index][key])


def units_of(data, epoch, index):
    return data.rows(epoch)[data.order(epoch).index(index)]


def test_weights_by_modality_and_level_reach_the_positions(token_folder):
    weights = {"image": 0.5, "audio": 2.0, "audio.1": 0.25}
    data = PackedDataset(TokenDataset(token_folder[0]), 96, seed=3, condition_dropout=0.0, loss_weights=weights)
    seen = set()
    for unit in itertools.chain(*data.rows(0)):
        ids, factors = data.document(unit)
        trained = unit.document % 2 == 1  # only odd documents learn their audio
        for name, wanted in (("image", 0.5), ("audio.0", 2.0), ("audio.1", 0.5), ("audio.2", 2.0)):
            r = data.vocab.range(name)
            inside = (ids >= r.offset) & (ids < r.stop)
            if inside.any():
                here = wanted if trained or name == "image" else 0.0
                assert set(factors[inside]) == {np.float32(here)}
                seen.add((name, here))
    assert len(seen) == 7


def test_prompts_are_learned_as_much_as_asked_for_and_never_their_structure(token_folder):
    plain = PackedDataset(TokenDataset(token_folder[0]), 96, condition_dropout=0.0)
    both = {"loss_weights": {"audio": 0.5}, "prompt_loss_weight": {"audio": 0.2}}
    data = PackedDataset(TokenDataset(token_folder[0]), 96, condition_dropout=0.0, **both)
    body = [(r.offset, r.stop) for r in data.vocab.body("audio")]
    given = 0
    for unit in itertools.chain(*plain.rows(0)):
        (ids, before), (_, after) = plain.document(unit), data.document(unit)
        inside = np.any([(ids >= a) & (ids < b) for a, b in body], axis=0)
        prompt = inside & (before == 0)
        assert np.allclose(after[prompt], 0.5 * 0.2)
        assert np.array_equal(after[~inside], before[~inside])
        assert np.array_equal(after[inside & ~prompt], 0.5 * before[inside & ~prompt])
        given += prompt.sum()
    assert given > 0
    with pytest.raises(UserError, match="prompt_loss_weight: the vocabulary has no smell"):
        PackedDataset(TokenDataset(token_folder[0]), 96, prompt_loss_weight={"smell": 1.0})


# ---- Several data sets, long documents, mistakes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, token_folder):
    """A data set of other documents with the same vocabulary: ten longer texts."""
    vocab, rng = TokenDataset(token_folder[0]).vocab, np.random.default_rng(8)
    documents = [Document((Segment("text", rng.integers(1, 300, 200 + i)),), f"t{i}") for i in range(10)]
    folder = tmp_path_factory.mktemp("other")
    write_dataset_json(folder, vocab, [write_shard(folder / "shard-00000.arrow", documents, vocab)], {})
    return folder


def test_a_mixture_holds_each_data_set_by_its_share_of_the_ids_and_repeats_none_before_all_came(token_folder, other_folder):
    sets = [TokenDataset(token_folder[0]), TokenDataset(other_folder)]
    ids = [int(d.lengths().sum()) for d in sets]
    data = PackedDataset(sets, 256, seed=5, weights=[3, 1])
    drawn: list[list[tuple[int, int]]] = [[], []]
    for epoch in range(4):
        units = list(itertools.chain(*data.rows(epoch)))
        held = [sum(u.length for u in units if u.source == s) for s in (0, 1)]
        assert held[0] / sum(held) == pytest.approx(0.75, abs=0.05)
        assert sum(held) == pytest.approx(sum(ids), rel=0.1)
        for s in (0, 1):
            drawn[s] += sorted((u.draw, u.document) for u in units if u.source == s)
    for s, dataset in enumerate(sets):
        assert [draw for draw, _ in drawn[s]] == list(range(len(drawn[s])))  # nothing skipped between epochs
        for turn in range(len(drawn[s]) // len(dataset)):
            documents = [document for _, document in drawn[s][turn * len(dataset) : (turn + 1) * len(dataset)]]
            assert sorted(documents) == list(range(len(dataset)))
    assert len(drawn[0]) > 2 * 40  # the first goes round more than once


def test_without_shares_every_document_of_every_data_set_comes_once(token_folder, other_folder):
    data = PackedDataset([TokenDataset(token_folder[0]), TokenDataset(other_folder)], 256)
    units = list(itertools.chain(*data.rows(1)))
    assert sorted((u.source, u.document) for u in units) == [(0, i) for i in range(40)] + [(1, i) for i in range(10)]


@pytest.mark.parametrize("how", ["split", "cut", "drop"])
def test_long_documents_are_split_cut_or_dropped_as_asked_and_counted(other_folder, how, caplog):
    dataset = TokenDataset(other_folder)
    data = PackedDataset(dataset, 128, condition_dropout=0.0, long_documents=how, max_length=100) if how != "drop" else None
    if data is None:
        data = PackedDataset(dataset, 256, condition_dropout=0.0, long_documents="drop", max_length=206)
    count, done = {"split": (10, "split into pieces"), "cut": (10, "cut off there"), "drop": (5, "left out")}[how]
    assert f"{other_folder}: {count} of 10 documents have more than" in caplog.text
    assert f"they are {done}" in caplog.text
    pieces: dict[int, list[np.ndarray]] = {}
    for index in data.order(0):
        row = data[0, index]
        for number, unit in enumerate(data.rows(0)[index]):
            here = row["documents"] == number
            assert here.sum() == unit.length
            assert np.array_equal(row["positions"][here], np.arange(unit.length))
            targets = row["targets"][here]
            assert np.array_equal(targets[:-1], row["ids"][here][1:])
            assert row["weights"][here][-1] == 0
            pieces.setdefault(unit.document, []).append((unit.start, row["ids"][here]))
    for document in range(10):
        ids, found = dataset.ids(document), [part for _, part in sorted(pieces.get(document, []), key=lambda p: p[0])]
        if how == "split":
            assert np.array_equal(np.concatenate(found), ids)
        elif how == "cut":
            assert np.array_equal(found[0], ids[:100])
        else:
            assert (len(found) == 1) == (len(ids) <= 206)


def test_mistakes_are_told(token_folder, other_folder, tmp_path):
    dataset, other = TokenDataset(token_folder[0]), TokenDataset(other_folder)
    with pytest.raises(UserError, match=r"10 of 10 documents have more than 100 tokens, the longest 211"):
        PackedDataset(other, 100, long_documents="error")
    with pytest.raises(UserError, match="no documents to train on, all are too long"):
        PackedDataset(other, 100, long_documents="drop")
    with pytest.raises(UserError, match="each data set needs one, above 0"):
        PackedDataset([dataset, other], 256, weights=[1, 0])
    write_dataset_json(tmp_path, dataset.vocab, [write_shard(tmp_path / "shard-00000.arrow", [], dataset.vocab)], {})
    with pytest.raises(UserError, match=f"{tmp_path}: no documents to train on"):
        PackedDataset(TokenDataset(tmp_path), 256)

    foreign, folder = make_vocab(text=300, image=32), tmp_path / "foreign"
    folder.mkdir()
    shard = write_shard(folder / "shard-00000.arrow", [Document((Segment("text", np.arange(1, 9)),))], foreign)
    write_dataset_json(folder, foreign, [shard], {})
    with pytest.raises(UserError, match="the vocabularies differ"):
        PackedDataset([dataset, TokenDataset(folder)], 256)
