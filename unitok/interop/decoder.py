"""Import of decoders from transformers, and export to it. The layouts are equal, so tensors are only renamed.

`hf-llama`, `hf-qwen3` and `hf-chameleon` are folders saved by transformers: config.json, and weights in one file or several. A
head that is tied to the embedding becomes a matrix of its own. Options that our decoder does not have are refused by name.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from unitok.bundle import Bundle
from unitok.errors import UserError
from unitok.files import read_json, whole_folder, write_json
from unitok.interop.image import from_chameleon
from unitok.interop.weights import ForeignConfig, State, log, log_unused, read_config, read_folder, strip_prefix
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.pretrained import save_weights
from unitok.ranges import Range, Span
from unitok.tokenizers.image import ImageTokenizer
from unitok.tokenizers.text import ImportedTextTokenizer, TextTokenizer
from unitok.vocab import Vocab

#: Fields with equal names in our configuration and in that of transformers.
QWEN3_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip

#: Defaults of max_position_embeddings in transformers.
DEFAULT_LENGTHS = {"llama": 2048, "qwen3": 32_768, "chameleon": 4096}

#: Our special tokens -> Chameleon's names, and their ids if the folder has no vocabulary
#: (transformers:models/chameleon/convert_chameleon_weights_to_hf.py).
CHAMELEON = {
    "<bos>": ("<s>", 0),
    "<pad>": ("<pad>", 1),
    "<eos>": ("</s>", 2),
    "<image>": ("<racm3:break>", 8197),
    "</image>": ("<eoss>", 8196),
}


Tokenizers = dict[str, ImageTokenizer | TextTokenizer]


def decoder_config(given: ForeignConfig, where: str) -> DecoderConfig:
    """Return our configuration for the config.json of transformers' Llama, Qwen3 or Chameleon. Errors: `UserError` for an
    option that our decoder does not have."""
    kind = given["model_type"]
    for name, known in {"hidden_act": ("silu", "swish"), "use_sliding_window": (False, None)}.items():
        if given.get(name, known[0]) not in known:
            raise UserError(f"{where}: {name} {given[name]!r} cannot be imported")
    if given.get("quantization_config"):
        raise UserError(f"{where}: quantized weights (quantization_config) cannot be imported; give those before quantization")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    if missing := [name for name in needed if name not in given]:
        raise UserError(f"{where}: no {missing[0]} in it")
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    scaling = {"rope_type": rope.get("type", "default")} | {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    longest = given.get("max_position_embeddings", DEFAULT_LENGTHS[kind])
    if scaling["rope_type"] == "llama3":
        scaling.setdefault("original_max_position_embeddings", given.get("original_max_position_embeddings", longest))
    heads = given.get("num_attention_heads", 32)
    groups = given.get("num_key_value_heads") or (heads if kind == "llama" or "num_key_value_heads" in given else 32)
    head_dim = None if kind == "chameleon" else given.get("head_dim")
    return DecoderConfig(
        **{name: given[name] for name in needed},
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim or (128 if kind == "qwen3" else given["hidden_size"] // heads),
        rope_theta=float(rope.get("rope_theta") or given.get("rope_theta") or 10_000.0),
        rope_scaling=scaling if scaling["rope_type"] != "default" else None,
        rms_norm_eps=given.get("rms_norm_eps", 1e-5 if kind == "chameleon" else 1e-6),
        max_position_embeddings=longest,
        qk_norm={"llama": "none", "qwen3": "rms", "chameleon": "layer"}[kind],  # type: ignore[arg-type]
        norm_placement="after" if given.get("swin_norm") else "before",
        attention_bias=bool(given.get("attention_bias")),
        mlp_bias=bool(given.get("mlp_bias")),
    )


def import_decoder(kind: str, folder: Path) -> "Decoder | ImportedDecoder":
    """Return our decoder with equal logits, in eval mode, from a folder of transformers' Llama, Qwen3 or Chameleon.

    Returns an `ImportedDecoder` for a Chameleon, and for a folder with a tokenizer.json or the `unitok_ids.json` of our exports.
    Errors: `UserError` that names the file.
    """
    given = read_config(folder, kind.removeprefix("hf-"))
    where = str(folder)
    config = decoder_config(given, str(folder / "config.json"))
    raw = read_folder(folder)
    vision = {name: raw.pop(name) for name in list(raw) if "vqmodel" in name}
    decoder = Decoder.from_state(config, _decoder_state(raw, bool(given.get("tie_word_embeddings")), where), where)
    if kind != "hf-chameleon":
        log_unused(where, vision)
        known = folder / "unitok_ids.json"
        if known.exists():
            return ImportedDecoder(decoder, {}, _exported_vocab(known, config.vocab_size))
        tokenizer = folder / "tokenizer.json"
        return _with_text(decoder, given, tokenizer) if tokenizer.exists() else decoder
    image = from_chameleon(vision, read_config(folder, part="vq_config"), where) if vision else None
    tokenizer = folder / "tokenizer.json"
    names = given.get("vocabulary_map")
    if not names:
        names = read_json(tokenizer, "").get("model", {}).get("vocab", {}) if tokenizer.exists() else {}
    vocab, tokenizers = _chameleon_vocab(names, config.vocab_size, image, tokenizer)
    return ImportedDecoder(decoder, tokenizers, vocab)


def _decoder_state(raw: State, tied: bool, where: str) -> State:
    """Return the tensors in fp32 with the names of `LlamaForCausalLM`, whatever class or wrapper saved them. Empties `raw`."""
    # Some versions of transformers 5 save the decoder of a Chameleon under `model.language_model.`, others without it.
    named = {re.sub(r"(^|\.)model\.language_model\.", r"\1model.", name): tensor for name, tensor in raw.items()}
    raw.clear()
    bare = ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "norm.weight")
    state, others = strip_prefix(named, [f"model.{name}" for name in bare], where)
    if f"model.{bare[0]}" not in state:  # saved without its head, or not a decoder: loading reports what is missing
        state, others = strip_prefix(named, bare, where)
        state = {f"model.{name}": tensor for name, tensor in state.items()} if bare[0] in state else state
    named.clear()
    if f"model.{bare[0]}" in state:
        others |= {name: state.pop(name) for name in list(state) if not name.startswith(("model.", "lm_head."))}
    log_unused(where, others)
    state = {name: state.pop(name).float() for name in list(state) if "rotary_emb." not in name}
    embedding, head = state.get(f"model.{bare[0]}"), state.get("lm_head.weight")
    if embedding is None:
        return state
    if head is None and not tied:
        raise UserError(
            f"{where}: no lm_head.weight in it, and its config.json does not set tie_word_embeddings: it cannot predict tokens"
        )
    if head is None:
        state["lm_head.weight"] = embedding.clone()
    elif tied and not torch.equal(head, embedding):
        log.warning("%s: config.json ties the head to the embedding, but the file has another head, which is kept", where)
    return state


def _exported_vocab(path: Path, size: int) -> Vocab:
    """Return the vocabulary in the `unitok_ids.json` of one of our exports. Errors: `UserError` if it does not have `size`
    tokens."""
    known = read_json(path, "")
    if "manifest" not in known:
        raise UserError(f"{path}: not written by `unitok export`: it has no manifest; export again, or remove it")
    vocab = Vocab.from_manifest(known["manifest"])
    if vocab.size != size:
        raise UserError(f"{path}: {vocab.size} tokens, the weights have {size}: remove it if they are not the exported ones")
    return vocab


def _with_text(decoder: Decoder, given: ForeignConfig, tokenizer: Path) -> "ImportedDecoder":
    """Return a language model with its text tokenizer. Its tokens keep their numbers; our special tokens come after them, but for begin and
    end of a document, which are the model's own."""
    size = decoder.config.vocab_size
    text = ImportedTextTokenizer(tokenizer.read_bytes(), 0, size)
    if not set(range(size)) - set(text.illegal):
        raise UserError(f"{tokenizer}: none of its tokens is one of the {size} of the weights; is it of another model?")
    start = Vocab.start()
    specials = {name: size + id for name, id in start.specials.items()}
    for name, key in (("<bos>", "bos_token_id"), ("<eos>", "eos_token_id")):
        own = given.get(key)
        own = own[0] if isinstance(own, list) and own else own
        if isinstance(own, int) and 0 <= own < size and own not in specials.values():
            specials[name] = own
    illegal = sorted({*text.illegal, *(id for id in specials.values() if id < size)})
    (special,) = start.ranges
    ranges = [Range("text", "text", 0, size, illegal=tuple(illegal)), replace(special, offset=size)]
    vocab = Vocab(ranges, specials, {"text": Span("text", ("text",), fingerprint=text.fingerprint())})
    return ImportedDecoder(decoder.grown(vocab.size), {"text": text}, vocab)


