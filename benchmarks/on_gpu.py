"""Whether everything is right on a GPU, and how fast, most valuable first, in the minutes there are.

    python benchmarks/on_gpu.py [--minutes 28] [--checks] [--device cuda]

Measured on one H200 (torch 2.11, driver 580): all is right. With bfloat16 a step of generation of a decoder of 100M takes 0.20 ms, and
3,634 tokens of an image are drawn in a second (52.5 times those of transformers' generate with its dynamic cache on the same machine),
56,910 of 64 images with guidance. Training of 350M reaches 42 % of the peak, of 100M 35 to 37 %; without compilation it is 15 %.

First the checks: each attention back end in each type, forward and backward, beside the same in float64 on the CPU; a decoder's training
step; steps of generation, recorded, for few and many slots; draws and cross-entropy in one kernel beside PyTorch's. Then the time of a
step by slots, tokens per second, and training steps of random documents of 150 to 450 tokens in rows of 32,768 with fused AdamW (MFU
by the FLOPs of `unitok inspect`). Then the other benchmarks with `--device cuda`, each with a limit, whose own results are
`results/NAME.gpu.json`. What is done is written after every stage, so a machine that is taken away loses one. On `--device cpu` the
same checks run as far as they need no GPU, and nothing is timed.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import generate
import torch
from common import RESULTS, circumstances

from unitok.generation_config import SamplingParams
from unitok.hardware import check_device, peak_flops
from unitok.model import Decoder, DecoderConfig
from unitok.model.attention import build_packing, choose_backend
from unitok.model.copies import copy_for_generation
from unitok.model.costs import count
from unitok.model.inference import InferenceDecoder
from unitok.model.loss import next_id_loss
from unitok.model.presets import PRESETS
from unitok.sample.allowed import AllowedLogits
from unitok.sample.draw import Draw
from unitok.sample.sampling import BatchedSamplingParams

#: Preset, tokens per step, back end of attention, whether compiled.
TRAININGS = (
    ("100m", 32_768, "varlen", True),
    ("100m", 32_768, "xformers", True),
    ("100m", 32_768, "sdpa", True),
    ("100m", 32_768, "varlen", False),
    ("100m", 65_536, "varlen", True),
    ("350m", 32_768, "varlen", True),
)
SMALL = DecoderConfig(500, 256, 4, 640, 4, 2, head_dim=64, max_position_embeddings=600)
#: Largest relative error that rounding explains, by type: of the whole, by norm.
ALLOWED = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # TF32 may be on
#: Command after `python benchmarks/`, and its most minutes; in the order of their value.
SPEED = (
    ("train_step.py --sizes 100m --ids 16384 --rounds 3", 2.0),
    ("train_step.py --sizes 100m --ids 16384 --rounds 3 --compile --peers qwen3", 4.0),
    ("generate.py --sizes 100m --peers dynamic static --rounds 2", 5.0),
    ("image_tokenizer.py --rounds 3", 2.0),
    ("audio_tokenizer.py --rounds 3 --min-seconds 8 --max-seconds 30", 2.0),
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
    """Error of states of steps with a cache: one by one and recorded, for few and for many slots; on a CPU compiled."""
    decoder, rows = filled(SMALL).eval(), []
    count = 40 if device == "cpu" else 300  # past 256 positions another graph is needed
    for slots in (1, 3, 40):
        ids = torch.randint(0, 500, (slots, count))
        exact = replace_dtype(decoder, torch.float64).hidden(ids)
        for dtype in (torch.float32, torch.bfloat16):
            copies: dict[str, Any] = {"PyTorch": InferenceDecoder(replace_dtype(decoder, dtype).to(device))}
            copies["compiled" if device == "cpu" else "recorded"] = (
                copy_for_generation(replace_dtype(decoder, dtype)) if device == "cpu" else copies["PyTorch"]
            )
            for name, copy in copies.items():
                cache, found = copy.new_cache(slots, 600), []
                step = copy.step_once if name == "recorded" else copy.step
                for i in range(count):
                    where = torch.full((slots, 1), i, device=device)
                    states = step(ids[:, i : i + 1].to(device), where, cache, i + 1, torch.zeros_like(where))
                    found.append(states.clone())
                error = distance(torch.cat(found, 1), exact)
                case = f"steps, {name}, {slots} slots, {dtype}"
                rows.append({"case": case, "error": error, "right": error < 3 * ALLOWED[dtype]})
    return rows


def kernels(device: str) -> list[Result]:
    """Draws and cross-entropy in one kernel, beside PyTorch's on the CPU. On a CPU there is nothing to compare."""
    if device == "cpu":
        return []
    random, different, draws = torch.Generator().manual_seed(0), 0, 0
    for kinds, masked, n in ((1, False, 1024), (2, True, 1000), (3, True, 700)):
        for _ in range(60):
            u = torch.rand(5, 4, generator=random)
            kept = [SamplingParams(float(t * 1.5), int(k * n), float(p), min_p=0.05) for t, k, p, _ in u]
            logits = torch.randn(5 * kinds, n, generator=random) * 3
            mask = torch.rand(5, n, generator=random) > 0.7 if masked else None
            scales, uniform = torch.rand(5, 2, generator=random) * 3, torch.rand(5, dtype=torch.float64, generator=random)
            ids = []
            for place in ("cpu", device):
                head = logits.to(place).__getitem__
                allowed = AllowedLogits(
                    ((0, n),), torch.arange(n, device=place), head, None if mask is None else mask.to(place)
                )
                draw = Draw(allowed, BatchedSamplingParams(kept, torch.device(place)))
                compared = [torch.arange(5, device=place) + 5 * kind for kind in range(kinds)]
                ids.append(draw(torch.arange(5 * kinds, device=place), scales.to(place), uniform.to(place), *compared).cpu())
            different, draws = different + int((ids[0] != ids[1]).sum()), draws + 5
    rows = [{"case": f"{draws} draws", "error": different / draws, "right": different <= 1}]
    for n in (97, 20_000):
        hidden, weight = torch.randn(1, 64, 32), torch.randn(n, 32)
        batch = {"targets": torch.randint(0, n, (1, 64)), "weights": torch.rand(1, 64), "mask_index": torch.zeros(1, 64).long()}
        found = []
        for place in ("cpu", device):
            h, w = (x.detach().clone().to(place).requires_grad_() for x in (hidden, weight))
            next_id_loss(h, w, {k: v.to(place) for k, v in batch.items()}, None, 1e-3).total.backward()
            found.append(torch.cat([h.grad.flatten().cpu(), w.grad.flatten().cpu()]))
        error = distance(found[1], found[0])
        rows.append(
            {"case": f"cross-entropy of {n} tokens, gradients", "error": error, "right": error < ALLOWED[torch.float32]}
        )
    return rows


