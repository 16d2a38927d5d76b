"""Generation beside transformers' `generate` and llama.cpp, with the same weights: image tokens per second.

    python benchmarks/generate.py [--quick] [--device cuda] [--sizes 10m] [--peers dynamic static F32 F16 Q8_0]

Measured on two cores with AVX-512, a decoder of 10M: 8.5 times transformers with its dynamic cache at batch 1, 4.0 times at batch 16 with
guidance; 1.13, 1.77 and 1.80 times llama.cpp at batch 1 with weights of four, two and one byte, 1.61, 1.84 and 1.34 times at batch 16. Of
100M at batch 1: 3.1 times transformers, 1.08, 1.39 and 1.52 times llama.cpp.

The decoder is exported in Qwen3's layout, loaded by AutoModelForCausalLM of transformers, and as GGUF by llama.cpp (llama-cpp-python, its
C interface without Python between tokens but the call; its own defaults). Its weights are random, because speed does not depend on them;
logits are compared first. Each row continues a prompt of 32 text tokens by 256 tokens: for unitok the codes of an image of 16 x 16, with
begin, header and end, by grammar; for the others any tokens of the vocabulary. Temperature 0.9 and top-k 100; fp32 on a CPU, bfloat16 on
a GPU, and beside llama.cpp's F16 and Q8_0 our bfloat16 and int8. Guidance: unitok compares with a second sequence in the same batch;
transformers runs doubled prompts in one batch (`doubled`), and its own `guidance_scale`, which runs the model twice (`two passes`).
Compilation and two warm runs are not counted.
"""

import argparse
import json
import sys
import tempfile
import time
from importlib.util import find_spec
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
from unitok.model.native.decoder import NativeDecoder
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
        for weights in ("f32", "f16", "q8_0") if find_spec("gguf") else ():
            export_decoder("gguf", decoder, vocab, folder / weights, weights=weights)
    return folder


def prompts(batch: int) -> np.ndarray:
    vocab = vocabulary()
    text = np.random.default_rng(0).integers(0, 4000, (batch, PROMPT - 1)) + vocab.range("text").offset
    return np.concatenate([np.full((batch, 1), vocab.bos), text], 1)


def run_ours(folder: Path, batch: int, guided: bool, device: str, weights: str = "float32") -> Any:
    trained = Decoder.from_pretrained(folder / "ours", device)
    half = device != "cpu" or weights == "bfloat16"
    decoder = copy_for_generation(
        trained.bfloat16() if half else trained, "int8" if weights == "int8" else ""
    )  # once, as a bundle does
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


class Llama:
    """llama.cpp's C interface: a model, and a context for some sequences."""

    def __init__(self, path: Path, sequences: int, threads: int, exact: bool = False):
        import llama_cpp as c

        self.c, self.sequences = c, sequences
        c.llama_backend_init()
        self._quiet = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._quiet, None)
        self.model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        options = c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_seq_max = 512 * sequences, 2048, sequences
        options.n_threads = options.n_threads_batch = threads
        if exact:  # keys and values in fp32; the defaults are F16
            options.type_k = options.type_v = c.GGML_TYPE_F32
            options.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = c.llama_init_from_model(self.model, options)
        self.batch = c.llama_batch_init(2048, 0, 1)

    def decode(self, tokens: list[tuple[int, int, int]], wanted: set[int]) -> None:
        """Tokens as (id, position, sequence); logits of the tokens whose index is wanted."""
        b = self.batch
        b.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, i in wanted
            b.seq_id[i][0] = sequence
        assert self.c.llama_decode(self.context, b) == 0

    def forget(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)


def run_llama(folder: Path, batch: int, kind: str, threads: int) -> Any:
    llama = Llama(folder / kind.lower() / f"decoder-{kind.lower()}.gguf", batch, threads)
    c, given = llama.c, prompts(batch).tolist()
    chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
    for sampler in (c.llama_sampler_init_top_k(TOP_K), c.llama_sampler_init_temp(TEMPERATURE), c.llama_sampler_init_dist(0)):
        c.llama_sampler_chain_add(chain, sampler)

    def run() -> None:
        llama.forget()
        tokens = [(token, i, sequence) for sequence, row in enumerate(given) for i, token in enumerate(row)]
        last = [PROMPT * (sequence + 1) - 1 for sequence in range(batch)]
        for position in range(PROMPT, PROMPT + NEW + 1):
            llama.decode(tokens, set(last))
            drawn = [c.llama_sampler_sample(chain, llama.context, i) for i in last]
            tokens = [(token, position, sequence) for sequence, token in enumerate(drawn)]
            last = list(range(batch))

    return run


