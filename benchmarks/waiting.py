"""How OpenMP's threads wait, on a quiet and on a busy machine: training, encoding and generation per second.

    python benchmarks/waiting.py [--quick] [--rounds 3] [--busy 2]

Measured: beside two other programs 1.3 to 1.6 times the speed of libgomp's default, on a quiet machine 0.78 to 1.01 times.

Three policies take turns, each in a process, because OpenMP reads them when it loads: libgomp's default (threads look for work
300,000 times before they sleep), `OMP_WAIT_POLICY=passive` (they sleep at once), and unitok's (`unitok.hardware.bound_waiting`).
A busy machine: `--busy` processes that only count run beside it. Medians of the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import write_results

from unitok.hardware import SPIN_COUNT

POLICIES = {"libgomp default": {}, "passive": {"OMP_WAIT_POLICY": "passive"}, "ours": {"GOMP_SPINCOUNT": str(SPIN_COUNT)}}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one round")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--busy", type=int, default=2, help="processes that only count, on the busy machine")
    p.add_argument("--out", type=Path, help="default: benchmarks/results/waiting.json")
    p.add_argument("--only", metavar="BUNDLE", help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.only:
        print(json.dumps(measure(o.only)))
        return
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "unitok", "bundle", f"{folder}/tiny", "--untrained", "tiny"], check=True)
        for machine, others in (("quiet", 0), (f"busy ({o.busy} others)", o.busy)):
            load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
            try:
                runs_of = in_turns(f"{folder}/tiny", 1 if o.quick else o.rounds)
            finally:
                for process in load:
                    process.kill()
            for task in runs_of["ours"]:
                theirs, passive, ours = (runs_of[name][task] for name in POLICIES)
                row = {"case": f"{task}, {machine}", "unit": "per second", "ours": ours, "peer": "libgomp default"}
                rows.append(row | {"theirs": theirs, "ratio": ours / theirs, "passive": passive})
    write_results("waiting", rows, out=o.out)


def in_turns(bundle: str, rounds: int) -> dict[str, dict[str, float]]:
    """For each policy the median of each task, per second."""
    runs_of: dict[str, list[dict[str, float]]] = {name: [] for name in POLICIES}
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    for _ in range(rounds):
        for name, setting in POLICIES.items():
            command = [sys.executable, __file__, "--only", bundle]
            done = subprocess.run(command, env=clean | setting, capture_output=True, text=True, check=True)
            runs_of[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: {task: statistics.median(r[task] for r in runs) for task in runs[0]} for name, runs in runs_of.items()}


def measure(bundle: str) -> dict[str, float]:
    """Training steps, images encoded and images generated per second, in this process."""
    import torch

    from unitok import Unitok
    from unitok.tokenizers.image import ImageTokenizer, ImageTokenizerConfig

    torch.manual_seed(0)
    unitok = Unitok.from_pretrained(bundle)
    network = ImageTokenizer(ImageTokenizerConfig(ch=32, ch_mult=(1, 2, 4), resolution=32, patch=1))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    pixels = torch.rand(16, 3, 32, 32) * 2 - 1

    def step() -> None:
        loss = (network.decoder(network.encoder(pixels)) - pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {
        "training steps": per_second(step),
        "images encoded": len(pixels) * per_second(lambda: unitok.require("image").encode(pixels)),
        "images generated": per_second(lambda: unitok.generate(["a red circle"], modalities="image", seed=0)),
    }


def per_second(run: Callable[[], Any], seconds: float = 2.0) -> float:
    """How often something is done, after once for warming up."""
    run()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        run()
        count += 1
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
