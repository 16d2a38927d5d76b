"""Promises of generation configs: the call counts before its config, that before the bundle's file, that before the library."""

import copy
import json
import pickle

import numpy as np
import pytest

from unitok import GenerationConfig, SamplingParams, Unitok
from unitok.bundle import Bundle, make_bundle
from unitok.errors import UserError
from unitok.modalities import build_vocab, modalities
from unitok.sample.requests import config_for, sampling_of
from unitok.sample.stream import Chunk

OWN = GenerationConfig(max_new_tokens=40, temperature=0.7, text={"temperature": 0.0}, image={"temperature": 0.4, "top_p": 0.95})


@pytest.fixture(scope="module")
def voices():
    """A bundle's vocabulary with two tokenizers of the kind audio."""
    audio = modalities()["audio"].untrained()
    vocab = build_vocab({"speech": audio, "music": audio}, {"speech": "audio", "music": "audio"})
    own = GenerationConfig(audio={"temperature": 0.5, "top_k": 9}, sampling={"music": {"temperature": 0.8}})
    return Bundle(vocab, generation_config=own)


@pytest.mark.parametrize(
    ("given", "speech", "music"),
    [
        ({}, SamplingParams(0.5, 9), SamplingParams(0.8, 9)),
        ({"audio": {"top_p": 0.9}}, SamplingParams(0.5, 9, 0.9), SamplingParams(0.8, 9, 0.9)),
        ({"audio": {"temperature": 1}, "speech": {"temperature": 2}}, SamplingParams(2, 9), SamplingParams(1, 9)),
        ({"temperature": 1.0}, SamplingParams(1.0, 9), SamplingParams(1.0, 9)),  # the library's default, said again
        ({"temperature": 2, "music": {"temperature": 3}}, SamplingParams(2, 9), SamplingParams(3, 9)),
        ({"music": SamplingParams(top_p=0.7)}, SamplingParams(0.5, 9), SamplingParams(top_p=0.7)),
        ({"audio": SamplingParams()}, SamplingParams(), SamplingParams()),
    ],
)
def test_a_later_layer_counts_before_an_earlier_one_and_within_it_a_name_before_its_kind_before_all(
    voices, given, speech, music
):
    named = {name: value for name, value in given.items() if name in voices.vocab.spans}
    config = GenerationConfig(**{k: v for k, v in given.items() if k not in named}, sampling=named)
    assert sampling_of(voices, config_for(voices, config)) == {"speech": speech, "music": music}


def test_without_any_the_librarys_hold(voices):
    config = config_for(Bundle(voices.vocab))
    assert sampling_of(voices, config) == {"speech": SamplingParams(), "music": SamplingParams()}
    assert (config.modalities, config.n, config.seed, config.max_new_tokens, config.best_of) == ("free", 1, 0, 512, 1)


def test_the_defaults_of_all_content_are_those_of_sampling_params():
    assert {name: getattr(GenerationConfig(), name) for name in vars(SamplingParams())} == vars(SamplingParams())


def test_values_that_are_not_about_sampling_are_layered_too(tiny):
    own = Unitok(tiny.vocab, tiny.tokenizers, tiny.model, GenerationConfig(n=2, seed=3, max_new_tokens=12, modalities="text:3"))
    assert [len(o.ids) for o in own.generate("a text")] == [4, 4]
    assert len(own.generate("a text", n=1)) == 1
    (seeded,) = own.generate("a text", generation_config={"n": 1, "seed": 4})
    assert seeded.ids.tolist() == tiny.generate("a text", "text:3", seed=4, max_new_tokens=12)[0].ids.tolist()
    (again,) = own.generate("a text", n=1, generation_config=GenerationConfig(n=5, seed=4))
    assert again.ids.tolist() == seeded.ids.tolist()


def test_a_bundles_own_is_saved_and_every_entry_point_uses_it(tiny, tmp_path):
    Unitok(tiny.vocab, tiny.tokenizers, tiny.model, OWN).save_pretrained(tmp_path / "bundle")
    own = Unitok.from_pretrained(tmp_path / "bundle")
    assert own.generation_config == OWN
    call = {"prompt": ["a text"], "modalities": "text:4,image:2x3", "n": 2}
    wanted = [output.ids.tolist() for output in tiny.generate(**call, generation_config=OWN)]
    assert [output.ids.tolist() for output in own.generate(**call)] == wanted
    assert [one.ids.tolist() for one in own.stream(**call) if not isinstance(one, Chunk)] == wanted
    assert [output.ids.tolist() for output in tiny.generate(**call)] != wanted
    make_bundle(tmp_path / "bundle", {"text": tmp_path / "bundle" / "tokenizers" / "text"})
    assert Bundle.from_pretrained(tmp_path / "bundle", parts=[]).generation_config == OWN


