"""What a file, a field or a row is follows from its content and its role: nothing is read wrongly without a word."""

import base64
import json
import tarfile
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image
from raw_data import documents_of, errors_of, png, tar_of, wav

from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.tokenize import estimate, tokenize
from unitok.data.shards import TokenDataset
from unitok.errors import UserError

FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def read(tmp_path, bundle_folder, tiny, capsys):
    """Tokenizes `in`, or what is named; returns documents by id, errors, and what was printed."""

    def run(source="in", **options):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        capsys.readouterr()
        tokenize(Plan(str(tmp_path / source), str(out), str(bundle_folder), **options), progress=True)
        printed = capsys.readouterr().out
        errors = errors_of(out) if (out / "errors.jsonl").exists() else []
        return documents_of(out, tiny), errors, printed

    (tmp_path / "in").mkdir()
    return run


def test_captions_are_captions_whatever_their_first_letters_are(read, tmp_path):
    captions = [
        "BMW",
        "P5 and P6",
        "FORM 1040",
        "ID3 on a wall",
        "RIFF RAFF",
        "GIF89a, says it",
        "OggS",
        "fLaC",
        "II* x",
        "\ufeffcaff",
    ]
    members = []
    for i, caption in enumerate(captions):
        (tmp_path / "in" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "in" / f"{i}.txt").write_text(caption, encoding="utf-8")
        members += [(f"{i}.png", png(i)), (f"{i}.TXT", caption.encode())]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    want = [[caption.removeprefix("\ufeff"), "image"] for caption in captions]
    for source in ("in", "a.tar"):
        documents, errors, _ = read(source)
        assert (list(documents.values()), errors) == (want, [])


def test_files_that_lines_or_rows_name_are_no_documents_of_their_own(read, tmp_path):
    for folder in ("train", "test", "by-csv/clips"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "in" / split / "0.png").write_bytes(png())
        line = {"file_name": "./0.png", "text": f"{split} 0"}
        (tmp_path / "in" / split / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "in" / "by-csv" / "clips" / "a.wav").write_bytes(wav())
    (tmp_path / "in" / "by-csv" / "clips" / "alone.wav").write_bytes(wav(1))
    (tmp_path / "in" / "by-csv" / "metadata.csv").write_text('\ufefffile_name;transcription\nclips/a.wav;"one; two"\n')
    (tmp_path / "in" / "by-csv" / "statistics.csv").write_text("class,count\ncat,3\n")
    for name in ("README.md", "LICENSE", "dataset_infos.json"):
        (tmp_path / "in" / name).write_text("about")
    documents, errors, printed = read()
    assert sorted(map(sorted, documents.values())) == [
        ["audio"], ["audio", "one; two"], ["image", "test 0"], ["image", "train 0"]]  # fmt: skip
    assert not errors
    assert "1 tables without a column that is read" in printed
    assert "3 files that describe a data set" in printed
    assert "3 train, 1 test" in printed
    out = max(tmp_path.glob("out-*"))
    assert len(TokenDataset(out, "test")) == 1  # training takes the split `train`


def test_a_word_of_a_split_in_a_name_is_none_where_there_is_no_other_split(read, tmp_path):
    (tmp_path / "in" / "test").mkdir()
    (tmp_path / "in" / "test" / "train.png").write_bytes(png())
    (tmp_path / "in" / "train.png").write_bytes(png(1))
    documents, _, printed = read()
    assert len(documents) == 2
    assert "splits" not in printed


