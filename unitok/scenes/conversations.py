"""Conversations about a scene, of two to four turns: draw it, what color is it, make it larger, now play it.

Each turn says what the user says and what the right answer is, so that an oracle can judge every turn.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from unitok.scenes.world import BACKGROUNDS, COLORS, SIZES, Scene, SceneObject, caption, change_caption, questions

MOST_TURNS = 4


@dataclass(frozen=True)
class Turn:
    """What the user says, and the right answer.

    Args:
        kind: `draw`, `describe`, `ask`, `change` or `play`.
        text: what the user says.
        shown: whether the user shows an image of the scene before it.
        scene: that holds after the turn.
        modality: of the answer: an image of the scene, its audio, or a text.
        answer: the text of the answer, or what stands before an image that was changed (`change_caption`); else "".
    """

    kind: str
    text: str
    shown: bool
    scene: Scene
    modality: str
    answer: str = ""


def draw_conversation(
    scene: Scene, rng: np.random.Generator, may_be: Callable[[Scene], bool] = lambda scene: True
) -> list[Turn]:
    """Return a random conversation of two to `MOST_TURNS` turns that begins with a scene; at most two of its turns are images.

    may_be: whether a scene may come up; a change that leads to another one is not made.
    """
    if rng.random() < 0.5:
        turns = [Turn("draw", f"draw {caption(scene, rng)}", False, scene, "image")]
    else:
        turns = [Turn("describe", "what is this?", True, scene, "text", caption(scene))]
    count = int(rng.integers(2, MOST_TURNS + 1))
    while len(turns) < count:
        now = turns[-1].scene
        kinds = ["ask", "play"] if any(turn.kind == "change" for turn in turns) else ["ask", "change", "play"]
        kind = kinds[int(rng.integers(len(kinds)))]
        if kind == "ask":
            pairs = questions(now)
            question, answer = pairs[int(rng.integers(len(pairs)))]
            turns.append(Turn("ask", question, False, now, "text", f"{answer}."))
        elif kind == "play":
            turns.append(Turn("play", "now play it", False, now, "audio"))
        else:
            possible = [(text, changed) for text, changed in changes(now) if may_be(changed)]
            if possible:
                text, changed = possible[int(rng.integers(len(possible)))]
                turns.append(Turn("change", text, False, changed, "image", change_caption(now, changed)))
    return turns


def changes(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """Every request that changes one thing of a scene, with the scene that it leads to."""
    for background in BACKGROUNDS:
        if background != scene.background:
            yield f"make the background {background}", replace(scene, background=background)
    for i, one in enumerate(scene.objects):
        others = scene.objects[:i] + scene.objects[i + 1 :]
        alone = not others
        named = "it" if alone else f"the {one.color} {one.shape}"
        (size,) = set(SIZES) - {one.size}
        yield f"make {named} {'larger' if size == 'large' else 'smaller'}", _with(scene, i, replace(one, size=size))
        for color in COLORS:
            if color != one.color and all((color, one.shape) != (o.color, o.shape) for o in others):
                yield f"make {named} {color}", _with(scene, i, replace(one, color=color))


def _with(scene: Scene, i: int, one: SceneObject) -> Scene:
    return replace(scene, objects=(*scene.objects[:i], one, *scene.objects[i + 1 :]))
