"""The Lightning shells that train tokenizers, under the class paths that configurations name."""

from unitok.tokenizers.audio_training import AudioAdversary, AudioLosses, AudioTokenizerTraining
from unitok.tokenizers.image_training import Adversary, ImageLosses, ImageTokenizerTraining

__all__ = ["Adversary", "AudioAdversary", "AudioLosses", "AudioTokenizerTraining", "ImageLosses", "ImageTokenizerTraining"]
