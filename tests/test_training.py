"""Promises of training: stopping and resuming is bit for bit the uncut run; what the user says now wins."""

from pathlib import Path

import pytest
import torch

from unitok.bundle import Unitok, make_bundle, make_untrained
from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.data.tokenize import Plan, tokenize
from unitok.errors import UserError
from unitok.fit import run_lightning
from unitok.training import Budget, warmup_linear

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


def test_documents_longer_than_the_decoder_takes_are_an_error_before_training(tmp_path, tokens):
    with pytest.raises(UserError, match=r"documents of up to \d+ ids, model.decoder.max_position_embeddings is 16: raise it"):
        run_lightning(
            arguments("decoder", tmp_path / "run", tokens, 2, "--model.init_args.decoder.max_position_embeddings", "16")
        )
    assert not (tmp_path / "run").exists()


# ---- Skipped batches, averages, starting from something ---------------------------------------------------------------


class Poisoned:
    """Makes the hidden states of some steps' forward passes NaN."""

    def __init__(self, monkeypatch, steps: set[int]):
        from unitok.model.decoder import Decoder

        self.calls, real = 0, Decoder.hidden

        def hidden(decoder, *arguments, **more):
            self.calls += 1
            found = real(decoder, *arguments, **more)
            return found * float("nan") if self.calls in steps else found

        monkeypatch.setattr(Decoder, "hidden", hidden)


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


def test_a_run_starts_from_a_bundle_with_some_parameters_frozen(tmp_path, tokens, bundle_folder):
    start = ["--model.init_args.start_from", str(bundle_folder), "--model.init_args.decoder.max_position_embeddings", "1024"]
    freeze = ["--model.init_args.freeze", '["model.layers.0.*", "model.embed_tokens.*"]']
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 3, *start, *freeze))
    old = Unitok.from_pretrained(bundle_folder).model.state_dict()
    new = {name.removeprefix("decoder."): t for name, t in weights(tmp_path / "run").items()}
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {name for name in old if not name.startswith(("model.layers.0.", "model.embed_tokens."))}
    with pytest.raises(UserError, match=r"freeze 'model.layer.0.*': no parameter of that name; the nearest is model.layers.0"):
        run_lightning(
            arguments("decoder", tmp_path / "no", tokens, 3, *start, "--model.init_args.freeze", '["model.layer.0.*"]')
        )
    with pytest.raises(UserError, match="only_new_ids: the data has no ids that"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 3, *start, "--model.init_args.only_new_ids", "true"))
    make_untrained(tmp_path / "other", seed=3)
    other = Unitok.from_pretrained(tmp_path / "other")
    other.vocab.ranges[1] = type(other.vocab.ranges[1])("text", "text", 256, 299)
    other.vocab.save(tmp_path / "other" / "vocab.json")
    with pytest.raises(UserError, match="its vocabulary is no beginning of the data's"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 3, "--model.init_args.start_from", str(tmp_path / "other")))
    assert not (tmp_path / "no").exists()


def test_a_grown_vocabulary_trains_its_new_rows_alone(tmp_path, scenes_folder):
    """A bundle that knows text and images learns sounds; nothing of the old ids moves (as in Anole)."""
    whole = make_untrained(tmp_path / "whole")
    from unitok.bundle import build_vocab
    from unitok.model import Decoder, DecoderConfig

    small = build_vocab(whole.text, whole.image)
    old = Decoder(DecoderConfig(small.size, 32, 1, 64, 1, 1, head_dim=32))
    torch.nn.init.normal_(old.lm_head.weight, std=0.1)
    Unitok(small, whole.text, whole.image, None, old).save_pretrained(tmp_path / "small")
    whole.vocab = build_vocab(audio=whole.audio, onto=small)
    whole.model = None
    whole.save_pretrained(tmp_path / "grown")
    tokenize(Plan(str(scenes_folder), str(tmp_path / "tokens"), str(tmp_path / "grown")))
    only = ["--model.init_args.start_from", str(tmp_path / "small"), "--model.init_args.only_new_ids", "true"]
    run_lightning(arguments("decoder", tmp_path / "run", tmp_path / "tokens", 4, *only, "--model.init_args.optimizer", "adamw"))
    made = make_bundle(tmp_path / "grown", {"model": tmp_path / "run"})
    assert made.model.config.vocab_size == whole.vocab.size > small.size
    before, after = old.state_dict(), made.model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name][: len(tensor)] if tensor.ndim else after[name]), name
    assert after["lm_head.weight"][small.size :].abs().max() > 0


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
