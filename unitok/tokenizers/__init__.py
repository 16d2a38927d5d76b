"""Tokenizers: text, images and audio to codes and back. Networks here know nothing of training or of the vocabulary."""

from typing import TYPE_CHECKING

from unitok.lazy import attach

if TYPE_CHECKING:
    from unitok.tokenizers.audio import AudioTokenizer as AudioTokenizer
    from unitok.tokenizers.audio import AudioTokenizerConfig as AudioTokenizerConfig
    from unitok.tokenizers.image import ImageTokenizer as ImageTokenizer
    from unitok.tokenizers.image import ImageTokenizerConfig as ImageTokenizerConfig
    from unitok.tokenizers.text import TextTokenizer as TextTokenizer

__getattr__, __all__ = attach(
    __name__,
    {
        "TextTokenizer": "text",
        "ImageTokenizer": "image",
        "ImageTokenizerConfig": "image",
        "AudioTokenizer": "audio",
        "AudioTokenizerConfig": "audio",
    },
)
