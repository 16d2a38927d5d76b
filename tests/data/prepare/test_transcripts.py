"""Data sets of recordings with transcripts, each in its true format."""

import gzip
import json
import struct

import numpy as np
import pytest
import soundfile
from raw_data import found_in, png, wav

from unitok.data.media_list import list_media
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.sources import Source
from unitok.data.prepare.texts import read_texts
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.document import Part
from unitok.errors import UserError
from unitok.interleaved import format_raw_document, raw_document


def read(folder, **options) -> list[tuple]:
    """For each document its id and its parts: (type, value or file, view)."""
    return [
        (raw.id, *((p.type, p.value or str(p.path), *([p.view] if p.view else [])) for p in raw.content))
        for raw in found_in(SourceSpec(str(folder), **options))[0]
    ]


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_ljspeech(tmp_path):
    for name in ("LJ001-0001", "LJ001-0002"):
        write(tmp_path / "wavs" / f"{name}.wav", wav())
    write(
        tmp_path / "metadata.csv",
        'LJ001-0001|in 1831, the "Times"|in eighteen thirty-one, the "Times"\nLJ001-0002|in being modern.|\n',
    )
    write(tmp_path / "README", "The LJ Speech Dataset")
    expected = [
        ("LJ001-0001", ("text", 'in eighteen thirty-one, the "Times"'), ("audio", "wavs/LJ001-0001.wav")),
        ("LJ001-0002", ("text", "in being modern."), ("audio", "wavs/LJ001-0002.wav")),
    ]
    assert read(tmp_path) == expected
    assert read(tmp_path / "metadata.csv") == expected
    backwards = read(tmp_path, order=("both",))
    assert [id for id, *_ in backwards] == ["LJ001-0001", "LJ001-0001#backwards", "LJ001-0002", "LJ001-0002#backwards"]
    assert backwards[1][1:] == expected[0][:0:-1]
    template = ({"type": "audio", "path": "{audio}", "end": "0.2"}, {"type": "text", "text": "{printed}: {text}"})
    assert read(tmp_path / "metadata.csv", template=template)[0][1:] == (
        ("audio", "wavs/LJ001-0001.wav", "t=0,0.2"),
        ("text", 'in 1831, the "Times": in eighteen thirty-one, the "Times"'),
    )


def test_lists_with_and_without_speakers(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / "wavs" / f"{name}.wav", wav())
    write(tmp_path / "filelists" / "train.txt", "../wavs/a.wav|Hello | there.\r\n\r\n../wavs/b.wav|Good bye.\r\n")
    raws, errors = found_in(tmp_path / "filelists")
    assert not raws
    assert "leaves" in errors[0]
    assert [raw.content[0].value for raw in found_in(tmp_path / "filelists", str(tmp_path))[0]] == [
        "Hello | there.",
        "Good bye.",
    ]
    write(tmp_path / "filelists" / "train.txt", "wavs/a.wav|Hello.\n")  # relative to the top
    assert read(tmp_path)[0][1:] == (("text", "Hello."), ("audio", "wavs/a.wav"))
    write(tmp_path / "s" / "list.txt", "\ufeffwavs/a.wav|alice|hello you\nwavs/b.wav|bob|yes\nwavs/c.wav|alice|no\n")
    for name in ("a", "b", "c"):
        write(tmp_path / "s" / "wavs" / f"{name}.wav", wav())
    assert [parts[0] for _, *parts in read(tmp_path / "s")] == [("text", "hello you"), ("text", "yes"), ("text", "no")]
    assert [parts[0][1] for _, *parts in read(tmp_path / "s", speakers="name")] == ["alice: hello you", "bob: yes", "alice: no"]
    roles = {"alice": "user", "bob": "assistant"}
    raws, _ = found_in(SourceSpec(str(tmp_path / "s"), speakers=roles))
    assert [[part.role for part in raw.content] for raw in raws] == [["user"] * 2, ["assistant"] * 2, ["user"] * 2]
    write(tmp_path / "l" / "train.list", "a.wav|alice|EN|hello\n")
    write(tmp_path / "l" / "a.wav", wav())
    assert read(tmp_path / "l", speakers="name") == [("a.wav", ("text", "alice: hello"), ("audio", "a.wav"))]
    with pytest.raises(UserError, match="speakers 'yes'; it is name, or roles"):
        SourceSpec("x", speakers="yes")


