"""The loss of next ids: cross-entropy over the ids that may come, with a z-loss, and never all logits at once.

Positions of one kind share a legal set (`unitok.grammar`): only its rows of the head are multiplied, a forced id costs nothing. Logits
and their gradient are made for some positions at a time, in the forward pass, so memory holds one piece of logits (cf. Hsu et al.
2024, "Liger Kernel"; Wijmans et al. 2024, "Cut your losses"). The z-loss keeps the log of each softmax's normalizer near 0
(Chowdhery et al. 2022, "PaLM"; 1e-5 as in Chameleon).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unitok.intervals import Intervals, size_of
from unitok.model.heads import index_in, rows_of

#: Logits that are held at once: what stays in a CPU's cache, and what fills a GPU.
PIECE = {"cpu": 1 << 20}
PIECE_ELSEWHERE = 1 << 26


@dataclass
class Loss:
    """What `next_id_loss` gives. The N positions are those that had a choice and a weight."""

    total: (
        Tensor  # over all positions weight x (cross-entropy + z_loss x squared log-normalizer), nats; it alone has a gradient
    )
    index: Tensor  # int64 [N], where the positions stand in the flattened batch
    nll: Tensor  # [N], their cross-entropies, nats
    logsumexp_rms: Tensor  # [N]
    right: Tensor  # bool [N], whether the likeliest id came; empty unless measured


def next_id_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: dict[str, Tensor],
    kinds: list[Intervals] | None,
    z_loss: float = 0.0,
    measure: bool = False,
) -> Loss:
    """The loss of a batch. hidden: [B, T, C]. weight: the head, [V, C]. batch: `targets`, `weights` and `kinds`, each [B, T]; positions
    of weight 0 do not count. kinds: legal sets, indexed by `batch["mask_index"]`; None: every id may come everywhere. z_loss: weight of
    the squared log-normalizer. measure: whether to find out which positions were right."""
    flat = {key: batch[key].flatten() for key in ("targets", "weights", "mask_index")}
    counts = flat["weights"] > 0
    groups = []
    for kind, intervals in enumerate([((0, weight.shape[0]),)] if kinds is None else kinds):
        if size_of(intervals) < 2:
            continue  # nothing to choose
        where = (counts if kinds is None else counts & (flat["mask_index"] == kind)).nonzero().flatten()
        if len(where):
            groups.append((intervals, where))
    index = torch.cat([where for _, where in groups]) if groups else counts.new_zeros(0, dtype=torch.long)
    sizes = [(intervals, len(where)) for intervals, where in groups]
    total, nll, normalizer, right = _Pieces.apply(
        hidden.flatten(0, 1)[index],
        weight,
        flat["targets"][index],
        flat["weights"][index],
        sizes,
        z_loss,
        measure,
        torch.is_grad_enabled(),
    )
    return Loss(total, index, nll, normalizer, right)


class _Pieces(torch.autograd.Function):
    """states [N, C] by group, each (legal ids, how many states), and head [V, C] -> total, and for each position its nll,
    log-normalizer and rightness; with gradients, if `learns`, in the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        factors: Tensor,
        groups: list[tuple[Intervals, int]],
        z_loss: float,
        measure: bool,
        learns: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = len(states)
        nll, normalizer = states.new_zeros(n, dtype=torch.float32), states.new_zeros(n, dtype=torch.float32)
        right = torch.zeros(n if measure else 0, dtype=torch.bool, device=states.device)
        differentiate = learns and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        d_states = torch.empty_like(states) if differentiate else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if differentiate else None
        dtype = torch.get_autocast_dtype(states.device.type) if torch.is_autocast_enabled(states.device.type) else states.dtype
        start = 0
        for intervals, count in groups:
            rows = rows_of(weight, intervals).to(dtype)
            d_rows = torch.zeros_like(rows, dtype=torch.float32) if differentiate else None
            length = max(1, PIECE.get(states.device.type, PIECE_ELSEWHERE) // len(rows))
            for a in range(start, start + count, length):
                piece = slice(a, min(a + length, start + count))
                x = states[piece].to(dtype)
                logits = (x @ rows.T).float()
                index = index_in(targets[piece], intervals)[:, None]
                normalizer[piece] = z = logits.logsumexp(-1)
                nll[piece] = z - logits.gather(1, index).squeeze(1)
                if measure:
                    right[piece] = logits.argmax(-1) == index.squeeze(1)
                if d_states is not None and d_rows is not None:
                    # d/dlogits of weight x (nll + z_loss x z^2): weight x (softmax x (1 + 2 z_loss z) - onehot)
                    w = factors[piece].float()
                    d_logits = logits.sub_(z[:, None]).exp_().mul_((w * (1 + 2 * z_loss * z))[:, None])
                    d_logits.scatter_add_(1, index, -w[:, None])
                    d_logits = d_logits.to(dtype)
                    d_states[piece] = d_logits @ rows
                    d_rows += d_logits.T @ x
            if d_weight is not None and d_rows is not None:
                for (a, b), part in zip(intervals, d_rows.split([b - a for a, b in intervals]), strict=True):
                    d_weight[a:b] += part
            start += count
        if differentiate:
            ctx.save_for_backward(d_states, d_weight.to(weight.dtype) if d_weight is not None else None)
        total = ((nll + z_loss * normalizer.square()) * factors).sum()
        ctx.mark_non_differentiable(nll, normalizer, right)
        return total, nll, normalizer, right

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: Any) -> Any:  # type: ignore[override]
        d_states, d_weight = ctx.saved_tensors
        return d_states * grad.to(d_states.dtype), d_weight * grad.to(d_weight.dtype), None, None, None, None, None, None
