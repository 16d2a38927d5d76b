"""Descriptions of sources for `unitok tokenize`: recipes, templates and filters; the order of a document's parts."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from unitok.document import ROLES, Part
from unitok.errors import UserError, type_of
from unitok.files import read_yaml
from unitok.modalities import modalities, modality_of
from unitok.storage import is_remote

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FIELD = r"\{([^{}]+)\}"  # of a template

TemplatePart = dict[str, object]  # type, content with fields in braces, and perhaps role, loss, optional
T = TypeVar("T")


@dataclass(frozen=True)
class Filters:
    """Limits for documents; 0 stands for no limit. A document is left out, and counted, where one of its parts breaks a limit.

    Args:
        min_side, max_side: shorter and longer side of every image, pixels.
        max_aspect: longer side by shorter side of every image.
        min_seconds, max_seconds: length of every audio.
        min_characters, max_characters: length of all texts together.
    """

    min_side: int = 0
    max_side: int = 0
    max_aspect: float = 0.0
    min_seconds: float = 0.0
    max_seconds: float = 0.0
    min_characters: int = 0
    max_characters: int = 0

    def reject(self, facts: Mapping[str, float]) -> str:
        """The name of the first limit that facts (`Loaded.facts`) break, or ""."""
        if self == _NO_FILTERS:
            return ""
        measured = {f"{bound}_{name}": value for name, value in facts.items() for bound in ("min", "max")}
        if "width" in facts:
            short, long = sorted((facts["width"], facts["height"]))
            measured |= {"min_side": short, "max_side": long, "max_aspect": long / short}
        for name, value in measured.items():
            limit = getattr(self, name, 0)
            if limit and (value < limit if name.startswith("min") else value > limit):
                return name
        return ""


_NO_FILTERS = Filters()


@dataclass(frozen=True)
class SourceSpec:
    """A source of a recipe.

    Args:
        path: folder, file, or a pattern with `*`; local (relative to the recipe) or a URL that fsspec opens.
        name: what the shards' column `source` calls it; needed where two sources hold files of equal names.
        weight: how often each document is taken: 0.1 takes a tenth of them, 2.5 all of them twice and half of them again.
        template: parts with fields in braces, see `unitok.data.prepare.fields`; none: texts, images, audio.
        instances: the tokenizer that files of a kind go to, where the bundle has several: `{audio: speech}`.
        roles, loss: by type (a kind or an instance), for parts that have none of their own.
        order: the order of types in each document; `[random]`: each document's parts shuffled; `[both]`: each document twice, in its
            order and in the opposite one.
        interleave: `words`: each word beside what is heard of it, by the times in a field `words` (`unitok.data.prepare.words`); or seconds,
            such as `1s`: a stretch of each video and recording of a document in turn, as they play together.
        speakers: `name`: the name in a field `speaker` stands before the text (`alice: …`); or the role of each speaker's parts by name.
            Default: such a field is not used.
        root: another folder that paths may lead into; default: none may leave the source's own folder.
        group: field of lines and rows that names a document's group; default: `group`, where there is one. A group is never split
            between training and validation.
        group_separator: documents without such a field whose ids are equal up to the last of these belong to one group.
        mask_history: of conversations, only the last turn of the assistant is learned; default: all of its turns.
        options: how content is read, by kind: the fields of `Modality.Options`; in a recipe each kind is a key of the source.
    """

    path: str
    name: str = ""
    weight: float = 1.0
    template: tuple[TemplatePart, ...] = ()
    instances: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    loss: dict[str, bool] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    interleave: str = ""
    speakers: str | dict[str, str] = ""
    filters: Filters = field(default_factory=Filters)
    root: str = ""
    group: str = ""
    group_separator: str = ""
    mask_history: bool = False
    options: dict[str, dict[str, object]] = field(default_factory=dict)

    @property
    def by_words(self) -> bool:
        """Whether words stand beside what is heard of them."""
        return self.interleave == "words"

    @property
    def turn_seconds(self) -> float:
        """Seconds of each stretch of the videos and recordings that stand in turn; 0: each whole."""
        return float(self.interleave[:-1]) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?s", self.interleave) else 0.0

    def __post_init__(self) -> None:
        where = f"source {self.name or self.path}"
        if self.weight <= 0:
            raise UserError(f"{where}: weight {self.weight:g}; it must be above 0")
        for role in self.roles.values():
            _check_role(role, where)
        if len(set(self.order)) < len(self.order):
            raise UserError(f"{where}: order {list(self.order)}; it lists types, each once, or is [random] or [both]")
        if len(self.order) > 1 and {"both", "random"} & set(self.order):
            raise UserError(f"{where}: order {list(self.order)}: random and both stand alone")
        if self.interleave and not self.by_words and not self.turn_seconds:
            raise UserError(f"{where}: interleave {self.interleave!r}; it is words, or seconds above 0 such as 1s")
        if self.by_words and (self.template or self.order == ("random",)):
            raise UserError(f"{where}: interleave words: without a template or a random order")
        if self.by_words and self.speakers:
            raise UserError(f"{where}: interleave and speakers do not go together; leave one of them out")
        if self.speakers and self.template:
            raise UserError(f"{where}: speakers: a template has its own place for {{speaker}}; leave one of them out")
        if isinstance(self.speakers, str) and self.speakers not in ("", "name"):
            raise UserError(f"{where}: speakers {self.speakers!r}; it is name, or roles by the names of speakers")
        for role in self.speakers.values() if isinstance(self.speakers, dict) else ():
            _check_role(role, where)
        for kind, given in self.options.items():
            make_options(kind, given, where)
        check_template(self.template, where)
        object.__setattr__(self, "group", re.sub(f"^{FIELD}$", r"\1", self.group))  # in braces as in a template, or without

    def types(self) -> set[str]:
        """All types that it names: kinds and instances."""
        named = {*self.instances, *self.instances.values(), *self.roles, *self.loss, *self.order}
        return named - {"random", "both"} | {str(part["type"]) for part in self.template}

    def defaults(self, type: str) -> tuple[str, bool]:
        """Role and loss of a type's parts that have none of their own."""
        names = (type, self.instances.get(type, type))
        role = next((self.roles[name] for name in reversed(names) if name in self.roles), "none")
        return role, all(self.loss.get(name, True) for name in names)


