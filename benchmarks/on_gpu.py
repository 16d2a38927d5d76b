"""Everything that was never measured on a GPU, most valuable first, in the minutes there are.

    python benchmarks/on_gpu.py [--minutes 28] [--device cuda]

Not run on a GPU yet. First whether it is right: each attention back end in each type, forward and backward, beside the same in float64 on
the CPU; a decoder's training step; steps recorded as CUDA graphs and generation in bfloat16 beside float64. Then how fast: the other
benchmarks with `--device cuda`, each with a limit, whose own results are `results/NAME.gpu.json`. What is done is written after every
stage, so a machine that is taken away loses one. On `--device cpu` the same checks run without GPU back ends, and nothing is timed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, versions

from unitok.hardware import check_device
from unitok.model import Decoder, DecoderConfig
from unitok.model.attention import build_packing, choose_backend
from unitok.model.copies import copy_for_generation
from unitok.model.cuda_graphs import CudaGraphs
from unitok.model.inference import InferenceDecoder

SMALL = DecoderConfig(500, 256, 4, 640, 4, 2, head_dim=64, max_position_embeddings=600)
#: Largest relative error that rounding explains, by type: of the whole, by norm.
ALLOWED = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # TF32 may be on
#: Command after `python benchmarks/`, and its most minutes; in the order of their value.
SPEED = (
    ("train_step.py --sizes 25m 100m", 5.0),
    ("train_step.py --sizes 100m 350m --compile --out results/train_step_compiled.gpu.json", 5.0),
    ("generate.py --sizes 10m 100m --peers dynamic static", 6.0),
    ("image_tokenizer.py --quick", 3.0),
    ("audio_tokenizer.py --quick", 2.0),
    ("tokenization.py --quick --no-memory", 4.0),
)

Result = dict[str, Any]


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference as a part of the norm."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


def filled(config: DecoderConfig) -> Decoder:
    """A decoder with random weights throughout: those into the residual begin at zero and would hide mistakes."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            p.normal_(float("norm" in name), 0.1)
    return decoder


