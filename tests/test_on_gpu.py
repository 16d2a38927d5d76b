"""The checks of the script that measures a GPU: on a CPU its references and its measure of errors, on a GPU our kernels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def test_the_checks_find_everything_right_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "on_gpu.py"), "--device", "cpu", "--out", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    checked = [row for row in cases if "right" in row]
    assert len(checked) == 20
    assert all(row["right"] for row in checked)
    assert {row["case"].split()[1].strip(",") for row in cases if "problem" in row} == {"varlen", "xformers"}  # they need a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
def test_the_checks_find_everything_right_on_a_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "on_gpu.py"), "--checks", "--out", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    checked = [row for row in json.loads((tmp_path / "out.json").read_text())["cases"] if "right" in row]
    assert len(checked) > 20
    assert all(row["right"] for row in checked)
