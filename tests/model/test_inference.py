"""Promises of the decoders for generation, in PyTorch and compiled: with a cache the states of `Decoder`, for every architecture, at any
positions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from unitok.bundle import make_untrained
from unitok.generation_config import SamplingParams
from unitok.grammar import Grammar
from unitok.model import Decoder, DecoderConfig
from unitok.model.inference import InferenceDecoder
from unitok.model.native import library
from unitok.model.native.decoder import NativeDecoder
from unitok.plan import parse_plan
from unitok.sample.engine import generate
from unitok.sample.running import Request
from unitok.span_positions import AXES
from unitok.training.lora import LowRank, add_lora
from unitok.training.optim import build_optimizers

SMALL = DecoderConfig(97, 48, 3, 80, 4, 2, head_dim=16, max_position_embeddings=64)
KINDS = {
    "ours": SMALL,
    "span_positions": replace(SMALL, span_positions=9),
    "span_rotation": replace(SMALL, span_rotation=True),
    "grid_rotation": replace(SMALL, span_rotation=True, grid_rotation=True),
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


def random_places(*size):
    """Span positions with frames, rows and columns."""
    place = torch.randint(0, 12, size)
    for at, _ in AXES:
        place += torch.randint(0, 12, size) << at
    return place


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
    ids, span_positions = torch.randint(0, 97, (2, 11)), random_places(2, 11)
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
    ids, span_positions = torch.randint(0, 97, (3, 12)), random_places(3, 12)
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
def test_recorded_steps_equal_a_pass_and_all_may_be_dropped_and_recorded_again():
    torch.manual_seed(0)
    decoder = filled(Decoder(replace(SMALL, max_position_embeddings=600)))
    ids = torch.randint(0, 97, (2, 300))
    with torch.inference_mode():
        wanted = decoder.hidden(ids)
    for _ in range(2):  # in the second round the memory of the first is gone
        fast = InferenceDecoder(decoder.cuda())
        assert fast.graphs is not None
        for _ in range(2):
            cache = fast.new_cache(2, 600)
            for i in range(300):  # the number of positions that are looked at grows over a multiple of 256
                where = torch.full((2, 1), i, device="cuda")
                states = fast.step_once(ids[:, i : i + 1].cuda(), where, cache, i + 1, torch.zeros_like(where))
                assert_close(states[:, 0].cpu(), wanted[:, i])
            fast.graphs._recorded.clear()
            torch.rand(1, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
def test_images_of_one_seed_are_the_same_again_while_other_memory_comes_and_goes(tmp_path):
    made = make_untrained(tmp_path / "tiny")
    assert made.decoder is not None
    copy, grammar = InferenceDecoder(made.decoder.cuda()), Grammar(made.vocab)
    sampling = {"image": SamplingParams(0.9, 50, guidance_scale=2.0)}
    found = []
    for _ in range(3):
        requests = [Request(np.array([made.vocab.bos]), parse_plan("image:4x4", made.vocab), 40, 0, i) for i in range(2)]
        found.append([ids.tolist() for ids in generate(copy, grammar, requests, sampling)])
        torch.randint(0, 1 << 30, (1 << 20,), device="cuda")  # where freed memory is used again
    assert found[0] == found[1] == found[2]
