"""Scenes as ordinary files: images, audio, captions, questions, and documents of every direction between them.

A folder of all folds is what a decoder and its tokenizers train on: files of every scene, but documents with images and audio of
seen scenes alone; scenes that are kept out stand in text.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import TypedDict

import numpy as np
from PIL import Image
from tqdm import tqdm

from unitok.errors import UserError
from unitok.files import read_json_lines, write_json_lines, write_text
from unitok.media import save_audio, save_image
from unitok.media.maps import label_colors
from unitok.scenes.conversations import Turn, draw_conversation
from unitok.scenes.tasks import AVERAGES as TASK_AVERAGES
from unitok.scenes.tasks import Boxes, SceneTask, draw_tasks
from unitok.scenes.world import (
    KEPT_OUT_PAIRS,
    SAMPLE_RATE,
    Fold,
    Pair,
    Scene,
    SceneObject,
    audio_caption,
    caption,
    draw_scene,
    object_boxes,
    questions,
    render_audio,
    render_image,
    render_labels,
)

#: Parts of a document as `unitok.interleaved` writes them.
Content = list[dict[str, object]]


def _part(content: dict[str, object], loss: bool, role: str = "") -> dict[str, object]:
    return content | ({} if loss else {"loss": False}) | ({"role": role} if role else {})


def _text(text: str, loss: bool = True, role: str = "") -> dict[str, object]:
    return _part({"type": "text", "text": text}, loss, role)


def _file(kind: str, name: int | str, loss: bool = True, role: str = "") -> dict[str, object]:
    name = f"{name:06d}" if isinstance(name, int) else name
    path = f"images/{name}.png" if kind == "image" else f"audio/{name}.wav"
    return _part({"type": kind, "path": path}, loss, role)


QUESTIONS_PER_DOCUMENT = 4
TEXTS_PER_KEPT_OUT_SCENE = 0.5  # of each kind, on average
EDITED = "-9"  # ends the names of images of edited scenes
#: Documents per scene on average, by kind; `tasks.AVERAGES` has those of tasks.
AVERAGES = {
    "caption-image": 0.55,
    "caption-image-audio": 0.2,
    "image-caption": 1.0,
    "image-questions": 0.5,
    "image-audio": 0.2,
    "caption-audio": 0.3,
    "audio-caption": 0.2,
    "story": 0.15,
    "sequel": 0.15,
    "conversation": 0.2,
}


def scene_documents(
    scenes: list[Scene], index: int, after: int, rng: np.random.Generator, averages: Mapping[str, float] = AVERAGES
) -> Iterator[tuple[str, Content]]:
    """Pairs (kind of document, content in the interleaved file format) of the documents that begin with scene `index`.

    Parts that are given have no loss. Given captions name two objects in either order; captions to be learned always in reading
    order, so that there is one right answer. after: the scene that follows in a story, whose caption is learned, or in a sequel, whose
    caption is given. averages: documents per scene, by kind.
    """
    scene = scenes[index]
    given_caption, given_image = _text(caption(scene, rng), loss=False), _file("image", index, loss=False)
    image, audio = _file("image", index), _file("audio", index)
    documents: dict[str, Content] = {
        "caption-image": [given_caption, image],
        "caption-image-audio": [given_caption, image, audio],
        "image-caption": [given_image, _text(caption(scene))],
        "image-questions": [given_image],
        "image-audio": [given_image, audio],
        "caption-audio": [_text(audio_caption(scene), loss=False), audio],
        "audio-caption": [_file("audio", index, loss=False), _text(audio_caption(scene))],
        "story": [given_caption, image, _text(caption(scenes[after])), _file("image", after)],
        "sequel": [given_caption, image, _text(caption(scenes[after], rng), loss=False), _file("image", after)],
    }
    for kind, content in documents.items():
        if rng.random() < averages[kind]:
            if kind == "image-questions":
                pairs = questions(scene)
                for i in rng.permutation(len(pairs))[:QUESTIONS_PER_DOCUMENT]:
                    content += [_text(f" {pairs[i][0]}", loss=False), _text(f" {pairs[i][1]}.")]
            yield kind, content


def conversation_document(turns: list[Turn], index: int) -> tuple[Content, dict[str, Scene]]:
    """The document of a conversation that begins with scene `index`, and the scenes that its files show, by the files' names.

    What the user says has no loss.
    """
    content, scenes = Content(), dict[str, Scene]()
    for turn in turns:
        name = next(
            (name for name, scene in scenes.items() if scene == turn.scene), f"{index:06d}" + f"-{len(scenes)}" * bool(scenes)
        )
        scenes[name] = turn.scene
        if turn.shown:
            content.append(_file("image", name, False, "user"))
        content.append(_text(turn.text, False, "user"))
        content += [_text(turn.answer, role="assistant")] * bool(turn.answer)
        content += [_file(turn.modality, name, role="assistant")] * (turn.modality != "text")
    return content, scenes


def task_document(task: SceneTask, index: int) -> Content:
    """The document of a task about scene `index`; what is given has no loss."""
    content: Content = []
    for kind, value in (*task.given, *task.answer):
        loss = len(content) >= len(task.given)
        if kind == "text":
            content.append(_text(str(value), loss))
        elif kind == "box":
            content.append(_part({"type": kind, "boxes": _rounded(value)}, loss))
        elif kind == "point":
            content.append(_part({"type": kind, "points": _rounded(value)}, loss))
        elif kind == "labels":
            path = f"labels/{index:06d}.png"
            content.append(_part({"type": "image", "path": path, "map": "labels"}, loss))
        else:
            content.append(_file("image", f"{index:06d}{EDITED * (kind == 'edited')}", loss))
    return content


def _rounded(rows: object) -> object:
    return np.round(np.asarray(rows), 4).tolist()


def text_documents(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, Content]]:
    """Documents of text alone, for a scene that is kept out: pairs as of `scene_documents`."""
    for kind, text in (("caption", caption(scene)), ("notes", audio_caption(scene))):
        if rng.random() < TEXTS_PER_KEPT_OUT_SCENE:
            yield kind, [_text(text)]


def _write_media(job: tuple[Path, str, Scene, int, int]) -> None:
    out, name, scene, seed, resolution = job
    places = (seed, *map(int, name.removesuffix(EDITED).split("-")))  # what is edited stays where it was
    rng = np.random.default_rng(places)
    save_image(out / "images" / f"{name}.png", render_image(scene, rng, resolution))
    save_audio(out / "audio" / f"{name}.wav", render_audio(scene, rng), SAMPLE_RATE)
    if (out / "labels").exists() and "-" not in name:
        labels = Image.fromarray(render_labels(scene, np.random.default_rng(places), resolution))
        labels.putpalette(label_colors().reshape(-1).tolist())
        labels.save(out / "labels" / f"{name}.png")


def write_scenes(
    out: Path,
    count: int,
    seed: int = 0,
    max_objects: int = 3,
    fold: Fold | None = None,
    resolution: int = 32,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = False,
    pairs: frozenset[Pair] = KEPT_OUT_PAIRS,
    tasks: bool = False,
    averages: Mapping[str, float] = MappingProxyType({}),
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
        fold: only scenes of this fold; None: of all, but documents with images and audio of seen ones alone.
        resolution: side of the images, pixels.
        workers: processes that draw images and audio.
        overwrite: remove whatever else is in the folder, instead of raising `UserError`.
        progress: show a progress bar.
        pairs: color-shape pairs that are kept out.
        tasks: also write `labels/N.png`, and documents with boxes, points, label maps and edits (`unitok.scenes.tasks`).
        averages: documents per scene by kind, 0 to 1, instead of those of `AVERAGES`.
    """
    per_scene = _averages(averages, tasks)
    if count < 1:
        raise UserError(f"count {count}: at least 1 scene is needed")
    _begin(out, overwrite)
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng, max_objects, fold, pairs) for _ in range(count)]
    shown = [i for i, scene in enumerate(scenes) if fold or scene.fold(pairs) == "seen"]
    following = dict(zip(shown, shown[1:] + shown[:1], strict=True))  # the next scene of a story
    rows, documents = [], []
    media = {f"{i:06d}": scene for i, scene in enumerate(scenes)}  # by the names of their files
    talk, other = np.random.default_rng((seed, 1)), np.random.default_rng((seed, 2))  # apart: scenes do not depend on them
    texts: dict[object, None] = {}
    may_be = partial(_may_be_shown, fold, pairs)
    for i, scene in enumerate(scenes):
        boxes = object_boxes(scene, np.random.default_rng((seed, i))) if tasks else []
        rows.append(_row(scene, i, rng, boxes))
        taught = [*(scene_documents(scenes, i, following[i], rng, per_scene) if i in following else text_documents(scene, rng))]
        if i in following and talk.random() < per_scene["conversation"]:
            turns = draw_conversation(scene, talk, may_be)
            content, shown_scenes = conversation_document(turns, i)
            media |= shown_scenes
            taught.append(("conversation", content))
        for task in draw_tasks(scene, boxes, other, may_be, per_scene) if tasks and i in following else ():
            taught.append((task.kind, task_document(task, i)))
            media |= {} if task.edited is None else {f"{i:06d}{EDITED}": task.edited}
        for kind, content in taught:
            documents.append({"id": f"{i:06d}-{kind}", "content": content})
            texts |= dict.fromkeys(part["text"] for part in content if part["type"] == "text")
    write_json_lines(out / "scenes.jsonl", rows)
    write_text(out / "text.txt", "".join(f"{text}\n" for text in texts))
    _write_files(
        out, media, seed, resolution, ("images", "audio", "labels") if tasks else ("images", "audio"), workers, progress
    )
    write_json_lines(out / "documents.jsonl", documents)


