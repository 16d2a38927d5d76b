"""Promises of image files: metadata never costs an image, colors are sRGB, half an image is none, nothing outside is read."""

import io
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from unitok.errors import UserError
from unitok.media import image_files, open_image, to_rgb

#: Pillow's notes on metadata.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\..*", "ignore::PIL.Image.DecompressionBombWarning")

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def gradient(width: int = 64, height: int = 48) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([40 + x * 3, 220 - y * 4, 30 + x + y], -1).astype(np.uint8)


def saved(format: str, image: Image.Image | None = None, **how) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(gradient())).save(buffer, format, **how)
    return buffer.getvalue()


def pixels(data: bytes, name: str = "a") -> np.ndarray:
    return np.asarray(open_image(name, data)).astype(int)


# ---- Metadata -------------------------------------------------------------------------------------------------------


def chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """A PNG's chunk."""
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


PNG_CHUNKS = {
    "text of 2 MB": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"node " * 400_000)),
    "international text of 2 MB": chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
    "texts of 65 MB": chunk(b"tEXt", b"k\0" + b"x" * 900_000) * 73,
    "text with a wrong checksum": chunk(b"tEXt", b"a\0b", 1),
    "text of an unknown method": chunk(b"zTXt", b"a\0\7zzz"),
    "profile of 2 MB": chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2_000_000))),
    "profile without a name": chunk(b"iCCP", b"abc"),
    "profile of an unknown method": chunk(b"iCCP", b"a\0\5" + zlib.compress(SRGB)),
    "EXIF that is none": chunk(b"eXIf", b"\xfe" * 20),
    "gamma cut off": chunk(b"gAMA", b"\0"),
    "colors cut off": chunk(b"cHRM", bytes(8)),
    "transparency cut off": chunk(b"tRNS", b"\0"),
    "animation of no frames": chunk(b"acTL", bytes(8)),
    "a name that is none": chunk(b"a1b2", b"xx"),
    "orientation that is none": chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation="9"'),
}


@pytest.mark.parametrize("name", PNG_CHUNKS)
def test_a_png_is_its_pixels_whatever_its_other_chunks_hold(name):
    plain = saved("PNG")
    for at in (33, len(plain) - 12):  # behind IHDR, before IEND
        assert np.array_equal(pixels(plain[:at] + PNG_CHUNKS[name] + plain[at:]), gradient()), at


JPEG_SEGMENTS = {
    "EXIF that is none": b"\xff\xe1Exif\0\0not a directory at all",
    "EXIF cut off": b"\xff\xe1Exif\0\0II*\0\x08\0\0\0\x05\0",
    "profile that is none": b"\xff\xe2ICC_PROFILE\0\1\1no profile",
    "profile of which parts are missing": b"\xff\xe2ICC_PROFILE\0\1\3" + SRGB,
    "profile without numbers": b"\xff\xe2ICC_PROFILE\0",
    "Photoshop's, cut off": b"\xff\xedPhotoshop 3.0\x008BIM\x04\x04\xff",
    "JFIF cut off": b"\xff\xe0JFIF",
    "multi picture that is none": b"\xff\xe2MPF\0junk",
}


@pytest.mark.parametrize("name", JPEG_SEGMENTS)
def test_a_jpeg_is_its_pixels_whatever_its_other_segments_hold(name):
    plain, segment = saved("JPEG", quality=95), JPEG_SEGMENTS[name]
    segment = segment[:2] + struct.pack(">H", len(segment)) + segment[2:]
    for at in (2, 20):  # before and behind JFIF
        assert np.array_equal(pixels(plain[:at] + segment + plain[at:]), pixels(plain))


def test_no_damage_of_metadata_costs_an_image_in_any_format():
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Software], exif[ExifTags.Base.XResolution] = "maker", "soft" * 20, 72.0
    data = exif.tobytes()
    tiff = saved("TIFF", exif=exif, icc_profile=SRGB)
    first = int.from_bytes(tiff[4:8], "little") + 2
    tags = [first + 12 * i for i in range(int.from_bytes(tiff[first - 2 : first], "little"))]
    tags = [at for at in tags if int.from_bytes(tiff[at : at + 2], "little") in (271, 282, 305, 34675)]
    avif = saved("AVIF", exif=data)
    inside = avif.find(data[6:20])
    assert len(tags) == 4
    assert inside > 0
    plain = {
        name: pixels(saved(name, lossless=True) if name == "WEBP" else saved(name))
        for name in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")
    }
    for _ in range(40):
        bad = bytearray(data)
        for _ in range(rng.integers(1, 8)):
            bad[int(rng.integers(6, len(bad)))] = int(rng.integers(256))
        torn = bytearray(tiff)
        for at in tags:
            torn[at + 2 + int(rng.integers(10))] = int(rng.integers(256))
        files = {
            name: saved(name, exif=bytes(bad), **({"lossless": True} if name == "WEBP" else {}))
            for name in ("JPEG", "PNG", "WEBP")
        }
        files["AVIF"] = avif[:inside] + bytes(bad[6:]) + avif[inside + len(bad) - 6 :]
        files["TIFF"] = bytes(torn)
        for name, file in files.items():
            assert np.array_equal(pixels(file), plain[name]), name


