"""Twenty clips of FFmpeg's test sources and filters, in many containers, through tokenization and back: sizes and lengths are exact."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import av
import pytest
from clips import turned
from PIL import Image

from unitok import Unitok
from unitok.bundle import make_bundle
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import detokenize, tokenize
from unitok.data.shards import TokenDataset
from unitok.media import open_video
from unitok.modalities.video import frames_of
from unitok.tokenizers import ImageTokenizer

FPS = 5  # frames per second that are taken
AREA = 32 * 32  # of a frame, at most


@dataclass
class Shot:
    """A clip: its file, what FFmpeg's filters draw, its codec, that of its audio, degrees by which a player turns it, and one in how many
    frames is left out, so that the rate varies (0: none)."""

    file: str
    drawn: str
    codec: str = "libx264"
    audio: str = ""
    degrees: int = 0
    left_out: int = 0


SHOTS = [
    Shot("bars.mp4", "smptebars=size=64x48:rate=10:duration=2", audio="aac"),
    Shot("test.mp4", "testsrc2=size=50x38:rate=25:duration=1.4"),
    Shot("upright.mp4", "testsrc2=size=64x36:rate=10:duration=1", degrees=90),
    Shot("head-over.mp4", "testsrc=size=64x36:rate=10:duration=1", degrees=180),
    Shot("left.mp4", "testsrc=size=48x36:rate=10:duration=1", degrees=270),
    Shot("varying.mp4", "testsrc2=size=32x32:rate=20:duration=2", left_out=3),
    Shot("mandelbrot.webm", "mandelbrot=size=64x64:rate=15:end_pts=30,trim=duration=1", "libvpx-vp9", "libopus"),
    Shot("life.webm", "life=size=40x30:rate=10:seed=1,trim=duration=1.5,format=yuv420p", "libvpx"),
    Shot("odd.webm", "testsrc2=size=51x37:rate=12:duration=1", "libvpx-vp9"),
    Shot("cells.mkv", "cellauto=size=64x48:rate=10:seed=1,trim=duration=1,format=yuv420p"),
    Shot("gradients.mkv", "gradients=size=64x64:rate=13:duration=2:seed=1,format=yuv420p", audio="aac"),
    Shot("slow.mkv", "testsrc=size=64x48:rate=30:duration=1", "libvpx-vp9", left_out=4),
    Shot("colors.mkv", "rgbtestsrc=size=33x45:rate=7:duration=1,format=yuv444p", "ffv1"),
    Shot("yuv.avi", "yuvtestsrc=size=64x48:rate=10:duration=1,format=yuv422p", "huffyuv"),
    Shot("motion.avi", "testsrc2=size=48x32:rate=24:duration=1,format=yuvj420p", "mjpeg"),
    Shot("hue.mov", "testsrc2=size=64x48:rate=24:duration=1,hue=H=2*PI*t", audio="aac"),
    Shot("blur.mov", "testsrc=size=64x48:rate=10:duration=1,negate", "mpeg4"),
    Shot("wide.mp4", "testsrc2=size=160x20:rate=10:duration=1"),
    Shot("tall.mp4", "testsrc2=size=20x160:rate=10:duration=1,rotate=t/4"),
    Shot("one.mp4", "color=red:size=32x32:rate=10:duration=0.1"),
]


def film(shot: Shot, folder: Path) -> tuple[tuple[int, int], float]:
    """Write a clip. Returns: width and height as a player shows them, and its seconds."""
    with av.open(shot.drawn, format="lavfi") as source, av.open(str(folder / shot.file), "w") as file:
        drawn = source.streams.video[0]
        stream = file.add_stream(shot.codec, rate=drawn.average_rate)
        stream.width, stream.height = drawn.width, drawn.height
        stream.pix_fmt = drawn.pix_fmt if "format=" in shot.drawn else "yuv420p"
        sound = file.add_stream(shot.audio, rate=48_000) if shot.audio else None
        for number, frame in enumerate(source.decode(video=0)):
            if not shot.left_out or number % shot.left_out != 1:
                again = frame.reformat(format=stream.pix_fmt)
                again.pts, again.time_base = number, 1 / drawn.average_rate
                file.mux(stream.encode(again))
        file.mux(stream.encode(None))
        seconds = float((number + 1) / drawn.average_rate)
        if sound is not None:
            with av.open(f"sine=frequency=440:sample_rate=48000:duration={seconds / 2}", format="lavfi") as tone:
                for frame in tone.decode(audio=0):
                    file.mux(sound.encode(frame))
            file.mux(sound.encode(None))
        size = drawn.width, drawn.height
    if shot.degrees:
        path = folder / shot.file
        path.write_bytes(turned(path.read_bytes(), shot.degrees))
    return (size[::-1] if shot.degrees % 180 else size), seconds


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips") / "bundle"
    make_bundle(out, {"model": bundle_folder}, add=[f"video:fps={FPS}"])
    return out


@pytest.fixture(scope="module")
def grouped(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with an image tokenizer of which four frames share a grid."""
    folder = tmp_path_factory.mktemp("clips")
    image = ImageTokenizer.from_pretrained(bundle_folder)
    of_videos = ImageTokenizer(replace(image.config, group=4))
    of_videos.init_from(image, "image")
    of_videos.save_pretrained(folder / "image")
    make_bundle(folder / "bundle", {"text": bundle_folder, "image": folder / "image"}, add=[f"video:fps={FPS}"])
    return folder / "bundle"


