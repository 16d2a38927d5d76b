"""Promises of training: stopping and resuming is bit for bit the uncut run; what the user says now wins."""

import csv
import logging
import math
import os
import re
import signal

import pytest
import torch
from fitting import Poisoned, arguments, weights

from unitok.api import Unitok
from unitok.bundle import make_bundle, make_untrained
from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.data.modules import TokenShards
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import tokenize
from unitok.errors import UserError
from unitok.files import lock
from unitok.model.decoder import Decoder
from unitok.training.budget import Budget
from unitok.training.fit import run_lightning
from unitok.training.shell import warmup_linear


@pytest.mark.parametrize("kind", ["image", "audio", "decoder", "decoder in sums"])
def test_a_run_stopped_and_resumed_has_bit_for_bit_the_weights_of_the_uncut_run(kind, tmp_path, scenes_folder, tokens):
    more = ("--model.init_args.muon_every", "3") if kind == "decoder in sums" else ()  # stopped at step 4, within a sum
    kind = kind.split()[0]
    data = {"image": scenes_folder / "images", "audio": scenes_folder / "audio", "decoder": tokens}[kind]
    run_lightning(arguments(kind, tmp_path / "uncut", data, 10, *more))
    # stopped in the middle of an epoch (24 scenes, batches of 4: an epoch is 6 steps), by a limit that is no end of the run
    run_lightning(arguments(kind, tmp_path / "cut", data, 10, *more, "--trainer.max_steps", "4"))
    files = list((tmp_path / "cut" / "checkpoints").glob("*.ckpt"))
    assert files
    assert load_checkpoint(files[0])["unitok"]["steps_done"] == 4
    run_lightning(arguments(kind, tmp_path / "cut", data, 10, *more, "--resume", "auto"))
    uncut, cut = weights(tmp_path / "uncut"), weights(tmp_path / "cut")
    assert load_checkpoint(newest_checkpoint(tmp_path / "cut"))["unitok"]["steps_done"] == 10
    assert uncut.keys() == cut.keys()
    for name, tensor in uncut.items():
        assert torch.equal(tensor, cut[name]), name
    run_lightning(arguments(kind, tmp_path / "other", data, 10, *more, "--data.init_args.seed", "1"))
    assert any(not torch.equal(t, uncut[n]) for n, t in weights(tmp_path / "other").items())  # the comparison can fail


def test_a_trained_decoder_joins_the_bundle_it_was_trained_for_and_no_other(tmp_path, tokens, bundle_folder, capsys):
    import shutil

    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2))
    shutil.copytree(bundle_folder, tmp_path / "bundle")
    made = make_bundle(tmp_path / "bundle", {"model": tmp_path / "run"})
    assert made.model.config.hidden_size == 32
    again = Unitok.from_pretrained(tmp_path / "bundle")
    ids, span_positions = torch.randint(0, made.vocab.size, (1, 7)), torch.zeros(1, 7, dtype=torch.long)
    assert torch.equal(again.model(ids, span_positions=span_positions), made.model(ids, span_positions=span_positions))
    # another image tokenizer makes another vocabulary
    other = Unitok.from_pretrained(bundle_folder)
    with torch.no_grad():
        other.image.encoder.conv_in.weight += 1
    other.image.save_pretrained(tmp_path / "image")
    with pytest.raises(UserError, match="the vocabularies differ in image: tokenizer"):
        make_bundle(tmp_path / "third", {
            "text": bundle_folder / "tokenizers/text", "image": tmp_path / "image",
            "audio": bundle_folder / "tokenizers/audio", "model": tmp_path / "run",
        })  # fmt: skip
    assert not (tmp_path / "third").exists()


