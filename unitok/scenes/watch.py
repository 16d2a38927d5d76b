"""Samples of scenes while a decoder trains: every direction, with scores."""

from pathlib import Path
from typing import Any

from unitok.api import Unitok
from unitok.bundle import Bundle
from unitok.scenes.evaluate import Evaluation, config_of_scenes
from unitok.scenes.files import read_scenes
from unitok.training.callbacks import Made, Samples
from unitok.vocab import Vocab


class SceneSamples(Samples):
    """`Samples` for scenes: a page for each direction, and the scores of the oracle as metrics.

    Args:
        bundle: folder with the tokenizers that the data was made with.
        scenes: folder written by `unitok scenes`.
        options: as for `Samples`.
    """

    def __init__(self, bundle: str, scenes: str, **options: Any):
        super().__init__(bundle=bundle, prompts=scenes, **options)

    def read(self, vocab: Vocab) -> None:
        """Read the scenes. Errors: `UserError`."""
        self._rows = read_scenes(self.prompts)[: self.number]

    def make(self, bundle: Bundle, out: Path) -> Made:
        """Sample in every direction and write pages into a folder. Returns: outputs and scores by name."""
        unitok = Unitok(bundle.vocab, bundle.tokenizers, bundle.model)
        config = config_of_scenes(bundle, self.config)
        evaluation = Evaluation(unitok, out, config.seed, config)
        evaluation.max_new_tokens = config.max_new_tokens
        evaluation.generate(self.prompts, self._rows)
        return evaluation.kept, {name: score for name, score in evaluation.scores.items() if not isinstance(score, list)}
