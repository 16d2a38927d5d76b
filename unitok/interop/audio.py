"""Audio tokenizers of other projects as ours: EnCodec's files, audiocraft's compression models, transformers' EnCodec.

All are SEANet around a Euclidean residual quantizer. Shapes are read from the weights. What weights cannot say (sample rate,
causality, padding, dilation) is read from audiocraft's `xp.cfg` in the file, a YAML or JSON beside it or given, a published
model's name, or the published model of equal shapes; without these it is asked for, never guessed.
"""

import hashlib
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unitok.checkpoints import Inert, is_safetensors, load_checkpoint, load_weights, weights_in
from unitok.errors import UserError
from unitok.files import read_yaml
from unitok.interop.weights import State, log, read_config, read_folder, require_names, strip_prefix, tell_unused
from unitok.pretrained import load_state
from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig

_ENCODEC = AudioTokenizerConfig(
    sample_rate=24_000, n_filters=32, dimension=128, ratios=(8, 5, 4, 2), patch=1, kernel_size=7, last_kernel_size=7, lstm=2,
    norm="weight_norm", causal=True, true_skip=False, pad_mode="reflect", num_codebooks=32, codebook_size=1024, codebook_dim=0,
)  # fmt: skip
_MUSICGEN = replace(
    _ENCODEC, sample_rate=32_000, n_filters=64, ratios=(8, 5, 4, 4), causal=False, true_skip=True,
    num_codebooks=4, codebook_size=2048,
)  # fmt: skip

#: Published models by the names that their files and folders have (encodec:model.py; transformers' facebook/encodec_32khz;
#: audiocraft:config/solver/compression/encodec_audiogen_16khz.yaml).
PUBLISHED = {
    "encodec_24khz": _ENCODEC,
    "encodec_48khz": replace(
        _ENCODEC, sample_rate=48_000, channels=2, norm="time_group_norm", causal=False, num_codebooks=16,
        normalize=True, segment=1.0, overlap=0.01,
    ),
    "encodec_32khz": _MUSICGEN,
    "audiogen_16khz": replace(_MUSICGEN, sample_rate=16_000, ratios=(8, 5, 4, 2), pad_mode="constant"),
}  # fmt: skip

#: What weights cannot say; the first two are never guessed.
UNSEEN = ("sample_rate", "causal", "pad_mode", "dilation_base", "normalize", "segment", "overlap")

#: Names that every EnCodec has, in whatever wrapper it was saved.
NEEDED = ("encoder.model.0.conv.conv.bias", "quantizer.vq.layers.0._codebook.embed")

#: Our names of what transformers' EncodecConfig calls otherwise; its defaults are EnCodec's for 24 kHz.
HF_NAMES = {
    "sample_rate": "sampling_rate",
    "channels": "audio_channels",
    "n_filters": "num_filters",
    "dimension": "hidden_size",
    "ratios": "upsampling_ratios",
    "n_residual_layers": "num_residual_layers",
    "dilation_base": "dilation_growth_rate",
    "lstm": "num_lstm_layers",
    "norm": "norm_type",
    "causal": "use_causal_conv",
    "normalize": "normalize",
}
HF_SAME = ("kernel_size", "last_kernel_size", "residual_kernel_size", "compress", "pad_mode", "codebook_size")


def import_audio_tokenizer(
    kind: str, source: Path, config: Path | None = None, trust: bool = False, **given: int | bool | None
) -> AudioTokenizer:
    """A checkpoint of one of `unitok.interop.KINDS` -> an `AudioTokenizer` with equal codes, in eval mode.

    Args:
        config: for `encodec`: a YAML or JSON file (audiocraft's, transformers', ours), or a name of `PUBLISHED`.
        given: `sample_rate` (Hz) and `causal`, where no configuration says them; they must agree with one that does.
    """
    where = str(source)
    if kind == "hf-encodec":
        return _read_transformers(source)
    if source.is_dir():
        if (source / "config.json").exists() and not (source / "compression_state_dict.bin").exists():
            raise UserError(f"{where}: a folder saved by transformers: import it as hf-encodec")
        source = source / "compression_state_dict.bin"  # a folder of MusicGen or AudioGen
    _check_hash(source)
    state, told, named = _read_file(source, config, trust)
    asked = _named_config(config)[0] if config else {}
    for name, value in (asked | {k: v for k, v in given.items() if v is not None}).items():
        if told.setdefault(name, value) != value:
            raise UserError(f"{where}: {name} {value} is asked for, but {named} says {told[name]}")
    return from_encodec(state, _config(infer_config(state, where), told, named, where), where)