def test_bits_and_accuracy_are_logged_for_every_modality_and_level(tmp_path, tokens):
    more = ["--data.init_args.loss_weights", "{audio.1: 0.5, audio.2: 0.25}", "--data.init_args.condition_dropout", "0"]
    more += ["--data.init_args.batch_size", "16"]  # so that each has every modality
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2, *more))
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics" / "metrics.csv")))
    names = ["text", "image", "audio", *(f"audio.{level}" for level in range(3))]
    for name in names:
        for row in rows:
            assert 0 <= float(row[f"accuracy/{name}"]) <= 1
        assert 0 < float(rows[0][f"bits_per_token/{name}"]) < 16
    # a new decoder gives every allowed id the same chance: 64 image codes are 6 bits, 32 codes of a level 5
    assert float(rows[0]["bits_per_token/image"]) == pytest.approx(6.0)
    assert float(rows[0]["bits_per_token/audio.2"]) == pytest.approx(5.0)
    assert float(rows[0]["logsumexp_rms/image"]) == pytest.approx(math.log(64), rel=1e-5)
    assert float(rows[1]["output_rms"]) > 0
    assert float(rows[1]["query_rms/0"]) > 0
    assert 0 <= float(rows[0]["padding_fraction"]) < 0.5


def test_a_mixture_of_two_data_sets_trains(tmp_path, tokens, scenes_folder, bundle_folder):
    second = tmp_path / "second"
    tokenize(Plan(str(scenes_folder), str(second), str(bundle_folder)))
    config = tmp_path / "mixture.yaml"
    config.write_text(f"data:\n  init_args:\n    path:\n      {tokens}: 3\n      {second}: 1\n")
    run = arguments("decoder", tmp_path / "run", tokens, 2)
    at = run.index("--data.init_args.path")
    del run[at : at + 2]
    run_lightning([*run, "--config", str(config)])
    assert newest_checkpoint(tmp_path / "run") is not None
    data = TokenShards({str(tokens): 3.0, str(second): 1.0}, sequence_length=192).training_data()
    drawn = [sum(unit.length for row in data.rows(0) for unit in row if unit.source == source) for source in (0, 1)]
    assert drawn[0] / drawn[1] == pytest.approx(3.0, rel=0.1)


def test_averaged_weights_are_resumed_and_what_a_bundle_takes(tmp_path, tokens, bundle_folder):
    import shutil

    average = ["--model.init_args.ema_decay", "0.8"]
    run_lightning(arguments("decoder", tmp_path / "uncut", tokens, 8, *average))
    run_lightning(arguments("decoder", tmp_path / "cut", tokens, 8, *average, "--trainer.max_steps", "3"))
    run_lightning(arguments("decoder", tmp_path / "cut", tokens, 8, *average, "--resume", "auto"))
    uncut, cut = weights(tmp_path / "uncut"), weights(tmp_path / "cut")
    assert all(torch.equal(uncut[name], cut[name]) for name in uncut)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(uncut[f"average.module.{name}"], uncut[f"decoder.{name}"])
    shutil.copytree(bundle_folder, tmp_path / "bundle")
    made = make_bundle(tmp_path / "bundle", {"model": tmp_path / "cut"})
    assert torch.equal(made.model.state_dict()[name], uncut[f"average.module.{name}"])


def test_what_is_configured_on_resume_wins_over_the_checkpoint(tmp_path, tokens):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2))
    before = weights(tmp_path / "run")
    still = ["--model.init_args.lr", "0", "--model.init_args.muon_lr", "0"]
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 4, "--resume", "auto", *still))
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["unitok"]["steps_done"] == 4
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, before[name]), name


def test_validate_measures_a_run_on_data_of_the_same_vocabulary_only(tmp_path, tokens, scenes_folder, capsys):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2))
    check = arguments("decoder", tmp_path / "run", tokens, 2, "--resume", "auto", "--data.init_args.val_path")
    check[0] = "validate"
    run_lightning([*check, str(tokens)])
    assert "val_loss" in capsys.readouterr().out
    make_untrained(tmp_path / "other", seed=1)
    tokenize(Plan(str(scenes_folder), str(tmp_path / "tokens"), str(tmp_path / "other")))
    with pytest.raises(UserError, match="the vocabularies differ"):
        run_lightning([*check, str(tmp_path / "tokens")])


