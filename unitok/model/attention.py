"""Attention behind one function, with equal results on every back end.

A batch [B, T] holds documents that must not see one another. What separates them is a packing, made once a batch and shared by all
layers; no other file knows a mask or a cumulative length. No back end makes a T x T mask or spends time on pairs of positions in
different documents:

- `sdpa`: torch's scaled-dot-product attention, everywhere, and the reference. Documents of similar length are gathered
  into one causal call. Padding on the right needs no mask: a causal query never looks at what comes after it.
- `xformers`: `memory_efficient_attention` over the flattened batch; CUDA only.
- `varlen`: torch's `varlen_attn`, FlashAttention over the flattened batch; CUDA only, in half precision.

`auto` is the first of xformers, varlen and sdpa that runs a toy pass on the device in the model's numbers; a back end that was
asked for and cannot run is an error that says why.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unitok.errors import UserError

log = logging.getLogger("unitok")


class Packing(Protocol):
    """Which positions of a batch belong together, as one back end wants it said."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention inside each document: q [B, T, H, D], k and v [B, T, G, D], G dividing H -> [B, T, H, D]."""
        ...


def build_packing(documents: Tensor | None, backend: str) -> Packing:
    """From document numbers [B, T], equal in a document and different in neighbors; None: one document a row."""
    return WholeRows() if documents is None else _PACKINGS[backend](document_lengths(documents), documents.device)


def document_lengths(documents: Tensor) -> list[int]:
    """Document numbers [B, T] -> lengths of the runs of equal numbers in the flattened batch, rows kept apart."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    edges = starts.flatten().nonzero().flatten().tolist() + [documents.numel()]
    return [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every row one document: q [B, T, H, D], k and v [B, T, G, D] -> [B, T, H, D]."""
    grouped = k.shape[2] != q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


class WholeRows:
    """One document a row."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v)


class Buckets:
    """`sdpa`: documents gathered by length. A bucket holds those that are at least `LEAST` as long as its longest."""

    LEAST = 0.75

    def __init__(self, lengths: list[int], device: torch.device):
        starts = torch.tensor([0, *lengths]).cumsum(0)
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        groups: list[list[int]] = []
        for i in order:
            if not groups or lengths[i] < self.LEAST * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(i)
        self.gather: list[Tensor] = []  # for each bucket int64 [documents, longest]: positions of the flattened batch
        scatter = torch.empty(int(starts[-1]), dtype=torch.long)  # where each position stands in the buckets' outputs
        before = 0
        for group in groups:
            longest = lengths[group[0]]
            sizes = torch.tensor([lengths[i] for i in group])[:, None]
            place = torch.arange(longest).expand(len(group), -1)
            index = starts[group][:, None] + torch.minimum(place, sizes - 1)  # padding repeats the last position
            real = place < sizes
            scatter[index[real]] = (torch.arange(index.numel()) + before).view_as(index)[real]
            before += index.numel()
            self.gather.append(index.to(device))
        self.scatter = scatter.to(device)

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        out = []
        for index in self.gather:
            pieces = (x.index_select(0, index.flatten()).unflatten(0, index.shape) for x in flat)
            out.append(causal(*pieces).flatten(0, 1))
        return torch.cat(out).index_select(0, self.scatter).view_as(q)


class XformersPacking:
    """`xformers`: a block-diagonal causal mask that is only described, never made."""

    def __init__(self, lengths: list[int], device: torch.device):
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        self.bias = BlockDiagonalCausalMask.from_seqlens(lengths, device=device)

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention

        groups = q.shape[2] // k.shape[2]  # grouped heads have no backward pass there: repeat them
        k, v = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v))
        flat = (x.flatten(0, 1)[None] for x in (q, k, v))  # [1, B * T, H, D]
        return memory_efficient_attention(*flat, attn_bias=self.bias).view_as(q)


class VarlenPacking:
    """`varlen`: FlashAttention by cumulative lengths."""

    def __init__(self, lengths: list[int], device: torch.device):
        self.edges = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        self.longest = max(lengths)

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention import varlen

        attend: Any = varlen.varlen_attn
        ends = (self.edges, self.edges, self.longest, self.longest)
        grouped = q.shape[2] != k.shape[2]
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return attend(*flat, *ends, window_size=(-1, 0), enable_gqa=grouped).view_as(q)


#: By name, in the order in which `auto` tries them.
_PACKINGS: dict[str, Callable[[list[int], torch.device], Packing]] = {
    "xformers": XformersPacking,
    "varlen": VarlenPacking,
    "sdpa": Buckets,
}


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The back end to use. Errors: `UserError` for an unknown one and for one that was asked for and cannot run."""
    if wanted == "auto":
        return next(name for name in _PACKINGS if not _problem(name, device.type, dtype, head_dim))
    if wanted not in _PACKINGS:
        raise UserError(f"attention {wanted!r}: choose one of {', '.join(('auto', *_PACKINGS))}")
    if problem := _problem(wanted, device.type, dtype, head_dim):
        raise UserError(f"attention {wanted!r} cannot run here: {problem}; use auto or sdpa")
    return wanted


@cache
def _problem(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why a back end cannot run, or "" if a toy forward and backward pass went through. FileInfo out, and logged, once."""
    if backend == "sdpa":
        return ""
    if device != "cuda":
        return f"it needs CUDA, the model is on {device}"
    logging.getLogger("xformers").setLevel(logging.ERROR)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q, k, v = (torch.ones(1, 4, 1, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
            packing = build_packing(torch.tensor([[0, 0, 1, 1]], device=device), backend)
            packing.attend(q, k, v).sum().backward()
    except Exception as error:  # a back end built for other versions raises almost anything; all of it is reported
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        log.info("attention: %s cannot run here: %s", backend, problem)
        return problem
    return ""
