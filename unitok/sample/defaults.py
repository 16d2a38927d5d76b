"""SamplingParams of sampling where nobody gives any: the library's, over them a bundle's own, over those what a call gives."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from unitok.bundle import GENERATION_CONFIG, Bundle
from unitok.errors import UserError
from unitok.sample.prompts import check_names
from unitok.sample.sampling import SamplingParams

FORM = "settings={'image': SamplingParams(temperature=0.5)}, from unitok.sample.sampling"


def sampling_params_of(bundle: Bundle, given: Any = None) -> dict[str, SamplingParams]:
    """The settings of each of a bundle's tokenizers, by its name. given: `SamplingParams` for all, or by kind or name, which counts
    first. `SamplingParams` are taken whole, a dict of some fields changes these; the bundle's own (`Bundle.defaults`) are such dicts.
    Errors: `UserError` that says where a name or value is wrong."""
    if given is not None and not isinstance(given, SamplingParams | Mapping):
        raise UserError(f"settings: a {type(given).__name__}; give {FORM}")
    spans = bundle.vocab.spans
    layers = {
        GENERATION_CONFIG: bundle.defaults,
        "settings": dict.fromkeys(spans, given) if isinstance(given, SamplingParams) else given or {},
    }
    known = dict.fromkeys([*spans, *(span.kind for span in spans.values())])
    for where, layer in layers.items():
        for name in layer:
            if name not in known:
                raise UserError(f"{where}: {name!r} is none of {', '.join(known)}; give {FORM}")
    made = {}
    for name, span in spans.items():
        made[name] = SamplingParams()
        for where, layer in layers.items():
            for key in dict.fromkeys((span.kind, name)):
                if key in layer:
                    made[name] = _changed(made[name], layer[key], f"{where}[{key!r}]")
    return made


def _changed(settings: SamplingParams, by: Any, where: str) -> SamplingParams:
    if isinstance(by, Mapping):
        check_names(by, [f.name for f in fields(SamplingParams)], where)
        try:
            return replace(settings, **by)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not isinstance(by, SamplingParams):
        raise UserError(f"{where}: a {type(by).__name__}; give {FORM}")
    return by
