"""Draws 64 images that the built-in bundle generates, the wrong ones in a red frame.

    python docs/figures/sheet.py [scenes] [--out docs/figures/sheet.png]

Nothing is picked by hand. The prompts are the first captions of one seed of the fold `composed`, a third of them of one, two and three
objects each on average; each image is the only sample of seed 0, judged by the oracle. `make figures` runs this script.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from unitok.api import Unitok
from unitok.media import save_image
from unitok.scenes import world
from unitok.scenes.evaluate import to_bytes
from unitok.scenes.oracle import read_image

SEED, SIDE, FRAME = 7, 8, 3  # of the prompts; images per row; pixels
GREEN, RED = (26, 127, 75), (192, 57, 43)


def framed(pixels: torch.Tensor, color: tuple[int, int, int]) -> torch.Tensor:
    """An image [3, H, W] in a frame, with a white margin around it."""
    edge = (torch.tensor(color) / 127.5 - 1)[:, None, None]
    height, width = pixels.shape[-2:]
    out = torch.ones(3, height + 4 * FRAME, width + 4 * FRAME)
    out[:, FRAME:-FRAME, FRAME:-FRAME] = edge
    out[:, 2 * FRAME : -2 * FRAME, 2 * FRAME : -2 * FRAME] = pixels
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle", nargs="?", default="scenes", help="a bundle: its folder, or the name of a built-in one")
    p.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"), help="the PNG file to write")
    o = p.parse_args()
    rng = np.random.default_rng(SEED)
    scenes = [world.draw_scene(rng, fold="composed") for _ in range(SIDE * SIDE)]
    outputs = Unitok.from_pretrained(o.bundle).generate([[world.caption(s)] for s in scenes], modalities="image", seed=0)
    images = [output.images[0].clamp(-1, 1) for output in outputs]
    right = [read_image(to_bytes(image)) == scene for image, scene in zip(images, scenes, strict=True)]
    cells = [framed(image, GREEN if good else RED) for image, good in zip(images, right, strict=True)]
    rows = [torch.cat(cells[i : i + SIDE], 2) for i in range(0, len(cells), SIDE)]
    save_image(o.out, torch.cat(rows, 1))
    for scene, good in zip(scenes, right, strict=True):
        if not good:
            print("wrong:", world.caption(scene))
    print(f"{o.out}: {sum(right)} of {len(right)} right")


if __name__ == "__main__":
    main()
