"""Promises of compiled generation: the tokens of PyTorch's, at any number of threads, in any process; smaller weights are close to it."""

import ctypes
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from unitok.api import Unitok
from unitok.errors import UserError
from unitok.generation_config import SamplingParams
from unitok.grammar import Grammar
from unitok.model import Decoder, DecoderConfig
from unitok.model import native as compiled
from unitok.model.copies import copy_for_generation, fastest_weights
from unitok.model.inference import InferenceDecoder
from unitok.model.native.decoder import NativeDecoder
from unitok.plan import parse_plan
from unitok.sample.engine import generate
from unitok.sample.running import Request

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler")

PARAMS = {
    "plain": SamplingParams(1.0),
    "greedy": SamplingParams(0.0),
    "top-k": SamplingParams(0.9, top_k=20),
    "top-p": SamplingParams(1.1, top_p=0.8),
    "min-p": SamplingParams(1.0, min_p=0.1),
    "all filters": SamplingParams(0.8, top_k=40, top_p=0.95, min_p=0.02),
    "repetition penalty": SamplingParams(1.0, repetition_penalty=1.3),
    "guidance": SamplingParams(1.0, top_k=30, guidance_scale=3.0),
    "guidance three ways": SamplingParams(0.7, guidance_scale=2.0, media_guidance_scale=1.5),
    "guidance for a while": SamplingParams(1.0, guidance_scale=2.0, guidance_schedule="linear"),
}


def requests_of(vocab, plan="text,image:6x7,audio:5", count=5):
    """Requests whose prompts differ in length, so that they stand at different positions and in different spans."""
    first = vocab.range("text").offset
    prompts = [np.array([vocab.bos, *range(first + 10, first + 13 + 2 * i)]) for i in range(count)]
    return [Request(prompt, parse_plan(plan, vocab), 120, 1, i, media=prompt[:2]) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def wild(tiny):
    """The small decoder with random weights throughout: an untrained one predicts every token alike."""
    torch.manual_seed(0)
    decoder = Decoder(tiny.model.config)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            p.normal_(float("norm" in name), 0.1)
    return decoder.eval()


@pytest.mark.parametrize("name", PARAMS)
def test_sampled_tokens_are_those_of_pytorch(tiny, wild, name):
    grammar, sampling = Grammar(tiny.vocab), dict.fromkeys(tiny.vocab.spans, PARAMS[name])
    for plan in ("text,image:6x7,audio:5", "image:4x4,text"):
        requests = requests_of(tiny.vocab, plan)
        wanted, found = (
            generate(copy, grammar, requests, sampling, batch_size=3) for copy in (InferenceDecoder(wild), NativeDecoder(wild))
        )
        # Both round differently, which shows where a random number lies at the very border of two tokens: about once in 100,000.
        assert sum(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)) >= len(found) - 1
        assert len({tuple(x.tolist()) for x in found}) == len(found)


