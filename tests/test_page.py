"""Promises of pages: no name or text becomes an element, and nothing but a page is replaced by one."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unitok import page
from unitok.cli import main
from unitok.errors import UserError, visible

HOSTILE = "<img src=x onerror=alert(1)>\"'&\x1b[2J\u202e"


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


def test_every_text_and_name_is_escaped_where_it_is_put(tmp_path):
    page.write_page(tmp_path / "a.html", HOSTILE, "", page.text(HOSTILE) + page.image(HOSTILE) + page.audio("javascript:a#?%"))
    elements = Elements((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert elements.text.count(visible(HOSTILE)) == 3
    assert "\x1b" not in elements.text
    assert [(tag, set(a)) for tag, a in elements.found[-2:]] == [("img", {"alt", "src"}), ("audio", {"controls", "src"})]
    assert elements.found[-1][1]["src"] == "javascript%3Aa%23%3F%25"
    page.write_page(tmp_path / "a.html", "again", "", "")  # its own
    (tmp_path / "notes.html").write_text("mine")
    for taken in (tmp_path / "notes.html", tmp_path):
        with pytest.raises(UserError, match="no page of unitok's"):
            page.write_page(taken, "x", "", "")
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_measuring_files_with_hostile_names_shows_them_as_text(bundle_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    for name in (b"<script>alert(1)<", b"caf\xe9.png", b"a\nb\x1b[2J.png"):
        with open(bytes(tmp_path / "in") + b"/" + name, "wb") as file:
            file.write((tmp_path / "a.png").read_bytes())
    written = only_utf8(monkeypatch)
    main(["eval", "image-tokenizer", str(bundle_folder), str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    elements = Elements((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in elements.found}
    assert all(told in elements.text for told in ("<script>alert(1)<", "caf\\xe9.png", "a\nb\\x1b[2J.png"))
    assert {"index.html", "images.jsonl"} <= written
    assert len((tmp_path / "out" / "images.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_names_in_a_terminal_send_it_nothing():
    assert visible("a\x1b[2J\r\n\t\x9b\x00\x7f\u2028\u202e\u2066\udce9\ud800é\u0301") == (
        r"a\x1b[2J\r\n\t\x9b\x00\x7f\u2028\u202e\u2066\xe9\ud800" + "é\u0301"
    )
    assert visible("a\nb\tc\rd", lines=True) == "a\nb\tc\\rd"


def test_an_error_that_quotes_a_name_is_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--bundle", "gone\n\x1b[2J\udce9", "--text", "x"])
    assert (
        capsys.readouterr().err == "error: gone\\n\\x1b[2J\\xe9/bundle.json: no such file; make a bundle with `unitok bundle`\n"
    )
