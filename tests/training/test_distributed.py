"""Promises of several processes: two train like one, go on as one or two, and sharded parameters change nothing."""

import csv
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from fitting import weights
from launch import run_processes

from unitok.api import Unitok
from unitok.bundle import make_bundle
from unitok.checkpoints import is_sharded, load_checkpoint, newest_checkpoint
from unitok.configs import CONFIGS
from unitok.errors import UserError
from unitok.training.fit import run_lightning

CONFIG = CONFIGS / "scenes" / "decoder.yaml"
DDP = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.init_args.batch_size", "2"]
SHARDED = [
    *("--trainer.devices", "2", "--data.init_args.batch_size", "2"),
    *("--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"),
    *("--trainer.strategy.init_args.data_parallel_size", "2", "--trainer.strategy.init_args.tensor_parallel_size", "1"),
]


def arguments(out: Path, data: Path, steps: int, *more: str) -> list[str]:
    return [
        *("fit", "--config", str(CONFIG), "--out", str(out), "--data.init_args.path", str(data)),
        *("--model.init_args.minutes", "null", "--model.init_args.steps", str(steps), "--data.init_args.batch_size", "4"),
        *("--model.init_args.decoder.hidden_size", "32", "--model.init_args.decoder.num_hidden_layers", "2"),
        *(
            "--data.init_args.sequence_length",
            "192",
            "--trainer.enable_progress_bar",
            "false",
            "--model.init_args.log_every",
            "1",
        ),
        *more,
    ]


def losses(out: Path, name: str = "loss") -> list[float]:
    return [float(row[name]) for row in csv.DictReader(open(out / "metrics" / "metrics.csv")) if row.get(name)]


