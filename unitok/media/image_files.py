"""Image files of any format as upright sRGB images: Pillow decodes most formats, extras decode SVG and HEIC.

Only pixels matter, so bad metadata is no reason to lose an image: if it keeps Pillow from decoding (a text or profile that
exceeds its limits, broken EXIF, a missing end marker), the file is read again without it. An image with missing pixels stays an
error.
"""

import io
import re
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Literal
from xml.etree import ElementTree

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from unitok.errors import UserError, first_line
from unitok.media.formats import HEAD, image_format, unread

#: Larger images are refused before they are decompressed (a 20 kB PNG can hold gigabytes).
MAX_PIXELS = 200_000_000
#: Longest side in pixels that an SVG is rendered to.
MAX_SVG_SIDE = 1024
#: Most bytes of an ICC profile, and of an uncompressed SVG.
_MAX_PROFILE, _MAX_SVG = 64 << 20, 64 << 20

#: Formats that Pillow opens by running another program, that it cannot decode, or that match any file (IMT).
_REFUSED_FORMATS = {"EPS", "PDF", "WMF", "FPX", "MIC", "MPEG", "HDF5", "GRIB", "BUFR", "IMT"}

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LIMIT = threading.Lock()


@cache
def _formats() -> list[str]:
    """Return the formats that Pillow may try if the first bytes of a file do not show its format."""
    Image.init()
    return [name for name in Image.ID if name not in _REFUSED_FORMATS]


def open_image(path: Path, data: bytes | None = None) -> Image.Image:
    """Read an image file as an upright RGB image. data: bytes of the file; `path` is then only its name. Errors: `UserError`
    that names the file and what is wrong with it."""
    head = b""
    try:
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            head = file.read(HEAD)
            file.seek(0)
            return _decode(file, image_format(head, str(path)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for bad files
        if not image_format(head, str(path)) and (what := unread(head)):
            raise UserError(f"{path}: {what}") from None
        unknown = "damaged, or of an unknown format" if head else "an empty file"
        why = unknown if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(f"{path}: not a readable image ({why}); replace it or leave it out") from None


def _decode(file: IO[bytes], format: str) -> Image.Image:
    if format in ("SVG", "SVGZ") or (not format and b"<svg" in file.read(HEAD)):
        file.seek(0)
        return _render_svg(file.read(_MAX_SVG + 1), format == "SVGZ")
    file.seek(0)
    if format == "HEIF":
        return _open_heif(file)
    formats = [format] if format else _formats()
    try:
        return _load(file, formats)
    except (UserError, MemoryError):
        raise
    except Exception:
        file.seek(0)
        repaired, profile = _REPAIRS.get(format, lambda data: (b"", None))(file.read())
        if repaired:
            try:
                return _load(io.BytesIO(repaired), formats, profile)
            except UserError:
                raise
            except Exception:
                pass
        raise


def _load(file: IO[bytes], formats: list[str], profile: bytes | None = None) -> Image.Image:
    try:
        return _load_within(file, formats, profile)
    except Image.DecompressionBombError:
        pass
    with _LIMIT:  # Pillow's limit is lower than ours and global: it is raised while one image is read
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS // 2
        try:
            file.seek(0)
            return _load_within(file, formats, profile)
        except Image.DecompressionBombError as error:
            count = re.search(r"\d+", str(error))
            raise UserError(f"{count[0] if count else 'its'} pixels are too many (limit {MAX_PIXELS})") from None
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _load_within(file: IO[bytes], formats: list[str], profile: bytes | None) -> Image.Image:
    with Image.open(file, formats=formats) as image:
        _check_size(image.size)
        image.load()
        rgb = to_rgb(image, profile)
        rgb.format = image.format  # conversions lose it
        return rgb


def _check_size(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{size[0]} x {size[1]} pixels are too many (limit {MAX_PIXELS})")


# ---- Colors ---------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """Convert an image of any mode to RGB without metadata. Its rotation (EXIF) and colors (its ICC profile, or `profile`) are
    applied.

    Transparent images are put on white; 16 bits and floats become 8 bits. Metadata that cannot be read is ignored.
    """
    profile = profile or image.info.get("icc_profile")
    image = upright(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, np.float32)
        if not np.isfinite(values).all():
            raise ValueError("values that are not finite numbers")
        top = 65535.0 if image.mode != "F" or values.max(initial=0) > 255 else (255.0 if values.max(initial=0) > 1 else 1.0)
        image = Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if profile:
            alpha = rgba.getchannel("A")
            rgba = _to_srgb(rgba.convert("RGB"), profile, image.mode in ("L", "LA", "La", "1"))
            rgba.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
    elif profile:
        image = _to_srgb(image, profile, image.mode in ("L", "1"))
    rgb = image.convert("RGB")
    rgb.info = {}  # metadata that is applied must not be applied again
    return rgb


def upright(image: Image.Image) -> Image.Image:
    """Rotate an image by the orientation in its EXIF, if that can be read."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises SyntaxError, ValueError, struct.error and others for damaged EXIF
        return image
    return image if turn is None else image.transpose(turn)


def _to_srgb(image: Image.Image, profile: bytes, gray: bool) -> Image.Image:
    """Convert the colors of an image from a profile to sRGB; not if the profile is invalid or for other channels."""
    mode = "L" if gray else "CMYK" if image.mode == "CMYK" else "RGB"
    profile_mode, transform = _transform(profile, mode)
    return image.convert("RGB") if transform is None else transform.apply(image.convert(profile_mode))


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode of images that a profile is for, and the transform to sRGB, which is None if it changes nothing or the
    profile does not fit images of `mode`."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        profile_mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip(), "")
        if profile_mode != mode and (profile_mode, mode) != ("RGB", "L"):
            return "", None
        flags = (
            ImageCms.Flags.NOOPTIMIZE if profile_mode == "L" else ImageCms.Flags.NONE
        )  # lcms' table of a gray curve is coarse
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), profile_mode, "RGB", flags=flags)
    except Exception:  # lcms raises errors of several types for an invalid profile
        return "", None
    if profile_mode == "RGB":
        steps = np.linspace(0, 255, 17).round().astype(np.uint8)
        colors = Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(17, -1, 3))
        if np.abs(np.asarray(transform.apply(colors), np.int16) - np.asarray(colors, np.int16)).max() <= 1:  # sRGB
            return "", None
    return profile_mode, transform


