"""Promises of what a file is: its content decides, text comes first, and every format that the libraries read is known."""

import builtins
import io
import struct

import numpy as np
import pytest
import soundfile
from PIL import Image

from unitok.data.prepare.fields import unrecognized
from unitok.errors import UserError
from unitok.media import open_image
from unitok.media.formats import find_media, image_format, sniff, sniff_bytes
from unitok.media.image_files import _REFUSED_FORMATS

CAPTIONS = [
    "BMW parked beside a red wall", "P5 and P6 are the numbers on the two buses", "P5 2 2 255\nabcd", "caffe latte", "FORM 1040",
    "ID3 is painted on the wall", "RIFF RAFF WAVE on a stage", "RIFF    WEBPVP8 ", "GIF89a, says the mug", "OggS in chalk",
    "fLaC on a sticker", ".snd is a suffix", "II* three stars", "MM*", "SIMPLE  =                    T", "\n\nan empty line", "icns",
    "qoif", "DDS |", "/* XPM */ in a comment", "<svg> is a tag", "#define X 3", "NIST_1A\n", "Image type: photo", "MThd", "8BPS",
    " paf", "2BIT", "APETAGEX", "TAG", "riff", "Extended Instrument: x", "ALawSoundFile**", "PVF1\n1 8000 16\nx", "x", "a\tb\r\nc",
    "日本語の説明", "صورة كلب", "naïve café", "\ufeffwith a mark", "\U0001f600", "\u200bzero width", "\u3000wide", "form\x0cfeed",
]  # fmt: skip


@pytest.mark.parametrize("caption", CAPTIONS)
def test_words_are_text_whatever_their_first_letters(caption):
    data = (caption + "\n").encode()
    for head in (data, data * 300, (data * 4096)[:4096]):
        assert sniff_bytes(head, "7.txt") == sniff_bytes(head) == "text"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_another_encoding_is_not_taken_for_media(encoding):
    for words in ("BMW", "naïve café", "words " * 1000):
        head = words.encode(encoding)[:4096]
        assert sniff_bytes(head, "a.txt") is None
        assert encoding != "utf-16" or "UTF-16 text, which is not read; convert it to UTF-8" in unrecognized(head)


# ---- Images ---------------------------------------------------------------------------------------------------------

#: Formats that Pillow writes and we do not read.
NOT_READ = {
    "EPS": "Pillow runs Ghostscript for it", "PDF": "Pillow only writes it", "PALM": "Pillow only writes it",
    "BUFR": "Pillow has no decoder", "GRIB": "Pillow has no decoder", "HDF5": "Pillow has no decoder", "WMF": "Pillow has no decoder",
}  # fmt: skip
#: Formats that need their suffix: TGA has no magic number, XBM is text.
BY_SUFFIX = {"TGA": "a.tga", "XBM": "a.xbm"}


def gradient() -> np.ndarray:
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([40 + x * 3, 220 - y * 4, 30 + x + y], -1).astype(np.uint8)


def test_every_format_that_pillow_saves_is_known_and_opens():
    Image.init()
    image, seen = Image.fromarray(gradient()), set()
    for name in sorted(set(Image.SAVE) - set(NOT_READ)):
        for mode in ("RGB", "RGBA", "L", "P", "1"):
            buffer = io.BytesIO()
            try:
                image.convert(mode).save(buffer, name)
            except (OSError, ValueError, KeyError):  # a mode that the format does not have
                continue
            data = buffer.getvalue()
            shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA").convert("RGB"))
            for file in [BY_SUFFIX.get(name, "a"), f"a.{name.lower()}"]:
                assert sniff_bytes(data[:4096], file) == "image", (name, mode, file)
                assert image_format(data[:4096], file) in (name, "JPEG")  # MPO begins as JPEG does
                opened = np.asarray(open_image(file, data))
                assert name in ("ICO", "SPIDER") or np.array_equal(opened, shown), (name, mode)  # ICO has a mask, SPIDER floats
            seen.add(name)
    assert seen == set(Image.SAVE) - set(NOT_READ)
    assert {name for name in NOT_READ if name != "PALM"} <= _REFUSED_FORMATS