def test_images_with_captions_in_a_list(tmp_path):
    write(tmp_path / "captions.txt", "cat.png|a cat\ndog.png|a dog\n")
    for name in ("cat", "dog"):
        write(tmp_path / f"{name}.png", png())
    assert read(tmp_path) == [
        ("cat.png", ("text", "a cat"), ("image", "cat.png")),
        ("dog.png", ("text", "a dog"), ("image", "dog.png")),
    ]


def test_flickr_data_sets_with_their_images_in_a_folder_beside_the_captions(bundle_folder, tmp_path):
    names = [f"{n}_693b08cb0e.jpg" for n in range(1000268201, 1000268209)]
    tables = {
        "captions.txt": ("image,caption\n", '{0},"A child , in dress {1} ."\n'),  # as Kaggle has it
        "results.csv": ("image_name| comment_number| comment\n", "{0}| {1}| A child , in dress {1} .\n"),  # Flickr30k
        "Flickr8k.token.txt": ("", "{0}#{1}\tA child , in dress {1} .\n"),
    }
    for number, (file, (header, row)) in enumerate(tables.items()):
        top = tmp_path / str(number)
        write(top / "text" / file, header + "".join(row.format(name, k) for name in names for k in range(5)))
        for name in names:
            write(top / "Flicker8k_Dataset" / name, png())
        expected = [
            (("text", f"A child , in dress {k} ."), ("image", f"Flicker8k_Dataset/{n}")) for n in names for k in range(5)
        ]
        assert [tuple(parts) for _, *parts in read(top)] == expected
        assert (
            list(read_texts(top)) == list(read_texts(top / "text" / file)) == [text for (_, text), _ in expected]
        )  # alone, too
        template = ({"type": "image", "path": "{image}"}, {"type": "text", "text": "{caption}"})
        assert not number or [len(parts) for _, *parts in read(tmp_path / "0", template=template)] == [2] * 40

        tokenize(Plan(str(top), str(tmp_path / f"tokens{number}"), str(bundle_folder), validation=0.5))
        sides = TokenDataset(tmp_path / f"tokens{number}").documents_by_split()
        assert len(sides) == 2  # and the five captions of an image are on one of them
        assert [n % 5 for n in sides.values()] == [0, 0]


def test_a_table_without_a_header_is_not_taken_for_one(tmp_path):
    write(tmp_path / "a.png", png())
    write(tmp_path / "data.csv", "a.png,A cat\nb.png,A dog\n")
    with pytest.raises(UserError, match="data.csv: its first line names a.png: put the names of its columns above"):
        read(tmp_path)


def test_librispeech(tmp_path):
    chapter = tmp_path / "train-clean-100" / "84" / "121123"
    for number in range(2):
        write(chapter / f"84-121123-000{number}.flac", wav())
    write(chapter / "84-121123.trans.txt", "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS THAN FIVE MINUTES\n")
    assert read(tmp_path) == [
        (f"84-121123-000{n}", ("text", text), ("audio", f"train-clean-100/84/121123/84-121123-000{n}.flac"))
        for n, text in enumerate(["GO DO YOU HEAR", "BUT IN LESS THAN FIVE MINUTES"])
    ]


