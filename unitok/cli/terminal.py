"""An output in a terminal, while it is generated. How a chunk looks, its modality says (`Modality.terminal`)."""

import sys
from collections.abc import Iterable
from typing import TextIO

from unitok.bundle import Bundle
from unitok.sample.outputs import Output
from unitok.sample.stream import Chunk


def show(chunks: Iterable[Chunk | Output], bundle: Bundle, file: TextIO | None = None) -> list[Output]:
    """Show the chunks of the first output as they come, and return all outputs in order."""
    file = file or sys.stdout
    colors = file.isatty()
    outputs, lines_drawn, last_modality, last_text = [], 0, "", "\n"
    for chunk in chunks:
        if isinstance(chunk, Output):
            outputs.append(chunk)
        elif chunk.index == 0:
            tokenizer = bundle.tokenizers.get(chunk.modality)
            text, replaces = bundle.modality(chunk.modality).terminal(tokenizer, chunk.content, chunk.done, colors)
            if text and chunk.modality != last_modality and not last_text.endswith("\n"):
                file.write("\n")
            if replaces:  # draw over the lines of the chunk before
                lines = text.splitlines(keepends=True)
                file.write(f"\x1b[{lines_drawn}A" if lines_drawn else "")
                lines_drawn = 0 if chunk.done else len(lines)
                file.write("".join(f"\x1b[2K{line}" for line in lines))
            else:
                file.write(text)
            last_modality, last_text = (chunk.modality, text) if text else (last_modality, last_text)
            file.flush()
    file.write("" if last_text.endswith("\n") else "\n")
    return sorted(outputs, key=lambda output: output.index)
