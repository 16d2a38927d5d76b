"""Reading the files of a data source, local or through fsspec. Sources are not trusted: a `UserError` names each refused file.

A path may be absolute, contain `..` or go through a link, but it must stay under one folder. Links to folders, pipes, devices
and names that are not UTF-8 are refused. A file that changes while it is read is an error.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from unitok.errors import UserError, first_line, is_utf8

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: Larger files are not read into memory whole: audio is read in pieces, all else is refused. Bytes.
MAX_BYTES = 2 << 30
#: The longest text file, bytes.
MAX_TEXT = 64 << 20
#: Files up to this many bytes are read whole when they are opened; of larger ones only the first bytes.
SMALL = 32 << 20
NOT_UTF8 = "its name is not UTF-8; rename it"


@dataclass(frozen=True)
class FileInfo:
    """A file of a source.

    Args:
        name: relative to the source.
        size: bytes.
        stamp: a number that changes when the file does.
        problem: why it is refused; "" if it is not.
    """

    name: str
    size: int = 0
    stamp: int = 0
    problem: str = ""


class TooLarge(UserError):
    """A file is larger than what may be read at once."""


#: The names of the files of a folder, and the `FileInfo` of those for which the listing already gave it.
Folder = tuple[list[str], dict[str, FileInfo]]


def is_remote(path: str) -> bool:
    """Whether a path is a URL for fsspec, such as `s3://bucket/folder`; `file://` is a local path."""
    return "://" in path and not path.startswith("file://")


def printable(name: str) -> str:
    """Return a name or message as text that can be encoded as UTF-8; other bytes become escapes."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # lone surrogates, which cannot come from a file name
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


