"""Seconds to a loss: training of unitok's decoder beside transformers' Chameleon with AdamW, 90 seconds each.

    python benchmarks/loss_race.py [--quick] [--work FOLDER]

Measured, median of three seeds: unitok reaches the loss that the peer ends at in 45 of its 90 seconds.

Both have the same shape (about 2M parameters), documents (scenes, tokenized), held-out documents, seconds and threads. Both losses
are the mean cross-entropy of the next token over the whole vocabulary, in nats, over all tokens of 400 new documents. The peer is
what a researcher would write: random documents padded to the longest of each batch, fused AdamW, linear warm-up and decay over
the 90 seconds, and the best of all pairs of learning rate and batch size, each tried for the whole time. unitok uses the recipe
that benchmarks/recipes.py chose on other new documents: packed rows, Muon in every fourth step with AdamW. It runs with a quarter,
0.3, a third, 0.4, half, 0.75 and all of the seconds, a whole run each; what counts is the shortest run that ends at the loss of the peer
or below.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import write_results
from train_step import theirs

from unitok.configs import CONFIGS
from unitok.data.loading import EndlessBatches
from unitok.data.packing import PackedDataset
from unitok.data.shards import TokenDataset
from unitok.hardware import keep_large_blocks
from unitok.model import Decoder, DecoderConfig
from unitok.model.loss import next_id_loss
from unitok.model.presets import PRESETS
from unitok.training.optim import build_optimizers
from unitok.training.shell import warmup_linear, weight_average

RATES, BATCHES = (1e-3, 3e-3, 1e-2), (4, 8)  # of AdamW, and documents a batch
SHARES = (0.25, 0.3, 1 / 3, 0.4, 0.5, 0.75, 1.0)  # of the seconds, that ours has, one after the other


def make_tokens(work: Path) -> tuple[Path, Path]:
    """Shards of scenes to train on and of new ones, with tokenizers trained for two minutes."""

    def unitok(*words: object) -> None:
        subprocess.run([sys.executable, "-m", "unitok", *map(str, words)], check=True)

    if not (work / "new_tokens" / "dataset.json").exists():
        unitok("scenes", work / "scenes", "--count", 12_000, "--seed", 1, "--max-objects", 2)
        unitok("scenes", work / "new", "--count", 300, "--seed", 2, "--max-objects", 2)
        unitok("train-text-tokenizer", work / "scenes" / "text.txt", "--out", work / "text", "--vocab-size", 512)
        for part, data, minutes in (("image", "images", 1.5), ("audio", "audio", 0.7)):
            flags = ["--data.init_args.path", work / "scenes" / data, "--model.init_args.minutes", minutes, "--resume", "auto"]
            unitok("fit", "--config", CONFIGS / "scenes" / f"{part}.yaml", "--out", work / part, *flags)
        parts = [word for name in ("text", "image", "audio") for word in (f"--{name}", work / name)]
        unitok("bundle", work / "bundle", *parts)
        unitok("tokenize", work / "scenes", work / "tokens", "--bundle", work / "bundle")
        unitok("tokenize", work / "new", work / "new_tokens", "--bundle", work / "bundle")
    return work / "tokens", work / "new_tokens"


def padded(dataset: TokenDataset, chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents [B, T] padded on the right, and which tokens are real."""
    documents = [torch.from_numpy(dataset.ids(i)) for i in chosen]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(documents, True, dataset.vocab.pad), pad([torch.ones_like(d, dtype=torch.bool) for d in documents], True, False)


