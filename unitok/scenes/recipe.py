"""`make bundle`: the recipe of the built-in bundle, from scenes to a folder of the package, with its scores and its model card.

Trainings have numbers of steps, so that the same version makes the same bundle on a slow machine, too. Sampling parameters are chosen
on scenes of their own. A recipe that was interrupted goes on where it was.
"""

import argparse
import hashlib
import json
import zlib
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from safetensors.torch import load_file

from unitok.bundle import Bundle
from unitok.bundle.checksums import checksums
from unitok.configs import CONFIGS
from unitok.conversations import to_data_url
from unitok.files import Json, read_json, write_json, write_text
from unitok.hub import BUILT_IN
from unitok.media import encode_png
from unitok.model.native import compiler
from unitok.pretrained import save_weights
from unitok.sample.prompts import words_of
from unitok.scenes.evaluate import Scores, interval
from unitok.scenes.pipeline import Pipeline
from unitok.scenes.tune import tune
from unitok.scenes.world import BACKGROUNDS, COLORS, PITCHES, SHAPES, TIMBRES, parse_caption, render_image

NAME = "scenes"
MINUTES = 540.0  # on two CPU cores, by the pace of some steps; with an H200 the decoder takes 8 of them
RESOLUTION = 64
#: Scenes of the decoder's first and last training, of the one between, and of the last alone; and their seeds.
SCENES, EDITED, REENCODED = 60_000, 28_000, 4_000
SEEDS = (31, 22, 24)
EXAMPLE = "a large red circle left of a small blue square on a white background"
EXAMPLES: list[tuple[str, list[str]]] = [  # prompts, and what to make of each
    (EXAMPLE, ["image", "audio"]),
    ("a small yellow ring on a black background", ["image"]),
    ("a loud C4 flute then a soft G4 bell then a loud E4 violin", ["audio"]),
    ("a large purple cross above a small cyan circle on a black background", ["image", "text", "image"]),
    ("a large blue square left of a large yellow triangle, both above a small red circle on a white background", ["image"]),
]
SHOWN = "a large green ring above a small pink triangle on a black background"
OF_IMAGE: list[tuple[str, list[str]]] = [  # the same of an image of SHOWN; the last prompt is for its lower half
    ("", ["text", "audio"]),
    (" what shape is the pink thing?", ["text"]),
    (" find the green ring:", ["box"]),
    (" find all things:", ["text", "box", "text", "box"]),
    (" labels:", ["image"]),
    (" make the background white", ["text", "image"]),
    ("a large green ring above a large blue square on a black background", ["image"]),
]
#: Documents a scene of the training on edits: of these as many as can be, of all other kinds some, so that little is forgotten.
AVERAGES = {
    "edit": 1.0,
    "conversation": 0.6,
    "image-caption": 0.2,
    **dict.fromkeys(("caption-image", "image-questions", "find", "point", "label"), 0.1),
    **dict.fromkeys(("describe_box", "detect", "draw_boxes", "draw_labels"), 0.1),
    **dict.fromkeys(("caption-image-audio", "image-audio", "caption-audio", "audio-caption", "story", "sequel"), 0.05),
}
#: The same of scenes whose images are read as files give them back: decoded from their codes and encoded again, which changes half of them.
READ = {
    **dict.fromkeys(("caption-image", "caption-image-audio", "caption-audio", "audio-caption", "story", "sequel"), 0.0),
    **dict.fromkeys(("draw_boxes", "draw_labels"), 0.0),
    **dict.fromkeys(("image-caption", "edit"), 0.8),
    "image-questions": 0.4,
    "conversation": 0.3,
}
TRAININGS = ("decoder", "edits", "rehearsal")  # of the decoder, by the names of their configurations
PER_DIRECTION = 600  # scenes, a third each of one, two and three objects on average

_DIRECTIONS = {
    "caption to image": "text_to_image.attributes",
    "image to caption": "image_to_text.exact",
    "what it drew to caption, by pixels": "image_to_text.drawn",
    "caption to audio": "text_to_audio.notes",
    "audio to caption": "audio_to_text.exact",
    "image to audio": "image_to_audio.notes",
    "questions about an image": "questions.exact",
    "caption, image, caption, image": "interleaved.attributes",
    "find a thing (IoU of at least 0.5)": "find",
    "point at a thing": "point",
    "describe what is in a box": "describe_box",
    "find all things": "detect",
    "boxes to image": "draw_boxes",
    "image to label map (mean IoU of at least 0.5)": "label",
    "label map to image": "draw_labels",
    "edit an image": "edit",
    "fill a hole in an image": "fill_image",
    "fill a word": "fill_text",
    "fill a note": "fill_audio",
}
_TURNS = {
    "draw": "draw a caption",
    "describe": "describe an image",
    "ask": "answer a question",
    "change": "change what was drawn",
    "play": "play what was drawn",
}
_COLUMNS = {
    "one object": ".one",
    "two objects": ".two",
    "three objects": ".three",
    "all": "",
    "composed": ".composed",
    "systematic": ".systematic",
}

