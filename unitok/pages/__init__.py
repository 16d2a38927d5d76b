"""HTML pages of images, audio and text, made from the Jinja2 templates in this folder. A page is one UTF-8 file that loads nothing
from the network.

Templates escape everything they print and make control characters visible. The exception is `Markup`: elements made by this module.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from markupsafe import Markup

from unitok.errors import UserError, visible
from unitok.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

_MARK = b'name="generator" content="unitok"'  # as base.html has it
_SMALL = 128  # pixels; images of at most half this size are enlarged
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Figure:
    """Text or an element, with a caption. kind: `given`, `new` or empty. layers: elements that are shown on it."""

    content: str | Markup
    caption: str = ""
    kind: str = ""
    layers: Sequence[Markup] = ()


@dataclass(frozen=True)
class Article:
    """Figures under a title. kind: `right`, `wrong` or empty."""

    figures: Sequence[Figure]
    title: str = ""
    kind: str = ""


def _finalize(value: object) -> object:
    """What a template prints for a value, before it is escaped; numbers get four digits."""
    if value is None or hasattr(value, "__html__"):
        return value or ""
    return f"{value:.4g}" if isinstance(value, float) else visible(value, lines=True)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # slow, so only when a page is written

    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_finalize, trim_blocks=True)


def _element(name: str, *arguments: object) -> Markup:
    return getattr(_environment().get_template("macros.html").module, name)(*arguments)


def text(content: object) -> Markup:
    """A paragraph with a text."""
    return _element("text", content)


def image(source: bytes | Path) -> Markup:
    """An `img` element for the bytes of a PNG, or for an image file in the folder of the page. Small PNGs are enlarged by a whole factor."""
    if isinstance(source, bytes):
        head = source[:24]
    else:
        with open(source, "rb") as file:
            head = file.read(24)
    width, height = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    zoom = _SMALL // max(width, height, 1) if head.startswith(_PNG) else 1
    return _element("image", _url(source, "image/png"), width * zoom if zoom > 1 else 0)


def audio(source: bytes | Path) -> Markup:
    """A player for the bytes of a WAV, or for an audio file in the folder of the page."""
    return _element("audio", _url(source, "audio/wav"))


def video(source: Path) -> Markup:
    """A player for a video file in the folder of the page."""
    return _element("video", _url(source, "video/mp4"))


def boxes(rows: Sequence[Sequence[float]]) -> Markup:
    """A layer that draws boxes (x0, y0, x1, y1) or points (x, y), in fractions of the image that it is shown on."""
    return _element("boxes", [[v * 100 for v in row] for row in rows])


def _url(source: bytes | Path, kind: str) -> Markup:
    if isinstance(source, bytes):
        return Markup(f"data:{kind};base64,{b64encode(source).decode()}")
    return Markup(quote(source.name, errors="surrogateescape"))  # also a colon, so that no name is read as a URL scheme


def fragment(figures: Sequence[Figure]) -> str:
    """HTML of figures for the output of a notebook cell; it needs no other file."""
    return _environment().get_template("notebook.html").render(figures=figures)


def write_page(path: Path, template: str, **values: object) -> None:
    """Render a template with `values` and write it to `path` atomically. Errors: as `check_page`."""
    check_page(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _environment().get_template(template).render(values))


def check_page(path: Path) -> None:
    """Raise `UserError` where `path` is a folder, or a file that is no page of this module."""
    if path.is_dir() or (path.exists() and _MARK not in path.read_bytes()[:1000]):
        raise UserError(f"{path}: exists and was not written by unitok; choose another name, or remove it")
