"""Promises of training where something is wrong: said by name, in one line, with the last good checkpoint in place."""

import inspect
import logging
import os
import re
import signal
import subprocess
import sys

import lightning
import pytest
import torch
from fitting import Poisoned, arguments, weights

from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.data.loading import EndlessBatches
from unitok.data.packing import PackedDataset
from unitok.data.shards import TokenDataset
from unitok.errors import UserError
from unitok.training.fit import _keep_metrics, run_lightning
from unitok.training.parser import OTHER_NAMES, known_keys, nearest_key
from unitok.training.shell import _random_state, _set_random_state


def test_a_checkpoint_of_another_architecture_or_vocabulary_is_refused_by_name(tmp_path, tokens):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 1))
    with pytest.raises(UserError, match="decoder.intermediate_size is 64, the checkpoint has 384"):
        run_lightning(
            arguments(
                "decoder", tmp_path / "run", tokens, 3, "--resume", "auto", "--model.init_args.decoder.intermediate_size", "64"
            )
        )


def test_documents_longer_than_the_decoder_takes_are_an_error_before_training(tmp_path, tokens):
    with pytest.raises(
        UserError, match=r"documents of up to \d+ tokens, model.decoder.max_position_embeddings is 16: raise it"
    ):
        run_lightning(
            arguments("decoder", tmp_path / "run", tokens, 2, "--model.init_args.decoder.max_position_embeddings", "16")
        )
    assert not (tmp_path / "run").exists()


# ---- Skipped batches, averages, starting from something ---------------------------------------------------------------


def test_a_batch_that_gives_nan_is_skipped_and_logged(tmp_path, tokens, monkeypatch, caplog):
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
    with pytest.raises(UserError, match="step 7: skipped 5 batches in a row, the norm of the last gradient is nan"):
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


def test_what_a_run_cannot_go_on_with_is_refused_by_name(tmp_path, tokens, monkeypatch):
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
    with pytest.raises(UserError, match="accumulate_grad_batches 0: it must be at least 1"):
        run_lightning([*again, "--model.init_args.accumulate_grad_batches", "0"])
    with pytest.raises(UserError, match=r"loss_weights: the vocabulary has no audio\.3; it has "):
        run_lightning([*again, "--data.init_args.loss_weights", "{audio.0: 2, audio.3: 1}"])
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"model.compile true: on a CPU it needs a C\+\+ compiler"):
        run_lightning([*again, "--model.init_args.compile", "true"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.init_args.log_every=0", "log_every 0: it must be at least 1"),
        ("--model.init_args.lr=-1", "lr -1.0: it must be at least 0"),
        ("--model.init_args.betas=[1.0,1.0]", "betas 1, 1: both must be from 0 to below 1"),
        ("--model.init_args.decoder.dropout=1.5", "dropout 1.5: it must be from 0 to 1"),
        ("--data.init_args.seed=-1", "seed -1: it must be at least 0"),
        ("--data.init_args.workers=-1", "workers -1: it must be at least 0"),
        ("--data.init_args.condition_dropout=2", "condition_dropout 2.0: it must be from 0 to 1"),
        ("--model.init_args.stable_fraction=30", "stable_fraction 30.0: it must be from 0 to 1"),
        ("--data.init_args.loss_weights={text: -1}", "loss_weights.text -1.0: it must be from 0 to 1e+06"),
        ("--data.init_args.loss_weights={text: .nan}", "loss_weights.text nan: it must be from 0 to 1e+06"),
    ],
)
def test_numbers_out_of_range_are_named(flag, message, tmp_path, tokens):
    with pytest.raises(UserError, match=f"^(.*: )?{re.escape(message)}"):
        run_lightning([*arguments("decoder", tmp_path / "run", tokens, 1), flag])


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("image", ["quantize_start=12"], "quantize_start 12.0: a fraction of the run, from 0 to below 1"),
        ("image", ["gan.start=3"], "gan.start 3.0: it must be from 0 to 1"),
        ("image", ["gan.width=10"], "gan.width 10: with gan.norm group it must be a multiple of 4"),
        ("image", ["losses.l2=0"], "losses: nothing compares the images"),
        ("image", ["losses.commitment=-1"], "losses.commitment -1.0: it must be at least 0"),
        (
            "audio",
            ["losses.l1=0", "losses.l2=0", "losses.spectral_from=0.3"],
            "losses: nothing compares the audio from the first step",
        ),
    ],
)
def test_tokenizers_settings_that_cannot_train_are_named_before_the_first_step(kind, flags, message, tmp_path, scenes_folder):
    given = [f"--model.init_args.{flag}" for flag in flags]
    with pytest.raises(UserError, match=f"^(.*: )?{re.escape(message)}"):
        run_lightning(
            [*arguments(kind, tmp_path / "run", scenes_folder / {"image": "images", "audio": "audio"}[kind], 2), *given]
        )


