"""Sampling flags as settings."""

from dataclasses import fields
from typing import Any

from unitok.errors import UserError
from unitok.modalities import modalities
from unitok.sample.sampling import Settings


def settings_from(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Flags -> fields of settings: `temperature` holds for all modalities, `image_temperature` for one; errors name the flag."""
    names = [f.name for f in fields(Settings)]
    given = {
        prefix: {name: value for name in names if (value := options.get(f"{prefix}{name}")) is not None}
        for prefix in ("", *(f"{modality}_" for modality in modalities()))
    }
    for prefix, own in given.items():
        try:
            Settings(**own)
        except UserError as error:
            name, _, problem = str(error).partition(" ")
            raise UserError(f"--{f'{prefix}{name}'.replace('_', '-')} {problem}") from None
    return {modality: given[""] | given[f"{modality}_"] for modality in modalities()}