def train_by_the_clock(monkeypatch, minutes: float, seconds, resume_at: int = 0) -> tuple[float, list[float], Budget]:
    """A run under a clock of our own, whose steps take `seconds(step, elapsed)`. Returns seconds spent, progress per step, the budget."""
    clock = [100.0]
    monkeypatch.setattr("unitok.training.budget.time.monotonic", lambda: clock[0])
    budget = Budget(None, minutes)
    budget.begin()
    progress, done = [], 0
    while not budget.over(done):
        progress.append(budget.progress(done))
        clock[0] += seconds(done, clock[0] - 100.0)
        done += 1
        budget.tick(done, budget.clock())
        if done == resume_at:
            state, budget = budget.state(), Budget(None, minutes)
            budget.restore(state, done)
            assert budget.progress(done) >= progress[-1]
            budget.begin()
    assert progress == sorted(progress)
    assert budget.progress(done) == 1.0
    return clock[0] - 100.0, progress, budget


@pytest.mark.parametrize("slower", [1.0, 1.3, 0.7, 5.0])
def test_minutes_are_kept_to_also_when_the_pace_changes_and_progress_never_goes_back(monkeypatch, slower):
    spent, progress, _ = train_by_the_clock(
        monkeypatch, 2.0, lambda step, _: 0.1 if step < 300 else 0.1 * slower, resume_at=500
    )
    assert 114 <= spent <= 121
    assert progress[-1] > 0.95
    with pytest.raises(UserError, match="one of steps, minutes and tokens"):
        Budget(3, 1.0)


@pytest.mark.parametrize("stalls_at", [5, 60, 100, 112, 119])
def test_a_machine_that_slows_down_ends_by_half_as_much_again_at_the_low_end_of_its_schedule(monkeypatch, stalls_at):
    spent, progress, _ = train_by_the_clock(monkeypatch, 2.0, lambda _, elapsed: 0.1 if elapsed < stalls_at else 3.0)
    assert spent <= 1.5 * 120 + 0.1 * 120
    assert progress[-1] >= 0.9
    assert warmup_linear(99, progress[-1], 10, stable_fraction=0.3) < 0.2


def test_a_run_that_hangs_at_its_end_is_cut_to_a_few_steps_and_says_so(monkeypatch, caplog):
    # the plan of the last tenth is made at full pace; then each step takes 90 s
    spent, progress, budget = train_by_the_clock(monkeypatch, 2.0, lambda _, elapsed: 0.1 if elapsed < 110 else 90.0)
    assert budget.ends
    assert spent == pytest.approx(110 + 2 * 90, abs=2)  # the first passes 180 s; one more ends the schedule
    assert progress[-1] >= 0.9
    assert "the 2 minutes and half as much again are over; the run ends with 1 step of its schedule's tail" in caplog.text


def test_minutes_that_are_less_than_a_step_give_two(monkeypatch):
    spent, progress, _ = train_by_the_clock(monkeypatch, 0.001, lambda *_: 7.0)
    assert (spent, len(progress)) == (14.0, 2)
    assert progress[-1] >= 0.9


def test_the_schedule_warms_up_and_falls_to_a_fiftieth():
    assert warmup_linear(0, 0.0, 10) == pytest.approx(0.1)
    assert warmup_linear(50, 0.5, 10, stable_fraction=0.5) == 1.0
    assert warmup_linear(99, 1.0, 10) == pytest.approx(0.02)


# ---- Lengths, pieces, pace ---------------------------------------------------------------------------------------------


def test_a_length_in_tokens_becomes_steps_and_the_half_life_the_second_beta(tmp_path, tokens):
    more = [
        "--model.init_args.steps",
        "null",
        "--model.init_args.tokens",
        "3000",
        "--model.init_args.beta2_half_life_tokens",
        "7680",
    ]
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 1, *more))
    saved = load_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert saved["unitok"]["steps_done"] == 4  # of 4 rows of 192
    assert saved["optimizer_states"][0]["param_groups"][0]["betas"][1] == pytest.approx(0.5**0.1)
    run_lightning(
        arguments("decoder", tmp_path / "run", tokens, 1, *more, "--model.init_args.tokens", "4600", "--resume", "auto")
    )
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["unitok"]["steps_done"] == 6
    with pytest.raises(UserError, match="one of steps, minutes and tokens"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 1, "--model.init_args.tokens", "3000"))


