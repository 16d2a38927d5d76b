"""Bundles: vocabulary, tokenizers and decoder in one folder; and how such a folder is made."""

from unitok.bundle.bundle import Bundle, ReadFile
from unitok.bundle.making import load_trained_part, make_bundle, make_untrained

__all__ = [
    "Bundle",
    "ReadFile",
    "load_trained_part",
    "make_bundle",
    "make_untrained",
]
