"""Draws the figure of the README: prompts, and what the built-in bundle generates from them.

    python docs/figures/readme.py [scenes] [--out docs/figures/readme.svg]

Nothing is picked by hand. The prompts are the first scenes of one seed of the fold `composed`, whose sequences of objects no training
document shows; each output is the only sample of seed 0, with the sampling parameters of the bundle. The marks are verdicts of the oracle, which reads pixels
and waveforms (`unitok.scenes.oracle`). `make figures` runs this script.
"""

import argparse
import textwrap
from base64 import b64encode
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unitok.api import Unitok
from unitok.errors import visible
from unitok.files import write_text
from unitok.media import draw_spectrogram, encode_png
from unitok.scenes import world
from unitok.scenes.evaluate import same_notes, to_bytes
from unitok.scenes.oracle import read_audio, read_image

MOST = 160  # new tokens of an output: more than any right one has
SEED, ROWS, RESOLUTION = 6, 3, 64  # of the prompts; the scenes of the bundle's recipe have seeds 1 to 5
WIDTH, MARGIN, COLUMN, GAP, HEIGHT, TOP, BOTTOM = 880, 16, 162, 9, 190, 48, 40  # pixels; COLUMN and HEIGHT are those of a card
INSET, MEDIA, LINE = 22, 84, 16.5  # from the edge of a card to its content; height of an image; height of a line of text
INK, SOFT, RULE, BLUE, GREEN, RED = "#1c2126", "#5b6672", "#d5dbe2", "#2563a8", "#1a7f4b", "#c0392b"
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"


@dataclass
class Part:
    """Content of a card: str, pixels [3, H, W] or a waveform [C, T] with its rate. right: the verdict, None for a prompt."""

    content: str | Tensor
    right: bool | None = None


def cards(u: Unitok, scenes: list[world.Scene]) -> dict[str, list[list[Part]]]:
    """For each column its cards: prompt and output of each scene."""
    rng = np.random.default_rng(SEED)
    images = [world.render_image(scene, rng, RESOLUTION) for scene in scenes]
    waves = [world.render_audio(scene, rng) for scene in scenes]
    captions = [world.caption(scene) for scene in scenes]
    asked = [pairs[int(rng.integers(2, len(pairs)))] for pairs in map(world.questions, scenes)]
    pixels = [torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1 for image in images]
    rate = u.require("audio").sample_rate

    drawn = u.generate([[text] for text in captions], modalities="image", seed=0, max_new_tokens=MOST)
    played = u.generate([[world.audio_caption(scene)] for scene in scenes], modalities="audio", seed=0, max_new_tokens=MOST)
    seen = u.generate([[Image.fromarray(image)] for image in images], modalities="text", seed=0, max_new_tokens=MOST)
    listened = u.generate(
        [[(torch.from_numpy(wave), world.SAMPLE_RATE)] for wave in waves], modalities="text", seed=0, max_new_tokens=MOST
    )
    prompts = [[Image.fromarray(image), f" {question}"] for image, (question, _) in zip(images, asked, strict=True)]
    answered = u.generate(prompts, modalities="text", seed=0, max_new_tokens=MOST)

    columns: dict[str, list[list[Part]]] = {}
    for i, scene in enumerate(scenes):
        image, audio, answer = drawn[i].images[0], played[i].audios[0], answered[i].text.strip().rstrip(".")
        row = {
            "Text → image": [Part(captions[i]), Part(image, read_image(to_bytes(image)) == scene)],
            "Text → audio": [
                Part(world.audio_caption(scene)),
                Part(audio, same_notes(read_audio(audio.numpy(), rate), scene)),
            ],
            "Image → text": [Part(pixels[i]), Part(seen[i].text, world.parse_caption(seen[i].text) == scene)],
            "Audio → text": [
                Part(torch.from_numpy(waves[i])),
                Part(listened[i].text, world.parse_audio_caption(listened[i].text) == scene.notes()),
            ],
            "Question → answer": [Part(pixels[i]), Part(asked[i][0]), Part(answer, answer == asked[i][1])],
        }
        for title, parts in row.items():
            columns.setdefault(title, []).append(parts)
    return columns


# ---- SVG ------------------------------------------------------------------------------------------------------------


def text_at(x: float, y: float, text: str, color: str = INK, size: float = 12.5, weight: int = 400) -> str:
    """One line; y is its baseline."""
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{color}" font-size="{size:g}" font-weight="{weight}">{escape(visible(text))}</text>'
    )