def image_codes(names: dict[str, int]) -> dict[int, int]:
    """Return the token of each image code, from the tokens' ids by name. The name of an image token is IMGIMG, the digits of
    its code as A to J, and Z."""
    codes = {}
    for name, id in names.items():
        if match := re.fullmatch(r"IMGIMG([A-J]+)Z", name):
            codes[int("".join(str(ord(letter) - ord("A")) for letter in match[1]))] = id
    return codes


def _chameleon_vocab(
    names: dict[str, int], size: int, image: ImageTokenizer | None, tokenizer: Path
) -> tuple[Vocab | None, Tokenizers]:
    """Return the vocabulary of a Chameleon, in which all tokens after those of image codes are text, and its tokenizers. The
    vocabulary is None without names of tokens or without image tokenizer."""
    codes = image_codes(names)
    ids = sorted(codes.values())
    if image is None:
        return None, {}
    if not ids:
        return None, {"image": image}
    if sorted(codes) != list(range(len(ids))) or ids != list(range(ids[0], ids[0] + len(ids))):
        raise UserError(
            f"the vocabulary names {len(ids)} image tokens, but not with the codes 0 to {len(ids) - 1}, or not with consecutive ids"
        )
    if len(ids) != image.codebook_size:
        raise UserError(f"the vocabulary names {len(ids)} image tokens, the image tokenizer has {image.codebook_size}")
    specials = {ours: names.get(theirs, usual) for ours, (theirs, usual) in CHAMELEON.items()}
    after = ids[-1] + 1
    permutation = tuple(int(p) for p in np.array([codes[c] for c in range(len(ids))]) - ids[0])
    text = ImportedTextTokenizer(tokenizer.read_bytes(), after, size - after) if tokenizer.exists() else None
    illegal = {id - after for id in specials.values() if after <= id < size} | set(text.illegal if text else ())
    ranges = [
        Range("special", "special", 0, ids[0]),
        Range("image", "codes", ids[0], len(ids), permutation=permutation),
        Range("text", "text", after, size - after, illegal=tuple(sorted(illegal))),
    ]
    spans = {
        "text": Span("text", ("text",), fingerprint=text.fingerprint() if text else ""),
        "image": Span("image", ("image",), "<image>", "</image>", (), image.fingerprint()),
    }
    return Vocab(ranges, specials, spans), {"text": text, "image": image} if text else {"image": image}


