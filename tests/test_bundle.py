"""Promises of bundles: parts join and are added, old ids never move, what does not belong together is refused, nothing is lost."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from unitok.api import Unitok
from unitok.bundle import Bundle, make_bundle, make_untrained
from unitok.cli import main
from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.files import kind_of
from unitok.hub import find
from unitok.tokenizers import AudioTokenizer, ImageTokenizer, TextTokenizer


def test_parts_are_added_without_moving_an_old_id(bundle_folder, tmp_path):
    tokenizers = bundle_folder / "tokenizers"
    first = make_bundle(tmp_path / "b", {"text": tokenizers / "text", "audio": tokenizers / "audio"})
    second = make_bundle(tmp_path / "b", {"image": tokenizers / "image"})
    second.vocab.check_covers(first.vocab, "the second", "the first")
    assert [r.name for r in second.vocab.ranges][-2:] == ["grid", "image"]
    assert Unitok.from_pretrained(tmp_path / "b").vocab == second.vocab


def test_the_first_levels_of_an_audio_tokenizer_may_be_all_that_is_used(bundle_folder, tmp_path, capsys):
    audio = bundle_folder / "tokenizers" / "audio"
    whole = AudioTokenizer.from_pretrained(audio)
    main(["bundle", str(tmp_path / "one"), "--audio", f"speech={audio}", "--levels", "speech=1"])
    one = Bundle.from_pretrained(tmp_path / "one")
    codec = one.tokenizers["speech"]
    samples = torch.linspace(-1, 1, 3 * whole.hop_length).sin()[None, None]
    assert whole.num_codebooks > codec.num_codebooks == 1
    assert one.vocab.spans["speech"].body == ("speech.0",)
    assert torch.equal(codec.encode(samples), whole.encode(samples, 1))
    torch.testing.assert_close(codec.decode(codec.encode(samples)), whole.decode(whole.encode(samples, 1)))
    for flags, problem in (
        (["speech=9"], f"num_codebooks 9: this tokenizer has 1 to {whole.num_codebooks} levels"),
        (["music=1"], "'music' is not among the audio tokenizers that are given"),
        (["speech"], "--levels speech: write NAME=K"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["bundle", str(tmp_path / "two"), "--audio", f"speech={audio}", "--levels", *flags])
        assert stop.value.code == 2
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_a_bundle_begins_with_the_tokenizers_that_made_its_decoders_data(tmp_path, capsys):
    """A decoder of data of the built-in bundle, whose vocabulary has tokens of boxes and points, too."""
    main(["bundle", str(tmp_path / "one"), "--tokenizers", "scenes"])
    one, built_in = Bundle.from_pretrained(tmp_path / "one"), Bundle.from_pretrained("scenes")
    assert one.vocab == built_in.vocab
    assert one.model is None
    assert not one.generation_config.given()  # which suits another decoder
    built_in.model.save_pretrained(tmp_path / "decoder")
    built_in.vocab.save(tmp_path / "decoder" / "vocab.json")
    main(["bundle", str(tmp_path / "two"), "--tokenizers", "scenes", "--decoder", str(tmp_path / "decoder")])
    assert Bundle.from_pretrained(tmp_path / "two").model is not None
    for words, problem in (
        (["scenes", "--decoder", str(tmp_path / "decoder")], "scenes: the name of the built-in bundle, which stays as it is"),
        ([str(tmp_path / "one"), "--tokenizers", "scenes"], "has tokenizers; choose another folder"),
        ([str(tmp_path / "three"), "--decoder", str(tmp_path / "decoder")], "as tokenizers (--tokenizers)"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["bundle", *words])
        assert stop.value.code == 2
        assert problem in capsys.readouterr().err


def test_what_is_known_of_a_bundle_stays_where_only_its_config_is_new(tmp_path):
    shutil.copytree(find("scenes"), tmp_path / "b")
    facts = Bundle.from_pretrained(tmp_path / "b", parts=()).facts
    (tmp_path / "g.json").write_text('{"temperature": 0.5}')
    made = make_bundle(tmp_path / "b", {}, generation_config=tmp_path / "g.json")
    assert made.facts == facts
    assert {"world", "scores", "training"} <= set(facts)
    make_bundle(tmp_path / "b", {"audio": tmp_path / "b" / "tokenizers" / "audio"})
    assert "scores" not in Bundle.from_pretrained(tmp_path / "b", parts=()).facts


def test_the_levels_of_an_audio_tokenizer_may_be_delayed(bundle_folder, tmp_path):
    tokenizers = bundle_folder / "tokenizers"
    usual = make_bundle(tmp_path / "usual", {"text": tokenizers / "text", "audio": tokenizers / "audio"})
    paths = {"text": tokenizers / "text", "speech": tokenizers / "audio"}
    late = make_bundle(tmp_path / "late", paths, kinds={"speech": "audio"}, delayed=["speech"])
    codes = np.arange(6).reshape(3, 2)
    for bundle, name, order in ((usual, "audio", [0, 2, 4, 1, 3, 5]), (late, "speech", [0, 1, 2, 3, 4, 5])):
        ids = bundle.vocab.encode(Document([Segment(name, codes)]), bos=False, eos=False)
        level = dict(zip(range(6), (0, 0, 1, 1, 2, 2), strict=True))
        offsets = [part.offset for part in bundle.vocab.ranges if part.name.startswith(f"{name}.")]
        assert list(ids[1:-1]) == [offsets[level[code]] + code for code in order]
        assert np.array_equal(bundle.vocab.decode(ids).segments[0].codes, codes)
    parts = ["--text", str(tokenizers / "text"), "--audio", f"speech={tokenizers / 'audio'}"]
    main(["bundle", str(tmp_path / "again"), *parts, "--delayed", "speech"])
    again = make_bundle(tmp_path / "again", {"image": tokenizers / "image"})
    again.vocab.check_covers(late.vocab, "the bundle with images", "the one without")
    for given, problem in (
        ({"delayed": ["text"]}, "text has one level"),
        ({"delayed": ["music"]}, "no tokenizer 'music' in the bundle; it has text, audio"),
    ):
        with pytest.raises(UserError, match=problem):
            make_bundle(tmp_path / "none", {"text": tokenizers / "text", "audio": tokenizers / "audio"}, **given)
    with pytest.raises(UserError, match="have their order in the bundle already"):
        make_bundle(tmp_path / "usual", {"audio": tokenizers / "audio"}, delayed=["audio"])


def test_a_decoder_does_not_outlive_the_tokenizers_it_was_trained_for(bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    other = Unitok.from_pretrained(bundle_folder)
    with torch.no_grad():
        other.image.encoder.conv_in.weight += 1
    other.image.save_pretrained(tmp_path / "image")
    with pytest.raises(UserError, match="trained with another image tokenizer"):
        make_bundle(tmp_path / "b", {"image": tmp_path / "image"})
    larger = ImageTokenizer(replace(other.image.config, codebook_size=128))
    larger.quantizer.codebook.set(torch.randn(128, 8))
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(UserError, match="trained with another image tokenizer"):
        make_bundle(tmp_path / "b", {"image": tmp_path / "larger"})
    Unitok.from_pretrained(tmp_path / "b")  # as it was
    with pytest.raises(UserError, match="the vocabularies differ in image"):
        make_bundle(tmp_path / "c", {
            "text": bundle_folder, "audio": bundle_folder, "image": tmp_path / "image", "model": bundle_folder,
        })  # fmt: skip
    assert not (tmp_path / "c").exists()


def test_a_bundle_missing_a_part_says_how_to_add_it(bundle_folder, tmp_path):
    make_bundle(tmp_path / "b", {"text": bundle_folder})
    u = Unitok.from_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match=r"no image; add one with `unitok bundle BUNDLE --image PATH`"):
        u.require("image")
    with pytest.raises(UserError, match="no decoder"):
        u.generate(["x"])


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a b", "1st", ""])
def test_a_tokenizers_name_of_a_foreign_bundle_becomes_no_path(bundle_folder, tmp_path, name):
    shutil.copytree(bundle_folder, tmp_path / "b")
    for file in ("vocab.json", "bundle.json"):
        text = (tmp_path / "b" / file).read_text()
        renamed = json.loads(text.replace('"modality": "audio"', f'"modality": "{name}"').replace('"audio"', f'"{name}"'))
        (tmp_path / "b" / file).write_text(json.dumps(renamed))
    with pytest.raises(UserError, match=r"vocab.json: modality .* make a name") as error:
        Unitok.from_pretrained(tmp_path / "b")
    assert "\n" not in str(error.value)


def test_a_bundle_written_over_itself_is_whole(bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    u = Unitok.from_pretrained(tmp_path / "b")
    u.save_pretrained(tmp_path / "b")
    again = Unitok.from_pretrained(tmp_path / "b")
    assert again.image.fingerprint() == u.image.fingerprint()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b"]


def test_names_of_files_with_dots_keep_their_captions(bundle_folder, tmp_path):
    from PIL import Image
    from raw_data import found_in

    for name in ("photo.v1", "photo.v2"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    (tmp_path / "photo.txt").write_text("another text")
    good, _ = found_in(tmp_path)
    found = {raw.id: [p.value for p in raw.content if p.type == "text"] for raw in good}
    assert found == {"photo.v1.png": ["this is photo.v1"], "photo.v2.png": ["this is photo.v2"], "photo.txt": ["another text"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


@pytest.fixture
def owned(bundle_folder, tmp_path):
    """A bundle with files of its user's, and neighbors with names that a program might take for its own."""
    shutil.copytree(bundle_folder, tmp_path / "b")
    for name in (
        "b/README.md",
        "b/.card",
        "b/model/notes.txt",
        "b/samples/1.png",
        "b/tokenizers/text/corpus.txt",
        "b.old/x",
        "b.partial/x",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "link").symlink_to("samples")
    (tmp_path / "corpus.txt").write_text("a small text\n" * 9)
    return tmp_path


