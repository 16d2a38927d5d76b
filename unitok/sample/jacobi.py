"""Several tokens of an image in one pass: Jacobi iteration on samples whose random numbers are drawn beforehand.

Each token is the argmax of score + Gumbel noise (Gumbel 1954), and the noise of every position is fixed before the first token. A
window of guesses is read in one pass, which gives as many new ones; those whose predecessors had been guessed right are final (Wiggers
and Hoogeboom 2020, "Predictive sampling"; the window is that of Teng et al. 2024, "Speculative Jacobi decoding", the fixed noise what
So et al. 2025 call coupling). The result is that of sampling one by one with the same noise, up to rounding. A position that was never
read is guessed from the scores of the code above it and its own noise. This pays for one image at a time, where a pass of 16 tokens
costs little more than one of 1, and for a trained model: what random weights predict changes with every token.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def draw_ahead(
    predict: Callable[[Tensor, int], Tensor], scores: Tensor, noise: Tensor, columns: int, window: int
) -> tuple[Tensor, int]:
    """Return a choice among n for each of N positions, and how many passes it took.

    Args:
        predict: choices [W] at consecutive positions, and the first of these positions -> scores [W, n] of the position after each:
            logits after guidance, filters and temperature.
        scores: of the first position, [1, n].
        noise: Gumbel noise, [N, n].
        columns: distance of a position from the one above it.
        window: most positions in a pass.
    """
    count = len(noise)
    seen, choices = torch.zeros_like(noise), torch.zeros(count, dtype=torch.int64, device=noise.device)
    final = known = passes = 0  # choices before index `final` are final, those before `known` at least guessed
    while True:
        window_slice = slice(final, final + len(scores))
        drawn = (scores + noise[window_slice]).argmax(-1)
        right = int((drawn == choices[window_slice]).cumprod(0).sum()) if final else 0
        seen[window_slice], choices[window_slice] = scores, drawn
        known = max(known, window_slice.stop)
        final += min(
            right + 1, len(scores)
        )  # where the guess was wrong, the new choice had right predecessors: it is final, too
        if final == count:
            return choices, passes
        width = min(window, count - final)
        while known < final + width - 1:  # never read: use the scores of the code above, or of the one before
            back = columns if known >= columns else 1
            new = slice(known, min(final + width - 1, known + back))
            seen[new] = seen[known - back : new.stop - back]
            choices[new] = (seen[new] + noise[new]).argmax(-1)
            known = new.stop
        scores = predict(choices[final - 1 : final - 1 + width], final - 1)
        passes += 1
