"""Outputs: the decoded content of what was generated, as objects, in notebooks, and as files with a page to look at."""

import re
import shutil
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
import soundfile

from unitok import pages
from unitok.bundle import Bundle, ReadFile
from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError
from unitok.files import whole_folder, write_text
from unitok.interleaved import Types, format_raw_document
from unitok.media import can_write_video
from unitok.media.formats import HEAD, image_format, promised
from unitok.modalities import AnyModality, referred, with_layers
from unitok.modalities.box import in_pixels
from unitok.modalities.video import VideoModality, with_audio

if TYPE_CHECKING:
    from torch import Tensor

    from unitok.modalities.video import Video


@dataclass(repr=False, eq=False)
class Output:
    """One continuation of a prompt. Equal only to itself."""

    bundle: Bundle
    prompt: Document  # that it continues
    new: Document
    ids: np.ndarray  # the new tokens, int64 [L]
    index: int = 0  # in the list of outputs
    score: float | None = None  # by which it is among the best, with `best_of`
    _decoded: dict[int, Any] = field(default_factory=dict, init=False)

    @property
    def document(self) -> Document:
        """Prompt and continuation together."""
        return Document(self.prompt.segments + self.new.segments, f"{self.index:06d}")

    def content(self, i: int) -> Any:
        """Return the i-th generated segment decoded, as `Bundle.decode` does: a str, image or audio. It is decoded once."""
        if i not in self._decoded:
            self._decoded[i] = self.bundle.decode(self.new.segments[i])
        return self._decoded[i]

    def replace_content(self, i: int, content: Any) -> None:
        """Let the i-th generated segment be shown and saved as other content than its codes decode to."""
        self._decoded[i] = content

    def of_kind(self, kind: str) -> list[Any]:
        """Return the generated content of one kind, of all tokenizers of that kind, in order."""
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

    @property
    def videos(self) -> "list[Video]":
        """Generated videos."""
        return self.of_kind("video")

    @property
    def movies(self) -> "list[Video]":
        """Videos with the audio of the same role beside them, joined where they stand in turn, a second of each; also of the prompt where
        what belongs to them is generated."""
        given = len(self.prompt.segments)
        made: list[Video] = []
        runs = groupby(enumerate(self.document.segments), lambda each: (bool(self._modality(each[1]).keys), each[1].role))
        for (timed, _), run in runs:
            some = list(run)
            rates = {getattr(self.bundle.require(s.modality), "sample_rate", 0) for _, s in some} - {0}
            if timed and some[-1][0] >= given and len(rates) == 1 and len(some) > 1:
                movie = with_audio([self.content(i - given) if i >= given else self._given(i) for i, _ in some], min(rates))
                made += [movie] if movie else []
        return made

    def _given(self, i: int) -> Any:
        """The i-th segment of the prompt decoded, once."""
        if ~i not in self._decoded:
            self._decoded[~i] = self.bundle.decode(self.prompt.segments[i])
        return self._decoded[~i]

    def _modality(self, segment: Segment) -> AnyModality:
        return self.bundle.modality(segment.modality)

    @property
    def boxes(self) -> list[np.ndarray]:
        """Generated boxes, float [N, 4] each: x0, y0, x1, y1 in pixels of the image that they belong to, fractions without one."""
        return self._places("box")

    @property
    def points(self) -> list[np.ndarray]:
        """Generated points, float [N, 2] each: x, y in pixels of the image that they belong to, fractions without one."""
        return self._places("point")

    def _places(self, kind: str) -> list[np.ndarray]:
        kinds, first = self._kinds, len(self.prompt.segments)
        places = []
        for number in (i for i in range(first, len(kinds)) if kinds[i] == kind):
            rows, about = self.content(number - first), referred(kinds, number, None)
            places.append(rows if about is None else in_pixels(rows, self._size(about)))
        return places

    def _size(self, number: int) -> tuple[int, int]:
        """(height, width) in pixels of an image of the document, before it was shrunk where that is known."""
        segment, first = self.document.segments[number], len(self.prompt.segments)
        if known := segment.original or segment.size:
            return known[0], known[1]
        height, width = (self.bundle.decode(segment) if number < first else self.content(number - first)).shape[-2:]
        return height, width

    # ---- Showing -------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        given = ", ".join(self._line(segment) for segment in self.prompt.segments)
        new = ", ".join(self._line(segment, i) for i, segment in enumerate(self.new.segments))
        score = "" if self.score is None else f", score {self.score:.3f}"
        return f"<Output {self.index}: {given or 'nothing'} -> {new or 'nothing'} ({len(self.ids)} tokens{score})>"

    def _line(self, segment: Segment, i: int | None = None) -> str:
        """Return a segment in a few words: its text, or the shape of its codes. i: its index in what was generated."""
        if not self.bundle.modality(segment.modality).inline:
            return f"{segment.modality} {'x'.join(map(str, segment.codes.shape))}"
        content = str(self.bundle.decode(segment) if i is None else self.content(i))
        return f"{segment.modality} {content if len(content) <= 40 else f'{content[:40]}…'!r}"

    def _repr_html_(self) -> str:
        """Show prompt (gray) and continuation in a notebook."""
        contents = [self._given(i) for i in range(len(self.prompt.segments))]
        contents += [self.content(i) for i in range(len(self.new.segments))]
        figures = [
            self._figure(segment, content, "given" if number < len(self.prompt.segments) else "new")
            for number, (segment, content) in enumerate(zip(self.document.segments, contents, strict=True))
        ]
        return pages.fragment(with_layers(self._kinds, contents, figures))

    @property
    def _kinds(self) -> list[str]:
        """The kinds of the whole document's segments."""
        return [self.bundle.vocab.span(segment.modality).kind for segment in self.document.segments]

    def _figure(self, segment: Segment, content: object, kind: str) -> pages.Figure:
        element = self.bundle.modality(segment.modality).html(self.bundle.require(segment.modality), content)
        return pages.Figure(element, kind=kind)

    # ---- Files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, overwrite: bool = False, as_map: str = "") -> RawDocument:
        """Write the files of the whole document into a folder, generated text as .txt, and `movies` with their audio. Files that the prompt named as a Path are
        copied as they are; everything else of the prompt is decoded. Returns the document that names them.

        overwrite: replace the files of another output of the same number. as_map: also write generated images as the maps that they
        show, `labels`, `depth`, `edges` or `normals` (`unitok.media.maps`). Errors: `UserError` without it, and for the name of a file.
        """
        folder, name = Path(folder), f"{self.index:06d}"
        if promised(folder.name):
            raise UserError(f"{folder}: save writes several files; give a folder, such as {folder.with_suffix('')}")
        folder.mkdir(parents=True, exist_ok=True)
        if not overwrite and (there := next(folder.glob(f"{name}[-.]*"), None)):
            raise UserError(f"{there}: is there already; choose another folder, or overwrite=True")
        parts: list[Part] = []
        for i, segment in enumerate(self.prompt.segments):
            if isinstance(segment.source, ReadFile) and (suffix := _suffix(segment.source)):
                copy = folder / f"{name}-prompt-{i}.{suffix}"
                shutil.copyfile(segment.source, copy)
                parts.append(Part(segment.modality, path=copy, role=segment.role, loss=False))
            else:
                decoded = self.bundle.write_document(Document((segment,)), folder, f"{name}-prompt-{i}")
                parts += [Part(p.type, p.value, p.path, p.role, False) for p in decoded.content]
        contents = [self.content(i) for i in range(len(self.new.segments))]
        parts += self.bundle.write_document(self.new, folder, name, contents).content
        for i, content in enumerate(contents if as_map else ()):
            self.bundle.modality(self.new.segments[i].modality).save_map(content, folder / f"{name}-{i}.{as_map}.png", as_map)
        for i, movie in enumerate(self.movies if can_write_video() else ()):
            VideoModality().save(None, movie, folder / f"{name}-movie-{i}")
        if self.text:
            (folder / f"{name}.txt").write_text(self.text, encoding="utf-8")
        return RawDocument(name, tuple(parts))


