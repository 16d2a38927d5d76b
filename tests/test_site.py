"""The documentation's site is built without a warning, fetches nothing from elsewhere, and draws its diagrams with its own Mermaid."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_of_the_docs_is_in_the_menu(site):
    pages = {file.stem for file in (ROOT / "docs").glob("*.md")}
    menu = set(re.findall(r'href="\.\./([\w-]+)/" class="md-nav__link"', (site / "reference" / "index.html").read_text()))
    assert pages - menu == {"reference"}  # a page's link to itself is "./"


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe|audio|video|source)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', text)
        assert [url for pair in loaded for url in pair if "//" in url] == [], page
        assert ('class="mermaid"' in text) == ("mermaid.tiny.js" in text), page
    assert "mermaid.tiny.js" in (site / "design" / "index.html").read_text()


def test_the_reference_shows_signatures_and_docstrings(site):
    text = re.sub(r"<[^>]+>", "", (site / "reference" / "index.html").read_text())
    for shown in (
        "Unitok",
        "generate(",
        "Document",
        "Segment",
        "Vocab",
        "Grammar",
        "TextTokenizer",
        "ImageTokenizer",
        "AudioTokenizer",
    ):
        assert shown in text