def test_warnings_of_the_program_stay_as_they_were():
    exif_cut_off = saved("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(pixels, [exif_cut_off] * 40))
    assert warnings.filters == before


# ---- Ends and limits ------------------------------------------------------------------------------------------------


def noise(**how) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))


ENDINGS = {  # how files are made, bytes of their end that hold no pixels, bytes more that hold some
    "JPEG": (saved("JPEG", noise(), quality=90), 2, 1),
    "JPEG, progressive": (saved("JPEG", noise(), quality=90, progressive=True), 2, 4),
    "PNG": (saved("PNG", noise()), 20, 20),
    "PNG, palette": (saved("PNG", noise().quantize()), 20, 20),
    "GIF": (saved("GIF", noise().quantize()), 2, 4),
    "WEBP": (saved("WEBP", noise().convert("RGBA"), exif=b"Exif\0\0MM" + bytes(99)), 100, 60),
    "QOI": (saved("QOI", noise()), 8, 1),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_missing_end_marker_costs_no_image_and_missing_pixels_do(name):
    data, ending, pixel = ENDINGS[name]
    for cut in {1, ending}:
        assert np.array_equal(pixels(data[:-cut]), pixels(data)), cut
    for end in (len(data) - ending - pixel, len(data) // 2, len(data) // 10):
        with pytest.raises(UserError, match="a: not a readable image"):
            open_image("a", data[:end])


def test_an_interlaced_png_without_its_end_has_all_its_rows():
    rows = gradient(21, 13)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]  # ISO 15948 8.2
    raw = b"".join(b"\0" + row.tobytes() for x, y, right, down in passes for row in rows[y::down, x::right] if row.size)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 21, 13, 8, 2, 0, 0, 1)) + chunk(b"zTXt", b"a\0\7")
    assert np.array_equal(pixels(png + chunk(b"IDAT", zlib.compress(raw))), rows)
    with pytest.raises(UserError, match="not a readable image"):
        open_image("a", png + chunk(b"IDAT", zlib.compress(raw[:-30])))


