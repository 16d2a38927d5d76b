"""Promises of starting from a bundle: parts frozen, new rows alone, low-rank differences."""

import logging
from pathlib import Path

import pytest
import torch
from fitting import arguments, weights

from unitok.api import Unitok
from unitok.bundle import Bundle, make_bundle, make_untrained
from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.cli import main
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import tokenize
from unitok.errors import UserError
from unitok.model import Decoder, DecoderConfig
from unitok.training.finetune import start_decoder
from unitok.training.fit import run_lightning
from unitok.training.optim import OptimizerDefaults, optimizer_defaults
from unitok.training.shell import warmup_linear


def peaks(out, stable_fraction=0.0):
    """Peak learning rates of each optimizer's groups: those of the last step, divided by the schedule's factor there."""
    saved = load_checkpoint(newest_checkpoint(out))
    done = saved["unitok"]["steps_done"]
    factor = warmup_linear(done - 1, (done - 1) / done, 30, stable_fraction)
    return [[group["lr"] / factor for group in state["param_groups"]] for state in saved["optimizer_states"]]


def test_default_learning_rates_fall_with_the_width_where_training_starts_from_weights():
    assert optimizer_defaults(64, "scratch") == optimizer_defaults(4096, "scratch") == OptimizerDefaults(1e-2, 0.02, 0.3)
    assert optimizer_defaults(64, "weights") == optimizer_defaults(128, "weights") == OptimizerDefaults(1e-3, 0.002, 0.0)
    assert optimizer_defaults(4096, "weights").lr == pytest.approx(3e-5, rel=0.1)
    assert optimizer_defaults(4096, "lora").lr == optimizer_defaults(4096, "new tokens").lr == pytest.approx(3e-4, rel=0.1)
    assert optimizer_defaults(64, "lora").lr == 1e-3


@pytest.fixture
def start(tmp_path, bundle_folder):
    """Make what a run can start from: our bundle, or a decoder of transformers that `unitok import` read, 160 wide."""

    def make(kind: str) -> str:
        if kind == "bundle":
            return str(bundle_folder)
        transformers = pytest.importorskip("transformers", reason="an extra")
        vocab = Unitok.from_pretrained(bundle_folder, parts=()).vocab
        heads = {"num_attention_heads": 5, "num_key_value_heads": 5}
        shape = {"vocab_size": vocab.size, "hidden_size": 160, "intermediate_size": 64, "num_hidden_layers": 1, **heads}
        more = {"max_position_embeddings": 256}
        if kind == "hf-chameleon":
            vq = {"resolution": 32, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 16}
            vq |= {"latent_channels": 16, "num_embeddings": 24}
            config = transformers.ChameleonConfig(**shape, **more, vq_config=vq, vocabulary_map={"<image>": 40})
            model = transformers.ChameleonForConditionalGeneration(config)
        elif kind == "hf-qwen3":
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **more, head_dim=32))
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **more))
        model.save_pretrained(tmp_path / "theirs")
        main(["import", kind, str(tmp_path / "theirs"), str(tmp_path / "ours")])
        vocab.save(tmp_path / "ours" / "vocab.json")  # an import does not know what its tokens mean
        return str(tmp_path / "ours")

    return make


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("", {}, [[1e-2, 1e-2], [0.02]]),
        ("", {"optimizer": "adamw"}, [[1e-2, 1e-2]]),
        ("bundle", {}, [[1e-3, 1e-3], [0.002]]),  # 64 wide
        ("bundle", {"lr": "5e-4", "muon_lr": "0.01"}, [[5e-4, 5e-4], [0.01]]),
        ("hf-llama", {}, [[8e-4, 8e-4], [0.002]]),  # 160 wide: 1e-3 x 128 / 160
        ("hf-qwen3", {"optimizer": "adamw"}, [[8e-4, 8e-4]]),
        ("hf-chameleon", {}, [[8e-4, 8e-4], [0.002]]),
    ],
    ids=str,
)
def test_every_group_of_parameters_has_the_peak_that_fits_the_start(kind, more, expected, start, tmp_path, tokens):
    flags = {"stable_fraction": "null", **more, **({"init_from": start(kind)} if kind else {})}
    words = [word for key, value in flags.items() for word in (f"--model.init_args.{key}", value)]
    longest = ["--model.init_args.decoder.max_position_embeddings", "1024", "--data.init_args.max_length", "192"]
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 2, *longest, *words))
    assert peaks(tmp_path / "run", 0.0 if kind else 0.3) == [pytest.approx(groups) for groups in expected]


def test_a_built_in_bundle_is_a_start():
    shipped = Bundle.from_pretrained("scenes", parts=["model"])
    decoder, _ = start_decoder(Path("scenes"), shipped.model.config, shipped.vocab, "data")
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), shipped.model.parameters(), strict=True))


def test_a_run_starts_from_a_bundle_with_some_parameters_frozen(tmp_path, tokens, bundle_folder, caplog):
    start = ["--model.init_args.init_from", str(bundle_folder), "--model.init_args.decoder.max_position_embeddings", "1024"]
    freeze = ["--model.init_args.freeze", '["model.layers.0.*", "model.embed_tokens.*"]']
    with caplog.at_level(logging.INFO, logger="unitok"):
        run_lightning(arguments("decoder", tmp_path / "run", tokens, 3, *start, *freeze))
    line = (
        "fine-tuning of all weights: lr 0.001 (default 0.001), muon_lr 0.002 (default 0.002), stable_fraction 0.3 (default 0)"
    )
    assert line in caplog.messages
    architecture = next(m for m in caplog.messages if m.startswith(f"the architecture is that of {bundle_folder}: "))
    assert "hidden_size 64, not 32" in architecture
    assert "max_position_embeddings" not in architecture
    old = Unitok.from_pretrained(bundle_folder).model.state_dict()
    new = {name.removeprefix("decoder."): t for name, t in weights(tmp_path / "run").items()}
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {name for name in old if not name.startswith(("model.layers.0.", "model.embed_tokens."))}
    with pytest.raises(UserError, match=r"freeze 'model.layer.0.*': no parameter of that name; the nearest is model.layers.0"):
        run_lightning(
            arguments("decoder", tmp_path / "no", tokens, 3, *start, "--model.init_args.freeze", '["model.layer.0.*"]')
        )
    with pytest.raises(UserError, match="train_new_tokens_only: the data has no tokens that"):
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
    """A bundle that knows text and images learns audio; nothing of the old tokens changes (as in Anole)."""
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
    assert peaks(tmp_path / "run", 0.3) == [pytest.approx([1e-2, 1e-2])]  # 32 wide
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
    assert peaks(tmp_path / "run", 0.3) == [pytest.approx([1e-3, 1e-3])]  # AdamW alone
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
    with pytest.raises(UserError, match="lora needs init_from"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 4, "--model.init_args.lora.rank", "2"))
    with pytest.raises(UserError, match="lora.targets: no matrix 'queries'; the decoder has down_proj"):
        run_lightning(arguments("decoder", tmp_path / "no", tokens, 4, *start, "--model.init_args.lora.targets", "[queries]"))


# ---- Checkpoints and what may go wrong ---------------------------------------------------------------------------------
