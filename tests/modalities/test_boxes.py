"""Boxes and points stay around the same pixels, whatever is done to their image, and come back within half a bin."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from unitok import Boxes, Points, Unitok
from unitok.bundle import make_bundle
from unitok.cli import main
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.sources import Source
from unitok.data.shards import TokenDataset
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.modalities import modality_of
from unitok.modalities.image import ImageOptions


@pytest.fixture(scope="module")
def boxed(bundle_folder, tmp_path_factory) -> Unitok:
    """The tiny bundle with boxes and points, without a decoder."""
    out = tmp_path_factory.mktemp("boxed") / "bundle"
    parts = {name: bundle_folder / "tokenizers" / name for name in ("text", "image", "audio")}
    make_bundle(out, parts, add=["box", "point:bins=64"])
    return Unitok.from_pretrained(out)


def seen_box(pixels: np.ndarray) -> tuple[float, float, float, float] | None:
    """The box of what is bright in an image [H, W, 3], in pixels."""
    rows, columns = (np.flatnonzero((pixels[..., 0] > 127).any(axis)) for axis in (1, 0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else None


def test_a_box_that_is_drawn_into_the_pixels_stays_around_them_through_crops_flips_rotations_and_sizes(boxed, tmp_path):
    image, box, tokenizer, hidden = modality_of("image"), modality_of("box"), boxed.require("image"), 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        width, height = (int(side) for side in rng.integers(40, 120, 2))
        x0, y0 = (int(rng.integers(side - 12)) for side in (width, height))
        x1, y1 = (int(rng.integers(at + 12, side + 1)) for at, side in ((x0, width), (y0, height)))
        upright = np.zeros((height, width, 3), np.uint8)
        upright[y0:y1, x0:x1] = 255
        turned, exif = Image.fromarray(upright), Image.Exif()
        if seed % 3 == 0:  # as a camera that was held sideways
            turned = turned.transpose(Image.Transpose.ROTATE_90)
            exif[ExifTags.Base.Orientation] = 6
        turned.save(tmp_path / "a.png", exif=exif)
        options = ImageOptions(
            area=int(rng.integers(900, 9000)), fit=str(rng.choice(["keep", "crop", "resize"])), flip=bool(rng.integers(2))
        )
        view = str(rng.choice(["", "flip", "crop=1"]))
        blob = boxed_blob(tmp_path / "a.png")
        loaded = image.load(tokenizer, blob, options, "a.png", view, float(rng.random()))
        value = box.check({"boxes": [[x0, y0, x1, y1]], "unit": "pixel"}, "a")
        rows = box.related(value, loaded, "a")
        seen = seen_box(loaded.content)
        if not len(rows):
            hidden += 1  # less than half of it is in the crop
            continue
        assert seen is not None
        scale = np.array(loaded.content.shape[1::-1] * 2)
        assert np.abs(rows[0] * scale - seen).max() <= 1.5, (seed, rows[0] * scale, seen)
    assert 10 < hidden < 150


def boxed_blob(path):
    from unitok.storage import Blob, Files

    return Blob.of(Files("/"), str(path))


def test_boxes_come_back_within_half_a_bin(boxed):
    rng = np.random.default_rng(0)
    for _ in range(200):
        corners = np.sort(rng.random((int(rng.integers(1, 6)), 2, 2)), axis=1)
        rows = corners.reshape(len(corners), 4)
        (segment,) = boxed.read(Boxes(rows))
        assert np.abs(boxed.decode(segment) - rows).max() <= 0.5 / 999 + 1e-9
        ids = boxed.vocab.encode(boxed.read_prompt(Boxes(rows)))
        Grammar(boxed.vocab).check(ids)
        assert np.array_equal(boxed.vocab.encode(boxed.vocab.decode(ids)), ids)
    (segment,) = boxed.read(Points([[0.25, 0.75]]))
    assert boxed.decode(segment) == pytest.approx(np.array([[16 / 63, 47 / 63]]))


def test_the_grammar_forces_corners_into_their_order(boxed):
    vocab, rng = boxed.vocab, np.random.default_rng(0)
    grammar = Grammar(vocab)
    for _ in range(300):
        row = grammar.row(40)
        row.advance(vocab.specials["<box>"])
        ids = [vocab.bos, vocab.specials["<box>"]]
        while row.state != "done":
            pool = np.concatenate([np.arange(a, b) for a, b in row.allowed()])
            ids.append(int(rng.choice(pool)))
            row.advance(ids[-1])
        for segment in vocab.decode(np.array(ids)).segments:
            if segment.modality == "box":
                assert (segment.codes[2] >= segment.codes[0]).all()
                assert (segment.codes[3] >= segment.codes[1]).all()
    low = [
        vocab.bos,
        vocab.specials["<box>"],
        *(vocab.range("place").offset + np.array([5, 5, 4, 5])),
        vocab.specials["</box>"],
    ]
    with pytest.raises(UserError, match="position 4: place:4 cannot stand here"):
        grammar.check(np.array([*low, vocab.eos]))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"boxes": [[9, 0, 1, 1]]}, r"\[x0, y0, x1, y1\] with x1 >= x0 and y1 >= y0 \(not x, y, width, height\)"),
        ({"boxes": [[0, 0, 1.2, 1]]}, r"box \[0.0, 0.0, 1.2, 1.0\] \(fractions\) leaves its image, 0 to 1"),
        ({"boxes": [[0, 0, 99, 10]], "unit": "pixel"}, r"leaves its image, 40 x 24 pixels"),
        ({"boxes": [[0, 0, float("nan"), 1]]}, "4 numbers"),
        ({"boxes": []}, "no box in it"),
        ({"boxes": [[0, 0, 1, 1]], "unit": "percent"}, "unit 'percent'; choose one of fraction, pixel"),
        ({"boxes": [[0, 0, 1, 1]], "image": 4}, "image 4 does not exist; the document has 1"),
        ({"boxes": [[0, 0, 1, 1]], "size": 4}, "size: unknown; a part of type box has type, boxes, unit, image, role, loss"),
    ],
)
def test_what_is_no_box_is_listed_with_its_line(part, message, boxed, tmp_path):
    boxed.save_pretrained(tmp_path / "b")
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "a.png")
    lines = [
        {"content": [{"type": "image", "path": "a.png"}, {"type": "box"} | given]}
        for given in (part, {"boxes": [[0, 0, 1, 1]]})
    ]
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    main(["tokenize", str(tmp_path / "d.jsonl"), str(tmp_path / "t"), "--bundle", str(tmp_path / "b")])
    (error,) = [json.loads(line) for line in (tmp_path / "t" / "errors.jsonl").read_text().splitlines()]
    assert "d.jsonl, line 1" in error["error"]
    assert re.search(message, error["error"])


COCO = {
    "info": {"year": 2026},
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 24},
        {"id": 9, "file_name": "gone.png", "width": 40, "height": 24},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 12, 20.5, 6], "area": 123, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [2, 3, 4, 5], "area": 20, "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 24], "area": 20, "iscrowd": 1},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
}


def test_a_coco_file_becomes_an_image_with_labeled_boxes_in_reading_order(boxed, tmp_path):
    boxed.save_pretrained(tmp_path / "b")
    for folder in ("annotations", "val2017"):
        (tmp_path / "coco" / folder).mkdir(parents=True)
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "coco" / "val2017" / "a.png")
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(COCO))
    main(["tokenize", str(tmp_path / "coco"), str(tmp_path / "t"), "--bundle", str(tmp_path / "b")])
    data = TokenDataset(tmp_path / "t")
    document = data.document(0)
    contents = [boxed.decode(s) if s.modality != "image" else s.size for s in document.segments]
    assert contents[0] == (24, 40)
    assert contents[1::2] == ["cat", "dog"]
    assert np.abs(contents[2] * [40, 24, 40, 24] - [[2, 3, 6, 8]]).max() <= 40 * 0.5 / 999
    assert np.abs(contents[4] * [40, 24, 40, 24] - [[10, 12, 30.5, 18]]).max() <= 40 * 0.5 / 999
    (error,) = [json.loads(line) for line in (tmp_path / "t" / "errors.jsonl").read_text().splitlines()]
    assert "gone.png" in error["error"]


def test_objects_of_imagefolder_and_of_ms_swift_are_boxes_where_the_bundle_has_them(boxed, bundle_folder, tmp_path):
    boxed.save_pretrained(tmp_path / "b")
    (tmp_path / "d").mkdir()
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "d" / "a.png")
    row = {"file_name": "a.png", "objects": {"bbox": [[4, 6, 20, 12]], "categories": ["cat"]}}
    (tmp_path / "d" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    swift = {
        "messages": [
            {"role": "user", "content": "<image>Find <ref-object>."},
            {"role": "assistant", "content": "It is at <bbox>."},
        ],
        "images": ["a.png"],
        "objects": {"ref": ["a cat"], "bbox": [[4, 6, 24, 18]]},
    }
    (tmp_path / "d" / "swift.jsonl").write_text(json.dumps(swift) + "\n")
    for name, expected in (
        ("b", ["image", "text", "box", "image", "text", "text", "box", "text"]),
        ("plain", ["image", "image", "text", "text"]),
    ):
        bundle = str(tmp_path / "b") if name == "b" else str(bundle_folder)
        main(["tokenize", str(tmp_path / "d"), str(tmp_path / f"out-{name}"), "--bundle", bundle])
        data = TokenDataset(tmp_path / f"out-{name}")
        segments = [s for i in range(len(data)) for s in data.document(i).segments]
        assert [s.modality for s in segments] == expected
        for segment in segments:
            if segment.modality == "box":
                assert np.abs(boxed.decode(segment) - [[0.1, 0.25, 0.6, 0.75]]).max() <= 0.5 / 999


#: Things in scikit-image's photographs: x, y, width, height in pixels.
PHOTOGRAPHS = {
    "astronaut.png": [("face", [172, 62, 104, 148]), ("helmet", [308, 164, 204, 196])],
    "chelsea.png": [("cat", [2, 2, 446.5, 297]), ("eye", [170.25, 92.5, 48, 40]), ("nose", [229, 158, 54, 44])],
    "coffee.png": [("cup", [166, 42, 270, 208]), ("spoon", [20, 270, 290, 110])],
    "rocket.jpg": [("rocket", [309.5, 80, 34, 262])],
}


def test_photographs_in_a_coco_file_go_through_tokens_and_back_with_boxes_within_half_a_bin(boxed, tmp_path):
    skimage = pytest.importorskip("skimage")
    boxed.save_pretrained(tmp_path / "b")
    (tmp_path / "d" / "images").mkdir(parents=True)
    coco = {"images": [], "annotations": [], "categories": []}
    for image, (name, things) in enumerate(PHOTOGRAPHS.items(), 1):
        source = Path(skimage.__file__).parent / "data" / name
        (tmp_path / "d" / "images" / name).write_bytes(source.read_bytes())
        width, height = Image.open(source).size
        coco["images"].append({"id": image, "file_name": name, "width": width, "height": height})
        for label, box in things:
            number = len(coco["annotations"]) + 1
            coco["categories"].append({"id": number, "name": label})
            coco["annotations"].append({"id": number, "image_id": image, "category_id": number, "bbox": box, "iscrowd": 0})
    (tmp_path / "d" / "instances_photographs.json").write_text(json.dumps(coco, indent=1))
    main(["tokenize", str(tmp_path / "d"), str(tmp_path / "t"), "--bundle", str(tmp_path / "b"), "--image-area", "1024"])
    main(["inspect", str(tmp_path / "t"), "--verify", "--page", str(tmp_path / "page.html"), "--bundle", str(tmp_path / "b")])
    assert (tmp_path / "page.html").read_text().count("<rect") == len(coco["annotations"])
    main(["detokenize", str(tmp_path / "t"), str(tmp_path / "files"), "--bundle", str(tmp_path / "b")])
    lines = [json.loads(line) for line in (tmp_path / "files" / "documents.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        texts, boxes = line["content"][1::2], line["content"][2::2]
        found[line["id"]] = {text["text"]: box["boxes"][0] for text, box in zip(texts, boxes, strict=True)}
    assert set(found) == {Path(name).stem for name in PHOTOGRAPHS}
    for row in coco["images"]:
        for label, (x, y, wide, high) in PHOTOGRAPHS[row["file_name"]]:
            sides = np.array([row["width"], row["height"]] * 2)
            true = np.array([x, y, x + wide, y + high]) / sides
            assert np.abs(true - found[Path(row["file_name"]).stem][label]).max() <= 0.5 / 999 + 1e-6


@pytest.mark.parametrize(
    "text",
    [
        '{\n"type": "article", "text": "hello world"}',
        '{"version": "5.0", "shapes": [], "text": "hello world"}',
        '{"images": [], "text": "hello world"}',
        '{"info": {}, "text": "hello world"}',
    ],
)
def test_json_that_begins_like_coco_is_a_document_as_before(text, tmp_path):
    (tmp_path / "1.json").write_text(text)
    source = Source(SourceSpec(str(tmp_path)))
    (make,) = source.read(list(source.items()))
    assert [part.value for part in make()[0].content] == ["hello world"]


def test_a_coco_file_that_is_compressed_or_has_odd_ids_is_read(tmp_path):
    (tmp_path / "d").mkdir()
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "d" / "a.png")
    odd = json.loads(json.dumps(COCO))
    odd["images"][0]["id"] = odd["annotations"][0]["image_id"] = ["seven"]
    with gzip.open(tmp_path / "d" / "instances.json.gz", "wt") as file:
        file.write(json.dumps(odd))
    source = Source(SourceSpec(str(tmp_path / "d")), boxes=True)
    first, second = source.read(list(source.items()))
    assert [part.type for part in first()[0].content] == ["image", "text", "box"]
    with pytest.raises(UserError, match=r"instances.json.gz, image 2: gone.png: no such file"):
        second()


def test_what_is_no_box_stays_text_where_the_bundle_has_none(bundle_folder, boxed, tmp_path):
    (tmp_path / "d").mkdir()
    boxed.save_pretrained(tmp_path / "b")
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "d" / "a.png")
    swift = {
        "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "At <bbox> and <bbox>."}],
        "images": ["a.png"],
        "objects": {"ref": [], "bbox": [[4, 6], "(1,2),(3,4)"]},
    }
    folder = {"file_name": "a.png", "text": "a cat", "objects": {"bbox": [[9, 9, -3, 4]], "id": [0]}}
    (tmp_path / "d" / "swift.jsonl").write_text(json.dumps(swift) + "\n")
    (tmp_path / "d" / "metadata.jsonl").write_text(json.dumps(folder) + "\n")
    main(["tokenize", str(tmp_path / "d"), str(tmp_path / "t"), "--bundle", str(bundle_folder)])
    data = TokenDataset(tmp_path / "t")
    texts = [boxed.decode(s) for i in range(len(data)) for s in data.document(i).segments if s.modality == "text"]
    assert texts == ["a cat", "Where?", "At [4, 6] and (1,2),(3,4)."]
    assert not (tmp_path / "t" / "errors.jsonl").exists()