def test_files_that_a_recipes_weights_leave_out_are_missed(tmp_path, scenes_folder):
    (tmp_path / "r.yaml").write_text(f"sources: [{{path: {scenes_folder / 'images'}, weight: 0.0001}}]")
    with pytest.raises(UserError, match=r"r\.yaml: no files are left: raise the weights in it"):
        run_lightning(arguments("image", tmp_path / "run", tmp_path / "r.yaml", 2))


def test_data_without_samples_end_the_wait_for_one():
    class Empty:
        parts = 2

        def order(self, epoch, part=None):
            return []

    with pytest.raises(UserError, match="no samples"):
        next(iter(EndlessBatches(Empty(), 4)))


def test_a_decoder_stops_after_passes_over_its_data(tmp_path, tokens):
    data = PackedDataset([TokenDataset(tokens)], 192)
    rows = [sum(len(data.order(epoch, part)) for part in range(data.parts)) for epoch in range(2)]
    for epochs in (1, 2):
        run_lightning(
            arguments("decoder", tmp_path / "run", tokens, 500, "--trainer.max_epochs", str(epochs), "--resume", "auto")
        )
        seen = load_checkpoint(newest_checkpoint(tmp_path / "run"))["unitok"]["samples_seen"]
        assert sum(rows[:epochs]) <= seen < sum(rows[:epochs]) + 4


def test_metrics_of_earlier_parts_are_never_replaced(tmp_path):
    (tmp_path / "metrics-2.csv").write_text("old")
    (tmp_path / "metrics.csv").write_text("new")
    _keep_metrics(tmp_path / "metrics.csv")
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"metrics-2.csv": "old", "metrics-3.csv": "new"}


def test_random_states_of_a_gpu_are_left_where_there_is_none():
    saved = _random_state()
    expected = torch.rand(3)
    _set_random_state(
        saved | {"cuda": torch.zeros(16, dtype=torch.uint8), "torch.cuda": [torch.zeros(16, dtype=torch.uint8)] * 8}
    )
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--model.init_args.grad_clp", "grad_clip"),
        ("--model.init_args.decoder.hiden_size", "hidden_size"),
        ("--data.init_args.sequencelength", "sequence_length"),
        ("--trainer.maxsteps", "max_steps"),
        ("--model.init_args.learning_rate", "lr"),  # names of other projects
        ("--model.init_args.max_steps", "steps"),
        ("--model.init_args.decoder.n_layer", "num_hidden_layers"),
        ("--data.init_args.block_size", "sequence_length"),
        ("--output_dir", "out"),
    ],
)
def test_a_key_that_does_not_exist_names_the_nearest(wrong, right, tmp_path, tokens):
    with pytest.raises(UserError) as raised:
        run_lightning(arguments("decoder", tmp_path / "run", tokens, 3, wrong, "3"))
    room, _, key = wrong.removeprefix("--").replace(".init_args", "").partition(".")
    expected = f"{room}: there is no key {key}" if room in ("model", "data") else f"there is no key {wrong.removeprefix('--')}"
    assert str(raised.value) == f"{expected}; did you mean {right}?"


def test_a_key_in_yaml_that_does_not_exist_names_the_nearest(tmp_path, tokens):
    (tmp_path / "more.yaml").write_text("model:\n  init_args:\n    gradient_clip_val: 1.0\n")
    with pytest.raises(UserError, match="there is no key gradient_clip_val; did you mean grad_clip"):
        run_lightning(arguments("decoder", tmp_path / "run", tokens, 3, "--config", str(tmp_path / "more.yaml")))


def test_names_of_other_projects_lead_to_keys_that_exist():
    keys = known_keys()
    assert set(OTHER_NAMES) <= set(keys)
    others = [name for names in OTHER_NAMES.values() for name in names]
    assert len(others) == len(set(others))
    trainers = {key for key in others if key in inspect.signature(lightning.Trainer).parameters}
    assert set(others) & set(keys) <= trainers  # keys of the Trainer that are none of a model
    assert nearest_key("zzzzzz") is None


