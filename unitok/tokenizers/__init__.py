"""Tokenizers turn text, images and audio into codes and back. They know nothing of training or of the vocabulary."""

from typing import TYPE_CHECKING

from unitok.lazy import attach

if TYPE_CHECKING:
    from unitok.tokenizers.audio import AudioTokenizer as AudioTokenizer
    from unitok.tokenizers.config import AudioTokenizerConfig as AudioTokenizerConfig
    from unitok.tokenizers.config import ImageTokenizerConfig as ImageTokenizerConfig
    from unitok.tokenizers.image import ImageTokenizer as ImageTokenizer
    from unitok.tokenizers.text import TextTokenizer as TextTokenizer

__getattr__, __all__ = attach(
    __name__,
    {
        "TextTokenizer": "text",
        "ImageTokenizer": "image",
        "ImageTokenizerConfig": "config",
        "AudioTokenizer": "audio",
        "AudioTokenizerConfig": "config",
    },
)
