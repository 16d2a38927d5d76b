"""The built-in data: sonified scenes, drawn from a seed in any number and written as ordinary files.

A scene is one to three objects (colored shapes) on a plain background. It has an image, a caption, audio, a caption of the audio,
and questions with answers. In the audio each object is a note, in reading order: its color is the pitch, its shape the timbre,
its size the loudness. Images are drawn from signed distances (exact edges, any size, no drawing library). Notes start at phase
zero, because random phases cost a small codec most of its bits. Training data never has a tenth of the color-shape pairs, so
that scores can tell composition from memory. `unitok.scenes.oracle` reads files back with the tables and renderers of this
module.
"""

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypedDict

import numpy as np
from tqdm import tqdm

from unitok.errors import UserError
from unitok.files import read_json_lines, write_json_lines, write_text
from unitok.media import save_audio, save_image

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

#: Color-shape pairs that training data never has: a tenth of the 40. Every color and shape is still seen in other pairs.
HELD_OUT = frozenset((list(COLORS)[2 * i], SHAPES[(3 * i + 1) % 5]) for i in range(4))


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

    @property
    def held_out(self) -> bool:
        """Whether it has a color-shape pair that is kept out of training data."""
        return any((o.color, o.shape) in HELD_OUT for o in self.objects)

    def notes(self) -> tuple[Note, ...]:
        """What the audio of this scene plays, in order."""
        return tuple(o.note() for o in self.objects)


def draw_scene(rng: np.random.Generator, max_objects: int = 3, held_out: bool = False) -> Scene:
    """A random scene of one to `max_objects` objects.

    held_out: whether it has a color-shape pair that is kept out of training data; without it, it has none.
    """
    while True:
        count = int(rng.integers(1, max_objects + 1))
        layouts = [name for name, (centers, _) in _CENTERS.items() if len(centers) == count]
        objects = tuple(SceneObject(*(str(rng.choice(list(x))) for x in (COLORS, SHAPES, SIZES))) for _ in range(count))
        scene = Scene(str(rng.choice(list(BACKGROUNDS))), str(rng.choice(layouts)), objects)
        if scene.held_out == held_out and len({(o.color, o.shape) for o in objects}) == count:
            return scene


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
            where = {"row": ("left", "right"), "column": ("above", "below")}[scene.layout][i]
            pairs.append((f"where is the {one.color} {one.shape}?", where))
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
    y, x = np.mgrid[0.5:size, 0.5:size].astype(np.float32)
    centers, (move_x, move_y) = _CENTERS[scene.layout]
    for one, (cx, cy) in zip(scene.objects, centers, strict=True):
        cx, cy = (cx + rng.uniform(-move_x, move_x)) * size, (cy + rng.uniform(-move_y, move_y)) * size
        alpha = cover(one.shape, SIZES[one.size] * size, x - cx, y - cy)[..., None]
        image += alpha * (np.array(COLORS[one.color], np.float32) - image)
    return np.round(image).astype(np.uint8)


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


# ---- Documents and files --------------------------------------------------------------------------------------------


#: Parts of a document as `unitok.interleaved` writes them.
Content = list[dict[str, str | bool]]


def _text(text: str, loss: bool = True) -> dict[str, str | bool]:
    return {"type": "text", "text": text} | ({} if loss else {"loss": False})


def _file(kind: str, index: int, loss: bool = True) -> dict[str, str | bool]:
    path = f"images/{index:06d}.png" if kind == "image" else f"audio/{index:06d}.wav"
    return {"type": kind, "path": path} | ({} if loss else {"loss": False})


QUESTIONS_PER_DOCUMENT = 4


def scene_documents(scenes: list[Scene], index: int, rng: np.random.Generator) -> Iterator[tuple[str, Content]]:
    """Pairs (kind of document, content in the interleaved file format) of the documents that begin with scene `index`.

    Parts that are given have no loss. Given captions name two objects in either order; captions to be learned always in reading
    order, so that there is one right answer.
    """
    scene, after = scenes[index], (index + 1) % len(scenes)
    given_caption, given_image = _text(caption(scene, rng), loss=False), _file("image", index, loss=False)
    image, audio = _file("image", index), _file("audio", index)
    documents: dict[str, tuple[float, Content]] = {  # by kind: documents per scene on average, and the content
        "caption-image": (0.55, [given_caption, image]),
        "caption-image-audio": (0.2, [given_caption, image, audio]),
        "image-caption": (1.0, [given_image, _text(caption(scene))]),
        "image-questions": (0.5, [given_image]),
        "image-audio": (0.2, [given_image, audio]),
        "caption-audio": (0.3, [_text(audio_caption(scene), loss=False), audio]),
        "audio-caption": (0.2, [_file("audio", index, loss=False), _text(audio_caption(scene))]),
        "story": (0.3, [given_caption, image, _text(caption(scenes[after])), _file("image", after)]),
    }
    for kind, (average, content) in documents.items():
        if rng.random() < average:
            if kind == "image-questions":
                pairs = questions(scene)
                for i in rng.permutation(len(pairs))[:QUESTIONS_PER_DOCUMENT]:
                    content += [_text(f" {pairs[i][0]}", loss=False), _text(f" {pairs[i][1]}.")]
            yield kind, content


