"""Promises of audio files: all of a file is read, at its true length and from the right places, or one line says why not."""

import errno
import io
import struct

import numpy as np
import pytest
import soundfile

from unitok.errors import UserError
from unitok.media import AudioFile, audio_seconds, audio_streams, open_audio, read_audio_blocks, read_clip
from unitok.media.byte_source import ByteSource
from unitok.media.mpeg import mpeg_frames

RATE = 8000
INFO = b"LIST" + (13).to_bytes(4, "little") + b"INFOISFT\1\0\0\0a" + b"\0"


def sweep(seconds: float = 3.0, rate: int = RATE) -> np.ndarray:
    t = np.arange(round(rate * seconds)) / rate
    return (0.4 * np.sin(2 * np.pi * (200 + 150 * t) * t)).astype(np.float32)


def encoded(format: str, samples: np.ndarray | None = None, rate: int = RATE, **how) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, sweep(rate=rate) if samples is None else samples, rate, format=format, **how)
    return buffer.getvalue()


def decoded(data: bytes, name: str = "a") -> np.ndarray:
    """[T, C], which must be as long as the file is said to be."""
    with open_audio(name, data) as file:
        samples = file.read()
        assert len(samples) == file.frames
        assert audio_seconds(name, data) == file.frames / file.samplerate
    return samples


def variable_mp3(rate: int = RATE) -> bytes:
    """An MP3 of variable rate, with a header that says how long it is; in silence its frames are small."""
    samples = sweep(rate=rate)
    samples[rate : 2 * rate] = 0
    return encoded("MP3", samples, rate, bitrate_mode="VARIABLE", compression_level=0.4)


def without_header(mp3: bytes) -> bytes:
    size = mpeg_frames()[mp3[1] << 8 | mp3[2]][0]
    assert b"Xing" in mp3[:size] or b"Info" in mp3[:size]
    return mp3[size:]


# ---- Cut off --------------------------------------------------------------------------------------------------------

#: Formats whose files do not say how long they are, or say it where we do not look.
NO_LENGTH = {"VOC", "PAF", "PVF", "IRCAM", "MAT4", "MAT5", "XI", "RAW", "SD2"}


