"""What accelerators can do, by their makers' data sheets; what this CPU can, and how its threads wait for one another.

Importing it imports nothing, so that it may be asked before PyTorch loads.
"""

import os
import time

#: Rounds for which a thread of GNU OpenMP looks for work before it sleeps. At the library's own 300,000 (no OMP_WAIT_POLICY) a
#: thread that waits takes the core of one that works: beside other programs a training lost from a third to nearly all of its steps.
#: Sleeping at once (OMP_WAIT_POLICY=passive) costs up to half of a quiet machine's speed. See benchmarks/waiting.py, docs/notes.md.
SPIN_COUNT = 3000

#: Peak FLOPs a second in bf16, dense, by the part of the device's name that tells it.
HARDWARE = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "l40s": 362e12, "rtx4090": 165e12}


def peak_flops(device_name: str) -> float | None:
    """Of a device as the driver names it ("NVIDIA H100 80GB HBM3"); None where it is not known."""
    name = device_name.lower().replace(" ", "")
    return next((flops for key, flops in HARDWARE.items() if key in name), None)


def fast_bfloat16() -> bool:
    """Whether a training step in bfloat16 beats float32 on this CPU, measured on a small convolution in both."""
    import torch

    x, layer = torch.randn(16, 64, 16, 16), torch.nn.Conv2d(64, 64, 3, padding=1)
    seconds: dict[bool, float] = {}
    for enabled in (False, True):
        for attempt in range(3):
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                layer(x).float().square().mean().backward()
            taken = time.perf_counter() - began
            seconds[enabled] = taken if attempt == 0 else min(taken, seconds[enabled])
    return seconds[True] < 0.8 * seconds[False]


def bound_waiting() -> str:
    """Let OpenMP's threads look for work for a short time only, unless the user said how they wait; -> what holds.

    It counts for libraries that load later, and for processes that are started.
    """
    said = [name for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    if not said or (said == ["GOMP_SPINCOUNT"] and os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        return f"threads look for work {SPIN_COUNT} times, then sleep (GOMP_SPINCOUNT, OMP_WAIT_POLICY change that)"
    return ", ".join(f"{name}={os.environ[name]}" for name in said)