# ---- Flags of Lightning's Trainer ---------------------------------------------------------------------------------------

CALLBACKS = "--trainer.callbacks+=lightning.pytorch.callbacks."


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trainer.gradient_clip_val", "1.0"], "model.grad_clip"),
        (["--trainer.accumulate_grad_batches", "2"], "model.accumulate_grad_batches"),
        (["--trainer.val_check_interval", "0.5"], "give a number of steps"),
        (["--trainer.check_val_every_n_epoch", "2"], "val_check_interval"),
        (["--trainer.limit_train_batches", "0.5"], "give a number of steps"),
        (["--trainer.max_steps", "0"], "at least 1"),
        (["--trainer.max_epochs", "-3"], "at least 1"),
        (["--trainer.min_steps", "9"], "model.steps"),
        (["--trainer.overfit_batches", "0.5"], "give a number of steps"),
        (["--trainer.enable_checkpointing", "false"], "fast_dev_run"),
        (["--trainer.default_root_dir", "elsewhere"], "--out"),
        (["--trainer.strategy", "ddp_spawn"], "choose auto, ddp or"),
        (["--ckpt_path", "final.ckpt"], "--resume"),
        ([f"{CALLBACKS}StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"], "model.ema_decay"),
        (
            [f"{CALLBACKS}GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2}"],
            "model.accumulate_grad_batches",
        ),
        (["--trainer.max_time", "soon"], "not a valid duration"),  # what Lightning itself refuses
        (["--trainer.accelerator", "tpu"], "torch_xla"),
        (["--trainer.num_nodes", "0"], "positive integer"),
    ],
    ids=lambda value: value[0].rpartition(".")[2] if isinstance(value, list) else "",
)
def test_a_flag_that_cannot_work_is_one_line_that_names_what_does_and_leaves_nothing(flags, said, tmp_path, tokens):
    with pytest.raises(UserError) as raised:
        run_lightning(arguments("decoder", tmp_path / "run", tokens, 3, *flags))
    assert said in str(raised.value)
    assert flags[0].removeprefix("--").split("=")[0].rstrip("+") in str(raised.value) or str(raised.value).startswith(
        "trainer: "
    )
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_limits_of_the_trainer_count_batches_and_epochs_of_the_data_and_a_dry_run_writes_nothing(
    tmp_path, scenes_folder, caplog
):
    data = scenes_folder / "images"
    batches = -(-len(list(data.iterdir())) // 4)
    both = ["--model.init_args.gan.start", "0", "--model.init_args.gan.disc_only", "0"]  # two optimizers from the first step

    def steps(*limit: str) -> int:
        run_lightning(arguments("image", tmp_path / "run", data, 50, *both, *limit, "--resume", "auto"))
        assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["stopped.ckpt"]
        return load_checkpoint(newest_checkpoint(tmp_path / "run"))["unitok"]["steps_done"]

    assert steps("--trainer.max_steps", "3") == 3
    assert steps("--trainer.max_epochs", "1") == batches in (6, 7)
    assert steps("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "4.0") == 8
    assert steps("--trainer.max_epochs", "1") == 8  # it is past them
    with caplog.at_level(logging.INFO, logger="unitok"):
        assert steps("--trainer.max_steps", "3") == 8
    assert (
        "stopped.ckpt: 8 steps are done, nothing is left to train within the Trainer's limits (trainer.max_steps 3"
        in caplog.text
    )
    run_lightning(arguments("image", tmp_path / "dry", data, 50, "--trainer.fast_dev_run", "true"))
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere.Stamps"], "data: No module named 'nowhere'; Given value: nowhere.Stamps"),
        (["--data.init_args.crop", "middle"], "data: crop: Expected one of ['center', 'random']. Got value: middle"),
        (["--model.init_args.steps", "many"], "model: steps: Expected a int; Given value: many"),
    ],
)
def test_a_wrong_value_names_its_key_and_the_last_cause(flags, message, tmp_path, scenes_folder):
    with pytest.raises(UserError) as raised:
        run_lightning(arguments("image", tmp_path / "run", scenes_folder / "images", 3, *flags))
    assert str(raised.value) == message
