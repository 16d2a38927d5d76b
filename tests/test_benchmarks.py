"""Every benchmark still runs, in its shortest form; numbers of such a run mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SHORTEST = {
    "audio_tokenizer": ["--quick", "--rounds", "1"],
    "generate": ["--quick", "--peers", "dynamic", "--rounds", "1"],
    "image_tokenizer": ["--quick", "--rounds", "1"],
    "jacobi": ["--quick", "--bundle", "scenes", "--count", "20", "--windows", "4"],
    "loss_race": ["--quick", "--seconds", "3", "--theirs", "0.003", "8", "--work", "WORK/loss_race"],
    "photos": ["--minutes", "0.1", "--work", "WORK/photos"],
    "recipes": ["--seconds", "1", "--work", "WORK/loss_race"],
    "scale": ["--documents", "1e5"],
    "scene_race": ["--seconds", "3", "--seeds", "0", "--rows", "now", "--work", "WORK/scene_race"],
    "scenes": ["--minutes", "0.1", "--seeds", "0", "--work", "WORK/scenes"],
    "scenes_audio": ["--minutes", "0.1", "--seeds", "0", "--work", "WORK/scenes"],
    "serve": ["--requests", "4", "--rounds", "1", "--clients", "2"],
    "speech": ["--minutes", "0.1", "--work", "WORK/speech"],
    "stability": ["--seconds", "1", "--work", "WORK/loss_race", "--plot", "PLOT"],
    "step": ["--sizes", "10m", "--dtypes", "float32"],
    "tokenization": ["--quick", "--cases", "audio of 1 s", "--no-memory"],
    "train_step": ["--quick", "--rounds", "1", "--steps", "1", "--peers", "qwen3", "--work", "WORK/train_step"],
    "waiting": ["--quick"],
    "weights": ["--count", "4", "--tokens", "64"],
}
OTHERS = {
    "common",
    "on_gpu",
    "scene_recipes",
    "write_page",
    "write_results_page",
}  # run by other tests, or parts of a benchmark


def test_every_benchmark_has_a_shortest_form():
    assert set(SHORTEST) | OTHERS == {script.stem for script in FOLDER.glob("*.py")}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What several make once: scenes, tokenizers, tokens."""
    return tmp_path_factory.mktemp("work")


@pytest.mark.long
@pytest.mark.parametrize("name", SHORTEST)
def test_a_benchmark_runs_to_its_end_and_writes_its_results(name, work, tmp_path):
    words = [word.replace("WORK", str(work)).replace("PLOT", str(tmp_path / "plot.svg")) for word in SHORTEST[name]]
    command = [sys.executable, str(FOLDER / f"{name}.py"), *words, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "machine" in json.loads((tmp_path / "out.json").read_text())
