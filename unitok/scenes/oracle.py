"""Reads scenes back from pixels and waveforms with plain image and signal processing. It never sees a model.

Images: the border gives the background; connected regions that differ from it are objects. The color of an object is the one
nearest to the median of its pixels. Its shape and size are those of the template, drawn at its centroid, with the least squared
difference of coverage.
Audio: every stretch of one note's length that has energy is a note. Its pitch and timbre are those of the template whose
magnitude spectrum is most similar (cosine); its loudness follows from its power.
"""

from functools import cache

import numpy as np
import torch
from scipy import ndimage

from unitok.scenes import world
from unitok.scenes.world import Note, Scene, SceneObject

#: Layouts by the number of objects in each row, from top to bottom.
_LAYOUTS = {(1,): "one", (2,): "row", (1, 1): "column", (2, 1): "two over one", (1, 2): "one over two"}


def read_image(pixels: np.ndarray) -> Scene | None:
    """uint8 or float [H, W, 3] of range [0, 255] -> the scene that it shows; None if it shows no scene or is not square."""
    image = np.asarray(pixels, np.float32)
    if image.shape[0] != image.shape[1]:
        return None
    side = image.shape[0]
    plain = plain_background(image)
    difference = np.linalg.norm(image - plain, axis=-1)
    regions, count = ndimage.label(difference > 60)
    smallest = 0.4 * np.pi * (min(world.SIZES.values()) * side) ** 2 * 0.5
    objects: list[tuple[float, float, SceneObject]] = []
    for region in range(1, count + 1):
        inside = regions == region
        if inside.sum() >= smallest:
            objects.append(_read_object(image, inside, plain))
    return _arrange(nearest(plain, world.BACKGROUNDS), objects)


def plain_background(image: np.ndarray) -> np.ndarray:
    """The color [3] of the border of an image [H, W, 3]."""
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), *image[:, [0, -1]].swapaxes(0, 1)])
    return np.median(border, axis=0)


def _read_object(image: np.ndarray, inside: np.ndarray, plain: np.ndarray) -> tuple[float, float, SceneObject]:
    """x and y of the centroid, pixels, and the object that a region shows."""
    deep = ndimage.binary_erosion(inside)
    color_value = np.median(image[deep if deep.sum() >= 8 else inside], axis=0)
    color = nearest(color_value, world.COLORS)
    direction = color_value - plain
    alpha = np.clip((image - plain) @ direction / max(float(direction @ direction), 1.0), 0, 1)
    alpha = alpha * ndimage.binary_dilation(inside, iterations=2)
    side = image.shape[0]
    y, x = np.mgrid[0.5:side, 0.5:side]
    cx, cy = (alpha * x).sum() / alpha.sum(), (alpha * y).sum() / alpha.sum()
    best = min(
        (float(np.square(world.cover(shape, radius * side, x - cx, y - cy) - alpha).sum()), shape, size)
        for shape in world.SHAPES
        for size, radius in world.SIZES.items()
    )
    return cx, cy, SceneObject(color, best[1], best[2])


def _arrange(background: str, objects: list[tuple[float, float, SceneObject]]) -> Scene | None:
    """A scene in reading order from objects with x and y of their centers; None for no known layout."""
    objects = sorted(objects, key=lambda item: item[1])  # from top to bottom
    rows = [objects]
    if len(objects) == 2 and objects[1][1] - objects[0][1] > abs(objects[1][0] - objects[0][0]):
        rows = [objects[:1], objects[1:]]
    elif len(objects) == 3:
        above = 2 if objects[2][1] - objects[1][1] > objects[1][1] - objects[0][1] else 1
        rows = [objects[:above], objects[above:]]
    layout = _LAYOUTS.get(tuple(map(len, rows)))
    ordered = tuple(one for row in rows for _, _, one in sorted(row, key=lambda item: item[0]))
    return Scene(background, layout, ordered) if layout else None


def read_audio(waveform: np.ndarray, rate: int) -> tuple[Note, ...]:
    """float [T] or [C, T] in [-1, 1] at `rate` Hz -> its notes in order; empty for silence."""
    wave = np.asarray(waveform, np.float32)
    wave = wave.mean(0) if wave.ndim == 2 else wave
    slot = round(world.NOTE_SECONDS * rate)
    count = int(np.ceil(wave.size / slot - 0.25))  # less than a quarter of a note at the end is padding, more is one more note
    notes = []
    for i in range(count):
        samples = wave[i * slot : (i + 1) * slot]
        if samples.size == 0 or np.sqrt(np.mean(samples**2)) < 0.02:
            continue
        spectrum = _spectrum(np.pad(samples, (0, slot - samples.size)))
        names, spectra, levels = _note_templates(rate)
        best = int(np.argmax(spectra @ spectrum / (np.linalg.norm(spectrum) + 1e-9)))
        pitch, timbre = names[best]
        level = np.sqrt(np.mean(samples**2)) / levels[best]  # the amplitude that gives this power
        loudness = min(world.LOUDNESSES, key=lambda name: abs(np.log(level / world.LOUDNESSES[name])))
        notes.append(Note(pitch, timbre, loudness))
    return tuple(notes)


def _spectrum(samples: np.ndarray) -> np.ndarray:
    return np.abs(np.fft.rfft(samples * np.hanning(samples.size)))


@cache
def _note_templates(rate: int) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
    """(pitch, timbre) of all 40 notes, their magnitude spectra of unit length [40, F], and their RMS at amplitude 1 [40]."""
    names = [(pitch, timbre) for pitch in world.PITCHES for timbre in world.TIMBRES]
    notes = [world.render_note(Note(pitch, timbre, "loud"), rate, amplitude=1.0) for pitch, timbre in names]
    spectra = np.stack([_spectrum(note) for note in notes])
    levels = np.array([np.sqrt(np.mean(note**2)) for note in notes])
    return names, spectra / np.linalg.norm(spectra, axis=1, keepdims=True), levels


def nearest(color: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    """The name of the color [3] that is nearest."""
    return min(names, key=lambda name: float(np.linalg.norm(color - np.array(names[name]))))


# ---- Comparing with a scene -----------------------------------------------------------------------------------------


def same_notes(read: tuple[Note, ...], scene: Scene) -> bool:
    """Whether number, order, pitch and timbre of all notes are those of the scene."""
    return [(n.pitch, n.timbre) for n in read] == [(n.pitch, n.timbre) for n in scene.notes()]


def same_colors(read: Scene | None, scene: Scene) -> bool:
    """Whether the colors of the objects are those of the scene, in order."""
    return read is not None and [o.color for o in read.objects] == [o.color for o in scene.objects]


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """float [3, H, W] in [-1, 1] -> float [H, W, 3] in [0, 255], as the oracle reads it."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).cpu().numpy()
