"""glibc's allocator, told to keep large blocks.

glibc maps blocks of more than 32 MB anew at each use and gives them back at once, so that every such tensor costs a page
fault for each 4 kB of it: 16 ms for the 33 MB of 128 channels of 256 x 256 pixels, where the convolution takes 144
(docs/notes.md). Kept, they cost nothing; the process then holds on to up to `KEPT_BYTES` that it no longer uses.
"""

import ctypes
import os
import sys
from functools import cache

KEPT_BYTES = 1 << 30
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


@cache
def keep_large_blocks() -> bool:
    """Once in a process; -> whether it is so. Not under other C libraries or allocators, nor with UNITOK_KEEP_MEMORY=0."""
    if not sys.platform.startswith("linux") or os.environ.get("UNITOK_KEEP_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, KEPT_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, KEPT_BYTES))
