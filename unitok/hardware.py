"""What accelerators and this CPU can do; how CPU threads wait for one another, and what the allocator keeps.

The last two change the process: commands and trainings ask for them before PyTorch loads, the library never does.
"""

import ctypes
import math
import os
import sys
import time
from functools import cache

#: Rounds for which a thread of GNU OpenMP looks for work before it sleeps. At its own 300,000 a thread that waits takes the core of
#: one that works: beside other programs a training lost from a third to nearly all of its steps. Sleeping at once
#: (OMP_WAIT_POLICY=passive) costs up to half of a quiet machine's speed. See benchmarks/waiting.py, docs/notes.md.
SPIN_COUNT = 3000

#: What glibc keeps. It maps blocks of more than 32 MB anew at each use, which costs a page fault for each 4 kB: 16 ms for the 33 MB
#: of 128 channels of 256 x 256 pixels, where the convolution takes 144 (docs/notes.md). Kept, they cost nothing but this much memory.
KEPT_BYTES = 1 << 30
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h

#: Peak FLOPs per second in bf16, dense, by the part of the device's name that tells it; from their makers' data sheets.
HARDWARE = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "l40s": 362e12, "rtx4090": 165e12}


def peak_flops(device_name: str) -> float | None:
    """Of a device as the driver names it ("NVIDIA H100 80GB HBM3"); None where it is not known."""
    name = device_name.lower().replace(" ", "")
    return next((flops for key, flops in HARDWARE.items() if key in name), None)


def fast_bfloat16() -> bool:
    """Whether a training step in bfloat16 beats float32 on this CPU, measured on a small convolution in both."""
    import torch

    x, layer = torch.randn(16, 64, 16, 16), torch.nn.Conv2d(64, 64, 3, padding=1)
    seconds = {False: math.inf, True: math.inf}  # the best of three
    for enabled in [False, True] * 3:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(x).float().square().mean().backward()
        seconds[enabled] = min(seconds[enabled], time.perf_counter() - began)
    return seconds[True] < 0.8 * seconds[False]


def bound_waiting() -> str:
    """Let OpenMP's threads of what loads later look for work for a short time only, unless the user said how they wait; -> what holds."""
    said = [name for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    if not said or (said == ["GOMP_SPINCOUNT"] and os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        return f"threads look for work {SPIN_COUNT} times, then sleep (GOMP_SPINCOUNT, OMP_WAIT_POLICY change that)"
    return ", ".join(f"{name}={os.environ[name]}" for name in said)


def check_device(device: str) -> str:
    """A device's name, if PyTorch can compute there; imports PyTorch. Errors: `UserError`."""
    import torch

    from unitok.errors import UserError, first_line

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r}: not available here ({first_line(error)}); try cpu") from None
    return device


@cache
def keep_large_blocks() -> bool:
    """Let glibc's allocator keep large blocks; -> whether it does. Not other C libraries or allocators, nor with UNITOK_KEEP_MEMORY=0."""
    if not sys.platform.startswith("linux") or os.environ.get("UNITOK_KEEP_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, KEPT_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, KEPT_BYTES))
