"""MkDocs hooks: the README is the front page, links that leave docs/ become plain text, and diagrams are drawn by our copy of Mermaid."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add the README as index.md. Its links to docs/X become links to X, all others to files of the repository become text."""
    text = re.sub(r"(\]\(|src=\")(?!\w+:|#)", r"\1../", (ROOT / "README.md").read_text())
    files.append(File.generated(config, "index.md", content=text.replace("../docs/", "")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keep of a link that leaves docs/ its text alone: the site has no copy of the repository's files."""
    return re.sub(r"(?<!!)\[([^]\n]+)\]\(\.\./[^)]+\)", r"\1", markdown.replace("](../README.md", "](index.md"))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Load Mermaid where there is a diagram, and before Material for MkDocs would load it from a content delivery network."""
    script = f'<script src="{get_relative_url("assets/mermaid.tiny.js", page.url)}"></script>'
    return output.replace("</body>", f"{script}</body>") if 'class="mermaid"' in output else output