def test_media_of_tables_are_read_in_every_form_or_the_row_is_refused_by_the_field(read, tmp_path):
    (tmp_path / "in" / "img").mkdir()
    (tmp_path / "in" / "img" / "0.png").write_bytes(png())
    coded = base64.b64encode(png()).decode()
    good = {
        "path": {"image": ["img/0.png"]},
        "large": {"image_path": pa.array(["img/0.png"], pa.large_string())},
        "base64": {"image": [coded]},
        "url": {"img": [f"data:image/png;base64,{coded}"]},
        "bytes": {"photo": pa.array([png()], pa.large_binary())},
        "struct": {"image": pa.array([{"bytes": png(), "path": None}], FILE)},
        "path-in-struct": {"image": pa.array([{"bytes": None, "path": "img/0.png"}], FILE)},
        "nested": {"sample": pa.array([{"image": {"bytes": png(), "path": None}}], pa.struct([("image", FILE)]))},
        "both": {"image": pa.array([{"bytes": png(), "path": None}], FILE), "path": ["of/another/machine.png"]},
    }
    bad = {
        "numbers": ({"image": [[1, 2, 3]]}, "image: a list of numbers"),
        "arrays": ({"audio": [{"array": [0.1], "sampling_rate": 8000}]}, "audio.array: a list of numbers"),
        "missing": ({"image": ["img/1.png"]}, "img/1.png: no such file"),
        "web": ({"image": ["https://example.org/1.png"]}, "is a URL, which is not followed"),
        "broken": ({"image": ["data:image/png;base64,!"]}, "a data URL that is not base64"),
    }
    for name, columns in good.items():
        pq.write_table(
            pa.table(columns | {"caption": pa.array(["seen"]).dictionary_encode()}), tmp_path / "in" / f"{name}.parquet"
        )
        documents, errors, _ = read(f"in/{name}.parquet")
        assert (list(documents.values()), errors) == ([["seen", "image"]], []), name
    for name, (columns, why) in bad.items():
        pq.write_table(pa.table(columns | {"caption": ["seen"]}), tmp_path / "in" / f"{name}.parquet")
        with pytest.raises(UserError, match=why):
            read(f"in/{name}.parquet")


def test_a_row_that_holds_an_image_may_name_a_recording(read, tmp_path):
    (tmp_path / "in" / "a.wav").write_bytes(wav())
    columns = {"image": pa.array([{"bytes": png(), "path": None}], FILE), "caption": ["seen"]}
    pq.write_table(pa.table(columns | {"audio": ["a.wav"]}), tmp_path / "in" / "x.parquet")
    assert list(read()[0].values()) == [["seen", "image", "audio"]]
    pq.write_table(pa.table(columns | {"audio": ["gone.wav"]}), tmp_path / "in" / "x.parquet")
    with pytest.raises(UserError, match=r"gone.wav: no such file"):
        read("in/x.parquet")


def test_quotes_between_tabs_are_parts_of_texts_unless_they_enclose_tabs_or_lines(read, tmp_path):
    said = ["plain", 'he said, "you are."', '"He never came back.', 'They called it home".', '"', '"all of it"', '"say ""hi"""']
    lines = ["id\ttext\tup", *(f"{i}\t{text}\t2" for i, text in enumerate(said))]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    assert [texts for (texts,) in read("a.tsv")[0].values()] == [*said[:5], "all of it", 'say "hi"']
    (tmp_path / "b.tsv").write_text('id\ttext\n1\t"two\nlines"\n2\t"a\ttab"\n')
    assert list(read("b.tsv")[0].values()) == [["two\nlines"], ["a\ttab"]]


def test_cells_of_a_csv_file_may_be_long(read, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "png")
    coded = base64.b64encode(file.getvalue()).decode()
    assert len(coded) > 3e6
    (tmp_path / "a.csv").write_text(f'image,caption\n"data:image/png;base64,{coded}",one\n')
    assert list(read("a.csv")[0].values()) == [["one", "image"]]


def test_what_rows_hold_and_is_not_used_is_counted_by_name(read, tmp_path):
    rows = {"image": pa.array([{"bytes": png(), "path": None}, None], FILE), "caption": ["a", "b"], "id": [7, 7]}
    pq.write_table(pa.table(rows), tmp_path / "in" / "a.parquet")
    npy = BytesIO()
    np.save(npy, np.zeros(3))
    members = [
        ("0.jpg", png()),
        ("0.npy", npy.getvalue()),
        ("1.png", png(1)),
        ("1.cls", b"7"),
        ("1.json", b'{"caption": null}'),
    ]
    (tmp_path / "in" / "b.tar").write_bytes(tar_of([*members, ("2.0 x.png", png(2)), ("2.1 y.png", png(3))]))
    (tmp_path / "in" / "c.jsonl").write_text(json.dumps({"image": "c.png", "question": "what?", "answer": "that"}))
    (tmp_path / "in" / "c.png").write_bytes(png(4))
    documents, errors, printed = read()
    assert documents == {
        "7": ["a", "image"], "7~2": ["b"], "0": ["image"], "1": ["image"], "2": ["image", "image"], "c-1": ["image"]}  # fmt: skip
    assert not errors
    for said in ("'image' is empty (1)", "'npy' is not used (1)", "'cls' is not used (1)", "'json' is not used (1)"):
        assert said in printed
    for name in ("question", "answer"):
        assert f"field '{name}' is not used" in printed or "others" in printed
    assert "1 documents have the id of another document" in printed
    assert "6 images (PNG 6); 2 texts" in printed