def _write_media(job: tuple[Path, int, Scene, int, int]) -> None:
    out, index, scene, seed, resolution = job
    rng = np.random.default_rng((seed, index))
    save_image(out / "images" / f"{index:06d}.png", render_image(scene, rng, resolution))
    save_audio(out / "audio" / f"{index:06d}.wav", render_audio(scene, rng), SAMPLE_RATE)


def write_scenes(
    out: Path,
    count: int,
    seed: int = 0,
    max_objects: int = 3,
    held_out: bool = False,
    resolution: int = 32,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write `count` scenes as ordinary files; the same arguments give the same bytes.

    The folder gets `images/N.png` and `audio/N.wav`; `scenes.jsonl` (for each scene its objects, captions and questions);
    `text.txt` (every text once, one per line, to train a text tokenizer); and `documents.jsonl` (documents in every direction),
    written last: a folder without it is incomplete. Earlier scenes are replaced, other files are kept.

    Args:
        out: folder to write.
        count: number of scenes.
        seed: of all random choices.
        max_objects: most objects in a scene, 1 to 3.
        held_out: only scenes with color-shape pairs that training data never has.
        resolution: side of the images, pixels.
        workers: processes that draw images and audio.
        overwrite: remove whatever else is in the folder, instead of raising `UserError`.
        progress: show a progress bar.
    """
    if count < 1:
        raise UserError(f"count {count}: at least 1 scene is needed")
    if _is_other(out):
        if not overwrite:
            raise UserError(f"{out}: not empty and no scenes; choose another folder, or overwrite to replace all of it")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "documents.jsonl").unlink(missing_ok=True)
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng, max_objects, held_out) for _ in range(count)]
    rows, documents = [], []
    texts: dict[str | bool, None] = {}
    for i, scene in enumerate(scenes):
        row = {"id": f"{i:06d}", "caption": caption(scene, rng), "audio_caption": audio_caption(scene)}
        media = {"image": f"images/{i:06d}.png", "audio": f"audio/{i:06d}.wav", "questions": questions(scene)}
        rows.append(row | media | asdict(scene))
        for kind, content in scene_documents(scenes, i, rng):
            documents.append({"id": f"{i:06d}-{kind}", "content": content})
            texts |= dict.fromkeys(part["text"] for part in content if part["type"] == "text")
    write_json_lines(out / "scenes.jsonl", rows)
    write_text(out / "text.txt", "".join(f"{text}\n" for text in texts))
    for name in ("images", "audio"):
        (out / name).mkdir(exist_ok=True)
        for path in (out / name).iterdir():  # from a run that was stopped, or that had another count
            if re.fullmatch(r"\d{6,}\.(png|wav)", path.name):
                path.unlink()
    jobs = [(out, i, scene, seed, resolution) for i, scene in enumerate(scenes)]
    bar = {"total": count, "desc": "scenes", "unit": "scene", "mininterval": 1.0, "disable": not progress}
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 and count >= 1000 else None
    with pool or nullcontext():
        for _ in tqdm(pool.map(_write_media, jobs, chunksize=256) if pool else map(_write_media, jobs), **bar):
            pass
    write_json_lines(out / "documents.jsonl", documents)


def _is_other(out: Path) -> bool:
    """Whether a folder has files but is not a folder of scenes."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    if not out.exists() or {f.name for f in out.iterdir()} <= {
        ".scenes.jsonl.partial"
    }:  # all that is left of a run that was killed early
        return False
    try:
        with open(out / "scenes.jsonl", "rb") as file:
            return file.read(28) != b'{"id": "000000", "caption": '
    except OSError:
        return True


class SceneRow(TypedDict):
    """One scene of a folder. `image` and `audio`: paths relative to the folder; `question`: one of `questions`."""

    id: str
    scene: Scene
    caption: str
    audio_caption: str
    image: str
    audio: str
    question: str
    answer: str


def read_scenes(folder: Path, count: int = 0) -> list[SceneRow]:
    """The scenes that `scenes.jsonl` of a folder lists. Errors: `UserError` where there are none, or fewer than `count`."""
    path = Path(folder) / "scenes.jsonl"
    if not path.exists():
        raise UserError(f"{folder}: no scenes.jsonl in this folder; make scenes with `unitok scenes`")
    rows = [row for _, row in read_json_lines(path)]
    if len(rows) < count:
        raise UserError(f"{folder}: has {len(rows)} scenes, fewer than count {count}")
    scenes: list[SceneRow] = []
    for i, row in enumerate(rows):
        if isinstance(row, UserError):
            raise row
        try:
            question, answer = row["questions"][i % len(row["questions"])]
            scenes.append(
                {
                    "id": row["id"],
                    "scene": Scene(row["background"], row["layout"], tuple(SceneObject(**fields) for fields in row["objects"])),
                    "caption": row["caption"],
                    "audio_caption": row["audio_caption"],
                    "image": row["image"],
                    "audio": row["audio"],
                    "question": f" {question}",
                    "answer": answer,
                }
            )
        except (KeyError, TypeError):
            raise UserError(f"{path}: row {i + 1} is not a scene as this version writes them; make the scenes again") from None
    return scenes
