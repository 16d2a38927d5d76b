"""Audio that only FFmpeg reads: recognized, complete, the same in pieces, and with a message where it is damaged or PyAV is missing."""

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips import clip, noise

from unitok.errors import UserError
from unitok.media import load_audio, open_audio
from unitok.media.formats import sniff
from unitok.media.video_files import write_video

RATE = 16_000
#: file -> codec, and what FFmpeg calls the format where the suffix does not say it
KINDS = {
    "a.m4a": ("aac", "ipod"),
    "a.aac": ("aac", "adts"),
    "a.ac3": ("ac3", "ac3"),
    "a.wv": ("wavpack", "wv"),
    "a.tta": ("tta", "tta"),
    "a.wma": ("wmav2", "asf"),
    "a.mka": ("aac", "matroska"),
    "a.ogg": ("flac", "ogg"),
}


def write_sound(path: Path, samples: np.ndarray, codec: str, format: str) -> None:
    """Write float samples [1, T] at RATE, or at a rate that the codec takes."""
    rate = 32_000 if codec == "ac3" else RATE
    with av.open(str(path), "w", format=format) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 96_000
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for name, (codec, format) in KINDS.items():
        write_sound(folder / name, noise(2.5, RATE), codec, format)
    write_video(folder / "v.mp4", clip(10), 4.0, noise(2.5, RATE), RATE)
    return folder


@pytest.mark.parametrize("name", [*KINDS, "v.mp4"])
def test_it_is_read_whole_and_in_pieces(sounds, name):
    assert sniff(sounds / name) == ("video" if name == "v.mp4" else "audio")
    wave, rate = load_audio(sounds / name)
    assert wave.shape[-1] / rate == pytest.approx(
        2.5, abs=0.15
    )  # some formats do not say where their sound ends in the last frame
    step = rate // RATE
    found, wanted = wave[0, ::step].numpy(), noise(2.5, RATE)[0]
    best = max(np.corrcoef(found[k : k + 20_000], wanted[:20_000])[0, 1] for k in range(0, 2400, 1))
    assert best > 0.95
    whole = wave.numpy()
    with open_audio(sounds / name) as file:
        pieces = np.concatenate([file.read(3001) for _ in range(40)]).T
        np.testing.assert_array_equal(pieces, whole)
        file.seek(rate)
        np.testing.assert_allclose(file.read(1000).T, whole[:, rate : rate + 1000], atol=2e-3)
    with open_audio(Path(name), (sounds / name).read_bytes()) as file:
        np.testing.assert_array_equal(file.read().T, whole)


def test_what_is_damaged_or_silent_says_so(sounds, tmp_path):
    data = (sounds / "a.m4a").read_bytes()
    (tmp_path / "cut.m4a").write_bytes(data[: len(data) // 2])
    (tmp_path / "cut.wv").write_bytes((sounds / "a.wv").read_bytes()[:4000])
    (tmp_path / "head.m4a").write_bytes(b"\0\0\0\x1cftypM4A \0\0\2\0")
    write_video(tmp_path / "mute.mp4", clip(4), 4.0)
    for name, message in (
        ("cut.m4a", "not readable audio"),
        ("cut.wv", "cut off|damaged"),
        ("head.m4a", "not readable audio"),
        ("mute.mp4", "no audio in it"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_audio(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_without_pyav_it_says_what_to_install(sounds, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"a\.m4a: .*pip install 'unitok-lm\[video\]'"):
        load_audio(sounds / "a.m4a")


def test_the_sound_of_a_video_is_a_part(sounds, tiny):
    (segment,) = tiny.read_prompt(load_audio(sounds / "v.mp4")).segments
    from unitok.document import Part, RawDocument

    document = tiny.read_prompt(RawDocument("x", (Part("audio", path=sounds / "v.mp4"),)))
    np.testing.assert_array_equal(document.segments[0].codes, segment.codes)
