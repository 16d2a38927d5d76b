"""Settings of sampling where nobody gives any: the library's, over them a bundle's own, over those what a call gives."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from unitok.bundle import GENERATION_CONFIG, Bundle
from unitok.errors import UserError
from unitok.sample.prompts import check_names
from unitok.sample.sampling import Settings

FORM = "settings={'image': Settings(temperature=0.5)}, from unitok.sample.sampling"


def settings_of(bundle: Bundle, given: Any = None) -> dict[str, Settings]:
    """The settings of each of a bundle's tokenizers, by its name. given: `Settings` for all, or by kind or name, which counts
    first. `Settings` are taken whole, a dict of some fields changes these; the bundle's own (`Bundle.defaults`) are such dicts.
    Errors: `UserError` that says where a name or value is wrong."""
    if given is not None and not isinstance(given, Settings | Mapping):
        raise UserError(f"settings: a {type(given).__name__}; give {FORM}")
    spans = bundle.vocab.spans
    layers = {
        GENERATION_CONFIG: bundle.defaults,
        "settings": dict.fromkeys(spans, given) if isinstance(given, Settings) else given or {},
    }
    known = dict.fromkeys([*spans, *(span.kind for span in spans.values())])
    for where, layer in layers.items():
        for name in layer:
            if name not in known:
                raise UserError(f"{where}: {name!r} is none of {', '.join(known)}; give {FORM}")
    made = {}
    for name, span in spans.items():
        made[name] = Settings()
        for where, layer in layers.items():
            for key in dict.fromkeys((span.kind, name)):
                if key in layer:
                    made[name] = _changed(made[name], layer[key], f"{where}[{key!r}]")
    return made


def _changed(settings: Settings, by: Any, where: str) -> Settings:
    if isinstance(by, Mapping):
        check_names(by, [f.name for f in fields(Settings)], where)
        try:
            return replace(settings, **by)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not isinstance(by, Settings):
        raise UserError(f"{where}: a {type(by).__name__}; give {FORM}")
    return by
