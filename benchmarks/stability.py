"""QK-norm and z-loss on and off, at rising learning rates; also draws docs/stability.svg.

    python benchmarks/stability.py [--seconds 30] [--work FOLDER]

Measured in runs of 18 seconds: at a learning rate of 0.03 the loss is 4.3 nats with neither and 3.8 to 3.9 nats with one or both.
z-loss alone is best at each of the three learning rates, with one seed.

The shape of `tiny` (1.8M parameters in its blocks) on scenes; AdamW for all (nothing bounds its steps, while those of Muon have a
fixed size), no clipping, softmax over all tokens, the same seed and seconds. Recorded: the loss of each batch, the norm of the output
of the last layer, the log-normalizer of the softmax (root mean squares), and at the end the loss on new documents.
"""

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances
from loss_race import Measure, Training, make_tokens, on_all_ids, race

from unitok.data.loading import EndlessBatches
from unitok.data.packing import PackedDataset
from unitok.data.shards import TokenDataset
from unitok.hardware import keep_large_blocks
from unitok.model import Decoder
from unitok.model.loss import next_id_loss
from unitok.model.presets import PRESETS
from unitok.training.monitor import NormWatch
from unitok.training.optim import build_optimizers
from unitok.training.shell import warmup_linear

RATES = (3e-3, 1e-2, 3e-2)
COLORS = {"QK-norm, z-loss": "#1b7f4d", "QK-norm": "#7fc8a0", "z-loss": "#d98a2b", "neither": "#b3261e"}
PANELS = {"loss": "loss of the batch, nats", "output_norm": "last layer's output, rms", "logsumexp_rms": "log-normalizer, rms"}


def train(tokens: Path, new: Measure, qk: bool, z_loss: float, rate: float, seconds: float) -> dict[str, Any]:
    """One run; -> its curves by step, and the loss on new documents."""
    torch.manual_seed(0)
    data = PackedDataset(TokenDataset(tokens), 1536, 0, condition_dropout=0.0)
    config = replace(PRESETS["tiny"].config, vocab_size=data.vocab.size, qk_norm="rms" if qk else "none")
    decoder = Decoder(config)
    [optimizer] = build_optimizers(decoder, "adamw", rate, 0.0, (0.9, 0.95), 0.0)
    batches = iter(EndlessBatches(data, 1))
    curves: dict[str, Any] = {name: [] for name in PANELS}

    def step(done: int, share: float) -> None:
        batch = on_all_ids({k: torch.from_numpy(v)[None] for k, v in data[next(batches)[0]].items()})
        for group in optimizer.param_groups:
            group["lr"] = rate * warmup_linear(done, share, 20)
        with NormWatch(decoder, on=True) as watch:
            hidden = decoder.hidden(batch["ids"], batch["positions"], batch["documents"])
        loss = next_id_loss(hidden, decoder.lm_head.weight, batch, None, z_loss)
        optimizer.zero_grad()
        (loss.total / batch["weights"].sum()).backward()
        optimizer.step()
        curves["loss"].append(float(loss.nll.mean()))
        curves["output_norm"].append(float(watch.rms["output_rms"]))
        curves["logsumexp_rms"].append(float(loss.logsumexp.square().mean().sqrt()))

    name = f"{rate:g} {'QK-norm' if qk else 'no norm'}, z-loss {z_loss:g}"
    [curves["new"]] = race(
        [Training(name, seconds, step, lambda: new(lambda ids, within: decoder(ids, span_positions=within)))]
    )
    return curves


def draw(runs: dict[str, dict[str, Any]], title: str) -> str:
    """Curves of some runs as an SVG, a panel for each of `PANELS`."""
    width, height, left, top = 300, 190, 46, 46
    out = []
    for number, (name, label) in enumerate(PANELS.items()):
        x0 = left + number * (width + 60)
        values = [v for run in runs.values() for v in run[name] if v == v and v < 1e4]
        low, high = (0.0, max(values))
        longest = max(len(run[name]) for run in runs.values())
        out.append(f'<text x="{x0}" y="{top - 8}" font-weight="bold">{label}</text>')
        out.append(f'<rect x="{x0}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        for share in (0, 0.5, 1):
            y = top + height * (1 - share)
            out.append(f'<text x="{x0 - 5}" y="{y + 4:.1f}" text-anchor="end">{low + share * (high - low):.3g}</text>')
        out.append(f'<text x="{x0 + width}" y="{top + height + 15}" text-anchor="end">{longest} steps</text>')
        for which, run in runs.items():
            points = " ".join(
                f"{x0 + width * i / max(1, longest - 1):.1f},{top + height * (1 - (v - low) / (high - low)):.1f}"
                for i, v in enumerate(run[name])
                if v == v and v <= high
            )
            out.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[which]}" stroke-width="1.3"/>')
    for i, (which, color) in enumerate(COLORS.items()):
        out.append(f'<rect x="{left + i * 170}" y="{top + height + 26}" width="14" height="4" fill="{color}"/>')
        out.append(f'<text x="{left + i * 170 + 19}" y="{top + height + 32}">{which}</text>')
    size = f'width="{3 * (width + 60) + 20}" height="{top + height + 46}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="#222">'
    back = '<rect width="100%" height="100%" fill="white" />'
    return f'{head}{back}<text x="{left}" y="18" font-size="13">{title}</text>{"".join(out)}</svg>\n'


def main() -> None:
    keep_large_blocks()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=30.0, help="of each run")
    p.add_argument("--z-loss", type=float, default=1e-4, help="its weight, where it is on")
    p.add_argument("--work", type=Path, default=Path("runs/loss_race"), help="folder for scenes, tokenizers and tokens")
    p.add_argument("--out", type=Path, default=RESULTS / "stability.json")
    p.add_argument("--plot", type=Path, default=RESULTS.parent.parent / "docs" / "stability.svg")
    o = p.parse_args()
    tokens, new = make_tokens(o.work)
    measure = Measure(new)
    losses: dict[str, dict[str, float]] = {}
    for rate in RATES:
        runs = {}
        for name, (qk, z) in zip(COLORS, itertools.product((True, False), (o.z_loss, 0.0)), strict=True):
            runs[name] = train(tokens, measure, qk, z, rate, o.seconds)
        losses[f"{rate:g}"] = {name: run["new"] for name, run in runs.items()}
    o.plot.write_text(draw(runs, f"AdamW at {RATES[-1]:g}, 1.8M parameters, {o.seconds:g} s each"))
    results = circumstances("cpu") | {"seconds": o.seconds, "z_loss": o.z_loss, "losses": losses}
    o.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {o.out} and {o.plot}")


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
