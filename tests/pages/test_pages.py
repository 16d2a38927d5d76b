"""Promises of pages: no name or text becomes an element, and nothing but a page is replaced by one."""

import ast
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from elements import Elements, only_utf8
from PIL import Image

from unitok import pages
from unitok.cli import main
from unitok.errors import UserError, visible
from unitok.media import encode_png

TEMPLATES = Path(pages.__file__).parent
HOSTILE = "<img src=x onerror=alert(1)>\"'&\x1b[2J\u202e"


def page_of(text: str, path: Path, template: str) -> Elements:
    """A page that shows a text wherever the template takes one, and an image whose file has it as its name."""
    image, audio = path.parent / text, path.parent / "javascript:a#?%"
    for file in (image, audio):
        file.write_bytes(b"")
    figure = pages.Figure(pages.text(text) + pages.image(image) + pages.audio(audio), text, text)
    articles = [pages.Article([figure, pages.Figure(text)], text, text)]
    score = {"name": text, "shown": text, "fraction": text, "folds": [text, text]}
    pages.write_page(
        path,
        template,
        title=text,
        lead=text,
        heading=text,
        articles=articles,
        figures=3 * [figure, pages.Figure(text)],
        budget=1,
        memory=1,
        measures=[score],
        scores={text: text, "by_levels": [{text: text}]},
        reconstructions=articles,
        seconds={text: 1},
        generations=[{"title": text, "groups": [{"title": text, "right": text, "articles": articles}]}],
        charts={text: [{"points": text, "label": text}]},
    )
    return Elements(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "template", sorted(f.name for f in TEMPLATES.glob("*.html") if f.name not in ("base.html", "macros.html", "notebook.html"))
)
def test_every_text_and_name_is_escaped_where_it_is_put(template, tmp_path):
    elements = page_of(HOSTILE, tmp_path / "a.html", template)
    assert elements.text.count(visible(HOSTILE)) >= 7
    assert "\x1b" not in (tmp_path / "a.html").read_text(encoding="utf-8")
    media = {tag: attributes for tag, attributes in elements.found if tag in ("img", "audio")}
    assert media["audio"]["src"] == "javascript%3Aa%23%3F%25"  # no scheme, no fragment, no query
    assert unquote(media["img"]["src"]) == HOSTILE
    harmless = page_of("plain", tmp_path / "b.html", template)
    assert [(tag, set(found)) for tag, found in elements.found] == [(tag, set(found)) for tag, found in harmless.found]


def test_only_pages_of_ours_are_replaced(tmp_path):
    page_of(HOSTILE, tmp_path / "a.html", "articles.html")
    page_of(HOSTILE, tmp_path / "a.html", "articles.html")  # its own
    (tmp_path / "notes.html").write_text("mine")
    for taken in (tmp_path / "notes.html", tmp_path):
        with pytest.raises(UserError, match="was not written by unitok"):
            page_of("x", taken, "articles.html")
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_a_page_is_one_file_without_scripts_that_fetches_nothing():
    sources = "".join(f.read_text() for f in TEMPLATES.iterdir() if f.suffix in (".html", ".css"))
    assert "://" not in sources
    assert "url(" not in sources
    assert "@import" not in sources
    assert "<script" not in sources
    assert "script-src 'none'" in (TEMPLATES / "base.html").read_text()


def test_small_images_are_enlarged_to_whole_pixels_and_large_ones_are_not():
    shown = {side: Elements(pages.image(encode_png(torch.zeros(3, 2, side)))).found[0][1] for side in (20, 64, 65, 300)}
    assert {side: image.get("width") for side, image in shown.items()} == {20: "120", 64: "128", 65: None, 300: None}
    assert {side for side, image in shown.items() if image.get("class") == "small"} == {20, 64}


def tags(source: str) -> set[str]:
    """HTML in the strings of a Python file, its docstrings too."""
    known = "html|head|body|meta|title|style|script|div|span|p|h[1-6]|a|br|img|figure|figcaption|article|section|table|tr|td|th|ul|li|svg|path"
    pattern = re.compile(rf"</?(?:{known})(?:\s[^<>]*)?/?>|<(?:{known}|audio|video)\s+[\w-]+=")
    strings = [
        node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return {found[0] for string in strings for found in pattern.finditer(string)}


def test_html_is_written_in_templates_alone():
    package = TEMPLATES.parent
    assert {f.relative_to(package).as_posix() for f in package.rglob("*.py") if tags(f.read_text())} == set()
    assert tags('f"<td>{x}</td>"') == {"<td>", "</td>"}
    assert tags("'<audio controls=1 src=' + name") == {"<audio controls="}
    assert tags("f'<{name}>'; '<audio>'; '</image>'") == set()  # special tokens


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
    error = capsys.readouterr().err
    assert error.startswith("error: gone\\n\\x1b[2J\\xe9: ")
    assert error.count("\n") == 1
