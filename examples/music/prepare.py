"""Make melodies with captions that say exactly what is played, by a General MIDI soundfont.

`apt-get install fluidsynth timgm6mb-soundfont`, `pip install mido`
`python examples/music/prepare.py OUT --count 4000`

OUT/train, OUT/test   wavs/*.wav and metadata.csv as LJSpeech has it (name|caption): `a flute plays C5 E5 G5 A5 in C major at 125`

Melodies to test on have four notes. Many to train on are shorter: they teach which note is which before it matters which one is next. Notes begin
with the codec's frames, so that a note has nearly the same codes wherever it stands.
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
LENGTHS = (1, 1, 2, 3, NOTES, NOTES)  # of melodies to train on, each as often as the others
START = 0.04  # seconds before the first note: a frame of codec.yaml

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
TEMPOS = (100, 125, 150)  # quarter notes per minute, of 15, 12 and 10 frames
NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
KEYS = ("C", "D", "E", "F", "G", "A")
MAJOR = (0, 2, 4, 5, 7, 9, 11)
LOWEST, HIGHEST = 60, 83  # C4 to B5


def note_name(number: int) -> str:
    """The name of a MIDI note, such as C4 for 60."""
    return f"{NAMES[number % 12]}{number // 12 - 1}"


def draw(rng: random.Random, length: int) -> tuple[str, list[int], str, int]:
    """A melody: instrument, notes, key, tempo. Steps are within a sixth, as in songs."""
    key = rng.choice(KEYS)
    scale = [n for n in range(LOWEST, HIGHEST + 1) if (n - NAMES.index(key)) % 12 in MAJOR]
    at, notes = rng.randrange(len(scale)), []
    for _ in range(length):
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
            events.append((start + START + i * beat, mido.Message("note_on", note=note, velocity=100)))
            events.append((start + START + (i + 0.9) * beat, mido.Message("note_off", note=note, velocity=0)))
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
    for split, count, lengths in (("test", arguments.test, (NOTES,)), ("train", arguments.count, LENGTHS)):
        melodies: list[tuple[str, list[int], str, int]] = []
        while len(melodies) < count:
            melody = draw(rng, rng.choice(lengths))
            if caption(*melody) not in seen or len(melody[1]) < NOTES:
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
                length = round((START + len(melody[1]) * 60 / melody[3] + RELEASE) * RATE)
                soundfile.write(folder / "wavs" / f"m{first + number:05d}.wav", samples[start : start + length], RATE)
                rows.append(f"m{first + number:05d}|{caption(*melody)}\n")
        (folder / "metadata.csv").write_text("".join(rows))
        print(f"{folder}: {count} melodies")