def _check_role(role: object, where: str) -> None:
    if role not in ROLES:
        raise UserError(f"{where}: role {role!r}; choose one of {', '.join(ROLES)}")


# ---- Templates --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PartOptions:
    """The keys that a template's part may have besides its type and content."""

    role: str = "none"
    loss: bool = True
    optional: bool = False


def part_keys(type: str) -> set[str]:
    """The further keys of a part with a file, such as `map`: those of its kind; of an instance, whose kind is not known here, those of all."""
    known = modalities().get(type)
    return {key for m in ([known] if known else modalities().values()) if not m.inline for key in m.keys}


def template_content(part: TemplatePart) -> str:
    """The content of a template's part, with fields in braces."""
    further = {key for modality in modalities().values() for key in modality.keys}
    return next(str(value) for key, value in part.items() if key not in {"type", "role", "loss", "optional", *further})


def check_template(template: Sequence[object], where: str) -> None:
    """Raise `UserError` for an entry that is not a part."""
    content: list[TemplatePart] = []
    for number, part in enumerate(template, 1):
        place = f"{where}: template, part {number}"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise UserError(f"{place}: a part is {{type: text, text: …}}, {{type: image, path: …}} or the like")
        known = modalities().get(part["type"])  # else an instance of the bundle
        key = known.key if known else next((k for k in part if k in {m.key for m in modalities().values()}), "path")
        if not isinstance(part.get(key), str) or not part[key]:
            raise UserError(f"{place}: an empty or missing {key!r}")
        further = part_keys(str(part["type"]))
        options = read_typed(_PartOptions, {k: v for k, v in part.items() if k not in ("type", key, *further)}, place)
        _check_role(options.role, place)
        if re.search("[{}]", re.sub(FIELD, "", part[key])):
            raise UserError(f"{place}: {part[key]!r}: a brace without its partner, or with no field in between")
        content.append(part)
    if content and not any(re.search(FIELD, template_content(part)) or "path" in part for part in content):
        raise UserError(f"{where}: template: it has no {{field}}, so that all documents would be the same")


def parse_template(text: str) -> tuple[TemplatePart, ...]:
    """A template from YAML or JSON text, or from the file of that name."""
    inline = any(mark in text for mark in "\n{[")
    where = "template" if inline or not Path(text).is_file() else text
    parts = read_yaml(where, text if where == "template" else Path(text).read_text())
    if not isinstance(parts, list) or not parts:
        raise UserError(f"template {text[:60]}: a list of parts, or a YAML file that holds one")
    check_template(parts, "template")
    return tuple(parts)


# ---- Recipes ----------------------------------------------------------------------------------------------------------


