"""Public names of a package that are imported when they are asked for, so that importing the package stays cheap."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def attach(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """Return `__getattr__` and `__all__` for a package; homes: public name -> its module, relative to the package."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get, sorted(homes)
