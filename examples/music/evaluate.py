"""How much of a bundle's melodies is as their captions say: each note's pitch, by YIN, which knows neither the codec nor the decoder.

`python examples/music/evaluate.py runs/music/test`: the judge's own errors, on the recordings themselves
`python examples/music/evaluate.py runs/music/test BUNDLE OUT`: also through the codec, of captions that are played, of the second halves of
recordings that are continued, with their captions and without (what is given ends before the third of four notes), and of recordings that are
described
"""

import math
import re
import sys
from pathlib import Path

import numpy as np
import soundfile

NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
LOWEST, HIGHEST = 58, 86  # MIDI notes that may be read
START = 0.04  # seconds before the first note


def read_caption(text: str) -> tuple[list[str], int]:
    """The notes and the tempo that a caption names; none where it is no caption."""
    found = re.fullmatch(r"an? \w+ plays ((?:[A-G]#?\d ?)+) in [A-G] major at (\d+)", text.strip())
    return (found[1].split(), int(found[2])) if found else ([], 120)


def pitch(samples: np.ndarray, rate: int) -> str:
    """The note that is played in samples [T], by YIN (de Cheveigne and Kawahara 2002); "" for none."""
    longest = int(rate / (440 * 2 ** ((LOWEST - 69) / 12))) + 1
    shortest = int(rate / (440 * 2 ** ((HIGHEST - 69) / 12)))
    window = len(samples) - longest - 2
    if window < longest or np.abs(samples).max() < 1e-3:
        return ""
    differences = np.array([((samples[:window] - samples[lag : lag + window]) ** 2).sum() for lag in range(longest + 2)])
    normalized = np.ones_like(differences)
    normalized[1:] = differences[1:] * np.arange(1, len(differences)) / np.maximum(np.cumsum(differences[1:]), 1e-12)
    below = [lag for lag in range(shortest, longest) if normalized[lag] < 0.2 and normalized[lag] <= normalized[lag + 1]]
    lag = below[0] if below else shortest + int(normalized[shortest:longest].argmin())
    a, b, c = normalized[lag - 1 : lag + 2]  # a parabola through the minimum
    exact = lag + (0.5 * (a - c) / (a - 2 * b + c) if a - 2 * b + c > 0 else 0)
    number = round(69 + 12 * np.log2(rate / exact / 440))
    return f"{NAMES[number % 12]}{number // 12 - 1}"


def read_notes(samples: np.ndarray, rate: int, tempo: int, count: int) -> list[str]:
    """The notes of a melody, each in the middle of its beat."""
    beat = 60 / tempo
    starts = [round((START + (i + 0.25) * beat) * rate) for i in range(count)]
    return [pitch(samples[start : start + round(0.45 * beat * rate)], rate) for start in starts]


def score(name: str, waveforms: list[tuple[np.ndarray, int]], captions: list[str], start: float = 0.0) -> None:
    """Print the fraction of notes, and of melodies, that are as captions name them. start: of a melody, as a fraction of its notes."""
    pairs = []
    for (samples, rate), text in zip(waveforms, captions, strict=True):
        notes, tempo = read_caption(text)
        right = [a == b for a, b in zip(notes, read_notes(samples, rate, tempo, len(notes)), strict=True)]
        pairs.append(right[math.ceil(start * len(right)) :])
    notes, melodies = np.mean([right for pair in pairs for right in pair]), np.mean([all(pair) for pair in pairs])
    print(f"{name}: {100 * notes:.1f} % of notes, {100 * melodies:.1f} % of melodies")


if __name__ == "__main__":
    test = Path(sys.argv[1])
    rows = [line.split("|") for line in (test / "metadata.csv").read_text().splitlines()]
    files, captions = [test / "wavs" / f"{name}.wav" for name, _ in rows], [text for _, text in rows]
    score("recordings", [soundfile.read(file) for file in files], captions)
    if len(sys.argv) > 2:
        from unitok import Unitok

        u, out = Unitok.from_pretrained(sys.argv[2]), Path(sys.argv[3])
        rate = u.require("audio").sample_rate
        score("through the codec", [(u.decode(u.read(file)[0])[0].numpy(), rate) for file in files], captions)
        if u.model is not None:
            played = u.generate([[text] for text in captions], "audio", temperature=0.5, top_p=0.95, max_new_tokens=700, seed=0)
            out.mkdir(parents=True, exist_ok=True)
            for file, output in zip(files, played, strict=True):
                soundfile.write(out / file.name, output.audios[0].T.numpy(), rate)
            score("captions that are played", [(output.audios[0][0].numpy(), rate) for output in played], captions)
            given = {"halves that are continued, without captions": [[file] for file in files]}
            given["halves that are continued, with captions"] = [
                [text, file] for text, file in zip(captions, files, strict=True)
            ]
            for name, prompts in given.items():
                outputs = u.generate(
                    prompts, "audio", prefix_fraction=0.4, temperature=0.5, top_p=0.95, max_new_tokens=700, seed=0
                )
                score(name, [(output.audios[0][0].numpy(), rate) for output in outputs], captions, 0.5)
            described = u.generate([[file] for file in files], "text", temperature=0.0, max_new_tokens=100, seed=0)
            same = [read_caption(output.text) == read_caption(text) for output, text in zip(described, captions, strict=True)]
            print(f"recordings that are described: notes and tempo right in {100 * np.mean(same):.1f} %")
