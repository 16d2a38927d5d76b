"""Promises of interchange: equal logits for Chameleon, Llama and Qwen3 of transformers, both ways for Qwen3; refusals by name."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from unitok.api import Unitok
from unitok.bundle import make_bundle, make_untrained
from unitok.cli import main
from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.generation_config import SamplingParams
from unitok.grammar import Grammar
from unitok.interop import import_checkpoint
from unitok.interop.decoder import export_decoder
from unitok.model import Decoder, DecoderConfig
from unitok.plan import parse_plan
from unitok.sample.engine import generate
from unitok.sample.running import Request
from unitok.tokenizers import ImageTokenizer
from unitok.training.finetune import start_decoder

transformers = pytest.importorskip("transformers", reason="an extra")

SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 131,  # no multiple of anything
}


def filled(model):
    """Random weights everywhere, norms and biases too, so that nothing that is left out goes unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") and p.ndim < 3 else 0.0, 0.2)
    return model.eval()


def imported(kind, model, tmp_path, shard="10GB") -> Decoder:
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    main(["import", kind, str(tmp_path / "theirs"), str(tmp_path / "ours")])
    return Decoder.from_pretrained(tmp_path / "ours")


def difference(ours, logits_of) -> float:
    """The largest between two models' logits; both must have all 131 columns and say something."""
    ids = torch.randint(0, 131, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mine, theirs = ours(ids), logits_of(ids)
    assert mine.shape == theirs.shape == (2, 17, 131)
    assert theirs.std() > 0.1
    return float((mine - theirs).abs().max())


LLAMAS = {
    "plain": {},
    "grouped queries": {"num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "head_dim": {"head_dim": 16},
    "llama 3.1": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMAS)
def test_llamas_logits_are_equal(name, tmp_path):
    model = filled(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | LLAMAS[name])))
    assert difference(imported("hf-llama", model, tmp_path), lambda ids: model(ids).logits) < 1e-4


@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 2, "head_dim": 20}, {"tie_word_embeddings": True}])
def test_qwen3s_logits_are_equal_there_and_back(more, tmp_path):
    config = transformers.Qwen3Config(**{"num_key_value_heads": 4, "head_dim": 12} | SHAPE | more)
    model = filled(transformers.Qwen3ForCausalLM(config))
    ours = imported("hf-qwen3", model, tmp_path, shard="40KB")  # several files and an index
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert difference(ours, lambda ids: model(ids).logits) < 1e-4
    main(["export", "hf-qwen3", str(tmp_path / "ours"), str(tmp_path / "back")])
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back).__name__ == "Qwen3ForCausalLM"
    assert difference(ours, lambda ids: back(ids).logits) < 1e-4


VQ = {"embed_dim": 16, "num_embeddings": 24, "latent_channels": 16, "base_channels": 32, "channel_multiplier": [1, 1],
      "num_res_blocks": 1, "resolution": 32}  # fmt: skip


def image_names() -> dict[str, int]:
    """Names of 24 image ids in an order that is not their codes'."""
    order = np.random.default_rng(0).permutation(24)
    letters = {str(d): chr(ord("A") + d) for d in range(10)}
    return {f"IMGIMG{''.join(letters[c] for c in str(code))}Z": 4 + place for place, code in enumerate(order.tolist())}


def chameleon(names: dict[str, int], **more):
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": 40, "<racm3:break>": 29, "<eoss>": 28} | names
    config = transformers.ChameleonConfig(**SHAPE | {"vq_config": VQ, "vocabulary_map": vocabulary} | more)
    return filled(transformers.ChameleonForConditionalGeneration(config))


