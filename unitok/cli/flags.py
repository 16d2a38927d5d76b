"""Sampling flags as settings."""

from dataclasses import fields
from typing import Any

from unitok.errors import UserError
from unitok.modalities import modalities
from unitok.sample.sampling import Settings


def settings_from(options: dict[str, Any]) -> dict[str, Settings]:
    """Flags -> settings: `temperature` holds for all modalities, `image_temperature` for one; errors name the flag."""
    names = [f.name for f in fields(Settings)]
    common = {name: options[name] for name in names if options.get(name) is not None}
    Settings(**common)
    out = {}
    for modality in modalities():
        own = {name: value for name in names if (value := options.get(f"{modality}_{name}")) is not None}
        try:
            out[modality] = Settings(**common | own)
        except UserError as error:
            raise UserError(str(error).replace("--", f"--{modality}-", 1)) from None
    return out
