"""An output while it grows, in a terminal: text as it is written, pictures in half blocks, sound as seconds."""

import sys
from collections.abc import Iterable
from typing import TextIO

import torch.nn.functional as F
from torch import Tensor

from unitok.errors import visible
from unitok.sample.outputs import Output
from unitok.sample.stream import Piece

COLUMNS = 48  # characters that a picture is wide, at most


def show(pieces: Iterable[Piece | Output], sample_rate: int, file: TextIO | None = None) -> list[Output]:
    """Show the first output's pieces; -> all outputs, in order. sample_rate: of sounds, Hz. Without a terminal a picture is a line
    that says its size."""
    file = file or sys.stdout
    outputs, drawn, last = [], 0, ""
    for piece in pieces:
        if isinstance(piece, Output):
            outputs.append(piece)
            continue
        if piece.index != 0:
            continue
        if piece.modality == "text":
            file.write(visible(piece.content, lines=True))
        elif piece.modality == "image" and not file.isatty():
            if piece.done:
                height, width = piece.content.shape[1:]
                file.write(f"\n[picture, {height} x {width} pixels]\n")
        elif piece.modality == "image":
            lines = half_blocks(piece.content)
            file.write(
                ("\n" if last == "text" else "") + (f"\x1b[{drawn}A" if drawn else "") + "".join(f"\x1b[2K{x}\n" for x in lines)
            )
            drawn = len(lines)
        elif piece.modality == "audio":
            heard = piece.content.shape[-1] / sample_rate
            file.write(f"{'' if last == 'audio' else chr(10)}\N{EIGHTH NOTE} {heard:.2f} s ")
        last = piece.modality
        drawn = 0 if piece.done else drawn
        file.flush()
    file.write("\n")
    return sorted(outputs, key=lambda output: output.index)


def half_blocks(picture: Tensor) -> list[str]:
    """float [3, h, w] in [-1, 1] -> lines of characters of which each shows two pixels, one above the other."""
    h, w = picture.shape[1:]
    columns = min(COLUMNS, w)
    rows = max(2, 2 * round(columns * h / w / 2))
    small = F.interpolate(picture[None].float(), (rows, columns), mode="bilinear", antialias=True)[0]
    values = ((small.clamp(-1, 1) + 1) * 127.5).round().int().permute(1, 2, 0).tolist()
    lines = []
    for above, below in zip(values[::2], values[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m\N{UPPER HALF BLOCK}"
            for a, b in zip(above, below, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return lines
