"""What the benchmarks share: peers that take turns, peak memory, and a description of the machine."""

import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "vector-quantize-pytorch", "taming-transformers", "transformers", "encodec", "pillow")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status_gb(name: str) -> float:
    """A line of /proc/self/status, GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e9


def peak_memory_gb() -> float:
    """Peak memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


#: Makes glibc keep large blocks, as `unitok.hardware.keep_large_blocks` does, in a process that does not ask for it itself.
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def in_turns(
    script: str, arguments: dict[str, list[str]], rounds: int, keep_for_all: bool = False
) -> dict[str, dict[str, float]]:
    """Run each peer in a process; the processes take turns. Returns: median seconds and peak memory (GB) by name.

    arguments: for each peer those of the `--only` mode of the script, which calls `serve`. keep_for_all: the allocator of the peers
    keeps large blocks, too.
    """
    environment = os.environ | (KEEPING if keep_for_all else {})
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    workers = {name: subprocess.Popen([sys.executable, script, *words], **pipes) for name, words in arguments.items()}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    memory = {}
    for turn in range(rounds + 2):
        for name, worker in workers.items():
            answer = _ask(worker, "stop" if turn == rounds + 1 else "run")
            if turn == rounds + 1:
                memory[name] = answer
            elif turn:  # the first turn warms up
                seconds[name].append(answer)
    return {name: {"seconds": statistics.median(seconds[name]), "gb": memory[name]} for name in workers}


def _ask(worker: subprocess.Popen, what: str) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(what + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("answer "):
            return float(line.split()[1])
    raise SystemExit(f"{' '.join(map(str, worker.args))}: it died")  # type: ignore[arg-type]


def serve(run: Callable[[], Any], device: str) -> None:
    """A worker of `in_turns`: runs once for each line of the input and prints the seconds; at the end, the peak memory."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_gb("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e9
    for line in sys.stdin:
        if line.strip() == "stop":
            used = (_status_gb("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 1e9) - before
            print("answer", used, flush=True)
            return
        _wait()
        began = time.perf_counter()
        run()
        _wait()
        print("answer", time.perf_counter() - began, flush=True)


def in_a_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script's own `--only` mode and read the JSON of its last line."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)}: {done.stderr[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_scenes(work: Path) -> None:
    """Write scenes for training, new scenes, and scenes with held-out color-shape pairs into `work`, unless they are there."""
    for folder, number, seed, more in (
        ("train", 12_000, 1, ["--fold", "seen"]),
        ("test", 1000, 2, ["--fold", "seen"]),
        ("held_out", 400, 3, ["--fold", "systematic"]),
    ):
        if not (work / folder / "scenes.jsonl").exists():
            command = ["scenes", str(work / folder), "--count", str(number), "--seed", str(seed), "--max-objects", "2", *more]
            subprocess.run([sys.executable, "-m", "unitok", *command], check=True)


def train(config: Path, out: Path, data: Path, minutes: float, seed: int, options: dict[str, str] | None = None) -> None:
    """`unitok fit` for some minutes; options: arguments of the model. A finished run is left as it is."""
    flags = [word for name, value in (options or {}).items() for word in (f"--model.init_args.{name}", value)]
    command = ["fit", "--config", str(config), "--out", str(out), "--data.init_args.path", str(data), "--resume", "auto"]
    command += ["--model.init_args.minutes", str(minutes), "--seed_everything", str(seed), "--data.init_args.seed", str(seed)]
    subprocess.run([sys.executable, "-m", "unitok", *command, *flags], check=True)


def machine(device: str) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model)
    description = {"cpu": model, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    if device == "cpu":
        return description
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return description | {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": str(torch.version.cuda)}


def versions() -> dict[str, str]:
    packages = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    return packages


def circumstances(device: str) -> dict[str, Any]:
    """When, where and with what something was measured."""
    return {"date": date.today().isoformat(), "machine": machine(device), "versions": versions()}


def write_results(name: str, cases: list[dict[str, Any]], device: str = "cpu", out: Path | None = None, **more: Any) -> None:
    """Print a table and write `results/NAME.json` (`NAME.gpu.json` on CUDA).

    cases: dictionaries of `case, unit, ours, peer, theirs, ratio` and more; a ratio over 1 is in favor of unitok.
    """
    columns = list(dict.fromkeys(key for row in cases for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in cases]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    path = out or RESULTS / f"{name}{'' if device == 'cpu' else '.gpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = circumstances(device) | {"cases": cases} | more
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
