"""The built-in data: sonified scenes, endless, seeded, written as ordinary files.

A scene is one to three colored shapes on a plain background, with a picture, a caption, a sound, a caption of what is heard,
and questions with answers. Each thing is also a note, in reading order: its color is the pitch, its shape the timbre, its
size the loudness. Pictures are drawn from signed distances (exact edges, any size, no drawing library); notes start at phase
zero, because random phases cost a small codec most of its bits; a tenth of the color-shape pairs is never in training data, so
that composition can be told from memory. `unitok.scenes.oracle` reads files back with this module's tables and renderers alone.
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
from typing import Any

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
SIZES = {"small": 0.15, "large": 0.205}  # radius as a share of the picture's side
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

#: How each attribute sounds.
_PITCH = dict(zip(COLORS, PITCHES, strict=True))
_TIMBRE = dict(zip(SHAPES, TIMBRES, strict=True))
_LOUDNESS = dict(zip(SIZES, LOUDNESSES, strict=True))

#: Color-shape pairs that training never shows: a tenth of the 40, every color and shape still being seen in others.
HELD_OUT = frozenset((list(COLORS)[2 * i], SHAPES[(3 * i + 1) % 5]) for i in range(4))


@dataclass(frozen=True)
class Thing:
    """One colored shape; as a note it has a pitch, a timbre and a loudness."""

    color: str
    shape: str
    size: str

    def words(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"

    def note(self) -> "Note":
        return Note(_PITCH[self.color], _TIMBRE[self.shape], _LOUDNESS[self.size])


@dataclass(frozen=True)
class Note:
    """What can be heard of a thing."""

    pitch: str
    timbre: str
    loudness: str

    def words(self) -> str:
        return f"a {self.loudness} {self.pitch} {self.timbre}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: things in reading order (rows from above, then from the left)."""

    background: str
    layout: str
    things: tuple[Thing, ...]

    @property
    def held_out(self) -> bool:
        """Whether it has a color-shape pair that is kept out of training."""
        return any((t.color, t.shape) in HELD_OUT for t in self.things)

    def notes(self) -> tuple[Note, ...]:
        return tuple(t.note() for t in self.things)


def draw_scene(rng: np.random.Generator, max_objects: int = 3, held_out: bool = False) -> Scene:
    """A random scene of one to `max_objects` things, with (`held_out`) or without pairs that training must not see."""
    while True:
        count = int(rng.integers(1, max_objects + 1))
        layouts = [name for name, (centres, _) in _PLACES.items() if len(centres) == count]
        things = tuple(Thing(*(str(rng.choice(list(x))) for x in (COLORS, SHAPES, SIZES))) for _ in range(count))
        scene = Scene(str(rng.choice(list(BACKGROUNDS))), str(rng.choice(layouts)), things)
        if scene.held_out == held_out and len({(t.color, t.shape) for t in things}) == count:
            return scene


# ---- Words: captions, questions, and their inverses -----------------------------------------------------------------


#: How each layout is said, with its things by number in reading order; of two also in the other order.
_SENTENCES = {
    "one": ("{0}",),
    "row": ("{0} left of {1}", "{1} right of {0}"),
    "column": ("{0} above {1}", "{1} below {0}"),
    "two over one": ("{0} left of {1}, both above {2}",),
    "one over two": ("{0} above {1} left of {2}",),
}


def _captions(scene: Scene) -> list[str]:
    """All captions of a scene."""
    things = [thing.words() for thing in scene.things]
    return [f"{said.format(*things)} on a {scene.background} background" for said in _SENTENCES[scene.layout]]


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Say what is seen, in reading order; with `rng`, two things are named in either order."""
    return _captions(scene)[0 if rng is None else -int(rng.integers(2))]


_THING = r"a ({}) ({}) ({})".format("|".join(SIZES), "|".join(COLORS), "|".join(SHAPES))


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption names, or None if it is no caption of a scene. Inverse of `caption`."""
    named = tuple(Thing(color, shape, size) for size, color, shape in re.findall(_THING, text))
    for layout, background, things in itertools.product(_SENTENCES, BACKGROUNDS, (named, named[::-1])):
        scene = Scene(background, layout, things)
        if len(things) == len(_PLACES[layout][0]) and text.strip() in _captions(scene):
            return scene
    return None


def sound_caption(scene: Scene) -> str:
    """Say what is heard, and nothing that is only seen."""
    return " then ".join(note.words() for note in scene.notes())


_NOTE = r"a ({}) ({}) ({})".format("|".join(LOUDNESSES), "|".join(PITCHES), "|".join(TIMBRES))


def parse_sound_caption(text: str) -> tuple[Note, ...] | None:
    """The notes that a caption of a sound names, or None. Inverse of `sound_caption`."""
    parts = [re.fullmatch(_NOTE, part) for part in text.strip().split(" then ")]
    return None if None in parts else tuple(Note(p[2], p[3], p[1]) for p in parts if p)


