"""Folders of a part: `config.json` + `model.safetensors`, with a version. Shared by every network of unitok.

Nothing is ever unpickled. A folder is written beside its place and renamed, so a half-written one is never seen.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unitok.errors import UserError, read_json

VERSION = 1


def begin_folder(folder: Path) -> Path:
    """An empty folder beside `folder`, to be filled and then put in its place by `replace_folder`."""
    check_replaceable(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def save_part(folder: Path, kind: str, config: Any, state: dict[str, Tensor]) -> None:
    """Write a part's folder; `config` is a dataclass of plain values."""
    folder = Path(folder)
    partial = begin_folder(folder)
    (partial / "config.json").write_text(json.dumps({"unitok": VERSION, "kind": kind} | asdict(config), indent=1) + "\n")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, partial / "model.safetensors")
    replace_folder(partial, folder)


def check_replaceable(folder: Path) -> None:
    """Raise `UserError` unless `folder` is free to be written: absent, empty, or a part or bundle of unitok."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder")
    parts_only = {f.name for f in folder.iterdir()} <= {"model", "tokenizers"}  # an import without a vocabulary
    config = folder / "model" / "config.json" if parts_only else folder / "config.json"
    ours = (folder / "bundle.json").exists() or (config.exists() and '"unitok"' in config.read_text())
    if any(folder.iterdir()) and not ours:
        raise UserError(f"{folder}: not empty and nothing that unitok made; choose another folder")


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; what was there is put aside first and removed last, so one of the two is always whole."""
    check_replaceable(folder)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_config(folder: Path, kind: str, config_class: type) -> Any:
    """The config of a part's folder; errors: `UserError` naming the file."""
    path = Path(folder) / "config.json"
    row = read_json(path, f"a {kind} is a folder with config.json and model.safetensors")
    if row.pop("kind", None) != kind or row.pop("unitok", None) != VERSION:
        raise UserError(f"{path}: not a {kind} of version {VERSION}")
    return make_config(config_class, row, str(path))


def load_part(folder: Path, kind: str, config_class: type) -> tuple[Any, dict[str, Tensor]]:
    """Read a part's folder -> its config and state; errors: `UserError` naming the file. Inverse of `save_part`."""
    config = load_config(folder, kind, config_class)
    weights = Path(folder) / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{weights}: no such file")
    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{weights}: not a whole safetensors file ({error})") from None


def make_config(config_class: type, row: dict, where: str) -> Any:
    """A dataclass from plain values (lists become tuples); errors: `UserError` for keys it does not have."""
    known = {f.name for f in fields(config_class)}
    if unknown := set(row) - known:
        raise UserError(f"{where}: unknown keys {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})


def load_state(module: nn.Module, state: dict[str, Tensor], where: str, assign: bool = False) -> None:
    """`load_state_dict`, with one line that names the first keys that differ; `assign` as there."""
    own = module.state_dict()
    shapes = [
        f"{k} is {list(state[k].shape)}, not {list(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    differing = [("it lacks", [k for k in own if k not in state]), ("it has", [k for k in state if k not in own]), ("", shapes)]
    told = [f"{what} {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}".strip() for what, keys in differing if keys]
    if told:
        raise UserError(f"{where}: the weights do not fit the configuration: {'; '.join(told)}")
    module.load_state_dict(state, assign=assign)


def part_folder(path: Path, name: str) -> Path:
    """The folder of a part, given it or the bundle that holds it (`name` relative to the bundle)."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder")
    return path / name if (path / "bundle.json").exists() or (path / name / "config.json").exists() else path


def state_fingerprint(config: Any, state: dict[str, Tensor]) -> str:
    """sha256 of configuration and weights: two tokenizers with the same fingerprint make the same codes."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
