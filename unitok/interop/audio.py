"""Import of audio tokenizers: EnCodec's files, audiocraft's compression models, transformers' EnCodec.

All are SEANet around a Euclidean residual quantizer. The shapes of the weights determine most of the configuration. The rest
(sample rate, causality, padding, dilation) comes from audiocraft's `xp.cfg` in the file, from a YAML or JSON that lies beside
it or is given, from the name of a published model, or from the published model of equal shapes. Otherwise the user must give
it.
"""

import hashlib
import re
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from unitok.checkpoints import Inert, is_safetensors, load_checkpoint, load_weights, weights_in
from unitok.errors import UserError
from unitok.files import read_yaml
from unitok.interop.weights import ForeignConfig, State, log, log_unused, read_config, read_folder, require_names, strip_prefix
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

#: Published models by the names of their files and folders (encodec:model.py; transformers' facebook/encodec_32khz;
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

#: Fields that do not follow from the weights; the first two are never guessed.
NOT_IN_WEIGHTS = ("sample_rate", "causal", "pad_mode", "dilation_base", "normalize", "segment", "overlap")

#: Names in the weights of every EnCodec.
NEEDED = ("encoder.model.0.conv.conv.bias", "quantizer.vq.layers.0._codebook.embed")

#: Our fields -> those of transformers' EncodecConfig with another name; its defaults are those of EnCodec's 24 kHz model.
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
    kind: str,
    source: Path,
    config: Path | None = None,
    trust: bool = False,
    sample_rate: int | None = None,
    causal: bool | None = None,
) -> AudioTokenizer:
    """Return an `AudioTokenizer` with equal codes, in eval mode, from a checkpoint.

    Args:
        kind: one of `unitok.interop.KINDS`. source: its file or folder. trust: as for `import_checkpoint`.
        config: for `encodec`: a YAML or JSON file (of audiocraft, transformers or unitok), or a name of `PUBLISHED`.
        sample_rate, causal: Hz, and whether codes are independent of later audio, if no configuration says so; they must agree
            with a configuration that does.

    Errors: `UserError` that names the file.
    """
    where = str(source)
    if kind == "hf-encodec":
        return _read_transformers(source)
    if source.is_dir():
        if (source / "config.json").exists() and not (source / "compression_state_dict.bin").exists():
            raise UserError(f"{where}: a folder saved by transformers: import it as hf-encodec")
        source = source / "compression_state_dict.bin"  # a folder of MusicGen or AudioGen
    _check_hash(source)
    state, known, origin = _read_file(source, config, trust)
    requested = _read_named_config(config)[0] if config else {}
    requested |= {name: value for name, value in {"sample_rate": sample_rate, "causal": causal}.items() if value is not None}
    for name, value in requested.items():
        if known.setdefault(name, value) != value:
            raise UserError(f"{where}: {name} {value} was given, but {origin} says {known[name]}")
    return from_encodec(state, _join_config(infer_config(state, where), known, origin, where), where)


def _read_file(source: Path, config: Path | None, trust: bool) -> tuple[State, ForeignConfig, str]:
    """Return the weights of a file by EnCodec's names; the fields in the configuration inside it, else in `config`, else in one
    beside it; and the name of that configuration."""
    whole = source.is_file() and is_safetensors(source)
    checkpoint: object = load_weights(source) if whole else load_checkpoint(source, trust)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("pretrained"), str):
        name = checkpoint["pretrained"]
        raise UserError(f"{source}: no weights, only the name {name!r} of others: get those, and import them as hf-encodec")
    state, others = strip_prefix(weights_in(checkpoint, source), NEEDED, str(source))
    log_unused(str(source), others)
    inside = _plain(checkpoint.get("xp.cfg")) if isinstance(checkpoint, dict) else None
    if isinstance(inside, str):
        inside = read_yaml(f"{source}, xp.cfg", inside)
    if isinstance(inside, dict):
        return state, _known_fields(inside, f"{source}, xp.cfg"), "its xp.cfg"
    if config is not None:
        return state, *_read_named_config(config)
    for name in (f"{source.stem}.yaml", f"{source.stem}.json", "config.yaml", "config.json"):
        beside = source.parent / name
        if beside.is_file() and (known := _known_fields(read_yaml(beside), str(beside))):
            return state, known, name
    published = re.fullmatch(rf"({'|'.join(PUBLISHED)})(-[0-9a-f]{{8}})?", source.stem)
    return state, *(_read_named_config(Path(published[1])) if published else ({}, ""))


