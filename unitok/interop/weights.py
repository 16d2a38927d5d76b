"""Weights on a disk as people leave them: shards with an index, stale files, names behind prefixes.

An index is followed to the letter; without one the standard file is read; the prefix under which every needed name stands is
taken off. What is passed over is logged: weights that are silently not the ones meant give a model that is silently wrong.
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

#: Files of weights in a folder saved by transformers, the first that is there is read (transformers:utils/__init__.py).
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
STANDARD = ("model.safetensors", "pytorch_model.bin")

#: What torch.compile, DDP, FSDP and checkpointed activations put anywhere into a name.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_EMA = re.compile(r"(?:^|[._])ema(?:[._]|$)")


def read_config(folder: Path, model_type: str = "", part: str = "") -> dict[str, Any]:
    """The config.json of a folder saved by transformers, or its `part`. Errors: `UserError` for another type; "" allows any."""
    path = folder / "config.json"
    given = read_json(path, "give a folder saved by transformers")
    given = given[part] if isinstance(given.get(part), dict) else given
    if model_type and given.get("model_type") != model_type:
        raise UserError(f"{path}: model_type {given.get('model_type')!r}, not {model_type}")
    return given


def read_folder(folder: Path) -> State:
    """The tensors of a folder's weights: those that its index names, or its one standard file.

    Errors: `UserError` where a shard is missing, or where several files could be meant. `read_config` has found the folder.
    """
    for name in INDICES:
        if (folder / name).exists() and (state := _read_index(folder, name)) is not None:
            return state
    files = _candidates(folder)
    chosen = [folder / name for name in STANDARD if folder / name in files][:1]
    for suffix in (".safetensors", ".bin"):
        if not chosen:
            found = [f for f in files if f.suffix == suffix]
            chosen = _numbered(found) or found[:1]
            if len(chosen) < len(found) and chosen == found[:1]:
                names = ", ".join(f.name for f in found[:4])
                raise UserError(f"{folder}: several files could be its weights ({names}) and no index; keep the one you mean")
    if not chosen:
        others = [f.name for f in sorted(folder.iterdir()) if f.suffix in (".gguf", ".h5", ".msgpack")]
        other = f"; {others[0]} cannot be read" if others else ""
        raise UserError(f"{folder}: no .safetensors or .bin file in it{other}")
    _tell_read(folder, chosen, files)
    merged: State = {}
    for file in chosen:
        held = load_weights(file)
        if twice := next((name for name in held if name in merged), None):
            raise UserError(f"{file}: {twice} is in another file, too, and no index says which one counts")
        merged |= held
    return merged


def _candidates(folder: Path) -> list[Path]:
    """Files that could be a folder's weights; a trainer's own are none."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin") and f.is_file())
    return [f for f in files if f.name not in ("training_args.bin", "optimizer.bin", "scheduler.bin")]


def _tell_read(folder: Path, read: list[Path], files: list[Path]) -> None:
    """Say in the log which of a folder's files are its weights, where there are others that could be."""
    if others := [f.name for f in files if f not in read]:
        log.warning("%s: read %s; not read: %s", folder, ", ".join(f.name for f in read), ", ".join(others))


def _read_index(folder: Path, name: str) -> State | None:
    """The tensors that an index names, from the files it says; None where it is a leftover beside a whole file."""
    path = folder / name
    named = read_json(path, "").get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(v, str) and Path(v).name == v for v in named.values()):
        raise UserError(f'{path}: not an index of weights: it has no "weight_map" from names to files of this folder')
    files = sorted(set(named.values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        if any((folder / whole).is_file() for whole in STANDARD):
            log.warning("%s: %s names files that are not there; not used", folder, name)
            return None
        raise UserError(f"{folder / missing[0]}: no such file, though {name} lists it")
    state: State = {}
    for file in files:
        held = load_weights(folder / file)
        for key in [key for key, where in named.items() if where == file]:
            if key not in held:
                raise UserError(f"{folder / file}: no {key} in it, though {name} says so")
            state[key] = held[key]
    _tell_read(folder, [folder / file for file in files], _candidates(folder))
    return state


def _numbered(files: list[Path]) -> list[Path]:
    """Files that are all the shards of one set, by their names; errors: `UserError` where some of the set are missing."""
    sets: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        if found := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.\w+", file.name):
            sets.setdefault((found[1], found[3]), []).append(file)
    if len(sets) != 1:
        return []
    ((name, count), shards) = next(iter(sets.items()))
    if len(shards) != int(count):
        raise UserError(f"{shards[0].parent}: {len(shards)} of {int(count)} files {name}-…-of-{count}, and no index")
    return shards


def strip_prefix(state: State, wanted: Sequence[str], where: str) -> tuple[State, State]:
    """Tensors under the prefix of all of `wanted`, by their plain names, and the others; without such a prefix all and none.

    Of several, a run's `best_state` or one with `ema` in it is taken, then what a checkpoint usually means; the log says which.
    """
    plain = {_WRAPPERS.sub("", name): name for name in state}
    if len(plain) == len(state):  # else a wrapped and a plain copy lie side by side: both stay what they are called
        state = {name: state[old] for name, old in plain.items()}
    anchor = wanted[0]
    prefixes = [name.removesuffix(anchor) for name in state if name == anchor or name.endswith(f".{anchor}")]
    fitting = [p for p in prefixes if all(p + name in state for name in wanted)]
    if not fitting:
        return state, {}
    taken, *others = sorted(fitting, key=_preference)
    if others:
        log.warning("%s: read the weights under %r; those under %s are not used", where, taken, ", ".join(map(repr, others)))
    under = {name.removeprefix(taken): tensor for name, tensor in state.items() if name.startswith(taken)}
    return under, {name: tensor for name, tensor in state.items() if not name.startswith(taken)}


def _preference(prefix: str) -> tuple[bool, int, int]:
    """The best of a run first, then moving averages; then by the dictionary that holds them; then what lies highest."""
    first = prefix.partition(".")[0]
    usual = ("", "state_dict", "model")
    average = first == "best_state" or _EMA.search(prefix) is not None
    return not average, usual.index(first) if first in usual else len(usual), len(prefix)


def require_names(state: State, names: Sequence[str], what: str, where: str) -> None:
    """Errors: `UserError` with the first of `names` that weights of `what` have, and these have not."""
    if missing := [name for name in names if name not in state]:
        has = ", ".join(list(state)[:3])
        raise UserError(f"{where}: not {what}: it has no {missing[0]}; its first keys are {has}")


def tell_unused(where: str, unused: Iterable[str]) -> None:
    """Say in the log how many tensors an import leaves unused, and the first of them."""
    if names := list(unused):
        more = ", …" if len(names) > 3 else ""
        log.warning("%s: %d tensors are not used: %s", where, len(names), ", ".join(names[:3]) + more)
