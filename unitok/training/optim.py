"""Optimizers of the decoder: Muon for the matrices of the blocks, AdamW for everything else; or AdamW for all.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") orthogonalises the momentum of each
matrix. Unlike `torch.optim.Muon`, matrices of equal shape go through the iterations as one batch, and on a CPU in fp32: bf16 may
be emulated there, tens of times slower. Of sharded matrices (FSDP2) every process orthogonalises the whole, and keeps its part.
"""

from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """[N, R, C] -> nearly semi-orthogonal matrices, of singular values 0.7 to 1.2: quintic Newton-Schulz, Jordan's coefficients."""
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
    """Momentum, Nesterov, orthogonalised, for parameters with two dimensions.

    Args:
        lr: size of a step, for matrices no taller than wide; taller ones are scaled by sqrt(rows / columns), as Jordan's.
        momentum: of the gradient. weight_decay: decoupled, times lr. iterations: of Newton-Schulz.
    """

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0, iterations: int = 5):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One update of all parameters that have a gradient; -> the closure's loss, if one was given."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, parameters in by_shape.items():
                updates = []
                for p in parameters:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    gradient: Any = p.grad
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(whole(torch.lerp(gradient, buffer, group["momentum"])))
                directions = orthogonalise(torch.stack(updates), group["iterations"])
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, direction in zip(parameters, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(_like(direction, p), alpha=-group["lr"] * scale)
        return loss


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over processes, gathered; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """A tensor that all processes have, sharded as `model` is."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


#: What training starts from.
Start = Literal["scratch", "weights", "new ids", "lora"]


def default_rates(hidden_size: int, start: Start) -> tuple[float, float]:
    """Peaks of AdamW's and Muon's learning rates where none are given.

    From scratch those that docs/notes.md found for a few million parameters. From weights a tenth, and AdamW's falls with the
    width: 1e-3 to a width of 128, 3e-5 at 4096 (Touvron et al. 2023, "Llama 2", fine-tune with 2e-5). Where the weights stay, ten
    times that: rows of new ids, and low-rank differences, up to 1e-3 (Schulman et al. 2025, "LoRA without regret").
    """
    if start == "scratch":
        return 1e-2, 0.02
    widest = 1e-2 * min(1.0, 128 / hidden_size)
    return {"weights": widest / 10, "new ids": widest, "lora": min(1e-3, widest)}[start], 0.002


def build_optimizers(
    decoder: nn.Module,
    name: str,
    rate: float,
    muon_lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    muon_iterations: int = 5,
) -> list[torch.optim.Optimizer]:
    """`muon`: Muon for the blocks' matrices, AdamW for all else; `adamw`: AdamW for all. Frozen parameters are left out."""
    matrices, embeddings, vectors = [], [], []
    for full_name, p in decoder.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or "norm" in full_name:  # the gains of each head's own norm are a matrix by shape only
            vectors.append(p)
        elif any(part in full_name for part in ("embed_", "lm_head", "lora_")) or name == "adamw":
            embeddings.append(p)
        else:
            matrices.append(p)
    decay = weight_decay if name == "adamw" else 0.0
    groups = [{"params": embeddings, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)]
    if name == "muon" and matrices:
        optimizers.append(Muon(matrices, lr=muon_lr, weight_decay=weight_decay, iterations=muon_iterations))
    return optimizers