def _read_file(source: Path, config: Path | None, trust: bool) -> tuple[State, dict[str, Any], str]:
    """The weights of a file by EnCodec's names; what the configuration in it, else `config`, else one beside says; its name."""
    whole = source.is_file() and is_safetensors(source)
    checkpoint: Any = load_weights(source) if whole else load_checkpoint(source, trust)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("pretrained"), str):
        name = checkpoint["pretrained"]
        raise UserError(f"{source}: no weights, only the name of others, {name!r}: get those, and import them (hf-encodec)")
    state, others = strip_prefix(weights_in(checkpoint, source), NEEDED, str(source))
    tell_unused(str(source), others)
    inside = _plain(checkpoint.get("xp.cfg")) if isinstance(checkpoint, dict) else None
    if isinstance(inside, str):
        inside = read_yaml(f"{source}, xp.cfg", inside)
    if isinstance(inside, dict):
        return state, _told(inside, f"{source}, xp.cfg"), "its xp.cfg"
    if config is not None:
        return state, *_named_config(config)
    for name in (f"{source.stem}.yaml", f"{source.stem}.json", "config.yaml", "config.json"):
        beside = source.parent / name
        if beside.is_file() and (told := _told(read_yaml(beside), str(beside))):
            return state, told, name
    published = re.fullmatch(rf"({'|'.join(PUBLISHED)})(-[0-9a-f]{{8}})?", source.stem)
    return state, *(_named_config(Path(published[1])) if published else ({}, ""))


def _plain(node: Any) -> Any:
    """A configuration of OmegaConf's as plain types: its objects come as stand-ins that keep their state."""
    if isinstance(node, Inert):
        state = node.state if isinstance(node.state, dict) else {}
        return _plain(state.get("_content", state.get("_val")))
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, list | tuple) else node


def _named_config(config: Path) -> tuple[dict[str, Any], str]:
    """What a configuration's file, or a published model, says; and its name. Errors: `UserError` for neither."""
    if config.name in PUBLISHED and not config.is_file():
        said = asdict(PUBLISHED[config.name])
        del said["num_codebooks"]  # a file may hold the first levels alone
        return said, config.name
    if not config.is_file():
        raise UserError(f"config {config}: no such file, nor a published model ({', '.join(PUBLISHED)})")
    if told := _told(read_yaml(config), str(config)):
        return told, config.name
    raise UserError(f"{config}: says nothing of an EnCodec: give audiocraft's, transformers' or ours")


def _told(given: Any, where: str) -> dict[str, Any]:
    """What audiocraft's, transformers' or our configuration says, by our names; {}: of no EnCodec. Errors: `UserError`."""
    if not isinstance(given, dict):
        return {}
    theirs = given["audio_encoder"] if isinstance(given.get("audio_encoder"), dict) else given  # of a MusicGen
    if theirs.get("model_type") == "encodec":
        told = _from_transformers(theirs, where)
    elif "model_type" in given:
        told = {}
    elif any(isinstance(given.get(name), dict) for name in ("encodec", "seanet", "rvq")):
        told = _from_audiocraft(given, where)
    else:
        own: Any = given
        for key in ("model", "init_args", "tokenizer") if "model" in given else ():  # of `unitok fit`
            own = own.get(key) if isinstance(own, dict) else None
        known = asdict(AudioTokenizerConfig())
        told = {name: value for name, value in own.items() if name in known} if isinstance(own, dict) else {}
    rate, causal, pad_mode = (told.get(name) for name in ("sample_rate", "causal", "pad_mode"))
    if not (rate is None or (type(rate) is int and rate > 0)) or not (causal is None or isinstance(causal, bool)):
        raise UserError(f"{where}: sample_rate {rate!r} and causal {causal!r}; they are Hz, and true or false")
    if pad_mode not in (None, "reflect", "constant", "replicate"):
        raise UserError(f"{where}: pad_mode {pad_mode!r} cannot be imported")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in told.items() if value is not None}


def _resolved(node: Any, root: Any, where: str, depth: int = 8) -> Any:
    """A configuration in which what `${a.b}` stands for is in its place."""
    if isinstance(node, dict):
        return {key: _resolved(value, root, where, depth) for key, value in node.items()}
    named = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
    if named is None:
        return node
    if not depth:
        raise UserError(f"{where}: values that stand for one another in a circle")
    value = root
    for key in named[1].split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return _resolved(value, root, where, depth - 1)


