"""Measuring a tokenizer on a folder of files: reading, batches, rows and their page. What is measured is in `image.py`, `audio.py`."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unitok import pages
from unitok.errors import UserError
from unitok.files import check_replaceable, whole_folder, write_json, write_json_lines
from unitok.media import find_media
from unitok.storage import printable


@dataclass
class Measured:
    """One file: what is known of it, by what the worst come first, and what makes its part of the page."""

    row: dict[str, Any]
    quality: float
    figures: Callable[[], list[pages.Figure]]


class Measure(Protocol):
    """What differs between kinds. `listing`: the file of rows. `shown`: files on the page."""

    kind: str
    listing: str
    shown: int

    def read(self, path: Path) -> Tensor:
        """A file's content as the tokenizer takes it. Errors: `UserError`."""

    def measure(self, batch: Tensor) -> list[Measured]:
        """Reconstruct contents of equal shape."""

    def scores(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Scores of all files together."""


def evaluate_tokenizer(
    measure: Measure, folder: Path, out: Path, limit: int, batch_size: int, overwrite: bool, progress: bool
) -> dict[str, Any]:
    """Measure files; write `scores.json`, the rows and `index.html`; returns the scores.

    Errors: `UserError` where something else lies in `out`, unless `overwrite` is set, and where no file can be read.
    """
    kind = measure.kind
    check_replaceable(out, f"{kind} evaluation", overwrite)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    everything, empty = find_media(folder, kind)
    files = everything[: limit or None]
    if not files:
        raise UserError(f"{folder}: no {kind} files in it")
    measured: list[tuple[float, dict[str, Any]]] = []
    worst: list[Measured] = []
    skipped = [_skip(path, f"{path}: an empty file") for path in empty]
    waiting: dict[torch.Size, list[tuple[Path, Tensor]]] = {}

    def finish(shape: torch.Size) -> None:
        paths, contents = zip(*waiting.pop(shape), strict=True)
        for path, one in zip(paths, measure.measure(torch.stack(contents)), strict=True):
            one.row = {"file": printable(path.relative_to(folder).as_posix())} | one.row
            measured.append((one.quality, one.row))
            worst.append(one)
        worst.sort(key=lambda one: one.quality)
        del worst[measure.shown :]

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
    if not measured:
        raise UserError(f"{folder}: none of its {len(files)} {kind} files can be read; the first: {skipped[0]['error']}")
    rows = [row for _, row in sorted(measured, key=lambda each: each[0])]
    scores = measure.scores(rows) | {"skipped": len(skipped)}
    articles = [pages.Article(one.figures(), one.row["file"]) for one in worst]
    with whole_folder(out, f"{kind} evaluation", overwrite=True) as new:
        write_json_lines(new / measure.listing, [*rows, *skipped])
        title = f"{kind.capitalize()} tokenizer"
        pages.write_page(new / "index.html", "evaluation.html", title=title, scores=scores, articles=articles)
        write_json(new / "scores.json", scores)
    return scores


def _skip(path: Path, error: str) -> dict[str, str]:
    return {"file": printable(str(path)), "error": printable(error)}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that a block takes to `seconds[name]`."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    yield
    wait()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


def means(rows: list[dict[str, Any]], names: Iterable[str]) -> dict[str, float]:
    """Mean over rows of each name that some row has a value of."""
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: float(np.mean(found)) for name, found in values.items() if found}


def print_table(scores: dict[str, Any]) -> None:
    """Print scores, four digits each; those by level as a table."""
    levels = scores.get("by_levels", [])
    for name, value in scores.items():
        if value is not levels:
            print(f"{name:<32}{value:>12.4g}")
    for names in [list(level) for level in levels[:1]]:
        print("".join(f"{name:>{len(name) + 2}}" for name in names))
        for level in levels:
            print("".join(f"{level.get(name, math.nan):>{len(name) + 2}.4g}" for name in names))
