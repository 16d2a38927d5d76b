"""Promises of bundles: parts join and are added, old ids never move, what does not belong together is refused."""

import shutil
from dataclasses import replace

import pytest
import torch

from unitok.bundle import Unitok, make_bundle
from unitok.errors import UserError
from unitok.tokenizers import ImageTokenizer


def test_parts_are_added_without_moving_an_old_id(bundle_folder, tmp_path):
    tokenizers = bundle_folder / "tokenizers"
    first = make_bundle(tmp_path / "b", {"text": tokenizers / "text", "audio": tokenizers / "audio"})
    second = make_bundle(tmp_path / "b", {"image": tokenizers / "image"})
    second.vocab.check_covers(first.vocab, "the second", "the first")
    assert [r.name for r in second.vocab.ranges][-2:] == ["grid", "image"]
    assert Unitok.from_pretrained(tmp_path / "b").vocab == second.vocab


def test_a_decoder_does_not_outlive_the_tokenizers_it_was_trained_for(bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    other = Unitok.from_pretrained(bundle_folder)
    with torch.no_grad():
        other.image.encoder.conv_in.weight += 1
    other.image.save_pretrained(tmp_path / "image")
    with pytest.raises(UserError, match="trained with another image tokenizer"):
        make_bundle(tmp_path / "b", {"image": tmp_path / "image"})
    larger = ImageTokenizer(replace(other.image.config, codebook_size=128))
    larger.quantizer.set_codebook(torch.randn(128, 8))
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
    u = make_bundle(tmp_path / "b", {"text": bundle_folder})
    with pytest.raises(UserError, match=r"no image; add one with `unitok bundle BUNDLE --image PATH`"):
        u.need("image")
    with pytest.raises(UserError, match="no decoder"):
        u.generate(["x"])


def test_a_bundle_written_over_itself_is_whole(bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    u = Unitok.from_pretrained(tmp_path / "b")
    u.save_pretrained(tmp_path / "b")
    again = Unitok.from_pretrained(tmp_path / "b")
    assert again.image.fingerprint() == u.image.fingerprint()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b"]


def test_names_of_files_with_dots_keep_their_captions(bundle_folder, tmp_path):
    from PIL import Image

    from unitok.data.sources import read_source

    for name in ("photo.v1", "photo.v2"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    (tmp_path / "photo.txt").write_text("another text")
    found = {raw.id: [p.text for p in raw.content if p.type == "text"] for raw in read_source(tmp_path)}
    assert found == {"photo.v1.png": ["this is photo.v1"], "photo.v2.png": ["this is photo.v2"], "photo.txt": ["another text"]}
