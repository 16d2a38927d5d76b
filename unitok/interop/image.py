"""Image tokenizers of other projects as ours: taming-transformers, LlamaGen, Chameleon (Meta's file, transformers' folder).

All four are taming's network. The architecture is read from the weights themselves; a YAML or config.json only adds the
resolution. taming's `quant_conv` and `post_quant_conv` are our quantizer's two projections (1x1 convolutions are linear).
LlamaGen names its blocks differently and orders the decoder's from low to high resolution; its codes have length 1.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from unitok.checkpoints import load_weights
from unitok.errors import UserError
from unitok.pretrained import load_state
from unitok.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from unitok.tokenizers.quantize import VectorQuantizer

State = dict[str, Tensor]


def import_image_tokenizer(kind: str, source: Path, config: Path | None = None, trust: bool = False) -> ImageTokenizer:
    """A checkpoint of one of `unitok.interop.KINDS` -> an `ImageTokenizer` with equal codes, in eval mode."""
    if kind == "hf-chameleon-vqvae":
        state, resolution = _read_transformers(source)
    elif kind == "llamagen":
        state, resolution = _from_llamagen(load_weights(source, trust)), 256
    else:
        state, resolution = load_weights(source, trust), _resolution(source, config, 512 if kind == "chameleon-vqgan" else 256)
    return _build(state, resolution, normalise=kind == "llamagen", where=str(source))


# ---- taming's names -> ours -----------------------------------------------------------------------------------------


def _build(state: State, resolution: int, normalise: bool, where: str) -> ImageTokenizer:
    """`state` has taming's names; whatever belongs to the loss is left out."""
    config = infer_config(state, resolution, normalise, where)
    model = ImageTokenizer(config)
    wanted = {k: v for k, v in state.items() if k.startswith(("encoder.", "decoder."))}
    for theirs, ours in (("quant_conv", "project_in"), ("post_quant_conv", "project_out")):
        wanted[f"quantizer.{ours}.weight"] = state[f"{theirs}.weight"].flatten(1)
        wanted[f"quantizer.{ours}.bias"] = state[f"{theirs}.bias"]
    wanted = {k: v.float() for k, v in wanted.items()}
    assert isinstance(model.quantizer, VectorQuantizer)
    model.quantizer.set_codebook(state["quantize.embedding.weight"].float())
    wanted |= {k: v for k, v in model.state_dict().items() if "_codebook" in k}
    load_state(model, wanted, where)
    return model.eval()


def infer_config(state: State, resolution: int, normalise: bool, where: str) -> ImageTokenizerConfig:
    """The architecture that weights with taming's names have. `resolution`: nominal, pixels a side."""
    if "quantize.embed.weight" in state:
        raise UserError(f"{where}: a Gumbel VQ-GAN; only vector-quantized ones can be imported")
    needed = ["encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight", "quant_conv.weight"]
    if missing := [k for k in needed if k not in state]:
        has = ", ".join(list(state)[:3])
        raise UserError(f"{where}: not a VQ-GAN of this kind: it has no {missing[0]}; its first keys are {has}")
    ch = state["encoder.conv_in.weight"].shape[0]
    levels = 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.down\.(\d+)\.", k)))
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    attention = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state]
    size, dim = state["quantize.embedding.weight"].shape
    blocks = {int(m[1]) for k in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", k))}
    return ImageTokenizerConfig(
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
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


def _resolution(source: Path, config: Path | None, default: int) -> int:
    """From the YAML: `model.params.ddconfig.resolution`, or Chameleon's `ddconfig` wherever it lies."""
    beside = sorted(source.parent.glob("*.yaml"))
    named = [f for f in beside if f.stem == source.stem]
    path = config or (named[0] if named else beside[0] if len(beside) == 1 else None)
    if path is None:
        return default
    if not path.exists():
        raise UserError(f"--config {path}: no such file")
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    ddconfig = _find(found, "ddconfig") or {}
    if ddconfig.get("double_z"):
        raise UserError(f"{path}: double_z is true: a KL autoencoder, not a VQ-GAN")
    return int(ddconfig.get("resolution", default))


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


def _read_transformers(folder: Path) -> tuple[State, int]:
    """A folder saved by transformers: ChameleonVQVAE's own, or a whole Chameleon's."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; hf-chameleon-vqvae takes a folder saved by transformers")
    config = json.loads(path.read_text())
    config = config.get("vq_config", config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors file in it")
    state = {k: v for file in files for k, v in load_weights(file).items()}
    prefix = next((p for p in ("model.vqmodel.", "vqmodel.") if any(k.startswith(p) for k in state)), "")
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, int(config.get("resolution", 512))