def image_of(x: float, y: float, width: float, pixels: Tensor, smooth: bool) -> str:
    """Pixels [3, H, W] in [-1, 1] as an image of height MEDIA."""
    url = f"data:image/png;base64,{b64encode(encode_png(pixels)).decode()}"
    style = "" if smooth else ' style="image-rendering:pixelated"'
    return f'<image x="{x:g}" y="{y:g}" width="{width:g}" height="{MEDIA}" preserveAspectRatio="none"{style} href="{url}"/>'


def mark(x: float, y: float, right: bool) -> str:
    """A check or a cross in a disk around x, y."""
    line = "M-3.2,0.2 L-0.9,2.6 L3.4,-2.6" if right else "M-2.6,-2.6 L2.6,2.6 M-2.6,2.6 L2.6,-2.6"
    stroke = 'fill="none" stroke="#fff" stroke-width="1.7" stroke-linecap="round" stroke-linejoin="round"'
    disk = f'<circle r="7" fill="{GREEN if right else RED}" stroke="#fff" stroke-width="1.5"/>'
    return f'<g transform="translate({x:g},{y:g})">{disk}<path d="{line}" {stroke}/></g>'


def card(x: float, y: float, parts: list[Part]) -> str:
    """A card with its parts from top to bottom."""
    out = [f'<rect x="{x:g}" y="{y:g}" width="{COLUMN}" height="{HEIGHT}" rx="8" fill="#fff" stroke="{RULE}"/>']
    left, right, top = x + INSET, x + COLUMN - 12, y + 14.0
    for part in parts:
        generated = part.right is not None
        if isinstance(part.content, str):
            lines = textwrap.wrap(part.content, 21, max_lines=4) or [""]
            height = LINE * len(lines)
            color = INK if generated else SOFT
            out += [text_at(left, top + 12 + LINE * i, line, color) for i, line in enumerate(lines)]
        else:
            image = part.content.shape[0] == 3
            height = MEDIA
            pixels = part.content if image else draw_spectrogram(part.content, world.SAMPLE_RATE)[:, 24:]  # up to 3 kHz
            out.append(image_of(left, top, MEDIA if image else right - left, pixels, smooth=not image))
        bar = BLUE if generated else RULE
        out.append(f'<rect x="{x + 10:g}" y="{top:g}" width="3" height="{height:g}" rx="1.5" fill="{bar}"/>')
        if part.right is not None:
            out.append(mark(x + COLUMN - 15, y + HEIGHT - 15, part.right))
        top += height + 11
    return "".join(out)


def draw(columns: dict[str, list[list[Part]]]) -> str:
    """The whole figure as an SVG."""
    rows = len(next(iter(columns.values())))
    height = TOP + rows * (HEIGHT + GAP) - GAP + BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="{FONT}" role="img">',
        "<title>Prompts, and the images, audio and texts that one model generates from them</title>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="14" fill="#f3f5f8" stroke="{RULE}"/>',
    ]
    for i, (title, column) in enumerate(columns.items()):
        x = MARGIN + i * (COLUMN + GAP)
        out.append(text_at(x + 2, TOP - 16, title, size=14.5, weight=600))
        out += [card(x, TOP + j * (HEIGHT + GAP), parts) for j, parts in enumerate(column)]
    y = height - 15
    out += [
        f'<rect x="{MARGIN}" y="{y - 11}" width="3" height="14" rx="1.5" fill="#aeb7c1"/>',
        text_at(MARGIN + 9, y, "prompt", SOFT),
    ]
    out += [
        f'<rect x="{MARGIN + 64}" y="{y - 11}" width="3" height="14" rx="1.5" fill="{BLUE}"/>',
        text_at(MARGIN + 73, y, "generated", SOFT),
    ]
    out += [mark(MARGIN + 151, y - 4, True), mark(MARGIN + 169, y - 4, False)]
    out.append(
        text_at(
            MARGIN + 182,
            y,
            "right or wrong, as an oracle reads it. Audio is drawn as a spectrogram. First samples, unseen sequences of objects.",
            SOFT,
        )
    )
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle", nargs="?", default="scenes", help="a bundle: its folder, or the name of a built-in one")
    p.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".svg"), help="the SVG file to write")
    o = p.parse_args()
    rng = np.random.default_rng(SEED)
    scenes = [world.draw_scene(rng, max_objects=2, fold="composed") for _ in range(ROWS)]
    write_text(o.out, draw(cards(Unitok.from_pretrained(o.bundle), scenes)))
    print(o.out)


if __name__ == "__main__":
    main()
