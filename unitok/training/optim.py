"""Optimizers of the decoder, and their default learning rates.

`muon` is Muon for the matrices of the blocks and AdamW for everything else; `adamw` is AdamW for all. Muon (Jordan et al. 2024, "Muon:
An optimizer for hidden layers in neural networks") orthogonalizes the momentum of each matrix. Unlike `torch.optim.Muon`, it iterates
on matrices of equal shape as one batch, and on a CPU in fp32, because bf16 may be emulated there, tens of times slower. Sharded
matrices (FSDP2) are gathered: every process orthogonalizes the whole matrix and keeps its own part.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import ParamsT

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
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
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

    def __setstate__(self, state: dict) -> None:
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
                    updates.append(full_tensor(torch.lerp(gradient, buffer, group["momentum"])))
                    if group["every"] > 1:
                        gradient.zero_()  # the next sum
                directions = orthogonalize(torch.stack(updates), group["iterations"])
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for (p, _), direction in zip(pairs, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(_sharded_like(direction, p), alpha=-group["lr"] * scale)
        return loss

    def _gradient(self, p: nn.Parameter, gradient: Tensor, every: int) -> Tensor | None:
        """The gradient to update by: with `every` above 1 the sum of the last ones, and None until there are so many."""
        state = self.state[p]
        state.setdefault("momentum", torch.zeros_like(p))
        if every == 1:
            return gradient
        step = state.setdefault("step", torch.zeros(()))
        step += 1
        total = state.setdefault("sum", torch.zeros_like(p))
        total.add_(gradient)
        return None if int(step) % every else total


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over processes, gathered; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A tensor that all processes hold, sharded as `model` is."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


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