def test_common_voice_musiccaps_audiofolder_and_audiocraft(tmp_path):
    write(tmp_path / "cv" / "clips" / "common_voice_en_1.mp3", wav())
    write(
        tmp_path / "cv" / "validated.tsv",
        "client_id\tpath\tsentence\tup_votes\n0a1\tcommon_voice_en_1.mp3\tA sentence.\t2\n",
    )
    assert [parts for _, *parts in read(tmp_path / "cv")] == [
        [("text", "A sentence."), ("audio", "clips/common_voice_en_1.mp3")]
    ]

    header = "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval"
    rows = ["-0Gj8-vB1q4,30,40,/m/0140xf,\"['ballad']\",A slow ballad.,4,False,True"]
    rows += ["-0SdAVK79lg,1,1.5,/m/0155w,\"['guitar']\",A guitar.,0,False,False", "missing,0,10,/m/0,[],Lost.,0,False,False"]
    write(tmp_path / "mc" / "musiccaps-public.csv", "\n".join([header, *rows]) + "\n")
    write(tmp_path / "mc" / "wav" / "-0Gj8-vB1q4.wav", wav(seconds=10))
    write(tmp_path / "mc" / "wav" / "-0SdAVK79lg.wav", wav(seconds=3))
    raws, errors = found_in(tmp_path / "mc")
    assert [[(str(p.path or p.value), p.view) for p in raw.content] for raw in raws] == [
        [("A slow ballad.", ""), ("wav/-0Gj8-vB1q4.wav", "")],  # the clip alone, as most people have it
        [("A guitar.", ""), ("wav/-0SdAVK79lg.wav", "t=1,1.5")],
    ]
    (error,) = errors
    assert "no recording of that name" in error

    write(
        tmp_path / "ac" / "egs" / "data.jsonl",
        json.dumps({"path": "../music/a.wav", "duration": 0.3, "sample_rate": 8000, "weight": None}),
    )
    write(tmp_path / "ac" / "music" / "a.wav", wav())
    write(tmp_path / "ac" / "music" / "a.json", json.dumps({"key": "", "bpm": 90, "description": "A waltz."}))
    assert [parts for _, *parts in read(tmp_path / "ac")] == [[("text", "A waltz."), ("audio", "music/a.wav")]]

    write(tmp_path / "af" / "metadata.csv", "file_name,transcription\ndata/a.wav,one two\n")
    write(tmp_path / "af" / "data" / "a.wav", wav())
    assert [parts for _, *parts in read(tmp_path / "af")] == [[("text", "one two"), ("audio", "data/a.wav")]]


