"""What the examples compute, where that needs no package of theirs."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from unitok.cli import main
from unitok.data.prepare.recipe import load_recipe

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_judge_of_melodies_hears_what_is_played():
    music = runpy.run_path(str(EXAMPLES / "music" / "evaluate.py"))
    notes, rate, beat = {"C4": 60, "F#4": 66, "A5": 81}, 8000, 0.5
    time = np.arange(round(beat * rate)) / rate
    melody = [np.zeros(400)]  # 0.05 s
    for number in notes.values():
        turns = 2 * np.pi * 440 * 2 ** ((number - 69) / 12) * time
        melody.append(np.sin(turns) * 0.3 + np.sin(2 * turns) * 0.3 + np.sin(3 * turns) * 0.1)
    assert music["read_notes"](np.concatenate(melody), rate, 120, 3) == list(notes)
    assert music["read_notes"](np.zeros(16000), rate, 120, 2) == ["", ""]
    assert music["read_caption"]("an oboe plays C4 F#4 A5 in D major at 90") == (["C4", "F#4", "A5"], 90)
    assert music["read_caption"]("a large red circle") == ([], 120)


def test_texts_of_recordings_become_words():
    words_of = runpy.run_path(str(EXAMPLES / "speech" / "prepare.py"))["words_of"]
    assert words_of("Please press 1, or 42 (beep) - don't wait... [tone]") == "please press one or forty two don't wait"
    assert words_of("120 <beep>") == "one two zero"
    assert words_of("[ascending tones]") == ""


@pytest.mark.parametrize(
    "config",
    sorted(EXAMPLES.glob("*/*coder.yaml")) + sorted(EXAMPLES.glob("*/codec.yaml")),
    ids=lambda file: "-".join(file.parts[-2:]),
)
def test_the_configs_of_examples_are_read(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(config), "--out", str(tmp_path / "out"), "--print_config"])
    assert end.value.code == 0
    assert "class_path" in capsys.readouterr().out


def test_the_recipe_of_speech_is_read():
    sources = load_recipe(EXAMPLES / "speech" / "recipe.yaml")
    assert [(source.name, source.order) for source in sources] == [
        ("real", ("text", "audio")),
        ("heard", ("audio", "text")),
        ("spliced", ("text", "audio")),
        ("varied", ("audio", "text")),
    ]
