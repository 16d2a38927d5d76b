"""Atomic writing of files and folders, locks, JSON and YAML. Everything that unitok writes goes through this file.

A file or folder is written under a temporary name beside its final path, synced to the disk and renamed, so nobody ever sees a
half-written one. Replacing a folder takes two renames; if the process is killed between them, the next reader or writer restores
the old folder (`settle`). Only what unitok wrote itself, and of the same kind, is replaced; other files in a folder are kept.
"""

import errno
import filecmp
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

from unitok.errors import UserError, first_line

#: A value that JSON can hold.
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

# ---- JSON and YAML --------------------------------------------------------------------------------------------------


def read_json(path: Path, absent: str, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file; a `UserError` names the file and what is wrong with it. Values are not checked.

    Args:
        path: the file.
        absent: what the error says to do if there is no such file.
        keys: names that the object must have.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {absent}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of too many digits
        raise UserError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON {type(value).__name__}, not an object; it is damaged, or another program's")
    if missing := [key for key in keys if key not in value]:
        raise UserError(f"{path}: has no {', '.join(missing)}; it is damaged, or another program's")
    return value


def write_json(path: Path, value: object, staging: Path | None = None) -> None:
    """Write one value as indented JSON. `staging`: see `atomic_write`."""
    write_text(path, json.dumps(value, indent=1) + "\n", staging)


#: Characters at which `str.splitlines` ends a line although JSON does not, and lone surrogates, which UTF-8 cannot encode.
_UNSAFE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def json_line(value: object) -> str:
    """Return a value as one line of a JSON Lines file, without the line feed. Inverse of `parse_json_line`."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def write_json_lines(path: Path, rows: Iterable[object], staging: Path | None = None) -> None:
    """Write a JSON Lines file, one line per value. `staging`: see `atomic_write`. Inverse of `read_json_lines`."""
    with atomic_write(path, staging) as file:
        file.writelines(json_line(row) + "\n" for row in rows)


def parse_json_line(line: str, where: str) -> Any:
    """Return the value of one line of a JSON Lines file. Raises `UserError`, whose message begins with `where`."""
    try:
        return json.loads(line.rstrip("\r\n"))  # with a line feed columns would be those of the next line
    except json.JSONDecodeError as error:
        reason = f"not JSON ({error.msg} at column {error.colno})"
    except ValueError as error:  # a number of too many digits
        reason = f"not JSON ({first_line(error)})"
    except RecursionError:
        reason = "JSON with too many nested brackets"
    raise UserError(f"{where}: {reason}; mend or remove the line")


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each line of a JSON Lines file that is not blank; for a bad line the value is a `UserError`.

    Raises `UserError` for a missing file and for one that is not UTF-8.
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
    """Return what a YAML or JSON file holds, as plain types. text: parse this instead; `source` then only names it in errors (`UserError`)."""
    import yaml  # slow to import, rarely needed

    if text is None:
        text = Path(source).read_text(encoding="utf-8-sig", errors="replace")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML ({' '.join(str(error).split())[:120]})") from None


# ---- One file -------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path, staging: Path | None = None, binary: bool = False) -> Iterator[IO[Any]]:
    """Open a temporary file for writing; on success it replaces `path`, on an error it is removed.

    Processes that write the same file take turns, and overwrite what a killed one left. A link is followed; a replaced file keeps
    its permissions.

    Args:
        path: the file.
        staging: a folder on the same disk for the temporary file, which then gets a unique name and no lock: for file systems
            without locks. The folder's owner removes what killed processes leave there (`remove_partials`).
        binary: open it for bytes, not text.

    Raises:
        OSError: with the name of the file.
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
    """Write a text as UTF-8. See `atomic_write`."""
    with atomic_write(path, staging) as file:
        file.write(text)


def remove_partials(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder that no other process writes to."""
    for path in folder.glob("*.partial"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error means that the disk, or the user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync folders
            raise
    finally:
        os.close(handle)


# ---- Locks ----------------------------------------------------------------------------------------------------------

_held: set[int] = set()  # file handles of the locks that this process holds


def _close_inherited_locks() -> None:
    """In a child process: close the parent's locks, so that a worker that outlives its parent does not hold them."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_locks)


@contextmanager
def lock(path: Path, busy: str = "", shared: bool = False, folder: bool = False) -> Iterator[None]:
    """Hold the lock of a file or folder, created if it does not exist. The lock ends with the process at the latest.

    On file systems without locks nothing is locked.

    Args:
        path: the file or folder.
        busy: message of the error where another process holds the lock; "" waits for it instead.
        shared: allow other processes that also hold it shared.
        folder: `path` is a folder.

    Raises:
        UserError: `busy`.
        FileNotFoundError: the folder that a file is in does not exist.
    """
    import fcntl  # not on Windows, where data sets can still be read

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
        os.close(handle)  # the file was renamed or removed while we waited: open the new one
    _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


# ---- One folder -----------------------------------------------------------------------------------------------------

#: Kind of folder -> pattern of the names that unitok writes into it. All other files there belong to the user.
_PART = r"config\.json|model\.safetensors|tokenizer\.(model|json)"
_PARTS = rf"(model|tokenizers/[^/]+)/({_PART})"
_PAGE = r"index\.html|scores\.json"
_OWN = {
    "bundle": rf"bundle\.json|vocab\.json|generation_config\.json|{_PARTS}",
    "imported model": _PARTS,
    "exported decoder": r"(generation_)?config\.json|model\.safetensors|unitok_ids\.json",
    "sample output": r"outputs\.jsonl|index\.html|\d{6}\.txt|\d{6}(-prompt-\d+)?-\d+\.\w+|\d{6}-(prompt|movie)-\d+\.\w+",
    "image evaluation": rf"images\.jsonl|{_PAGE}",
    "video evaluation": rf"videos\.jsonl|{_PAGE}",
    "audio evaluation": rf"audio\.jsonl|{_PAGE}",
    "document evaluation": rf"scores\.jsonl|{_PAGE}",
}
_LISTINGS = {
    "outputs.jsonl": "sample output",
    "images.jsonl": "image evaluation",
    "videos.jsonl": "video evaluation",
    "audio.jsonl": "audio evaluation",
    "scores.jsonl": "document evaluation",
}
#: A file in the folder -> what the folder is, for messages.
_MARKS = {
    "dataset.json": "a data set",
    "checkpoints": "a training run",
    "scenes.jsonl": "scenes",
    "state.json": "a demo or recipe",
}


def _own_names(kind: str) -> str:
    """Return the pattern of the names that unitok writes into a folder of a kind; "" for an unknown kind."""
    return _OWN.get(kind) or (_PART if kind == "decoder" or kind.endswith(" tokenizer") else "")


@contextmanager
def whole_folder(folder: str | Path, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty temporary folder to fill; on success it replaces `folder`, on an error it is removed.

    Files that unitok did not write are carried over from a folder of the same kind.

    Args:
        folder: the final path.
        kind: what is written, such as "bundle"; see `kind_of`.
        overwrite: replace anything, also another bundle.

    Raises:
        UserError: `folder` must not be replaced (see `check_replaceable`), a bundle would lose a part, or the disk is full.
    """
    target = check_replaceable(folder, kind, overwrite)
    partial = _beside(target, "new")
    busy = f"{folder}: another command is writing it; wait for it, or choose another folder"
    with lock(partial, busy, folder=True):
        for leftover in partial.iterdir():  # of a killed command
            remove(leftover)
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
                raise UserError(f"{folder}: {error.strerror or error}; the folder was left unchanged") from None
            raise


def replace_folder(partial: Path, folder: Path) -> None:
    """Sync `partial` to the disk and rename it to `folder`. If the process is killed, `settle` finds either the old or the new folder."""
    for inside, _, names in os.walk(partial):
        for path in (*(Path(inside, name) for name in names), Path(inside)):
            if not path.is_symlink():
                _sync(path)
    old, gone = _beside(folder, "old"), _beside(folder, "gone")
    if old.exists():  # of a command that was killed after its second rename
        shutil.rmtree(old)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        os.rename(old, gone)  # a half-removed folder must not be restored by `settle`
    shutil.rmtree(gone, ignore_errors=True)


def settle(folder: str | Path) -> Path:
    """Return the real path of a folder, after restoring it if a command was killed while it replaced it."""
    folder = Path(os.path.realpath(folder))
    old = _beside(folder, "old")
    if old.is_dir() and not folder.exists():
        with suppress(OSError):  # another process was faster, or this one may not write
            os.rename(old, folder)
    return folder


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.unitok-{what}"


def _carry_over(old: Path, new: Path, kind: str) -> bool:
    """Link or copy the files that unitok did not write from an old folder to a new one.

    Returns:
        Whether a file that unitok did write is missing or different in the new folder, and would be lost.
    """
    loses = False
    for inside, folders, names in os.walk(old):
        for name in (*names, *(f for f in folders if Path(inside, f).is_symlink())):
            path = Path(inside, name)
            target = new / path.relative_to(old)
            if re.fullmatch(_own_names(kind), path.relative_to(old).as_posix()):
                loses = loses or not (target.exists() and filecmp.cmp(path, target, shallow=False))
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(path, target, follow_symlinks=False)
    return loses


def kind_of(folder: Path) -> str:
    """Return what unitok wrote into a folder, such as "bundle"; "" for anything else, also if another program saved there since."""

    def read(name: str, *keys: str) -> Mapping[str, object]:
        try:
            return read_json(folder / name, "", *keys)
        except (UserError, OSError):
            return {}

    if not folder.is_dir():
        return ""
    if read("bundle.json", "version", "parts") and (folder / "vocab.json").exists():
        return "bundle"
    config = read("config.json", "unitok")
    if config and "transformers_version" not in config:
        kind = str(config.get("kind", "exported decoder" if "architectures" in config else ""))
        return f"imported {kind}" if "first" in config else kind if _own_names(kind) else ""
    if {f.name for f in folder.iterdir()} <= {"model", "tokenizers"} and read("model/config.json", "unitok"):
        return "imported model"  # without a vocabulary
    page = (folder / "index.html").exists()
    return next((kind for name, kind in _LISTINGS.items() if page and (folder / name).exists()), "")


def check_replaceable(folder: str | Path, kind: str = "", overwrite: bool = False) -> Path:
    """Return the real path of a folder that may be written, else raise a `UserError` that names what is in it.

    Args:
        folder: it may be absent, empty, or of the same kind.
        kind: what is to be written; "" for anything that unitok writes.
        overwrite: any content may be replaced.
    """
    folder = Path(folder)
    true = settle(folder)
    if not true.is_dir():
        found = next(path for path in (true, *true.parents) if path.exists())
        if not found.is_dir():
            raise UserError(f"{folder}: {'' if found == true else f'{found} '}is a file; give a folder")
        return true
    present = kind_of(true)
    fits = present == kind if kind else bool(present)
    if not overwrite and any(true.iterdir()) and (not fits or _bundle_around(true)):
        raise _holds(folder)
    here = Path(os.path.realpath("."))
    if not fits and (true == here or true in here.parents):
        raise UserError(f"{folder}: the current folder, or one above it, with other files; choose another folder")
    return true


def check_inputs(folder: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise `UserError` if a folder that is to be replaced is, or contains, one of the inputs."""
    target = Path(os.path.realpath(folder))
    for path in inputs:
        real = Path(os.path.realpath(path))
        if target == real or target in real.parents:
            raise UserError(f"{folder}: contains the input {path}; choose another folder")


def _bundle_around(folder: Path) -> Path | None:
    """Return the bundle that a folder is a part of, or None."""
    for bundle in list(folder.parents)[:2]:
        if kind_of(bundle) == "bundle" and re.fullmatch(_PARTS, f"{folder.relative_to(bundle).as_posix()}/config.json"):
            return bundle
    return None


def _holds(folder: Path) -> UserError:
    """Return the error that names what is in a folder."""
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