def test_a_json_list_of_records_is_lines_and_a_sidecar_is_not(read, tmp_path):
    for i in range(2):
        (tmp_path / "in" / f"{i}.png").write_bytes(png(i))
    records = [{"image": "0.png", "caption": 'says "[{é"'}, {"image": "1.png", "caption": "two"}]
    (tmp_path / "in" / "all.json").write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    assert list(read()[0].values()) == [['says "[{é"', "image"], ["two", "image"]]
    (tmp_path / "in" / "all.json").write_text('[{"image": "0.png", "caption": "cut"}, {"image": "1.p')
    documents, errors, _ = read()
    assert documents["all-1"] == ["cut", "image"]
    assert "not JSON: the rest cannot be read" in errors[0]
    (tmp_path / "in" / "all.json").unlink()
    (tmp_path / "in" / "0.json").write_text('[{"caption": "a list beside an image"}]')
    assert read()[0] == {"0.png": ["image"], "1.png": ["image"]}


def test_members_of_one_key_that_are_apart_are_refused_and_old_archives_read(read, tmp_path):
    pairs = [(f"{i}.png", png(i)) for i in range(3)] + [(f"{i}.txt", b"x") for i in range(2)]
    (tmp_path / "apart.tar").write_bytes(tar_of(pairs))
    documents, errors, _ = read("apart.tar")
    assert documents == {"2": ["image"]}
    assert len(errors) == 2
    assert "members are apart" in errors[0]
    header = tarfile.TarInfo("0.png")
    header.size = len(png())
    old = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
    old[257:265] = bytes(8)  # no magic: as before POSIX
    old[148:156] = b"%06o\0 " % (sum(old[:148]) + sum(old[156:512]) + 8 * 32)
    (tmp_path / "old.tar").write_bytes(bytes(old) + png() + bytes(-len(png()) % 512 + 1024))
    assert read("old.tar")[0] == {"0": ["image"]}


def test_templates_find_suffixes_in_any_case_and_leave_the_rest_alone(read, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of([("0.JPG", png()), ("0.Txt", b"x"), ("0.npy", b"\x93NUMPY")]))
    template = ({"type": "image", "path": "{jpg}"}, {"type": "text", "text": "{TXT}"})
    documents, _, printed = read("a.tar", spec=SourceSpec("", template=template))
    assert documents == {"0": ["image", "x"]}
    assert "'npy' is not used (1)" in printed


def test_silent_segments_and_short_tails_are_left_out_and_counted(read, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(110):
        samples = np.concatenate([np.zeros(800), rng.uniform(-0.3, 0.3, 804)])
        soundfile.write(tmp_path / "in" / f"{i}.wav", samples, 8000)
    documents, errors, printed = read(spec=SourceSpec("", options={"audio": {"segment": 0.1}}))
    assert len(documents) == 110
    assert all(id.endswith("#t=0.1,0.2") for id in documents)
    assert not errors
    assert "110 silent_segments" in printed
    assert "the rest of the audio is shorter than a frame (110)" in printed


def test_one_bad_segment_costs_that_segment(read, tmp_path):
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 2400).astype(np.float32)
    samples[1000] = np.nan
    soundfile.write(tmp_path / "in" / "a.wav", samples, 8000, subtype="FLOAT")
    documents, errors, printed = read(spec=SourceSpec("", options={"audio": {"segment": 0.1}}), documents_per_shard=8)
    assert list(documents) == ["a.wav#t=0,0.1", "a.wav#t=0.2,0.3"]
    assert len(errors) == 1
    assert "bad         0 of 1" in printed


@pytest.mark.parametrize("segment", [0.0, 40.0])
def test_audio_of_more_than_a_minute_is_read_from_every_source(bundle_folder, tmp_path, segment):
    import fsspec

    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 8000 * 61)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "0.wav", samples, 8000)
    data = (tmp_path / "in" / "0.wav").read_bytes()
    (tmp_path / "a.tar").write_bytes(tar_of([("0.wav", data)]))
    pq.write_table(pa.table({"audio": pa.array([{"bytes": data, "path": None}], FILE)}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({"audio": "in/0.wav"}))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "in"), "/long", recursive=True)
    lengths = []
    for source in ("in", "a.tar", "a.parquet", "a.jsonl", "memory://long"):
        out = tmp_path / f"o{len(lengths)}"
        path = source if "://" in source else str(tmp_path / source)
        tokenize(Plan(path, str(out), str(bundle_folder), spec=SourceSpec("", options={"audio": {"segment": segment}})))
        data_set = TokenDataset(out)
        lengths.append([data_set.ids(i).tolist() for i in range(len(data_set))])
    memory.rm("/long", recursive=True)
    assert len(lengths[0]) == (2 if segment else 1)
    assert all(found == lengths[0] for found in lengths)


