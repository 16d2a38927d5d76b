"""Files and folders that are whole or not there, locks, JSON and YAML. Results are written through this file alone.

A file or folder is written beside its place, brought to the disk and renamed, so that a half-written one is never seen. After a
kill between the two renames that replace a folder, whoever reads or writes it next puts back what was there (`settle`). Only what
unitok made itself, and of the same kind, is replaced; files of others in a folder are kept.
"""

import errno
import filecmp
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

from unitok.errors import UserError, first_line

#: A value that JSON can hold.
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

# ---- JSON and YAML --------------------------------------------------------------------------------------------------


def read_json(path: Path, absent: str, *keys: str) -> dict[str, Any]:
    """The JSON object in a file, which must have `keys`; errors: `UserError` naming the file. absent: what to do where there is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {absent}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of too many digits
        raise UserError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON {type(found).__name__}, not an object; it is damaged, or another program's")
    if missing := [key for key in keys if key not in found]:
        raise UserError(f"{path}: has no {', '.join(missing)}; it is damaged, or another program's")
    return found


def write_json(path: Path, value: Any, staging: Path | None = None) -> None:
    """Write one value as readable JSON; `staging` as in `atomic_write`."""
    write_text(path, json.dumps(value, indent=1) + "\n", staging)


#: Where `str.splitlines` ends a line although JSON does not; and halves of surrogate pairs, which UTF-8 cannot hold.
_UNSAFE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def json_line(value: Any) -> str:
    """A line of a JSON Lines file, without its end: readable text, and one line for every reader. Inverse of `parse_json_line`."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def write_json_lines(path: Path, rows: Iterable[Any], staging: Path | None = None) -> None:
    """Write a JSON Lines file, a line for each value; `staging` as in `atomic_write`. Inverse of `read_json_lines`."""
    with atomic_write(path, staging) as file:
        file.writelines(json_line(row) + "\n" for row in rows)


