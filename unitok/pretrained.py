"""Folders of a part: `config.json` + `model.safetensors`, with a version; and how a folder takes the place of another.

Nothing is ever unpickled. A folder is written beside its place, brought to the disk and renamed, so a half-written one is never
seen; a kill between two renames is mended by whoever looks next (`settle`). Only what unitok made itself, and of the same
kind, is replaced; files of others that lie in it are kept.
"""

import filecmp
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unitok.errors import UserError, first_line, read_json

VERSION = 1


#: Kind of folder -> the names in it that unitok writes; whatever else lies there is its owner's.
_PART = r"config\.json|model\.safetensors|tokenizer\.(model|json)"
_PARTS = rf"(model|tokenizers/(text|image|audio))/({_PART})"
_PAGE = r"index\.html|scores\.json"
OWN = {
    "bundle": rf"bundle\.json|vocab\.json|{_PARTS}",
    "imported model": _PARTS,
    "exported decoder": r"(generation_)?config\.json|model\.safetensors|unitok_ids\.json",
    **dict.fromkeys(("text tokenizer", "imported text tokenizer", "image tokenizer", "audio tokenizer", "decoder"), _PART),
    "sample output": r"outputs\.jsonl|index\.html|\d{6}\.txt|\d{6}(-prompt-\d+)?-\d+\.\w+|\d{6}-prompt-\d+\.\w+",
    "image evaluation": rf"images\.jsonl|{_PAGE}",
    "audio evaluation": rf"sounds\.jsonl|{_PAGE}",
}