def test_a_batch_in_parts_trains_like_the_whole(tmp_path, tokens):
    still = ["--model.init_args.decoder.dropout", "0", "--model.init_args.loss_vocabulary", "all"]
    still += ["--model.init_args.decoder.checkpoint_activations", "true"]
    for pieces in ("1", "2"):
        run_lightning(
            arguments("decoder", tmp_path / pieces, tokens, 6, *still, "--model.init_args.accumulate_grad_batches", pieces)
        )
    whole, pieces = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
    with pytest.raises(UserError, match="accumulate_grad_batches 3: it must divide data.batch_size 4"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 6, "--model.init_args.accumulate_grad_batches", "3"))


def test_a_row_of_metrics_is_written_once(tmp_path, tokens):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 7, "--model.init_args.log_every", "3"))
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics" / "metrics.csv")))
    assert [int(row["step"]) for row in rows if row["loss"]] == [2, 5, 6]


def test_the_pace_is_logged_with_what_is_left(tmp_path, tokens):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 4))
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics" / "metrics.csv")))
    row = rows[-1]
    seconds, ids = float(row["seconds_per_step"]), float(row["tokens_per_second"])
    assert 0.3 * 768 < ids * seconds <= 768 * 1.0001
    assert 0 < float(row["teraflops"]) < 1
    assert float(rows[0]["eta_minutes"]) > 0
    assert float(row["eta_minutes"]) == 0


# ---- Stopping, starting again ------------------------------------------------------------------------------------------


class SignalAt:
    """Sends this process a signal in the middle of the n-th forward pass of a decoder."""

    def __init__(self, monkeypatch, n: int, number: int):
        self.calls, real = 0, Decoder.hidden

        def hidden(decoder, *arguments, **more):
            self.calls += 1
            if self.calls == n:
                signal.raise_signal(number)
            return real(decoder, *arguments, **more)

        monkeypatch.setattr(Decoder, "hidden", hidden)


@pytest.mark.parametrize(
    ("number", "passes", "step"), [(signal.SIGINT, 4, 4), (signal.SIGTERM, 5, 3)], ids=["in a step", "in a validation"]
)
def test_a_signal_leaves_a_checkpoint_from_which_the_run_ends_bit_for_bit_as_the_uncut_one(
    number, passes, step, tmp_path, tokens, monkeypatch, caplog, capsys
):
    watched = [] if step == passes else ["--data.init_args.val_path", str(tokens), "--trainer.val_check_interval", "3"]
    watched += ["--trainer.limit_val_batches", "3"] if watched else []
    run_lightning(arguments("decoder", tmp_path / "uncut", tokens, 7, *watched))
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        SignalAt(patched, passes, number)
        with pytest.raises(SystemExit) as ended:
            run_lightning(arguments("decoder", tmp_path / "cut", tokens, 7, *watched))
    assert ended.value.code == 128 + number
    assert signal.getsignal(signal.SIGTERM) == before
    assert f"stopped at step {step}; go on with --resume auto" in caplog.messages
    assert [f.name for f in (tmp_path / "cut" / "checkpoints").iterdir()] == ["stopped.ckpt"]
    capsys.readouterr()
    shown = ("--trainer.enable_progress_bar", "true")
    run_lightning(arguments("decoder", tmp_path / "cut", tokens, 7, *watched, "--resume", "auto", *shown))
    bar = [line for line in re.split("[\r\n]", "".join(capsys.readouterr())) if "it/s" in line]
    assert "decoder: 100%" in bar[-1]
    assert "7/7" in bar[-1]
    uncut, cut = weights(tmp_path / "uncut"), weights(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in uncut.items())