def test_files_say_what_was_given_and_no_more(tmp_path):
    config = GenerationConfig(
        temperature=1.0, modalities=("image", "text"), sampling={"speech": {"top_k": 3}}, image=SamplingParams()
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {
        "temperature": 1.0,
        "modalities": "image,text",
        "speech": {"top_k": 3},
        "image": vars(SamplingParams()),
    }
    for again in (
        GenerationConfig.from_pretrained(tmp_path),
        GenerationConfig.from_pretrained(tmp_path / "generation_config.json"),
    ):
        assert again == config
    assert GenerationConfig.from_dict({"image": {"top_k": 2}}) == GenerationConfig(image={"top_k": 2})
    with pytest.raises(UserError, match="negative_prompt: only a text"):
        GenerationConfig(negative_prompt=["a", tmp_path]).to_dict()


@pytest.mark.parametrize(
    "given",
    [
        {"sampling": {"image": {"top_k": 3}, "speech": {}}, "image": {"temperature": 0.5}},
        {"sampling": {"image": SamplingParams()}},
        {"sampling": {}, "audio": {}},
        {"modalities": ("image", "text"), "negative_prompt": "a"},
    ],
)
def test_a_config_has_one_form_which_files_give_back(given):
    config = GenerationConfig(**given)
    assert GenerationConfig.from_dict(config.to_dict()) == config
    assert GenerationConfig.from_dict(json.loads(json.dumps(config.to_dict()))).given() == config.given()


def test_values_of_a_kind_are_merged_wherever_they_stand(tiny):
    config = GenerationConfig(sampling={"image": {"top_k": 3, "top_p": 0.5}}, image={"top_p": 0.9})
    assert config == GenerationConfig(image={"top_k": 3, "top_p": 0.9})
    assert config.replace(sampling={"image": {"top_k": 4}}) == GenerationConfig(image={"top_k": 4})
    assert sampling_of(tiny, config_for(tiny, config))["image"] == SamplingParams(top_k=3, top_p=0.9)


def test_a_bundles_own_may_be_assigned_as_a_dict(tiny):
    u = Unitok(tiny.vocab, tiny.tokenizers, tiny.model, {"seed": 3})
    assert u.generation_config == GenerationConfig(seed=3)
    u.generation_config = {"image": {"top_k": 2}}
    assert u.generation_config == GenerationConfig(image={"top_k": 2})
    for wrong in ({"temprature": 1}, 3):
        with pytest.raises(UserError, match="^generation_config"):
            u.generation_config = wrong
    assert u.generation_config == GenerationConfig(image={"top_k": 2})


def test_a_stream_leaves_out_what_the_bundle_asks_for_and_it_cannot_do(tiny):
    u = Unitok(tiny.vocab, tiny.tokenizers, tiny.model, GenerationConfig(best_of=2, jacobi_window=4, seed=3))
    call = {"prompt": "a text", "modalities": "image:2x2"}
    (output,) = [one for one in u.stream(**call, generation_config={"best_of": 1}) if not isinstance(one, Chunk)]
    assert output.ids.tolist() == tiny.generate(**call, seed=3)[0].ids.tolist()


def test_a_config_remembers_what_it_was_given():
    config = GenerationConfig(max_new_tokens=256, temperature=1.0)
    assert repr(config) == "GenerationConfig(max_new_tokens=256, temperature=1.0)"
    assert (config.n, config.max_new_tokens) == (1, 256)
    assert config != GenerationConfig(max_new_tokens=256)
    assert config.replace(n=2) == GenerationConfig(max_new_tokens=256, temperature=1.0, n=2)
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
        assert again.given() == {"max_new_tokens": 256, "temperature": 1.0}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"image": {"temprature": 1}}, "image: no 'temprature'; did you mean temperature"),
        ({"temprature": 1}, "no 'temprature'; did you mean temperature"),
        ({"smell": {}}, "no tokenizer 'smell'; the bundle has text, image, audio"),
        ({"image": {"top_p": 2}}, "image: top_p 2: it must be above 0 and at most 1"),
        ({"image": 0.4}, "image is a float"),
        ({"n": 0}, "n is 0: it must be an integer of at least 1"),
        ({"negative_prompt": 3}, "negative_prompt is an int"),
        ({"version": 1, "settings": {}}, "no 'version'"),
        ([], "a JSON list, not an object"),
    ],
)
def test_a_wrong_value_of_a_bundle_is_one_line_that_says_where(tiny, tmp_path, content, said):
    tiny.save_pretrained(tmp_path / "bundle")
    (tmp_path / "bundle" / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as error:
        config_for(Bundle.from_pretrained(tmp_path / "bundle", parts=[]))
    assert "generation_config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_edits_have_defaults_of_their_own(tiny, tmp_path):
    own = GenerationConfig.from_dict({"image": {"temperature": 0.4, "guidance_scale": 1.5}, "edit": {"guidance_scale": 2.5}})
    own.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).to_dict() == own.to_dict()
    bundle = Unitok(tiny.vocab, tiny.tokenizers, tiny.model, own)
    assert config_for(bundle).image == {"temperature": 0.4, "guidance_scale": 1.5}
    assert config_for(bundle, edited="image").image == {"temperature": 0.4, "guidance_scale": 2.5}
    assert config_for(bundle, GenerationConfig(guidance_scale=4.0), edited="image").image["guidance_scale"] == 4.0
    with pytest.raises(UserError, match="edit: no 'scale'"):
        GenerationConfig(edit={"scale": 2})
    image = np.zeros((32, 32, 3), np.uint8)
    asked = bundle.edit(image, "make it red", seed=1)[0]
    plain = tiny.edit(image, "make it red", seed=1, temperature=0.4, guidance_scale=2.5)[0]
    assert asked.ids.tolist() == plain.ids.tolist()
    given = tiny.edit(image, "make it red", seed=1, generation_config={"edit": {"temperature": 0.4, "guidance_scale": 2.5}})[0]
    assert given.ids.tolist() == plain.ids.tolist()