@contextmanager
def whole_folder(folder: str | Path, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when all of it is on the disk; nothing stays of a half one.

    Files that unitok did not write move along from a folder of the same kind. Errors: `UserError` as `check_replaceable`'s,
    and for another bundle in the place of one, unless `overwrite` is set.
    """
    check_replaceable(folder, kind, overwrite)
    target = settle(folder)
    here = Path(os.path.realpath("."))
    if target.is_dir() and (target == here or target in here.parents) and kind_of(target) != kind:
        raise UserError(f"{folder}: the current folder, or one that holds it, with files of others; choose another folder")
    partial = _beside(target, "new")
    handle = _hold(partial, folder)
    try:
        yield partial
        if target.is_dir():
            shutil.copymode(target, partial)
            if kind_of(target) == kind and _carry_over(target, partial, kind) and kind == "bundle" and not overwrite:
                raise _holds(Path(folder))
        _sync(partial)
        _swap(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        settle(target)
        if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.filename is None):  # a full disk
            raise UserError(f"{folder}: {getattr(error, 'strerror', None) or error}; it is as it was") from None
        raise
    finally:
        os.close(handle)


def check_inputs(folder: str | Path, inputs: Iterable[str | Path]) -> None:
    """Errors: `UserError` where a folder that is to be replaced is, or holds, something that is read."""
    target = Path(os.path.realpath(folder))
    for path in inputs:
        real = Path(os.path.realpath(path))
        if target == real or target in real.parents:
            raise UserError(f"{folder}: holds {path}, which is read; choose another folder")


def _hold(partial: Path, folder: str | Path) -> int:
    """Make an empty folder that no other process fills; -> a handle that is to be closed. Errors: `UserError` where one does."""
    import fcntl  # not on Windows, where folders are read

    while True:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(f"{folder}: another command is writing it; wait for it, or choose another folder") from None
        except OSError:
            pass  # a file system without locks
        if partial.exists() and os.path.samestat(os.fstat(handle), partial.stat()):
            break
        os.close(handle)  # the other one has just put it in its place
    for path in partial.iterdir():  # of a command that was killed
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return handle


def settle(folder: str | Path) -> Path:
    """The true path of a folder. Where a command was killed while it replaced it, what was there is put back first."""
    folder = Path(os.path.realpath(folder))
    old = _beside(folder, "old")
    if old.is_dir() and not folder.exists():
        with suppress(OSError):  # another process was sooner, or may write
            os.rename(old, folder)
    return folder


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.unitok-{what}"


def _swap(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`. At each moment one of the two is whole, and `settle` finds it."""
    old, gone = _beside(folder, "old"), _beside(folder, "gone")
    if old.exists():  # of a command that was killed later than its second renaming
        shutil.rmtree(old)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    _sync_one(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        os.rename(old, gone)  # so that what is half removed is never taken for what was there
    shutil.rmtree(gone, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Wait until a folder and all in it are on the disk."""
    for inside, _, names in os.walk(folder):
        for path in (*(Path(inside, name) for name in names), Path(inside)):
            if not path.is_symlink():
                _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _carry_over(old: Path, new: Path, kind: str) -> bool:
    """Take along from a folder of a kind what unitok did not write there; -> whether something that it did write would be lost."""
    loses = False
    for inside, folders, names in os.walk(old):
        for name in (*names, *(f for f in folders if Path(inside, f).is_symlink())):
            path = Path(inside, name)
            place = new / path.relative_to(old)
            if re.fullmatch(OWN[kind], path.relative_to(old).as_posix()):
                loses = loses or not (place.exists() and filecmp.cmp(path, place, shallow=False))
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(path, place, follow_symlinks=False)
    return loses


def kind_of(folder: Path) -> str:
    """What unitok made there, a key of `OWN`; "" for anything else, also where another program has saved since."""

    def holds(name: str, *keys: str) -> dict[str, Any]:
        with suppress(UserError, OSError):
            return read_json(folder / name, "", *keys)
        return {}

    if not folder.is_dir():
        return ""
    if holds("bundle.json", "version", "parts") and (folder / "vocab.json").exists():
        return "bundle"
    config = holds("config.json", "unitok")
    if config and "transformers_version" not in config:
        kind = config.get("kind", "exported decoder" if "architectures" in config else "")
        return f"imported {kind}" if "first" in config else kind if kind in OWN else ""
    if {f.name for f in folder.iterdir()} <= {"model", "tokenizers"} and holds("model/config.json", "unitok"):
        return "imported model"  # without a vocabulary
    page = (folder / "index.html").exists()
    listings = {"outputs.jsonl": "sample output", "images.jsonl": "image evaluation", "sounds.jsonl": "audio evaluation"}
    return next((kind for name, kind in listings.items() if page and (folder / name).exists()), "")


def check_replaceable(folder: str | Path, kind: str = "", overwrite: bool = False) -> None:
    """Raise `UserError` unless `folder` may be written: absent, empty, of the same kind, or anything if `overwrite` is set.

    kind: "" where it is not known yet: then anything that unitok made will do.
    """
    folder = Path(folder)
    true = settle(folder)
    if true.exists() and not true.is_dir():
        raise UserError(f"{folder}: is a file; give a folder")
    if overwrite or not true.is_dir() or not any(true.iterdir()):
        return
    found = kind_of(true)
    if found not in ((kind,) if kind else OWN) or _bundle_around(true):
        raise _holds(folder)


def _bundle_around(folder: Path) -> Path | None:
    """The bundle that a folder is a part of."""
    for bundle in list(folder.parents)[:2]:
        if kind_of(bundle) == "bundle" and re.fullmatch(_PARTS, f"{folder.relative_to(bundle).as_posix()}/config.json"):
            return bundle
    return None


def _holds(folder: Path) -> UserError:
    """The error that names what lies in a folder."""
    kind, bundle = kind_of(folder), _bundle_around(Path(os.path.realpath(folder)))
    if kind == "bundle":
        parts = read_json(folder / "bundle.json", "")["parts"]
        what = f"a bundle ({', '.join(map(str, parts))})"
    elif kind:
        what = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" + (f" of the bundle {bundle}" if bundle else "")
    else:
        marks = {
            "dataset.json": "a data set",
            "checkpoints": "a training run",
            "scenes.jsonl": "scenes",
            "state.json": "a demo",
        }
        names = sorted(f.name for f in folder.iterdir())
        what = next(
            (what for mark, what in marks.items() if mark in names), f"files that unitok did not make, such as {names[0]}"
        )
    return UserError(f"{folder}: holds {what}; choose another folder, or overwrite to replace all of it")


def save_part(folder: Path, kind: str, config: Any, state: dict[str, Tensor], overwrite: bool = False) -> None:
    """Write a part's folder; `config` is a dataclass of plain values. Errors: `UserError` as `check_replaceable`'s."""
    with whole_folder(folder, kind, overwrite) as partial:
        content = json.dumps({"unitok": VERSION, "kind": kind} | asdict(config), indent=1)
        (partial / "config.json").write_text(content + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, partial / "model.safetensors")


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
    try:
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    except TypeError as error:  # a key without a default is missing, or a value is of another type
        raise UserError(f"{where}: {first_line(error)}") from None


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
    settle(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder")
    return path / name if (path / "bundle.json").exists() or (path / name / "config.json").exists() else path


def known_vocabulary(path: Path) -> Path:
    """The vocab.json that says what a decoder's ids mean: beside it, or of the bundle that `path` is the `model` folder of.

    Errors: `UserError` where there is none, as for an imported decoder: that its ids are as many as others says nothing.
    """
    for folder in (path, *([path.parent] if (path.parent / "bundle.json").exists() else [])):
        if (folder / "vocab.json").exists():
            return folder / "vocab.json"
    part_folder(path, "model")  # says so where there is nothing at all
    raise UserError(
        f"{path}: a decoder without a vocabulary (no vocab.json beside it): what its ids mean is not known, so it cannot be "
        "used with the ids of other tokenizers; give a bundle, whose decoder was trained on its ids"
    )


def state_fingerprint(config: Any, state: dict[str, Tensor]) -> str:
    """sha256 of configuration and weights: two tokenizers with the same fingerprint make the same codes."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
