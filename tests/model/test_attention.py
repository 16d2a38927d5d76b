"""Promises of the back ends: equal to the definition, forward and gradient; documents apart; a reason where one cannot run."""

import math

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


def able() -> list[tuple[str, str]]:
    """The back ends that run here, with the device they run on."""
    found = [("sdpa", "cpu")]
    if torch.cuda.is_available():
        found += [(name, "cuda") for name in ("xformers", "varlen") if not _problem(name, "cuda", torch.bfloat16, 8)]
    return found


def off_by(a: Tensor, b: Tensor) -> float:
    """Relative distance, or absolute where all is near 0."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(("backend", "device"), able())
def test_every_back_end_equals_a_naive_loop_forward_and_gradient(backend, device, name, heads):
    torch.manual_seed(1)
    h, g = heads
    dtype, close = (torch.float32, 1e-5) if backend == "sdpa" else (torch.bfloat16, 1e-2)
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


def test_xformers_mask_is_ours():
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is an extra for CUDA")
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, -1]])
    theirs = bias.BlockDiagonalCausalMask.from_seqlens(document_lengths(documents)).materialize((1, 1, 10, 10))[0, 0]
    same = documents[:, :, None] == documents[:, None, :]
    ours = torch.block_diag(*(same & torch.ones(5, 5, dtype=torch.bool).tril()).float()).bool()
    assert torch.equal(theirs == 0, ours)


def test_document_lengths_keep_rows_apart():
    assert document_lengths(torch.tensor([[0, 0, 1], [1, 1, -1]])) == [2, 1, 2, 1]


def test_a_back_end_that_cannot_run_says_why_and_auto_never_fails():
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 64) == "sdpa"
    for name in ("xformers", "varlen"):
        with pytest.raises(UserError, match=rf"'{name}' cannot run here: it needs CUDA"):
            choose_backend(name, torch.device("cpu"), torch.float32, 64)
    with pytest.raises(UserError, match="choose one of auto, sdpa, xformers, varlen"):
        choose_backend("flash", torch.device("cpu"), torch.float32, 64)
