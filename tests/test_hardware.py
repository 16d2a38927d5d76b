"""Large blocks do not fault their pages in anew at each use, once the allocator was told to keep them: by commands, not the library."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource
from unitok.hardware import keep_large_blocks

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        bytearray(36 << 20)  # every page is written to
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before, told = faults(), keep_large_blocks()
faults()
print(before, told, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
@pytest.mark.parametrize("keep", ["1", "0"])
def test_large_blocks_keep_their_pages(keep):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"UNITOK_KEEP_MEMORY": keep},
    )
    before, told, after = done.stdout.split()
    assert int(before) > 3 * (36 << 20) // 65_536  # there was something to save, also with pages of 64 kB
    assert (told == "True") == (keep == "1")
    assert (int(after) < int(before) / 10) == (keep == "1")


def test_only_commands_and_trainings_tell_the_allocator():
    package = Path(__file__).parent.parent / "unitok"
    tell = {f.relative_to(package).as_posix() for f in package.rglob("*.py") if "    keep_large_blocks()" in f.read_text()}
    assert tell == {"cli/__init__.py", "training/fit.py", "data/prepare/launch.py"}  # the last starts processes of a command
