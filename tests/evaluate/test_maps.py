"""`unitok eval maps`: what is measured is what the maps say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from unitok import Unitok
from unitok.cli import main
from unitok.errors import UserError
from unitok.evaluate.documents import read_raw_documents
from unitok.evaluate.maps import MapResult, evaluate_maps, map_scores
from unitok.generation_config import SamplingParams
from unitok.media.maps import labels_to_rgb


def result(true, made) -> MapResult:
    return MapResult("a", np.array(true), np.array(made), SimpleNamespace())


def test_scores_are_those_of_known_maps():
    labels = map_scores([result([[0, 0], [1, 1]], [[0, 0], [0, 1]]), result([[2]], [[2]])], "labels")
    assert labels == pytest.approx({"documents": 2, "mean_iou": (2 / 3 + 1 / 2 + 1) / 3, "pixel_accuracy": 0.8})
    depth = map_scores([result([[0.5, 0.4, 0.0]], [[0.55, 0.2, 0.9]])], "depth")
    assert depth["absolute_relative_error"] == pytest.approx((0.1 + 0.5) / 2)
    assert depth["rmse"] == pytest.approx(((0.05**2 + 0.2**2) / 2) ** 0.5)
    assert depth["delta_1"] == 0.5
    void = map_scores([result([[0, 255], [255, 1]], [[0, 0], [1, 0]])], "labels")
    assert void == pytest.approx({"documents": 1, "mean_iou": 0.25, "pixel_accuracy": 0.5})


def test_what_fills_up_the_last_codes_is_not_measured(bundle_folder, tmp_path, monkeypatch):
    """A perfect answer, for a map whose sides are no whole codes, has perfect scores."""
    labels = np.indices((21, 29)).sum(0).astype(np.uint8) // 13
    Image.fromarray(np.zeros((21, 29, 3), np.uint8)).save(tmp_path / "0.png")
    Image.fromarray(labels).save(tmp_path / "labels.png")
    content = [{"type": "image", "path": "0.png", "loss": False}, {"type": "image", "path": "labels.png", "map": "labels"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"content": content}) + "\n")
    u = Unitok.from_pretrained(bundle_folder)
    colors = torch.from_numpy(labels_to_rgb(labels)).permute(2, 0, 1) / 127.5 - 1
    whole = torch.nn.functional.pad(colors[None], (0, -29 % u.image.stride, 0, -21 % u.image.stride), "replicate")[0]
    assert whole.shape[1:] > colors.shape[1:]
    monkeypatch.setattr("unitok.evaluate.maps.generate_outputs", lambda *_, **__: [SimpleNamespace(images=[whole])])
    (perfect,) = evaluate_maps(u, read_raw_documents(u, tmp_path / "d.jsonl"), "labels", SamplingParams())
    assert np.array_equal(perfect.made, labels)


def test_a_bundle_is_measured_on_documents_with_maps(bundle_folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = []
    for number, (height, width) in enumerate([(24, 40), (32, 32), (24, 40)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 3, (height, width), np.uint8)).save(tmp_path / f"{number}-labels.png")
        Image.fromarray(rng.integers(100, 5000, (height, width)).astype(np.uint16)).save(tmp_path / f"{number}-depth.png")
        for kind in ("labels", "depth"):
            given = {"type": "image", "path": f"{number}.png", "loss": False}
            lines.append({"content": [given, {"type": "image", "path": f"{number}-{kind}.png", "map": kind}]})
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    names = {"labels": {"mean_iou", "pixel_accuracy"}, "depth": {"absolute_relative_error", "rmse", "delta_1"}}
    for kind, expected in names.items():
        out = tmp_path / kind
        command = ["eval", "maps", str(tmp_path / "d.jsonl"), "--bundle", str(bundle_folder), "--map", kind, "--far", "5000"]
        main([*command, "--out", str(out)])
        scores = json.loads((out / "scores.json").read_text())
        assert expected | {"documents"} == set(scores)
        assert scores["documents"] == 3
        assert all(np.isfinite(value) for value in scores.values())
        assert len((out / "maps.jsonl").read_text().splitlines()) == 3
        assert (out / "samples" / "index.html").exists()
        assert next(iter(expected)) in capsys.readouterr().out
    u = Unitok.from_pretrained(bundle_folder)
    raws = read_raw_documents(u, tmp_path / "d.jsonl")
    results = evaluate_maps(u, raws, "labels", SamplingParams(temperature=0.0))
    assert [r.made.shape for r in results] == [r.true.shape for r in results] == [(24, 40), (32, 32), (24, 40)]
    assert {int(v) for r in results for v in np.unique(r.made)} <= {0, 1, 2}
    with pytest.raises(UserError, match="no document has a learned part"):
        evaluate_maps(u, raws[1::2], "labels", SamplingParams())
