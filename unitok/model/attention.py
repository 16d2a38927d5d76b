"""Attention behind one function, with equal results on every back end.

A batch [B, T] holds documents that must not attend to one another. A `Packing` says where they begin and end; it is made once per
batch and shared by all layers, and no other file knows a mask or a cumulative length. No back end makes a T x T mask or spends time
on pairs of positions in different documents:

- `sdpa`: torch's scaled-dot-product attention; runs everywhere and is the reference. Documents of similar length are gathered
  into one causal call. Padding on the right needs no mask: a causal query never attends to later positions.
- `varlen`: torch's `varlen_attn`, FlashAttention over the flattened batch; CUDA only, in half precision.
- `xformers`: `memory_efficient_attention` over the flattened batch; CUDA only. In half precision it runs the same kernel, but compiled
  blocks are cut in two by it, which costs a fifth of a step's time.

`auto` is the first of varlen, xformers and sdpa that runs a tiny pass on the device in the model's dtype. A back end that is
chosen by name and cannot run is an error that says why.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unitok.errors import UserError

log = logging.getLogger("unitok")


class Packing(Protocol):
    """Which positions of a batch belong to one document, in the form that one back end needs."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention inside each document: q [B, T, H, D], k and v [B, T, G, D], G dividing H -> [B, T, H, D]."""
        ...


def build_packing(documents: Tensor | None, backend: str) -> Packing:
    """The packing of a batch.

    documents: numbers [B, T], equal within a document and different in neighboring ones; None: each row is one document.
    """
    if documents is None:
        return WholeRows()
    if "torch._dynamo" in sys.modules:  # importing it takes as long as importing torch, and without it nothing is compiled
        _keep_out_of_graphs()
    return _PACKINGS[backend](document_lengths(documents), documents.device)


@cache
def _keep_out_of_graphs() -> None:
    """Let compiled blocks call these back ends as they are: their shapes change with each batch, or they are no operations of torch."""
    for kind in (Buckets, XformersPacking):
        kind.attend = torch.compiler.disable(kind.attend)  # type: ignore[method-assign]


def document_lengths(documents: Tensor) -> list[int]:
    """Document numbers [B, T] -> lengths of the runs of equal numbers in the flattened batch; a run ends with its row."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    edges = starts.flatten().nonzero().flatten().tolist() + [documents.numel()]
    return [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention where each row is one document: q [B, T, H, D], k and v [B, T, G, D] -> [B, T, H, D].

    On a CPU gradients are computed in fp32: torch's backward pass takes four times as long in bfloat16 (docs/notes.md).
    """
    grouped, dtype, kind = k.shape[2] != q.shape[2], q.dtype, q.device.type
    widened = kind == "cpu" and dtype != torch.float32 and torch.is_grad_enabled()
    q, k, v = (x.transpose(1, 2).float() if widened else x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast(kind, enabled=False) if widened else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).to(dtype)