def test_no_command_replaces_what_another_made(owned, tiny, monkeypatch, capsys):
    monkeypatch.setattr("unitok.interop.import_checkpoint", lambda *_: tiny.model)
    monkeypatch.setattr("unitok.interop.describe", lambda _: "a decoder")
    monkeypatch.chdir(owned)
    u = Unitok.from_pretrained("b")
    with torch.no_grad():
        u.model.lm_head.weight += 1  # it has been trained
    with pytest.raises(UserError, match=r"holds a bundle \(text, image, audio, model\)"):
        u.save_pretrained("b")
    u.save_pretrained("b", overwrite=True)
    before = contents(owned)
    bundle = "b: holds a bundle (text, image, audio, model)"
    assert bundle in refused(capsys, "train-text-tokenizer", "corpus.txt", "--out", "b")
    assert bundle in refused(capsys, "import", "hf-llama", "corpus.txt", "b")
    assert bundle in refused(capsys, "export", "hf-qwen3", "b", "b")
    assert bundle in refused(capsys, "bundle", "b", "--untrained", "tiny")
    assert bundle in refused(capsys, "sample", "--bundle", "b", "--text", "x", "--out", "b")
    assert bundle in refused(capsys, "eval", "image-tokenizer", "b", "b/samples", "--out", "b")
    assert "no scenes" in refused(capsys, "scenes", "b", "--count", "1")
    assert "a text tokenizer of the bundle" in refused(
        capsys, "train-text-tokenizer", "corpus.txt", "--out", "b/tokenizers/text"
    )
    assert "a decoder of the bundle" in refused(capsys, "import", "hf-llama", "corpus.txt", "b/model")
    (owned / "theirs").mkdir()
    for name, text in {"bundle.json": '{"version": 1, "entry": "a.js"}', "config.json": '{"model_type": "unitok"}'}.items():
        (owned / "theirs" / name).write_text(text)
        before[f"theirs/{name}"] = text.encode()
    assert "files that unitok did not make" in refused(capsys, "bundle", "theirs", "--untrained", "tiny")
    assert "files that unitok did not make" in refused(capsys, "train-text-tokenizer", "corpus.txt", "--out", "theirs")
    assert contents(owned) == before


