"""Several ids of an image in one pass: Jacobi iteration on draws whose random numbers are fixed beforehand.

Each id is the largest of score + Gumbel noise (Gumbel 1954), drawn for every position before the first id. A window of guesses is
read in one pass, as many new ones come out, and those are final whose predecessors had been guessed right (Wiggers and Hoogeboom
2020, "Predictive sampling"; the window is that of Teng et al. 2024, "Speculative Jacobi decoding", the fixed noise what So et al.
2025 call coupling). The ids are those of plain sampling, up to rounding. A place that was never read is guessed with the scores of
the code above it and its own noise. It pays for one image at a time, where a pass of 16 ids costs little more than one of 1, and on
a model that has learnt: what random weights say changes with every id.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def draw_ahead(
    predict: Callable[[Tensor, int], Tensor], scores: Tensor, noise: Tensor, columns: int, window: int
) -> tuple[Tensor, int]:
    """A choice among n for each of N places, and how many passes it took. predict: choices [W] at places from a first one on, and
    that place -> scores [W, n] of the places after each, given all before: logits after guidance, filters and temperature. scores:
    [1, n], of the first place. noise: [N, n]. columns: so many places apart are neighbors. window: most places in a pass."""
    count = len(noise)
    seen, choices = torch.zeros_like(noise), torch.zeros(count, dtype=torch.int64, device=noise.device)
    final = known = passes = 0  # choices are final up to the one, guesses up to the other
    while True:
        here = slice(final, final + len(scores))
        drawn = (scores + noise[here]).argmax(-1)
        right = int((drawn == choices[here]).cumprod(0).sum()) if final else 0
        seen[here], choices[here] = scores, drawn
        known = max(known, here.stop)
        final += min(right + 1, len(scores))  # the first wrong one was drawn after right ones: it is final, too
        if final == count:
            return choices, passes
        width = min(window, count - final)
        while known < final + width - 1:  # never read: as if the code above stood there, or the one before
            back = columns if known >= columns else 1
            new = slice(known, min(final + width - 1, known + back))
            seen[new] = seen[known - back : new.stop - back]
            choices[new] = (seen[new] + noise[new]).argmax(-1)
            known = new.stop
        scores = predict(choices[final - 1 : final - 1 + width], final - 1)
        passes += 1
