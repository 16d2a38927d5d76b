"""Make a small data set of speech from installed Debian packages: 23 minutes of one speaker, and as much as you like made of them.

`apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-en`, `pip install pocketsphinx`; for `--synthetic` also espeak-ng
`python examples/speech/prepare.py OUT --spliced 30000`

OUT/real/train, OUT/real/test   wavs/*.wav and metadata.csv as LJSpeech has it (name|text as printed|text as read), divided by text
OUT/real/words.jsonl            the recordings of OUT/real/train with the times of their words, as Whisper's JSON has them
OUT/real/phones                 which phone is heard in each hundredth of a second of them: what codec.yaml teaches its first level
OUT/spliced                     new sentences to speak, of pieces of these recordings, cut between words at the codec's frames; also with times
OUT/varied                      others to write down, cut anywhere, and whole recordings, each played faster or slower, louder or softer
OUT/synthetic                   sentences of the words of OUT/real/train by espeak-ng, also with times

The recordings are by Allison Smith, CC-BY-SA 3.0 (`/usr/share/doc/asterisk-core-sounds-en/copyright`); nothing of them is in this repository.
"""

import argparse
import ctypes
import gzip
import itertools
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TEXTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
RATE = 8000  # Hz, of the recordings
LONGEST = 6.0  # seconds, of recordings to test on and of sentences of pieces at their usual speed
WORDS = 10  # most words of a sentence of pieces
TEST = 69  # recordings
FRAME = 320  # samples, of codec.yaml
FADE = 0.01  # seconds
MOST = 5  # words of a piece
SPEED = 0.12  # varied sentences are at most so much faster or slower, and higher or lower
GAIN = 4.0  # decibels, by which they are louder or softer at most
WHOLE = 0.35  # of the varied sentences are recordings as they are
SILENT = 0.01  # of full scale; what is quieter at both ends is cut, but for PAD seconds
PAD = 0.05
_PHONES = "SIL AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
PHONES = tuple(_PHONES.split())  # of the CMU dictionary, and silence
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


Recordings = list[tuple[np.ndarray, str]]  # samples [T] and words of each