def test_names_with_stars_and_colons_are_folders_where_there_are_such(read, tmp_path):
    for name in ("in/a*b", "in/x::y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png())
        assert read(name)[0] == {"0.png": ["image"]}


def test_a_dry_run_shows_decoded_documents(read, tmp_path, bundle_folder):
    (tmp_path / "in" / "0.png").write_bytes(png(0, (40, 32)))
    (tmp_path / "in" / "0.txt").write_text("a caption\x1b[31m")
    found = estimate(Plan(str(tmp_path / "in"), str(tmp_path / "out"), str(bundle_folder)))
    assert found.examples == ["'0.png': 'a caption\\x1b[31m', image 29 x 36"]
    assert not (tmp_path / "out").exists()


def test_images_in_fields_of_one_name_are_told_apart_by_their_content(read, tmp_path, bundle_folder):
    """Also where base64 holds `//`, which is no part of a path."""
    images = [png(i) for i in range(4)]
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in images]
    assert any("//" in url[5:] for url in urls)
    lines = [{"image": url, "text": str(i)} for i, url in enumerate(urls)]
    (tmp_path / "in" / "fields.jsonl").write_text("\n".join(map(json.dumps, lines)))
    parts = [{"type": "image", "path": url} for url in urls]
    (tmp_path / "in" / "content.jsonl").write_text(json.dumps({"content": parts}))
    for i, data in enumerate(images):
        (tmp_path / "in" / f"{i}.png").write_bytes(data)
    out = tmp_path / "tokens"
    tokenize(Plan(str(tmp_path / "in"), str(out), str(bundle_folder)))
    data = TokenDataset(out)
    documents = [[s.codes.tolist() for s in data.document(i).segments if s.modality == "image"] for i in range(len(data))]
    content, fields, files = documents[0], documents[1:5], documents[5:]
    assert [[codes] for codes in content] == fields == files
    assert len({str(codes) for codes in content}) == 4


def test_names_of_files_that_are_no_media_leave_texts_alone(read, tmp_path):
    rows = {"text": ["def f(): pass", "x = 1"], "path": ["src/a.py", "src/b.py"]}
    pq.write_table(pa.table(rows), tmp_path / "in" / "code.parquet")
    (tmp_path / "in" / "notes.jsonl").write_text(json.dumps({"text": "a note", "filename": "notice.txt"}))
    (tmp_path / "in" / "notice.png").write_bytes(png())
    (tmp_path / "in" / "notice.txt").write_text("a notice on a wall")
    documents, errors, _ = read()
    assert list(documents.values()) == [["def f(): pass"], ["x = 1"], ["a note"], ["image"]]  # notice.txt describes a data set
    assert not errors


def test_samples_of_an_archive_with_gaps_are_read_whole_by_several_threads(read, tmp_path):
    """Refused ones between them part the list in pieces, which are read at the same time."""
    members = []
    for i in range(40):
        members += [(f"{i:02}.png", png(i)), (f"{i:02}.txt", b"%d" % i)]
        members += [("apart.txt", b"x")] * (i % 2)
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    documents, errors, _ = read("a.tar")
    assert documents == {f"{i:02}": [str(i), "image"] for i in range(40)}
    assert len(errors) == 1


def test_many_documents_of_one_id_are_named_in_one_go(read, tmp_path):
    from unitok.data.prepare.items import SourceItem
    from unitok.data.prepare.plan import _Listed

    listed = _Listed([], [])
    named = [listed.add(0, "train", SourceItem("a", "", "line")).id for _ in range(20_000)]
    assert named[:3] == ["a", "a~2", "a~3"]
    assert len(set(named)) == len(named)
    (tmp_path / "in" / "x.jsonl").write_text('{"id": null, "text": "1"}\n{"id": null, "text": "2"}')
    assert list(read()[0]) == ["x-1", "x-2"]


