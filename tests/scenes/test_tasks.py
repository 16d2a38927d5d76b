"""Tasks about scenes: every answer is what the picture shows, and the oracle of each says so."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unitok import Unitok
from unitok.bundle import Bundle, make_bundle
from unitok.cli import main
from unitok.data.packing import PackedDataset
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.holes import find_holes, mend
from unitok.media import load_image
from unitok.model import Decoder, DecoderConfig
from unitok.scenes.evaluate import evaluate_bundle
from unitok.scenes.evaluate_tasks import box_iou, mean_iou
from unitok.scenes.files import read_scenes, write_scenes
from unitok.scenes.oracle import read_image
from unitok.scenes.tasks import AVERAGES, make_task
from unitok.scenes.world import COLORS, SHAPES, Scene, change_caption, parse_caption


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "scenes"
    write_scenes(out, 60, seed=5, fold="seen", resolution=64, workers=1, tasks=True)
    return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, bundle_folder) -> Path:
    """The built-in tokenizers with boxes, and a decoder with random weights."""
    out = tmp_path_factory.mktemp("tasks") / "bundle"
    make_bundle(out, _built_in(), add=["box:bins=64", "point:bins=64"])
    made = Bundle.from_pretrained(out)
    config = DecoderConfig(made.vocab.size, 64, 2, 96, 4, 4, 16, max_position_embeddings=512, span_positions=80)
    Bundle(made.vocab, made.tokenizers, Decoder(config).eval()).save_pretrained(out, overwrite=True)
    return out


def _built_in() -> dict[str, Path]:
    from unitok.hub import find

    return {name: find("scenes") / "tokenizers" / name for name in ("text", "image", "audio")}


@pytest.fixture(scope="module")
def tokens(folder, bundle, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "tokens"
    tokenize(Plan(str(folder), str(out), str(bundle)))
    return out


def test_boxes_and_labels_are_around_the_pixels_of_their_things(folder):
    for row in read_scenes(folder):
        pixels = load_image(folder / row["image"])
        image = ((pixels.permute(1, 2, 0) + 1) * 127.5).numpy()
        labels = np.asarray(Image.open(folder / row["labels"]))
        for one, (x0, y0, x1, y1) in zip(row["scene"].objects, row["boxes"], strict=True):
            colored = np.abs(image - np.array(COLORS[one.color])).sum(-1) < 30
            labeled = labels == SHAPES.index(one.shape) + 1
            for mask in (colored, labeled):
                inside = np.zeros_like(mask)
                inside[int(y0 * 64) : int(np.ceil(y1 * 64)), int(x0 * 64) : int(np.ceil(x1 * 64))] = True
                rows, columns = np.nonzero(mask & inside)
                seen = (columns.min() / 64, rows.min() / 64, (columns.max() + 1) / 64, (rows.max() + 1) / 64)
                assert np.abs(np.subtract(seen, (x0, y0, x1, y1))).max() <= 2 / 64  # a tip is thin


@pytest.mark.parametrize(
    ("before", "after", "place", "pair"),
    [
        ("{a} above {b}", "{a} above a large blue cross", "below", "{b} then a large blue cross"),
        ("{a} left of {b}, both above {c}", "{b} above {c}", "left", "{a} then nothing"),
        ("{a} above {b} left of {c}", "{a} above {b}", "right", "{c} then nothing"),
        ("{a}", "{a} left of {b}", "right", "nothing then {b}"),
        ("{a}", "a large red circle", "it", "{a} then a large red circle"),
    ],
)
def test_a_change_is_said_by_its_place_what_was_and_is_and_a_caption(before, after, place, pair):
    names = {"a": "a small red circle", "b": "a large red cross", "c": "a small cyan ring"}
    before, after, pair = (text.format(**names) for text in (before, after, pair))
    scenes = [parse_caption(f"{text} on a gray background") for text in (before, after)]
    assert change_caption(*scenes) == f"{place}, {pair}, now {after} on a gray background"
    black = parse_caption(f"{before} on a black background")
    assert change_caption(scenes[0], black) == f"background, gray then black, now {before} on a black background"


def test_every_kind_of_task_has_documents_and_edits_show_what_they_say(folder):
    rows = {row["id"]: row["scene"] for row in read_scenes(folder)}
    documents = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    kinds = [document["id"].split("-", 1)[1] for document in documents]
    assert set(AVERAGES) <= set(kinds)
    edits = [document for document, kind in zip(documents, kinds, strict=True) if kind == "edit"]
    verbs = set()
    for document in edits:
        source, instruction, described, target = document["content"]
        before, after = rows[document["id"].split("-")[0]], _shown(folder / target["path"])
        assert described["text"] == f" {change_caption(before, after)}"
        assert [part.get("loss", True) for part in document["content"]] == [False, False, True, True]
        assert _shown(folder / source["path"]) == before != after
        text = instruction["text"].split()
        verbs.add(text[0])
        if "background" in text:
            assert after.background == text[-1]
        elif text[0] == "remove":
            assert len(after.objects) == len(before.objects) - 1
            assert set(after.objects) < set(before.objects)
        elif text[0] == "add":
            assert set(after.objects) > set(before.objects)
        else:
            changed = [pair for pair in zip(before.objects, after.objects, strict=True) if pair[0] != pair[1]]
            assert len(changed) == 1
    assert verbs == {"make", "turn", "remove", "add"}


def test_what_is_edited_in_training_belongs_to_the_seen_fold(tmp_path):
    write_scenes(tmp_path, 60, resolution=64, workers=1, tasks=True)
    edited = list((tmp_path / "images").glob("*-9.png"))
    assert len(edited) > 10
    assert all(shown is not None and shown.fold() == "seen" for shown in map(_shown, edited))


def _shown(path: Path) -> Scene | None:
    return read_image(((load_image(path).permute(1, 2, 0) + 1) * 127.5).numpy())


def test_the_same_task_has_the_same_answer(folder):
    for row in read_scenes(folder)[:20]:
        for kind in AVERAGES:
            first, second = (make_task(kind, row["scene"], row["boxes"], np.random.default_rng(3)) for _ in range(2))
            assert first == second


def test_measures_of_boxes_and_maps():
    assert box_iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert box_iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0
    assert box_iou((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
    a = np.zeros((4, 4), int)
    b = a.copy()
    b[:2] = 1
    assert mean_iou(a, a) == 1
    assert mean_iou(a, b) == pytest.approx((0.5 + 0) / 2)


def test_a_bundle_is_scored_on_every_task_and_hole_and_nothing_is_malformed(folder, bundle, tmp_path):
    write_scenes(tmp_path / "new", 3, seed=6, fold="composed", resolution=64, workers=1, tasks=True)
    scores = evaluate_bundle(bundle, folder, tmp_path / "eval", 3, 0, {"composed": tmp_path / "new"})
    for kind in (*AVERAGES, "fill_image", "fill_text", "fill_audio"):
        assert 0 <= scores[f"generation.{kind}"] <= 1
        assert 0 <= scores[f"generation.{kind}.composed"] <= 1
    assert any(name.startswith("generation.conversation.") and name.endswith(".composed") for name in scores)
    assert scores["malformed"] == 0
    assert (tmp_path / "eval" / "samples" / "find" / "index.html").exists()


def test_rows_with_holes_are_the_documents_that_they_come_from(tokens):
    data = TokenDataset(tokens)
    packed = PackedDataset(data, 1024, seed=1, condition_dropout=0.2, fill_rate=0.5)
    again = PackedDataset(data, 1024, seed=1, condition_dropout=0.2, fill_rate=0.5)
    units = [unit for row in packed.rows(0) for unit in row]
    assert packed.rows(0) == again.rows(0)
    holed = [unit for unit in units if unit.holed]
    assert 0.25 < len(holed) / len(units) < 0.5  # of those that lost no condition
    whole = 0
    for unit in holed:
        ids, weights = packed.document(unit)
        assert len(ids) == len(weights) == unit.length
        mended, start = mend(data.vocab, ids), find_holes(data.vocab, ids)[1]
        assert not weights[: start + 1].any()  # what is around a hole is only read
        assert weights[start + 1 :].any()
        original = data.ids(unit.document)
        if len(mended) == len(original):
            assert np.array_equal(mended, original)
            whole += 1
        else:  # it lost its condition: its spans are among those of the document
            assert set(mended.tolist()) <= set(original.tolist())
    assert 0.6 < whole / len(holed) < 0.95
    batch = packed.row(0, packed.order(0)[0])
    assert batch["weights"].any()


def test_without_a_rate_nothing_has_holes(tokens):
    data = TokenDataset(tokens)
    assert not any(unit.holed for row in PackedDataset(data, 1024).rows(0) for unit in row)


def test_a_trained_bundle_with_boxes_is_loaded_and_points(bundle):
    u = Unitok.from_pretrained(bundle)
    (output,) = u.generate("find the red circle:", modalities="image:8x8,box:1,point:1", seed=1)
    (box,), (point,) = output.boxes, output.points
    assert box.shape == (1, 4)
    assert (box[:, 2:] >= box[:, :2]).all()
    assert 0 <= point.min() <= point.max() <= 64


def test_kinds_of_documents_are_as_frequent_as_is_asked(tmp_path, capsys):
    main(
        [
            "scenes",
            str(tmp_path / "a"),
            "--count",
            "60",
            "--tasks",
            "--average",
            "edit=1",
            "--average",
            "find=0",
            "--average",
            "story=0",
        ]
    )
    lines = (tmp_path / "a" / "documents.jsonl").read_text().splitlines()
    kinds = Counter(json.loads(line)["id"].split("-", 1)[1] for line in lines)
    shown = kinds["image-caption"]  # of each scene that is shown
    assert kinds["find"] == kinds["story"] == 0
    assert kinds["edit"] == shown > 40
    assert 0 < kinds["sequel"] < shown
    for given, said in (
        ("edit=2", "average edit=2: give a number from 0 to 1"),
        ("edits=1", "one of caption-image"),
        ("edit", "write KIND=N"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["scenes", str(tmp_path / "b"), "--tasks", "--average", given])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
