"""A decoder as GGUF: tensors, keys and vocabulary as llama.cpp reads them, and its logits where it is installed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor

from unitok.bundle import Bundle
from unitok.cli import main
from unitok.model import Decoder

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    """A bundle whose decoder has no shape by chance: grouped heads, heads that do not add up to the width, norms unlike 1."""
    torch.manual_seed(0)
    config = replace(
        tiny.model.config, span_positions=0, hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=160, rope_theta=5000.0, rms_norm_eps=1e-5,
    )  # fmt: skip
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            p.normal_(float("norm" in name), 0.15)
    folder = tmp_path_factory.mktemp("gguf") / "bundle"
    Bundle(tiny.vocab, tiny.tokenizers, decoder).save_pretrained(folder)
    return folder


def exported(bundle, out, weights):
    main(["export", "gguf", str(bundle), str(out), "--weights", weights])
    assert (out / "unitok_ids.json").exists()
    return out / f"decoder-{weights}.gguf"


@pytest.mark.parametrize(("weights", "error"), [("f32", 0.0), ("f16", 5e-4), ("q8_0", 5e-3)])
def test_tensors_and_tokens_are_those_of_the_bundle(bundle, tiny, tmp_path, weights, error):
    reader = gguf.GGUFReader(exported(bundle, tmp_path / "out", weights))
    decoder, vocab = Bundle.from_pretrained(bundle).model, tiny.vocab
    state, tensors = decoder.state_dict(), {t.name: t for t in reader.tensors}
    assert len(tensors) == len(state)
    names = {
        "token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight", "output_norm.weight": "model.norm.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight", "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.1.attn_k_norm.weight": "model.layers.1.self_attn.k_norm.weight",
        "blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    }  # fmt: skip
    for theirs, ours in names.items():
        found = gguf.quants.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        np.testing.assert_allclose(found, state[ours].numpy(), atol=0.0 if state[ours].ndim == 1 else error)
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "qwen3"
    assert (value["qwen3.attention.key_length"], value["qwen3.attention.head_count_kv"]) == (32, 2)
    assert value["qwen3.rope.freq_base"] == 5000.0
    tokens, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    assert len(tokens) == len(set(tokens)) == vocab.size
    assert tokens[vocab.specials["<image>"]] == "<image>"
    assert tokens[vocab.range("image").offset + 7] == "<image:7>"
    pieces = SentencePieceProcessor(model_proto=tiny.tokenizers["text"].model)
    first, ordinary = vocab.range("text").offset, pieces.vocab_size() - 1
    assert tokens[first + ordinary] == pieces.id_to_piece(ordinary)
    assert types[first + ordinary] == gguf.TokenType.NORMAL
    assert types[vocab.range("image").offset] == gguf.TokenType.CONTROL
    assert (value["tokenizer.ggml.bos_token_id"], value["tokenizer.ggml.eos_token_id"]) == (vocab.bos, vocab.eos)


def test_a_decoders_own_folder_in_a_bundle_is_exported_with_the_meaning_of_its_tokens(bundle, tmp_path, capsys):
    for kind in ("gguf", "hf-qwen3"):
        for source, out in ((bundle, "whole"), (bundle / "model", "own")):
            main(["export", kind, str(source), str(tmp_path / f"{kind}-{out}")])
        whole, own = ({f.name: f.read_bytes() for f in (tmp_path / f"{kind}-{out}").iterdir()} for out in ("whole", "own"))
        assert whole == own
    Bundle.from_pretrained(bundle, parts=["model"]).model.save_pretrained(tmp_path / "alone")
    capsys.readouterr()
    main(["export", "hf-qwen3", str(tmp_path / "alone"), str(tmp_path / "out")])
    assert "alone: has no vocabulary" in capsys.readouterr().out


def test_what_llama_cpp_does_not_have_is_refused(bundle, bundle_folder, tmp_path, capsys):
    def refusal(source, *more):
        with pytest.raises(SystemExit) as stop:
            main(["export", *more, str(source), str(tmp_path / "out")])
        assert stop.value.code == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "span_positions" in refusal(bundle_folder, "gguf")
    Bundle.from_pretrained(bundle, parts=["model"]).model.save_pretrained(tmp_path / "alone")
    assert "give a bundle" in refusal(tmp_path / "alone", "gguf")
    assert "weights f16: only for gguf" in refusal(bundle, "--weights", "f16", "hf-qwen3")
    known = Bundle.from_pretrained(bundle)
    for change, said in (
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "only linear scaling"),
        ({"intermediate_size": 100}, "width 100"),
    ):  # fmt: skip
        odd = tmp_path / next(iter(change))
        Bundle(known.vocab, known.tokenizers, Decoder(replace(known.model.config, **change))).save_pretrained(odd)
        assert said in refusal(odd, "gguf", "--weights", "q8_0")


def test_llama_cpp_gives_the_same_logits_and_texts(bundle, tiny, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    path = exported(bundle, tmp_path / "out", "f32")
    llama = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, flash_attn=False, type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    vocab, text = tiny.vocab, tiny.tokenizers["text"]
    words = "a large red circle, and 7 é\n\tthings"
    ids = llama.tokenize(words.encode(), add_bos=False)
    first = vocab.range("text").offset
    assert [id - first for id in ids] == text.encode(words)
    assert llama.detokenize(ids).decode() == words
    codes = [vocab.range("image").offset + i for i in range(9)]
    sequence = [vocab.bos, *ids, vocab.specials["<image>"], *codes]
    llama.eval(sequence)
    wanted = Bundle.from_pretrained(bundle).model(torch.tensor([sequence]))[0].detach().numpy()
    np.testing.assert_allclose(llama.scores[: len(sequence)], wanted, atol=1e-3)
