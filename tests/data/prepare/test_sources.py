"""What `tokenize` reads: every format, templates, recipes, augmentation."""

import gzip
import json

import pyarrow.parquet as pq
import pytest
from raw_data import errors_of, found_in, png, table_of, tar_of, tokens_of, wav, write_in_every_format

from unitok.cli import main
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec, load_recipe
from unitok.data.prepare.texts import read_texts
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.errors import UserError


def test_captions_that_a_pattern_or_wrong_names_leave_out_are_said(bundle_folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(png())
        (tmp_path / "in" / f"{number}.txt").write_text("a caption")
    main(["tokenize", str(tmp_path / "in" / "*.png"), str(tmp_path / "pattern"), "--bundle", str(bundle_folder)])
    assert "3 texts of the same base names as files of the pattern, which does not match them" in capsys.readouterr().out
    for text in (tmp_path / "in").glob("*.txt"):
        text.unlink()
    table = tmp_path / "in" / "captions.csv"
    for folder, said in (("/data/elsewhere/", True), ("", False)):
        table.write_text("image,caption\n" + "".join(f"{folder}{number}.png,a caption\n" for number in range(3)))
        main(["tokenize", str(tmp_path / "in"), str(tmp_path / f"table-{said}"), "--bundle", str(bundle_folder)])
        told = "3 names of files in lines or rows, none of them in the source" in capsys.readouterr().out
        assert told == said


def test_every_format_gives_the_same_documents(scenes_folder, bundle_folder, tmp_path):
    sources = write_in_every_format(scenes_folder, tmp_path / "in")
    found = {name: tokens_of(path, tmp_path / name, bundle_folder) for name, path in sources.items()}
    assert set(found) == {"folder", "lines", "archives", "tables", "dataset"}
    expected = list(found["lines"].values())
    assert len(expected) == 24
    for name, documents in found.items():
        assert list(documents.values()) == expected, name
    data = TokenDataset(tmp_path / "archives")
    where = [data.document(i) for i in (0, len(data) - 1)]
    assert [d.source for d in where] == ["a-000.tar, 000000", "a-001.tar.gz, 000023"]
    assert [s.source for s in where[0].segments] == ["", "a-000.tar/000000.png", "a-000.tar/000000.wav"]
    assert TokenDataset(tmp_path / "tables").document(3).segments[1].source == "part-0.parquet/3/image"


def test_compressed_archives_are_read_forward_also_by_several_threads(bundle_folder, tmp_path, monkeypatch):
    """As many decompressions from the beginning as there are passes over the file: the listing, and the making of all shards."""
    members = [(f"{i:04d}.{kind}", data) for i in range(60) for kind, data in (("png", png()), ("txt", b"%d" % i))]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar.gz").write_bytes(tar_of(members, "w:gz"))
    begun, rewind = [], gzip._GzipReader._rewind
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: (begun.append(1), rewind(self))[1])
    plan = Plan(str(tmp_path / "in"), str(tmp_path / "out"), str(bundle_folder), documents_per_shard=20)
    tokenize(plan)
    assert len(TokenDataset(tmp_path / "out")) == 60
    assert len(begun) <= 1


def test_remote_sources_and_patterns_give_the_same_documents(scenes_folder, bundle_folder, tmp_path):
    import fsspec

    sources = write_in_every_format(scenes_folder, tmp_path / "in")
    memory = fsspec.filesystem("memory")
    try:
        for name, path in sources.items():
            memory.put(str(path), f"/sources/{name}", recursive=True)
        expected = tokens_of(sources["lines"], tmp_path / "local", bundle_folder)
        for name in sources:
            found = tokens_of(f"memory://sources/{name}", tmp_path / f"{name}-remote", bundle_folder)
            assert list(found.values()) == list(expected.values()), name
        memory.pipe("/sources/hidden/.git/HEAD.txt", b"ref")
        memory.pipe("/sources/hidden/a.txt", b"seen")
        assert [*tokens_of("memory://sources/hidden", tmp_path / "hidden", bundle_folder)] == ["a.txt"]
    finally:
        memory.rm("/sources", recursive=True)
    pattern = tokens_of(f"{sources['archives']}/*.tar", tmp_path / "pattern", bundle_folder)
    assert list(pattern.values()) == list(expected.values())[: len(pattern)]
    assert 0 < len(pattern) < len(expected)


