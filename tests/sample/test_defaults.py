"""Promises of sampling's defaults: a call's settings count before a bundle's own, those before the library's; files keep them."""

import json

import pytest
from unitok.sample.defaults import sampling_params_of

from unitok.api import Unitok
from unitok.bundle import Bundle, make_bundle
from unitok.errors import UserError
from unitok.modalities import build_vocab, modalities
from unitok.sample.sampling import SamplingParams
from unitok.sample.stream import Chunk

OWN = {"text": {"temperature": 0.0}, "image": {"temperature": 0.4, "top_p": 0.95, "guidance_scale": 1.5}}


@pytest.fixture(scope="module")
def voices():
    """A bundle's vocabulary with two tokenizers of the kind audio."""
    audio = modalities()["audio"].untrained()
    vocab = build_vocab({"speech": audio, "music": audio}, {"speech": "audio", "music": "audio"})
    return Bundle(vocab, defaults={"audio": {"temperature": 0.5, "top_k": 9}, "music": {"temperature": 0.8}})


@pytest.mark.parametrize(
    ("given", "speech", "music"),
    [
        (None, SamplingParams(0.5, 9), SamplingParams(0.8, 9)),
        ({"audio": {"top_p": 0.9}}, SamplingParams(0.5, 9, 0.9), SamplingParams(0.8, 9, 0.9)),
        ({"audio": {"temperature": 1}, "speech": {"temperature": 2}}, SamplingParams(2, 9), SamplingParams(1, 9)),
        ({"music": SamplingParams(top_p=0.7)}, SamplingParams(0.5, 9), SamplingParams(top_p=0.7)),
        (SamplingParams(), SamplingParams(), SamplingParams()),
    ],
)
def test_what_a_call_gives_counts_before_the_bundles_and_a_name_before_its_kind(voices, given, speech, music):
    assert sampling_params_of(voices, given) == {"speech": speech, "music": music}


def test_without_any_the_librarys_hold(voices):
    assert sampling_params_of(Bundle(voices.vocab)) == {"speech": SamplingParams(), "music": SamplingParams()}


def test_a_bundles_own_settings_are_saved_and_every_entry_point_uses_them(tiny, tmp_path):
    Unitok(tiny.vocab, tiny.tokenizers, tiny.model, OWN).save_pretrained(tmp_path / "bundle")
    own = Unitok.from_pretrained(tmp_path / "bundle")
    assert own.defaults == OWN
    call = {"prompt": ["a text"], "modalities": "text:4,image:2x3", "n": 2, "max_new_tokens": 40}
    wanted = [output.ids.tolist() for output in tiny.generate(**call, settings=OWN)]
    assert [output.ids.tolist() for output in own.generate(**call)] == wanted
    assert [one.ids.tolist() for one in own.stream(**call) if not isinstance(one, Chunk)] == wanted
    assert [output.ids.tolist() for output in tiny.generate(**call)] != wanted
    make_bundle(tmp_path / "bundle", {"text": tmp_path / "bundle" / "tokenizers" / "text"})
    assert Bundle.from_pretrained(tmp_path / "bundle", parts=[]).defaults == OWN


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"version": 1, "settings": {"image": {"temprature": 1}}}, r"\['image'\]: no 'temprature'; did you mean temperature"),
        ({"version": 1, "settings": {"smell": {}}}, "'smell' is none of text, image, audio"),
        ({"version": 1, "settings": {"image": {"top_p": 2}}}, "top_p 2: it must be above 0 and at most 1"),
        ({"version": 1, "settings": {"image": 0.4}}, r"\['image'\]: a float"),
        ({"version": 2, "settings": {}}, "version 2; this unitok reads version 1"),
        ({"version": 1}, "has no settings"),
    ],
)
def test_wrong_settings_of_a_bundle_are_one_line_that_says_where(tiny, tmp_path, content, said):
    tiny.save_pretrained(tmp_path / "bundle")
    (tmp_path / "bundle" / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as error:
        sampling_params_of(Bundle.from_pretrained(tmp_path / "bundle", parts=[]))
    assert "generation_config.json" in str(error.value)
    assert "\n" not in str(error.value)
