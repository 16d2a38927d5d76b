"""Writes docs/benchmarks.md from the docstrings of the benchmarks and benchmarks/results/: `make benchmarks-page`.

python benchmarks/write_page.py [--out docs/benchmarks.md]
"""

import argparse
import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
#: Scripts in the order of the page, with the files of their results.
SCRIPTS = {
    "photos": ("photos",),
    "scenes": ("scenes",),
    "image_tokenizer": ("image_tokenizer", "image_tokenizer.gpu"),
    "speech": ("speech",),
    "scenes_audio": ("scenes_audio",),
    "audio_tokenizer": ("audio_tokenizer",),
    "tokenization": ("tokenization",),
    "train_step": ("train_step", "train_step_compiled", "train_step_half", "train_step_compiled_half"),
    "loss_race": ("loss_race",),
    "recipes": ("recipes",),
    "scene_race": ("scene_race",),
    "stability": ("stability",),
    "generate": ("generate",),
    "step": ("step",),
    "weights": ("weights",),
    "jacobi": ("jacobi",),
    "waiting": ("waiting",),
    "serve": ("serve",),
    "scale": ("scale",),
    "on_gpu": ("on_gpu.gpu",),
}
COLUMNS = {"case": "case", "unit": "unit", "ours": "unitok", "peer": "peer", "theirs": "peer's result", "ratio": "ratio"}
HEAD = """# Benchmarks

<!-- Written by benchmarks/write_page.py (`make benchmarks-page`); edit the docstrings of the scripts instead. -->

Each script of `benchmarks/` prints its table and writes `benchmarks/results/NAME.json`; `--quick` is a short trial. The peer runs in the
same session, warmed up, with its best settings. A ratio over 1 is in favor of unitok. What has no column for a GPU was not measured on
one.

"""


def written(value: object) -> str:
    """A value of a result as a cell: three digits, thousands with commas."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 0.001 else f"{value:.0e}"


def table(rows: list[list[str]]) -> str:
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def _cases(cases: list[dict[str, Any]], gpu: list[dict[str, Any]]) -> str:
    """The table of all cases; the same on a GPU in the last column, where it was measured."""
    keys = [key for key in COLUMNS if any(case.get(key) is not None for case in cases)]
    keys += [key for key in dict.fromkeys(key for case in cases for key in case) if key not in COLUMNS and key != "difference"]
    keys += ["difference"] if "ratio" not in keys and any("difference" in case for case in cases) else []
    on_gpu = {(case["case"], case.get("peer")): f"{written(case['ours'])} ({written(case['ratio'])})" for case in gpu}
    last = ["on a GPU (ratio)"] if any((case["case"], case.get("peer")) in on_gpu for case in cases) else []
    rows = [[*(COLUMNS.get(key, key.replace("_", " ")) for key in keys), *last]]
    for case in cases:
        shown = [on_gpu.get((case["case"], case.get("peer")), "not measured") for _ in last]
        rows.append([*(written(case.get(key)) for key in keys), *shown])
    return table(rows)


def _losses(losses: dict[str, Any]) -> str:
    """Losses by learning rate and options, or by recipe (a list, one loss per seed)."""
    first = next(iter(losses.values()))
    if isinstance(first, dict):
        return table([["learning rate", *first], *([rate, *map(written, row.values())] for rate, row in losses.items())])
    return table([["recipe", "loss by seed"], *([name, ", ".join(map(written, row))] for name, row in losses.items())])


def _more(results: dict[str, Any]) -> str:
    """What else a result holds, as a list: numbers and texts, or numbers by name."""
    lines = []
    for key, value in results.items():
        if key in ("date", "machine", "versions", "cases", "losses"):
            continue
        if isinstance(value, int | float | str):
            lines.append((key, written(value)))
        elif isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values()):
            lines.append((key, ", ".join(f"{name} {written(v)}" for name, v in value.items())))
    return "".join(f"- {key}: {value}\n".replace("_", " ") for key, value in lines)


def _section(script: str, names: tuple[str, ...]) -> str:
    """One benchmark: title, command, what was measured, how, and the tables."""
    title, command, *paragraphs = (ast.get_docstring(ast.parse((FOLDER / f"{script}.py").read_text())) or "").split("\n\n")
    parts = [f"## {title.removesuffix('.')}\n", f"`{command.strip()}`\n", *(f"{text}\n" for text in paragraphs)]
    for name in names:
        results = json.loads((FOLDER / "results" / f"{name}.json").read_text())
        gpu = FOLDER / "results" / f"{name}.gpu.json"
        if results.get("cases"):
            parts.append(_cases(results["cases"], json.loads(gpu.read_text())["cases"] if gpu.exists() else []))
        if isinstance(results.get("losses"), dict):
            parts.append(_losses(results["losses"]))
        parts += [_more(results)] if _more(results) else []
        machine, versions = results["machine"], results["versions"]
        on = f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads"
        on += f", {machine['gpu']} (driver {machine['driver']})" if "gpu" in machine else ""
        parts.append(
            f"`{name}.json`, {results['date']}: {on}; {', '.join(f'{package} {v}' for package, v in versions.items())}.\n"
        )
    return "\n".join(parts)


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(_section(script, names) for script, names in SCRIPTS.items())


def write(page: Callable[[], str], name: str, about: str | None) -> None:
    """Write a page into docs/, or where the command line says. about: what it says of itself."""
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=FOLDER.parent / "docs" / name)
    o = p.parse_args()
    o.out.write_text(page())
    print(o.out)


if __name__ == "__main__":
    write(page, "benchmarks.md", __doc__)
