"""The built-in world: sonified scenes, drawn from a seed in any number.

A scene is one to three objects (colored shapes) on a plain background. It has an image, a caption, audio, a caption of the audio,
and questions with answers. In the audio each object is a note, in reading order: its color is the pitch, its shape the timbre,
its size the loudness. Images are drawn from signed distances (exact edges, any size, no drawing library). Notes start at phase
zero, because random phases cost a small codec most of its bits. Two folds of scenes are never
shown to a decoder in training, so that scores can tell composition from memory (`Fold`). `unitok.scenes.oracle` reads files back
with the tables and renderers of this module; `unitok.scenes.files` writes them.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 40),
    "green": (30, 170, 60),
    "blue": (40, 70, 235),
    "yellow": (245, 225, 40),
    "purple": (140, 40, 180),
    "cyan": (40, 215, 230),
    "orange": (250, 130, 20),
    "pink": (255, 150, 200),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 0.15, "large": 0.205}  # radius, as a fraction of the side of the image
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (16, 16, 16)}
COUNTS = ("one", "two", "three")

# C major from C4 to C5, Hz, in the order of COLORS; timbres in the order of SHAPES: (partial, amplitude) pairs.
PITCHES = {"C4": 261.6, "D4": 293.7, "E4": 329.6, "F4": 349.2, "G4": 392.0, "A4": 440.0, "B4": 493.9, "C5": 523.3}
TIMBRES: dict[str, tuple[tuple[float, float], ...]] = {
    "flute": ((1, 1.0),),
    "clarinet": ((1, 0.75), (3, 0.45), (5, 0.25)),
    "violin": ((1, 0.6), (2, 0.5), (3, 0.3), (4, 0.25), (5, 0.15)),
    "bell": ((1, 0.35), (2.76, 0.65), (5.4, 0.35)),
    "organ": ((1, 0.55), (2, 0.65), (4, 0.35)),
}
LOUDNESSES = {"soft": 0.22, "loud": 0.7}  # amplitude, in the order of SIZES
NOTE_SECONDS = 0.4
SAMPLE_RATE = 8_000  # Hz

#: What each attribute becomes in the audio.
_PITCH = dict(zip(COLORS, PITCHES, strict=True))
_TIMBRE = dict(zip(SHAPES, TIMBRES, strict=True))
_LOUDNESS = dict(zip(SIZES, LOUDNESSES, strict=True))

Pair = tuple[str, str]  # color and shape

#: Scenes by what a decoder's training has of them. `seen`: it has documents of them in every direction. `composed`: a tenth of all
#: sequences of objects, which none of its documents shows, though each color-shape pair is shown. `systematic`: scenes with a
#: color-shape pair that none of its documents shows. Text alone names both; tokenizers see all three.
Fold = Literal["seen", "composed", "systematic"]


def kept_out_pairs(choice: int = 0) -> frozenset[Pair]:
    """A tenth of the color-shape pairs, four of 40, of different colors; every color and shape is seen in other pairs.

    choice: 0 for the pairs of the reported scores; 1 for others, to choose recipes by.
    """
    return frozenset((list(COLORS)[2 * i + choice], SHAPES[(3 * i + 1 + choice) % 5]) for i in range(4))


KEPT_OUT_PAIRS = kept_out_pairs()


@dataclass(frozen=True)
class SceneObject:
    """One colored shape of a scene; in the audio it is a note."""

    color: str
    shape: str
    size: str

    def words(self) -> str:
        """Its part of a caption: "a large red circle"."""
        return f"a {self.size} {self.color} {self.shape}"

    def note(self) -> "Note":
        """The note that it becomes in the audio."""
        return Note(_PITCH[self.color], _TIMBRE[self.shape], _LOUDNESS[self.size])


@dataclass(frozen=True)
class Note:
    """One note of the audio."""

    pitch: str
    timbre: str
    loudness: str

    def words(self) -> str:
        """Its part of a caption of the audio: "a loud C4 flute"."""
        return f"a {self.loudness} {self.pitch} {self.timbre}"


@dataclass(frozen=True)
class Scene:
    """What an image shows: objects in reading order (rows from top to bottom, each from left to right)."""

    background: str
    layout: str
    objects: tuple[SceneObject, ...]

    def fold(self, pairs: frozenset[Pair] = KEPT_OUT_PAIRS) -> Fold:
        """The fold that it belongs to. pairs: color-shape pairs that are kept out."""
        if any((o.color, o.shape) in pairs for o in self.objects):
            return "systematic"
        objects = "; ".join(o.words() for o in self.objects)
        return "composed" if zlib.crc32(objects.encode()) % 10 == 0 else "seen"

    def notes(self) -> tuple[Note, ...]:
        """What the audio of this scene plays, in order."""
        return tuple(o.note() for o in self.objects)


def draw_scene(
    rng: np.random.Generator, max_objects: int = 3, fold: Fold | None = "seen", pairs: frozenset[Pair] = KEPT_OUT_PAIRS
) -> Scene:
    """A random scene of one to `max_objects` objects, of different color-shape pairs.

    fold: the one that it belongs to; None: any. pairs: color-shape pairs that are kept out.
    """
    count = int(rng.integers(1, max_objects + 1))  # drawn once, so that all folds have equally many objects
    layouts = [name for name, (centers, _) in _CENTERS.items() if len(centers) == count]
    while True:
        objects = tuple(SceneObject(*(_draw(rng, names) for names in (COLORS, SHAPES, SIZES))) for _ in range(count))
        scene = Scene(_draw(rng, BACKGROUNDS), _draw(rng, layouts), objects)
        if len({(o.color, o.shape) for o in objects}) == count and fold in (None, scene.fold(pairs)):
            return scene


def _draw(rng: np.random.Generator, names: Collection[str]) -> str:
    return list(names)[int(rng.integers(len(names)))]


# ---- Words: captions, questions, and their inverses -----------------------------------------------------------------


#: Templates of captions by layout. Numbers are objects in reading order; two objects may also be named in the other order.
_SENTENCES = {
    "one": ("{0}",),
    "row": ("{0} left of {1}", "{1} right of {0}"),
    "column": ("{0} above {1}", "{1} below {0}"),
    "two over one": ("{0} left of {1}, both above {2}",),
    "one over two": ("{0} above {1} left of {2}",),
}


def _captions(scene: Scene) -> list[str]:
    """Every caption that a scene may have."""
    objects = [o.words() for o in scene.objects]
    return [f"{sentence.format(*objects)} on a {scene.background} background" for sentence in _SENTENCES[scene.layout]]


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A caption of the image, in reading order; with `rng`, two objects are named in either order."""
    return _captions(scene)[0 if rng is None else -int(rng.integers(2))]


