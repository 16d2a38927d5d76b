"""Measuring a tokenizer on a folder of files: reading, batches, rows and their page. What is measured is in `image.py`, `audio.py`."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unitok import pages
from unitok.bundle import load_trained_part
from unitok.document import json_line
from unitok.errors import UserError
from unitok.media import find_media
from unitok.pretrained import check_replaceable, whole_folder
from unitok.storage import printable


class Measure:
    """What is measured of one kind of content. A row is what is known of one file: plain values by name."""

    listing: str  # the file of rows
    shown: int  # of the worst, on the page

    def __init__(self, model: Any):
        self.model = model
        self.codes: list[Tensor] = []
        self.seconds = {"encode": 0.0, "decode": 0.0}

    def read(self, path: Path) -> Tensor:
        """A file's content as the tokenizer takes it. Errors: `UserError`."""
        raise NotImplementedError

    def measure(self, batch: Tensor) -> list[tuple[dict[str, Any], Any]]:
        """Rows of contents of equal shape, each with what `figures` needs. Adds to `codes` and `seconds`."""
        raise NotImplementedError

    def quality(self, row: dict[str, Any]) -> float:
        """By which the worst come first."""
        raise NotImplementedError

    def scores(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Scores of all files together: numbers, and lists of rows."""
        raise NotImplementedError

    def figures(self, row: dict[str, Any], contents: Any) -> list[pages.Figure]:
        """Original and reconstructions."""
        raise NotImplementedError

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to `seconds[name]`."""
        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        wait()
        began = time.perf_counter()
        yield
        wait()
        self.seconds[name] += time.perf_counter() - began


def evaluate_tokenizer(
    measure_of: Callable[[Any], Measure],
    kind: str,
    tokenizer: Path,
    folder: Path,
    out: Path,
    limit: int = 0,
    batch_size: int = 1,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a tokenizer of a kind; write `scores.json`, the rows and `index.html`; returns the scores.

    Errors: `UserError` where something else lies in `out`, unless `overwrite` is set, and where no file can be read.
    """
    check_replaceable(out, f"{kind} evaluation", overwrite)
    part, _ = load_trained_part(kind, tokenizer)
    measure = measure_of(part.to(device))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    everything, empty = find_media(folder, kind)
    files = everything[: limit or None]
    if not files:
        raise UserError(f"{folder}: no {kind} files in it")
    rows: list[dict[str, Any]] = []
    shown: list[tuple[dict[str, Any], Any]] = []
    skipped = [_skip(path, f"{path}: an empty file") for path in empty]
    waiting: dict[torch.Size, list[tuple[Path, Tensor]]] = {}

    def finish(shape: torch.Size) -> None:
        paths, contents = zip(*waiting.pop(shape), strict=True)
        for path, (row, reconstructed) in zip(paths, measure.measure(torch.stack(contents)), strict=True):
            rows.append({"file": printable(path.relative_to(folder).as_posix())} | row)
            shown.append((rows[-1], reconstructed))
        shown.sort(key=lambda each: measure.quality(each[0]))
        del shown[measure.shown :]

    for path in tqdm(files, desc="reconstruct", unit=kind, disable=not progress):
        try:
            content = measure.read(path)
        except UserError as error:
            skipped.append(_skip(path, str(error)))
            continue
        waiting.setdefault(content.shape, []).append((path, content))
        if len(waiting[content.shape]) >= batch_size:
            finish(content.shape)
    for shape in list(waiting):
        finish(shape)
    if not rows:
        raise UserError(f"{folder}: none of its {len(files)} {kind} files can be read; the first: {skipped[0]['error']}")
    scores = measure.scores(rows) | {"skipped": len(skipped)}
    rows.sort(key=measure.quality)
    with whole_folder(out, f"{kind} evaluation", overwrite=True) as new:
        lines = "".join(json_line(row) + "\n" for row in [*rows, *skipped])
        (new / measure.listing).write_text(lines, encoding="utf-8")
        pages.write_page(
            new / "index.html",
            "articles.html",
            title=f"{kind.capitalize()} tokenizer",
            tables=tables(scores),
            lead="Originals and reconstructions, the worst first",
            articles=[pages.Article(measure.figures(row, reconstructed), row["file"]) for row, reconstructed in shown],
        )
        (new / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def _skip(path: Path, error: str) -> dict[str, str]:
    return {"file": printable(str(path)), "error": printable(error)}


def means(rows: list[dict[str, Any]], names: Iterable[str]) -> dict[str, float]:
    """Mean over rows of each name that some row has a value of."""
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: float(np.mean(found)) for name, found in values.items() if found}


def tables(scores: dict[str, Any]) -> list[pages.Table]:
    """Scores for people, four digits each: first the numbers, then each list of rows."""
    plain = pages.Table([(name, _format(value)) for name, value in scores.items() if not isinstance(value, list)])
    lists = {name: rows for name, rows in scores.items() if isinstance(rows, list)}
    return [plain] + [
        pages.Table([[_format(row.get(name)) for name in rows[0]] for row in rows], list(rows[0]), title.replace("_", " "))
        for title, rows in lists.items()
    ]


def _format(value: Any) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def print_table(scores: dict[str, Any]) -> None:
    """Print scores as tables."""
    for table in tables(scores):
        lines = [*([table.columns] if table.columns else []), *table.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for first, *others in lines:
            cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            print("  ".join([first.ljust(widths[0]), *cells]))
