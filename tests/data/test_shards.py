"""Promises of reading: random access anywhere, in any order, from anywhere, by any program; damage is found."""

import json
import pickle
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from unitok.cli.inspect import histogram, inspect
from unitok.data.modules import TokenShards
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.errors import UserError


@pytest.fixture(scope="module")
def split_tokens(tmp_path_factory, scenes_folder, bundle_folder) -> Path:
    """A data set of several shards and two splits."""
    out = tmp_path_factory.mktemp("split") / "tokens"
    tokenize(Plan(str(scenes_folder), str(out), str(bundle_folder), documents_per_shard=16, validation=0.2))
    return out


@pytest.fixture
def remote_tokens(split_tokens):
    memory = fsspec.filesystem("memory")
    memory.put(str(split_tokens), "/tokens", recursive=True)
    yield "memory://tokens"
    memory.rm("/tokens", recursive=True)


def test_other_programs_open_the_shards_as_they_are(split_tokens, tmp_path):
    polars, datasets = pytest.importorskip("polars"), pytest.importorskip("datasets")
    data = TokenDataset(split_tokens)
    frame = polars.read_ipc(str(split_tokens / "shard-*.arrow"))
    assert frame.height == len(data)
    assert frame["tokens"][5].to_list() == data.ids(5).tolist()
    files = sorted(map(str, split_tokens.glob("shard-*.arrow")))
    read = datasets.load_dataset("arrow", data_files=files, cache_dir=str(tmp_path), split="train")
    assert len(read) == len(data)
    assert read[len(data) - 1]["tokens"] == data.ids(len(data) - 1).tolist()
    assert read[3]["spans"][0]["modality"] == data.placed(3)[0].modality


def test_a_remote_data_set_is_read_through_a_cache(split_tokens, remote_tokens, tmp_path):
    local, remote = TokenDataset(split_tokens), TokenDataset(remote_tokens, cache=tmp_path / "cache")
    assert remote.lengths().tolist() == local.lengths().tolist() == [len(local.ids(i)) for i in range(len(local))]
    assert not (tmp_path / "cache").exists()  # lengths are read without the shards
    assert remote.document(len(local) - 1) == local.document(len(local) - 1)
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1
    fsspec.filesystem("memory").rm("/tokens/shard-00000.arrow")
    last = len(local) - 1
    assert np.array_equal(TokenDataset(remote_tokens, cache=tmp_path / "cache").ids(last), local.ids(last))
    fsspec.filesystem("memory").pipe("/tokens/shard-00001.arrow", b"damaged on its way")
    with pytest.raises(UserError, match="the download is damaged"):
        TokenDataset(remote_tokens, cache=tmp_path / "cache").ids(17)
    with pytest.raises(UserError, match="no such file"):
        TokenDataset("memory://nowhere")


def test_shards_names_lead_nowhere_else(split_tokens, tmp_path):
    shutil.copytree(split_tokens, tmp_path / "evil")
    info = json.loads((tmp_path / "evil" / "dataset.json").read_text())
    for name in ("../../etc/passwd", "/etc/passwd", "shard-1.arrow/../x"):
        info["shards"][0]["file"] = name
        (tmp_path / "evil" / "dataset.json").write_text(json.dumps(info))
        with pytest.raises(UserError, match="is not the name of a shard"):
            TokenDataset(tmp_path / "evil")


