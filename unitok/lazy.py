"""Lazy public names of a package: a module is imported when one of its names is first used, so importing the package is fast."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def attach(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """Return the functions and names that make a package lazy.

    Args:
        package: the full name of the package.
        homes: public name -> the module that defines it, relative to the package.

    Returns:
        `__getattr__` and `__all__` for the package's `__init__.py`.
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get, sorted(homes)
