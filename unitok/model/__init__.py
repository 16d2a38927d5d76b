"""The decoder. It imports neither the tokenizers nor the vocabulary: ids in, logits out."""

from typing import Any

__all__ = ["Decoder", "DecoderConfig"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unitok.model import decoder

    return getattr(decoder, name)
