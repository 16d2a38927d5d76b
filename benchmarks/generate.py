"""Generation beside transformers' `generate`, with the same weights: image tokens per second.

    python benchmarks/generate.py [--quick] [--device cuda] [--sizes 10m]

Measured on two cores, a decoder of 10M: 1.88 times transformers with its dynamic cache and 1.36 times its compiled static one
at batch 1, 1.87 times the dynamic one at batch 16 with guidance.

The decoder is exported in Qwen3's layout and loaded by AutoModelForCausalLM of transformers. Its weights are random, because speed
does not depend on them; the logits of both are compared first. Each row continues a prompt of 32 text tokens by 256 tokens: for
unitok the codes of an image of 16 x 16, with begin, header and end; for transformers any tokens of the vocabulary, because
`generate` has no notion of images. Temperature 0.9 and top-k 100; fp32 on a CPU, bfloat16 on a GPU. Guidance: unitok compares with
a second sequence in the same batch; transformers runs doubled prompts in one batch (`doubled`), and its own `guidance_scale`,
which runs the model twice (`two passes`). Compilation and two warm runs are not counted.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import in_turns, serve, write_results

from unitok.generation_config import SamplingParams
from unitok.grammar import Grammar
from unitok.hardware import keep_large_blocks
from unitok.interop.decoder import export_decoder
from unitok.modalities import build_vocab
from unitok.model import Decoder
from unitok.model.copies import copy_for_generation
from unitok.model.decoder import DecoderConfig
from unitok.model.inference import InferenceDecoder
from unitok.model.presets import PRESETS
from unitok.plan import parse_plan
from unitok.sample.engine import generate
from unitok.sample.running import Request
from unitok.vocab import Vocab

PROMPT, SIDE, NEW = 32, 16, 256
TEMPERATURE, TOP_K, SCALE = 0.9, 100, 2.0


def vocabulary() -> Vocab:
    """4,096 text tokens, 1,024 image codes, four levels of 256 audio codes."""
    sizes = SimpleNamespace(size=4096, illegal=(), codebook_size=1024, fingerprint=str)
    return build_vocab(
        {"text": sizes, "image": sizes, "audio": SimpleNamespace(num_codebooks=4, codebook_size=256, fingerprint=str)}
    )


def make_models(work: Path, size: str) -> Path:
    """Random weights, as a decoder of ours and as transformers' Qwen3."""
    folder = work / size
    if not (folder / "hf").exists():
        torch.manual_seed(0)
        config: DecoderConfig = PRESETS[size].config
        vocab = vocabulary()
        decoder = Decoder(DecoderConfig(**(vars(config) | {"vocab_size": vocab.size})))
        for block in decoder.model.layers:  # they begin at zero
            for layer in (block.self_attn.o_proj, block.mlp.down_proj):
                torch.nn.init.normal_(layer.weight, std=0.02)
        torch.nn.init.normal_(decoder.lm_head.weight, std=0.02)
        decoder.save_pretrained(folder / "ours")
        export_decoder("hf-qwen3", decoder, vocab, folder / "hf")
    return folder


def prompts(batch: int) -> np.ndarray:
    vocab = vocabulary()
    text = np.random.default_rng(0).integers(0, 4000, (batch, PROMPT - 1)) + vocab.range("text").offset
    return np.concatenate([np.full((batch, 1), vocab.bos), text], 1)


def run_ours(folder: Path, batch: int, guided: bool, device: str) -> Any:
    trained = Decoder.from_pretrained(folder / "ours", device)
    decoder = copy_for_generation(trained.bfloat16() if device != "cpu" else trained)  # once, as a bundle does
    vocab = vocabulary()
    grammar, plan = Grammar(vocab), parse_plan(f"image:{SIDE}x{SIDE}", vocab)
    sampling = {"image": SamplingParams(TEMPERATURE, TOP_K, guidance_scale=SCALE if guided else 1.0)}

    def run() -> None:
        requests = [Request(ids, plan, NEW + 5, 0, i) for i, ids in enumerate(prompts(batch))]
        made = generate(decoder, grammar, requests, sampling)
        assert all(len(ids) == NEW + 4 for ids in made)

    return run


