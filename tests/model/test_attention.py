"""Promises of the back ends: equal to the definition, forward and gradient; documents apart; a reason where one cannot run."""

import math
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.model.attention import Buckets, _problem, build_packing, choose_backend, document_lengths


def naive_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Position by position in float64, by the definition."""
    b, t, h, d = q.shape
    rows = []
    for i in range(b):
        for at in range(t):
            seen = [s for s in range(at + 1) if documents[i, s] == documents[i, at]]
            for j in range(h):
                g = j // (h // k.shape[2])
                scores = (k[i, seen, g].double() @ q[i, at, j].double()) / math.sqrt(d)
                rows.append(scores.softmax(0) @ v[i, seen, g].double())
    return torch.stack(rows).view(b, t, h, d)


DOCUMENTS = {
    "mixed": torch.tensor([[0, 0, 0, 1, 1, 2, -1], [0, 1, 1, 1, 1, 1, 1]]),
    "one id each": torch.arange(7).expand(2, -1),
    "one a row": torch.zeros(2, 7, dtype=torch.long),
    "none given": None,
}


def by_its_formula(q: Tensor, k: Tensor, v: Tensor, attn_bias) -> Tensor:
    """What xformers documents `memory_efficient_attention` to compute, of its own mask: softmax(q k / sqrt(D) + bias) v."""
    assert q.shape == k.shape == v.shape
    assert q.shape[0] == 1  # a block-diagonal mask wants one flat row
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    bias = attn_bias.materialize((q.shape[2], q.shape[2])).double()
    return (((q @ k.mT) / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v).transpose(1, 2)


def by_cumulative_lengths(
    q: Tensor, k: Tensor, v: Tensor, ends_q, ends_k, longest_q, longest_k, *, window_size, enable_gqa=False
):
    """What torch documents `varlen_attn` to compute: each stretch by itself; a window of (-1, 0) sees all before and itself."""
    assert ends_q is ends_k
    assert ends_q.dtype == torch.int32  # the kernel takes no other
    assert longest_q == longest_k >= int(ends_q.diff().max())
    assert window_size == (-1, 0)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = []
    for a, b in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b].double(), k[a:b].double()) / math.sqrt(q.shape[-1])
        seen = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v[a:b].double()))
    return torch.cat(out)


def able() -> list[tuple[str, str]]:
    """Back ends with the device they run on; on a CPU the kernels of xformers and varlen by their documented formulas."""
    found = [("sdpa", "cpu"), ("varlen", "cpu")]
    if find_spec("xformers"):
        found.append(("xformers", "cpu"))
    if torch.cuda.is_available():
        found += [(name, "cuda") for name in ("xformers", "varlen") if not _problem(name, "cuda", torch.bfloat16, 8)]
    return found


@pytest.fixture
def kernels(monkeypatch) -> Callable[[str], None]:
    """Puts the formulas in the place of kernels that need CUDA."""

    def stand_in(device: str) -> None:
        if device == "cpu":
            monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_cumulative_lengths)
            if find_spec("xformers"):
                monkeypatch.setattr("xformers.ops.memory_efficient_attention", by_its_formula)

    return stand_in


def off_by(a: Tensor, b: Tensor) -> float:
    """Relative distance, or absolute where all is near 0."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(("backend", "device"), able())
def test_every_back_end_equals_a_naive_loop_forward_and_gradient(backend, device, name, heads, kernels):
    kernels(device)
    torch.manual_seed(1)
    h, g = heads
    dtype, close = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 1e-2)
    documents = DOCUMENTS[name]
    q = torch.randn(2, 7, h, 8, dtype=dtype, device=device, requires_grad=True)
    k, v = (torch.randn(2, 7, g, 8, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    packing = build_packing(documents.to(device) if documents is not None else None, backend)
    ours = packing.attend(q, k, v)
    alone = documents if documents is not None else torch.zeros(2, 7, dtype=torch.long)
    theirs = naive_attention(q, k, v, alone)
    assert off_by(ours, theirs) < close
    grad = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, (q, k, v), grad)
    for a, b in zip(mine, torch.autograd.grad(theirs, (q, k, v), grad.double()), strict=True):
        assert off_by(a, b) < close


def test_gradients_in_bfloat16_on_a_cpu_are_those_of_fp32():
    torch.manual_seed(1)
    exact = [torch.randn(2, 7, heads, 8).bfloat16().float().requires_grad_() for heads in (4, 2, 2)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    packing = build_packing(DOCUMENTS["mixed"], "sdpa")
    reference = packing.attend(*exact)
    grad = torch.randn_like(reference).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = packing.attend(*half)
    assert torch.equal(ours, reference.bfloat16())
    for a, b in zip(torch.autograd.grad(ours, half, grad), torch.autograd.grad(reference, exact, grad.float()), strict=True):
        assert off_by(a, b) < 4e-3  # one rounding


def test_documents_of_many_lengths_in_long_rows_equal_each_alone():
    torch.manual_seed(2)
    lengths = torch.randint(1, 90, (40,)).tolist()
    documents = torch.repeat_interleave(torch.arange(40), torch.tensor(lengths))[None]
    q, k, v = (torch.randn(1, sum(lengths), 2, 16) for _ in range(3))
    packing = build_packing(documents, "sdpa")
    assert isinstance(packing, Buckets)
    assert len(packing.gather) < 20  # documents of similar length share a call
    together = packing.attend(q, k, v)
    start = 0
    for n in lengths:
        piece = slice(start, start + n)
        alone = build_packing(None, "sdpa").attend(q[:, piece], k[:, piece], v[:, piece])
        torch.testing.assert_close(together[:, piece], alone, atol=1e-6, rtol=1e-5)
        start += n


def test_padding_inside_a_bucket_costs_little():
    lengths = list(range(10, 200))
    packing = Buckets(lengths, torch.device("cpu"))
    padded = sum(index.shape[0] * index.shape[1] for index in packing.gather)
    assert sum(lengths) <= padded < 1.2 * sum(lengths)


def test_a_compiled_block_meets_batches_of_other_documents_without_being_compiled_again():
    graphs = 0

    def count(graph, _inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    class Block(torch.nn.Module):
        def forward(self, x, packing):
            return packing.attend(x * 2, x, x) + 1

    block, x = Block(), torch.randn(2, 24, 2, 8)
    block.compile(dynamic=False, backend=count)
    for lengths in ([24, 24], [5, 19, 24], [1, 2, 3, 18, 7, 17], [24, 12, 12]):
        documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(2, 24)
        packing = build_packing(documents, "sdpa")
        torch.testing.assert_close(block(x, packing), Block()(x, packing))
    assert graphs == 2  # before attention and after it


def test_document_lengths_keep_rows_apart():
    assert document_lengths(torch.tensor([[0, 0, 1], [1, 1, -1]])) == [2, 1, 2, 1]


def test_a_back_end_that_cannot_run_says_why_and_auto_never_fails():
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 64) == "sdpa"
    for name in ("xformers", "varlen"):
        with pytest.raises(UserError, match=rf"'{name}' cannot run here: it needs CUDA"):
            choose_backend(name, torch.device("cpu"), torch.float32, 64)
    with pytest.raises(UserError, match="choose one of auto, varlen, xformers, sdpa"):
        choose_backend("flash", torch.device("cpu"), torch.float32, 64)
