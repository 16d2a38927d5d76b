"""Figures that the README and the benchmarks' docstrings state are those of benchmarks/results/, rounded."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\.?\d|\w)")


def agree(shown: str, value: float) -> bool:
    """Whether a number as it is written is that value, rounded to its last digit; of thousands the last that is not 0."""
    plain = shown.replace(",", "")
    digits = -len(plain.partition(".")[2]) if "." in plain else 0
    if not digits and abs(float(plain)) >= 1000:
        digits = len(plain) - len(plain.rstrip("0"))
    return abs(float(plain) - value) <= 0.5 * 10**digits + 1e-9


def test_a_number_agrees_with_what_rounds_to_it_alone():
    assert agree("1.88", 1.8842)
    assert agree("6,530", 6527.8)
    assert agree("-0.7", -0.677)
    assert agree("90", 90.3)
    assert not agree("1.88", 1.886)
    assert not agree("6,530", 6536)
    assert not agree("90", 85)
    assert NUMBER.findall("Qwen3 272 (2.35 times); 99 to 100 %, 6,530 of 25.7M") == ["272", "2.35", "99", "100", "6,530"]


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def case(name: str, case: str, peer: str | None = None) -> dict[str, Any]:
    """The one case of that name, beside that peer."""
    (found,) = [c for c in results(name)["cases"] if c["case"] == case and peer in (None, c.get("peer"))]
    return found


def of_both(name: str, of: str, peer: str) -> list[float]:
    """As rows of speed state it: ours, the ratio; theirs."""
    found = case(name, of, peer)
    return [found["ours"], found["ratio"], found["theirs"]]


def ours(name: str, *cases: str) -> list[float]:
    """What is ours, a share in percent."""
    found = [case(name, c) for c in cases]
    return [c["ours"] * (100 if c["unit"] == "share" else 1) for c in found]


def uses(side: str) -> list[float]:
    """The smallest and largest share of codes in use of a level of speech, percent."""
    shares = [100 * c[side] for c in results("speech")["cases"] if c["case"].endswith("use")]
    return [min(shares), max(shares)]


def speech(side: str) -> list[float]:
    dB = [case("speech", f"20 minutes, {levels} levels: si_sdr_db")[side] for levels in (1, 4, 8)]
    return [*dB, case("speech", "20 minutes, 8 levels: stoi")[side], *uses(side)]


def photos() -> list[float]:
    taming, jpeg = ([case("photos", f"15 minutes: {m}", p) for m in ("psnr_db", "ssim")] for p in ("taming", "jpeg"))
    return [*(c["ours"] for c in taming), *(c["theirs"] for c in (*taming, *jpeg))]


def on_scenes(kind: str, *measures: str) -> list[float]:
    return ours("scenes", *(f"4 minutes, {kind}, seed {seed}: {m}" for m in measures for seed in (0, 1)))


def steps(name: str, size: str, peer: str = "qwen3") -> list[float]:
    """Ids per second and GB: ours; theirs, with the ratio of speeds."""
    speed, memory = (case(name, f"{size}, loss over all ids: {what}", peer) for what in ("speed", "memory"))
    return [speed["ours"], memory["ours"], speed["theirs"], speed["ratio"], memory["theirs"]]


def two(name: str, *cases: tuple[str, str]) -> list[float]:
    """Two cases side by side: ours of each; theirs and the ratio of each."""
    found = [case(name, *c) for c in cases]
    return [*(c["ours"] for c in found), *(value for c in found for value in (c["theirs"], c["ratio"]))]


def tokenized(of: str) -> list[float]:
    memory, loop, one = (case("tokenization", of, peer) for peer in ("tensors in memory", "plain loop", "1 worker"))
    return [memory["ours"], memory["theirs"], memory["ratio"], loop["theirs"], loop["ratio"], one["theirs"]]


def audio_rows() -> dict[str, list[float]]:
    rows = {}
    for seconds, batch in ((1, 1), (1, 8), (30, 1), (30, 8)):
        for verb in ("encode", "decode"):
            of = f"{verb} {seconds} s batch {batch}"
            speed, memory = (
                of_both("audio_tokenizer", f"{of}: speed", "encodec"),
                case("audio_tokenizer", f"{of}: memory", "encodec"),
            )
            more = (seconds, batch) == (30, 8)
            found = [*speed[:2], memory["ours"], speed[2], memory["theirs"]] if more else speed
            rows[f"EnCodec 24 kHz, {verb} {seconds} s batch {batch}, seconds of sound a second{'; peak memory' * more}"] = found
    hour = results("audio_tokenizer")["hour"]
    rows["an hour of sound, EnCodec 24 kHz, encode and decode: seconds; peak memory"] = [
        hour[name] for name in ("encode_seconds", "decode_seconds", "peak_gb")
    ]
    return rows


def image_rows() -> dict[str, list[float]]:
    shapes = [("VQ-GAN f16, 256 pixels, batch 1", "f16-16384 256px batch 1"), ("VQ-GAN f16, 256 pixels, batch 4", "f16-16384 256px batch 4"),
              ("Chameleon's, 512 pixels, batch 1", "chameleon 512px batch 1")]  # fmt: skip
    return {
        f"{verb}, {shape}: pictures a second": of_both("image_tokenizer", f"{verb} {of}: speed", "taming")
        for shape, of in shapes
        for verb in ("encode", "decode")
    }


def rows_expected() -> dict[str, list[float]]:
    """What each row of the README's table of benchmarks states, in order, from the results."""
    jacobi = case("jacobi", "temperature 0.4, guidance 1.5 (the demo's), window 16")
    same = case("jacobi", "temperature 0.4, guidance 1.5 (the demo's): distribution")
    race, memory = (
        case("loss_race", "to the loss of 90 s, median of 3 seeds"),
        case("tokenization", "peak memory, 10,000 documents"),
    )
    seed = "3 minutes, seed 0: "
    return {
        "photographs, 64 codes of 10 bits for 64 x 64 pixels, after 15 minutes: PSNR, SSIM": photos(),
        "new scenes, after 4 minutes, two seeds: PSNR; all attributes read; codes in use": on_scenes(
            "none", "psnr_db", "attributes", "use"
        ),
        "the same with GAN: PSNR; attributes; edges kept, against without": [
            *on_scenes("gan", "psnr_db", "attributes", "sharpness"),
            *on_scenes("none", "sharpness"),
        ],
        **image_rows(),
        "sounds of new scenes, after 3 minutes: all notes read; use of each level; SI-SDR by level": ours(
            "sounds", *(seed + name for name in ("notes", "use_1", "use_2", "si_sdr_db_1", "si_sdr_db_2"))
        ),
        "speech at 3.2 kbit/s, after 20 minutes: SI-SDR with 1, 4 and 8 levels; STOI with 8; use of each level": [
            *speech("ours"),
            *speech("theirs"),
        ],
        **audio_rows(),
        "train a decoder of 1.8M, ids that are not padding a second; memory": steps("train_step", "2m"),
        "the same, of 25.7M": steps("train_step", "25m"),
        "the same, of 1.8M, both compiled": steps("train_step_compiled", "2m compiled"),
        "the same, of 25.7M, both compiled": steps("train_step_compiled", "25m compiled"),
        "train a decoder of 1.8M to the loss that the peer ends at, median of three seeds: seconds": [
            race["ours"],
            race["theirs"],
        ],
        "generate with a decoder of 10M, batch 1: ids of a picture a second": two(
            "generate", ("10m, batch 1", "dynamic"), ("10m, batch 1", "static")
        ),
        "the same with guidance, batch 1; batch 16": two(
            "generate", ("10m, batch 1, guidance (doubled)", "dynamic"), ("10m, batch 16, guidance (doubled)", "dynamic")
        ),
        "the same without guidance, batch 16": two("generate", ("10m, batch 16", "dynamic")),
        "the same, of 100M, batch 1; with guidance": two(
            "generate", ("100m, batch 1", "dynamic"), ("100m, batch 1, guidance (doubled)", "dynamic")
        ),
        "the demo's pictures one by one, 16 ids guessed at once: pictures a second": [
            *(jacobi["ours"], jacobi["theirs"], jacobi["ratio"], same["ours"])
        ],
        "`unitok tokenize`, files to shards, pictures of 64 px, small network: pictures a second": tokenized(
            "pictures of 64 px, small network"
        ),
        "the same, of 256 px": tokenized("pictures of 256 px, small network"),
        "the same, sounds of 1 s at 8 kHz, small network: seconds of sound a second": tokenized(
            "sounds of 1 s at 8 kHz, small network"
        ),
        "the same, sounds of 2 s, EnCodec 24 kHz": tokenized("sounds of 2 s at 24 kHz, EnCodec's network"),
        "its peak memory with 10,000 documents, one process": [memory["ours"], 1000, memory["theirs"]],
    }


