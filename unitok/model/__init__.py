"""The decoder: tokens in, logits out. It imports neither the tokenizers nor the vocabulary."""

from typing import TYPE_CHECKING

from unitok.lazy import attach

if TYPE_CHECKING:
    from unitok.model.decoder import Decoder as Decoder
    from unitok.model.decoder import DecoderConfig as DecoderConfig

__getattr__, __all__ = attach(__name__, {"Decoder": "decoder", "DecoderConfig": "decoder"})
