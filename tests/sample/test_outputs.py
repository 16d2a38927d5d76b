"""Promises of outputs: begun ones are continued, the best of several is kept, streams add up to the whole."""

import copy
import io
import json
import pickle
import re

import numpy as np
import pytest
import torch
from elements import Elements, only_utf8

from unitok.api import Unitok
from unitok.cli import main
from unitok.cli.terminal import show
from unitok.document import Document, Segment
from unitok.errors import UserError, visible
from unitok.grammar import Grammar
from unitok.modalities.image import half_blocks
from unitok.ranges import Span
from unitok.sample.outputs import Output, save_outputs
from unitok.sample.score import score_documents
from unitok.sample.stream import Chunk
from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig


def picture(seed=0, shape=(4, 5)):
    return Segment("image", np.random.default_rng(seed).integers(0, 64, shape))


def sound(tiny, frames=6):
    return Segment("audio", np.random.default_rng(1).integers(0, 32, (tiny.audio.num_codebooks, frames)))


def test_a_bundle_that_has_generated_and_its_outputs_are_copied_and_pickled(tiny):
    (output,) = tiny.generate("a", "image:2x2", seed=3)
    again = pickle.loads(pickle.dumps(output))
    assert torch.equal(again.images[0], output.images[0])
    (other,) = copy.deepcopy(tiny).generate("a", "image:2x2", seed=3)
    assert other.ids.tolist() == output.ids.tolist()


@pytest.mark.parametrize("role", ["none", "user"])
def test_a_begun_picture_keeps_its_first_rows_and_its_size(tiny, role):
    text = Segment("text", tiny.text.encode("a small text"), role)
    begun = Segment("image", picture().codes, role)
    prompt = Document((text, begun))
    outputs = tiny.generate([prompt], "image,text", n=3, prefix_fraction=0.5, max_new_tokens=60)
    for output in outputs:
        assert output.prompt.segments == (text,)
        assert [s.modality for s in output.new.segments] == ["image", "text"]
        made = output.new.segments[0].codes
        assert made.shape == (4, 5)
        assert np.array_equal(made[:2], begun.codes[:2])
        assert output.new.segments[0].role == role
    assert any(not np.array_equal(o.new.segments[0].codes, begun.codes) for o in outputs)


def test_a_begun_sound_goes_on_to_the_length_that_is_wanted(tiny):
    start = sound(tiny)
    (output,) = tiny.generate([Document((start,))], "audio:9,text", prefix_fraction=0.5, max_new_tokens=100)
    made = output.new.segments[0].codes
    assert made.shape[1] == 9
    assert np.array_equal(made[:, :3], start.codes[:, :3])
    with pytest.raises(UserError, match="the plan wants 2 frames of audio, the prompt has 6"):
        tiny.generate([Document((start,))], "audio:2", prefix_fraction=1.0)
    with pytest.raises(UserError, match="the plan wants 3x3 codes, the image was begun with 4x5"):
        tiny.generate([Document((picture(),))], "image:3x3", prefix_fraction=0.5)
    with pytest.raises(UserError, match="must end with an image or audio"):
        tiny.generate(["a text"], "text", prefix_fraction=0.5)


@pytest.mark.parametrize("by", ["logprob", "pmi"])
def test_the_best_of_several_are_those_with_the_best_scores(tiny, by):
    prompt = ["a small text"]
    everything = tiny.generate(prompt, "image:2x2", n=8, seed=1)
    best = tiny.generate(prompt, "image:2x2", n=2, best_of=4, rank_by=by, seed=1)
    given = everything[0].prompt

    def value(output):
        scored = score_documents(tiny, [Document(given.segments + output.new.segments), output.new])
        likely = scored[0].parts[-1].log_probability
        return likely - (scored[1].parts[-1].log_probability if by == "pmi" else 0)

    order = sorted((value(o) for o in everything), reverse=True)
    assert [value(o) for o in best] == pytest.approx(order[:2], abs=1e-3)
    assert [o.index for o in best] == [0, 1]
    assert best[0].score == pytest.approx(order[0] / len(best[0].ids), abs=1e-3)


