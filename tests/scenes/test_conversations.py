"""Built-in conversations: every turn follows from the scene before it, an oracle knows its answer, and no kept-out scene comes up."""

import json

import numpy as np
import pytest

from unitok.generation_config import GenerationConfig
from unitok.media import load_audio, open_image
from unitok.scenes.conversations import MOST_TURNS, draw_conversation
from unitok.scenes.evaluate import Evaluation, config_of_scenes
from unitok.scenes.files import read_scenes, write_scenes
from unitok.scenes.oracle import read_audio, read_image
from unitok.scenes.world import change_caption, draw_scene, parse_caption, questions

KINDS = {"draw", "describe", "ask", "change", "play"}


def test_turns_follow_from_the_scene_and_kept_out_scenes_never_come_up():
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(600):
        scene = draw_scene(rng)
        turns = draw_conversation(scene, rng, lambda changed: changed.fold() == "seen")
        assert 2 <= len(turns) <= MOST_TURNS
        assert turns[0].kind in ("draw", "describe")
        before = scene
        for turn in turns:
            kinds.add(turn.kind)
            assert turn.scene.fold() == "seen"
            if turn.kind == "change":
                assert turn.answer == change_caption(before, turn.scene)
                changed = [turn.scene.background != before.background, turn.scene.objects != before.objects]
                assert sum(changed) == 1
                assert turn.scene.layout == before.layout
                differing = [pair for pair in zip(before.objects, turn.scene.objects) if pair[0] != pair[1]]
                if differing:
                    ((old, new),) = differing
                    assert new.shape == old.shape
                    word = turn.text.rpartition(" ")[2]
                    assert word == (new.color if new.color != old.color else {"large": "larger", "small": "smaller"}[new.size])
            else:
                assert turn.scene == before
            if turn.kind == "ask":
                assert (turn.text, turn.answer.removesuffix(".")) in questions(turn.scene)
            if turn.kind == "draw":
                assert parse_caption(turn.text.removeprefix("draw ")) == scene
            if turn.kind == "describe":
                assert turn.shown
                assert parse_caption(turn.answer) == scene
            before = turn.scene
    assert kinds == KINDS


def test_the_files_of_conversations_show_the_scene_of_each_turn(tmp_path):
    write_scenes(tmp_path, 200, seed=3, resolution=64, workers=1)
    found = 0
    for line in (tmp_path / "documents.jsonl").read_text().splitlines():
        document = json.loads(line)
        if not document["id"].endswith("-conversation"):
            continue
        found += 1
        roles = [part["role"] for part in document["content"]]
        assert roles[0] == "user"
        assert roles[-1] == "assistant"
        scene = None
        for part in document["content"]:
            assert part.get("loss", True) == (part["role"] == "assistant")
            if part["type"] == "image":
                before, scene = scene, read_image(np.asarray(open_image(tmp_path / part["path"])))
                assert scene is not None
                assert scene != before
            if part["type"] == "audio" and scene:
                waveform, rate = load_audio(tmp_path / part["path"])
                assert read_audio(waveform.numpy(), rate) == scene.notes()
    assert found > 20


@pytest.mark.parametrize("described", [False, True])
def test_every_turn_is_scored_by_its_kind(tiny, tmp_path, scenes_folder, described):
    rows = read_scenes(scenes_folder)[:6]
    evaluation = Evaluation(tiny, tmp_path, 0, config_of_scenes(tiny, GenerationConfig(edit_described=described)))
    evaluation.max_new_tokens = 120
    evaluation.conversations(scenes_folder, rows)
    assert evaluation.malformed == 0
    scores = {name: value for name, value in evaluation.scores.items() if name.startswith("generation.conversation.")}
    assert {name.rpartition(".")[2] for name in scores} <= KINDS
    assert all(value == 0 for value in scores.values())  # random weights are right in nothing
    assert sum(value for name, value in evaluation.scores.items() if name.startswith("turns.")) >= 2 * len(rows)
