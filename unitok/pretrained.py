"""Folders of a part: `config.json` + `model.safetensors`, with a version. Nothing is ever unpickled."""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from unitok.checkpoints import load_weights
from unitok.errors import UserError, first_line
from unitok.files import read_json, settle, whole_folder, write_json
from unitok.hub import find

VERSION = 2


def save_part(folder: Path, kind: str, config: Any, state: dict[str, Tensor], overwrite: bool = False) -> None:
    """Write a part's folder; `config` is a dataclass of plain values. Errors: `UserError` as `check_replaceable`'s."""
    with whole_folder(folder, kind, overwrite) as partial:
        write_json(partial / "config.json", {"unitok": VERSION, "kind": kind} | asdict(config))
        save_weights(partial / "model.safetensors", state)


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Errors: `OSError` for a full disk."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def load_config(folder: Path, kind: str, config_class: type) -> Any:
    """The config of a part's folder; errors: `UserError` naming the file."""
    path = Path(folder) / "config.json"
    row = read_json(path, f"a {kind} is a folder with config.json and model.safetensors")
    if row.pop("kind", None) != kind or row.pop("unitok", None) != VERSION:
        raise UserError(f"{path}: not a {kind} of version {VERSION}")
    return make_config(config_class, row, str(path))


def load_part(folder: Path, kind: str, config_class: type) -> tuple[Any, dict[str, Tensor]]:
    """Read a part's folder -> its config and state; errors: `UserError` naming the file. Inverse of `save_part`."""
    return load_config(folder, kind, config_class), load_weights(Path(folder) / "model.safetensors")


def make_config(config_class: type, row: dict, where: str) -> Any:
    """A dataclass from plain values (lists become tuples); errors: `UserError` for keys it does not have."""
    known = {f.name for f in fields(config_class)}
    if unknown := set(row) - known:
        raise UserError(f"{where}: unknown keys {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    try:
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    except TypeError as error:  # a key without a default is missing, or a value is of another type
        raise UserError(f"{where}: {first_line(error)}") from None


def load_state(module: nn.Module, state: dict[str, Tensor], where: str, assign: bool = False) -> None:
    """`load_state_dict`, with one line that names the first keys that differ; `assign` as there."""
    own = module.state_dict()
    other = [k for k in own if k in state and state[k].shape != own[k].shape]
    shapes = [f"{k} is {list(state[k].shape)}, not {list(own[k].shape)}" for k in other]
    differing = [("it lacks", [k for k in own if k not in state]), ("it has", [k for k in state if k not in own]), ("", shapes)]
    told = [f"{what} {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}".strip() for what, keys in differing if keys]
    if told:
        raise UserError(f"{where}: the weights do not fit the configuration: {'; '.join(told)}")
    module.load_state_dict(state, assign=assign)


def part_folder(path: str | Path, name: str, revision: str | None = None) -> Path:
    """The folder of a tokenizer or decoder.

    path: that folder, or the bundle that holds it; either by its path or as a name that `unitok.hub.find` knows, at a `revision`.
    name: the part's folder in a bundle, such as `tokenizers/image`. Errors: `UserError` where there is nothing.
    """
    path = find(path, revision)
    if not settle(path).exists():
        raise UserError(f"{path}: no such folder")
    return path / name if (path / "bundle.json").exists() or (path / name / "config.json").exists() else path


def known_vocabulary(path: Path) -> Path:
    """The vocab.json that says what a decoder's ids mean: beside it, or of the bundle that `path` is the `model` folder of.

    Errors: `UserError` where there is none, as for an imported decoder: its ids may be as many as others and mean something else.
    """
    for folder in (path, *([path.parent] if (path.parent / "bundle.json").exists() else [])):
        if (folder / "vocab.json").exists():
            return folder / "vocab.json"
    part_folder(path, "model")  # says so where there is nothing at all
    why = "what its ids mean is not known, so it cannot be used with the ids of other tokenizers"
    remedy = "give a bundle, whose decoder was trained on its ids"
    raise UserError(f"{path}: a decoder without a vocabulary (no vocab.json beside it): {why}; {remedy}")


def state_fingerprint(config: Any, state: dict[str, Tensor]) -> str:
    """sha256 of configuration and weights: two tokenizers with the same fingerprint make the same codes."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
