"""Numbers of the README and of the benchmarks' docstrings are those of benchmarks/results/, rounded; pages that scripts write are current."""

import ast
import contextlib
import json
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
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
    (one,) = [c for c in results(name)["cases"] if c["case"] == case and peer in (None, c.get("peer"))]
    return one


def ends(values: Iterable[float]) -> list[float]:
    """The smallest and the largest."""
    some = list(values)
    return [min(some), max(some)]


def ours(name: str, *cases: str) -> list[float]:
    """The results of unitok, fractions in percent."""
    rows = [case(name, c) for c in cases]
    return [c["ours"] * (100 if c["unit"] == "fraction" else 1) for c in rows]


def usage(side: str) -> list[float]:
    """The smallest and the largest fraction of codes in use, over the levels of speech, percent."""
    return ends(100 * c[side] for c in results("speech")["cases"] if c["case"].endswith("usage"))


def on_scenes(kind: str, *measures: str) -> list[float]:
    return ours("scenes", *(f"4 minutes, {kind}, seed {seed}: {m}" for m in measures for seed in (0, 1)))


def beside(name: str, of: str, *peers: str, ratio: bool = True) -> list[float]:
    """As a row of the README has them: the result of unitok; for each peer its result, and the ratio."""
    rows = [case(name, of, peer) for peer in peers]
    return [
        rows[0]["ours"],
        *(value for row in rows for value in ([row["theirs"], row["ratio"]] if ratio else [row["theirs"]])),
    ]


def in_two_types() -> list[float]:
    """Generation: ours in float32 and in int8, transformers' result and ratio, llama.cpp's."""
    plain, small = case("generate", "10m, batch 1", "dynamic"), case("generate", "10m, batch 1, weights int8", "llama.cpp Q8_0")
    return [plain["ours"], small["ours"], plain["theirs"], plain["ratio"], small["theirs"], small["ratio"]]


def headline() -> dict[str, list[float]]:
    """What each row of the README's table has, in order, by its script."""
    return {
        "photos.py": beside("photos", "15 minutes: psnr_db", "taming", "jpeg", ratio=False),
        "speech.py": beside("speech", "20 minutes, 8 levels: si_sdr_db", "encodec", ratio=False),
        "image_tokenizer.py": beside("image_tokenizer", "encode f16-16384 256px batch 1: speed", "taming"),
        "tokenization.py": beside("tokenization", "images of 64 px, small network", "plain loop"),
        "train_step.py": beside("train_step", "2m, loss over all tokens: speed", "qwen3"),
        "generate.py": in_two_types(),
    }


def test_the_readmes_six_numbers_are_those_of_the_results():
    (table,) = re.findall(r"^## Numbers$.*?^\|---.*?\n(.*?)\n\n", (ROOT / "README.md").read_text(), flags=re.S | re.M)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    expected = headline()
    assert [row[3].strip("`") for row in rows] == list(expected)
    for label, mine, theirs, script in rows:
        shown, values = NUMBER.findall(f"{mine}; {theirs}"), expected[script.strip("`")]
        assert len(shown) == len(values), (label, shown, values)
        for number, value in zip(shown, values, strict=True):
            assert agree(number, value), f"{label}: the README says {number}, the results {value}"
    assert agree("0.156", results("photos")["bits_per_pixel"])
    assert "at 0.156 bits per pixel" in rows[0][0]


def test_the_readmes_padding_and_memory_are_those_of_the_results():
    text = (ROOT / "README.md").read_text().replace("\n", " ")
    theirs, ours, factor = re.search(
        r"are (\d+) % padding and unitok's packed rows ([\d.]+) %, .*? factor of ([\d.]+)\.", text
    ).groups()
    padding = results("train_step")["padding"]
    assert agree(theirs, 100 * padding["theirs"])
    assert agree(ours, 100 * padding["ours"])
    assert agree(factor, (1 - padding["ours"]) / (1 - padding["theirs"]))
    assert "up to twice the memory" in text
    assert agree("2", 1 / ratios("image_tokenizer", "taming", "memory")[0])


