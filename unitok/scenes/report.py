"""The report of the demo: one self-contained HTML file, which holds its images and audio."""

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from unitok import pages
from unitok.files import read_json, read_json_lines
from unitok.pages import Article, Figure

_TITLES = {
    "text_to_image": "Caption to image",
    "image_to_text": "Image to caption",
    "text_to_audio": "Caption to audio",
    "audio_to_text": "Audio to caption",
    "image_to_audio": "Image to audio",
    "questions": "Questions about an image",
    "interleaved": "Caption, image, caption, image",
}
_NOTES = {"": "", ".composed": ": new sequences of objects", ".systematic": ": new color-shape pairs"}
_FOLDS = (".composed", ".systematic")
_CURVES = {
    "image": ("loss", "psnr_db", "codebook_usage/0"),
    "audio": ("loss", "snr_db", "codebook_usage/0"),
    "decoder": ("loss", "bits_per_token/text", "bits_per_token/image", "bits_per_token/audio"),
}
_WIDTH, _HEIGHT, _MARGIN = 420, 170, 8  # of a chart; report.html has the same numbers


def _media(path: Path) -> Markup:
    return (pages.image if path.suffix == ".png" else pages.audio)(path.read_bytes())


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _measures(scores: Mapping[str, float | list[float]]) -> list[dict[str, object]]:
    """Rows of the table of scores. `fraction` is a number in [0, 1] that a bar shows, or None; `folds` are the scores on kept-out ones."""
    rows: list[dict[str, object]] = []
    for name, value in scores.items():
        if (
            name.startswith("scenes")
            or re.search(r"\.(one|two|three)\b", name)
            or name.endswith(_FOLDS)
            or name in ("seconds", "peak_memory_gb")
        ):
            continue
        fraction = None
        if isinstance(value, list):
            shown = ", ".join(map(_percent, value))
        elif name.endswith("_db"):
            shown = f"{value:.1f} dB"
        elif name == "malformed" or name.startswith("turns"):
            shown = f"{value:g}"  # a number of them
        else:
            fraction, shown = value, _percent(value)
        of_folds = [scores.get(name + ending) for ending in _FOLDS]
        folds = [_percent(value) if isinstance(value, float) else "" for value in of_folds]
        rows.append({"name": name, "shown": shown, "fraction": fraction, "folds": folds})
    return rows


def _reconstructions(folder: Path, pattern: str) -> list[Article]:
    pairs = [(path, path.with_name(path.name.replace("original", "reconstruction"))) for path in sorted(folder.glob(pattern))]
    return [Article([Figure(_media(a), "original"), Figure(_media(b), "reconstruction")]) for a, b in pairs]


def _samples(folder: Path) -> list[Article]:
    """Samples of one direction: prompt, output, and whether it is right."""
    rights = json.loads((folder / "right.json").read_text())
    articles = []
    for (_, row), right in zip(read_json_lines(folder / "outputs.jsonl"), rights, strict=True):
        figures = []
        for part in row["content"]:
            content = pages.text(part["text"]) if part["type"] == "text" else _media(folder / Path(part["path"]).name)
            figures.append(Figure(content, kind="new" if part.get("loss", True) else "given"))
        articles.append(Article(figures, kind="right" if right else "wrong"))
    return articles


def _generations(run: Path, scores: Mapping[str, float | list[float]]) -> list[dict[str, object]]:
    """Title of each direction, and its groups of samples: of the built-in bundle, of the one just trained, and that on kept-out folds."""
    shipped = read_json(run / "shipped" / "scores.json", "") if (run / "shipped").exists() else {}
    sections: list[dict[str, object]] = []
    for key, title in _TITLES.items():
        groups = []
        for folder, of_bundle, endings, name in (
            (run / "shipped", shipped, ("",), "the built-in bundle"),
            (run / "eval", scores, _NOTES, "trained just now"),
        ):
            for ending in endings:
                if (samples := folder / "samples" / f"{key}{ending}").exists():
                    pattern = rf"generation\.{key}\.[a-z]+{re.escape(ending)}"
                    value = next(v for name, v in of_bundle.items() if isinstance(v, float) and re.fullmatch(pattern, name))
                    note = f"{name}{_NOTES[ending]}"
                    groups.append({"title": note, "right": _percent(value), "articles": _samples(samples)})
        if groups:
            sections.append({"title": title, "groups": groups})
    return sections


def _curves(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Columns of a metrics.csv over steps: the points of an SVG polyline, and a label with the last and the highest value."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    curves = []
    for column in columns:
        points = [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if len(points) < 2:
            continue
        values = [value for _, value in points]
        top, low = max(values), min(0.0, *values)
        across = (_WIDTH - 2 * _MARGIN) / (points[-1][0] or 1.0)
        up = (_HEIGHT - 2 * _MARGIN) / (top - low or 1.0)
        line = [f"{_MARGIN + across * step:.1f},{_HEIGHT - _MARGIN - up * (value - low):.1f}" for step, value in points]
        curves.append({"points": " ".join(line), "label": f"{column} {values[-1]:.3g} (max {top:.3g})"})
    return curves


def write_report(run: Path, scores: Mapping[str, float | list[float]], seconds: Mapping[str, float], minutes: float) -> Path:
    """Write `report.html` into the folder of a demo.

    Args:
        run: folder of the demo.
        scores: by name, as `unitok eval` measures them.
        seconds: that each stage took.
        minutes: budget of the demo.

    Returns: path of the report.
    """
    reconstructions = run / "eval" / "reconstructions"
    metrics = {name: run / name / "metrics" / "metrics.csv" for name in _CURVES}
    path = run / "report.html"
    pages.write_page(
        path,
        "report.html",
        title="unitok demo",
        budget=minutes,
        memory=scores.get("peak_memory_gb", 0.0),
        measures=_measures(scores),
        reconstructions=_reconstructions(reconstructions, "*-original.png")
        + _reconstructions(reconstructions, "*-original.wav")[:4],
        generations=_generations(run, scores),
        charts={name: _curves(file, _CURVES[name]) for name, file in metrics.items() if file.exists()},
        seconds=seconds,
    )
    return path