@dataclass
class ImportedDecoder:
    """A decoder with the tokenizers (by name) and the vocabulary of its folder; vocab is None if it has none."""

    model: Decoder
    tokenizers: Tokenizers
    vocab: Vocab | None = None

    def save_pretrained(self, out: Path, overwrite: bool = False) -> None:
        """Write a bundle; without a vocabulary only the folders `model/` and `tokenizers/NAME/`."""
        if self.vocab is not None:
            Bundle(self.vocab, self.tokenizers, self.model).save_pretrained(out, overwrite)
            return
        with whole_folder(out, "imported model", overwrite) as partial:
            self.model.save_pretrained(partial / "model")
            for name, tokenizer in self.tokenizers.items():
                tokenizer.save_pretrained(partial / "tokenizers" / name)


# ---- Export ---------------------------------------------------------------------------------------------------------


def export_decoder(
    kind: str,
    decoder: Decoder,
    vocab: Vocab | None,
    out: Path,
    overwrite: bool = False,
    text: TextTokenizer | None = None,
    weights: str = "f32",
) -> None:
    """Write a decoder in the format `kind`, `hf-qwen3` or `gguf`, with the meaning of its tokens in `unitok_ids.json`.

    text, weights: for `gguf`: the text tokenizer, and one of `unitok.interop.gguf.WEIGHTS`. Errors: `UserError` for a decoder with
    options that the format does not have.
    """
    if kind not in ("hf-qwen3", "gguf"):
        raise UserError(f"no kind {kind!r}; choose hf-qwen3 or gguf")
    if weights != "f32" and kind != "gguf":
        raise UserError(f"weights {weights}: only for gguf; {kind} has those of the decoder, in float32")
    c = decoder.config
    fits = {"span_positions": 0, "span_rotation": False, "grid_rotation": False, "qk_norm": "rms", "norm_placement": "before"}
    fits |= {"mlp_bias": False, "attention_bias": False}
    for name, value in fits.items():  # servers have no bias on the output projection
        if getattr(c, name) != value:
            remedy = f"train one with model.init_args.decoder.{name} {str(value).lower()}"
            raise UserError(
                f"the decoder has {name} {getattr(c, name)!r}, which Qwen3 does not: it cannot be exported; {remedy}"
            )
    with whole_folder(out, "exported decoder", overwrite) as partial:
        if kind == "gguf":
            from unitok.interop.gguf import write_gguf

            if vocab is None:
                raise UserError("gguf: give a bundle; a decoder's folder alone does not say what its tokens mean")
            write_gguf(partial / f"decoder-{weights}.gguf", decoder, vocab, text, weights)
        else:
            _write_qwen3(partial, decoder, vocab)
        if vocab:
            write_json(partial / "unitok_ids.json", id_map(vocab))


