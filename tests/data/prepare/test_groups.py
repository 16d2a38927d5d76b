"""Promises of groups: never divided by a validation split, stable, counted; documents without one are split as ever."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import tar_of

from unitok.cli.inspect import inspect
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec, hash_fraction
from unitok.data.prepare.texts import read_texts
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.errors import UserError

ANIMALS, LANGUAGES = [f"animal-{i}" for i in range(40)], ("en", "fr", "de")
PAIRS = [(animal, language) for language in LANGUAGES for animal in ANIMALS]


def sides(source: Path, out: Path, bundle: Path, **spec: str) -> dict[str, str]:
    """The split of each document by its id."""
    tokenize(Plan(str(source), str(out), str(bundle), validation=0.3, spec=SourceSpec("", **spec)))
    found = {}
    for split in ("train", "validation"):
        data = TokenDataset(out, split)
        found |= {data.document(i).id: split for i in range(len(data))}
    assert len(found) == len(TokenDataset(out))
    return found


def check_whole(found: dict[str, str], separator: str = "/") -> None:
    """No animal is on both sides, and both sides have some."""
    by_animal = {animal: {side for id, side in found.items() if id.startswith(animal + separator)} for animal in ANIMALS}
    assert all(len(each) == 1 for each in by_animal.values())
    assert 2 < sum(each == {"validation"} for each in by_animal.values()) < 25


def write_lines(path: Path, animals: list[str], **fields: str) -> None:
    rows = [
        {"id": f"{animal}/{language}", "text": f"{animal} {language}"} | {key: animal + value for key, value in fields.items()}
        for animal in animals
        for language in LANGUAGES
    ]
    path.write_text("\n".join(map(json.dumps, rows)))


def test_a_field_keeps_documents_together_when_files_are_added_too(bundle_folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in" / "b.jsonl", ANIMALS, group="")
    found = sides(tmp_path / "in", tmp_path / "out", bundle_folder)
    check_whole(found)
    write_lines(tmp_path / "in" / "a.jsonl", ["cow", "hen"], group="")
    more = sides(tmp_path / "in", tmp_path / "more", bundle_folder)
    assert len(more) == len(found) + 6
    assert {id: more[id] for id in found} == found
    groups = {s: len({id.split("/")[0] for id, side in found.items() if side == s}) for s in ("train", "validation")}
    assert TokenDataset(tmp_path / "out").info["groups"] == groups
    capsys.readouterr()
    inspect(str(tmp_path / "out"), verify=True)
    printed = capsys.readouterr().out
    assert f"splits: {3 * groups['train']} train ({groups['train']} groups), {3 * groups['validation']} validation" in printed


def test_another_field_and_a_separator_of_ids_do_the_same(bundle_folder, tmp_path):
    write_lines(tmp_path / "x.jsonl", ANIMALS, subject="x")
    check_whole(sides(tmp_path / "x.jsonl", tmp_path / "field", bundle_folder, group="{subject}"))
    check_whole(sides(tmp_path / "x.jsonl", tmp_path / "ids", bundle_folder, group_separator="/"))
    with pytest.raises(UserError, match=r"no line or row has the field 'subjekt' \(group\)"):
        sides(tmp_path / "x.jsonl", tmp_path / "wrong", bundle_folder, group="subjekt")


def test_rows_of_tables_members_of_archives_and_files_have_groups(bundle_folder, tmp_path):
    columns = {"id": [f"{a}/{b}" for a, b in PAIRS], "text": ["words"] * len(PAIRS)}
    numbers = [ANIMALS.index(animal) for animal, _ in PAIRS]
    pq.write_table(pa.table(columns | {"group": numbers}), tmp_path / "x.parquet")
    check_whole(sides(tmp_path / "x.parquet", tmp_path / "rows", bundle_folder))
    (tmp_path / "x.tar").write_bytes(tar_of([(f"{a}_{b}.txt", b"words") for a, b in PAIRS]))
    check_whole(sides(tmp_path / "x.tar", tmp_path / "members", bundle_folder, group_separator="_"), "_")
    (tmp_path / "in").mkdir()
    for animal, language in PAIRS:
        (tmp_path / "in" / f"{animal}_{language}.txt").write_text("words")
    check_whole(sides(tmp_path / "in", tmp_path / "files", bundle_folder, group_separator="_"), "_")


def test_whole_numbers_as_floats_and_fields_of_records_are_groups_of_tables(bundle_folder, tmp_path):
    columns = {"id": [f"{a}/{b}" for a, b in PAIRS], "text": ["words"] * len(PAIRS)}
    numbers = [float(ANIMALS.index(animal)) for animal, _ in PAIRS]
    pq.write_table(pa.table(columns | {"group": numbers}), tmp_path / "floats.parquet")
    found = sides(tmp_path / "floats.parquet", tmp_path / "floats", bundle_folder)
    check_whole(found)
    pq.write_table(pa.table(columns | {"group": list(map(int, numbers))}), tmp_path / "whole.parquet")
    assert found == sides(tmp_path / "whole.parquet", tmp_path / "whole", bundle_folder)
    pq.write_table(pa.table(columns | {"meta": [{"spk": animal, "age": 1} for animal, _ in PAIRS]}), tmp_path / "meta.parquet")
    check_whole(sides(tmp_path / "meta.parquet", tmp_path / "record", bundle_folder, group="meta.spk"))
    kinds = pa.array([animal for animal, _ in PAIRS]).dictionary_encode()
    pq.write_table(pa.table(columns | {"group": kinds}), tmp_path / "kinds.parquet")
    check_whole(sides(tmp_path / "kinds.parquet", tmp_path / "kinds", bundle_folder))


@pytest.mark.parametrize("group", [1.5, ["a"], {"name": "a"}, "\ud800"])
def test_a_field_that_cannot_be_a_group_is_an_error(bundle_folder, tmp_path, group):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "words", "group": group}))
    with pytest.raises(UserError, match="x.jsonl, line 1: group .*: a group is a text or a whole number"):
        sides(tmp_path / "x.jsonl", tmp_path / "out", bundle_folder)
    assert list(read_texts(tmp_path / "x.jsonl")) == ["words"]  # where groups do not matter


def test_rows_without_a_value_have_no_group_and_a_group_that_is_named_must_be_there(bundle_folder, tmp_path):
    rows = [{"id": animal, "text": "words", "group": value} for animal in ANIMALS for value in (None, float("nan"))]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenize(Plan(str(tmp_path / "x.jsonl"), str(tmp_path / "out"), str(bundle_folder), validation=0.3))
    assert "groups" not in TokenDataset(tmp_path / "out").info
    with pytest.raises(UserError, match=r"no line or row has the field 'group' \(group\)"):
        sides(tmp_path / "x.jsonl", tmp_path / "named", bundle_folder, group="group")


def test_a_separator_groups_texts_of_one_base_name_too(bundle_folder, tmp_path):
    (tmp_path / "in").mkdir()
    for animal, language in PAIRS:
        (tmp_path / "in" / f"{animal}_{language}.txt").write_text("words")
        (tmp_path / "in" / f"{animal}_{language}.json").write_text('{"caption": "words"}')
    check_whole(sides(tmp_path / "in", tmp_path / "out", bundle_folder, group_separator="_"), "_")


def test_texts_of_one_base_name_stay_together(bundle_folder, tmp_path):
    (tmp_path / "in").mkdir()
    for animal in ANIMALS:
        (tmp_path / "in" / f"{animal}.txt").write_text("words")
        (tmp_path / "in" / f"{animal}.json").write_text('{"caption": "words"}')
    found = sides(tmp_path / "in", tmp_path / "out", bundle_folder)
    assert len(found) == 80
    check_whole(found, ".")


def test_documents_without_a_group_are_split_by_their_ids(bundle_folder, tmp_path):
    write_lines(tmp_path / "x.jsonl", ANIMALS)
    found = sides(tmp_path / "x.jsonl", tmp_path / "out", bundle_folder)
    assert found == {id: "validation" if hash_fraction("validation", id) < 0.3 else "train" for id in found}
    assert "groups" not in TokenDataset(tmp_path / "out").info
    with pytest.raises(AssertionError):
        check_whole(found)


def test_a_run_in_two_jobs_gives_the_bytes_of_one(bundle_folder, tmp_path):
    write_lines(tmp_path / "x.jsonl", ANIMALS, group="")
    plans = [
        Plan(str(tmp_path / "x.jsonl"), str(tmp_path / name), str(bundle_folder), 20, validation=0.3) for name in ("one", "two")
    ]
    tokenize(plans[0])
    assert tokenize(plans[1], part=(1, 2)) is None  # as a run that was stopped leaves it
    tokenize(plans[1])
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir() if f.suffix != ".log"} for n in ("one", "two"))
    assert one == two
    assert json.loads(one["dataset.json"])["groups"]["validation"] > 2


def test_a_split_that_lines_name_is_kept_and_divided_groups_are_counted(bundle_folder, tmp_path, capsys):
    rows = [{"id": str(i), "text": "words", "group": "a", "split": "train" if i else "test"} for i in range(3)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenize(Plan(str(tmp_path / "x.jsonl"), str(tmp_path / "out"), str(bundle_folder)), progress=True)
    assert "1 groups are in several splits" in capsys.readouterr().out
    assert TokenDataset(tmp_path / "out").documents_by_split() == {"train": 2, "test": 1}
