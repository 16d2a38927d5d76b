"""Promises of video files: frames as a viewer sees them, at their times, with their sound; what is damaged says where."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips import clip, noise, turned
from PIL import Image

from unitok.errors import UserError
from unitok.media.video_files import Frame, open_video, sample_frames, write_video


def distance(images: list[Image.Image], frames: list[np.ndarray]) -> float:
    return float(np.mean([np.abs(np.asarray(a).astype(int) - b).mean() for a, b in zip(images, frames, strict=True)]))


def lag(found: np.ndarray, wanted: np.ndarray) -> int:
    """By how many samples [T] is later than [T]."""
    size = 2 * min(len(found), len(wanted))
    peaks = np.fft.irfft(np.fft.rfft(found, size) * np.fft.rfft(wanted, size).conj())
    at = int(peaks.argmax())
    return at if at < size // 2 else at - size


@pytest.mark.parametrize(
    ("name", "size"), [("a.mp4", (48, 64)), ("odd.mp4", (37, 51)), ("a.webm", (48, 64)), ("a.gif", (48, 64))]
)
@pytest.mark.parametrize("rate", [8.0, 7.5])
def test_what_is_written_comes_back_frame_by_frame_with_its_sound(tmp_path, name, size, rate):
    frames, sound = clip(16, *size), noise(16 / rate, 16_000)
    write_video(tmp_path / name, frames, rate, sound, 16_000)
    with open_video(tmp_path / name) as video:
        assert (video.size, video.problem, video.format.lower()) == (size[::-1], "", name.rpartition(".")[2])
        read = list(video.frames())
        images = list(sample_frames(read, rate))
        assert len(read) == len(images) == 16
        assert abs(read[-1].time + read[-1].duration - 16 / rate) < 0.02
        assert distance(images, frames) < 3
        late = list(video.frames(1.0))
        assert late[0].time <= 1.0 < late[0].time + late[0].duration
        assert distance([late[0].image], [np.asarray(read[16 - len(late)].image)]) == 0
        if name.endswith("gif"):
            with pytest.raises(UserError, match="without audio"):
                video.audio()
            return
        part = video.audio(0.25, 1.25)
        assert part.shape == (1, video.sample_rate)
        step = video.sample_rate // 16_000 or 1
        assert abs(lag(part[0, ::step], sound[0, 4_000:20_000])) <= 16  # a millisecond, the precision of WebM
        assert len(video.audio(0.0, 9.0)[0]) == 9 * video.sample_rate
    with open_video(Path(name), (tmp_path / name).read_bytes()) as video:
        assert len(list(video.frames())) == 16


def test_frames_of_varying_distances_are_seen_when_they_are_shown():
    shown = [Frame(time, 0.1, time) for time in (0.0, 0.05, 0.5, 0.51, 0.9)]  # type: ignore[arg-type]
    assert list(sample_frames(shown, 10)) == [0.05] * 5 + [0.51] * 4 + [0.9]
    assert list(sample_frames(shown, 10, 0.45, 0.75)) == [0.5, 0.51, 0.51]
    assert list(sample_frames(shown, 2)) == [0.05, 0.51]
    assert list(sample_frames(shown[:1], 1)) == [0.0]  # at least one
    assert not list(sample_frames([], 10))


def test_variable_rates_lying_rates_and_gaps(tmp_path):
    frames, times = clip(6), [0, 10, 500, 510, 900, 1000]  # milliseconds
    with av.open(str(tmp_path / "vfr.mkv"), "w") as file:
        stream = file.add_stream("libvpx-vp9", rate=10_000, options={"crf": "12", "b": "0", "cpu-used": "8"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for image, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    with open_video(tmp_path / "vfr.mkv") as video:
        read = list(video.frames())
        assert [round(1000 * frame.time) for frame in read] == times
        images = list(sample_frames(read, 10))
    assert distance(images, [frames[1]] * 5 + [frames[3]] * 4 + [frames[4]]) < 3


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_telephone_that_was_held_upright(tmp_path, degrees):
    write_video(tmp_path / "a.mp4", clip(3), 8)
    with open_video(Path("turned.mp4"), turned((tmp_path / "a.mp4").read_bytes(), degrees)) as video:
        wanted = [np.rot90(image, -degrees // 90) for image in clip(3)]
        assert video.size == wanted[0].shape[1::-1]
        assert distance([frame.image for frame in video.frames()], wanted) < 3


def test_animations_have_durations_of_their_own(tmp_path):
    images = [Image.fromarray(image) for image in clip(4)]
    for name, options in (("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})):
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=[100, 300, 50, 50], **options)
        with open_video(tmp_path / name) as video:
            assert [round(frame.time, 3) for frame in video.frames()] == [0.0, 0.1, 0.4, 0.45]
    images[0].save(tmp_path / "fast.gif", save_all=True, append_images=images[1:], duration=0)
    images[0].save(tmp_path / "still.png")
    with open_video(tmp_path / "fast.gif") as fast, open_video(tmp_path / "still.png") as still:
        assert [round(frame.time, 3) for frame in fast.frames()] == [0.0, 0.1, 0.2, 0.3]  # as browsers show it
        assert len(list(still.frames())) == 1


def test_what_is_damaged_gives_what_comes_before_and_says_where(tmp_path):
    frames = [np.random.default_rng(i).integers(0, 255, (48, 64, 3)).astype(np.uint8) for i in range(40)]
    write_video(tmp_path / "a.webm", frames, 10)
    data = (tmp_path / "a.webm").read_bytes()
    with open_video(Path("cut.webm"), data[: len(data) // 2]) as video:
        read = list(video.frames())
        assert 5 < len(read) < 35
        assert video.problem
    images = [Image.fromarray(image) for image in clip(8)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=100)
    with open_video(Path("cut.gif"), buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3]) as video:
        assert 1 <= len(list(video.frames())) < 8


def test_bad_files_are_one_line_that_says_what_to_do(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "whole.mp4", clip(4), 8)
    (tmp_path / "begin.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:500])
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(noise(0.5, 16_000), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    for name, problem in (
        ("empty.mp4", "not a readable video"),
        ("text.mp4", "not a readable video"),
        ("begin.mp4", "not a readable video"),
        ("sound.mp4", "no video in it, only audio"),
        ("absent.mp4", "no such file"),
        ("", "no images in this folder"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            open_video(tmp_path / name)
        assert "\n" not in str(error.value)
        assert str(tmp_path / name) in str(error.value)
