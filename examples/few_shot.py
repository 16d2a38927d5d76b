"""Few-shot prompts: earlier pairs of image and answer are turns of a conversation; see docs/conversations.md.

python examples/few_shot.py [BUNDLE] [--scenes 100] [--shots 0 1 2]

The user shows images of one object and says nothing; each earlier answer of the assistant names its color. How often is the last answer
the color of the last image?
"""

import argparse

import numpy as np
from PIL import Image

from unitok import Unitok
from unitok.scenes.world import COLORS, Scene, draw_scene, render_image


def show(scene: Scene, rng: np.random.Generator, side: int) -> dict[str, object]:
    """Return a message of the user: the image of a scene."""
    return {"role": "user", "content": [{"type": "image", "image": Image.fromarray(render_image(scene, rng, side))}]}


def right(unitok: Unitok, scenes: int, shots: int) -> float:
    """Return the fraction of answers that name the color of the last image, and no other."""
    rng, found, side = np.random.default_rng(0), 0, unitok.image.config.resolution
    for _ in range(scenes):
        *earlier, last = [draw_scene(rng, 1) for _ in range(shots + 1)]
        messages: list[dict[str, object]] = []
        for scene in earlier:
            messages += [show(scene, rng, side), {"role": "assistant", "content": f"{scene.objects[0].color}."}]
        answer = unitok.chat([*messages, show(last, rng, side)], "text", seed=0, max_new_tokens=40, temperature=0).text
        found += {color for color in COLORS if color in answer} == {last.objects[0].color} and len(answer) < 12
    return found / scenes


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle", nargs="?", default="scenes")
    p.add_argument("--scenes", type=int, default=100)
    p.add_argument("--shots", type=int, nargs="+", default=[0, 1, 2])
    o = p.parse_args()
    unitok = Unitok.from_pretrained(o.bundle)
    for shots in o.shots:
        print(f"{shots} shots: {100 * right(unitok, o.scenes, shots):.0f} % of {o.scenes} answers are the color alone")


if __name__ == "__main__":
    main()
