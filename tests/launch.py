"""Runs of `unitok fit` as processes of their own, as users start them."""

import os
import socket
import subprocess
import sys


def run_processes(arguments: list[str], timeout: float = 300) -> None:
    """One command whose Trainer starts its further processes itself, over gloo on this machine; it must end with 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "unitok", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