@pytest.mark.parametrize("which", ["bundle", "grouped"])
def test_clips_are_as_long_and_as_large_as_before(which, request, tmp_path):
    bundle = request.getfixturevalue(which)
    (tmp_path / "in").mkdir()
    shown = {shot.file: film(shot, tmp_path / "in") for shot in SHOTS}
    options = {"video": {"frames": 100, "area": AREA}}
    tokenize(Plan(str(tmp_path / "in"), str(tmp_path / "tokens"), str(bundle), options=options))
    frames = Unitok.from_pretrained(bundle).video.frames
    found = {}
    dataset = TokenDataset(tmp_path / "tokens")
    for document in map(dataset.document, range(len(dataset))):
        (video,) = (segment for segment in document.segments if segment.modality == "video")
        found[Path(video.source).name] = video
    assert sorted(found) == sorted(shown)
    for name, ((width, height), seconds) in shown.items():
        count = max(1, int(seconds * FPS + 0.5 + 1e-3))
        assert len(found[name].codes) == frames.steps(count), name
        assert found[name].facts == ((FPS,) if which == "bundle" else (FPS, count))
        assert found[name].size == frames.fit(Image.new("RGB", (width, height)), AREA, "keep").size[::-1], name  # as an image
    detokenize(tmp_path / "tokens", tmp_path / "out", bundle)
    again = sorted((tmp_path / "out").glob("*.mp4"))
    assert len(again) == len(SHOTS)
    lengths = []
    for file in again:
        with open_video(file) as video:
            lengths.append((len(list(video.frames())), video.size[::-1]))
            assert video.rate == FPS
    assert sorted(lengths) == sorted((frames_of(video), video.size) for video in found.values())


MEASURED = """
import resource, sys
from unitok.cli import main
main(sys.argv[1:])
print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


@pytest.mark.long
def test_an_hour_is_never_in_memory_as_a_whole(bundle, tmp_path):
    peaks = []
    for seconds in (300, 3600):
        folder = tmp_path / str(seconds)
        folder.mkdir()
        film(Shot("a.mp4", f"testsrc=size=64x64:rate=5:duration={seconds}"), folder)
        words = ("tokenize", str(folder), str(tmp_path / f"tokens-{seconds}"), "--bundle", str(bundle), "--workers", "1")
        done = subprocess.run([sys.executable, "-c", MEASURED, *words], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)  # MB
        dataset = TokenDataset(tmp_path / f"tokens-{seconds}")
        assert sum(len(dataset.document(i).segments[0].codes) for i in range(len(dataset))) == seconds * FPS
    print(f"peak memory: {peaks[0]:.0f} MB of five minutes, {peaks[1]:.0f} MB of an hour")
    assert peaks[1] < 1.15 * peaks[0]  # all frames of the hour are 221 MB
