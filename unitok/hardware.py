"""Speed of accelerators and of this CPU, and two settings of the process: how CPU threads wait, and what the allocator keeps.

Commands and trainings change these two settings before PyTorch is imported. The library never does.
"""

import ctypes
import math
import os
import sys
import time
from functools import cache
from importlib.util import find_spec

#: How often a thread of GNU OpenMP polls for work before it sleeps. With the library's default of 300,000 a waiting thread occupies
#: the core that a working thread needs: beside other programs, training ran at two thirds of its speed or far less. Sleeping at once
#: (OMP_WAIT_POLICY=passive) costs up to half of the speed on an idle machine. See benchmarks/waiting.py and docs/notes.md.
SPIN_COUNT = 3000

#: Freed memory that glibc keeps, in bytes. By default it maps each block over 32 MB anew, with a page fault per 4 kB: 16 ms for the
#: 33 MB of 128 channels of 256 x 256 pixels, whose convolution takes 144 ms (docs/notes.md). The price is this much memory.
KEPT_BYTES = 1 << 30
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # constants of malloc.h

#: Peak dense bf16 FLOPs per second, from the makers' data sheets. A key is a part of the device's name.
HARDWARE = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "l40s": 362e12, "rtx4090": 165e12}


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOPs per second of a device, by the driver's name for it ("NVIDIA H100 80GB HBM3"); None if unknown."""
    name = device_name.lower().replace(" ", "")
    return next((flops for key, flops in HARDWARE.items() if key in name), None)


def fast_bfloat16() -> bool:
    """Whether training in bfloat16 is faster than in float32 on this CPU, measured on a small convolution."""
    import torch

    x, layer = torch.randn(16, 64, 16, 16), torch.nn.Conv2d(64, 64, 3, padding=1)
    seconds = {False: math.inf, True: math.inf}  # the best of three
    for enabled in [False, True] * 3:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(x).float().square().mean().backward()
        seconds[enabled] = min(seconds[enabled], time.perf_counter() - began)
    return seconds[True] < 0.8 * seconds[False]


@cache
def has_triton() -> bool:
    """Whether our kernels in Triton can run on the GPU here: of NVIDIA, from Ampere on. PyTorch's builds for CUDA on Linux bring Triton."""
    import torch

    if find_spec("triton") is None or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def bound_waiting() -> str:
    """Let OpenMP's threads poll for work only briefly, unless the user chose how they wait.

    Call it before PyTorch is imported.

    Returns:
        A sentence that says which setting holds, for `unitok doctor`.
    """
    chosen = [name for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    if not chosen or (chosen == ["GOMP_SPINCOUNT"] and os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        return f"threads poll for work {SPIN_COUNT} times, then sleep (set GOMP_SPINCOUNT or OMP_WAIT_POLICY to change it)"
    return ", ".join(f"{name}={os.environ[name]}" for name in chosen)


def check_device(device: str) -> str:
    """Return the name of a device if PyTorch can compute on it, else raise `UserError`. Imports PyTorch."""
    import torch

    from unitok.errors import UserError, first_line

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r}: not available here ({first_line(error)}); try cpu") from None
    return device


@cache
def keep_large_blocks() -> bool:
    """Tell glibc's allocator to keep large blocks for the next use.

    Returns:
        Whether it does: False for another C library, and where the environment says UNITOK_KEEP_MEMORY=0.
    """
    if not sys.platform.startswith("linux") or os.environ.get("UNITOK_KEEP_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, KEPT_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, KEPT_BYTES))
