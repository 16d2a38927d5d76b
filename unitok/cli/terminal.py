"""An output while it grows, in a terminal. What a chunk looks like is its modality's (`Modality.terminal`)."""

import sys
from collections.abc import Iterable
from typing import TextIO

from unitok.bundle import Bundle
from unitok.sample.outputs import Output
from unitok.sample.stream import Chunk


def show(pieces: Iterable[Chunk | Output], bundle: Bundle, file: TextIO | None = None) -> list[Output]:
    """Show the first output's pieces, and return all outputs in order."""
    file = file or sys.stdout
    outputs, drawn, last, end = [], 0, "", "\n"
    for piece in pieces:
        if isinstance(piece, Output):
            outputs.append(piece)
        elif piece.index == 0:
            tokenizer, colors = bundle.tokenizers.get(piece.modality), file.isatty()
            text, replaces = bundle.modality(piece.modality).terminal(tokenizer, piece.content, piece.done, colors)
            if text and piece.modality != last and not end.endswith("\n"):
                file.write("\n")
            if replaces:
                lines = text.splitlines(keepends=True)
                file.write(f"\x1b[{drawn}A" if drawn else "")
                drawn = 0 if piece.done else len(lines)
                file.write("".join(f"\x1b[2K{line}" for line in lines))
            else:
                file.write(text)
            last, end = (piece.modality, text) if text else (last, end)
            file.flush()
    file.write("" if end.endswith("\n") else "\n")
    return sorted(outputs, key=lambda output: output.index)
