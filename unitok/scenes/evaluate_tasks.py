"""What `unitok eval --scenes` measures on tasks (`unitok.scenes.tasks`) and on holes: each score is a fraction of right answers, 0 to 1.

`find`, `describe_box`, … as the kinds of tasks: a box is right from an intersection over union (IoU) of 0.5 on, a point in its box, a
map of labels from a mean IoU of 0.5 on, an image and a text where everything in them is. `fill_image`, `fill_text`, `fill_audio`: one
thing of the image, one word of the caption, one note of the audio is made anew, given the caption (of text: the image).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from unitok.api import Unitok
from unitok.document import Document, Part, RawDocument
from unitok.evaluate.boxes import box_iou
from unitok.generation_config import GenerationConfig
from unitok.media import load_image
from unitok.media.maps import SMOOTH, rgb_to_labels
from unitok.sample.fill import BLANK
from unitok.sample.outputs import Output
from unitok.sample.requests import edit_plan
from unitok.scenes.files import SceneRow
from unitok.scenes.oracle import read_audio, read_image, same_notes, to_bytes
from unitok.scenes.tasks import AVERAGES, SceneTask, make_task
from unitok.scenes.world import NOTE_SECONDS, SHAPES, caption

#: What each kind of task makes.
_MODALITIES = {"find": "box:1", "point": "point:1", "describe_box": "text", "draw_boxes": "image", "label": "image"}
_MODALITIES |= {"draw_labels": "image", "edit": "image"}


def mean_iou(a: np.ndarray, b: np.ndarray) -> float:
    """The mean intersection over union of the labels in two maps [H, W]."""
    labels = np.union1d(np.unique(a), np.unique(b))
    return float(np.mean([((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in labels]))


class Measuring(Protocol):
    """What an `Evaluation` offers."""

    unitok: Unitok
    scores: dict[str, float | list[float]]
    seed: int
    config: GenerationConfig

    def continue_from(
        self, prompts: list[Document], modalities: str, name: str, *, config: GenerationConfig | None = None
    ) -> list[Output]:
        """Continue prompts."""

    def save_samples(self, name: str, outputs: list[Output], right: list[bool]) -> None:
        """Keep the first outputs as files."""


class TaskEvaluation:
    """Measures the tasks of one bundle; adds to the scores of an evaluation.

    Args:
        evaluation: whose scores are added to. folder, rows: the scenes. of_edits: how edited images are sampled, if otherwise.
        ending: is added to the names of the scores.
    """

    def __init__(
        self,
        evaluation: Measuring,
        folder: Path,
        rows: list[SceneRow],
        of_edits: GenerationConfig | None = None,
        ending: str = "",
    ):
        self.of_edits, self.ending = of_edits, ending
        self.evaluation, self.folder, self.rows = evaluation, folder, rows
        self.unitok, self.scores = evaluation.unitok, evaluation.scores

    def run(self) -> None:
        """Score every kind of task that the bundle has tokenizers for."""
        for kind in AVERAGES:
            tasks = [
                make_task(kind, row["scene"], row["boxes"], np.random.default_rng((self.evaluation.seed, i)))
                for i, row in enumerate(self.rows)
            ]
            chosen = [(row, task) for row, task in zip(self.rows, tasks, strict=True) if task is not None]
            values = self._score_task(kind, chosen)
            self._add(kind, values)
        for name, fill in (("fill_image", self._fill_image), ("fill_text", self._fill_text), ("fill_audio", self._fill_audio)):
            filled = [fill(row, i) for i, row in enumerate(self.rows)]
            right = [value for _, value in filled]
            for index, (output, _) in enumerate(filled):
                output.index = index
            self.evaluation.save_samples(f"{name}{self.ending}", [output for output, _ in filled], right)
            self._add(name, right)

    def _add(self, kind: str, values: Sequence[float]) -> None:
        self.scores[f"generation.{kind}{self.ending}"] = float(np.mean([value >= 0.5 for value in values]))
        self.scores[f"mean.{kind}{self.ending}"] = float(np.mean(values))

    # ---- Tasks -----------------------------------------------------------------------------------------------------

    def _score_task(self, kind: str, chosen: list[tuple[SceneRow, SceneTask]]) -> list[float]:
        """How right each answer is, 0 to 1; right from 0.5 on."""
        name = f"{kind}{self.ending}"
        raws = [RawDocument(row["id"], tuple(self._part(row, *piece) for piece in task.given)) for row, task in chosen]
        prompts = [self.unitok.read_raw(raw) for raw in raws]
        if kind == "detect":
            plans = [",".join(["text", "box:1"] * len(row["scene"].objects)) for row, _ in chosen]
            return [
                self._detected(self.evaluation.continue_from([prompt], plan, name)[0], task)
                for prompt, plan, (_, task) in zip(prompts, plans, chosen, strict=True)
            ]
        config = self.of_edits if kind == "edit" else None
        plan = edit_plan(config) if config else _MODALITIES[kind]
        outputs = self.evaluation.continue_from(prompts, plan, name, config=config)
        values = [_JUDGES[kind](output, row, task, self.folder) for output, (row, task) in zip(outputs, chosen, strict=True)]
        self.evaluation.save_samples(name, outputs, [value >= 0.5 for value in values])
        return values

    def _part(self, row: SceneRow, kind: str, value: object) -> Part:
        if kind == "image":
            return Part("image", path=self.folder / row["image"])
        if kind == "labels":
            return Part("image", path=self.folder / row["labels"], view="map=labels")
        if kind == "text":
            return Part("text", value)
        return Part(kind, {"boxes" if kind == "box" else "points": value})

    def _detected(self, output: Output, task: SceneTask) -> float:
        texts = output.of_kind("text")
        boxes = [rows[0] for rows in output.of_kind("box")]
        named = [value for kind, value in task.answer if kind == "text"]
        true = [value[0] for kind, value in task.answer if kind == "box"]  # type: ignore[index]
        return float([text.strip() for text in texts] == named) * min(map(box_iou, boxes, true))

    # ---- Holes -----------------------------------------------------------------------------------------------------

    def _fill_image(self, row: SceneRow, i: int) -> tuple[Output, bool]:
        pixels = load_image(self.folder / row["image"])
        height, width = pixels.shape[1:]
        x0, y0, x1, y1 = row["boxes"][i % len(row["boxes"])]
        mask = np.zeros((height, width), bool)
        mask[int(y0 * height) : int(np.ceil(y1 * height)), int(x0 * width) : int(np.ceil(x1 * width))] = True
        (output,) = self.unitok.fill(
            self.folder / row["image"],
            mask,
            row["caption"],
            seed=self.evaluation.seed + i,
            generation_config=self.evaluation.config,
        )
        return output, read_image(to_bytes(output.images[0])) == row["scene"]

    def _fill_text(self, row: SceneRow, i: int) -> tuple[Output, bool]:
        whole = caption(row["scene"])
        words = [n for n, word in enumerate(whole.split(" ")) if word not in ("a", "on", "of", "background", "both")]
        chosen = words[i % len(words)]
        holed = " ".join(BLANK if n == chosen else word for n, word in enumerate(whole.split(" ")))
        (output,) = self.unitok.fill(
            holed, prompt=self.folder / row["image"], seed=self.evaluation.seed + i, generation_config=self.evaluation.config
        )
        return output, output.text == whole

    def _fill_audio(self, row: SceneRow, i: int) -> tuple[Output, bool]:
        start = NOTE_SECONDS * (i % len(row["scene"].objects))
        (output,) = self.unitok.fill(
            self.folder / row["audio"],
            (start, start + NOTE_SECONDS),
            row["audio_caption"],
            seed=self.evaluation.seed + i,
            generation_config=self.evaluation.config,
        )
        rate = self.unitok.require("audio").sample_rate
        return output, same_notes(read_audio(output.audios[0].cpu().numpy(), rate), row["scene"])


Judge = Callable[[Output, SceneRow, SceneTask, Path], float]


def _iou_of(output: Output, row: SceneRow, task: SceneTask, folder: Path) -> float:
    return box_iou(output.of_kind("box")[0][0], task.answer[0][1][0])  # type: ignore[index]


def _pointed(output: Output, row: SceneRow, task: SceneTask, folder: Path) -> float:
    ((x, y),) = output.of_kind("point")[0]
    named = [f"the {o.color} {o.shape}" in str(task.given[-1][1]) for o in row["scene"].objects]
    x0, y0, x1, y1 = row["boxes"][named.index(True)]
    return float(x0 <= x <= x1 and y0 <= y <= y1)


def _labeled(output: Output, row: SceneRow, task: SceneTask, folder: Path) -> float:
    labels = rgb_to_labels(to_bytes(output.images[0]), range(len(SHAPES) + 1), SMOOTH)
    true = np.asarray(Image.open(folder / row["labels"]))
    return mean_iou(labels, true) if labels.shape == true.shape else 0.0


def _shows(output: Output, row: SceneRow, task: SceneTask, folder: Path) -> float:
    return float(read_image(to_bytes(output.images[0])) == (task.edited or row["scene"]))


_JUDGES: dict[str, Judge] = {
    "find": _iou_of,
    "point": _pointed,
    "describe_box": lambda output, row, task, folder: float(output.text.strip() == task.answer[0][1]),
    "draw_boxes": _shows,
    "label": _labeled,
    "draw_labels": _shows,
    "edit": _shows,
}

__all__ = ["TaskEvaluation", "box_iou", "mean_iou"]