def test_a_template_says_what_becomes_a_document(bundle_folder, tiny, tmp_path):
    rows = [
        {"caption": "a b", "image": {"bytes": png(1), "path": "x.png"}, "audio": None, "kind": 1},
        {"caption": None, "image": {"bytes": png(2), "path": None}, "audio": None, "kind": 0},
        {"caption": "c", "image": None, "audio": {"bytes": wav(), "path": None}, "kind": 0},
    ]
    pq.write_table(table_of(rows), tmp_path / "t.parquet")
    template = (
        {"type": "text", "text": "What is it?", "role": "user", "loss": False},
        {"type": "image", "path": "{image}", "role": "user", "optional": True},
        {"type": "text", "text": "a {kind}: {caption}", "role": "assistant"},
    )
    spec = SourceSpec("", template=template, loss={"image": False})
    tokenize(Plan(str(tmp_path / "t.parquet"), str(tmp_path / "out"), str(bundle_folder), spec=spec))
    data = TokenDataset(tmp_path / "out")
    told = [
        [(s.modality, s.role, s.loss, tiny.decode(s) if s.modality == "text" else "") for s in data.document(i).segments]
        for i in range(len(data))
    ]
    question = ("text", "user", False, "What is it?")
    assert told == [
        [question, ("image", "user", False, ""), ("text", "assistant", True, "a dog: a b")],
        [question, ("text", "assistant", True, "a cat: c")],
    ]
    assert errors_of(tmp_path / "out") == [
        "t.parquet, row 1: nothing in a {kind}: {caption}; set `optional: true` for a part that may be missing"
    ]


def test_fields_of_records_lines_and_lists_reach_templates(bundle_folder, tiny, tmp_path):
    (tmp_path / "p.png").write_bytes(png())
    line = {"photos": ["p.png", "p.png"], "meta": {"lines": ["one", "two"]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line))
    spec = SourceSpec("", template=({"type": "image", "path": "{photos}"}, {"type": "text", "text": "{meta.lines}"}))
    tokenize(Plan(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), str(bundle_folder), spec=spec))
    document = TokenDataset(tmp_path / "out").document(0)
    assert [s.modality for s in document.segments] == ["image", "image", "text"]
    assert tiny.decode(document.segments[2]) == "onetwo"


