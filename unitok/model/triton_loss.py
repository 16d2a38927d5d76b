"""Cross-entropy of a chunk of logits on a GPU in one kernel (written in Triton), which turns the logits into their gradient.

Logits are read twice and written once, in the type in which they were multiplied; sums are in fp32 (cf. Hsu et al. 2024, "Liger Kernel").
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # that are in flight


@triton.jit
def _cross_entropy(
    logits, index, factors, nll, logsumexp, correct, n, z_loss, MEASURE: tl.constexpr, DIFFERENTIATE: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * n
    most, total, best = float("-inf"), 0.0, 0
    for start in range(0, n, N):
        i = start + tl.arange(0, N)
        x = tl.load(logits + i, mask=i < n, other=float("-inf")).to(tl.float32)
        here, at = tl.max(x, 0, return_indices=True)
        if MEASURE:
            best = tl.where(here > most, start + at, best)
        larger = tl.maximum(most, here)
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(x - larger))
        most = larger
    z, target = most + tl.log(total), tl.load(index + row)
    tl.store(logsumexp + row, z)
    tl.store(nll + row, z - tl.load(logits + target).to(tl.float32))
    if MEASURE:
        tl.store(correct + row, (best == target).to(tl.int8))
    if DIFFERENTIATE:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        weight = tl.load(factors + row).to(tl.float32)
        scale = weight * (1 + 2 * z_loss * z)
        for start in range(0, n, N):
            i = start + tl.arange(0, N)
            x = tl.load(logits + i, mask=i < n, other=0.0).to(tl.float32)
            d = tl.exp(x - z) * scale - tl.where(i == target, weight, 0.0)
            tl.store(logits + i, d.to(logits.dtype.element_ty), mask=i < n)


def fused_cross_entropy(
    logits: Tensor, index: Tensor, factors: Tensor, z_loss: float, out: tuple[Tensor, ...], gradient: bool
) -> Tensor:
    """`loss._cross_entropy` in one kernel; the logits themselves become the gradient."""
    nll, logsumexp, correct = out
    n, measure = logits.shape[1], len(correct) > 0
    _cross_entropy[(len(logits),)](
        logits, index, factors, nll, logsumexp, correct.view(torch.int8) if measure else nll, n, z_loss, MEASURE=measure,
        DIFFERENTIATE=gradient, N=min(triton.next_power_of_2(n), COLUMNS), num_warps=8,
    )  # fmt: skip
    return logits
