"""More to learn from scenes: find things, describe what is in a box, draw by boxes and label maps, edit.

Each document of these kinds has one right answer, which the oracle reads back. Boxes and maps are those of the image of the scene.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unitok.scenes.conversations import changes
from unitok.scenes.world import COLORS, SHAPES, SIZES, Scene, SceneObject, caption, change_caption

#: The box (x0, y0, x1, y1) of each object of a scene, as fractions of the side of its image.
Boxes = Sequence[tuple[float, float, float, float]]

#: A part of a document: a text, the boxes or points of things, an image of the scene, its labels, or an image of the edited scene.
Piece = tuple[str, object]


@dataclass(frozen=True)
class SceneTask:
    """One document.

    Args:
        kind: of task. given, answer: pieces, read and learned. edited: the scene of the image that is the answer of an edit.
    """

    kind: str
    given: tuple[Piece, ...]
    answer: tuple[Piece, ...]
    edited: Scene | None = None


#: Documents per scene on average, by kind.
AVERAGES = {
    "find": 0.5,
    "point": 0.2,
    "describe_box": 0.3,
    "detect": 0.3,
    "draw_boxes": 0.3,
    "label": 0.3,
    "draw_labels": 0.3,
    "edit": 0.6,
}


def draw_tasks(
    scene: Scene,
    boxes: Boxes,
    rng: np.random.Generator,
    may_be: Callable[[Scene], bool] = lambda scene: True,
    averages: Mapping[str, float] = AVERAGES,
) -> Iterator[SceneTask]:
    """Yield random tasks about a scene.

    boxes: of its objects in the image (`object_boxes`). may_be: whether a scene may come up; an edit that leads to another one is
    not made. averages: documents per scene, by kind.
    """
    for kind in AVERAGES:
        if rng.random() < averages[kind] and (task := make_task(kind, scene, boxes, rng, may_be)) is not None:
            yield task


def make_task(
    kind: str,
    scene: Scene,
    boxes: Boxes,
    rng: np.random.Generator,
    may_be: Callable[[Scene], bool] = lambda scene: True,
) -> SceneTask | None:
    """Return a task of a kind about a scene; None where it has none. Arguments as for `draw_tasks`."""
    chosen = int(rng.integers(len(scene.objects)))
    one, box = scene.objects[chosen], [boxes[chosen]]
    named, image = f"the {one.color} {one.shape}", ("image", scene)
    if kind == "find":
        return SceneTask(kind, (image, ("text", f" find {named}:")), (("box", box),))
    if kind == "point":
        x0, y0, x1, y1 = boxes[chosen]
        return SceneTask(kind, (image, ("text", f" point at {named}:")), (("point", [((x0 + x1) / 2, (y0 + y1) / 2)]),))
    if kind == "describe_box":
        return SceneTask(kind, (image, ("box", box)), (("text", one.words()),))
    pairs = tuple(piece for o, b in zip(scene.objects, boxes, strict=True) for piece in (("text", o.words()), ("box", [b])))
    if kind == "detect":
        return SceneTask(kind, (image, ("text", " find all things:")), pairs)
    if kind == "draw_boxes":
        return SceneTask(kind, (*pairs, ("text", f" on a {scene.background} background")), (image,))
    if kind == "label":
        return SceneTask(kind, (image, ("text", " labels:")), (("labels", scene),))
    if kind == "draw_labels":
        return SceneTask(kind, (("labels", scene), ("text", caption(scene))), (image,))
    edits = [(text, edited) for text, edited in _edits(scene, rng) if may_be(edited)]
    if not edits:
        return None
    text, edited = edits[int(rng.integers(len(edits)))]
    said = f" {change_caption(scene, edited)}"
    return SceneTask(kind, (image, ("text", f" {text}")), (("text", said), ("edited", edited)), edited)


#: What is left of a layout when an object is taken away, by its number.
_WITHOUT = {
    "row": ("one", "one"),
    "column": ("one", "one"),
    "two over one": ("column", "column", "row"),
    "one over two": ("row", "column", "column"),
}


def _edits(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, Scene]]:
    """Some requests that change one thing of a scene, and the scene that each leads to: as many of each kind."""
    options = list(changes(scene))
    backgrounds = [edit for edit in options if edit[1].background != scene.background]
    others = [edit for edit in options if edit[1].background == scene.background]
    sizes = [edit for edit in others if edit[0].endswith(("larger", "smaller"))]
    colors = [edit for edit in others if edit not in sizes]
    for kind in (backgrounds, sizes, colors):
        yield kind[int(rng.integers(len(kind)))]
    i = int(rng.integers(len(scene.objects)))
    one, left = scene.objects[i], scene.objects[:i] + scene.objects[i + 1 :]
    named = f"the {one.color} {one.shape}" if left else "it"
    shape = [s for s in SHAPES if s != one.shape and all((one.color, s) != (o.color, o.shape) for o in left)]
    into = shape[int(rng.integers(len(shape)))]
    changed = (*scene.objects[:i], replace(one, shape=into), *scene.objects[i + 1 :])
    yield f"turn {named} into a {into}", replace(scene, objects=changed)
    if left:
        yield f"remove {named}", Scene(scene.background, _WITHOUT[scene.layout][i], left)
    else:
        new = SceneObject(*(list(names)[int(rng.integers(len(names)))] for names in (COLORS, SHAPES, SIZES)))
        where, layout = (("right of", "row"), ("below", "column"))[int(rng.integers(2))]
        if (new.color, new.shape) != (one.color, one.shape):
            yield f"add {new.words()} {where} it", Scene(scene.background, layout, (one, new))
