"""Promises of the quantizers: codes that decode to what was quantized, codebooks that stay alive, levels that add."""

import copy
from itertools import pairwise

import pytest
import torch

from unitok.tokenizers.codebook import Codebook, nearest
from unitok.tokenizers.quantize import (
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ResidualQuantizer,
    SimVectorQuantizer,
    VectorQuantizer,
)


def trained(quantizer, channels, vectors=512):
    """A few training steps, so that the codebook is started and has moved."""
    torch.manual_seed(0)
    for _ in range(4):
        z = torch.randn(8, vectors // 8, channels)
        out = quantizer.train()(z)
        if out.projected is not None:
            if not quantizer.started:
                quantizer.init_codebook(quantizer.project(z).projected)
                continue
            quantizer.update(out.projected)
    return quantizer.eval()


@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizer(12, size=32, dim=4),
        VectorQuantizer(12, size=32, dim=12, normalize=False),
        FiniteScalarQuantizer(12, scales=(5, 4, 3)),
        LookupFreeQuantizer(12, size=64),
        SimVectorQuantizer(12, size=32, dim=4),
        ResidualQuantizer(12, levels=3, size=16, dim=6),
        ResidualQuantizer(12, levels=3, size=16, dim=0),
        ResidualQuantizer(12, levels=3, size=16, dim=6, normalize=True),
    ],
    ids=["vq", "vq-euclid", "fsq", "lfq", "simvq", "rvq", "rvq-encodec", "rvq-dac"],
)
def test_looking_codes_up_gives_exactly_what_quantizing_gave(quantizer):
    trained(quantizer, 12)
    out = quantizer(torch.randn(2, 9, 12))
    assert out.codes.min() >= 0
    assert out.codes.max() < quantizer.size
    torch.testing.assert_close(quantizer.lookup(out.codes), out.latents, atol=1e-5, rtol=1e-5)


def test_dead_codes_are_revived_relative_to_the_batch_and_survive_the_next_step():
    torch.manual_seed(0)
    vq = VectorQuantizer(8, size=16, dim=4)
    vq.decay = 0.5
    vq.update(vq.train()(torch.randn(8, 32, 8)).projected)
    codebook = vq.codebook
    with torch.no_grad():  # kill half of the codes
        codebook.cluster_size[8:] = 0
        codebook.embed[8:] = torch.nn.functional.normalize(-10 * torch.ones(8, 4) + torch.randn(8, 4) * 0.01, dim=-1)
        codebook.embed_avg[8:] = 0
    revived = []
    for _ in range(10):
        out = vq(torch.randn(8, 32, 8))
        revived.append(vq.update(out.projected))
    assert revived[0] >= 4
    assert sum(revived[-3:]) <= 1
    assert len(out.codes.unique()) >= 14


def test_forward_leaves_the_codebook_alone_and_update_learns_it_from_a_whole_batch():
    torch.manual_seed(0)
    vq = VectorQuantizer(8, size=16, dim=4).train()
    vq.update(vq(torch.randn(4, 64, 8)).projected)
    before = {k: v.clone() for k, v in vq.state_dict().items()}
    lows = [vq(torch.randn(4, 64, 8)).projected for _ in range(4)]
    assert all(torch.equal(v, before[k]) for k, v in vq.state_dict().items())
    twin = copy.deepcopy(vq)
    torch.manual_seed(1)  # the update draws by its own seed
    vq.update(torch.cat(lows), seed=7)
    torch.manual_seed(2)
    twin.update(torch.cat(lows), seed=7)
    assert not torch.equal(vq.codebook.embed, before["codebook.embed"])
    assert torch.equal(vq.codebook.embed, twin.codebook.embed)


def test_kmeans_starts_every_code_inside_the_data_and_the_first_update_keeps_them():
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    data = torch.nn.functional.normalize(centres.repeat(200, 1) + 0.01 * torch.randn(1600, 4), dim=-1)
    vq = VectorQuantizer(4, size=64, dim=4)
    vq.init_codebook(data)
    assert nearest(data, vq.codebook.embed).unique().numel() >= 48
    assert (vq.codebook.embed @ centres.T).max(-1).values.min() > 0.99
    vq.update(data)
    assert (vq.codebook.embed @ centres.T).max(-1).values.min() > 0.99


def test_the_nearest_code_is_found_in_any_number_of_parts(monkeypatch):
    torch.manual_seed(0)
    vectors, codebook = torch.randn(7, 11, 3), torch.randn(50, 3)
    wanted = torch.cdist(vectors.reshape(-1, 3), codebook).argmin(-1).reshape(7, 11)
    assert torch.equal(nearest(vectors, codebook), wanted)
    monkeypatch.setattr("unitok.tokenizers.codebook.CHUNK", 150)
    assert torch.equal(nearest(vectors, codebook), wanted)


def test_a_codebook_is_updated_in_fp32_under_autocast():
    torch.manual_seed(0)
    vectors = torch.randn(4000, 8)
    plain, cast = Codebook(64, 8, False), Codebook(64, 8, False)
    for codebook in (plain, cast):
        codebook.init_codebook(vectors[:500])
        with torch.autocast("cpu", torch.bfloat16, enabled=codebook is cast):
            codebook.update(vectors, 0.5)
    assert torch.equal(plain.embed, cast.embed)
    assert torch.equal(cast.nearest(vectors.bfloat16()), cast.nearest(vectors.bfloat16().float()))


def test_quantizing_is_in_fp32_under_autocast():
    torch.manual_seed(0)
    vq = trained(VectorQuantizer(12, size=64, dim=4), 12)
    z = torch.randn(4, 50, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq(z).codes, vq.float()(z).codes)
        assert vq(z).latents.dtype == torch.float32


def test_fewer_levels_of_a_residual_quantizer_are_a_coarser_reading_of_the_same():
    rvq = trained(ResidualQuantizer(8, levels=4, size=64, dim=8), 8)
    z = torch.randn(4, 64, 8)
    target = rvq.project(z).latents
    codes = rvq(z).codes
    errors = [(rvq.lookup(codes[..., :k]) - target).square().mean().item() for k in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)


def test_commitment_reaches_the_latents_from_every_level():
    rvq = trained(ResidualQuantizer(8, levels=3, size=16, dim=8), 8).train()
    z = torch.randn(4, 32, 8, requires_grad=True)
    gradients = []
    for levels in (1, 2, 3):
        loss = rvq(z, levels=levels).losses["commitment"]
        gradients.append(torch.autograd.grad(loss, z)[0])
    for fewer, more in pairwise(gradients):  # each level adds a gradient of its own
        assert (more - fewer).abs().sum() > 1e-6