def _begin(out: Path, overwrite: bool) -> None:
    """Make the folder, without `documents.jsonl`. Errors: `UserError` for one that holds something else."""
    if _is_other(out):
        if not overwrite:
            raise UserError(f"{out}: not empty and no scenes; choose another folder, or overwrite to replace all of it")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "documents.jsonl").unlink(missing_ok=True)


def _averages(given: Mapping[str, float], tasks: bool) -> dict[str, float]:
    """Documents per scene of every kind. Errors: `UserError` for one that there is not, and for a number that is none."""
    known = AVERAGES | (TASK_AVERAGES if tasks else {})
    for kind, average in given.items():
        if kind not in known or not 0 <= average <= 1:
            raise UserError(f"average {kind}={average:g}: give a number from 0 to 1 for one of {', '.join(known)}")
    return known | dict(given)


def _may_be_shown(fold: Fold | None, pairs: frozenset[Pair], scene: Scene) -> bool:
    """Whether documents may show a scene that another one is changed into. fold, pairs: as for `write_scenes`."""
    return fold is not None or scene.fold(pairs) == "seen"


def _row(scene: Scene, i: int, rng: np.random.Generator, boxes: Boxes) -> dict[str, object]:
    """What `scenes.jsonl` says of a scene. boxes: of its objects; empty without tasks."""
    row = {"id": f"{i:06d}", "caption": caption(scene, rng), "audio_caption": audio_caption(scene)}
    files = {"image": f"images/{i:06d}.png", "audio": f"audio/{i:06d}.wav", "questions": questions(scene)}
    return row | files | asdict(scene) | ({"labels": f"labels/{i:06d}.png", "boxes": _rounded(boxes)} if boxes else {})


