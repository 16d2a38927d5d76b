"""Word error rates by a recognizer that knows neither the codec nor the decoder: pocketsphinx, with its own acoustic model.

    pip install pocketsphinx jiwer
    python examples/speech/judge.py FOLDER…

Each folder holds `metadata.csv` (name|…|text) and `wavs/`. The recognizer's language model are pairs of the words that the texts of
all folders hold. So what it prints for recordings is the floor for what it prints for anything generated.
"""

import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jiwer
import numpy as np
import soundfile
import soxr
from pocketsphinx import Decoder, get_model_path

RATE = 16000  # Hz, of the acoustic model


def read_folder(folder: Path) -> list[tuple[Path, str]]:
    """The recordings of a folder with their texts."""
    rows = [line.split("|") for line in (folder / "metadata.csv").read_text().splitlines()]
    return [(folder / "wavs" / f"{row[0]}.wav", row[-1]) for row in rows]


def bigrams(texts: Iterable[str], known: set[str], smoothing: float = 0.5) -> str:
    """A language model of pairs of words in ARPA's format: counts, interpolated with all words alike."""
    pairs, singles = Counter[tuple[str, str]](), Counter[str]()
    for text in texts:
        words = ["<s>", *text.split(), "</s>"]
        singles.update(words)
        pairs.update((a, b) for a, b in zip(words, words[1:], strict=False) if {a, b} <= known | {"<s>", "</s>"})
    vocabulary = sorted(known | {"<s>", "</s>"})
    lines = ["\\data\\", f"ngram 1={len(vocabulary)}", f"ngram 2={len(pairs)}", "", "\\1-grams:"]
    backoff = math.log10(smoothing)
    lines += [f"{math.log10(1 / len(vocabulary)):.4f} {word} {backoff:.4f}" for word in vocabulary]
    lines += ["", "\\2-grams:"]
    lines += [
        f"{math.log10((1 - smoothing) * n / singles[a] + smoothing / len(vocabulary)):.4f} {a} {b}"
        for (a, b), n in pairs.items()
    ]
    return "\n".join([*lines, "", "\\end\\", ""])


class Judge:
    """Writes down what is said. texts: what may be said, in words."""

    def __init__(self, texts: Iterable[str]):
        texts = list(texts)
        dictionary = get_model_path("en-us/cmudict-en-us.dict")
        known = {line.split()[0] for line in Path(dictionary).read_text().splitlines()}
        words = {word for text in texts for word in text.split()}
        self.unknown = words - known
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder, "words.arpa")
            model.write_text(bigrams(texts, words & known))
            self._decoder = Decoder(hmm=get_model_path("en-us/en-us"), dict=dictionary, lm=str(model), loglevel="FATAL", lw=6.5)

    def hear(self, file: Path) -> str:
        """The words of a recording."""
        samples, rate = soundfile.read(file)
        samples = soxr.resample(samples, rate, RATE) if rate != RATE else samples
        samples = np.pad(samples, RATE // 4)
        peak = max(float(np.abs(samples).max()), 1e-4)
        self._decoder.start_utt()
        self._decoder.process_raw((samples / peak * 20000).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return found.hypstr if found else ""


def word_error_rate(judge: Judge, rows: Iterable[tuple[Path, str]]) -> tuple[float, list[tuple[str, str]]]:
    """Errors per word of the texts, and each text with what was heard."""
    heard = [(text, judge.hear(file)) for file, text in rows]
    return jiwer.wer([text for text, _ in heard], [said for _, said in heard]), heard


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]]
    all_rows = {folder: read_folder(folder) for folder in folders}
    judge = Judge(text for rows in all_rows.values() for _, text in rows)
    if judge.unknown:
        print(f"words that the recognizer does not know: {', '.join(sorted(judge.unknown))}")
    for folder, rows in all_rows.items():
        rate, heard = word_error_rate(judge, rows)
        print(f"{folder}: word error rate {100 * rate:.1f} % of {sum(len(text.split()) for text, _ in heard)} words")
        for text, said in heard[:6]:
            print(f"  {text}\n  -> {said}")
