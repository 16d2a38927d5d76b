"""Promises of what tokenizers are trained on: folders, patterns, JSON Lines, archives and recipes, in order, without opening files."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from raw_data import png, table_of, tar_of, wav

from unitok.data import media_list
from unitok.data.folders import AudioDataset, ImageDataset
from unitok.data.media_list import list_media
from unitok.data.modules import ImageFiles
from unitok.errors import UserError


def names(paths, kind: str = "image", **more) -> list[str]:
    return ["/".join(file.label.parts[-2:]) for file in list_media(paths, kind, **more)]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a/1.png", "a/b/2.PNG", "3.png", "a/.hidden/4.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png())
    (tmp_path / "in" / "a" / "1.wav").write_bytes(wav())
    (tmp_path / "in" / "a" / "1.txt").write_text("a caption")
    (tmp_path / "in" / "a" / "noname").write_bytes(png())
    return tmp_path / "in"


def test_a_folder_gives_all_its_files_of_a_kind_in_order(folder):
    assert names(str(folder)) == ["in/3.png", "a/1.png", "a/noname", "b/2.PNG"]
    assert names(folder, "audio") == ["a/1.wav"]


def test_a_pattern_gives_what_it_matches_at_any_depth(folder):
    assert names(f"{folder}/**/*.png") == ["in/3.png", "a/1.png"]
    assert names(f"{folder}/a/*") == ["a/1.png", "a/noname", "b/2.PNG"]
    with pytest.raises(UserError, match="no audio files in it"):
        names(f"{folder}/**/*.png", "audio")


def test_files_are_not_opened_to_be_listed(folder, monkeypatch):
    def refuse(path: Path) -> str:
        raise AssertionError(path)

    (folder / "a" / "noname").unlink()
    monkeypatch.setattr(media_list, "sniff", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "open", refuse)
    assert len(names(str(folder))) == 3


def test_json_lines_give_the_files_that_they_name_and_the_root_lets_them_lead_elsewhere(folder, tmp_path):
    (tmp_path / "lines").mkdir()
    rows = [
        {"content": [{"type": "text", "text": "x"}, {"type": "image", "path": str(folder / "3.png")}]},
        {"file_name": str(folder / "a" / "1.png"), "text": "y"},
        {"file_name": str(folder / "a" / "1.png"), "text": "the same again"},
        {"file_name": str(folder / "a" / "b" / "2.PNG"), "split": "test"},
        {"content": [{"type": "audio", "path": str(folder / "a" / "1.wav")}]},
    ]
    lines = tmp_path / "lines" / "all.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"no image files in it \(4 files \(leaves .*`root` names another folder"):
        names(str(lines))
    assert names(str(lines), root=str(folder)) == ["in/3.png", "a/1.png"]
    assert names(str(lines), "audio", root=str(folder)) == ["a/1.wav"]
    assert names([str(lines), f"{folder}/**/2.*"], root=str(folder)) == ["in/3.png", "a/1.png", "b/2.PNG"]


def test_members_of_an_archive_are_trained_on_and_damaged_ones_replaced(folder, tmp_path):
    members = [(f"{i}.png", png(i, (32, 32))) for i in range(3)] + [("0.txt", b"a caption"), ("9.png", b"no image")]
    (tmp_path / "x.tar").write_bytes(tar_of(sorted(members)))
    data = ImageDataset(tmp_path / "x.tar", 32, False, 0)
    assert [file.member for file in data.files] == ["0.png", "1.png", "2.png", "9.png"]
    (tmp_path / "1.png").write_bytes(png(1, (32, 32)))
    alone = ImageDataset(tmp_path / "1.png", 32, False, 0)
    assert data[0, 1].equal(alone[0, 0])
    assert any(data[0, 3].equal(data[0, i]) for i in range(3))
    assert data.bad_files()[0] == 1
    (folder / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes())
    assert len(names(folder)) == 8
    (tmp_path / "x.tar.gz").write_bytes(tar_of(sorted(members), "w:gz"))
    with pytest.raises(UserError, match=r"no image files in it \(4 members of compressed archives \(decompress them"):
        names(str(tmp_path / "x.tar.gz"))


def test_tables_give_the_files_that_they_name_and_say_that_media_in_them_are_not_read(folder, tmp_path):
    pq.write_table(pa.table({"image_path": ["a/1.png", "3.png"]}), folder / "x.parquet")
    assert names(str(folder / "x.parquet")) == ["a/1.png", "in/3.png"]
    rows = [{"image": {"bytes": png(), "path": None}}]
    pq.write_table(table_of(rows), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"1 rows of tables that name no file \(only media in files and .tar archives"):
        names(str(tmp_path / "y.parquet"))


def test_a_recipe_gives_its_sources_by_weight(folder, tmp_path):
    sources = [{"path": "in/a/*", "weight": 2}, {"path": "in", "name": "all", "weight": 0.5}]
    (tmp_path / "mix.yaml").write_text(json.dumps({"sources": sources}))
    expected = ["a/1.png", "a/1.png", "a/noname", "a/noname", "b/2.PNG", "b/2.PNG", "in/3.png", "a/noname", "b/2.PNG"]
    assert names(str(tmp_path / "mix.yaml")) == expected
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(folder, tmp_path / "elsewhere" / "in")
    shutil.copy(tmp_path / "mix.yaml", tmp_path / "elsewhere")
    assert names(str(tmp_path / "elsewhere" / "mix.yaml")) == expected  # by names within the source


def test_links_that_leave_a_folder_are_left_out_and_counted(folder, tmp_path, caplog):
    secret = tmp_path / "secret"
    (secret / "media").mkdir(parents=True)
    (secret / "media" / "s.png").write_bytes(png())
    (secret / "s.tar").write_bytes(tar_of([("0.png", png())]))
    (secret / "s.jsonl").write_text(json.dumps({"file_name": "media/s.png"}))
    expected = names(folder)
    (folder / "x.tar").symlink_to(secret / "media")
    (folder / "y.tar").symlink_to(secret / "s.tar")
    (folder / "z.tar").symlink_to(secret / "gone")
    (folder / "l.png").symlink_to(secret / "media" / "s.png")
    (folder / "l.jsonl").symlink_to(secret / "s.jsonl")
    (folder / "album").symlink_to(secret / "media")
    assert names(folder) == expected
    assert "left out: 5 files (leaves the folder of its source" in caplog.text
    assert names(f"{folder}/**") == expected
    assert "left out: 6 files (leaves the folder of its source" in caplog.text
    assert len(names(folder, root=str(secret))) == len(expected) + 2  # the root lets y.tar and l.png lead there
    assert "left out: 2 files (a link to a folder: not followed); 1 files (no such file)" in caplog.text


def test_a_patterns_lines_lead_anywhere_in_its_folder(folder):
    (folder / "meta").mkdir()
    (folder / "meta" / "d.jsonl").write_text(json.dumps({"file_name": "../a/1.png"}))
    assert names(f"{folder}/meta*/*.jsonl", root="") == ["a/1.png"]


def test_splits_other_than_train_are_left_out_unless_a_source_has_no_others(folder, tmp_path, caplog):
    for split in ("val", "test"):
        (folder / split).mkdir()
        (folder / split / "0.png").write_bytes(png())
    plain = ["in/3.png", "a/1.png", "a/noname", "b/2.PNG"]
    assert names(folder) == plain
    assert "left out: 1 files of the split test, 1 files of the split validation" in caplog.text
    assert names(f"{folder}/**/*") == plain
    assert names(f"{folder}/*/0.png") == ["test/0.png", "val/0.png"]
    assert "it has no files of other splits: all are used" in caplog.text
    (folder / "rows.jsonl").write_text(json.dumps({"file_name": "a/1.png", "split": "test"}))
    assert "a/1.png" not in names(f"{folder}/**/*")  # though the pattern finds it, too


def test_what_is_not_there_or_not_local_is_one_line(tmp_path):
    with pytest.raises(UserError, match="gone: no such file or folder"):
        names(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="s3://bucket/x: tokenizers are trained on local files"):
        names("s3://bucket/x")


def test_a_pipe_is_left_out_or_a_bad_file_and_holds_nothing_up(tmp_path, caplog):
    os.mkfifo(tmp_path / "pipe.wav")
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.ones(900) / 4, 8000, subtype="FLOAT")
    data = AudioDataset(tmp_path, 8000, 1, 800, 0)
    assert "left out: 1 files (neither a file nor a folder" in caplog.text
    (tmp_path / "b.wav").unlink()
    os.mkfifo(tmp_path / "b.wav")
    assert [data[0, i].shape for i in data.order(0)] == [(1, 800), (1, 800)]
    assert data.bad_files()[0] == 1


def test_the_data_module_takes_lists_and_patterns(folder):
    module = ImageFiles([f"{folder}/a/*.png", f"{folder}/3.png"], f"{folder}/**/2.*", size=32, batch_size=2)
    assert next(iter(module.train_dataloader())).shape == (2, 3, 32, 32)
    assert len(module.validation_data()) == 1
