"""Promises of the decoder: causal, documents apart, cache exact, Qwen3's layout, mistakes told."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from unitok.errors import UserError
from unitok.model import Decoder, DecoderConfig
from unitok.model.decoder import RotaryPositions, rotate
from unitok.training.optim import Muon, orthogonalize

CONFIG = DecoderConfig(97, 48, 2, 96, num_attention_heads=4, num_key_value_heads=2, head_dim=12)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    for p in model.parameters():  # output projections start at zero: move everything away from it
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
    return model.eval()


def test_packed_documents_cannot_see_one_another_and_cost_what_they_cost_alone(decoder):
    rng = np.random.default_rng(0)
    documents = [torch.from_numpy(rng.integers(0, 97, n)) for n in (5, 1, 9, 3)]
    packed = torch.cat([*documents, torch.zeros(2, dtype=torch.long)])[None]
    numbers = torch.repeat_interleave(torch.tensor([0, 1, 2, 3, -1]), torch.tensor([5, 1, 9, 3, 2]))[None]
    positions = torch.cat([torch.arange(n) for n in (5, 1, 9, 3, 2)])[None]
    together = decoder(packed, positions, numbers)[0]
    alone = torch.cat([decoder(d[None])[0] for d in documents])
    torch.testing.assert_close(together[:18], alone, atol=1e-5, rtol=1e-4)
    changed = packed.clone()
    changed[0, 6:15] = (changed[0, 6:15] + 1) % 97
    moved = (decoder(changed, positions, numbers)[0] - together).abs().amax(-1)
    assert moved[:6].max() == 0
    assert moved[15:].max() == 0
    assert moved[6:15].min() > 0


def test_the_decoder_is_causal(decoder):
    ids = torch.randint(0, 97, (1, 12))
    later = ids.clone()
    later[0, 7:] = (later[0, 7:] + 5) % 97
    assert torch.equal(decoder(ids)[0, :7], decoder(later)[0, :7])


def test_queries_and_keys_have_the_norm_that_their_gain_says(decoder):
    layer = decoder.model.layers[0].self_attn
    x = 1000 * torch.randn(1, 3, 4, 12)
    torch.testing.assert_close(layer.q_norm(x).square().mean(-1), torch.ones(1, 3, 4), atol=1e-3, rtol=1e-3)


def test_with_span_rotation_the_same_place_in_another_image_is_always_equally_far():
    rotary = RotaryPositions(replace(CONFIG, span_rotation=True))
    q, k = torch.randn(2, 1, 1, 12).unbind(0)
    by_document, by_span = torch.zeros(12), torch.zeros(12)
    by_document[[0, 2, 4, 6, 8, 10]] = by_span[[1, 3, 5, 7, 9, 11]] = 1  # pair i is dimensions i and i + 6

    def score(mask, at, other):
        turned = [rotate(x * mask, *rotary(*(torch.tensor([[p]]) for p in where))) for x, where in ((q, at), (k, other))]
        return (turned[0] * turned[1]).sum()

    near = score(by_span, (90, 5), (20, 6))  # position in the document, position in the image
    torch.testing.assert_close(near, score(by_span, (300, 30), (120, 31)))
    torch.testing.assert_close(score(by_document, (90, 5), (20, 6)), score(by_document, (170, 1), (100, 60)))
    assert (near - score(by_span, (90, 5), (20, 8))).abs() > 1e-3
    with pytest.raises(UserError, match="multiple of 4"):
        replace(CONFIG, head_dim=6, span_rotation=True)


def test_names_are_qwen3s(decoder):
    names = set(decoder.state_dict())
    block = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"}  # fmt: skip
    wanted = {f"model.layers.{i}.{n}.weight" for i in range(2) for n in block}
    assert names == wanted | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_logits_equal_qwen3s_of_transformers(decoder):
    transformers = pytest.importorskip("transformers", reason="an extra")
    c = decoder.config
    config = transformers.Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
        intermediate_size=c.intermediate_size, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta, tie_word_embeddings=False, attention_bias=False,
    )  # fmt: skip
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.load_state_dict(decoder.state_dict())
    ids = torch.randint(0, 97, (2, 13))
    torch.testing.assert_close(decoder(ids), theirs(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_new_decoder_gives_the_uniform_distribution():
    logits = Decoder(CONFIG)(torch.randint(0, 97, (2, 8)))
    assert logits.abs().max() == 0


CHAMELEON = replace(CONFIG, qk_norm="layer", norm_placement="after", attention_bias=True)


@pytest.mark.parametrize("config", [CONFIG, CHAMELEON, replace(CONFIG, qk_norm="none", mlp_bias=True)])
def test_checkpointing_activations_changes_no_gradient(config):
    gradients = []
    for kept in (False, True):
        torch.manual_seed(0)
        model = Decoder(replace(config, checkpoint_activations=kept))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.15)
        ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
        model(ids).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.abs().max() > 0 for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_mistakes_are_one_line(decoder):
    with pytest.raises(UserError, match="token 97: the decoder's vocabulary has tokens 0 to 96"):
        decoder(torch.tensor([[3, 97]]))
    with pytest.raises(UserError, match="token -100"):
        decoder(torch.tensor([[3, -100]]))
    with pytest.raises(UserError, match="a document of 1025 tokens: the decoder takes at most 1024"):
        decoder(torch.zeros(1, 1025, dtype=torch.long))
    with pytest.raises(UserError, match="a document of 1030 tokens"):
        decoder(torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1, 2, 1029]]))
    for wrong, said in [
        ({"num_attention_heads": 5}, "num_key_value_heads 2 must divide num_attention_heads 5"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"qk_norm": "layr"}, "qk_norm 'layr': choose one of rms, layer, none"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0: it must be at least 1"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling 'yarn': choose one of default, linear, llama3"),
    ]:
        with pytest.raises(UserError, match=said):
            Decoder(replace(CONFIG, **wrong))


def test_a_saved_decoder_is_the_same_decoder(decoder, tmp_path):
    decoder.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 97, (1, 9))
    again = Decoder.from_pretrained(tmp_path / "model")
    assert not again.training
    assert torch.equal(again(ids), decoder(ids))


# ---- Optimizers ------------------------------------------------------------------------------------------------------


def test_orthogonalize_brings_all_singular_values_near_one():
    torch.manual_seed(3)
    for shape in ((4, 32, 48), (2, 64, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_muon_equals_torchs_on_one_matrix():
    torch.manual_seed(4)
    start, gradients = torch.randn(16, 24), [torch.randn(16, 24) for _ in range(3)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = Muon([ours], lr=0.02, momentum=0.95)
    b = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.0, nesterov=True)
    for g in gradients:
        for p, o in ((ours, a), (theirs, b)):
            p.grad = g.clone()
            o.step()
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-2)  # torch's iterations run in bfloat16


def test_muon_of_several_steps_updates_by_the_sum_of_their_gradients():
    torch.manual_seed(5)
    start, gradients = torch.randn(16, 24), [torch.randn(16, 24) for _ in range(6)]
    rare, summed = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a, b = Muon([rare], every=3), Muon([summed])
    for i, g in enumerate(gradients):
        before = rare.detach().clone()
        rare.grad = g.clone()
        a.step()
        assert torch.equal(rare, before) == (i % 3 < 2)
        if i == 3:  # in the middle of a sum
            other = torch.nn.Parameter(rare.detach().clone())
            resumed = Muon([other], every=3)
            resumed.load_state_dict(a.state_dict())
            rare, a = other, resumed
    for i in (0, 3):
        summed.grad = sum(gradients[i : i + 3])
        b.step()
    torch.testing.assert_close(rare, summed)
    state = a.state_dict()
    for group in state["param_groups"]:
        del group["every"]  # as a checkpoint of before
    Muon([torch.nn.Parameter(start.clone())]).load_state_dict(state)
