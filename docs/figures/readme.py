"""Draws the figure of the README: prompts, and what the built-in bundle generates from them.

    python docs/figures/readme.py [scenes] [--out docs/figures/readme.svg]

Nothing is picked by hand. The prompts are the first scenes of one seed, on a background each, of the fold `composed`, whose sequences of
objects no training document shows; each output is the only sample of seed 0, with the sampling parameters of the bundle. The marks are verdicts of the oracle, which reads pixels
and waveforms (`unitok.scenes.oracle`). `make figures` runs this script.
"""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unitok.api import Unitok
from unitok.conversations import to_data_url
from unitok.document import Part as RawPart
from unitok.errors import visible
from unitok.evaluate.boxes import box_iou
from unitok.files import write_text
from unitok.media import draw_spectrogram, encode_png, image_to_tensor, tensor_to_image
from unitok.media.maps import SMOOTH, rgb_to_labels
from unitok.sample.outputs import Output
from unitok.scenes import world
from unitok.scenes.evaluate import same_notes, to_bytes
from unitok.scenes.evaluate_tasks import mean_iou
from unitok.scenes.oracle import read_audio, read_image
from unitok.scenes.tasks import SceneTask, make_task

MOST = 160  # new tokens of an output: more than any right one has
SEED, ROWS, RESOLUTION = 6, 2, 64  # of the prompts; the scenes of the bundle's recipe have seeds 1 to 5
WIDTH, MARGIN, COLUMN, GAP, TOP, BOTTOM = 880, 16, 162, 9, 44, 40  # pixels; COLUMN is the width of a card
INSET, LINE = 22, 16.5  # from the edge of a card to its content; height of a line of text
HEIGHTS, MEDIA = (190, 236), (84, 64)  # of the cards and their images in the upper and the lower part
INK, SOFT, RULE, BLUE, GREEN, RED = "#1c2126", "#5b6672", "#d5dbe2", "#2563a8", "#1a7f4b", "#c0392b"
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"


@dataclass
class Part:
    """Content of a card: str, pixels [3, H, W] or a waveform [C, T] with its rate. right: the verdict, None for a prompt."""

    content: str | Tensor
    right: bool | None = None


Columns = dict[str, list[list[Part]]]  # the cards of each column, each a list of parts


def jitter(i: int) -> np.random.Generator:
    """What moves the objects of scene `i` off their places, the same in its image, labels and boxes."""
    return np.random.default_rng((SEED, i))


def to_pixels(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> [3, H, W] in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1


def directions(u: Unitok, scenes: list[world.Scene]) -> Columns:
    """Prompt and output of each scene, from text, image or audio to another of them."""
    rng = np.random.default_rng(SEED)
    images = [world.render_image(scene, jitter(i), RESOLUTION) for i, scene in enumerate(scenes)]
    waves = [world.render_audio(scene, rng) for scene in scenes]
    captions = [world.caption(scene) for scene in scenes]
    asked = [pairs[int(rng.integers(2, len(pairs)))] for pairs in map(world.questions, scenes)]
    pixels = [*map(to_pixels, images)]
    rate = u.require("audio").sample_rate

    drawn = u.generate([[text] for text in captions], modalities="image", seed=0, max_new_tokens=MOST)
    played = u.generate([[world.audio_caption(scene)] for scene in scenes], modalities="audio", seed=0, max_new_tokens=MOST)
    seen = u.generate([[Image.fromarray(image)] for image in images], modalities="text", seed=0, max_new_tokens=MOST)
    listened = u.generate(
        [[(torch.from_numpy(wave), world.SAMPLE_RATE)] for wave in waves], modalities="text", seed=0, max_new_tokens=MOST
    )
    prompts = [[Image.fromarray(image), f" {question}"] for image, (question, _) in zip(images, asked, strict=True)]
    answered = u.generate(prompts, modalities="text", seed=0, max_new_tokens=MOST)

    columns: Columns = {}
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


def tasks(u: Unitok, scenes: list[world.Scene]) -> Columns:
    """Prompt and output of each scene: find a thing, draw labels, draw things in boxes, edit, fill a hole."""
    columns: Columns = {}
    for i, scene in enumerate(scenes):
        image, boxes = world.render_image(scene, jitter(i), RESOLUTION), world.object_boxes(scene, jitter(i))

        def made(kind: str, modality: str) -> tuple[SceneTask, Output]:
            task = make_task(kind, scene, boxes, jitter(i))  # noqa: B023
            pieces = {"image": lambda _: Image.fromarray(image), "box": lambda rows: RawPart("box", {"boxes": rows})}  # noqa: B023
            prompt = [pieces.get(name, str)(value) for name, value in task.given]
            return task, u.generate([prompt], modality, seed=0, max_new_tokens=MOST)[0]

        task, output = made("find", "box")
        found = output.of_kind("box")[0][0]
        answer = Part(framed(to_pixels(image), [found]), box_iou(found, task.answer[0][1][0]) >= 0.5)
        row = {"Find": [Part(to_pixels(image)), Part(task.given[1][1].strip()), answer]}
        _, output = made("label", "image")
        labels = rgb_to_labels(to_bytes(output.images[0]), range(len(world.SHAPES) + 1), SMOOTH)
        right = mean_iou(labels, world.render_labels(scene, jitter(i), RESOLUTION)) >= 0.5
        row["Label every pixel"] = [Part(to_pixels(image)), Part("labels:"), Part(output.images[0], right)]
        task, output = made("draw_boxes", "image")
        empty = np.full_like(image, world.BACKGROUNDS[scene.background])
        row["Boxes → image"] = [
            Part(framed(to_pixels(empty), boxes)),
            Part(", ".join(value for name, value in task.given if name == "text" and not value.startswith(" on"))),
            Part(output.images[0], read_image(to_bytes(output.images[0])) == scene),
        ]
        task = make_task("edit", scene, boxes, jitter(i))
        (output,) = u.edit(Image.fromarray(image), task.given[1][1], seed=0)
        changed = Part(output.images[0], read_image(to_bytes(output.images[0])) == task.edited)
        row["Edit"] = [Part(to_pixels(image)), Part(task.given[1][1].strip()), changed]
        x0, y0, x1, y1 = (round(RESOLUTION * value) for value in boxes[-1])
        hole, holed = np.zeros(image.shape[:2], bool), to_pixels(image)
        hole[max(0, y0) : y1, max(0, x0) : x1] = True
        holed[:, torch.from_numpy(hole)] = torch.tensor([0.8, -1.0, 0.0])[:, None]
        (output,) = u.fill(Image.fromarray(image), hole, world.caption(scene), seed=0)
        filled = Part(output.images[0], read_image(to_bytes(output.images[0])) == scene)
        row["Fill a hole"] = [Part(holed), Part(world.caption(scene)), filled]
        for title, parts in row.items():
            columns.setdefault(title, []).append(parts)
    return columns


def framed(pixels: Tensor, boxes: Sequence[Sequence[float]]) -> Tensor:
    """Pixels [3, H, W] with boxes, fractions of their width and height, drawn on a copy of four times the side."""
    large = tensor_to_image(pixels.repeat_interleave(4, 1).repeat_interleave(4, 2))
    for box in boxes:
        ImageDraw.Draw(large).rectangle([value * large.width for value in box], outline=(230, 0, 122), width=8)
    return image_to_tensor(large)


# ---- SVG ------------------------------------------------------------------------------------------------------------


def text_at(x: float, y: float, text: str, color: str = INK, size: float = 12.5, weight: int = 400) -> str:
    """One line; y is its baseline."""
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{color}" font-size="{size:g}" font-weight="{weight}">{escape(visible(text))}</text>'
    )