def made_by_hand() -> dict[str, tuple[bytes, np.ndarray]]:
    """Formats and variants that Pillow reads and does not write: bytes, and the pixels in them."""
    rgb = gradient()
    gray = np.repeat(rgb[..., :1], 3, -1)
    image = Image.fromarray(rgb)

    def saved(name: str, picture: Image.Image = image, **how) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, name, **how)
        return buffer.getvalue()

    fits = [("SIMPLE", "T"), ("BITPIX", 8), ("NAXIS", 2), ("NAXIS1", 64), ("NAXIS2", 48)]
    cards = "".join(f"{key:8}= {value:>20}".ljust(80) for key, value in fits) + "END"
    area = [0, 4, *[0] * 6, 48, 64, 1, 0, 0, 1, *[0] * 19, 256, *[0] * 30]
    psd = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHHIIIH", 3, 48, 64, 8, 3, 0, 0, 0, 0)
    icon = saved("ICO", image.resize((32, 32)), sizes=[(32, 32)], bitmap_format="bmp")
    small = np.asarray(image.resize((32, 32)))
    return {
        "TIFF, big": (saved("TIFF", big_tiff=True), rgb),
        "TIFF, Motorola": (saved("TIFF", Image.fromarray(rgb[..., 0].astype(">u2") * 257)), gray),
        "JPEG 2000 codestream": (saved("JPEG2000", no_jp2=True), rgb),
        "P2.pgm": (b"P2\n# made\n64 48\n255\n" + " ".join(map(str, rgb[..., 0].ravel())).encode(), gray),
        "P3.PPM": (b"P3 64 48 255\n" + " ".join(map(str, rgb.ravel())).encode(), rgb),
        "P5": (b"P5\n64 48\n255\n" + rgb[..., 0].tobytes(), gray),
        "P6": (b"P6 64 48 255\n" + rgb.tobytes(), rgb),
        "Pf": (b"Pf\n64 48\n-1.0\n" + (rgb[::-1, :, 0] / 255).astype("<f4").tobytes(), gray),
        "SUN": (struct.pack(">8I", 0x59A66A95, 64, 48, 24, rgb.size, 1, 0, 0) + rgb[..., ::-1].tobytes(), rgb),
        "FITS": (cards.ljust(2880).encode() + rgb[::-1, :, 0].tobytes(), gray),
        "PSD": (psd + rgb.transpose(2, 0, 1).tobytes(), rgb),
        "CUR": (icon[:2] + b"\2" + icon[3:], small),
        "DCX": (struct.pack("<III", 0x3ADE68B1, 12, 0) + saved("PCX"), rgb),
        "GBR": (struct.pack(">5I4sI", 30, 2, 64, 48, 1, b"GIMP", 10) + b"a\0" + rgb[..., 0].tobytes(), gray),
        "MCIDAS": (struct.pack(">64i", *area) + rgb[..., 0].tobytes(), gray),
        "PIXAR": (b"\x80\xe8\0\0".ljust(416, b"\0") + struct.pack("<4H2H", 48, 64, 0, 0, 14, 2).ljust(608, b"\0") + rgb.tobytes(), rgb),
        "a.xpm": (b'/* XPM */\nstatic char *x[] = {\n"2 1 2 1",\n"a c #ff0000",\n"b c #0000ff",\n"ab"\n};\n', np.array([[[255, 0, 0], [0, 0, 255]]])),
    }  # fmt: skip


@pytest.mark.parametrize("name", made_by_hand())
def test_formats_that_pillow_only_reads_are_known_and_open(name):
    data, pixels = made_by_hand()[name]
    assert sniff_bytes(data[:4096], name) == "image"
    assert np.array_equal(np.asarray(open_image(name, data)), pixels)


def test_what_is_written_in_letters_goes_by_its_suffix():
    plain = b"P3 2 1 255\n1 2 3 4 5 6\n"
    assert [sniff_bytes(plain, n) for n in ("a.ppm", "PPM", "a.txt", "")] == ["image", "image", "text", "text"]
    svg = b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'
    assert [sniff_bytes(svg, n) for n in ("a.svg", "svg", "a.xml", "a.txt")] == ["image", "image", "text", "text"]
    assert sniff_bytes(b"<!DOCTYPE html><html>404</html>", "a.svg") == "text"  # an error page
    assert sniff_bytes(b"#define X 1\nint main() {}\n", "a.c") == "text"