def real(out: Path) -> tuple[Recordings, Recordings]:
    """Write the recordings; return those to train on, and those to test on.

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
        if len(samples) / RATE >= 0.2:
            rows.append((name.strip().replace("/", "-"), " ".join(text.split()).replace("|", ","), words))
            recordings[rows[-1][0]] = samples
    long = {words for name, _, words in rows if len(recordings[name]) / RATE > LONGEST}
    texts = sorted({words for *_, words in rows} - long, key=lambda words: zlib.crc32(words.encode()))
    uses = Counter(word for words in texts for word in set(words.split()))  # texts that hold a word
    test: set[str] = set()
    for words in texts:
        held = set(words.split())
        if sum(row[2] in test for row in rows) < TEST and len(held) > 1 and all(uses[word] > 1 for word in held):
            test.add(words)
            uses.subtract(held)
    found: list[Recordings] = []
    for split in ("train", "test"):
        kept = [row for row in rows if (row[2] in test) == (split == "test")]
        (out / split / "wavs").mkdir(parents=True, exist_ok=True)
        for name, *_ in kept:
            soundfile.write(out / split / "wavs" / f"{name}.wav", recordings[name], RATE)
        (out / split / "metadata.csv").write_text("".join("|".join(row) + "\n" for row in kept))
        found.append([(recordings[name], words) for name, _, words in kept])
        minutes = sum(len(samples) for samples, _ in found[-1]) / RATE / 60
        print(f"{out / split}: {len(kept)} recordings of {len({row[2] for row in kept})} texts, {minutes:.1f} minutes")
    return found[0], found[1]


def aligned(recordings: Recordings) -> tuple[list[list[int]], list[np.ndarray]]:
    """The samples at which each word of each recording begins, and the last word ends, [] where the words cannot be found; and which of
    `PHONES` is heard, [frames, phones] of 0 and 1 at 100 frames per second, 0 where that is not known."""
    import pocketsphinx

    model, dictionary = (pocketsphinx.get_model_path(name) for name in ("en-us/en-us", "en-us/cmudict-en-us.dict"))
    known = {line.split()[0] for line in Path(dictionary).read_text().splitlines()}
    decoder = pocketsphinx.Decoder(hmm=model, dict=dictionary, lm=None, loglevel="FATAL")
    frame, pad = RATE // 100, RATE // 4  # samples
    found: list[list[int]] = []
    phones: list[np.ndarray] = []

    def decode(samples: np.ndarray) -> None:
        louder = np.pad(samples, pad) / np.abs(samples).max() * 20000
        decoder.start_utt()
        decoder.process_raw(soxr.resample(louder, RATE, 16000).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()

    for samples, words in recordings:
        found.append([])
        phones.append(np.zeros((max(1, round(len(samples) / frame)), len(PHONES)), np.float32))
        if not set(words.split()) <= known:
            continue
        decoder.set_align_text(words)
        decode(samples)
        spoken = [part for part in decoder.seg() or () if re.match("[a-z]", part.word)]
        if [re.sub(r"\(\d+\)", "", part.word) for part in spoken] == words.split():
            starts = [(part.start_frame * frame) - pad for part in spoken]
            found[-1] = [max(0, start) for start in starts] + [min(len(samples), (spoken[-1].end_frame + 1) * frame - pad)]
            decoder.set_alignment()  # once more, for the phones of these words
            decode(samples)
            for phone in decoder.get_alignment().phones():
                first = phone.start - pad // frame
                heard = phones[-1][max(0, first) : max(0, first + phone.duration)]
                heard[:] = np.array(PHONES) == (phone.name if phone.name in PHONES else "SIL")
    return found, phones


def row_of(file: str, words: list[str], starts: Sequence[float]) -> str:
    """A line of JSON Lines: a recording, its text, and its words with their times. starts: samples at which words begin, and the last ends."""
    times = [round(start / RATE, 4) for start in starts]
    timed = [{"word": word, "start": a, "end": b} for word, a, b in zip(words, times, times[1:], strict=False)]
    return json.dumps({"audio": file, "text": " ".join(words), "words": timed}) + "\n"


def timed(out: Path, recordings: Recordings, starts: list[list[int]], phones: list[np.ndarray]) -> None:
    """Write the times of the words of recordings, which lie in OUT/train, where they were found, and their phones."""
    names = [line.split("|")[0] for line in (out / "train" / "metadata.csv").read_text().splitlines()]
    rows = [
        row_of(f"train/wavs/{name}.wav", text.split(), at)
        for name, (_, text), at in zip(names, recordings, starts, strict=True)
        if at
    ]
    (out / "words.jsonl").write_text("".join(rows))
    (out / "phones").mkdir(exist_ok=True)
    for name, heard in zip(names, phones, strict=True):
        np.save(out / "phones" / f"{name}.npy", heard)
    print(f"{out / 'words.jsonl'}: {len(rows)} recordings with the times of their words")


def spliced(out: Path, recordings: Recordings, starts: list[list[int]], held: set[str], count: int, speed: float = 0.0) -> None:
    """Write sentences of pieces of one to `MOST` words, each of any recording, with short fades between.

    starts: where words begin, as `aligned` has them. speed: most that each is faster or slower, and higher or lower; then some are whole
    recordings. Without, pieces are of whole frames of the codec, so that a piece has nearly the same codes in each sentence: what is to be
    spoken should be easy to predict, what is to be understood should differ each time.
    """
    grid = 1 if speed else FRAME
    rng = random.Random(str(out.name))
    (out / "wavs").mkdir(parents=True, exist_ok=True)
    fade = round(FADE * RATE)
    whole = [(np.pad(samples, (0, grid)), text, at) for (samples, text), at in zip(recordings, starts, strict=True) if at]
    weights = [len(at) ** 0.5 for *_, at in whole]
    ramp = np.linspace(0, 1, fade)
    rows: list[str] = []
    while len(rows) < count:
        samples = np.zeros(rng.randrange(round(PAD * RATE) // grid + 1) * grid + fade)
        words: list[str] = []
        begins: list[float] = []
        over = 0.0  # where the last word ends
        wanted = 1 + int(WORDS * rng.random() ** 1.5)
        if speed and rng.random() < WHOLE:
            recording, text, at = rng.choice(whole)
            lead = rng.randrange(FRAME)
            samples, words, wanted = np.pad(recording, (lead, 0)), text.split(), 0
            begins, over = [lead + sample for sample in at[:-1]], lead + at[-1]
        while len(words) < wanted:
            ((recording, text, at),) = rng.choices(whole, weights)
            first = rng.randrange(len(at) - 1)
            last = min(first + rng.randint(1, min(MOST, wanted - len(words))), len(at) - 1)
            cuts = [round(sample / grid) * grid for sample in at[first : last + 1]]
            piece = recording[cuts[0] : cuts[-1] + fade]
            if len(piece) >= grid + fade:
                begins += [len(samples) - fade + cut - cuts[0] for cut in cuts[:-1]]
                over = len(samples) - fade + cuts[-1] - cuts[0]
                seam = samples[-fade:] * (1 - ramp) + piece[:fade] * ramp
                samples = np.concatenate([samples[:-fade], seam, piece[fade:]])
                words += text.split()[first:last]
        if wanted:
            samples[-fade:] *= 1 - ramp  # what follows the last piece
        sentence = " ".join(words)
        if len(samples) > LONGEST * RATE or any(f" {text} " in f" {sentence} " for text in held):
            continue
        factor = 1.0
        if speed:
            factor, louder = rng.uniform(1 - speed, 1 + speed), 10 ** (rng.uniform(-GAIN, GAIN) / 20)
            samples = np.clip(soxr.resample(samples, round(RATE * factor), RATE) * louder, -1, 1)
        file = f"wavs/j{len(rows):05d}.wav"
        soundfile.write(out / file, samples, RATE)
        rows.append(row_of(file, words, [start / factor for start in (*begins, over)]))
    (out / "metadata.jsonl").write_text("".join(rows))
    print(f"{out}: {count} sentences of pieces of {len(whole)} recordings")


class Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h; types: 0 the last one, 1 a word. text_position: from 1 on. audio_position: milliseconds."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("type", "identifier", "text_position", "length", "audio_position", "sample")),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


class Espeak:
    """Speaks with espeak-ng's library, which says when each word begins. rate: Hz."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libespeak-ng.so.1")
        self.rate: int = self.library.espeak_Initialize(1, 0, None, 0)  # 1: samples are retrieved, not played
        assert self.rate > 0, "espeak-ng finds its data nowhere: apt-get install espeak-ng-data"
        self._samples: list[np.ndarray] = []
        self._begins: dict[int, float] = {}  # seconds, by the position in the text
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))
        self._callback = kind(self._take)
        self.library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float64) / 32768)
        for event in itertools.takewhile(lambda event: event.type, (events[i] for i in itertools.count())):
            if event.type == 1:
                self._begins[event.text_position - 1] = event.audio_position / 1000
        return 0

    def speak(self, words: list[str], voice: str, words_per_minute: int) -> tuple[np.ndarray, list[float]]:
        """Return samples [T] and the seconds at which words begin and the last one ends; words that it says as one begin at once."""
        self._samples, self._begins = [], {}
        text = " ".join(words).encode()
        assert not self.library.espeak_SetVoiceByName(voice.encode()), f"espeak-ng has no voice {voice}"
        self.library.espeak_SetParameter(1, words_per_minute, 0)
        self.library.espeak_Synth(text, len(text) + 1, 0, 1, 0, 1, None, None)
        self.library.espeak_Synchronize()
        samples = np.concatenate(self._samples)
        places = itertools.accumulate((len(word) + 1 for word in words[:-1]), initial=0)
        begins = [self._begins.get(place) for place in places] + [len(samples) / self.rate]
        return samples, list(
            itertools.accumulate(begins, lambda before, begin: before if begin is None else begin, initial=0.0)
        )[1:]


