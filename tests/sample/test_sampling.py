"""Promises of sampling: filters by the book, distributions untouched by masks, rows independent, output always well-formed."""

import numpy as np
import pytest
import torch

from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.grammar import Grammar, parse_plan
from unitok.sample.engine import Request, generate
from unitok.sample.sampling import Settings, draw, guide, keep_top_k, keep_top_p


def test_top_k_and_top_p_keep_what_they_say_row_by_row():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(3, 1)
    assert (keep_top_k(logits, torch.tensor([0, 1, 3])) > -torch.inf).sum(-1).tolist() == [4, 1, 3]
    # probabilities: 0.644, 0.237, 0.087, 0.032
    assert (keep_top_p(logits, torch.tensor([1.0, 0.6, 0.7])) > -torch.inf).sum(-1).tolist() == [4, 1, 2]


def test_guidance_is_u_plus_s_times_c_minus_u_on_log_probabilities():
    c, u = torch.randn(2, 5), torch.randn(2, 5)
    c[:, 4] = u[:, 4] = -torch.inf
    out = guide(c, u, torch.tensor([[1.0], [3.0]]))
    lc, lu = c.log_softmax(-1), u.log_softmax(-1)
    torch.testing.assert_close(out[0, :4], lc[0, :4])
    torch.testing.assert_close(out[1, :4], (lu + 3 * (lc - lu))[1, :4])
    assert out[:, 4].isinf().all()


def test_drawing_follows_the_probabilities_and_never_takes_an_id_of_probability_0():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0, -torch.inf]])
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    ids = draw(logits.repeat(n, 1), torch.full((n,), 2.0), uniform.double())
    share = torch.bincount(ids, minlength=5) / n
    torch.testing.assert_close(share, torch.softmax(logits[0] / 2, 0), atol=1e-3, rtol=0)
    edge = draw(logits.repeat(2, 1), torch.ones(2), torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64))
    assert edge.tolist() == [0, 3]
    assert draw(logits, torch.zeros(1), torch.tensor([0.1], dtype=torch.float64)).item() == 3


def prompts_of(tiny):
    rng = np.random.default_rng(0)
    text = Segment("text", tiny.text.encode("a small text"))
    picture = Segment("image", rng.integers(0, 64, (2, 3)))
    sound = Segment("audio", rng.integers(0, 32, (tiny.audio.num_codebooks, 4)))
    return [Document((text,)), Document((text, picture)), Document((picture, text, sound)), Document((sound,))]


