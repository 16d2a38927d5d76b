"""What accelerators can do, by their makers' data sheets; and how CPU threads wait for one another.

Imports nothing, so that it may be asked before PyTorch loads.
"""

import os

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


def bound_waiting() -> str:
    """Let OpenMP's threads look for work for a short time only, unless the user said how they wait; -> what holds.

    It counts for libraries that load later, and for processes that are started.
    """
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
