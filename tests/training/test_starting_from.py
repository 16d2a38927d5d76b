"""Promises of starting from a bundle: parts frozen, new rows alone, low-rank differences."""

import logging

import pytest
import torch
from fitting import arguments, weights

from unitok.api import Unitok
from unitok.bundle import Bundle, make_bundle, make_untrained
from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import tokenize
from unitok.errors import UserError
from unitok.model import Decoder, DecoderConfig
from unitok.training.fit import run_lightning
from unitok.training.optim import default_rates
from unitok.training.shell import warmup_linear


def last_rates(out):
    """Of each optimizer, at the last of 3 or 4 steps, over the schedule's factor there."""
    saved = load_checkpoint(newest_checkpoint(out))
    done = saved["unitok"]["steps_done"]
    factor = warmup_linear(done - 1, (done - 1) / done, 30, stable_fraction=0.3)
    return [state["param_groups"][0]["lr"] / factor for state in saved["optimizer_states"]]


def test_learning_rates_fit_what_training_starts_from():
    assert default_rates(64, "scratch") == default_rates(4096, "scratch") == (1e-2, 0.02)
    assert default_rates(64, "weights") == default_rates(128, "weights") == pytest.approx((1e-3, 0.002))
    assert default_rates(4096, "weights")[0] == pytest.approx(3e-5, rel=0.1)
    assert default_rates(4096, "lora")[0] == pytest.approx(3e-4, rel=0.1)
    assert default_rates(64, "lora")[0] == 1e-3
    assert default_rates(4096, "new ids")[0] == pytest.approx(3e-4, rel=0.1)


def test_a_run_starts_from_a_bundle_with_some_parameters_frozen(tmp_path, tokens, bundle_folder, caplog):
    start = ["--model.init_args.init_from", str(bundle_folder), "--model.init_args.decoder.max_position_embeddings", "1024"]
    freeze = ["--model.init_args.freeze", '["model.layers.0.*", "model.embed_tokens.*"]']
    with caplog.at_level(logging.INFO, logger="unitok"):
        run_lightning(arguments("decoder", tmp_path / "run", tokens, 3, *start, *freeze))
    assert "a start from weights: AdamW 0.001 (usual: 0.001), Muon 0.002 (usual: 0.002)" in caplog.text
    assert last_rates(tmp_path / "run") == pytest.approx([1e-3, 0.002])
    old = Unitok.from_pretrained(bundle_folder).model.state_dict()
    new = {name.removeprefix("decoder."): t for name, t in weights(tmp_path / "run").items()}
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {name for name in old if not name.startswith(("model.layers.0.", "model.embed_tokens."))}
    with pytest.raises(UserError, match=r"freeze 'model.layer.0.*': no parameter of that name; the nearest is model.layers.0"):
        run_lightning(
            arguments("decoder", tmp_path / "no", tokens, 3, *start, "--model.init_args.freeze", '["model.layer.0.*"]')
        )
    with pytest.raises(UserError, match="train_new_tokens_only: the data has no ids that"):
        run_lightning(
            arguments("decoder", tmp_path / "no", tokens, 3, *start, "--model.init_args.train_new_tokens_only", "true")
        )
    make_untrained(tmp_path / "other", seed=3)  # codes of the same numbers that mean something else
    with pytest.raises(UserError, match="the vocabularies differ in .*: tokenizer"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 3, "--model.init_args.init_from", str(tmp_path / "other")))
    short = ["--model.init_args.init_from", str(tmp_path / "short")]
    Decoder(
        DecoderConfig(Unitok.from_pretrained(bundle_folder).vocab.size, 16, 1, 16, 1, 1, 16, max_position_embeddings=20)
    ).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match=r"short: a decoder without a vocabulary \(no vocab.json beside it\)"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 3, *short))
    Unitok.from_pretrained(bundle_folder, parts=()).vocab.save(tmp_path / "short" / "vocab.json")
    with pytest.raises(UserError, match="max_position_embeddings is 20: raise it"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 3, *short))
    with pytest.raises(UserError, match="train_new_tokens_only needs init_from"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 3, "--model.init_args.train_new_tokens_only", "true"))
    assert not (tmp_path / "no").exists()


def test_a_grown_vocabulary_trains_its_new_rows_alone(tmp_path, scenes_folder):
    """A bundle that knows text and images learns sounds; nothing of the old ids moves (as in Anole)."""
    whole = make_untrained(tmp_path / "whole")
    from unitok.modalities import build_vocab

    small = build_vocab({"text": whole.text, "image": whole.image})
    old = Decoder(DecoderConfig(small.size, 32, 1, 64, 1, 1, head_dim=32))
    torch.nn.init.normal_(old.lm_head.weight, std=0.1)
    Bundle(small, {"text": whole.text, "image": whole.image}, old).save_pretrained(tmp_path / "small")
    whole.vocab = build_vocab({"audio": whole.audio}, onto=small)
    whole.model = None
    whole.save_pretrained(tmp_path / "grown")
    tokenize(Plan(str(scenes_folder), str(tmp_path / "tokens"), str(tmp_path / "grown")))
    only = ["--model.init_args.init_from", str(tmp_path / "small"), "--model.init_args.train_new_tokens_only", "true"]
    run_lightning(arguments("decoder", tmp_path / "run", tmp_path / "tokens", 4, *only, "--model.init_args.optimizer", "adamw"))
    made = make_bundle(tmp_path / "grown", {"model": tmp_path / "run"})
    assert made.model.config.vocab_size == whole.vocab.size > small.size
    before, after = old.state_dict(), made.model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name][: len(tensor)] if tensor.ndim else after[name]), name
    assert after["lm_head.weight"][small.size :].abs().max() > 0
    rows = after["model.embed_tokens.weight"]
    assert not torch.equal(rows[small.size :], rows[: small.size].mean(0).expand_as(rows[small.size :]))


def test_lora_trains_differences_alone_and_a_bundle_takes_the_sums(tmp_path, tokens, bundle_folder):
    import shutil

    pytest.importorskip("peft", reason="an extra")
    start = ["--model.init_args.init_from", str(bundle_folder), "--model.init_args.lora.rank", "2"]
    run_lightning(arguments("decoder", tmp_path / "uncut", tokens, 4, *start))
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 4, *start, "--trainer.max_steps", "2"))
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 4, *start, "--resume", "auto"))
    assert last_rates(tmp_path / "run") == pytest.approx([1e-3])  # AdamW alone
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