class Measure:
    """Mean cross-entropy of the next token over the whole vocabulary, on 400 of the new documents."""

    def __init__(self, folder: Path, first: int = 0, number: int = 400):
        dataset = TokenDataset(folder)
        order = np.random.default_rng(0).permutation(len(dataset))[first : first + number]
        order = order[np.argsort(dataset.lengths()[order])].tolist()
        self.batches = [padded(dataset, order[i : i + 50]) for i in range(0, len(order), 50)]

    @torch.inference_mode()
    def __call__(self, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> float:
        total, count = 0.0, 0
        for ids, real in self.batches:
            losses = F.cross_entropy(logits_of(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            total += float(losses[real[:, 1:]].sum())
            count += int(real[:, 1:].sum())
        return total / count


def race(step: Callable[[float], None], measure: Callable[[], float], seconds: float) -> float:
    """Steps for so many seconds; -> the loss at the end, which does not count."""
    spent = 0.0
    while spent < seconds:
        began = time.perf_counter()
        step(spent / seconds)
        spent += time.perf_counter() - began
    return measure()


def on_all_ids(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A packed batch in which every token of a document has loss, prompts too, as for the peer and as the loss is measured."""
    documents = batch["documents"]
    inside = (documents[:, :-1] == documents[:, 1:]) & (documents[:, 1:] >= 0)
    return batch | {"weights": F.pad(inside.float(), (0, 1))}


@dataclass(frozen=True)
class Recipe:
    """How ours is trained; see `DecoderTraining`. tokens: per step, packed into one row."""

    optimizer: str = "muon"
    lr: float = 2e-2
    muon_lr: float = 0.02
    beta2: float = 0.95
    decay: float = 0.0
    stable_fraction: float = 0.3
    tokens: int = 768
    iterations: int = 3
    every: int = 4
    grad_clip: float = 1.0
    z_loss: float = 1e-5
    average: float = 0.0  # decay of the average of the weights that is measured; 0: the weights themselves


def race_ours(data: Path, config: DecoderConfig, measure: Measure, seconds: float, seed: int, recipe: Recipe) -> float:
    """Train ours by a recipe for so many seconds; -> its loss."""
    torch.manual_seed(seed)
    decoder = Decoder(config)
    average = weight_average(decoder, recipe.average) if recipe.average else None
    packed = PackedDataset(TokenDataset(data), recipe.tokens, seed, condition_dropout=0.0)
    batches = iter(EndlessBatches(packed, 1))
    peaks = (recipe.lr, recipe.muon_lr)
    optimizers = build_optimizers(
        decoder, recipe.optimizer, *peaks, (0.9, recipe.beta2), recipe.decay, recipe.iterations, recipe.every
    )
    done = 0

    def step(share: float) -> None:
        nonlocal done
        batch = on_all_ids({k: torch.from_numpy(v)[None] for k, v in packed[next(batches)[0]].items()})
        for optimizer, peak in zip(optimizers, peaks, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * warmup_linear(done, share, 30, recipe.stable_fraction)
        hidden = decoder.hidden(batch["ids"], batch["positions"], batch["documents"])
        loss = next_id_loss(hidden, decoder.lm_head.weight, batch, None, recipe.z_loss).total / batch["weights"].sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), recipe.grad_clip or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
        if average is not None:
            average.update_parameters(decoder)
        done += 1

    loss = race(step, lambda: measure(average.module if average else decoder), seconds)
    print(f"ours, {seconds:g} s, seed {seed}: {done} steps, {loss:.4f}", flush=True)
    return loss


def race_theirs(
    data: Path, config: DecoderConfig, measure: Measure, seconds: float, seed: int, rate: float, size: int
) -> float:
    torch.manual_seed(seed)
    model = theirs("chameleon", config).train()
    dataset, rng = TokenDataset(data), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    done = 0

    def documents() -> Iterator[list[int]]:
        while True:
            order = rng.permutation(len(dataset)).tolist()
            for i in range(0, len(order) - size + 1, size):
                yield order[i : i + size]

    batches = documents()

    def step(share: float) -> None:
        nonlocal done
        ids, real = padded(dataset, next(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate * warmup_linear(done, share, 20)
        loss = model(input_ids=ids, attention_mask=real.long(), labels=ids.masked_fill(~real, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1

    loss = race(step, lambda: measure(lambda ids: model(input_ids=ids).logits), seconds)
    print(f"theirs, rate {rate:g}, {size} documents, seed {seed}: {done} steps, {loss:.4f}", flush=True)
    return loss


def main() -> None:
    keep_large_blocks()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one seed")
    p.add_argument("--seconds", type=float, default=90.0, help="of each run of the peer; unitok has fractions of it")
    p.add_argument("--theirs", type=float, nargs=2, metavar=("RATE", "DOCUMENTS"), help="of the peer, instead of trying all")
    p.add_argument("--work", type=Path, default=Path("runs/loss_race"), help="folder for scenes, tokenizers and tokens")
    p.add_argument("--out", type=Path, help="default: benchmarks/results/loss_race.json")
    o = p.parse_args()
    tokens, new = make_tokens(o.work)
    measure = Measure(new, first=400)
    config = replace(PRESETS["tiny"].config, vocab_size=TokenDataset(tokens).vocab.size)
    tried: dict[tuple[float, int], float] = {}
    for rate, size in itertools.product(RATES, BATCHES) if o.theirs is None else [(o.theirs[0], int(o.theirs[1]))]:
        tried[rate, size] = race_theirs(tokens, config, measure, o.seconds, 0, rate, size)
    best = min(tried, key=lambda key: tried[key])
    seconds, losses, ours = [], [], []
    for seed in (0,) if o.quick else (0, 1, 2):
        wanted = tried[best] if seed == 0 else race_theirs(tokens, config, measure, o.seconds, seed, *best)
        losses.append(wanted)
        seconds.append(float("inf"))
        for share in SHARES:
            loss = race_ours(tokens, config, measure, share * o.seconds, seed, Recipe())
            ours.append({"seed": seed, "seconds": share * o.seconds, "loss": loss})
            if loss <= wanted:
                seconds[-1] = share * o.seconds
                break
    middle = statistics.median(seconds)
    row: dict[str, Any] = {
        "case": f"to the loss of {o.seconds:g} s, median of {len(losses)} seeds",
        "unit": "s",
        "ours": middle,
    }
    row |= {"peer": "chameleon", "theirs": o.seconds, "ratio": o.seconds / middle, "loss": statistics.median(losses)}
    more: dict[str, Any] = {"seconds": seconds, "losses": losses, "ours": ours}
    more["theirs_tried"] = {f"rate {r:g}, {b} documents": loss for (r, b), loss in tried.items()}
    write_results("loss_race", [row], out=o.out, **more)


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
