"""Bundles: vocabulary, tokenizers and decoder in one folder; and how such a folder is made."""

from unitok.bundle.bundle import Bundle
from unitok.bundle.making import load_trained_part, make_bundle, make_untrained
from unitok.bundle.reading import ReadFile

__all__ = [
    "Bundle",
    "ReadFile",
    "load_trained_part",
    "make_bundle",
    "make_untrained",
]
