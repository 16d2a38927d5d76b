"""Scenes in motion: one or two things that move or grow in a clip of two seconds, with captions, questions, and what reads them back.

Things move right, left, up or down, slowly or quickly, or they grow or shrink; two of them at once, or one after the other, or they cross:
they move in opposite ways and one passes in front of or behind the other. The audio of a clip has a note per frame, of the thing that moves, of two in
turn; its shape is the timbre, as in still scenes, small things are high, and the notes follow the motion: higher and higher for a thing that
moves up, louder and louder for one that moves right. The oracle (`read_clip`, `follows`) reads frames and notes with plain signal processing, as `unitok.scenes.oracle` does.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from scipy import ndimage

from unitok.scenes.oracle import nearest, plain_background
from unitok.scenes.world import BACKGROUNDS, COLORS, SAMPLE_RATE, SHAPES, SIZES, TIMBRES, cover

T = TypeVar("T")

FRAMES, RATE = 8, 4  # of a clip, and per second
WAYS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = (("right", "left"), ("down", "up"))  # of two things that cross, the first begins left or above
SPEEDS = {"slowly": 0.2, "quickly": 0.45}  # how far a thing moves in a clip, as a fraction of the side
GROWTH = {"grows": (0.12, 0.21), "shrinks": (0.21, 0.12)}  # radius of the first and last frame, as a fraction of the side
PLACES = (0.25, 0.75)  # of two things
CROSSING = 0.56  # how far things move that cross, as a fraction of the side
HALF = FRAMES // 2  # frames; of two things that move one after the other, the first moves in the first half
REGISTERS = {"small": 0.0, "large": -12.0}  # semitones above C4
RISES = {"slowly": 4.0, "quickly": 10.0}  # semitones by which notes rise or fall with things that move up or down
SWELLS = {"slowly": 8.0, "quickly": 20.0}  # decibels by which they grow louder or softer with things that move right or left
AMPLITUDE = 0.2  # of a note that is neither


@dataclass(frozen=True)
class Thing:
    """A colored shape that moves (`size`, `way` and `speed` say how), or grows or shrinks (`growth`)."""

    color: str
    shape: str
    size: str = ""
    way: str = ""
    speed: str = ""
    growth: str = ""

    def words(self) -> str:
        """Its part of a caption: "a small red circle moves right quickly"."""
        if self.growth:
            return f"a {self.color} {self.shape} {self.growth}"
        return f"a {self.size} {self.color} {self.shape} moves {self.way} {self.speed}"


@dataclass(frozen=True)
class Clip:
    """What a video shows. where: of the second thing, seen from the first: below, above, right of or left of it, or crossing in front of or
    behind it; "" for one thing. in_turn: whether the second thing begins when the first has ended; else both move at once, and the first is
    above or left, or begins there."""

    background: str
    things: tuple[Thing, ...]
    where: str = ""
    in_turn: bool = False

    @property
    def crosses(self) -> bool:
        """Whether the second thing crosses in front of or behind the first."""
        return self.where in ACROSS

    @property
    def front(self) -> int:
        """The number of the thing that is in front where two cross."""
        return int(self.where != ACROSS[1])


ACROSS = ("crossing in front of", "crossing behind")
#: Places of the second thing: the axis on which it is apart from the first (0: columns, 1: rows), and whether it comes later there.
WHERE = {"below": (1, True), "above": (1, False), "right of": (0, True), "left of": (0, False)}


def draw_clip(rng: np.random.Generator) -> Clip:
    """A random clip: one thing, two at once, two in turn or two that cross, each as often."""

    def draw(names: Sequence[T]) -> T:
        return names[int(rng.integers(len(names)))]

    kind = int(rng.integers(4))  # one thing, two at once, two in turn, two that cross
    if kind == 3:
        both = zip(rng.permutation(list(COLORS)).tolist(), draw(OPPOSITE), strict=False)
        crossing = tuple(Thing(color, draw(SHAPES), "small", way, "quickly") for color, way in both)
        return Clip(draw(tuple(BACKGROUNDS)), crossing, draw(ACROSS))
    where = "" if kind == 0 else draw(("below", "right of") if kind == 1 else tuple(WHERE))
    ways = tuple(WAYS) if not where else ("up", "down") if WHERE[where][0] == 0 else ("right", "left")
    colors = rng.permutation(list(COLORS))
    things = []
    for number in range(1 + bool(where)):
        color, shape = str(colors[number]), draw(SHAPES)
        if rng.random() < 0.25:
            things.append(Thing(color, shape, growth=draw(tuple(GROWTH))))
        else:
            things.append(Thing(color, shape, draw(tuple(SIZES)), draw(ways), draw(tuple(SPEEDS))))
    return Clip(draw(tuple(BACKGROUNDS)), tuple(things), where, kind == 2)


# ---- Words ----------------------------------------------------------------------------------------------------------


def caption(clip: Clip) -> str:
    """A caption: "a small red circle moves right quickly, then below it a blue ring grows, on a black background"."""
    first, *second = (thing.words() for thing in clip.things)
    middle = f", {'then' if clip.in_turn else 'and'} {clip.where} it {second[0]}" if second else ""
    return f"{first}{middle}, on a {clip.background} background"


_THING = (
    rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"(?:moves ({'|'.join(WAYS)}) ({'|'.join(SPEEDS)})|({'|'.join(GROWTH)}))"
)
_CAPTION = re.compile(
    rf"{_THING}(?:, (then|and) ({'|'.join([*WHERE, *ACROSS])}) it {_THING})?, on a ({'|'.join(BACKGROUNDS)}) background"
)


def parse_caption(text: str) -> Clip | None:
    """The clip that a caption describes, or None if the text is no such caption. Inverse of `caption`."""
    found = _CAPTION.fullmatch(text.strip())
    if found is None:
        return None
    groups = [group or "" for group in found.groups()]
    things = tuple(
        Thing(color, shape, size, way, speed, growth)
        for size, color, shape, way, speed, growth in (groups[:6], groups[8:14])
        if color
    )
    clip = Clip(groups[14], things, groups[7], groups[6] == "then")
    return clip if caption(clip) == text.strip() else None


def questions(clip: Clip) -> list[tuple[str, str]]:
    """All (question, answer) pairs about a clip for which the answer is unique."""
    pairs = []
    for thing in clip.things:
        named = f"the {thing.color} {thing.shape}"
        pairs.append((f"what shape is the {thing.color} thing?", thing.shape))
        if thing.way:
            pairs += [(f"which way does {named} move?", thing.way), (f"how does {named} move?", thing.speed)]
        does = thing.growth or f"moves {thing.way}"
        if sum(does == (other.growth or f"moves {other.way}") for other in clip.things) == 1:
            pairs.append((f"what color is the thing that {does}?", thing.color))
    if clip.in_turn:
        pairs += [(f"what color is the thing that moves {when}?", t.color) for when, t in zip(("first", "last"), clip.things)]
    else:
        pairs.append(("how many things are there?", ("one", "two")[len(clip.things) - 1]))
        pairs += [("do the things cross?", "yes" if clip.crosses else "no")] * bool(clip.where)
    if clip.crosses:
        pairs.append(("what color is the thing in front?", clip.things[clip.front].color))
    return pairs


# ---- Frames ---------------------------------------------------------------------------------------------------------


def render_clip(clip: Clip, rng: np.random.Generator, side: int = 32) -> np.ndarray:
    """uint8 [FRAMES, side, side, 3]: the frames of a clip, its things a little off their places."""
    frames = np.empty((FRAMES, side, side, 3), np.float32)
    frames[:] = BACKGROUNDS[clip.background]
    y, x = np.mgrid[0.5:side, 0.5:side].astype(np.float32)
    for number, thing in sorted(enumerate(clip.things), key=lambda one: one[0] == clip.front):  # what is in front is drawn last
        center = np.array([0.5, 0.5]) + rng.uniform(-0.01, 0.01, 2)
        if clip.where in WHERE:
            axis, later = WHERE[clip.where]
            center[axis] += PLACES[number if later else 1 - number] - 0.5
        for frame in range(FRAMES):
            progress = _progress(clip, number, frame)
            distance = CROSSING if clip.crosses else SPEEDS.get(thing.speed, 0.0)
            cx, cy = center + (progress - 0.5) * np.array(WAYS.get(thing.way, (0, 0))) * distance
            first, last = GROWTH.get(thing.growth) or [SIZES[thing.size]] * 2
            radius = (first + (last - first) * progress) * side
            alpha = cover(thing.shape, radius, x - cx * side, y - cy * side)[..., None]
            frames[frame] += alpha * (np.array(COLORS[thing.color], np.float32) - frames[frame])
    return np.round(frames).astype(np.uint8)


def _progress(clip: Clip, number: int, frame: int) -> float:
    """How far a thing has moved or grown at a frame, 0 to 1."""
    steps, past = (HALF - 1, frame - HALF * number) if clip.in_turn else (FRAMES - 1, frame)
    return min(max(past / steps, 0.0), 1.0)


# ---- Audio ----------------------------------------------------------------------------------------------------------


def notes(clip: Clip) -> list[tuple[int, str, float, float]]:
    """The note of each frame: the number of the thing that plays it, its timbre, semitones above C4, decibels above `AMPLITUDE`."""
    made = []
    for frame in range(FRAMES):
        number = 0 if not clip.where else frame // HALF if clip.in_turn else frame % 2
        thing, progress = clip.things[number], _progress(clip, number, frame)
        (right, down), offset = WAYS.get(thing.way, (0, 0)), progress - 0.5
        first, last = {"grows": (0.0, -12.0), "shrinks": (-12.0, 0.0)}.get(thing.growth) or [REGISTERS[thing.size]] * 2
        pitch = first + (last - first) * progress - down * offset * RISES.get(thing.speed, 0.0)
        timbre = list(TIMBRES)[SHAPES.index(thing.shape)]
        made.append((number, timbre, pitch, right * offset * SWELLS.get(thing.speed, 0.0)))
    return made


def _note(timbre: str, pitch: float, rate: int, amplitude: float) -> np.ndarray:
    """float32 [rate / RATE]: partials start at phase zero; attack 5 ms, then it decays; nothing above half the rate."""
    t, hertz = np.arange(rate // RATE, dtype=np.float32) / rate, 261.63 * 2 ** (pitch / 12)
    partials = [(p, a) for p, a in TIMBRES[timbre] if hertz * p < rate / 2]
    wave = sum(a * np.sin(2 * np.pi * hertz * p * t) for p, a in partials)
    power = sum(a * a for _, a in partials) ** 0.5
    envelope = np.minimum(t / 0.005, 1) * np.minimum((1 / RATE - t) / 0.02, 1) * np.exp(-2 * t * RATE)
    return (wave * envelope * amplitude / power / 1.4).astype(np.float32)


def render_notes(clip: Clip, rng: np.random.Generator, rate: int = SAMPLE_RATE) -> np.ndarray:
    """float32 [1, T] in [-1, 1]: the audio of a clip, a note for each frame; loudness varies a little. rate: Hz, a multiple of `RATE`."""
    loudness = AMPLITUDE * rng.uniform(0.93, 1.07)
    return np.concatenate([_note(t, p, rate, loudness * 10 ** (db / 20)) for _, t, p, db in notes(clip)])[None]


# ---- Reading back ---------------------------------------------------------------------------------------------------

_RADII = np.linspace(0.08, 0.23, 16)  # that are tried, as fractions of the side
_SMALLEST = 0.008  # of the area: what is smaller is no thing
_SEEN = 4  # frames at least in which a thing is seen
_MOVED = 0.1  # of the side: what moves less stands still
_APART = 0.25  # of the side, on average: things that are less apart cross


@dataclass
class _Track:
    """What was seen of one thing: frames, and in each its center (x, y) and radius as fractions of the side, and errors by shape."""

    frames: list[int]
    centers: list[np.ndarray]
    radii: list[float]
    errors: list[np.ndarray]

    def during(self, frames: set[int]) -> "_Track":
        """What was seen of it in some frames."""
        chosen = [i for i, frame in enumerate(self.frames) if frame in frames]
        lists: tuple[list, ...] = (self.frames, self.centers, self.radii, self.errors)
        return _Track(*([values[i] for i in chosen] for values in lists))


def read_clip(frames: np.ndarray) -> Clip | None:
    """uint8 or float [F, H, W, 3] of range [0, 255] -> the clip that it shows; None if it shows none. F may differ from `FRAMES`."""
    images = np.asarray(frames, np.float32)
    if images.ndim != 4 or images.shape[1] != images.shape[2] or len(images) < 4:
        return None
    background = np.median([plain_background(image) for image in images], axis=0)
    tracks: dict[str, _Track] = {}
    for number, image in enumerate(images):
        for color, center, errors in _regions(image, background):
            track = tracks.setdefault(color, _Track([], [], [], []))
            if number not in track.frames:
                track.frames.append(number)
                track.centers.append(center)
                track.radii.append(float(_RADII[errors.min(0).argmin()]))
                track.errors.append(errors.min(1))
    seen = {color: track for color, track in tracks.items() if len(track.frames) >= min(_SEEN, len(images))}
    if not 1 <= len(seen) <= 2:
        return None
    if len(seen) == 2:  # where only one is seen, it may be both at once
        both = set.intersection(*(set(track.frames) for track in seen.values()))
        seen = {color: track.during(both) for color, track in seen.items()}
        if len(both) < 3:
            return None
    things = {color: _thing(color, track) for color, track in seen.items()}
    read = [(thing, seen[color]) for color, thing in things.items() if thing is not None]
    if len(read) < len(seen):
        return None
    if len(read) == 2 and np.abs(_apart(read)).max() < _APART:
        front = read[_in_front(images, [track for _, track in read], list(seen))][0]
        first, second = sorted((thing for thing, _ in read), key=lambda thing: thing.way in ("left", "up"))
        return Clip(nearest(background, BACKGROUNDS), (first, second), ACROSS[front is first])
    return _arranged(nearest(background, BACKGROUNDS), read, len(images))


def _regions(image: np.ndarray, background: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Of each thing in a frame, the largest first: its color, its center as fractions of the side, and errors [shapes, radii]."""
    side = len(image)
    labels, count = ndimage.label(np.linalg.norm(image - background, axis=-1) > 60)
    y, x = np.mgrid[0.5:side, 0.5:side]
    found = []
    for region in range(1, count + 1):
        inside = labels == region
        if inside.sum() < _SMALLEST * side * side:
            continue
        deep = ndimage.binary_erosion(inside)
        value = np.median(image[deep if deep.sum() >= 6 else inside], axis=0)
        direction = value - background
        alpha = np.clip((image - background) @ direction / max(float(direction @ direction), 1.0), 0, 1)
        alpha = alpha * ndimage.binary_dilation(inside, iterations=2)
        center = np.array([(alpha * x).sum(), (alpha * y).sum()]) / alpha.sum()
        drawn = [[cover(s, r * side, x - center[0], y - center[1]) for r in _RADII] for s in SHAPES]
        errors = np.square(np.array(drawn) - alpha).sum((-1, -2)) / alpha.sum()
        found.append((int(inside.sum()), nearest(value, COLORS), center / side, errors))
    return [tuple(rest) for _, *rest in sorted(found, key=lambda one: -one[0])]  # type: ignore[misc]


