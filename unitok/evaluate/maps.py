"""`unitok eval maps`: how well a decoder segments images of your own, or estimates their depth.

Documents are interleaved JSON Lines with a map that is learned (`"map": "labels"` or `"depth"`) after what is given. The decoder writes a map of
the same grid, by default greedily, which is compared with the file at the file's size:

- labels: **mean IoU**, over the labels of all documents together; **pixel accuracy**; the labels that occur in the files are those that
  may be generated, and pixels of 255 in a file, which data sets call void, are not counted;
- depth: **absolute relative error**, the mean of |d - d*| / d* over pixels whose true depth d* is above 0; **RMSE** in fractions of the
  depth that is white; **delta 1**, the fraction of pixels within a factor of 1.25.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from unitok.api import Unitok
from unitok.document import Document, RawDocument
from unitok.errors import UserError
from unitok.files import whole_folder, write_json, write_json_lines
from unitok.generation_config import GenerationConfig, SamplingParams
from unitok.media.maps import SMOOTH, map_values, rgb_to_labels
from unitok.sample.outputs import Output, save_outputs
from unitok.sample.requests import config_for, generate_outputs

KIND = "map evaluation"  # kind of folder in `unitok.files`
SHOWN = 40  # documents on the page
VOID = 255  # label of pixels that are not counted

MeasuredMap = Literal["labels", "depth"]


@dataclass
class MapResult:
    """The true and the generated map of one document, [H, W]: labels, or depths as fractions of the depth that is white."""

    id: str
    true: np.ndarray
    made: np.ndarray
    output: Output


def evaluate_maps(
    bundle: Unitok, raws: Sequence[RawDocument], kind: MeasuredMap, sampling: SamplingParams, seed: int = 0, far: float = 0.0
) -> list[MapResult]:
    """Let the decoder write the map of each document that has a learned one after something that is given.

    far: of depth, as `--image-far`. Errors: `UserError` where no document has any.
    """
    view, chosen = f"map={kind}", []
    for raw in raws:
        numbers = [n for n, part in enumerate(raw.content) if part.loss and part.view == view]
        if numbers and numbers[0]:
            chosen.append((raw, numbers[0]))
    if not chosen:
        raise UserError(f'no document has a learned part with "map": "{kind}" after something that is given')
    prompts, plans, sizes, true = [], list[tuple[str, bool]](), [], []
    for raw, number in chosen:
        document, path = bundle.read_raw(raw), raw.content[number].path
        assert path is not None
        segment = document.segments[number]
        prompts.append(Document(document.segments[:number], document.id))
        turn = segment.role == "assistant" and document.segments[number - 1].role != segment.role
        plans.append((f"{segment.modality}:{'x'.join(map(str, segment.codes.shape))}", turn))
        sizes.append(segment.size)
        true.append(map_values(str(path), path.read_bytes(), kind, far))
    if not any(_counted(values, kind).any() for values in true):
        raise UserError(
            "no pixel of the maps has a depth above 0" if kind == "depth" else f"all pixels of the maps are {VOID}, void"
        )
    known = sorted({int(label) for labels in true for label in np.unique(labels)} - {VOID}) if kind == "labels" else []
    given = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "guidance_scale")}
    outputs: dict[int, Output] = {}
    for plan, turn in dict.fromkeys(plans):  # one call for all maps of one grid
        members = [n for n, other in enumerate(plans) if other == (plan, turn)]
        config = config_for(bundle, GenerationConfig(modalities=plan, seed=seed, **given))
        outputs |= dict(
            zip(members, generate_outputs(bundle, [prompts[n] for n in members], config, progress=True), strict=True)
        )
    return [
        MapResult(prompts[n].id, true[n], _made(outputs[n], kind, known, sizes[n], true[n].shape), outputs[n])
        for n in range(len(prompts))
    ]


def _made(output: Output, kind: MeasuredMap, known: Sequence[int], size: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The generated map at the size of the true one. size: height and width that the true one is encoded in; what is beyond fills up codes."""
    (height, width), (true_height, true_width) = size, shape
    pixels = ((output.images[0][:, :height, :width].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).cpu().numpy()
    if kind == "labels":
        labels = Image.fromarray(rgb_to_labels(pixels, known, SMOOTH))
        return np.asarray(labels.resize((true_width, true_height), Image.Resampling.NEAREST))
    depth = Image.fromarray((pixels.mean(axis=2) / 255).astype(np.float32))
    return np.asarray(depth.resize((true_width, true_height), Image.Resampling.BILINEAR))


def map_scores(results: Sequence[MapResult], kind: MeasuredMap) -> dict[str, float]:
    """Return the scores of results by name."""
    scores = {"documents": float(len(results))}
    if kind == "labels":
        pairs = np.zeros((256, 256), np.int64)  # pixels by true and made label
        for result in results:
            pairs += np.bincount(result.true.astype(np.int64).ravel() * 256 + result.made.ravel(), minlength=1 << 16).reshape(
                256, 256
            )
        pairs[VOID] = 0
        either = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
        found = either > 0
        iou = pairs.diagonal()[found] / either[found]
        return scores | {"mean_iou": float(iou.mean()), "pixel_accuracy": float(pairs.trace() / pairs.sum())}
    known = [(result.true[result.true > 0], result.made[result.true > 0]) for result in results]
    true, made = (np.concatenate([pair[i] for pair in known]).astype(np.float64) for i in (0, 1))
    made = np.maximum(made, 1e-3)
    ratio = np.maximum(true / made, made / true)
    return scores | {
        "absolute_relative_error": float((np.abs(made - true) / true).mean()),
        "rmse": float(np.sqrt(((made - true) ** 2).mean())),
        "delta_1": float((ratio < 1.25).mean()),
    }


def _counted(true: np.ndarray, kind: MeasuredMap) -> np.ndarray:
    """Which pixels of a true map [H, W] count."""
    return true > 0 if kind == "depth" else true != VOID


def write_scores(results: Sequence[MapResult], kind: MeasuredMap, scores: dict[str, float], out: Path) -> None:
    """Write `scores.json`, `maps.jsonl` (the scores of each document) and `samples/index.html`. Everything in `out` is replaced."""
    with whole_folder(out, KIND, overwrite=True) as new:
        save_outputs([result.output for result in results[:SHOWN]], new / "samples", "Maps")
        write_json_lines(
            new / "maps.jsonl",
            [
                {"id": result.id} | (map_scores([result], kind) if _counted(result.true, kind).any() else {})
                for result in results
            ],
        )
        write_json(new / "scores.json", scores)