def _from_audiocraft(given: dict[str, Any], where: str) -> dict[str, Any]:
    """audiocraft's `xp.cfg` (audiocraft:config/model/encodec/default.yaml) by our names."""
    used = {name: given.get(name) for name in ("encodec", "seanet", "rvq", "sample_rate", "channels", "causal")}
    given = _resolved(used, given, where)
    encodec, seanet, rvq = (given[name] or {} for name in ("encodec", "seanet", "rvq"))
    for half in [seanet.pop(key, None) for key in ("encoder", "decoder")]:  # what is said of one half alone must hold for both
        seanet |= half or {}
    computed = {
        "autoencoder": "seanet", "quantizer": "rvq", "activation": "ELU", "activation_params": {"alpha": 1.0},
        "norm_params": {}, "final_activation": None, "trim_right_ratio": 1.0, "disable_norm_outer_blocks": 0,
    }  # fmt: skip
    for name, only in computed.items():
        if (value := (encodec | seanet).get(name, only)) != only:
            raise UserError(f"{where}: {name} {value!r}; only {only!r} can be imported")
    told = {name: seanet[name] for name in asdict(AudioTokenizerConfig()) if name in seanet}
    told |= {"num_codebooks": rvq.get("n_q"), "codebook_size": rvq.get("bins"), "normalize": encodec.get("renormalize")}
    for name in ("sample_rate", "channels", "causal"):
        told[name] = encodec.get(name, told.get(name, given[name]))
    return told


def _config(seen: AudioTokenizerConfig, told: dict[str, Any], named: str, where: str) -> AudioTokenizerConfig:
    """What weights say (`seen`) and what else is known (`told`), joined; errors: `UserError` where they differ or lack some."""
    shapes = {name: value for name, value in asdict(seen).items() if name not in UNSEEN}
    if not told:
        published = [name for name, c in PUBLISHED.items() if all(getattr(c, k) == v for k, v in shapes.items())]
        if published:
            told, named = asdict(PUBLISHED[published[0]]), published[0]
            log.warning("%s: no configuration beside it; its shapes are those of %s, so it is taken as that", where, named)
    for name, value in shapes.items():
        folded = name == "norm" and (value, told.get(name)) == ("none", "weight_norm")  # into plain weights of the same values
        if told.get(name, value) != value and not folded:
            raise UserError(f"{where}: {named} says {name} {told[name]}, its weights have {value}: they do not belong together")
    if missing := [name for name in ("sample_rate", "causal") if name not in told]:
        asked = " and ".join(missing)
        raise UserError(
            f"{where}: neither its weights nor {named or 'a configuration'} say {asked}: give {asked}, or its configuration "
            "(or a published model's name) as config"
        )
    guessed = {name: getattr(seen, name) for name in ("pad_mode", "dilation_base") if name not in told}
    if guessed.get("dilation_base") and seen.n_residual_layers == 1:
        del guessed["dilation_base"]  # of the first block it is 1 anyway
    if guessed:
        said = ", ".join(f"{name} {value}" for name, value in guessed.items())
        log.warning("%s: no configuration says %s: taken as is usual for such weights; it cannot be verified", where, said)
    return replace(seen, **{name: told[name] for name in UNSEEN if name in told})


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
    """The architecture of weights with EnCodec's names; what they cannot say (`UNSEEN`) is as usual for such weights."""
    if NEEDED[0] not in state and any("encoder.layers." in name for name in state):
        raise UserError(f"{where}: transformers' names: import its folder as hf-encodec")
    require_names(state, NEEDED, "an EnCodec model", where)
    # Convolutions outside of blocks, from the waveform's side: first, strided ones of kernels of twice their stride, last.
    outer = sorted({int(m[1]) for k in state if (m := re.match(r"encoder\.model\.(\d+)\.conv\.conv\.", k))})
    weights = [_weight(state, f"encoder.model.{i}.conv.conv") for i in outer]
    blocks = sorted({int(m[1]) for k in state if (m := re.match(r"encoder\.model\.(\d+)\.block\.", k))})
    inner = _weight(state, f"encoder.model.{blocks[0]}.block.1.conv.conv") if blocks else None
    convolutions = [w for w in weights if w is not None]
    if len(convolutions) < 3 or len(convolutions) < len(weights) or inner is None:
        has = f"{len(convolutions)} convolutions and {len(blocks)} blocks"
        raise UserError(f"{where}: not an EnCodec model: its encoder has {has}")
    n_filters, channels, kernel = convolutions[0].shape
    ratios = tuple(w.shape[-1] // 2 for w in reversed(convolutions[1:-1]))
    lstm = [int(m[1]) for k in state if (m := re.match(r"encoder\.model\.\d+\.lstm\.weight_ih_l(\d+)", k))]
    plain = "encoder.model.0.conv.conv.weight" in state
    true_skip = _weight(state, f"encoder.model.{blocks[0]}.shortcut.conv.conv") is None
    return replace(
        _ENCODEC,
        channels=channels,
        n_filters=n_filters,
        dimension=convolutions[-1].shape[0],
        ratios=ratios,
        n_residual_layers=len(blocks) // len(ratios),
        kernel_size=kernel,
        last_kernel_size=convolutions[-1].shape[-1],
        residual_kernel_size=inner.shape[-1],
        compress=n_filters // inner.shape[0],
        lstm=max(lstm, default=-1) + 1,
        norm="time_group_norm" if "encoder.model.0.conv.norm.weight" in state else "none" if plain else "weight_norm",
        true_skip=true_skip,
        pad_mode="constant" if true_skip else "reflect",  # audiocraft's default, and EnCodec's
        num_codebooks=1 + max(int(m[1]) for k in state if (m := re.match(r"quantizer\.vq\.layers\.(\d+)\.", k))),
        codebook_size=state[NEEDED[1]].shape[0],
    )


def _weight(state: State, name: str) -> Tensor | None:
    """A convolution's kernel or, under weight norm in either style, its direction."""
    for suffix in ("weight", "weight_v", "parametrizations.weight.original1"):
        if f"{name}.{suffix}" in state:
            return state[f"{name}.{suffix}"]
    return None


def from_encodec(state: State, config: AudioTokenizerConfig, where: str) -> AudioTokenizer:
    """`state` has EnCodec's names."""
    model = AudioTokenizer(config)
    wanted: State = {}
    for name, tensor in state.items():
        if name.startswith(("encoder.", "decoder.")) and not (config.norm == "none" and ".conv.norm." in name):
            name = name.replace(".weight_g", ".parametrizations.weight.original0")
            wanted[name.replace(".weight_v", ".parametrizations.weight.original1")] = tensor.float()
    rest = {name for name in state if not name.startswith(("encoder.", "decoder."))}
    for level, codebook in enumerate(model.quantizer.layers):
        theirs = f"quantizer.vq.layers.{level}._codebook"
        if f"{theirs}.embed" not in state:
            raise UserError(f"{where}: it lacks {theirs}.embed, though it has later levels")
        codebook.set(state[f"{theirs}.embed"].float(), state.get(f"{theirs}.cluster_size"))
        rest -= {f"{theirs}.{name}" for name in ("embed", "cluster_size", "embed_avg", "inited")}
    if strange := sorted(name for name in rest if name.startswith("quantizer.")):
        raise UserError(f"{where}: its quantizer has {strange[0]}, which EnCodec's has not: it cannot be imported")
    wanted |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("quantizer.")}
    load_state(model, wanted, where)
    tell_unused(where, sorted(rest))
    return model.prepare_for_inference()


