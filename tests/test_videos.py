"""Promises of videos: frames are the bundle's images, long ones become documents in order, plans and streams know frames."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clips import clip, noise
from PIL import Image
from raw_data import tar_of

from unitok.api import Unitok
from unitok.bundle import Bundle, make_bundle
from unitok.cli import main
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import detokenize, tokenize
from unitok.data.shards import TokenDataset
from unitok.document import Part, RawDocument, Segment
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.media import open_video, write_video
from unitok.modalities.video import Video, VideoOptions
from unitok.sample.stream import Chunk


@pytest.fixture(scope="module")
def u(bundle_folder, tmp_path_factory) -> Unitok:
    """The tiny bundle, with videos of its image codes."""
    out = tmp_path_factory.mktemp("video") / "bundle"
    make_bundle(out, {"model": bundle_folder}, add=["video"])
    return Unitok.from_pretrained(out)


@pytest.fixture(scope="module")
def folder(bundle_folder, tmp_path_factory) -> Path:
    """A bundle with the same tokenizers, in a folder."""
    out = tmp_path_factory.mktemp("video") / "bundle"
    make_bundle(out, {"model": bundle_folder}, add=["video"])
    return out


def moving(count: int, side: int = 32) -> Video:
    frames = torch.from_numpy(np.stack(clip(count, side, side))).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Video(frames, 8)


def test_frames_are_images_and_come_back_with_their_rate(u):
    (segment,) = u.read(moving(5))
    assert (segment.modality, segment.codes.shape[0], segment.facts, segment.size) == ("video", 5, (8,), (32, 32))
    for codes, frame in zip(segment.codes, moving(5).frames, strict=True):
        assert np.array_equal(codes, u.image.encode(frame[None])[0].numpy())
    ids = u.vocab.encode(u.read_prompt(moving(5)))
    names = [u.vocab.name_of(int(id)) for id in ids[1:6]]
    rows, columns = segment.codes.shape[1:]
    assert names == ["<video>", "fps:8", "frames:5", f"grid:{rows}", f"grid:{columns}"]
    Grammar(u.vocab).check(ids)
    assert u.vocab.decode(ids).segments[0].facts == (8,)
    video = u.decode(segment)
    assert video.frames.shape == (5, 3, 32, 32)
    assert video.rate == 8
    with pytest.raises(UserError, match="0 facts where its header has 1"):
        u.vocab.encode(type(u.read_prompt("a"))((Segment("video", segment.codes),)))


def test_plans_streams_and_continued_videos(u):
    (output,) = u.generate(["a"], "video:8x4x2x3", seed=0)
    (video,) = output.of_kind("video")
    stride = u.image.stride
    assert video.frames.shape == (4, 3, 2 * stride, 3 * stride)
    assert video.rate == 8
    chunks = list(u.stream(["a"], "video:8x4x2x3", seed=0))
    shown = [chunk.content.frames for chunk in chunks if isinstance(chunk, Chunk)]
    counts = [len(frames) for frames in shown]
    assert len(counts) > 1
    assert counts == sorted(set(counts))
    assert counts[-1] == 4
    torch.testing.assert_close(shown[-1], video.frames)
    (longer,) = u.generate([moving(4)], "video", prefix_fraction=0.5, seed=0)
    given, made = moving(4), longer.of_kind("video")[0]
    assert len(made.frames) == 4
    assert np.array_equal(longer.document.segments[-1].codes[:2], u.read(given)[0].codes[:2])
    with pytest.raises(UserError, match="too small"):
        u.generate(["a"], "video:8x4x2x3", max_new_tokens=20)
    (short,) = u.generate(["a"], "video", seed=1, max_new_tokens=40)
    assert short.of_kind("video")[0].frames.shape[0] >= 1


def test_frames_outside_of_a_stretch_are_the_originals(u, tmp_path):
    original = moving(8)
    write_video(tmp_path / "a.mp4", clip(8, 32, 32), 8)
    (output,) = u.fill(original, (0.26, 0.6), "a bar", seed=1)  # frames 2 to 4
    (made,) = output.of_kind("video")
    same = [torch.equal(a, b) for a, b in zip(made.frames, original.frames, strict=True)]
    assert same == [True, True, False, False, False, True, True, True]
    assert [segment.modality for segment in output.prompt.segments] == ["text"]
    (output,) = u.fill(tmp_path / "a.mp4", (0.5, 9.0))
    (made,) = output.of_kind("video")
    with open_video(tmp_path / "a.mp4") as video:
        read = torch.from_numpy(np.stack([np.asarray(frame.image) for frame in video.frames()])).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.equal(made.frames[:4], read[:4])
    assert not torch.equal(made.frames[4:], read[4:])
    for hole, problem in (
        (None, "video needs a stretch to fill"),
        ((0.5, 0.2), "of video of 1 s; the stretch"),
        ((2, 3), "of video of 1 s; the stretch"),
    ):
        with pytest.raises(UserError, match=problem):
            u.fill(original, hole)


def test_a_long_file_becomes_documents_of_its_stretches(u, tmp_path):
    write_video(tmp_path / "a.mp4", clip(29, 32, 32), 8, noise(29 / 8, 8000), 8000)
    from unitok.modalities import modality_of
    from unitok.storage import Blob, Files

    modality, blob = modality_of("video"), Blob.of(Files("/"), str(tmp_path / "a.mp4"))
    views, left_out = modality.pieces(u.video, blob, VideoOptions(fps=8, frames=8))
    assert (len(views), left_out) == (4, "")
    frames = [modality.load(u.video, blob, VideoOptions(fps=8, frames=8), "a", view).content for view in views]
    assert [len(some) for some in frames] == [8, 8, 8, 5]
    with open_video(tmp_path / "a.mp4") as video:
        whole = np.stack([np.asarray(frame.image) for frame in video.frames()])
    assert np.array_equal(np.concatenate(frames), whole)


def test_a_bundle_without_images_has_no_videos(bundle_folder, tmp_path):
    with pytest.raises(UserError, match="its frames are encoded by 'image', which is not there"):
        make_bundle(tmp_path / "b", {"text": bundle_folder / "tokenizers" / "text"}, add=["video"])
    alone = Bundle.from_pretrained(bundle_folder, parts=["text"])
    assert alone.video is None


def test_bad_videos_are_one_line(u, tmp_path):
    for content, problem in (
        (Video(torch.zeros(3, 32, 32), 8), "give 1 to 256 frames"),
        (Video(torch.zeros(2, 3, 32, 32), 7.5), "7.5 frames per second; give a whole number"),
        (Video(torch.zeros(0, 3, 32, 32), 8), "give 1 to 256 frames"),
        (Video(torch.zeros(2, 3, 32, 32), "8"), "8 frames per second; give a whole number"),
        (Video(torch.rand(2, 3, 32, 32) * 255, 8), r"float frames are in \[-1, 1\], got up to 25"),
        (Video(torch.full((2, 3, 32, 32), torch.nan), 8), "not finite"),
        (Video(torch.zeros(2, 3, 32, 32, dtype=torch.int64), 8), "frames of int64; give 1 to 256 frames"),
        (Video("clip.mp4", 8), "frames: a str; give a tensor or NumPy array, 1 to 256 frames"),
    ):
        with pytest.raises(UserError, match=problem):
            u.read(content)
    for options, problem in (
        ({"fps": 61}, "fps is 61"),
        ({"frames": 0}, "frames is 0"),
        ({"frames": 300}, "frames is 300"),
        ({"fit": "x"}, "fit 'x'"),
    ):
        with pytest.raises(UserError, match=problem):
            VideoOptions(**options)
    (tmp_path / "bad.mp4").write_bytes(b"\0\0\0\x18ftypisom" + b"\0" * 50)
    with pytest.raises(UserError, match="not a readable video"):
        u.read(Path(tmp_path / "bad.mp4"))


def test_frames_may_be_bytes_and_floats_of_any_size(u):
    video = moving(3)
    pixels = ((video.frames + 1) * 127.5).round().byte()
    (expected,) = u.read(video)
    for frames in (pixels, pixels.numpy(), video.frames.double(), video.frames.clone().requires_grad_()):
        (segment,) = u.read(Video(frames, 8))
        assert np.array_equal(segment.codes, expected.codes)


def test_videos_between_images_are_listed_where_the_bundle_has_none(bundle_folder, tmp_path):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.gif", clip(3), 8)
    write_video(tmp_path / "in" / "b.mp4", clip(3), 8)
    tokenize(Plan(str(tmp_path / "in"), str(tmp_path / "tokens"), str(bundle_folder)))
    errors = [json.loads(line) for line in (tmp_path / "tokens" / "errors.jsonl").open()]
    assert len(errors) == 1
    assert "the bundle has no video; add one with `unitok bundle BUNDLE --add video`" in errors[0]["error"]


def test_folders_of_videos_are_tokenized_and_come_back(u, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write_video(tmp_path / "in" / f"{name}.mp4", clip(20, 32, 32), 8, noise(2.5, 8000), 8000)
        (tmp_path / "in" / f"{name}.txt").write_text(f"a bar, {name}")
    u.save_pretrained(tmp_path / "bundle")
    plan = Plan(str(tmp_path / "in"), str(tmp_path / "tokens"), str(tmp_path / "bundle"), options={"video": {"frames": 12}})
    tokenize(plan)
    detokenize(tmp_path / "tokens", tmp_path / "out", tmp_path / "bundle")
    lengths = []
    for file in sorted((tmp_path / "out").glob("*.mp4")):
        with open_video(file) as video:
            lengths.append(len(list(video.frames())))
            assert (video.size, video.rate) == ((32, 32), 8.0)
    assert sorted(lengths) == [8, 8, 12, 12]


def test_webvid_and_webdataset_are_read_as_they_come(u, folder, tmp_path):
    table, archive = tmp_path / "webvid", tmp_path / "shards"
    (table / "videos" / "000001").mkdir(parents=True)
    archive.mkdir()
    write_video(table / "videos" / "000001" / "11.mp4", clip(8, 32, 32), 8.0)
    write_video(table / "12.webm", clip(8, 32, 32), 8.0)
    rows = [
        '11,https://example.org/11.mp4,PT00H00M01S,000001,"A bar, moving right"',
        "12,,,000002,Another bar",
        "13,,,000002,None",
    ]
    (table / "results_2M_val.csv").write_text("\n".join(["videoid,contentUrl,duration,page_dir,name", *rows]) + "\n")
    members = [("a.mp4", (table / "videos" / "000001" / "11.mp4").read_bytes()), ("a.json", b'{"caption": "A bar"}')]
    (archive / "00000.tar").write_bytes(tar_of(members))
    found = {}
    for source in (table, archive):
        out = tmp_path / f"{source.name}.tokens"
        tokenize(Plan(str(source), str(out), str(folder)), max_error_rate=1.0)
        data = TokenDataset(out)
        found[source] = [tuple(s.modality for s in data.document(i).segments) for i in range(len(data))]
        texts = [u.decode(data.document(i).segments[0]) for i in range(len(data))]
        assert texts == (["A bar, moving right", "Another bar"] if source == table else ["A bar"])
    assert set(found[table] + found[archive]) == {("text", "video")}
    (error,) = map(json.loads, (tmp_path / "webvid.tokens" / "errors.jsonl").read_text().splitlines())
    assert "videoid '13': no 000002/13.mp4 beside the table or in videos/" in error["error"]


def test_the_bundle_says_at_which_rate_files_are_read(u, folder, bundle_folder, tmp_path):
    out = tmp_path / "slow"
    make_bundle(out, {"model": bundle_folder}, add=["video:fps=4"])
    slow = Unitok.from_pretrained(out)
    assert slow.vocab.to_manifest() == u.vocab.to_manifest()  # a decoder of the one is a decoder of the other
    write_video(tmp_path / "a.mp4", clip(24, 32, 32), 8)
    for unitok, rate in ((u, 8), (slow, 4)):
        (segment,) = unitok.read_prompt(tmp_path / "a.mp4").segments
        assert (segment.facts, len(segment.codes)) == ((rate,), 3 * rate)
    with pytest.raises(UserError, match="fps is 99"):
        make_bundle(tmp_path / "fast", {"model": bundle_folder}, add=["video:fps=99"])
    write_video(tmp_path / "long.gif", clip(8, 16, 16) * 33, 8)
    with pytest.raises(UserError, match="over 256 frames at 8 per second; give `start` and `end`"):
        u.read_prompt(RawDocument("", (Part("video", path=tmp_path / "long.gif"),)))
    for plan, problem in (("video:61x2x2x2", "no fps may be over 60"), ("video:8x2x999x2", "no side may be over")):
        with pytest.raises(UserError, match=problem):
            u.generate("a", plan)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("video:fps=61", "video: fps is 61; it must be 1 to 60"),
        ("video:fps=0", "'fps=0' is no setting; write NAME=NUMBER, at least 1, with a name of: fps"),
        ("video:rate=8", "'rate=8' is no setting"),
        ("box:bins=1", "box: bins is 1; it must be at least 2"),
        ("image", "image: its tokenizer has weights"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(bundle_folder, tmp_path, setting, problem):
    with pytest.raises(UserError, match=problem):
        make_bundle(tmp_path / "b", {"model": bundle_folder}, add=[setting])
    assert not (tmp_path / "b").exists()
    make_bundle(tmp_path / "slow", {"model": bundle_folder}, add=["video:fps=1"])


def test_parts_of_a_built_in_bundle_are_given_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["bundle", "moving", "--text", "scenes", "--image", "scenes", "--add", "video"])
    assert (
        Unitok.from_pretrained(tmp_path / "moving").image.fingerprint() == Unitok.from_pretrained("scenes").image.fingerprint()
    )


def test_videos_and_their_audio_in_turn(u, folder, tmp_path):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.mp4", clip(16, 32, 32), 8, noise(1.5, 8000), 8000)
    soundfile.write(tmp_path / "in" / "b.wav", noise(1.5, 44_100)[0], 44_100)
    text, video = {"type": "text", "text": "a bar"}, {"type": "video", "path": "a.mp4"}
    audio, other = {"type": "audio", "path": "a.mp4"}, {"type": "audio", "path": "b.wav"}
    lines = [
        {"content": [text, video, audio]},
        {"video": "a.mp4", "audio": "a.mp4"},
        {"content": [video | {"role": "user"}, text | {"role": "user"}, audio | {"role": "assistant"}]},
        {"content": [video, video]},
        {"content": [video, other]},
    ]
    (tmp_path / "in" / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def tokenized(*flags: str) -> list[list[tuple[str, int]]]:
        out = tmp_path / "-".join(("out", *flags))
        words = ["tokenize", str(tmp_path / "in"), str(out), "--bundle", str(folder)]
        main([*words, "--order", "text,video,audio", *flags])
        data = TokenDataset(out)
        documents = (data.document(number).segments for number in range(len(data)))
        return [
            [(s.modality, s.codes.shape[s.modality == "audio"]) for s in segments if s.modality != "text"]
            for segments in documents
        ]

    whole, turns = tokenized(), tokenized("--interleave", "1s")
    kinds = ["video", "audio", "video", "audio"]
    assert [[kind for kind, _ in one] for one in turns] == [kinds, kinds, ["video", "audio"], ["video", "video"], kinds]
    assert [length for kind, length in turns[0] if kind == "video"] == [8, 8]
    for one, other_one in zip(whole, turns, strict=True):  # as many frames as without
        assert all(
            sum(n for k, n in one if k == kind) == sum(n for k, n in other_one if k == kind) for kind in ("video", "audio")
        )
    assert tokenized("--interleave", "0.3s")[0][:6] == [
        ("video", 2),
        ("audio", 4),
        ("video", 3),
        ("audio", 4),
        ("video", 2),
        ("audio", 3),
    ]
    assert [len(one) for one in tokenized("--interleave", "5s")] == [2] * 5  # all of it is one stretch
    for unusable in ("0.01s", "40s"):
        assert len(tokenized("--interleave", unusable)) == 2
        errors = (tmp_path / f"out---interleave-{unusable}" / "errors.jsonl").read_text()
        assert errors.count(f"interleave {unusable}: ") == 3
    for wrong in ("1", "0s", "-1s", "word"):
        with pytest.raises(SystemExit):
            main(["tokenize", str(tmp_path / "in"), str(tmp_path / "no"), "--bundle", str(folder), "--interleave", wrong])


def test_what_plays_together_is_one_file(u, tmp_path):
    (output,) = u.generate(["a"], "video:8x4x4x4,audio:0.5s,video:8x4x4x4,audio:0.5s", seed=0)
    (movie,) = output.movies
    assert torch.equal(movie.frames, torch.cat([video.frames for video in output.videos]))
    assert torch.equal(movie.audio, torch.cat(output.audios, -1))
    output.save(tmp_path)
    with open_video(tmp_path / "000000-movie-0.mp4") as video:
        assert len(list(video.frames())) == 8
        assert video.audio().shape[-1] / video.sample_rate == pytest.approx(
            movie.audio.shape[-1] / u.audio.sample_rate, abs=0.1
        )
    (heard,) = u.generate([moving(4)], "audio:0.5s", seed=0)  # the audio of a video that was given
    (together,) = heard.movies
    assert len(together.frames) == 4
    assert torch.equal(together.audio, heard.audios[0])
    for prompt, plan in (
        ([moving(4), "a"], "audio:0.5s"),
        (["a"], "video:8x4x4x4"),
        (["a"], "video:8x4x4x4,video:4x4x4x4,audio:0.5s"),
    ):
        assert u.generate([prompt], plan, seed=0)[0].movies == []


def test_a_folder_of_frames_is_a_video(u, folder, tmp_path):
    frames = tmp_path / "in" / "frames"
    frames.mkdir(parents=True)
    drawn = clip(12, 32, 32)
    for number, pixels in enumerate(drawn, 1):
        Image.fromarray(pixels).save(frames / f"frame-{number}.png")
    (frames / "notes.txt").write_text("12 frames")
    (tmp_path / "secret.png").write_bytes((frames / "frame-1.png").read_bytes())
    (frames / "frame-0.png").symlink_to(tmp_path / "secret.png")  # not followed
    (segment,) = u.read(frames)
    again = Video(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1, 8)
    assert segment.facts == (8,)
    assert np.array_equal(segment.codes, u.read(again)[0].codes)  # frame 10 after frame 9
    part = {"type": "video", "path": "frames"}
    lines = [{"content": [part]}, {"content": [part | {"start": 0.25, "end": 1.0}]}, {"content": [part | {"path": "empty"}]}]
    (tmp_path / "in" / "empty").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = tokenize(Plan(str(tmp_path / "in" / "a.jsonl"), str(tmp_path / "out"), str(folder)))
    assert [len(TokenDataset(tmp_path / "out").document(n).segments[0].codes) for n in range(2)] == [12, 6]
    assert '"error": "empty: no images in this folder' in (tmp_path / "out" / "errors.jsonl").read_text()
    (frames / "frame-3.png").write_bytes(b"torn")
    (short,) = u.read(frames)
    assert len(short.codes) == 2
    assert report
    with pytest.raises(UserError, match=r"in: not a file|no images in this folder"):
        u.read(tmp_path / "in")
    (frames / "\u00b21.png").write_bytes((frames / "frame-1.png").read_bytes())
    assert len(u.read(frames)[0].codes) >= 2
    (tmp_path / "in" / "link").symlink_to(frames)
    (tmp_path / "in" / "c.jsonl").write_text(json.dumps({"content": [part | {"path": "link"}]}) + "\n")
    with pytest.raises(UserError, match="a link to a folder"):
        tokenize(Plan(str(tmp_path / "in" / "c.jsonl"), str(tmp_path / "no"), str(folder)))
    outside = {"content": [{"type": "video", "path": "../in2"}]}
    (tmp_path / "in2").mkdir()
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps(outside) + "\n")
    with pytest.raises(UserError, match="leaves the folder of its source"):
        tokenize(Plan(str(tmp_path / "in" / "b.jsonl"), str(tmp_path / "no"), str(folder)))


def test_rows_name_folders_of_frames(folder, tmp_path):
    frames = tmp_path / "in" / "clips" / "one"
    frames.mkdir(parents=True)
    for number, pixels in enumerate(clip(8, 32, 32)):
        Image.fromarray(pixels).save(frames / f"{number}.png")
    rows = [
        {"video": "clips/one", "caption": "a dog"},
        {"video": "clips", "caption": "no frames"},
        {"video": "clips/two", "caption": "a"},
    ]
    (tmp_path / "in" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in" / "rows.csv").write_text("video,caption\nclips/one,a dog\n")
    for name, listed in (("rows.jsonl", ["no images in this folder", "no such file"]), ("rows.csv", [])):
        tokenize(Plan(str(tmp_path / "in" / name), str(tmp_path / name), str(folder)))
        made = TokenDataset(tmp_path / name)
        assert len(made) == 1
        assert [(s.modality, s.facts) for s in made.document(0).segments] == [("text", ()), ("video", (8,))]
        errors = tmp_path / name / "errors.jsonl"
        found = [json.loads(line)["error"] for line in errors.read_text().splitlines()] if errors.exists() else []
        assert all(said in error for said, error in zip(listed, found, strict=True)), found


def test_fields_that_name_one_file_are_one_part(folder, tmp_path):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.mp4", clip(8, 32, 32), 8, noise(1, 8000), 8000)
    soundfile.write(tmp_path / "in" / "b.wav", noise(1, 8000)[0], 8000)
    rows = {
        ("audio", "path", "b.wav"): ["audio"],
        ("file_name", "audio", "b.wav"): ["audio"],
        ("video", "audio", "b.wav"): ["audio"],
        ("video", "path", "a.mp4"): ["video"],
        ("video", "audio", "a.mp4"): ["audio", "video"],
    }
    lines = [json.dumps({first: file, second: file}) for first, second, file in rows]
    (tmp_path / "in" / "documents.jsonl").write_text("\n".join(lines))
    tokenize(Plan(str(tmp_path / "in"), str(tmp_path / "out"), str(folder)))
    data = TokenDataset(tmp_path / "out")
    assert [[s.modality for s in data.document(n).segments] for n in range(len(rows))] == list(rows.values())
