"""Recordings with times of their words: documents in which each word stands beside what is heard of it."""

import json
import re

import numpy as np
import pytest
from raw_data import wav

from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.errors import UserError

WORDS = [
    {"word": " One", "start": 0.1, "end": 0.3, "probability": 0.9},
    {"word": " red", "start": 0.42, "end": 0.6},
    {"word": " bell.", "start": 0.6, "end": 1.0},
]


def documents(source, out, bundle, **options):
    tokenize(Plan(str(source), str(out), str(bundle), spec=SourceSpec(str(source), interleave="words", **options)))
    data = TokenDataset(out)
    return [data.document(i) for i in range(len(data))]


@pytest.fixture
def recording(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.wav").write_bytes(wav(1, 1.3))
    return folder


def write_rows(folder, *rows):
    (folder / "train.jsonl").write_text("".join(json.dumps({"audio": "a.wav"} | row) + "\n" for row in rows))


def test_words_and_stretches_stand_in_turn_and_keep_the_codes_of_the_whole(recording, tmp_path, tiny, bundle_folder):
    rate = tiny.require("audio").frame_rate
    (whole,) = tiny.read_prompt(recording / "a.wav").segments
    edges = [0, *(round(t * rate) for t in (0.42, 0.6)), whole.codes.shape[1]]
    listed = [[w["start"], w["end"], w["word"]] for w in WORDS]
    for number, row in enumerate(
        ({"words": WORDS, "text": "One red bell."}, {"words": listed}, {"segments": [{"words": WORDS}]})
    ):
        write_rows(recording, row)
        (document,) = documents(recording, tmp_path / f"out{number}", bundle_folder)
        assert [s.modality for s in document.segments] == ["text", "audio"] * 3
        stretches = document.segments[1::2]
        assert [tiny.decode(s).strip() for s in document.segments[::2]] == ["One", "red", "bell."]
        for stretch, a, b in zip(stretches, edges, edges[1:], strict=False):
            np.testing.assert_array_equal(stretch.codes, whole.codes[:, a:b])
        assert sum(s.size[0] for s in stretches) == whole.size[0]
        assert stretches[1].source == f"a.wav#t={edges[1] / rate:.10g},{edges[2] / rate:.10g}"


def test_stretches_first_leave_what_comes_after_the_last_word_alone(recording, tmp_path, tiny, bundle_folder):
    write_rows(recording, {"words": WORDS})
    (document,) = documents(recording, tmp_path / "out", bundle_folder, order=("audio", "text"))
    assert [s.modality for s in document.segments] == ["audio", "text"] * 3 + ["audio"]
    assert document.segments[-1].codes.shape[1] == document_frames(document) - round(1.0 * tiny.require("audio").frame_rate)
    both = documents(recording, tmp_path / "both", bundle_folder, order=("both",))
    assert [[s.modality for s in d.segments[:2]] for d in both] == [["text", "audio"], ["audio", "text"]]
    assert both[1].segments == document.segments


def document_frames(document) -> int:
    return sum(s.codes.shape[1] for s in document.segments if s.modality == "audio")


def test_what_whisper_writes_beside_a_recording(recording, tmp_path, tiny, bundle_folder):
    written = {
        "text": " One red bell.",
        "language": "en",
        "segments": [{"id": 0, "words": WORDS[:2]}, {"id": 1, "words": WORDS[2:]}],
    }
    (recording / "a.json").write_text(json.dumps(written))
    (document,) = documents(recording, tmp_path / "out", bundle_folder)
    assert [tiny.decode(s).strip() for s in document.segments if s.modality == "text"] == ["One", "red", "bell."]


def test_a_word_shorter_than_a_frame_stands_with_the_next(recording, tmp_path, tiny, bundle_folder):
    words = [{"word": "a", "start": 0.1, "end": 0.101}, {"word": "bell", "start": 0.101, "end": 0.5}]
    write_rows(recording, {"words": [{"word": "One", "start": 0.0, "end": 0.1}, *words]})
    (document,) = documents(recording, tmp_path / "out", bundle_folder)
    assert [tiny.decode(s) for s in document.segments if s.modality == "text"] == ["One", " a bell"]
    assert document.segments[-1].modality == "audio"


def test_times_are_those_of_the_file_also_in_a_stretch_of_it(recording, tmp_path, tiny, bundle_folder):
    write_rows(recording, {"words": WORDS, "start": 0.4, "end": 1.2})
    (document,) = documents(recording, tmp_path / "out", bundle_folder)
    assert [tiny.decode(s).strip() for s in document.segments if s.modality == "text"] == ["red", "bell."]
    assert document.segments[1].codes.shape[1] == round((0.6 - 0.4) * tiny.require("audio").frame_rate)
    write_rows(recording, {"words": WORDS, "start": 0, "end": 0.5})
    (document,) = documents(recording, tmp_path / "short", bundle_folder)
    assert [tiny.decode(s).strip() for s in document.segments if s.modality == "text"] == ["One", "red"]


def test_words_without_times_stand_with_the_one_before(recording, tmp_path, tiny, bundle_folder):
    write_rows(recording, {"words": [WORDS[0], {"word": "2"}, *WORDS[1:]], "segments": [{"words": WORDS}]})  # WhisperX has both
    (document,) = documents(recording, tmp_path / "out", bundle_folder)
    assert "".join(tiny.decode(s) for s in document.segments if s.modality == "text").split() == ["One2", "red", "bell."]


BAD = [
    ({"text": "One red bell."}, "no field 'words' with words and their times"),
    ({"words": [{"word": "One", "start": 0.1}]}, "word 1, .*: no word with its start and end in seconds"),
    ({"words": [{"word": "One", "start": 0.5, "end": 0.1}]}, "word 1, .*: no word with its start and end"),
    ({"words": [{"word": " ", "start": 0.1, "end": 0.2}]}, "word 1"),
    ({"words": [["One", 0.1, float("nan")]]}, "word 1"),
    ({"words": ["One", "red"]}, "word 1, One: no word"),
    ({"words": [["One", 100, 300]]}, "the last one ends at 300 s, the recording at 1.3"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a conversation has no words"),
    ({"content": [{"type": "text", "text": "a"}]}, "this line has `content`"),
    ({"words": [WORDS[2], WORDS[0]]}, "word 2, 'One', begins at 0.1 s, the one before it at 0.6 s"),
    ({"words": WORDS, "audio": ["a.wav", "b.wav"]}, "one recording with its words, and this one has 2 recordings"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_times_are_listed(recording, tmp_path, bundle_folder, row, message):
    (recording / "b.wav").write_bytes(wav(2, 1.3))
    write_rows(recording, row, {"audio": "b.wav", "words": WORDS})
    spec = SourceSpec(str(recording), interleave="words")
    tokenize(Plan(str(recording), str(tmp_path / "out"), str(bundle_folder), spec=spec), max_error_rate=1.0)
    (error,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert re.search(message, error["error"]), error
    assert len(TokenDataset(tmp_path / "out")) == 1


def test_options_that_do_not_go_together(recording, tmp_path, bundle_folder):
    write_rows(recording, {"words": WORDS})
    spec = SourceSpec(str(recording), interleave="words", options={"audio": {"segment": 0.5}})
    with pytest.raises(UserError, match="leave out --audio-segment"):
        tokenize(Plan(str(recording), str(tmp_path / "out"), str(bundle_folder), spec=spec))
    with pytest.raises(UserError, match="interleave 'seconds'; it is words"):
        SourceSpec("x", interleave="seconds")
    with pytest.raises(UserError, match="interleave and speakers do not go together"):
        SourceSpec("x", interleave="words", speakers="name")
    with pytest.raises(UserError, match="without a template or a random order"):
        SourceSpec("x", interleave="words", order=("random",))
