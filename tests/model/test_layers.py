"""Promises of norms and rotations: on a CPU they and their gradients are PyTorch's, in fewer passes; elsewhere they are PyTorch's own."""

import pytest
import torch
from torch import nn

from unitok.model import Decoder, DecoderConfig
from unitok.model.layers import RMSNorm, rotate


def plain_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 2, 8)])
def test_a_norm_and_its_gradients_are_those_of_pytorch(shape):
    norm, reference = (kind(8, eps=1e-3, dtype=torch.float64) for kind in (RMSNorm, nn.RMSNorm))
    with torch.no_grad():
        reference.weight.copy_(norm.weight.normal_())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert "Norm" in norm(x).grad_fn.name()
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)), (x, norm.weight)
    )
    torch.testing.assert_close(norm(x), reference(x))
    with torch.no_grad():
        assert torch.equal(norm(x), reference(x))  # where no gradient is needed it is PyTorch's
    single, weight = x.detach().float().requires_grad_(), torch.randn(shape)
    (exact,) = torch.autograd.grad((reference.float()(single) * weight).sum(), single)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad((norm.float()(single) * weight).sum(), single)
    torch.testing.assert_close(found, exact)  # whose products are not rounded
    half = x.detach().bfloat16().requires_grad_()
    assert torch.equal(norm.bfloat16()(half), reference.bfloat16()(half))  # nor is it ours where it is rounded


def test_a_rotation_and_its_gradient_are_those_of_its_definition():
    angles = torch.rand(2, 3, 1, 4, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert "Rotation" in rotate(x, cos, sin).grad_fn.name()
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))
    torch.testing.assert_close(rotate(x, cos, sin), plain_rotation(x, cos, sin))
    torch.testing.assert_close(rotate(x.float(), cos, sin).double(), plain_rotation(x, cos, sin), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_a_decoders_gradients_do_not_depend_on_who_computes_them(half, monkeypatch):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(50, 32, 2, 64, 2, 1, head_dim=16))
    for p in decoder.parameters():
        nn.init.normal_(p, mean=float(p.ndim < 2), std=0.2)
    ids = torch.randint(50, (2, 20))

    def gradients() -> list[torch.Tensor]:
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            decoder(ids).float().logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in decoder.parameters()]

    ours = gradients()
    monkeypatch.setattr("unitok.model.layers._by_hand", lambda *_: False)
    for a, b in zip(ours, gradients(), strict=True):
        assert float((a - b).norm()) <= (2e-2 if half else 1e-5) * float(b.norm())
