"""Promises of prompts: a part alone is a prompt, mistakes are one line, files obey their folder and their declared type."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError
from unitok.sample.prompts import read_prompts
from unitok.sample.sampling import SamplingParams


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / "picture.png")
    soundfile.write(folder / "sound.wav", rng.uniform(-0.5, 0.5, 2000), 8000)
    return folder


def parts(tiny, media) -> list:
    samples, rate = soundfile.read(media / "sound.wav")
    picture = Image.open(media / "picture.png")
    document = Document((Segment("text", tiny.text.encode("a text")),))
    return ["a red circle", media / "picture.png", media / "sound.wav", picture, (samples, rate), document]


def test_a_part_alone_is_a_prompt_of_one_part(tiny, media):
    for part in parts(tiny, media):
        wanted = tiny.read_prompt([part])
        assert len(wanted.segments) == 1
        assert tiny.read_prompt(part) == wanted
        (output,) = tiny.generate(part, "image:1x1")
        assert output.prompt == wanted
        assert output.ids.tolist() == tiny.generate([part], "image:1x1")[0].ids.tolist()
        *_, streamed = tiny.stream(part, "image:1x1")
        assert streamed.ids.tolist() == output.ids.tolist()
        (alone,), (listed,) = tiny.score(part), tiny.score([part])
        assert alone.parts == listed.parts != []
    assert (
        tiny.read_prompt(media / "sound.wav").segments[0].codes.tolist()
        == tiny.read_prompt(parts(tiny, media)[4]).segments[0].codes.tolist()
    )


def test_lists_are_one_prompt_and_lists_of_lists_a_batch(tiny):
    assert [len(o.prompt.segments) for o in tiny.generate(["A frog.", "A dog."], "image:1x1")] == [2]
    assert [len(o.prompt.segments) for o in tiny.generate([["A frog."], ["A dog.", "B"]], "image:1x1")] == [1, 2]
    assert len(tiny.score(["A frog.", ["A dog.", "B"]])) == 2


def test_settings_of_every_form_are_the_same(tiny):
    cold = SamplingParams(temperature=0.0)
    made = [
        tiny.generate("a text", "image:2x2", settings=form)[0].ids.tolist()
        for form in (cold, {"image": cold}, {"image": {"temperature": 0.0}})
    ]
    assert made[0] == made[1] == made[2] != tiny.generate("a text", "image:2x2")[0].ids.tolist()
    assert [s.modality for s in tiny.generate("a", ["image", "text"], max_new_tokens=90)[0].new.segments] == ["image", "text"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"prompt": np.zeros((8, 8, 3), np.uint8)}, r"not ndarray; of an array: PIL\.Image\.fromarray"),
        ({"prompt": torch.zeros(1, 800)}, r"not Tensor; of an array"),
        ({"prompt": [1, 2, 3]}, "not list; of an array"),
        ({"prompt": ["a", 3]}, "not int"),
        ({"prompt": b"a"}, "not bytes"),
        ({"prompt": None}, "prompt: a NoneType"),
        ({"prompt": {"text": "a"}}, "prompt: a dict"),
        ({"prompt": [["a"], "b"]}, "mixed"),
        ({"prompt": ("a", "b", "c"), "modalities": 3}, "modalities is a int"),
        ({"prompt": [("a", "b")]}, "its rate is a str"),
        ({"prompt": Image.new("RGB", (0, 5))}, "0 x 5 pixels"),
        (
            {"temperature": 0.5},
            r"no 'temperature'; it is one of the settings: settings=\{'image': SamplingParams\(temperature=VALUE\)\}",
        ),
        ({"max_new_tokenz": 5}, "no 'max_new_tokenz'; did you mean max_new_tokens"),
        ({"num_return_sequences": 5}, "no 'num_return_sequences'; did you mean"),
        ({"settings": {"images": SamplingParams()}}, "settings: 'images' is none of text, image, audio"),
        ({"settings": {"image": {"temprature": 1}}}, r"settings\['image'\]: no 'temprature'; did you mean temperature"),
        ({"settings": {"image": 0.5}}, r"settings\['image'\]: a float; give settings="),
        ({"settings": 0.5}, "settings: a float; give settings="),
        ({"settings": {"image": {"temperature": "hot"}}}, "temperature 'hot'"),
        ({"n": "2"}, "n is '2'"),
        ({"n": 1.5}, r"n is 1\.5"),
        ({"prefix_fraction": "half"}, "prefix_fraction is 'half'"),
        ({"batch_size": "2"}, "batch size is '2'"),
        ({"prompt": Path()}, "not a file"),
        ({"modalities": ["image", "smell"]}, "smell"),
    ],
)
def test_wrong_calls_are_one_line_that_names_the_argument(tiny, arguments, told):
    with pytest.raises(UserError, match=told) as error:
        tiny.generate(**{"prompt": "a text", "modalities": "image:1x1"} | arguments)
    assert "\n" not in str(error.value)


def test_a_text_that_names_a_picture_is_hinted_at(tiny, media):
    with pytest.warns(UserWarning, match=r"names an image file; Path\("):
        tiny.read_prompt(str(media / "picture.png"))


def prompts(folder, *parts):
    (folder / "prompts.jsonl").write_text(json.dumps({"id": "1", "content": list(parts)}) + "\n")
    return folder / "prompts.jsonl"


def test_files_of_prompts_stay_in_their_folder_and_are_what_they_are_declared(tiny, media, tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "picture.png").write_bytes((media / "picture.png").read_bytes())
    (inside / "link.png").symlink_to(media / "picture.png")
    for path in (str(media / "picture.png"), "../in/../secret.png", "link.png", "gone.png", "."):
        (tmp_path / "secret.png").write_bytes((media / "picture.png").read_bytes())
        with pytest.raises(UserError, match="line 1: .*(leaves|no such file|folder)"):
            read_prompts(prompts(inside, {"type": "image", "path": path}))
    good = prompts(inside, {"type": "image", "path": "picture.png"}, {"type": "image", "path": "../in/picture.png"})
    document = tiny.read_raw(read_prompts(good)[0])
    assert len(document.segments) == 2
    wide = read_prompts(prompts(inside, {"type": "image", "path": "link.png"}), root=str(tmp_path.parent.parent))
    assert tiny.read_raw(wide[0]).segments[0].codes.tolist() == document.segments[0].codes.tolist()
    for kind, name in (("image", "sound.wav"), ("audio", "picture.png")):
        with pytest.raises(UserError, match=rf"{name}: the part's type is {kind}, the file is "):
            tiny.read_raw(RawDocument("1", (Part(kind, path=media / name),)))
