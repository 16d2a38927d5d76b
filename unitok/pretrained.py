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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unitok.errors import UserError

VERSION = 1


def save_part(folder: Path, kind: str, config: Any, state: dict[str, Tensor]) -> None:
    """Write a part's folder; `config` is a dataclass of plain values."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps({"unitok": VERSION, "kind": kind} | asdict(config), indent=1) + "\n")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, partial / "model.safetensors")
    replace_folder(partial, folder)


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`, which may exist."""
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def load_part(folder: Path, kind: str, config_class: type) -> tuple[Any, dict[str, Tensor]]:
    """Read a part's folder -> its config and state; errors: `UserError` naming the file. Inverse of `save_part`."""
    path = Path(folder) / "config.json"
    try:
        row = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a {kind} is a folder with config.json and model.safetensors") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if row.pop("kind", None) != kind or row.pop("unitok", None) != VERSION:
        raise UserError(f"{path}: not a {kind} of version {VERSION}")
    weights = Path(folder) / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{weights}: no such file")
    return make_config(config_class, row, str(path)), load_file(weights)


def make_config(config_class: type, row: dict, where: str) -> Any:
    """A dataclass from plain values (lists become tuples); errors: `UserError` for keys it does not have."""
    known = {f.name for f in fields(config_class)}
    if unknown := set(row) - known:
        raise UserError(f"{where}: unknown keys {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})


def load_state(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """`load_state_dict`, with one line for what does not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: the weights do not fit the configuration: {detail}") from None


def part_folder(path: Path, name: str) -> Path:
    """The folder of a part, given it or the bundle that holds it (`name` relative to the bundle)."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder")
    return path / name if (path / "bundle.json").exists() else path


def state_fingerprint(config: Any, state: dict[str, Tensor]) -> str:
    """sha256 of configuration and weights: two tokenizers with the same fingerprint make the same codes."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
