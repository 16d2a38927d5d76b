"""Promises of scenes and their oracle: files are read right, captions have inverses, held-out pairs stay out."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from unitok.errors import UserError
from unitok.media import load_audio, load_image, open_image
from unitok.scenes.files import read_scenes, write_scenes
from unitok.scenes.oracle import read_audio, read_image
from unitok.scenes.world import (
    BACKGROUNDS,
    COLORS,
    KEPT_OUT_PAIRS,
    SHAPES,
    Scene,
    SceneObject,
    audio_caption,
    caption,
    draw_scene,
    kept_out_pairs,
    parse_audio_caption,
    parse_caption,
    questions,
    render_audio,
    render_image,
)


def test_the_oracle_reads_at_least_99_of_100_written_files_right(tmp_path):
    write_scenes(tmp_path, 150, seed=11, max_objects=3, workers=1)
    right = []
    for row in read_scenes(tmp_path):
        pixels = (load_image(tmp_path / row["image"]).permute(1, 2, 0).numpy() + 1) * 127.5
        samples, rate = load_audio(tmp_path / row["audio"])
        right += [read_image(pixels) == row["scene"], read_audio(samples.numpy(), rate) == row["scene"].notes()]
    assert np.mean(right) >= 0.99


def test_the_oracle_sees_every_single_change():
    rng = np.random.default_rng(0)
    base = Scene("white", "row", (SceneObject("red", "circle", "large"), SceneObject("blue", "cross", "small")))
    changes = [Scene(b, base.layout, base.objects) for b in BACKGROUNDS if b != "white"] + [
        Scene("white", "column", base.objects)
    ]
    changes += [Scene("white", "row", (SceneObject(c, "circle", "large"), base.objects[1])) for c in COLORS if c != "red"]
    changes += [Scene("white", "row", (SceneObject("red", s, "large"), base.objects[1])) for s in SHAPES if s != "circle"]
    changes += [
        Scene("white", "row", (SceneObject("red", "circle", "small"), base.objects[1])),
        Scene("white", "row", base.objects[::-1]),
    ]
    for other in changes:
        assert read_image(render_image(other, rng)) == other != base


def test_nothing_to_see_or_hear_is_not_read_as_something():
    assert read_image(np.full((32, 32, 3), 128)) is None
    assert read_audio(np.zeros(6400, np.float32), 8000) == ()


def test_half_a_note_more_is_a_wrong_number():
    rng = np.random.default_rng(0)
    scene = draw_scene(rng, 1)
    wave = render_audio(scene, rng)
    assert read_audio(wave, 8000) == scene.notes()
    assert read_audio(np.concatenate([wave, wave[:, :1600]], 1), 8000) != scene.notes()


def test_captions_parse_back_and_other_texts_do_not():
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = draw_scene(rng, 3)
        assert parse_caption(caption(scene, rng)) == scene
        assert parse_audio_caption(audio_caption(scene)) == scene.notes()
    for text in ("", "a red circle", "a small red circle a small red ring on a white background", "a loud C4"):
        assert parse_caption(text) is None
        assert parse_audio_caption(text) is None


def test_questions_have_one_answer_each():
    rng = np.random.default_rng(2)
    for _ in range(100):
        pairs = questions(draw_scene(rng, 2))
        assert len({q for q, _ in pairs}) == len(pairs) >= 4


def test_a_tenth_of_the_pairs_is_kept_out_and_every_color_and_shape_is_still_seen():
    assert len(KEPT_OUT_PAIRS) == len(COLORS) * len(SHAPES) // 10
    seen = {(c, s) for c in COLORS for s in SHAPES} - KEPT_OUT_PAIRS
    assert {c for c, _ in seen} == set(COLORS)
    assert {s for _, s in seen} == set(SHAPES)
    assert not kept_out_pairs(0) & kept_out_pairs(1)


def test_every_scene_is_in_one_fold_and_training_documents_show_seen_scenes_alone(tmp_path):
    rng = np.random.default_rng(3)
    for fold, _ in itertools.product(("seen", "composed", "systematic"), range(100)):
        assert draw_scene(rng, 3, fold).fold() == fold
    folds = [draw_scene(rng, 2, None).fold() for _ in range(2000)]
    pairs = 1 - (0.9 + 0.9 * 0.9) / 2  # scenes with one of a tenth of the pairs
    assert abs(folds.count("systematic") / 2000 - pairs) < 0.03
    assert abs(folds.count("composed") / 2000 - 0.1 * (1 - pairs)) < 0.03
    write_scenes(tmp_path, 200, seed=1, workers=1)
    shown, named = set(), set()
    for line in (tmp_path / "documents.jsonl").read_text().splitlines():
        for part in json.loads(line)["content"]:
            if "path" in part:
                image = tmp_path / "images" / f"{Path(part['path']).stem}.png"  # also of what audio plays
                shown.add(read_image(np.asarray(open_image(image))).fold())
            elif scene := parse_caption(part["text"]):
                named.add(scene.fold())
    assert shown == {"seen"}
    assert named == {"seen", "composed", "systematic"}
    assert len(list((tmp_path / "images").glob("??????.png"))) == 200  # for tokenizers, of every fold


def test_scenes_show_every_attribute_and_every_object_has_a_note_of_its_own():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, 3) for _ in range(600)] + [draw_scene(rng, 3, "systematic") for _ in range(200)]
    assert {scene.background for scene in scenes} == {"white", "gray", "black"}
    assert {(scene.layout, len(scene.objects)) for scene in scenes} == {
        *(("one", 1), ("row", 2), ("column", 2), ("two over one", 3), ("one over two", 3))
    }
    objects = {one for scene in scenes for one in scene.objects}
    assert len(objects) == 8 * 5 * 2  # colors, shapes, sizes
    assert len({one.note() for one in objects}) == len(objects)
    for one, other in itertools.combinations(objects, 2):  # color is pitch, shape timbre, size loudness
        mine, theirs = one.note(), other.note()
        assert (one.color == other.color) == (mine.pitch == theirs.pitch)
        assert (one.shape == other.shape) == (mine.timbre == theirs.timbre)
        assert (one.size == other.size) == (mine.loudness == theirs.loudness)


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_scenes(tmp_path / name, 8, seed=seed, max_objects=2, workers=1)
    a, b, c = (
        {f.relative_to(tmp_path / n).as_posix(): f.read_bytes() for f in sorted((tmp_path / n).rglob("*.*"))} for n in "abc"
    )
    assert a == b != c


def test_documents_go_in_every_direction_and_losses_fall_on_what_follows(tmp_path):
    write_scenes(tmp_path, 60, seed=4, max_objects=2, workers=1)
    shapes = set()
    for line in (tmp_path / "documents.jsonl").read_text().splitlines():
        content = json.loads(line)["content"]
        assert content[0].get("loss") is False or len(content) == 1  # what is given, but for text alone
        assert content[-1].get("loss", True)
        shapes.add(tuple(part["type"] for part in content))
        assert all((tmp_path / part["path"]).exists() for part in content if "path" in part)
    for wanted in (("text", "image"), ("image", "text"), ("text", "audio"), ("audio", "text"), ("image", "audio"),
                   ("text", "image", "text", "image"), ("text", "image", "audio")):  # fmt: skip
        assert wanted in shapes


def test_scenes_of_another_version_are_one_line(tmp_path):
    write_scenes(tmp_path, 2, max_objects=1, workers=1)
    path = tmp_path / "scenes.jsonl"
    path.write_text(path.read_text().replace('"objects"', '"things"'))
    with pytest.raises(UserError, match="row 1 is not a scene as this version writes them"):
        read_scenes(tmp_path)