def _write_qwen3(folder: Path, decoder: Decoder, vocab: Vocab | None) -> None:
    """Write what transformers loads."""
    c, named = decoder.config, {"bos_token_id": "<bos>", "eos_token_id": "<eos>", "pad_token_id": "<pad>"}
    specials = {name: vocab.specials.get(special) for name, special in named.items()} if vocab else {}
    config = {
        "unitok": 1,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        **{name: value for name, value in asdict(c).items() if name in QWEN3_FIELDS},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default"} | (c.rope_scaling or {}) | {"rope_theta": c.rope_theta},
        "rope_theta": c.rope_theta,  # where transformers before 5 and servers look
        **({"rope_scaling": c.rope_scaling} if c.rope_scaling else {}),
        **specials,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **specials})
    save_weights(folder / "model.safetensors", decoder.state_dict(), {"format": "pt"})


def id_map(vocab: Vocab) -> dict[str, object]:
    """Return the meaning of tokens for programs that do not know unitok: ranges, special tokens, and the layout of spans."""
    return {
        "unitok": 1,
        "ranges": {r.name: {"first": r.offset, "count": r.size, "kind": r.kind} for r in vocab.ranges},
        "special_ids": vocab.specials,
        "spans": {
            m: {"begin": s.begin, "header": list(s.header), "body": list(s.body), "end": s.end} for m, s in vocab.spans.items()
        },
        "manifest": vocab.to_manifest(),
    }
