"""The demo, killed in the middle and started again (minutes: `make check-long`)."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

WANTED = {
    "oracle.originals", "reconstruction.image.colours", "reconstruction.image.attributes", "reconstruction.audio.notes",
    "codebook.image.use", "codebook.audio.use", "malformed", "seconds", "peak_memory_gb",
    *(f"generation.{name}{suffix}" for suffix in ("", ".held_out") for name in (
        "text_to_image.attributes", "image_to_text.exact", "text_to_audio.notes", "audio_to_text.exact",
        "image_to_audio.notes", "questions.exact", "interleaved.attributes")),
}  # fmt: skip


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
        time.sleep(1)
    before = json.loads((out / "state.json").read_text())
    assert "audio" in before["done"]
    assert "tokenize" not in before["done"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "image: done already" in done.stdout
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) >= WANTED
    assert scores["oracle.originals"] >= 0.99
    assert scores["malformed"] == 0
    assert scores["seconds"] > sum(before["seconds"].values())
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") > 20
    assert page.count("data:audio/wav") > 5
    assert not re.search(r'(src|href)="(?!data:)', page), "the report must be self-contained"
