"""Promises of checkpoints: the newest by what it says, torn ones skipped, weights left on the disk until they are used."""

import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save

from unitok.checkpoints import check_checkpoint, load_checkpoint, newest_checkpoint, training_facts, write_checkpoint
from unitok.errors import UserError
from unitok.training.run_folder import check_unused


def test_the_newest_checkpoint_is_the_one_with_the_most_steps(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    folder.mkdir()

    def write(name: str, steps: int, mtime: int) -> Path:
        torch.save({"unitok": {"steps_done": steps}, "state_dict": {"w": torch.zeros(1000)}}, folder / name)
        os.utime(folder / name, (mtime, mtime))
        return folder / name

    write("step=90.ckpt", 90, 10)
    write("kept.ckpt", 40, 50)  # copied later
    write("of another run.ckpt", 900, 60)
    assert newest_checkpoint(tmp_path).name == "step=90.ckpt"
    write("stopped.ckpt", 100, 5)
    write("step=100.ckpt", 100, 40)
    assert newest_checkpoint(tmp_path).name == "stopped.ckpt"
    final = write("final.ckpt", 100, 1)
    assert newest_checkpoint(tmp_path).name == "final.ckpt"
    with pytest.raises(UserError, match=r"final.ckpt is of step 100, .*kept.ckpt of step 40; choose another --out"):
        check_unused(tmp_path, str(folder / "kept.ckpt"), overwrite=False)  # the later steps would be overwritten
    check_unused(tmp_path, str(final), overwrite=False)
    final.write_bytes(final.read_bytes()[:3000])
    assert newest_checkpoint(tmp_path).name == "stopped.ckpt"
    assert "final.ckpt: not a checkpoint that can be read" in caplog.text
    assert "skipped" in caplog.text


def test_a_checkpoint_and_its_run_say_what_it_was_trained_on_without_the_folders_of_a_machine(tmp_path):
    described = {"steps_done": 30, "samples_seen": 120, "budget": {"spent": 90.0}}
    path = tmp_path / "checkpoints" / "step=30.ckpt"
    assert training_facts(path, described) == {"steps": 30, "samples": 120, "minutes": 1.5}
    (tmp_path / "metrics").mkdir()
    config = "data: {class_path: unitok.data.TokenShards, init_args: {path: /home/ada/frogs, sequence_length: 1024}}"
    (tmp_path / "metrics" / "config.yaml").write_text(config)
    known = {"data": "frogs", "steps": 30, "samples": 120, "tokens": 122_880, "minutes": 1.5}
    assert training_facts(path, described) == known
    assert training_facts(path, {}) == {"data": "frogs"}


def shard(folder: Path, value: float) -> None:
    save({"state_dict": {"w": torch.full((99,), value)}}, checkpoint_id=folder, no_dist=True)
    torch.save({"unitok": {"steps_done": int(value)}}, folder / "meta.pt")


def test_a_sharded_checkpoint_is_found_after_a_kill_between_renames_and_refused_where_it_is_cut_off(tmp_path):
    path = tmp_path / "checkpoints" / "step=7.ckpt"
    shard(path.with_name(f".{path.name}.unitok-old"), 7.0)
    assert newest_checkpoint(tmp_path) == path
    assert torch.equal(load_checkpoint(path)["state_dict"]["w"], torch.full((99,), 7.0))
    (part,) = path.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"step=7.ckpt: not a sharded checkpoint that can be read \(.*is cut off"):
        check_checkpoint(path)
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_that_are_not_used_are_not_read(tmp_path):
    write_checkpoint({"unitok": {"steps_done": 3}, "used": torch.ones(9), "rest": torch.ones(16 << 20)}, tmp_path / "a.ckpt")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    assert check_checkpoint(tmp_path / "a.ckpt") == {"steps_done": 3}
    held = load_checkpoint(tmp_path / "a.ckpt")
    assert held["used"].sum() == 9
    assert resident() - before < 32 << 20
    assert held["rest"].sum() == 16 << 20
    assert resident() - before > 32 << 20  # it was there to be read


def test_a_checkpoint_that_is_read_may_be_changed_and_replaced(tmp_path):
    write_checkpoint({"w": torch.zeros(9)}, tmp_path / "a.ckpt")
    held = load_checkpoint(tmp_path / "a.ckpt")["w"]
    held += 1
    assert load_checkpoint(tmp_path / "a.ckpt")["w"].sum() == 0
    write_checkpoint({"w": torch.full((9,), 5.0)}, tmp_path / "a.ckpt")
    assert held.sum() == 9
    assert [f.name for f in tmp_path.iterdir()] == ["a.ckpt"]