def test_stretches_of_long_recordings(bundle_folder, tmp_path):
    write(tmp_path / "in" / "long.wav", wav(seconds=3))
    lines = [
        {"audio_filepath": "long.wav", "offset": 0.5, "duration": 0.25, "text": "one"},
        {"audio": "long.wav", "start": 1, "end": 2.5, "text": "two"},
        {"content": [{"type": "audio", "path": "long.wav", "start": 2.5}]},
        {"content": [{"type": "audio", "path": "long.wav", "start": 1, "end": 1}]},
        {"audio": "long.wav", "start": 2, "end": 9, "text": "three"},
        {"audio": "long.wav", "start": "x", "end": 9, "text": "four"},
    ]
    write(tmp_path / "in" / "x.jsonl", "\n".join(map(json.dumps, lines)))
    raws, errors = found_in(tmp_path / "in")
    assert [raw.content[-1].view for raw in raws] == ["t=0.5,0.75", "t=1,2.5", "t=2.5,", "t=2,9", ""]
    assert raws[-1].notes == ("field 'start' is not used: no number of seconds",)
    (error,) = errors
    assert "start is the smaller" in error
    line = json.loads(format_raw_document(raws[2], tmp_path))["content"][0]
    assert line == {"type": "audio", "path": "long.wav", "start": 2.5}
    assert raw_document({"content": [line]}, tmp_path, "", "").content[0].view == "t=2.5,"

    plan = Plan(str(tmp_path / "in"), str(tmp_path / "out"), str(bundle_folder), options={"audio": {"segment": 1.0}})
    tokenize(plan, max_error_rate=1.0)
    documents = TokenDataset(tmp_path / "out")
    frames = [d.segments[-1].size[0] for d in (documents.document(i) for i in range(len(documents)))]
    assert frames == [2000, 8000, 4000, 4000, 8000, 8000, 8000]
    error = json.loads((tmp_path / "out" / "errors.jsonl").read_text().splitlines()[-1])["error"]
    assert "no stretch from 2 to 9 s: the audio is 3 s long" in error


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"a.wav|", "no text"),
        (b"b.wav|lost", "no such file"),
        (b"a.wav", "1 columns where 2 should be"),
        ("a.wav|caf\xe9".encode("latin-1"), "not UTF-8 text"),
    ],
)
def test_a_bad_line_is_listed_and_the_others_are_read(bundle_folder, tmp_path, line, problem):
    write(tmp_path / "in" / "a.wav", wav())
    write(tmp_path / "in" / "metadata.csv", b"a.wav|good\n" + line + b"\na.wav|also good\n")
    tokenize(Plan(str(tmp_path / "in"), str(tmp_path / "out"), str(bundle_folder)), max_error_rate=1.0)
    assert len(TokenDataset(tmp_path / "out")) == 2
    (error,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert "line 2" in error["error"] or "b.wav" in error["error"]
    assert problem in error["error"]


# ---- What is no transcript, and what is one in another dress ---------------------------------------------------------


def test_tables_with_a_header_stay_tables_and_texts_stay_texts(tmp_path):
    write(tmp_path / "x" / "wavs" / "a.wav", wav())
    write(tmp_path / "x" / "metadata.csv", "audio_file|text|speaker_name\nwavs/a.wav|hello you|alice\n")
    assert [parts for _, *parts in read(tmp_path / "x")] == [[("text", "hello you"), ("audio", "wavs/a.wav")]]
    write(tmp_path / "x" / "metadata.csv", "wavs/a.wav|text\n")  # of one word, which is the name of a column, too
    assert [parts for _, *parts in read(tmp_path / "x")] == [[("text", "text"), ("audio", "wavs/a.wav")]]
    write(tmp_path / "t" / "train.txt", "Listen to song.mp3 | by X")
    write(tmp_path / "t" / "note.txt", "a.wav|not looked into: its name does not say that it is a list")
    assert [parts[0][0] for _, *parts in read(tmp_path / "t")] == ["text", "text"]
    write(tmp_path / "s" / "notes" / "train.txt", "an ordinary text")
    write(tmp_path / "s" / "test" / "cat.png", png())
    assert [item.split for item in Source(SourceSpec(str(tmp_path / "s"))).items()] == ["", ""]


def test_the_speaker_may_stand_after_the_text_and_further_columns_are_not_used(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.wav", wav())
    write(tmp_path / "train_list.txt", "a.wav|hello you|0\nb.wav|good bye|0\nc.wav|yes|1\n")  # StyleTTS2
    assert [parts[0][1] for _, *parts in read(tmp_path, speakers="name")] == ["0: hello you", "0: good bye", "1: yes"]
    write(tmp_path / "train_list.txt", "a.wav|alice|EN|hello|hh ah l ow|0 1 2|1 2\nb.wav|bob|EN|bye|b ay|0 0|1 1\n")
    assert [parts[0][1] for _, *parts in read(tmp_path / "train_list.txt", speakers="name")] == ["alice: hello", "bob: bye"]
    items = list(Source(SourceSpec(str(tmp_path / "train_list.txt"), group="speaker")).items())
    assert [item.group for item in items] == ["alice", "bob"]


def test_recordings_of_absolute_paths_are_no_documents_of_their_own(tmp_path):
    write(tmp_path / "wavs" / "a.wav", wav())
    write(tmp_path / "train.list", f"{tmp_path}/wavs/a.wav|hello\n")
    assert len(read(tmp_path)) == 1
    assert [file.path for file in list_media(str(tmp_path / "train.list"), "audio")] == [str(tmp_path / "wavs" / "a.wav")]


def test_compressed_lists_with_bad_lines(tmp_path):
    write(tmp_path / "wavs" / "a.wav", wav())
    write(tmp_path / "metadata.csv.gz", gzip.compress(b"a|one|one\na\na|two|two\n"))
    raws, errors = found_in(tmp_path)
    assert [raw.content[0].value for raw in raws] == ["one", "two"]
    assert len(errors) == 1
    source = Source(SourceSpec(str(tmp_path)))
    assert len([make() for make in source.read(list(source.items())[:1])]) == 1


def test_texts_of_transcripts_without_their_recordings(tmp_path):
    write(tmp_path / "wavs" / "a.wav", wav())
    write(tmp_path / "metadata.csv", "a|1|one\n")
    write(tmp_path / "train.txt", "wavs/a.wav|two\n")
    (tmp_path / "wavs" / "a.wav").chmod(0)  # is not opened
    assert sorted(read_texts(tmp_path)) == ["one", "two"]
    assert list(read_texts(tmp_path / "train.txt")) == ["two"]


def test_rows_with_media_of_their_own_need_no_other_recording(tmp_path):
    lines = [
        {"ytid": "x", "audio": "c.wav", "caption": "one"},
        {"image": "d.png", "start_time": "2020-01-01T00:00", "end_time": "later", "text": "two"},
        {"audio": "c.wav", "start": float("nan"), "end": float("nan"), "text": "three"},
        {"audio": "c.wav", "start": 0.1, "duration": 0.1, "text": "four"},
    ]
    write(tmp_path / "c.wav", wav())
    write(tmp_path / "d.png", png())
    write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines)))
    raws, errors = found_in(tmp_path)
    assert errors == []
    assert [raw.content[-1].view for raw in raws] == ["", "", "", "t=0.1,0.2"]


