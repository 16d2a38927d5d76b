"""A language model that people have becomes one that sees and hears: its tokens keep their numbers and its logits on text."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from unitok.api import Unitok
from unitok.cli import main
from unitok.data.shards import TokenDataset
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.vocab import Vocab

TEXTS = [
    "a large red circle on a white background",
    "what is this? a bell, loud and low.",
    "Grüße, 你好, and 1,234 things",
] * 20
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS = {"hf-llama": (LlamaForCausalLM, LlamaConfig, {}), "hf-qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16})}


@pytest.fixture(params=MODELS)
def language_model(request, tmp_path):
    """A tiny model with random weights and a real byte-level BPE, as transformers saves them: (kind, model, tokenizer, folder)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<s>", "</s>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    )
    folder = tmp_path / "language-model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    model_class, config_class, more = MODELS[request.param]
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": [1, 2], "tie_word_embeddings": False}
    model = model_class(
        config_class(vocab_size=tokenizer.get_vocab_size() + 5, **SIZES, **ends, **more)
    ).eval()  # rows for alignment
    model.save_pretrained(folder)
    return request.param, model, tokenizer, folder


def bundle_with_media(kind, folder, bundle_folder, out):
    """Import a language model and add tokenizers: `out/imported` and `out/bundle`."""
    main(["import", kind, str(folder), str(out / "imported")])
    added = ["--image", str(bundle_folder), "--audio", str(bundle_folder)]
    main(["bundle", str(out / "bundle"), "--decoder", str(out / "imported"), *added])


def test_text_keeps_its_numbers_and_its_logits(language_model, bundle_folder, tmp_path):
    kind, model, tokenizer, folder = language_model
    bundle_with_media(kind, folder, bundle_folder, tmp_path)
    unitok, size = Unitok.from_pretrained(tmp_path / "bundle"), model.config.vocab_size
    assert list(unitok.tokenizers) == ["text", "image", "audio"]
    assert unitok.model.config.vocab_size == unitok.vocab.size > size + 64
    for text in set(TEXTS):
        ids = unitok.vocab.encode(unitok.read_prompt(text), eos=False)
        assert ids.tolist() == [0, *tokenizer.encode(text).ids]  # <s>, which begins its documents and ours
        given = torch.from_numpy(ids)[None]
        with torch.no_grad():
            np.testing.assert_allclose(unitok.model(given)[..., :size], model(given).logits, atol=1e-5)
        assert unitok.decode(unitok.read_prompt(text).segments[0]) == text
    assert unitok.vocab.eos == 1
    assert unitok.vocab.bos not in unitok.vocab.range("text").intervals()[0]
    old, new = unitok.model.lm_head.weight[:size], unitok.model.lm_head.weight[size:]
    assert torch.allclose(new.mean(), old.mean(), atol=5e-3)
    assert torch.allclose(new.std(), old.std(), rtol=0.1)
    outputs = unitok.generate("a large", "text,image:2x2", n=2, max_new_tokens=60)
    assert all(output.images[0].shape == (3, 8, 8) for output in outputs)
    with pytest.raises(SystemExit):  # its own tokens are not those of another text tokenizer
        main(["bundle", str(tmp_path / "other"), "--decoder", str(tmp_path / "imported"), "--text", str(bundle_folder)])


@pytest.mark.parametrize(
    "flags", [[], ["--model.init_args.train_new_tokens_only", "true"], ["--model.init_args.lora.rank", "4"]]
)
def test_it_trains_whole_or_its_new_rows_or_by_lora(language_model, bundle_folder, scenes_folder, tmp_path, flags):
    kind, model, _, folder = language_model
    bundle_with_media(kind, folder, bundle_folder, tmp_path)
    main(["tokenize", str(scenes_folder), str(tmp_path / "tokens"), "--bundle", str(tmp_path / "bundle"), "--workers", "1"])
    assert TokenDataset(tmp_path / "tokens").vocab.to_manifest() == Vocab.load(tmp_path / "bundle" / "vocab.json").to_manifest()
    config = [
        "fit",
        "--config",
        "decoder/from-llama.yaml",
        "--out",
        str(tmp_path / "run"),
        "--data.init_args.path",
        str(tmp_path / "tokens"),
    ]
    small = [
        "--data.init_args.sequence_length",
        "512",
        "--data.init_args.batch_size",
        "1",
        "--trainer.precision",
        "32-true",
        "--trainer.accelerator",
        "cpu",
    ]
    main([*config, "--model.init_args.init_from", str(tmp_path / "bundle"), "--model.init_args.steps", "2", *small, *flags])
    before = Unitok.from_pretrained(tmp_path / "bundle").model.state_dict()
    main(["bundle", str(tmp_path / "bundle"), "--decoder", str(tmp_path / "run")])
    trained = Unitok.from_pretrained(tmp_path / "bundle").model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    size = model.config.vocab_size
    if "true" in flags:
        assert moved == {"model.embed_tokens.weight", "lm_head.weight"}
        assert all(torch.equal(before[name][:size], trained[name][:size]) for name in moved)
    else:
        assert "model.layers.0.self_attn.q_proj.weight" in moved


def test_what_cannot_be_imported_is_said(language_model, tmp_path, capsys):
    kind, _, _, folder = language_model
    broken = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(broken)[:200])
    with pytest.raises(SystemExit) as ended:
        main(["import", kind, str(folder), str(tmp_path / "imported")])
    assert ended.value.code == 2
    assert "tokenizer.json" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    main(["import", kind, str(folder), str(tmp_path / "imported")])  # without one: a decoder alone, as before
    assert isinstance(Decoder.from_pretrained(tmp_path / "imported"), Decoder)


def test_new_rows_are_those_of_the_old_ones_in_mean_and_spread():
    torch.manual_seed(0)
    decoder = Decoder(
        DecoderConfig(
            vocab_size=200,
            hidden_size=16,
            num_hidden_layers=1,
            intermediate_size=32,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    with torch.no_grad():
        decoder.lm_head.weight.normal_(3.0, 0.5)
    grown = decoder.grown(5000)
    assert torch.equal(grown.lm_head.weight[:200], decoder.lm_head.weight)
    new = grown.lm_head.weight[200:]
    assert torch.allclose(new.mean(0), decoder.lm_head.weight.mean(0), atol=0.05)
    assert torch.allclose(new.std(0), decoder.lm_head.weight.std(0), rtol=0.06)