def test_every_number_of_threads_gives_the_same_bits_also_to_two_callers_at_once(wild):
    ids, before = torch.randint(0, 300, (70, 3)), torch.get_num_threads()  # more rows than go through the layers together

    def states():
        copy = NativeDecoder(wild)
        return copy.step(ids, torch.arange(3).expand(70, -1), copy.new_cache(70, 4), 3, torch.zeros_like(ids))

    try:
        torch.set_num_threads(1)
        wanted, found = states(), []
        torch.set_num_threads(3)  # more than there may be cores
        callers = [threading.Thread(target=lambda: found.append(states())) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(found) == 2
        assert all(torch.equal(x, wanted) for x in found)
    finally:
        torch.set_num_threads(before)


def test_an_output_is_the_same_bit_by_bit_whatever_else_is_in_the_batch(tiny, wild):
    grammar, copy = Grammar(tiny.vocab), NativeDecoder(wild)
    sampling = dict.fromkeys(tiny.vocab.spans, PARAMS["all filters"])
    alone = [generate(copy, grammar, [request], sampling)[0].tolist() for request in requests_of(tiny.vocab)]
    for size in (0, 2, 3):
        together = generate(copy, grammar, requests_of(tiny.vocab), sampling, batch_size=size)
        assert [x.tolist() for x in together] == alone
    others = ({"guidance_scale": 2.0}, {"guidance_scale": 2.0, "media_guidance_scale": 3.0}, {"repetition_penalty": 1.2})
    for other in others:
        mixed = requests_of(tiny.vocab)
        for request in mixed[1:]:
            request.sampling = dict.fromkeys(tiny.vocab.spans, SamplingParams(0.8, **other))
        assert generate(copy, grammar, mixed, sampling)[0].tolist() == alone[0]
    ids = torch.randint(0, 300, (7, 1))
    states = [copy.step(x, torch.zeros_like(x), copy.new_cache(len(x), 1), 1, torch.zeros_like(x)) for x in (ids, ids[3:4])]
    assert torch.equal(states[0][3:4], states[1])


def test_prompts_of_any_lengths_are_read_together(wild):
    """70 prompts of 1 to 70 tokens, in two parts each, of which blocks of rows hold parts of several."""
    copy = NativeDecoder(wild)
    rows = [torch.randint(0, 300, (length,)).tolist() for length in range(1, 71)]
    cache = copy.new_cache(70, 70)
    halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]
    first = [i for i in range(70) if halves[i][0]]
    part = cache.part(1, 70)  # all but the slot whose first half is empty
    copy.read([halves[i][0] for i in first], [[0] * len(halves[i][0]) for i in first], [0] * len(first), part)
    found = copy.read([b for _, b in halves], [[0] * len(b) for _, b in halves], [len(a) for a, _ in halves], cache)
    for i in (0, 1, 30, 69):
        ids = torch.tensor(rows[i])[None]
        wanted = wild.hidden(ids, span_positions=torch.zeros_like(ids))[0, -1]
        torch.testing.assert_close(found[i], wanted, atol=1e-4, rtol=1e-3)


def _in_a_child(copy, ids, queue):
    queue.put(copy.step(ids, torch.zeros_like(ids), copy.new_cache(1, 2), 1, torch.zeros_like(ids)).numpy())


def test_a_forked_process_generates_too(wild):
    copy, ids = NativeDecoder(wild), torch.tensor([[7]])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    wanted = copy.step(ids, torch.zeros_like(ids), copy.new_cache(1, 2), 1, torch.zeros_like(ids))
    child = context.Process(target=_in_a_child, args=(copy, ids, queue))
    child.start()
    assert np.array_equal(queue.get(timeout=60), wanted.numpy())
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize(("weights", "within"), [("bfloat16", 0.02), ("int8", 0.1)])
def test_smaller_weights_predict_nearly_the_same(weights, within):
    """The built-in model on its own text and image: log-probabilities differ little, and the likeliest token hardly ever."""
    bundle = Unitok.from_pretrained("scenes")
    prompt = "a large red circle left of a small blue square on a white background"
    drawn = bundle.generate(prompt, modalities="image", temperature=0.0)[0]
    ids = torch.from_numpy(bundle.vocab.encode(drawn.document))[None]
    spans = torch.from_numpy(Grammar(bundle.vocab).span_positions(ids[0].numpy()))[None]

    def log_probabilities(copy):
        length = ids.shape[1]
        states = copy.step(ids, torch.arange(length)[None], copy.new_cache(1, length), length, spans, start=0)
        return copy.head_of(((0, bundle.vocab.size),))(states[0]).log_softmax(-1)

    exact, close = (log_probabilities(NativeDecoder(bundle.model, kind)) for kind in ("float32", weights))
    likely = exact > -7  # of a thousandth or more
    assert (exact - close)[likely].abs().mean() < within
    assert (exact.argmax(-1) == close.argmax(-1)).float().mean() > 0.95


def test_a_bundle_turns_into_smaller_weights_and_back(tiny, bundle_folder):
    def drawn(bundle):
        return bundle.generate("a", modalities="image:4x4", seed=3)[0].document.segments[-1].codes.tolist()

    bundle = Unitok.from_pretrained(bundle_folder, dtype="int8")
    assert bundle.dtype == torch.int8
    assert bundle.inference.weights == "int8"
    assert bundle.model.lm_head.weight.dtype == torch.float32  # what is saved and trained is as it was
    assert drawn(bundle.to("float32")) == drawn(tiny)
    assert bundle.to(torch.bfloat16).inference.weights == "bfloat16"
    assert Unitok.from_pretrained(bundle_folder, dtype="auto").inference.weights in ("float32", "bfloat16", "int8")
    assert fastest_weights(tiny.model) in ("float32", "bfloat16", "int8")
    with pytest.raises(UserError, match="int16: give a type of floating point"):
        bundle.to("int16")