CARD = {
    "license": "apache-2.0",
    "description": f"""A small model that reads and writes text, images of 64 x 64 pixels and audio of 8 kHz, about one world: scenes of one to three
colored shapes, and a note for each. It ships inside unitok (`pip install unitok-lm`) and shows in seconds what every direction
between three modalities looks like, boxes, label maps, edits and holes among them; it was trained with the configuration of
`make bundle`.

Prompts name size, color and shape of each thing, how they stand, and the background: "{EXAMPLE}". Captions of audio name loudness, pitch
and timbre: "a loud C4 flute then a soft G4 bell". In the audio of a scene color is pitch, shape is timbre and size is loudness.

- colors: {", ".join(COLORS)}; shapes: {", ".join(SHAPES)}; sizes: small, large; backgrounds: {", ".join(BACKGROUNDS)}
- layouts: one thing; X left of Y, X right of Y, X above Y, X below Y; X left of Y, both above Z; X above Y left of Z
- pitches: {", ".join(PITCHES)}; timbres: {", ".join(TIMBRES)}; soft, loud
- conversations: "draw …"; what is this? (with an image); make it larger, make the red circle blue, make the background black; now play it
- after an image: find the red circle: (a box follows); point at the red circle:; find all things:; labels: (a label map follows); turn the
  red circle into a ring; remove the red circle; a box (what is in it?)
- before an image: words and boxes in turn; a label map and a caption
- questions: how many things are there? what color is the background? what color is the circle? what shape is the red thing? what size
  is the red circle? where is the red circle?""",
    "training_data": f"""{SCENES:,} scenes that `unitok scenes OUT --count {SCENES} --seed {SEEDS[0]} --resolution {RESOLUTION} --tasks` writes; for the second of the decoder's
three trainings {EDITED:,} of seed {SEEDS[1]}, with more edits and conversations; for the third also {REENCODED:,} of seed {SEEDS[2]}, whose
images were decoded from their codes and encoded again: the project makes them itself, from a seed; no other data and no pretrained
weights. No document shows two folds of scenes, which only text names: *composed*, a tenth of all sequences of objects, and *systematic*, scenes with one of four color-shape pairs. The tokenizers saw all scenes.""",
    "evaluation": """Fractions of new drawings in which everything named is right, read from pixels and samples by an oracle that never sees the
model, of a single sample each, with 95 % intervals. Every scene of one object is drawn anew, and was in training as another drawing;
of two objects many were, of three few. What training never showed is in the columns *composed* and *systematic*. Sampling parameters
were chosen on scenes of their own, half of them *composed*. All three trainings of the decoder were done with two
seeds, of which the one with the higher scores is here; the other's differ by 1.1 points on average, by 6 at most (93.8 % of things
pointed at), and by 5 on *systematic*. Both have the same tokenizers.""",
    "intended_use": "Demonstration, tests, teaching, and as a start for experiments on two CPU cores.",
    "limits": """It knows nothing but these scenes. Other words and other images get an answer in this world's terms. Unseen pairs of color and
shape are less often right, as the scores say; unseen pairs of pitch and timbre nearly never are. An image that it drew has other codes when its pixels are
encoded again, half of them: it is described as well, edited right in 96 and filled right in 95 % of cases (of 150). In conversations codes stay codes. An edit begins with its description, as `u.edit` and `--modalities text,image` let it: an image alone is right in 8 of 100.""",
}