def test_half_a_file_of_any_format_is_no_file():
    files = {name: encoded(name) for name in set(soundfile.available_formats()) - NO_LENGTH - {"WVE"}}
    files |= {
        "RIFX": encoded("WAV", endian="BIG"),
        "WVE": encoded("WVE", subtype="ALAW"),
        "ADPCM": encoded("WAV", subtype="MS_ADPCM"),
        "Opus": encoded("OGG", subtype="OPUS"),
        "variable MP3": variable_mp3(),
        "MP3 without a header": without_header(encoded("MP3", bitrate_mode="CONSTANT")),
    }
    assert len(files) > 20
    told = {
        "WAV",
        "AIFF",
        "AU",
        "CAF",
        "W64",
        "RF64",
        "RIFX",
        "FLAC",
        "OGG",
        "Opus",
        "MP3",
        "variable MP3",
        "MP3 without a header",
    }
    frame = mpeg_frames()[int.from_bytes(files["MP3 without a header"][1:3], "big")][0]
    for name, data in files.items():
        for share in (0.5, 0.93):
            stop = round(len(data) * share)
            if name == "MP3 without a header":  # which promises nothing but its last frame
                stop = stop // frame * frame + frame // 2
            with pytest.raises(UserError, match=r"^a\.x: (audio that is cut off|damaged audio|not readable)") as caught:
                taken(data[:stop], name)
            assert name not in told or "cut off" in str(caught.value), (name, caught.value)
    with pytest.raises(
        UserError, match=r"a: audio that is cut off: its header says 3.00 s, 1.50 s can be decoded; replace it or leave it"
    ):
        decoded(files["WAV"][: len(files["WAV"]) // 2])
    with pytest.raises(UserError, match=r"its header says 3\.\d\d s, 1\.\d\d s can be decoded"):
        decoded(files["variable MP3"][: round(len(files["variable MP3"]) * 0.6)])


def taken(data: bytes, name: str) -> None:
    decoded(data, "a.x")
    pytest.fail(f"part of {name} was taken for all")


def test_a_cut_file_is_told_before_it_is_cut_into_segments():
    for data in (variable_mp3(), encoded("FLAC"), encoded("OGG"), encoded("WAV")):
        with pytest.raises(UserError, match="cut off"):
            audio_seconds("a", data[: len(data) // 2])


def test_damage_ends_in_samples_or_in_one_line():
    files = [encoded(name) for name in ("WAV", "AIFF", "AU", "CAF", "W64", "RF64", "NIST", "FLAC", "OGG", "SVX")]
    files += [variable_mp3(), without_header(variable_mp3()), encoded("AU", endian="LITTLE")]
    rng, whole, refused = np.random.default_rng(0), 0, []
    for data in files:
        for at in (*range(0, 60, 4), *rng.integers(60, len(data), 4)):
            noise = rng.integers(0, 256, 40, dtype=np.uint8).tobytes()
            for broken in (
                data[:at],
                data[:at] + noise + data[at + 40 :],
                data[:at] + bytes(8) + data[at + 8 :],
                data[:at] + data[at + 7 :],
            ):
                try:
                    decoded(broken)
                    whole += 1
                except UserError as error:
                    refused.append(str(error))
    assert whole > 100
    assert len(refused) > 100
    assert not any("\n" in line for line in refused)


def test_wav_of_16_bits_is_read_as_libsndfile_reads_it(monkeypatch):
    rng = np.random.default_rng(0)
    plain = [encoded("WAV", rng.uniform(-1, 1, (count, channels))) for count in (1, 7, 100) for channels in (1, 2, 3)]
    wave = plain[3]
    for before, after in ((INFO, b""), (b"", INFO), (INFO + INFO, INFO)):
        body = wave[8:36] + before + wave[36:] + after
        plain.append(b"RIFF" + len(body).to_bytes(4, "little") + body)
    assert all(audio_streams.find_pcm(ByteSource("a", data)) for data in plain)

    def outcome(data: bytes) -> object:
        try:
            with open_audio("a", data) as file:
                return file.samplerate, file.format, file.read().tolist()
        except UserError as error:
            return "no audio" if "no rate of audio" in str(error) or "SF_INFO" in str(error) else str(error)

    files = list(plain)
    for _ in range(1500):
        damaged = bytearray(plain[rng.integers(len(plain))])
        for at in rng.integers(0, min(len(damaged), 80), rng.integers(4)):
            damaged[at] = rng.choice([0, 1, 2, 255, rng.integers(256)])
        files.append(bytes(damaged[: None if rng.random() < 0.8 else rng.integers(12, len(damaged))]))
    ours = [outcome(data) for data in files]
    monkeypatch.setattr(audio_streams, "find_pcm", lambda source: None)
    assert ours == [outcome(data) for data in files]


class Slow(io.FileIO):
    """A file that gives few bytes at a time, as network file systems may."""

    def read(self, size: int = -1) -> bytes:
        return super().read(min(size, 999))


class Broken(io.FileIO):
    """A file on a disk that fails beyond the header."""

    def read(self, size: int = -1) -> bytes:
        if self.tell() > 40:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def test_wav_on_a_slow_disk_is_read_whole_and_on_a_broken_one_is_named(tmp_path):
    path, samples = tmp_path / "a.wav", sweep()
    path.write_bytes(encoded("WAV", samples))
    for kind in (Slow, Broken):
        source = ByteSource(path)
        source.file.close()
        source.file = kind(path)
        with AudioFile("a.wav", source, audio_streams.streams_of(source)) as file:
            if kind is Slow:
                assert np.allclose(file.read()[:, 0], samples, atol=1e-4)
            else:
                with pytest.raises(UserError, match=r"^a.wav: damaged audio \(.*Input/output error"):
                    file.read()


# ---- One after another ----------------------------------------------------------------------------------------------

COVER = bytes(range(256)) * 40  # holds no frame
PICTURE = b"APIC" + struct.pack(">I", len(COVER)) + b"\0\0" + COVER
SIZE = bytes(len(PICTURE) >> shift & 127 for shift in (21, 14, 7, 0))
TAG = b"ID3\3\0\0" + SIZE + PICTURE
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 82, 1, 0xA0000000) + bytes(8 + 50)
APE += b"APETAGEX" + struct.pack("<IIII", 2000, 82, 1, 0x80000000) + bytes(8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: encoded("OGG"),
        lambda: encoded("OGG", subtype="OPUS"),
        lambda: encoded("WAV"),
        lambda: encoded("WAV", endian="BIG"),
        lambda: encoded("AIFF"),
        lambda: encoded("AU"),
        lambda: encoded("CAF"),
        lambda: encoded("W64"),
        lambda: encoded("FLAC"),
        variable_mp3,
        lambda: TAG + variable_mp3(),
    ],
)
def test_streams_one_after_another_are_all_read(make):
    one = make()
    both = np.concatenate([decoded(one)] * 2)
    assert np.array_equal(decoded(one + one), both)
    with open_audio("a", one + one) as file:  # across the seam, and back
        middle = len(both) // 2
        for start in (middle - 100, middle + 50, 0):
            file.seek(start)
            np.testing.assert_allclose(file.read(200), both[start : start + 200], atol=1e-6)


def test_streams_of_different_rates_are_refused():
    with pytest.raises(UserError, match=r"a.ogg: its streams differ \(8000 Hz, 1 channels; then 16000 Hz, 1\); convert it"):
        decoded(encoded("OGG") + encoded("OGG", rate=16_000), "a.ogg")


@pytest.mark.parametrize("before", [b"", TAG, TAG + TAG, APE, bytes(700)])
@pytest.mark.parametrize("after", [b"", b"TAG" + bytes(125), APE, bytes(3000)])
def test_tags_and_images_change_no_sample(before, after):
    for mp3 in (variable_mp3(), without_header(variable_mp3())):
        assert np.array_equal(decoded(before + mp3 + after), decoded(mp3))
    if before[:3] != b"APE" and before[:1] != b"\0":
        flac = encoded("FLAC")
        assert np.array_equal(decoded(before + flac), decoded(flac))


# ---- Unknown lengths ------------------------------------------------------------------------------------------------


def endless() -> dict[str, bytes]:
    """Files as programs write them to a pipe, without knowing how long they will be."""

    def with_fields(data: bytes, *fields: tuple[int, bytes]) -> bytes:
        for at, value in fields:
            data = data[:at] + value + data[at + len(value) :]
        return data

    wav, aiff, flac = encoded("WAV"), encoded("AIFF"), encoded("FLAC")
    au, caf, w64 = encoded("AU"), encoded("CAF"), encoded("W64")
    assert wav[36:40] == b"data"
    info = int.from_bytes(flac[18:26], "big") >> 36 << 36
    caf_data, w64_data = caf.find(b"data"), w64.find(b"data\xf3\xac")
    frames, sound = aiff.find(b"COMM") + 10, aiff.find(b"SSND") + 4
    return {
        "WAV, all ones": with_fields(wav, (4, b"\xff" * 4), (40, b"\xff" * 4)),
        "WAV, zeros": with_fields(wav, (4, bytes(4)), (40, bytes(4))),
        "WAV, no data size": with_fields(wav, (40, bytes(4))),
        "WAV, as sox": with_fields(wav, (4, b"\x24\xf0\xff\x7f"), (40, b"\0\xf0\xff\x7f")),
        "AIFF": with_fields(aiff, (4, bytes(4)), (frames, bytes(4)), (sound, bytes(4))),
        "AU": with_fields(au, (8, b"\xff" * 4)),
        "CAF": with_fields(caf, (caf_data + 4, b"\xff" * 8)),
        "W64": with_fields(w64, (16, b"\xff" * 8), (w64_data + 16, b"\xff" * 7 + b"\x7f")),
        "FLAC": with_fields(flac, (18, info.to_bytes(8, "big"))),
        "MP3": without_header(variable_mp3()),
    }


@pytest.mark.parametrize("name", endless())
def test_files_that_do_not_say_how_long_they_are_are_read_to_their_end(name, tmp_path):
    data, whole = endless()[name], sweep()
    (tmp_path / "a").write_bytes(data)
    for once in (decoded(data), decoded(None, tmp_path / "a")):
        if name == "MP3":
            assert 0 <= len(once) - len(whole) < 3000
        else:
            assert len(once) == len(whole)
            assert np.abs(once[:, 0] - whole).max() < 1e-4
    twice = decoded(data + data)  # two MP3s without headers are one stream, and its decoder's delay comes once
    assert len(twice) == 2 * len(once) or (name == "MP3" and 0 <= len(twice) - 2 * len(once) < 1152)


def test_an_mp3_without_a_header_is_as_long_as_with_it():
    with_it, without = decoded(variable_mp3(44_100)), decoded(without_header(variable_mp3(44_100)))
    assert len(with_it) == 3 * 44_100
    delay = len(without) - len(with_it)  # of encoder and decoder, which only the header tells
    assert 0 <= delay < 3000
    shift = min(range(delay + 1), key=lambda n: float(np.abs(without[n : n + 40_000] - with_it[:40_000]).max()))
    assert np.abs(without[shift : shift + len(with_it)] - with_it).max() < 1e-3


# ---- Places ---------------------------------------------------------------------------------------------------------

PLACES = {
    "WAV": ({}, 0.0),
    "FLAC": ({}, 0.0),
    "WAV, GSM": ({"subtype": "GSM610"}, 0.0),  # libsndfile cannot seek in it
    "WAV, ADPCM": ({"subtype": "IMA_ADPCM"}, 0.0),
    "OGG": ({}, 1e-6),
    "OGG, Opus": ({"subtype": "OPUS"}, 2e-3),
    "MP3, variable": ({"bitrate_mode": "VARIABLE", "compression_level": 0.4}, 1e-5),
    "MP3, constant": ({"bitrate_mode": "CONSTANT"}, 1e-5),
}


@pytest.mark.parametrize("name", PLACES)
def test_pieces_are_the_stretches_of_the_whole(name):
    how, tolerance = PLACES[name]
    rng, rate = np.random.default_rng(0), 16_000
    tone = sweep(9, rate)
    tone[2 * rate : 5 * rate] += 0.1 * rng.standard_normal(3 * rate)  # frames of many sizes
    data = encoded(name.partition(",")[0], tone.clip(-1, 1), rate, **how)
    whole = decoded(data)[:, 0]
    assert abs(len(whole) - len(tone)) < 3000
    assert np.array_equal(np.concatenate([b[0] for b in read_audio_blocks("a", rate, 1, 0.3, data)]), whole)
    starts = [*rng.uniform(0, 8.4, 6), 8.45, 0.0, 0.01]  # the last page, the beginning
    with open_audio("a", data) as same:
        for start in starts:
            with open_audio("a", data) as fresh:
                for file in (same, fresh):
                    piece = read_clip(file, "a", (start, start + 0.5))[0].numpy()
                    expected = whole[round(start * rate) : round((start + 0.5) * rate)]
                    assert len(piece) == len(expected)
                    assert np.abs(piece - expected).max() <= tolerance, start


# ---- Levels ---------------------------------------------------------------------------------------------------------


def test_levels_over_one_are_clipped_and_those_of_integers_refused():
    tone = sweep()
    loud = decoded(encoded("WAV", tone * 4, subtype="FLOAT"))[:, 0]
    assert np.array_equal(loud, (tone * 4).clip(-1, 1))
    with pytest.raises(
        UserError, match=r"a: float samples up to 13\d\d\d(\.\d+)?, beyond \[-1, 1\]; scale them, 16-bit ones by 1 / 32768"
    ):
        decoded(encoded("WAV", tone * 32768, subtype="FLOAT"))
    for value in (np.nan, np.inf):
        broken = tone.copy()
        broken[7] = value
        with pytest.raises(UserError, match="a: samples that are not finite numbers"):
            decoded(encoded("WAV", broken, subtype="FLOAT"))


@pytest.mark.parametrize(
    ("rate", "channels", "subtype", "count"), [(100, 1, "PCM_16", 50), (192_000, 6, "PCM_24", 999), (8000, 2, "PCM_U8", 1)]
)
def test_any_rate_depth_and_channel_count_is_audio(rate, channels, subtype, count):
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (count, channels))
    found = decoded(encoded("WAV", samples, rate, subtype=subtype))
    assert found.shape == (count, channels)
    assert np.abs(found - samples).max() < 0.01


def test_a_suffix_of_raw_samples_does_not_hide_what_a_file_is(tmp_path):
    (tmp_path / "a.raw").write_bytes(encoded("WAV"))
    with open_audio(tmp_path / "a.raw") as file:
        assert file.frames == 3 * RATE
