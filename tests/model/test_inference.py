"""Promises of the decoders for generation, in PyTorch and compiled: with a cache the states of `Decoder`, for every architecture, at any
positions."""

from dataclasses import replace

import pytest
import torch

from unitok.model import Decoder, DecoderConfig
from unitok.model.cuda_graphs import CudaGraphs
from unitok.model.inference import InferenceDecoder
from unitok.model.native import library
from unitok.model.native.decoder import NativeDecoder
from unitok.training.lora import LowRank, add_lora
from unitok.training.optim import build_optimizers

SMALL = DecoderConfig(97, 48, 3, 80, 4, 2, head_dim=16, max_position_embeddings=64)
KINDS = {
    "ours": SMALL,
    "span_positions": replace(SMALL, span_positions=9),
    "chameleon 34b": replace(SMALL, qk_norm="layer", norm_placement="after"),
    "llama with biases": replace(SMALL, qk_norm="none", num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "linear scaling": replace(SMALL, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "lora": SMALL,
}


@pytest.fixture(params=["PyTorch", "compiled"])
def copy_of(request):
    """What makes a decoder for generation."""
    if request.param == "compiled" and library() is None:
        pytest.skip("no C++ compiler")
    return {"PyTorch": InferenceDecoder, "compiled": NativeDecoder}[request.param]


def filled(decoder):
    """Random weights everywhere: what blocks add begins at zero, and would hide every mistake in them."""
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") and p.ndim < 2 else 0.0, 0.2)
    return decoder.eval()


@pytest.fixture(params=KINDS)
def decoder(request):
    torch.manual_seed(0)
    decoder = Decoder(KINDS[request.param])
    if request.param == "lora":
        add_lora(decoder, LowRank(rank=2))
    return filled(decoder)


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_reading_with_a_cache_equals_one_pass_also_where_contexts_stand_at_different_positions(decoder, copy_of):
    ids, span_positions = torch.randint(0, 97, (2, 11)), torch.randint(0, 12, (2, 11))
    whole = decoder.hidden(ids, span_positions=span_positions)
    fast = copy_of(decoder)
    cache = fast.new_cache(2, 16)
    # right-padded prompts of 6 and 3 ids, then each goes on at its own position
    prompt = ids[:, :6].clone()
    prompt[1, 3:] = 0
    first = fast.step(prompt, torch.arange(6).expand(2, -1), cache, 6, span_positions[:, :6], start=0)
    assert_close(first[0], whole[0, :6])
    assert_close(first[1, :3], whole[1, :3])
    for i in range(5):
        where = torch.tensor([[6 + i], [3 + i]])
        step = fast.step(ids.gather(1, where), where, cache, 7 + i, span_positions.gather(1, where))
        assert_close(step[:, 0], torch.stack([whole[0, 6 + i], whole[1, 3 + i]]))


@torch.no_grad()
def test_a_common_position_and_several_tokens_at_once_change_nothing(decoder, copy_of):
    ids, span_positions = torch.randint(0, 97, (3, 12)), torch.randint(0, 12, (3, 12))
    whole = decoder.hidden(ids, span_positions=span_positions)
    fast = copy_of(decoder)
    common, own = fast.new_cache(3, 16), fast.new_cache(3, 16)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 12)):
        where = torch.arange(start, stop).expand(3, -1)
        part = (ids[:, start:stop], where)
        assert_close(fast.step(*part, common, stop, span_positions[:, start:stop], start=start), whole[:, start:stop])
        assert_close(fast.step(*part, own, stop, span_positions[:, start:stop]), whole[:, start:stop])


@torch.no_grad()
def test_contexts_are_rewound_moved_and_kept_when_the_cache_grows(copy_of):
    torch.manual_seed(0)
    decoder = filled(Decoder(SMALL))
    ids = torch.randint(0, 97, (2, 9))
    whole = decoder.hidden(ids)
    fast = copy_of(decoder)
    cache = fast.new_cache(2, 8)
    wrong = ids.clone()
    wrong[:, 4:] = 0
    fast.step(wrong[:, :8], torch.arange(8).expand(2, -1), cache, 8, start=0)
    fast.step(ids[:, 4:8], torch.arange(4, 8).expand(2, -1), cache, 8, start=4)  # written over
    cache = cache.grown(3, 12)
    cache.take(cache, 1, 0, 8)
    found = fast.step(ids[1:, 8:], torch.full((1, 1), 8), cache.part(0, 1), 9, start=8)
    assert_close(found[0, 0], whole[1, 8])


@pytest.mark.parametrize("optimizer", ["fused AdamW", "Muon and AdamW", "SGD"])
def test_one_made_of_a_decoder_that_has_learned_has_its_weights_and_one_made_before_keeps_its_own(optimizer, copy_of):
    decoder = filled(Decoder(SMALL))
    optimizers = {
        "fused AdamW": [torch.optim.AdamW(decoder.parameters(), lr=0.1, fused=True)],
        "Muon and AdamW": build_optimizers(decoder, "muon", 0.1, 0.1, (0.9, 0.95), 0.0),
        "SGD": [torch.optim.SGD(decoder.parameters(), lr=0.1)],
    }[optimizer]
    ids = torch.randint(0, 97, (1, 5))

    def states(fast):
        return fast.step(ids, torch.arange(5)[None], fast.new_cache(1, 8), 5, start=0)

    for _ in range(2):
        fast = copy_of(decoder)
        before = states(fast)
        decoder(ids).logsumexp(-1).sum().backward()
        for each in optimizers:
            each.step()
        assert torch.equal(states(fast), before)  # it shares no memory with what learns
        with torch.no_grad():
            learnt = decoder.hidden(ids)
        assert_close(states(copy_of(decoder)), learnt)
        assert not torch.allclose(before, learnt)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@torch.inference_mode()
def test_recorded_steps_equal_steps_one_by_one():
    torch.manual_seed(0)
    fast = InferenceDecoder(filled(Decoder(replace(SMALL, max_position_embeddings=600))).cuda())
    plain, graphed, graphs = fast.new_cache(2, 600), fast.new_cache(2, 600), CudaGraphs(fast)
    ids, span_positions = torch.randint(0, 97, (2, 300), device="cuda"), torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    for i in range(300):  # the number of positions that are looked at grows over a multiple of 256
        where = torch.tensor([[i], [i // 2]], device="cuda")
        wanted = fast.step(ids[:, i : i + 1], where, plain, i + 1, span_positions)
        assert_close(graphs.step(ids[:, i : i + 1], where, graphed, i + 1, span_positions), wanted)