def test_a_signal_before_the_first_step_leaves_nothing(tmp_path, tokens, monkeypatch, caplog):
    monkeypatch.setattr(TokenShards, "training_data", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        run_lightning(arguments("decoder", tmp_path / "runs" / "new", tokens, 3))
    assert ended.value.code == 143
    assert caplog.messages[-1] == "stopped before the first step"
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_never_overwritten_unless_that_is_asked_for(tmp_path, tokens, capsys):
    out = tmp_path / "run"
    run_lightning(arguments("decoder", out, tokens, 3))
    mine = out / "checkpoints" / "mine.ckpt"
    mine.write_bytes((out / "checkpoints" / "final.ckpt").read_bytes())
    (out / "notes.txt").write_text("a good run")

    def content() -> dict[str, bytes]:
        return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}

    before = content()
    other = tmp_path / "other" / "checkpoints" / "final.ckpt"
    run_lightning(arguments("decoder", tmp_path / "other", tokens, 1))
    for more, said in [
        ([], "holds a run .final.ckpt, mine.ckpt.; go on with --resume auto, choose another --out, or replace it"),
        (["--resume", str(other)], "holds another run than .*choose another --out"),
        (["--resume", "auto", "--overwrite"], "replaces the run in .* continues it: choose one"),
        (["--overwrite", "--data.init_args.path", str(tmp_path / "nowhere")], "no such file; make a data set"),
    ]:
        with pytest.raises(UserError, match=said):
            run_lightning(arguments("decoder", out, tokens, 3, *more))
        assert content() == before, more
    run_lightning(arguments("decoder", out, tokens, 2, "--overwrite", "--data.init_args.seed", "1"))
    after = content()
    assert after.keys() - before.keys() <= {f for f in after if f.startswith("tensorboard/")}
    kept = {name for name in before if after.get(name) == before[name]} - {".lock", "tensorboard/hparams.yaml"}  # empty both
    assert kept == {"checkpoints/mine.ckpt", "notes.txt"}
    assert load_checkpoint(newest_checkpoint(out))["unitok"]["steps_done"] == 2  # not the user's copy of step 3
    assert "overwrite: false" in (out / "metrics" / "config.yaml").read_text()
    more = ["--data.init_args.seed", "1", "--resume", str(newest_checkpoint(out))]
    run_lightning(arguments("decoder", tmp_path / "further", tokens, 3, *more))
    assert "resume: null" in (tmp_path / "further" / "metrics" / "config.yaml").read_text()  # its copy starts another run


def test_a_second_run_in_one_folder_stops_and_measuring_the_first_leaves_it_alone(tmp_path, tokens):
    out = tmp_path / "run"
    run_lightning(arguments("decoder", out, tokens, 1))
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    with lock(out / ".lock", "fit"):
        for more in ([], ["--resume", "auto"], ["--overwrite"]):
            with pytest.raises(UserError, match="another `unitok fit` is at work on it"):
                run_lightning(arguments("decoder", out, tokens, 2, *more))
        measure = arguments("decoder", out, tokens, 2, "--resume", "auto", "--data.init_args.val_path", str(tokens))
        run_lightning(["validate", *measure[1:], "--trainer.limit_val_batches", "1"])
        begun, begins = os.pipe()
        child = os.fork()
        if child == 0:  # a process that reads data: it must not hold the lock when its run is gone
            os.write(begins, b"!")
            signal.pause()
        os.read(begun, 1)
    try:
        with lock(out / ".lock", "fit"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (out / "validate" / "metrics.csv").exists()
    assert all(f.stat().st_mtime_ns == when for f, when in before.items() if f.name != ".lock")
    assert {f.name for f in out.iterdir()} - {f.name for f in before} == {"validate"}


def test_a_resumed_run_says_from_where_and_what_is_different(tmp_path, tokens, caplog):
    out = tmp_path / "run"
    caplog.set_level(logging.INFO)
    run_lightning(arguments("decoder", out, tokens, 2, "--resume", "auto"))
    assert f"{out}: no checkpoint to resume from; a new run starts" in caplog.text
    caplog.clear()
    more = ["--data.init_args.batch_size", "2", "--model.init_args.lr", "0.001", "--resume", "auto"]
    run_lightning(arguments("decoder", out, tokens, 3, *more))
    said = next(line for line in caplog.messages if line.startswith("resumed"))
    assert said.startswith(f"resumed from {out}/checkpoints/final.ckpt at step 2; changed: ")
    assert set(said.partition("changed: ")[2].split(", ")) == {
        "model.steps 2 -> 3",
        "model.lr unset -> 0.001",
        "data.batch_size 4 -> 2",
    }


def test_checkpoints_are_written_by_the_clock_but_not_while_batches_are_skipped(tmp_path, tokens, monkeypatch):
    Poisoned(monkeypatch, set(range(4, 99)))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / ".step=9.ckpt.partial").write_bytes(b"of a run that was killed")
    with pytest.raises(UserError, match="skipped 5 batches in a row"):
        run_lightning(arguments("decoder", tmp_path / "run", tokens, 20, "--checkpoint_seconds", "0"))
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=3.ckpt"]
    monkeypatch.undo()
    kept = tmp_path / "run" / "checkpoints" / "kept.ckpt"  # a copy that the user made
    kept.write_bytes((tmp_path / "run" / "checkpoints" / "step=3.ckpt").read_bytes())
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 20, "--resume", "auto"))
    assert {f.name for f in (tmp_path / "run" / "checkpoints").iterdir()} == {"final.ckpt", "kept.ckpt"}
    assert {f.name for f in (tmp_path / "run" / "metrics").glob("*.csv")} == {"metrics.csv", "metrics-1.csv"}
    torn = tmp_path / "torn" / "checkpoints" / "final.ckpt"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(kept.read_bytes()[:5000])
    with pytest.raises(UserError, match="no checkpoint of this run can be read; remove them"):
        run_lightning(arguments("decoder", tmp_path / "torn", tokens, 20, "--resume", "auto"))