def test_our_limit_of_pixels_holds_whatever_pillows_is(monkeypatch):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 5000)
    for pillows in (100, 5000, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        assert open_image("a", saved("PNG")).size == (64, 48)
        with pytest.raises(UserError, match=r"^a: (80 x 80|6400) pixels are too many \(limit 5000\)"):
            open_image("a", saved("PNG", Image.new("L", (80, 80))))
        assert pillows == Image.MAX_IMAGE_PIXELS


# ---- Colors ---------------------------------------------------------------------------------------------------------


def profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2 (ICC.1:2001) for a printer or monitor."""
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(
        ">I4sI4s4s4s12s4s28s12s48s", at + len(body), b"", 0x02400000, kind, space, pcs, b"", b"acsp", b"", D50, b""
    )
    return head + struct.pack(">I", len(tags)) + table + body


D50 = struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
WHITE = {b"wtpt": b"XYZ " + bytes(4) + D50}


def display_p3() -> bytes:
    """The built-in sRGB profile with the primaries of Display P3."""
    primaries = {b"rXYZ": (0.5151, 0.2412, -0.0011), b"gXYZ": (0.2920, 0.6922, 0.0419), b"bXYZ": (0.1571, 0.0666, 0.7841)}
    data = bytearray(SRGB)
    for i in range(struct.unpack_from(">I", data, 128)[0]):
        name, at, _ = struct.unpack_from(">4sII", data, 132 + 12 * i)
        if name in primaries:
            struct.pack_into(">3i", data, at + 8, *(round(v * 65536) for v in primaries[name]))
    return bytes(data)


def printer() -> bytes:
    """CMYK whose inks are far from what plain arithmetic takes them for: corners of the ink cube in Lab (lut8Type)."""
    lab = np.random.default_rng(1).integers(60, 200, (16, 3)).astype(np.uint8)
    lab[0] = 255, 128, 128  # paper
    ramp = bytes(range(256))
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + unit + ramp * 4 + lab.tobytes() + ramp * 3
    return profile(b"CMYK", {**WHITE, b"A2B0": table}, b"Lab ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_profiles_are_applied(mode):
    icc = printer() if mode == "CMYK" else display_p3()
    plain = Image.fromarray(gradient()).convert(mode)
    data = saved("TIFF" if mode in ("P", "CMYK") else "PNG", plain, icc_profile=icc)
    color = plain if mode == "CMYK" else plain.convert("RGB")
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    shown = np.asarray(ImageCms.profileToProfile(color, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))
    assert np.array_equal(pixels(data), shown)
    assert np.abs(shown.astype(int) - np.asarray(plain.convert("RGB"))).max() > 20  # what plain pixels would be


def test_a_grey_profile_is_applied_to_grey_and_alpha_stays():
    icc = profile(b"GRAY", {**WHITE, b"kTRC": b"curv" + bytes(4) + struct.pack(">I", 0)})  # values are light itself
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    light = ramp / 255
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255  # IEC 61966-2-1
    assert np.abs(pixels(saved("PNG", Image.fromarray(ramp), icc_profile=icc)) - srgb[..., None]).max() <= 1
    half = Image.merge("LA", (Image.fromarray(ramp), Image.new("L", (256, 4), 128)))
    assert np.abs(pixels(saved("PNG", half, icc_profile=icc)) - (srgb[..., None] + 255) / 2).max() <= 2


@pytest.mark.parametrize("icc", [b"no profile", bytes(200), SRGB[:300], SRGB, profile(b"GRAY", WHITE), printer()])
def test_a_profile_that_cannot_be_read_or_changes_nothing_leaves_the_pixels(icc):
    assert np.array_equal(pixels(saved("PNG", icc_profile=icc)), gradient())


def test_what_is_applied_is_not_applied_again_and_the_given_image_stays():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    given = Image.open(io.BytesIO(saved("PNG", icc_profile=display_p3(), exif=exif)))
    once = to_rgb(given)
    assert once.size == (48, 64)
    assert np.array_equal(np.asarray(to_rgb(once)), np.asarray(once))
    assert np.array_equal(np.asarray(given), gradient())
    assert given.info["icc_profile"]


# ---- Extras ---------------------------------------------------------------------------------------------------------

OPEN = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '


def svg(inside: str, attributes: str = 'width="40" height="20"', before: str = "") -> bytes:
    return f"{before}{OPEN}{attributes}>{inside}</svg>".encode()


def test_an_svg_is_drawn_at_its_size_over_white(tmp_path):
    pytest.importorskip("resvg_py")
    half = '<rect width="20" height="20" fill="red" opacity="0.5"/>'
    for data in (svg(half), svg(half, 'width="30pt" height="15pt" viewBox="0 0 40 20"'), svg(half, 'viewBox="0 0 40 20"')):
        (tmp_path / "a.svg").write_bytes(data)
        image = open_image(tmp_path / "a.svg")
        assert image.size == (40, 20)
        assert image.format == "SVG"
        assert image.getpixel((5, 5)) == pytest.approx((255, 127, 127), abs=1)
        assert image.getpixel((35, 5)) == (255, 255, 255)
    assert open_image("a.svg", svg(half, 'width="1e9" height="5e8" viewBox="0 0 40 20"')).size == (1024, 512)
    assert open_image("a.svg", svg("").replace(b'xmlns="http://www.w3.org/2000/svg"', b"")).size == (40, 20)
    entity = svg('<rect width="40" height="20" fill="&c;"/>', before='<!DOCTYPE svg [<!ENTITY c "#00ff00">]>')
    assert open_image("a.svg", entity).getpixel((0, 0)) == (0, 255, 0)


def test_an_svg_reads_nothing_outside_and_cannot_grow_without_end(tmp_path):
    pytest.importorskip("resvg_py")
    (tmp_path / "b.png").write_bytes(saved("PNG"))
    for reference in (tmp_path / "b.png", "b.png", f"file://{tmp_path}/b.png", "http://127.0.0.1:9/b.png"):
        for href in ("href", "xlink:href"):
            shown = f'<image width="40" height="20" {href}="{reference}"/>'
            with pytest.raises(UserError, match=r"a.svg: an SVG that shows another file .* is not read; embed that file"):
                open_image("a.svg", svg(shown))
            assert open_image("a.svg", svg(f'<g style="display: none">{shown}</g>')).getextrema() == ((255, 255),) * 3
    nested = svg(f'<image width="40" height="20" href="{tmp_path}/b.png"/>').decode().replace('"', "'").replace("#", "%23")
    nested = svg(f'<image width="40" height="20" href="data:image/svg+xml;utf8,{nested.replace("<", "&lt;")}"/>')
    assert open_image("a.svg", nested).getextrema() == ((255, 255),) * 3
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 9))
    bombs = [
        svg("<text>&a8;</text>", before=f'<!DOCTYPE svg [<!ENTITY a0 "xxxxxxxxxx">{entities}]>'),
        svg("<text>&x;</text>", before='<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/hostname">]>'),
        svg("<g>" * 5000 + "</g>" * 5000),
        b"<svg width='1'",
    ]
    for bomb in bombs:
        with pytest.raises(UserError, match=r"^a.svg: "):
            open_image("a.svg", bomb)


def test_heic_opens_upright():
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(gradient())).save(buffer, quality=95, exif=exif.tobytes())
    opened = open_image("a.heic", buffer.getvalue())
    assert opened.size == (48, 64)
    assert np.abs(np.asarray(opened).astype(int) - np.rot90(gradient(), -1)).mean() < 4
    assert "HEIF" not in Image.OPEN  # the user's Pillow stays as it is


@pytest.mark.parametrize(
    ("extra", "module", "data"), [("svg", "resvg_py", svg("")), ("heic", "pillow_heif", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")]
)
def test_without_its_extra_a_format_says_how_to_get_it(extra, module, data, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=rf"a.{extra}: {extra.upper()} files need the extra {extra}: pip install 'unitok-lm\[{extra}\]'"
    ):
        open_image(f"a.{extra}", data)