def questions(scene: Scene) -> list[tuple[str, str]]:
    """All the questions about a picture that have one answer, each with it (one word)."""
    asked = [
        ("how many things are there?", COUNTS[len(scene.things) - 1]),
        ("what color is the background?", scene.background),
    ]
    for i, t in enumerate(scene.things):
        others = scene.things[:i] + scene.things[i + 1 :]
        if all(o.shape != t.shape for o in others):
            asked.append((f"what color is the {t.shape}?", t.color))
        if all(o.color != t.color for o in others):
            asked.append((f"what shape is the {t.color} thing?", t.shape))
        asked.append((f"what size is the {t.color} {t.shape}?", t.size))
        if len(scene.things) == 2:
            where = {"row": ("left", "right"), "column": ("above", "below")}[scene.layout][i]
            asked.append((f"where is the {t.color} {t.shape}?", where))
    return asked


# ---- Pictures -------------------------------------------------------------------------------------------------------


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
    """The share of each pixel that a shape at the origin covers; x, y: pixel centres relative to it, in pixels."""
    return np.clip(0.5 - _DISTANCES[shape](x, y, radius), 0.0, 1.0)


#: Where the centres lie by layout, as shares of the side, and how far each may move from there (x, y).
_PLACES = {
    "one": ([(0.5, 0.5)], (0.06, 0.06)),
    "row": ([(0.25, 0.5), (0.75, 0.5)], (0.015, 0.03)),
    "column": ([(0.5, 0.25), (0.5, 0.75)], (0.03, 0.015)),
    "two over one": ([(0.25, 0.25), (0.75, 0.25), (0.5, 0.75)], (0.015, 0.015)),
    "one over two": ([(0.5, 0.25), (0.25, 0.75), (0.75, 0.75)], (0.015, 0.015)),
}