class Outputs(list[Output]):
    """A list of outputs that shows each of them in a notebook, as its slices do."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Output: ...
    @overload
    def __getitem__(self, index: slice) -> "Outputs": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "Output | Outputs":
        return Outputs(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def _repr_html_(self) -> str:
        return "".join(output._repr_html_() for output in self)


def _suffix(path: str) -> str:
    """Return the suffix for a copy of a file by its content, not its name: `png`, `wav`; "" where it cannot be opened any more."""
    try:
        with open(path, "rb") as file:
            name = image_format(file.read(HEAD), path)
        name = name or soundfile.info(path).format
    except (OSError, soundfile.LibsndfileError):
        return ""
    return {"JPEG": "jpg", "WAVEX": "wav"}.get(name, re.sub(r"\W", "", name).lower())


def save_outputs(
    outputs: list[Output], folder: Path, title: str = "unitok sample", overwrite: bool = False, as_map: str = ""
) -> None:
    """Write outputs into a folder: their files, `outputs.jsonl` (a whole document per line) and `index.html`.

    Outputs that lie there are replaced, other files stay. as_map: as for `Output.save`. Errors: `UserError` where the folder is of another kind, unless `overwrite`
    is set.
    """
    with whole_folder(folder, "sample output", overwrite) as new:
        raws, types = (
            [output.save(new, overwrite=True, as_map=as_map) for output in outputs],
            outputs[0].bundle.types if outputs else {},
        )
        lead, articles = "Gray: the prompt. Blue: generated.", [_article(raw, types, new) for raw in raws]
        pages.write_page(new / "index.html", "articles.html", title=title, lead=lead, articles=articles)
        write_text(new / "outputs.jsonl", "".join(format_raw_document(raw, new, types) + "\n" for raw in raws))


def _article(raw: RawDocument, types: Types, folder: Path) -> pages.Article:
    figures = []
    for part in raw.content:
        modality = types[part.type]
        element = modality.html(None, part.value) if part.path is None else modality.html_of_file(part.path)
        figures.append(pages.Figure(element, kind="new" if part.loss else "given"))
    kinds, contents = [types[part.type].kind for part in raw.content], [part.value for part in raw.content]
    movies = [VideoModality().html_of_file(file) for file in sorted(folder.glob(f"{raw.id}-movie-*"))]
    kinds, contents = [*kinds, *[VideoModality.kind] * len(movies)], [*contents, *movies]
    figures += [pages.Figure(movie, "together", kind="new") for movie in movies]
    return pages.Article(with_layers(kinds, contents, figures))