def test_every_row_of_the_readmes_benchmarks_is_in_the_results():
    (table,) = re.findall(r"^## Benchmarks$.*?^\|---.*?\n(.*?)\n\n", (ROOT / "README.md").read_text(), flags=re.S | re.M)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    expected = rows_expected()
    assert [row[0] for row in rows] == list(expected)
    for label, mine, theirs, script in rows:
        shown, values = NUMBER.findall(f"{mine}; {theirs}"), expected[label]
        assert len(shown) == len(values), (label, shown, values)
        for number, value in zip(shown, values, strict=True):
            assert agree(number, value), f"{label}: the README says {number}, the results {value}"
        assert (ROOT / "benchmarks" / script.strip("`").split()[0]).exists()


def test_the_readmes_padding_is_that_of_the_results():
    shown = re.search(r"are (\d+) % padding, and packed ([\d.]+) %", (ROOT / "README.md").read_text())
    padding = results("train_step")["padding"]
    assert agree(shown[1], 100 * padding["theirs"])
    assert agree(shown[2], 100 * padding["ours"])


def ratios(name: str, peer: str, of: str) -> list[float]:
    """The smallest and the largest."""
    found = [c["ratio"] for c in results(name)["cases"] if c.get("peer") == peer and of in c["case"]]
    return [min(found), max(found)]


