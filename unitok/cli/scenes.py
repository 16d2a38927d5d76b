"""`unitok scenes`."""

from pathlib import Path
from typing import Annotated, Literal

from unitok.errors import UserError


def scenes(
    out: Path,
    *,
    count: int = 1000,
    seed: int = 0,
    max_objects: Annotated[int, (1, 2, 3)] = 3,
    fold: Literal["seen", "composed", "systematic"] | None = None,
    resolution: int = 32,
    tasks: bool = False,
    average: list[str] | None = None,
    workers: int = 2,
    overwrite: bool = False,
) -> None:
    """Write sonified scenes: PNG, WAV, captions, questions, and documents in interleaved JSON Lines.

    Args:
        out: folder to write
        count: number of scenes
        seed: the same seed writes the same bytes
        max_objects: most objects in a scene
        fold: only scenes of this fold, to measure on: seen, those a decoder learns from; composed, sequences of objects that no
            training document shows; systematic, with color-shape pairs that none shows (default: all, to train on;
            documents with images and audio are of seen scenes alone)
        resolution: side of the images, pixels
        tasks: also label maps, and documents with boxes, points, label maps and edits; the bundle then needs --add box and --add point
        average: KIND=N, documents of a kind per scene on average, 0 to 1 (again for another kind): edit=1, conversation=0.6
        workers: processes that draw images and audio
        overwrite: replace the folder even if it holds something else than scenes
    """
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    if resolution < 32:
        raise UserError(f"--resolution {resolution}: shapes need at least 32 pixels per side")
    from unitok.scenes.files import write_scenes

    averages: dict[str, float] = {}
    for text in average or []:
        kind, _, number = text.partition("=")
        try:
            averages[kind] = float(number)
        except ValueError:
            raise UserError(f"--average {text}: write KIND=N, such as edit=1") from None
    shape = (out, count, seed, max_objects, fold, resolution, workers, overwrite)
    write_scenes(*shape, progress=True, tasks=tasks, averages=averages)
    print(f"{out}: {count} scenes")