_OBJECT = r"a ({}) ({}) ({})".format("|".join(SIZES), "|".join(COLORS), "|".join(SHAPES))


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption describes, or None if the text is no such caption. Inverse of `caption`."""
    named = tuple(SceneObject(color, shape, size) for size, color, shape in re.findall(_OBJECT, text))
    for layout, background, objects in itertools.product(_SENTENCES, BACKGROUNDS, (named, named[::-1])):
        scene = Scene(background, layout, objects)
        if len(objects) == len(_CENTERS[layout][0]) and text.strip() in _captions(scene):
            return scene
    return None


#: Where each object of a layout stands, in a word.
_PLACES = {
    "one": ("it",),
    "row": ("left", "right"),
    "column": ("above", "below"),
    "two over one": ("left", "right", "below"),
    "one over two": ("above", "left", "right"),
}


def change_caption(before: Scene, after: Scene) -> str:
    """Where something changes, what it was and what it is, and the caption of the whole: *right, a small red ring then a small blue ring, now a
    large cyan cross left of a small blue ring on a white background*. One thing changes, is taken away, or is added last.

    Each step is a small one for a decoder that reads a request before it: where is what the request names, what is it, what becomes of it (docs/notes.md).
    """
    old, new = ([one.words() for one in scene.objects] for scene in (before, after))
    if before.background != after.background:
        place, pair = "background", (before.background, after.background)
    elif len(old) < len(new):
        place, pair = _PLACES[after.layout][-1], ("nothing", new[-1])
    else:
        removed = len(old) > len(new)
        i = next(i for i, words in enumerate(old) if (words not in new if removed else words != new[i]))
        place, pair = _PLACES[before.layout][i], (old[i], "nothing" if removed else new[i])
    return f"{place}, {' then '.join(pair)}, now {caption(after)}"


def audio_caption(scene: Scene) -> str:
    """A caption of the audio: its notes in order, nothing that only the image shows."""
    return " then ".join(note.words() for note in scene.notes())


_NOTE = r"a ({}) ({}) ({})".format("|".join(LOUDNESSES), "|".join(PITCHES), "|".join(TIMBRES))


def parse_audio_caption(text: str) -> tuple[Note, ...] | None:
    """The notes that a caption of audio names, or None if the text is no such caption. Inverse of `audio_caption`."""
    parts = [re.fullmatch(_NOTE, part) for part in text.strip().split(" then ")]
    return None if None in parts else tuple(Note(p[2], p[3], p[1]) for p in parts if p)


def questions(scene: Scene) -> list[tuple[str, str]]:
    """All (question, answer) pairs about an image for which the answer is unique; answers are one word."""
    pairs = [
        ("how many things are there?", COUNTS[len(scene.objects) - 1]),
        ("what color is the background?", scene.background),
    ]
    for i, one in enumerate(scene.objects):
        others = scene.objects[:i] + scene.objects[i + 1 :]
        if all(o.shape != one.shape for o in others):
            pairs.append((f"what color is the {one.shape}?", one.color))
        if all(o.color != one.color for o in others):
            pairs.append((f"what shape is the {one.color} thing?", one.shape))
        pairs.append((f"what size is the {one.color} {one.shape}?", one.size))
        if len(scene.objects) == 2:
            pairs.append((f"where is the {one.color} {one.shape}?", _PLACES[scene.layout][i]))
    return pairs


# ---- Images ---------------------------------------------------------------------------------------------------------


def _inside_triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    apothem = 0.55 * r  # of an equilateral triangle with its tip at (0, -1.1 r)
    return np.maximum.reduce([y - apothem, 0.866 * x - 0.5 * y - apothem, -0.866 * x - 0.5 * y - apothem])


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(np.abs(x), np.abs(y)) - 0.88 * r,
    "triangle": _inside_triangle,
    "cross": lambda x, y, r: np.minimum(
        np.maximum(np.abs(x) - r, np.abs(y) - 0.32 * r), np.maximum(np.abs(y) - r, np.abs(x) - 0.32 * r)
    ),
    "ring": lambda x, y, r: np.abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r,
}


def cover(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers, in [0, 1]. x, y: pixel centers relative to the center of the shape, in pixels."""
    return np.clip(0.5 - _DISTANCES[shape](x, y, radius), 0.0, 1.0)


