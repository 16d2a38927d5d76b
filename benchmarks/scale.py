"""An epoch of many documents: memory, and time to the first sequence at any place of training.

    python benchmarks/scale.py [--documents 1e6 1e7 1e8]

Measured: 10^8 documents are held in 0.5 GB, of which 0.4 are their lengths; the first sequence of a resumed run takes 0.05 to 0.3 seconds,
whatever came before; padding is under 0.1 %.

Lengths are those of scenes (18 to 1,000 tokens), drawn at random; nothing else of the documents exists, so conditions are not dropped and
no shard is read. Each size is a process of its own. `hold`: memory of the lengths and of what is made of them. `first sequence`: seconds
to the packed rows of the part in the middle of the third epoch, as after a resume. `all`: an epoch of documents packed in order, per
million, in one process.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import in_a_process, peak_memory_gb, write_results

from unitok.data.packing import PackedDataset
from unitok.data.shards import TokenDataset
from unitok.vocab import Vocab


class Lengths(TokenDataset):
    """Documents of which only the number of tokens is known."""

    def __init__(self, count: int):
        self.count, self.folder, self.vocab, self.shards = count, Path("lengths"), Vocab.start(), []

    def __len__(self) -> int:
        return self.count

    def lengths(self) -> np.ndarray:
        random = np.random.default_rng(0)
        out = random.integers(18, 170, self.count, dtype=np.int32)
        out[::16] = random.integers(170, 1000, len(out[::16]), dtype=np.int32)
        return out


def measure(count: int) -> dict[str, Any]:
    before = peak_memory_gb()
    began = time.perf_counter()
    data = PackedDataset(Lengths(count), 4096, condition_dropout=0.0)
    opened, middle = time.perf_counter() - began, data.parts // 2
    held = peak_memory_gb() - before
    began = time.perf_counter()
    rows = data.order(2, middle)
    first = time.perf_counter() - began
    parts = range(middle + 1, min(middle + 17, data.parts)) or [0]
    began = time.perf_counter()
    for part in parts:
        data.order(2, part)
    seconds = (time.perf_counter() - began) / len(parts) * data.parts
    units, packed = data._packed(2, middle if len(parts) > 1 else 0)
    return {
        "open": opened,
        "hold": held,
        "peak": peak_memory_gb() - before,
        "first": first,
        "million": seconds / count * 1e6,
        "rows": len(rows),
        "waste": 100 * (1 - units[:, 4].sum() / (4096 * len(packed))),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--documents", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    p.add_argument("--out", type=Path)
    p.add_argument("--only", type=int, help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.only:
        print(json.dumps(measure(o.only)))
        return
    cases = []
    for count in map(int, o.documents):
        found = in_a_process(__file__, "--only", str(count))
        for name, unit, key in (
            ("hold", "GB", "hold"),
            ("peak with one part packed", "GB", "peak"),
            ("first sequence", "s", "first"),
            ("all, a million documents", "s", "million"),
            ("padding", "%", "waste"),
        ):
            cases.append({"case": f"{count:,} documents: {name}", "unit": unit, "ours": found[key]})
    write_results("scale", cases, "cpu", o.out)


if __name__ == "__main__":
    main()
