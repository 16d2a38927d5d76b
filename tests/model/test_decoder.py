"""Promises of the decoder: causal, documents apart, cache exact, back ends equal, Qwen3's layout."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.model import Decoder, DecoderConfig
from unitok.model.attention import Packing, attention, choose_backend, document_lengths
from unitok.model.optim import Muon, orthogonalise
from unitok.model.training import allowed_loss

CONFIG = DecoderConfig(97, 48, 2, 96, num_attention_heads=4, num_key_value_heads=2, head_dim=12)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    for p in model.parameters():  # output projections start at zero: move everything away from it
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
    return model.eval()


def naive_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Position by position in float64, by the definition."""
    out = torch.zeros_like(q, dtype=torch.float64)
    b, h, t, d = q.shape
    for i in range(b):
        for j in range(h):
            for at in range(t):
                seen = [s for s in range(at + 1) if documents[i, s] == documents[i, at]]
                g = j // (h // k.shape[1])
                scores = (k[i, g, seen].double() @ q[i, j, at].double()) / math.sqrt(d)
                out[i, j, at] = scores.softmax(0) @ v[i, g, seen].double()
    return out


def test_attention_equals_a_naive_loop_forward_and_gradient():
    torch.manual_seed(1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, -1], [0, 1, 1, 1, 1, 1, 1]])
    q = torch.randn(2, 4, 7, 6, requires_grad=True)
    k, v = (torch.randn(2, 2, 7, 6, requires_grad=True) for _ in range(2))
    ours = attention(q, k, v, Packing.build(documents, "sdpa"))
    theirs = naive_attention(q, k, v, documents)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-5)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad.double()), strict=True
    ):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-4)


def test_xformers_mask_is_ours(monkeypatch):
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is an extra for CUDA")
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, -1]])
    theirs = bias.BlockDiagonalCausalMask.from_seqlens(document_lengths(documents)).materialize((1, 1, 10, 10))[0, 0]
    ours = torch.block_diag(*Packing.build(documents, "sdpa").mask[:, 0].float()).bool()
    assert torch.equal(theirs == 0, ours)


def test_document_lengths_keep_rows_apart():
    assert document_lengths(torch.tensor([[0, 0, 1], [1, 1, -1]])) == [2, 1, 2, 1]


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


def test_stepping_on_the_cache_equals_one_pass_also_for_rows_at_different_positions(decoder):
    ids = torch.randint(0, 97, (2, 11))
    whole = decoder(ids)
    cache = decoder.new_cache(2, 16)
    # right-padded prompts of 6 and 3 ids, then each row goes on at its own position
    prompt = ids[:, :6].clone()
    prompt[1, 3:] = 0
    first = decoder.lm_head(decoder.step(prompt, torch.arange(6).expand(2, -1), cache, 6))
    torch.testing.assert_close(first[0], whole[0, :6], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(first[1, :3], whole[1, :3], atol=1e-5, rtol=1e-4)
    for i in range(5):
        positions = torch.tensor([[6 + i], [3 + i]])
        step = decoder.step(ids.gather(1, positions), positions, cache, 7 + i)
        logits = decoder.lm_head(step)[:, 0]
        torch.testing.assert_close(logits, torch.stack([whole[0, 6 + i], whole[1, 3 + i]]), atol=1e-5, rtol=1e-4)


def test_queries_and_keys_have_the_norm_that_their_gain_says(decoder):
    layer = decoder.model.layers[0].self_attn
    x = 1000 * torch.randn(1, 3, 4, 12)
    torch.testing.assert_close(layer.q_norm(x).square().mean(-1), torch.ones(1, 3, 4), atol=1e-3, rtol=1e-3)


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


def test_a_back_end_that_cannot_run_says_why_and_auto_never_fails():
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 64) == "sdpa"
    with pytest.raises(UserError, match=r"'xformers' cannot run here: it needs CUDA"):
        choose_backend("xformers", torch.device("cpu"), torch.float32, 64)
    with pytest.raises(UserError, match="choose one of auto, sdpa, xformers"):
        choose_backend("flash", torch.device("cpu"), torch.float32, 64)


def test_a_saved_decoder_is_the_same_decoder(decoder, tmp_path):
    decoder.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 97, (1, 9))
    again = Decoder.from_pretrained(tmp_path / "model")
    assert not again.training
    assert torch.equal(again(ids), decoder(ids))


# ---- Loss and optimizers --------------------------------------------------------------------------------------------


def test_the_loss_over_allowed_ids_is_the_masked_softmax_written_out(decoder):
    torch.manual_seed(2)
    kinds = [((0, 10), (20, 40)), ((40, 97),), ((5, 6),)]
    targets = torch.tensor([[3, 25, 50, 96, 5, 39]])
    batch = {
        "targets": targets,
        "kinds": torch.tensor([[0, 0, 1, 1, 2, 0]]),
        "weights": torch.tensor([[1.0, 2.0, 0.5, 1.0, 1.0, 0.0]]),
    }
    hidden = torch.randn(1, 6, 48)
    weight = decoder.lm_head.weight.detach()
    nll, squared, index = allowed_loss(hidden, weight, batch, kinds, over_all=False)
    logits = hidden[0] @ weight.T
    for loss, z, i in zip(nll, squared, index.tolist(), strict=True):
        legal = [id for a, b in kinds[batch["kinds"][0, i]] for id in range(a, b)]
        probabilities = torch.softmax(logits[i, legal].double(), 0)
        assert math.isclose(loss.item(), -math.log(probabilities[legal.index(int(targets[0, i]))]), rel_tol=1e-4)
        assert math.isclose(z.item(), torch.logsumexp(logits[i, legal], 0).item() ** 2, rel_tol=1e-3, abs_tol=1e-6)
    assert sorted(index.tolist()) == [0, 1, 2, 3]  # 4 is forced, 5 has no weight


def test_orthogonalise_brings_all_singular_values_near_one():
    torch.manual_seed(3)
    for shape in ((4, 32, 48), (2, 64, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
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