def image_of(x: float, y: float, width: float, height: float, pixels: Tensor, smooth: bool) -> str:
    """Pixels [3, H, W] in [-1, 1] as an image."""
    url = to_data_url(encode_png(pixels), "image/png")
    style = "" if smooth else ' style="image-rendering:pixelated"'
    return f'<image x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" preserveAspectRatio="none"{style} href="{url}"/>'


def mark(x: float, y: float, right: bool) -> str:
    """A check or a cross in a disk around x, y."""
    line = "M-3.2,0.2 L-0.9,2.6 L3.4,-2.6" if right else "M-2.6,-2.6 L2.6,2.6 M-2.6,2.6 L2.6,-2.6"
    stroke = 'fill="none" stroke="#fff" stroke-width="1.7" stroke-linecap="round" stroke-linejoin="round"'
    disk = f'<circle r="7" fill="{GREEN if right else RED}" stroke="#fff" stroke-width="1.5"/>'
    return f'<g transform="translate({x:g},{y:g})">{disk}<path d="{line}" {stroke}/></g>'


def card(x: float, y: float, parts: list[Part], whole: float, media: float) -> str:
    """A card of height `whole` with its parts from top to bottom, images of height `media`."""
    out = [f'<rect x="{x:g}" y="{y:g}" width="{COLUMN}" height="{whole:g}" rx="8" fill="#fff" stroke="{RULE}"/>']
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
            height = media
            pixels = part.content if image else draw_spectrogram(part.content, world.SAMPLE_RATE)[:, 24:]  # up to 3 kHz
            out.append(image_of(left, top, media if image else right - left, media, pixels, smooth=not image))
        bar = BLUE if generated else RULE
        out.append(f'<rect x="{x + 10:g}" y="{top:g}" width="3" height="{height:g}" rx="1.5" fill="{bar}"/>')
        if part.right is not None:
            out.append(mark(x + COLUMN - 15, y + whole - 15, part.right))
        top += height + 11
    return "".join(out)


def draw(groups: list[Columns]) -> str:
    """The whole figure as an SVG, a group of columns below the other."""
    tall = [
        TOP + len(next(iter(columns.values()))) * (of_card + GAP) for columns, of_card in zip(groups, HEIGHTS, strict=False)
    ]
    height = sum(tall) - GAP + BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="{FONT}" role="img">',
        "<title>Prompts, and the images, audio and texts that one model generates from them</title>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="14" fill="#f3f5f8" stroke="{RULE}"/>',
    ]
    for top, columns, of_card, media in zip((0, tall[0]), groups, HEIGHTS, MEDIA, strict=False):
        for i, (title, column) in enumerate(columns.items()):
            x = MARGIN + i * (COLUMN + GAP)
            out.append(text_at(x + 2, top + TOP - 14, title, size=14.5, weight=600))
            out += [card(x, top + TOP + j * (of_card + GAP), parts, of_card, media) for j, parts in enumerate(column)]
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
    scenes: dict[str, world.Scene] = {}
    while len(scenes) < ROWS:
        scene = world.draw_scene(rng, max_objects=2, fold="composed")
        scenes.setdefault(scene.background, scene)
    u = Unitok.from_pretrained(o.bundle)
    write_text(o.out, draw([make(u, [*scenes.values()]) for make in (directions, tasks)[: 1 + ("box" in u.vocab.spans)]]))
    print(o.out)


if __name__ == "__main__":
    main()
