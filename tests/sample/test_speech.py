"""Speaking texts of any length."""

import pytest
import torch

from unitok.errors import UserError
from unitok.sample.speech import PAUSE, sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello. How are you?  Fine!", ["Hello.", "How are you?", "Fine!"]),
        ("It costs 3.50 now\n\nand 4 later.", ["It costs 3.50 now", "and 4 later."]),
        ('"Stop!" she said.', ['"Stop!"', "she said."]),
        ("你好。再见！", ["你好。", "再见！"]),
        ("no end", ["no end"]),
        (" \n ", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_long_sentences_are_divided_without_losing_a_word():
    text = ", ".join(f"part {i} of many" for i in range(40)) + " " + "word " * 100 + "x" * 450 + "."
    found = sentences(text, 60)
    assert max(map(len, found)) <= 60
    assert "".join(found).replace(" ", "") == text.replace(" ", "")
    assert found[0].endswith(",")


def test_a_text_is_spoken_sentence_by_sentence(tiny):
    config = {"temperature": 0.0, "max_new_tokens": 40}
    rate = tiny.require("audio").sample_rate
    each = [tiny.generate(text, "audio", seed=0, **config)[0].audios[0] for text in ("One bell.", "Two bells!")]
    pause = torch.zeros(each[0].shape[0], round(PAUSE * rate))
    spoken = tiny.speak("One bell. Two bells!", seed=0, generation_config=config)
    assert torch.equal(spoken, torch.cat([each[0], pause, each[1]], -1))
    voice = (torch.randn(1, 4000) * 0.1, 8000)
    other = tiny.speak("One bell.", voice=voice, seed=0, generation_config=config)
    prompted = tiny.generate([voice, "One bell."], "audio", seed=0, **config)[0].audios[0]
    assert torch.equal(other, prompted)
    for bad, given, message in (
        (" ", {}, "give a text to speak"),
        ("a", {"voice": "alice"}, "voice: give a recording"),
        ("a", {"speed": 2}, "speed"),
    ):
        with pytest.raises(UserError, match=message):
            tiny.speak(bad, **given)