def synthetic(out: Path, texts: list[str], held: set[str], count: int, seed: int = 0) -> None:
    """Write sentences by espeak-ng, with the times of their words: texts as they are, and texts with pieces of others in place of their own."""
    rng, espeak = random.Random(seed), Espeak()
    (out / "wavs").mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    while len(rows) < count:
        first, second = (rng.choice(texts).split() for _ in range(2))
        at, to = rng.randint(0, len(first)), rng.randint(0, len(second))
        words = [*first[:at], *second[to:]] if rng.random() < 0.7 else first
        sentence = " ".join(words)
        if not words or any(f" {text} " in f" {sentence} " for text in held):
            continue
        samples, begins = espeak.speak(words, rng.choice(VOICES), rng.randint(140, 180))
        samples = soxr.resample(samples, espeak.rate, RATE)
        loud = np.flatnonzero(np.abs(samples) > SILENT)
        lead = max(0, int(loud[0]) - round(PAD * RATE))
        samples = trimmed(samples) * (0.7 / np.abs(samples).max())
        if len(samples) > LONGEST * RATE:
            continue
        file = f"wavs/s{len(rows):05d}.wav"
        soundfile.write(out / file, samples, RATE)
        rows.append(row_of(file, words, [min(max(0.0, begin * RATE - lead), len(samples)) for begin in begins]))
    (out / "metadata.jsonl").write_text("".join(rows))
    print(f"{out}: {count} sentences")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--spliced", type=int, default=0, help="sentences of pieces of recordings to speak; a third more to write down"
    )
    parser.add_argument("--synthetic", type=int, default=0, help="sentences by espeak-ng, to train with other voices")
    arguments = parser.parse_args()
    to_train, to_test = real(arguments.out / "real")
    held = {words for _, words in to_test}
    if arguments.spliced:
        starts, phones = aligned(to_train)
        timed(arguments.out / "real", to_train, starts, phones)
        spliced(arguments.out / "spliced", to_train, starts, held, arguments.spliced)
        spliced(arguments.out / "varied", to_train, starts, held, arguments.spliced * 4 // 3, SPEED)
    if arguments.synthetic:
        synthetic(arguments.out / "synthetic", [words for _, words in to_train], held, arguments.synthetic)
