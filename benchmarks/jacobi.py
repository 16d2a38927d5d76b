"""Jacobi decoding of images beside plain sampling: speed, and whether the distribution is the same.

    python benchmarks/jacobi.py [--quick] [--bundle scenes] [--device cuda]

Measured on the built-in bundle, windows of 8 and 16: 0.59 to 1.18 times the images per second of plain sampling, whose tokens cost little
where sampling is compiled and the weights stay in a cache; no difference of the distributions is seen (p = 0.58 and 0.11).

Speed: one image at a time from captions of scenes, with and without, taking turns; the ratio of
seconds, and passes of the model per image. Distribution: images of one caption, `--count` sampled plainly in batches and as many by
Jacobi decoding, with other random numbers; a two-sample chi-square of their codes by position, its p-value by permutation.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_results

from unitok.api import Unitok
from unitok.generation_config import SamplingParams
from unitok.grammar import Grammar
from unitok.hardware import keep_large_blocks
from unitok.plan import PlanItem
from unitok.sample.engine import Session, generate
from unitok.sample.running import Request
from unitok.scenes.world import caption, draw_scene

SETTINGS = {
    "temperature 0.4, guidance 1.5 (the demo's)": SamplingParams(0.4, top_p=0.95, guidance_scale=1.5),
    "temperature 1": SamplingParams(1.0),
}


def main() -> None:
    keep_large_blocks()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer images: about 3 minutes")
    p.add_argument("--bundle", default="scenes", help="with image tokens of a grid; default: the built-in one")
    p.add_argument("--count", type=int, default=0, help="images on each side for the distribution; 0: 600, quick 150")
    p.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16])
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    bench = _Bench(Unitok.from_pretrained(o.bundle, o.device), 6 if o.quick else 24)
    rows = [bench.speed(name, params, window) for name, params in SETTINGS.items() for window in o.windows]
    count = o.count or (150 if o.quick else 600)
    rows += [bench.distribution(name, params, max(o.windows), count) for name, params in SETTINGS.items()]
    write_results("jacobi", rows, o.device, o.out)


class _Bench:
    def __init__(self, unitok: Unitok, images: int):
        self.unitok, self.grammar = unitok, Grammar(unitok.vocab)
        rng = np.random.default_rng(0)
        captions = [caption(draw_scene(rng, 2)) for _ in range(images)]
        self.prompts = [unitok.vocab.encode(unitok.read_prompt([text]), eos=False) for text in captions]
        side = unitok.require("image").config.resolution // unitok.require("image").config.stride
        self.plan = [PlanItem("image", (side, side))]
        self.codes = side * side

    def make(self, requests: list[Request], params: SamplingParams, window: int) -> list[np.ndarray]:
        return generate(self.unitok.require("model"), self.grammar, requests, {"image": params}, jacobi_window=window)

    def speed(self, name: str, params: SamplingParams, window: int) -> dict[str, Any]:
        """Seconds per image, one at a time, in turns."""
        seconds: dict[int, list[float]] = {0: [], window: []}
        passes = []
        for i, prompt in enumerate(self.prompts):
            for which in seconds:
                session = Session(self.unitok.require("model"), self.grammar, {"image": params}, jacobi_window=which)
                began = time.perf_counter()
                session.add(Request(prompt, self.plan, self.codes + 8, 1, i))
                while session.waiting:
                    session.step()
                if i:  # the first was for warming up
                    seconds[which].append(time.perf_counter() - began)
                if which:
                    passes.append(session.passes)
        plain, ours = (statistics.median(seconds[which]) for which in seconds)
        row = {"case": f"{name}, window {window}", "unit": "images/s", "ours": 1 / ours, "peer": "plain", "theirs": 1 / plain}
        row |= {"ratio": plain / ours, "passes": statistics.mean(passes), "codes": self.codes}
        print(row, flush=True)
        return row

    def distribution(self, name: str, params: SamplingParams, window: int, count: int) -> dict[str, Any]:
        """Whether both ways draw from one distribution."""
        prompt = self.prompts[0]
        sides = []
        for seed, which in ((1, 0), (2, window)):
            requests = [Request(prompt, self.plan, self.codes + 8, seed, i) for i in range(count)]
            made = self.make(requests, params, 0) if not which else [self.make([r], params, which)[0] for r in requests]
            sides.append(np.stack([ids[3 : 3 + self.codes] for ids in made]))
        statistic, p = permutation_test(*sides)
        row: dict[str, Any] = {"case": f"{name}: distribution", "unit": "p-value", "ours": p, "peer": None, "theirs": None}
        row |= {"ratio": None, "images": count, "chi_square": statistic}
        print(row, flush=True)
        return row


def permutation_test(a: np.ndarray, b: np.ndarray, times: int = 2000) -> tuple[float, float]:
    """Two samples of codes of images [N, positions] -> the chi-square of their counts by position and code, and its p-value.

    The codes of an image depend on one another, so no table has the distribution of the statistic: images are dealt to the two
    sides anew `times` times, which is what it would be if both came from one distribution.
    """
    both = np.concatenate([a, b])
    cells = []
    for position in range(both.shape[1]):
        names, counts = np.unique(both[:, position], return_counts=True)
        cells.append((both[:, position, None] == names[counts >= 10]).astype(np.float32))
    hot = np.concatenate(cells, 1)  # [2 N, cells]
    totals = hot.sum(0)

    def chi_square(sides: np.ndarray) -> np.ndarray:
        return ((2 * (sides @ hot) - totals) ** 2 / totals).sum(-1)

    rng = np.random.default_rng(0)
    labels = (np.arange(len(both)) < len(a)).astype(np.float32)
    observed = float(chi_square(labels[None])[0])
    dealt = chi_square(np.stack([rng.permutation(labels) for _ in range(times)]))
    return observed, float((1 + (dealt >= observed).sum()) / (1 + times))


if __name__ == "__main__":
    main()