def load_recipe(path: Path) -> list[SourceSpec]:
    """The sources of a recipe. Errors: `UserError` naming the file and what is wrong."""
    try:
        content = read_yaml(path, Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"{path}: not YAML text") from None
    sources = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(sources, list) or not sources or set(content) != {"sources"}:
        raise UserError(f"{path}: a recipe is `sources:` and a list, each with a `path`, and nothing else")
    specs = [_read_spec(entry, f"{path}: source {number}", Path(path).parent) for number, entry in enumerate(sources, 1)]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two sources are called {next(n for n in names if names.count(n) > 1)!r}; give each a `name`")
    return specs


def _read_spec(entry: object, where: str, folder: Path) -> SourceSpec:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise UserError(f"{where}: it needs a `path`")
    entry = dict(entry)
    options = {kind: entry.pop(kind) for kind in modalities() if kind in entry}
    for key in ("path", "root"):
        if isinstance(entry.get(key), str) and entry[key] and not is_remote(entry[key]):
            entry[key] = str(folder / entry[key])
    entry.setdefault("name", entry["path"].rstrip("/").rpartition("/")[2])
    return read_typed(SourceSpec, entry | ({"options": options} if options else {}), where)


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a value by name"}


def read_typed(kind: type[T], value: object, where: str) -> T:
    """A YAML value as a plain type, a tuple, a dictionary, or a dataclass of these and of others like it.

    Errors: `UserError` that begins with `where`, for an unknown key and for a value of another type.
    """
    return _typed(kind, value, where)


def _typed(kind: Any, value: object, where: str) -> Any:
    outer = get_origin(kind) or kind
    if outer is object:
        return value
    if outer is UnionType:
        return _typed(
            next((k for k in get_args(kind) if isinstance(value, get_origin(k) or k)), get_args(kind)[0]), value, where
        )
    if outer is tuple and isinstance(value, list | str):
        values = [value] if isinstance(value, str) else value
        return tuple(_typed(get_args(kind)[0], one, f"{where} [{number}]") for number, one in enumerate(values, 1))
    if outer is dict and isinstance(value, dict):
        inner = get_args(kind)[1] if get_args(kind) else object
        return {str(key): _typed(inner, one, f"{where}: {key}") for key, one in value.items()}
    if is_dataclass(outer) and isinstance(value, dict):
        known = [f.name for f in fields(outer)]
        if unknown := set(value) - set(known):
            if "options" in known:  # they are given under the name of each kind
                known = [*(name for name in known if name != "options"), *modalities()]
            raise UserError(f"{where}: {', '.join(sorted(map(str, unknown)))}: unknown; it may have {', '.join(known)}")
        hints = get_type_hints(outer)
        return kind(**{name: _typed(hints[name], one, f"{where}: {name}") for name, one in value.items()})
    is_number = outer is float and type(value) is int
    if is_number or (type(value) is outer and not (isinstance(value, float) and not math.isfinite(value))):
        return value
    raise UserError(f"{where} {value!r}; it is {_NAMES.get(outer, 'a list' if outer is tuple else 'values by name')}")


# ---- Order and chance -------------------------------------------------------------------------------------------------


def arrange(spec: SourceSpec, parts: Sequence[Part], id: str, seed: int) -> tuple[Part, ...]:
    """A document's parts in the order that its source asks for."""
    if spec.order in ((), ("both",)):
        return tuple(parts)
    if spec.order == ("random",):
        return tuple(sorted(parts, key=lambda part: hash_fraction(seed, "order", id, str(parts.index(part)))))
    ranks = {kind: i for i, kind in enumerate(spec.order)}

    def rank(part: Part) -> int:
        names = (part.type, spec.instances.get(part.type, part.type))
        return min(ranks.get(name, len(ranks)) for name in names)

    return tuple(sorted(parts, key=rank))


def hash_fraction(*words: object) -> float:
    """A number in [0, 1) that depends only on the words, the same on every machine: what random choices are made by."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def make_options(kind: str, given: Mapping[str, object], where: str) -> "DataclassInstance":
    """Return a kind's options, an object of its `Options`, from plain values. Errors: `UserError` naming the wrong one."""
    options = modality_of(kind).Options
    known = {f.name: f for f in fields(options)}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{where}: {kind} has no option {name!r}; it has {', '.join(known) or 'none'}")
        expected = type(known[name].default)
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise UserError(f"{where}: {kind} {name} is {value!r}; it is {type_of(known[name].default)}")
    made: DataclassInstance = options(**given)
    return made
