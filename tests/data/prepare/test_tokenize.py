"""Promises of tokenize: nothing lost, the same bytes for any number of workers, bad files listed, stopped runs go on."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from unitok.bundle import Bundle
from unitok.data.prepare.plan import Plan, make_plan, open_sources
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.sources import Source
from unitok.data.prepare.tokenize import detokenize, tokenize
from unitok.data.prepare.worker import Worker
from unitok.data.shards import TokenDataset
from unitok.errors import UserError
from unitok.interleaved import read_raw_documents
from unitok.modalities import build_vocab


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix != ".log"}


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory) -> Path:
    """What a person's folder looks like: pairs, singles, odd sizes, and a few things that cannot be used."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 30), (33, 90), (5, 7)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"photo{i}.png")
    (folder / "photo0.txt").write_text("a noisy photograph\n")
    (folder / "sub").mkdir()
    for name, rate, form in (("a.wav", 44_100, "WAV"), ("b.flac", 22_050, "FLAC"), ("c.mp3", 44_100, "MP3")):
        soundfile.write(folder / "sub" / name, rng.uniform(-0.3, 0.3, rate // 4), rate, format=form)
    (folder / "sub" / "a.txt").write_text("a noisy sound")
    (folder / "story.md").write_text("only text, but UTF-8 ✓")
    # and what cannot be used
    (folder / "cut.png").write_bytes((folder / "photo1.png").read_bytes()[:900])
    (folder / "binary.dat").write_bytes(bytes(range(256)) * 4)
    soundfile.write(folder / "silent.wav", np.zeros(4000), 8000)
    soundfile.write(folder / "nothing.wav", np.zeros(0), 8000)
    Image.new("RGB", (9, 9)).save(folder / "uncaptioned.png")
    (folder / "uncaptioned.txt").write_text("  \n")
    return folder


def test_a_mixed_folder_goes_to_shards_and_back_with_the_bad_files_listed(mixed_folder, bundle_folder, tmp_path):
    info = tokenize(Plan(str(mixed_folder), str(tmp_path / "out"), str(bundle_folder)))
    assert info["documents"] == 7
    assert set(files_of(tmp_path / "out")) == {"dataset.json", "errors.jsonl", "plan.json", "shard-00000.arrow"}
    errors = [json.loads(line)["error"] for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    for name in ("cut.png", "binary.dat", "silent.wav", "nothing.wav", "uncaptioned.txt"):
        assert sum(name in e for e in errors) == 1, name
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.verify() == []
    by_id = {dataset.document(i).id: dataset.document(i) for i in range(len(dataset))}
    pair = by_id["photo0.png"].segments
    assert [(s.modality, s.source) for s in pair] == [("text", ""), ("image", "photo0.png")]
    assert [s.modality for s in by_id["sub/a.wav"].segments] == ["text", "audio"]
    assert detokenize(tmp_path / "out", tmp_path / "files", bundle_folder) == 7
    back = {raw.id: raw for raw in read_raw_documents(tmp_path / "files" / "documents.jsonl")}
    assert back["photo0.png"].content[0].value == "a noisy photograph"
    assert Image.open(back["photo2.png"].content[0].path).size == (7, 5)
    assert soundfile.info(back["sub/b.flac"].content[0].path).frames == 2000  # a quarter second at 8 kHz
    assert back["story.md"].content[0].value == "only text, but UTF-8 ✓"


def test_bytes_do_not_depend_on_workers(scenes_folder, bundle_folder, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        tokenize(Plan(str(scenes_folder), str(tmp_path / name), str(bundle_folder), documents_per_shard=30), workers)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(files_of(tmp_path / "one")) > 3


def test_a_stopped_run_goes_on_without_listing_and_ends_with_the_same_bytes(
    scenes_folder, bundle_folder, tmp_path, monkeypatch
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tokenize(Plan(str(scenes_folder), str(whole), str(bundle_folder), documents_per_shard=30))
    plan = Plan(str(scenes_folder), str(stopped), str(bundle_folder), documents_per_shard=30)
    stopped.mkdir()
    make_plan(plan, open_sources(plan), Bundle.from_pretrained(bundle_folder))
    entry = Worker(plan).process(1)  # as a run that was killed after this shard would have left it
    before = (stopped / entry["file"]).stat().st_mtime_ns
    (stopped / ".work" / "shard-00000.arrow.7.partial").write_bytes(b"torn")
    monkeypatch.setattr(Source, "items", lambda *_: pytest.fail("a run that goes on has its listing"))
    tokenize(plan)
    assert (stopped / entry["file"]).stat().st_mtime_ns == before  # kept, not made again
    assert files_of(stopped) == files_of(whole)


def test_a_type_without_a_tokenizer_in_any_source_is_told_before_any_work(scenes_folder, bundle_folder, tmp_path, monkeypatch):
    whole = Bundle.from_pretrained(bundle_folder)
    parts = {name: whole.require(name) for name in ("text", "image")}
    Bundle(build_vocab(parts), parts).save_pretrained(tmp_path / "bundle")
    sources = [{"name": name, "path": str(scenes_folder / name)} for name in ("images", "audio")]
    (tmp_path / "mix.yaml").write_text(json.dumps({"sources": sources}))
    tried, read = [], Source.read
    monkeypatch.setattr(Source, "read", lambda self, items: tried.extend(items) or read(self, items))
    with pytest.raises(UserError, match="the bundle has no audio; add one with"):
        tokenize(Plan("", str(tmp_path / "out"), str(tmp_path / "bundle"), recipe=str(tmp_path / "mix.yaml")))
    assert len(tried) == 8 + 8  # the first of each source
    assert not (tmp_path / "out").exists()


def test_a_finished_output_says_so_and_another_source_is_refused(scenes_folder, mixed_folder, bundle_folder, tmp_path, capsys):
    out = tmp_path / "out"
    tokenize(Plan(str(scenes_folder), str(out), str(bundle_folder)))
    tokenize(Plan(str(scenes_folder), str(out), str(bundle_folder)), progress=True)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with other files in its source"):
        tokenize(Plan(str(mixed_folder), str(out), str(bundle_folder)))
    with pytest.raises(UserError, match=r"out: it is tokenized already"):
        tokenize(Plan(str(out), str(tmp_path / "twice"), str(bundle_folder)))


def test_another_plan_for_a_folder_is_told_by_what_differs(scenes_folder, bundle_folder, tmp_path):
    out = str(tmp_path / "out")
    tokenize(Plan(str(scenes_folder), out, str(bundle_folder), validation=0.25, spec=SourceSpec("", order=("image", "text"))))
    for plan, why in (
        (
            Plan(str(scenes_folder), out, str(bundle_folder), seed=3),
            "made with validation 0.25, not 0.0; seed 0, not 3; order ['image', 'text'], not []",
        ),
        (
            Plan(str(scenes_folder), out, str(bundle_folder), validation=0.25, documents_per_shard=7),
            "documents per shard 64, not 7; order",
        ),
    ):
        with pytest.raises(UserError) as caught:
            tokenize(plan)
        assert why in str(caught.value)


def test_roles_and_loss_of_the_file_reach_the_shard(bundle_folder, tmp_path):
    lines = [
        {"id": "x", "content": [
            {"type": "text", "text": "why?", "role": "user", "loss": False},
            {"type": "text", "text": "so", "role": "assistant"},
        ]},
    ]  # fmt: skip
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    tokenize(Plan(str(tmp_path / "documents.jsonl"), str(tmp_path / "out"), str(bundle_folder)))
    document = TokenDataset(tmp_path / "out").document(0)
    assert [(s.role, s.loss) for s in document.segments] == [("user", False), ("assistant", True)]


def test_bad_lines_are_skipped_and_too_many_stop_the_run_which_can_go_on(bundle_folder, tmp_path):
    source = tmp_path / "documents.jsonl"
    rows = ['{"content": [{"type": "text", "text": "good"}]}', "{not json", '{"content": []}',
            '{"content": [{"type": "text", "text": ""}]}', '{"content": [{"type": "image", "path": "gone.png"}]}',
            '{"content": [{"type": "smell", "path": "x"}]}']  # fmt: skip
    source.write_text("\n".join(rows))
    plan = Plan(str(source), str(tmp_path / "out"), str(bundle_folder))
    assert tokenize(plan)["documents"] == 1
    errors = (tmp_path / "out" / "errors.jsonl").read_text()
    for telling in (
        "line 2: not JSON",
        "line 3",
        "line 4, part 1: an empty or missing 'text'",
        "gone.png: no such file",
        "'smell'",
    ):
        assert telling in errors
    strict = Plan(str(source), str(tmp_path / "strict"), str(bundle_folder))
    with pytest.raises(UserError, match="5 of 6 documents could not be used"):
        tokenize(strict, max_error_rate=0.5)
    assert len((tmp_path / "strict" / "errors.jsonl").read_text().splitlines()) == 5
    assert not (tmp_path / "strict" / "dataset.json").exists()
    assert tokenize(strict, max_error_rate=0.9)["documents"] == 1  # it goes on where it stopped
    assert files_of(tmp_path / "strict") == files_of(tmp_path / "out")