def parse_json_line(line: str, where: str) -> Any:
    """What one line of a JSON Lines file holds; errors: `UserError` with `where`."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"not JSON ({error.msg} at column {error.colno})"
    except ValueError as error:  # a number of too many digits
        reason = f"not JSON ({first_line(error)})"
    except RecursionError:
        reason = "JSON in too many brackets"
    raise UserError(f"{where}: {reason}; mend or remove the line")


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line of a JSON Lines file that is not blank; a bad line's value is the `UserError` that says why.

    Errors: `UserError` for no file, or another encoding.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, parse_json_line(line, f"{Path(path).name}, line {number}")
                    except UserError as error:
                        yield number, error
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; convert it, for example with iconv") from None


def read_yaml(source: Path | str, text: str | None = None) -> Any:
    """What a YAML or JSON file, or a text that `source` names, holds, as plain types; errors: `UserError` naming `source`."""
    import yaml  # not before there is some to read

    if text is None:
        text = Path(source).read_text(encoding="utf-8-sig", errors="replace")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML ({' '.join(str(error).split())[:120]})") from None


# ---- One file -------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path, staging: Path | None = None, binary: bool = False) -> Iterator[IO[Any]]:
    """A file to write, which takes the place of `path` when all of it is on the disk; nothing stays of a half one.

    Processes that write one file take turns; what a killed one left is overwritten. A link is followed; a file that is replaced
    keeps its permissions. Errors: `OSError` naming the file.

    staging: a folder on the same disk to write in, under a name that no other process has, where there are no locks; its owner
        removes what killed processes left there (`remove_partials`).
    """
    path = Path(os.path.realpath(path))
    partial = staging / f"{path.name}.{uuid.uuid4().hex}.partial" if staging else path.with_name(f".{path.name}.partial")
    with nullcontext() if staging else lock(partial):
        try:
            with open(partial, "wb" if binary else "w", encoding=None if binary else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, partial)
            os.replace(partial, path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno and error.filename in (None, str(partial)):
                error.filename = str(path)
            raise
    _sync(path.parent)


def write_text(path: Path, text: str, staging: Path | None = None) -> None:
    """Write a text as UTF-8; see `atomic_write`."""
    with atomic_write(path, staging) as file:
        file.write(text)


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that no other process writes in."""
    for path in folder.glob("*.partial"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, link or folder, which may be gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no room for a file."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do it to folders
            raise
    finally:
        os.close(handle)


# ---- Locks ----------------------------------------------------------------------------------------------------------

_held: set[int] = set()  # handles of the locks of this process


def _let_go() -> None:
    """Processes that read data must not hold the locks of the one that started them when that is gone."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def lock(path: Path, busy: str = "", shared: bool = False, folder: bool = False) -> Iterator[None]:
    """Hold the lock of a file or folder, which is made if need be; it goes with this process. Some file systems have none.

    busy: the error where another process holds it; "": wait for it. shared: with others that share it. Errors: `UserError(busy)`;
    `FileNotFoundError` where the folder of a file is gone.
    """
    import fcntl  # not on Windows, where data sets are read

    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if busy else 0)
    while True:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, operation)
        except BlockingIOError:
            os.close(handle)
            raise UserError(busy) from None
        except OSError:
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)  # the one that held it has just renamed or removed it
    _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


# ---- One folder -----------------------------------------------------------------------------------------------------

#: Kind of folder -> the names in it that unitok writes; whatever else lies there is its owner's.
_PART = r"config\.json|model\.safetensors|tokenizer\.(model|json)"
_PARTS = rf"(model|tokenizers/[^/]+)/({_PART})"
_PAGE = r"index\.html|scores\.json"
_OWN = {
    "bundle": rf"bundle\.json|vocab\.json|generation_config\.json|{_PARTS}",
    "imported model": _PARTS,
    "exported decoder": r"(generation_)?config\.json|model\.safetensors|unitok_ids\.json",
    "sample output": r"outputs\.jsonl|index\.html|\d{6}\.txt|\d{6}(-prompt-\d+)?-\d+\.\w+|\d{6}-prompt-\d+\.\w+",
    "image evaluation": rf"images\.jsonl|{_PAGE}",
    "audio evaluation": rf"audio\.jsonl|{_PAGE}",
    "document evaluation": rf"scores\.jsonl|{_PAGE}",
}
_LISTINGS = {
    "outputs.jsonl": "sample output",
    "images.jsonl": "image evaluation",
    "audio.jsonl": "audio evaluation",
    "scores.jsonl": "document evaluation",
}
#: How the folders of others begin, for messages.
_MARKS = {"dataset.json": "a data set", "checkpoints": "a training run", "scenes.jsonl": "scenes", "state.json": "a demo"}


def _own_names(kind: str) -> str:
    """A pattern of the names that unitok writes into a folder of a kind; "" where it makes no such folder."""
    return _OWN.get(kind) or (_PART if kind == "decoder" or kind.endswith(" tokenizer") else "")


@contextmanager
def whole_folder(folder: str | Path, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when all of it is on the disk; nothing stays of a half one.

    Files of others move along from a folder of the same kind. Errors: `UserError` as `check_replaceable`'s, for a full disk, and
    for another bundle in the place of one, unless `overwrite` is set.
    """
    target = check_replaceable(folder, kind, overwrite)
    partial = _beside(target, "new")
    busy = f"{folder}: another command is writing it; wait for it, or choose another folder"
    with lock(partial, busy, folder=True):
        for left in partial.iterdir():  # by a command that was killed
            remove(left)
        try:
            yield partial
            if target.is_dir():
                shutil.copymode(target, partial)
                if kind_of(target) == kind and _carry_over(target, partial, kind) and kind == "bundle" and not overwrite:
                    raise _holds(Path(folder))
            replace_folder(partial, target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            settle(target)
            if isinstance(error, OSError) and (is_full_disk(error) or error.filename is None):
                raise UserError(f"{folder}: {error.strerror or error}; it is as it was") from None
            raise


def replace_folder(partial: Path, folder: Path) -> None:
    """Put `partial`, brought to the disk, in the place of `folder`. At each moment one of the two is whole, and `settle` finds it."""
    for inside, _, names in os.walk(partial):
        for path in (*(Path(inside, name) for name in names), Path(inside)):
            if not path.is_symlink():
                _sync(path)
    old, gone = _beside(folder, "old"), _beside(folder, "gone")
    if old.exists():  # of a command that was killed later than its second renaming
        shutil.rmtree(old)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        os.rename(old, gone)  # so that what is half removed is never taken for what was there
    shutil.rmtree(gone, ignore_errors=True)


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


def _carry_over(old: Path, new: Path, kind: str) -> bool:
    """Take along from a folder of a kind what unitok did not write there; -> whether something that it did write would be lost."""
    loses = False
    for inside, folders, names in os.walk(old):
        for name in (*names, *(f for f in folders if Path(inside, f).is_symlink())):
            path = Path(inside, name)
            place = new / path.relative_to(old)
            if re.fullmatch(_own_names(kind), path.relative_to(old).as_posix()):
                loses = loses or not (place.exists() and filecmp.cmp(path, place, shallow=False))
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(path, place, follow_symlinks=False)
    return loses


def kind_of(folder: Path) -> str:
    """What unitok made there, such as "bundle" or "decoder"; "" for anything else, also where another program has saved since."""

    def holds(name: str, *keys: str) -> dict[str, Any]:
        try:
            return read_json(folder / name, "", *keys)
        except (UserError, OSError):
            return {}

    if not folder.is_dir():
        return ""
    if holds("bundle.json", "version", "parts") and (folder / "vocab.json").exists():
        return "bundle"
    config = holds("config.json", "unitok")
    if config and "transformers_version" not in config:
        kind = str(config.get("kind", "exported decoder" if "architectures" in config else ""))
        return f"imported {kind}" if "first" in config else kind if _own_names(kind) else ""
    if {f.name for f in folder.iterdir()} <= {"model", "tokenizers"} and holds("model/config.json", "unitok"):
        return "imported model"  # without a vocabulary
    page = (folder / "index.html").exists()
    return next((kind for name, kind in _LISTINGS.items() if page and (folder / name).exists()), "")


def check_replaceable(folder: str | Path, kind: str = "", overwrite: bool = False) -> Path:
    """The true path of a folder that may be written: absent, empty, of the same kind, or anything if `overwrite` is set.

    kind: "" for anything that unitok made. Errors: `UserError` that names what lies there.
    """
    folder = Path(folder)
    true = settle(folder)
    if not true.is_dir():
        if true.exists():
            raise UserError(f"{folder}: is a file; give a folder")
        return true
    found = kind_of(true)
    fits = found == kind if kind else bool(found)
    if not overwrite and any(true.iterdir()) and (not fits or _bundle_around(true)):
        raise _holds(folder)
    here = Path(os.path.realpath("."))
    if not fits and (true == here or true in here.parents):
        raise UserError(f"{folder}: the current folder, or one that holds it, with files of others; choose another folder")
    return true


def check_inputs(folder: str | Path, inputs: Iterable[str | Path]) -> None:
    """Errors: `UserError` where a folder that is to be replaced is, or holds, something that is read."""
    target = Path(os.path.realpath(folder))
    for path in inputs:
        real = Path(os.path.realpath(path))
        if target == real or target in real.parents:
            raise UserError(f"{folder}: holds {path}, which is read; choose another folder")


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
        names = sorted(f.name for f in folder.iterdir())
        other = f"files that unitok did not make, such as {names[0]}"
        what = next((what for mark, what in _MARKS.items() if mark in names), other)
    return UserError(f"{folder}: holds {what}; choose another folder, or overwrite to replace all of it")
