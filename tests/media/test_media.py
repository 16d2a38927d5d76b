"""Promises of media: any image and any audio that people have, or one clear line naming the file."""

import io

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from unitok.errors import UserError
from unitok.media import (
    convert_audio,
    crop_square,
    fit_image,
    load_audio,
    load_image,
    load_text,
    save_audio,
    save_image,
    save_text,
    sniff,
)


def gradient(width=20, height=12) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 0 * x + 128], -1).astype(np.uint8)


MODES = ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16", "I", "F", "YCbCr"]


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_loads_as_what_a_viewer_shows(tmp_path, mode):
    rgb = Image.fromarray(gradient())
    path = tmp_path / "picture.file"  # the suffix must not matter
    if mode in ("I;16", "I", "F"):
        gray = np.asarray(rgb.convert("L"))
        image = Image.fromarray(
            gray.astype(np.uint16) * 257
            if mode == "I;16"
            else gray.astype(np.int32) * 257
            if mode == "I"
            else gray / np.float32(255)
        )
    else:
        image = rgb.convert(mode)
    image.save(path, format="TIFF" if mode in ("CMYK", "F", "I", "YCbCr", "LA") else "PNG")
    pixels = load_image(path)
    assert pixels.shape == (3, 12, 20)
    shown = np.asarray(rgb.convert("L" if mode in ("L", "LA", "I;16", "I", "F") else mode).convert("RGB"), np.float32)
    difference = ((pixels.numpy() + 1) * 127.5 - shown.transpose(2, 0, 1)).__abs__()
    assert difference.max() < (2 if mode not in ("CMYK", "YCbCr") else 8)


def test_transparency_is_shown_over_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = load_image(tmp_path / "a.png")
    assert pixels[:, :2].max() == -1
    assert pixels[:, 2:].min() == 1


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(gradient(20, 12))
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = load_image(tmp_path / "a.jpg")
    assert pixels.shape == (3, 20, 12)
    upright = torch.from_numpy(np.rot90(gradient(20, 12), -1).copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert (pixels - upright).abs().mean() < 0.03


def test_png_is_exact_both_ways(tmp_path):
    save_image(tmp_path / "a.png", gradient())
    pixels = load_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png", pixels)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), gradient())


def test_fitting_keeps_aspect_and_never_enlarges():
    big = Image.new("RGB", (3000, 1000))
    small = fit_image(big, 64 * 64, 512)
    assert small.width * small.height <= 64 * 64 * 1.02
    assert abs(small.width / small.height - 3) < 0.1
    assert fit_image(Image.new("RGB", (5, 4)), 64 * 64, 512).size == (5, 4)
    assert max(fit_image(Image.new("RGB", (9000, 2)), 64 * 64, 512).size) == 512
    assert crop_square(Image.new("RGB", (70, 30)), 32).size == (32, 32)


@pytest.mark.parametrize(
    ("name", "content"),
    [("notes.png", b"this is text"), ("cut.png", None), ("zeros.png", bytes(100)), ("empty.png", b"")],
)
def test_what_is_not_an_image_is_one_line_naming_the_file(tmp_path, name, content):
    if content is None:
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
        content = buffer.getvalue()[:1000]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: not a readable image") as caught:
        load_image(tmp_path / name)
    assert "\n" not in str(caught.value)


FORMATS = [("WAV", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")]  # fmt: skip


@pytest.mark.parametrize(("container", "subtype"), FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (44_100, 2)])
def test_audio_of_any_format_loads_with_its_rate(tmp_path, container, subtype, rate, channels):
    t = np.arange(rate // 2) / rate
    wave = np.stack([0.5 * np.sin(2 * np.pi * (300 + 100 * c) * t) for c in range(channels)], -1)
    path = tmp_path / "sound.file"
    soundfile.write(path, wave, rate, format=container, subtype=subtype)
    assert sniff(path) == "audio"
    samples, read = load_audio(path)
    assert read == rate
    assert samples.shape[0] == channels
    assert abs(samples.shape[1] - len(wave)) < 3000
    assert abs(samples.abs().max().item() - 0.5) < 0.1


def test_resampling_keeps_the_tone_and_the_length():
    t = torch.arange(44_100) / 44_100
    tone = torch.sin(2 * torch.pi * 440 * t)[None].repeat(2, 1)
    out = convert_audio(tone, 44_100, 8000, 1)
    assert out.shape == (1, 8000)
    assert torch.fft.rfft(out[0]).abs().argmax() == 440
    assert convert_audio(out, 8000, 8000, 2).shape == (2, 8000)


def test_what_is_not_audio_is_one_line_naming_the_file(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF----WAVE")
    with pytest.raises(UserError, match=r"a.wav: not readable audio"):
        load_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 1)), 8000)
    with pytest.raises(UserError, match=r"none.wav: audio of zero length"):
        load_audio(tmp_path / "none.wav")
    with pytest.raises(UserError, match=r"gone.wav: no such file"):
        load_audio(tmp_path / "gone.wav")


def test_wav_is_exact_to_16_bits_and_clips(tmp_path):
    wave = np.array([[0.0, 0.25, -0.5, 1.5, -2.0]], np.float32)
    save_audio(tmp_path / "a.wav", wave, 8000)
    samples, _ = load_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(samples.numpy(), np.clip(wave, -1, 1), atol=1 / 32000)


def test_text_is_exact_and_must_be_utf8(tmp_path):
    save_text(tmp_path / "a.txt", "naïve\r\n\x00 text\u2028")
    assert load_text(tmp_path / "a.txt") == "naïve\r\n\x00 text\u2028"
    (tmp_path / "b.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_text(tmp_path / "b.txt")


def test_content_decides_what_a_file_is(tmp_path):
    save_image(tmp_path / "picture.txt", gradient())
    save_audio(tmp_path / "sound.png", np.zeros((1, 10), np.float32), 8000)
    (tmp_path / "words.wav").write_text("héllo " * 1000)
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    found = [sniff(tmp_path / n) for n in ("picture.txt", "sound.png", "words.wav", "noise")]
    assert found == ["image", "audio", "text", None]