def render_picture(scene: Scene, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """uint8 [size, size, 3]: the scene with its things moved a little from their span_positions."""
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    y, x = np.mgrid[0.5:size, 0.5:size].astype(np.float32)
    centres, (move_x, move_y) = _PLACES[scene.layout]
    for thing, (cx, cy) in zip(scene.things, centres, strict=True):
        cx, cy = (cx + rng.uniform(-move_x, move_x)) * size, (cy + rng.uniform(-move_y, move_y)) * size
        alpha = cover(thing.shape, SIZES[thing.size] * size, x - cx, y - cy)[..., None]
        picture += alpha * (np.array(COLORS[thing.color], np.float32) - picture)
    return np.round(picture).astype(np.uint8)


# ---- Sounds ---------------------------------------------------------------------------------------------------------


def render_note(note: Note, rate: int = SAMPLE_RATE, amplitude: float | None = None, decay: float = 2.0) -> np.ndarray:
    """float32 [NOTE_SECONDS * rate] in [-1, 1]: partials from phase zero, 5 ms attack, falling by exp(-decay t / note)."""
    t = np.arange(round(NOTE_SECONDS * rate), dtype=np.float32) / rate
    wave = sum(a * np.sin(2 * np.pi * PITCHES[note.pitch] * p * t) for p, a in TIMBRES[note.timbre])
    envelope = np.minimum(t / 0.005, 1) * np.minimum((NOTE_SECONDS - t) / 0.02, 1) * np.exp(-decay * t / NOTE_SECONDS)
    power = sum(a * a for _, a in TIMBRES[note.timbre]) ** 0.5  # so that equal loudness is equal power
    return (wave * envelope * (LOUDNESSES[note.loudness] if amplitude is None else amplitude) / power / 1.4).astype(np.float32)


def render_sound(scene: Scene, rng: np.random.Generator, rate: int = SAMPLE_RATE) -> np.ndarray:
    """float32 [1, T] in [-1, 1]: one note a thing, in reading order, each a little louder or softer, longer or shorter."""
    waves = []
    for note in scene.notes():
        amplitude = LOUDNESSES[note.loudness] * rng.uniform(0.85, 1.15)
        waves.append(render_note(note, rate, amplitude, decay=rng.uniform(1.5, 2.5)))
    return np.concatenate(waves)[None]


# ---- Documents and files --------------------------------------------------------------------------------------------


def _text(text: str, loss: bool = True) -> dict:
    return {"type": "text", "text": text} | ({} if loss else {"loss": False})


def _file(kind: str, index: int, loss: bool = True) -> dict:
    path = f"images/{index:06d}.png" if kind == "image" else f"sounds/{index:06d}.wav"
    return {"type": kind, "path": path} | ({} if loss else {"loss": False})


QUESTIONS_PER_DOCUMENT = 4


def scene_documents(scenes: list[Scene], index: int, rng: np.random.Generator) -> Iterator[tuple[str, list[dict]]]:
    """The documents that begin with scene `index`: pairs of a kind and its content, in the interleaved file format.

    What is given has no loss; given captions come in either order, those to be learned in one: an answer is one answer.
    """
    scene, after = scenes[index], (index + 1) % len(scenes)
    given_caption, given_image = _text(caption(scene, rng), loss=False), _file("image", index, loss=False)
    image, audio = _file("image", index), _file("audio", index)
    documents = {  # by kind: how many of every scene on average, and the content
        "caption-image": (0.55, [given_caption, image]),
        "caption-image-sound": (0.2, [given_caption, image, audio]),
        "image-caption": (1.0, [given_image, _text(caption(scene))]),
        "image-questions": (0.5, [given_image]),
        "image-sound": (0.2, [given_image, audio]),
        "caption-sound": (0.3, [_text(sound_caption(scene), loss=False), audio]),
        "sound-caption": (0.2, [_file("audio", index, loss=False), _text(sound_caption(scene))]),
        "story": (0.3, [given_caption, image, _text(caption(scenes[after])), _file("image", after)]),
    }
    for kind, (average, content) in documents.items():
        if rng.random() < average:
            if kind == "image-questions":
                asked = questions(scene)
                for i in rng.permutation(len(asked))[:QUESTIONS_PER_DOCUMENT]:
                    content += [_text(f" {asked[i][0]}", loss=False), _text(f" {asked[i][1]}.")]
            yield kind, content


def _write_media(job: tuple[Path, int, Scene, int, int]) -> None:
    out, index, scene, seed, size = job
    rng = np.random.default_rng((seed, index))
    save_image(out / "images" / f"{index:06d}.png", render_picture(scene, rng, size))
    save_audio(out / "sounds" / f"{index:06d}.wav", render_sound(scene, rng), SAMPLE_RATE)


def write_scenes(
    out: Path,
    count: int,
    seed: int = 0,
    max_objects: int = 3,
    held_out: bool = False,
    size: int = 32,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write `count` scenes as real files. Errors: `UserError` where something else lies there; `overwrite` removes that.

    `images/N.png`, `sounds/N.wav`; `scenes.jsonl` (what each shows, its captions and questions); `text.txt` (every text once, a
    line each, to train a tokenizer); last `documents.jsonl` (in every direction), without which the folder is not whole. Bytes
    depend only on count, seed, max_objects (things in a scene), held_out (only scenes with pairs that training never shows) and size
    (pixels a side). Earlier scenes are replaced, other files stay.
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
    rows: list[dict[str, Any]] = []
    documents: list[dict[str, Any]] = []
    for i, scene in enumerate(scenes):
        row = {"id": f"{i:06d}", "caption": caption(scene, rng), "sound_caption": sound_caption(scene)}
        media = {"image": f"images/{i:06d}.png", "audio": f"sounds/{i:06d}.wav", "questions": questions(scene)}
        rows.append(row | media | asdict(scene))
        documents += [{"id": f"{i:06d}-{kind}", "content": content} for kind, content in scene_documents(scenes, i, rng)]
    write_json_lines(out / "scenes.jsonl", rows)
    texts = dict.fromkeys(part["text"] for d in documents for part in d["content"] if part["type"] == "text")
    write_text(out / "text.txt", "\n".join(texts) + "\n")
    for name in ("images", "sounds"):
        (out / name).mkdir(exist_ok=True)
        for path in (out / name).iterdir():  # of a run that was stopped, or of another count
            if re.fullmatch(r"\d{6,}\.(png|wav)", path.name):
                path.unlink()
    jobs = [(out, i, scene, seed, size) for i, scene in enumerate(scenes)]
    bar = {"total": count, "desc": "scenes", "unit": "scene", "mininterval": 1.0, "disable": not progress}
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 and count >= 1000 else None
    with pool or nullcontext():
        for _ in tqdm(pool.map(_write_media, jobs, chunksize=256) if pool else map(_write_media, jobs), **bar):
            pass
    write_json_lines(out / "documents.jsonl", documents)


def _is_other(out: Path) -> bool:
    """Whether a folder holds something else than scenes."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    if not out.exists() or {f.name for f in out.iterdir()} <= {".scenes.jsonl.partial"}:  # written first; of a kill
        return False
    try:
        with open(out / "scenes.jsonl", "rb") as file:
            return file.read(28) != b'{"id": "000000", "caption": '
    except OSError:
        return True


def read_scenes(folder: Path, count: int = 0) -> list[dict]:
    """Lines of `scenes.jsonl`, with `scene`, `question` and `answer`; errors: `UserError` for none, or fewer than `count`."""
    path = Path(folder) / "scenes.jsonl"
    if not path.exists():
        raise UserError(f"{folder}: no scenes there (no scenes.jsonl); make some with `unitok scenes`")
    rows = [row for _, row in read_json_lines(path)]
    if len(rows) < count:
        raise UserError(f"{folder}: {len(rows)} scenes, count {count} asks for more")
    for i, row in enumerate(rows):
        if isinstance(row, UserError):
            raise row
        things = tuple(Thing(**thing) for thing in row.pop("things"))
        row["scene"] = Scene(row.pop("background"), row.pop("layout"), things)
        question, row["answer"] = row["questions"][i % len(row["questions"])]
        row["question"] = f" {question}"
    return rows
