"""Promises of modalities: one path for content of each kind, there and back; a kind is declared once, and asked by all."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from unitok.bundle import Bundle, make_bundle
from unitok.data.prepare.recipe import make_options
from unitok.document import Document, Part, Segment
from unitok.errors import UserError
from unitok.modalities import (
    Loaded,
    Modality,
    Plain,
    build_vocab,
    kind_accepting,
    modalities,
    modality_of,
    register,
)
from unitok.plan import parse_plan
from unitok.ranges import Span

CONTENT = {
    "text": "a small text ✓",
    "image": Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)),
    "audio": (torch.sin(torch.arange(4000) / 9)[None] * 0.5, 8000),
}


def test_the_kinds_that_stand_are_found_in_the_order_of_a_vocabulary():
    assert list(modalities()) == ["text", "image", "audio", "box", "point", "video"]
    assert {kind: kind_accepting(content) for kind, content in CONTENT.items()} == {kind: kind for kind in CONTENT}
    assert kind_accepting(object()) is None
    with pytest.raises(UserError, match="type 'smell'; choose one of text, image, audio, box, point"):
        modality_of("smell")


@pytest.mark.parametrize("kind", CONTENT)
def test_content_goes_to_codes_and_back_and_into_a_file_alike_alone_and_in_a_batch(tiny, tmp_path, kind):
    modality, tokenizer = modality_of(kind), tiny.tokenizers[kind]
    loaded = [modality.load(tokenizer, CONTENT[kind], modality.Options(), "it") for _ in range(3)]
    assert len({modality.batch_key(tokenizer, one) for one in loaded}) == 1
    codes = modality.encode(tokenizer, loaded)
    (alone,) = modality.encode(tokenizer, loaded[:1])
    assert all(np.array_equal(alone, one) for one in codes)
    segment = Segment(kind, alone, size=loaded[0].size)
    content = modality.decode(tokenizer, segment)
    assert kind != "text" or content == CONTENT["text"]
    saved = modality.save(tokenizer, content, tmp_path / "it")
    assert (saved is None) == modality.inline
    if saved is not None:  # what was written is read as the same kind, of the same size
        (again,) = tiny.read(saved)
        assert (again.modality, again.codes.shape, again.size) == (kind, alone.shape, loaded[0].size)


@pytest.mark.parametrize("kind", CONTENT)
def test_a_stream_ends_with_what_decoding_gives(tiny, kind):
    (segment,) = tiny.read(CONTENT[kind])
    stream = tiny.modality(kind).stream(tiny.tokenizers[kind], tiny.vocab.span(kind))
    chunks = [stream.push(segment.codes[..., :n], n == segment.codes.shape[-1]) for n in range(1, segment.codes.shape[-1] + 1)]
    chunks = [chunk for chunk in chunks if chunk is not None]
    whole = tiny.decode(Segment(kind, segment.codes))
    assert "".join(chunks) == whole if kind == "text" else torch.equal(chunks[-1], whole)


def test_options_are_typed_and_a_wrong_one_is_named():
    assert make_options("image", {"crops": 2, "crop_scale": 1}, "here").crops == 2
    with pytest.raises(UserError, match=r"here: image has no option 'crop'; it has area, fit, crops, crop_scale, flip"):
        make_options("image", {"crop": 2}, "here")
    with pytest.raises(UserError, match="here: audio segment is 'ten'; it is a float"):
        make_options("audio", {"segment": "ten"}, "here")


def test_every_hook_of_a_modality_is_documented_and_every_option_said():
    for kind, modality in modalities().items():
        doc = inspect.getdoc(modality.Options) or ""
        assert all(f"{field.name}: " in doc for field in dataclasses.fields(modality.Options)), kind
    assert all(inspect.getdoc(hook) for name, hook in vars(Modality).items() if callable(hook) and not name.startswith("_"))


def test_a_kind_without_weights_is_added_to_a_bundle_and_read_again(tmp_path, bundle_folder, monkeypatch):
    monkeypatch.setattr("unitok.modalities._REGISTRY", dict(modalities()))

    @register
    class Steps(Modality):
        kind = "steps"
        key = "steps"

        def declare(self, name, tokenizer):
            return Span(name, (name,), f"<{name}>", f"</{name}>", kind=self.kind), {name: 9}, ()

        def encode(self, tokenizer, batch):
            return [np.array([one.content]) for one in batch]

        def decode(self, tokenizer, segment):
            return segment.codes[0].tolist()

    with pytest.raises(UserError, match="modality 'steps'"):
        register(Steps)
    made = make_bundle(tmp_path / "b", {"text": bundle_folder}, add=["steps"])
    again = Bundle.from_pretrained(tmp_path / "b")
    assert again.vocab.to_manifest() == made.vocab.to_manifest()
    assert isinstance(again.steps, Plain)
    segment = Segment("steps", [[3, 0, 8]])
    assert again.decode(segment) == [3, 0, 8]
    assert build_vocab({"text": again.text}).size + 9 == again.vocab.size


def test_instances_of_a_kind_are_found_by_their_names_and_by_their_kind_where_there_is_one(tiny, tmp_path):
    tiny.audio.save_pretrained(tmp_path / "audio")
    kinds = {"speech": "audio", "music": "audio"}
    both = make_bundle(tmp_path / "both", dict.fromkeys(kinds, tmp_path / "audio"), kinds=kinds)
    assert list(Bundle.from_pretrained(tmp_path / "both").tokenizers) == ["speech", "music"]
    assert both.instance("speech") == "speech"
    with pytest.raises(UserError, match="several tokenizers for audio: speech, music; say which"):
        both.read(CONTENT["audio"])
    one = make_bundle(tmp_path / "one", {"speech": tmp_path / "audio"}, kinds=kinds)
    (segment,) = one.read(CONTENT["audio"])
    assert segment.modality == "speech"
    document = Document((dataclasses.replace(segment, size=(), source=""),))
    assert one.vocab.decode(one.vocab.encode(document)) == both.vocab.decode(both.vocab.encode(document)) == document


def test_a_name_that_a_tokenizer_cannot_have_is_refused_and_a_part_that_lacks_says_how_to_add_it(tiny, tmp_path, monkeypatch):
    tiny.audio.save_pretrained(tmp_path / "audio")
    for name in ("model", "tokenizers", "read", "text", "a b"):
        with pytest.raises(UserError, match=f"'{name}' cannot be the name of a tokenizer for audio"):
            make_bundle(tmp_path / "b", {name: tmp_path / "audio"}, kinds={name: "audio"})
    with pytest.raises(UserError, match="audio: its tokenizer has weights; give one, as audio=PATH"):
        make_bundle(tmp_path / "b", {"speech": tmp_path / "audio"}, kinds={"speech": "audio"}, add=["audio"])
    one = make_bundle(tmp_path / "b", {"speech": tmp_path / "audio"}, kinds={"speech": "audio"})
    again = make_bundle(tmp_path / "c", {"music": tmp_path / "b"}, kinds={"music": "audio"})  # the only one of its kind there
    assert again.music.fingerprint() == one.speech.fingerprint()
    one.tokenizers.clear()
    with pytest.raises(UserError, match="--audio speech=PATH"):
        one.require("speech")
    with pytest.raises(UserError, match="--image PATH"):
        one.require("image")


def test_a_part_of_a_prompt_may_say_its_tokenizer_and_a_plan_a_kind(tiny, tmp_path):
    kinds = {"speech": "audio", "music": "audio"}
    tiny.audio.save_pretrained(tmp_path / "audio")
    both = make_bundle(tmp_path / "both", dict.fromkeys(kinds, tmp_path / "audio"), kinds=kinds)
    (segment,) = both.read(Part("music", CONTENT["audio"]))
    assert segment.modality == "music"
    with pytest.raises(UserError, match="a part of type music holds a str"):
        both.read(Part("music", "hello"))
    with pytest.raises(UserError, match="several tokenizers for audio"):
        parse_plan("audio:2s", both.vocab, both.rates)
    one = make_bundle(tmp_path / "one", {"speech": tmp_path / "audio"}, kinds=kinds)
    assert parse_plan("audio:2s", one.vocab, one.rates)[0].modality == "speech"


def test_a_kind_says_which_files_are_its_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("unitok.modalities._REGISTRY", dict(modalities()))

    @register
    class Moves(Modality):
        kind = "moves"

        def recognizes(self, head, name):
            return head.startswith(b"MOVES")

        def declare(self, name, tokenizer):
            return Span(name, (name,), f"<{name}>", f"</{name}>", kind=self.kind), {name: 256}, ()

        def load(self, tokenizer, content, options, name, view="", chance=0.0):
            return Loaded(np.frombuffer(content.read()[5:], np.uint8))

        def encode(self, tokenizer, batch):
            return [one.content[None] for one in batch]

    bundle = Bundle(build_vocab({"moves": Plain("moves")}), {"moves": Plain("moves")})
    (tmp_path / "a.txt").write_bytes(b"MOVES right left")
    (segment,) = bundle.read(tmp_path / "a.txt")
    assert bytes(segment.codes[0].astype(np.uint8)) == b" right left"
    (tmp_path / "b.png").write_bytes(b"none of them")
    with pytest.raises(UserError, match="neither an image nor audio"):
        bundle.read(tmp_path / "b.png")
    (tmp_path / "c.png").touch()
    with pytest.raises(UserError, match="an empty file; replace it"):
        bundle.read(tmp_path / "c.png")