def _thing(color: str, track: _Track) -> Thing | None:
    """What a track shows; None for a thing that neither moves nor grows."""
    shape = SHAPES[int(np.sum(track.errors, 0).argmin())]
    first, last = (float(np.mean(track.radii[part])) for part in (slice(2), slice(-2, None)))
    if max(first, last) > 1.35 * min(first, last):
        return Thing(color, shape, growth="grows" if last > first else "shrinks")
    moved = np.mean(track.centers[-2:], 0) - np.mean(track.centers[:2], 0)
    distance = float(np.abs(moved).max())
    if distance < _MOVED * 0.7:
        return None
    way = max(WAYS, key=lambda name: float(np.dot(WAYS[name], moved)))
    steps = len(track.centers) - 2  # between the means of the first and the last two
    distance *= (len(track.centers) - 1) / steps if steps else 1.0
    speed = min(SPEEDS, key=lambda name: abs(SPEEDS[name] - distance))
    radius = float(np.median(track.radii))
    return Thing(color, shape, min(SIZES, key=lambda name: abs(SIZES[name] - radius)), way, speed)


def _apart(read: list[tuple[Thing, _Track]]) -> np.ndarray:
    """From the first thing to the second (x, y), on average over the frames."""
    return np.asarray(np.mean(read[1][1].centers, 0) - np.mean(read[0][1].centers, 0))


