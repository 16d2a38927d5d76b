"""Several tokenizers of one kind: parts, folders and templates say which of them content goes to, and it comes back by its name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_data import errors_of, png, wav

from unitok.bundle import Bundle, make_bundle
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.tokenize import detokenize, tokenize
from unitok.data.shards import TokenDataset
from unitok.errors import UserError
from unitok.interleaved import read_raw_documents
from unitok.modalities import Modality, build_vocab, modalities, modality_of, register
from unitok.ranges import Span


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
        (SourceSpec("", instances={"audio": "speach"}), "type 'speach'; choose one of speech, music, text"),
        (SourceSpec("", order=("smell",)), "type 'smell'; choose one of"),
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
    assert error == "a.png: the part's type is music, but the file is image; correct the type"


def test_order_and_pieces_know_instances_and_kinds(two_audio, tmp_path):
    (tmp_path / "0.wav").write_bytes(wav(1))
    (tmp_path / "0.txt").write_text("said")
    for order in (("speech", "text"), ("audio", "text"), ("text", "speech")):
        spec = SourceSpec("", order=order, instances={"audio": "speech"})
        out = tmp_path.with_name("-".join(order))
        tokenize(Plan(str(tmp_path), str(out), str(two_audio), spec=spec))
        assert [s.modality for s in TokenDataset(out).document(0).segments] == [{"audio": "speech"}.get(t, t) for t in order]
    both = [{"type": "speech", "path": "0.wav"}, {"type": "music", "path": "0.wav"}]
    (tmp_path / "documents.jsonl").write_text(json.dumps({"content": both}))
    out = tmp_path.with_name("both")
    tokenize(Plan(str(tmp_path / "documents.jsonl"), str(out), str(two_audio), options={"audio": {"segment": 0.2}}))
    assert len(TokenDataset(out)) == 1  # which of the two a piece would belong to, nothing says
    with pytest.raises(UserError, match="text is not a tokenizer for audio"):
        tokenize(Plan(str(tmp_path), str(tmp_path / "no"), str(two_audio), spec=SourceSpec("", instances={"audio": "text"})))


def test_a_value_that_its_kind_refuses_costs_its_document_alone(two_audio, tmp_path, monkeypatch):
    monkeypatch.setattr("unitok.modalities._REGISTRY", dict(modalities()))

    @register
    class Dice(Modality):
        kind = "dice"
        key = "dice"

        def declare(self, name, tokenizer):
            return Span(name, (name,), f"<{name}>", f"</{name}>", kind=self.kind), {name: 6}, ()

        def check(self, value, where):
            if not isinstance(value, list):
                raise UserError(f"{where}: dice are a list")
            return value

        def encode(self, tokenizer, batch):
            return [np.array([one.content]) - 1 for one in batch]

    make_bundle(tmp_path / "bundle", {"text": two_audio}, add=["dice"])
    rows = [{"t": "good", "d": [1, 6]}, {"t": "bad", "d": [0, 9]}, {"t": "worse", "d": "xy"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = ({"type": "text", "text": "{t}"}, {"type": "dice", "dice": "{d}"})
    spec = SourceSpec("", template=template)
    tokenize(Plan(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), str(tmp_path / "bundle"), spec=spec), max_error_rate=1.0)
    assert [s.codes.tolist() for s in TokenDataset(tmp_path / "out").document(0).segments[1:]] == [[[0, 5]]]
    bad, worse = (json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert "code -1 is not an allowed code of 'dice'" in bad["error"]
    assert "rows.jsonl" in worse["where"]
    assert "dice are a list" in worse["error"]
