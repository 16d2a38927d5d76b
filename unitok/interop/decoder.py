"""Decoders of transformers as ours, and ours as transformers': renaming, because the layouts are the same.

`hf-llama`, `hf-qwen3` and `hf-chameleon` are folders saved by transformers, config.json and weights in one file or
several. A head tied to the embedding becomes a matrix of its own. What our decoder does not compute is refused by name.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unitok.bundle import Bundle
from unitok.errors import UserError
from unitok.files import read_json, whole_folder, write_json
from unitok.interop import DECODER_KINDS, EXPORTS
from unitok.interop.weights import State, log, read_folder, strip_prefix, tell_unused
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.pretrained import save_weights
from unitok.tokenizers.image import ImageTokenizer
from unitok.tokenizers.text import ImportedTextTokenizer
from unitok.vocab import Range, Span, Vocab

MODEL_TYPES = {kind: kind.removeprefix("hf-") for kind in DECODER_KINDS}

#: Fields that our configuration and transformers' share by name.
QWEN3_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
)

#: Of transformers' configurations, where the folder's does not say.
DEFAULT_LENGTHS = {"llama": 2048, "qwen3": 32_768, "chameleon": 4096}

#: Of Chameleon's vocabulary, where no tokenizer says otherwise (transformers:models/chameleon/convert_chameleon_weights_to_hf.py).
CHAMELEON = {"<bos>": 0, "<pad>": 1, "<eos>": 2, "<image>": 8197, "</image>": 8196}


def read_config(folder: Path, model_type: str) -> dict[str, Any]:
    """The folder's config.json; errors: `UserError` where it is not one of that type."""
    path = folder / "config.json"
    given = read_json(path, "give a folder saved by transformers")
    if given.get("model_type") != model_type:
        raise UserError(f"{path}: model_type {given.get('model_type')!r}, not {model_type}")
    return given


