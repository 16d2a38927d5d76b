"""Runs the notebook examples/tour.ipynb and keeps what its cells show: texts, and images as PNG.

    python docs/figures/tour.py [examples/tour.ipynb] [--out examples/tour.ipynb]

A cell shows what it prints and, as in Jupyter, the value of its last line. `make figures` runs this script; no Jupyter is needed.
"""

import argparse
import ast
import contextlib
import io
import json
import tempfile
from base64 import b64encode
from pathlib import Path
from typing import Any

from PIL import Image

from unitok.files import write_text


def run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the code of a cell with the names of those before it; return its outputs in the notebook's format."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        shown = {"text/plain": repr(value).splitlines(keepends=True)}
        if isinstance(value, Image.Image):
            file = io.BytesIO()
            value.save(file, "PNG", optimize=True)
            shown = {"image/png": b64encode(file.getvalue()).decode(), "text/plain": ["an image"]}
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": shown})
    return outputs


def run_notebook(notebook: dict[str, Any]) -> None:
    """Run all cells of code, and put their outputs into the notebook; files that they write are removed. Raises what a cell raises."""
    names: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = run_cell("".join(cell["source"]), names)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebook", nargs="?", type=Path, default=Path(__file__).parents[2] / "examples" / "tour.ipynb")
    p.add_argument("--out", type=Path, help="default: the notebook itself")
    o = p.parse_args()
    notebook = json.loads(o.notebook.read_text())
    run_notebook(notebook)
    write_text(o.out or o.notebook, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(o.out or o.notebook)


if __name__ == "__main__":
    main()
