"""Samples of scenes while a decoder trains: every direction, with scores."""

from pathlib import Path

from unitok.api import Unitok
from unitok.bundle import Bundle
from unitok.generation_config import Values
from unitok.scenes.evaluate import Evaluation, config_of_scenes
from unitok.scenes.world import read_scenes
from unitok.training.callbacks import Made, Samples
from unitok.vocab import Vocab


class SceneSamples(Samples):
    """`Samples` for scenes: a page for each direction, and the scores of the oracle as metrics.

    Args:
        bundle: folder with the tokenizers that the data was made with.
        scenes: folder written by `unitok scenes`.
        every_minutes: minutes of training between two times.
        number: scenes that are used, the first ones.
        seed: of sampling.
        max_new_tokens: most new tokens per output; default: the bundle's, else 512.
        generation_config: how to sample, over the bundle's own, and that over the demo's: fields of `unitok.GenerationConfig`.
    """

    def __init__(
        self,
        bundle: str,
        scenes: str,
        *,
        every_minutes: float = 1.0,
        number: int = 16,
        seed: int = 0,
        max_new_tokens: int | None = None,
        generation_config: Values | None = None,
    ):
        super().__init__(
            bundle,
            scenes,
            every_minutes=every_minutes,
            number=number,
            seed=seed,
            max_new_tokens=max_new_tokens,
            generation_config=generation_config,
        )

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
