"""What `unitok tokenize` is told about its sources: recipes, and what each source of one may say."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from unitok.document import ROLES, Part
from unitok.errors import UserError
from unitok.modalities import modalities
from unitok.storage import is_remote

PART_TYPES = tuple(modalities())
FIELD = r"\{([^{}]+)\}"  # of a template


@dataclass(frozen=True)
class Filters:
    """Which documents are taken; 0 stands for no limit. A document of which one part fails is left out, and counted.

    Args:
        min_side, max_side: shorter and longer side of every picture, pixels.
        max_aspect: longer side by shorter side of every picture.
        min_seconds, max_seconds: length of every sound.
        min_characters, max_characters: length of all texts together.
    """

    min_side: int = 0
    max_side: int = 0
    max_aspect: float = 0.0
    min_seconds: float = 0.0
    max_seconds: float = 0.0
    min_characters: int = 0
    max_characters: int = 0

    def of_image(self, width: int, height: int) -> str:
        """The name of the filter that a picture fails, or ""."""
        short, long = min(width, height), max(width, height)
        if short < self.min_side:
            return "min_side"
        if self.max_side and long > self.max_side:
            return "max_side"
        return "max_aspect" if self.max_aspect and long > self.max_aspect * short else ""

    def of_audio(self, seconds: float) -> str:
        """The name of the filter that a sound fails, or ""."""
        if seconds < self.min_seconds:
            return "min_seconds"
        return "max_seconds" if self.max_seconds and seconds > self.max_seconds else ""

    def of_texts(self, characters: int) -> str:
        """The name of the filter that a document's texts fail, or ""."""
        if characters < self.min_characters:
            return "min_characters"
        return "max_characters" if self.max_characters and characters > self.max_characters else ""


@dataclass(frozen=True)
class SourceSpec:
    """A source of a recipe.

    Args:
        path: folder, file, or a pattern with `*`; local (relative to the recipe) or a URL that fsspec opens.
        name: how it is called in the shards' `source` column; needed where two sources hold files of equal names.
        weight: how often each document is taken: 0.1 takes a tenth of them, 2.5 all of them twice and half of them again.
        template: parts with fields in braces, see `unitok.data.prepare.fields`; none: texts, images, audio.
        roles, loss: role and loss by type (`text`, `image`, `audio`) for parts that do not say theirs.
        order: types in the order in which they are to come, or `[random]`: each document's parts shuffled.
        filters: which documents are taken.
        root: the folder that paths must not leave; by default the source's own.
        crops: documents more of each one with pictures, of random crops (`crop_scale`: their least share of a side).
        flip: a document more of each one with pictures, mirrored; half of the crops are, too.
        audio_segment: seconds; a document with one longer sound becomes one for each piece of that length.
    """

    path: str
    name: str = ""
    weight: float = 1.0
    template: tuple[dict[str, Any], ...] = ()
    roles: dict[str, str] = field(default_factory=dict)
    loss: dict[str, bool] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    filters: Filters = field(default_factory=Filters)
    root: str = ""
    crops: int = 0
    crop_scale: float = 0.5
    flip: bool = False
    audio_segment: float = 0.0

    def __post_init__(self) -> None:
        said = f"source {self.name or self.path}"
        if self.weight <= 0:
            raise UserError(f"{said}: weight {self.weight:g}; it must be above 0")
        if self.crops < 0 or not 0 < self.crop_scale <= 1:
            raise UserError(f"{said}: crops must be at least 0, and crop_scale in (0, 1]")
        if self.audio_segment < 0:
            raise UserError(f"{said}: audio_segment {self.audio_segment:g}; it is seconds, 0 for whole sounds")
        for what, given, allowed in (("roles", self.roles, PART_TYPES), ("loss", self.loss, PART_TYPES)):
            for key in given:
                if key not in allowed:
                    raise UserError(f"{said}: {what} of {key!r}; choose of {', '.join(allowed)}")
        for role in self.roles.values():
            if role not in ROLES:
                raise UserError(f"{said}: role {role!r}; choose one of {', '.join(ROLES)}")
        twice = len(set(self.order)) < len(self.order)
        if self.order != ("random",) and (twice or set(self.order) - set(PART_TYPES)):
            raise UserError(f"{said}: order {list(self.order)}; it lists {', '.join(PART_TYPES)}, each once, or is [random]")
        check_template(self.template, said)

    def told(self) -> dict[str, Any]:
        """All that the result depends on, as plain types; where the source lies is not part of it."""
        return {k: v for k, v in asdict(self).items() if k not in ("path", "root")}


