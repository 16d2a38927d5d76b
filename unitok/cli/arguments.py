"""Types of arguments: paths that are read, and flags that follow from what is registered."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, get_type_hints

from unitok.cli.flags import Flag, flag_of, of_type, read_docstring
from unitok.errors import UserError


def check_input(path: Path) -> None:
    """Raise `UserError` for a path that is not there."""
    if not settle(path).exists():
        raise UserError(f"{path}: no such file or folder")


def check_bundle(path: Path) -> None:
    """Raise `UserError` for a path where no bundle is."""
    if not (settle(path) / "bundle.json").exists():
        raise UserError(f"{path}: no bundle (bundle.json) there; make one with `unitok bundle`")


Input = Annotated[Path, check_input]
BundleFolder = Annotated[Path, check_bundle]


@dataclass(frozen=True)
class PerKind:
    """Marks a list: a flag per kind of content, which may be repeated; the list holds (kind, value) in the order given."""

    metavar: str = ""

    def flags(self, name: str, text: str) -> Iterator[Flag]:
        from unitok.modalities import modalities

        for kind, modality in modalities().items():
            shown = self.metavar or (kind.upper() if modality.inline else "FILE")
            options = {"action": "append", "type": lambda value, kind=kind: (kind, value), "default": []}
            yield flag_of(kind), options | {"dest": name, "metavar": shown, "help": text.replace("{kind}", kind)}


@dataclass(frozen=True)
class Fields:
    """Marks a dict: a flag per field of dataclasses by prefix; the dict holds {prefix: {field: value}} of what was given.

    Args:
        classes: gives the dataclasses by prefix.
        default: stands in the help for that of each field.
    """

    classes: Callable[[], Mapping[str, type]]
    default: str = ""

    def flags(self, name: str, text: str) -> Iterator[Flag]:
        classes = self.classes()
        for prefix, owner in classes.items():
            texts, hints = read_docstring(owner)[1].get("Args", {}), get_type_hints(owner)
            for field in fields(owner):
                options = of_type(hints[field.name]) | {"dest": f"{name}.{prefix}.{field.name}", "default": None}
                if "type" in options and "choices" not in options:
                    options["metavar"] = field.name.upper()
                of, meaning = text.replace("{kind}", prefix), texts[field.name].replace("%", "%%")
                if prefix:
                    meaning = f"{of}: as {flag_of(field.name)}" if "" in classes else f"{of}: {meaning}"
                default = self.default or field.default
                said = default is False or default in (None, "") or f"{default}: " in meaning
                shown = "" if said else f" (default: {default})"
                yield flag_of(*filter(None, [prefix, field.name])), options | {"help": meaning + shown}
