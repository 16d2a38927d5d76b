"""Videos in which a few frames share a grid of codes: causal, in pieces as in one pass, from raw files to generated ones."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from unitok import Unitok
from unitok.bundle import make_bundle
from unitok.cli import main
from unitok.data.folders import VideoDataset
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.evaluate.video import video_scores
from unitok.grammar import Grammar, Row
from unitok.modalities import build_vocab
from unitok.modalities.video import FrameTokenizer, Video
from unitok.sample.stream import Chunk
from unitok.tokenizers import ImageTokenizer, ImageTokenizerConfig
from unitok.vocab import Vocab

GROUP = 4
CONFIG = ImageTokenizerConfig(ch=32, ch_mult=(1,), patch=8, resolution=32, z_channels=16, codebook_size=64, group=GROUP)


def make(**changes: object) -> ImageTokenizer:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(replace(CONFIG, **changes)).eval()
    tokenizer.quantizer.init_codebook(torch.randn(1000, CONFIG.codebook_dim))
    return tokenizer


def video_of(frames: int, height: int = 32, width: int = 40) -> torch.Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("encoder", ["patch", "vqgan"])
@pytest.mark.parametrize("tile", [1024, 16])
def test_grids_are_causal_and_pieces_are_equal_to_one_pass(encoder, tile):
    tokenizer, video = make(encoder=encoder), video_of(11, 30, 40)
    tokenizer.tile, tokenizer.overlap = tile, 1
    (codes,) = tokenizer.encode_videos([video])
    assert codes.shape == (tokenizer.steps(11), 4, 5) == (4, 4, 5)
    assert torch.equal(codes[0], tokenizer.encode(video[:1])[0])  # the first frame is an image
    changed = video.clone()
    changed[1 + GROUP] = 0
    (others,) = tokenizer.encode_videos([changed])
    assert torch.equal(others[:2], codes[:2])
    assert not torch.equal(others[2], codes[2])
    several = tokenizer.encode_videos([video[:1], video, video[:6]])
    assert [len(grids) for grids in several] == [1, 4, 3]
    assert torch.equal(several[1], codes)
    assert torch.equal(several[2][:2], codes[:2])
    whole = tokenizer.decode_video(codes, 11)
    assert whole.shape == (11, 3, 32, 40)
    assert len(tokenizer.decode_video(codes)) == 1 + 3 * GROUP
    torch.testing.assert_close(tokenizer.decode_video(codes[:2]), whole[: 1 + GROUP])
    torch.testing.assert_close(tokenizer.decode_video(codes, 11, start=2), whole[1 + GROUP :])
    torch.testing.assert_close(whole[:1], tokenizer.decode(codes[:1]))
    torch.testing.assert_close(tokenizer.decode_video(codes[:1], 1), whole[:1])
    assert len(tokenizer.decode_video(codes, 3, start=2)) == 0


def test_wrong_videos_are_one_line():
    tokenizer = make()
    codes = tokenizer.encode_videos([video_of(9).numpy()])[0]
    with pytest.raises(UserError, match="videos of 4 frames: .*such as 5"):
        tokenizer(video_of(4)[None])
    assert tokenizer.encode_videos([]) == []
    for call, problem in (
        (lambda: tokenizer.encode_videos([video_of(2)[0]]), "videos are \\[F, 3, H, W\\]"),
        (lambda: tokenizer.encode_videos([video_of(3)[:0]]), "at least one frame"),
        (lambda: tokenizer.encode_videos([video_of(2), video_of(2, 64)]), "several sizes"),
        (lambda: tokenizer.decode_video(codes, start=3), "start 3: the video has 3 grids"),
        (lambda: tokenizer.decode_video(codes, start=-1), "start -1"),
    ):
        with pytest.raises(UserError, match=problem):
            call()


@pytest.mark.parametrize("vectors", [512, 32 * 512])
def test_a_codebook_that_was_trained_keeps_its_codes_at_first(vectors):
    image = make(group=1, codebook_size=512)
    image.quantizer.update(torch.randn(512, CONFIG.codebook_dim))
    video = ImageTokenizer(replace(CONFIG, codebook_size=1024))
    video.init_from(image, "image")
    before = video.quantizer.codebook.embed.clone()
    assert video.quantizer.update(torch.randn(vectors, CONFIG.codebook_dim)) <= 512  # the new ones alone
    cosine = torch.nn.functional.cosine_similarity(video.quantizer.codebook.embed[:512], before[:512], dim=-1)
    assert cosine.min() > 0.9


@pytest.mark.parametrize("group", [1, 2])
def test_reconstructions_of_videos_have_their_shape(group):
    tokenizer, videos = make(group=group), torch.stack([video_of(5, 30, 40), video_of(5, 30, 40)])
    out = tokenizer(videos)
    assert out.signal.shape == videos.shape
    assert out.codes.shape == (2, tokenizer.steps(5), 4, 5)
    codes = tokenizer.encode_videos(list(videos))
    assert torch.equal(torch.stack(codes), out.codes)
    torch.testing.assert_close(tokenizer.decode_video(codes[0], 5)[..., :30, :], out.signal[0].clamp(-1, 1).detach())


def test_a_trained_image_tokenizer_becomes_one_of_videos():
    image = make(group=1, codebook_size=32)
    video = make(codebook_size=64)
    video.init_from(image, "image")
    still = video_of(1).expand(1 + GROUP, -1, -1, -1)
    (codes,) = video.encode_videos([still])
    assert torch.equal(codes[0], image.encode(still[:1])[0])
    assert torch.equal(codes[0], codes[1])  # of a still image, a group has the codes of a frame
    torch.testing.assert_close(video.decode_video(codes), image.decode(codes[:1]).expand_as(still))
    for changes, what in (({"ch": 64}, "ch"), ({"codebook_size": 16}, "codebook_size 32"), ({"group": 2}, "group 4")):
        with pytest.raises(UserError, match=f"RUN: its weights do not fit a tokenizer of another .*{what}"):
            make(**changes).init_from(video if "group" in changes else image, "RUN")


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    frames = FrameTokenizer(fps=4)
    frames.bind({"image": (image := make())})
    built = build_vocab({"image": image, "video": frames})
    return Vocab.from_manifest(built.to_manifest())


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 256])
def test_documents_come_back_exactly(vocab, frames):
    grids = 1 + -(-(frames - 1) // GROUP)
    codes = np.random.default_rng(frames).integers(0, 64, (grids, 2, 3))
    document = Document((Segment("video", codes, facts=(7, frames)), Segment("image", codes[0])))
    assert vocab.decode(vocab.encode(document)) == document
    wrong = frames - 1 if frames % GROUP == 2 else frames + 1 if frames % GROUP == 1 else None
    if wrong:
        with pytest.raises(UserError, match=f"{grids} grids of codes for {wrong} frames"):
            vocab.encode(Document((Segment("video", codes, facts=(7, wrong)),)))


@pytest.mark.parametrize("budget", [9, 12, 30, 101])
def test_any_allowed_tokens_end_within_a_budget(vocab, budget):
    grammar = Grammar(vocab)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        row, ids = Row(grammar, budget), [vocab.bos]
        while row.state != "done":
            allowed = row.allowed()
            low, high = allowed[int(rng.integers(len(allowed)))]
            ids.append(int(rng.integers(low, high)))
            row.advance(ids[-1])
        assert len(ids) - 1 <= budget
        vocab.decode(np.array(ids))


def write_clips(folder, count: int = 4) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.full((3 + 2 * number, 40, 40, 3), 255 * (number % 2), np.uint8)
        for index, frame in enumerate(pixels):
            frame[8:20, 4 * (index % 7) : 4 * (index % 7) + 8] = rng.integers(256, size=3)
        first, *rest = [Image.fromarray(frame) for frame in pixels]
        first.save(folder / f"{number}.webp", save_all=True, append_images=rest, duration=250, lossless=True)
    Image.fromarray(pixels[0]).save(folder / "still.png")


def test_samples_are_stretches_of_videos_and_still_images(tmp_path):
    write_clips(tmp_path / "clips")
    (tmp_path / "clips" / "torn.gif").write_bytes(b"GIF89a")
    data = VideoDataset(str(tmp_path / "clips"), size=32, frames=5, fps=4, flip=False, seed=0)
    samples = {data.files[i].label.name: data[0, i] for i in range(len(data)) if data.files[i].label.name != "torn.gif"}
    assert len(samples) == 5
    assert all(sample.shape == (5, 3, 32, 32) for sample in samples.values())
    assert torch.equal(samples["still.png"][0], samples["still.png"][4])
    assert torch.equal(samples["0.webp"][2], samples["0.webp"][4])  # of three frames, the last one stays
    assert not torch.equal(samples["0.webp"][0], samples["0.webp"][2])
    again = VideoDataset(str(tmp_path / "clips"), size=32, frames=5, fps=4, flip=False, seed=0)
    assert all(torch.equal(again[3, i], data[3, i]) for i in range(len(data)))


FIT = """
model:
  class_path: unitok.training.ImageTokenizerTraining
  init_args:
    steps: 6
    quantize_start: 0.3
    losses: {perceptual: multiscale, gradient: 0.1}
    gan: {start: 0.6, disc_only: 0.1, ramp: 0.1, width: 8}
    tokenizer: {ch: 32, ch_mult: [1], patch: 8, resolution: 32, z_channels: 16, codebook_size: 16, group: 4}
