"""Promises of training: stopping and resuming is bit for bit the uncut run; what the user says now wins."""

import csv

import pytest
import torch
from fitting import Poisoned, arguments, weights

from unitok.bundle import Unitok, make_bundle, make_untrained
from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.data.module import TokenShards
from unitok.data.plan import Plan
from unitok.data.tokenize import tokenize
from unitok.errors import UserError
from unitok.fit import run_lightning
from unitok.training import Budget, warmup_linear


@pytest.mark.parametrize("kind", ["image", "audio", "decoder"])
def test_a_run_stopped_and_resumed_has_bit_for_bit_the_weights_of_the_uncut_run(kind, tmp_path, scenes_folder, tokens):
    data = {"image": scenes_folder / "images", "audio": scenes_folder / "sounds", "decoder": tokens}[kind]
    run_lightning(arguments(kind, tmp_path / "uncut", data, 10))
    # stopped in the middle of an epoch (24 scenes, batches of 4: an epoch is 6 steps), by a limit that is no end of the run
    run_lightning(arguments(kind, tmp_path / "cut", data, 10, "--trainer.max_steps", "4"))
    files = list((tmp_path / "cut" / "checkpoints").glob("*.ckpt"))
    assert files
    assert load_checkpoint(files[0])["unitok"]["steps_done"] == 4
    run_lightning(arguments(kind, tmp_path / "cut", data, 10, "--resume", "auto"))
    uncut, cut = weights(tmp_path / "uncut"), weights(tmp_path / "cut")
    assert load_checkpoint(newest_checkpoint(tmp_path / "cut"))["unitok"]["steps_done"] == 10
    assert uncut.keys() == cut.keys()
    for name, tensor in uncut.items():
        assert torch.equal(tensor, cut[name]), name
    run_lightning(arguments(kind, tmp_path / "other", data, 10, "--data.init_args.seed", "1"))
    assert any(not torch.equal(t, uncut[n]) for n, t in weights(tmp_path / "other").items())  # the comparison can fail


def test_a_trained_decoder_joins_the_bundle_it_was_trained_for_and_no_other(tmp_path, tokens, bundle_folder, capsys):
    import shutil

    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2))
    shutil.copytree(bundle_folder, tmp_path / "bundle")
    made = make_bundle(tmp_path / "bundle", {"model": tmp_path / "run"})
    assert made.model.config.hidden_size == 32
    again = Unitok.from_pretrained(tmp_path / "bundle")
    ids, places = torch.randint(0, made.vocab.size, (1, 7)), torch.zeros(1, 7, dtype=torch.long)
    assert torch.equal(again.model(ids, places=places), made.model(ids, places=places))
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
    more = ["--data.init_args.audio_level_weights", "[1.0, 0.5, 0.25]", "--data.init_args.drop_condition", "0"]
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2, *more))
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics" / "metrics.csv")))
    modalities = ["text", "image", "audio", *(f"audio_{level}" for level in range(3))]
    for name in modalities:
        for row in rows:
            assert 0 <= float(row[f"accuracy_{name}"]) <= 1
        assert 0 < float(rows[0][f"bits_{name}"]) < 16
    # a new decoder gives every allowed id the same chance: 64 image codes are 6 bits, 32 codes of a level 5
    assert float(rows[0]["bits_image"]) == pytest.approx(6.0)
    assert float(rows[0]["bits_audio_2"]) == pytest.approx(5.0)
    assert float(rows[0]["log_normaliser_image"]) > 0
    assert float(rows[1]["output_norm"]) > 0
    assert float(rows[1]["query_norm_0"]) > 0
    assert 0 <= float(rows[0]["padding"]) < 0.5


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
    data = TokenShards({str(tokens): 3.0, str(second): 1.0}, row_length=192).training_data()
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
    assert not torch.equal(uncut[f"average.model.{name}"], uncut[f"decoder.{name}"])
    shutil.copytree(bundle_folder, tmp_path / "bundle")
    made = make_bundle(tmp_path / "bundle", {"model": tmp_path / "cut"})
    assert torch.equal(made.model.state_dict()[name], uncut[f"average.model.{name}"])


def test_what_is_said_on_resume_wins_over_the_checkpoint(tmp_path, tokens):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2))
    before = weights(tmp_path / "run")
    still = ["--model.init_args.learning_rate", "0", "--model.init_args.muon_rate", "0"]
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


