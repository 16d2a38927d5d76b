"""`unitok tokenize` beside its own tokenizers on tensors in memory, and beside the loop that a researcher would write.

    python benchmarks/tokenization.py [--quick] [--rounds 3] [--ray] [--device cpu]

Measured on 2 cores, the whole verb (files to shards, checksums, atomic writes): 82 to 103 % of the speed of the tokenizers alone on
tensors in memory for images, 50 % for short audio with a small network, where reading a file takes as long as its network, 109 % for
EnCodec's; 3.4 to 5.4 times the speed of a plain loop (PIL or soundfile, `encode` one by one, `torch.save`) on small files and 1.0
to 1.4 times where the network, whose two threads the loop has, takes nearly all of the time; the same peak memory for 1,000 and
for 10,000 documents.

The tokenizers are untrained, of the shapes in `unitok/configs/`. Images are windows of the photographs that scikit-image ships; audio is noise
with a melody. Every number is a marginal one: a run over all files minus a run over half of them, so that starting processes and
loading weights, which do not matter for a large data set, do not count (`start_up` has them, in seconds). All take turns; medians. Tensors
in memory go through in batches of 64 with two threads inside each operation, or half of them in each of two threads of the
interpreter, whichever is faster. (A script called tokenize.py would hide Python's own module of that name.)
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from common import in_a_process, peak_memory_gb, write_results
from PIL import Image

from unitok.api import Unitok
from unitok.bundle import Bundle
from unitok.configs import CONFIGS
from unitok.hardware import keep_large_blocks
from unitok.modalities import build_vocab
from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig, ImageTokenizer, ImageTokenizerConfig, TextTokenizer

#: name: kind, config, files of a run of the verb (the two others take some of them), pixels a side or seconds, unit
CASES = {
    "images of 64 px, small network": ("image", "image/laptop-f8-64.yaml", 8000, 64, "images/s"),
    "images of 256 px, small network": ("image", "image/laptop-f8-64.yaml", 1200, 256, "images/s"),
    "audio of 1 s at 8 kHz, small network": ("audio", "audio/laptop-8khz.yaml", 16000, 1, "s of audio/s"),
    "audio of 2 s at 24 kHz, EnCodec's network": ("audio", "audio/encodec-24khz.yaml", 320, 2, "s of audio/s"),
}


def tokenizer_of(kind: str, config: str) -> Any:
    """An untrained tokenizer as a config declares it."""
    declared = yaml.safe_load((CONFIGS / config).read_text())["model"]["init_args"]["tokenizer"]
    torch.manual_seed(0)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in declared.items()}
    if kind == "image":
        return ImageTokenizer(ImageTokenizerConfig(**settings)).eval()
    return AudioTokenizer(AudioTokenizerConfig(**settings)).eval()


def write_bundle(folder: Path, kind: str, config: str) -> None:
    text = TextTokenizer.train(["a small text about nothing much, to have a few pieces"], size=300)
    part = tokenizer_of(kind, config)
    part.save_pretrained(folder.with_name("part"))  # and read again: a saved codec has its weight norm folded in
    parts = {"text": text, kind: type(part).from_pretrained(folder.with_name("part"))}
    Bundle(build_vocab(parts), parts).save_pretrained(folder, overwrite=True)


def write_files(folder: Path, kind: str, count: int, size: int, rate: int) -> None:
    """Images of `size` pixels a side, or audio of `size` seconds."""
    import skimage

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    if kind == "audio":
        time_axis = np.arange(size * rate) / rate
        for i in range(count):
            tones = sum(0.2 * np.sin(2 * np.pi * f * time_axis) for f in rng.uniform(100, 2000, 3))
            soundfile.write(folder / f"{i:05d}.wav", tones + rng.normal(0, 0.01, len(time_axis)), rate)
        return
    names = ("astronaut", "chelsea", "coffee", "rocket")
    photographs = [Image.open(next((Path(skimage.__file__).parent / "data").glob(f"{n}.*"))).convert("RGB") for n in names]
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        left, top = int(rng.integers(photograph.width - size)), int(rng.integers(photograph.height - size))
        photograph.crop((left, top, left + size, top + size)).save(folder / f"{i:05d}.jpg", quality=90)


# ---- The three ways, each in a process of its own that prints its seconds --------------------------------------------


def plain_loop(bundle: Path, folder: Path, count: int, kind: str) -> float:
    """What a researcher would write: open, encode, save, one by one."""
    tokenizer = getattr(Unitok.from_pretrained(bundle, parts=(kind,)), kind)
    out = Path(tempfile.mkdtemp())

    def run(files: list[Path]) -> None:
        for path in files:
            if kind == "image":
                pixels = (
                    torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1
                )
                codes = tokenizer.encode(pixels[None])
            else:
                samples, _ = soundfile.read(path, dtype="float32")
                codes = tokenizer.encode(torch.from_numpy(samples)[None, None])
            torch.save(codes, out / f"{path.stem}.pt")

    files = sorted(folder.iterdir())[:count]
    run(files[:4])
    began = time.perf_counter()
    run(files)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def in_memory(bundle: Path, folder: Path, count: int, kind: str) -> float:
    """The tokenizer alone: batches of 64 of tensors that are there already."""
    tokenizer = getattr(Unitok.from_pretrained(bundle, parts=(kind,)), kind)
    if kind == "image":
        arrays = [np.asarray(Image.open(p).convert("RGB")) for p in sorted(folder.iterdir())[:count]]
        tensors = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    else:
        arrays = [soundfile.read(p, dtype="float32")[0] for p in sorted(folder.iterdir())[:count]]
        tensors = torch.from_numpy(np.stack(arrays))[:, None]

    def run(part: torch.Tensor) -> None:
        for batch in part.split(64):
            tokenizer.encode(batch)

    run(tensors[:64])
    began = time.perf_counter()
    run(tensors)
    both = time.perf_counter() - began
    torch.set_num_threads(1)
    run(tensors[:64])
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:  # the interpreter's lock is free inside the networks
        list(pool.map(run, tensors.chunk(2)))
    return min(both, time.perf_counter() - began)


def verb(bundle: Path, source: Path, shard: int, workers: int, engine: str = "local", device: str = "cpu") -> float:
    """Wall time of the whole command, seconds. shard: documents; the same, and even in number, for all files and half of them."""
    with tempfile.TemporaryDirectory() as out:
        words = [str(source), f"{out}/tokens", "--bundle", str(bundle), "--workers", str(workers), "--device", device]
        words += ["--image-area", "65536", "--documents-per-shard", str(shard)]  # the images at their own size
        began = time.perf_counter()
        command = [sys.executable, "-m", "unitok", "tokenize", *words, "--engine", engine]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return time.perf_counter() - began


def memory(bundle: Path, source: Path) -> float:
    """Peak memory of the verb in one process, GB."""
    from unitok.cli import main

    with tempfile.TemporaryDirectory() as out:
        main(
            [
                "tokenize",
                str(source),
                f"{out}/tokens",
                "--bundle",
                str(bundle),
                "--workers",
                "1",
                "--documents-per-shard",
                "512",
            ]
        )
    return peak_memory_gb()


def half_of(folder: Path, share: float = 0.5) -> Path:
    """A folder with the first files of another, linked."""
    out = folder.with_name(f"{folder.name}-{share:g}")
    out.mkdir(exist_ok=True)
    files = sorted(folder.iterdir())
    for file in files[: round(share * len(files))]:
        if not (out / file.name).exists():
            (out / file.name).hardlink_to(file)
    return out


def measure(name: str, work: Path, rounds: int, quick: bool, ray: bool, device: str) -> list[dict[str, Any]]:
    kind, config, count, size, unit = CASES[name]
    count = count // 2 if quick else count
    place = work / name.replace(" ", "-").replace(",", "")
    rate = tokenizer_of(kind, config).sample_rate if kind == "audio" else 0
    write_bundle(place / "bundle", kind, config)
    write_files(place / "files", kind, count, size, rate)
    folder, half = place / "files", half_of(place / "files")
    ways: dict[str, list[float]] = {}
    some = min(count, max(32, count // 4))
    for _ in range(rounds):
        for way in (
            "verb",
            "verb half",
            "1 worker",
            "1 worker half",
            *(("1 actor", "1 actor half", "2 actors", "2 actors half") * ray),
        ):
            engine = "ray" if "actor" in way else "local"
            source = half if "half" in way else folder
            ways.setdefault(way, []).append(verb(place / "bundle", source, count // 8, 1 if "1" in way else 2, engine, device))
        for way in ("memory", "loop"):
            measured = in_a_process(__file__, "--only", way, str(place / "bundle"), str(folder), str(some), kind)
            ways.setdefault(way, []).append(measured["seconds"])
    median = {way: statistics.median(seconds) for way, seconds in ways.items()}
    each = size if kind == "audio" else 1

    def marginal(way: str) -> float:
        pairs = zip(ways[way], ways[f"{way} half"], strict=True)
        return (count - count // 2) * each / statistics.median(a - b for a, b in pairs)

    ours = marginal("verb")
    start = 2 * median["verb half"] - median["verb"]
    shared = {"case": name, "unit": unit, "ours": ours}
    rows = []
    for peer, theirs in (("tensors in memory", some * each / median["memory"]), ("plain loop", some * each / median["loop"])):
        rows.append(shared | {"peer": peer, "theirs": theirs, "ratio": ours / theirs, "start_up": start})
    one = marginal("1 worker")
    rows.append(shared | {"peer": "1 worker", "theirs": one, "ratio": ours / one})
    if ray:
        two, one = marginal("2 actors"), marginal("1 actor")
        rows.append(shared | {"case": f"{name}, Ray", "ours": two, "peer": "1 actor", "theirs": one, "ratio": two / one})
    return rows


def measure_memory(work: Path) -> dict[str, Any]:
    """Peak memory with 1,000 documents by that with 10,000."""
    name = "images of 64 px, small network"
    kind, config, _, size, _ = CASES[name]
    write_bundle(work / "memory" / "bundle", kind, config)
    write_files(work / "memory" / "files", kind, 10_000, size, 0)
    peak = {}
    for share in (0.1, 1.0):
        folder = half_of(work / "memory" / "files", share)
        peak[share] = in_a_process(__file__, "--only", "peak", str(work / "memory" / "bundle"), str(folder), "0", kind)["gb"]
    row = {"case": "peak memory, 10,000 documents", "unit": "GB", "ours": peak[1.0], "peer": "1,000 documents"}
    return row | {"theirs": peak[0.1], "ratio": peak[0.1] / peak[1.0]}


def main() -> None:
    keep_large_blocks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the files, one round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--cases", nargs="*", help="only those whose names hold one of these words")
    parser.add_argument("--ray", action="store_true", help="Ray actors, too, for the first case")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--only", nargs=5, help=argparse.SUPPRESS)
    o = parser.parse_args()
    torch.set_num_threads(2)
    if o.only:
        way, bundle, folder, count, kind = o.only
        if way == "peak":
            print(json.dumps({"gb": memory(Path(bundle), Path(folder))}))
        else:
            run = plain_loop if way == "loop" else in_memory
            print(json.dumps({"seconds": run(Path(bundle), Path(folder), int(count), kind)}))
        return
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name in CASES:
            if not o.cases or any(word in name for word in o.cases):
                rows += measure(name, Path(work), 1 if o.quick else o.rounds, o.quick, o.ray and not rows, o.device)
                print(json.dumps(rows[-1]), flush=True)
        if not o.no_memory:
            rows.append(measure_memory(Path(work)))
    write_results("tokenization", rows, o.device, o.out)


if __name__ == "__main__":
    main()
