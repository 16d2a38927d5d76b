"""`unitok eval boxes`: how well a decoder finds things in images of your own.

A document's answer begins with its first learned segment, and may hold any number of boxes, each with the text right before it as its
label (`find the dog:`, box; or dog, box, cat, box for detection). The decoder writes an answer of its own, by default greedily. Measured
over all true boxes:

- **IoU**: the mean intersection over union with the generated box of the same label that overlaps most; 0 where there is none;
- **accuracy at 0.5**: the fraction of true boxes with an IoU of at least 0.5;
- **mAP**: mean average precision over labels, at an IoU of 0.5 and over 0.5 to 0.95, by pycocotools, where it is installed (extra `eval`).
  A generated box's score is the order in which it was written, since the decoder gives no other.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unitok.api import Unitok
from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.files import whole_folder, write_json, write_json_lines
from unitok.generation_config import GenerationConfig, SamplingParams
from unitok.sample.outputs import Output, save_outputs
from unitok.sample.requests import config_for, generate_outputs

KIND = "box evaluation"  # kind of folder in `unitok.files`
SHOWN = 40  # documents on the page
BOX = "box"

Labeled = list[tuple[str, np.ndarray]]  # label and box x0, y0, x1, y1 as fractions


@dataclass
class BoxResult:
    """The true and the generated boxes of one document."""

    id: str
    true: Labeled
    made: Labeled
    output: Output

    def ious(self) -> list[float]:
        """The IoU of each true box with the best generated box of its label."""
        return [max([box_iou(box, one) for name, one in self.made if name == label], default=0.0) for label, box in self.true]

    def row(self) -> dict[str, object]:
        """Return the result as plain types."""
        rows = {"true": self.true, "generated": self.made}
        return {"id": self.id, "iou": self.ious()} | {
            name: [{"label": label, "xyxy": box.round(4).tolist()} for label, box in boxes] for name, boxes in rows.items()
        }


def box_iou(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """The intersection over union of two boxes x0, y0, x1, y1."""
    wide, high = (max(0.0, float(min(a[2 + i], b[2 + i]) - max(a[i], b[i]))) for i in (0, 1))
    areas = [float((x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in (a, b)]
    return wide * high / max(sum(areas) - wide * high, 1e-12)


def labeled_boxes(bundle: Unitok, segments: Sequence[Segment], first: int = 0) -> Labeled:
    """Return the boxes of the segments from `first` on, each with the text right before it, or "" where there is none."""
    found: Labeled = []
    for number in range(first, len(segments)):
        segment = segments[number]
        if bundle.vocab.span(segment.modality).kind != BOX:
            continue
        before = segments[number - 1] if number else None
        label = str(bundle.decode(before)).strip() if before is not None and before.modality == bundle.vocab.bare else ""
        found += [(label, box) for box in bundle.decode(segment)]
    return found


def evaluate_boxes(
    bundle: Unitok, documents: Sequence[Document], sampling: SamplingParams, seed: int = 0, max_new_tokens: int = 256
) -> list[BoxResult]:
    """Let the decoder write the answer of each document that has learned boxes.

    Errors: `UserError` where no document has any.
    """
    chosen: list[tuple[Document, int]] = []
    for document in documents:
        first = next((i for i, segment in enumerate(document.segments) if segment.loss), len(document.segments))
        if first and any(bundle.vocab.span(s.modality).kind == BOX for s in document.segments[first:]):
            chosen.append((document, first))
    if not chosen:
        raise UserError("no document has boxes that are learned, after something that is given")
    given = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
    config = config_for(bundle, GenerationConfig(modalities="free", seed=seed, max_new_tokens=max_new_tokens, **given))
    prompts = [Document(document.segments[:first], document.id) for document, first in chosen]
    outputs = generate_outputs(bundle, prompts, config, progress=True)
    return [
        BoxResult(
            document.id,
            labeled_boxes(bundle, document.segments, first),
            labeled_boxes(bundle, output.document.segments, first),
            output,
        )
        for (document, first), output in zip(chosen, outputs, strict=True)
    ]


def box_scores(results: Sequence[BoxResult]) -> dict[str, float]:
    """Return the scores of results by name."""
    ious = [iou for result in results for iou in result.ious()]
    scores = {
        "documents": float(len(results)),
        "boxes": float(len(ious)),
        "iou": float(np.mean(ious)),
        "accuracy_at_0.5": float(np.mean([iou >= 0.5 for iou in ious])),
    }
    return scores | mean_average_precision(results)


def mean_average_precision(results: Sequence[BoxResult]) -> dict[str, float]:
    """Return `map` and `map_at_0.5` by pycocotools; nothing where it is not installed."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        return {}
    labels = sorted({label for result in results for label, _ in (*result.true, *result.made)})
    ids = {label: number for number, label in enumerate(labels, 1)}

    def rows(made: bool) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for image, result in enumerate(results, 1):
            for number, (label, (x0, y0, x1, y1)) in enumerate(result.made if made else result.true):
                wide, high = (x1 - x0) * 1000, (y1 - y0) * 1000
                row = {"image_id": image, "category_id": ids[label], "bbox": [x0 * 1000, y0 * 1000, wide, high]}
                found.append(row | {"id": len(found) + 1, "area": wide * high, "iscrowd": 0, "score": 1 / (1 + number)})
        return found

    made = rows(True)
    if not made:
        return {"map": 0.0, "map_at_0.5": 0.0}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image} for image in range(1, len(results) + 1)],
        "annotations": rows(False),
        "categories": [{"id": id, "name": label} for label, id in ids.items()],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(made), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": float(evaluation.stats[0]), "map_at_0.5": float(evaluation.stats[1])}


def write_scores(results: Sequence[BoxResult], scores: dict[str, float], out: Path) -> None:
    """Write `scores.json`, `boxes.jsonl` and `samples/index.html`, which draws what was generated. Everything in `out` is replaced."""
    with whole_folder(out, KIND, overwrite=True) as new:
        save_outputs([result.output for result in results[:SHOWN]], new / "samples", "Boxes")
        write_json_lines(new / "boxes.jsonl", [result.row() for result in results])
        write_json(new / "scores.json", scores)
