"""Promises of `unitok eval` on scenes and of the report: right counts, wrong does not, everything is on one page."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unitok.cli import main
from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig
from unitok.media import load_audio, load_image
from unitok.sample.outputs import Output
from unitok.scenes.evaluate import DIRECTIONS as WAYS
from unitok.scenes.evaluate import Evaluation, evaluate_bundle, print_scores
from unitok.scenes.files import read_scenes, write_scenes
from unitok.scenes.report import write_report

DIRECTIONS = {
    "text_to_image": "attributes",
    "image_to_text": "exact",
    "text_to_audio": "notes",
    "audio_to_text": "exact",
    "image_to_audio": "notes",
    "questions": "exact",
    "interleaved": "attributes",
}
GENERATED = [*(f"{name}.{score}" for name, score in DIRECTIONS.items()), "image_to_text.drawn"]
FOLDS = ("composed", "systematic")
SCORES = {
    *("oracle.originals", "malformed", "codebook.image.usage", "codebook.audio.usage"),
    *("scenes", "scenes.composed", "scenes.systematic"),
    *(
        f"reconstruction.{name}"
        for name in ("image.colors", "image.attributes", "image.psnr_db", "audio.notes", "audio.snr_db")
    ),
    *(f"generation.{name}{suffix}" for name in GENERATED for suffix in ("", ".composed", ".systematic")),
}


@pytest.fixture(scope="module")
def kept_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept_out")
    for fold in ("composed", "systematic"):
        write_scenes(folder / fold, 3, seed=6, max_objects=2, fold=fold, workers=1)
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, bundle_folder, scenes_folder, kept_out):
    """`unitok eval` with an untrained bundle, on two scenes."""
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    main(
        [
            "eval",
            "--bundle",
            str(bundle_folder),
            "--scenes",
            str(scenes_folder),
            "--composed",
            str(kept_out / "composed"),
            "--systematic",
            str(kept_out / "systematic"),
        ]
        + ["--count", "2", "--out", str(out)]
    )
    return out


def test_a_bundle_is_measured_in_every_direction(evaluated, scenes_folder, kept_out):
    scores = json.loads((evaluated / "scores.json").read_text())
    rows = {
        ending: read_scenes(folder)[:2]
        for ending, folder in ({"": scenes_folder} | {f".{f}": kept_out / f for f in FOLDS}).items()
    }
    counts = {ending: sorted({len(row["scene"].objects) for row in of_fold}) for ending, of_fold in rows.items()}
    by_count = {
        f"{name}.{('one', 'two')[count - 1]}{ending}"
        for ending, found in counts.items()
        for count in found
        for name in ("scenes", *(f"generation.{n}" for n in GENERATED))
        if len(found) > 1
    }
    assert by_count  # else another seed
    talks = {name for name in scores if name.startswith(("generation.conversation.", "turns."))}
    assert {"turns.ask", "generation.conversation.ask"} <= talks
    assert set(scores) == SCORES | by_count | talks
    for ending, found in counts.items():
        if len(found) > 1:
            one, two = (scores[f"generation.questions.exact.{count}{ending}"] for count in ("one", "two"))
            assert scores[f"generation.questions.exact{ending}"] == (one + two) / 2
            assert scores[f"scenes.one{ending}"] == scores[f"scenes.two{ending}"] == 1
    assert scores["oracle.originals"] >= 0.95  # of all scenes of the folder
    assert scores["malformed"] == 0  # whatever the weights
    assert len(scores["codebook.audio.usage"]) == 3
    assert scores["scenes"] == scores["scenes.composed"] == 2
    fractions = [scores[name] for name in scores if name.startswith("generation")]
    assert all(0 <= fraction <= 1 for fraction in fractions)
    for name in DIRECTIONS:
        for suffix in ("", ".composed", ".systematic"):
            folder = evaluated / "samples" / f"{name}{suffix}"
            assert (
                len((folder / "outputs.jsonl").read_text().splitlines())
                == len(json.loads((folder / "right.json").read_text()))
                == 2
            )
    first = json.loads((evaluated / "samples" / "image_to_text" / "outputs.jsonl").read_text().splitlines()[0])
    assert [part["type"] for part in first["content"]][:2] == ["image", "text"]
    pairs = [f.name for f in (evaluated / "reconstructions").iterdir()]
    assert len(pairs) == 12 * 4  # of twelve scenes: images and audio, before and after


def test_too_few_scenes_or_none_are_one_line(bundle_folder, scenes_folder, tmp_path):
    more = (tmp_path / "out", 25, 0)
    with pytest.raises(UserError, match="has 24 scenes, fewer than count 25"):
        evaluate_bundle(bundle_folder, scenes_folder, *more)
    with pytest.raises(UserError, match="no scenes.jsonl in this folder"):
        evaluate_bundle(bundle_folder, bundle_folder, *more)
    with pytest.raises(UserError, match="has (seen|composed) scenes; make it with `unitok scenes OUT --fold systematic`"):
        evaluate_bundle(bundle_folder, scenes_folder, tmp_path / "out", 2, 0, {"systematic": scenes_folder})
    with pytest.raises(UserError, match="best_of 0: it must be at least 1"):
        evaluate_bundle(bundle_folder, scenes_folder, tmp_path / "out", 2, 0, best_of=0)
    for count in (0, -1):
        with pytest.raises(UserError, match=f"count {count}: it must be at least 1"):
            evaluate_bundle(bundle_folder, scenes_folder, tmp_path / "out", count, 0)
    assert not (tmp_path / "out").exists()


def test_the_best_of_several_is_chosen_by_pmi(tiny, scenes_folder, tmp_path, monkeypatch):
    configs = []

    def generate(unitok, prompts, config, batch_size, turn):
        configs.append(config)
        return [
            SimpleNamespace(images=[torch.zeros(3, 32, 32)], audios=[torch.zeros(1, 3200)], text="", document=p)
            for p in prompts
        ]

    monkeypatch.setattr("unitok.scenes.evaluate.generate_outputs", generate)
    evaluation = Evaluation(tiny, tmp_path, 0, GenerationConfig())
    monkeypatch.setattr(evaluation, "save_samples", lambda *_: None)
    monkeypatch.setattr(evaluation, "_well_formed", lambda *_: True)
    evaluation.generate(scenes_folder, read_scenes(scenes_folder)[:2], ".best_of_4", 4)
    assert {(c.best_of, c.rank_by, c.n) for c in configs} == {(4, "pmi", 1)}


def test_each_direction_counts_the_truth_as_right_and_another_scene_as_wrong(tiny, scenes_folder):
    rows = read_scenes(scenes_folder)
    row = rows[0]
    other = next(r for r in rows if r["scene"].notes() != row["scene"].notes() and len(r["scene"].objects) == 1)
    other |= {"answer": "nothing"}

    def truth(of: dict, name: str) -> SimpleNamespace:
        text = {"image_to_text": of["caption"], "audio_to_text": of["audio_caption"]}
        return SimpleNamespace(
            images=[load_image(scenes_folder / of["image"])],
            audios=[load_audio(scenes_folder / of["audio"])[0]],
            text=text.get(name, f" {of['answer']}."),
        )

    rate = load_audio(scenes_folder / row["audio"])[1]
    assert tiny.audio.sample_rate == rate
    assert {d.name: d.score for d in WAYS} == {name: score for name, score in DIRECTIONS.items() if name != "interleaved"}
    for direction in WAYS:
        assert direction.right(truth(row, direction.name), row, rate), direction.name
        assert not direction.right(truth(other, direction.name), row, rate), direction.name
        assert set(direction.given) <= row.keys()
        assert direction.modalities not in direction.given


def test_what_is_drawn_is_described_as_what_the_oracle_sees_in_it(tiny, scenes_folder, tmp_path, monkeypatch):
    rows = [row for row in read_scenes(scenes_folder) if len(row["scene"].objects) == 1][:2]
    assert rows[0]["scene"] != rows[1]["scene"]
    image = load_image(scenes_folder / rows[0]["image"])
    drawn = [SimpleNamespace(images=[each]) for each in (image, image, torch.zeros_like(image))]  # the last shows nothing
    evaluation = Evaluation(tiny, tmp_path, 0, {})
    said = [SimpleNamespace(text=text) for text in (rows[0]["caption"], rows[1]["caption"], "nothing")]
    monkeypatch.setattr(evaluation, "continue_from", lambda *_, **__: said)
    evaluation._describe_drawn(drawn, [rows[1], rows[1], rows[1]])
    assert evaluation.scores["generation.image_to_text.drawn"] == pytest.approx(1 / 3)


def test_interleaved_images_must_each_fit_the_text_before_them(tiny, scenes_folder, tmp_path, monkeypatch):
    """With images that are right for the first prompt only."""
    rows = read_scenes(scenes_folder)[:2]
    assert rows[0]["scene"] != rows[1]["scene"]
    evaluation = Evaluation(tiny, tmp_path, 0, {})
    monkeypatch.setattr(evaluation, "save_samples", lambda *_: None)
    seen = []

    def draw(prompts, modalities, name, seed=0, best_of=1):
        seen.append(prompts)
        image = load_image(scenes_folder / rows[0]["image"])
        return [SimpleNamespace(images=[image], document=Document(p.segments)) for p in prompts]

    monkeypatch.setattr(evaluation, "continue_from", draw)
    evaluation._interleaved(scenes_folder, rows)
    assert evaluation.scores["generation.interleaved.attributes"] == 0.5  # one of two first ones, one of two second ones
    texts = [[tiny.decode(s) for s in p.segments if s.modality == "text"][-1] for p in seen[1]]
    assert texts == [rows[1]["caption"], rows[0]["caption"]]


def test_an_output_that_the_grammar_refuses_is_counted_as_malformed(tiny, tmp_path):
    evaluation = Evaluation(tiny, tmp_path, 0, {})
    vocab = tiny.vocab
    new = Document((Segment("image", np.zeros((2, 2), np.int64)),))
    ids = vocab.encode(new, bos=False)
    prompt = Document((Segment("text", tiny.text.encode("a")),))
    good = Output(tiny, prompt, new, ids)
    assert evaluation._well_formed(good)
    assert evaluation._well_formed(replace(good, ids=ids[:-1]))  # stopped by its budget just before its end
    assert not evaluation._well_formed(replace(good, ids=np.delete(ids, 4)))  # a code is missing
    assert not evaluation._well_formed(replace(good, new=Document((Segment("image", np.ones((2, 2), np.int64)),))))


def test_scores_are_printed_one_per_line(capsys):
    print_scores({"b": 0.25, "a": [1.0, 0.5], "malformed": 0})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["a", "1.000,", "0.500"],
        ["b", "0.250"],
        ["malformed", "0"],
    ]


# ---- The report -----------------------------------------------------------------------------------------------------


@pytest.fixture
def page(evaluated, tmp_path) -> str:
    """The report of a run whose decoder alone has a curve, with one caption that looks like HTML."""
    (tmp_path / "eval").symlink_to(evaluated)
    (tmp_path / "decoder" / "metrics").mkdir(parents=True)
    lines = ["step,loss,bits_per_token/text", "0,4.0,8.0", "5,2.0,", "10,1.25,3.5"]
    (tmp_path / "decoder" / "metrics" / "metrics.csv").write_text("\n".join(lines) + "\n")
    scores = json.loads((evaluated / "scores.json").read_text()) | {"seconds": 90.0, "peak_memory_gb": 1.5}
    path = write_report(tmp_path, scores, {"scenes": 30.0, "image": 60.0}, 2)
    assert path == tmp_path / "report.html"
    assert [f.name for f in tmp_path.glob("report.html*")] == ["report.html"]
    return path.read_text()


def test_the_report_has_every_score_sample_pair_curve_and_time(page, evaluated):
    scores = json.loads((evaluated / "scores.json").read_text())
    for name, value in scores.items():
        if not name.startswith("scenes") and not re.search(r"\.(composed|systematic|one|two)\b", name):
            (row,) = re.findall(rf"<tr><td>{re.sub('[._]', ' ', name)}</td>.*?</tr>", page)
            if isinstance(value, float) and not name.endswith("_db"):
                assert f">{100 * value:.1f} %<" in row
    assert page.count('<article class="right"') + page.count('<article class="wrong"') == 2 * 7 * 3
    marks = [json.loads(f.read_text()) for f in evaluated.glob("samples/*/right.json")]
    assert page.count('<article class="right"') == sum(sum(each) for each in marks)
    assert page.count("<figcaption>original<") == page.count("<figcaption>reconstruction<") == 12 + 4
    assert "loss 1.25 (max 4)" in page
    assert "bits_per_token/text 3.5 (max 8)" in page
    assert "in 1.5 minutes\n(budget 2 minutes); the largest process took 1.5 GB of memory" in page
    assert "<tr><td>image</td><td>60 s</td></tr>" in page


def test_the_report_shows_the_built_in_bundle_beside_the_one_just_trained(evaluated, tmp_path):
    for name in ("eval", "shipped"):
        (tmp_path / name).symlink_to(evaluated)
    scores = json.loads((evaluated / "scores.json").read_text())
    page = write_report(tmp_path, scores, {}, 1).read_text()
    titles = re.findall(r"<h[34]>(.*?) *(?:<span|</h)", page.split("<h2>Generations</h2>")[1].split("<h2>Training</h2>")[0])
    new = ["trained just now", "trained just now: new sequences of objects", "trained just now: new color-shape pairs"]
    assert len(titles) == 7 * 5
    for start in range(0, 35, 5):
        assert titles[start + 1 : start + 5] == ["the built-in bundle", *new]


def test_the_report_needs_no_other_file_and_is_well_formed(page, evaluated):
    assert not re.search(r'(src|href)="(?!data:)', page)
    samples = [json.loads(line) for f in evaluated.glob("samples/*/outputs.jsonl") for line in f.read_text().splitlines()]
    kinds = [part["type"] for sample in samples for part in sample["content"]]
    assert page.count("data:image/png") == kinds.count("image") + 2 * 12
    assert page.count("data:audio/wav") == kinds.count("audio") + 2 * 4
    for tag in ("div", "table", "tr", "td", "th", "svg", "span", "h1", "h2", "h3", "p", "audio", "article", "figure"):
        assert len(re.findall(rf"<{tag}[\s>]", page)) == page.count(f"</{tag}>"), tag


def test_text_in_the_report_is_escaped(evaluated, tmp_path):
    folder = tmp_path / "eval" / "samples" / "image_to_text"
    folder.mkdir(parents=True)
    content = [{"type": "text", "text": '<script>alert("x")</script> & more'}]
    (folder / "outputs.jsonl").write_text(json.dumps({"content": content}) + "\n")
    (folder / "right.json").write_text("[true]\n")
    page = write_report(tmp_path, {"generation.image_to_text.exact": 1.0}, {}, 1).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; more" in page
    assert "100.0 % right" in page


def test_a_right_answer_is_green_and_a_wrong_one_red(evaluated, tmp_path):
    folder = tmp_path / "eval" / "samples" / "questions.systematic"
    folder.mkdir(parents=True)
    lines = [
        {"content": [{"type": "text", "text": f"given {i}", "loss": False}, {"type": "text", "text": f"new {i}"}]}
        for i in (0, 1)
    ]
    (folder / "outputs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "right.json").write_text("[false, true]\n")
    page = write_report(
        tmp_path, {"generation.questions.exact": 1.0, "generation.questions.exact.systematic": 0.5}, {}, 1
    ).read_text()
    assert 'trained just now: new color-shape pairs <span class="soft">50.0 % right' in page
    for i, mark in enumerate(("wrong", "right")):
        assert (
            f'<article class="{mark}" title="{mark}">\n<figure class="given"><p>given {i}</p></figure>\n<figure class="new"><p>new {i}</p>'
            in page
        )


def test_a_decoded_image_reaches_the_oracle_as_bytes():
    from unitok.scenes.oracle import to_bytes

    pixels = to_bytes(torch.tensor([[[-1.0]], [[0.0]], [[2.0]]]))
    assert pixels.shape == (1, 1, 3)
    assert pixels.tolist() == [[[0.0, 127.5, 255.0]]]