def _plain(node: object) -> object:
    """Convert a configuration of OmegaConf to plain types; unpickling replaced its objects by stand-ins that keep their
    state."""
    if isinstance(node, Inert):
        state = node.state if isinstance(node.state, dict) else {}
        return _plain(state.get("_content", state.get("_val")))
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, list | tuple) else node


def _read_named_config(config: Path) -> tuple[ForeignConfig, str]:
    """Return the fields in a configuration file, or those of a published model, and its name. Errors: `UserError` for
    neither."""
    if config.name in PUBLISHED and not config.is_file():
        published = asdict(PUBLISHED[config.name])
        del published["num_codebooks"]  # a file may hold the first levels alone
        return published, config.name
    if not config.is_file():
        raise UserError(f"config {config}: no such file, nor a published model ({', '.join(PUBLISHED)})")
    if known := _known_fields(read_yaml(config), str(config)):
        return known, config.name
    raise UserError(f"{config}: not the configuration of an EnCodec: give one of audiocraft, transformers or unitok")


def _known_fields(config: object, where: str) -> ForeignConfig:
    """Return the fields of `AudioTokenizerConfig` in a configuration of audiocraft, transformers or unitok; {} if it is not one
    of an EnCodec. Errors: `UserError` for values that cannot be imported."""
    if not isinstance(config, dict):
        return {}
    theirs = config["audio_encoder"] if isinstance(config.get("audio_encoder"), dict) else config  # of a MusicGen
    fields: ForeignConfig = {}
    if theirs.get("model_type") == "encodec":
        fields = _from_transformers(theirs, where)
    elif "model_type" not in config and any(isinstance(config.get(name), dict) for name in ("encodec", "seanet", "rvq")):
        fields = _from_audiocraft(config, where)
    elif "model_type" not in config:
        own: object = config
        for key in ("model", "init_args", "tokenizer") if "model" in config else ():  # of `unitok fit`
            own = own.get(key) if isinstance(own, dict) else None
        names = asdict(AudioTokenizerConfig())
        fields = {name: value for name, value in own.items() if name in names} if isinstance(own, dict) else {}
    rate, causal, pad_mode = (fields.get(name) for name in ("sample_rate", "causal", "pad_mode"))
    if not (rate is None or (type(rate) is int and rate > 0)) or not (causal is None or isinstance(causal, bool)):
        raise UserError(f"{where}: sample_rate {rate!r} and causal {causal!r}; they must be Hz, and true or false")
    if pad_mode not in (None, "reflect", "constant", "replicate"):
        raise UserError(f"{where}: pad_mode {pad_mode!r} cannot be imported")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items() if value is not None}


def _resolved(node: object, root: object, where: str, depth: int = 8) -> object:
    """Replace references `${a.b}` in a configuration by the values of `root` that they name."""
    if isinstance(node, dict):
        return {key: _resolved(value, root, where, depth) for key, value in node.items()}
    named = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
    if named is None:
        return node
    if not depth:
        raise UserError(f"{where}: its values refer to one another in a circle")
    value = root
    for key in named[1].split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return _resolved(value, root, where, depth - 1)


