"""What the benchmarks share: alternating measurements, peak memory, and what they ran on."""

import contextlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "vector-quantize-pytorch", "taming-transformers", "transformers", "encodec", "pillow")


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, run in turns, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            _wait()
            began = time.perf_counter()
            run()
            _wait()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_gb() -> float:
    """Of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def in_a_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script's own `--only` mode and read the JSON of its last line; for peak memory, which never falls."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)}: {done.stderr[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine(device: str) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model)
    found = {"cpu": model, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return found | ({} if device == "cpu" else {"gpu": torch.cuda.get_device_name()})


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_results(name: str, cases: list[dict[str, Any]], device: str = "cpu", out: Path | None = None, **more: Any) -> None:
    """Print a table and write `results/NAME.json` (`NAME.gpu.json` on CUDA).

    cases: dictionaries of `case, unit, ours, peer, theirs, ratio` and more; the ratio is over 1 when we are ahead.
    """
    columns = list(dict.fromkeys(key for row in cases for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in cases]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    path = out or RESULTS / f"{name}{'' if device == 'cpu' else '.gpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(device), "versions": versions(), "cases": cases} | more
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
