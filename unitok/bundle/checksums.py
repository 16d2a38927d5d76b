"""Checksums of a bundle's files: a damaged or swapped file is noticed before it is used."""

import hashlib
from pathlib import Path

from unitok.errors import UserError, type_of
from unitok.files import Json

_UNCHECKED = ("bundle.json", "README.md", "generation_config.json")  # the file with the checksums, and what people edit


def checksums(folder: Path) -> dict[str, Json]:
    """SHA-256 of the files of a bundle, those that people edit apart, by their paths in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: _checksum(path) for name, path in named.items() if name not in _UNCHECKED}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, expected: Json) -> None:
    """Compare a bundle's files with the checksums in its `bundle.json`. Errors: `UserError` that names the first file that differs."""
    if not isinstance(expected, dict):
        raise UserError(f"{folder / 'bundle.json'}: sha256 is {type_of(expected)}; it is an object of names and checksums")
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; install unitok again, or get the bundle again")
        if _checksum(folder / name) != digest:
            raise UserError(f"{folder / name}: damaged (its checksum differs); install unitok again, or get the bundle again")
