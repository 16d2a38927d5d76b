"""Writes docs/results.md, everything that the project says of itself with the command that shows it: `make benchmarks-page`.

python benchmarks/write_results_page.py [--out docs/results.md]

Numbers come from benchmarks/results/ and from the card of the built-in bundle. What trains for an hour or more has its rows here, with the date of
its entry in docs/notes.md.
"""

import json
from typing import Any, NamedTuple

from write_page import FOLDER, table, write, written

from unitok.hub import BUILT_IN

HEAD = """# Results

<!-- Written by benchmarks/write_results_page.py (`make benchmarks-page`). -->

Every claim of the project, the command that shows it, and when and where it was measured. What is beside it ran in the same session on the same
machine, with its best settings; a ratio over 1 is in favor of unitok. Machines differ, and so will your numbers. [All tables](benchmarks.md), and
[what was tried](notes.md), also in vain.

"""


class Claim(NamedTuple):
    """A row that a file of benchmarks/results/ holds. peer: whose ratio is shown, None for none."""

    text: str
    file: str
    case: str
    peer: str | None = None


SPEED = (
    Claim("photographs at 0.156 bits per pixel after 15 minutes, PSNR", "photos", "15 minutes: psnr_db", "taming"),
    Claim("encoding an image of 256 pixels", "image_tokenizer", "encode f16-16384 256px batch 1: speed", "taming"),
    Claim("encoding 30 s of audio", "audio_tokenizer", "encode 30 s batch 1: speed", "encodec"),
    Claim("small image files to shards", "tokenization", "images of 64 px, small network", "plain loop"),
    Claim("training a decoder of 1.8M, without padding", "train_step", "2m, loss over all tokens: speed", "qwen3"),
    Claim("training a decoder of 25M, without padding", "train_step", "25m, loss over all tokens: speed", "qwen3"),
    Claim("a loss that the peer reaches in 90 s", "loss_race", "to the loss of 90 s, median of 3 seeds", "chameleon"),
    Claim("generation, 10M, batch 1", "generate", "10m, batch 1", "dynamic"),
    Claim("generation, 10M, batch 16, with guidance", "generate", "10m, batch 16, guidance (doubled)", "dynamic"),
    Claim("generation, 10M, batch 1, four bytes a weight", "generate", "10m, batch 1, weights float32", "llama.cpp F32"),
    Claim("generation, 10M, batch 1, one byte a weight", "generate", "10m, batch 1, weights int8", "llama.cpp Q8_0"),
    Claim("generation, 100M, batch 1, one byte a weight", "generate", "100m, batch 1, weights int8", "llama.cpp Q8_0"),
    Claim("100,000,000 documents, packed: memory", "scale", "100,000,000 documents: peak with one part packed"),
    Claim("a million documents packed", "scale", "100,000,000 documents: all, a million documents"),
    Claim("GPU: an image, 100M, batch 1", "on_gpu.gpu", "generation, 100m, batch 1", "transformers, dynamic cache"),
    Claim("GPU: 64 images with guidance, 100M", "on_gpu.gpu", "generation, 100m, batch 64, guidance"),
    Claim("GPU: training of 100M, compiled", "on_gpu.gpu", "training, 100m, 65536 tokens, varlen, compiled"),
    Claim("GPU: training of 350M, compiled", "on_gpu.gpu", "training, 350m, 32768 tokens, varlen, compiled"),
    Claim("GPU: encoding images of 256 pixels", "image_tokenizer.gpu", "encode f16-16384 256px batch 32: speed", "taming"),
)
TWO_CORES = "2 CPU cores"
#: Text, value, command, date, machine.
LEARNED = (
    ("make demo: captions become images that are right in everything they name; images are described so", "89 %; 97.5 %",
     "make demo", "2026-11-28", "2 cores of an Intel Xeon (AVX-512, AMX), 2,947 steps of the decoder"),
    ("the same where two cores make fewer steps in 13 minutes", "88 %; 96 %", "make demo", "2026-11-26", "2 cores of an AMD EPYC (AVX-512), 2,313 steps"),
    ("recordings of new sentences written down, word errors, after 90 minutes of one core", "28.0 %",
     "python examples/speech/evaluate.py", "2026-11-27", TWO_CORES),
    ("new sentences spoken, word errors as a recognizer hears them, three seeds (recordings: 9.2 %)", "33.7, 35.2, 28.0 %",
     "python examples/speech/evaluate.py", "2026-11-27", TWO_CORES),
    ("24,000 drawn clips, 60 minutes: captions become videos that are right in everything they name; videos are described so", "70.5 %; 82.0 %",
     "python examples/video/evaluate.py", "2026-11-28", TWO_CORES),
    ("a grid for four frames: clips of 8 frames, some of which cross, read right by the oracle from 192 codes", "91.5 %",
     "python examples/video/evaluate.py", "2026-11-28", TWO_CORES),
    ("memory while a video is tokenized: five minutes; an hour", "462 MB; 518 MB", "pytest -m long tests/test_video_clips.py", "2026-11-28",
     TWO_CORES),
)  # fmt: skip
PROVED = (
    ("a run that is killed anywhere goes on with equal weights, bit for bit", "pytest -m long tests/training/test_kill.py"),
    ("what generates is well-formed, whatever the weights", "pytest tests/test_grammar.py tests/sample"),
    ("packing is a pure function of (seed, epoch, index)", "pytest tests/data/test_packing.py"),
    ("imported checkpoints give the outputs of their projects", "pytest tests/interop"),
    ("exports give the logits of transformers and llama.cpp", "pytest tests/interop"),
    ("hostile files end in one line, and never in code that they bring", "pytest tests/data/prepare tests/media tests/interop"),
)