# ---- Repairing ------------------------------------------------------------------------------------------------------
# Bytes of a damaged file -> a valid file with equal pixels, and the ICC profile that was removed; b"" if pixels are missing.

Repaired = tuple[bytes, bytes | None]
NOT_REPAIRED: Repaired = b"", None


def _repair_png(data: bytes) -> Repaired:
    """Keep only the chunks that define pixels (ISO 15948), and decompress the image data to check that it is complete."""
    kept: list[tuple[bytes, bytes]] = []
    pixels, profile, at = b"", None, 8
    while len(data) >= at + 8 and (name := data[at + 4 : at + 8]).isalpha() and name != b"IEND":
        size = int.from_bytes(data[at : at + 4], "big")
        body, checksum = data[at + 8 : at + 8 + size], data[at + 8 + size : at + 12 + size]
        at += 12 + size
        if name == b"IDAT":
            pixels += body
        elif name == b"tRNS" and size < {0: 2, 2: 6}.get(kept[0][1][9] if kept else 0, 1):
            continue
        elif name in (b"IHDR", b"PLTE", b"tRNS"):
            if int.from_bytes(checksum, "big") != zlib.crc32(name + body):
                return NOT_REPAIRED
            kept.append((name, body))
        elif name == b"eXIf" and len(body) == size:
            kept.append((name, body))
        elif name == b"iCCP":
            with suppress(zlib.error):
                profile = zlib.decompressobj().decompress(body[body.find(b"\0") + 2 :], _MAX_PROFILE)
    if not kept or kept[0][0] != b"IHDR" or len(kept[0][1]) < 13:
        return NOT_REPAIRED
    expected, inflate, raw = _png_bytes(kept[0][1]), zlib.decompressobj(), b""
    with suppress(zlib.error):
        raw = inflate.decompress(pixels, expected)
    if len(raw) < expected:
        return NOT_REPAIRED
    chunks = [*kept, (b"IDAT", pixels if inflate.eof else zlib.compress(raw, 1)), (b"IEND", b"")]
    body = b"".join(len(b).to_bytes(4, "big") + n + b + zlib.crc32(n + b).to_bytes(4, "big") for n, b in chunks)
    return data[:8] + body, profile


#: The passes of an interlaced PNG: first column and row, and steps between columns and rows.
_ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def _png_bytes(header: bytes) -> int:
    """Return the bytes of a PNG's uncompressed image data, from its IHDR: the rows of all passes, each with its filter byte."""
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    _check_size((width, height))
    bits = header[8] * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(header[9], 4)
    total = 0
    for x, y, right, down in _ADAM7 if header[12] else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - x) // right), -(-(height - y) // down)
        total += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    return total


