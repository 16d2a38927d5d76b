"""Norms and rotations of the decoder, with gradients of their own on a CPU.

There PyTorch differentiates a norm or a rotation operation by operation, in a dozen passes over memory; these take five and four, and a
training step of a small decoder 10 to 17 % less time (docs/notes.md). On a GPU, and where a compiler fuses the passes, PyTorch's own are
used.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx


def _by_hand(x: Tensor, *others: Tensor) -> bool:
    """Whether the gradient is computed here: on a CPU, where it is needed, and where nothing has to be rounded to another type."""
    same = all(other.dtype == x.dtype for other in others) and x.dtype in (torch.float32, torch.float64)
    return same and x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension, [..., C] -> [..., C] (Zhang and Sennrich 2019, "Root mean square layer normalization")."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x."""
        if self.weight is None or self.eps is None or not _by_hand(x, self.weight):
            return super().forward(x)
        out: Tensor = _Norm.apply(x, self.weight, self.eps)
        return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        normed, weight, scale = saved
        by_gain = (grad * normed).flatten(0, -2)
        with torch.autocast(grad.device.type, enabled=False):  # which would round this product
            along = (by_gain @ weight).view(scale.shape).div_(-normed.shape[-1])  # what would only make x longer
        return torch.addcmul(grad * weight, normed, along).mul_(scale), by_gain.sum(0), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last dimension as pairs (rotate-half; Su et al. 2021, "RoFormer")."""
    if _by_hand(x, cos, sin):
        out: Tensor = _Rotation.apply(x, cos, sin)
        return out
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        cos, sin = saved
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x rotated by the angles (`sign` 1) or back (-1)."""
    out = torch.empty_like(x)
    (a, b), (to_a, to_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=sign)
    return out
