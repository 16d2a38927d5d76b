"""Promises of the loss: the masked softmax written out, its exact gradient, no difference by pieces, little memory."""

import math

import pytest
import torch
import torch.nn.functional as F

from unitok.model import loss as module
from unitok.model.loss import next_id_loss

KINDS = [((0, 10), (20, 40)), ((40, 97),), ((5, 6),)]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {
        "targets": torch.tensor([[3, 25, 50, 96, 5, 39]]),
        "mask_index": torch.tensor([[0, 0, 1, 1, 2, 0]]),
        "weights": torch.tensor([[1.0, 2.0, 0.5, 1.0, 1.0, 0.0]]),
    }


def written_out(hidden, weight, batch, z_loss):
    """The total and each position's loss in float64, one position at a time."""
    logits, total, rows = (hidden[0].double() @ weight.double().T), 0.0, {}
    for i in range(hidden.shape[1]):
        allowed = [id for a, b in KINDS[batch["mask_index"][0, i]] for id in range(a, b)]
        z = torch.logsumexp(logits[i, allowed], 0)
        nll = z - logits[i, batch["targets"][0, i]]
        total = total + batch["weights"][0, i].double() * (nll + z_loss * z.square()) * (len(allowed) > 1)
        rows[i] = (nll.item(), z.item(), allowed[int(logits[i, allowed].argmax())] == batch["targets"][0, i])
    return total, rows


@pytest.mark.parametrize("chunk", [1 << 20, 64])  # all logits at once, and one or two positions at a time
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_loss_over_allowed_tokens_is_the_masked_softmax_written_out(batch, chunk, z_loss, monkeypatch):
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)
    torch.manual_seed(2)
    hidden, weight = torch.randn(1, 6, 48, requires_grad=True), torch.randn(97, 48, requires_grad=True)
    found = next_id_loss(hidden, weight, batch, KINDS, z_loss, measure=True)
    total, rows = written_out(hidden, weight, batch, z_loss)
    torch.testing.assert_close(found.total.double(), total, rtol=1e-5, atol=1e-5)
    for nll, z, correct, i in zip(found.nll, found.logsumexp, found.correct, found.index.tolist(), strict=True):
        assert math.isclose(nll.item(), rows[i][0], rel_tol=1e-4)
        assert math.isclose(z.item(), rows[i][1], rel_tol=1e-4)
        assert bool(correct) == rows[i][2]
    assert sorted(found.index.tolist()) == [0, 1, 2, 3]  # 4 is forced, 5 has no weight
    mine = torch.autograd.grad(3 * found.total, (hidden, weight))
    for a, b in zip(mine, torch.autograd.grad(3 * total, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_the_loss_over_all_tokens_is_torchs_cross_entropy(batch):
    torch.manual_seed(3)
    hidden, weight = torch.randn(1, 6, 48, requires_grad=True), torch.randn(97, 48, requires_grad=True)
    ours = next_id_loss(hidden, weight, batch, None)
    losses = F.cross_entropy((hidden @ weight.T)[0], batch["targets"][0], reduction="none")
    theirs = (losses * batch["weights"][0]).sum()
    torch.testing.assert_close(ours.total, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.total, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_batch_in_which_nothing_counts_has_loss_and_gradient_zero(batch):
    hidden, weight = torch.randn(1, 6, 48, requires_grad=True), torch.randn(97, 48, requires_grad=True)
    found = next_id_loss(hidden, weight, batch | {"weights": torch.zeros(1, 6)}, KINDS)
    found.total.backward()
    assert found.total == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_logits_of_a_long_batch_never_exist_at_once(monkeypatch):
    monkeypatch.setitem(module.CHUNK, "cpu", 1 << 16)
    n, v, c = 4096, 512, 16
    hidden, weight = torch.randn(1, n, c, requires_grad=True), torch.randn(v, c, requires_grad=True)
    one = torch.ones(1, n)
    batch = {"targets": torch.randint(0, v, (1, n)), "mask_index": torch.zeros(1, n, dtype=torch.long), "weights": one}
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        next_id_loss(hidden, weight, batch, None).total.backward()
    assert largest <= max(1 << 16, n * c)
    assert largest < n * v / 16


def test_half_precision_keeps_the_loss(batch):
    torch.manual_seed(4)
    hidden, weight = torch.randn(1, 6, 48), torch.randn(97, 48)
    exact = next_id_loss(hidden, weight, batch, KINDS).total
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = next_id_loss(hidden.bfloat16(), weight, batch, KINDS)
    found.total.backward()
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, exact, rtol=2e-2, atol=2e-2)
    assert hidden.grad.isfinite().all()


def test_autocast_on_a_cpu_leaves_the_loss_in_fp32(batch):
    torch.manual_seed(4)
    hidden, weight = torch.randn(1, 6, 48), torch.randn(97, 48, requires_grad=True)
    exact = next_id_loss(hidden, weight, batch, KINDS)
    with torch.autocast("cpu", torch.bfloat16):
        found = next_id_loss(hidden, weight, batch, KINDS)
    assert torch.equal(found.nll, exact.nll)
    assert torch.equal(*(torch.autograd.grad(loss.total, weight)[0] for loss in (found, exact)))
