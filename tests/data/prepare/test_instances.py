"""Several tokenizers of one kind: parts, folders and templates say which of them content goes to, and it comes back by its name."""

import json
from pathlib import Path

import pytest
import torch
from raw_data import errors_of, png, wav

from unitok.bundle import Bundle
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.tokenize import detokenize, tokenize
from unitok.data.shards import TokenDataset
from unitok.errors import UserError
from unitok.interleaved import read_raw_documents
from unitok.modalities import build_vocab, modality_of


@pytest.fixture(scope="module")
def two_audio(tmp_path_factory) -> Path:
    """A bundle with text, and with two tokenizers of audio that give different codes."""
    torch.manual_seed(1)
    kinds = {"speech": "audio", "music": "audio", "text": "text"}
    tokenizers = {name: modality_of(kind).untrained() for name, kind in kinds.items()}
    folder = tmp_path_factory.mktemp("bundles") / "two"
    Bundle(build_vocab(tokenizers, kinds), tokenizers).save_pretrained(folder)
    return folder


def test_parts_name_an_instance_and_come_back_by_it(two_audio, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav())
    rows = [
        [{"type": "speech", "path": "a.wav"}, {"type": "text", "text": "said"}, {"type": "music", "path": "a.wav"}],
        [{"type": "audio", "path": "a.wav"}],
    ]
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps({"content": row}) for row in rows[:1]))
    tokenize(Plan(str(tmp_path), str(tmp_path.with_name("named")), str(two_audio)))
    data = TokenDataset(tmp_path.with_name("named"))
    assert data.verify() == []
    speech, _, music = data.document(0).segments
    assert [speech.modality, music.modality] == ["speech", "music"]
    assert speech.codes.tolist() != music.codes.tolist()
    assert detokenize(data.folder, tmp_path / "back", two_audio) == 1
    [back] = read_raw_documents(tmp_path / "back" / "documents.jsonl", Bundle.from_pretrained(two_audio).types)
    assert [part.type for part in back.content] == ["speech", "text", "music"]
    assert back.content[1].value == "said"
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps({"content": row}) for row in rows))
    with pytest.raises(UserError, match="several tokenizers for audio: speech, music; say which"):
        tokenize(Plan(str(tmp_path), str(tmp_path.with_name("unsaid")), str(two_audio)))
    assert not tmp_path.with_name("unsaid").exists()


def test_sources_say_which_instance_their_files_are(two_audio, tmp_path):
    for folder in ("talk", "songs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.wav").write_bytes(wav(1))
        (tmp_path / folder / "0.txt").write_text(folder)
    sources = [
        {"path": "talk", "instances": {"audio": "speech"}, "roles": {"audio": "user"}, "audio": {"segment": 0.2}},
        {"path": "songs", "template": [{"type": "music", "path": "{wav}"}, {"type": "text", "text": "{txt}"}]},
    ]
    (tmp_path / "mix.yaml").write_text(json.dumps({"sources": sources}))
    tokenize(Plan("", str(tmp_path / "out"), str(two_audio), recipe=str(tmp_path / "mix.yaml")))
    data = TokenDataset(tmp_path / "out")
    found = [[(s.modality, s.role) for s in data.document(i).segments] for i in range(len(data))]
    talk = [("text", "none"), ("speech", "user")]
    assert found == [talk, talk, [("music", "none"), ("text", "none")]]
    assert not (tmp_path / "out" / "errors.jsonl").exists()
    for spec, why in (
        (SourceSpec("", instances={"audio": "speach"}), "type 'speach'; choose of speech, music, text"),
        (SourceSpec("", order=("smell",)), "type 'smell'; choose of"),
        (SourceSpec("", template=({"type": "music", "text": "{wav}"},)), "template: a part of type music needs a 'path'"),
        (SourceSpec(""), "several tokenizers for audio"),
    ):
        with pytest.raises(UserError, match=why):
            tokenize(Plan(str(tmp_path / "talk"), str(tmp_path / "no"), str(two_audio), spec=spec))
        assert not (tmp_path / "no").exists()


def test_an_image_where_audio_should_be_is_listed(two_audio, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = ['{"content": [{"type": "music", "path": "a.png"}]}', '{"content": [{"type": "text", "text": "good"}]}']
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    tokenize(Plan(str(tmp_path / "x.jsonl"), str(tmp_path / "out"), str(two_audio)))
    [error] = errors_of(tmp_path / "out")
    assert error == "a.png: the part's type is music, the file is image; give the type that it has"