def _repair_jpeg(data: bytes) -> Repaired:
    """Remove the segments that do not define pixels, and add the end marker if it is missing after all pixels."""
    at, kept, scans, whole = 2, [data[:2]], set(), set()
    while (marker := _MARKER.search(data, at)) and marker[0] != b"\xff\xd9":
        start, name = marker.start(), marker[0][1]
        size = int.from_bytes(data[start + 2 : start + 4], "big")
        body = data[start + 4 : start + 2 + size]
        at = start + 2 + size
        if len(body) < size - 2 or size < 2:
            return NOT_REPAIRED
        if name in range(0xC0, 0xD0) and name not in (0xC4, 0xC8, 0xCC):
            whole = {(c, k) for c in body[6::3] for k in range(64)}
        if name == 0xDA:
            following = _MARKER.search(data, at)
            end = following.start() if following else len(data)
            first, last, low = body[-3], body[-2], body[-1] & 15
            scans |= {(c, k) for c in body[1:-3:2] for k in range(first, last + 1) if not low}
            kept.append(data[start:end])
            at = end
        elif name not in (*range(0xE0, 0xF0), 0xFE) or (body[:5] in _JPEG_SEGMENTS and size > _JPEG_SEGMENTS[body[:5]]):
            kept.append(data[start:at])
    plain = b"".join(kept)
    if marker:
        return plain + b"\xff\xd9", None
    if whole and whole <= scans:
        # Missing pixels would be decoded from the bytes that follow: different endings give equal images only if none are
        # missing.
        plain = plain.rstrip(b"\xff")
        ends = [plain + end * 1024 + b"\xff\xd9" for end in (b"", b"\xaa", b"\x55", b"\xfe\x01")]
        decoded = [np.asarray(Image.open(io.BytesIO(end), formats=["JPEG"])) for end in ends]
        if all(np.array_equal(decoded[0], other) for other in decoded[1:]):
            return ends[0], None
    return NOT_REPAIRED


#: Segments that change how pixels are shown -> their minimal number of bytes.
_JPEG_SEGMENTS = {b"JFIF\0": 15, b"Exif\0": 15, b"ICC_P": 15, b"Adobe": 13}


