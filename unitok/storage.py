"""The files of a source, read with care: local ones, and whatever fsspec opens.

What comes from elsewhere is not trusted. A path (absolute, with `..`, or through a link) is followed only while it stays
under one folder; links to folders, pipes and devices are refused, and so are names that are not UTF-8; a file that changes
while it is read is an error, never half of one file and half of another. Each refusal is a `UserError` that names the file.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from unitok.errors import UserError, first_line, is_utf8

#: Larger files are not read into memory at once: sounds are read in pieces, all else is refused.
MAX_BYTES = 2 << 30
#: Longest text of one file.
MAX_TEXT = 64 << 20
#: Smaller files are read as soon as they are opened; of larger ones first the beginning.
SMALL = 32 << 20


@dataclass(frozen=True)
class Found:
    """A file of a source: its name relative to the source, bytes, and a stamp that changes when it does; or why it is refused."""

    name: str
    size: int = 0
    stamp: int = 0
    problem: str = ""


def is_remote(path: str) -> bool:
    """Whether a path is a URL for fsspec, such as `s3://bucket/folder`; `file://` is a local path."""
    return "://" in path and not path.startswith("file://")


def printable(name: str) -> str:
    """A name or message that need not be UTF-8, as text that is."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # halves of surrogate pairs, which no file's name can give
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


