"""Image tokenizers of other projects as ours: taming-transformers, LlamaGen, Chameleon (Meta's file, transformers' folder).

All four are taming's network. The architecture is read from the weights themselves; a YAML or config.json only adds the
resolution. taming's `quant_conv` and `post_quant_conv` are our quantizer's two projections (1x1 convolutions are linear).
LlamaGen names its blocks differently and orders the decoder's from low to high resolution; its codes have length 1.
"""

import re
from pathlib import Path
from typing import Any

from unitok.checkpoints import load_weights
from unitok.errors import UserError
from unitok.files import read_json
from unitok.interop.weights import State, log, read_folder, read_yaml, strip_prefix, tell_unused
from unitok.pretrained import load_state
from unitok.tokenizers import ImageTokenizer, ImageTokenizerConfig
from unitok.tokenizers.quantize import VectorQuantizer

#: Names that every VQ-GAN of this family has, in whatever wrapper it was saved.
NEEDED = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight", "quant_conv.weight")


def import_image_tokenizer(kind: str, source: Path, config: Path | None = None, trust: bool = False) -> ImageTokenizer:
    """A checkpoint of one of `unitok.interop.KINDS` -> an `ImageTokenizer` with equal codes, in eval mode."""
    where = str(source)
    if kind == "hf-chameleon-vqvae":
        given = read_json(source / "config.json", "hf-chameleon-vqvae takes a folder saved by transformers")
        return from_chameleon(read_folder(source), given, where)
    state, others = strip_prefix(load_weights(source, trust), NEEDED, where)
    if kind == "llamagen":
        return _build(_from_llamagen(state), others, 256, {}, normalise=True, where=where)
    ddconfig = _ddconfig(source, config)
    resolution = int(ddconfig.get("resolution", 512 if kind == "chameleon-vqgan" else 256))
    made = _build(state, others, resolution, ddconfig, normalise=False, where=where)
    if not ddconfig:
        log.warning(
            "%s: no YAML says what it is: taken as its weights are, of resolution %d; it cannot be verified", where, resolution
        )
    return made


def from_chameleon(state: State, given: dict[str, Any], where: str) -> ImageTokenizer:
    """Weights and config.json of transformers' ChameleonVQVAE, or of a whole Chameleon."""
    given = given.get("vq_config") or given
    return _build(*strip_prefix(state, NEEDED, where), int(given.get("resolution", 512)), {}, normalise=False, where=where)


# ---- taming's names -> ours -----------------------------------------------------------------------------------------


def _build(
    state: State, others: State, resolution: int, ddconfig: dict[str, Any], normalise: bool, where: str
) -> ImageTokenizer:
    """`state` has taming's names; whatever belongs to the loss is left out, as `others` are. `ddconfig`: what must fit them."""
    config = infer_config(state, resolution, normalise, where)
    _check_ddconfig(config, ddconfig, where)
    model = ImageTokenizer(config)
    wanted = {k: v for k, v in state.items() if k.startswith(("encoder.", "decoder."))}
    used = {*wanted, "quantize.embedding.weight"}
    for theirs, ours in (("quant_conv", "project_in"), ("post_quant_conv", "project_out")):
        if missing := [k for k in (f"{theirs}.weight", f"{theirs}.bias") if k not in state]:
            raise UserError(f"{where}: not a VQ-GAN of this kind: it has no {missing[0]}")
        wanted[f"quantizer.{ours}.weight"] = state[f"{theirs}.weight"].flatten(1)
        wanted[f"quantizer.{ours}.bias"] = state[f"{theirs}.bias"]
        used |= {f"{theirs}.weight", f"{theirs}.bias"}
    wanted = {k: v.float() for k, v in wanted.items()}
    assert isinstance(model.quantizer, VectorQuantizer)
    model.quantizer.codebook.set(state["quantize.embedding.weight"].float())
    wanted |= {k: v for k, v in model.state_dict().items() if ".codebook." in k}
    load_state(model, wanted, where)
    tell_unused(where, [*(name for name in state if name not in used), *others])
    return model.eval()