def test_splits_are_told_by_words_in_names_of_folders_by_fields_and_by_what_rows_name(read, tmp_path):
    for folder in ("train2017", "test-clean", "imgs_val"):
        (tmp_path / "in" / folder).mkdir()
        (tmp_path / "in" / folder / "0.png").write_bytes(png())
    (tmp_path / "in" / "test-clean" / "named.png").write_bytes(png(1))
    lines = [{"file_name": str(tmp_path / "in" / "test-clean" / "named.png"), "text": "named"}, {"text": "x", "split": "val"}]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "in" / "test-clean" / "named.txt").write_text("beside")
    documents, errors, printed = read()
    assert sorted(documents.values()) == [["image"], ["image"], ["image"], ["named", "image"], ["x"]]
    assert "1 train, 2 test, 2 validation" in printed or "1 train, 2 validation, 2 test" in printed
    assert "1 files of the same base name as one that a line or row names" in printed
    assert not errors


def test_splits_in_fields_are_told_by_words_too_and_in_every_type_of_text(read, tmp_path):
    names = ["train", "test-clean", "val2017", " Test", "dev_set", "training", "other"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x", "split": name}) for name in names))
    assert "3 train, 2 test, 2 validation" in read("a.jsonl")[2]
    table = pa.table({name: pa.array(["train", "test"], pa.string_view()) for name in ("text", "split")})
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as file:
        file.write_table(table)
    assert "1 train, 1 test" in read("b.arrow")[2]


def test_files_that_share_a_base_name_keep_their_captions(read, tmp_path):
    for name in ("1.jpg", "1.png", "2.png", "3.png"):
        (tmp_path / "in" / name).write_bytes(png())
    for name in ("1.jpg.txt", "1.png.txt", "2.png.txt", "2.txt"):
        (tmp_path / "in" / name).write_text(f"of {name}")
    documents, errors, _ = read()
    assert sorted(documents.values()) == [
        ["image"],
        ["of 1.jpg.txt", "image"],
        ["of 1.png.txt", "image"],
        ["of 2.png.txt\nof 2.txt", "image"],
    ]
    assert not errors


def test_a_fraction_for_validation_that_takes_nothing_is_said(read, tmp_path, caplog):
    for folder in ("train", "test"):
        (tmp_path / "in" / folder).mkdir()
        for i in range(8):
            (tmp_path / "in" / folder / f"{i}.png").write_bytes(png(i))
    read(validation=0.5)
    assert "no documents for validation: 0.5 is of those without a split of their own" in caplog.text


def test_json_lines_in_a_file_called_json_are_lines(read, tmp_path):
    (tmp_path / "in" / "a.png").write_bytes(png())
    (tmp_path / "in" / "train.json").write_text('{"file_name": "a.png", "caption": "A"}\n{"text": "two"}\n')
    (tmp_path / "in" / "one.json").write_text('{\n "caption": "alone"\n}')
    assert list(read()[0].values()) == [["A", "image"], ["two"], ["alone"]]


def test_several_captions_of_a_row_are_told_apart(read, tmp_path):
    rows = {"caption": [["one", " two"]], "text": ["three"], "prompt": [""], "image": [png()]}
    pq.write_table(pa.table(rows), tmp_path / "in" / "a.parquet")
    documents, errors, printed = read()
    assert list(documents.values()) == [["one\ntwo\nthree", "image"]]
    assert not errors
    assert "'prompt' is empty (1)" in printed


def test_images_of_a_bad_row_are_not_taken_without_their_caption(read, tmp_path):
    for name in "ab":
        (tmp_path / "in" / f"{name}.png").write_bytes(png())
    (tmp_path / "in" / "captions.csv").write_text("image,caption\na.png,one, two\nb.png,three\n")
    documents, errors, _ = read()
    assert list(documents.values()) == [["three", "image"]]
    assert len(errors) == 1
    (tmp_path / "in" / "captions.csv").write_bytes("image,caption\na.png,\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="captions.csv: not a readable table .*mend it"):
        read()


def test_a_saved_dictionary_of_data_sets_keeps_its_splits(read, tmp_path):
    from datasets import Dataset, DatasetDict

    splits = {name: Dataset.from_dict({"text": [f"{name} {i}" for i in range(2)]}) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(str(tmp_path / "in" / "saved"))
    documents, errors, printed = read("in/saved")
    assert sorted(text for [text] in documents.values()) == ["test 0", "test 1", "train 0", "train 1"]
    assert "2 train, 2 test" in printed
    assert not errors
