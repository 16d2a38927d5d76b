"""The sampling parameters of a bundle of scenes, chosen on scenes of their own, other than those of the reported scores."""

import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from unitok.api import Unitok
from unitok.generation_config import GenerationConfig
from unitok.scenes import EDITING, LOCATING, SAMPLING
from unitok.scenes.evaluate import DIRECTIONS, Evaluation
from unitok.scenes.files import read_scenes

TEMPERATURES = (0.6, 0.4, 0.2, 0.0)  # the first wins that is within `TOLERANCE` of the best: no variety is given away for noise
GUIDANCE_SCALES = (1.5, 1.0, 2.0, 2.5, 3.0)
TOLERANCE = 0.003  # of the fraction of right outputs
MAX_NEW_TOKENS = 300


def tune(bundle: Path, scenes: Sequence[Path], count: int, seed: int = 0) -> GenerationConfig:
    """The temperature and guidance of images, and the temperature of audio, with the most right outputs.

    Args:
        bundle: folder of the bundle.
        scenes: folders of scenes to choose by, of a fold each, which count the same. count: how many of each.
        seed: of sampling.
    """
    unitok, rows = Unitok.from_pretrained(bundle), {folder: read_scenes(folder, count)[:count] for folder in scenes}
    directions = {direction.name: direction for direction in DIRECTIONS}

    def score(names: tuple[str, ...], **changed: dict[str, float]) -> float:
        config = GenerationConfig(sampling={kind: SAMPLING[kind] | changed.get(kind, {}) for kind in SAMPLING})
        with tempfile.TemporaryDirectory() as folder:
            evaluation = Evaluation(unitok, Path(folder), seed, config)
            evaluation.max_new_tokens = MAX_NEW_TOKENS
            right = [evaluation.outputs(directions[name], folder, rows[folder])[1] for folder in scenes for name in names]
            fraction = float(np.mean([np.mean(values) for values in right]))
        print(f"{', '.join(names)}: {changed}: {100 * fraction:.1f} %", flush=True)
        return fraction

    def best(names: tuple[str, ...], kind: str, choices: list[dict[str, float]]) -> dict[str, float]:
        scores = [score(names, **{kind: choice}) for choice in choices]
        return next(choice for choice, found in zip(choices, scores, strict=True) if found >= max(scores) - TOLERANCE)

    grid = [{"temperature": t, "guidance_scale": g} for t, g in product(TEMPERATURES, GUIDANCE_SCALES)]
    chosen = {
        "image": best(("text_to_image",), "image", grid),
        "audio": best(("text_to_audio", "image_to_audio"), "audio", [{"temperature": t} for t in TEMPERATURES]),
    }
    locating = {kind: params for kind, params in LOCATING.items() if kind in unitok.vocab.spans}
    drawing = {kind: SAMPLING[kind] | chosen.get(kind, {}) for kind in SAMPLING}
    return GenerationConfig(sampling=drawing | locating, edit=EDITING, edit_described=True)