def infer_config(state: State, resolution: int, normalise: bool, where: str) -> ImageTokenizerConfig:
    """The architecture that weights with taming's names have. `resolution`: nominal, pixels a side."""
    if any(name == "quantize.embed.weight" or name.endswith(".quantize.embed.weight") for name in state):
        raise UserError(f"{where}: a Gumbel VQ-GAN; only vector-quantized ones can be imported")
    if missing := [k for k in NEEDED if k not in state]:
        has = ", ".join(list(state)[:3])
        raise UserError(f"{where}: not a VQ-GAN of this kind: it has no {missing[0]}; its first keys are {has}")
    ch, colors = state["encoder.conv_in.weight"].shape[:2]
    if colors != 3:
        raise UserError(f"{where}: a VQ-GAN of {colors} channels; images have 3")
    levels = 1 + max((int(m[1]) for k in state if (m := re.match(r"encoder\.down\.(\d+)\.", k))), default=-1)
    blocks = {int(m[1]) for k in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", k))}
    first = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    if not levels or (lost := [name for name in first if name not in state]):
        raise UserError(
            f"{where}: not a VQ-GAN of this kind: it has no {lost[0] if levels else 'encoder.down.0.block.0.conv1.weight'}"
        )
    attention = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state]
    size, dim = state["quantize.embedding.weight"].shape
    return ImageTokenizerConfig(
        ch=ch,
        ch_mult=tuple(state[name].shape[0] // ch for name in first),
        num_res_blocks=len(blocks),
        attn_resolutions=tuple(resolution // 2**i for i in attention),
        z_channels=state["encoder.conv_out.weight"].shape[0],
        resolution=resolution,
        patch=1,
        quantizer="vq",
        codebook_size=size,
        codebook_dim=dim,
        codebook_normalise=normalise,
        decodes=any(k.startswith("decoder.") for k in state),
    )


def _ddconfig(source: Path, config: Path | None) -> dict[str, Any]:
    """taming's `model.params.ddconfig`, or Chameleon's wherever it lies, of the YAML; empty where there is no YAML."""
    beside = sorted(source.parent.glob("*.yaml"))
    named = [f for f in beside if f.stem == source.stem]
    path = config or (named[0] if named else beside[0] if len(beside) == 1 else None)
    if path is None:
        return {}
    if not path.exists():
        raise UserError(f"config {path}: no such file")
    found = _find(read_yaml(str(path), path.read_text(encoding="utf-8-sig", errors="replace")), "ddconfig")
    ddconfig = found if isinstance(found, dict) else {}
    if ddconfig.get("double_z"):
        raise UserError(f"{path}: double_z is true: a KL autoencoder, not a VQ-GAN")
    return ddconfig


def _check_ddconfig(config: ImageTokenizerConfig, ddconfig: dict[str, Any], where: str) -> None:
    """Raise where the YAML describes another network than the weights are."""
    for name in ("ch", "ch_mult", "num_res_blocks", "z_channels"):
        told, found = ddconfig.get(name), getattr(config, name)
        if told is not None and (tuple(told) if isinstance(told, list) else told) != found:
            raise UserError(f"{where}: its YAML says {name} {told}, its weights have {found}: they do not belong together")


def _find(node: Any, key: str) -> Any:
    """The first value of `key` in nested mappings."""
    if not isinstance(node, dict):
        return None
    if key in node:
        return node[key]
    return next((found for child in node.values() if (found := _find(child, key)) is not None), None)


# ---- Others' names -> taming's --------------------------------------------------------------------------------------


def _from_llamagen(state: State) -> State:
    """LlamaGen's names as taming's."""
    last = max((int(m[1]) for k in state if (m := re.match(r"decoder\.conv_blocks\.(\d+)\.", k))), default=0)
    out: State = {}
    for name, tensor in state.items():
        name = re.sub(r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1.", name)
        name = re.sub(r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", name)
        name = re.sub(r"\.res\.(\d+)\.", r".block.\1.", name)
        for i, part in enumerate(("block_1", "attn_1", "block_2")):
            name = re.sub(rf"^(encoder|decoder)\.mid\.{i}\.", rf"\1.mid.{part}.", name)
        out[name] = tensor
    return out