def attention(device: str) -> list[Result]:
    """Errors of each back end's outputs and gradients."""
    torch.manual_seed(0)
    documents, rows = torch.tensor([[0] * 70 + [1] * 30 + [2] * 28, [0] * 128]), []
    for head_dim in (64, 128):
        exact = [torch.randn(2, 128, heads, head_dim, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
        weight = torch.randn(2, 128, 4, head_dim, dtype=torch.float64)
        out = build_packing(documents, "sdpa").attend(*exact)
        (out * weight).sum().backward()
        for backend in ("sdpa", "varlen", "xformers"):
            for dtype in ALLOWED:
                case = f"attention {backend}, {dtype}, head_dim {head_dim}"
                try:
                    choose_backend(backend, torch.device(device), dtype, head_dim)
                    given = [x.detach().to(device, dtype).requires_grad_() for x in exact]
                    found = build_packing(documents.to(device), backend).attend(*given)
                    (found * weight.to(device, dtype)).sum().backward()
                except Exception as error:  # whatever a back end raises is a result
                    rows.append({"case": case, "problem": str(error)[:200]})
                    continue
                errors = [distance(found, out), *(distance(a.grad, b.grad) for a, b in zip(given, exact, strict=True))]
                rows.append({"case": case, "error": max(errors), "right": max(errors) < ALLOWED[dtype]})
    return rows


def training(device: str) -> list[Result]:
    """Error of a training step's gradients, in float32 and under autocast to bfloat16."""
    ids, documents = torch.randint(0, 500, (2, 128)), torch.tensor([[0] * 70 + [1] * 58, [0] * 128])

    def gradients(decoder: Decoder, autocast: bool) -> list[torch.Tensor]:
        place = decoder.device
        with torch.autocast(place.type, torch.bfloat16, enabled=autocast):
            states = decoder.hidden(ids.to(place), documents=documents.to(place))
        (states @ decoder.lm_head.weight.to(states.dtype).T).float().logsumexp(-1).mean().backward()
        return [p.grad for p in decoder.parameters() if p.grad is not None]

    exact, rows = gradients(filled(SMALL).double(), False), []
    for dtype in (torch.float32, torch.bfloat16):
        found = gradients(filled(SMALL).to(device), dtype == torch.bfloat16)
        flat = [torch.cat([x.double().cpu().flatten() for x in each]) for each in (found, exact)]
        error = distance(*flat)
        rows.append({"case": f"gradients, {dtype}", "error": error, "right": error < 3 * ALLOWED[dtype]})
    return rows


@torch.inference_mode()
def generation(device: str) -> list[Result]:
    """Error of states of steps with a cache: one by one, recorded as CUDA graphs, compiled on a CPU."""
    decoder, ids = filled(SMALL).eval(), torch.randint(0, 500, (2, 300))
    exact, rows = replace_dtype(decoder, torch.float64).hidden(ids), []
    for dtype in (torch.float32, torch.bfloat16):
        copies: dict[str, Any] = {"PyTorch": InferenceDecoder(replace_dtype(decoder, dtype).to(device))}
        copies["compiled" if device == "cpu" else "CUDA graphs"] = (
            copy_for_generation(replace_dtype(decoder, dtype)) if device == "cpu" else copies["PyTorch"]
        )
        for name, copy in copies.items():
            cache, found = copy.new_cache(2, 600), []
            step = CudaGraphs(copy).step if name == "CUDA graphs" else copy.step
            for i in range(300):  # past 256 positions another graph is needed
                where = torch.full((2, 1), i, device=device)
                states = step(ids[:, i : i + 1].to(device), where, cache, i + 1, torch.zeros_like(where))
                found.append(states.clone())
            error = distance(torch.cat(found, 1), exact)
            rows.append({"case": f"steps, {name}, {dtype}", "error": error, "right": error < 3 * ALLOWED[dtype]})
    return rows


def replace_dtype(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """A copy of a decoder in another type."""
    copy = Decoder(replace(decoder.config))
    copy.load_state_dict(decoder.state_dict())
    return copy.to(dtype).eval()


def speed(command: str, seconds: float) -> Result:
    """Run another benchmark on the GPU for so many seconds at most."""
    script, *words = command.split()
    folder, began = Path(__file__).parent, time.monotonic()
    words = [str(folder / word) if word.startswith("results/") else word for word in words]
    try:
        done = subprocess.run(
            [sys.executable, str(folder / script), "--device", "cuda", *words],
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        said, code = done.stdout[-2000:] + done.stderr[-2000:], done.returncode
    except subprocess.TimeoutExpired as late:
        said, code = str(late.stdout or b"")[-2000:], -1
    return {"case": command, "seconds": time.monotonic() - began, "code": code, "said": said}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=28.0, help="in all")
    p.add_argument("--device", default="cuda", help="cuda; cpu: only the checks that need no GPU")
    p.add_argument("--out", type=Path, help="default: benchmarks/results/on_gpu.gpu.json")
    o = p.parse_args()
    check_device(o.device)
    out, end = o.out or RESULTS / "on_gpu.gpu.json", time.monotonic() + 60 * o.minutes
    rows: list[Result] = []

    def note(more: list[Result]) -> None:
        rows.extend(more)
        for row in more:
            print({key: value for key, value in row.items() if key != "said"}, flush=True)
        out.write_text(json.dumps({"machine": machine(o.device), "versions": versions(), "cases": rows}, indent=1) + "\n")

    checks: tuple[Callable[[str], list[Result]], ...] = (attention, training, generation)
    for check in checks:
        note(check(o.device))
    for command, minutes in SPEED if o.device != "cpu" else ():
        if (left := end - time.monotonic()) > 30:
            note([speed(command, min(left, 60 * minutes))])
    if wrong := [row["case"] for row in rows if row.get("right") is False]:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