@pytest.mark.parametrize("want", ["free", "image", "text,image:2x3,audio:3", "audio,text"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_with_random_weights_nothing_is_ever_malformed(tiny, want, guidance):
    grammar, vocab = Grammar(tiny.vocab), tiny.vocab
    plan = parse_plan(want, vocab, tiny.audio.frame_rate)
    settings = {m: Settings(1.0, guidance=guidance if m != "text" else 1.0) for m in ("text", "image", "audio")}
    prompts = [vocab.encode(p, eos=False) for p in prompts_of(tiny)]
    requests = [Request(p, plan, 24 + 3 * i + j, 1, 10 * i + j) for i, p in enumerate(prompts) for j in range(6)]
    spans = 0
    for request, new in zip(requests, generate(tiny.model, grammar, requests, settings), strict=True):
        assert len(new) <= request.max_ids
        whole = np.concatenate([request.prompt, new])
        if whole[-1] != vocab.eos:
            whole = np.append(whole, vocab.eos)
        grammar.check(whole)
        document = vocab.decode(new)
        spans += len(document.segments)
        if plan:
            assert [s.modality for s in document.segments] == [w.modality for w in plan]
    assert spans >= 24


def test_the_same_seed_gives_the_same_ids_alone_and_in_a_batch(tiny):
    grammar = Grammar(tiny.vocab)
    prompts = [tiny.vocab.encode(p, eos=False) for p in prompts_of(tiny)]
    settings = {"image": Settings(guidance=2.0), "text": Settings(top_k=20), "audio": Settings(top_p=0.9)}
    requests = [Request(p, None, 40, 5, i) for i, p in enumerate(prompts)]
    together = generate(tiny.model, grammar, requests, settings)
    again = generate(tiny.model, grammar, requests, settings)
    alone = [generate(tiny.model, grammar, [r], settings)[0] for r in requests]
    other = generate(tiny.model, grammar, [Request(r.prompt, None, 40, 6, r.row) for r in requests], settings)
    for a, b, c in zip(together, again, alone, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
    assert any(not np.array_equal(a, b) for a, b in zip(together, other, strict=True))


def test_greedy_sampling_equals_a_naive_loop_over_whole_sequences(tiny):
    """No cache, no batch, no sliced head, guidance by two full passes: the same ids."""
    vocab, grammar = tiny.vocab, Grammar(tiny.vocab)
    scale = 2.5
    settings = {"text": Settings(0.0), "image": Settings(0.0, guidance=scale), "audio": Settings(0.0)}
    plan = parse_plan("image:2x2,audio:2,text", vocab, 12.5)
    for prompt in prompts_of(tiny):
        start = vocab.encode(prompt, eos=False)
        (fast,) = generate(tiny.model, grammar, [Request(start, plan, 40)], settings)
        ids, state = start.tolist(), grammar.follow(start, complete=False).copy_for(40, plan)
        twin = [vocab.bos]
        while state.state != "done":
            wanted = state.modality or state.plan[0].modality
            with torch.inference_mode():
                c, u = (
                    tiny.model(torch.tensor([seq]), places=torch.from_numpy(grammar.places(np.array(seq)))[None])[0, -1]
                    for seq in (ids, twin)
                )
            legal = torch.zeros_like(c, dtype=torch.bool)
            for a, b in state.allowed():
                legal[a:b] = True
            c, u = c.masked_fill(~legal, -torch.inf), u.masked_fill(~legal, -torch.inf)
            if wanted == "image":
                c = guide(c[None], u[None], torch.tensor([[scale]]))[0]
            id = int(c.argmax())
            state.advance(id)
            ids.append(id)
            twin = [*twin, id] if state.span else [vocab.bos]
        assert fast.tolist() == ids[len(start) :]


def test_masks_change_nothing_of_the_distribution_among_allowed_ids(tiny):
    """The first id of 4,000 rows against the softmax over the legal set, by a chi-square statistic."""
    vocab, grammar = tiny.vocab, Grammar(tiny.vocab)
    prompt = vocab.encode(prompts_of(tiny)[0], eos=False)
    requests = [Request(prompt, parse_plan("audio:1", vocab), 12, 3, i) for i in range(4000)]
    second = np.array([ids[1] for ids in generate(tiny.model, grammar, requests, {})])  # after <audio>: a code of level 0
    level = vocab.range("audio.0")
    with torch.inference_mode():
        ids = np.append(prompt, vocab.specials["<audio>"])
        logits = tiny.model(torch.from_numpy(ids)[None], places=torch.from_numpy(grammar.places(ids))[None])[0, -1]
    expected = torch.softmax(logits[level.offset : level.stop].double(), 0).numpy() * 4000
    counts = np.bincount(second - level.offset, minlength=level.size)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < level.size - 1 + 5 * np.sqrt(2 * (level.size - 1))


def test_a_budget_that_is_too_small_is_said_before_anything_is_drawn(tiny):
    prompt = tiny.vocab.encode(prompts_of(tiny)[0], eos=False)
    plan = parse_plan("image:4x4", tiny.vocab)
    with pytest.raises(UserError, match=r"a budget of 10 ids is too small: at least 21"):
        generate(tiny.model, Grammar(tiny.vocab), [Request(prompt, plan, 10)], {})


def test_python_prompts_of_every_kind_and_outputs_as_files(tiny, tmp_path, scenes_folder):
    from PIL import Image

    picture = Image.open(scenes_folder / "images" / "000000.png")
    wave = torch.zeros(1, 4000).uniform_(-0.1, 0.1)
    outputs = tiny.generate(
        [["a text", scenes_folder / "sounds" / "000001.wav"], [picture, (wave, 8000)], [prompts_of(tiny)[1]]],
        want="text,image:3x2,audio:0.2s",
        n=2,
        seed=1,
        max_ids=200,
    )
    assert [o.index for o in outputs] == list(range(6))
    for output in outputs:
        assert output.text
        stride = tiny.image.stride
        assert [tuple(i.shape) for i in output.images] == [(3, 3 * stride, 2 * stride)]
        assert len(output.audios) == 1
        assert len(output.document.segments) > len(output.new.segments)
    raw = outputs[0].save(tmp_path)
    files = [p.path for p in raw.content if p.path]
    assert all(f.exists() for f in files)
    assert files[0].read_bytes() == (scenes_folder / "sounds" / "000001.wav").read_bytes()  # the prompt's file as it was
