"""A run that is ended (SIGKILL, SIGTERM, SIGINT) at random moments and started again has bit for bit the weights of the uncut run."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.configs import CONFIGS
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import tokenize

STEPS = {"image": 240, "audio": 360, "decoder": 300}  # some seconds on fast cores, too
KILLS = 3
SMALL = {
    "image": {"quantize_start": "0.2", "gan.start": "0.3", "ema_decay": "0.9"},
    "audio": {"quantize_start": "0.2", "tokenizer.n_filters": "32", "ema_decay": "0.9"},
    "decoder": {"decoder.dropout": "0.1", "ema_decay": "0.9"},
}


def command(kind: str, out: Path, data: Path, workers: int, processes: int) -> list[str]:
    words = [sys.executable, "-m", "unitok", "fit", "--config", str(CONFIGS / "scenes" / f"{kind}.yaml"), "--out", str(out)]
    words += ["--data.init_args.path", str(data), "--data.init_args.workers", str(workers), "--resume", "auto"]
    words += ["--model.init_args.minutes", "null", "--model.init_args.steps", str(STEPS[kind])]
    words += ["--checkpoint_seconds", "1", "--trainer.enable_progress_bar", "false"]
    if kind == "decoder":
        words += ["--data.init_args.sequence_length", "512"]
    if processes > 1:
        words += ["--trainer.devices", str(processes), "--trainer.strategy", "ddp"]
    return words + [word for name, value in SMALL[kind].items() for word in (f"--model.init_args.{name}", value)]


def steps_done(out: Path) -> int:
    newest = newest_checkpoint(out)
    return load_checkpoint(newest)["unitok"]["steps_done"] if newest else 0


def written(out: Path) -> float:
    """When the newest checkpoint was written."""
    return max((f.stat().st_mtime for f in out.glob("checkpoints/*.ckpt") if f.exists()), default=0.0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "workers", "processes", "number"),
    [
        *itertools.product(("image", "audio", "decoder"), (0, 2), (1,), (signal.SIGKILL,)),
        ("decoder", 0, 2, signal.SIGKILL),
        ("decoder", 2, 1, signal.SIGINT),
        ("decoder", 2, 2, signal.SIGTERM),
    ],
)
def test_a_run_killed_at_random_moments_ends_with_the_weights_of_the_uncut_run(
    kind, workers, processes, number, tmp_path, scenes_folder, bundle_folder, monkeypatch
):
    if processes > 1:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = {"image": scenes_folder / "images", "audio": scenes_folder / "audio", "decoder": tmp_path / "tokens"}[kind]
    if kind == "decoder":
        tokenize(Plan(str(scenes_folder), str(data), str(bundle_folder)))
    subprocess.run(command(kind, tmp_path / "uncut", data, workers, processes), check=True)
    rng, kills, seen, out = random.Random(workers), 0, [], tmp_path / "cut"
    for _ in range(KILLS + 1):
        process = subprocess.Popen(command(kind, out, data, workers, processes), start_new_session=True)
        before, deadline = written(out), time.monotonic() + 120
        wait = rng.uniform(0.2, 3.0)  # after it has begun to write checkpoints of its own
        while process.poll() is None and time.monotonic() < deadline and kills < KILLS:
            if written(out) > before:
                time.sleep(wait)
                break
            time.sleep(0.1)
        if kills == KILLS:
            process.wait()
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == (-number if number == signal.SIGKILL else 128 + number)
        kills += 1
        seen.append(steps_done(out))
    print(f"{kind}, {workers} workers, {processes} processes: killed {kills} times, newest checkpoints at steps {seen}")
    assert kills >= 2
    assert steps_done(out) == STEPS[kind]
    uncut, cut = (load_checkpoint(newest_checkpoint(tmp_path / name))["state_dict"] for name in ("uncut", "cut"))
    assert uncut.keys() == cut.keys()
    for name, tensor in uncut.items():
        assert torch.equal(tensor, cut[name]), name
