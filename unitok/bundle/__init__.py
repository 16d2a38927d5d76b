"""Bundles: vocabulary, tokenizers and decoder in one folder; and how such a folder is made."""

from unitok.bundle.bundle import GENERATION_CONFIG, Bundle, ReadFile, read_generation_config, write_generation_config
from unitok.bundle.making import load_trained_part, make_bundle, make_untrained

__all__ = [
    "GENERATION_CONFIG",
    "Bundle",
    "ReadFile",
    "load_trained_part",
    "make_bundle",
    "make_untrained",
    "read_generation_config",
    "write_generation_config",
]
