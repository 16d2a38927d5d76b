"""Audio tokenizers of other projects as ours: EnCodec's published files and transformers' EnCodec.

Both are SEANet around a Euclidean residual quantizer; the architecture is read from the weights, or from the folder's
config.json. transformers names the same layers differently. Weight norm, in either style of keys, becomes plain weights.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from unitok.checkpoints import load_weights
from unitok.errors import UserError, read_json
from unitok.pretrained import load_state
from unitok.tokenizers.audio import AudioTokenizer, AudioTokenizerConfig

State = dict[str, Tensor]

#: What EnCodec's two published models have that their weights do not tell, by the channels of their waveform.
PUBLISHED: dict[int, dict[str, Any]] = {
    1: {"sample_rate": 24_000, "causal": True},
    2: {"sample_rate": 48_000, "causal": False, "normalise": True, "segment": 1.0, "overlap": 0.01},
}

#: What a config.json of transformers leaves out where it is so (EncodecConfig's defaults).
HF_DEFAULTS: dict[str, Any] = {
    "sampling_rate": 24_000,
    "audio_channels": 1,
    "num_filters": 32,
    "hidden_size": 128,
    "upsampling_ratios": [8, 5, 4, 2],
    "num_residual_layers": 1,
    "kernel_size": 7,
    "last_kernel_size": 7,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "compress": 2,
    "num_lstm_layers": 2,
    "norm_type": "weight_norm",
    "use_causal_conv": True,
    "pad_mode": "reflect",
    "codebook_size": 1024,
    "normalize": False,
    "chunk_length_s": None,
    "overlap": None,
    "trim_right_ratio": 1.0,
}


def import_audio_tokenizer(kind: str, source: Path, trust: bool = False) -> AudioTokenizer:
    """A checkpoint of one of `unitok.interop.KINDS` -> an `AudioTokenizer` with equal codes, in eval mode."""
    if kind == "hf-encodec":
        state, config = _read_transformers(source)
    else:
        _check_hash(source)
        state = load_weights(source, trust)
        config = infer_config(state, str(source))
    return _build(state, config, str(source))


def _check_hash(path: Path) -> None:
    """The published files carry the beginning of their sha256 in their name."""
    named = re.fullmatch(r"encodec_\w+-([0-9a-f]{8})\.th", path.name)
    if not named:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(named[1]):
        raise UserError(f"{path}: damaged or another file: its name says sha256 {named[1]}…, it has {found[:8]}…; get it again")


def infer_config(state: State, where: str) -> AudioTokenizerConfig:
    """The architecture of weights with EnCodec's names."""
    first, last = "encoder.model.0.conv.conv", _last_convolution(state, "encoder")
    if _weight(state, first) is None or last is None or "quantizer.vq.layers.0._codebook.embed" not in state:
        raise UserError(f"{where}: not an EnCodec model: its first keys are {', '.join(list(state)[:3])}")
    weight = _weight(state, first)
    assert weight is not None
    n_filters, channels, kernel = weight.shape
    if channels not in PUBLISHED:
        raise UserError(f"{where}: {channels} channels; EnCodec's models have 1 or 2")
    # Strided convolutions, from the waveform's side: kernels of twice their stride, after the residual blocks.
    indices = sorted({int(m[1]) for k in state if (m := re.match(r"encoder\.model\.(\d+)\.conv\.conv\.", k))})[1:-1]
    strided = [_weight(state, f"encoder.model.{i}.conv.conv") for i in indices]
    ratios = tuple(w.shape[-1] // 2 for w in reversed(strided) if w is not None)
    blocks = {int(m[1]) for k in state if (m := re.match(r"encoder\.model\.(\d+)\.block\.", k))}
    block = f"encoder.model.{min(blocks)}"
    inner = _weight(state, f"{block}.block.1.conv.conv")
    lstm = [int(m[1]) for k in state if (m := re.match(r"encoder\.model\.\d+\.lstm\.weight_ih_l(\d+)", k))]
    final = _weight(state, last)
    assert inner is not None and final is not None  # noqa: PT018
    size, _ = state["quantizer.vq.layers.0._codebook.embed"].shape
    return AudioTokenizerConfig(
        channels=channels,
        n_filters=n_filters,
        dimension=final.shape[0],
        ratios=ratios,
        patch=1,
        n_residual_layers=len(blocks) // len(ratios),
        kernel_size=kernel,
        last_kernel_size=final.shape[-1],
        residual_kernel_size=inner.shape[-1],
        compress=n_filters // inner.shape[0],
        lstm=max(lstm, default=-1) + 1,
        norm="time_group_norm"
        if "encoder.model.0.conv.norm.weight" in state
        else "none"
        if f"{first}.weight" in state
        else "weight_norm",
        true_skip=_weight(state, f"{block}.shortcut.conv.conv") is None,
        pad_mode="reflect",
        num_codebooks=_levels(state),
        codebook_size=size,
        codebook_dim=0,
        **PUBLISHED[channels],
    )


def _weight(state: State, name: str) -> Tensor | None:
    """A convolution's kernel or, under weight norm in either style, its direction."""
    for suffix in ("weight", "weight_v", "parametrizations.weight.original1"):
        if f"{name}.{suffix}" in state:
            return state[f"{name}.{suffix}"]
    return None


def _last_convolution(state: State, network: str) -> str | None:
    found = [int(m[1]) for k in state if (m := re.match(rf"{network}\.model\.(\d+)\.conv\.conv\.", k))]
    return f"{network}.model.{max(found)}.conv.conv" if found else None


def _levels(state: State) -> int:
    return 1 + max(int(m[1]) for k in state if (m := re.match(r"quantizer\.vq\.layers\.(\d+)\.", k)))


def _build(state: State, config: AudioTokenizerConfig, where: str) -> AudioTokenizer:
    """`state` has EnCodec's names."""
    model = AudioTokenizer(config)
    wanted: State = {}
    for name, tensor in state.items():
        if name.startswith(("encoder.", "decoder.")):
            name = name.replace(".weight_g", ".parametrizations.weight.original0")
            wanted[name.replace(".weight_v", ".parametrizations.weight.original1")] = tensor.float()
    for level in range(config.num_codebooks):
        theirs, ours = f"quantizer.vq.layers.{level}._codebook", f"quantizer.layers.{level}._codebook"
        embed = state[f"{theirs}.embed"].float()
        counts = state.get(f"{theirs}.cluster_size")
        counts = embed.new_ones(len(embed)) if counts is None else counts.float()
        wanted[f"{ours}.embed"] = embed[None]
        wanted[f"{ours}.cluster_size"] = counts[None]
        wanted[f"{ours}.embed_avg"] = (embed * counts[:, None])[None]
    for name, buffer in model.state_dict().items():
        if name.endswith("initted"):
            wanted[name] = buffer.new_ones(buffer.shape)
    load_state(model, wanted, where)
    return model.for_use()


def _read_transformers(folder: Path) -> tuple[State, AudioTokenizerConfig]:
    """A folder saved by transformers' EncodecModel -> EnCodec's names, and the architecture."""
    path = folder / "config.json"
    given = read_json(path, "give a folder saved by transformers")
    if given.get("model_type") != "encodec":
        raise UserError(f"{path}: model_type {given.get('model_type')!r}, not encodec")
    theirs = HF_DEFAULTS | given
    if theirs["trim_right_ratio"] != 1.0:
        raise UserError(f"{path}: trim_right_ratio {theirs['trim_right_ratio']:g}; only 1 can be imported")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors file in it")
    raw = {k: v for file in files for k, v in load_weights(file).items()}
    state = {_encodec_name(name, raw): tensor for name, tensor in raw.items()}
    if not all(any(name.startswith(part) for name in state) for part in ("encoder.model.0.", "quantizer.vq.layers.0.")):
        raise UserError(f"{folder}: not an EnCodec model: its first keys are {', '.join(list(raw)[:3])}")
    segment = theirs.get("chunk_length_s") or 0.0
    config = AudioTokenizerConfig(
        sample_rate=theirs["sampling_rate"],
        channels=theirs["audio_channels"],
        n_filters=theirs["num_filters"],
        dimension=theirs["hidden_size"],
        ratios=tuple(theirs["upsampling_ratios"]),
        patch=1,
        n_residual_layers=theirs["num_residual_layers"],
        kernel_size=theirs["kernel_size"],
        last_kernel_size=theirs["last_kernel_size"],
        residual_kernel_size=theirs["residual_kernel_size"],
        dilation_base=theirs["dilation_growth_rate"],
        compress=theirs["compress"],
        lstm=theirs["num_lstm_layers"],
        norm=theirs["norm_type"],
        causal=theirs["use_causal_conv"],
        true_skip=not any(".shortcut." in name for name in state),
        pad_mode=theirs["pad_mode"],
        num_codebooks=_levels(state),
        codebook_size=theirs["codebook_size"],
        codebook_dim=0,
        normalise=theirs["normalize"],
        segment=segment,
        overlap=(theirs.get("overlap") or 0.0) if segment else 0.0,
    )
    return state, config


def _encodec_name(name: str, state: State) -> str:
    """transformers' name of a tensor as EnCodec's."""
    name = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", name)
    name = name.replace("quantizer.layers.", "quantizer.vq.layers.").replace(".codebook.", "._codebook.")
    outer = re.match(r"^(decoder\.model\.\d+)\.(conv|norm)\.", name)
    if outer and _is_transposed(outer[1], state):
        return name.replace(f"{outer[1]}.", f"{outer[1]}.convtr.", 1).replace(".convtr.conv.", ".convtr.convtr.", 1)
    return re.sub(r"\.(conv|norm)\.(?=[a-z]+[a-z_0-9.]*$)", lambda m: ".conv." + m[0][1:], name, count=1)


def _is_transposed(layer: str, state: State) -> bool:
    """Of the decoder's outer convolutions only the first and the last are not transposed."""
    outer = [int(m[1]) for k in state if (m := re.match(r"decoder\.layers\.(\d+)\.conv\.", k))]
    return int(layer.rsplit(".", 1)[1]) not in (min(outer), max(outer))