def run_script(path: Path, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.syspath_prepend(path.parent)
        runpy.run_path(str(path), run_name="__main__")


def test_the_page_of_benchmarks_is_what_its_script_writes_and_has_every_result(tmp_path):
    run_script(ROOT / "benchmarks" / "write_page.py", "--out", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page, "run `make benchmarks-page`"
    names = {f.stem for f in (ROOT / "benchmarks" / "results").glob("*.json")}
    cases = {name: {row["case"] for row in results(name).get("cases", [])} for name in names}
    columns = {name for name in names if name.endswith(".gpu") and cases[name] <= cases.get(name.removesuffix(".gpu"), set())}
    assert set(re.findall(r"^`([\w.]+)\.json`, \d{4}-\d\d-\d\d: ", page, flags=re.M)) == names - columns
    for name in names:
        for row in results(name).get("cases", []):
            assert f"| {row['case']} |" in page
            assert name not in columns or f" ({row['ratio']:.3g}) |" in page


def test_the_page_of_results_is_what_its_script_writes(tmp_path):
    run_script(ROOT / "benchmarks" / "write_results_page.py", "--out", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert (ROOT / "docs" / "results.md").read_text() == page, "run `make benchmarks-page`"
    for path in re.findall(r"`(?:python|pytest)(?: -m long)? ([^`]*?)(?: --[^`]*)?`", page):
        assert all((ROOT / each).exists() for each in path.split()), path


def test_the_notebook_runs_and_shows_what_it_says(tmp_path):
    """Of the notebook only its sources count: what it shows may differ in a digit on another machine."""
    source = ROOT / "examples" / "tour.ipynb"
    with contextlib.chdir(tmp_path):
        run_script(ROOT / "docs" / "figures" / "tour.py", source, "--out", tmp_path / "tour.ipynb")
    assert [path.name for path in tmp_path.iterdir()] == ["tour.ipynb"]  # what its cells write does not stay
    made, kept = (json.loads(path.read_text())["cells"] for path in (tmp_path / "tour.ipynb", source))
    assert [cell["source"] for cell in made] == [cell["source"] for cell in kept]
    for ours, theirs in zip(made, kept, strict=True):
        kinds = [[sorted(output.get("data", {"text": 0})) for output in cell.get("outputs", [])] for cell in (ours, theirs)]
        assert kinds[0] == kinds[1], "run `make figures`"
    printed = "".join(text for cell in made for output in cell.get("outputs", []) for text in output.get("text", []))
    assert "a large red circle left of a small blue square on a white background\n" in printed


def test_the_figure_of_the_readme_is_drawn_from_a_bundle(tiny, tmp_path):
    """With an untrained bundle; whatever it writes is text in the figure, and nothing else."""
    tiny.save_pretrained(tmp_path / "bundle")
    for name in ("a.svg", "b.svg"):
        run_script(ROOT / "docs" / "figures" / "readme.py", tmp_path / "bundle", "--out", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    for path, of_tasks in ((tmp_path / "a.svg", 0), (ROOT / "docs" / "figures" / "readme.svg", 10)):  # without boxes, and with
        tags = [element.tag.partition("}")[2] for element in ET.parse(path).iter()]
        assert set(tags) == {"svg", "title", "rect", "text", "image", "g", "circle", "path"}
        assert tags.count("image") == 10 + 2 * of_tasks  # a card for each direction, or task, and scene
        assert tags.count("circle") == 10 + of_tasks + 2  # a verdict on each, and two in the legend
    assert "](docs/figures/readme.svg)" in (ROOT / "README.md").read_text()


def ratios(name: str, peer: str, of: str) -> list[float]:
    """The smallest and the largest ratio of the cases that `of` is part of."""
    return ends(c["ratio"] for c in results(name)["cases"] if c.get("peer") == peer and of in c["case"])


def ratios_of(start: str, peer: str) -> list[float]:
    """Speeds of tokenize over a peer's, the smallest and the largest."""
    return ends(c["ratio"] for c in results("tokenization")["cases"] if c["peer"] == peer and c["case"].startswith(start))


def loses(kind: str) -> list[float]:
    return [a - b for a, b in zip(on_scenes("none", kind), on_scenes("gan", kind), strict=True)]


FIRST = "first token, s, median"
MATRICES = ("queries, keys, values", "output", "SwiGLU: gate, up", "SwiGLU: down", "head")
OUTSIDE = "outside (prompt, grammar, Python)"


def of_step(kind: str, phase: str, unit: str) -> float:
    """What a phase of a token takes, or reads, of the decoder of 10M in a type."""
    return float(case("step", f"10m, {kind}: {phase}")[unit])


def of_scale(what: str) -> list[float]:
    """By the number of documents."""
    return [c["ours"] for c in results("scale")["cases"] if c["case"].endswith(f": {what}")]


def of_server() -> list[float]:
    """Clients, and how many times sooner their first token comes; then tokens per second beside one request at a time, fewest and most."""
    cases = results("serve")["cases"]
    sooner = {n: c["ratio"] for n in (8, 32) for c in cases if (c["case"], c["unit"]) == (f"{n} clients", FIRST)}
    return [*(x for pair in sooner.items() for x in pair), *ends(c["ratio"] for c in cases if c["unit"] == "tokens per second")]


def of_weights() -> list[float]:
    """What weights of two bytes and of one change, and the number of greedy tokens; as many outputs are right in both."""
    assert all(c["ours"] == c["theirs"] for c in results("weights")["cases"] if "percent right" in c["case"])
    kept = ("log-probabilities, mean difference", "same choice, percent", "same tokens of 1,024, percent")
    return [*(case("weights", f"{of}: {kind}")["ours"] for of in kept for kind in ("bfloat16", "int8")), 1024]


def measured() -> dict[str, list[float]]:
    """What the paragraph `Measured …: …` of each benchmark's docstring states, in order, from the results."""
    generate = [case("generate", of, "dynamic")["ratio"] for of in ("10m, batch 1", "10m, batch 16, guidance (doubled)")]
    types = {"float32": "F32", "bfloat16": "F16", "int8": "Q8_0"}
    llama = [
        case("generate", f"10m, batch {batch}, weights {ours}", f"llama.cpp {theirs}")["ratio"]
        for batch in (1, 16)
        for ours, theirs in types.items()
    ]
    psnr = {peer: case("photos", "15 minutes: psnr_db", peer)["difference"] for peer in ("taming", "jpeg")}
    levels = [case("speech", f"20 minutes, {n} levels: si_sdr_db")["difference"] for n in (1, 8)]
    race, audio = case("loss_race", "to the loss of 90 s, median of 3 seeds"), "audio_tokenizer"
    small = [
        case("tokenization", f"{of}, small network", "plain loop")["ratio"]
        for of in ("images of 64 px", "audio of 1 s at 8 kHz")
    ]
    large = [case("tokenization", of, "plain loop")["ratio"] for of in (
        "images of 256 px, small network", "audio of 2 s at 24 kHz, EnCodec's network")]  # fmt: skip
    memory = [100 * ratio for of in ("images", "audio") for ratio in ratios_of(of, "tensors in memory")]
    peak = case("tokenization", "peak memory, 10,000 documents")
    assert peak["ours"] == pytest.approx(peak["theirs"], rel=0.05)
    more_memory = sorted(1 / ratio for ratio in ratios("image_tokenizer", "taming", "memory"))
    temperatures = ("temperature 0.4, guidance 1.5 (the demo's)", "temperature 1")
    best, *worse = (sum(row) / len(row) for row in results("recipes")["losses"].values())
    lost = [loss - best for loss in worse]  # by the recipes in order: the first three, the fourth, others, AdamW for all
    assert min(lost) > 0
    of_100m = [case("generate", "100m, batch 1", "dynamic")["ratio"]]
    of_100m += [
        case("generate", f"100m, batch 1, weights {ours}", f"llama.cpp {theirs}")["ratio"] for ours, theirs in types.items()
    ]
    half = ["train_step_half", "train_step_compiled_half"]
    faster = [r for name in half for peer in ("qwen3", "chameleon") for r in ratios(name, peer, "speed")]
    smaller = [1 / r for name in half for peer in ("qwen3", "chameleon") for r in ratios(name, peer, "memory")]
    fast = results("stability")["losses"]["0.03"]
    others = [loss for name, loss in fast.items() if name != "neither"]
    assert all(row["z-loss"] == min(row.values()) for row in results("stability")["losses"].values())
    return {
        "audio_tokenizer": [*ratios(audio, "encodec", "speed"), *ratios(audio, "transformers", "speed"), 30, 8],
        "generate": [generate[0], 1, generate[1], 16, *llama[:3], 1, *llama[3:], 16, 1, *of_100m],
        "image_tokenizer": [*ratios("image_tokenizer", "taming", "speed"), *more_memory],
        "jacobi": [
            *ratios("jacobi", "plain", "window"),
            *(case("jacobi", f"{of}: distribution")["ours"] for of in temperatures),
        ],
        "recipes": [best, min(lost[:3]), max(lost[:3]), lost[3], lost[-1], 512, max(lost[4:-1])],
        "serve": of_server(),
        "stability": [0.03, fast["neither"], min(others), max(others)],
        "waiting": [*ratios("waiting", "libgomp default", "busy"), *ratios("waiting", "libgomp default", "quiet")],
        "loss_race": [race["ours"], race["theirs"]],
        "photos": [psnr["taming"], -psnr["jpeg"]],
        "scale": [10, 8, *of_scale("hold")[-1:], 10**8 * 4 / 1e9, *ends(of_scale("first sequence")), max(of_scale("padding"))],
        "step": [
            *(of_step(kind, "a token", "us") / 1000 for kind in types),
            *(*ends(of_step("float32", phase, "GB/s") for phase in MATRICES), case("step", "memory")["GB/s"]),
            of_step("bfloat16", "a token", "MB"),
            *ends(100 * of_step(kind, "sampling", "us") / of_step(kind, "a token", "us") for kind in types),
            *ends(100 * of_step(kind, OUTSIDE, "us") / of_step(kind, "a token", "us") for kind in types),
        ],
        "scenes": [
            *on_scenes("none", "psnr_db"),
            *(min(on_scenes("none", "usage")), *on_scenes("none", "attributes")),
            *(*on_scenes("gan", "sharpness"), *on_scenes("none", "sharpness"), *loses("psnr_db")),
        ],
        "scenes_audio": ours(
            "scenes_audio", *(f"3 minutes, seed 0: {name}" for name in ("notes", "usage_1", "si_sdr_db_1", "si_sdr_db_2"))
        ),
        "speech": [*levels, *usage("ours"), *usage("theirs")],
        "tokenization": [*memory[:3], memory[3], *sorted(small), *sorted(large), 1000, 10_000],
        "train_step": [
            *ratios("train_step", "qwen3", "all tokens: speed"),
            *ratios("train_step", "chameleon", "all tokens: speed"),
            *(*faster, min(smaller), max(smaller)),
        ],
        "weights": of_weights(),
    }


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())) or ""


@pytest.mark.parametrize("name", list(measured()))
def test_a_benchmarks_docstring_states_what_was_measured(name):
    (told,) = re.findall(r"^Measured[^:]*:\s+(.*?)\n\n", docstring(name), flags=re.S | re.M)
    shown, values = NUMBER.findall(told), measured()[name]
    assert len(shown) == len(values), (shown, values)
    for number, value in zip(shown, values, strict=True):
        assert agree(number, value), f"{told}: says {number}, the results {value}"


def test_no_benchmark_states_an_aim_as_a_claim():
    scripts = [f.stem for f in (ROOT / "benchmarks").glob("*.py") if f.stem != "common"]
    stated = {name for name in scripts if re.search("^Measured", docstring(name), flags=re.M)}
    assert stated - set(measured()) == {"on_gpu", "scene_race"}  # whose results are read by eye
    assert not [name for name in scripts if re.search(r"\b[Cc]laims?\b|\baims?\b", docstring(name))]
