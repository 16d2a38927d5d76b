"""A decoder as a GGUF file, which llama.cpp and what is built on it load as a Qwen3.

The file has unitok's tokens with their numbers: text pieces with their scores, all others as control tokens that no text becomes, named
as in `Vocab` or by range and code (`<image:17>`). llama.cpp knows no grammar of spans: it continues tokens, and `Vocab.decode` reads
what comes (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp:src/llama-arch.cpp).
"""

import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from unitok.errors import UserError
from unitok.model.decoder import Decoder
from unitok.tokenizers.text import ImportedTextTokenizer, TextTokenizer
from unitok.vocab import Vocab

#: Types of the weights. Norms are in float32 in all of them.
WEIGHTS = {"f32": "4 bytes", "f16": "2 bytes", "q8_0": "1 byte and a scale for each 32"}

#: Names in the decoder -> in the file; those of blocks stand after `model.layers.N.` and `blk.N.`.
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_BLOCKS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path: Path, decoder: Decoder, vocab: Vocab, text: TextTokenizer | None, weights: str = "f32") -> None:
    """Write a decoder of Qwen3's architecture. text: its text tokenizer, if it has one.

    Errors: `UserError` for a scaling of positions, a text tokenizer or a width that the format does not have, and without `gguf`.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("this needs the package gguf: pip install 'unitok-lm[gguf]'") from None
    c = decoder.config
    scaling = c.rope_scaling or {}
    if scaling and scaling["rope_type"] != "linear":
        raise UserError(f"rope_scaling {scaling['rope_type']!r}: llama.cpp has only linear scaling for Qwen3")
    widths = [c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim]
    if weights == "q8_0" and (odd := [width for width in widths if width % 32]):
        raise UserError(f"weights q8_0: the decoder has matrices of width {odd[0]}, which 32 does not divide; take f16")
    kind = gguf.GGMLQuantizationType[weights.upper()]
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name("unitok decoder")
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[weights])
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    if weights == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocab(writer, vocab, text)
    for name, tensor in decoder.state_dict().items():
        data = tensor.float().cpu().numpy()
        if data.ndim == 1:
            writer.add_tensor(_renamed(name), data)
        else:
            writer.add_tensor(_renamed(name), gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str) -> str:
    part, weight = name.rsplit(".", 1)
    if part in _NAMES:
        return f"{_NAMES[part]}.{weight}"
    _, _, number, rest = part.split(".", 3)
    return f"blk.{number}.{_IN_BLOCKS[rest]}.{weight}"


def _add_vocab(writer: "object", vocab: Vocab, text: TextTokenizer | None) -> None:
    """Write all tokens with names, scores and types. writer: a `gguf.GGUFWriter`."""
    from gguf import GGUFWriter, TokenType

    assert isinstance(writer, GGUFWriter)
    if isinstance(text, ImportedTextTokenizer):
        raise UserError("gguf: only with a SentencePiece text tokenizer of `unitok train-text-tokenizer`; this one is imported")
    names, types, scores = vocab.names(), [TokenType.CONTROL] * vocab.size, [0.0] * vocab.size
    for r in (r for r in vocab.ranges if text is not None and r.kind == "text"):
        assert text is not None
        p, here = SentencePieceProcessor(model_proto=text.model), slice(r.offset, r.stop)
        names[here] = [p.id_to_piece(code) for code in range(r.size)]
        scores[here] = [p.get_score(code) for code in range(r.size)]
        types[here] = [
            TokenType.BYTE if p.is_byte(code) else TokenType.UNKNOWN if p.is_unknown(code)
            else TokenType.CONTROL if p.is_control(code) or p.is_unused(code) else TokenType.NORMAL
            for code in range(r.size)
        ]  # fmt: skip
        writer.add_unk_token_id(names.index(p.id_to_piece(p.unk_id())))
    taken: set[str] = set()
    for token in sorted(range(vocab.size), key=lambda token: types[token] == TokenType.CONTROL):  # texts keep their names
        while names[token] in taken:  # llama.cpp takes no name twice
            names[token] += "'"
        taken.add(names[token])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(vocab.bos)
    writer.add_eos_token_id(vocab.eos)
    writer.add_pad_token_id(vocab.pad)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_string("unitok.manifest", json.dumps(vocab.to_manifest()))