data:
  class_path: unitok.data.VideoFiles
  init_args: {size: 32, frames: 5, fps: 4, batch_size: 2}
trainer: {accelerator: cpu}
"""


def test_from_files_to_generated_videos(bundle_folder, tmp_path):
    write_clips(clips := tmp_path / "clips")
    (tmp_path / "fit.yaml").write_text(FIT)
    words = ["fit", "--config", str(tmp_path / "fit.yaml"), "--out", str(tmp_path / "run")]
    main([*words, "--data.init_args.path", str(clips), "--data.init_args.val_path", str(clips)])
    parts = {"text": bundle_folder, "image": tmp_path / "run"}
    make_bundle(tmp_path / "bundle", parts, add=["video:fps=4"])
    (clips / "still.png").unlink()
    (clips / "documents.jsonl").write_text(
        "".join(
            json.dumps({"content": [{"type": "text", "text": f"clip {n}"}, {"type": "video", "path": f"{n}.webp"}]}) + "\n"
            for n in range(4)
        )
    )
    tokenize(Plan(str(clips / "documents.jsonl"), str(tmp_path / "tokens"), str(tmp_path / "bundle")))
    documents = [TokenDataset(tmp_path / "tokens").document(number) for number in range(4)]
    assert sorted((len(d.segments[1].codes), d.segments[1].facts) for d in documents) == [
        (2, (4, 3)),
        (2, (4, 5)),
        (3, (4, 7)),
        (3, (4, 9)),
    ]
    decoder = ["fit", "--config", "decoder/tiny.yaml", "--out", str(tmp_path / "decoder"), "--model.init_args.minutes", "null"]
    main(
        [
            *decoder,
            "--model.init_args.steps",
            "2",
            "--data.init_args.path",
            str(tmp_path / "tokens"),
            "--data.init_args.batch_size",
            "1",
        ]
    )
    parts = {"model": tmp_path / "decoder", "text": tmp_path / "bundle", "image": tmp_path / "bundle"}
    make_bundle(tmp_path / "whole", parts, add=["video:fps=4"])
    u = Unitok.from_pretrained(tmp_path / "whole")
    plan = "video:4x7x2x3"
    (made,) = u.generate([["clip"]], plan, seed=0)
    assert made.videos[0].frames.shape == (7, 3, 16, 24)
    chunks = [each.content for each in u.stream(["clip"], plan, seed=0) if isinstance(each, Chunk)]
    counts = [len(video.frames) for video in chunks]
    assert counts[-1] == 7
    assert counts == sorted({*counts} & {1, 5, 7})  # whole groups, each once
    torch.testing.assert_close(chunks[-1].frames, made.videos[0].frames)
    given = Video(video_of(7), 4)
    (continued,) = u.generate([["clip", given]], "video", prefix_fraction=0.3, seed=0)
    first = u.image.decode(u.image.encode(given.frames[:1]))[0]
    torch.testing.assert_close(continued.videos[0].frames[0], first)
    (output,) = u.fill(given, (0.5, 0.75))  # frame 2, whose grid is made anew
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(output.videos[0].frames[others], given.frames[others])


def test_flicker_is_what_changes_between_frames():
    video = (video_of(6) + 1) / 2
    assert video_scores(video, video)["flicker"] == 0
    assert video_scores((video + 0.1).clamp(0, 2), video)["flicker"] == pytest.approx(0, abs=1e-4)  # lighter, and as steady
    blinking = video.clone()
    blinking[1::2] += 0.1
    assert video_scores(blinking, video)["flicker"] == pytest.approx(25.5)
    assert video_scores(video[:1], video[:1])["flicker"] is None


def test_a_folder_of_videos_is_measured(tmp_path, capsys):
    make().save_pretrained(tmp_path / "image")
    write_clips(tmp_path / "clips")
    main(
        [
            "eval",
            "video-tokenizer",
            str(tmp_path / "image"),
            str(tmp_path / "clips"),
            "--fps",
            "4",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "videos.jsonl").read_text().splitlines()]
    assert {row["file"]: row.get("frames") for row in rows if "frames" in row} == {
        "0.webp": 3,
        "1.webp": 5,
        "2.webp": 7,
        "3.webp": 9,
    }
    assert "a single frame" in rows[-1]["error"]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["frames_per_grid"] == GROUP
    assert scores["codes_per_second"] == sum(row.get("codes", 0) for row in rows) / scores["seconds"]
    assert "codes_per_second" in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").read_text().count("<img") == 4 * 4
    main(
        [
            "eval",
            "video-tokenizer",
            str(tmp_path / "image"),
            str(tmp_path / "clips"),
            "--limit",
            "2",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["videos"] == 2  # into its own folder again
