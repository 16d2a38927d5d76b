"""Detect what a file is: an image, audio or text, by its first bytes, and by its name if these do not decide.

Text is recognized first: UTF-8 without control characters is text, whatever it begins with ("BMW", "ID3", "RIFF"). Formats of
images and audio have a magic number; if that is short, the header after it is checked, too. Formats that consist of text (SVG,
XPM, plain netpbm) or have no magic number (TGA) also need the suffix. Folders, archives, tables and training all use these
functions, so they see the same files.
"""

import codecs
import os
import re
import struct
from functools import lru_cache
from pathlib import Path

from unitok.media.mpeg import find_mpeg

#: Bytes at the beginning of a file that are examined.
HEAD = 4096

#: C0 control characters except white space, and DEL: they occur in binary headers, not in text.
_CONTROLS = bytes({*range(32), 127} - {9, 10, 11, 12, 13})

_NETPBM = rb"P(?:[1-6f]|0CMYK|yP|yRGBA|yCMYK)(?:\s+|#[^\n]*\n)+\d+(?:\s+|#[^\n]*\n)+\d+\s"
#: Image formats that are text: suffix -> name in Pillow (SVG: ours), and a pattern that the text must contain.
_WRITTEN = {
    "svg": ("SVG", re.compile(rb"(?s)<(?:[\w-]+:)?svg[\s>/]|<!DOCTYPE\s+svg|\A\s*<\?xml.{4000}")),
    "xpm": ("XPM", re.compile(rb"^/\* XPM \*/")),
    "xbm": ("XBM", re.compile(rb"#define\s+\S+\s+\d+")),
    **dict.fromkeys(("pbm", "pgm", "ppm", "pnm", "pfm"), ("PPM", re.compile(_NETPBM))),
}
_TARGA = ("tga", "icb", "vda", "vst")

#: Image formats by their names in Pillow, with a pattern of their first bytes; `_header_fits` checks some further.
_IMAGES = {
    format: re.compile(begin, re.DOTALL)
    for format, begin in {
        "PNG": rb"\x89PNG",
        "JPEG": rb"\xff\xd8\xff",
        "GIF": rb"GIF8[79]a",
        "TIFF": rb"(?:II[*+]\0|MM\0[*+]|MM\*\0|II\0\*).{4}",  # the last two have the wrong byte order, which Pillow accepts
        "BMP": rb"BM",
        "ICO": rb"\0\0\x01\0",
        "CUR": rb"\0\0\x02\0",
        "JPEG2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
        "PSD": rb"8BPS\0\x01",
        "ICNS": rb"icns",
        "QOI": rb"qoif.{8}[\3\4]",
        "DDS": rb"DDS \x7c\0\0\0",
        "SGI": rb"\x01\xda[\0\1][\1\2]\0[\1-\3]",
        "PCX": rb"\n[\0\2\3\5][\0\1].{125}",
        "DCX": rb"\xb1\x68\xde\x3a",
        "SUN": rb"\x59\xa6\x6a\x95",
        "FITS": rb"SIMPLE  =",
        "FTEX": rb"FTEX",
        "BLP": rb"BLP[12]",
        "MSP": rb"DanM|LinS",
        "PIXAR": rb"\x80\xe8\0\0",
        "XVTHUMB": rb"P7 332",
        "PPM": _NETPBM,
        "IM": rb"Image type:(?=.{0,500}(?:\0{4}|\x1a))",
        "MCIDAS": rb"\0{7}\x04",
        "IPTC": rb"(?=.*\x1c\x03\x14)(?=.*\x1c\x03\x1e)\x1c",  # its width and height
        "WEBP": rb"RIFF.{4}WEBP",
        "AVIF": rb".{4}ftyp",
        "HEIF": rb".{4}ftyp",
        "FLI": rb".{4}[\x11\x12]\xaf.{8}[\0\3]\0",
        "GBR": rb".{20}GIMP",
        "PCD": rb".{2048}PCD_",
        "DIB": rb"[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
        "SPIDER": rb"(?=.{16}(?:\x3f\x80\0\0|\0\0\x80\x3f)).{108}",  # its type, 1.0
    }.items()
}
_ANY_IMAGE = re.compile(b"|".join(b"(?:%b)" % begin.pattern for begin in _IMAGES.values()), re.DOTALL)
#: Brands of ISO media files (`ftyp`) that are images.
_AVIF = {b"avif", b"avis"}
_HEIF = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}

