"""Training steps of the decoder beside transformers' Chameleon and Qwen3 at equal shape.

    python benchmarks/train_step.py [--quick] [--compile] [--half] [--device cuda]

Measured on a CPU, forward, backward and optimizer, with the same loss: 2.35 to 2.73 times Qwen3's tokens that are not padding per
second, 2.39 to 2.55 times Chameleon's. In bfloat16 on cores that multiply it in tiles (AMX): 2.79 to 3.12 and 2.34 to 2.83 times, compiled
2.52 to 3.03 and 2.34 to 2.93 times, at 0.34 to 0.55 times their memory.

The documents are those of scenes (text, images and audio in all orders), as `unitok tokenize` writes them. unitok packs them in
rows. The peers pad them to the longest of each batch, with labels of -100, as transformers' collators do, which makes about half
of their tokens padding. A step of each holds about as many tokens, padding included. All use torch's fused AdamW at
one learning rate; fp32 on a CPU, bfloat16 autocast on a GPU and with `--half`. `all tokens`: the loss of the peers, a softmax over the
whole vocabulary; `allowed`: over the tokens that the grammar allows, which is unitok's default.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import in_turns, serve, write_results

from unitok.bundle import Bundle
from unitok.configs import CONFIGS
from unitok.data.packing import PackedDataset
from unitok.data.shards import TokenDataset
from unitok.hardware import HARDWARE, keep_large_blocks
from unitok.interop.decoder import QWEN3_FIELDS
from unitok.modalities import build_vocab
from unitok.model import Decoder, DecoderConfig
from unitok.model.costs import count
from unitok.model.loss import next_id_loss
from unitok.model.presets import PRESETS
from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig, ImageTokenizer, ImageTokenizerConfig, TextTokenizer

SIZES = {"2m": "tiny", "25m": "25m", "100m": "100m", "350m": "350m"}
PEERS = ("qwen3", "chameleon")


def make_tokens(work: Path) -> Path:
    """Token shards of 3,000 scenes, made with the demo's tokenizers before their training: lengths are what counts here."""
    tokens = work / "tokens"
    if (tokens / "dataset.json").exists():
        return tokens

    def unitok(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "unitok", *words], check=True)

    unitok("scenes", str(work / "scenes"), "--count", "3000", "--seed", "1", "--max-objects", "2")
    unitok("train-text-tokenizer", str(work / "scenes" / "text.txt"), "--out", str(work / "text"), "--vocab-size", "512")
    torch.manual_seed(0)
    parts: dict[str, Any] = {"text": TextTokenizer.from_pretrained(work / "text")}
    for name, model, config in (
        ("image", ImageTokenizer, ImageTokenizerConfig),
        ("audio", AudioTokenizer, AudioTokenizerConfig),
    ):
        given = yaml.safe_load((CONFIGS / "scenes" / f"{name}.yaml").read_text())["model"]["init_args"]["tokenizer"]
        part: Any = model(config(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}))
        part.train()
        width = part.config.z_channels if name == "image" else part.config.dimension
        part.quantizer.init_codebook(part.quantizer.project(torch.randn(4, 512, width)).projected)
        parts[name] = part.eval()
    Bundle(build_vocab(parts), parts).save_pretrained(work / "bundle", overwrite=True)
    unitok("tokenize", str(work / "scenes"), str(tokens), "--bundle", str(work / "bundle"))
    return tokens


def packed_batches(
    tokens: Path, sequence_length: int, rows: int, number: int
) -> tuple[list[dict[str, torch.Tensor]], PackedDataset]:
    data = PackedDataset(TokenDataset(tokens), sequence_length, condition_dropout=0.0)
    batches = []
    for i in range(number):
        items = [data[0, i * rows + j] for j in range(rows)]
        batches.append({key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]})
    return batches, data


