"""Make melodies with captions that say exactly what is played, by a General MIDI soundfont.

`apt-get install fluidsynth timgm6mb-soundfont`, `pip install mido`
`python examples/music/prepare.py OUT --count 4000`

OUT/train, OUT/test   wavs/*.wav and metadata.csv as LJSpeech has it (name|caption): `a flute plays C5 E5 G5 A5 in C major at 120`
"""

import argparse
import random
import subprocess
import tempfile
from pathlib import Path

import mido
import numpy as np
import soundfile

SOUNDFONT = "/usr/share/sounds/sf2/TimGM6mb.sf2"
RATE = 8000  # Hz
SLOT = 4.0  # seconds between the beginnings of two melodies in one rendering
RELEASE = 0.25  # seconds after the last note
BATCH = 500  # melodies per rendering
NOTES = 4

#: General MIDI programs.
INSTRUMENTS = {
    "piano": 0,
    "vibraphone": 11,
    "oboe": 68,
    "guitar": 24,
    "violin": 40,
    "trumpet": 56,
    "clarinet": 71,
    "flute": 73,
}
TEMPOS = (90, 120, 150)  # quarter notes per minute
NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
KEYS = ("C", "D", "E", "F", "G", "A")
MAJOR = (0, 2, 4, 5, 7, 9, 11)
LOWEST, HIGHEST = 60, 83  # C4 to B5


def note_name(number: int) -> str:
    """The name of a MIDI note, such as C4 for 60."""
    return f"{NAMES[number % 12]}{number // 12 - 1}"


def draw(rng: random.Random) -> tuple[str, list[int], str, int]:
    """A melody: instrument, notes, key, tempo. Steps are within a sixth, as in songs."""
    key = rng.choice(KEYS)
    scale = [n for n in range(LOWEST, HIGHEST + 1) if (n - NAMES.index(key)) % 12 in MAJOR]
    at, notes = rng.randrange(len(scale)), []
    for _ in range(NOTES):
        notes.append(scale[at])
        at = min(len(scale) - 1, max(0, at + rng.randint(-5, 5)))
    return rng.choice(list(INSTRUMENTS)), notes, key, rng.choice(TEMPOS)


def caption(instrument: str, notes: list[int], key: str, tempo: int) -> str:
    """What is said of a melody; `read_caption` in `evaluate.py` is its inverse for the notes."""
    article = "an" if instrument[0] in "aeiou" else "a"
    return f"{article} {instrument} plays {' '.join(map(note_name, notes))} in {key} major at {tempo}"


def render(melodies: list[tuple[str, list[int], str, int]]) -> np.ndarray:
    """Samples [T] at `RATE` of melodies, one in each slot."""
    events = []  # seconds, message
    for number, (instrument, notes, _, tempo) in enumerate(melodies):
        start, beat = number * SLOT, 60 / tempo
        events.append((start, mido.Message("program_change", program=INSTRUMENTS[instrument])))
        for i, note in enumerate(notes):
            events.append((start + 0.05 + i * beat, mido.Message("note_on", note=note, velocity=100)))
            events.append((start + 0.05 + (i + 0.9) * beat, mido.Message("note_off", note=note, velocity=0)))
    events.sort(key=lambda event: event[0])
    track, file = mido.MidiTrack(), mido.MidiFile(ticks_per_beat=1000)  # at the default 120 a beat is half a second
    for (before, _), (now, message) in zip([(0.0, None), *events], events, strict=False):
        track.append(message.copy(time=round((now - before) * 2000)))
    file.tracks.append(track)
    with tempfile.TemporaryDirectory() as folder:
        file.save(f"{folder}/a.mid")
        command = ["fluidsynth", "-q", "-ni", "-R", "0", "-C", "0", "-g", "0.8", "-r", str(RATE), "-F", f"{folder}/a.wav"]
        subprocess.run(
            [*command, SOUNDFONT, f"{folder}/a.mid"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return soundfile.read(f"{folder}/a.wav")[0].mean(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4000, help="melodies to train on")
    parser.add_argument("--test", type=int, default=200, help="melodies to test on, none of which is among the others")
    arguments = parser.parse_args()
    rng, seen = random.Random(0), set()
    for split, count in (("test", arguments.test), ("train", arguments.count)):
        melodies: list[tuple[str, list[int], str, int]] = []
        while len(melodies) < count:
            melody = draw(rng)
            if caption(*melody) not in seen:
                seen.add(caption(*melody))
                melodies.append(melody)
        folder = arguments.out / split
        (folder / "wavs").mkdir(parents=True, exist_ok=True)
        rows = []
        for first in range(0, count, BATCH):
            batch = melodies[first : first + BATCH]
            samples = render(batch)
            for number, melody in enumerate(batch):
                start = round(number * SLOT * RATE)
                length = round((0.05 + NOTES * 60 / melody[3] + RELEASE) * RATE)
                soundfile.write(folder / "wavs" / f"m{first + number:05d}.wav", samples[start : start + length], RATE)
                rows.append(f"m{first + number:05d}|{caption(*melody)}\n")
        (folder / "metadata.csv").write_text("".join(rows))
        print(f"{folder}: {count} melodies")
