"""The decoder for generation on a CPU, as one C++ call per stretch of tokens; compiled when it is first needed.

Small models lose more time between PyTorch's operations than in them, and PyTorch has no fast product of a few rows with weights of
one or two bytes. `decoder.cpp` has all of it: products with weights in float32, bfloat16 or int8, attention over the cache, sampling,
and threads that wait briefly. It is compiled by the machine's C++ compiler for this very processor, in a few seconds, and kept in
the user's cache folder (`~/.cache/unitok`). Without a compiler, or with UNITOK_NATIVE=0, `InferenceDecoder` computes the same in PyTorch.
"""

import atexit
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


def library() -> ctypes.CDLL | None:
    """The compiled code, compiled if need be; None where it is turned off or cannot be had (`why_not` says why)."""
    return _load()[0]


def why_not() -> str:
    """Why there is no compiled code; empty if there is."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled code, or why there is none. A kept file that does not load is compiled once more."""
    try:
        path = build()
        try:
            return ctypes.CDLL(str(path)), ""
        except OSError:
            path.unlink()
            return ctypes.CDLL(str(build())), ""
    except OSError as error:
        log.debug("generation in PyTorch: %s", error)
        return None, str(error)


def build(*more: str) -> Path:
    """Return the compiled file, compiled if need be. more: of the compiler's flags. Errors: `OSError` that says why there is none."""
    if os.environ.get("UNITOK_NATIVE") == "0":
        raise OSError("UNITOK_NATIVE=0 is set")
    program = compiler()
    if program is None:
        raise OSError("no C++ compiler (c++, g++ or clang++)")
    tuned = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    words = [program, *FLAGS, *more]
    name = f"decoder-{_fingerprint([*words, tuned])}.so"
    folder = _folder(name)
    path = folder / name
    if path.exists():
        return path
    log.info("compiling generation for this processor, once: %s", path)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        made = Path(partial) / name
        for flags in ([tuned], []):  # some compilers know no processor but their default
            command = [*words, *flags, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not done.returncode:
                break
        else:
            raise OSError(f"{program}: {next(iter(done.stderr.strip().splitlines()), 'failed')}")
        os.replace(made, path)  # whole, also where two processes compile at once
    return path


def _folder(name: str) -> Path:
    """The folder of the user's cache where a file is kept; a temporary one of this process where nothing can be written."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (given if given.is_absolute() else Path.home() / ".cache") / "unitok"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists() or os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError) as error:  # no home
        log.debug("no cache folder: %s", error)
    return _own_folder()


@cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="unitok-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


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
