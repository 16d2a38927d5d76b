"""Reads scenes back from pixels and waveforms with plain image and signal processing. It never sees a model.

Pictures: the border gives the background, connected regions that differ from it are things; color is the nearest to the median
of a thing's pixels; shape and size are the template, drawn at its centroid, with the least squared difference of coverage.
Sounds: slots of one note's length with energy in them are notes; pitch and timbre are the template whose magnitude spectrum has
the largest cosine to the slot's; loudness is the power.
"""

from functools import cache

import numpy as np
from scipy import ndimage

from unitok.scenes import world
from unitok.scenes.world import Note, Scene, Thing

#: Layouts by the number of things in each row from above.
_LAYOUTS = {(1,): "one", (2,): "row", (1, 1): "column", (2, 1): "two over one", (1, 2): "one over two"}


def read_picture(pixels: np.ndarray) -> Scene | None:
    """uint8 or float [H, W, 3] of range [0, 255] -> the scene that it shows, or None if it shows none (or is not square)."""
    image = np.asarray(pixels, np.float32)
    if image.shape[0] != image.shape[1]:
        return None
    side = image.shape[0]
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), *image[:, [0, -1]].swapaxes(0, 1)])
    plain = np.median(border, axis=0)
    difference = np.linalg.norm(image - plain, axis=-1)
    regions, count = ndimage.label(difference > 60)
    smallest = 0.4 * np.pi * (min(world.SIZES.values()) * side) ** 2 * 0.5
    found: list[tuple[float, float, Thing]] = []
    for region in range(1, count + 1):
        inside = regions == region
        if inside.sum() >= smallest:
            found.append(_read_thing(image, inside, plain))
    return _arrange(_nearest(plain, world.BACKGROUNDS), found)


def _read_thing(image: np.ndarray, inside: np.ndarray, plain: np.ndarray) -> tuple[float, float, Thing]:
    """Centroid x, y in pixels and what the region shows."""
    deep = ndimage.binary_erosion(inside)
    color_value = np.median(image[deep if deep.sum() >= 8 else inside], axis=0)
    color = _nearest(color_value, world.COLORS)
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
    return cx, cy, Thing(color, best[1], best[2])


def _arrange(background: str, found: list[tuple[float, float, Thing]]) -> Scene | None:
    """Things with their centers -> a scene in reading order."""
    found = sorted(found, key=lambda f: f[1])  # from above
    rows = [found]
    if len(found) == 2 and found[1][1] - found[0][1] > abs(found[1][0] - found[0][0]):
        rows = [found[:1], found[1:]]
    elif len(found) == 3:
        above = 2 if found[2][1] - found[1][1] > found[1][1] - found[0][1] else 1
        rows = [found[:above], found[above:]]
    layout = _LAYOUTS.get(tuple(map(len, rows)))
    things = tuple(thing for row in rows for _, _, thing in sorted(row, key=lambda f: f[0]))
    return Scene(background, layout, things) if layout else None


def read_sound(samples: np.ndarray, rate: int) -> tuple[Note, ...]:
    """float [T] or [C, T] in [-1, 1] at `rate` Hz -> its notes in order; empty when nothing can be heard."""
    wave = np.asarray(samples, np.float32)
    wave = wave.mean(0) if wave.ndim == 2 else wave
    slot = round(world.NOTE_SECONDS * rate)
    count = int(np.ceil(wave.size / slot - 0.25))  # up to a quarter of a slot over is padding, more is a note of its own
    notes = []
    for i in range(count):
        piece = wave[i * slot : (i + 1) * slot]
        if piece.size == 0 or np.sqrt(np.mean(piece**2)) < 0.02:
            continue
        spectrum = _spectrum(np.pad(piece, (0, slot - piece.size)))
        names, spectra, levels = _note_templates(rate)
        best = int(np.argmax(spectra @ spectrum / (np.linalg.norm(spectrum) + 1e-9)))
        pitch, timbre = names[best]
        level = np.sqrt(np.mean(piece**2)) / levels[best]  # the amplitude that would have this power
        loudness = min(world.LOUDNESSES, key=lambda name: abs(np.log(level / world.LOUDNESSES[name])))
        notes.append(Note(pitch, timbre, loudness))
    return tuple(notes)


def _spectrum(piece: np.ndarray) -> np.ndarray:
    return np.abs(np.fft.rfft(piece * np.hanning(piece.size)))


@cache
def _note_templates(rate: int) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
    """Names, unit-length magnitude spectra [40, F], and the RMS of each note at amplitude 1."""
    names = [(pitch, timbre) for pitch in world.PITCHES for timbre in world.TIMBRES]
    notes = [world.render_note(Note(pitch, timbre, "loud"), rate, amplitude=1.0) for pitch, timbre in names]
    spectra = np.stack([_spectrum(note) for note in notes])
    levels = np.array([np.sqrt(np.mean(note**2)) for note in notes])
    return names, spectra / np.linalg.norm(spectra, axis=1, keepdims=True), levels


def _nearest(color: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(color - np.array(names[name]))))
