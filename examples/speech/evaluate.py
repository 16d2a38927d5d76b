"""Word error rates of a bundle on recordings with transcripts: of what it says, and of what it writes down.

    python examples/speech/evaluate.py BUNDLE runs/speech/real/test OUT

OUT/reconstructed and OUT/spoken0 to 2 get the recordings through the codec, and the texts as the bundle speaks them; the judge (judge.py) hears
them and the recordings themselves.
"""

import sys
from pathlib import Path

import jiwer
import soundfile
from judge import Judge, read_folder, word_error_rate

from unitok import Unitok

bundle, test, out = map(Path, sys.argv[1:4])
rows = read_folder(test)
texts = [text for _, text in rows]
u = Unitok.from_pretrained(bundle)
rate = u.require("audio").sample_rate


def save(name: str, waveforms: list) -> list[tuple[Path, str]]:
    folder = out / name
    (folder / "wavs").mkdir(parents=True, exist_ok=True)
    files = [folder / "wavs" / file.name for file, _ in rows]
    for file, waveform in zip(files, waveforms, strict=True):
        soundfile.write(file, waveform.T.numpy(), rate)
    (folder / "metadata.csv").write_text("".join(f"{file.stem}|{text}\n" for file, text in zip(files, texts, strict=True)))
    return list(zip(files, texts, strict=True))


judge = Judge(texts)
print(f"recordings: {100 * word_error_rate(judge, rows)[0]:.1f} % word errors, as the judge hears them")
reconstructed = save("reconstructed", [u.decode(u.read(file)[0]) for file, _ in rows])
print(f"through the codec: {100 * word_error_rate(judge, reconstructed)[0]:.1f} %")
if u.model is not None:
    written = [u.transcribe(file).text or "-" for file, _ in rows]
    print(f"speech to text: {100 * jiwer.wer(texts, written):.1f} %")
    for text, found in list(zip(texts, written, strict=True))[:8]:
        print(f"  {text}\n  -> {found}")
    for seed in range(3):
        errors, heard = word_error_rate(judge, save(f"spoken{seed}", [u.speak(text, seed=seed) for text in texts]))
        print(f"text to speech: {100 * errors:.1f} %, as the judge hears them (seed {seed})")
    for text, found in heard[:8]:
        print(f"  {text}\n  -> {found}")