def test_several_of_one_kind_and_metadata_of_archives(bundle_folder, tmp_path):
    members = [
        ("x/1.b.png", png(1)), ("x/1.a.png", png(2)), ("x/1.txt", b"two pictures"), ("x/1.json", b'{"caption": "not this"}'),
        ("x/2.jpg", wav()), ("x/2.cls", b"3"), ("x/3.npy", b"\x93NUMPY\x00"), ("x/3.txt", b"three"),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    tokenize(Plan(str(tmp_path / "a.tar"), str(tmp_path / "out"), str(bundle_folder)))
    data = TokenDataset(tmp_path / "out")
    documents = {d.id: [(s.modality, s.source) for s in d.segments] for d in map(data.document, range(len(data)))}
    assert documents == {
        "x/1": [("text", ""), ("image", "a.tar/x/1.b.png"), ("image", "a.tar/x/1.a.png")],
        "x/2": [("audio", "a.tar/x/2.jpg")],  # content decides, not the suffix
    }
    assert errors_of(tmp_path / "out") == ["a.tar, x/3: a.tar/x/3.npy: neither an image nor audio nor UTF-8 text"]


def test_recipes_mix_weigh_filter_order_and_split(scenes_folder, bundle_folder, tmp_path):
    sources = write_in_every_format(scenes_folder, tmp_path / "in")
    (tmp_path / "small").mkdir()
    for i, size in enumerate([(8, 60), (30, 30), (70, 70)]):
        (tmp_path / "small" / f"{i}.png").write_bytes(png(i, size))
        (tmp_path / "small" / f"{i}.json").write_text(json.dumps({"text": f"number {i}"}))
    recipe = {
        "sources": [
            {"path": "in/lines", "weight": 2.5, "order": ["audio", "image"], "filters": {"max_characters": 60}},
            {"path": "small", "name": "tiles", "roles": {"text": "user"}, "filters": {"min_side": 9, "max_side": 64}},
        ]
    }
    (tmp_path / "mix.yaml").write_text(json.dumps(recipe))
    plan = Plan(
        "", str(tmp_path / "out"), str(bundle_folder), recipe=str(tmp_path / "mix.yaml"), validation=0.3, documents_per_shard=16
    )
    info = tokenize(plan)
    assert info is not None
    data = TokenDataset(tmp_path / "out")
    documents = [data.document(i) for i in range(len(data))]
    tiles = [d for d in documents if d.source.startswith("tiles/")]
    assert [(d.source, d.segments[0].role) for d in tiles] == [("tiles/1.png", "user")]
    filtered = [s.get("filtered", {}) for s in info["shards"]]
    assert sum(f.get("min_side", 0) for f in filtered) == sum(f.get("max_side", 0) for f in filtered) == 1
    long = sum(f.get("max_characters", 0) for f in filtered)
    copies = [d.id for d in documents if d.source.startswith("lines/")]
    short = {id.partition("#")[0] for id in copies}
    assert len(copies) + long > 48
    for id in short:
        assert {id, f"{id}#2"} <= set(copies)
    assert 0 < sum(id.endswith("#3") for id in copies) < len(short)
    assert all([s.modality for s in d.segments] == ["audio", "image", "text"] for d in documents if d not in tiles)
    train, validation = (TokenDataset(tmp_path / "out", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == len(data)
    halves = [{d.document(i).id.partition("#")[0] for i in range(len(d))} for d in (train, validation)]
    assert all(halves)
    assert not halves[0] & halves[1]  # copies stay on one side
    with pytest.raises(UserError, match="it has no split 'test'; its splits are train, validation"):
        TokenDataset(tmp_path / "out", "test")
    assert sources


def test_random_orders_depend_on_the_seed_alone(scenes_folder, bundle_folder, tmp_path):
    sources = write_in_every_format(scenes_folder, tmp_path / "in")
    spec = SourceSpec("", order=("random",))
    first, again, other = (
        tokens_of(sources["folder"], tmp_path / str(i), bundle_folder, spec=spec, seed=seed) for i, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first != other


def test_augmentation_makes_documents_of_their_own(bundle_folder, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(3, (64, 64)))
    (tmp_path / "in" / "b.wav").write_bytes(wav(seconds=0.75))
    (tmp_path / "in" / "b.txt").write_text("noise")
    spec = SourceSpec("", options={"image": {"crops": 2, "flip": True}, "audio": {"segment": 0.3}})
    tokenize(Plan(str(tmp_path / "in"), str(tmp_path / "out"), str(bundle_folder), spec=spec))
    data = TokenDataset(tmp_path / "out")
    documents = {d.id: d for d in map(data.document, range(len(data)))}
    assert list(documents) == ["a.png", "a.png#flip", "a.png#crop=1", "a.png#crop=2"] + [
        f"b.wav#t={start:g},{stop:g}" for start, stop in ((0, 0.3), (0.3, 0.6), (0.6, 0.75))
    ]
    views = [documents[id].segments[0].source for id in list(documents)[:4]]
    assert views[:2] == ["a.png", "a.png#flip"]
    assert all(view.startswith("a.png#xywh=") for view in views[2:])
    assert views[2] != views[3]
    pieces = [d.segments for id, d in documents.items() if id.startswith("b.wav")]
    assert [(s[0].modality, s[1].size[0], s[1].source) for s in pieces] == [
        ("text", 2400, "b.wav#t=0,0.3"), ("text", 2400, "b.wav#t=0.3,0.6"), ("text", 1200, "b.wav#t=0.6,0.75")]  # fmt: skip


# ---- Trust ----------------------------------------------------------------------------------------------------------


def test_archives_put_one_after_another_are_read_to_the_last_one(tmp_path):
    parts = [tar_of([(f"{n}{i}.txt", b"x") for i in range(5)]) for n in "ab"]
    (tmp_path / "both.tar").write_bytes(b"".join(parts))
    (tmp_path / "both.tar.gz").write_bytes(gzip.compress(parts[0]) + gzip.compress(parts[1]))
    good, bad = found_in(tmp_path)
    assert [raw.id for raw in good] == [f"{n}{i}" for n in "ab" for i in range(5)] * 2
    assert not bad


def test_a_name_that_an_archive_holds_twice_is_two_files(bundle_folder, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of([("y.png", png(2)), ("x.png", png(3)), ("x.png", png(4))]))
    found = tokens_of(tmp_path / "a.tar", tmp_path / "out", bundle_folder)
    assert list(found) == ["y", "x"]
    codes = [s.codes.tolist() for s in TokenDataset(tmp_path / "out").document(1).segments]
    assert codes[0] != codes[1]


def test_lines_without_content_are_rows_of_fields(bundle_folder, tiny, tmp_path):
    (tmp_path / "p.png").write_bytes(png())
    lines = ['{"text": "content"}', '{"caption": "seen", "image": "p.png", "score": 3}', '{"score": 3}', '{"id": "\\ud800"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    tokenize(Plan(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), str(bundle_folder)))
    data = TokenDataset(tmp_path / "out")
    assert [[s.modality for s in data.document(i).segments] for i in range(len(data))] == [["text"], ["text", "image"]]
    assert len(errors_of(tmp_path / "out")) == 2


def test_optional_parts_may_be_absent(bundle_folder, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of([("1.png", png()), ("1.wav", wav()), ("2.png", png(1)), ("3.wav", wav())]))
    template = ({"type": "image", "path": "{png}"}, {"type": "audio", "path": "{wav}", "optional": True})
    spec = SourceSpec("", template=template)
    tokenize(Plan(str(tmp_path / "a.tar"), str(tmp_path / "out"), str(bundle_folder), spec=spec))
    data = TokenDataset(tmp_path / "out")
    assert [[s.modality for s in data.document(i).segments] for i in range(len(data))] == [["image", "audio"], ["image"]]
    assert errors_of(tmp_path / "out") == ["a.tar, 3: no field 'png'; the fields are wav"]


def test_a_folder_between_two_of_one_base_name_does_not_part_them(tmp_path):
    (tmp_path / "cat.k").mkdir()
    for name in ("cat.jpg", "cat.k/other.png", "dog.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "cat.txt").write_text("a cat")
    good, bad = found_in(tmp_path)
    assert [(raw.id, len(raw.content)) for raw in good] == [("cat.jpg", 2), ("dog.png", 1), ("cat.k/other.png", 1)]
    assert not bad


def test_recipes_that_cannot_be_say_why(tmp_path):
    for content, why in (
        ("sources: []", "a recipe is `sources:`"),
        ("sources: [{weight: 1}]", "source 1: it needs a `path`"),
        ("sources: [{path: a, wieght: 1}]", "wieght: unknown"),
        ("sources: [{path: a, weight: 0}]", "weight 0; it must be above 0"),
        ("sources: [{path: a, weight: heavy}]", "weight 'heavy'; it is a number"),
        ("sources: [{path: a, filters: {min_size: 3}}]", "filters: min_size: unknown; it may have min_side"),
        ("sources: [{path: a, order: [7]}]", "order [1] 7; it is a text"),
        ("sources: [{path: a, template: [{type: image}]}]", "template, part 1: an empty or missing 'path'"),
        ("sources: [{path: a}, {path: b/a}]", "two sources are called 'a'"),
        ("seed: 1\nsources: [{path: a}]", "and nothing else"),
        ("sources: [{path: a, loss: false}]", "loss False; it is a value by name"),
        ("sources: [{path: a, roles: [user]}]", "roles ['user']; it is a value by name"),
        ("sources: [{path: a, weight: .nan}]", "weight nan; it is a number"),
        ("sources: [{path: a, image: {crops: 2.5}}]", "image crops is 2.5; it is an int"),
        ("sources: [{path: a, image: {crop: 2}}]", "image has no option 'crop'"),
        ("sources: [{path: a, template: [{type: text, text: x, loss: 0}]}]", "loss 0; it is true or false"),
        ("sources: [{path: a, template: [{type: text, text: '{x'}]}]", "a brace without its partner"),
        ("sources: [{path: a, template: [{type: text, text: x}]}]", "it has no {field}"),
        ("sources: [{path: a, order: [text, text]}]", "each once"),
        ("{", "not YAML"),
    ):
        (tmp_path / "r.yaml").write_text(content)
        with pytest.raises(UserError, match="r.yaml|source a") as caught:
            load_recipe(tmp_path / "r.yaml")
        assert why in str(caught.value), content


def test_a_source_gives_documents_and_errors(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.bin").write_bytes(bytes(9))
    good, bad = found_in(tmp_path)
    assert [raw.id for raw in good] == ["a.txt"]
    assert len(bad) == 1


def test_texts_come_from_folders_patterns_archives_tables_and_recipes_without_reading_media(tmp_path, caplog):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "book.txt").write_text("one\n\ntwo\n")
    (tmp_path / "in" / "0.png").write_bytes(b"no image")
    (tmp_path / "in" / "0.txt").write_text("a caption")
    (tmp_path / "in" / "sub" / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "in" / "sub" / "x.jsonl").write_text('{"text": "three\\nfour"}')
    (tmp_path / "x.tar").write_bytes(tar_of([("1.png", b"no image"), ("1.txt", b"in a tar")]))
    (tmp_path / "x.csv").write_text("text,other\nin a table,no")
    whole = ["three\nfour", "a caption", "one", "two"]
    assert list(read_texts(tmp_path / "in")) == whole
    assert "1 documents could not be read; the first: sub/bad.txt" in caplog.text
    assert list(read_texts(f"{tmp_path}/in/**/*.txt")) == whole[1:]
    assert list(read_texts(tmp_path / "x.tar")) == ["in a tar"]
    assert list(read_texts(tmp_path / "x.csv")) == ["in a table"]
    (tmp_path / "mix.yaml").write_text('{"sources": [{"path": "x.tar"}, {"path": "in"}]}')
    assert list(read_texts(tmp_path / "mix.yaml")) == ["in a tar", *whole]


def test_texts_come_from_json_in_each_form_and_compressed(tmp_path, caplog):
    content = {"content": [{"type": "text", "text": "two"}]}
    rows = [{"text": "one"}, content, {"image": "gone.png", "caption": "three"}, {"image": "gone.png"}]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "x.jsonl").write_text(lines)
    assert list(read_texts(tmp_path / "x.jsonl")) == ["one", "two", "three"]
    assert not caplog.text
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows[:2])).encode()))
    (tmp_path / "x.json").write_text(json.dumps(rows[:2]))
    for name in ("x.jsonl.gz", "x.json"):
        assert list(read_texts(tmp_path / name)) == ["one", "two"], name
    (tmp_path / "y.jsonl").write_text('{"text": "one"}\n{"text": " "}')
    assert list(read_texts(f"file://{tmp_path}/y.jsonl")) == ["one"]
    caplog.clear()
    assert list(read_texts(tmp_path / "y.jsonl")) == ["one"]
    assert "1 documents could not be read; the first: y.jsonl, line 2" in caplog.text
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "z.jsonl").write_text('{"count": 1}')
    for name in ("x.txt.gz", "z.jsonl"):
        with pytest.raises(UserError, match=f"{name}: none of its 1 documents can be read"):
            list(read_texts(tmp_path / name))