def _repair_webp(data: bytes) -> Repaired:
    """Keep the chunks that are complete, and correct the size of the file; not if the first image is incomplete."""
    at, kept = 12, []
    while name := data[at : at + 4]:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if len(body := data[at + 8 : at + 8 + size]) < size:
            break
        kept.append((name, body))
        at += 8 + size + size % 2
    names = {name for name, _ in kept}
    if not names & {b"VP8 ", b"VP8L", b"ANMF"}:
        return NOT_REPAIRED
    flags = sum(bit for name, bit in _WEBP_FLAGS.items() if name in names)
    kept = [(n, bytes([flags | b[0] & 0x10]) + b[1:] if n == b"VP8X" else b) for n, b in kept]
    body = b"WEBP" + b"".join(n + len(b).to_bytes(4, "little") + b + bytes(len(b) % 2) for n, b in kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body, None


_WEBP_FLAGS = {
    b"ICCP": 0x20,
    b"ALPH": 0x10,
    b"EXIF": 8,
    b"XMP ": 4,
    b"ANIM": 2,
}  # flags of the chunk VP8X, which lists the others


def _repair_avif(data: bytes) -> Repaired:
    """Rename the EXIF item, so that it is not read."""
    before, name, after = data.partition(b"iinf")
    return before + name + after.replace(b"Exif", b"skip", 1), None


def _repair_tiff(data: bytes) -> Repaired:
    """Append a directory that has only the tags that define pixels (TIFF 6.0)."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
    big = 0x2B in data[2:4]
    pointer, width, count_size, entry = (8, 8, 8, 20) if big else (4, 4, 2, 12)
    at = int.from_bytes(data[pointer : pointer + width], order)
    count = int.from_bytes(data[at : at + count_size], order)
    first = at + count_size
    entries = [data[i : i + entry] for i in range(first, min(len(data), first + entry * count), entry)]
    kept = [e for e in entries if len(e) == entry and int.from_bytes(e[:2], order) in _TIFF_TAGS]
    directory = len(kept).to_bytes(count_size, order) + b"".join(kept) + bytes(width)
    data += bytes(len(data) % 2)
    return data[:pointer] + len(data).to_bytes(width, order) + data[pointer + width :] + directory, None


#: Size, compression, color, strips and tiles, planes, predictor, palette, alpha, sample format, JPEG's and YCbCr's.
_TIFF_TAGS = {254, *range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 332}
_TIFF_TAGS |= {*range(338, 342), 347, *range(512, 522), *range(529, 533), 34675}
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd8]")
_REPAIRS: dict[str, Callable[[bytes], Repaired]] = {
    "PNG": _repair_png,
    "JPEG": _repair_jpeg,
    "WEBP": _repair_webp,
    "AVIF": _repair_avif,
    "TIFF": _repair_tiff,
}


# ---- Extras ---------------------------------------------------------------------------------------------------------


def _missing_extra(extra: str) -> UserError:
    return UserError(f"{extra.upper()} files need the extra {extra}: pip install 'unitok-lm[{extra}]'")


def _open_heif(file: IO[bytes]) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise _missing_extra("heic") from None
    heif = pillow_heif.open_heif(file)
    _check_size(heif.size)
    image = heif.to_pillow()
    image.info = {key: value for key, value in image.info.items() if key not in ("exif", "xmp")}  # pillow-heif has rotated it
    rgb = to_rgb(image)
    rgb.format = "HEIF"
    return rgb


def _render_svg(data: bytes, packed: bool) -> Image.Image:
    """Render an SVG on white, at its own size, or shrunk to `MAX_SVG_SIDE`.

    No other file is read: the SVG is parsed here, and rendered without references to files, declarations or entities.
    """
    try:
        import resvg_py
    except ImportError:
        raise _missing_extra("svg") from None
    if packed:
        data = zlib.decompressobj(31).decompress(data, _MAX_SVG + 1)
    if len(data) > (1 << 20 if b"<!ENTITY" in data else _MAX_SVG):
        raise UserError(f"an SVG of {len(data)} bytes is too large; render it to PNG")
    root = ElementTree.fromstring(data)
    _check_svg(root)
    width, height = _svg_size(root)
    root.set("width", f"{width:g}")
    root.set("height", f"{height:g}")
    has_text = any(element.tag == f"{_SVG}text" for element in root.iter())
    png = resvg_py.svg_to_bytes(svg_string=ElementTree.tostring(root, "unicode"), skip_system_fonts=not has_text)
    image = _load(io.BytesIO(bytes(png)), ["PNG"])
    image.format = "SVG"
    return image


def _check_svg(element: ElementTree.Element, hidden: bool = False, depth: int = 1) -> None:
    """Raise `UserError` for an SVG that shows other files or is nested too deeply. Names without a namespace get that of
    SVG."""
    if depth > _MAX_DEPTH:
        raise UserError(f"an SVG nested over {_MAX_DEPTH} deep; render it to PNG")
    if isinstance(element.tag, str) and not element.tag.startswith("{"):
        element.tag = _SVG + element.tag
    hidden = hidden or element.get("display") == "none" or "display:none" in element.get("style", "").replace(" ", "")
    for key, value in list(element.attrib.items()):
        outside = key.rpartition("}")[2] == "href" and not value.strip().startswith(("#", "data:"))
        if outside and not hidden and element.tag != f"{_SVG}a":
            raise UserError(f"an SVG that shows another file ({value.strip()[:60]}), which is not read; embed that file")
        if outside:
            del element.attrib[key]
    for child in element:
        _check_svg(child, hidden, depth + 1)


def _svg_size(root: ElementTree.Element) -> tuple[float, float]:
    """Return width and height in pixels; an SVG without a view box gets one of that size."""
    box = [float(n) for n in re.findall(r"[-+.\deE]+", root.get("viewBox", "")) if _LENGTH.fullmatch(n)]
    box = box if len(box) == 4 and min(box[2:]) > 0 else []
    sides = []
    for name in ("width", "height"):
        length = _LENGTH.fullmatch(root.get(name, "").strip())
        sides.append(float(length[1]) * _UNITS[length[2] or "px"] if length else 0.0)
    if not box and min(sides) <= 0:
        sides = [300.0, 150.0]  # the default of browsers
    ratio = box[2] / box[3] if box else sides[0] / sides[1]
    width, height = sides[0] or sides[1] * ratio or box[2], sides[1] or sides[0] / ratio or box[3]
    if not box:
        root.set("viewBox", f"0 0 {width:g} {height:g}")
    scale = min(1.0, MAX_SVG_SIDE / max(width, height))
    return max(1.0, width * scale), max(1.0, height * scale)


_SVG = "{http://www.w3.org/2000/svg}"
_MAX_DEPTH = 256
_UNITS = {"px": 1.0, "pt": 96 / 72, "pc": 16.0, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0, "em": 16.0, "ex": 8.0}
_LENGTH = re.compile(r"\+?(\d+\.?\d*(?:[eE][-+]?\d{1,2})?|\.\d+)(px|pt|pc|mm|cm|in|em|ex)?")
