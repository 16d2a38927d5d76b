"""Training: Lightning modules under the class paths that configurations name, and what they are built from."""

from unitok.lazy import attach

__getattr__, __all__ = attach(
    __name__,
    {
        "ImageTokenizerTraining": "image",
        "AudioTokenizerTraining": "audio",
        "DecoderTraining": "decoder",
        "Samples": "callbacks",
    },
)
