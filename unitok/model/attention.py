"""Attention behind one function, with equal results on every back end.

Packed rows hold several documents that must not see one another. What separates them is one `Packing`, made once a
batch and shared by all layers; no other file knows a mask or an xformers type. Back ends:

- `sdpa`: torch's scaled-dot-product attention with a boolean mask; everywhere, and the reference;
- `xformers`: `memory_efficient_attention` with `BlockDiagonalCausalMask`, no T x T mask at all; CUDA only.

`auto` probes once for each device and kind of number, says what it took once in the log, and never fails; a back end
that was asked for and cannot run is an error that says why.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unitok.errors import UserError

BACKENDS = ("auto", "sdpa", "xformers")
log = logging.getLogger("unitok")


@dataclass
class Packing:
    """Which positions of a batch [B, T] belong together: causal inside a document, nothing across.

    Exactly one of the two is set, by the back end that will use it.
    """

    mask: Tensor | None = None  # bool [B, 1, T, T], True where attention may look; None is plain causal
    bias: Any = None  # xformers' BlockDiagonalCausalMask over the flattened batch

    @classmethod
    def build(cls, documents: Tensor | None, backend: str) -> "Packing":
        """From document numbers [B, T] (equal in a document, different in neighbours); None: one document a row."""
        if documents is None:
            return cls()
        if backend == "xformers":
            from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

            return cls(bias=BlockDiagonalCausalMask.from_seqlens(document_lengths(documents)))
        t = documents.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=documents.device).tril()
        return cls(mask=(documents[:, None, :, None] == documents[:, None, None, :]) & causal)


def document_lengths(documents: Tensor) -> list[int]:
    """Document numbers [B, T] -> lengths of the runs of equal numbers in the flattened batch, rows kept apart."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    edges = starts.flatten().nonzero().flatten().tolist() + [documents.numel()]
    return [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Causal attention: q [B, H, T, D], k and v [B, G, T, D] with G dividing H -> [B, H, T, D]."""
    groups = q.shape[1] // k.shape[1]
    if packing.bias is not None:
        return _xformers_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), packing.bias)
    causal = packing.mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=packing.mask, is_causal=causal, enable_gqa=groups > 1)


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    from xformers.ops import memory_efficient_attention

    b, h, t, d = q.shape
    flat = (x.transpose(1, 2).reshape(1, b * t, h, d) for x in (q, k, v))  # xformers wants [1, total, H, D]
    return memory_efficient_attention(*flat, attn_bias=bias).reshape(b, t, h, d).transpose(1, 2)


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The back end to use; errors: `UserError` for an unknown one and for one that was asked for and cannot run."""
    if wanted not in BACKENDS:
        raise UserError(f"attention {wanted!r}: choose one of {', '.join(BACKENDS)}")
    if wanted == "sdpa":
        return wanted
    problem = _xformers_problem(device.type, dtype, head_dim)
    if wanted == "xformers" and problem:
        raise UserError(f"attention 'xformers' cannot run here: {problem}; use auto or sdpa")
    chosen = "sdpa" if problem else "xformers"
    if wanted == "auto":
        _say_once(chosen, problem)
    return chosen


@cache
def _xformers_problem(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why xformers cannot run, or "" if a toy forward and backward pass went through."""
    if device != "cuda":
        return f"it needs CUDA, the model is on {device}"
    logging.getLogger("xformers").setLevel(logging.ERROR)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q, k, v = (torch.randn(1, 1, 4, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
            packing = Packing.build(torch.tensor([[0, 0, 1, 1]], device=device), "xformers")
            attention(q, k, v, packing).sum().backward()
    except (ImportError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


@cache
def _say_once(chosen: str, problem: str) -> None:
    log.info("attention: %s%s", chosen, f" (xformers: {problem})" if problem else "")