@pytest.mark.parametrize("by", ["logprob", "pmi"])
def test_choosing_among_free_outputs_with_roles_works_whatever_they_are(tiny, by):
    prompt = Document((Segment("text", tiny.text.encode("a small text"), "user"),))
    everything = tiny.generate([prompt], "free", n=24, seed=2, max_new_tokens=24)
    assert any(s.role != "user" for o in everything for s in o.new.segments)
    best = tiny.generate([prompt], "free", n=3, best_of=8, rank_by=by, seed=2, max_new_tokens=24)
    scores = [output.score for output in best]
    assert scores == sorted(scores, reverse=True)
    assert {tuple(o.ids) for o in best} <= {tuple(o.ids) for o in everything}


def test_mistakes_in_a_stream_are_said_before_any_work(tiny):
    with pytest.raises(UserError, match="batch_size is 0"):
        tiny.stream(["a text"], batch_size=0)
    with pytest.raises(UserError, match="a budget of 4 tokens is too small"):
        tiny.stream(["a text"], modalities="image:2x2", max_new_tokens=4)


@pytest.fixture(scope="module")
def causal(tiny):
    """The tiny bundle with a sound tokenizer that can stream."""
    torch.manual_seed(0)
    c = tiny.audio.config
    config = AudioTokenizerConfig(**{**vars(c), "causal": True, "norm": "none", "num_codebooks": c.num_codebooks})
    audio = AudioTokenizer(config)
    audio.train()
    audio.quantizer.init_codebook(audio.quantizer.project(torch.randn(4, 64, config.dimension)).projected)
    return Unitok(tiny.vocab, {"text": tiny.text, "image": tiny.image}, tiny.model), audio.eval()


@pytest.mark.parametrize("streams", [True, False])
def test_a_streams_pieces_add_up_to_its_outputs(tiny, causal, streams):
    u, audio = causal
    u.tokenizers["audio"] = audio if streams else tiny.audio
    modalities, prompt = "text,image:8x6,audio:40", [["a small text"], ["text", "small"]]
    outputs, pieces = [], []
    for piece in u.stream(prompt, modalities=modalities, n=2, max_new_tokens=400, image={"guidance_scale": 2.0}, seed=4):
        (outputs if isinstance(piece, Output) else pieces).append(piece)
    whole = u.generate(prompt, modalities, n=2, max_new_tokens=400, image={"guidance_scale": 2.0}, seed=4)
    assert sorted(o.index for o in outputs) == [0, 1, 2, 3]
    for output in outputs:
        mine = [p for p in pieces if p.index == output.index]
        assert output.ids.tolist() == whole[output.index].ids.tolist()
        assert "".join(p.content for p in mine if p.modality == "text") == output.text
        pictures = [p.content for p in mine if p.modality == "image"]
        assert len(pictures) > 1
        assert [p.shape[1] for p in pictures] == sorted(p.shape[1] for p in pictures)
        torch.testing.assert_close(pictures[-1], output.images[0])
        sounds = [p.content for p in mine if p.modality == "audio"]
        assert (len(sounds) > 1) == streams
        torch.testing.assert_close(torch.cat(sounds, -1), output.audios[0], atol=1e-4, rtol=1e-3)
        assert [p.span for p in mine if p.done] == [0, 1, 2]


def test_a_begun_picture_streams_from_its_kept_rows_on(tiny):
    pieces = list(tiny.stream([Document((picture(),))], modalities="image", prefix_fraction=0.5, max_new_tokens=40))
    shown = [p.content for p in pieces if isinstance(p, Chunk)]
    assert shown[0].shape[1] >= 2 * tiny.image.stride
    torch.testing.assert_close(shown[-1], pieces[-1].images[0])


def test_an_image_whose_codes_do_not_tell_its_size_is_shown_once_it_is_whole(tiny):
    stream = tiny.modality("image").stream(tiny.image, Span("image", ("image",), "<image>", "</image>"))
    assert stream.push(np.ones((1, 3), np.int64), False) is None
    assert stream.push(np.ones((1, 4), np.int64), True).shape == (3, tiny.image.stride, 4 * tiny.image.stride)


def test_the_live_view_shows_text_pictures_and_sound_as_they_grow(tiny):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    outputs = show(tiny.stream(["a small text"], modalities="text,image:4x4,audio:3", max_new_tokens=120), tiny, screen)
    told = screen.getvalue()
    assert visible(outputs[0].text, lines=True) in told
    assert told.count("\N{UPPER HALF BLOCK}") >= 16 * 8
    assert "\N{EIGHTH NOTE}" in told
    paper = io.StringIO()
    show(tiny.stream(["a small text"], modalities="image:4x4", max_new_tokens=120), tiny, paper)
    assert paper.getvalue() == "[image, 16 x 16 pixels]\n"
    assert len(half_blocks(torch.zeros(3, 64, 32))) == 32


