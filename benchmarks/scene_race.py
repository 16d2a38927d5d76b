"""Which recipe makes a small decoder follow its prompts sooner: equal seconds of one thread, right outputs of every direction.

    python benchmarks/scene_race.py [--seconds 240] [--seeds 0 1 2] [--rows ROW ...] [--work FOLDER]

Measured: the tokenizer decides; see the table. Rows of a later run replace those of the same name in the results.

Every row changes what its name says against another row. All train the demo's decoder on the demo's scenes (32 pixels, one or two
objects) for the same seconds of CPU time, two processes of one thread at a time; then 200 new scenes of each direction are judged by the
oracle, and 200 with color-shape pairs that only text names. These pairs are others than those of the reported scores. Tokenizers are
trained once per kind, for equal minutes, on scenes of all folds. Nats are per token of what documents learn, over allowed tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, in_a_process, machine, versions
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unitok.api import Unitok
from unitok.data.modules import TokenShards
from unitok.data.packing import PackedDataset
from unitok.data.shards import TokenDataset
from unitok.generation_config import GenerationConfig
from unitok.model import Decoder, DecoderConfig
from unitok.model.loss import next_id_loss
from unitok.scenes.evaluate import DIRECTIONS, Evaluation, config_of_scenes
from unitok.scenes.files import read_scenes, write_scenes
from unitok.scenes.world import kept_out_pairs
from unitok.training.optim import build_optimizers
from unitok.training.shell import warmup_linear
from unitok.vocab import Vocab

SCENES, SHOWN = 16_000, 200  # to train on; to measure on
MINUTES = {"image": 3.0, "audio": 1.5}  # of the tokenizers' trainings
DECODER = DecoderConfig(
    hidden_size=128, num_hidden_layers=4, intermediate_size=384, num_attention_heads=2, num_key_value_heads=2, head_dim=64,
    max_position_embeddings=256, span_positions=72,
)  # fmt: skip
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A recipe. image, audio: the kind of tokenizer, a key of `TOKENIZERS`; data: of `TokenShards`; muon_every: of `DecoderTraining`.

    model: changes a decoder, or wraps it; one that is wrapped is not sampled from. change: of a batch, given the fraction of the run.
    """

    image: str = "patch"
    audio: str = "patch"
    data: dict[str, Any] = field(default_factory=lambda: {"prompt_loss_weight": {"image": 0.2}})
    muon_every: int = 4
    lr: float = 1e-2
    decoder: DecoderConfig = DECODER
    model: Callable[[Decoder, Unitok], nn.Module] | None = None
    change: Callable[[Batch, Vocab, float, torch.Generator], Batch] | None = None


#: Options of `unitok fit` by kind of tokenizer.
TOKENIZERS: dict[str, dict[str, dict[str, str]]] = {
    "image": {"patch": {}, "vqgan": {"tokenizer.encoder": "vqgan"}, "patch, 128 codes": {"tokenizer.codebook_size": "128"}},
    "audio": {
        "patch": {},
        "seanet": {"tokenizer.encoder": "seanet"},
        "patch, 4 levels of 32": {"tokenizer.num_codebooks": "4", "tokenizer.codebook_size": "32"},
    },
}


# ---- What some rows change -------------------------------------------------------------------------------------------


def inside(tokens: Tensor, vocab: Vocab, name: str) -> Tensor:
    """Which tokens are codes of a modality."""
    ranges = [(tokens >= r.offset) & (tokens < r.stop) for r in vocab.body(name)]
    return torch.stack(ranges).any(0)


class Neighbors(nn.Module):
    """A decoder whose input also has the code above the next one, an embedding of its own (8 columns)."""

    def __init__(self, decoder: Decoder, bundle: Unitok):
        super().__init__()
        self.decoder, self.vocab = decoder, bundle.vocab
        self.embed_above = nn.Embedding(bundle.vocab.size, decoder.config.hidden_size)
        nn.init.zeros_(self.embed_above.weight)

    def hidden(self, batch: Batch) -> Tensor:
        ids = batch["ids"]
        above = F.pad(ids, (7, 0))[
            :, : ids.shape[1]
        ]  # the next code is one to the right of this one, so its upper neighbor is 7 back
        known = inside(ids, self.vocab, "image") & inside(above, self.vocab, "image")
        inputs = self.decoder.model.embed_tokens.weight.new_zeros(*ids.shape, self.decoder.config.hidden_size)
        inputs[known] = self.embed_above(above[known])
        handle = self.decoder.model.embed_tokens.register_forward_hook(lambda module, args, out: out + inputs)
        try:
            return self.decoder.hidden(ids, batch["positions"], batch["documents"], batch["span_positions"])
        finally:
            handle.remove()


