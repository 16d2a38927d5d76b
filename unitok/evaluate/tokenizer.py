"""Measuring a tokenizer on a folder of files: reading, batches, rows and their page. What is measured is in `image.py` and
`audio.py`."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unitok import pages
from unitok.errors import UserError, check_range, visible
from unitok.files import check_replaceable, whole_folder, write_json, write_json_lines
from unitok.media import find_media
from unitok.storage import printable

Row = dict[str, object]  # plain types, for a line of JSON


@dataclass
class Measured:
    """One file: its row of scores, the quality that sorts the page (the worst first), and a function that draws its figures."""

    row: Row
    quality: float
    figures: Callable[[], list[pages.Figure]]


class Measure(Protocol):
    """What differs between kinds. `also`: what their files may look like, too. `listing`: name of the file of rows. `shown`: number of files
    on the page."""

    kind: str
    also: tuple[str, ...]
    listing: str
    shown: int

    def read(self, path: Path) -> Tensor:
        """The content of a file as the tokenizer takes it. Errors: `UserError`."""

    def measure(self, batch: Tensor) -> list[Measured]:
        """Reconstruct contents of equal shape, stacked, and compare each with its original."""

    def scores(self) -> Row:
        """Scores of all files together, by name: numbers, and lists of rows for tables."""


def evaluate_tokenizer(
    measure: Measure, folder: Path, out: Path, limit: int, batch_size: int, overwrite: bool, progress: bool
) -> Row:
    """Measure files; write `scores.json`, the rows and `index.html`. Returns the scores.

    limit: how many files, the first by name; 0: all. Errors: `UserError` if something else lies in `out` and `overwrite` is not
    set, and if no file can be read.
    """
    kind = measure.kind
    check_range("limit", limit, 0)
    check_range("batch_size", batch_size, 1)
    check_replaceable(out, f"{kind} evaluation", overwrite)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths, empty = find_media(folder, kind, measure.also)
    files = paths[: limit or None]
    if not files:
        raise UserError(f"{folder}: no {kind} files in it")
    measured: list[tuple[float, Row]] = []
    worst: list[tuple[str, Measured]] = []
    skipped = [_skipped(path, f"{path}: an empty file") for path in empty]
    waiting: dict[torch.Size, list[tuple[Path, Tensor]]] = {}

    def finish(shape: torch.Size) -> None:
        batch, contents = zip(*waiting.pop(shape), strict=True)
        for path, one in zip(batch, measure.measure(torch.stack(contents)), strict=True):
            name = printable(path.relative_to(folder).as_posix())
            measured.append((one.quality, {"file": name} | one.row))
            worst.append((name, one))
        worst.sort(key=lambda named: named[1].quality)
        del worst[measure.shown :]

    for path in tqdm(files, desc="reconstruct", unit=kind, disable=not progress):
        try:
            content = measure.read(path)
        except UserError as error:
            skipped.append(_skipped(path, str(error)))
            continue
        waiting.setdefault(content.shape, []).append((path, content))
        if len(waiting[content.shape]) >= batch_size:
            finish(content.shape)
    for shape in list(waiting):
        finish(shape)
    if not measured:
        raise UserError(f"{folder}: none of its {len(files)} {kind} files can be read; the first: {skipped[0]['error']}")
    rows = [row for _, row in sorted(measured, key=lambda each: each[0])]
    scores = measure.scores() | {"skipped": len(skipped)}
    with whole_folder(out, f"{kind} evaluation", overwrite=True) as new:
        write_json_lines(new / measure.listing, [*rows, *skipped])
        pages.write_page(
            new / "index.html",
            "evaluation.html",
            title=f"{kind.capitalize()} tokenizer",
            scores=scores,
            heading="Originals and reconstructions, the worst first",
            articles=[pages.Article(one.figures(), name) for name, one in worst],
        )
        write_json(new / "scores.json", scores)
    return scores


def _skipped(path: Path, error: str) -> Row:
    return {"file": printable(str(path)), "error": printable(error)}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that a block takes to `seconds[name]`, work on CUDA devices included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    yield
    wait()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


def means(rows: Iterable[Mapping[str, float | None]], names: Iterable[str]) -> dict[str, float]:
    """Mean of each name over the rows that have a value of it; names without any value are left out."""
    rows = list(rows)
    values = {name: [value for row in rows if (value := row.get(name)) is not None] for name in names}
    return {name: float(np.mean(column)) for name, column in values.items() if column}


def print_scores(scores: Mapping[str, object]) -> None:
    """Print scores: a line per number, of four digits, and a table per list of rows."""
    for name, value in scores.items():
        if not isinstance(value, list):
            print(f"{name:<32}{_cell(value):>12}")
    for value in scores.values():
        if isinstance(value, list):
            print()
            _print_table(value)


def _print_table(rows: Sequence[Mapping[str, object]]) -> None:
    names = list(rows[0])
    lines = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else visible(value)
