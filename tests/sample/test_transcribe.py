"""Words of recordings: the search finds what reading whole documents finds, and words have their times."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from unitok import Unitok
from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.media import load_audio, save_audio
from unitok.sample import transcribe as module
from unitok.sample.transcribe import WordSearch
from unitok.storage import Blob

WORDS = {"speech_unit": "word"}


@pytest.fixture(scope="module")
def u(bundle_folder: Path) -> Unitok:
    """A bundle whose decoder has random weights, so that all of a document matters to it."""
    u = Unitok.from_pretrained(bundle_folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in u.require("model").parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return u


def every_division(u: Unitok, codes: np.ndarray, choices: int) -> list[tuple[float, tuple[tuple[int, int], ...]]]:
    """Score and words of all divisions of codes [S, K, N] into stretches, each with one of its `choices` likeliest words, by reading whole
    documents, one for each of S hearings, whose logits are averaged."""
    vocab, grammar, decoder = u.vocab, Grammar(u.vocab), u.require("model")
    begin, end = vocab.specials["<audio>"], vocab.specials["</audio>"]
    words, levels = (list(range(r.offset, r.stop)) for r in (vocab.body("text")[0], vocab.body("audio")[0]))

    @torch.inference_mode()
    def after(ids: np.ndarray, tokens: list[int]) -> dict[int, float]:
        places = np.stack([grammar.span_positions(row) for row in ids])
        logits = decoder(torch.from_numpy(ids), span_positions=torch.from_numpy(places))[:, -1, tokens].double().mean(0)
        return dict(zip(tokens, logits.log_softmax(-1).tolist(), strict=True))

    def added(ids: np.ndarray, *tokens: int) -> np.ndarray:
        return np.concatenate([ids, np.tile(tokens, (len(codes), 1))], 1)

    def continued(ids: np.ndarray, first: int):
        ids, score = added(ids, begin), 0.0
        for stop in range(first + 1, codes.shape[2] + 1):
            frames = (Document((Segment("audio", heard[:, stop - 1 : stop]),)) for heard in codes)
            ids = np.concatenate([ids, np.stack([vocab.encode(frame, eos=False)[2:-1] for frame in frames])], 1)
            last = stop == codes.shape[2]
            chances = after(ids, [end, *levels])
            over = score + (0.0 if last else chances[end])
            named = after(added(ids, end), [*([vocab.eos] if last else []), *words])
            for word in sorted(named, key=lambda id: -named[id])[:choices]:
                if last:
                    yield over + named[word], (((word, stop),) if word != vocab.eos else ())
                else:
                    for rest, found in continued(added(ids, end, word), stop):
                        yield over + named[word] + rest, ((word, stop), *found)
            score += math.log(sum(math.exp(chances[id]) for id in levels))

    return list(continued(np.full((len(codes), 1), vocab.bos), 0))


@pytest.mark.parametrize(("pieces", "hearings"), [([4], 1), ([1, 3], 3), ([1, 1, 1, 1], 2)])
def test_the_search_finds_the_likeliest_of_all_divisions(u, monkeypatch, pieces, hearings):
    for name, value in (("WIDTH", 10_000), ("CHOICES", 2), ("UNLIKELY", -math.inf), ("MOST", 1)):
        monkeypatch.setattr(module, name, value)
    rng = np.random.default_rng(len(pieces))
    name, levels = u.instance("audio"), len(u.vocab.body("audio"))
    codes = rng.integers(0, u.vocab.body("audio")[0].size, (hearings, levels, 4))
    every = every_division(u, codes, 2)
    assert len(every) == 2 * 3**3
    search, at = WordSearch(u, name, hearings), 0
    for count in pieces:
        search.push(codes[..., at : at + count])
        at += count
    found = [(word.tokens, word.end) for word in search.finish()]
    score, words = max(every)
    assert max(path.score for path in search.paths) == pytest.approx(score, abs=1e-3)
    assert tuple((ids[0], stop) for ids, stop in found) == words


def test_words_have_the_times_of_their_stretches(u, monkeypatch):
    rate, seconds = u.require("audio").sample_rate, 1.5
    recording = (torch.randn(1, round(rate * seconds)) * 0.1, rate)
    said = u.transcribe(recording, generation_config=WORDS)
    assert said.text.replace(" ", "") == "".join(word.text for word in said.words).replace(" ", "")
    assert [word.start for word in said.words[1:]] == [word.end for word in said.words[:-1]]
    assert all(0 <= word.start < word.end <= seconds + 1 / u.require("audio").frame_rate for word in said.words)


def test_a_new_document_does_not_see_the_last_one_and_its_first_word_gets_its_space(u, monkeypatch):
    monkeypatch.setattr(module, "CONTEXT", 0.2)
    levels = len(u.vocab.body("audio"))
    codes = np.random.default_rng(5).integers(0, 8, (levels, 60))
    search = WordSearch(u, "audio")
    search.push(codes[None])
    said = search.finish()
    assert [word.opens for word in said].count(True) > 2
    start = next(
        word.end for word in said if word.opens and word.end > 20
    )  # the frame at which a later document ends its first word
    first = max((word.end for word in said if word.end < start), default=0)
    alone = WordSearch(u, "audio")
    alone.push(codes[None, :, first:])
    assert [(w.tokens, w.end + first) for w in alone.finish()] == [(w.tokens, w.end) for w in said if w.end > first]
    monkeypatch.setattr(
        module.WordSearch,
        "finish",
        lambda self: [_said(u, " red", 3, True), _said(u, " bell", 6, False), _said(u, "Two", 9, True)],
    )
    recording = (torch.randn(1, 4000) * 0.1, 8000)
    assert u.transcribe(recording, generation_config=WORDS).text == "red bell Two"


def _said(u, text: str, end: int, opens: bool):
    offset = u.vocab.body("text")[0].offset
    return module._Said(tuple(code + offset for code in u.require("text").encode(text)), end, opens, None, 0)


def test_what_is_heard_may_be_longer_than_the_decoder_reads(u, monkeypatch):
    monkeypatch.setattr(module, "CONTEXT", 0.2)
    search, levels = WordSearch(u, "audio"), len(u.vocab.body("audio"))
    frames = 2 * search.room // levels
    search.push(np.zeros((1, levels, frames), np.int64))  # even if no word ends in it
    assert search.frame == frames
    assert all(0 < word.end <= frames for word in search.finish())
    monkeypatch.setattr(module, "CONTEXT", 60.0)  # now the decoder's own limit ends documents, not each frame a word
    monkeypatch.setattr(u.require("model").config, "max_position_embeddings", 96)
    search = WordSearch(u, "audio")
    search.push(np.zeros((1, levels, 2 * search.room // levels), np.int64))
    assert max(path.read for path in search.paths) <= search.room == 96


def test_a_file_a_waveform_and_an_upload_are_heard_alike(u, tmp_path, monkeypatch):
    rate = u.require("audio").sample_rate
    samples = torch.randn(1, round(rate * 1.3)).clamp(-1, 1) * 0.1
    save_audio(tmp_path / "a.wav", samples, rate)
    samples, rate = load_audio(tmp_path / "a.wav")
    heard: list[np.ndarray] = []
    monkeypatch.setattr(module.WordSearch, "push", lambda self, codes: heard.append(codes))
    monkeypatch.setattr(module.WordSearch, "finish", lambda self: [])
    monkeypatch.setattr(module, "SECONDS", 0.2)
    upload = Part("audio", path=Path("file"), file=Blob("file", (tmp_path / "a.wav").read_bytes()))
    part = Part("audio", path=tmp_path / "a.wav")
    given = tmp_path / "a.wav", [tmp_path / "a.wav"], (samples, rate), (rate, samples), upload, part, RawDocument("", (part,))
    for recording in given:
        u.transcribe(recording, generation_config=WORDS | {"speech_hearings": 3})
    assert heard[0].shape[0] == 3
    assert len(heard) == len(given)
    assert all((each == heard[0]).all() for each in heard)
    u.transcribe(replace(part, view="t=0.2,0.7"), generation_config=WORDS | {"speech_hearings": 2})
    assert heard[-1].shape[::2] == (2, math.ceil(0.5 * u.require("audio").frame_rate))
    u.transcribe(u.read(tmp_path / "a.wav")[0], generation_config=WORDS)  # of codes there is one hearing
    assert (heard[-1] == heard[0][:1]).all()


def test_whole_texts(u):
    recording = (torch.randn(1, 4000) * 0.1, 8000)
    given = {"max_new_tokens": 8}
    (output,) = u.generate([recording], "text", temperature=0.0, seed=0, **given)
    assert u.transcribe(recording, generation_config=given) == module.Transcript(output.text.strip())
    hot = [given | {"seed": seed, "text": {"temperature": 5.0}} for seed in range(3)]
    assert len({u.transcribe(recording, generation_config=config).text for config in hot}) > 1


def test_what_is_no_recording(u):
    for bad in ("a text", Path("missing.wav"), Document(())):
        with pytest.raises(UserError, match=r"recording|missing\.wav"):
            u.transcribe(bad)
    with pytest.raises(UserError, match="speech_unit is 'words'"):
        u.transcribe((torch.zeros(1, 800), 8000), generation_config={"speech_unit": "words"})