class FromCodebooks(nn.Module):
    """Adds to the rows of a matrix [V, C], those of the codes, what an MLP makes of their codebook vectors; a parametrization."""

    def __init__(self, codebooks: dict[tuple[int, int], Tensor], width: int):
        super().__init__()
        self.ranges = list(codebooks)
        self.vectors = [F.normalize(vectors - vectors.mean(0)) * vectors.shape[1] ** 0.5 for vectors in codebooks.values()]
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(v.shape[1], 64), nn.SiLU(), nn.Linear(64, width)) for v in self.vectors
        )
        for mlp in self.mlps:
            nn.init.zeros_(mlp[-1].weight)
            nn.init.zeros_(mlp[-1].bias)

    def forward(self, matrix: Tensor) -> Tensor:
        added = torch.zeros_like(matrix)
        for (start, stop), vectors, mlp in zip(self.ranges, self.vectors, self.mlps, strict=True):
            added[start:stop] = mlp(vectors)
        return matrix + added


def know_codebooks(*names: str) -> Callable[[Decoder, Unitok], nn.Module]:
    """Embedding and head know the vectors of the codes of these modalities, so that near codes share what is learned."""

    def wrap(decoder: Decoder, bundle: Unitok) -> nn.Module:
        codebooks = {}
        for name in names:
            quantizer = bundle.require(name).quantizer
            books = quantizer.codebooks if hasattr(quantizer, "codebooks") else [quantizer.codebook]
            for r, book in zip(bundle.vocab.body(name), books, strict=True):
                codebooks[r.offset, r.stop] = book.embed.clone()
        for layer in (decoder.model.embed_tokens, decoder.lm_head):
            parametrize.register_parametrization(layer, "weight", FromCodebooks(codebooks, decoder.config.hidden_size))
        return decoder

    return wrap


def drop_text(batch: Batch, vocab: Vocab, fraction: float, random: torch.Generator) -> Batch:
    """A tenth of the text tokens of the input become another text token."""
    ids = batch["ids"].clone()
    (r,) = vocab.body("text")
    chosen = inside(ids, vocab, "text") & (torch.rand(ids.shape, generator=random) < 0.1)
    ids[chosen] = torch.randint(r.offset, r.stop, (int(chosen.sum()),), generator=random)
    return batch | {"ids": ids}


def noisy_codes(batch: Batch, vocab: Vocab, fraction: float, random: torch.Generator) -> Batch:
    """A twentieth of the image tokens of the input become another one, until the last fifth of the run."""
    ids = batch["ids"].clone()
    (r,) = vocab.body("image")
    chosen = inside(ids, vocab, "image") & (torch.rand(ids.shape, generator=random) < (0.05 if fraction < 0.8 else 0.0))
    ids[chosen] = torch.randint(r.offset, r.stop, (int(chosen.sum()),), generator=random)
    return batch | {"ids": ids}


def rare_codes(power: float) -> Callable[[Batch, Vocab, float, torch.Generator], Batch]:
    """Image tokens weigh by a power of how rare they are in the batch, one in the mean."""

    def change(batch: Batch, vocab: Vocab, fraction: float, random: torch.Generator) -> Batch:
        chosen = inside(batch["targets"], vocab, "image") & (batch["weights"] > 0)
        if not chosen.any():
            return batch
        codes = batch["targets"][chosen]
        weights = torch.bincount(codes, minlength=vocab.size)[codes].float() ** -power
        scaled = batch["weights"].clone()
        scaled[chosen] *= weights / weights.mean()
        return batch | {"weights": scaled}

    return change