def test_the_live_view_draws_an_image_over_the_one_before_it(tiny):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    grown = [Chunk(0, 1, "image", torch.zeros(3, rows, 8), rows == 8) for rows in (4, 8)]
    show([Chunk(0, 0, "text", "a", True), *grown, Chunk(0, 2, "text", "b", True)], tiny, screen)
    moves = re.findall(r"\x1b\[(\d+)A", screen.getvalue())
    assert moves == ["2"]  # the lines of the first one
    assert screen.getvalue().startswith("a\n\x1b[2K")
    assert screen.getvalue().endswith("\nb\n")


def test_what_a_text_says_does_not_reach_the_terminal_as_a_command(tiny):
    screen = io.StringIO()
    show([Chunk(0, 0, "text", "a\x1b[2J\x9b1m\r\u202eb\x07\nc\td é", False)], tiny, screen)
    assert screen.getvalue() == "a\\x1b[2J\\x9b1m\\r\\u202eb\\x07\nc\td é\n"


def test_files_of_a_prompt_keep_nothing_of_their_names_and_pages_quote_the_rest(tiny, tmp_path, scenes_folder, monkeypatch):
    written = only_utf8(monkeypatch)
    hostile = tmp_path / 'a.png" onerror="alert(1)'
    hostile.write_bytes((scenes_folder / "images" / "000000.png").read_bytes())
    sound = tmp_path / "b.png?#%41"
    sound.write_bytes((scenes_folder / "audio" / "000000.wav").read_bytes())
    prompt = [hostile, sound, "<script>alert(2)</script>\x1b\u202e"]
    out = tmp_path / "out"
    save_outputs(tiny.generate(prompt, "image:1x1,audio:1", n=2), out, '<b>"title"')
    elements = Elements((out / "index.html").read_text(encoding="utf-8")).found
    assert {tag for tag, _ in elements} <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "p",
        "article",
        "figure",
        "div",
        "img",
        "audio",
    }
    assert all(set(a) <= {"src", "alt", "controls", "class", "width"} for tag, a in elements if tag in ("img", "audio"))
    sources = [a["src"] for tag, a in elements if tag in ("img", "audio")]
    assert len(sources) == 8
    assert all((out / source).is_file() for source in sources)
    assert (out / "000000-prompt-0.png").read_bytes() == hostile.read_bytes()
    assert (out / "000000-prompt-1.wav").read_bytes() == sound.read_bytes()
    assert {"index.html", "outputs.jsonl"} <= written
    (out / "mine.txt").write_text("mine")
    save_outputs(tiny.generate("a text", "image:1x1"), out)
    assert sorted(f.name for f in out.iterdir()) == ["000000-0.png", "index.html", "mine.txt", "outputs.jsonl"]
    with pytest.raises(UserError, match="holds files that unitok did not make"):
        save_outputs([], scenes_folder / "images")


def test_a_file_that_a_document_names_is_never_copied(tiny, tmp_path, scenes_folder):
    secret = scenes_folder / "images" / "000000.png"
    prompt = Document((Segment("image", picture().codes, source=str(secret)), Segment("text", [270], source=str(secret))))
    (output,) = tiny.generate(prompt, "image:1x1")
    assert output.prompt.segments[0].source == str(secret)
    output.save(tmp_path)
    made = [file.read_bytes() for file in tmp_path.glob("*.png")]
    assert len(made) == 2
    assert secret.read_bytes() not in made