def decoder_config(given: dict[str, Any], where: str) -> DecoderConfig:
    """A config.json of transformers' Llama, Qwen3 or Chameleon -> ours; errors: `UserError` for what we do not compute."""
    kind = given["model_type"]
    refused = {
        "hidden_act": given.get("hidden_act", "silu") not in ("silu", "swish"),
        "use_sliding_window": bool(given.get("use_sliding_window")),
    }
    for name, is_so in refused.items():
        if is_so:
            raise UserError(f"{where}: {name} {given[name]!r} cannot be imported")
    if given.get("quantization_config"):
        raise UserError(
            f"{where}: quantized weights (quantization_config), which cannot be imported; give the model's plain ones"
        )
    missing = [n for n in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers") if n not in given]
    if missing:
        raise UserError(f"{where}: no {missing[0]} in it")
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    scaling = {"rope_type": rope.get("type", "default")} | scaling
    longest = given.get("max_position_embeddings", DEFAULT_LENGTHS[kind])
    if scaling["rope_type"] == "llama3":
        scaling.setdefault("original_max_position_embeddings", given.get("original_max_position_embeddings", longest))
    heads = given.get("num_attention_heads", 32)
    groups = given.get("num_key_value_heads") or (heads if kind == "llama" or "num_key_value_heads" in given else 32)
    head_dim = None if kind == "chameleon" else given.get("head_dim")
    return DecoderConfig(
        vocab_size=given["vocab_size"],
        hidden_size=given["hidden_size"],
        num_hidden_layers=given["num_hidden_layers"],
        intermediate_size=given["intermediate_size"],
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
    """A folder of one of `MODEL_TYPES` -> our decoder with equal logits, in eval mode.

    Where the folder says what its ids mean, an `ImportedDecoder` with that: names of Chameleon's image ids, or the
    `unitok_ids.json` of our own exports.
    """
    given = read_config(folder, MODEL_TYPES[kind])
    where = str(folder)
    config = decoder_config(given, str(folder / "config.json"))
    raw = read_folder(folder)
    vision = {name: raw.pop(name) for name in list(raw) if "vqmodel" in name}
    decoder = Decoder.from_state(config, _decoder_state(raw, bool(given.get("tie_word_embeddings")), where), where)
    if kind != "hf-chameleon":
        tell_unused(where, vision)
        known = folder / "unitok_ids.json"
        return ImportedDecoder(decoder, vocab=_exported_vocab(known, config.vocab_size)) if known.exists() else decoder
    from unitok.interop.image import from_chameleon

    image = from_chameleon(vision, given, where) if vision else None
    names = given.get("vocabulary_map") or _tokenizer_names(folder)
    vocab, text = _chameleon_vocab(names, config.vocab_size, image, folder / "tokenizer.json")
    return ImportedDecoder(decoder, image, vocab, text)


def _decoder_state(raw: State, tied: bool, where: str) -> State:
    """The tensors in fp32 by the names of `LlamaForCausalLM`, whatever class or wrapper saved them; empties `raw`."""
    # transformers 5 saves a Chameleon's decoder under `model.language_model.` in some versions, without it in others.
    named = {re.sub(r"(^|\.)model\.language_model\.", r"\1model.", name): tensor for name, tensor in raw.items()}
    raw.clear()
    bare = ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "norm.weight")
    state, others = strip_prefix(named, [f"model.{name}" for name in bare], where)
    if f"model.{bare[0]}" not in state:  # saved without its head, or no decoder: loading says what it lacks
        state, others = strip_prefix(named, bare, where)
        state = {f"model.{name}": tensor for name, tensor in state.items()} if bare[0] in state else state
    named.clear()
    if f"model.{bare[0]}" in state:
        others |= {name: state.pop(name) for name in list(state) if not name.startswith(("model.", "lm_head."))}
    tell_unused(where, others)
    state = {name: state.pop(name).float() for name in list(state) if "rotary_emb." not in name}
    embedding, head = state.get(f"model.{bare[0]}"), state.get("lm_head.weight")
    if embedding is None:
        return state
    if head is None and not tied:
        raise UserError(
            f"{where}: no lm_head.weight in it, and its config.json does not say tie_word_embeddings: it cannot predict"
        )
    if head is None:
        state["lm_head.weight"] = embedding.clone()
    elif tied and not torch.equal(head, embedding):
        log.warning("%s: config.json ties the head to the embedding, but the file has another head, which is kept", where)
    return state


def _exported_vocab(path: Path, size: int) -> Vocab:
    """The vocabulary that an export of ours kept; errors: `UserError` where it is not that of a decoder of `size` ids."""
    known = read_json(path, "")
    if not isinstance(known, dict) or "manifest" not in known:
        raise UserError(f"{path}: not what `unitok export` wrote: it has no manifest; export again, or remove it")
    vocab = Vocab.from_manifest(known["manifest"])
    if vocab.size != size:
        raise UserError(f"{path}: {vocab.size} ids, the weights have {size}: remove it if they are no longer the exported ones")
    return vocab


def _tokenizer_names(folder: Path) -> dict[str, int]:
    """The names of ids in a tokenizer.json that lies beside the weights, or none."""
    path = folder / "tokenizer.json"
    return read_json(path, "").get("model", {}).get("vocab", {}) if path.exists() else {}


def image_codes(names: dict[str, int]) -> dict[int, int]:
    """Names of ids -> code of each image id. An image id's name is IMGIMG, its code with A to J for digits, and Z."""
    found = {}
    for name, id in names.items():
        if written := re.fullmatch(r"IMGIMG([A-J]+)Z", name):
            found[int("".join(str(ord(letter) - ord("A")) for letter in written[1]))] = id
    return found


def _chameleon_vocab(
    names: dict[str, int], size: int, image: ImageTokenizer | None, tokenizer: Path
) -> tuple[Vocab | None, ImportedTextTokenizer | None]:
    """The vocabulary that the names say: image codes where they stand, ids after them as text; with its text tokenizer if the
    file is there. (None, None) without names or image tokenizer."""
    codes = image_codes(names)
    ids = sorted(codes.values())
    if not ids or image is None:
        return None, None
    if sorted(codes) != list(range(len(ids))) or ids != list(range(ids[0], ids[0] + len(ids))):
        raise UserError(
            f"the vocabulary's image names give {len(ids)} codes that are not 0 to {len(ids) - 1}, or not in one stretch"
        )
    if len(ids) != image.codebook_size:
        raise UserError(f"the vocabulary names {len(ids)} image codes, the image tokenizer has {image.codebook_size}")
    specials = {
        "<bos>": names.get("<s>", CHAMELEON["<bos>"]),
        "<pad>": names.get("<pad>", CHAMELEON["<pad>"]),
        "<eos>": names.get("</s>", CHAMELEON["<eos>"]),
        "<image>": names.get("<racm3:break>", CHAMELEON["<image>"]),
        "</image>": names.get("<eoss>", CHAMELEON["</image>"]),
    }
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
    return Vocab(ranges, specials, spans), text


@dataclass
class ImportedDecoder:
    """A decoder with what its folder says of its ids: vocabulary, image encoder and text tokenizer, as far as there are any."""

    model: Decoder
    image: ImageTokenizer | None = None
    vocab: Vocab | None = None
    text: ImportedTextTokenizer | None = None

    def save_pretrained(self, out: Path, overwrite: bool = False) -> None:
        """Write `model/` and `tokenizers/image/`; with a vocabulary a whole bundle."""
        if self.vocab is not None:
            parts = {"text": self.text, "image": self.image}
            tokenizers = {name: part for name, part in parts.items() if part is not None}
            Bundle(self.vocab, tokenizers, self.model).save_pretrained(out, overwrite)
            return
        with whole_folder(out, "imported model", overwrite) as partial:
            self.model.save_pretrained(partial / "model")
            if self.image is not None:
                self.image.save_pretrained(partial / "tokenizers" / "image")


# ---- Export ---------------------------------------------------------------------------------------------------------


def export_decoder(kind: str, decoder: Decoder, vocab: Vocab | None, out: Path, overwrite: bool = False) -> None:
    """Write a decoder as `kind`, with `unitok_ids.json` to tell what ids mean. Errors: `UserError` where it does not fit."""
    if kind not in EXPORTS:
        raise UserError(f"no kind {kind!r}; choose one of {', '.join(EXPORTS)}")
    c = decoder.config
    unfit = {
        "places": c.places != 0,
        "qk_norm": c.qk_norm != "rms",
        "norm_placement": c.norm_placement != "before",
        "mlp_bias": c.mlp_bias,
        "attention_bias": c.attention_bias,  # servers know none on the output projection
    }
    for name, is_so in unfit.items():
        if is_so:
            raise UserError(f"the decoder has {name} {getattr(c, name)!r}, which Qwen3 does not: it cannot be exported")
    specials = (
        {"bos_token_id": vocab.bos, "eos_token_id": vocab.eos, "pad_token_id": vocab.specials.get("<pad>")} if vocab else {}
    )
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
    generation = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **specials}
    with whole_folder(out, "exported decoder", overwrite) as partial:
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", generation)
        save_weights(partial / "model.safetensors", decoder.state_dict(), {"format": "pt"})
        if vocab:
            write_json(partial / "unitok_ids.json", id_map(vocab))


