"""`unitok demo`: what the built-in bundle does, then the whole pipeline on the built-in data, and both side by side.

The budget: fixed fractions for the tokenizers, a reserve for scoring, and the rest for the decoder.
"""

from pathlib import Path

from unitok.configs import CONFIGS
from unitok.errors import UserError
from unitok.files import read_json, write_json
from unitok.generation_config import GenerationConfig
from unitok.scenes import EDITING, SAMPLING
from unitok.scenes.pipeline import Pipeline

IMAGE_FRACTION, AUDIO_FRACTION, SCORING_FRACTION = 0.185, 0.06, 0.125  # of the minutes
SCENES_PER_MINUTE = 950  # of the budget: scenes for training
SHOWN = 12  # scenes that the built-in bundle is shown on
RECONSTRUCTIONS = 400  # scenes for the scores of reconstructions and of codebook usage

PROMPTS = [
    ("a large red circle left of a small blue square on a white background", "image,audio"),
    ("a large pink ring on a gray background", "image,text,image"),
    ("a small green square on a white background", "image,text,image,audio"),  # a story that ends in audio
]


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
    demo = Pipeline(out, "demo", minutes, {"minutes": minutes, "eval_scenes": eval_scenes, "seed": seed})
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

    # The built-in bundle on the first scenes of `test`, drawn larger, so that both bundles are seen on the same scenes.
    shown = "scenes {out}/scenes/shown --count {count} --seed {own_seed} --max-objects 2 --fold seen --resolution 64"
    shipped = "eval --bundle scenes --scenes {out}/scenes/shown --count {count} --out {out}/shipped --seed {seed}"
    demo.stage("shipped", words(shown, count=SHOWN, own_seed=1_000_000 * seed + 2), words(shipped, count=SHOWN))
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
    demo.stage(
        "bundle",
        line,
        lambda: GenerationConfig(sampling=SAMPLING, edit=EDITING, edit_described=True).save_pretrained(out / "bundle"),
    )
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


def _report(demo: Pipeline) -> None:
    from unitok.scenes.report import write_report

    scores = read_json(demo.out / "eval" / "scores.json", "")
    scores |= {"seconds": round(demo.seconds, 1), "peak_memory_gb": round(demo.state["peak_memory_gb"], 2)}
    write_json(demo.out / "scores.json", scores)
    write_report(demo.out, scores, demo.state["seconds"], demo.minutes)
