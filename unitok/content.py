"""Types of what callers hand over: a piece of content, and prompts that are made of such pieces."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from PIL import Image

from unitok.document import Document, Part, RawDocument, Segment


class Array(Protocol):
    """A NumPy array, a PyTorch tensor, or any object that converts itself into a NumPy array."""

    def __array__(self) -> np.ndarray: ...


#: Audio: samples [C, T] in [-1, 1] and their rate in Hz.
Waveform: TypeAlias = tuple[Array | Sequence[float], float]
#: One piece: a str is text, a Path is read by what is in the file, an array is an image (uint8 [H, W, 3], or float [3, H, W] in [-1, 1]).
Content: TypeAlias = str | Path | Image.Image | Array | Waveform | Document | Segment | Part | RawDocument
#: One prompt: a piece, or its pieces in reading order.
Prompt: TypeAlias = Content | Sequence[Content]
#: One prompt, or a batch: a list of lists of pieces.
Prompts: TypeAlias = Content | Sequence[Content | Sequence[Content]]