def shares(of: str, peer: str, *percent: str) -> list[float]:
    """Speeds of tokenize over a peer's, the smallest and the largest."""
    found = [c["ratio"] for c in results("tokenization")["cases"] if c["peer"] == peer and c["case"].startswith(of)]
    return [min(found), max(found)]


def loses(kind: str) -> list[float]:
    return [a - b for a, b in zip(on_scenes("none", kind), on_scenes("gan", kind), strict=True)]


def measured() -> dict[str, list[float]]:
    """What the sentence `Measured …: …` of each benchmark's docstring states, in order, from the results."""
    generate = [case("generate", of, peer)["ratio"] for of, peer in (
        ("10m, batch 1", "dynamic"), ("10m, batch 1", "static"), ("10m, batch 16, guidance (doubled)", "dynamic"))]  # fmt: skip
    psnr = {peer: case("photos", "15 minutes: psnr_db", peer)["difference"] for peer in ("taming", "jpeg")}
    levels = [case("speech", f"20 minutes, {n} levels: si_sdr_db")["difference"] for n in (1, 8)]
    race, audio = case("loss_race", "to the loss of 90 s, median of 3 seeds"), "audio_tokenizer"
    small = [
        case("tokenization", f"{of}, small network", "plain loop")["ratio"]
        for of in ("pictures of 64 px", "sounds of 1 s at 8 kHz")
    ]
    large = [case("tokenization", of, "plain loop")["ratio"] for of in (
        "pictures of 256 px, small network", "sounds of 2 s at 24 kHz, EnCodec's network")]  # fmt: skip
    memory = [100 * ratio for of in ("pictures", "sounds") for ratio in shares(of, "tensors in memory")]
    peak = case("tokenization", "peak memory, 10,000 documents")
    assert peak["ours"] == pytest.approx(peak["theirs"], rel=0.05)
    return {
        "audio_tokenizer": [*ratios(audio, "encodec", "speed"), *ratios(audio, "transformers", "speed"), 30, 8],
        "generate": [*generate[:2], 1, generate[2], 16],
        "image_tokenizer": ratios("image_tokenizer", "taming", "speed"),
        "loss_race": [race["ours"], race["theirs"]],
        "photos": [psnr["taming"], -psnr["jpeg"]],
        "scenes": [
            *on_scenes("none", "psnr_db"),
            *(min(on_scenes("none", "use")), *on_scenes("none", "attributes")),
            *(*on_scenes("gan", "sharpness"), *on_scenes("none", "sharpness"), *loses("psnr_db")),
        ],
        "sounds": ours("sounds", *(f"3 minutes, seed 0: {name}" for name in ("notes", "use_1", "si_sdr_db_1", "si_sdr_db_2"))),
        "speech": [*levels, *uses("ours"), *uses("theirs")],
        "tokenization": [*memory[:3], memory[3], *sorted(small), *sorted(large), 1000, 10_000],
        "train_step": [*ratios("train_step", "qwen3", "all ids: speed"), *ratios("train_step", "chameleon", "all ids: speed")],
    }


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())) or ""


@pytest.mark.parametrize("name", list(measured()))
def test_a_benchmarks_docstring_states_what_was_measured(name):
    (said,) = re.findall(r"^Measured[^:]*:\s+(.*?\.)(?=\s+[A-Z]|\n\n)", docstring(name), flags=re.S | re.M)
    shown, values = NUMBER.findall(said), measured()[name]
    assert len(shown) == len(values), (shown, values)
    for number, value in zip(shown, values, strict=True):
        assert agree(number, value), f"{said}: says {number}, the results {value}"


def test_no_benchmark_states_an_aim_as_a_claim():
    scripts = [f.stem for f in (ROOT / "benchmarks").glob("*.py") if f.stem != "common"]
    assert {name for name in scripts if "Measured" in docstring(name)} >= set(measured())
    assert not [name for name in scripts if re.search(r"\b[Cc]laims?\b|\baims?\b", docstring(name))]