def all_logits(model, ids):
    """transformers hides image ids in its own logits: take them from the head."""
    return model.lm_head(model.model(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("swin", [False, True])
def test_chameleons_logits_are_equal_with_grouped_queries_and_both_norm_placements(groups, swin, tmp_path):
    model = chameleon({}, num_key_value_heads=groups, swin_norm=swin)
    ours = imported("hf-chameleon", model, tmp_path)
    assert difference(ours, lambda ids: all_logits(model, ids)) < 1e-4
    assert ours.config.norm_placement == ("after" if swin else "before")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    image = ImageTokenizer.from_pretrained(tmp_path / "ours")
    theirs = model.model.vqmodel.encode(pixels).image_tokens
    codes = image.encode(pixels)
    assert torch.equal(codes.flatten(), theirs.flatten())
    assert len(codes.unique()) > 3
    assert not (tmp_path / "ours" / "bundle.json").exists()  # ids stay plain


def test_with_names_of_image_ids_chameleon_becomes_a_bundle_with_its_own_ids(tmp_path, capsys):
    model = chameleon(image_names(), num_key_value_heads=4, max_position_embeddings=512)
    assert difference(imported("hf-chameleon", model, tmp_path), lambda ids: all_logits(model, ids)) < 1e-4
    assert "a bundle with image and decoder" in capsys.readouterr().out
    bundle = Unitok.from_pretrained(tmp_path / "ours")
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    theirs = model.model.get_image_tokens(pixels)[0].numpy()
    document = Document((Segment("image", bundle.image.encode(pixels)[0].numpy()), Segment("text", np.arange(3, 9))))
    ids = bundle.vocab.encode(document)
    assert ids[:2].tolist() == [0, 29]
    assert np.array_equal(ids[2 : 2 + len(theirs)], theirs)
    assert ids[2 + len(theirs)] == 28
    assert ids[-1] == 2
    assert bundle.vocab.size == 131
    Grammar(bundle.vocab).check(ids)
    again = bundle.vocab.decode(ids)
    assert [s.modality for s in again.segments] == ["image", "text"]
    assert np.array_equal(bundle.vocab.encode(again), ids)
    with torch.no_grad():
        assert bundle.model(torch.from_numpy(ids)[None]).shape[-1] == 131


def test_chameleons_own_text_tokenizer_comes_along(tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(["a large red circle left of a small blue square"] * 9, trainer)
    given = json.loads(trained.to_str())
    names = image_names() | {"<s>": 0, "<pad>": 1, "</s>": 2, "<eoss>": 28, "<racm3:break>": 29, "<reserved00001>": 30}
    given["model"]["vocab"] = names | {piece: 31 + id for piece, id in given["model"]["vocab"].items()}
    given["added_tokens"] = [
        {"id": names[name], "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for name in ("<s>", "</s>", "<pad>")
    ]  # fmt: skip
    size = max(given["model"]["vocab"].values()) + 1
    config = transformers.ChameleonConfig(
        **SHAPE | {"vq_config": VQ, "vocabulary_map": names | {"<image>": 30}, "vocab_size": size, "num_key_value_heads": 4}
    )
    filled(transformers.ChameleonForConditionalGeneration(config)).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(given))
    main(["import", "hf-chameleon", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert "a bundle with text, image and decoder" in capsys.readouterr().out
    bundle = Unitok.from_pretrained(tmp_path / "ours")
    reference = Tokenizer.from_str(json.dumps(given))
    for text in ("a small red square", " two\n spaces  ", "żółw 🐢", "<s> is no mark here IMGIMGAZ"):
        codes = bundle.text.encode(text)
        assert bundle.text.decode(codes) == text
        ids = bundle.vocab.encode(Document((Segment("text", np.array(codes)),)))
        assert ids[1:-1].tolist() == [code + bundle.vocab.range("text").offset for code in codes]
        if "<s>" not in text:
            assert ids[1:-1].tolist() == reference.encode(text, add_special_tokens=False).ids
        Grammar(bundle.vocab).check(ids)
    assert not bundle.vocab.range("text").holds(np.array([30]))[0]  # a reserved id
    again = Unitok.from_pretrained(tmp_path / "ours")
    assert again.text.fingerprint() == bundle.text.fingerprint()
    made = bundle.generate([["a red"]], modalities="text,image", max_new_tokens=700, seed=1)
    assert [s.modality for s in made[0].new.segments] == ["text", "image"]


def test_an_exported_bundle_says_what_its_ids_mean(tmp_path):
    bundle = make_untrained(tmp_path / "bundle")
    torch.manual_seed(1)
    bundle.model = filled(Decoder(replace(bundle.model.config, span_positions=0)))
    bundle.save_pretrained(tmp_path / "bundle", overwrite=True)
    for _ in range(2):  # an export may be written again
        main(["export", "hf-qwen3", str(tmp_path / "bundle"), str(tmp_path / "out")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    vocab = bundle.vocab
    assert (theirs.config.bos_token_id, theirs.generation_config.eos_token_id) == (vocab.bos, vocab.eos)
    known = json.loads((tmp_path / "out" / "unitok_ids.json").read_text())
    image = vocab.range("image")
    assert known["ranges"]["image"] == {"first": image.offset, "count": image.size, "kind": "codes"}
    assert known["special_ids"]["<image>"] == vocab.specials["<image>"]
    ids = torch.randint(0, vocab.size, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(bundle.model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_ids_of_unknown_meaning_are_refused_and_an_export_keeps_what_its_own_mean(tiny, bundle_folder, tmp_path):
    """A Llama of as many ids as the data has would train without a word, its text on other rows."""
    shape = SHAPE | {"vocab_size": tiny.vocab.size, "num_key_value_heads": 2, "head_dim": 12}
    filled(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))).save_pretrained(tmp_path / "llama")
    main(["import", "hf-llama", str(tmp_path / "llama"), str(tmp_path / "foreign")])
    config = tiny.model.config
    with pytest.raises(UserError, match=r"foreign: a decoder without a vocabulary \(no vocab.json"):
        start_decoder(tmp_path / "foreign", config, tiny.vocab, "the data")
    tokenizers = dict.fromkeys(("text", "image", "audio"), bundle_folder)
    with pytest.raises(UserError, match="foreign: a decoder without a vocabulary"):
        make_bundle(tmp_path / "bundle", tokenizers | {"model": tmp_path / "foreign"})
    assert not (tmp_path / "bundle").exists()
    assert start_decoder(bundle_folder, config, tiny.vocab, "the data")[1] == tiny.vocab.size
    assert start_decoder(bundle_folder / "model", config, tiny.vocab, "the data")[1] == tiny.vocab.size

    decoder = filled(Decoder(replace(config, span_positions=0)))
    export_decoder("hf-qwen3", decoder, tiny.vocab, tmp_path / "out")
    main(["import", "hf-qwen3", str(tmp_path / "out"), str(tmp_path / "back")])
    made = make_bundle(tmp_path / "bundle", tokenizers | {"model": tmp_path / "back"})
    assert made.vocab == tiny.vocab
    assert all(torch.equal(tensor, decoder.state_dict()[name]) for name, tensor in made.model.state_dict().items())
    known = json.loads((tmp_path / "out" / "unitok_ids.json").read_text())
    known["manifest"]["ranges"].pop()
    known["manifest"]["spans"].pop()
    (tmp_path / "out" / "unitok_ids.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"unitok_ids.json: \d+ tokens, the weights have"):
        import_checkpoint("hf-qwen3", tmp_path / "out")


def test_what_does_not_fit_is_refused_by_name(tmp_path, capsys):
    def refusal(*command: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(command))
        assert stopped.value.code == 2
        return capsys.readouterr().err

    make_untrained(tmp_path / "bundle")  # its decoder has place embeddings
    printed = refusal("export", "hf-qwen3", str(tmp_path / "bundle"), str(tmp_path / "out"))
    assert "the decoder has span_positions 32, which Qwen3 does not" in printed
    assert not (tmp_path / "out").exists()
    Decoder(DecoderConfig(20, 16, 1, 16, 1, 1, head_dim=16, qk_norm="layer")).save_pretrained(tmp_path / "layer")
    assert "qk_norm 'layer'" in refusal("export", "hf-qwen3", str(tmp_path / "layer"), str(tmp_path / "out"))

    model = filled(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)))
    theirs = tmp_path / "llama"
    model.save_pretrained(theirs)
    out = str(tmp_path / "ours")
    assert "model_type 'llama', not qwen3" in refusal("import", "hf-qwen3", str(theirs), out)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert "hidden_act 'gelu' cannot be imported" in refusal("import", "hf-llama", str(theirs), out)
    (theirs / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    printed = refusal("import", "hf-llama", str(theirs), out)
    assert "model.layers.0.mlp.gate_proj.weight is [80, 48], not [96, 48]" in printed
    (theirs / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "it lacks model.layers.2." in refusal("import", "hf-llama", str(theirs), out)
    (theirs / "config.json").unlink()
    assert "config.json: no such file; give a folder saved by transformers" in refusal("import", "hf-llama", str(theirs), out)
    assert not Path(out).exists()
    with pytest.raises(UserError, match="no kind 'hf-gpt2'"):
        import_checkpoint("hf-gpt2", theirs)


def test_an_exported_decoder_writes_images_in_transformers_too(tiny, tmp_path):
    """Greedy ids of `generate` with the grammar are those of our engine, in a batch of prompts of different lengths."""
    from unitok.interop.constrain import GrammarLogitsProcessor

    torch.manual_seed(0)
    decoder = filled(Decoder(replace(tiny.model.config, span_positions=0)))
    export_decoder("hf-qwen3", decoder, tiny.vocab, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    vocab, plan = tiny.vocab, parse_plan("text,image:2x3,audio:2", tiny.vocab, {"audio": 12.5})
    prompts = [vocab.encode(Document((Segment("text", tiny.text.encode(t)),)), eos=False) for t in ("a text", "nothing small")]
    longest = max(map(len, prompts))
    padded = torch.tensor([[vocab.pad] * (longest - len(p)) + p.tolist() for p in prompts])
    grammar = GrammarLogitsProcessor.from_pretrained(tmp_path / "out", "text,image:2x3,audio:2", 40)
    made = model.generate(
        padded, attention_mask=(padded != vocab.pad).long(), max_new_tokens=40, do_sample=False, logits_processor=[grammar]
    )
    ours = generate(
        decoder, Grammar(vocab), [Request(p, plan, 40) for p in prompts], dict.fromkeys(vocab.spans, SamplingParams(0.0))
    )
    for theirs, mine in zip(made[:, longest:].tolist(), ours, strict=True):
        assert theirs[: len(mine)] == mine.tolist()
        assert set(theirs[len(mine) :]) <= {vocab.eos, vocab.pad}
    beams = GrammarLogitsProcessor.from_pretrained(tmp_path / "out", "image:2x2,text", 24)
    found = model.generate(padded[:1], max_new_tokens=24, num_beams=3, do_sample=False, logits_processor=[beams])
    document = vocab.decode(found[0, longest:].numpy())
    assert [s.modality for s in document.segments] == ["image", "text"]
    fewer = GrammarLogitsProcessor.from_pretrained(tmp_path / "out", "image:2x2", 24)  # one token is allowed, of three beams
    found = model.generate(
        torch.tensor([[vocab.bos]]), max_new_tokens=24, num_beams=3, do_sample=False, logits_processor=[fewer]
    )
    assert [s.modality for s in vocab.decode(found[0, 1:].numpy()).segments] == ["image"]
