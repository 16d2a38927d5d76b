"""Promises of the built-in bundle: its recipe makes it whole, with scores, checksums and a card; the one that ships does what it says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unitok import Unitok
from unitok.bundle.checksums import checksums
from unitok.cli import main
from unitok.evaluate.boxes import box_iou
from unitok.hub import BUILT_IN
from unitok.scenes import recipe, tune
from unitok.scenes.evaluate import interval, to_bytes
from unitok.scenes.oracle import read_audio, read_image
from unitok.scenes.pipeline import Pipeline
from unitok.scenes.tasks import AVERAGES, make_task
from unitok.scenes.world import object_boxes, parse_caption, render_image

PROMPT = "a large red circle left of a small blue square on a white background"


# ---- The recipe, with trainings of a few steps ------------------------------------------------------------------------


#: A decoder that generates a test's samples in half the time.
SMALL = ("--model.init_args.decoder.num_hidden_layers", "1", "--model.init_args.decoder.hidden_size", "64")


def in_this_process(self: Pipeline, command: list[str], save) -> None:
    """Stands for a process: 3 steps of training, of which the last writes nothing to the terminal."""
    words = list(command)
    if words[0] == "fit":
        words += ["--model.init_args.steps", "3", "--model.init_args.log_every", "1", "--trainer.enable_progress_bar", "false"]
        words += (
            [*("--data.init_args.sequence_length", "800", "--model.init_args.compile", "false"), *SMALL]
            if {f"{name}.yaml" for name in recipe.TRAININGS} & {Path(word).name for word in words}
            else []
        )
    main(words)


def test_the_recipe_makes_a_bundle_with_scores_checksums_and_a_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "_run", in_this_process)
    monkeypatch.setattr(recipe, "SCENES", 40)
    monkeypatch.setattr(recipe, "EDITED", 20)
    monkeypatch.setattr(recipe, "REENCODED", 20)
    monkeypatch.setattr(recipe, "PER_DIRECTION", 2)
    monkeypatch.setattr(tune, "TEMPERATURES", (0.4, 0.0))
    monkeypatch.setattr(tune, "GUIDANCE_SCALES", (1.5,))
    recipe.run_recipe(tmp_path / "runs", tmp_path / "scenes")
    bundle = Unitok.from_pretrained(tmp_path / "scenes")
    assert bundle.parts == ["text", "image", "audio", "box", "point", "model"]
    scores = json.loads((tmp_path / "runs" / "eval" / "scores.json").read_text())
    shown = bundle.facts["scores"]["questions about an image"]["all"]
    assert shown.startswith(f"{100 * scores['generation.questions.exact']:.1f} % (")
    assert set(bundle.facts["scores"]["caption to image"]) >= {"all", "composed", "systematic"}
    assert {"edit an image", "fill a word", "find all things"} <= set(bundle.facts["scores"])
    training = bundle.facts["training"]
    assert (training["data"]["scenes"], training["data"]["edited scenes"]) == (40, 20)
    data = {name: training[name]["data"] for name in ("model", "model, edits", "model, rehearsal")}
    assert list(data.values()) == ["tokens", "edit-tokens", "tokens, reencoded-tokens"]
    assert set(PROMPT.split()) <= set(bundle.facts["world"]["words"])
    info = json.loads((tmp_path / "scenes" / "bundle.json").read_text())
    assert info["sha256"] == checksums(tmp_path / "scenes")
    assert all(t.dtype == torch.float16 for t in load_file(tmp_path / "scenes" / "model" / "model.safetensors").values())
    card = (tmp_path / "scenes" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "caption to image / systematic" in card
    assert bundle.generation_config.to_dict()["image"]["temperature"] in (0.0, 0.4)
    before = capsys.readouterr().out
    assert "== scenes (0 s of 32400 s spent)" in before
    recipe.run_recipe(tmp_path / "runs", tmp_path / "scenes")  # again: nothing is left to do
    assert capsys.readouterr().out.count("already done") == 16


def test_the_interval_is_wilsons():
    low, high = interval(0.9, 200)
    assert (round(low, 4), round(high, 4)) == (0.8506, 0.9343)
    assert interval(1.0, 200)[1] == 1.0
    assert interval(0.0, 200)[0] == 0.0


# ---- The bundle that ships -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Unitok:
    return Unitok.from_pretrained("scenes")


def test_it_draws_and_plays_what_the_prompt_says(shipped):
    outputs = shipped.generate(PROMPT, modalities="image,audio", n=8, seed=0)
    pixels = [((o.images[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy() for o in outputs]
    assert outputs[0].images[0].shape == (3, 64, 64)
    wanted = parse_caption(PROMPT)
    assert sum(read_image(p) == wanted for p in pixels) >= 6
    notes = [[(n.pitch, n.timbre) for n in read_audio(o.audios[0].numpy(), shipped.audio.sample_rate)] for o in outputs]
    assert sum(read == [(n.pitch, n.timbre) for n in wanted.notes()] for read in notes) >= 6


def test_it_says_what_an_image_shows_and_plays_it(shipped):
    image = shipped.generate(PROMPT, modalities="image", seed=1)[0].images[0]
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).byte().numpy()
    assert parse_caption(shipped.generate(pixels, modalities="text", seed=0)[0].text) == parse_caption(PROMPT)


def test_it_finds_edits_and_fills(shipped):
    scene = parse_caption(PROMPT)
    image, (box, _) = (draw(scene, np.random.default_rng(4)) for draw in (lambda s, r: render_image(s, r, 64), object_boxes))
    found = shipped.generate([Image.fromarray(image), " find the red circle:"], modalities="box:1")[0].boxes[0][0]
    assert box_iou(found / 64, box) > 0.5
    (edited,) = shipped.edit(Image.fromarray(image), " make the background black")
    assert read_image(to_bytes(edited.images[0])) == replace(scene, background="black")
    (filled,) = shipped.fill(PROMPT.replace("circle", "___"), prompt=Image.fromarray(image))
    assert filled.text == PROMPT


def test_its_files_are_those_that_its_recipe_wrote_and_small(shipped):
    folder = BUILT_IN / "scenes"
    info = json.loads((folder / "bundle.json").read_text())
    assert info["sha256"] == checksums(folder)
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 30e6
    assert f"unitok {info['training']['data']['unitok']}" in (folder / "README.md").read_text()
    card = (folder / "README.md").read_text()
    for row, values in info["scores"].items():
        for column, value in values.items() if isinstance(values, dict) else []:
            if isinstance(value, str):
                assert f"| {row} / {column} | {value} |" in card


def test_sample_needs_no_bundle_and_tells_of_words_outside_its_world(tmp_path, recwarn):
    main(["sample", "a large dog on a white background", "--modalities", "image", "--out", str(tmp_path / "out")])
    assert list((tmp_path / "out").glob("*.png"))
    assert any("never read dog" in str(w.message) for w in recwarn)


def test_the_words_of_its_tasks_are_known_to_it(recwarn):
    scene, rng = parse_caption(PROMPT), np.random.default_rng(0)
    tasks = [make_task(kind, scene, object_boxes(scene, rng), rng) for kind in AVERAGES for _ in range(4)]
    texts = [value for task in tasks for kind, value in task.given if kind == "text"]
    texts += [example["prompt"] for example in recipe.examples() if example["prompt"]]
    Unitok.from_pretrained("scenes").generate([[text] for text in dict.fromkeys(texts)], "text", max_new_tokens=40)
    assert not [str(w.message) for w in recwarn if "never read" in str(w.message)]


def test_a_file_is_not_taken_for_a_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog.png").write_bytes(b"")
    for text, expected in (
        ("dog.png", "dog.png is a file: give it with the flag of its kind, such as --image"),
        ("cat.jpg", "cat.jpg: no such file; a text that looks like a file's name is given with --text"),
        ("a" * 5000, "tokens"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["sample", text])
        assert stopped.value.code == 2
        assert expected in capsys.readouterr().err