class Files:
    """The files under a folder.

    Args:
        folder: a local folder, or a URL that fsspec opens.
        root: the folder that paths must not leave; by default `folder`.
    """

    def __init__(self, folder: str, root: str = ""):
        self.remote: Any = None
        self._true_folder = lru_cache(maxsize=1024)(self._find_true_folder)
        if is_remote(folder):
            import fsspec

            try:
                self.remote, path = fsspec.core.url_to_fs(folder, use_listings_cache=False, skip_instance_cache=True)
            except Exception as error:  # every file system of fsspec has its own
                raise UserError(f"{folder}: fsspec cannot open it ({first_line(error)})") from None
            self.folder = path.rstrip("/")
            return
        self.folder = os.path.realpath(folder.removeprefix("file://"))
        self.root = os.path.realpath(root) if root else self.folder
        if not os.path.isdir(self.root):
            raise UserError(f"--root {root}: no such folder")

    # ---- What is there -------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        """Whether there is such a file; errors: `UserError` for a server that does not answer."""
        if self.remote is not None:
            try:
                return self.remote.info(self._join(name))["type"] == "file"
            except FileNotFoundError:
                return False
            except Exception as error:  # every file system of fsspec has its own
                raise UserError(f"{name}: cannot be reached ({first_line(error)})") from None
        return os.path.isfile(os.path.join(self.folder, name))

    def folders(self, inside: str = "") -> Iterator[tuple[str, list[str], dict[str, Found]]]:
        """Each folder with the names of its files, in order, then the folders in it; and what is known of a file without a look.

        Hidden ones (`.name`) are left out. Memory holds the names of one folder, and of those that it lies in.
        """
        if self.remote is not None:
            yield from self._remote_folders()
            return
        try:
            with os.scandir(os.path.join(self.folder, inside)) as listing:
                entries = sorted((e for e in listing if not e.name.startswith(".")), key=lambda e: os.fsencode(e.name))
        except OSError as error:
            yield inside, [inside], {inside: Found(inside, problem=f"cannot be read ({error.strerror})")}
            return
        inner = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        bad = {
            os.path.join(inside, name): Found(printable(os.path.join(inside, name)), problem="its name is not UTF-8; rename it")
            for name in inner
            if not is_utf8(name)
        }
        names = [os.path.join(inside, e.name) for e in entries if not e.is_dir(follow_symlinks=False)]
        yield inside, [*names, *bad], bad
        for name in filter(is_utf8, inner):
            yield from self.folders(os.path.join(inside, name))

    def _remote_folders(self) -> Iterator[tuple[str, list[str], dict[str, Found]]]:
        for folder, folders, files in self.remote.walk(self.folder, detail=True, on_error="raise"):
            in_order = sorted(folders.items())
            folders.clear()  # fsspec goes into them in the order that it finds here
            folders.update(in_order)
            inside = folder[len(self.folder) :].lstrip("/")
            infos = {}
            for base, info in sorted(files.items()):
                if base and not base.startswith("."):
                    name = f"{inside}/{base}".lstrip("/")
                    infos[name] = Found(name, int(info.get("size") or 0), _remote_stamp(info))
            yield inside, list(infos), infos

    def look(self, name: str) -> Found:
        """One file, or why it is refused."""
        try:
            if self.remote is not None:
                info = self.remote.info(self._join(name))
                return Found(name, int(info.get("size") or 0), _remote_stamp(info))
            found = os.stat(self._resolve(name), follow_symlinks=False)
        except (UserError, OSError) as error:
            return Found(printable(name), problem=_reason(error))
        if stat.S_ISDIR(found.st_mode):
            return Found(name, problem="a link to a folder: not followed")
        if not stat.S_ISREG(found.st_mode):
            return Found(name, problem="neither a file nor a folder (a pipe, a socket or a device)")
        return Found(name, found.st_size, found.st_mtime_ns)

    # ---- Reading -------------------------------------------------------------------------------------------------

    def _join(self, name: str) -> str:
        if is_remote(name) or name.startswith("/") or ".." in name.split("/"):
            raise UserError("leaves its source's folder: refused")
        return f"{self.folder}/{name}" if name else self.folder

    def _resolve(self, name: str) -> str:
        """The true local path of a name; errors: `UserError` when it leaves the root."""
        if not is_utf8(name):
            raise UserError("its name is not UTF-8; rename it")
        if "://" in name:
            raise UserError("a URL is not followed: download it, and name the file")
        inside, _, base = name.rpartition("/")
        path = os.path.join(self._true_folder(inside), base)
        if base in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        if path != self.root and not path.startswith(self.root.rstrip("/") + "/"):
            raise UserError(f"leaves {self.root}: refused (--root names a wider folder)")
        return path

    def _find_true_folder(self, inside: str) -> str:
        """Where a folder truly lies; looked up once, not for each of its files."""
        return os.path.realpath(os.path.join(self.folder, inside))

    def open(self, name: str) -> IO[bytes]:
        """A file to read from, that may seek; errors: `UserError` for one that is refused or not there."""
        try:
            if self.remote is not None:
                return self.remote.open(self._join(name), "rb")
            handle = os.open(self._resolve(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                kind = "a folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "a pipe, a socket or a device"
                os.close(handle)
                raise UserError(f"{kind}, not a file")
            return os.fdopen(handle, "rb")
        except (UserError, OSError) as error:
            raise UserError(f"{printable(name)}: {_reason(error)}") from None

    def read(self, name: str, stamp: int | None = None) -> bytes:
        """All of a file; errors: `UserError` for one that is refused, absent, too large, or that changes meanwhile.

        stamp: what it had when it was listed, if it was.
        """
        with self.open(name) as file:
            before = self.stamp_of(file, name)
            if stamp is not None and before[1] != stamp:
                raise UserError(f"{name}: has changed since the run was planned")
            if before[0] > MAX_BYTES:
                raise UserError(f"{name}: {before[0]} bytes are too many (limit {MAX_BYTES})")
            try:
                data = file.read(before[0] + 1)
            except OSError as error:
                raise UserError(f"{name}: {_reason(error)}") from None
            if len(data) != before[0] or self.stamp_of(file, name) != before:
                raise UserError(f"{name}: changed while it was read")
            return data

    def stamp_of(self, file: IO[bytes], name: str) -> tuple[int, int]:
        """(bytes, stamp) of an open file."""
        if self.remote is not None:
            found = self.look(name)
            return found.size, found.stamp
        now = os.fstat(file.fileno())
        return now.st_size, now.st_mtime_ns

    def local(self, name: str) -> Path | None:
        """A local file's true path, to be read in pieces; None for a remote one."""
        return None if self.remote is not None else Path(self._resolve(name))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "a link: not followed"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return first_line(error)


def _remote_stamp(info: dict[str, Any]) -> int:
    """Of what a server says that changes with a file, and of its size."""
    told = [str(info[key]) for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated") if info.get(key)]
    digest = hashlib.sha256("\0".join([str(info.get("size")), *told[:1]]).encode()).digest()
    return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True)
class Blob:
    """The content of a file, an archive's member or a table's cell: bytes at hand, or read when they are asked for.

    Args:
        name: what it is called in messages and in shards, relative to its source.
        data: its bytes, if they are at hand. fetch: gives them where they are not; errors: `UserError`.
        files: where the name is a local file of its own: what opens it, so that long audio is read in pieces.
        stamp: what that file had when it was listed, if it was. place: where it begins in an archive, which may hold a name twice.
    """

    name: str
    data: bytes | None = None
    fetch: Callable[[], bytes] | None = None
    files: Files | None = None
    stamp: int | None = None
    place: int = 0

    @classmethod
    def of(cls, files: Files, name: str, stamp: int | None = None) -> "Blob":
        """A file of a source."""
        return cls(name, None, lambda: files.read(name, stamp), files if files.remote is None else None, stamp)

    def read(self) -> bytes:
        """All of it; errors: `UserError`."""
        if self.data is not None:
            return self.data
        assert self.fetch is not None
        return self.fetch()

    def loaded(self) -> "Blob":
        """Itself, with the bytes at hand if they are few; so that a file is opened once."""
        if self.data is not None or (self.files is not None and self.files.look(self.name).size > SMALL):
            return self
        return replace(self, data=self.read())

    def head(self) -> bytes:
        """The first 4096 bytes, which say what it is."""
        if self.files is None or self.data is not None:
            return self.read()[:4096]
        with self.files.open(self.name) as file:
            return file.read(4096)

    @contextmanager
    def local(self) -> Iterator[Path | None]:
        """The path of a local file of its own, to be read in pieces, or None; errors: `UserError` if it changes meanwhile."""
        if self.files is None or self.data is not None:
            yield None
            return
        before = self.files.look(self.name)
        if before.problem:
            raise UserError(f"{self.name}: {before.problem}")
        if self.stamp not in (None, before.stamp):
            raise UserError(f"{self.name}: has changed since the run was planned")
        yield self.files.local(self.name)
        if self.files.look(self.name) != before:
            raise UserError(f"{self.name}: changed while it was read")
