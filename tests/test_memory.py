"""Large tensors do not fault their pages in anew at each use, once the allocator was told to keep them."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from unitok.memory import keep_large_blocks

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before, told = faults(), keep_large_blocks()
faults()
print(before, told, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize("keep", ["1", "0"])
def test_large_tensors_keep_their_pages(keep):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"UNITOK_KEEP_MEMORY": keep},
    )
    before, told, after = done.stdout.split()
    if told == "False" and keep == "1":
        pytest.skip("not glibc")
    assert (told == "True") == (keep == "1")
    assert (int(after) < int(before) / 10) == (keep == "1")