NOW = Row()
ROWS = {
    "now": NOW,
    "as before: encoders with convolutions, Muon in every step, prompts not learned": replace(
        NOW, image="vqgan", audio="seanet", data={}, muon_every=1
    ),
    "image encoder with convolutions": replace(NOW, image="vqgan"),
    "audio encoder with convolutions": replace(NOW, audio="seanet"),
    "Muon in every step": replace(NOW, muon_every=1),
    "Muon in every second step": replace(NOW, muon_every=2),
    "Muon in every eighth step": replace(NOW, muon_every=8),
    "prompts not learned": replace(NOW, data={}),
    "given images learned as much": replace(NOW, data={"prompt_loss_weight": {"image": 1.0}}),
    "no span positions": replace(NOW, decoder=replace(DECODER, span_positions=0)),
    "image codebook of 128": replace(NOW, image="patch, 128 codes"),
    "audio: 4 levels of 32 codes": replace(NOW, audio="patch, 4 levels of 32"),
    "embedding of the code above": replace(NOW, model=Neighbors),
    "codebook vectors in embedding and head": replace(NOW, model=know_codebooks("image", "audio")),
    "text tokens dropped": replace(NOW, change=drop_text),
    "noise in the codes": replace(NOW, change=noisy_codes),
    "rare codes weigh more, power 0.5": replace(NOW, change=rare_codes(0.5)),
    "AdamW 5e-3": replace(NOW, lr=5e-3),
    "AdamW 2e-2": replace(NOW, lr=2e-2),
}


# ---- Data ------------------------------------------------------------------------------------------------------------


def unitok(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "unitok", *map(str, words)], check=True)


def make_data(work: Path, row: Row) -> Path:
    """The folder with the bundle and the tokens of a row, made if need be."""
    scenes = work / "scenes"
    for name, count, fold, seed in (
        ("train", SCENES, None, 1),
        ("test", SHOWN, "seen", 2),
        ("systematic", SHOWN, "systematic", 3),
    ):
        if not (scenes / name / "documents.jsonl").exists():
            write_scenes(scenes / name, count, seed, 2, fold, pairs=kept_out_pairs(1))
    if not (work / "text").exists():
        unitok("train-text-tokenizer", scenes / "train" / "text.txt", "--out", work / "text", "--vocab-size", 512)
    parts = ["--text", work / "text"]
    for kind, data in (("image", "images"), ("audio", "audio")):
        name = getattr(row, kind)
        run = work / f"{kind}-{_slug(name)}"
        options = {"minutes": str(MINUTES[kind])} | TOKENIZERS[kind][name]
        flags = [word for key, value in options.items() for word in (f"--model.init_args.{key}", value)]
        if not (run / "checkpoints" / "final.ckpt").exists():
            unitok(
                "fit",
                "--config",
                f"scenes/{kind}.yaml",
                "--out",
                run,
                "--resume",
                "auto",
                "--data.init_args.path",
                scenes / "train" / data,
                *flags,
            )
        parts += [f"--{kind}", run]
    folder = work / f"{_slug(row.image)}+{_slug(row.audio)}"
    if not (folder / "systematic" / "dataset.json").exists():
        unitok("bundle", folder / "bundle", *parts, "--overwrite")
        for name in ("train", "test", "systematic"):
            unitok("tokenize", scenes / name, folder / name, "--bundle", folder / "bundle")
    return folder


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


# ---- A run -----------------------------------------------------------------------------------------------------------