def test_both_orders_are_refused_where_order_says_something(tmp_path):
    write(tmp_path / "a.png", png())
    parts = [{"type": "text", "text": "q", "role": "user"}, {"type": "image", "path": "a.png", "role": "assistant"}]
    write(tmp_path / "x.jsonl", json.dumps({"content": parts}))
    _, errors = found_in(SourceSpec(str(tmp_path / "x.jsonl"), order=("both",)))
    assert "parts with roles" in errors[0]
    for wrong in ({"order": ("audio", "both")}, {"speakers": "name", "template": ({"type": "text", "text": "{a}"},)}):
        with pytest.raises(UserError, match="stand alone|leave one of them out"):
            SourceSpec("x", **wrong)


def test_a_silent_stretch_of_a_prompt_is_a_users_mistake(tiny, tmp_path):
    samples = np.concatenate([np.zeros(4000), np.random.default_rng(0).uniform(-0.5, 0.5, 4000)])
    soundfile.write(tmp_path / "a.wav", samples, 8000)
    with pytest.raises(UserError, match="silent segments"):
        tiny.read(Part("audio", path=tmp_path / "a.wav", view="t=0,0.4"))
    assert tiny.read(Part("audio", path=tmp_path / "a.wav", view="t=0.5,0.9"))[0].size == (3200,)


def test_recordings_that_lie_about_their_rate_and_others_that_are_odd(bundle_folder, tmp_path):
    tone = (np.sin(np.arange(8000) / 9) * 12_000).astype("<i2").tobytes()
    rates = {"none": 0, "slow": 8, "fast": 4_000_000_000, "high": 768_000, "usual": 8000}
    for name, rate in rates.items():
        header = struct.pack(
            "<4sI8sIHHIIHH4sI",
            b"RIFF",
            36 + len(tone),
            b"WAVEfmt ",
            16,
            1,
            1,
            rate,
            rate * 2 & 0xFFFFFFFF,
            2,
            16,
            b"data",
            len(tone),
        )
        write(tmp_path / "in" / f"{name}.wav", header + tone)
    clipped = np.sign(np.sin(np.arange(8000) / 9))
    for name, samples in {
        "clipped": clipped,
        "loud": 5 * clipped,
        "constant": 0 * clipped + 0.4,
        "silent": 0 * clipped,
    }.items():
        soundfile.write(tmp_path / "in" / f"{name}.wav", samples, 8000, subtype="FLOAT")
    names = [*rates, "clipped", "loud", "constant", "silent"]
    unseen = "\u4f60\u597d \U0001f600"  # the text tokenizer has bytes for it
    lines = [f"{name}.wav|{unseen if name == 'usual' else 'hello'}\n" for name in names]
    write(tmp_path / "in" / "metadata.csv", "".join(lines).encode())
    tokenize(Plan(str(tmp_path / "in"), str(tmp_path / "out"), str(bundle_folder)), max_error_rate=1.0)
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert {error["id"] for error in errors} == {"silent.wav", "none.wav", "slow.wav", "fast.wav"}
    assert "its header says 8 Hz, which is no rate of audio" in str(errors)
    assert len(TokenDataset(tmp_path / "out")) == len(names) - len(errors)
