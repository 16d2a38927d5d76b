"""Several documents of one: flips and random crops of its pictures, pieces of its sound."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from unitok.data.prepare.recipe import SourceSpec
from unitok.document import RawDocument
from unitok.media import audio_seconds
from unitok.storage import Blob


def versions(spec: SourceSpec, raw: RawDocument, frame: float = 0.0) -> Iterator[RawDocument]:
    """A document, and what augmentation and segments of audio make of it: each with an id of its own.

    frame: seconds of one frame of audio codes; a last segment that is shorter is left out.
    """
    for piece in _pieces(spec, raw, frame):
        yield piece
        if not any(p.type == "image" for p in piece.content):
            continue
        for view in (["flip"] if spec.flip else []) + [f"crop={n}" for n in range(1, spec.crops + 1)]:
            content = tuple(replace(p, view=view) if p.type == "image" else p for p in piece.content)
            yield replace(piece, id=f"{piece.id}#{view}", content=content)


def _pieces(spec: SourceSpec, raw: RawDocument, frame: float) -> Iterator[RawDocument]:
    """A document with one long sound as one for each piece of it; any other as it is."""
    sounds = [p for p in raw.content if p.type == "audio"]
    if not spec.audio_segment or len(sounds) != 1:
        yield raw
        return
    blob: Blob = sounds[0].file
    with blob.local() as path:
        data = None if path else blob.read()
        seconds = audio_seconds(path or Path(blob.name), data)
    if seconds <= spec.audio_segment:
        yield raw
        return
    kept = blob if data is None else replace(blob, data=data)
    count = -int(-seconds // spec.audio_segment)
    if seconds - (count - 1) * spec.audio_segment < frame:
        count -= 1
        raw = replace(raw, notes=(*raw.notes, "the rest of the audio is shorter than a frame"))
    for number in range(count):
        start = number * spec.audio_segment
        view = f"t={start:.10g},{min(start + spec.audio_segment, seconds):.10g}"
        content = tuple(replace(p, view=view, file=kept) if p.type == "audio" else p for p in raw.content)
        yield replace(raw, id=f"{raw.id}#{view}", content=content)


def clip(view: str) -> tuple[float, float] | None:
    """A view `t=10,20` of a sound as seconds; None for all of it."""
    if not view:
        return None
    start, stop = view.removeprefix("t=").split(",")
    return float(start), float(stop)


def random_crop(image: Image.Image, spec: SourceSpec, chance: float) -> tuple[Image.Image, str]:
    """A random part of a picture, of its own aspect; -> it, and where it was, as a media fragment."""
    rng = np.random.default_rng(int(chance * 2**56))
    scale = rng.uniform(spec.crop_scale, 1)
    width, height = (max(1, round(side * scale)) for side in image.size)
    x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    view = f"xywh={x},{y},{width},{height}"
    image = image.crop((x, y, x + width, y + height))
    if spec.flip and rng.random() < 0.5:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), f"{view}&flip"
    return image, view