#: Centers of the objects by layout, as fractions of the side, and how far each may move from there (x, y).
_CENTERS = {
    "one": ([(0.5, 0.5)], (0.06, 0.06)),
    "row": ([(0.25, 0.5), (0.75, 0.5)], (0.015, 0.03)),
    "column": ([(0.5, 0.25), (0.5, 0.75)], (0.03, 0.015)),
    "two over one": ([(0.25, 0.25), (0.75, 0.25), (0.5, 0.75)], (0.015, 0.015)),
    "one over two": ([(0.5, 0.25), (0.25, 0.75), (0.75, 0.75)], (0.015, 0.015)),
}


def render_image(scene: Scene, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """uint8 [size, size, 3]: the image of a scene, its objects moved a little from the centers of the layout."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for one, alpha in zip(scene.objects, _covers(scene, rng, size), strict=True):
        image += alpha[..., None] * (np.array(COLORS[one.color], np.float32) - image)
    return np.round(image).astype(np.uint8)


def render_labels(scene: Scene, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """uint8 [size, size]: the label of each pixel of the image that the same `rng` draws: 0 is the background, then shapes from 1 on."""
    labels = np.zeros((size, size), np.uint8)
    for one, alpha in zip(scene.objects, _covers(scene, rng, size), strict=True):
        labels[alpha > 0.5] = SHAPES.index(one.shape) + 1
    return labels


def object_centers(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """The center (x, y) of each object in the image that the same `rng` draws, as fractions of the side."""
    centers, (move_x, move_y) = _CENTERS[scene.layout]
    return [(cx + rng.uniform(-move_x, move_x), cy + rng.uniform(-move_y, move_y)) for cx, cy in centers]


#: How far each shape reaches from its center to the left, up, right and down, in radii.
_EXTENTS = {
    "circle": (1, 1, 1, 1),
    "square": (0.88, 0.88, 0.88, 0.88),
    "triangle": (0.953, 1.1, 0.953, 0.55),
    "cross": (1, 1, 1, 1),
    "ring": (1, 1, 1, 1),
}


def object_boxes(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """The box (x0, y0, x1, y1) of each object in the image that the same `rng` draws, as fractions of the side."""
    boxes = []
    for one, (x, y) in zip(scene.objects, object_centers(scene, rng), strict=True):
        left, up, right, down = (SIZES[one.size] * reach for reach in _EXTENTS[one.shape])
        boxes.append((x - left, y - up, x + right, y + down))
    return boxes


def _covers(scene: Scene, rng: np.random.Generator, size: int) -> list[np.ndarray]:
    """How much of each pixel each object covers, float32 [size, size] in [0, 1]."""
    y, x = np.mgrid[0.5:size, 0.5:size].astype(np.float32)
    places = zip(scene.objects, object_centers(scene, rng), strict=True)
    return [cover(one.shape, SIZES[one.size] * size, x - cx * size, y - cy * size) for one, (cx, cy) in places]


# ---- Audio ----------------------------------------------------------------------------------------------------------


def render_note(note: Note, rate: int = SAMPLE_RATE, amplitude: float | None = None, decay: float = 2.0) -> np.ndarray:
    """float32 [NOTE_SECONDS * rate] in [-1, 1]: one note. Partials start at phase zero; attack 5 ms, decay exp(-decay t / length).

    rate: Hz. amplitude: default that of the note's loudness.
    """
    t = np.arange(round(NOTE_SECONDS * rate), dtype=np.float32) / rate
    wave = sum(a * np.sin(2 * np.pi * PITCHES[note.pitch] * p * t) for p, a in TIMBRES[note.timbre])
    envelope = np.minimum(t / 0.005, 1) * np.minimum((NOTE_SECONDS - t) / 0.02, 1) * np.exp(-decay * t / NOTE_SECONDS)
    power = sum(a * a for _, a in TIMBRES[note.timbre]) ** 0.5  # so that equal loudness is equal power
    return (wave * envelope * (LOUDNESSES[note.loudness] if amplitude is None else amplitude) / power / 1.4).astype(np.float32)


def render_audio(scene: Scene, rng: np.random.Generator, rate: int = SAMPLE_RATE) -> np.ndarray:
    """float32 [1, T] in [-1, 1]: the audio of a scene, one note per object; loudness and decay vary a little. rate: Hz."""
    waves = []
    for note in scene.notes():
        amplitude = LOUDNESSES[note.loudness] * rng.uniform(0.85, 1.15)
        waves.append(render_note(note, rate, amplitude, decay=rng.uniform(1.5, 2.5)))
    return np.concatenate(waves)[None]
