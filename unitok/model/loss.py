"""The loss of the next token: cross-entropy over the allowed tokens plus a z-loss, without ever holding all logits.

Positions with the same mask index share a set of allowed tokens (`unitok.grammar`): only that set's rows of the head are multiplied,
and a forced token costs nothing. Logits and their gradient are computed for some positions at a time, in the forward pass, so memory
holds one chunk of logits (cf. Hsu et al. 2024, "Liger Kernel"; Wijmans et al. 2024, "Cut your losses"). The z-loss keeps the log of
each softmax's normalizer near 0 (Chowdhery et al. 2022, "PaLM"; weight 1e-5 as in Chameleon).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from unitok.hardware import has_triton
from unitok.intervals import Intervals, size_of
from unitok.model.heads import index_in, rows_of

#: Logits that are held at once, by type of device: what fits into a CPU's cache, and what fills a GPU.
CHUNK = {"cpu": 1 << 20}
CHUNK_ELSEWHERE = 1 << 26


@dataclass
class Loss:
    """Result of `next_id_loss`. Its N positions are those with a weight above 0 and more than one allowed token."""

    total: Tensor  # sum over positions of weight x (cross-entropy + z_loss x logsumexp^2), nats; only this has a gradient
    index: Tensor  # int64 [N], index of each position in the flattened batch
    nll: Tensor  # [N], cross-entropy of each position, nats
    logsumexp: Tensor  # [N], log of each softmax's normalizer
    correct: Tensor  # bool [N], whether the target was the likeliest token; empty unless measured


def next_id_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: dict[str, Tensor],
    allowed_sets: Sequence[Intervals] | None,
    z_loss: float = 0.0,
    measure: bool = False,
) -> Loss:
    """The loss of a batch, summed over its positions.

    hidden: [B, T, C]. weight: the head, [V, C]. batch: `targets`, `weights` and `mask_index`, each [B, T]; positions of weight 0 do
    not count. allowed_sets: sets of allowed tokens, indexed by `mask_index`; None: all tokens are allowed everywhere. z_loss: weight
    of the squared logsumexp. measure: whether to compute `Loss.correct`.
    """
    flat = {key: batch[key].flatten() for key in ("targets", "weights", "mask_index")}
    counts = flat["weights"] > 0
    sets = [((0, weight.shape[0]),)] if allowed_sets is None else allowed_sets
    number = torch.where(counts, 0 if allowed_sets is None else flat["mask_index"].long(), len(sets))
    # Sorted once: asking for the members of each set would wait for the device each time.
    order, lengths = number.argsort(stable=True), torch.bincount(number, minlength=len(sets) + 1).tolist()
    members = zip(sets, order.split(lengths), strict=False)  # without those that do not count
    groups = [(allowed, some) for allowed, some in members if len(some) and size_of(allowed) > 1]  # of one, it is forced
    index = torch.cat([some for _, some in groups]) if groups else order[:0]
    sizes = [(intervals, len(some)) for intervals, some in groups]
    kind = hidden.device.type
    # On a CPU in fp32, which is as fast: in bfloat16 oneDNN compiles a product for each number of positions, and keeps a thousand.
    half = torch.is_autocast_enabled(kind) and kind != "cpu"
    with torch.autocast(kind, enabled=False):
        total, nll, logsumexp, correct = _ChunkedLoss.apply(
            hidden.flatten(0, 1)[index],
            weight,
            flat["targets"][index],
            flat["weights"][index],
            sizes,
            z_loss,
            measure,
            torch.get_autocast_dtype(kind) if half else hidden.dtype,
            torch.is_grad_enabled(),
        )
    return Loss(total, index, nll, logsumexp, correct)


def _cross_entropy(
    logits: Tensor, index: Tensor, factors: Tensor, z_loss: float, out: tuple[Tensor, ...], gradient: bool
) -> Tensor:
    """Write nll, logsumexp and correct (unless it is empty) of logits [N, n] into `out`, each [N]; return the gradient in the logits.

    index: the targets' columns. With `gradient`, that of the sum of factors x (nll + z_loss x logsumexp^2), in place of the logits.
    """
    if logits.is_cuda and has_triton():
        from unitok.model.triton_loss import fused_cross_entropy

        return fused_cross_entropy(logits, index, factors, z_loss, out, gradient)
    nll, logsumexp, correct = out
    logits, index = logits.float(), index[:, None]
    z = logits.logsumexp(-1)
    logsumexp.copy_(z)
    nll.copy_(z - logits.gather(1, index).squeeze(1))
    if len(correct):
        correct.copy_(logits.argmax(-1) == index.squeeze(1))
    if gradient:  # factor x (softmax x (1 + 2 z_loss z) - onehot)
        w = factors.float()
        logits = logits.sub_(z[:, None]).exp_().mul_((w * (1 + 2 * z_loss * z))[:, None])
        logits.scatter_add_(1, index, -w[:, None])
    return logits


class _ChunkedLoss(torch.autograd.Function):
    """Hidden states [N, C] in groups, each (allowed tokens, number of states), and head [V, C] -> total, nll, logsumexp, correct.

    Products are of `dtype`. With `differentiate` the gradients are computed in the same pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        factors: Tensor,
        groups: list[tuple[Intervals, int]],
        z_loss: float,
        measure: bool,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = len(states)
        nll, logsumexp = states.new_zeros(n, dtype=torch.float32), states.new_zeros(n, dtype=torch.float32)
        correct = torch.zeros(n if measure else 0, dtype=torch.bool, device=states.device)
        differentiate = grad_enabled and (states.requires_grad or weight.requires_grad)
        d_states = torch.empty_like(states) if differentiate else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if differentiate else None
        start = 0
        for intervals, count in groups:
            rows = rows_of(weight, intervals).to(dtype)
            d_rows = torch.zeros_like(rows, dtype=torch.float32) if differentiate else None
            length = max(1, CHUNK.get(states.device.type, CHUNK_ELSEWHERE) // len(rows))
            for a in range(start, start + count, length):
                chunk = slice(a, min(a + length, start + count))
                x = states[chunk].to(dtype)
                logits, index = x @ rows.T, index_in(targets[chunk], intervals)
                out = (nll[chunk], logsumexp[chunk], correct[chunk])
                d_logits = _cross_entropy(logits, index, factors[chunk], z_loss, out, differentiate).to(dtype)
                if d_states is not None and d_rows is not None:
                    d_states[chunk] = d_logits @ rows
                    d_rows += d_logits.T @ x
            if d_weight is not None and d_rows is not None:
                for (a, b), part in zip(intervals, d_rows.split([b - a for a, b in intervals]), strict=True):
                    d_weight[a:b] += part
            start += count
        if d_states is not None and d_weight is not None:
            ctx.save_for_backward(d_states, d_weight.to(weight.dtype))
        total = ((nll + z_loss * logsumexp.square()) * factors).sum()
        ctx.mark_non_differentiable(nll, logsumexp, correct)
        return total, nll, logsumexp, correct

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        d_states, d_weight = saved
        return d_states * grad.to(d_states.dtype), d_weight * grad.to(d_weight.dtype), *(None,) * 7
