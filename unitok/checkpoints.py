"""Checkpoints of any origin as plain types and tensors. Nothing in them is ever executed.

`torch.load(weights_only=True)` refuses files that also hold objects of other programs, such as Lightning's callbacks or
an argparse Namespace, which published checkpoints often do. Such objects are read as inert stand-ins, which take any
state and do nothing, so that the tensors beside them come out. What still does not read is refused; only `trust` lets
it be unpickled.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitok.errors import UserError


def load_checkpoint(path: Path, trust: bool = False) -> Any:
    """What a checkpoint holds; objects of other programs as `Inert`. Errors: `UserError` naming the file.

    trust: unpickle everything, which runs whatever code the file's author put there.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # a torn file raises almost anything
        if trust:
            raise UserError(f"{path}: not a checkpoint that can be read ({_first_line(error)})") from None
        first = error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive, or a torn one
        raise UserError(f"{path}: not a checkpoint that can be read ({_first_line(first)})") from None
    if not foreign:
        raise UserError(f"{path}: not a checkpoint that can be read ({_first_line(first)})")
    try:
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        names = ", ".join(sorted(foreign)[:4])
        raise UserError(
            f"{path}: holds objects that would have to be run to be read ({names}); "
            "if you trust its author, pass --trust-checkpoint"
        ) from None


class Inert:
    """Stands where a checkpoint held an object of another program: takes any arguments and any state, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def _stand_in(name: str) -> type:
    module, _, short = name.rpartition(".")
    return type(short, (Inert,), {"__module__": module})


def load_weights(path: Path, trust: bool = False) -> dict[str, Tensor]:
    """The tensors by name of a .safetensors file or of a checkpoint.

    Of a checkpoint with several state dicts the first of `ema`, `state_dict`, `model`, `best_state` that it has.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.exists():
            raise UserError(f"{path}: no such file")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    found = load_checkpoint(path, trust)
    for name in ("ema", "state_dict", "model", "best_state"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not any(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path}: no weights in it")
    return {k: v for k, v in found.items() if isinstance(v, Tensor)}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that reads whole, or None."""
    files = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in files:
        try:
            load_checkpoint(file)
        except UserError:
            continue
        return file
    return None