def id_map(vocab: Vocab) -> dict[str, Any]:
    """What ids mean, for programs that know nothing of unitok: ranges, special ids, and how spans are laid out."""
    return {
        "unitok": 1,
        "ranges": {r.name: {"first": r.offset, "count": r.size, "kind": r.kind} for r in vocab.ranges},
        "special_ids": vocab.specials,
        "spans": {
            m: {"begin": s.begin, "header": list(s.header), "body": list(s.body), "end": s.end} for m, s in vocab.spans.items()
        },
        "manifest": vocab.to_manifest(),
    }


def describe(part: Any) -> str:
    """One line on an imported part."""
    if isinstance(part, ImportedDecoder):
        parts = ", ".join(name for name in ("text", "image") if getattr(part, name) is not None)
        rest = f"a bundle with {f'{parts} and decoder' if parts else 'the decoder and what its ids mean'}"
        rest = rest if part.vocab else "ids stay plain: no names of image ids, or no image encoder"
        return f"{_describe_decoder(part.model)}; {rest}"
    return f"{_describe_decoder(part)}; it brings no vocabulary, so nothing says what its ids mean"


def _describe_decoder(decoder: Decoder) -> str:
    c = decoder.config
    count = sum(p.numel() for p in decoder.parameters())
    return f"a decoder of {count / 1e6:.1f}M parameters, {c.num_hidden_layers} layers, {c.vocab_size} ids"