def test_a_command_replaces_its_own_and_with_overwrite_anything(owned, capsys):
    out, corpus = owned / "text", owned / "corpus.txt"
    main(["train-text-tokenizer", str(corpus), "--out", str(out), "--vocab-size", "300"])
    (out / "mine.txt").write_text("mine")
    first = TextTokenizer.from_pretrained(out).fingerprint()
    corpus.write_text("other words than those\n" * 9)
    main(["train-text-tokenizer", str(corpus), "--out", str(out), "--vocab-size", "300"])
    assert TextTokenizer.from_pretrained(out).fingerprint() != first
    assert (out / "mine.txt").read_text() == "mine"
    main(["train-text-tokenizer", str(corpus), "--out", str(owned / "b"), "--vocab-size", "300", "--overwrite"])
    assert kind_of(owned / "b") == "text tokenizer"
    assert not (owned / "b" / "README.md").exists()
    (out / "config.json").write_text(
        json.dumps({"unitok": 1, "architectures": ["Qwen3ForCausalLM"], "transformers_version": "5"})
    )
    assert kind_of(out) == ""  # trained on in another program since it was exported
    assert "files that unitok did not make" in refused(capsys, "train-text-tokenizer", corpus, "--out", out)


def test_adding_to_a_bundle_keeps_the_files_of_others_in_it(owned, bundle_folder):
    theirs = {name: data for name, data in contents(owned / "b").items() if name not in contents(bundle_folder)}
    assert len(theirs) == 5
    make_bundle(owned / "b", {"model": bundle_folder})
    made = contents(owned / "b")
    assert {name: made[name] for name in theirs} == theirs
    assert made.keys() - theirs.keys() == contents(bundle_folder).keys()
    assert os.readlink(owned / "b" / "link") == "samples"
    make_untrained(owned / "b")  # the same again: nothing is lost
    assert contents(owned / "b") == made
    assert sorted(f.name for f in owned.iterdir()) == ["b", "b.old", "b.partial", "corpus.txt"]


def test_overwriting_leaves_out_a_decoder_that_lost_its_tokenizer(owned):
    u = Unitok.from_pretrained(owned / "b")
    with torch.no_grad():
        u.image.encoder.conv_in.weight += 1
    u.image.save_pretrained(owned / "image")
    with pytest.raises(UserError, match="trained with another image tokenizer; choose another folder, or overwrite"):
        make_bundle(owned / "b", {"image": owned / "image"})
    made = make_bundle(owned / "b", {"image": owned / "image"}, overwrite=True)
    assert made.model is None
    assert made.text is not None
    assert (owned / "b" / "README.md").exists()


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"version": 9, "parts": []}', '{"version": 2, "parts": ["smell"]}', "[" * 100_000, '{"version": 2, "parts": 3}'])  # fmt: skip
def test_a_bundle_json_that_is_none_is_one_line(owned, capsys, content):
    (owned / "b" / "bundle.json").write_text(content)
    line = refused(capsys, "sample", "--bundle", owned / "b", "--text", "x", "--out", owned / "out")
    assert str(owned / "b") in line
    (owned / "b" / "tokenizers" / "image" / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json"):
        ImageTokenizer.from_pretrained(owned / "b" / "tokenizers" / "image")
