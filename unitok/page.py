"""HTML pages to look at and listen to. What comes from outside is escaped here, and nowhere else; pages are UTF-8 everywhere."""

import html
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

from unitok.errors import UserError, visible
from unitok.files import write_text

_MARK = '<meta name="generator" content="unitok">'


def text(content: object) -> str:
    """Any text, for an element or between double quotes."""
    return html.escape(visible(content, lines=True))


def image(source: bytes | str, attributes: str = 'alt="picture"') -> str:
    """An element for a PNG's bytes, or for the file of that name beside the page."""
    return f'<img {attributes} src="{_url(source, "image/png")}">'


def audio(source: bytes | str, attributes: str = "") -> str:
    """A player for a WAV's bytes, or for the file of that name beside the page."""
    return f'<audio controls {attributes} src="{_url(source, "audio/wav")}"></audio>'


def _url(source: bytes | str, kind: str) -> str:
    if isinstance(source, bytes):
        return f"data:{kind};base64,{b64encode(source).decode()}"
    return html.escape(quote(source, errors="surrogateescape"))  # a colon too, so a name is never a scheme


def write_page(path: Path, title: str, style: str, body: str) -> None:
    """Write a page, whole; `body` is HTML. Errors: `UserError` as `check_page`'s."""
    check_page(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        path,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_MARK}<title>{text(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{style}</style></head><body>'
        f"<h1>{text(title)}</h1>{body}</body></html>\n",
    )


def check_page(path: Path) -> None:
    """Raise `UserError` where something else than a page of ours lies."""
    if path.is_dir() or (path.exists() and _MARK.encode() not in path.read_bytes()[:1000]):
        raise UserError(f"{path}: is no page of unitok's; choose another name, or remove it")
