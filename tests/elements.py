"""Reads pages: their elements and text, and which files said their encoding."""

import builtins
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
    names, write, opens = set(), Path.write_text, builtins.open

    def writes(path, text, encoding=None):
        assert encoding == "utf-8" or text.isascii(), path
        names.update({path.name} if encoding else {})
        return write(path, text, encoding)

    def opened(file, mode="r", *rest, encoding=None, **more):
        if "w" in mode and encoding == "utf-8":
            name = Path(file).name.removesuffix(".partial")
            names.update({name, name.rpartition(".")[0]})  # a file that is whole when it is renamed has a random name
        return opens(file, mode, *rest, encoding=encoding, **more)

    monkeypatch.setattr(Path, "write_text", writes)
    monkeypatch.setattr(builtins, "open", opened)
    return names
