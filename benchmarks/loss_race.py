"""Seconds to a loss: training of unitok's decoder beside transformers' Chameleon with AdamW, 90 seconds each.

    python benchmarks/loss_race.py [--quick] [--work FOLDER]

Measured, median of three seeds: unitok reaches the loss that the peer ends at in 30 of its 90 seconds.

Both have the same shape (about 2M parameters), documents (scenes, tokenized), held-out documents, seconds and threads. Both losses
are the mean cross-entropy of the next token over the whole vocabulary, in nats, over all tokens of 400 new documents. The peer is
what a researcher would write: random documents padded to the longest of each batch, fused AdamW, linear warm-up and decay over
the 90 seconds, and the best of six pairs of learning rate and batch size, and of two in bfloat16 where the CPU is fast at it. unitok
uses the recipe that benchmarks/recipes.py chose on other new documents: packed rows, embedded span positions (72 x 192 more
parameters), Muon in every second step with AdamW, bfloat16 where it is fast. It has a fifth, a quarter, 0.3, a third, 0.4 and half of
the seconds, a whole run each; what counts is the shortest run that ends at the loss of the peer or below. All runs of a seed train at
the same time, in turns of a hundredth of their seconds, so that a machine whose pace changes is slow for all of them.
"""

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import write_results
from train_step import theirs as model_of

from unitok.configs import CONFIGS
from unitok.data.loading import EndlessBatches
from unitok.data.packing import PackedDataset
from unitok.data.shards import TokenDataset
from unitok.grammar import Grammar
from unitok.hardware import fast_bfloat16, keep_large_blocks
from unitok.model import Decoder, DecoderConfig
from unitok.model.loss import next_id_loss
from unitok.model.presets import PRESETS
from unitok.training.optim import build_optimizers
from unitok.training.shell import warmup_linear, weight_average

RATES, BATCHES = (1e-3, 3e-3, 1e-2), (4, 8)  # of AdamW, and documents a batch
SHARES = (0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5)  # of the peer's seconds, that ours has


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
    return _pad(documents, dataset.vocab.pad), _pad([torch.ones_like(d, dtype=torch.bool) for d in documents], False)