def _write_files(
    out: Path, media: dict[str, Scene], seed: int, resolution: int, folders: tuple[str, ...], workers: int, progress: bool
) -> None:
    """Write images, audio and label maps of scenes by the names of their files."""
    _make_folders(out, folders)
    jobs = [(out, name, scene, seed, resolution) for name, scene in media.items()]
    bar = {"total": len(jobs), "desc": "scenes", "unit": "scene", "mininterval": 1.0, "disable": not progress}
    many = workers > 1 and len(jobs) >= 1000
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if many else None
    with pool or nullcontext():
        for _ in tqdm(pool.map(_write_media, jobs, chunksize=256) if pool else map(_write_media, jobs), **bar):
            pass


def _make_folders(out: Path, names: tuple[str, ...]) -> None:
    """Make the folders of media, without the files of a run that was stopped, or that had another count."""
    for name in names:
        (out / name).mkdir(exist_ok=True)
        for path in (out / name).iterdir():
            if re.fullmatch(r"\d{6,}(-\d)?\.(png|wav)", path.name):
                path.unlink()


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
    """One scene of a folder. `image`, `audio` and `labels`: paths relative to the folder; `question`: one of `questions`; `labels` is "" and
    `boxes` is empty where it was written without tasks."""

    id: str
    scene: Scene
    caption: str
    audio_caption: str
    image: str
    audio: str
    question: str
    answer: str
    labels: str
    boxes: list[tuple[float, float, float, float]]


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
                    "labels": row.get("labels", ""),
                    "boxes": [tuple(box) for box in row.get("boxes", [])],
                }
            )
        except (KeyError, TypeError):
            raise UserError(f"{path}: row {i + 1} is not a scene as this version writes them; make the scenes again") from None
    return scenes
