"""A server as its users start it: a process of its own, on a port of the loopback."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMITS = ("--slots", "4", "--queue", "4", "--max-body-mb", "2", "--name", "tiny")


class Server:
    """A running server. url: without a slash at its end."""

    def __init__(self, process: subprocess.Popen, url: str):
        self.process, self.url = process, url

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def running(bundle: Path | str, *flags: str, **environment: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "unitok", "serve", str(bundle), "--port", "0", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment
    )
    try:
        line = process.stdout.readline()
        yield Server(process, re.search(r"http://\S+(?=/)", line)[0])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
