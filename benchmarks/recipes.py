"""Recipes for the decoder at equal seconds: optimizer, learning rates, schedule, tokens per step.

    python benchmarks/recipes.py [--seconds 22.5] [--work FOLDER]

Measured, mean of two seeds: the recipe of the race is best, at 0.827 nats. Without span positions, in float32, or with Muon in every
step it loses 0.04 to 0.07; with Muon in every fourth step 0.02; with AdamW for all 0.35. Learning rates, the schedule and 512 tokens
change 0.03 and less.

Each recipe changes what its name says against the first one, that of benchmarks/loss_race.py. All train the same shape (1.8M
parameters in its blocks) on scenes for the same seconds. The loss is the mean cross-entropy of the next token over the whole
vocabulary, in nats, on 400 new documents, others than those of the race. Two seeds each; all recipes train in turns, as in the race.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from common import RESULTS, circumstances
from loss_race import Measure, Recipe, make_tokens, ours, race

from unitok.data.shards import TokenDataset
from unitok.model.presets import PRESETS

NOW = Recipe()
RECIPES = {
    "now: AdamW 2e-2, Muon 0.03 in every second step, 768 tokens": NOW,
    "no span positions": replace(NOW, span_positions=0),
    "float32": replace(NOW, half=False),
    "Muon in every step": replace(NOW, every=1),
    "Muon in every fourth step": replace(NOW, every=4),
    "Muon 0.02": replace(NOW, muon_lr=0.02),
    "Muon 0.04": replace(NOW, muon_lr=0.04),
    "AdamW 1e-2": replace(NOW, lr=1e-2),
    "512 tokens": replace(NOW, tokens=512),
    "stable for 0.1": replace(NOW, stable_fraction=0.1),
    "AdamW for all, 3e-3": replace(NOW, optimizer="adamw", lr=3e-3, decay=0.1),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=22.5, help="of each run")
    p.add_argument("--work", type=Path, default=Path("runs/loss_race"), help="folder for scenes, tokenizers and tokens")
    p.add_argument("--out", type=Path, default=RESULTS / "recipes.json")
    o = p.parse_args()
    tokens, new = make_tokens(o.work)
    measure = Measure(new)
    config = replace(PRESETS["tiny"].config, vocab_size=TokenDataset(tokens).vocab.size)

    losses: dict[str, list[float]] = {name: [] for name in RECIPES}
    for seed in (0, 1):
        racing = [
            replace(ours(tokens, config, measure, o.seconds, seed, recipe), name=name) for name, recipe in RECIPES.items()
        ]
        for name, loss in zip(RECIPES, race(racing), strict=True):
            losses[name].append(loss)
    results = circumstances("cpu") | {"seconds": o.seconds, "losses": losses}
    o.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {o.out}")


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
