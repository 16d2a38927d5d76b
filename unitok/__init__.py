"""unitok: one model that reads and writes text, images and audio. Public names are imported when they are first used."""

from typing import TYPE_CHECKING

from unitok.lazy import attach

if TYPE_CHECKING:
    from unitok.api import Unitok as Unitok
    from unitok.document import Document as Document
    from unitok.document import Segment as Segment
    from unitok.generation_config import GenerationConfig as GenerationConfig
    from unitok.generation_config import SamplingParams as SamplingParams
    from unitok.grammar import Grammar as Grammar
    from unitok.modalities.box import Boxes as Boxes
    from unitok.modalities.box import Points as Points
    from unitok.sample.outputs import Output as Output
    from unitok.tokenizers import AudioTokenizer as AudioTokenizer
    from unitok.tokenizers import ImageTokenizer as ImageTokenizer
    from unitok.tokenizers import TextTokenizer as TextTokenizer
    from unitok.vocab import Vocab as Vocab

__version__ = "0.1.0"
__getattr__, __all__ = attach(
    __name__,
    {
        "Unitok": "api",
        "Document": "document",
        "Segment": "document",
        "GenerationConfig": "generation_config",
        "SamplingParams": "generation_config",
        "Grammar": "grammar",
        "Boxes": "modalities.box",
        "Points": "modalities.box",
        "Output": "sample.outputs",
        "AudioTokenizer": "tokenizers",
        "ImageTokenizer": "tokenizers",
        "TextTokenizer": "tokenizers",
        "Vocab": "vocab",
    },
)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