def padded_batches(tokens: Path, ids_a_batch: int, number: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Random documents, padded on the right to the longest of their batch; and how many tokens are real."""
    dataset = TokenDataset(tokens)
    lengths = dataset.lengths()
    order = np.random.default_rng(0).permutation(len(dataset))
    documents = max(1, round(ids_a_batch / lengths.mean()))
    batches, real = [], 0
    for i in range(number):
        chosen = [torch.from_numpy(dataset.ids(int(d))) for d in order[i * documents : (i + 1) * documents]]
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {"input_ids": pad(chosen, True, dataset.vocab.pad), "labels": pad(chosen, True, -100)}
        batch["attention_mask"] = pad([torch.ones_like(ids) for ids in chosen], True, 0)
        batches.append(batch)
        real += sum(len(ids) for ids in chosen)
    return batches, real


def theirs(peer: str, c: DecoderConfig) -> Any:
    """The same shape in transformers, with its own initialization."""
    import transformers

    shape: dict[str, Any] = {name: getattr(c, name) for name in QWEN3_FIELDS}
    if peer == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, use_cache=False))
    del shape["head_dim"]  # Chameleon's is the width by the heads
    image = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 8, "num_embeddings": 8}
    config = transformers.ChameleonConfig(
        **shape, vq_config=image | {"latent_channels": 8}, vocabulary_map={"<image>": 0}, use_cache=False
    )
    model = transformers.ChameleonForConditionalGeneration(config)
    del model.model.vqmodel  # neither its memory nor its parameters should count
    return model


def steps(which: str, size: str, tokens: Path, o: argparse.Namespace) -> tuple[Callable[[], None], int, Any]:
    """What runs some training steps; how many tokens of these are not padding; and the configuration of the model."""
    torch.manual_seed(0)
    number, device = o.steps, o.device
    vocab = TokenDataset(tokens).vocab
    config = replace(PRESETS[SIZES[size]].config, vocab_size=vocab.size, max_position_embeddings=1024)
    if which == "ids":
        packed, _ = packed_batches(tokens, o.ids, 1, number)
        real = sum(int((b["documents"] >= 0).sum()) for b in packed)
        padded, real_theirs = padded_batches(tokens, o.ids, number)
        positions = sum(b["input_ids"].numel() for b in padded)
        return (
            lambda: None,
            real,
            {"theirs": real_theirs, "padding_theirs": 1 - real_theirs / positions, "slots": number * o.ids},
        )
    precise = torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or o.half)
    if which in PEERS:
        model = theirs(which, config).to(device).train()
        batches, real = padded_batches(tokens, o.ids, number)
        forward: Any = torch.compile(model) if o.compile else model

        def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return forward(**batch).loss
    else:
        model = Decoder(config).to(device).train()
        for p in model.parameters():  # ours starts with zeros: give every product real work
            torch.nn.init.normal_(p, mean=float(p.ndim < 2), std=0.02)
        batches, data = packed_batches(tokens, o.ids, 1, number)
        real = sum(int((b["documents"] >= 0).sum()) for b in batches)
        kinds = None if which == "all" else data.grammar.allowed_sets
        if o.compile:
            for layer in model.model.layers:
                layer.compile(dynamic=False)

        def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            hidden = model.hidden(batch["ids"], batch["positions"], batch["documents"])
            return next_id_loss(hidden, model.lm_head.weight, batch, kinds).total / batch["weights"].sum()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in batches]

    def run() -> None:
        for batch in batches:
            with precise:
                loss = loss_of(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run, real, config


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="2m only, few rounds")
    p.add_argument("--hardware", choices=HARDWARE, default="h200", help="whose peak the MFU is taken of")
    p.add_argument("--device", default="cpu")
    p.add_argument("--sizes", nargs="+", choices=SIZES, default=["2m", "25m"])
    p.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    p.add_argument("--compile", action="store_true", help="torch.compile for all; compile time does not count")
    p.add_argument("--half", action="store_true", help="bfloat16 autocast on a CPU, too: for those that multiply it fast (AMX)")
    p.add_argument("--ids", type=int, default=4096, help="tokens per step")
    p.add_argument("--steps", type=int, default=4, help="steps a round; on a CPU one for the larger sizes")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--keep-for-all", action="store_true", help="the peers' allocator keeps large blocks, too")
    p.add_argument("--work", type=Path, default=Path("runs/train_step"), help="folder for scenes and tokens")
    p.add_argument("--out", type=Path, help="default: benchmarks/results/train_step.json")
    p.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    o = p.parse_args()
    tokens = make_tokens(o.work)
    if o.only:
        which, size = o.only
        if which in ("all", "allowed"):
            keep_large_blocks()
        serve(steps(which, size, tokens, o)[0], o.device)
        return
    cases = []
    given = o.steps
    _, real, info = steps("ids", "2m", tokens, o)
    more: dict[str, Any] = {
        "tokens_per_step": real / o.steps,
        "padding": {"ours": 1 - real / info["slots"], "theirs": info["padding_theirs"]},
    }
    for size in ["2m"] if o.quick else o.sizes:
        o.steps = given if size == "2m" or o.device != "cpu" else 1
        _, real, info = steps("ids", size, tokens, o)
        flags = ["--ids", str(o.ids), "--steps", str(o.steps), "--device", o.device, "--work", str(o.work)]
        flags += [*(["--compile"] if o.compile else []), *(["--half"] if o.half else [])]
        jobs = {which: [*flags, "--only", which, size] for which in ("all", "allowed", *o.peers)}
        measured = in_turns(__file__, jobs, 3 if o.quick else o.rounds, o.keep_for_all)
        config = replace(PRESETS[SIZES[size]].config, vocab_size=TokenDataset(tokens).vocab.size)
        for peer in o.peers:
            for which, name in (("all", "all tokens"), ("allowed", "allowed")):
                case = f"{size}{' compiled' if o.compile else ''}{' in bfloat16' if o.half else ''}, loss over {name}"
                ours, other = real / measured[which]["seconds"], info["theirs"] / measured[peer]["seconds"]
                row: dict[str, Any] = {
                    "case": f"{case}: speed",
                    "unit": "tokens/s",
                    "ours": ours,
                    "peer": peer,
                    "theirs": other,
                }
                row["ratio"] = ours / other
                if o.device != "cpu" and which == "all":
                    mean = int(TokenDataset(tokens).lengths().mean())
                    row["mfu"] = ours * count(config, mean).flops / HARDWARE[o.hardware]
                cases.append(row)
                row = {"case": f"{case}: memory", "unit": "GB", "ours": measured[which]["gb"], "peer": peer}
                cases.append(row | {"theirs": measured[peer]["gb"], "ratio": measured[peer]["gb"] / measured[which]["gb"]})
    print(json.dumps(more))
    write_results(f"train_step{'_compiled' if o.compile else ''}{'_half' if o.half else ''}", cases, o.device, o.out, **more)


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
