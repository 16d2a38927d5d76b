"""The files of a source, local or opened by fsspec, which are not trusted. Each refusal is a `UserError` that names the file.

A path (absolute, with `..`, or through a link) is followed only while it stays under one folder; links to folders, pipes,
devices and names that are not UTF-8 are refused; a file that changes while it is read is an error.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
NOT_UTF8 = "its name is not UTF-8; rename it"


@dataclass(frozen=True)
class FileInfo:
    """A file of a source: its name relative to the source, bytes, and a stamp that changes when it does; or why it is refused."""

    name: str
    size: int = 0
    stamp: int = 0
    problem: str = ""


#: Names of the files of a folder, and what is known of some without a look.
Folder = tuple[list[str], dict[str, FileInfo]]


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
    """The files under a local folder, which paths must not leave; `open_files` gives those of a server.

    root: another folder that paths may lead into. named: a file in `folder` that may be a link to anywhere, because the user named it.
    """

    remote: Any = None

    def __init__(self, folder: str, root: str = "", named: str = ""):
        self.folder, self.named = os.path.realpath(folder.removeprefix("file://")), named
        self.roots = (self.folder, *([os.path.realpath(root)] if root else []))
        if missing := [path for path in self.roots if not os.path.isdir(path)]:
            raise UserError(f"root {root if root else missing[0]}: no such folder")
        self._true_folder = lru_cache(maxsize=1024)(lambda inside: os.path.realpath(os.path.join(self.folder, inside)))

    def exists(self, name: str) -> bool:
        """Whether there is such a file; errors: `UserError` for a server that does not answer."""
        return os.path.isfile(os.path.join(self.folder, name))

    def folders(self, inside: str = "") -> Iterator[Folder]:
        """Each folder, then the folders in it, in order; hidden names (`.name`) are left out."""
        try:
            with os.scandir(os.path.join(self.folder, inside)) as listing:
                entries = sorted((e for e in listing if not e.name.startswith(".")), key=lambda e: os.fsencode(e.name))
        except OSError as error:
            yield [inside], {inside: FileInfo(inside, problem=_reason(error))}
            return
        inner = [os.path.join(inside, e.name) for e in entries if e.is_dir(follow_symlinks=False)]
        bad = {name: FileInfo(printable(name), problem=NOT_UTF8) for name in inner if not is_utf8(name)}
        names = [os.path.join(inside, e.name) for e in entries if not e.is_dir(follow_symlinks=False)]
        yield [*names, *bad], bad
        for name in inner:
            if name not in bad:
                yield from self.folders(name)

    def look(self, name: str) -> FileInfo:
        """A file's size and stamp, or why it is refused."""
        try:
            return self._stat(name)
        except (UserError, OSError) as error:
            return FileInfo(printable(name), problem=_reason(error))

    def _stat(self, name: str) -> FileInfo:
        found = os.stat(self._resolve(name), follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            return FileInfo(name, problem="a link to a folder: not followed")
        if not stat.S_ISREG(found.st_mode):
            return FileInfo(name, problem="neither a file nor a folder (a pipe, a socket or a device)")
        return FileInfo(name, found.st_size, found.st_mtime_ns)

    def _resolve(self, name: str) -> str:
        """The true local path of a name; errors: `UserError` when it leaves the folder and the root."""
        if not is_utf8(name):
            raise UserError(NOT_UTF8)
        if "://" in name:
            raise UserError("a URL is not followed: download it, and name the file")
        inside, _, base = name.rpartition("/")
        path = os.path.join(self._true_folder(inside), base)
        if base in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        inside_roots = any(path == root or path.startswith(root.rstrip("/") + "/") for root in self.roots)
        if not inside_roots and not (self.named and name == self.named):
            raise UserError("leaves the folder of its source: refused (`root` names another folder that paths may lead into)")
        return path

    def open(self, name: str) -> IO[bytes]:
        """A file to read from; errors: `UserError` for one that is refused or not there."""
        try:
            return self._open(name)
        except (UserError, OSError) as error:
            raise UserError(f"{printable(name)}: {_reason(error)}") from None

    def _open(self, name: str) -> IO[bytes]:
        handle = os.open(self._resolve(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            kind = "a folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "a pipe, a socket or a device"
            os.close(handle)
            raise UserError(f"{kind}, not a file")
        return os.fdopen(handle, "rb")

    def read(self, name: str, stamp: int | None = None) -> bytes:
        """All of a file; errors: `UserError` for one that is refused, absent, too large, or that has not the `stamp` or changes."""
        with self.open(name) as file:
            size, before = self.stamp_of(file, name)
            _check_stamp(name, before, stamp)
            if size > MAX_BYTES:
                raise UserError(f"{name}: {size} bytes are too many (limit {MAX_BYTES})")
            try:
                data = file.read(size + 1)
            except OSError as error:
                raise UserError(f"{name}: {_reason(error)}") from None
            if len(data) != size or self.stamp_of(file, name) != (size, before):
                raise UserError(f"{name}: changed while it was read")
            return data

    def stamp_of(self, file: IO[bytes], name: str) -> tuple[int, int]:
        """(bytes, stamp) of an open file."""
        now = os.fstat(file.fileno())
        return now.st_size, now.st_mtime_ns

    def local(self, name: str) -> Path:
        """A local file's true path, to be read in pieces."""
        return Path(self._resolve(name))


class _RemoteFiles(Files):
    """The files under a URL that fsspec opens."""

    def __init__(self, folder: str):
        import fsspec

        with _asking(folder):
            self.remote, path = fsspec.core.url_to_fs(folder, use_listings_cache=False, skip_instance_cache=True)
        self.folder = path.rstrip("/")

    def exists(self, name: str) -> bool:
        with _asking(name):
            try:
                return self.remote.info(self._join(name))["type"] == "file"
            except FileNotFoundError:
                return False

    def folders(self, inside: str = "") -> Iterator[Folder]:
        for folder, folders, files in self.remote.walk(self.folder, detail=True, on_error="raise"):
            in_order = sorted(folders.items())
            folders.clear()  # fsspec goes into them in the order that it finds here
            folders.update(in_order)
            inside = folder[len(self.folder) :].lstrip("/")
            infos = {}
            for base, info in sorted(files.items()):
                if base and not base.startswith("."):
                    name = f"{inside}/{base}".lstrip("/")
                    infos[name] = _told(name, info)
            yield list(infos), infos

    def _stat(self, name: str) -> FileInfo:
        return _told(name, self.remote.info(self._join(name)))

    def _open(self, name: str) -> IO[bytes]:
        return self.remote.open(self._join(name), "rb")

    def _join(self, name: str) -> str:
        if is_remote(name) or name.startswith("/") or ".." in name.split("/"):
            raise UserError("leaves its source's folder: refused")
        return f"{self.folder}/{name}" if name else self.folder

    def stamp_of(self, file: IO[bytes], name: str) -> tuple[int, int]:
        found = self.look(name)
        return found.size, found.stamp


def open_files(folder: str, root: str = "", named: str = "") -> Files:
    """The files under a local folder or a URL. Errors: `UserError` for one that cannot be opened."""
    return _RemoteFiles(folder) if is_remote(folder) else Files(folder, root, named)


def kind_of_path(path: str) -> str:
    """What lies at a local path or a URL: `file`, `folder`, or "" for nothing."""
    if not is_remote(path):
        return "folder" if Path(path).is_dir() else "file" if Path(path).exists() else ""
    files = open_files(path)
    with _asking(path):
        return "file" if files.remote.isfile(files.folder) else "folder" if files.remote.exists(files.folder) else ""


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """What a server, or fsspec in its place, answers with an error is a `UserError` that names what was asked for."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every file system of fsspec has its own
        raise UserError(f"{name}: cannot be reached ({first_line(error)})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "a link: not followed"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return first_line(error)


def _told(name: str, info: dict[str, Any]) -> FileInfo:
    """A file as a server tells of it; the stamp is made of its size and of the first word that changes with it."""
    told = [str(info[key]) for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated") if info.get(key)]
    digest = hashlib.sha256("\0".join([str(info.get("size")), *told[:1]]).encode()).digest()
    return FileInfo(name, int(info.get("size") or 0), int.from_bytes(digest[:7], "big"))


def _check_stamp(name: str, now: int, listed: int | None) -> None:
    if listed not in (None, now):
        raise UserError(f"{name}: has changed since the run was planned")


@dataclass(frozen=True)
class Blob:
    """Content of an archive's member, a table's cell or a file. name: relative to its source, in messages and shards.

    place: where it begins in an archive, which may hold a name twice.
    """

    name: str
    data: bytes = field(default=b"", repr=False)
    place: int = 0

    @staticmethod
    def of(files: Files, name: str, stamp: int | None = None) -> "Blob":
        """The content of a file, read when it is asked for. stamp: what it must have, where it was listed."""
        return _FileBlob(name, files=files, stamp=stamp)

    def read(self) -> bytes:
        """All of it; errors: `UserError`."""
        return self.data

    def head(self) -> bytes:
        """The first 4096 bytes, which say what it is."""
        return self.data[:4096]

    def loaded(self) -> "Blob":
        """Itself, with the bytes at hand where they are few, so that a file is opened once."""
        return self

    @contextmanager
    def local(self) -> Iterator[Path | None]:
        """The path of a local file, to be read in pieces, or None; errors: `UserError` if it changes meanwhile."""
        yield None


@dataclass(frozen=True)
class _FileBlob(Blob):
    """The content of a file of a source."""

    files: Any = None
    stamp: int | None = None

    def read(self) -> bytes:
        return self.files.read(self.name, self.stamp)

    def head(self) -> bytes:
        with self.files.open(self.name) as file:
            return file.read(4096)

    def loaded(self) -> Blob:
        large = self.files.remote is None and self.files.look(self.name).size > SMALL
        return self if large else Blob(self.name, self.read())

    @contextmanager
    def local(self) -> Iterator[Path | None]:
        if self.files.remote is not None:
            yield None
            return
        before = self.files.look(self.name)
        if before.problem:
            raise UserError(f"{self.name}: {before.problem}")
        _check_stamp(self.name, before.stamp, self.stamp)
        yield self.files.local(self.name)
        if self.files.look(self.name) != before:
            raise UserError(f"{self.name}: changed while it was read")
