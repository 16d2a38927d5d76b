"""Promises of packing and of the order of data: nothing lost, little wasted, a pure function of (seed, epoch, index)."""

import itertools

import numpy as np
import pytest

from unitok.data.module import EndlessBatches
from unitok.data.packing import PackedDataset, epoch_rows, pack
from unitok.data.shards import TokenDataset, write_dataset_json, write_shard
from unitok.document import Document, Segment


def test_packing_places_every_document_once_and_wastes_little():
    lengths = np.random.default_rng(0).integers(18, 170, 5000)
    rows = pack(lengths, 256)
    assert sorted(itertools.chain(*rows)) == list(range(5000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 256
    assert lengths.sum() / (256 * len(rows)) > 0.97


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(18, 170, 3000)
    same = [epoch_rows(lengths, 256, 1, 2) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*same, strict=True))
    assert not np.array_equal(epoch_rows(lengths, 256, 1, 2)[0], epoch_rows(lengths, 256, 1, 3)[0])


class Numbers:
    def order(self, epoch):
        return np.random.default_rng(epoch).permutation(10).tolist()

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


@pytest.fixture(scope="module")
def token_folder(tmp_path_factory):
    from unitok.vocab import Vocab

    vocab, rng = Vocab.build(text=300, image=64, audio=(3, 16), illegal_text=(0,)), np.random.default_rng(7)
    documents = []
    for i in range(40):
        prompt = Segment("text", rng.integers(1, 300, int(rng.integers(2, 9))), loss=False)
        picture = Segment("image", rng.integers(0, 64, (3, 3)))
        sound = Segment("audio", rng.integers(0, 16, (3, 4)), loss=bool(i % 2))
        documents.append(Document((prompt, picture, sound), f"d{i}"))
    folder = tmp_path_factory.mktemp("tokens")
    shards = [write_shard(folder / f"shard-0000{k}.arrow", documents[k * 20 : k * 20 + 20], vocab) for k in range(2)]
    write_dataset_json(folder, vocab, shards, {})
    return folder, documents


def test_shards_give_back_the_documents(token_folder):
    folder, documents = token_folder
    dataset = TokenDataset(folder)
    assert [dataset.document(i) for i in range(40)] == documents
    assert dataset.verify() == []
    shard = folder / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    good = shard.read_bytes()
    shard.write_bytes(content)
    assert any("checksum" in p for p in TokenDataset(folder).verify())
    shard.write_bytes(good)


def test_other_programs_open_the_shards(token_folder):
    import pyarrow as pa

    table = pa.ipc.open_file(token_folder[0] / "shard-00000.arrow").read_all()
    assert table.column_names == ["id", "tokens", "spans"]
    assert table.num_rows == 20


def test_a_batch_says_what_every_position_is(token_folder):
    folder, _ = token_folder
    data = PackedDataset(TokenDataset(folder), 96, seed=3, drop_condition=0.0)
    vocab, seen = data.vocab, 0
    for index in data.order(0):
        row = data[0, index]
        at = 0
        for number, document in enumerate(data.rows(0)[index].tolist()):
            ids, placed = data.dataset.ids(document), data.dataset.placed(document)
            n = len(ids)
            here = slice(at, at + n)
            assert np.array_equal(row["ids"][here], ids)
            assert np.array_equal(row["targets"][at : at + n - 1], ids[1:])
            assert np.array_equal(row["positions"][here], np.arange(n))
            assert (row["documents"][here] == number).all()
            wanted = [next((p.loss for p in placed if p.start <= t < p.start + p.length), placed[-1].loss) for t in range(1, n)]
            assert np.array_equal(row["weights"][at : at + n - 1], np.float32(wanted))
            assert row["weights"][at + n - 1] == 0  # across documents nothing is learnt
            legal = [data.grammar.kinds[k] for k in row["kinds"][at : at + n - 1]]
            assert all(any(a <= t < b for a, b in intervals) for t, intervals in zip(ids[1:], legal, strict=True))
            at += n
            seen += 1
        assert (row["documents"][at:] == -1).all()
        assert row["weights"][at:].sum() == 0
        assert (row["ids"][at:] == vocab.pad).all()
    assert seen == 40


def test_a_dropped_condition_is_bos_the_target_span_and_eos(token_folder):
    data = PackedDataset(TokenDataset(token_folder[0]), 96, seed=3, drop_condition=1.0)
    vocab = data.vocab
    for i in range(40):
        ids, weights = data.document(i, 0)
        (segment,) = vocab.decode(ids).segments
        assert segment.modality in ("image", "audio")
        assert ids[0] == vocab.bos
        assert ids[-1] == vocab.eos
        assert weights[1:-1].min() == 1
        data.grammar.check(ids)


def test_modality_weights_reach_the_positions(token_folder):
    data = PackedDataset(TokenDataset(token_folder[0]), 96, seed=3, drop_condition=0.0, weights={"image": 0.5})
    ids, weights = data.document(0, 0)
    image = data.vocab.range("image")
    inside = (ids >= image.offset) & (ids < image.stop)
    assert inside.sum() == 9
    assert set(weights[inside]) == {np.float32(0.5)}