def check_template(template: Sequence[Any], where: str) -> None:
    """Errors: `UserError` for a part that is not one."""
    for number, part in enumerate(template, 1):
        here = f"{where}: template, part {number}"
        if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
            raise UserError(f"{here}: a part is {{type: text, text: …}} or {{type: image or audio, path: …}}")
        key = "text" if part["type"] == "text" else "path"
        if not isinstance(part.get(key), str) or not part[key]:
            raise UserError(f"{here}: an empty or missing {key!r}")
        if unknown := set(part) - {"type", key, "role", "loss", "optional"}:
            raise UserError(f"{here}: {', '.join(sorted(map(str, unknown)))}; it may say type, {key}, role, loss, optional")
        if "{" in re.sub(FIELD, "", part[key]) or "}" in re.sub(FIELD, "", part[key]):
            raise UserError(f"{here}: {part[key]!r}: a brace without its other one, or without a field between them")
        if part.get("role", "none") not in ROLES:
            raise UserError(f"{here}: role {part['role']!r}; choose one of {', '.join(ROLES)}")
        for key in ("loss", "optional"):
            if not isinstance(part.get(key, True), bool):
                raise UserError(f"{here}: {key} {part[key]!r}; it is true or false")
    if template and not any(part["type"] != "text" or re.search(FIELD, part["text"]) for part in template):
        raise UserError(f"{where}: template: no {{field}} in it, so that all documents would be the same")


def parse_template(text: str) -> tuple[dict[str, Any], ...]:
    """A template as YAML or JSON text, or the name of a file that holds it."""
    inline = any(mark in text for mark in "\n{[")
    read = _load_yaml(text, "--template") if inline or not Path(text).is_file() else _load_yaml(Path(text).read_text(), text)
    if not isinstance(read, list) or not read:
        raise UserError(f"--template {text[:60]}: a list of parts, or a YAML file that holds one")
    check_template(read, "--template")
    return tuple(read)


def load_recipe(path: Path) -> list[SourceSpec]:
    """The sources of a recipe; errors: `UserError` naming the file and what is wrong."""
    try:
        content = _load_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"{path}: not YAML text") from None
    if not isinstance(content, dict) or not isinstance(content.get("sources"), list) or not content["sources"]:
        raise UserError(f"{path}: a recipe is `sources:` and a list, each with a `path`")
    if unknown := set(content) - {"sources"}:
        raise UserError(f"{path}: {', '.join(sorted(map(str, unknown)))}: unknown; a recipe holds `sources` alone")
    specs = [
        _read_spec(entry, f"{path}: source {number}", Path(path).parent) for number, entry in enumerate(content["sources"], 1)
    ]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two sources are called {next(n for n in names if names.count(n) > 1)!r}; give each a `name`")
    return specs


def _read_spec(entry: Any, where: str, folder: Path) -> SourceSpec:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise UserError(f"{where}: it needs a `path`")
    kinds = {f.name: f.default for f in fields(SourceSpec)}
    if unknown := set(entry) - set(kinds):
        raise UserError(f"{where}: {', '.join(sorted(map(str, unknown)))}: unknown; it may say {', '.join(kinds)}")
    entry = dict(entry)
    for key in ("template", "order"):
        if key in entry:
            if not isinstance(entry[key], list | str):
                raise UserError(f"{where}: {key} is a list")
            entry[key] = (entry[key],) if isinstance(entry[key], str) else tuple(entry[key])
    limits = entry.pop("filters", {})
    if not isinstance(limits, dict) or set(limits) - {f.name for f in fields(Filters)}:
        raise UserError(f"{where}: filters may say {', '.join(f.name for f in fields(Filters))}")
    for key, value in (*entry.items(), *limits.items()):
        default = kinds.get(key, 0.0)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} {value!r}; it is true or false")
        elif isinstance(default, int | float):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{where}: {key} {value!r} is not a number")
            if key == "crops" and value != int(value):
                raise UserError(f"{where}: crops {value!r}; it is a whole number")
        elif isinstance(default, str) and not isinstance(value, str):
            raise UserError(f"{where}: {key} {value!r} is not a text")
    for key, kind, said in (("roles", str, "a role"), ("loss", bool, "true or false")):
        given = entry.get(key, {})
        if not isinstance(given, dict) or not all(isinstance(v, kind) for v in given.values()):
            raise UserError(f"{where}: {key} names {said} for each type, such as {{text: …}}")
    if not all(isinstance(kind, str) for kind in entry.get("order", ())):
        raise UserError(f"{where}: order lists types, or is [random]")
    for key in ("path", "root"):
        if entry.get(key) and not is_remote(entry[key]):
            entry[key] = str(folder / entry[key])
    entry.setdefault("name", entry["path"].rstrip("/").rpartition("/")[2])
    return SourceSpec(**entry | {"filters": Filters(**limits)})


def _load_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML ({' '.join(str(error).split())[:120]})") from None


def arrange(spec: SourceSpec, parts: Sequence[Part], id: str, seed: int) -> tuple[Part, ...]:
    """Parts in the order that a source asks for."""
    if not spec.order:
        return tuple(parts)
    if spec.order == ("random",):
        return tuple(sorted(parts, key=lambda part: share(seed, "order", id, str(parts.index(part)))))
    places = {kind: i for i, kind in enumerate(spec.order)}
    return tuple(sorted(parts, key=lambda part: places.get(part.type, len(places))))


def share(*words: object) -> float:
    """A number in [0, 1) that depends on the words alone: what chance is decided by, the same on every machine."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
