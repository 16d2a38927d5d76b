"""Natural calls that are wrong: each is one line that names the argument and says what to do."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unitok
from unitok import Document, GenerationConfig, SamplingParams, Segment, Unitok
from unitok.errors import UserError

NOISE = np.random.default_rng(0).standard_normal(8000)

GENERATE = [
    # names of other libraries, and slips
    ({"temprature": 0.5}, "generate: no 'temprature'; did you mean temperature?"),
    ({"max_new_tokenz": 5}, "no 'max_new_tokenz'; did you mean max_new_tokens?"),
    ({"num_return_sequences": 5}, "no 'num_return_sequences'; did you mean n?"),
    ({"max_length": 5}, "did you mean max_new_tokens?"),
    ({"max_tokens": 5}, "did you mean max_new_tokens?"),
    ({"do_sample": False}, "for greedy decoding give temperature=0"),
    ({"cfg_scale": 3}, "did you mean guidance_scale?"),
    ({"guidance": 3}, "did you mean guidance_scale?"),
    ({"output": "image"}, "did you mean modalities?"),
    ({"sampling_params": {}}, "did you mean generation_config?"),
    ({"generator": torch.Generator()}, "did you mean seed?"),
    ({"smell": 3}, "generate: no 'smell'; there are prompt, modalities"),
    # values
    ({"temperature": "hot"}, "temperature 'hot': it must be a number"),
    ({"temperature": -1}, "temperature -1: it must be 0 or more"),
    ({"temperature": True}, "temperature True: it must be a number"),
    ({"top_p": 95}, "top_p 95: it must be above 0 and at most 1"),
    ({"top_k": 2.5}, "top_k 2.5: it must be an integer"),
    ({"guidance_schedule": "sine"}, "guidance_schedule sine: choose one of constant, linear, cosine"),
    ({"n": "2"}, "n is '2': it must be an integer of at least 1"),
    ({"n": 1.5}, "n is 1.5"),
    ({"n": 0}, "n is 0"),
    ({"max_new_tokens": 2}, "a budget of 2 tokens is too small"),
    ({"prefix_fraction": "half"}, "prefix_fraction is 'half': it must be above 0 and at most 1"),
    ({"prefix_fraction": 0.5}, "prefix_fraction: the prompt must end with an image or audio"),
    ({"rank_by": "likelihood"}, "rank_by is 'likelihood': choose one of logprob, pmi"),
    ({"batch_size": "2"}, "batch_size is '2'"),
    ({"modalities": 3}, "modalities is an int: give free, or a plan such as text,image:8x12,audio:2s"),
    ({"modalities": [3]}, "^modalities is a list"),
    ({"modalities": []}, "^modalities is empty: give free, or a plan such as"),
    ({"modalities": ""}, "^modalities is empty"),
    ({"modalities": "video"}, "^modalities 'video': no modality 'video' in this vocabulary; it has text, image, audio"),
    ({"modalities": ["image", "smell"]}, "^modalities 'smell': no modality 'smell'"),
    ({"modalities": "image:2 x 3"}, "^modalities 'image:2 x 3'"),
    # sampling of one kind of content
    ({"image": 0.5}, 'image is a float: give {"temperature": 0.5} or SamplingParams'),
    ({"image": Image.new("RGB", (8, 8))}, "image is an Image: give .* content goes into the prompt"),
    ({"image": {"temprature": 1}}, "image: no 'temprature'; did you mean temperature?"),
    ({"image": {"top_p": 2}}, "image: top_p 2: it must be above 0"),
    ({"sampling": SamplingParams()}, "sampling is a SamplingParams: give values by tokenizer"),
    ({"sampling": {"images": {"top_k": 1}}}, "no tokenizer 'images'; the bundle has text, image, audio"),
    ({"sampling": {"image": {"topk": 1}}}, "image: no 'topk'; did you mean top_k?"),
    ({"generation_config": 3}, "generation_config is an int: give a GenerationConfig, or a dict of its fields"),
    ({"generation_config": {"temprature": 1}}, "generation_config: no 'temprature'; did you mean temperature?"),
    ({"generation_config": {"image": {"top_k": -1}}}, "generation_config: image: top_k -1"),
    ({"generation_config": {"sampling": None}}, "generation_config: sampling is None: give values by tokenizer"),
    ({"generation_config": {"sampling": 3, "speech": {}}}, "generation_config: sampling is an int"),
    ({"sampling": {"seed": {"top_k": 1}}}, "sampling: 'seed' is no name of a tokenizer"),
    ({"negative_prompt": 3}, "^negative_prompt is an int: give a prompt"),
    ({"negative_prompt": {"text": "a"}}, "^negative_prompt is a dict"),
    ({"negative_prompt": object()}, "^negative_prompt: an object; give a str, Path"),
    ({"negative_prompt": ["a", 3]}, "^negative_prompt: an int; a piece of a prompt is"),
    ({"negative_prompt": []}, "^negative_prompt is an empty list"),
    ({"negative_prompt": [["a"], ["b"]]}, "^negative_prompt: a batch of 2 prompts; give one"),
    ({"negative_prompt": Path("gone.png")}, "^negative_prompt: gone.png: no such file"),
]

PROMPTS = [
    (None, "prompt: None; give a str, Path"),
    (3, "prompt: an int"),
    ({"text": "a"}, "prompt: a dict"),
    (b"a", "prompt: a bytes"),
    ({"a", "b"}, "prompt: a set; give a str, Path"),
    ((piece for piece in "ab"), "prompt: a generator; give a str, Path"),
    ([], "^prompt is an empty list$"),
    (["a", 3], "prompt: an int"),
    ([["a"], "b"], "pieces and lists of pieces are mixed"),
    ([1, 2, 3], "prompt: a list"),
    (NOISE, r"an array of float64 \[8000\]; .*audio is \(array \[C, T\], Hz\)"),
    (torch.zeros(1, 800), r"an array of float32 \[1, 800\]; an image is uint8 \[H, W, 3\]"),
    (np.zeros((8, 8, 3)), r"an array of float64 \[8, 8, 3\]; an image is uint8"),
    (np.zeros((2, 8, 8, 3), np.uint8), r"an array of uint8 \[2, 8, 8, 3\]"),
    (torch.full((3, 8, 8), 200.0), r"a float image is in \[-1, 1\], got up to 200"),
    ([("a", "b")], "its rate is a str"),
    ((np.zeros((3, 5, 8000)), 8000), "a waveform is .C, T., channels first"),
    ((NOISE * 30, 8000), r"samples are in \[-1, 1\], got up to"),
    (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
    ("", "a prompt's text: an empty text; write something, or leave it out"),
    (Path(), "not a file"),
    (Path("gone.png"), "gone.png: no such file"),
]


@pytest.mark.parametrize(("arguments", "said"), GENERATE, ids=lambda value: str(value)[:40])
def test_a_wrong_argument_is_one_line_that_names_it(tiny, arguments, said):
    with pytest.raises(UserError, match=said) as error:
        tiny.generate(**{"prompt": "a text", "modalities": "image:1x1"} | arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("prompt", "said"), PROMPTS, ids=range(len(PROMPTS)))
def test_a_wrong_prompt_is_one_line_that_names_its_type_or_shape(tiny, prompt, said):
    for call in (tiny.generate, tiny.stream):
        with pytest.raises(UserError, match=said) as error:
            call(prompt)
        assert "\n" not in str(error.value)


def test_a_stream_refuses_what_it_cannot_do(tiny):
    for arguments, said in (
        ({"best_of": 2}, "stream: no 'best_of'"),
        ({"generation_config": {"best_of": 2}}, "best_of is 2: a stream yields tokens as they are drawn, so it must be 1"),
        ({"generation_config": GenerationConfig(jacobi_window=4)}, "jacobi_window is 4"),
        ({"max_length": 2}, "stream: no 'max_length'; did you mean max_new_tokens?"),
        ({"use_tqdm": True}, "stream: no 'use_tqdm'; there are prompt"),  # no hint at an argument that a stream has not
        ({"num_beams": 2}, "stream: no 'num_beams'; there are prompt"),
    ):
        with pytest.raises(UserError, match=said):
            tiny.stream("a text", **arguments)


def test_loading_names_the_argument_that_other_libraries_call_otherwise():
    for given, said in (
        ({"torch_dtype": "auto"}, "from_pretrained: no 'torch_dtype'; did you mean dtype?"),
        ({"device_map": "auto"}, "did you mean device?"),
        ({"trust_remote_code": True}, "leave it out: nothing in a bundle is executed"),
        ({"divice": "cpu"}, "did you mean device?"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            Unitok.from_pretrained("scenes", **given)


def test_wrong_calls_of_score_are_one_line(tiny):
    with pytest.raises(UserError, match="documents: an int; give a str, Path"):
        tiny.score(3)
    with pytest.raises(UserError, match="^documents: an int"):
        tiny.score(["a", 3])
    with pytest.raises(UserError, match="^documents is an empty list$"):
        tiny.score([])
    for name in ("prompt", "inputs"):
        with pytest.raises(UserError, match=f"score: no '{name}'; did you mean documents"):
            tiny.score(**{name: "a"})
    with pytest.raises(UserError, match="score: no 'max_length'; there are documents"):
        tiny.score("a", max_length=3)
    with pytest.raises(UserError, match="document 1 has 2002 tokens, the decoder takes 1024"):
        tiny.score([Document((Segment("text", np.full(2001, 5)),))])
    with pytest.raises(UserError, match="score: no 'batch_size'; there are documents"):
        tiny.score("a", batch_size=3)


def test_a_text_that_names_an_image_is_hinted_at(tiny, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"names an image file; Path\("):
        tiny.read_prompt(str(tmp_path / "a.png"))


def test_an_array_that_may_be_in_another_range_is_hinted_at(tiny):
    with pytest.warns(UserWarning, match=r"of \[0, 1\] give 2 \* x - 1"):
        tiny.read_prompt(torch.rand(3, 8, 8))


def test_a_negative_prompt_that_guides_nothing_is_hinted_at(tiny):
    with pytest.warns(UserWarning, match="negative_prompt has no effect without guidance"):
        tiny.generate("a", "text", max_new_tokens=2, negative_prompt="b")


def test_public_names_are_those_and_no_others():
    names = "AudioTokenizer Boxes Document GenerationConfig Grammar ImageTokenizer Output Points SamplingParams Segment TextTokenizer Unitok Vocab"
    assert [name for name in dir(unitok) if not name.startswith("_")] == names.split()
    assert all(getattr(unitok, name).__name__ == name for name in names.split())
    with pytest.raises(AttributeError, match="no attribute 'Unitoc'"):
        unitok.Unitoc  # noqa: B018
