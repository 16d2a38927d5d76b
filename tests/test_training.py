"""Promises of training: stopping and resuming is bit for bit the uncut run; what the user says now wins."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unitok.bundle import Unitok, make_bundle, make_untrained
from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.data.module import TokenShards
from unitok.data.packing import PackedDataset
from unitok.data.tokenize import Plan, tokenize
from unitok.errors import UserError
from unitok.fit import run_lightning
from unitok.model import Decoder, DecoderConfig
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
    make_untrained(tmp_path / "other", seed=3)  # codes of the same numbers that mean something else
    with pytest.raises(UserError, match="the vocabularies differ in .*: tokenizer"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 3, "--model.init_args.start_from", str(tmp_path / "other")))
    short = ["--model.init_args.start_from", str(tmp_path / "short")]
    Decoder(
        DecoderConfig(Unitok.from_pretrained(bundle_folder).vocab.size, 16, 1, 16, 1, 1, 16, max_position_embeddings=20)
    ).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="max_position_embeddings is 20: raise it"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 3, *short))
    with pytest.raises(UserError, match="only_new_ids needs start_from"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 3, "--model.init_args.only_new_ids", "true"))
    assert not (tmp_path / "no").exists()


def test_a_grown_vocabulary_trains_its_new_rows_alone(tmp_path, scenes_folder):
    """A bundle that knows text and images learns sounds; nothing of the old ids moves (as in Anole)."""
    whole = make_untrained(tmp_path / "whole")
    from unitok.bundle import build_vocab

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
    rows = after["model.embed_tokens.weight"]
    assert not torch.equal(rows[small.size :], rows[: small.size].mean(0).expand_as(rows[small.size :]))


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


def test_lora_trains_differences_alone_and_a_bundle_takes_the_sums(tmp_path, tokens, bundle_folder):
    import shutil

    pytest.importorskip("peft", reason="an extra")
    start = ["--model.init_args.start_from", str(bundle_folder), "--model.init_args.lora.rank", "2"]
    run_lightning(arguments("decoder", tmp_path / "uncut", tokens, 4, *start))
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 4, *start, "--trainer.max_steps", "2"))
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 4, *start, "--resume", "auto"))
    trained, uncut = weights(tmp_path / "run"), weights(tmp_path / "uncut")
    assert all(torch.equal(tensor, uncut[name]) for name, tensor in trained.items())
    old = Unitok.from_pretrained(bundle_folder).model.state_dict()
    q = "model.layers.0.self_attn.q_proj"
    assert torch.equal(trained[f"decoder.{q}.base_layer.weight"], old[f"{q}.weight"])
    assert torch.equal(trained["decoder.lm_head.weight"], old["lm_head.weight"])
    shutil.copytree(bundle_folder, tmp_path / "bundle")
    new = make_bundle(tmp_path / "bundle", {"model": tmp_path / "run"}).model.state_dict()
    assert new.keys() == old.keys()
    a, b = (trained[f"decoder.{q}.lora_{letter}.default.weight"] for letter in "AB")
    assert b.abs().max() > 0
    torch.testing.assert_close(new[f"{q}.weight"], old[f"{q}.weight"] + 8.0 * b @ a)
    with pytest.raises(UserError, match="lora.targets: no matrix 'queries'; the decoder has down_proj"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 4, *start, "--model.init_args.lora.targets", "[queries]"))


# ---- Checkpoints and what may go wrong ---------------------------------------------------------------------------------


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


# ---- Samples while it trains -------------------------------------------------------------------------------------------


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
