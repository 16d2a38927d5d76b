"""Samples of scenes while a decoder trains: every direction, with scores."""

from collections.abc import Mapping
from pathlib import Path

from unitok.api import Unitok
from unitok.bundle import Bundle
from unitok.sample.defaults import sampling_params_of
from unitok.scenes import SAMPLING
from unitok.scenes.evaluate import Evaluation
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
        settings: of sampling, by kind of content or name of a tokenizer. Default: the demo's.
        max_new_tokens: most new tokens per output.
    """

    def __init__(
        self,
        bundle: str,
        scenes: str,
        *,
        every_minutes: float = 1.0,
        number: int = 16,
        seed: int = 0,
        settings: Mapping[str, dict[str, float]] | None = None,
        max_new_tokens: int = 512,
    ):
        super().__init__(
            bundle,
            scenes,
            every_minutes=every_minutes,
            number=number,
            seed=seed,
            settings=dict(SAMPLING if settings is None else settings),
            max_new_tokens=max_new_tokens,
        )

    def read(self, vocab: Vocab) -> None:
        """Read the scenes. Errors: `UserError`."""
        self._rows = read_scenes(self.prompts)[: self.number]

    def make(self, bundle: Bundle, out: Path) -> Made:
        """Sample in every direction and write pages into a folder. Returns: outputs and scores by name."""
        unitok = Unitok(bundle.vocab, bundle.tokenizers, bundle.model)
        evaluation = Evaluation(unitok, out, self.seed, sampling_params_of(bundle, self.settings))
        evaluation.max_new_tokens = self.max_new_tokens
        evaluation.generate(self.prompts, self._rows)
        return evaluation.kept, {name: score for name, score in evaluation.scores.items() if not isinstance(score, list)}
