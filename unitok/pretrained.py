"""The folder of a tokenizer or decoder: `config.json` and `model.safetensors`, with a version. Nothing is ever unpickled."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unitok.checkpoints import load_weights
from unitok.errors import UserError, first_line
from unitok.files import read_json, settle, whole_folder, write_json
from unitok.hub import find

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

VERSION = 2  # of folders
ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def save_part(folder: Path, kind: str, config: "DataclassInstance", state: dict[str, Tensor], overwrite: bool = False) -> None:
    """Write the folder of a tokenizer or decoder.

    kind: such as `image tokenizer` or `decoder`. config: a dataclass of plain values. state: the weights.
    Errors: `UserError` where something else is at `folder`, unless `overwrite`.
    """
    with whole_folder(folder, kind, overwrite) as partial:
        write_json(partial / "config.json", {"unitok": VERSION, "kind": kind} | asdict(config))
        save_weights(partial / "model.safetensors", state)


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name into a safetensors file. Errors: `OSError`, such as for a full disk."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def load_config(folder: Path, kind: str, config_class: type[ConfigT]) -> ConfigT:
    """Read the configuration in the folder of a tokenizer or decoder. Errors: `UserError` naming the file."""
    path = Path(folder) / "config.json"
    row = read_json(path, f"a {kind} is a folder with config.json and model.safetensors")
    if row.pop("kind", None) != kind or row.pop("unitok", None) != VERSION:
        raise UserError(f"{path}: not a {kind} of version {VERSION}")
    return make_config(config_class, row, str(path))


def load_part(folder: Path, kind: str, config_class: type[ConfigT]) -> tuple[ConfigT, dict[str, Tensor]]:
    """Read the configuration and weights of a tokenizer or decoder. Inverse of `save_part`. Errors: `UserError` naming the file."""
    return load_config(folder, kind, config_class), load_weights(Path(folder) / "model.safetensors")


def make_config(config_class: type[ConfigT], row: Mapping[str, object], where: str) -> ConfigT:
    """Make a dataclass from plain values; lists become tuples. Errors: `UserError`, which begins with `where`, for unknown or missing keys."""
    known = {f.name for f in fields(config_class)}
    if unknown := set(row) - known:
        raise UserError(f"{where}: unknown keys {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    try:
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    except TypeError as error:  # a key without a default is missing, or a value is of another type
        raise UserError(f"{where}: {first_line(error)}") from None


@contextmanager
def unallocated() -> Iterator[None]:
    """Make modules whose weights are shapes alone (torch's meta device): nothing is allocated or drawn only to be overwritten."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Leaves out the functions of `torch.nn.init`: on the meta device they import torch's compiler, which takes as long as importing torch."""

    def __torch_function__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


def load_state(module: nn.Module, state: dict[str, Tensor], where: str, assign: bool = False) -> None:
    """Load weights as `nn.Module.load_state_dict` does. Errors: `UserError`, which begins with `where`, for weights that do not fit."""
    own = module.state_dict()
    other = [k for k in own if k in state and state[k].shape != own[k].shape]
    shapes = [f"{k} is {list(state[k].shape)}, not {list(own[k].shape)}" for k in other]
    differing = [("it lacks", [k for k in own if k not in state]), ("it has", [k for k in state if k not in own]), ("", shapes)]
    problems = [f"{what} {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}".strip() for what, keys in differing if keys]
    if problems:
        raise UserError(f"{where}: the weights do not fit the configuration: {'; '.join(problems)}")
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


def find_vocabulary(path: Path) -> Path | None:
    """Return the vocab.json of a decoder, given its own folder or its bundle; None where there is none."""
    folders = (path, *([path.parent] if (path.parent / "bundle.json").exists() else []))
    return next((folder / "vocab.json" for folder in folders if (folder / "vocab.json").exists()), None)


def known_vocabulary(path: Path) -> Path:
    """Return the vocab.json of a decoder, given its own folder or its bundle.

    Errors: `UserError` where there is none, as for an imported decoder: nobody knows what its tokens mean, even if their number fits.
    """
    if vocab := find_vocabulary(path):
        return vocab
    part_folder(path, "model")  # an error where there is no folder at all
    why = "what its tokens mean is not known, so it cannot be used with other tokenizers"
    remedy = "give a bundle, whose decoder was trained with its tokenizers"
    raise UserError(f"{path}: a decoder without a vocabulary (no vocab.json beside it): {why}; {remedy}")


def state_fingerprint(config: "DataclassInstance", state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of configuration and weights: tokenizers with the same fingerprint make the same codes.

    Fields of the configuration with `later` in their metadata count only where they differ from their defaults, so bundles that were
    written before there were such fields keep their fingerprints.
    """
    usual = {f.name for f in fields(config) if f.metadata.get("later") and getattr(config, f.name) == f.default}
    values = {name: value for name, value in asdict(config).items() if name not in usual}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