def test_two_processes_train_like_one_with_the_double_batch_and_one_goes_on_where_two_stopped(tmp_path, tokens):
    watched = ["--data.init_args.val_path", str(tokens), "--data.init_args.validations", "2"]
    watched += ["--data.init_args.val_samples", "5"]
    run_lightning(arguments(tmp_path / "one", tokens, 8, *watched))
    run_processes(arguments(tmp_path / "two", tokens, 8, *DDP, *watched, "--trainer.max_steps", "5"))
    assert load_checkpoint(newest_checkpoint(tmp_path / "two"))["unitok"]["samples_seen"] == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one")[:5], rel=1e-4)
    (one, _), (two,) = losses(tmp_path / "one", "val_loss"), losses(tmp_path / "two", "val_loss")
    assert two == pytest.approx(one, rel=1e-4)  # five rows: in the second batch one of the processes has none
    run_lightning(arguments(tmp_path / "two", tokens, 8, "--resume", "auto"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3, msg=name)


OWN_DATA = """
import lightning as L
import torch
from torch.utils.data import DataLoader

def noted(items):
    with open(f"seen-{torch.distributed.get_rank()}", "a") as file:
        file.writelines(f"{number}\\n" for number, _ in items)
    return torch.stack([image for _, image in items])

class Numbered(L.LightningDataModule):
    def train_dataloader(self):
        images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return DataLoader([*enumerate(images)], batch_size=4, shuffle=True, collate_fn=noted)
"""


def test_two_processes_divide_data_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN_DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    run_processes([
        *("fit", "--config", str(CONFIGS / "scenes" / "image.yaml"), "--out", str(tmp_path / "run"), "--data", "own.Numbered"),
        *("--model.init_args.minutes", "null", "--model.init_args.steps", "2", "--trainer.enable_progress_bar", "false"),
        *("--trainer.devices", "2", "--trainer.strategy", "ddp"),
    ])  # fmt: skip
    first, second = ((tmp_path / f"seen-{rank}").read_text().split() for rank in (0, 1))
    assert set(first).isdisjoint(second)


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--model.init_args.ema_decay", "0.8", "--model.init_args.accumulate_grad_batches", "2"],
        ["--model.init_args.muon_every", "2"],
    ],
)
def test_sharded_parameters_train_like_whole_ones_resume_and_become_a_bundle(more, tmp_path, tokens, bundle_folder):
    import shutil

    run_processes(arguments(tmp_path / "whole", tokens, 8, *DDP, *more))
    run_processes(arguments(tmp_path / "sharded", tokens, 8, *SHARDED, *more, "--trainer.max_steps", "5"))
    assert is_sharded(newest_checkpoint(tmp_path / "sharded"))
    run_processes(arguments(tmp_path / "sharded", tokens, 8, *SHARDED, *more, "--resume", "auto"))
    assert [f.name for f in (tmp_path / "sharded" / "checkpoints").iterdir()] == ["final.ckpt"]
    whole, sharded = weights(tmp_path / "whole"), weights(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    print("largest difference:", max(float((whole[name] - sharded[name]).abs().max()) for name in whole))
    for name, tensor in whole.items():
        torch.testing.assert_close(sharded[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
    shutil.copytree(bundle_folder, tmp_path / "bundle")
    make_bundle(tmp_path / "bundle", {"model": tmp_path / "sharded"})
    state = Unitok.from_pretrained(tmp_path / "bundle").model.state_dict()
    prefix = "average.module." if "--model.init_args.ema_decay" in more else "decoder."
    assert all(torch.equal(tensor, sharded[f"{prefix}{name}"]) for name, tensor in state.items())


@pytest.mark.long
def test_four_sharded_processes_train_like_one_and_two_go_on_where_they_stopped(tmp_path, tokens):
    run_lightning(arguments(tmp_path / "one", tokens, 8))
    four = [{"2": "4"}.get(word, word) for word in SHARDED]  # processes, and their share of the data
    four[four.index("--data.init_args.batch_size") + 1] = "1"
    run_processes(arguments(tmp_path / "four", tokens, 8, *four, "--trainer.max_steps", "5"))
    assert load_checkpoint(newest_checkpoint(tmp_path / "four") / "meta.pt")["unitok"]["samples_seen"] == 20
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one")[:5], rel=1e-3)
    run_processes(arguments(tmp_path / "four", tokens, 8, *SHARDED, "--resume", "auto"))
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one")[5:], rel=1e-3)
    one, more = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name, tensor in one.items():
        torch.testing.assert_close(more[name], tensor, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.long
def test_two_processes_with_dropout_resume_bit_for_bit(tmp_path, tokens):
    drop = ["--model.init_args.decoder.dropout", "0.2"]
    run_processes(arguments(tmp_path / "uncut", tokens, 8, *DDP, *drop))
    run_processes(arguments(tmp_path / "cut", tokens, 8, *DDP, *drop, "--trainer.max_steps", "5"))
    run_processes(arguments(tmp_path / "cut", tokens, 8, *DDP, *drop, "--resume", "auto"))
    uncut, cut = weights(tmp_path / "uncut"), weights(tmp_path / "cut")
    for name, tensor in uncut.items():
        assert torch.equal(cut[name], tensor), name


def test_an_index_that_names_something_else_is_refused_without_running_it(tmp_path):
    import pickle

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    class Attribute:  # what an enum's member looks like in Python 3.11.2
        def __reduce__(self):
            return (getattr, (Path, "touch"))

    folder = tmp_path / "run" / "checkpoints" / "final.ckpt"
    folder.mkdir(parents=True)
    torch.save({}, folder / "meta.pt")
    for harm in (Harm(), Attribute()):
        (folder / ".metadata").write_bytes(pickle.dumps(harm))
        with pytest.raises(UserError, match="not a sharded checkpoint that can be read .it names"):
            load_checkpoint(folder)
    assert newest_checkpoint(tmp_path / "run") is None
    (folder / ".metadata").unlink()
    torch.distributed.checkpoint.save(  # PyTorch's own loading would unpickle what is no tensor
        {"state_dict": {"x": torch.zeros(2)}, "optimizer_0": {"lr": Harm()}}, checkpoint_id=folder, no_dist=True
    )
    with pytest.raises(UserError, match="not a sharded checkpoint that can be read"):
        load_checkpoint(folder)
    assert not (tmp_path / "harm").exists()
    torch.distributed.checkpoint.save(
        {"state_dict": {"x": torch.ones(2)}, "optimizer_0": {"lr": 0.5}}, checkpoint_id=folder, no_dist=True
    )
    assert torch.equal(load_checkpoint(folder)["state_dict"]["x"], torch.ones(2))


COUNTED = """
from pathlib import Path
from unitok.data.modules import ImageFiles

class Counted(ImageFiles):
    def _open(self, path, training):
        with open(Path(__file__).parent / "listed", "a") as file:
            file.write(f"{self.trainer.global_rank} {path}\\n")
        return super()._open(path, training)
"""


@pytest.mark.parametrize("folder", ["images", "nothing"])
def test_files_are_listed_by_the_first_process_for_all(folder, tmp_path, scenes_folder, monkeypatch):
    (tmp_path / "counted.py").write_text(COUNTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    (tmp_path / "nothing").mkdir()
    path = scenes_folder / "images" if folder == "images" else tmp_path / "nothing"
    words = ["fit", "--config", str(CONFIGS / "scenes" / "image.yaml"), "--out", str(tmp_path / "run")]
    words += ["--model.init_args.minutes", "null", "--model.init_args.steps", "2", "--data.class_path", "counted.Counted"]
    words += ["--data.init_args.path", str(path), "--data.init_args.val_path", str(path)]
    words += ["--data.init_args.workers", "1", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    if folder == "images":
        run_processes(words)
        assert (tmp_path / "listed").read_text() == f"0 {path}\n" * 2  # to train on, and to validate on
    else:
        with pytest.raises(AssertionError, match="nothing: no image files in it"):
            run_processes(words, 60)