def _in_front(images: np.ndarray, tracks: list[_Track], colors: list[str]) -> int:
    """Which of two things that cross is in front: that of which more is left where they meet."""
    palette = np.array([COLORS[color] for color in colors], np.float32)

    def area(image: np.ndarray) -> np.ndarray:
        """Pixels of each color."""
        distances = np.linalg.norm(image[..., None, :] - palette, axis=-1)
        return np.array([((distances.argmin(-1) == i) & (distances.min(-1) < 60)).sum() for i in range(2)], float)

    apart = np.mean([area(images[frame]) for frame in tracks[0].frames], 0)
    meeting = [frame for frame in range(len(images)) if frame not in tracks[0].frames] or [len(images) // 2]
    return int(np.argmax(np.mean([area(images[frame]) for frame in meeting], 0) / np.maximum(apart, 1)))


def _arranged(background: str, read: list[tuple[Thing, _Track]], count: int) -> Clip | None:
    if len(read) == 1:
        return Clip(background, (read[0][0],))
    early = [_early(track, count, bool(thing.growth)) for thing, track in read]
    in_turn = abs(early[0] - early[1]) > 0.5
    apart = _apart(read)
    axis = int(np.abs(apart).argmax())
    swap = early[0] < early[1] if in_turn else bool(apart[axis] < 0)
    (first, _), (second, _) = read[::-1] if swap else read
    later = bool(apart[axis] > 0) != swap
    where = next(name for name, place in WHERE.items() if place == (axis, later))
    return Clip(background, (first, second), where, in_turn)


def _early(track: _Track, count: int, grows: bool) -> float:
    """Which part of all that a thing changes, it changes in the first half of the frames."""
    steps = [
        (a, abs(r - s) if grows else float(np.abs(p - q).sum()))
        for a, p, q, r, s in zip(track.frames[1:], track.centers[1:], track.centers, track.radii[1:], track.radii, strict=False)
    ]
    whole = sum(step for _, step in steps)
    return sum(step for frame, step in steps if frame < count / 2) / max(whole, 1e-6)


_PITCHES = np.arange(-18.0, 6.1, 0.125)  # that are tried, in semitones above C4
_OFF = {"pitch": 0.75, "loudness": 2.0}  # semitones and decibels by which the notes of a thing may be off, on average


def follows(waveform: np.ndarray, rate: int, clip: Clip) -> bool:
    """Whether audio, float [T] or [C, T] in [-1, 1] at `rate` Hz, is that of a clip: as many notes, and for each thing its timbre (of most of
    its notes), pitches and loudnesses (on average)."""
    wave = np.asarray(waveform, np.float32)
    wave = wave.mean(0) if wave.ndim == 2 else wave
    slot, expected = rate // RATE, notes(clip)
    if round(len(wave) / slot) != len(expected):
        return False
    whole = np.pad(wave, (0, slot))  # the last note may be cut off a little
    read = [_read_note(whole[round(i * rate / RATE) :][:slot], rate) for i in range(FRAMES)]
    for number in range(len(clip.things)):
        pairs = [(a, b[1:]) for a, b in zip(read, expected, strict=True) if b[0] == number]
        timbre = Counter(a[0] for a, _ in pairs).most_common(1)[0][0]
        pitch, loudness = np.mean([(abs(a[1] - b[1]), abs(a[2] - b[2])) for a, b in pairs], 0)
        if timbre != pairs[0][1][0] or pitch > _OFF["pitch"] or loudness > _OFF["loudness"]:
            return False
    return True


def _read_note(samples: np.ndarray, rate: int) -> tuple[str, float, float]:
    """Timbre, semitones above C4, and decibels above `AMPLITUDE` of a note."""
    names, spectra, levels = _templates(rate)
    samples = np.pad(samples, (0, max(0, rate // RATE - len(samples))))
    spectrum = _spectrum(samples)
    best = int(np.argmax(spectra @ spectrum))
    level = np.sqrt(np.mean(samples**2)) / levels[best]
    return *names[best], float(20 * np.log10(max(level, 1e-4) / AMPLITUDE))


def _spectrum(samples: np.ndarray) -> np.ndarray:
    """Magnitudes, blurred over some 10 Hz, so that partials of a slightly other pitch still fit."""
    return ndimage.gaussian_filter1d(np.abs(np.fft.rfft(samples * np.hanning(samples.shape[-1]))), 3, axis=-1)


@cache
def _templates(rate: int) -> tuple[list[tuple[str, float]], np.ndarray, np.ndarray]:
    """(timbre, pitch) of all notes that are tried, their magnitude spectra of unit length, and their RMS at amplitude 1."""
    names = [(timbre, float(pitch)) for timbre in TIMBRES for pitch in _PITCHES]
    waves = np.stack([_note(timbre, pitch, rate, 1.0) for timbre, pitch in names])
    spectra = _spectrum(waves)
    return names, spectra / np.linalg.norm(spectra, axis=1, keepdims=True), np.sqrt(np.mean(waves**2, axis=1))
