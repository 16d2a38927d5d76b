"""Optimizers of the decoder, and their default learning rates.

`muon` is Muon for the matrices of the blocks and AdamW for everything else; `adamw` is AdamW for all. Muon (Jordan et al. 2024, "Muon:
An optimizer for hidden layers in neural networks") orthogonalizes the momentum of each matrix. Unlike `torch.optim.Muon`, it iterates
on matrices of equal shape as one batch, and on a CPU in fp32, because bf16 may be emulated there, tens of times slower. Of sharded
matrices (FSDP2) every process gathers one at a time, each another one, and sends back the parts of the others.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import all_to_all_single
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.optimizer import ParamsT

AT_ONCE = 1 << 27  # numbers of matrices that are orthogonalized as one batch, at most

#: What is trained, and from where: all weights from scratch; all weights of an earlier decoder; only the embedding and head rows of
#: new tokens; only low-rank differences.
Start = Literal["scratch", "weights", "new tokens", "lora"]


@dataclass(frozen=True)
class OptimizerDefaults:
    """Peak learning rates of AdamW and Muon, and the fraction of the run until which they are held."""

    lr: float
    muon_lr: float
    stable_fraction: float


def optimizer_defaults(hidden_size: int, start: Start) -> OptimizerDefaults:
    """Values for what a configuration leaves out.

    From scratch they are those that docs/notes.md found for a few million parameters. From weights they are a tenth; AdamW's falls
    with the width: 1e-3 up to a width of 128, 3e-5 at 4096 (Touvron et al. 2023, "Llama 2", fine-tune at 2e-5), and it falls right
    after the warm-up, as in transformers' Trainer. Where the old weights are frozen it is ten times that: for rows of new tokens, and
    for low-rank differences, where it is at most 1e-3 (Schulman et al. 2025, "LoRA without regret").
    """
    if start == "scratch":
        return OptimizerDefaults(1e-2, 0.02, 0.3)
    scaled = 1e-2 * min(1.0, 128 / hidden_size)
    return OptimizerDefaults({"weights": scaled / 10, "new tokens": scaled, "lora": min(1e-3, scaled)}[start], 0.002, 0.0)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """[N, R, C] -> nearly semi-orthogonal matrices, singular values 0.7 to 1.2: quintic Newton-Schulz with Jordan's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    half = matrices.is_cuda or torch.is_autocast_enabled(matrices.device.type)
    x = matrices.bfloat16() if half else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum, for parameters with two dimensions.

    Args:
        lr: step size for matrices no taller than wide; for taller ones it is multiplied by sqrt(rows / columns), as in Jordan's code.
        momentum: of the gradient. weight_decay: decoupled, multiplied by lr. iterations: of Newton-Schulz.
        every: calls of `step` per update, which is of the sum of their gradients. More than 1 pay where batches are small: the update
            costs less, and its gradient has less noise.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
        every: int = 1,
    ):
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations, "every": every}
        super().__init__(params, options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("every", 1)  # in a checkpoint of before

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient, at every `every`-th call. Returns the closure's loss, if a closure is given."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None and (gradient := self._gradient(p, p.grad, group["every"])) is not None:
                    by_shape[p.shape].append((p, gradient))
            for shape, pairs in by_shape.items():
                updates = []
                for p, gradient in pairs:
                    buffer = self.state[p]["momentum"]
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(torch.lerp(gradient, buffer, group["momentum"]))
                    if group["every"] > 1:
                        gradient.zero_()  # the next sum
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for (p, _), direction in zip(pairs, _directions(updates, group["iterations"]), strict=True):
                    mine = p.to_local() if isinstance(p, DTensor) else p
                    mine.mul_(1 - group["lr"] * group["weight_decay"])
                    mine.add_(direction, alpha=-group["lr"] * scale)
        return loss

    def _gradient(self, p: nn.Parameter, gradient: Tensor, every: int) -> Tensor | None:
        """The gradient to update by: with `every` above 1 the sum of the last ones, and None until there are so many."""
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        if every == 1:
            return gradient
        if "sum" not in state:
            state["step"], state["sum"] = torch.zeros(()), torch.zeros_like(p)
        state["step"] += 1
        state["sum"].add_(gradient)
        return None if int(state["step"]) % every else state["sum"]


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over processes, gathered; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _directions(updates: list[Tensor], iterations: int) -> Iterator[Tensor]:
    """Yield the orthogonalized updates of matrices of one shape; of sharded ones, this process's part."""
    first = updates[0]
    if not isinstance(first, DTensor):
        at_once = max(1, AT_ONCE // first.numel())
        for start in range(0, len(updates), at_once):
            yield from orthogonalize(torch.stack(updates[start : start + at_once]), iterations)
    elif tuple(first.placements) == (Shard(0),):
        sharded, together = [u for u in updates if isinstance(u, DTensor)], first.device_mesh.size()
        for start in range(0, len(sharded), together):
            yield from _exchanged(sharded[start : start + together], iterations)
    else:
        for update in updates:
            whole = orthogonalize(full_tensor(update)[None], iterations)[0]
            yield distribute_tensor(whole, first.device_mesh, first.placements, src_data_rank=None).to_local()


def _exchanged(updates: list[DTensor], iterations: int) -> list[Tensor]:
    """Orthogonalize at most one matrix per process, all sharded by rows: each process gathers its own one, and sends the parts back."""
    mesh, (rows, columns) = updates[0].device_mesh, updates[0].shape
    group, rank, local = mesh.get_group(), mesh.get_local_rank(), [update.to_local() for update in updates]
    parts = [len(part) * columns for part in torch.arange(rows).chunk(mesh.size())]
    parts += [0] * (mesh.size() - len(parts))  # numbers in each process's part
    gathered = parts if rank < len(updates) else [0] * mesh.size()
    sent = [parts[rank] if r < len(updates) else 0 for r in range(mesh.size())]
    mine = local[0].new_empty(sum(gathered))
    all_to_all_single(mine, torch.cat([part.flatten() for part in local]), gathered, sent, group)
    if gathered is parts:
        mine = orthogonalize(mine.view(1, rows, columns), iterations).flatten()
    back = local[0].new_empty(sum(sent))
    all_to_all_single(back, mine, sent, gathered, group)
    return [part.view(-1, columns) for part in back.split(parts[rank])] if parts[rank] else local


def build_optimizers(
    decoder: nn.Module,
    name: str,
    lr: float,
    muon_lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    muon_iterations: int = 5,
    muon_every: int = 1,
) -> list[torch.optim.Optimizer]:
    """AdamW, and with `name` `muon` also Muon for the matrices of the blocks. Frozen parameters are left out."""
    matrices, embeddings, vectors = [], [], []
    for full_name, p in decoder.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or "norm" in full_name:  # the gains of HeadLayerNorm are matrices by shape only
            vectors.append(p)
        elif any(part in full_name for part in ("embed_", "lm_head", "lora_")) or name == "adamw":
            embeddings.append(p)
        else:
            matrices.append(p)
    decay = weight_decay if name == "adamw" else 0.0
    groups = [{"params": embeddings, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]
    if name == "muon" and matrices:
        optimizers.append(Muon(matrices, lr=muon_lr, weight_decay=weight_decay, iterations=muon_iterations, every=muon_every))
    return optimizers
