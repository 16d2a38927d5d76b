"""Speaking texts of any length."""

import pytest
import torch

from unitok.errors import UserError
from unitok.sample.speech import PAUSE, sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is nine o'clock. How are you today?  Fine!", ["It is nine o'clock. How are you today?", "Fine!"]),
        ("Dr. Smith met Mr. J. Jones in town.", ["Dr. Smith met Mr. J.", "Jones in town."]),
        ("It costs 3.50 now, and here\n\nand 4 later.", ["It costs 3.50 now, and here", "and 4 later."]),
        ('"Stop it at once, please!" she said.', ['"Stop it at once, please!"', "she said."]),
        ("今天的天气非常好，我们去公园散步吧，好不好。再见！", ["今天的天气非常好，我们去公园散步吧，好不好。", "再见！"]),
        ("It costs 1,000 dollars.", ["It costs 1,000 dollars."]),
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
    each = [
        tiny.generate(text, "audio", seed=0, **config)[0].audios[0] for text in ("One bell in the old tower.", "Two bells!")
    ]
    pause = torch.zeros(each[0].shape[0], round(PAUSE * rate))
    spoken = tiny.speak("One bell in the old tower. Two bells!", seed=0, generation_config=config | {"n": 2})
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