def check_equal(folder: Path, device: str) -> dict[str, float]:
    """Largest difference of the models' logits, ours as it generates: with its cache, the last tokens one by one."""
    from transformers import AutoModelForCausalLM

    ids, found = torch.from_numpy(prompts(2)).to(device), {}
    copies: tuple[Any, ...] = (InferenceDecoder, NativeDecoder) if device == "cpu" else (InferenceDecoder,)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).to(device)(ids).logits
        for copy in copies:
            ours = copy(Decoder.from_pretrained(folder / "ours", device))
            head = ours.head_of(((0, ours.config.vocab_size),))
            cache, logits, start = ours.new_cache(2, PROMPT), [], 0
            for stop in (PROMPT - 4, *range(PROMPT - 3, PROMPT + 1)):
                positions = torch.arange(start, stop, device=device).expand(2, -1)
                states = ours.step(ids[:, start:stop], positions, cache, stop, start=start)
                logits.append(head(states.flatten(0, 1)).view(2, stop - start, -1))
                start = stop
            found[f"transformers, {copy.__name__}"] = float((torch.cat(logits, 1) - theirs).abs().max())
    try:
        llama = Llama(folder / "f32" / "decoder-f32.gguf", 1, 2, exact=True)
    except ImportError:
        return found
    llama.decode([(token, i, 0) for i, token in enumerate(ids[0].tolist())], {PROMPT - 1})
    last = np.ctypeslib.as_array(llama.c.llama_get_logits_ith(llama.context, PROMPT - 1), shape=(theirs.shape[-1],))
    return found | {"llama.cpp F32": float(np.abs(last - theirs[0, -1].numpy()).max())}


#: Types of llama.cpp's weights, and ours of as many bytes.
LLAMA = {"F32": "float32", "F16": "bfloat16", "Q8_0": "int8"}


def cases(size: str, quick: bool, device: str) -> list[tuple[int, str, str]]:
    """(batch, guidance, peer): guidance as theirs does it."""
    cases = [(1, "", "dynamic"), (1, "", "static"), (1, "doubled", "dynamic"), *((1, "", kind) for kind in LLAMA)]
    if device != "cpu":
        return [*cases[:3], (64, "doubled", "dynamic")]
    if size == "10m":
        cases += [(16, "", "dynamic"), (16, "doubled", "dynamic"), *((16, "", kind) for kind in LLAMA)]
    if size == "10m" and not quick:
        cases += [(1, "two passes", "dynamic"), (16, "two passes", "dynamic")]
    return cases


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="10M alone, fewer turns: about 5 minutes")
    p.add_argument("--sizes", nargs="+", default=None, help="presets")
    p.add_argument("--peers", nargs="+", help="only these: dynamic, static (of transformers), F32, F16, Q8_0 (of llama.cpp)")
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
            differences = check_equal(folder, o.device)
            print(differences, flush=True)
            for batch, guidance, peer in cases(size, o.quick, o.device):
                if o.peers and peer not in o.peers:
                    continue
                rows.append(measure(folder, size, batch, guidance, peer, o.device, o.rounds or (3 if o.quick else 5)))
                rows[-1]["logits_differ_by"] = max(differences.values())
    write_results("generate", rows, o.device, o.out)


def measure(folder: Path, size: str, batch: int, guidance: str, peer: str, device: str, rounds: int) -> dict[str, Any]:
    """One case: both in a process each, taking turns."""
    common = {"folder": str(folder), "batch": batch, "guidance_scale": guidance, "device": device}
    words = {
        "ours": ["--only", json.dumps(common | {"peer": "", "weights": LLAMA.get(peer, "float32")})],
        "theirs": ["--only", json.dumps(common | {"peer": peer})],
    }
    measured = in_turns(__file__, words, rounds)
    count = batch * NEW
    ours, theirs = (count / measured[name]["seconds"] for name in ("ours", "theirs"))
    name = f"{size}, batch {batch}{f', guidance ({guidance})' if guidance else ''}"
    if peer in LLAMA:
        name, peer = f"{name}, weights {LLAMA[peer]}", f"llama.cpp {peer}"
    row = {"case": name, "unit": "tokens/s", "ours": ours, "peer": peer, "theirs": theirs, "ratio": ours / theirs}
    print(row, flush=True)
    return row | {"ours_gb": measured["ours"]["gb"], "theirs_gb": measured["theirs"]["gb"]}


def serve_one(case: dict[str, Any]) -> None:
    folder, batch, guidance, device = (case[name] for name in ("folder", "batch", "guidance_scale", "device"))
    if case["peer"] in LLAMA:
        run = run_llama(Path(folder), batch, case["peer"], torch.get_num_threads())
    elif case["peer"]:
        run = run_theirs(Path(folder), batch, guidance, case["peer"] == "static", device)
    else:
        keep_large_blocks()
        run = run_ours(Path(folder), batch, bool(guidance), device, case["weights"])
    began = time.perf_counter()
    run()  # compiles, where it does
    print(f"first run {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    run()
    serve(run, device)


if __name__ == "__main__":
    main()
