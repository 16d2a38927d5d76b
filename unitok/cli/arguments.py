"""Types of arguments: paths that are read, flags that follow from the registered kinds of content, and what such flags give."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from unitok.cli.flags import described, flag_of, of_type, read_docstring
from unitok.errors import UserError
from unitok.files import settle

Given = dict[str, dict[str, Any]]  # values of flags by prefix and field
Flags = Iterator[tuple[str, dict[str, Any]]]


def check_input(path: Path) -> None:
    """Raise `UserError` for a path that is not there."""
    if not settle(path).exists():
        raise UserError(f"{path}: no such file or folder")


def find_bundle(name: Path) -> Path:
    """The folder of a bundle: of a path, of a built-in bundle, or of USER/NAME[@REVISION] on the Hugging Face hub. Errors: `UserError`."""
    from unitok.hub import find

    repository, at, revision = str(name).partition("@")
    exists = settle(name).exists()
    folder = name if exists or name.is_absolute() else find(repository, revision if at else None)
    if not (settle(folder) / "bundle.json").exists():
        raise UserError(f"{name}: no bundle (bundle.json) there; make one with `unitok bundle`")
    return folder


Input = Annotated[Path, check_input]
BundleFolder = Annotated[Path, find_bundle]


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
    """Marks a dict: a flag per field of dataclasses by prefix; the dict holds {prefix: {field: value}} of what was given."""

    classes: Callable[[], Mapping[str, type]]  # gives the dataclasses by prefix; those of the prefix "" hold for all
    default: str = ""  # stands in the help for the default of each field

    def flags(self, name: str, text: str) -> Flags:
        """One per field with a plain default, described by its class; where a later class has the same field, by that one."""
        classes, texts = self.classes(), dict[str, str]()
        for owner in classes.values():
            texts |= read_docstring(owner)[1].get("Args", {})
        for prefix, owner in classes.items():
            hints = get_type_hints(owner)
            for field in fields(owner):
                if field.default is MISSING:  # not a plain value
                    continue
                options = of_type(hints[field.name]) | {"dest": f"{name}.{prefix}.{field.name}", "default": None}
                if "type" in options and "choices" not in options:
                    options["metavar"] = field.name.upper()
                meaning, default = texts[field.name].rstrip("."), self.default or field.default
                if prefix and "" in classes:
                    meaning, default = f"the same of {prefix} alone", None
                help = described(meaning, default)
                yield flag_of(*filter(None, [prefix, field.name])), options | {"help": help}

    def __call__(self, given: Given) -> None:
        """Raise `UserError` for a value that a class does not take."""
        classes = self.classes()
        for prefix, values in given.items():
            try:
                classes[prefix](**values)
            except UserError as error:
                raise UserError(str(error) if str(error).startswith(prefix) else f"{prefix} {error}") from None


def split_name(kind: str, value: str) -> tuple[str, str]:
    """`NAME=PATH` as a tokenizer's name and the path; without a name that of its kind."""
    name, equals, path = value.partition("=")
    return (name, path) if equals and name.isidentifier() and not Path(value).exists() else (kind, value)


def content_of(kind: str, value: str) -> Any:
    """A part of a prompt as `Unitok.generate` takes it. Errors: `UserError` for a file that is not there, and for bad JSON."""
    from unitok.document import Part, RawDocument
    from unitok.modalities import modality_of

    modality = modality_of(kind)
    if not modality.inline:
        name, path = split_name(kind, value)
        check_input(Path(path))
        return Path(path) if name == kind else Part(name, path=Path(path))
    if modality.accepts(value):
        return value
    return RawDocument(kind, (Part(kind, modality.check(read_json_flag(value, kind), f"--{kind}")),))


def check_kinds(prompt: list[tuple[str, str]], parts: list[Any]) -> None:
    """Raise `UserError` for a file under the flag of another kind."""
    from unitok.modalities import kind_of_content

    for (kind, _), part in zip(prompt, parts):
        if not isinstance(part, Path) or not part.is_file():
            continue
        with open(part, "rb") as file:
            found = kind_of_content(file.read(4096), part.name, kind)
        if found not in (None, kind):
            raise UserError(f"--{kind} {part}: holds {found}; give it with --{found}")


def read_json_flag(text: str, name: str) -> Any:
    """A value given as JSON. Errors: `UserError` that names the flag."""
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"--{name}: {text[:60]!r} is not JSON") from None


def sampling_of_flags(by_kind: Given, named: str) -> Given:
    """What flags say of each kind of content, and the flag `--sampling` of each tokenizer or kind."""
    by_name = read_json_flag(named or "{}", "sampling")
    if not isinstance(by_name, dict) or not all(isinstance(given, dict) for given in by_name.values()):
        raise UserError('--sampling: JSON such as {"speech": {"temperature": 0.7}}')
    return {name: by_kind.get(name, {}) | by_name.get(name, {}) for name in (by_kind | by_name)}
