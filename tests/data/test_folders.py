"""Promises of training on folders: a bad file is named once, counted and replaced, always by the same; too many end the run."""

import builtins
import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from unitok.data.folders import AudioDataset, ImageDataset
from unitok.data.modules import AudioFiles, ImageFiles
from unitok.errors import UserError

GOOD = 12


def write_good(folder: Path, kind: str) -> None:
    """Files that tell each other apart by one value."""
    folder.mkdir()
    for i in range(GOOD):
        if kind == "image":
            Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(folder / f"{i:02}.png")
        else:
            soundfile.write(folder / f"{i:02}.wav", np.full(900, (i + 1) / 32), 8000, subtype="FLOAT")


def write_bad(folder: Path, kind: str) -> list[str]:
    """Each in another way; -> their names. The last three are good when the folder is listed."""
    suffix = {"image": "png", "audio": "wav"}[kind]
    good = folder / f"00.{suffix}"
    whole = good.read_bytes()
    (folder / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    (folder / f"empty.{suffix}").write_bytes(b"")
    (folder / f"page.{suffix}").write_text("<html>404</html>")
    (folder / f"header.{suffix}").write_bytes(whole[:40] + b"\x00" * 60)
    names = ["cut", "empty", "page", "header"]
    if kind == "image":
        Image.fromarray(np.full((40, 40), np.nan, np.float32)).save(folder / "nan.png", format="TIFF")
        names.append("nan")
    if kind == "audio":
        soundfile.write(folder / "nan.wav", np.r_[np.zeros(500), np.nan, np.zeros(399)], 8000, subtype="FLOAT")
        soundfile.write(folder / "nothing.wav", np.zeros(0), 8000)
        names += ["nan", "nothing"]
    for name in ("gone", "text", "swapped"):
        shutil.copy(good, folder / f"{name}.{suffix}")
    (folder / ".kept").mkdir()  # none of these was to be one of the files
    shutil.copy(good, folder / ".kept" / good.name)
    (folder / "caption.txt").write_text("")
    (folder / "film.mp4").write_bytes(b"\x00" * 99)
    return [*names, "gone", "text", "swapped"]


def spoil(folder: Path, kind: str) -> None:
    """What happens to files while a run goes on."""
    suffix = {"image": "png", "audio": "wav"}[kind]
    (folder / f"gone.{suffix}").unlink()
    (folder / f"text.{suffix}").write_text("no longer")
    if kind == "image":
        soundfile.write(folder / "swapped.png", np.zeros(100), 8000, format="WAV")
    else:
        Image.new("RGB", (8, 8)).save(folder / "swapped.wav", format="PNG")


def dataset(folder: Path, kind: str):
    return ImageDataset(folder, 32, True, 0) if kind == "image" else AudioDataset(folder, 8000, 1, 800, 0, gain=(-6, 0))


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_bad_files_are_replaced_always_by_the_same_and_counted(kind, tmp_path):
    write_good(tmp_path / "in", kind)
    bad = write_bad(tmp_path / "in", kind)
    data, other = dataset(tmp_path / "in", kind), dataset(tmp_path / "in", kind)
    spoil(tmp_path / "in", kind)
    drawn = {(epoch, i): data[epoch, i] for epoch in (0, 1) for i in data.order(epoch)}
    for sample in drawn.values():
        assert sample.shape == ((3, 32, 32) if kind == "image" else (1, 800))
        assert sample.isfinite().all()
    good = {i for i, file in enumerate(data.files) if file.label.stem.isdigit()}
    replaced = [place for place in drawn if place[1] not in good]
    assert len(good) == GOOD
    assert len(replaced) == 2 * len(bad) > 0
    stand_ins = [[i for i in good if torch.equal(drawn[epoch, i], drawn[epoch, index])] for epoch, index in replaced]
    assert all(len(each) == 1 for each in stand_ins)  # samples of the same epoch
    assert len({each[0] for each in stand_ins}) > 2
    for place in reversed(drawn):  # as after a resume: what was found before must not matter
        assert torch.equal(other[place], drawn[place])
    assert data.bad_files()[0] == other.bad_files()[0] == len(bad)


def test_each_bad_file_is_named_once_and_after_a_few_they_are_only_counted(tmp_path, caplog):
    write_good(tmp_path / "in", "audio")
    bad = write_bad(tmp_path / "in", "audio")
    data = dataset(tmp_path / "in", "audio")
    for epoch in range(3):
        for i in data.order(epoch):
            assert data[epoch, i] is not None
    said = [r.getMessage() for r in caplog.records]
    named = [Path(line.split(": ")[1]).stem for line in said[:5]]
    assert len(set(named)) == 5
    assert set(named) <= set(bad[:-3])
    assert said[5:] == ["left out: more files, which are counted (bad_files)"]
    assert not any("\n" in line for line in said)
    assert data.bad_files()[0] == 6


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_file_that_may_not_be_read_is_a_bad_one(kind, tmp_path, monkeypatch, caplog):
    write_good(tmp_path / "in", kind)
    secret, real = {"image": "03.png", "audio": "03.wav"}[kind], builtins.open

    def refuse(path, *more, **how):
        if str(path).endswith(secret):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *more, **how)

    monkeypatch.setattr(builtins, "open", refuse)  # as root is never refused
    data = dataset(tmp_path / "in", kind)
    assert all(data[0, i] is not None for i in data.order(0))
    assert data.bad_files()[0] == 1
    (said,) = (r.getMessage() for r in caplog.records)
    assert secret in said
    assert "Permission denied" in said