def _shown(claim: Claim) -> list[str]:
    """The cells of a claim. Errors: `KeyError` for a case that the file does not have."""
    results: dict[str, Any] = json.loads((FOLDER / "results" / f"{claim.file}.json").read_text())
    rows = [r for r in results["cases"] if r["case"] == claim.case and (claim.peer is None or r.get("peer") == claim.peer)]
    if not rows:
        raise KeyError(f"{claim.file}: {claim.case}, {claim.peer}")
    row, machine = rows[0], results["machine"]
    value = f"{written(row['ours'])} {row['unit']}" + (f", {100 * row['mfu']:.0f} % of the peak" if row.get("mfu") else "")
    beside = f"{claim.peer}: {written(row['theirs'])} (ratio {written(row['ratio'])})" if claim.peer else ""
    on = machine.get("gpu") or f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads"
    script = claim.file.removesuffix(".gpu")
    command = f"`python benchmarks/{script}.py{' --device cuda' if script != claim.file and script != 'on_gpu' else ''}`"
    return [claim.text, value, beside, command, results["date"], on]


def page() -> str:
    """The whole page."""
    facts = json.loads((BUILT_IN / "scenes" / "bundle.json").read_text())
    scores, training = facts["scores"], facts["training"]
    columns = ["all", "composed", "systematic"]
    shipped = [
        [title, *(row.get(column, "") for column in columns)]
        for title, row in scores.items()
        if isinstance(row, dict) and "all" in row
    ]
    folders = "--scenes SCENES --composed COMPOSED --systematic SYSTEMATIC --count 600"
    return "".join([
        HEAD, "## Speed and memory\n\n", table([["claim", "unitok", "beside it", "command", "date", "machine"], *map(_shown, SPEED)]),
        "\n## The model that ships\n\n",
        f"Its decoder was trained with the configurations of `make bundle` on two cores of an Intel Xeon (AMX): {training['model']['minutes']:.0f} minutes on everything, {training['model, edits']['minutes']:.0f} on edits "
        f"and {training['model, rehearsal']['minutes']:.0f} on everything again, of which a part are images that were decoded and encoded again "
        f"({training['data']['date']}); its image and audio tokenizers are of an earlier run of the recipe. Measured by `unitok eval --bundle scenes {folders}` on new scenes ",
        "(`unitok scenes FOLDER --tasks` with `--fold seen`, `composed` and `systematic`): everything right, single samples, 95 % intervals. All "
        "three trainings were done with two seeds (the other's first one took 8 minutes on an H200), of which the one with the higher scores ships. Scores of the other differ by 1.1 points on average and 5.8 at most (93.8 % of things pointed at), "
        "on *composed* by 0.9 and 4.8, on *systematic* by 5.0 and 17.8 (boxes to image, 75.3 %). Both have the same tokenizers, and the same scenes in the training on edits.\n\n",
        table([["direction", *columns], *shipped]),
        "\n## What is learned in an hour or so\n\n",
        table([["claim", "result", "command", "date", "machine"],
               *([text, value, f"`{command}`", date, on] for text, value, command, date, on in LEARNED)]),
        "\n## What tests prove\n\n",
        table([["claim", "command"], *([text, f"`{command}`"] for text, command in PROVED)]),
    ])  # fmt: skip


if __name__ == "__main__":
    write(page, "results.md", __doc__)
