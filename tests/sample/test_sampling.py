"""Promises of sampling: filters by the book, distributions untouched by masks, rows independent, output always well-formed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_layouts import every_layout, random_codes

from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.generation_config import SamplingParams
from unitok.grammar import Grammar
from unitok.model.decoder import Decoder
from unitok.model.inference import InferenceDecoder
from unitok.plan import PlanItem, parse_plan
from unitok.sample.engine import Session, generate
from unitok.sample.running import Request
from unitok.sample.sampling import (
    draw,
    guide,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from unitok.sample.score import log_probabilities


def test_top_k_and_top_p_keep_what_they_say_row_by_row():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(3, 1)
    assert (keep_top_k(logits, torch.tensor([0, 1, 3])) > -torch.inf).sum(-1).tolist() == [4, 1, 3]
    # probabilities: 0.644, 0.237, 0.087, 0.032
    assert (keep_top_p(logits, torch.tensor([1.0, 0.6, 0.7])) > -torch.inf).sum(-1).tolist() == [4, 1, 2]


def test_min_p_and_the_repetition_penalty_do_what_they_say_row_by_row():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(3, 1)
    assert (keep_min_p(logits, torch.tensor([0.0, 0.3, 0.1])) > -torch.inf).sum(-1).tolist() == [4, 2, 3]
    seen = torch.tensor([[False, True, False, False]]).repeat(3, 1)
    out = penalize_repetition(logits, seen, torch.tensor([[1.0], [2.0], [0.5]]))
    wanted = logits.log_softmax(-1)
    assert torch.equal(out[0], wanted[0])
    assert torch.equal(out[:, [0, 2, 3]], wanted[:, [0, 2, 3]])
    assert out[1, 1] == 2 * wanted[1, 1]
    assert out[2, 1] == 0.5 * wanted[2, 1]


def test_a_schedule_grows_from_nothing_to_the_full_scale_over_its_interval():
    params = SamplingParams(guidance_scale=3.0, guidance_start=2, guidance_stop=6, guidance_schedule="linear")
    assert [params.guides(i) for i in range(8)] == [False] * 2 + [True] * 4 + [False] * 2
    assert [params.scales(i, 64)[0] for i in range(2, 6)] == pytest.approx([1, 1 + 2 / 3, 1 + 4 / 3, 3])
    cosine = SamplingParams(guidance_scale=2.0, media_guidance_scale=3.0, guidance_schedule="cosine")
    assert cosine.scales(10, 21) == pytest.approx((1.5, 2.0))
    assert cosine.scales(10, None) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0.0), ("top_k", -1), ("temperature", -0.1), ("min_p", 1.0), ("repetition_penalty", 0.0), ("guidance_stop", -3), ("guidance_stop", 0),
     ("guidance_schedule", "quadratic")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(name, value):
    with pytest.raises(UserError, match=f"^{name} {value}: "):
        SamplingParams(**{name: value})


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


@pytest.mark.parametrize("modalities", ["free", "image", "text,image:2x3,audio:3", "audio,text"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_with_random_weights_nothing_is_ever_malformed(tiny, modalities, guidance_scale):
    grammar, vocab = Grammar(tiny.vocab), tiny.vocab
    plan = parse_plan(modalities, vocab, tiny.rates)
    sampling = {
        m: SamplingParams(1.0, guidance_scale=guidance_scale if m != "text" else 1.0) for m in ("text", "image", "audio")
    }
    prompts = [vocab.encode(p, eos=False) for p in prompts_of(tiny)]
    requests = [Request(p, plan, 24 + 3 * i + j, 1, 10 * i + j) for i, p in enumerate(prompts) for j in range(6)]
    spans = 0
    for request, new in zip(requests, generate(tiny.model, grammar, requests, sampling), strict=True):
        assert len(new) <= request.max_new_tokens
        whole = np.concatenate([request.prompt, new])
        if whole[-1] != vocab.eos:
            whole = np.append(whole, vocab.eos)
        grammar.check(whole)
        document = vocab.decode(new)
        spans += len(document.segments)
        if plan:
            assert [s.modality for s in document.segments] == [w.modality for w in plan]
    assert spans >= 24


def random_request(tiny, grammar, rng, row):
    """A prompt of any kind, perhaps ended within a picture or sound, and a plan or none, with any budget that suffices."""
    vocab = tiny.vocab

    def content():
        kind = rng.integers(3)
        if kind == 0:
            return Segment("text", tiny.text.encode("a small text")[: rng.integers(1, 4)], rng.choice(["none", "user"]))
        if kind == 1:
            return Segment("image", rng.integers(0, 64, rng.integers(1, 4, 2)))
        return Segment("audio", rng.integers(0, 32, (tiny.audio.num_codebooks, rng.integers(1, 4))))

    prompt = vocab.encode(Document(tuple(content() for _ in range(rng.integers(0, 4)))), eos=False)
    prompt = prompt[: rng.integers(max(1, len(prompt) - 8), len(prompt) + 1)]
    items = [
        PlanItem("text"),
        PlanItem("image"),
        PlanItem("audio"),
        PlanItem("image", (2, 3)),
        PlanItem("audio", repeats=2),
        PlanItem("image", (1, 1)),
    ]
    plan = None if rng.random() < 0.4 else [items[i] for i in rng.integers(0, len(items), rng.integers(1, 5))]
    if plan:
        plan = [item for item, before in zip(plan, [None, *plan], strict=False) if before != item or item.modality != "text"]
    state = grammar.follow(prompt, complete=False)
    try:
        state.copy_for(None, plan)
    except UserError:  # a begun picture of another size than the plan's
        plan = None
    least = next(n for n in range(1, 400) if suffices(state, n, plan))
    return Request(prompt, plan, int(least + rng.integers(0, 40)), 0, row)


def suffices(state, budget, plan):
    try:
        state.copy_for(budget, plan)
    except UserError:
        return False
    return True


def count_spans(tiny, least):
    """Spans of random requests until there are `least`; each output is checked whole."""
    grammar, vocab, rng = Grammar(tiny.vocab), tiny.vocab, np.random.default_rng(0)
    spans = {"text": 0, "image": 0, "audio": 0}
    ways = [
        SamplingParams(),
        SamplingParams(guidance_scale=2.0),
        SamplingParams(top_k=3),
        SamplingParams(0.0),
        SamplingParams(2.0, guidance_scale=3.0, media_guidance_scale=1.5),
    ]
    row = 0
    while sum(spans.values()) < least:
        requests = [random_request(tiny, grammar, rng, row := row + 1) for _ in range(96)]
        for request in requests:
            request.sampling = {m: ways[rng.integers(len(ways))] for m in spans}
        for request, new in zip(requests, generate(tiny.model, grammar, requests, batch_size=64), strict=True):
            assert len(new) <= request.max_new_tokens
            whole = np.concatenate([request.prompt, new])
            whole = whole if whole[-1] == vocab.eos else np.append(whole, vocab.eos)
            grammar.check(whole)
            document = vocab.decode(whole)
            assert np.array_equal(vocab.encode(document), whole)
            given = len(vocab.decode(request.prompt[: span_ends(vocab, request.prompt)]).segments)
            for segment in document.segments[given:]:
                spans[segment.modality] += 1
    return spans


def span_ends(vocab, prompt):
    """How much of a prompt is whole spans."""
    for stop in range(len(prompt), 0, -1):
        try:
            vocab.decode(prompt[:stop])
        except UserError:
            continue
        return stop
    return 0


def test_of_random_requests_with_random_weights_nothing_is_malformed(tiny):
    spans = count_spans(tiny, 1500)
    assert min(spans.values()) > 200


@pytest.mark.long
def test_of_100_000_spans_with_random_weights_nothing_is_malformed(tiny):
    spans = count_spans(tiny, 100_000)
    print(f"{sum(spans.values())} spans, none malformed: {spans}")
    assert min(spans.values()) > 10_000


def test_the_same_seed_gives_the_same_ids_alone_and_in_a_batch(tiny):
    grammar = Grammar(tiny.vocab)
    prompts = [tiny.vocab.encode(p, eos=False) for p in prompts_of(tiny)]
    sampling = {
        "image": SamplingParams(guidance_scale=2.0),
        "text": SamplingParams(top_k=20),
        "audio": SamplingParams(top_p=0.9),
    }
    requests = [Request(p, None, 40, 5, i) for i, p in enumerate(prompts)]
    together = generate(tiny.model, grammar, requests, sampling)
    again = generate(tiny.model, grammar, requests, sampling)
    alone = [generate(tiny.model, grammar, [r], sampling)[0] for r in requests]
    other = generate(tiny.model, grammar, [Request(r.prompt, None, 40, 6, r.row) for r in requests], sampling)
    for a, b, c in zip(together, again, alone, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
    assert any(not np.array_equal(a, b) for a, b in zip(together, other, strict=True))


def guided(c, u, scale, m, media_scale):
    """By the formulas, of log-probabilities; ids at -inf stay there."""
    c, u, m = (None if x is None else x.log_softmax(-1) for x in (c, u, m))
    mixed = u + scale * (c - u) if m is None else u + media_scale * (m - u) + scale * (c - m)
    return torch.where(c.isinf(), c, mixed)


def naive(tiny, request, sampling):
    """Greedy ids of a request without a cache, a batch or a sliced head: whole passes, one for each way of guidance."""
    vocab, grammar = tiny.vocab, Grammar(tiny.vocab)
    state = grammar.follow(request.prompt, complete=False).copy_for(request.max_new_tokens, request.plan)
    ids, span = request.prompt.tolist(), request.prompt.tolist()[len(request.prompt) - state.into :]
    befores = {"own": None, "none": request.negative_prompt, "media": request.media}
    while state.state != "done":
        params = sampling.get(state.modality or (state.plan[0].modality if state.plan else "text"), SamplingParams())
        legal = torch.zeros(vocab.size, dtype=torch.bool)
        for a, b in state.allowed():
            legal[a:b] = True
        logits = {}
        for kind, before in befores.items():
            start = [vocab.bos] if before is None else list(before)
            sequence = np.array(ids if kind == "own" else start + span)
            with torch.inference_mode():
                found = tiny.model(
                    torch.from_numpy(sequence)[None], span_positions=torch.from_numpy(grammar.span_positions(sequence))[None]
                )
            logits[kind] = found[0, -1].masked_fill(~legal, -torch.inf)[None]
        chosen = logits["own"]
        if params.guides(state.count):
            scale, media = (torch.tensor([[x]]) for x in params.scales(state.count, state.total))
            three = params.media_guidance_scale is not None
            chosen = guided(chosen, logits["none"], scale, logits["media"] if three else None, media)
        if params.repetition_penalty != 1:
            seen = torch.zeros(1, vocab.size, dtype=torch.bool)
            seen[0, ids] = True
            chosen = penalize_repetition(chosen, seen, torch.tensor([[params.repetition_penalty]]))
        id = int(chosen.argmax())
        before = state.span
        state.advance(id)
        ids.append(id)
        span = [*span, id] if state.span is before and before else [id] if state.span else []
    return ids[len(request.prompt) :]


WAYS = {
    "no guidance": {},
    "without the condition": {"image": {"guidance_scale": 2.5}},
    "in text, too": {"image": {"guidance_scale": 2.5}, "text": {"guidance_scale": 1.7}},
    "for an interval": {"image": {"guidance_scale": 3.0, "guidance_start": 1, "guidance_stop": 4}},
    "growing": {
        "image": {"guidance_scale": 3.0, "guidance_schedule": "linear"},
        "audio": {"guidance_scale": 2.0, "guidance_schedule": "cosine"},
    },
    "three ways": {"image": {"guidance_scale": 3.0, "media_guidance_scale": 1.4}, "audio": {"guidance_scale": 2.0}},
    "repetition penalty": {"audio": {"repetition_penalty": 1.8}, "text": {"repetition_penalty": 1.4, "guidance_scale": 1.5}},
}


@pytest.mark.parametrize("way", WAYS)
def test_greedy_ids_equal_a_naive_loop_over_whole_sequences(tiny, way):
    """Four prompts of different lengths in one batch, against one at a time without any of the engine."""
    vocab = tiny.vocab
    sampling = {m: SamplingParams(0.0, **WAYS[way].get(m, {})) for m in ("text", "image", "audio")}
    plan = parse_plan("image:2x3,audio:2,text,image:2x2", vocab, {"audio": 12.5})
    negative_prompt = vocab.encode(Document((Segment("text", tiny.text.encode("nothing")),)), eos=False)
    requests = []
    for i, prompt in enumerate(prompts_of(tiny)):
        media = vocab.encode(Document(tuple(s for s in prompt.segments if s.modality != "text")), eos=False)
        requests.append(
            Request(
                vocab.encode(prompt, eos=False),
                plan,
                44,
                row=i,
                negative_prompt=negative_prompt if i % 2 else None,
                media=media,
            )
        )
    made = [ids.tolist() for ids in generate(tiny.model, Grammar(vocab), requests, sampling)]
    assert made == [naive(tiny, request, sampling) for request in requests]
    if WAYS[way]:  # it does something
        assert made != [naive(tiny, request, dict.fromkeys(sampling, SamplingParams(0.0))) for request in requests]


def test_codes_of_every_layout_are_drawn_as_a_naive_loop_draws_them(tiny):
    """From the begin of a span, and from the middle of one; each finds its own end."""
    vocab, rng = every_layout(), np.random.default_rng(3)
    torch.manual_seed(1)
    model = Decoder(replace(tiny.model.config, vocab_size=vocab.size)).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("lm_head.weight", "o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.1)
    requests, sampling = [], {}
    for i, m in enumerate(["text", "raster3", "interleaved3", "delayed2", "delayed4", "clip", "strip"]):
        sampling[m] = SamplingParams(0.0, guidance_scale=1.0 + i % 2)
        prompt = vocab.encode(Document((Segment(m, random_codes(vocab, m, rng)),)), eos=False)
        cut = int(rng.integers(2 + len(vocab.span(m).header), len(prompt))) if vocab.span(m).begin else len(prompt)
        repeats = None if vocab.span(m).header or i % 3 else 4
        requests += [
            Request(prompt, [PlanItem(m, repeats=repeats)], 18, row=0),
            Request(prompt[:cut], [PlanItem(m)], 16, row=1),
        ]
    made = [ids.tolist() for ids in generate(model, Grammar(vocab), requests, sampling)]
    assert made == [naive(SimpleNamespace(vocab=vocab, model=model), request, sampling) for request in requests]
    for request, ids in zip(requests, made, strict=True):
        segments = vocab.decode(np.concatenate([request.prompt, ids])).segments
        assert segments[-1].modality == request.plan[0].modality
        if vocab.span(segments[-1].modality).begin:  # text goes on
            assert request.plan[0].repeats in (None, segments[-1].codes.shape[-1])


def test_a_negative_prompt_may_be_longer_than_the_prompt_and_leaves_less_room(tiny):
    given = {"modalities": "image", "guidance_scale": 2.0, "max_new_tokens": 2000, "temperature": 0.0}
    longer = 500 * "b"
    (output,) = tiny.generate("a", negative_prompt=longer, **given)
    assert output.images
    with pytest.raises(UserError, match=r"^a negative prompt of \d+ tokens: the decoder takes 1024 in all; shorten it"):
        tiny.generate("a", negative_prompt=3 * longer, **given)


def test_a_request_that_joins_later_gets_what_it_gets_alone(tiny):
    grammar, vocab = Grammar(tiny.vocab), tiny.vocab
    sampling = {"image": SamplingParams(guidance_scale=2.0), "audio": SamplingParams(top_k=5)}
    requests = [Request(vocab.encode(p, eos=False), None, 30 + 5 * i, 7, i) for i, p in enumerate(prompts_of(tiny) * 2)]
    alone = [generate(tiny.model, grammar, [r], sampling)[0].tolist() for r in requests]
    made = [ids.tolist() for ids in generate(tiny.model, grammar, requests, sampling, batch_size=3)]
    assert made == alone
    session, found = Session(tiny.model, grammar, sampling, ahead=2), {id(r): [] for r in requests}
    waiting = list(requests)
    while waiting or session.waiting:
        if waiting:
            session.add(waiting.pop(0))
        for event in session.step():
            found[id(event.request)] += event.ids
    assert [found[id(r)] for r in requests] == alone
    assert session.slots == []


def test_rows_that_need_no_guidance_have_no_second_slot(tiny):
    grammar, vocab = Grammar(tiny.vocab), tiny.vocab
    prompt = vocab.encode(prompts_of(tiny)[0], eos=False)
    session = Session(tiny.model, grammar, {"image": SamplingParams(guidance_scale=2.0, guidance_stop=3)}, ahead=1)
    session.add(Request(prompt, parse_plan("image:2x3", vocab), 20, row=0))
    session.add(Request(prompt, parse_plan("audio:4", vocab, {"audio": 12.5}), 20, row=1))
    counts = []
    while session.waiting:
        session.step()
        counts.append(len(session.slots))
    assert counts[:6] == [3, 3, 3, 2, 2, 1]  # two requests and one twin for three codes; then the picture is done


def test_a_prompt_that_requests_share_is_read_once(tiny, monkeypatch):
    grammar, vocab = Grammar(tiny.vocab), tiny.vocab
    prompts = [vocab.encode(p, eos=False) for p in prompts_of(tiny)]
    requests = [Request(prompts[i % 2 + 1], parse_plan("image:2x2", vocab), 20, 0, i) for i in range(6)]
    alone = [generate(tiny.model, grammar, [r])[0].tolist() for r in requests]
    session, read, step = Session(InferenceDecoder(tiny.model), grammar), [], InferenceDecoder.step

    def watch(self, ids, *more):
        read.append(tuple(ids.shape))
        return step(self, ids, *more)

    monkeypatch.setattr(InferenceDecoder, "step", watch)
    for request in requests:
        session.add(request)
    made = {request.row: [] for request in requests}
    while session.waiting:
        for event in session.step():
            made[event.request.row] += event.ids
    assert read[0] == (2, max(map(len, prompts[1:3])) + 3)  # two prompts, and the picture's begin and size
    assert read[1:] == [(6, 1)] * 3
    assert [made[i] for i in range(6)] == alone


def test_jacobi_gives_the_ids_of_plain_sampling_in_fewer_passes(tiny):
    """A window of 1 is sequential sampling of the same noise; greedy ids are those of the plain loop."""
    grammar, vocab = Grammar(tiny.vocab), tiny.vocab
    prompt = vocab.encode(prompts_of(tiny)[1], eos=False)
    plan = parse_plan("image:5x6,text,image:4x4", vocab)
    for params in (
        SamplingParams(0.3, top_k=20, guidance_scale=1.5),
        SamplingParams(0.5, top_p=0.9, guidance_scale=2.0, media_guidance_scale=1.2),
        SamplingParams(0.0),
        SamplingParams(0.0, guidance_scale=2.0, media_guidance_scale=1.4, guidance_schedule="linear"),
        SamplingParams(0.0, guidance_scale=2.5, guidance_start=7, guidance_stop=20),
    ):
        sampling, made, passes = {"image": params, "text": SamplingParams(0.0)}, {}, {}
        for window in (1, 4, 16):
            session = Session(tiny.model, grammar, sampling, jacobi_window=window)
            session.add(Request(prompt, plan, 90, 3, 0, media=prompt))
            made[window] = []
            while session.waiting:
                for event in session.step():
                    made[window] += event.ids
            passes[window] = session.passes
        assert made[1] == made[4] == made[16]
        # an interval of guidance cuts a picture's stretch in three, and each begins with an id that needs no pass
        assert passes[16] <= passes[4] <= passes[1] == (6 + 12 + 9 + 6 + 8 if params.guidance_stop else 29 + 15)
        grammar.check(np.concatenate([prompt, made[1], [vocab.eos]]))
        if params.temperature == 0:
            assert made[16] == naive(tiny, Request(prompt, plan, 90, 3, 0, media=prompt), sampling)
            assert passes[16] < passes[1]


def test_jacobi_never_draws_what_is_not_allowed_nor_the_same_for_all_prompts(tiny):
    """Text of a known length: its pieces are most of this vocabulary, and not all of them are legal."""
    grammar, vocab = Grammar(tiny.vocab), tiny.vocab
    plan, made = parse_plan("text:20,image:3x3", vocab), []
    for document in prompts_of(tiny):
        prompt = vocab.encode(document, eos=False)
        (ids,) = generate(tiny.model, grammar, [Request(prompt, plan, 60, 1)], {}, jacobi_window=8)
        grammar.check(np.concatenate([prompt, ids, [vocab.eos]]))
        assert vocab.range("text").holds(ids[:20]).all()
        made.append(ids.tolist())
    assert len({tuple(ids) for ids in made}) == len(made)


def test_scores_are_the_log_probabilities_of_whole_passes(tiny):
    vocab, grammar = tiny.vocab, Grammar(tiny.vocab)
    documents = [vocab.encode(p, eos=i % 2 == 0) for i, p in enumerate(prompts_of(tiny))]
    for ids, found in zip(documents, log_probabilities(tiny.model, grammar, documents, batch_ids=64), strict=True):
        state = grammar.row()
        with torch.inference_mode():
            logits = tiny.model(
                torch.from_numpy(ids)[None], span_positions=torch.from_numpy(grammar.span_positions(ids))[None]
            )[0].double()
        for i, id in enumerate(ids[1:].tolist()):
            legal = torch.cat([torch.arange(a, b) for a, b in state.allowed()])
            wanted = logits[i, id] - logits[i, legal].logsumexp(0)
            assert found[i] == pytest.approx(float(wanted), abs=1e-4)
            state.advance(id)
    with pytest.raises(UserError, match=r"document 1 has \d+ tokens, the decoder takes 1024"):
        log_probabilities(tiny.model, grammar, [np.concatenate([documents[0][:1], np.full(1100, documents[0][1])])])


def test_masks_change_nothing_of_the_distribution_among_allowed_ids(tiny):
    """The first id of 4,000 rows against the softmax over the legal set, by a chi-square statistic."""
    vocab, grammar = tiny.vocab, Grammar(tiny.vocab)
    prompt = vocab.encode(prompts_of(tiny)[0], eos=False)
    requests = [Request(prompt, parse_plan("audio:1", vocab), 12, 3, i) for i in range(4000)]
    second = np.array([ids[1] for ids in generate(tiny.model, grammar, requests, {})])  # after <audio>: a code of level 0
    level = vocab.range("audio.0")
    with torch.inference_mode():
        ids = np.append(prompt, vocab.specials["<audio>"])
        logits = tiny.model(torch.from_numpy(ids)[None], span_positions=torch.from_numpy(grammar.span_positions(ids))[None])[
            0, -1
        ]
    expected = torch.softmax(logits[level.offset : level.stop].double(), 0).numpy() * 4000
    counts = np.bincount(second - level.offset, minlength=level.size)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < level.size - 1 + 5 * np.sqrt(2 * (level.size - 1))


def test_a_budget_that_is_too_small_is_said_before_anything_is_drawn(tiny):
    prompt = tiny.vocab.encode(prompts_of(tiny)[0], eos=False)
    plan = parse_plan("image:4x4", tiny.vocab)
    with pytest.raises(UserError, match=r"a budget of 10 tokens is too small: at least 21"):
        generate(tiny.model, Grammar(tiny.vocab), [Request(prompt, plan, 10)], {})


def test_python_prompts_of_every_kind_and_outputs_as_files(tiny, tmp_path, scenes_folder):
    from PIL import Image

    picture = Image.open(scenes_folder / "images" / "000000.png")
    wave = torch.zeros(1, 4000).uniform_(-0.1, 0.1)
    outputs = tiny.generate(
        [["a text", scenes_folder / "audio" / "000001.wav"], [picture, (wave, 8000)], [prompts_of(tiny)[1]]],
        modalities="text,image:3x2,audio:0.2s",
        n=2,
        seed=1,
        max_new_tokens=200,
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
    assert files[0].read_bytes() == (scenes_folder / "audio" / "000001.wav").read_bytes()  # the prompt's file as it was