def test_without_a_compiler_generation_is_in_pytorch_and_int8_says_what_is_missing(tiny, monkeypatch):
    monkeypatch.setattr(compiled, "_load", lambda: (None, "no C++ compiler"))
    assert isinstance(copy_for_generation(tiny.model), InferenceDecoder)
    assert fastest_weights(tiny.model) == ""
    with pytest.raises(UserError, match=r"dtype int8: .*no C\+\+ compiler"):
        copy_for_generation(tiny.model, "int8")


def test_what_is_compiled_is_kept_and_a_compiler_that_fails_is_no_error(tmp_path):
    def kinds(*settings: dict[str, str]) -> list[str]:
        """What generates in a new process, with each of some settings of its environment."""
        code = f"""
import os
from unitok.model import Decoder, DecoderConfig, native
from unitok.model.copies import copy_for_generation
native.FLAGS[native.FLAGS.index("-O3")] = "-O0"  # compiles in a quarter of the time
for more in {settings}:
    os.environ.update(more)
    native._load.cache_clear()
    print(type(copy_for_generation(Decoder(DecoderConfig(10, 32, 1, 32)))).__name__)
"""
        env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout.split()

    own = os.environ.get("CXX", "")
    assert kinds({"CXX": "false"}, {"CXX": own}, {"UNITOK_NATIVE": "0"}) == [
        "InferenceDecoder",
        "NativeDecoder",
        "InferenceDecoder",
    ]
    (made,) = (tmp_path / "unitok").iterdir()
    written = made.stat().st_mtime_ns
    assert kinds({}) == ["NativeDecoder"]
    assert made.stat().st_mtime_ns == written
    made.write_bytes(b"")
    (tmp_path / "file").touch()
    # Compiled once more; and without a cache, in a folder of the process.
    assert kinds({}, {"XDG_CACHE_HOME": str(tmp_path / "file")}) == ["NativeDecoder", "NativeDecoder"]
    assert made.stat().st_size > 10_000


@pytest.mark.skipif(platform.machine() != "x86_64", reason="processors of x86")
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_smaller_processors_compute_the_same(level, wild, tmp_path):
    """Built for processors without AVX-512, and without AVX2; this one runs both."""
    made = tmp_path / "decoder.so"
    subprocess.run([compiled.compiler(), *compiled.FLAGS, f"-march={level}", str(compiled.SOURCE), "-o", str(made)], check=True)
    ids = torch.randint(0, 300, (7, 5))
    where, zeros = torch.arange(5).expand(7, -1), torch.zeros_like(ids)
    for weights, within in (("float32", 1e-4), ("bfloat16", 0.3), ("int8", 1.0)):
        copies = NativeDecoder(wild, weights, ctypes.CDLL(str(made))), NativeDecoder(wild, weights)
        found, wanted = (copy.step(ids, where, copy.new_cache(7, 8), 5, zeros) for copy in copies)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
        exact = wild.hidden(ids, span_positions=zeros).detach()
        assert (found - exact).abs().max() < within


def test_a_decoder_with_one_head_and_odd_sizes_and_one_token():
    torch.manual_seed(0)
    decoder = Decoder(replace(DecoderConfig(33, 34, 1, 35, 1, 1, head_dim=18, max_position_embeddings=4))).eval()
    with torch.no_grad():
        for p in decoder.parameters():
            p.normal_(0, 0.3)
        copy, ids = NativeDecoder(decoder), torch.tensor([[32]])
        found = copy.head_of(((0, 33),))(copy.step(ids, torch.zeros_like(ids), copy.new_cache(1, 1), 1)[0])
        torch.testing.assert_close(found, decoder(ids)[0], atol=2e-5, rtol=1e-4)