def milliseconds(run: Callable[[], Any], times: int) -> float:
    """Mean time of a call after five others."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times * 1e3


@torch.inference_mode()
def steps(device: str) -> list[Result]:
    """Time of a step of 100M at position 200 in bfloat16, by the number of slots."""
    copy, rows = InferenceDecoder(filled(replace(PRESETS["100m"].config, vocab_size=8192)).to(device).bfloat16()), []
    for slots in (1, 2, 4, 8, 32, 128):
        cache, ids = copy.new_cache(slots, 1024), torch.zeros(slots, 1, dtype=torch.int64, device=device)
        run = partial(copy.step_once, ids, torch.full_like(ids, 200), cache, 201, ids)
        rows.append({"case": f"step, 100m, {slots} slots", "unit": "ms", "ours": milliseconds(run, 100)})
    return rows


def tokens_per_second(device: str) -> list[Result]:
    """Images of 256 tokens as generate.py makes them, without a peer."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = generate.make_models(Path(folder), "100m")
        for batch, guided in ((1, False), (1, True), (64, True)):
            seconds = milliseconds(generate.run_ours(made, batch, guided, device), 3) / 1e3
            case = f"generation, 100m, batch {batch}{', guidance' if guided else ''}"
            rows.append({"case": case, "unit": "tokens/s", "ours": batch * generate.NEW / seconds})
    return rows


def train(device: str) -> list[Result]:
    """Tokens per second and MFU of training steps."""
    peak, rows = peak_flops(torch.cuda.get_device_name()), []
    for size, length, backend, compiled in TRAININGS:
        torch._dynamo.reset()
        config = replace(PRESETS[size].config, vocab_size=8192, attention=backend)
        decoder = Decoder(config).to(device)
        for layer in decoder.model.layers if compiled else ():
            layer.compile(dynamic=False)
        batches = []
        for seed in range(4):
            random = torch.Generator().manual_seed(seed)
            sizes = torch.randint(150, 450, (length // 150,), generator=random)
            sizes = sizes[: int((sizes.cumsum(0) < length).sum())]
            sizes = torch.cat([sizes, length - sizes.sum(0, keepdim=True)])
            documents = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[None]
            positions = torch.cat([torch.arange(int(n)) for n in sizes])[None]
            ids = torch.randint(0, 8192, (1, length), generator=random)
            more = {"targets": ids.roll(-1), "weights": torch.ones(1, length), "mask_index": torch.zeros_like(ids)}
            batch = {"ids": ids, "positions": positions, "documents": documents} | more
            batches.append({key: value.to(device) for key, value in batch.items()})
        optimizer, order = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True), itertools.cycle(batches)
        run = partial(training_step, decoder, optimizer, order)
        ms = milliseconds(run, 12)
        case = f"training, {size}, {length} tokens, {backend}, {'compiled' if compiled else 'eager'}"
        flops = count(config, length // len(sizes)).flops
        mfu = length / ms * 1e3 * flops / peak if peak else None
        rows.append({"case": case, "unit": "tokens/s", "ours": length / ms * 1e3, "mfu": mfu})
    return rows


def training_step(decoder: Decoder, optimizer: torch.optim.Optimizer, order: Iterator[dict[str, torch.Tensor]]) -> None:
    """Forward, backward and update in bfloat16 autocast."""
    batch = next(order)
    with torch.autocast("cuda", torch.bfloat16):
        hidden = decoder.hidden(batch["ids"], batch["positions"], batch["documents"])
        loss = next_id_loss(hidden, decoder.lm_head.weight, batch, None).total / batch["ids"].numel()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


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
    p.add_argument("--checks", action="store_true", help="no timing")
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
        out.write_text(json.dumps(circumstances(o.device) | {"cases": rows}, indent=1) + "\n")

    checks: tuple[Callable[[str], list[Result]], ...] = (attention, training, generation, kernels)
    for check in checks if o.device == "cpu" or o.checks else (*checks, steps, tokens_per_second, train):
        note(check(o.device))
    for command, minutes in SPEED if o.device != "cpu" and not o.checks else ():
        if (left := end - time.monotonic()) > 30:
            note([speed(command, min(left, 60 * minutes))])
    if wrong := [row["case"] for row in rows if row.get("right") is False]:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
