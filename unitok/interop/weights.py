"""Weights as they are found in practice: shards with an index, outdated files, names with prefixes.

If there is an index, exactly the files and tensors in it are read; else the standard file. A prefix that all needed names share
is removed. Files and tensors that are not used are logged, because a model with the wrong weights fails silently.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from unitok.checkpoints import load_weights
from unitok.errors import UserError
from unitok.files import read_json

log = logging.getLogger("unitok")

State = dict[str, Tensor]
#: A configuration of another project, as read from JSON or YAML; its values are checked where they are used.
ForeignConfig = dict[str, Any]

#: Files of weights in a folder saved by transformers; the first that exists is read (transformers:utils/__init__.py).
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
STANDARD = ("model.safetensors", "pytorch_model.bin")

#: Name parts that torch.compile, DDP, FSDP and activation checkpointing insert.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_EMA = re.compile(r"(?:^|[._])ema(?:[._]|$)")


def read_config(folder: Path, model_type: str = "", part: str = "") -> ForeignConfig:
    """Return the config.json of a folder saved by transformers, or its object `part` if it has one. Errors: `UserError` for
    another model_type; "" allows any."""
    path = folder / "config.json"
    config = read_json(path, "give a folder saved by transformers")
    config = config[part] if isinstance(config.get(part), dict) else config
    if model_type and config.get("model_type") != model_type:
        raise UserError(f"{path}: model_type {config.get('model_type')!r}, not {model_type}")
    return config


def read_folder(folder: Path) -> State:
    """Return the tensors of a folder: those that its index names, or those of its standard file.

    Errors: `UserError` if a shard is missing, or if several files could be the weights.
    """
    for name in INDICES:
        if (folder / name).exists() and (state := _read_index(folder, name)) is not None:
            return state
    files = _candidates(folder)
    chosen = [folder / name for name in STANDARD if folder / name in files][:1]
    for suffix in (".safetensors", ".bin"):
        if not chosen:
            matching = [f for f in files if f.suffix == suffix]
            chosen = _numbered(matching) or matching[:1]
            if len(chosen) < len(matching) and chosen == matching[:1]:
                names = ", ".join(f.name for f in matching[:4])
                raise UserError(
                    f"{folder}: several files could be its weights ({names}), and there is no index; keep one of them"
                )
    if not chosen:
        others = [f.name for f in sorted(folder.iterdir()) if f.suffix in (".gguf", ".h5", ".msgpack")]
        other = f"; {others[0]} cannot be read" if others else ""
        raise UserError(f"{folder}: no .safetensors or .bin file in it{other}")
    _log_files(folder, chosen, files)
    merged: State = {}
    for file in chosen:
        tensors = load_weights(file)
        if twice := next((name for name in tensors if name in merged), None):
            raise UserError(f"{file}: {twice} is in another file, too, and there is no index that says which one to use")
        merged |= tensors
    return merged


def _candidates(folder: Path) -> list[Path]:
    """Return the files that could be a folder's weights, without those of a trainer."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin") and f.is_file())
    return [f for f in files if f.name not in ("training_args.bin", "optimizer.bin", "scheduler.bin")]


def _log_files(folder: Path, read: list[Path], files: list[Path]) -> None:
    """Log which files were read, if others could be the weights, too."""
    if others := [f.name for f in files if f not in read]:
        log.warning("%s: read %s; not read: %s", folder, ", ".join(f.name for f in read), ", ".join(others))


def _read_index(folder: Path, name: str) -> State | None:
    """Return the tensors that an index names; None if its files do not exist, but a standard file does."""
    path = folder / name
    weight_map = read_json(path, "").get("weight_map")
    local = isinstance(weight_map, dict) and all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    )
    if not weight_map or not local:
        raise UserError(f'{path}: not an index of weights: it has no "weight_map" from names to files of this folder')
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        if any((folder / whole).is_file() for whole in STANDARD):
            log.warning("%s: %s names files that do not exist; it is not used", folder, name)
            return None
        raise UserError(f"{folder / missing[0]}: no such file, though {name} lists it")
    state: State = {}
    for file in files:
        tensors = load_weights(folder / file)
        for key in [key for key, holder in weight_map.items() if holder == file]:
            if key not in tensors:
                raise UserError(f"{folder / file}: no {key} in it, though {name} says so")
            state[key] = tensors[key]
    _log_files(folder, [folder / file for file in files], _candidates(folder))
    return state


def _numbered(files: list[Path]) -> list[Path]:
    """Return files that are shards of one set, by their names; none if there are several sets. Errors: `UserError` if some
    shards are missing."""
    sets: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        if match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.\w+", file.name):
            sets.setdefault((match[1], match[3]), []).append(file)
    if len(sets) != 1:
        return []
    ((name, count), shards) = next(iter(sets.items()))
    if len(shards) != int(count):
        raise UserError(f"{shards[0].parent}: {len(shards)} of {int(count)} files {name}-…-of-{count}, and no index")
    return shards


def strip_prefix(state: State, needed: Sequence[str], where: str) -> tuple[State, State]:
    """Find the prefix under which `state` has all `needed` names. Returns the tensors under it, by names without it, and the
    others; all tensors and none if there is no such prefix.

    Of several prefixes the one of a run's `best_state` or of averaged weights (`ema`) is used, then the most common one; it is
    logged.
    """
    plain = {_WRAPPERS.sub("", name): name for name in state}
    if len(plain) == len(state):  # else there are wrapped and plain copies of one name: all names stay
        state = {name: state[old] for name, old in plain.items()}
    anchor = needed[0]
    prefixes = [name.removesuffix(anchor) for name in state if name == anchor or name.endswith(f".{anchor}")]
    fitting = [p for p in prefixes if all(p + name in state for name in needed)]
    if not fitting:
        return state, {}
    taken, *others = sorted(fitting, key=_preference)
    if others:
        log.warning("%s: read the weights under %r; those under %s are not used", where, taken, ", ".join(map(repr, others)))
    under = {name.removeprefix(taken): tensor for name, tensor in state.items() if name.startswith(taken)}
    return under, {name: tensor for name, tensor in state.items() if not name.startswith(taken)}


def _preference(prefix: str) -> tuple[bool, int, int]:
    """Sort key: the best weights of a run and moving averages first; then the usual dictionaries; then the shortest prefix."""
    first = prefix.partition(".")[0]
    usual = ("", "state_dict", "model")
    average = first == "best_state" or _EMA.search(prefix) is not None
    return not average, usual.index(first) if first in usual else len(usual), len(prefix)


def require_names(state: State, names: Sequence[str], what: str, where: str) -> None:
    """Raise `UserError` if `state` lacks one of `names`, which all weights of `what` have."""
    if missing := [name for name in names if name not in state]:
        has = ", ".join(list(state)[:3])
        raise UserError(f"{where}: not {what}: it has no {missing[0]}; its first keys are {has}")


def log_unused(where: str, unused: Iterable[str]) -> None:
    """Log the number of tensors that an import does not use, and the first names."""
    if names := list(unused):
        more = ", …" if len(names) > 3 else ""
        log.warning("%s: %d tensors are not used: %s", where, len(names), ", ".join(names[:3]) + more)