#: First bytes of audio formats that libsndfile reads.
_AUDIO = re.compile(
    rb"""(?xs)
    (?:RIFF|RIFX|RF64|BW64).{4}WAVE
    | FORM.{4}(?:AIFF|AIFC|8SVX|16SV)
    | riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00   # W64
    | \.snd\x00 | dns\.[^\x00]                               # AU in either byte order
    | caff\x00\x01
    | fLaC[\x00\x80]
    | OggS\x00.{21}\x01.(?:\x01vorbis|OpusHead)
    | Creative\x20Voice\x20File\x1a
    | NIST_1A\n
    | PVF1\n
    | \x20paf|fap\x20
    | 2BIT[\x00-\xff]{8}[\x00\xff]
    | \x64\xa3[\x00-\x07]\x00 | \x00[\x00-\x07]\xa3\x64      # IRCAM
    | ALawSoundFile\*\*\x00
    | Extended\x20Instrument:\x20
    | MATLAB\x205\.0\x20MAT-file
    | \x00\x00[\x00\x03][\x00\xe8].{14,18}samplerate\x00     # MAT4
    | \xf0\x7e[\x00-\x7f]\x01                                # SDS
    | \x01\x04[\x20-\x7e\x00]{17}                            # MPC2K
    """
)

#: First bytes of video formats that FFmpeg reads.
_VIDEO = re.compile(
    rb"""(?xs)
    .{4}(?:ftyp(?!M4A|M4B)|moov|mdat|wide|free)             # MPEG-4, QuickTime
    | \x1a\x45\xdf\xa3                                      # Matroska, WebM
    | RIFF.{4}AVI\x20
    | OggS.{24}\x80theora
    | FLV\x01
    | \x00\x00\x01[\xb3\xba]                                # MPEG-1, MPEG-2
    | \x47.{187}\x47.{187}\x47                              # its transport stream
    """
)

#: First bytes of audio formats that FFmpeg reads and libsndfile does not.
_PACKED = re.compile(
    rb"""(?xs)
    .{4}ftyp(?:M4A|M4B)                                     # MPEG-4
    | OggS(?!.{24}\x80theora)                               # FLAC, Speex; Vorbis and Opus are libsndfile's
    | \xff[\xf0\xf1\xf8\xf9] | ADIF                         # AAC
    | \x30\x26\xb2\x75\x8e\x66\xcf\x11                      # Windows Media
    | \#!AMR
    | \x0b\x77                                              # AC-3
    | wvpk                                                  # WavPack
    | MAC\x20\x96 | MAC\x20.\x0f                            # Monkey's Audio
    | MPCK | MP\+                                           # Musepack
    | TTA[12]
    | DSD\x20 | FRM8
    | \.RMF | \.ra\xfd                                      # RealAudio
    """
)
#: Suffixes by which a file of a format that may hold either is audio, and video.
_SOUND, _PICTURES = ("m4a", "m4b", "mka", "weba", "oga"), ("wmv", "asf", "rm", "rmvb", "ogv")

