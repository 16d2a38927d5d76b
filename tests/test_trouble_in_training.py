"""Promises of training where something is wrong: said by name, in one line, with the last good checkpoint in place."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from fitting import Poisoned, arguments, weights

from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.data.packing import PackedDataset
from unitok.errors import UserError
from unitok.fit import run_lightning


def test_a_checkpoint_of_another_architecture_or_vocabulary_is_refused_by_name(tmp_path, tokens):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 1))
    with pytest.raises(UserError, match="decoder.intermediate_size is 64, the checkpoint has 384"):
        run_lightning(
            arguments(
                "decoder", tmp_path / "run", tokens, 3, "--resume", "auto", "--model.init_args.decoder.intermediate_size", "64"
            )
        )


def test_documents_longer_than_the_decoder_takes_are_an_error_before_training(tmp_path, tokens):
    with pytest.raises(UserError, match=r"documents of up to \d+ ids, model.decoder.max_position_embeddings is 16: raise it"):
        run_lightning(
            arguments("decoder", tmp_path / "run", tokens, 2, "--model.init_args.decoder.max_position_embeddings", "16")
        )
    assert not (tmp_path / "run").exists()


# ---- Skipped batches, averages, starting from something ---------------------------------------------------------------


def test_a_batch_that_gives_nan_is_skipped_and_said(tmp_path, tokens, monkeypatch, caplog):
    Poisoned(monkeypatch, {3, 5})
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 8))
    assert "step 3: skipped a batch, its gradient's norm is nan" in caplog.text
    saved = load_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert saved["unitok"]["extra"]["skipped"] == 2
    assert saved["unitok"]["steps_done"] == 8
    assert all(t.isfinite().all() for t in saved["state_dict"].values())


def test_five_bad_batches_in_a_row_stop_the_run_with_its_checkpoint_in_place(tmp_path, tokens, monkeypatch):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2))
    before = weights(tmp_path / "run")
    Poisoned(monkeypatch, set(range(1, 20)))
    with pytest.raises(UserError, match="step 7: 5 batches in a row with gradients of norm nan"):
        run_lightning(arguments("decoder", tmp_path / "run", tokens, 20, "--resume", "auto"))
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, before[name])


def test_where_there_is_no_room_the_old_checkpoint_stays(tmp_path, tokens):
    """A limit on the size of files stands for a full disk: writing fails in the middle."""
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2))
    size = (tmp_path / "run" / "checkpoints" / "final.ckpt").stat().st_size
    before = weights(tmp_path / "run")
    command = [sys.executable, "-m", "unitok", *arguments("decoder", tmp_path / "run", tokens, 4, "--resume", "auto")]
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {size // 2048} && exec "$@"', "bash", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr[-800:]
    assert "final.ckpt: could not be written" in done.stderr.splitlines()[-1]
    assert "make room and go on with --resume auto" in done.stderr.splitlines()[-1]
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["final.ckpt"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())


def test_a_worker_that_dies_is_one_line(tmp_path, tokens, monkeypatch):
    real = PackedDataset.row

    def row(self, epoch, index):
        if torch.utils.data.get_worker_info() is not None and index >= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, epoch, index)

    monkeypatch.setattr(PackedDataset, "row", row)
    with pytest.raises(UserError, match=r"a process that reads data died \(DataLoader worker .* go on with --resume auto"):
        run_lightning(arguments("decoder", tmp_path / "run", tokens, 8, "--data.init_args.workers", "1"))


def test_what_a_run_cannot_go_on_with_is_refused_by_name(tmp_path, tokens):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 1))
    again = arguments("decoder", tmp_path / "run", tokens, 3, "--resume", "auto")
    with pytest.raises(UserError, match="model.averages is True, the checkpoint has False"):
        run_lightning([*again, "--model.init_args.ema_decay", "0.9"])
    with pytest.raises(UserError, match="model.optimizer is adamw, the checkpoint has muon"):
        run_lightning([*again, "--model.init_args.optimizer", "adamw"])
    with pytest.raises(UserError, match="trainer.precision 16-mixed: choose one of 32-true, bf16-mixed"):
        run_lightning([*again, "--trainer.precision", "16-mixed"])
    with pytest.raises(UserError, match="trainer.strategy fsdp: choose auto, ddp or"):
        run_lightning([*again, "--trainer.strategy", "fsdp"])
    with pytest.raises(UserError, match="accumulate 0 must be at least 1"):
        run_lightning([*again, "--model.init_args.accumulate", "0"])
    with pytest.raises(UserError, match="audio_level_weights: 8 numbers, the vocabulary has 3 levels"):
        run_lightning([*again, "--data.init_args.audio_level_weights", "[1, 1, 1, 1, 1, 1, 1, 1]"])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--model.init_args.lerning_rate", "learning_rate"),
        ("--model.init_args.decoder.hiden_size", "hidden_size"),
        ("--data.init_args.rowlength", "row_length"),
        ("--trainer.maxsteps", "max_steps"),
    ],
)
def test_a_key_that_does_not_exist_is_told_with_the_nearest(wrong, right, tmp_path, tokens, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_lightning(arguments("decoder", tmp_path / "run", tokens, 3, wrong, "3"))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert wrong.rpartition(".")[2] in said[0]
    assert f"did you mean {right}?" in said[0]