def run_recipe(out: Path, destination: Path) -> None:
    """Make the built-in bundle.

    Args:
        out: folder of the runs. destination: folder that the bundle is written to.
    """
    recipe = Pipeline(out, "recipe", MINUTES, {"scenes": SCENES, "resolution": RESOLUTION, "version": float(_checksum())})
    first, second, bundle = (out / name for name in ("first", "second", "bundle"))

    def scenes(name: str, count: int, seed: int, *more: str, averages: Mapping[str, float] = MappingProxyType({})) -> list[str]:
        words = ["scenes", str(out / "scenes" / name), "--count", str(count), "--seed", str(seed)]
        words += [word for kind, number in averages.items() for word in ("--average", f"{kind}={number}")]
        return [*words, "--resolution", str(RESOLUTION), *more]

    on_gpu = torch.cuda.is_available()

    def fit(name: str, data: Path | str) -> list[str]:
        words = ["fit", "--config", str(CONFIGS / "bundle" / f"{name}.yaml"), "--out", str(out / name), "--resume", "auto"]
        return [*words, "--data.init_args.path", str(data), *(["--trainer.accelerator", "gpu"] if on_gpu else [])]

    def fit_decoder(name: str, tokens: Path | str, init_from: Path | None = None) -> list[str]:
        """In bfloat16 where that is fast, and then compiled, which gains little in fp32 on a CPU."""
        more = [] if init_from is None else ["--model.init_args.init_from", str(init_from)]
        if on_gpu or recipe.precision == "bf16-mixed":
            compiles = on_gpu or compiler() is not None
            more += ["--trainer.precision", "bf16-mixed", "--model.init_args.compile", str(compiles).lower()]
        return [*fit(name, tokens), *more]

    recipe.stage(
        "scenes",
        scenes("train", SCENES, SEEDS[0], "--tasks"),
        scenes("edits", EDITED, SEEDS[1], "--tasks", averages=AVERAGES),
        scenes("read", REENCODED, SEEDS[2], "--tasks", averages=READ),
        scenes("validation", PER_DIRECTION, 2, "--fold", "seen"),
        scenes("validation-composed", PER_DIRECTION, 6, "--fold", "composed"),
        scenes("test", PER_DIRECTION, 3, "--fold", "seen", "--tasks"),
        scenes("composed", PER_DIRECTION, 4, "--fold", "composed", "--tasks"),
        scenes("systematic", PER_DIRECTION, 5, "--fold", "systematic", "--tasks"),
    )
    text, train = out / "text", out / "scenes" / "train"
    recipe.stage("text", ["train-text-tokenizer", str(train / "text.txt"), "--out", str(text), "--vocab-size", "512"])
    recipe.stage("image", fit("image", train / "images"))
    recipe.stage("audio", fit("audio", train / "audio"))
    parts = [word for name in ("text", "image", "audio") for word in (f"--{name}", str(out / name))]
    parts += ["--add", "box:bins=64", "--add", "point:bins=64"]
    recipe.stage("tokenizers", ["bundle", str(bundle), *parts])

    def coded(verb: str, given: Path, made: Path) -> list[str]:
        return [verb, str(given), str(made), "--bundle", str(bundle)]

    tokens, edited, once, again = (out / f"{name}tokens" for name in ("", "edit-", "read-", "reencoded-"))
    documents = {"train": tokens, "edits": edited, "read": once}
    recipe.stage("tokenize", *(coded("tokenize", out / "scenes" / name, to) for name, to in documents.items()))
    recipe.stage("decode", coded("detokenize", once, out / "decoded"))
    recipe.stage("encode again", coded("tokenize", out / "decoded", again))
    recipe.stage("decoder", fit_decoder("decoder", tokens))
    recipe.stage("first bundle", ["bundle", str(first), *parts, "--decoder", str(out / "decoder")])
    recipe.stage("edits", fit_decoder("edits", edited, first))
    recipe.stage("second bundle", ["bundle", str(second), *parts, "--decoder", str(out / "edits")])
    recipe.stage("rehearsal", fit_decoder("rehearsal", json.dumps({str(tokens): 1.0, str(again): 0.5}), second))
    recipe.stage("bundle", ["bundle", str(bundle), "--decoder", str(out / "rehearsal")], lambda: halve(bundle / "model"))
    validation = [out / "scenes" / name for name in ("validation", "validation-composed")]
    recipe.stage("tune", lambda: tune(bundle, validation, PER_DIRECTION // 2).save_pretrained(bundle))
    folds = [word for fold in ("composed", "systematic") for word in (f"--{fold}", str(out / "scenes" / fold))]
    line = ["eval", "--bundle", str(bundle), "--scenes", str(out / "scenes" / "test"), *folds]
    recipe.stage("eval", [*line, "--count", str(PER_DIRECTION), "--out", str(out / "eval")])
    _publish([first, second, bundle], read_json(out / "eval" / "scores.json", ""), train / "documents.jsonl", destination)
    print(f"{destination}: the built-in bundle, in {recipe.seconds / 60:.0f} minutes")


def _checksum() -> int:
    """Of what makes another recipe: the version, the trainings' configurations, and which scenes they read."""
    configs = [(CONFIGS / "bundle" / f"{name}.yaml").read_text() for name in ("image", "audio", *TRAININGS)]
    return zlib.crc32(repr((version("unitok-lm"), configs, EDITED, REENCODED, SEEDS, AVERAGES, READ)).encode())


def _publish(folders: list[Path], scores: Scores, documents: Path, destination: Path) -> None:
    """Write the last of some bundles, each of one of the decoder's trainings, with its facts, checksums and model card."""
    bundle = Bundle.from_pretrained(folders[-1])
    digest = hashlib.sha256(documents.read_bytes()).hexdigest()
    trainings = [read_json(folder / "bundle.json", "")["training"] for folder in folders]
    versions: dict[str, Json] = {
        "unitok": version("unitok-lm"),
        "documents": digest[:16],
        "scenes": SCENES,
        "edited scenes": EDITED,
        "re-encoded scenes": REENCODED,
        "seeds": ", ".join(map(str, SEEDS)),
        "date": date.today().isoformat(),
    }
    further = {f"model, {name}": facts["model"] for name, facts in zip(TRAININGS[1:], trainings[1:], strict=True)}
    bundle.facts["training"] = {**trainings[-1], "model": trainings[0]["model"], **further, "data": versions}
    bundle.facts["scores"] = _table(scores)
    bundle.facts["world"] = {
        "example": EXAMPLE,
        "examples": examples(),
        "chats": True,
        "words": [*sorted(words_of(documents.with_name("text.txt").read_text()))],
    }
    bundle.save_pretrained(destination, overwrite=True)
    halve(destination / "model")
    write_text(destination / "README.md", bundle.model_card(NAME, CARD))
    info = read_json(destination / "bundle.json", "")
    write_json(destination / "bundle.json", info | {"sha256": checksums(destination)})


def examples() -> list[Json]:
    """What the server's page offers: prompts and what to make of each; of some an image, and of the last of these what of it is made anew
    (white), both as data URLs."""
    scene = parse_caption(SHOWN)
    assert scene is not None
    image = torch.from_numpy(render_image(scene, np.random.default_rng(0), RESOLUTION)).permute(2, 0, 1) / 127.5 - 1
    mask = torch.full_like(image, -1.0)
    mask[:, RESOLUTION // 2 :] = 1.0
    urls = [to_data_url(encode_png(pixels), "image/png") for pixels in (image, mask)]
    made: list[dict[str, Json]] = [{"prompt": prompt, "modalities": [*names]} for prompt, names in EXAMPLES + OF_IMAGE]
    for example in made[len(EXAMPLES) :]:
        example["image"] = urls[0]
    made[-1]["mask"] = urls[1]
    return [*made]


def halve(folder: Path) -> None:
    """Keep a decoder's weights in half precision, which is read as well as float32 and takes half the space."""
    file = folder / "model.safetensors"
    save_weights(file, {name: tensor.half() for name, tensor in load_file(file).items()})


def _table(scores: Scores) -> dict[str, Json]:
    """Scores with intervals by direction and column, as percentages; and what is measured on reconstructions."""
    table: dict[str, Json] = {}
    counted = [(title, name, "scenes") for title, name in _DIRECTIONS.items()]
    counted += [(f"conversations: {title}", f"conversation.{kind}", f"turns.{kind}") for kind, title in _TURNS.items()]
    for title, name, of in counted:
        row: dict[str, Json] = {}
        for column, ending in _COLUMNS.items():
            value, total = scores.get(f"generation.{name}{ending}"), scores.get(f"{of}{ending}")
            if isinstance(value, float) and isinstance(total, int):
                row[column] = _percent(value, total)
        table[title] = row
    kept = {"images, everything read": "image.attributes", "images, PSNR dB": "image.psnr_db", "audio, notes": "audio.notes"}
    table["reconstructions"] = {title: _number(scores[f"reconstruction.{name}"]) for title, name in kept.items()}
    table["malformed outputs"] = _number(scores["malformed"])
    return table


def _percent(value: float, count: int) -> str:
    low, high = interval(value, count)
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _number(value: float | list[float]) -> Json:
    return value if isinstance(value, int | float) else list(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/recipe"), help="folder of the runs")
    parser.add_argument("--destination", type=Path, default=BUILT_IN / NAME, help="folder that the bundle is written to")
    options = parser.parse_args()
    run_recipe(options.out, options.destination)
