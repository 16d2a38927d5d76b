"""Maps become images and come back; what is no map is refused with what it is."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from unitok.cli import main
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.sources import Source
from unitok.data.shards import TokenDataset
from unitok.document import Part
from unitok.errors import UserError
from unitok.media.maps import (
    SMOOTH,
    depth_to_rgb,
    label_colors,
    labels_to_rgb,
    read_map,
    rgb_to_depth,
    rgb_to_labels,
    save_map,
)


def test_the_colors_of_labels_are_pascal_vocs():
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        9: (192, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {label: tuple(label_colors()[label].tolist()) for label in known} == known
    assert len({tuple(color) for color in label_colors().tolist()}) == 256


def test_labels_come_back_from_colors_that_are_wrong_by_as_much_as_a_tokenizer_makes_them():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 21, (40, 50)).astype(np.uint8)
    assert np.array_equal(rgb_to_labels(labels_to_rgb(labels)), labels)
    noisy = labels_to_rgb(labels) + rng.normal(0, 10, (40, 50, 3))
    assert (rgb_to_labels(noisy.clip(0, 255), range(21)) == labels).mean() > 0.95  # a deviation of 10 is 28 dB
    assert (rgb_to_labels(noisy.clip(0, 255)) == labels).mean() < 0.9  # 256 colors are closer to each other


def test_pixels_of_a_third_color_between_two_labels_are_smoothed_away():
    labels = np.ones((40, 50), np.uint8)
    labels[:, 25:], labels[10:30, 5:20] = 2, 5
    blurred = ndimage.gaussian_filter(labels_to_rgb(labels).astype(float), (1.0, 1.0, 0))
    blurred += np.random.default_rng(0).normal(0, 12, blurred.shape)
    sharp, smooth = (rgb_to_labels(blurred, range(6), s) for s in (0.0, SMOOTH))
    assert set(np.unique(sharp)) > {1, 2, 5}  # between red and green all that is as dark
    assert set(np.unique(smooth)) == {1, 2, 5}
    assert (smooth == labels).mean() > 0.97
    assert np.array_equal(smooth, rgb_to_labels(blurred, (5, 4, 3, 2, 1, 0), SMOOTH))


def test_depth_comes_back_within_half_a_step():
    depth = np.random.default_rng(0).random((9, 7)) * 8
    assert np.abs(rgb_to_depth(depth_to_rgb(depth, 8.0), 8.0) - depth).max() <= 8 / 510 + 1e-6


@pytest.mark.parametrize("form", ["palette", "gray", "colors", "npy"])
def test_label_files_of_every_form_are_one_image(form, tmp_path):
    labels = np.arange(24, dtype=np.uint8).reshape(4, 6) % 7
    path = tmp_path / "a.png"
    if form == "palette":
        save_map(path, labels_to_rgb(labels), "labels")
        assert Image.open(path).mode == "P"
        assert np.array_equal(np.asarray(Image.open(path)), labels)
    elif form == "npy":
        np.save(tmp_path / "a.npy", labels.astype(np.int64))
        path = tmp_path / "a.npy"
    else:
        Image.fromarray(labels if form == "gray" else labels_to_rgb(labels)).save(path)
    assert np.array_equal(np.asarray(read_map("a", path.read_bytes(), "labels")), labels_to_rgb(labels))


def test_depth_of_16_bits_and_of_fractions_is_read_and_written(tmp_path):
    depth = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    Image.fromarray(depth).save(tmp_path / "a.png")
    gray = np.asarray(read_map("a", (tmp_path / "a.png").read_bytes(), "depth"))
    assert np.abs(gray[..., 0] - depth / 65535 * 255).max() <= 0.5
    half = np.asarray(read_map("a", depth / 55000 / 2, "depth"))
    assert half.max() == 128
    assert np.asarray(read_map("a", (tmp_path / "a.png").read_bytes(), "depth", far=55000)).max() == 255
    save_map(tmp_path / "b.png", gray, "depth")
    assert np.abs(np.asarray(Image.open(tmp_path / "b.png")).astype(int) - depth).max() <= 65535 / 510 + 1


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (np.full((2, 2, 3), 77, np.uint8), "labels", r"a: the color \[77, 77, 77\] at 0, 0 is no label's"),
        (np.full((2, 2), 300), "labels", "whole numbers, 0 to 255"),
        (np.full((2, 2), 0.5), "labels", "whole numbers, 0 to 255"),
        (np.full((2, 2), -1.0), "depth", "negative or not a finite number"),
        (np.full((2, 2), np.nan), "depth", "negative or not a finite number"),
        (np.zeros((2, 2, 3), np.uint8), "depth", "one number per pixel"),
        (np.zeros((2, 2), np.uint16), "normals", "8 bits per channel"),
        (b"no image", "labels", "a: not a readable map"),
    ],
)
def test_what_is_no_map_is_one_clear_line(content, kind, message):
    with pytest.raises(UserError, match=message):
        read_map("a", content, kind)


def test_maps_in_documents_are_tokenized_with_their_image_and_cropped_alike(bundle_folder, tiny, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 2, (6, 6)), np.ones((8, 8), int)).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray(labels_to_rgb(labels)).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(tmp_path / "bad.png")
    lines = [
        {"content": [{"type": "image", "path": "a.png"}, {"type": "image", "path": "labels.png", "map": "labels"}]},
        {"content": [{"type": "image", "path": "bad.png", "map": "labels"}]},
        {"content": [{"type": "image", "path": "a.png", "map": "smell"}]},
    ]
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    options = ["--image-crops", "3", "--image-flip", "--image-area", "2304"]
    main(["tokenize", str(tmp_path / "d.jsonl"), str(tmp_path / "t"), "--bundle", str(bundle_folder), *options])
    data = TokenDataset(tmp_path / "t")
    assert len(data) == 5  # as it is, mirrored, three crops
    for i in range(len(data)):
        image, map_ = data.document(i).segments
        assert image.size == map_.size
        assert image.source.partition("#")[2] == map_.source.partition("#map=labels")[2].removeprefix("&")
        agree = np.mean(image.codes == map_.codes)  # the image is the map's colors, but resized with colors in between
        assert agree > (0.99 if "xywh" not in image.source else 0.3)
    errors = {json.loads(line)["error"] for line in (tmp_path / "t" / "errors.jsonl").read_text().splitlines()}
    assert len(errors) == 2
    assert any("is no label's" in error for error in errors)
    assert any("map 'smell'; choose one of labels, depth, edges, normals" in error for error in errors)


def test_folders_of_modalities_are_documents_of_files_with_equal_paths(bundle_folder, tmp_path):
    labels = np.kron(np.eye(4, dtype=np.uint8), np.ones((8, 8), np.uint8))
    for split in ("train", "val"):
        for number in (1, 2):
            for folder in ("rgb", "semantic", "depth", "caption"):
                (tmp_path / "d" / split / folder / "x").mkdir(parents=True, exist_ok=True)
            stem = f"x/{number}"
            Image.fromarray(np.full((32, 32, 3), 40 * number, np.uint8)).save(tmp_path / "d" / split / "rgb" / f"{stem}.jpg")
            Image.fromarray(labels * number).save(tmp_path / "d" / split / "semantic" / f"{stem}.png")
            (tmp_path / "d" / split / "caption" / f"{stem}.txt").write_text(f"number {number}\n")
        Image.fromarray(np.full((32, 32), 30_000, np.uint16)).save(tmp_path / "d" / split / "depth" / "x" / "1.png")
    main(["tokenize", str(tmp_path / "d"), str(tmp_path / "t"), "--bundle", str(bundle_folder)])
    data = TokenDataset(tmp_path / "t", "train")
    documents = [data.document(i) for i in range(len(data))]
    assert [document.id for document in documents] == ["train/x/1", "train/x/2"]
    sources = [[segment.source for segment in document.segments] for document in documents]
    assert sources[0] == ["", "train/rgb/x/1.jpg", "train/semantic/x/1.png#map=labels", "train/depth/x/1.png#map=depth"]
    assert sources[1] == ["", "train/rgb/x/2.jpg", "train/semantic/x/2.png#map=labels"]
    assert len(TokenDataset(tmp_path / "t", "validation")) == 2
    assert not (tmp_path / "t" / "errors.jsonl").exists()


@pytest.mark.parametrize(
    ("files", "aligned"),
    [
        (("rgb/1.png", "depth/1.png", "README.md"), True),
        (("rgb/1.png", "depth/1.png", "rgb/LICENSE"), True),
        (("images/1.png", "labels/1.txt"), False),  # YOLO's
        (("images/1.png", "captions/captions.jsonl"), False),
        (("rgb/1.png", "depth/1.png", "extra/1.txt"), False),
        (("images/1.png", "images/2.png"), False),
    ],
)
def test_folders_are_aligned_where_all_files_are_of_modalities(files, aligned, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".png"):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
        else:
            (tmp_path / name).write_text('{"text": "a"}\n')
    items = list(Source(SourceSpec(str(tmp_path))).items())
    assert ([item.kind for item in items] == ["aligned"]) == aligned


def test_variants_in_aligned_folders_stay_in_their_group_and_one_split_is_none(tmp_path):
    for folder in ("rgb", "depth"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "train" / folder / f"1_{number}.png")
    items = list(Source(SourceSpec(str(tmp_path), group_separator="_")).items())
    assert [(item.id, item.split, item.group) for item in items] == [("train/1_0", "", "train/1"), ("train/1_1", "", "train/1")]


def test_maps_in_prompts_are_read_as_in_data_sets(tiny, tmp_path):
    labels = np.zeros((32, 32), np.uint8)
    labels[8:24, 8:24] = 3
    np.save(tmp_path / "m.npy", labels)
    Image.fromarray(labels).save(tmp_path / "m.png")
    read = [tiny.read(Part("image", path=tmp_path / name, view="map=labels"))[0] for name in ("m.npy", "m.png")]
    assert np.array_equal(read[0].codes, read[1].codes)
    assert np.array_equal(read[0].codes, tiny.read(labels_to_rgb(labels))[0].codes)
    palette = Image.fromarray(labels, "P")
    palette.putpalette([0, 0, 0] * 3 + [255, 255, 255])
    assert np.asarray(read_map("a", palette, "edges")).max() == 255
    for bad in (np.zeros((0, 0)), np.array([["a"]])):
        with pytest.raises(UserError, match="it holds numbers"):
            read_map("a", bad, "labels")