class Files:
    """The files under a local folder. For a URL see `open_files`.

    Args:
        folder: the source's folder; names are relative to it, and paths must not leave it.
        root: another folder that paths may lead into.
        named: a file in `folder` that may be a link to anywhere, because the user named it.
    """

    remote: "AbstractFileSystem | None" = None  # for a URL

    def __init__(self, folder: str, root: str = "", named: str = ""):
        self.folder, self.named = os.path.realpath(folder.removeprefix("file://")), named
        self.roots = (self.folder, *([os.path.realpath(root)] if root else []))
        for path, name in ((self.folder, folder), (self.roots[-1], f"root {root}")):
            if not os.path.isdir(path):
                raise UserError(f"{name}: no such folder")
        self._inside = tuple(root.rstrip("/") + "/" for root in self.roots)  # how paths under them begin
        self._true_folder = lru_cache(maxsize=1024)(lambda inside: os.path.realpath(os.path.join(self.folder, inside)))

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name. Raises `UserError` if a server does not answer."""
        return os.path.isfile(os.path.join(self.folder, name))

    def folders(self, inside: str = "") -> Iterator[Folder]:
        """Yield each folder, then the folders in it, sorted by name. Hidden names (`.name`) are left out."""
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

    def subfolders(self, inside: str = "") -> list[str]:
        """The names of the folders in a folder, sorted; without hidden ones, and without links."""
        try:
            with os.scandir(os.path.join(self.folder, inside)) as listing:
                return sorted(e.name for e in listing if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))
        except OSError:
            return []

    def is_folder(self, name: str) -> bool:
        """Whether a name is that of a folder that may be read. A link to one is not."""
        if self.remote is not None:
            return False
        try:
            path = self._resolve(name)
        except (UserError, OSError):
            return False
        return os.path.isdir(path) and not os.path.islink(os.path.join(self.folder, name))

    def look(self, name: str) -> FileInfo:
        """Return a file's size and stamp, or why it is refused."""
        try:
            return self._stat(name)
        except (UserError, OSError) as error:
            return FileInfo(printable(name), problem=_reason(error))

    def _stat(self, name: str) -> FileInfo:
        status = os.stat(self._resolve(name), follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            return FileInfo(name, problem="a link to a folder: not followed")
        if not stat.S_ISREG(status.st_mode):
            return FileInfo(name, problem="neither a file nor a folder (a pipe, a socket or a device)")
        return FileInfo(name, status.st_size, status.st_mtime_ns)

    def _resolve(self, name: str) -> str:
        """Return the real path of a name. Raises `UserError` if it leaves the folder and the root."""
        if not is_utf8(name):
            raise UserError(NOT_UTF8)
        if "://" in name:
            raise UserError("URLs are not followed: download it, and name the file")
        inside, _, base = name.rpartition("/")
        path = os.path.join(self._true_folder(inside), base)
        if base in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        if not path.startswith(self._inside) and path not in self.roots and not (self.named and name == self.named):
            raise UserError(
                "leaves the folder of its source: refused (`root` names another folder that paths may lead into; --root in commands)"
            )
        return path

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading. Raises `UserError` if it is refused or does not exist."""
        try:
            return self._open(name)
        except (UserError, OSError) as error:
            raise UserError(f"{printable(name)}: {_reason(error)}") from None

    def _open(self, name: str) -> IO[bytes]:
        handle = os.open(self._resolve(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            os.close(handle)
            raise UserError(f"{'a folder' if stat.S_ISDIR(mode) else 'a pipe, a socket or a device'}, not a file")
        return os.fdopen(handle, "rb")

    def read(self, name: str, stamp: int | None = None, most: int = MAX_BYTES) -> bytes:
        """Return all bytes of a file, which may be `most`.

        Raises:
            UserError: the file is refused, absent or too large (`TooLarge`), does not have the `stamp`, or changes while it is read.
        """
        with self.open(name) as file:
            size, before = self.stamp_of(file, name)
            _check_stamp(name, before, stamp)
            if size > most:
                raise TooLarge(f"{name}: {size} bytes are too many (limit {most})")
            try:
                data = file.read(size + 1)
            except OSError as error:
                raise UserError(f"{name}: {_reason(error)}") from None
            if len(data) != size or self.stamp_of(file, name) != (size, before):
                raise UserError(f"{name}: changed while it was read")
            return data

    def stamp_of(self, file: IO[bytes], name: str) -> tuple[int, int]:
        """Return (bytes, stamp) of an open file."""
        now = os.fstat(file.fileno())
        return now.st_size, now.st_mtime_ns

    def local(self, name: str) -> Path:
        """Return the real path of a local file, for reading in pieces."""
        return Path(self._resolve(name))


class _RemoteFiles(Files):
    """The files under a URL that fsspec opens."""

    remote: "AbstractFileSystem"

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
            in_order = sorted((base, info) for base, info in folders.items() if not base.startswith("."))
            folders.clear()  # fsspec visits the folders in the order of this dict
            folders.update(in_order)
            inside = folder[len(self.folder) :].lstrip("/")
            infos = {}
            for base, info in sorted(files.items()):
                if base and not base.startswith("."):
                    name = f"{inside}/{base}".lstrip("/")
                    infos[name] = _file_info(name, info)
            yield list(infos), infos

    def subfolders(self, inside: str = "") -> list[str]:
        with _asking(inside):
            try:
                entries = self.remote.ls(self._join(inside), detail=True)
            except FileNotFoundError:
                return []
        names = (e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "directory")
        return sorted(name for name in names if not name.startswith("."))

    def _stat(self, name: str) -> FileInfo:
        return _file_info(name, self.remote.info(self._join(name)))

    def _open(self, name: str) -> IO[bytes]:
        return self.remote.open(self._join(name), "rb")

    def _join(self, name: str) -> str:
        if is_remote(name) or name.startswith("/") or ".." in name.split("/"):
            raise UserError("leaves its source's folder: refused")
        return f"{self.folder}/{name}" if name else self.folder

    def stamp_of(self, file: IO[bytes], name: str) -> tuple[int, int]:
        info = self.look(name)
        return info.size, info.stamp


def open_files(folder: str, root: str = "", named: str = "") -> Files:
    """Return the files under a local folder or a URL. Raises `UserError` if it cannot be opened, and for a URL with a `root`."""
    if not is_remote(folder):
        return Files(folder, root, named)
    if root:
        raise UserError(f"root {root}: the paths of a URL ({folder}) cannot lead out of it; leave it out")
    return _RemoteFiles(folder)


def kind_of_path(path: str) -> str:
    """Return what a local path or a URL is: "file", "folder", or "" if it does not exist."""
    if not is_remote(path):
        return "folder" if Path(path).is_dir() else "file" if Path(path).exists() else ""
    files = _RemoteFiles(path)
    with _asking(path):
        return "file" if files.remote.isfile(files.folder) else "folder" if files.remote.exists(files.folder) else ""


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Turn an error of a server, or of fsspec, into a `UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every file system of fsspec raises its own types
        raise UserError(f"{name}: cannot be reached ({first_line(error)})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "a link: not followed"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return first_line(error)


def _file_info(name: str, info: Mapping[str, object]) -> FileInfo:
    """Return the `FileInfo` of a server's entry. The stamp is a hash of the size and of the first version or date in the entry."""
    versions = [
        str(info[key]) for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated") if info.get(key)
    ]
    digest = hashlib.sha256("\0".join([str(info.get("size")), *versions[:1]]).encode()).digest()
    return FileInfo(name, int(str(info.get("size") or 0)), int.from_bytes(digest[:7], "big"))


def _check_stamp(name: str, now: int, listed: int | None) -> None:
    """Raise `UserError` if a file is not the one that was listed."""
    if listed not in (None, now):
        raise UserError(f"{name}: has changed since the run was planned")


FOLDER = b"\0folder\0"  # stands for the first bytes of a folder


@dataclass(frozen=True)
class Blob:
    """The bytes of a member of an archive, a cell of a table, or a file.

    Args:
        name: relative to the source; used in messages and shards.
        data: the bytes.
        offset: where they begin in an archive, which may contain a name twice.
    """

    name: str
    data: bytes = field(default=b"", repr=False)
    offset: int = 0

    @staticmethod
    def of(files: Files, name: str, stamp: int | None = None) -> "Blob":
        """Return the content of a file, which is read when needed. stamp: the one from the listing, which must not have changed."""
        return _FileBlob(name, files=files, stamp=stamp)

    @staticmethod
    def at(path: Path) -> "Blob":
        """Return the content of a local file or folder, wherever it lies."""
        return _FileBlob(str(path.absolute()), files=Files("/"))

    def read(self) -> bytes:
        """Return all bytes. Raises `UserError`."""
        return self.data

    def head(self) -> bytes:
        """Return the first 4096 bytes, by which formats are recognized."""
        return self.data[:4096]

    def loaded(self) -> "Blob":
        """Return a blob with the bytes in memory if they are few, so that a file is opened once; else itself."""
        return self

    @contextmanager
    def local(self) -> Iterator[Path | None]:
        """Give the path of a local file, for reading in pieces, or None.

        Raises `UserError` if the file changes meanwhile. A `UserError` that names the path names the source's file instead.
        """
        yield None


@dataclass(frozen=True)
class _FileBlob(Blob):
    """The content of a file of a source, or of a folder, such as one of a video's frames."""

    files: Files = field(kw_only=True)
    stamp: int | None = None

    def read(self) -> bytes:
        return self.files.read(self.name, self.stamp)

    def head(self) -> bytes:
        if self.files.is_folder(self.name):
            return FOLDER
        with self.files.open(self.name) as file:
            return file.read(4096)

    def loaded(self) -> Blob:
        try:
            return Blob(self.name, self.files.read(self.name, self.stamp, SMALL if self.files.remote is None else MAX_BYTES))
        except UserError as error:
            if self.files.remote is None and (isinstance(error, TooLarge) or self.files.is_folder(self.name)):
                return self
            raise

    @contextmanager
    def local(self) -> Iterator[Path | None]:
        if self.files.remote is not None:
            yield None
            return
        before = None
        if not self.files.is_folder(self.name):
            found = self.files.look(self.name)
            if found.problem:
                raise UserError(f"{self.name}: {found.problem}")
            _check_stamp(self.name, found.stamp, self.stamp)
            before = found.size, found.stamp
        path = self.files.local(self.name)
        before = before or _state(path)
        try:
            yield path
        except UserError as error:
            error.args = (str(error).replace(str(path), self.name),)
            raise
        if _state(path) != before:
            raise UserError(f"{self.name}: changed while it was read")


def _state(path: Path) -> tuple[int, int] | None:
    """Bytes and time of change of a file or folder; None where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