def _read_transformers(folder: Path) -> AudioTokenizer:
    """A folder saved by transformers' EncodecModel, or by a model that holds one, such as MusicGen."""
    where = str(folder)
    told = _told(read_config(folder, "encodec", part="audio_encoder"), str(folder / "config.json"))
    theirs = ("encoder.layers.0.conv.bias", "quantizer.layers.0.codebook.embed")
    raw, others = strip_prefix(read_folder(folder), theirs, where)
    require_names(raw, theirs, "an EnCodec model", where)
    tell_unused(where, others)
    state = {_encodec_name(name, raw): tensor for name, tensor in raw.items()}
    return from_encodec(state, _config(infer_config(state, where), told, "config.json", where), where)


def _from_transformers(given: dict[str, Any], where: str) -> dict[str, Any]:
    """transformers' EncodecConfig by our names."""
    if (trim := given.get("trim_right_ratio", 1.0)) != 1.0:
        raise UserError(f"{where}: trim_right_ratio {trim:g}; only 1 can be imported")
    names = HF_NAMES | dict(zip(HF_SAME, HF_SAME, strict=True))
    told = {ours: given.get(theirs, getattr(_ENCODEC, ours)) for ours, theirs in names.items()}
    segment = given.get("chunk_length_s") or 0.0
    return told | {"segment": segment, "overlap": (given.get("overlap") or 0.0) if segment else 0.0}


def _encodec_name(name: str, state: State) -> str:
    """transformers' name of a tensor as EnCodec's."""
    name = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", name)
    name = name.replace("quantizer.layers.", "quantizer.vq.layers.").replace(".codebook.", "._codebook.")
    outer = re.match(r"^(decoder\.model\.(\d+))\.(conv|norm)\.", name)
    numbers = [int(m[1]) for k in state if (m := re.match(r"decoder\.layers\.(\d+)\.conv\.", k))]
    if outer and int(outer[2]) not in (min(numbers), max(numbers)):  # all but the first and the last are transposed
        return name.replace(f"{outer[1]}.", f"{outer[1]}.convtr.", 1).replace(".convtr.conv.", ".convtr.convtr.", 1)
    return re.sub(r"\.(conv|norm)\.(?=[a-z]+[a-z_0-9.]*$)", lambda m: ".conv." + m[0][1:], name, count=1)
