"""Speaking texts of any length."""

from dataclasses import replace

import pytest
import torch

from unitok.document import Document
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig
from unitok.grammar import Grammar
from unitok.sample.engine import Session
from unitok.sample.requests import generate_outputs, make_drafts, sampling_of
from unitok.sample.speech import PAUSE, prompts_to_speak, sentences, waveform_of
from unitok.sample.stream import Chunk, stream_drafts


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


def test_words_are_spoken_one_after_the_other(tiny):
    config = {"temperature": 0.0, "max_new_tokens": 200, "speech_unit": "word"}
    words = ["Two", " red", " bells!"]
    first, *further = (tiny.read_prompt(word) for word in words)
    document = first
    for word in further:  # the same in steps
        (output,) = tiny.generate(document, "audio:3", seed=0, temperature=0.0)
        document = Document(output.document.segments + word.segments)
    ((prompt, plan),) = prompts_to_speak(tiny, "".join(words), words=True)
    short = [replace(item, repeats=item.repeats or 3) for item in plan]
    (output,) = generate_outputs(tiny, [prompt], GenerationConfig(temperature=0.0), plans=[short])
    assert output.document.segments[:-1] == document.segments
    assert [segment.modality for segment in output.new.segments] == ["audio", "text", "audio", "text", "audio"]
    waveform = waveform_of(output)
    assert waveform.shape[-1] == 9 * tiny.require("audio").hop_length
    spoken = tiny.speak("Two red bells! One bell in the old tower.", generation_config=config)
    pause = round(PAUSE * tiny.require("audio").sample_rate)
    assert spoken.shape[-1] > pause + 9 * tiny.require("audio").hop_length


def test_a_stream_of_words_is_decoded_as_a_whole(tiny):
    ((prompt, plan),) = prompts_to_speak(tiny, "Two red bells", words=True)
    plans = [[replace(item, repeats=item.repeats or 8) for item in plan]]
    config = GenerationConfig(temperature=0.0)
    (whole,) = generate_outputs(tiny, [prompt], config, plans=plans)
    drafts = make_drafts(tiny, [prompt], config, plans=plans)
    session = Session(tiny.inference, Grammar(tiny.vocab), sampling_of(tiny, config), ahead=4)
    chunks = [c for c in stream_drafts(tiny, session, drafts, 1) if isinstance(c, Chunk)]
    samples = torch.cat([c.content for c in chunks if c.modality == "audio"], -1)
    torch.testing.assert_close(samples, waveform_of(whole), atol=1e-5, rtol=0)
    texts = {c.span: "" for c in chunks if c.modality == "text"}
    for chunk in (c for c in chunks if c.modality == "text"):
        texts[chunk.span] += chunk.content
    assert list(texts.values()) == [" red", " bells"]
