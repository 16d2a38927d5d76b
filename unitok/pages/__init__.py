"""HTML pages to look at and listen to, from the Jinja2 templates beside this file; a page is one UTF-8 file that fetches nothing.

Templates escape whatever they print and make control characters visible, except for `Markup`: the elements made here.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from unitok.errors import UserError, visible
from unitok.files import write_text

_MARK = b'name="generator" content="unitok"'  # as base.html has it
_SMALL = 128  # pixels; images of at most half of it are shown enlarged
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Figure:
    """Text or elements with a caption; `kind` is `given`, `new` or nothing."""

    content: str | Markup
    caption: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Article:
    """Figures under a title; `kind` is `right`, `wrong` or nothing."""

    figures: Sequence[Figure]
    title: str = ""
    kind: str = ""


def _finalize(value: Any) -> Any:
    """What templates do to each value before they escape it; numbers get four digits."""
    if value is None or hasattr(value, "__html__"):
        return value or ""
    return f"{value:.4g}" if isinstance(value, float) else visible(value, lines=True)


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # not before there is a page to write

    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_finalize, trim_blocks=True)


def _element(name: str, *arguments: Any) -> Markup:
    return getattr(_environment().get_template("macros.html").module, name)(*arguments)


def text(content: object) -> Markup:
    """An element with a text."""
    return _element("text", content)


def image(source: bytes | Path) -> Markup:
    """An element for a PNG's bytes, or for an image's file beside the page; small PNGs are enlarged to whole pixels."""
    if isinstance(source, bytes):
        head = source[:24]
    else:
        with open(source, "rb") as file:
            head = file.read(24)
    width, height = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    zoom = _SMALL // max(width, height, 1) if head.startswith(_PNG) else 1
    return _element("image", _url(source, "image/png"), width * zoom if zoom > 1 else 0)


def audio(source: bytes | Path) -> Markup:
    """A player for a WAV's bytes, or for an audio file beside the page."""
    return _element("audio", _url(source, "audio/wav"))


def _url(source: bytes | Path, kind: str) -> Markup:
    if isinstance(source, bytes):
        return Markup(f"data:{kind};base64,{b64encode(source).decode()}")
    return Markup(quote(source.name, errors="surrogateescape"))  # a colon too, so a name is never a scheme


def fragment(figures: Sequence[Figure]) -> str:
    """HTML of some figures for a notebook's output, with all it needs in it."""
    return _environment().get_template("notebook.html").render(figures=figures)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page whole; `values` are those that the template names. Errors: `UserError` as `check_page`'s."""
    check_page(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _environment().get_template(template).render(values))


def check_page(path: Path) -> None:
    """Raise `UserError` where something else than a page of ours lies."""
    if path.is_dir() or (path.exists() and _MARK not in path.read_bytes()[:1000]):
        raise UserError(f"{path}: is no page of unitok's; choose another name, or remove it")
