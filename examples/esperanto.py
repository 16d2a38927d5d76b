"""Captions in Esperanto for scenes: data to fine-tune on, prompts, and the score; see docs/fine-tuning.md.

python examples/esperanto.py write SCENES FILE.jsonl [--count 4000] [--prompts]
python examples/esperanto.py score SCENES OUTPUTS.jsonl
"""

import argparse
import os
from pathlib import Path

from unitok.document import Part, RawDocument
from unitok.interleaved import format_raw_document, read_raw_documents
from unitok.scenes.files import read_scenes
from unitok.scenes.world import Scene, SceneObject

WORDS = {
    "red": "ruĝa", "green": "verda", "blue": "blua", "yellow": "flava", "purple": "purpura", "cyan": "cejana",
    "orange": "oranĝa", "pink": "rozkolora", "white": "blanka", "gray": "griza", "black": "nigra", "small": "malgranda",
    "large": "granda", "circle": "cirklo", "square": "kvadrato", "triangle": "triangulo", "cross": "kruco", "ring": "ringo",
}  # fmt: skip
ASKED = " Esperante: "


def caption(scene: Scene) -> str:
    """Return a caption of a scene of one or two objects, in Esperanto."""

    def name(thing: SceneObject) -> str:
        return f"{WORDS[thing.size]} {WORDS[thing.color]} {WORDS[thing.shape]}"

    between = {"one": "", "row": " maldekstre de ", "column": " super "}[scene.layout]
    return f"{between.join(name(thing) for thing in scene.objects)} sur {WORDS[scene.background]} fono"


def write(scenes: Path, out: Path, count: int, prompts: bool) -> None:
    """Write interleaved JSON Lines: image, request, and (except for prompts) the caption, the only part with loss."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for row in read_scenes(scenes)[:count]:
            image = Path(os.path.relpath(scenes / row["image"], out.parent))
            content = [Part("image", path=out.parent / image, loss=False), Part("text", ASKED, loss=False)]
            if not prompts:
                content.append(Part("text", caption(row["scene"])))
            file.write(format_raw_document(RawDocument(row["id"], tuple(content)), out.parent) + "\n")


def score(scenes: Path, outputs: Path) -> None:
    """Print the fraction of captions that are right to the letter."""
    generated = [raw.content[-1].value.strip() for raw in read_raw_documents(outputs)]
    expected = [caption(row["scene"]) for row in read_scenes(scenes)[: len(generated)]]
    right = sum(a == b for a, b in zip(generated, expected, strict=True))
    for a, b in list(zip(generated, expected, strict=True))[:5]:
        print(f"{'right' if a == b else 'wrong'}: {a}{'' if a == b else f' (it is: {b})'}")
    print(f"{right} of {len(generated)} right ({right / len(generated):.0%})")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("write", "score"))
    p.add_argument("scenes", type=Path, help="folder made by unitok scenes")
    p.add_argument("file", type=Path, help="the file to write, or the outputs to score")
    p.add_argument("--count", type=int, default=4000, help="scenes, the first ones")
    p.add_argument("--prompts", action="store_true", help="leave out the captions")
    o = p.parse_args()
    if o.what == "write":
        write(o.scenes, o.file, o.count, o.prompts)
    else:
        score(o.scenes, o.file)


if __name__ == "__main__":
    main()
