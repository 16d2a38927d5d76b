"""The script of the first GPU run, as far as it runs on a CPU: its references and its measure of errors are right."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_checks_find_everything_right_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "on_gpu.py"), "--device", "cpu", "--out", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    checked = [row for row in cases if "right" in row]
    assert len(checked) == 12
    assert all(row["right"] for row in checked)
    assert {row["case"].split()[1].strip(",") for row in cases if "problem" in row} == {"varlen", "xformers"}  # they need a GPU