#: Formats that cannot be read: first bytes, what the file is, and what to do about it.
_UNREAD = (
    (_VIDEO.pattern, "a video", "its type is video"),
    (rb"MThd", "MIDI, which holds notes, not audio", "play it to a WAV file, or leave it out"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL image", "convert it to PNG"),
    (rb"P7\n", "a PAM image", "convert it to PNG"),
    (rb"\x76\x2f\x31\x01", "an OpenEXR image", "convert it to PNG"),
    (rb"%PDF", "a PDF document", "convert its pages to PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", "convert it to PNG"),
    (rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF", "a Windows metafile", "convert it to PNG"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", "convert it to UTF-8, for example with iconv"),
)


def sniff(path: Path) -> str | None:
    """Return `"image"`, `"audio"`, `"video"`, `"text"` or None for a file, by its first bytes and its name. Errors: `OSError`."""
    with open(path, "rb") as file:
        return sniff_bytes(file.read(HEAD), str(path))


@lru_cache(maxsize=64)  # of a file that is looked at by several, one after the other
def sniff_bytes(head: bytes, name: str = "") -> str | None:
    """Return what `sniff` does, from the first 4096 bytes of a file. name: its name or suffix, which decides if the content
    does not."""
    if image_format(head, name):
        return "image"
    if is_text(head):
        return "audio" if head.startswith(b"NIST_1A\n") and suffix_of(name) in ("nist", "sph", "wav") else "text"
    if _AUDIO.match(head) or find_mpeg(head) is not None or (suffix_of(name) == "htk" and head[8:12] == b"\0\2\0\0"):
        return "audio"
    if is_packed(head, name):
        return "audio"
    if _VIDEO.match(head) or (suffix_of(name) in _PICTURES and _PACKED.match(head)):
        return "video"
    if head and b"\0" not in head and _decodes(head):  # with control characters, such as a terminal's log
        return "text"
    return None


def is_packed(head: bytes, name: str = "") -> bool:
    """Whether a file is audio that FFmpeg reads and libsndfile does not."""
    suffix = suffix_of(name)
    if _AUDIO.match(head) or suffix in _PICTURES:
        return False
    return _PACKED.match(head) is not None or (suffix in _SOUND and _VIDEO.match(head) is not None)


def holds_packed_audio(head: bytes, name: str = "") -> bool:
    """Whether a file is audio that only FFmpeg reads, or a video, which may have such audio."""
    return (
        is_packed(head, name)
        or (_VIDEO.match(head) is not None and not _AUDIO.match(head))
        or (suffix_of(name) in _PICTURES and _PACKED.match(head) is not None)
    )


def image_format(head: bytes, name: str = "") -> str:
    """Return the format of an image (a name in Pillow, or SVG, SVGZ, HEIF) from the first 4096 bytes of a file; "" if it is not
    an image."""
    suffix = suffix_of(name)
    if suffix in _WRITTEN:
        format, sign = _WRITTEN[suffix]
        if sign.search(head.removeprefix(codecs.BOM_UTF8)):
            return format
    if is_text(head):
        return ""
    if _ANY_IMAGE.match(head):
        for format, begin in _IMAGES.items():
            if begin.match(head) and _header_fits(format, head):
                return format
    if suffix == "gbr" and head[4:8] == b"\0\0\0\1":
        return "GBR"
    if suffix == "svgz" and head.startswith(b"\x1f\x8b"):
        return "SVGZ"
    if suffix in _TARGA and len(head) > 18 and head[1] < 2 and head[2] & 0xF7 in (1, 2, 3) and head[16] in (1, 8, 16, 24, 32):
        return "TGA"
    return ""


def _header_fits(format: str, head: bytes) -> bool:
    """Whether the header confirms a format whose magic number is too short to be certain."""
    little = lambda start, size: int.from_bytes(head[start : start + size], "little")  # noqa: E731
    match format:
        case "BMP":
            return _bitmap_header(head[14:])
        case "DIB":
            return _bitmap_header(head)
        case "ICO" | "CUR":
            first = 6 + 16 * little(4, 2)
            return first > 6 and little(14, 4) > 0 and little(18, 4) >= first
        case "PCX":
            return little(8, 2) >= little(4, 2) and little(10, 2) >= little(6, 2)
        case "AVIF" | "HEIF":
            brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(int.from_bytes(head[:4]), 256), 4))}
            return bool(brands & _AVIF if format == "AVIF" else brands & _HEIF and head[8:11] not in (b"mp4", b"iso"))
        case "SPIDER":
            from PIL.SpiderImagePlugin import isSpiderHeader

            headers = [struct.unpack_from(f"{order}27f", head) for order in "><"]
            return any(isSpiderHeader(header) and header[4] == 1 for header in headers)
    return True


