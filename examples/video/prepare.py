"""Make a small data set of scenes in motion: two seconds of one or two things that move, grow or cross, their notes, captions, questions.

`python examples/video/prepare.py OUT --count 24000`

OUT/train   clips/*.webp (lossless, eight frames of 64 x 64 pixels), audio/*.wav (a note per frame), text.txt, and documents.jsonl: caption
            to video, to video and audio, video to audio, to caption, questions about videos
OUT/test    clips/*.webp, clips.jsonl (path and caption of each)
OUT/image   the image tokenizer of the built-in bundle: with its codes, frame by frame, there is nothing to train
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from unitok import Unitok
from unitok.media import save_audio
from unitok.scenes.motion import RATE, caption, draw_clip, questions, render_clip, render_notes
from unitok.scenes.world import SAMPLE_RATE

#: Documents per clip on average, by kind; questions of a document.
AVERAGES = {"draw": 0.6, "film": 0.5, "play": 0.5, "describe": 0.5, "ask": 0.4}
QUESTIONS = 3


def write_clip(folder: Path, seed: int, side: int, number: int) -> tuple[str, list[dict]]:
    """Write a clip; return its caption and its documents."""
    rng = np.random.default_rng((seed, number))
    clip = draw_clip(rng)
    frames = [Image.fromarray(frame) for frame in render_clip(clip, rng, side)]
    file = f"clips/{number:06d}.webp"
    frames[0].save(folder / file, save_all=True, append_images=frames[1:], duration=1000 // RATE, lossless=True, quality=0)
    save_audio(folder / "audio" / f"{number:06d}.wav", render_notes(clip, rng), SAMPLE_RATE)
    audio = {"type": "audio", "path": f"audio/{number:06d}.wav"}
    given, video = {"type": "text", "text": caption(clip), "loss": False}, {"type": "video", "path": file}
    shown = video | {"loss": False}
    asked: list[dict] = []
    for question, answer in rng.permutation(questions(clip))[:QUESTIONS].tolist():
        asked += [{"type": "text", "text": f" {question}", "loss": False}, {"type": "text", "text": f" {answer}."}]
    contents = {
        "draw": [given, video],
        "film": [given, video, audio],
        "play": [shown, audio],
        "describe": [shown, {"type": "text", "text": caption(clip)}],
        "ask": [shown, *asked],
    }
    return caption(clip), [
        {"id": f"{number:06d}-{kind}", "content": content}
        for kind, content in contents.items()
        if rng.random() < AVERAGES[kind]
    ]


def write(folder: Path, count: int, seed: int, side: int) -> None:
    for name in ("clips", "audio"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        made = list(pool.map(partial(write_clip, folder, seed, side), range(count), chunksize=100))
    rows = [{"video": f"clips/{number:06d}.webp", "caption": text} for number, (text, _) in enumerate(made)]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{folder}: {count} clips")
    if folder.name == "train":
        documents = [document for _, documents in made for document in documents]
        texts = dict.fromkeys(part["text"] for d in documents for part in d["content"] if part["type"] == "text")
        (folder / "text.txt").write_text("".join(f"{text}\n" for text in texts))
        (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=24_000, help="clips to train on")
    parser.add_argument("--test", type=int, default=200, help="clips to test on")
    parser.add_argument("--side", type=int, default=64, help="of the frames, in pixels")
    arguments = parser.parse_args()
    write(arguments.out / "train", arguments.count, 0, arguments.side)
    write(arguments.out / "test", arguments.test, 1, arguments.side)
    Unitok.from_pretrained("scenes").image.save_pretrained(arguments.out / "image", overwrite=True)
