"""What weights of two bytes and of one change: the built-in bundle in bfloat16 and int8 beside float32.

    python benchmarks/weights.py [--count 200] [--tokens 1000]

Measured: the oracle finds as many outputs right as in float32, in every direction. Log-probabilities differ by 0.003 (bfloat16) and 0.012
(int8) on average, 99.9 and 99.7 % of the likeliest tokens are the same, and 100 and 94 % of 1,024 greedy tokens until the first that differs.

`mean` and `largest`: differences of log-probabilities to those of float32, at every place of documents of new scenes, over the tokens
with a probability of a thousandth or more there. `same choice`: percent of these places with the same likeliest
token. `same tokens`: percent of at least 1,000 greedy tokens of images until the first that differs. Then percent of new scenes that the
oracle finds right, by direction, greedy. The decoder in memory: weights as they generate.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, circumstances

from unitok.api import Unitok
from unitok.document import RawDocument
from unitok.generation_config import GenerationConfig
from unitok.grammar import Grammar
from unitok.interleaved import read_raw_documents
from unitok.model.native.decoder import NativeDecoder
from unitok.scenes.evaluate import DIRECTIONS, Evaluation, config_of_scenes
from unitok.scenes.files import read_scenes, write_scenes
from unitok.scenes.world import caption

KINDS = ("float32", "bfloat16", "int8")


def log_probabilities(bundle: Unitok, copy: NativeDecoder, documents: list[Any]) -> torch.Tensor:
    """[places, V] at every place of documents."""
    grammar, found = Grammar(bundle.vocab), []
    for document in documents:
        ids = bundle.vocab.encode(document)[: bundle.model.config.max_position_embeddings]
        length, sent = len(ids), torch.from_numpy(ids)[None]
        spans = torch.from_numpy(grammar.span_positions(ids))[None]
        states = copy.step(sent, torch.arange(length)[None], copy.new_cache(1, length), length, spans, start=0)
        found.append(copy.head_of(((0, bundle.vocab.size),))(states[0]).log_softmax(-1))
    return torch.cat(found)


def greedy(bundle: Unitok, texts: list[str]) -> list[np.ndarray]:
    """Codes of the images that follow captions, each token the likeliest."""
    outputs = bundle.generate([[text] for text in texts], modalities="image", temperature=0.0)
    return [output.new.segments[-1].codes.flatten() for output in outputs]


def right(bundle: Unitok, scenes: Path) -> dict[str, float]:
    """Percent of right outputs by direction."""
    with tempfile.TemporaryDirectory() as out:
        config = config_of_scenes(bundle, GenerationConfig(text={"temperature": 0.0}))
        evaluation, rows = Evaluation(bundle, Path(out), 0, config), read_scenes(scenes)
        return {d.name: 100 * float(np.mean(evaluation.outputs(d, scenes, rows)[1])) for d in DIRECTIONS}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=200, help="scenes of each direction")
    p.add_argument("--tokens", type=int, default=1000, help="greedy tokens, at least")
    p.add_argument("--out", type=Path, default=RESULTS / "weights.json")
    o = p.parse_args()
    exact = Unitok.from_pretrained("scenes")
    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder) / "scenes"
        write_scenes(scenes, o.count, 91, 3, "seen", resolution=64)
        raws = [raw for raw in read_raw_documents(scenes / "documents.jsonl", exact.types) if isinstance(raw, RawDocument)]
        documents = [exact.read_raw(raw) for raw in raws[: o.count]]
        texts = [caption(row["scene"]) for row in read_scenes(scenes)][: o.tokens // 64 + 1]
        reference = log_probabilities(exact, NativeDecoder(exact.model, "float32"), documents)
        likely, wanted = reference > np.log(1e-3), greedy(exact, texts)
        rows = []
        for kind in KINDS:
            bundle = Unitok.from_pretrained("scenes", dtype=kind)
            found = log_probabilities(bundle, NativeDecoder(exact.model, kind), documents)
            difference = (found - reference)[likely].abs()
            made = greedy(bundle, texts)
            same = sum(int((a == b).cumprod().sum()) for a, b in zip(made, wanted, strict=True))
            values = {
                "log-probabilities, mean difference": float(difference.mean()),
                "log-probabilities, largest difference": float(difference.max()),
                "same choice, percent": 100 * float((found.argmax(-1) == reference.argmax(-1)).float().mean()),
                f"same tokens of {sum(map(len, wanted)):,}, percent": 100 * same / sum(map(len, wanted)),
            }
            values |= {f"{name}, percent right": value for name, value in right(bundle, scenes).items()}
            print(kind, values, flush=True)
            rows.append(values)
    cases = [
        {"case": f"{name}: {kind}", "unit": "", "ours": row[name], "peer": "float32", "theirs": rows[0][name], "ratio": None}
        for name in rows[0]
        for kind, row in zip(KINDS[1:], rows[1:], strict=True)
    ]
    results = circumstances("cpu") | {"cases": cases, "scenes": o.count}
    o.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