@pytest.mark.parametrize("slower", [1.0, 1.3, 0.7])
def test_minutes_are_kept_to_also_when_the_pace_changes_and_shares_never_go_back(monkeypatch, slower):
    clock = [100.0]
    monkeypatch.setattr("unitok.training.time.monotonic", lambda: clock[0])
    budget = Budget(None, minutes=2.0)
    budget.begin()
    shares, done = [], 0
    while not budget.over(done):
        clock[0] += 0.1 if done < 300 else 0.1 * slower
        done += 1
        budget.tick(done)
        shares.append(budget.share(done))
        if done == 500:  # stopped and resumed here
            state, budget = budget.state(), Budget(None, minutes=2.0)
            budget.restore(state)
            budget.begin()
    assert 114 <= clock[0] - 100.0 <= 121
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    with pytest.raises(UserError, match="either steps, minutes or"):
        Budget(3, 1.0)


def test_the_schedule_warms_up_and_falls_to_a_fiftieth():
    assert warmup_linear(0, 0.0, 10) == pytest.approx(0.1)
    assert warmup_linear(50, 0.5, 10, hold=0.5) == 1.0
    assert warmup_linear(99, 1.0, 10) == pytest.approx(0.02)


# ---- Lengths, pieces, pace ---------------------------------------------------------------------------------------------


def test_a_length_in_ids_becomes_steps_and_the_half_life_the_second_beta(tmp_path, tokens):
    more = ["--model.init_args.steps", "null", "--model.init_args.ids", "3000", "--model.init_args.half_life", "7680"]
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 1, *more))
    saved = load_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert saved["unitok"]["steps_done"] == 4  # of 4 rows of 192
    assert saved["optimizer_states"][0]["param_groups"][0]["betas"][1] == pytest.approx(0.5**0.1)
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 1, *more, "--model.init_args.ids", "4600", "--resume", "auto"))
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["unitok"]["steps_done"] == 6
    with pytest.raises(UserError, match="either steps, minutes or"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 1, "--model.init_args.ids", "3000"))


def test_a_batch_in_pieces_trains_like_the_whole(tmp_path, tokens):
    still = ["--model.init_args.decoder.dropout", "0", "--model.init_args.loss_over", "all"]
    still += ["--model.init_args.decoder.checkpoint_activations", "true"]
    for pieces in ("1", "2"):
        run_lightning(arguments("decoder", tmp_path / pieces, tokens, 6, *still, "--model.init_args.accumulate", pieces))
    whole, pieces = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
    with pytest.raises(UserError, match="accumulate 3: it must divide data.batch_size 4"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 6, "--model.init_args.accumulate", "3"))


def test_the_pace_is_logged_with_what_is_left(tmp_path, tokens):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 4))
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics" / "metrics.csv")))
    row = rows[-1]
    seconds, ids = float(row["seconds_a_step"]), float(row["ids_a_second"])
    assert 0.3 * 768 < ids * seconds <= 768 * 1.0001
    assert 0 < float(row["teraflops"]) < 1
    assert float(rows[0]["minutes_left"]) > 0
    assert float(row["minutes_left"]) == 0


# ---- LoRA --------------------------------------------------------------------------------------------------------------


def test_checkpoints_are_written_by_the_clock_but_not_while_batches_are_skipped(tmp_path, tokens, monkeypatch):
    Poisoned(monkeypatch, set(range(4, 99)))
    with pytest.raises(UserError, match="5 batches in a row"):
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
    with pytest.raises(UserError, match="no checkpoint of this run reads; remove them"):
        run_lightning(arguments("decoder", tmp_path / "torn", tokens, 20, "--resume", "auto"))


def test_samples_are_taken_while_it_trains_and_change_nothing(tmp_path, tokens, bundle_folder, scenes_folder):
    longer = ["--model.init_args.decoder.max_position_embeddings", "1024"]
    run_lightning(arguments("decoder", tmp_path / "without", tokens, 3, *longer))
    watch = ["--trainer.callbacks+=unitok.evaluate.watch.Samples", f"--trainer.callbacks.bundle={bundle_folder}"]
    often = ["--trainer.callbacks.every_minutes=1e-6", "--trainer.callbacks.number=2"]
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
    assert "sample.generation.text_to_image.attributes" in text
    events = b"".join(f.read_bytes() for f in (tmp_path / "run" / "tensorboard").rglob("events*"))
    assert b"text_to_image/0" in events
    assert b"text_to_audio/0" in events
    prompts = tmp_path / "run" / "samples" / "step=3" / "samples" / "image_to_text" / "outputs.jsonl"
    mine = [f"--trainer.callbacks.prompts={prompts}", *often, "--trainer.callbacks.max_ids=300"]
    run_lightning(arguments("decoder", tmp_path / "mine", tokens, 1, *longer, *watch, *mine))
    assert (tmp_path / "mine" / "samples" / "step=1" / "audio" / "outputs.jsonl").exists()
    with pytest.raises(UserError, match="Samples: give either scenes or prompts"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 1, *watch))
