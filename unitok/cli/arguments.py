"""Types of the verbs' parameters: input paths, and parameters that become a flag per kind of content or per field of a dataclass."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from unitok.cli.flags import Options, Written, described, flag_of, of_type, read_docstring
from unitok.errors import UserError
from unitok.files import settle

Given = dict[str, Options]  #: values of flags by prefix and field
Flags = Iterator[tuple[str, Options]]  #: flags and the keyword arguments of their `add_argument`


def check_input(path: Path) -> None:
    """Raise `UserError` if a path does not exist."""
    if not settle(path).exists():
        raise UserError(f"{path}: no such file or folder")


def check_part(path: Path) -> None:
    """Raise `UserError` for a path that does not exist and is not the name of a built-in bundle."""
    from unitok.hub import built_in

    if str(path) not in built_in():
        check_input(path)


def find_bundle(name: Written) -> Path:
    """Return the folder of a bundle, by its path, the name of a built-in bundle, or USER/NAME[@REVISION] on the Hugging Face hub.

    A name that begins as a path does (`./`, `../`, `/`, `~`) is one. Raises `UserError` if there is none.
    """
    from unitok.hub import find

    name = Written(name)  # a default is a Path
    repository, at, revision = name.partition("@")
    is_path = name.startswith(("/", "./", "../", "~")) or (("/" in name or at) and settle(Path(name)).exists())
    folder = Path(name) if is_path else find(repository, revision if at else None)
    if not (settle(folder) / "bundle.json").exists():
        raise UserError(f"{name}: not a bundle (it has no bundle.json); make one with `unitok bundle`")
    return folder


Input = Annotated[Path, check_input]
BundleFolder = Annotated[Path, find_bundle]
PartFolder = Annotated[Path, check_part]  #: of a tokenizer or decoder, of a run or bundle; also the name of a built-in bundle
Dtype = Literal["float32", "bfloat16", "float16", "int8", "auto"]  #: of the weights that generate


@dataclass(frozen=True)
class PerKind:
    """Marks a parameter that is a list: one repeatable flag per kind of content. The list has (kind, value) in the order given."""

    metavar: str = ""

    def flags(self, name: str, text: str) -> Flags:
        """Yield one flag per kind. `{kind}` in the text is replaced by it."""
        from unitok.modalities import modalities

        for kind, modality in modalities().items():
            shown = self.metavar or (kind.upper() if modality.inline else "FILE")
            options = {"action": "append", "type": lambda value, kind=kind: (kind, value), "default": []}
            yield flag_of(kind), options | {"dest": name, "metavar": shown, "help": text.replace("{kind}", kind)}


@dataclass(frozen=True)
class Fields:
    """Marks a parameter that is a dict: one flag per field of some dataclasses. The dict is {prefix: {field: value}} of the flags given.

    Args:
        classes: returns the dataclasses by the prefix of their flags. Flags of the prefix "" apply to all.
        default: replaces the default of each field in the help.
    """

    classes: Callable[[], Mapping[str, type]]
    default: str = ""

    def flags(self, name: str, text: str) -> Flags:
        """Yield one flag per field that has a plain default. A field of several classes has the help text of the last."""
        classes, texts = self.classes(), dict[str, str]()
        for owner in classes.values():
            texts |= read_docstring(owner)[1].get("Args", {})
        for prefix, owner in classes.items():
            hints = get_type_hints(owner)
            for field in fields(owner):
                if field.default is MISSING or not field.metadata.get("flag", True):  # not a plain value
                    continue
                options = of_type(hints[field.name]) | {"dest": f"{name}.{prefix}.{field.name}", "default": None}
                if "type" in options and "choices" not in options:
                    options["metavar"] = field.name.upper()
                meaning, default = texts[field.name].rstrip("."), self.default or field.default
                if prefix and "" in classes:
                    meaning, default = f"the same, for {prefix} only", None
                help = described(meaning, default)
                yield flag_of(*filter(None, [prefix, field.name])), options | {"help": help}

    def __call__(self, given: Given) -> None:
        """Raise `UserError` for a value that its class refuses."""
        classes = self.classes()
        for prefix, values in given.items():
            try:
                classes[prefix](**values)
            except UserError as error:
                raise UserError(str(error) if str(error).startswith(prefix) else f"{prefix} {error}") from None


def split_name(kind: str, value: str) -> tuple[str, str]:
    """Split `NAME=PATH` into a tokenizer's name and the path. Without `NAME=` the name is the kind."""
    name, equals, path = value.partition("=")
    return (name, path) if equals and name.isidentifier() and not Path(value).exists() else (kind, value)


def content_of(kind: str, value: str) -> Any:
    """Return the value of a prompt's flag as `Unitok.generate` takes it. Raises `UserError` for a missing file or bad JSON."""
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


def check_kinds(prompt: list[tuple[str, str]], parts: Sequence[object]) -> None:
    """Raise `UserError` if a file is of another kind than its flag says."""
    from unitok.modalities import kind_of_content

    for (kind, _), part in zip(prompt, parts):
        if not isinstance(part, Path) or not part.is_file():
            continue
        with open(part, "rb") as file:
            actual = kind_of_content(file.read(4096), part.name, kind)
        if actual not in (None, kind):
            raise UserError(f"--{kind} {part}: contains {actual}; give it with --{actual}")


def read_json_flag(text: str, name: str) -> object:
    """Parse a value that is given as JSON. Raises `UserError` that names the flag."""
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"--{name}: {text[:60]!r} is not JSON") from None


def sampling_of_flags(by_kind: Given, named: str) -> Given:
    """Return the sampling parameters by kind or name: those of the flags per kind, and over them those of `--sampling`."""
    by_name = read_json_flag(named or "{}", "sampling")
    if not isinstance(by_name, dict) or not all(isinstance(given, dict) for given in by_name.values()):
        raise UserError('--sampling: JSON such as {"speech": {"temperature": 0.7}}')
    return {name: by_kind.get(name, {}) | by_name.get(name, {}) for name in (by_kind | by_name)}
