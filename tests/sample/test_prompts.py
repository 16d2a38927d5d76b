"""Promises of prompts: a piece alone is a prompt, arrays and files are read alike, files obey their folder and their declared type."""

import json
import warnings

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig, SamplingParams
from unitok.sample.prompts import read_prompts


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / "picture.png")
    soundfile.write(folder / "sound.wav", rng.uniform(-0.5, 0.5, 2000), 8000)
    return folder


def pieces(tiny, media) -> list:
    samples, rate = soundfile.read(media / "sound.wav")
    picture = Image.open(media / "picture.png")
    document = Document((Segment("text", tiny.text.encode("a text")),))
    image = np.asarray(picture)
    return [
        "a red circle",
        media / "picture.png",
        media / "sound.wav",
        picture,
        (samples, rate),
        document,
        document.segments[0],
        image,
    ]


def test_a_piece_alone_is_a_prompt_of_one_piece(tiny, media):
    for piece in pieces(tiny, media):
        wanted = tiny.read_prompt([piece])
        assert len(wanted.segments) == 1
        assert tiny.read_prompt(piece) == wanted
        (output,) = tiny.generate(piece, "image:1x1")
        assert output.prompt == wanted
        assert output.ids.tolist() == tiny.generate([piece], "image:1x1")[0].ids.tolist()
        *_, streamed = tiny.stream(piece, "image:1x1")
        assert streamed.ids.tolist() == output.ids.tolist()
        (alone,), (listed,) = tiny.score(piece), tiny.score([piece])
        assert alone.parts == listed.parts != []
    assert (
        tiny.read_prompt(media / "sound.wav").segments[0].codes.tolist()
        == tiny.read_prompt(pieces(tiny, media)[4]).segments[0].codes.tolist()
    )


def test_lists_are_one_prompt_and_lists_of_lists_a_batch(tiny):
    assert [len(o.prompt.segments) for o in tiny.generate(["A frog.", "A dog."], "image:1x1")] == [2]
    assert [len(o.prompt.segments) for o in tiny.generate([["A frog."], ["A dog.", "B"]], "image:1x1")] == [1, 2]
    assert len(tiny.score(["A frog.", ["A dog.", "B"]])) == 2


def test_sampling_parameters_in_every_form_are_the_same(tiny):
    cold = SamplingParams(temperature=0.0)
    forms = (
        {"temperature": 0},
        {"image": cold},
        {"image": {"temperature": 0.0}},
        {"sampling": {"image": cold}},
        {"generation_config": GenerationConfig(temperature=0)},
        {"generation_config": {"temperature": 1, "image": {"temperature": 0}}},
        {"temperature": 0, "generation_config": {"image": {"temperature": 1}}},
    )
    made = [tiny.generate("a text", "image:2x2", **form)[0].ids.tolist() for form in forms]
    assert all(ids == made[0] for ids in made)
    assert made[0] != tiny.generate("a text", "image:2x2")[0].ids.tolist()
    assert [s.modality for s in tiny.generate("a", ["image", "text"], max_new_tokens=90)[0].new.segments] == ["image", "text"]


def test_arrays_are_images_as_their_files_are(tiny, media):
    image = Image.open(media / "picture.png")
    wanted = tiny.read_prompt(media / "picture.png").segments[0].codes.tolist()
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    alpha = np.concatenate([pixels, np.full((20, 24, 1), 255, np.uint8)], 2)
    for array in (pixels, tensor, tensor.numpy(), tensor / 127.5 - 1, (tensor / 127.5 - 1).double().numpy(), alpha):
        assert tiny.read_prompt(array).segments[0].codes.tolist() == wanted
    gray = tiny.read_prompt(pixels[..., 0]).segments[0].codes.tolist()
    assert gray == tiny.read_prompt(pixels[..., :1]).segments[0].codes.tolist()
    assert gray == tiny.read_prompt(Image.fromarray(pixels[..., 0])).segments[0].codes.tolist()


def test_waveforms_are_read_as_soundfile_and_scipy_give_them(tiny, media):
    samples, rate = soundfile.read(media / "sound.wav")
    wanted = tiny.read_prompt(media / "sound.wav").segments[0].codes.tolist()
    whole = (samples * 32768).round().astype(np.int16)
    for array in (samples, samples[None], samples[:, None], torch.from_numpy(samples).float(), whole, samples.tolist()):
        assert tiny.read_prompt((array, rate)).segments[0].codes.tolist() == wanted
        assert tiny.read_prompt((rate, array)).segments[0].codes.tolist() == wanted


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


def test_words_outside_the_world_of_a_bundle_are_said_and_others_are_not(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "facts", {"world": {"example": "a red circle", "words": ["a", "red", "circle", "c4"]}})
    with pytest.warns(UserWarning, match=r"never read dog, green: .* it knows texts such as 'a red circle'"):
        tiny.generate("a dog, a green circle", "image:1x1")
    with pytest.warns(UserWarning, match=r"never read x{39}…: "):
        tiny.generate("a " + 99 * "x", "image:1x1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.generate("A red circle, a C4.", "image:1x1")
