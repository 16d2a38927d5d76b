"""Promises of the demo: every stage is a command, a restart continues where it stopped, the end is scores and a report."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unitok import __version__
from unitok.cli import main
from unitok.errors import UserError
from unitok.scenes import demo as demo_module
from unitok.scenes.demo import AUDIO_FRACTION, IMAGE_FRACTION, SCORING_FRACTION, run_demo
from unitok.scenes.pipeline import Pipeline

QUICKSTART = (Path(__file__).parent.parent.parent / "docs" / "quickstart.md").read_text()

SCORES = {
    "oracle.originals", "reconstruction.image.colors", "reconstruction.image.attributes", "reconstruction.audio.notes",
    "codebook.image.usage", "codebook.audio.usage", "malformed", "seconds", "peak_memory_gb",
    *(f"generation.{name}{suffix}" for suffix in ("", ".composed", ".systematic") for name in (
        "text_to_image.attributes", "image_to_text.exact", "text_to_audio.notes", "audio_to_text.exact",
        "image_to_audio.notes", "questions.exact", "interleaved.attributes")),
}  # fmt: skip


# ---- In this process, with trainings of a few steps -------------------------------------------------------------------


def in_this_process(self: Pipeline, command: list[str], save) -> None:
    """Stands for a process: 24 scenes at most, 6 steps of training."""
    words = list(command)
    if "--count" in words:
        at = words.index("--count") + 1
        words[at] = str(min(24, int(words[at])))
    if words[0] == "fit":
        words += ["--model.init_args.minutes", "null", "--model.init_args.steps", "6", "--model.init_args.log_every", "1"]
        words += ["--trainer.enable_progress_bar", "false"]
    main(words)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "_run", in_this_process)
        run_demo(out, minutes=1, eval_scenes=2)
    return out


def test_a_demo_ends_with_every_score_and_a_report_of_them(demo):
    scores = json.loads((demo / "scores.json").read_text())
    assert set(scores) >= SCORES
    assert scores["oracle.originals"] >= 0.9
    assert scores["malformed"] == 0
    state = json.loads((demo / "state.json").read_text())
    assert state["done"] == [row[0] for row in quickstart_rows()]
    assert scores["seconds"] == pytest.approx(sum(state["seconds"].values()), abs=1)
    page = (demo / "report.html").read_text()
    assert all(f"<h3>{kind}</h3>\n<svg" in page for kind in ("image", "audio", "decoder"))
    assert (
        len(re.findall(r'<polyline class="c\d" points="[\d.]+,[\d.]+ ', page)) >= 6
    )  # curves: loss and quality of three trainings
    assert "<h2>Generations</h2>" in page
    assert f"<td>turns ask</td><td>{scores['turns.ask']:g}</td>" in page  # a number, no share of anything
    assert max(map(float, re.findall(r"([\d.]+) %", page))) <= 100
    assert all(len((demo / "samples" / str(i) / "outputs.jsonl").read_text().splitlines()) == 4 for i in range(3))


def test_a_demo_that_is_done_does_nothing_again_and_no_other_starts_in_its_folder(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "_run", lambda *_: pytest.fail("a stage ran again"))
    run_demo(demo, minutes=1, eval_scenes=2)
    printed = capsys.readouterr().out
    assert printed.count("already done") == len(quickstart_rows())
    assert "malformed" in printed
    assert f"open {demo / 'report.html'}" in printed
    with pytest.raises(UserError, match=r"a demo with other options \(minutes 1, eval_scenes 2, seed 0\)"):
        run_demo(demo, minutes=2, eval_scenes=2)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and not a demo"):
        run_demo(tmp_path)
    with pytest.raises(UserError, match="must be at least 1"):
        run_demo(tmp_path / "short", minutes=0.5)


def test_a_stage_is_a_process_whose_failure_names_the_command(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(Pipeline, "_precision", lambda self: "32-true")
    started = Pipeline(tmp_path / "demo", "demo", 1, {})
    started._run(["-V"], lambda: None)
    assert capfd.readouterr().out.strip() == __version__
    with pytest.raises(UserError, match="the command `unitok paint --red` failed with exit code 2"):
        started._run(["paint", "--red"], lambda: None)
    assert sys.platform != "linux" or started.state["peak_memory_gb"] > 0


def test_a_stage_that_fails_is_not_done_and_its_minutes_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "_precision", lambda self: "32-true")
    first = Pipeline(tmp_path, "demo", 1, {})
    assert first.minutes_for("image", 0.1234) == "0.123"
    first.stage("good", lambda: None)
    with pytest.raises(UserError, match="no room"):
        first.stage("bad", lambda: (_ for _ in ()).throw(UserError("no room")))
    again = Pipeline(tmp_path, "demo", 1, {})
    assert again.state["done"] == ["good"]
    assert again.minutes_for("image", 0.5) == "0.123"  # a restart must not change a training's schedule


# ---- The page about it ------------------------------------------------------------------------------------------------


def quickstart_rows() -> list[tuple[str, str]]:
    """Stage and command of the table."""
    return re.findall(r"^\| (\w+) \| (?:`unitok (.*?)`)? ?\|", QUICKSTART, flags=re.M)


def test_quickstart_has_the_demos_stages_commands_and_fractions(tmp_path, monkeypatch):
    ran: dict[str, list[list[str]]] = {}

    def stage(self, name, *commands):
        ran[name] = [command for command in commands if not callable(command)]
        if name == "report":
            (self.out / "scores.json").write_text("{}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "stage", stage)
    monkeypatch.setattr(Pipeline, "_precision", lambda self: "32-true")
    monkeypatch.setattr(demo_module, "CONFIGS", Path(""))
    run_demo(Path("runs/demo"))
    rows = quickstart_rows()
    assert [row[0] for row in rows] == list(ran)
    for name, shown in rows:
        words = shlex.split(shown)
        assert not words or any(matches(words, command) for command in ran[name]), f"{name}: {shown} is none of {ran[name]}"
    shares = re.search(
        r"image tokenizer gets ([\d.]+) % of\s+the minutes, the audio tokenizer ([\d.]+) %, scoring a reserve of ([\d.]+) %",
        QUICKSTART,
    )
    assert [float(share) for share in shares.groups()] == pytest.approx(
        [100 * IMAGE_FRACTION, 100 * AUDIO_FRACTION, 100 * SCORING_FRACTION]
    )
    given = {
        name: float(ran[name][0][ran[name][0].index("--model.init_args.minutes") + 1]) for name in ("image", "audio", "decoder")
    }
    assert given["image"] == pytest.approx(13 * IMAGE_FRACTION, abs=1e-3)
    assert given["audio"] == pytest.approx(13 * AUDIO_FRACTION, abs=1e-3)
    assert sum(given.values()) == pytest.approx(13 * (1 - SCORING_FRACTION), abs=13 * (IMAGE_FRACTION + AUDIO_FRACTION) + 0.2)


def matches(words: list[str], command: list[str]) -> bool:
    """Whether a command has these words in this order; an ellipsis stands for any word or the beginning or end of one."""
    left = iter(command)
    return all(any(re.fullmatch(re.escape(word).replace("…", ".*"), other) for other in left) for word in words)


def test_a_command_is_told_apart_from_another():
    command = ["fit", "--config", "a/b.yaml", "--out", "runs/b", "--more"]
    assert matches(["fit", "--config", "…/b.yaml", "--out", "runs/b"], command)
    assert not matches(["fit", "--config", "…/c.yaml"], command)
    assert not matches(["fit", "--out", "runs/b", "--config", "…"], command)
    assert not matches(["fit", "--size", "512"], command)


# ---- In processes (minutes: `make check-long`) ------------------------------------------------------------------------


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names a folder."""
    processes = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in file.read_bytes():
                processes.append(int(file.parent.name))
    return processes


@pytest.mark.long
def test_a_demo_that_is_killed_goes_on_where_it_was_and_ends_with_every_score(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "unitok", "demo", "--minutes", "1.5", "--eval-scenes", "8", "--out", str(out)]

    def wait_for(path, process):
        while not any(out.glob(path)):
            assert process.poll() is None, "the demo ended too early"
            time.sleep(0.2)

    for path in ("image/metrics/metrics.csv", "tokens/plan.json"):  # killed in a training, then in tokenization
        process = subprocess.Popen(command)
        wait_for(path, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while processes_of(out):  # the stage that it had started, which ends with it
            time.sleep(0.05)
    before = json.loads((out / "state.json").read_text())
    assert "audio" in before["done"]
    assert "tokenize" not in before["done"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "image: already done" in done.stdout
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) >= SCORES
    assert scores["oracle.originals"] >= 0.99
    assert scores["malformed"] == 0
    assert scores["seconds"] > sum(before["seconds"].values())
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") > 20
    assert page.count("data:audio/wav") > 5
    assert not re.search(r'(src|href)="(?!data:)', page), "the report must be self-contained"
