"""Types of arguments: paths that are read, and flags that follow from the registered kinds of content."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from unitok.cli.flags import flag_of, of_type, read_docstring, says_default
from unitok.errors import UserError

Flags = Iterator[tuple[str, dict[str, Any]]]


def check_input(path: Path) -> None:
    """Raise `UserError` for a path that is not there."""
    from unitok.pretrained import settle

    if not settle(path).exists():
        raise UserError(f"{path}: no such file or folder")


def check_bundle(path: Path) -> None:
    """Raise `UserError` for a path where no bundle is."""
    from unitok.pretrained import settle

    if not (settle(path) / "bundle.json").exists():
        raise UserError(f"{path}: no bundle (bundle.json) there; make one with `unitok bundle`")


Input = Annotated[Path, check_input]
BundleFolder = Annotated[Path, check_bundle]


@dataclass(frozen=True)
class PerKind:
    """Marks a list: a flag per kind of content, which may be repeated; the list holds (kind, value) in the order given."""

    metavar: str = ""

    def flags(self, name: str, text: str) -> Flags:
        """One per kind; `{kind}` stands for it in the text."""
        from unitok.modalities import modalities

        for kind, modality in modalities().items():
            shown = self.metavar or (kind.upper() if modality.inline else "FILE")
            options = {"action": "append", "type": lambda value, kind=kind: (kind, value), "default": []}
            yield flag_of(kind), options | {"dest": name, "metavar": shown, "help": text.replace("{kind}", kind)}


@dataclass(frozen=True)
class Fields:
    """Marks a dict: a flag per field of dataclasses by prefix; the dict holds {prefix: {field: value}} of what was given.

    Args:
        classes: gives the dataclasses by prefix; those of the prefix "" hold for all.
        default: stands in the help for the default of each field.
    """

    classes: Callable[[], Mapping[str, type]]
    default: str = ""

    def flags(self, name: str, text: str) -> Flags:
        """One per field, described by its class."""
        classes = self.classes()
        for prefix, owner in classes.items():
            texts, hints = read_docstring(owner)[1].get("Args", {}), get_type_hints(owner)
            for field in fields(owner):
                options = of_type(hints[field.name]) | {"dest": f"{name}.{prefix}.{field.name}", "default": None}
                if "type" in options and "choices" not in options:
                    options["metavar"] = field.name.upper()
                meaning, default = texts[field.name].rstrip("."), self.default or field.default
                if prefix and "" in classes:
                    meaning, default = f"the same of {prefix} alone", None
                shown = "" if says_default(meaning, default) else f" (default: {default})"
                yield flag_of(*filter(None, [prefix, field.name])), options | {"help": meaning.replace("%", "%%") + shown}

    def __call__(self, given: dict[str, dict[str, Any]]) -> None:
        """Raise `UserError` for a value that a class does not take."""
        classes = self.classes()
        for prefix, values in given.items():
            try:
                classes[prefix](**values)
            except UserError as error:
                raise UserError(str(error) if str(error).startswith(prefix) else f"{prefix} {error}") from None
