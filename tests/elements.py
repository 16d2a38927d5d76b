"""Reads pages: their elements and text, and which files said their encoding."""

from html.parser import HTMLParser
from pathlib import Path


class Elements(HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def only_utf8(monkeypatch) -> set[str]:
    """Texts that are not ASCII must say their encoding, so that no locale decides; -> the names of files that do."""
    names, write = set(), Path.write_text

    def writes(path, text, encoding=None):
        assert encoding == "utf-8" or text.isascii(), path
        return write(path, text, encoding)

    def opens(path, mode="r", encoding=None):
        assert "b" in mode or encoding in ("utf-8", "utf-8-sig"), path
        names.update({path.name.removeprefix(".").removesuffix(".partial")} if mode == "w" else {})
        return open(path, mode, encoding=encoding)

    monkeypatch.setattr(Path, "write_text", writes)
    monkeypatch.setattr("unitok.files.open", opens, raising=False)
    return names