def _pad(documents: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(documents, True, value)


class Measure:
    """Mean cross-entropy of the next token over the whole vocabulary, on 400 of the new documents."""

    def __init__(self, folder: Path, first: int = 0, number: int = 400):
        dataset = TokenDataset(folder)
        order = np.random.default_rng(0).permutation(len(dataset))[first : first + number]
        order = order[np.argsort(dataset.lengths()[order])].tolist()
        grammar = Grammar(dataset.vocab)
        self.batches = []
        for chosen in (order[i : i + 50] for i in range(0, len(order), 50)):
            within = [torch.from_numpy(grammar.span_positions(dataset.ids(i))) for i in chosen]
            self.batches.append((*padded(dataset, chosen), _pad(within, 0)))

    @torch.inference_mode()
    def __call__(self, logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        """logits_of: tokens [B, T] and span positions [B, T] -> logits [B, T, V]."""
        total, count = 0.0, 0
        for ids, real, within in self.batches:
            losses = F.cross_entropy(logits_of(ids, within)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            total += float(losses[real[:, 1:]].sum())
            count += int(real[:, 1:].sum())
        return total / count


@dataclass
class Training:
    """A training in progress. seconds: that it has. step: trains one step, given how many are done and the fraction of the seconds that is
    spent."""

    name: str
    seconds: float
    step: Callable[[int, float], None]
    loss: Callable[[], float]
    spent: float = 0.0
    steps: int = 0


def race(trainings: list[Training]) -> list[float]:
    """Let all train at the same time, a hundredth of their seconds each in turn, so that a machine whose pace changes is slow for all;
    -> their losses at the end. To measure them does not count."""
    for hundredth in range(1, 101):
        for training in trainings:
            while training.spent < training.seconds * hundredth / 100:
                began = time.perf_counter()
                training.step(training.steps, training.spent / training.seconds)
                training.spent += time.perf_counter() - began
                training.steps += 1
    losses = [training.loss() for training in trainings]
    for training, loss in zip(trainings, losses, strict=True):
        print(f"{training.name}: {training.steps} steps in {training.seconds:g} s, {loss:.4f}", flush=True)
    return losses


def on_all_ids(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A packed batch in which every token of a document has loss, prompts too, as for the peer and as the loss is measured."""
    documents = batch["documents"]
    inside = (documents[:, :-1] == documents[:, 1:]) & (documents[:, 1:] >= 0)
    return batch | {"weights": F.pad(inside.float(), (0, 1))}


@dataclass(frozen=True)
class Recipe:
    """How ours is trained; see `DecoderTraining`. tokens: per step, packed into one row. half: in bfloat16."""

    optimizer: str = "muon"
    lr: float = 2e-2
    muon_lr: float = 0.03
    beta2: float = 0.95
    decay: float = 0.0
    stable_fraction: float = 0.3
    tokens: int = 768
    iterations: int = 3
    every: int = 2
    grad_clip: float = 1.0
    z_loss: float = 1e-5
    average: float = 0.0  # decay of the average of the weights that is measured; 0: the weights themselves
    span_positions: int = 72
    half: bool = field(default_factory=fast_bfloat16)


def ours(data: Path, config: DecoderConfig, measure: Measure, seconds: float, seed: int, recipe: Recipe) -> Training:
    """Ours by a recipe."""
    torch.manual_seed(seed)
    decoder = Decoder(replace(config, span_positions=recipe.span_positions))
    average = weight_average(decoder, recipe.average) if recipe.average else None
    packed = PackedDataset(TokenDataset(data), recipe.tokens, seed, condition_dropout=0.0)
    batches = iter(EndlessBatches(packed, 1))
    peaks = (recipe.lr, recipe.muon_lr)
    optimizers = build_optimizers(
        decoder, recipe.optimizer, *peaks, (0.9, recipe.beta2), recipe.decay, recipe.iterations, recipe.every
    )

    def step(done: int, share: float) -> None:
        batch = on_all_ids({k: torch.from_numpy(v)[None] for k, v in packed[next(batches)[0]].items()})
        for optimizer, peak in zip(optimizers, peaks, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * warmup_linear(done, share, 30, recipe.stable_fraction)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.half):
            hidden = decoder.hidden(batch["ids"], batch["positions"], batch["documents"], batch["span_positions"])
            loss = next_id_loss(hidden, decoder.lm_head.weight, batch, None, recipe.z_loss).total / batch["weights"].sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), recipe.grad_clip or float("inf"))
            for optimizer in optimizers:
                optimizer.step()
        if average is not None:
            average.update_parameters(decoder)

    network = average.module if average else decoder
    loss = partial(measure, lambda ids, within: network(ids, span_positions=within))
    return Training(f"unitok, seed {seed}", seconds, step, loss)


@dataclass(frozen=True)
class Peer:
    """How the peer is trained: AdamW's learning rate, documents a batch, and whether in bfloat16."""

    rate: float
    size: int
    half: bool = False

    def __str__(self) -> str:
        return f"rate {self.rate:g}, {self.size} documents{', bfloat16' if self.half else ''}"


def theirs(data: Path, config: DecoderConfig, measure: Measure, seconds: float, seed: int, peer: Peer) -> Training:
    """Transformers' Chameleon."""
    torch.manual_seed(seed)
    model = model_of("chameleon", config).train()
    dataset, rng = TokenDataset(data), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peer.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def documents() -> Iterator[list[int]]:
        while True:
            order = rng.permutation(len(dataset)).tolist()
            for i in range(0, len(order) - peer.size + 1, peer.size):
                yield order[i : i + peer.size]

    batches = documents()

    def step(done: int, share: float) -> None:
        ids, real = padded(dataset, next(batches))
        for group in optimizer.param_groups:
            group["lr"] = peer.rate * warmup_linear(done, share, 20)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=peer.half):
            loss = model(input_ids=ids, attention_mask=real.long(), labels=ids.masked_fill(~real, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Training(f"theirs, {peer}, seed {seed}", seconds, step, partial(measure, lambda ids, _: model(input_ids=ids).logits))


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
    recipe = Recipe()
    peers = [Peer(rate, size) for rate, size in itertools.product(RATES, BATCHES)]
    peers += [Peer(RATES[1], size, half=True) for size in BATCHES if recipe.half]
    if o.theirs is not None:
        peers = [Peer(o.theirs[0], int(o.theirs[1]))]
    losses_of_peers = race([theirs(tokens, config, measure, o.seconds, 0, peer) for peer in peers])
    tried = dict(zip(peers, losses_of_peers, strict=True))
    best = min(peers, key=lambda peer: tried[peer])
    seconds, losses, all_of_ours = [], [], []
    for seed in (0,) if o.quick else (0, 1, 2):
        racing = [theirs(tokens, config, measure, o.seconds, seed, best)]
        racing += [ours(tokens, config, measure, share * o.seconds, seed, recipe) for share in SHARES]
        wanted, *reached = race(racing)
        losses.append(wanted)
        all_of_ours += [{"seed": seed, "seconds": t.seconds, "loss": loss} for t, loss in zip(racing[1:], reached, strict=True)]
        seconds.append(
            min((t.seconds for t, loss in zip(racing[1:], reached, strict=True) if loss <= wanted), default=math.inf)
        )
    middle = statistics.median(seconds)
    row: dict[str, Any] = {
        "case": f"to the loss of {o.seconds:g} s, median of {len(losses)} seeds",
        "unit": "s",
        "ours": middle,
    }
    row |= {"peer": "chameleon", "theirs": o.seconds, "ratio": o.seconds / middle, "loss": statistics.median(losses)}
    more: dict[str, Any] = {"seconds": seconds, "losses": losses, "ours": all_of_ours}
    more["theirs_tried"] = {str(peer): loss for peer, loss in tried.items()}
    more["ours_in"] = "bfloat16" if recipe.half else "float32"
    write_results("loss_race", [row], out=o.out, **more)


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
