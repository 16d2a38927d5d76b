"""`unitok eval boxes`: what is measured is what the boxes say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unitok import Unitok
from unitok.bundle import Bundle, make_bundle
from unitok.cli import main
from unitok.errors import UserError
from unitok.evaluate.boxes import BoxResult, box_scores, evaluate_boxes
from unitok.generation_config import SamplingParams
from unitok.model import Decoder, DecoderConfig


def result(true, made) -> BoxResult:
    boxes = [[(label, np.array(box)) for label, box in one] for one in (true, made)]
    return BoxResult("a", *boxes, SimpleNamespace())


CAT, DOG = ("cat", (0.1, 0.1, 0.5, 0.5)), ("dog", (0.5, 0.5, 0.9, 0.9))


@pytest.mark.parametrize(
    ("true", "made", "expected"),
    [
        ([CAT, DOG], [CAT, DOG], {"iou": 1, "accuracy_at_0.5": 1, "map": 1, "map_at_0.5": 1}),
        ([CAT, DOG], [DOG], {"iou": 0.5, "accuracy_at_0.5": 0.5, "map": 0.5}),
        ([CAT], [("dog", CAT[1])], {"iou": 0, "accuracy_at_0.5": 0, "map": 0}),
        ([CAT], [("cat", (0.1, 0.1, 0.5, 0.34))], {"iou": 0.6, "accuracy_at_0.5": 1, "map_at_0.5": 1, "map": 0.3}),
        ([CAT], [], {"iou": 0, "accuracy_at_0.5": 0, "map": 0}),
    ],
)
def test_scores_are_those_of_known_boxes(true, made, expected):
    pytest.importorskip("pycocotools")
    scores = box_scores([result(true, made)])
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert scores["boxes"] == len(true)


def test_a_bundle_is_measured_on_documents_with_boxes(bundle_folder, tmp_path, capsys):
    parts = {name: bundle_folder / "tokenizers" / name for name in ("text", "image", "audio")}
    make_bundle(tmp_path / "b", parts, add=["box"])
    made = Bundle.from_pretrained(tmp_path / "b")
    config = DecoderConfig(made.vocab.size, 64, 2, 96, 4, 4, 16, max_position_embeddings=512)
    Bundle(made.vocab, made.tokenizers, Decoder(config).eval()).save_pretrained(tmp_path / "b", overwrite=True)
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "a.png")
    image, text = {"type": "image", "path": "a.png", "loss": False}, {"type": "text", "text": " find the dog:", "loss": False}
    lines = [{"content": [image, text, {"type": "box", "boxes": [[0, 0, 20, 12]], "unit": "pixel"}]}] * 3
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    main(["eval", "boxes", str(tmp_path / "d.jsonl"), "--bundle", str(tmp_path / "b"), "--out", str(tmp_path / "o")])
    assert "accuracy_at_0.5" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "o" / "boxes.jsonl").read_text().splitlines()]
    assert [row["true"][0]["label"] for row in rows] == ["find the dog:"] * 3
    assert rows[0]["true"][0]["xyxy"] == pytest.approx([0, 0, 0.5, 0.5], abs=1e-3)
    assert (tmp_path / "o" / "samples" / "index.html").exists()
    u = Unitok.from_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match="no document has boxes that are learned"):
        evaluate_boxes(u, [u.read_prompt("a text")], SamplingParams())