def test_processes_that_decode_share_what_they_find_and_validation_leaves_bad_files_out(tmp_path):
    write_good(tmp_path / "in", "audio")
    bad = write_bad(tmp_path / "in", "audio")[:-3]
    found = []
    for workers in (0, 2):
        module = AudioFiles(str(tmp_path / "in"), str(tmp_path / "in"), seconds=0.1, batch_size=4, workers=workers)
        batches = [batch for batch, _ in zip(module.train_dataloader(), range(9), strict=False)]
        validated = [batch for batch in module.val_dataloader() if batch is not None]
        assert sum(len(batch) for batch in validated) == GOOD + 3
        assert module.check_files() == {"bad_files": len(bad), "val_bad_files": len(bad)}
        found.append(torch.stack(batches))
    assert torch.equal(*found)
    assert module.collate([None, None]) is None


def test_a_run_ends_where_more_files_are_bad_than_max_bad_fraction(tmp_path):
    write_good(tmp_path / "in", "image")
    for i in range(11):
        shutil.copy(tmp_path / "in" / "00.png", tmp_path / "in" / f"more-{i}.png")

    def look(**more: float) -> dict[str, float]:
        module = ImageFiles(str(tmp_path / "in"), size=32, **more)
        data = module.training_data()
        for i in data.order(0):
            data[0, i]
        return module.check_files()

    assert look(max_bad_fraction=0.0) == {"bad_files": 0}
    for i in range(10):
        (tmp_path / "in" / f"more-{i}.png").write_bytes((tmp_path / "in" / "00.png").read_bytes()[:60])
    assert look() == {"bad_files": 10}  # of 23, but 100 are asked for
    with pytest.raises(UserError, match="in: 10 files cannot be read, more than max_bad_fraction 0.05 of those"):
        look(max_bad_fraction=0.05)
    (tmp_path / "in" / "more-10.png").write_bytes(b"")
    with pytest.raises(UserError, match="in: 11 files cannot be read, more than max_bad_fraction 0.1 of those"):
        look()
    for file in (tmp_path / "in").glob("[01]*.png"):
        file.unlink()
    with pytest.raises(UserError, match="in: 100 image files in a row cannot be read"):
        look()
    with pytest.raises(UserError, match=r"max_bad_fraction 2: it must be in \[0, 1\]"):
        look(max_bad_fraction=2)


def test_images_of_a_test_split_are_not_trained_on(tmp_path):
    for name in ("train/a", "train/b", "test/c", "val/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / f"{name}.png")
    named = [f.label.name for f in ImageDataset(tmp_path, 32, False, 0).files]
    assert named == ["a.png", "b.png"]
    assert len(ImageDataset(tmp_path / "test", 32, False, 0).files) == 1
    (tmp_path / "train" / "a.png").rename(tmp_path / "a.png")
    (tmp_path / "train" / "b.png").unlink()
    assert len(ImageDataset(tmp_path, 32, False, 0).files) == 1  # also where no folder is called train
