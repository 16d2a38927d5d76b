"""Every snippet of the README that is marked bash or python runs, in order, in one empty folder; then that of generation."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readme_runs_from_top_to_bottom(tmp_path):
    snippets = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert [language for language, _ in snippets] == ["bash", "bash", "bash", "python"]
    for name in ("configs", "sample.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, code in snippets:
        program = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(
            program, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    (tmp_path / "runs" / "demo").mkdir()
    (tmp_path / "runs" / "demo" / "bundle").symlink_to(tmp_path / "runs" / "bundle")
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "generation.md").read_text(), flags=re.S)
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    assert (tmp_path / "one" / "000000-0.png").exists()
    assert (tmp_path / "samples" / "index.html").exists()


def test_every_file_that_the_docs_link_to_is_there():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