def _from_audiocraft(config: ForeignConfig, where: str) -> ForeignConfig:
    """Return our fields of audiocraft's `xp.cfg` (audiocraft:config/model/encodec/default.yaml)."""
    used = {
        name: _resolved(config.get(name), config, where)
        for name in ("encodec", "seanet", "rvq", "sample_rate", "channels", "causal")
    }
    encodec, seanet, rvq = (dict(part) if isinstance(part := used[name], dict) else {} for name in ("encodec", "seanet", "rvq"))
    for half in [seanet.pop(key, None) for key in ("encoder", "decoder")]:  # values of one half must hold for both
        seanet |= half or {}
    computed = {
        "autoencoder": "seanet", "quantizer": "rvq", "activation": "ELU", "activation_params": {"alpha": 1.0},
        "norm_params": {}, "final_activation": None, "trim_right_ratio": 1.0, "disable_norm_outer_blocks": 0,
    }  # fmt: skip
    for name, only in computed.items():
        if (value := (encodec | seanet).get(name, only)) != only:
            raise UserError(f"{where}: {name} {value!r}; only {only!r} can be imported")
    fields = {name: seanet[name] for name in asdict(AudioTokenizerConfig()) if name in seanet}
    fields |= {"num_codebooks": rvq.get("n_q"), "codebook_size": rvq.get("bins"), "normalize": encodec.get("renormalize")}
    for name in ("sample_rate", "channels", "causal"):
        fields[name] = encodec.get(name, fields.get(name, used[name]))
    return fields


def _join_config(inferred: AudioTokenizerConfig, known: ForeignConfig, origin: str, where: str) -> AudioTokenizerConfig:
    """Join the configuration that follows from weights with the fields that are `known` from elsewhere. origin: name of their
    source. Errors: `UserError` if they contradict one another, or if the sample rate or causality is missing."""
    shapes = {name: value for name, value in asdict(inferred).items() if name not in NOT_IN_WEIGHTS}
    if not known:
        published = [name for name, c in PUBLISHED.items() if all(getattr(c, k) == v for k, v in shapes.items())]
        if published:
            known, origin = asdict(PUBLISHED[published[0]]), published[0]
            log.warning("%s: no configuration beside it; it has the shapes of %s and is imported as that", where, origin)
    for name, value in shapes.items():
        folded = name == "norm" and (value, known.get(name)) == ("none", "weight_norm")  # into plain weights of equal values
        if known.get(name, value) != value and not folded:
            raise UserError(
                f"{where}: {origin} says {name} {known[name]}, its weights have {value}: they do not belong together"
            )
    if missing := " and ".join(name for name in ("sample_rate", "causal") if name not in known):
        raise UserError(
            f"{where}: neither its weights nor {origin or 'a configuration'} say {missing}: give {missing}, or as config its "
            "configuration or the name of a published model"
        )
    guessed = {name: getattr(inferred, name) for name in ("pad_mode", "dilation_base") if name not in known}
    if guessed.get("dilation_base") and inferred.n_residual_layers == 1:
        del guessed["dilation_base"]  # a single block has dilation 1 in any case
    if guessed:
        values = ", ".join(f"{name} {value}" for name, value in guessed.items())
        log.warning("%s: no configuration says %s: assumed as usual for such weights, which cannot be verified", where, values)
    return replace(inferred, **{name: known[name] for name in NOT_IN_WEIGHTS if name in known})


def _check_hash(path: Path) -> None:
    """Compare the sha256 of a published file with its first digits in the file's name. Errors: `UserError` if they differ."""
    expected = re.fullmatch(r"encodec_\w+-([0-9a-f]{8})\.th", path.name)
    if not expected:
        return
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if not actual.startswith(expected[1]):
        raise UserError(
            f"{path}: damaged, or another file: its name says sha256 {expected[1]}…, it has {actual[:8]}…; get it again"
        )


def infer_config(state: State, where: str) -> AudioTokenizerConfig:
    """Return the architecture of weights with EnCodec's names; the fields `NOT_IN_WEIGHTS` are as usual for such weights."""
    if NEEDED[0] not in state and any("encoder.layers." in name for name in state):
        raise UserError(f"{where}: it has the names of transformers: import its folder as hf-encodec")
    require_names(state, NEEDED, "an EnCodec model", where)
    # Convolutions outside of blocks, from waveform to latents: the first; the strided ones, with kernels of twice the stride;
    # the last.
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
    """Return the kernel of a convolution or, with weight norm of either style, its direction; None if there is no such
    convolution."""
    for suffix in ("weight", "weight_v", "parametrizations.weight.original1"):
        if f"{name}.{suffix}" in state:
            return state[f"{name}.{suffix}"]
    return None