class WholeRows:
    """Each row is one document."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v)


class Buckets:
    """`sdpa`: documents gathered by length. A bucket holds documents at least `MIN_RATIO` times as long as its longest one."""

    MIN_RATIO = 0.75

    def __init__(self, lengths: list[int], device: torch.device):
        starts = torch.tensor([0, *lengths]).cumsum(0)
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        groups: list[list[int]] = []
        for i in order:
            if not groups or lengths[i] < self.MIN_RATIO * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(i)
        self.gather: list[Tensor] = []  # for each bucket int64 [documents, longest]: positions of the flattened batch
        scatter = torch.empty(int(starts[-1]), dtype=torch.long)  # index of each position in the buckets' concatenated outputs
        before = 0
        for group in groups:
            longest = lengths[group[0]]
            sizes = torch.tensor([lengths[i] for i in group])[:, None]
            offset = torch.arange(longest).expand(len(group), -1)
            index = starts[group][:, None] + torch.minimum(offset, sizes - 1)  # padding repeats the last position
            real = offset < sizes
            scatter[index[real]] = (torch.arange(index.numel()) + before).view_as(index)[real]
            before += index.numel()
            self.gather.append(index.to(device))
        self.scatter = scatter.to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        out = []
        for index in self.gather:
            documents = (x.index_select(0, index.flatten()).unflatten(0, index.shape) for x in flat)
            out.append(causal(*documents).flatten(0, 1))
        return torch.cat(out).index_select(0, self.scatter).view_as(q)


class XformersPacking:
    """`xformers`: a block-diagonal causal mask that is described by lengths, never materialized."""

    def __init__(self, lengths: list[int], device: torch.device):
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        self.bias = BlockDiagonalCausalMask.from_seqlens(lengths, device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention

        groups = q.shape[2] // k.shape[2]  # its grouped heads have no backward pass: repeat them
        k, v = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v))
        flat = (x.flatten(0, 1)[None] for x in (q, k, v))  # [1, B * T, H, D]
        return memory_efficient_attention(*flat, attn_bias=self.bias).view_as(q)


class VarlenPacking:
    """`varlen`: torch's FlashAttention over cumulative lengths. Their number and the longest document are powers of 2 that never shrink in a
    process, so that a compiled block meets few different ones: what is beyond the batch has length 0."""

    documents, longest = 64, 64

    def __init__(self, lengths: list[int], device: torch.device):
        from torch.nn.attention.varlen import varlen_attn

        kind = VarlenPacking
        kind.documents = max(kind.documents, 1 << (len(lengths) - 1).bit_length())
        kind.longest = self.longest = max(kind.longest, 1 << (max(lengths) - 1).bit_length())
        edges = list(accumulate(lengths, initial=0))
        edges += edges[-1:] * (kind.documents - len(lengths))
        self.edges = torch.tensor(edges, dtype=torch.int32).to(device, non_blocking=True)
        # Since torch 2.12 grouped heads are asked for; before, there is no such argument and they are always taken.
        self.grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        edges, longest = self.edges, self.longest
        grouped: dict[str, Any] = self.grouped if q.shape[2] != k.shape[2] else {}
        out = varlen_attn(flat_q, flat_k, flat_v, edges, edges, longest, longest, window_size=(-1, 0), **grouped)
        assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
        return out.view_as(q)


#: By name, in the order in which `auto` tries them.
_PACKINGS: dict[str, Callable[[list[int], torch.device], Packing]] = {
    "varlen": VarlenPacking,
    "xformers": XformersPacking,
    "sdpa": Buckets,
}


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the back end to use. Errors: `UserError` for an unknown one, and for a named one that cannot run."""
    if name == "auto":
        return next(each for each in _PACKINGS if not _problem(each, device.type, dtype, head_dim))
    if name not in _PACKINGS:
        raise UserError(f"attention {name!r}: choose one of {', '.join(('auto', *_PACKINGS))}")
    if problem := _problem(name, device.type, dtype, head_dim):
        raise UserError(f"attention {name!r} cannot run here: {problem}; use auto or sdpa")
    return name


@cache
def _problem(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why a back end cannot run; "" if a tiny forward and backward pass succeeds. Tried, and logged, once per process."""
    if backend == "sdpa":
        return ""
    if device != "cuda":
        return f"it needs CUDA, the model is on {device}"
    logging.getLogger("xformers").setLevel(logging.ERROR)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            shapes = ((1, 4, heads, head_dim) for heads in (2, 1, 1))  # grouped, as some decoders are
            q, k, v = (torch.ones(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
            packing = build_packing(torch.tensor([[0, 0, 1, 1]], device=device), backend)
            packing.attend(q, k, v).sum().backward()
    except Exception as error:  # a back end built for other versions may raise anything; all of it is reported
        problem = (
            " ".join(f"{error} {_why_no_xformers() if backend == 'xformers' else ''}".split())[:400] or type(error).__name__
        )
        log.info("attention: %s cannot run here: %s", backend, problem)
        return problem
    return ""


def _why_no_xformers() -> str:
    """What xformers says when its own extension does not load, which its operators do not."""
    try:
        from xformers import _cpp_lib

        return str(_cpp_lib._cpp_library_load_exception or "")
    except ImportError:
        return ""