# ---- Audio ----------------------------------------------------------------------------------------------------------


def test_every_format_that_soundfile_writes_is_known_and_opens():
    tone = 0.4 * np.sin(np.arange(2000) / 20)
    seen = set()
    for container in soundfile.available_formats():
        if container in ("RAW", "SD2"):  # RAW has no header, SD2 has it in a file of its own
            continue
        for subtype in soundfile.available_subtypes(container):
            for endian in ("FILE", "BIG", "LITTLE"):
                buffer = io.BytesIO()
                rate = 44_100 if container == "XI" else 8000
                try:
                    soundfile.write(buffer, tone, rate, format=container, subtype=subtype, endian=endian)
                    data = buffer.getvalue()
                    decoded = soundfile.SoundFile(io.BytesIO(data))
                    expected = decoded.read(decoded.frames, dtype="float32")
                except (soundfile.LibsndfileError, ValueError):  # a pair that it lists and does not write or read
                    continue
                for name in ["a.htk"] if container == "HTK" else ["a", f"a.{container.lower()}"]:  # HTK has no magic number
                    assert sniff_bytes(data[:4096], name) == "audio", (container, subtype, endian, name)
                samples, read = load_audio_bytes(name, data)
                assert read == decoded.samplerate
                np.testing.assert_allclose(samples[0], expected.clip(-1, 1), atol=1e-6, err_msg=f"{container} {subtype}")
                seen.add(container)
    assert seen == set(soundfile.available_formats()) - {"RAW", "SD2"}


def load_audio_bytes(name: str, data: bytes) -> tuple[np.ndarray, int]:
    from unitok.media import open_audio

    with open_audio(name, data) as file:
        return file.read().T, file.samplerate


UNREAD = {
    "a.jxl": (b"\xff\x0a\x7f\0\0", "a JPEG XL image, which is not read; convert it to PNG"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_formats_that_nobody_here_reads_are_named_with_what_to_do(name, tmp_path):
    data, line = UNREAD[name]
    (tmp_path / name).write_bytes(data)
    assert sniff(tmp_path / name) is None
    assert line in unrecognized(data)
    with pytest.raises(UserError, match=r"which is not read; convert it") as caught:
        open_image(tmp_path / name)
    assert "\n" not in str(caught.value)


# ---- Folders --------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_opened_are_left_to_who_reads_them(tmp_path, monkeypatch):
    for name in ("a.png", "a.txt", "b.png"):
        Image.fromarray(gradient()).save(tmp_path / name, "PNG")
    really = builtins.open

    def refuse(file, *a, **k):
        if str(file).endswith(("a.png", "a.txt")):
            raise PermissionError(13, "Permission denied")
        return really(file, *a, **k)

    monkeypatch.setattr(builtins, "open", refuse)
    found = find_media(tmp_path, "image")
    monkeypatch.undo()
    assert found == ([tmp_path / "a.png", tmp_path / "b.png"], [])


def test_a_folder_is_searched_with_one_open_per_file(tmp_path, monkeypatch):
    for folder in ("b", "a", ".cache"):
        (tmp_path / folder).mkdir()
        Image.fromarray(gradient()).save(tmp_path / folder / "2.png")
        (tmp_path / folder / "2.txt").write_text("BMW parked beside a red wall")
    (tmp_path / "a" / ".hidden.png").write_bytes((tmp_path / "a" / "2.png").read_bytes())
    (tmp_path / "a" / "empty.png").touch()
    (tmp_path / "a" / "empty.txt").touch()  # an empty caption is no image
    opened = []
    really = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: opened.append(str(file)) or really(file, *a, **k))
    found, empty = find_media(tmp_path, "image")
    monkeypatch.undo()
    assert found == [tmp_path / "a" / "2.png", tmp_path / "b" / "2.png"]
    assert empty == [tmp_path / "a" / "empty.png"]
    assert len(opened) == len(set(opened)) == 6
