"""Make a small data set of speech from installed Debian packages: 25 minutes of one speaker, and as much of espeak-ng as you like.

`apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-en espeak-ng sox`
`python examples/speech/prepare.py OUT --synthetic 4000`

OUT/real/train, OUT/real/test   wavs/*.wav and metadata.csv as LJSpeech has it (name|text as printed|text as read), divided by text
OUT/synthetic                   sentences of the words of OUT/real/train, by espeak-ng, in the same format

The recordings are by Allison Smith, CC-BY-SA 3.0 (`/usr/share/doc/asterisk-core-sounds-en/copyright`); nothing of them is in this repository.
"""

import argparse
import gzip
import random
import re
import subprocess
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TEXTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
RATE = 8000  # Hz, of the recordings
LONGEST = 6.0  # seconds
TEST = 69  # recordings
SILENT = 0.01  # of full scale; what is quieter at both ends is cut, but for PAD seconds
PAD = 0.05
VOICES = ("en-us+f1", "en-us+f2", "en-us+f3", "en-us+f4", "en-us+f5")

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_NUMBERS = dict(enumerate(_UNITS.split())) | dict(
    zip(range(20, 100, 10), ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"])
)


def words_of(text: str) -> str:
    """A text as it is read: words in lower case, numbers in words; "" for what is no speech."""
    text = re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", text.lower())
    text = re.sub(r"\d+", lambda m: f" {_number(int(m[0]))} ", text)
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)?", text))


def _number(value: int) -> str:
    if value in _NUMBERS:
        return _NUMBERS[value]
    if value < 100:
        return f"{_NUMBERS[value // 10 * 10]} {_NUMBERS[value % 10]}"
    return " ".join(_NUMBERS[int(digit)] for digit in str(value))


def trimmed(samples: np.ndarray) -> np.ndarray:
    """Samples [T] without the silence at both ends."""
    loud = np.flatnonzero(np.abs(samples) > SILENT)
    pad = round(PAD * RATE)
    return samples[max(0, loud[0] - pad) : loud[-1] + pad] if len(loud) else samples[:0]


def real(out: Path) -> list[str]:
    """Write the recordings; return the texts of those to train on.

    To test on are `TEST` recordings of texts of several words, each of which some other text to train on holds.
    """
    rows: list[tuple[str, str, str]] = []  # name, text as printed, text as read
    recordings: dict[str, np.ndarray] = {}
    for line in gzip.decompress(TEXTS.read_bytes()).decode().splitlines():
        name, colon, text = line.partition(":")
        file, words = SOUNDS / f"{name.strip()}.wav", words_of(text)
        if not colon or line.startswith(";") or not words or not file.exists():
            continue
        samples = trimmed(soundfile.read(file)[0])
        if 0.2 <= len(samples) / RATE <= LONGEST:
            rows.append((name.strip().replace("/", "-"), " ".join(text.split()).replace("|", ","), words))
            recordings[rows[-1][0]] = samples
    texts = sorted({words for *_, words in rows}, key=lambda words: zlib.crc32(words.encode()))
    uses = Counter(word for words in texts for word in set(words.split()))  # texts that hold a word
    test: set[str] = set()
    for words in texts:
        held = set(words.split())
        if sum(row[2] in test for row in rows) < TEST and len(held) > 1 and all(uses[word] > 1 for word in held):
            test.add(words)
            uses.subtract(held)
    for split in ("train", "test"):
        kept = [row for row in rows if (row[2] in test) == (split == "test")]
        (out / split / "wavs").mkdir(parents=True, exist_ok=True)
        for name, *_ in kept:
            soundfile.write(out / split / "wavs" / f"{name}.wav", recordings[name], RATE)
        (out / split / "metadata.csv").write_text("".join("|".join(row) + "\n" for row in kept))
        print(f"{out / split}: {len(kept)} recordings of {len({row[2] for row in kept})} texts")
    return [words for *_, words in rows if words not in test]


def synthetic(out: Path, texts: list[str], count: int, seed: int = 0) -> None:
    """Write sentences by espeak-ng: texts as they are, and texts with pieces of others in place of their own."""
    rng = random.Random(seed)
    (out / "wavs").mkdir(parents=True, exist_ok=True)
    held = {line.rpartition("|")[2] for line in (out.parent / "real" / "test" / "metadata.csv").read_text().splitlines()}

    def sentence() -> str:
        while True:
            first, second = (rng.choice(texts).split() for _ in range(2))
            at, to = rng.randint(0, len(first)), rng.randint(0, len(second))
            words = " ".join([*first[:at], *second[to:]] if rng.random() < 0.7 else first)
            if words and len(words) <= 90 and words not in held:
                return words

    sentences = [(sentence(), rng.choice(VOICES), rng.randint(140, 180)) for _ in range(count)]

    def speak(number: int) -> str:
        file = out / "wavs" / f"s{number:05d}.wav"
        text, voice, speed = sentences[number]
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-w", file, text], check=True)
        subprocess.run(["sox", "-q", file, "-r", str(RATE), f"{file}.8k.wav", "norm", "-3"], check=True)
        Path(f"{file}.8k.wav").replace(file)
        samples = trimmed(soundfile.read(file)[0])
        soundfile.write(file, samples, RATE)
        return f"s{number:05d}|{text}|{text}\n"

    with ThreadPoolExecutor(2) as pool:
        (out / "metadata.csv").write_text("".join(pool.map(speak, range(count))))
    print(f"{out}: {count} sentences")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--synthetic", type=int, default=0, help="sentences by espeak-ng")
    arguments = parser.parse_args()
    texts = real(arguments.out / "real")
    if arguments.synthetic:
        synthetic(arguments.out / "synthetic", texts, arguments.synthetic)
