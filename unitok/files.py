"""The output folder of a run: files that are whole or not there, and locks that keep runs apart."""

import errno
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from unitok.errors import UserError, first_line


@contextmanager
def whole(path: Path, work: Path | None = None, binary: bool = False) -> Iterator[IO[Any]]:
    """A file to write beside its place (in `work`, on the same disk), that is renamed when it is whole and on the disk."""
    partial = (work or path.parent) / f"{path.name}.{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "wb") if binary else open(partial, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str, work: Path | None = None) -> None:
    """Write a text; see `whole`."""
    with whole(path, work) as file:
        file.write(text)


def drop(paths: Iterable[Path]) -> None:
    """Remove files that may be gone already."""
    for path in paths:
        path.unlink(missing_ok=True)


@contextmanager
def locked(out: Path, part: tuple[int, int] | None = None) -> Iterator[Path]:
    """Keep a second run off; -> the log. `part`: (i, n) for the i-th of n runs that share the work, which may overlap.

    Errors: `UserError` when another run is at work. The lock goes with the process, however it ends. On a file system without
    locks there is none: what is written is whole or not there, so nothing breaks.
    """
    names = ["tokenize.log"] + ([f"tokenize-{part[0]:05d}-of-{part[1]:05d}.log"] if part else [])
    with ExitStack() as files:
        for number, name in enumerate(names):
            files.enter_context(lock(out / name, "tokenize", shared=bool(part) and number == 0))
        yield out / names[-1]


@contextmanager
def lock(path: Path, verb: str, shared: bool = False) -> Iterator[None]:
    """Hold a file's lock, which goes with this process, however it ends; `shared`: with others that share it.

    Errors: `UserError` when another process of the verb holds it. On a file system without locks there is none.
    """
    import fcntl  # not on Windows, where data sets are read

    with open(path, "a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path.parent}: another `unitok {verb}` is at work on it; wait for it or choose another folder"
            ) from None
        except OSError:
            pass
        os.register_at_fork(after_in_child=file.close)  # processes that read data must not hold it when this one is gone
        yield


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """One of several processes; the others wait. Errors: `FileNotFoundError` when the file's folder is gone."""
    import fcntl

    with open(path, "a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def full_disk(error: OSError, out: Path) -> Exception:
    """A full disk in words; any other error as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{out}: {error.strerror}; make room and start again: what is done is kept")
    return error


def parse_line(line: str, where: str) -> Any:
    """One line of a JSON Lines file; errors: `UserError` with `where`."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); mend or remove the line") from None
    except ValueError as error:  # a number of too many digits
        raise UserError(f"{where}: not JSON ({first_line(error)}); mend or remove the line") from None
    except RecursionError:
        raise UserError(f"{where}: JSON in too many brackets; mend or remove the line") from None


#: Where `str.splitlines` ends a line although JSON does not; and halves of surrogate pairs, which UTF-8 cannot hold.
_UNSAFE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def json_line(value: Any) -> str:
    """A line of a JSON Lines file, without its end: readable text, and one line for every reader. Inverse of `json.loads`."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