def test_shuffled_reading_goes_on_where_it_was_and_is_split_over_processes(split_tokens):
    data = TokenDataset(split_tokens)
    shares = [list(data.shuffled(seed=3, epoch=1, rank=rank, world=3)) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(len(data)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert list(data.shuffled(seed=3, epoch=1, rank=1, world=3, start=4)) == shares[1][4:]
    assert list(data.shuffled(seed=3, epoch=2)) != list(data.shuffled(seed=3, epoch=1)) != list(range(len(data)))


def test_shards_are_opened_when_needed_and_never_sent_to_other_processes(split_tokens):
    data = TokenDataset(split_tokens)
    assert not data._open
    data.ids(0)
    assert list(data._open) == [0]
    assert len(pickle.dumps(data)) < 100_000
    assert np.array_equal(pickle.loads(pickle.dumps(data)).ids(20), data.ids(20))
    data.OPEN = 1
    data.ids(len(data) - 1)
    assert len(data._open) == 1
    with pytest.raises(IndexError):
        data.ids(len(data))


def test_training_reads_one_split_and_validates_on_the_other(split_tokens, tokens):
    module = TokenShards(str(split_tokens), sequence_length=512)
    train, validation = module.training_data(), module.validation_data()
    assert validation is not None
    ids = [{d.document(i).id for d in data.datasets for i in range(len(d))} for data in (train, validation)]
    assert all(ids)
    assert not ids[0] & ids[1]
    assert TokenShards(str(tokens), sequence_length=512).validation_data() is None
    assert TokenShards(str(tokens), str(tokens), sequence_length=512).validation_data() is not None


def test_verify_finds_what_was_changed(split_tokens, tmp_path):
    def changed(name: str, change) -> list[str]:
        folder = tmp_path / name
        shutil.copytree(split_tokens, folder)
        change(folder)
        return TokenDataset(folder).verify()

    def rewrite(folder: Path, column: str, change) -> None:
        path = folder / "shard-00000.arrow"
        table = pa.ipc.open_file(path).read_all()
        rows = table.to_pylist()
        change(rows)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, table.schema))

    def edit(folder: Path, change) -> None:
        info = json.loads((folder / "dataset.json").read_text())
        change(info)
        (folder / "dataset.json").write_text(json.dumps(info))

    def bad_id(rows: list[dict]) -> None:
        rows[3]["tokens"][4] = 10**6

    def bad_span(rows: list[dict]) -> None:
        rows[2]["spans"][0]["role"] = "user"

    assert changed("good", lambda folder: None) == []
    found = changed("id", lambda folder: rewrite(folder, "tokens", bad_id))
    assert any("checksum" in p for p in found)
    assert any("document 3" in p for p in found)
    assert any("document 2" in p for p in changed("span", lambda folder: rewrite(folder, "spans", bad_span)))
    counts = changed("count", lambda folder: edit(folder, lambda info: info["shards"][0].update(tokens=1)))
    assert counts == [
        f"shard-00000.arrow: it has {TokenDataset(split_tokens).info['shards'][0]['tokens']} tokens, dataset.json says 1"
    ]
    rows = changed("rows", lambda folder: edit(folder, lambda info: info["shards"][0].update(documents=3)))
    assert any("documents, dataset.json says 3" in p for p in rows)


def test_a_data_set_of_an_older_version_says_what_to_do(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"version": 1, "ids": 3, "shards": []}))
    with pytest.raises(UserError, match="data set version 1, but this unitok reads version 2; tokenize its sources again"):
        TokenDataset(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"version": 2, "shards": []}))
    with pytest.raises(UserError, match="has no vocab, documents, tokens, tokens_by_modality; it is damaged"):
        TokenDataset(tmp_path)


def test_inspect_tells_lengths_and_shows_samples(split_tokens, bundle_folder, tmp_path, capsys):
    inspect(str(split_tokens), page=tmp_path / "page.html", bundle=bundle_folder, samples=9, verify=True)
    told = capsys.readouterr().out
    held = len(TokenDataset(split_tokens, "validation"))
    assert 0 < held < len(TokenDataset(split_tokens, "train"))
    for word in (f"train, {held} validation", "median", "####", "verified"):
        assert word in told
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article>") == 9
    assert "data:image/png;base64," in page
    assert "data:audio/wav;base64," in page
    assert sum(int(line.rsplit(" ", 1)[1]) for line in histogram(np.array([3, 3, 5, 90_000])).splitlines()) == 4
    assert sum(int(line.rsplit(" ", 1)[1]) for line in histogram(np.array([7])).splitlines()) == 1
