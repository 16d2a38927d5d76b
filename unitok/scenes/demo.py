"""`unitok demo`: the whole pipeline on the built-in data. Every stage is a command that a user could type.

Each command is a process, which frees its memory between stages. `state.json` lists the finished stages: a demo that is started
again continues with the stage that was interrupted, and a training continues from its newest checkpoint. The budget: fixed
fractions for the tokenizers, a reserve for scoring, and the rest for the decoder.
"""

import ctypes
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypedDict, cast

from unitok.configs import CONFIGS
from unitok.errors import UserError
from unitok.files import read_json, write_json
from unitok.generation_config import GenerationConfig
from unitok.hardware import fast_bfloat16
from unitok.scenes import SAMPLING

IMAGE_FRACTION, AUDIO_FRACTION, SCORING_FRACTION = 0.185, 0.06, 0.125  # of the minutes
SCENES_PER_MINUTE = 950  # of the budget: scenes for training
SAVE_SECONDS = 10  # between two writes of state.json: the time that a killed demo may lose
RECONSTRUCTIONS = 400  # scenes for the scores of reconstructions and of codebook usage

PROMPTS = [
    ("a large red circle left of a small blue square on a white background", "image,audio"),
    ("a large pink ring on a gray background", "image,text,image"),
    ("a small green square on a white background", "image,text,image,audio"),  # a story that ends in audio
]


class State(TypedDict, total=False):
    """What `state.json` keeps. options: of the demo; minutes: of each training."""

    options: dict[str, float]
    done: list[str]
    seconds: dict[str, float]
    peak_memory_gb: float
    minutes: dict[str, float]
    precision: str


class Demo:
    """Runs stages and keeps in `state.json` which are done."""

    def __init__(self, out: Path, minutes: float, eval_scenes: int, seed: int):
        self.out, self.minutes, self.eval_scenes, self.seed = out, minutes, eval_scenes, seed
        self.file = out / "state.json"
        options: dict[str, float] = {"minutes": minutes, "eval_scenes": eval_scenes, "seed": seed}
        self.state = State(options=options, done=[], seconds={}, peak_memory_gb=0.0, minutes={})
        if self.file.exists():
            self.state = cast(State, read_json(self.file, "", *self.state))
            if self.state["options"] != options:
                earlier = ", ".join(f"{name} {value:g}" for name, value in self.state["options"].items())
                raise UserError(f"{out}: has a demo with other options ({earlier}); choose another folder, or remove it")
        elif out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: not empty and not a demo; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        self.precision = self._precision()

    def _precision(self) -> str:
        if "precision" not in self.state:
            self.state["precision"] = "bf16-mixed" if fast_bfloat16() else "32-true"
        return self.state["precision"]

    @property
    def seconds(self) -> float:
        """Time spent so far, over all restarts."""
        return sum(self.state["seconds"].values())

    def stage(self, name: str, *commands: list[str] | Callable[[], None]) -> None:
        """Run a stage unless it is done. commands: arguments of `unitok`, or functions."""
        if name in self.state["done"]:
            print(f"== {name}: already done")
            return
        print(f"== {name} ({self.seconds:.0f} s of {self.minutes * 60:.0f} s spent)", flush=True)
        began, before = time.monotonic(), self.state["seconds"].get(name, 0.0)

        def save() -> None:
            self.state["seconds"][name] = before + time.monotonic() - began
            write_json(self.file, self.state)

        for command in commands:
            if callable(command):
                command()
            else:
                self._run(command, save)
            save()
        self.state["done"].append(name)
        write_json(self.file, self.state)

    def _run(self, command: list[str], save: Callable[[], None]) -> None:
        """Run one command as a process; save the state while it runs, and note the peak memory of the largest process so far."""
        process = subprocess.Popen([sys.executable, "-m", "unitok", *command], preexec_fn=_die_with_parent)
        while process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(SAVE_SECONDS)
            save()
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        self.state["peak_memory_gb"] = max(self.state["peak_memory_gb"], largest)
        if process.returncode != 0:
            raise UserError(f"the command `unitok {' '.join(command)}` failed with exit code {process.returncode}")

    def minutes_for(self, name: str, minutes: float) -> str:
        """The minutes of a training. They are decided once, because a restart must not change its schedule."""
        self.state["minutes"].setdefault(name, round(minutes, 3))
        return str(self.state["minutes"][name])