def run_theirs(folder: Path, batch: int, guidance: str, static: bool, device: str) -> Any:
    from transformers import AutoModelForCausalLM, LogitsProcessor

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype, attn_implementation="sdpa").to(device).eval()
    ids = torch.from_numpy(prompts(batch)).to(device)
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 2}
    options |= {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": 1.0}
    if static:
        from transformers import CompileConfig

        compiled = CompileConfig(fullgraph=False, dynamic=False)
        compiled._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": compiled, "disable_compile": False}
    if guidance == "two passes":
        options |= {"guidance_scale": SCALE, "negative_prompt_ids": ids[:, :1], "negative_prompt_attention_mask": mask[:, :1]}
    if guidance == "doubled":

        class Doubled(LogitsProcessor):
            """The second half is the first without its condition: both get one distribution and one random number."""

            def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                c, u = scores.log_softmax(-1).chunk(2)
                mixed = (u + SCALE * (c - u)) / TEMPERATURE
                least = mixed.topk(TOP_K, -1).values[:, -1:]
                mixed = mixed.masked_fill(mixed < least, -torch.inf)
                noise = -torch.empty_like(mixed).exponential_().log()
                return (mixed + noise).repeat(2, 1)  # the largest is a draw (Gumbel 1954)

        bos = torch.full_like(ids, 2)
        bos[:, -1] = ids[:, 0]
        alone = torch.zeros_like(mask)
        alone[:, -1] = 1
        ids, mask = torch.cat([ids, bos]), torch.cat([mask, alone])
        options |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "logits_processor": [Doubled()]}

    def run() -> None:
        made = model.generate(ids, attention_mask=mask, **options)
        assert made.shape[1] == PROMPT + NEW

    return run


def check_equal(folder: Path) -> float:
    """Largest difference of the two models' logits, ours as it generates: with its cache, the last tokens one by one."""
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(prompts(2))
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)(ids).logits
        ours = InferenceDecoder(Decoder.from_pretrained(folder / "ours"))
        cache, logits, start = ours.new_cache(2, PROMPT), [], 0
        for stop in (PROMPT - 4, *range(PROMPT - 3, PROMPT + 1)):
            positions = torch.arange(start, stop).expand(2, -1)
            logits.append(ours.step(ids[:, start:stop], positions, cache, stop, start=start) @ ours.head.T)
            start = stop
        return float((torch.cat(logits, 1) - theirs).abs().max())


def cases(size: str, quick: bool) -> list[tuple[int, str, str]]:
    """(batch, guidance, peer): guidance as theirs does it."""
    cases = [(1, "", "dynamic"), (1, "", "static"), (1, "doubled", "dynamic")]
    if size == "10m":
        cases += [(16, "", "dynamic"), (16, "doubled", "dynamic")]
    if size == "10m" and not quick:
        cases += [(1, "two passes", "dynamic"), (16, "two passes", "dynamic")]
    return cases


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="10M alone, fewer turns: about 5 minutes")
    p.add_argument("--sizes", nargs="+", default=None, help="presets")
    p.add_argument("--cases", nargs="+", help="only cases of these peers: dynamic, static")
    p.add_argument("--rounds", type=int, default=0, help="turns that count")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path)
    p.add_argument("--work", type=Path, help="folder for the models; default: a temporary one")
    p.add_argument("--only", help=argparse.SUPPRESS)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    if o.only:
        serve_one(json.loads(o.only))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = o.work or Path(temporary)
        rows = []
        for size in o.sizes or (["10m"] if o.quick else ["10m", "100m"]):
            folder = make_models(work, size)
            difference = check_equal(folder)
            for batch, guidance, peer in cases(size, o.quick):
                if o.cases and peer not in o.cases:
                    continue
                rows.append(measure(folder, size, batch, guidance, peer, o.device, o.rounds or (3 if o.quick else 5)))
                rows[-1]["logits_differ_by"] = difference
    write_results("generate", rows, o.device, o.out)


def measure(folder: Path, size: str, batch: int, guidance: str, peer: str, device: str, rounds: int) -> dict[str, Any]:
    """One case: both in a process each, taking turns."""
    common = {"folder": str(folder), "batch": batch, "guidance_scale": guidance, "device": device}
    words = {
        "ours": ["--only", json.dumps(common | {"peer": ""})],
        "theirs": ["--only", json.dumps(common | {"peer": peer})],
    }
    measured = in_turns(__file__, words, rounds)
    count = batch * NEW
    ours, theirs = (count / measured[name]["seconds"] for name in ("ours", "theirs"))
    name = f"{size}, batch {batch}{f', guidance ({guidance})' if guidance else ''}"
    row = {"case": name, "unit": "tokens/s", "ours": ours, "peer": peer, "theirs": theirs, "ratio": ours / theirs}
    print(row, flush=True)
    return row | {"ours_gb": measured["ours"]["gb"], "theirs_gb": measured["theirs"]["gb"]}


def serve_one(case: dict[str, Any]) -> None:
    folder, batch, guidance, device = (case[name] for name in ("folder", "batch", "guidance_scale", "device"))
    if case["peer"]:
        run = run_theirs(Path(folder), batch, guidance, case["peer"] == "static", device)
    else:
        keep_large_blocks()
        run = run_ours(Path(folder), batch, bool(guidance), device)
    began = time.perf_counter()
    run()  # compiles, where it does
    print(f"first run {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    run()
    serve(run, device)


if __name__ == "__main__":
    main()