def run(row: Row, folder: Path, scenes: Path, seconds: float, seed: int) -> dict[str, float]:
    """Train by a recipe for so many seconds of this process; measure."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    base: dict[str, Any] = {"sequence_length": 1536, "max_length": 256, "batch_size": 1, "loss_weights": {"text": 3.0}}
    data = TokenShards(str(folder / "train"), seed=seed, **(base | row.data))
    packed = data.training_data()
    vocab, allowed = packed.vocab, packed.grammar.allowed_sets
    decoder = Decoder(replace(row.decoder, vocab_size=vocab.size))
    bundle = Unitok.from_pretrained(folder / "bundle")
    model = row.model(decoder, bundle) if row.model else decoder
    optimizers = build_optimizers(model, "muon", row.lr, 0.02, (0.9, 0.95), 0.0, 3, row.muon_every)

    def hidden(batch: Batch) -> Tensor:
        if isinstance(model, Decoder):
            return model.hidden(batch["ids"], batch["positions"], batch["documents"], batch["span_positions"])
        return model.hidden(batch)  # type: ignore[operator]

    epoch, waiting, steps, began = -1, [], 0, time.process_time()
    while (fraction := (time.process_time() - began) / seconds) < 1:
        if not waiting:
            epoch += 1
            waiting = list(packed.order(epoch))
        batch = data.collate([packed.row(epoch, waiting.pop(0))])
        if row.change:
            batch = row.change(batch, vocab, fraction, random)
        for optimizer, peak in zip(optimizers, (row.lr, 0.02), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * warmup_linear(steps, fraction, 30, 0.3)
        loss = next_id_loss(hidden(batch), decoder.lm_head.weight, batch, allowed, 1e-5).total / batch["weights"].sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        steps += 1
    for layer in (decoder.model.embed_tokens, decoder.lm_head):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    model.eval()
    measured: dict[str, float] = {"steps": steps} | _nats(hidden, decoder, data, folder / "test", allowed)
    return measured | _right(decoder, bundle, scenes) if isinstance(model, Decoder) else measured


@torch.no_grad()
def _nats(
    hidden: Callable[[Batch], Tensor], decoder: Decoder, data: TokenShards, folder: Path, allowed: Any
) -> dict[str, float]:
    """Nats per learned token of new documents, by modality."""
    packed = PackedDataset(TokenDataset(folder), 1536, condition_dropout=0.0, vocab=data.vocab)
    sums: dict[str, list[float]] = {name: [] for name in data.vocab.spans}
    for index in packed.order(0):
        batch = data.collate([packed.row(0, index)])
        loss = next_id_loss(hidden(batch), decoder.lm_head.weight, batch, allowed)
        targets = batch["targets"].flatten()[loss.index]
        for name in sums:
            sums[name] += loss.nll[inside(targets, data.vocab, name)].tolist()
    return {f"nats/{name}": mean(values) for name, values in sums.items()}


def _right(decoder: Decoder, bundle: Unitok, scenes: Path) -> dict[str, float]:
    """Percent of right outputs by direction and fold."""
    bundle = Unitok(bundle.vocab, bundle.tokenizers, decoder)
    found = {}
    with tempfile.TemporaryDirectory() as out:
        evaluation = Evaluation(bundle, Path(out), 0, config_of_scenes(bundle, GenerationConfig()))
        for fold in ("test", "systematic"):
            for direction in DIRECTIONS:
                right = evaluation.right(direction, scenes / fold, read_scenes(scenes / fold))
                found[f"{fold}/{direction.name}"] = 100 * mean(right)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=240.0, help="of CPU time of each run, one thread")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="default: all")
    p.add_argument("--work", type=Path, default=Path("runs/scene_race"), help="folder for scenes, tokenizers and tokens")
    p.add_argument("--out", type=Path, default=RESULTS / "scene_race.json")
    p.add_argument("--only", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.only:
        name, seed = o.only
        torch.set_num_threads(1)
        print(json.dumps(run(ROWS[name], make_data(o.work, ROWS[name]), o.work / "scenes", o.seconds, int(seed))))
        return
    for name in o.rows:
        make_data(o.work, ROWS[name])
    results = json.loads(o.out.read_text()) if o.out.exists() else {"runs": {}}
    jobs = [(name, seed) for seed in o.seeds for name in o.rows]

    def one(job: tuple[str, int]) -> tuple[tuple[str, int], dict[str, float]]:
        name, seed = job
        more = ["--seconds", str(o.seconds), "--work", str(o.work)]
        return job, in_a_process(__file__, "--only", name, str(seed), *more)

    with ThreadPoolExecutor(2) as pool:
        for (name, seed), measured in pool.map(one, jobs):
            print(f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.3g}" for key, value in measured.items()), flush=True)
            results["runs"].setdefault(name, {})[str(seed)] = measured
            results |= {"machine": machine("cpu"), "versions": versions(), "seconds": o.seconds}
            o.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