def test_an_output_never_replaces_another_unless_told_to(tiny, tmp_path):
    first, second = (tiny.generate(text, "image:1x1")[0] for text in ("a text", "another"))
    first.save(tmp_path / "out")
    before = (tmp_path / "out" / "000000-0.png").read_bytes()
    with pytest.raises(UserError, match=r"is there already; choose another folder, or overwrite=True"):
        second.save(tmp_path / "out")
    assert (tmp_path / "out" / "000000-0.png").read_bytes() == before
    second.save(tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match=r"x\.png: save writes several files; give a folder, such as .*x$"):
        first.save(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_outputs_are_hashable_and_a_slice_of_them_shows_itself(tiny):
    outputs = tiny.generate("a text", "image:1x1", n=3)
    assert len({*outputs, *outputs}) == 3
    assert outputs.index(outputs[1]) == 1
    assert outputs[:2] == list(outputs)[:2]
    assert outputs[:2]._repr_html_() == outputs[0]._repr_html_() + outputs[1]._repr_html_()


def test_an_output_is_decoded_once(tiny, tmp_path, monkeypatch):
    (output,) = tiny.generate("a text", "image:1x1,audio:1")
    calls = []
    for name in ("image", "audio"):
        part = getattr(tiny, name)
        monkeypatch.setattr(part, "decode", lambda *a, real=part.decode, name=name: (calls.append(name), real(*a))[1])
    assert len(output.images) == len(output.audios) == 1
    output.save(tmp_path)
    assert sorted(calls) == ["audio", "image"]


def test_outputs_show_themselves_escaped_with_the_prompt_in_gray(tiny, scenes_folder):
    prompt = ["<script>alert(1)</script>\x1b & more", scenes_folder / "images" / "000000.png"]
    outputs = tiny.generate(prompt, "image:2x2,audio:2", n=2)
    for shown, count in ((outputs[0]._repr_html_(), 1), (outputs._repr_html_(), 2)):
        elements = Elements(shown).found
        assert {tag for tag, _ in elements} == {"div", "figure", "p", "img", "audio"}
        assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b &amp; more" in shown
        sources = [a["src"][:22] for tag, a in elements if tag in ("img", "audio")]
        assert sources == ["data:image/png;base64,", "data:image/png;base64,", "data:audio/wav;base64,"] * count
        gray = ["color:#7a848f" in a["style"] for tag, a in elements if tag == "figure"]
        assert gray == [True, True, False, False] * count
    line = repr(outputs[0])
    assert line.startswith("<Output 0: text '<script>alert(1)</script>\\x1b & more', image ")
    assert line.endswith(" -> image 2x2, audio 3x2 (16 tokens)>")
    assert "\n" not in line


def test_scores_and_bundles_show_themselves(tiny):
    (score,) = tiny.score(Document((picture(shape=(2, 2)), Segment("text", tiny.text.encode("a text"), loss=False)), "cats"))
    assert re.fullmatch(r"<Score 'cats': -\d+\.\d\d nats, 8 tokens, \d+\.\d{3} bits per token \(image, text\)>", repr(score))
    elements = Elements(score._repr_html_()).found
    assert ["color:#7a848f" in a["style"] for tag, a in elements if tag == "figure"] == [False, True]
    assert f"{score.parts[0].log_probability:.2f} nats, 8 tokens" in score._repr_html_()
    line = "<Unitok: tokenizers text, image, audio; vocabulary of 780 tokens; decoder of 176,064 parameters>"
    assert repr(tiny) == line
    assert repr(Unitok(tiny.vocab)) == "<Unitok: tokenizers none; vocabulary of 780 tokens; no decoder>"


def test_scores_on_the_command_line_choose_among_answers(tiny, bundle_folder, tmp_path, capsys):
    lines = [
        {"id": answer, "content": [{"type": "text", "text": "a small", "loss": False}, {"type": "text", "text": answer}]}
        for answer in (" text", " nothing")
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["sample", "--bundle", str(bundle_folder), "--score", "--prompts", str(file), "--out", str(tmp_path / "out")])
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        given, answer = (tiny.text.encode(part["text"]) for part in line["content"])
        assert row["tokens"] == len(answer)
        ids = tiny.vocab.encode(Document((Segment("text", [*given, *answer]),)), eos=False)
        legal = torch.cat([torch.arange(a, b) for a, b in Grammar(tiny.vocab).follow(ids, complete=False).allowed()])
        with torch.inference_mode():
            logits = tiny.model(torch.from_numpy(ids)[None], span_positions=torch.zeros(1, len(ids), dtype=torch.int64))[0]
        chosen = logits[:, legal].double().log_softmax(-1)
        wanted = sum(chosen[i - 1, (legal == ids[i]).nonzero()[0, 0]] for i in range(1 + len(given), len(ids)))
        assert row["log_probability"] == pytest.approx(float(wanted), abs=1e-3)
    assert "bits per token" in capsys.readouterr().out


def test_a_plan_that_is_longer_than_the_usual_limit_gets_what_it_takes(tiny):
    levels = len(tiny.vocab.body("audio"))
    frames = 600 // levels
    (output,) = tiny.generate("a bell", f"audio:{frames}", seed=0)
    assert output.new.segments[0].codes.shape[1] == frames
    with pytest.raises(UserError, match="a budget of 512 tokens is too small"):
        tiny.generate("a bell", f"audio:{frames}", seed=0, max_new_tokens=512)
