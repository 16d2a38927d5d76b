"""Drawing a token on a GPU in one kernel (written in Triton): guidance, filters and the draw of `sampling.py`.

One program draws for one request and holds the logits of all its allowed tokens. Instead of sorting, the least logit that stays is
found by bisection of its 32 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unitok.sample.sampling import BatchedSamplingParams


@triton.jit
def _log_softmax(logits, row, n, inside, i):
    """One row of logits, normalized; -inf beyond n."""
    x = tl.load(logits + row * n + i, mask=inside, other=float("-inf")).to(tl.float32)
    most = tl.max(x)
    return x - most - tl.log(tl.sum(tl.exp(x - most)))


@triton.jit
def _keys(x):
    """Floats -> integers in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _draw(
    logits, mask, scales, uniform, temperature, top_k, top_p, min_p, out, n, requests,
    KINDS: tl.constexpr, MASKED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """logits [KINDS x requests, n], as `Session._guidance` orders them -> index of a token [requests]."""
    r, i = tl.program_id(0), tl.arange(0, N)
    inside = i < n
    low = float("-inf")
    if MASKED:
        inside = inside & (tl.load(mask + r * n + i, mask=inside, other=1) == 0)
    if KINDS == 1:
        x = tl.load(logits + r * n + i, mask=inside, other=low).to(tl.float32)
    else:
        scale, media_scale = tl.load(scales + 2 * r), tl.load(scales + 2 * r + 1)
        own, none = _log_softmax(logits, r, n, inside, i), _log_softmax(logits, requests + r, n, inside, i)
        if KINDS == 2:
            x = tl.where(scale == 1.0, own, none + scale * (own - none))
        else:
            media = _log_softmax(logits, 2 * requests + r, n, inside, i)
            x = none + media_scale * (media - none) + scale * (own - media)
        x = tl.where(inside, x, low)
    likeliest, warmth = tl.argmax(x, 0), tl.load(temperature + r)
    if TOP_K:
        keys, k = tl.where(inside, _keys(x), -2147483647), tl.load(top_k + r)
        k = tl.where(k == 0, N, tl.minimum(k, n))
        least, most = tl.full((), -2147483647, tl.int64), tl.full((), 2147483647, tl.int64)
        for _ in range(32):  # the largest key that at least k tokens reach
            middle = (least + most + 1) >> 1
            enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32)) >= k
            least, most = tl.where(enough, middle, least), tl.where(enough, most, middle - 1)
        x = tl.where(keys >= least.to(tl.int32), x, low)
    heated = x.to(tl.float64) / tl.maximum(warmth, 1e-6).to(tl.float64)
    heated = heated - tl.max(heated)
    weights = tl.exp(heated)
    if TOP_P:
        keys, p = tl.where(x > low, _keys(x), -2147483647), tl.load(top_p + r).to(tl.float64)
        total = tl.sum(weights)
        least, most = tl.full((), -2147483648, tl.int64), tl.full((), 2147483647, tl.int64)
        for _ in range(32):  # the smallest key above which less than p lies
            middle = (least + most) >> 1
            enough = tl.sum(tl.where(keys > middle.to(tl.int32), weights, 0.0)) < p * total
            least, most = tl.where(enough, least, middle + 1), tl.where(enough, middle, most)
        least = tl.where(p >= 1.0, -2147483648, least)
        weights = tl.where(keys >= least.to(tl.int32), weights, 0.0)
    if MIN_P:
        weights = tl.where(heated >= tl.log(tl.load(min_p + r).to(tl.float64)), weights, 0.0)
    sums = tl.cumsum(weights, 0)
    total = tl.max(sums)
    drawn = tl.sum((sums <= tl.load(uniform + r) * total).to(tl.int32))
    drawn = tl.where(tl.max(tl.where(i == drawn, weights, 0.0)) > 0.0, drawn, likeliest)  # never one of probability 0
    tl.store(out + r, tl.where(warmth == 0.0, likeliest, drawn).to(tl.int64))


def draw_fused(logits: Tensor, mask: Tensor | None, scales: Tensor, uniform: Tensor, params: BatchedSamplingParams) -> Tensor:
    """Logits [kinds x B, n] before guidance -> index of the token that is drawn for each request, int64 [B].

    mask: bool [B, n], what a request may not draw. scales: [B, 2]. uniform: float64 [B] in [0, 1).
    """
    requests, n = len(uniform), logits.shape[1]
    out = torch.empty(requests, dtype=torch.int64, device=logits.device)
    size = triton.next_power_of_2(n)
    _draw[(requests,)](
        logits, logits if mask is None else mask, scales, uniform, params.temperature, params.top_k, params.top_p, params.min_p,
        out, n, requests, KINDS=len(logits) // requests, MASKED=mask is not None, TOP_K=params.largest_k > 0, TOP_P=params.any_p,
        MIN_P=params.any_min_p, N=size, num_warps=4 if size <= 2048 else 8,
    )  # fmt: skip
    return out