def from_encodec(state: State, config: AudioTokenizerConfig, where: str) -> AudioTokenizer:
    """Return an `AudioTokenizer`, prepared for inference, from weights with EnCodec's names. Errors: `UserError` for weights
    that do not fit `config`."""
    model = AudioTokenizer(config)
    ours: State = {}
    for name, tensor in state.items():
        if name.startswith(("encoder.", "decoder.")) and not (config.norm == "none" and ".conv.norm." in name):
            name = name.replace(".weight_g", ".parametrizations.weight.original0")
            ours[name.replace(".weight_v", ".parametrizations.weight.original1")] = tensor.float()
    rest = {name for name in state if not name.startswith(("encoder.", "decoder."))}
    for level, codebook in enumerate(model.quantizer.codebooks):
        theirs = f"quantizer.vq.layers.{level}._codebook"
        if f"{theirs}.embed" not in state:
            raise UserError(f"{where}: it lacks {theirs}.embed, but has later levels")
        codebook.set(state[f"{theirs}.embed"].float(), state.get(f"{theirs}.cluster_size"))
        rest -= {f"{theirs}.{name}" for name in ("embed", "cluster_size", "embed_avg", "inited")}
    if strange := sorted(name for name in rest if name.startswith("quantizer.")):
        raise UserError(f"{where}: its quantizer has {strange[0]}, which that of EnCodec does not have: it cannot be imported")
    ours |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("quantizer.")}
    load_state(model, ours, where)
    log_unused(where, sorted(rest))
    return model.prepare_for_inference()


def _read_transformers(folder: Path) -> AudioTokenizer:
    """Read a folder saved by transformers' EncodecModel, or by a model that contains one, such as MusicGen."""
    where = str(folder)
    known = _known_fields(read_config(folder, "encodec", part="audio_encoder"), str(folder / "config.json"))
    theirs = ("encoder.layers.0.conv.bias", "quantizer.layers.0.codebook.embed")
    raw, others = strip_prefix(read_folder(folder), theirs, where)
    require_names(raw, theirs, "an EnCodec model", where)
    log_unused(where, others)
    state = {_encodec_name(name, raw): tensor for name, tensor in raw.items()}
    return from_encodec(state, _join_config(infer_config(state, where), known, "config.json", where), where)


def _from_transformers(config: ForeignConfig, where: str) -> ForeignConfig:
    """Return our fields of transformers' EncodecConfig."""
    if (trim := config.get("trim_right_ratio", 1.0)) != 1.0:
        raise UserError(f"{where}: trim_right_ratio {trim:g}; only 1 can be imported")
    names = HF_NAMES | dict(zip(HF_SAME, HF_SAME, strict=True))
    fields = {ours: config.get(theirs, getattr(_ENCODEC, ours)) for ours, theirs in names.items()}
    segment = config.get("chunk_length_s") or 0.0
    return fields | {"segment": segment, "overlap": (config.get("overlap") or 0.0) if segment else 0.0}


def _encodec_name(name: str, state: State) -> str:
    """Return EnCodec's name of a tensor for its name in transformers."""
    name = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", name)
    name = name.replace("quantizer.layers.", "quantizer.vq.layers.").replace(".codebook.", "._codebook.")
    outer = re.match(r"^(decoder\.model\.(\d+))\.(conv|norm)\.", name)
    numbers = [int(m[1]) for k in state if (m := re.match(r"decoder\.layers\.(\d+)\.conv\.", k))]
    if outer and int(outer[2]) not in (min(numbers), max(numbers)):  # all but the first and the last are transposed
        return name.replace(f"{outer[1]}.", f"{outer[1]}.convtr.", 1).replace(".convtr.conv.", ".convtr.convtr.", 1)
    return re.sub(r"\.(conv|norm)\.(?=[a-z]+[a-z_0-9.]*$)", lambda m: ".conv." + m[0][1:], name, count=1)
