"""Outputs: decoded content of what was generated, and files: text, PNG, WAV, `outputs.jsonl` and one page to look at."""

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from unitok import pages
from unitok.bundle import Bundle, ReadFile
from unitok.document import Document, Part, RawDocument
from unitok.files import whole_folder, write_text
from unitok.interleaved import Types, format_raw_document
from unitok.media.formats import HEAD, image_format

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Output:
    """One continuation."""

    bundle: Bundle = field(repr=False)
    prompt: Document  # that it continues
    new: Document
    ids: np.ndarray  # of what is new
    index: int = 0
    score: float | None = None  # by which it was the best, where there were several to choose from
    _decoded: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def document(self) -> Document:
        """Prompt and continuation together."""
        return Document(self.prompt.segments + self.new.segments, f"{self.index:06d}")

    def content(self, i: int) -> Any:
        """The i-th generated segment, decoded (once), as `Bundle.decode` gives it."""
        if i not in self._decoded:
            self._decoded[i] = self.bundle.decode(self.new.segments[i])
        return self._decoded[i]

    def of_kind(self, kind: str) -> list[Any]:
        """Generated content of a kind, of all tokenizers of that kind, in order."""
        names = [name for name, span in self.bundle.vocab.spans.items() if span.kind == kind]
        return [self.content(i) for i, segment in enumerate(self.new.segments) if segment.modality in names]

    @property
    def text(self) -> str:
        """All generated text."""
        return "".join(self.of_kind("text"))

    @property
    def images(self) -> "list[Tensor]":
        """Generated images, float [3, H, W] in [-1, 1]."""
        return self.of_kind("image")

    @property
    def audios(self) -> "list[Tensor]":
        """Generated audio, float [C, T] in [-1, 1] at the audio tokenizer's rate."""
        return self.of_kind("audio")

    def save(self, folder: str | Path) -> RawDocument:
        """Write the whole document's files into a folder, generated text as .txt. Files that the prompt gave as a Path are copied
        as they are; all else of it is decoded."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.index:06d}"
        parts: list[Part] = []
        for i, segment in enumerate(self.prompt.segments):
            if isinstance(segment.source, ReadFile) and (suffix := _suffix(segment.source)):
                copy = folder / f"{name}-prompt-{i}.{suffix}"
                shutil.copyfile(segment.source, copy)
                parts.append(Part(segment.modality, path=copy, role=segment.role, loss=False))
            else:
                one = self.bundle.write_document(Document((segment,)), folder, f"{name}-prompt-{i}")
                parts += [Part(p.type, p.value, p.path, p.role, False) for p in one.content]
        contents = [self.content(i) for i in range(len(self.new.segments))]
        parts += self.bundle.write_document(self.new, folder, name, contents).content
        if self.text:
            (folder / f"{name}.txt").write_text(self.text, encoding="utf-8")
        return RawDocument(name, tuple(parts))


def _suffix(path: str) -> str:
    """For the copy of a file, by what is in it, whatever its name: `png`, `wav`; "" where it cannot be opened any more."""
    try:
        with open(path, "rb") as file:
            name = image_format(file.read(HEAD), path)
        name = name or soundfile.info(path).format
    except (OSError, soundfile.LibsndfileError):
        return ""
    return {"JPEG": "jpg", "WAVEX": "wav"}.get(name, re.sub(r"\W", "", name).lower())


def save_outputs(outputs: list[Output], folder: Path, title: str = "unitok sample", overwrite: bool = False) -> None:
    """Write all outputs into a folder: their files, `outputs.jsonl` (a line is the whole document) and `index.html`. Earlier
    outputs go, other files stay. Errors: `UserError` where something else lies there, unless `overwrite` is set."""
    with whole_folder(folder, "sample output", overwrite) as new:
        raws, types = [output.save(new) for output in outputs], outputs[0].bundle.types if outputs else {}
        lead, articles = "Gray: given. Blue: generated.", [_article(raw, types) for raw in raws]
        pages.write_page(new / "index.html", "articles.html", title=title, lead=lead, articles=articles)
        write_text(new / "outputs.jsonl", "".join(format_raw_document(raw, new, types) + "\n" for raw in raws))


def _article(raw: RawDocument, types: Types) -> pages.Article:
    figures = []
    for part in raw.content:
        modality = types[part.type]
        element = modality.html(None, part.value) if part.path is None else modality.html_of_file(part.path)
        figures.append(pages.Figure(element, kind="new" if part.loss else "given"))
    return pages.Article(figures)