def _die_with_parent() -> None:
    """On Linux, end this process when the demo that started it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def run_demo(out: Path, minutes: float = 13.0, eval_scenes: int = 200, seed: int = 0) -> None:
    """Run all stages; the results are `report.html` and `scores.json`.

    Args:
        out: folder to write.
        minutes: budget for everything, scoring included.
        eval_scenes: new scenes for each direction.
        seed: of data, training and sampling.
    """
    if minutes < 1:
        raise UserError(f"minutes {minutes:g}: must be at least 1")
    demo = Demo(out, minutes, eval_scenes, seed)
    common = {"out": out, "seed": seed, "configs": CONFIGS / "scenes", "precision": demo.precision}

    def words(line: str, **values: object) -> list[str]:
        """The words of a command line, names in braces replaced by values."""
        return [word.format(**common, **values) for word in line.split()]

    def scenes(name: str, count: int, offset: int, fold: str = "") -> list[str]:
        line = "scenes {out}/scenes/{name} --count {count} --seed {own_seed} --max-objects 2" + (
            " --fold {fold}" if fold else ""
        )
        return words(line, name=name, count=count, own_seed=1_000_000 * seed + offset, fold=fold)

    def fit(name: str, budget: float, data: str) -> list[str]:
        line = (
            "fit --config {configs}/{name}.yaml --out {out}/{name} --resume auto --data.init_args.path {out}/{data} "
            "--model.init_args.minutes {minutes} --trainer.precision {precision} --seed_everything {seed} "
            "--data.init_args.seed {seed}"
        )
        return words(line, name=name, data=data, minutes=demo.minutes_for(name, budget))

    demo.stage(
        "scenes",
        scenes("train", max(400, int(SCENES_PER_MINUTE * minutes)), 1),
        scenes("test", max(RECONSTRUCTIONS, eval_scenes), 2, "seen"),
        *(scenes(fold, eval_scenes, 3 + i, fold) for i, fold in enumerate(("composed", "systematic"))),
    )
    demo.stage("text", words("train-text-tokenizer {out}/scenes/train/text.txt --out {out}/text --vocab-size 512"))
    demo.stage("image", fit("image", minutes * IMAGE_FRACTION, "scenes/train/images"))
    demo.stage("audio", fit("audio", minutes * AUDIO_FRACTION, "scenes/train/audio"))
    demo.stage("tokenizers", words("bundle {out}/bundle --text {out}/text --image {out}/image --audio {out}/audio"))
    demo.stage("tokenize", words("tokenize {out}/scenes/train {out}/tokens --bundle {out}/bundle"))
    left = minutes * (1 - SCORING_FRACTION) - demo.seconds / 60 - 8 / 60  # 8 s to start and to build the bundle
    demo.stage("decoder", fit("decoder", max(0.1, left), "tokens"))
    line = words("bundle {out}/bundle --decoder {out}/decoder")
    demo.stage("bundle", line, lambda: GenerationConfig(sampling=SAMPLING).save_pretrained(out / "bundle"))
    sample = "sample --bundle {out}/bundle --text {text} --modalities {modalities} --out {out}/samples/{i} --n 4 --seed {seed} --max-new-tokens 300"
    demo.stage(
        "sample", *(words(sample, text=text, modalities=modalities, i=i) for i, (text, modalities) in enumerate(PROMPTS))
    )
    folds = "--scenes {out}/scenes/test --composed {out}/scenes/composed --systematic {out}/scenes/systematic"
    scored = "eval --bundle {out}/bundle --count {count} --out {out}/eval --seed {seed} " + folds
    demo.stage("eval", words(scored, count=eval_scenes))
    demo.stage("report", lambda: _report(demo))
    from unitok.scenes.evaluate import print_scores

    print_scores(read_json(out / "scores.json", ""))
    print(f"{demo.seconds:.0f} s; open {out / 'report.html'}")


def _report(demo: Demo) -> None:
    from unitok.scenes.report import write_report

    scores = read_json(demo.out / "eval" / "scores.json", "")
    scores |= {"seconds": round(demo.seconds, 1), "peak_memory_gb": round(demo.state["peak_memory_gb"], 2)}
    write_json(demo.out / "scores.json", scores)
    write_report(demo.out, scores, demo.state["seconds"], demo.minutes)
