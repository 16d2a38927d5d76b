"""The decoder for generation on a CPU, as one C++ call per stretch of tokens; compiled when it is first needed.

Small models lose more time between PyTorch's operations than in them, and PyTorch has no fast product of a few rows with weights of
one or two bytes. `decoder.cpp` has all of it: products with weights in float32, bfloat16 or int8, attention over the cache, sampling,
and threads that wait briefly. It is compiled by the machine's C++ compiler for this very processor, in a few seconds, and kept in
the user's cache folder. Without a compiler, or with UNITOK_NATIVE=0, `InferenceDecoder` computes the same in PyTorch.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decoder.cpp")
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-shared", "-fPIC", "-pthread"]


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ that is installed."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, compiled if need be; None where it is turned off or cannot be had (`why_not` says why)."""
    try:
        return ctypes.CDLL(str(build()))
    except OSError as error:
        log.debug("generation in PyTorch: %s", error)
        return None


def why_not() -> str:
    """Why there is no compiled code; empty if there is."""
    try:
        build()
    except OSError as error:
        return str(error)
    return ""


def build(*more: str) -> Path:
    """Return the compiled file, compiled if need be. more: of the compiler's flags. Errors: `OSError` that says why there is none."""
    if os.environ.get("UNITOK_NATIVE") == "0":
        raise OSError("UNITOK_NATIVE=0 is set")
    program = compiler()
    if program is None:
        raise OSError("no C++ compiler (c++, g++ or clang++)")
    tuned = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    words = [program, *FLAGS, tuned, *more, str(SOURCE)]
    path = _folder() / f"decoder-{_fingerprint(words)}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("compiling generation for this processor, once: %s", path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "decoder.so"
        done = subprocess.run([*words, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{program}: {next(iter(done.stderr.strip().splitlines()), 'failed')}")
        os.replace(made, path)  # whole, also where two processes compile at once
    return path


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unitok"


def _fingerprint(words: list[str]) -> str:
    """Of the source, the command, the compiler and the processor, as a home folder may be shared by machines."""
    known = hashlib.sha256(SOURCE.read_bytes())
    for part in (words, _output([words[0], "--version"]), platform.machine(), _processor()):
        known.update(repr(part).encode())
    return known.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _output(words: list[str]) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
