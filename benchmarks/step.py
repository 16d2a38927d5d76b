"""What a token costs on a CPU, by phase, against the bytes that it must read.

    python benchmarks/step.py [--sizes 10m 100m] [--dtypes float32 bfloat16 int8] [--images 1]

Measured on two cores with AVX-512, a decoder of 10M: a token takes 1.19 ms in float32, 0.49 in bfloat16 and 0.44 in int8. In float32 the
matrices are read with 39 to 45 GB/s of the 51 that memory has, so nothing is left but fewer bytes; bfloat16's 23 MB stay in the last-level
cache, and int8 is bound by its conversions. Sampling takes 1 to 3 %, all of Python, grammar and prompt 1 to 4 %.

One sequence at position 160, the image's 1,024 rows of the head, temperature 0.9, top-k 100; random weights. Times are of the thread that
asks, waiting for the others included, mean of 256 tokens. `GB/s` is what the phase reads by that time. `memory` is what two threads read
of an array of 1 GB here, the least time that `bytes` can take where no cache holds the weights; a model below the size of the last-level cache reads faster.
"""

import argparse
import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_results
from generate import NEW, PROMPT, SIDE, TEMPERATURE, TOP_K, vocabulary

from unitok.generation_config import SamplingParams
from unitok.grammar import Grammar
from unitok.model import Decoder, DecoderConfig
from unitok.model.native import build
from unitok.model.native.decoder import DTYPES, NativeDecoder
from unitok.model.presets import PRESETS
from unitok.plan import parse_plan
from unitok.sample.engine import generate
from unitok.sample.running import Request

PHASES = (
    "embedding",
    "queries, keys, values",
    "",
    "attention",
    "output",
    "SwiGLU: gate, up",
    "SwiGLU: down",
    "last norm",
    "head",
    "sampling",
)


def bytes_read(config: DecoderConfig, size: int, images: int) -> dict[str, float]:
    """Bytes that a step reads by phase: weights, and of each image keys and values of 160 positions, in fp32, with smaller weights in bfloat16."""
    c, layers = config, config.num_hidden_layers
    heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        "queries, keys, values": size * layers * c.hidden_size * (heads + 2 * groups),
        "attention": float(images * max(2, size) * layers * 2 * groups * (PROMPT + NEW // 2)),
        "output": size * layers * c.hidden_size * heads,
        "SwiGLU: gate, up": size * layers * c.hidden_size * 2 * c.intermediate_size,
        "SwiGLU: down": size * layers * c.hidden_size * c.intermediate_size,
        "head": size * c.hidden_size * 1024,
    }


def memory_gb_per_second() -> float:
    """What two threads read of an array that no cache holds, the best of five."""
    x, best = torch.ones(1 << 28), 0.0
    for _ in range(5):
        began = time.perf_counter()
        x.sum()
        best = max(best, x.nbytes / 1e9 / (time.perf_counter() - began))
    return best


def measure(size: str, dtype: str, images: int) -> list[dict[str, Any]]:
    compiled = ctypes.CDLL(str(build("-DUNITOK_PROFILE")))
    vocab = vocabulary()
    config = DecoderConfig(**(vars(PRESETS[size].config) | {"vocab_size": vocab.size}))
    torch.manual_seed(0)
    copy = NativeDecoder(Decoder(config), dtype, compiled)
    grammar, plan = Grammar(vocab), parse_plan(f"image:{SIDE}x{SIDE}", vocab)
    prompt = np.array([vocab.bos, *range(300, 300 + PROMPT - 1)])

    def run() -> float:
        began = time.perf_counter()
        requests = [Request(prompt, plan, NEW + 5, seed) for seed in range(images)]
        generate(copy, grammar, requests, {"image": SamplingParams(TEMPERATURE, TOP_K)})
        return time.perf_counter() - began

    run()
    seconds = (ctypes.c_double * len(PHASES))()
    compiled.unitok_seconds(seconds)
    total = sum(run() for _ in range(4))
    compiled.unitok_seconds(seconds)
    read, rows = bytes_read(config, DTYPES[dtype], images), []
    for name, value in zip(PHASES, seconds, strict=True):
        if name:
            us, mb = 1e6 * value / (4 * NEW), read.get(name, 0.0) / 1e6
            rows.append({"case": f"{size}, {dtype}: {name}", "us": us, "MB": mb, "GB/s": mb / us * 1e3 if mb else None})
    us, mb = 1e6 * total / (4 * NEW), sum(read.values()) / 1e6
    rows.append({"case": f"{size}, {dtype}: outside (prompt, grammar, Python)", "us": us - sum(row["us"] for row in rows)})
    rows.append({"case": f"{size}, {dtype}: a token", "us": us, "MB": mb, "GB/s": mb / us * 1e3})
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", nargs="+", default=["10m", "100m"])
    p.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    p.add_argument("--images", type=int, default=1, help="that are generated at once")
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows = [row for size in o.sizes for dtype in o.dtypes for row in measure(size, dtype, o.images)]
    rows.append({"case": "memory", "GB/s": memory_gb_per_second()})
    write_results("step", rows, "cpu", o.out)


if __name__ == "__main__":
    main()
