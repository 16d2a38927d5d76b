"""`unitok demo`."""

from pathlib import Path


def demo(*, minutes: float = 13.0, out: Path = Path("runs/demo"), eval_scenes: int = 200, seed: int = 0) -> None:
    """Run the whole pipeline on built-in data: make files, train, tokenize, sample, score, write an HTML report.

    Args:
        minutes: budget for everything, minutes
        out: folder for everything it writes
        eval_scenes: new scenes to score each direction on
        seed: of data, training and sampling
    """
    from unitok.scenes.demo import run_demo

    run_demo(out, minutes, eval_scenes, seed)