def test_samples_are_taken_while_it_trains_and_change_nothing(tmp_path, tokens, bundle_folder, scenes_folder):
    longer = ["--model.init_args.decoder.max_position_embeddings", "1024"]
    run_lightning(arguments("decoder", tmp_path / "without", tokens, 3, *longer))
    bundle = f"--trainer.callbacks.bundle={bundle_folder}"
    watch = ["--trainer.callbacks+=unitok.scenes.SceneSamples", bundle]
    often = ["--trainer.callbacks.every_minutes=1e-6", "--trainer.callbacks.number=2", "--trainer.callbacks.max_new_tokens=100"]
    run_lightning(
        arguments(
            "decoder", tmp_path / "run", tokens, 3, *longer, *watch, f"--trainer.callbacks.scenes={scenes_folder}", *often
        )
    )
    without = weights(tmp_path / "without")
    assert all(torch.equal(tensor, without[name]) for name, tensor in weights(tmp_path / "run").items())
    for step in (1, 2, 3):
        folder = tmp_path / "run" / "samples" / f"step={step}"
        for direction in ("text_to_image", "image_to_text", "text_to_audio", "audio_to_text"):
            assert (folder / "samples" / direction / "index.html").exists()
    text = (tmp_path / "run" / "metrics" / "metrics.csv").read_text()
    assert "sample/generation.text_to_image.attributes" in text
    events = b"".join(f.read_bytes() for f in (tmp_path / "run" / "tensorboard").rglob("events*"))
    assert b"text_to_image/0" in events
    assert b"text_to_audio/0" in events
    prompts = tmp_path / "run" / "samples" / "step=3" / "samples" / "image_to_text" / "outputs.jsonl"
    own = ["--trainer.callbacks+=unitok.training.Samples", bundle]
    mine = [f"--trainer.callbacks.prompts={prompts}", *often, "--trainer.callbacks.max_new_tokens=300"]
    run_lightning(
        arguments("decoder", tmp_path / "mine", tokens, 1, *longer, *own, *mine, "--trainer.callbacks.modalities=[audio]")
    )
    assert [f.name for f in (tmp_path / "mine" / "samples" / "step=1").iterdir()] == ["audio"]
    wrong = [*mine, "--trainer.callbacks.modalities=[sound]"]
    with pytest.raises(UserError, match="modalities: 'sound' is none of text, image, audio"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 1, *longer, *own, *wrong))
    with pytest.raises(UserError, match="scenes"):  # no scenes are given
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 1, *watch))