def _bitmap_header(header: bytes) -> bool:
    """Whether a header is that of a Windows bitmap: a known size, one plane, a valid depth."""
    at = 8 if header[:4] == b"\x0c\0\0\0" else 12
    known = int.from_bytes(header[:4], "little") in (12, 16, 40, 52, 56, 64, 108, 124)
    depth = int.from_bytes(header[at + 2 : at + 4], "little")
    return known and header[at : at + 2] == b"\1\0" and depth in (1, 2, 4, 8, 16, 24, 32)


def suffix_of(name: str) -> str:
    """Return the suffix in lower case: `jpg` for `a/b.JPG`, `.jpg` and `jpg`."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _decodes(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return True


def is_text(head: bytes) -> bool:
    """Whether bytes are certainly text: UTF-8 without control characters other than white space."""
    printed = (len(part.translate(None, _CONTROLS)) == len(part) for part in (head[:64], head))  # most others show it early
    return bool(head) and all(printed) and _decodes(head)


def unread(head: bytes) -> str:
    """Return what a file is that cannot be read, and what to do about it; "" if its format is unknown."""
    for magic, what, remedy in _UNREAD:
        if re.match(magic, head, re.X if magic is _VIDEO.pattern else 0):
            return f"{what}, which is not read; {remedy}"
    return ""


# ---- Suffixes -------------------------------------------------------------------------------------------------------

#: Content other than text -> the suffixes of its files.
_SUFFIXES = {
    "an image": "jpg jpeg jpe jfif png apng gif webp bmp dib tif tiff heic heif hif avif avifs ico cur svg svgz jp2 j2k jpx "
    "j2c jpc jpf mpo psd eps qoi tga dds icns pcx dcx sgi pbm pgm ppm pnm pfm jxl",
    "an audio": "wav wave flac ogg oga opus spx mp2 mp3 mpga m4a m4b aac wma amr aif aiff aifc au caf w64 rf64 voc sph svx ape wv",
    "a video": "mp4 m4v mkv mov avi webm mpg mpeg ogv wmv flv 3gp",
    "an archive or a table": "tar tgz zip gz bz2 xz zst 7z rar parquet arrow",
    "a document": "pdf doc docx ppt pptx xls xlsx epub",
}
_CONTENTS = {suffix: what.replace("an audio", "audio") for what, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}


def promised(name: str) -> str:
    """Return the content that the suffix of a file stands for, other than text, such as `an image` or `audio`; or ""."""
    return _CONTENTS.get(suffix_of(name), "") if "." in name.rpartition("/")[2] else ""


def promised_kind(name: str) -> str:
    """Return the same without its article: `image`, `audio`, `video`; or ""."""
    return promised(name).removeprefix("an ").removeprefix("a ")


def find_media(folder: Path, kind: str, also: tuple[str, ...] = ()) -> tuple[list[Path], list[Path]]:
    """Return the files of a kind (`image`, `audio`, `video`) or of further ones under a folder, and the empty files that may be meant as such,
    both sorted.

    Each file is opened once. A file that may not be read counts by its suffix. Hidden files and folders (`.name`) are left out.
    """
    (matching, empty), kinds = ([], []), (kind, *also)
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(where, name) for name in names if not name.startswith(".")):
            try:
                if not os.path.isfile(path):  # opening a pipe would block
                    continue
                with open(path, "rb", buffering=0) as file:
                    head = file.read(HEAD)
            except OSError:
                if promised_kind(path) in kinds:
                    matching.append(Path(path))
                continue
            if not head:
                if promised_kind(path) in kinds or not os.path.splitext(path)[1]:
                    empty.append(Path(path))
            elif sniff_bytes(head, path) in kinds:
                matching.append(Path(path))
    return sorted(matching), sorted(empty)
