"""Promises of training: stopping and resuming is bit for bit the uncut run; what the user says now wins."""

from pathlib import Path

import pytest
import torch

from unitok.bundle import Unitok, make_bundle, make_untrained
from unitok.checkpoints import load_checkpoint
from unitok.data.tokenize import Plan, tokenize
from unitok.errors import UserError
from unitok.training import Budget, newest_checkpoint, run_lightning, warmup_linear

CONFIGS = Path(__file__).parent.parent / "configs" / "scenes"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, scenes_folder, bundle_folder) -> Path:
    out = tmp_path_factory.mktemp("data") / "tokens"
    tokenize(Plan(str(scenes_folder), str(out), str(bundle_folder)))
    return out


def arguments(kind: str, out: Path, data: Path, steps: int, *more: str) -> list[str]:
    small = {
        "image": ["--model.init_args.quantize_from", "0.2", "--model.init_args.gan.start", "0.3"],
        "audio": ["--model.init_args.quantize_from", "0.2", "--model.init_args.tokenizer.n_filters", "16"],
        "decoder": ["--model.init_args.decoder.hidden_size", "32", "--model.init_args.decoder.num_hidden_layers", "1"],
    }[kind]
    if kind == "decoder":
        small += ["--model.init_args.decoder.dropout", "0.1"]  # so that random state matters
        small += ["--data.init_args.row_length", "192"]
    return [
        *("fit", "--config", str(CONFIGS / f"{kind}.yaml"), "--out", str(out), "--data.init_args.path", str(data)),
        *("--model.init_args.minutes", "null", "--model.init_args.steps", str(steps), "--data.init_args.batch_size", "4"),
        *("--trainer.enable_progress_bar", "false", "--model.init_args.log_every", "1", *small, *more),
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(out)
    assert newest is not None
    return load_checkpoint(newest)["state_dict"]


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


def test_a_checkpoint_of_another_architecture_or_vocabulary_is_refused_by_name(tmp_path, tokens):
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 1))
    with pytest.raises(UserError, match="decoder.intermediate_size is 64, the checkpoint has 384"):
        run_lightning(
            arguments(
                "decoder", tmp_path / "run", tokens, 3, "--resume", "auto", "--model.init_args.decoder.intermediate_size", "64"
            )
        )


def test_bits_and_accuracy_are_logged_for_every_modality_and_level(tmp_path, tokens):
    more = ["--data.init_args.audio_level_weights", "[1.0, 0.5, 0.25]", "--data.init_args.drop_condition", "0"]
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2, *more))
    import csv

    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics" / "metrics.csv")))
    modalities = ["text", "image", "audio", *(f"audio_{level}" for level in range(3))]
    for name in modalities:
        for row in rows:
            assert 0 <= float(row[f"accuracy_{name}"]) <= 1
        assert 0 < float(rows[0][f"bits_{name}"]) < 16
    # a new decoder gives every allowed id the same chance: 64 image codes are 6 bits, 32 codes of a level 5
    assert float(rows[0]["bits_image"]) == pytest.approx(6.0)
    assert float(rows[0]["bits_audio_2"]) == pytest.approx(5.0)
    assert float(rows[0]["log_normaliser"]) > 0
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


def test_documents_longer_than_the_decoder_takes_are_an_error_before_training(tmp_path, tokens):
    with pytest.raises(UserError, match=r"documents of up to \d+ ids, model.decoder.max_position_embeddings is 16: raise it"):
        run_lightning(
            arguments("decoder", tmp_path / "run", tokens, 2, "--model.init_args.decoder.max_position_embeddings", "16")
        )
    assert not (tmp_path / "run").exists()


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
    with pytest.raises(UserError, match="either steps or minutes"):
        Budget(3, 1.0)


def test_the_schedule_warms_up_and_falls_to_a_fiftieth():
    assert warmup_linear(0, 0.0, 10) == pytest.approx(0.1)
    assert warmup_linear(50, 0.5, 10, hold=0.5) == 1.0
    assert warmup_linear(99, 1.0, 10) == pytest.approx(0.02)
