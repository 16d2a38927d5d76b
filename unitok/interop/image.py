"""Import of image tokenizers: taming-transformers, LlamaGen, Chameleon (the file of Meta, the folder of transformers).

All four are the network of taming-transformers. The architecture follows from the shapes of the weights; a YAML or config.json
only adds the resolution. `quant_conv` and `post_quant_conv` are the two projections of our quantizer (1x1 convolutions are
linear). LlamaGen numbers the blocks of the decoder from low to high resolution; its codes have length 1.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from unitok.checkpoints import load_weights
from unitok.errors import UserError
from unitok.files import read_yaml
from unitok.interop.weights import ForeignConfig, State, log, log_unused, read_config, read_folder, require_names, strip_prefix
from unitok.pretrained import load_state
from unitok.tokenizers import ImageTokenizer, ImageTokenizerConfig
from unitok.tokenizers.quantize import VectorQuantizer

#: Names in the weights of every VQ-GAN of this family.
NEEDED = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight", "quant_conv.weight")
FAMILY = "a VQ-GAN of this kind"


def import_image_tokenizer(kind: str, source: Path, config: Path | None = None, trust: bool = False) -> ImageTokenizer:
    """Return an `ImageTokenizer` with equal codes, in eval mode, from a checkpoint. kind: one of `unitok.interop.KINDS`.
    Errors: `UserError` that names the file."""
    where = str(source)
    if kind == "hf-chameleon-vqvae":
        return from_chameleon(read_folder(source), read_config(source, part="vq_config"), where)
    state, others = strip_prefix(load_weights(source, trust), NEEDED, where)
    if kind == "llamagen":
        state = _from_llamagen(state)
        return from_taming(state, infer_config(state, 256, True, where), where, others)
    ddconfig = _ddconfig(source, config)
    resolution = int(ddconfig.get("resolution", 512 if kind == "chameleon-vqgan" else 256))
    inferred = infer_config(state, resolution, False, where)
    for name in ("ch", "ch_mult", "num_res_blocks", "z_channels"):
        declared, actual = ddconfig.get(name), getattr(inferred, name)
        if declared is not None and (tuple(declared) if isinstance(declared, list) else declared) != actual:
            raise UserError(f"{where}: its YAML says {name} {declared}, its weights have {actual}: they do not belong together")
    if not ddconfig:
        log.warning("%s: no YAML says the resolution; %d is assumed, which cannot be verified", where, resolution)
    return from_taming(state, inferred, where, others)


def from_chameleon(state: State, vq_config: ForeignConfig, where: str) -> ImageTokenizer:
    """Return an `ImageTokenizer` from weights, under any prefix, and configuration of transformers' ChameleonVQVAE."""
    state, others = strip_prefix(state, NEEDED, where)
    return from_taming(state, infer_config(state, int(vq_config.get("resolution", 512)), False, where), where, others)


# ---- Names of taming-transformers -> ours ---------------------------------------------------------------------------


def from_taming(state: State, config: ImageTokenizerConfig, where: str, others: Iterable[str] = ()) -> ImageTokenizer:
    """Return an `ImageTokenizer` from weights with the names of taming-transformers. others: further names of the file, for the
    log."""
    model = ImageTokenizer(config)
    ours = {k: v for k, v in state.items() if k.startswith(("encoder.", "decoder."))}
    used = {*ours, "quantize.embedding.weight"}
    for convolution, projection in (("quant_conv", "project_in"), ("post_quant_conv", "project_out")):
        weight, bias = f"{convolution}.weight", f"{convolution}.bias"
        require_names(state, (weight, bias), FAMILY, where)
        ours |= {f"quantizer.{projection}.weight": state[weight].flatten(1), f"quantizer.{projection}.bias": state[bias]}
        used |= {weight, bias}
    ours = {k: v.float() for k, v in ours.items()}
    assert isinstance(model.quantizer, VectorQuantizer)
    model.quantizer.codebook.set(state["quantize.embedding.weight"].float())
    ours |= {k: v for k, v in model.state_dict().items() if ".codebook." in k}
    load_state(model, ours, where)
    log_unused(where, [*(name for name in state if name not in used), *others])
    return model.eval()


def infer_config(state: State, resolution: int, normalize: bool, where: str) -> ImageTokenizerConfig:
    """Return the architecture of weights with the names of taming-transformers. resolution: nominal, pixels per side.
    normalize: whether codes have length 1."""
    if any(name == "quantize.embed.weight" or name.endswith(".quantize.embed.weight") for name in state):
        raise UserError(f"{where}: a Gumbel VQ-GAN; only vector-quantized ones can be imported")
    require_names(state, NEEDED, FAMILY, where)
    ch, colors = state["encoder.conv_in.weight"].shape[:2]
    if colors != 3:
        raise UserError(f"{where}: a VQ-GAN of {colors} channels; images have 3")
    levels = 1 + max((int(m[1]) for k in state if (m := re.match(r"encoder\.down\.(\d+)\.", k))), default=-1)
    blocks = {int(m[1]) for k in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", k))}
    first = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(1, levels))]
    require_names(state, first, FAMILY, where)
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
        codebook_normalize=normalize,
        decodes=any(k.startswith("decoder.") for k in state),
    )


def _ddconfig(source: Path, config: Path | None) -> ForeignConfig:
    """Return the mapping `ddconfig` of a YAML file, at any depth: `config`, or the one beside the source; {} if there is
    none."""
    beside = sorted(source.parent.glob("*.yaml"))
    same_name = [f for f in beside if f.stem == source.stem]
    path = config or (same_name[0] if same_name else beside[0] if len(beside) == 1 else None)
    if path is None:
        return {}
    if not path.exists():
        raise UserError(f"config {path}: no such file")
    found = _find(read_yaml(path), "ddconfig")
    ddconfig = found if isinstance(found, dict) else {}
    if ddconfig.get("double_z"):
        raise UserError(f"{path}: double_z is true: a KL autoencoder, not a VQ-GAN")
    return ddconfig


def _find(node: object, key: str) -> object:
    """Return the first value of `key` in nested mappings; None if there is none."""
    if not isinstance(node, dict):
        return None
    if key in node:
        return node[key]
    return next((found for child in node.values() if (found := _find(child, key)) is not None), None)


# ---- Names of other projects -> those of taming-transformers --------------------------------------------------------


def _from_llamagen(state: State) -> State:
    """Rename the tensors of LlamaGen as in taming-transformers."""
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
