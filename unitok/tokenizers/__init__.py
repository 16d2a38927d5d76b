"""Tokenizers: text, images and sounds to codes and back. Networks here know nothing of training or of the vocabulary."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unitok.tokenizers.audio import AudioTokenizer, AudioTokenizerConfig
    from unitok.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
    from unitok.tokenizers.text import TextTokenizer

_HOMES = {
    "TextTokenizer": "text",
    "ImageTokenizer": "image",
    "ImageTokenizerConfig": "image",
    "AudioTokenizer": "audio",
    "AudioTokenizerConfig": "audio",
}
__all__ = ["AudioTokenizer", "AudioTokenizerConfig", "ImageTokenizer", "ImageTokenizerConfig", "TextTokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
