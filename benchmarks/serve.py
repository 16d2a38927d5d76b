"""The server under load: 1, 8 and 32 clients at once, beside one request at a time.

    python benchmarks/serve.py [--bundle scenes] [--requests 64] [--rounds 2] [--threads 2]

Measured on two cores: with 8 clients the first token comes 2.8 times sooner than one request at a time, with 32 clients 3.7 times; tokens
per second are 1.00 to 1.19 times as many, because the model is so small that what is around it bounds them. Images are equal, one by one.

Clients of a process of their own ask `/v1/chat/completions` for an image of the built-in bundle's world, streaming, each as soon as its last answer is complete. The peer is the same server with one slot (`--slots 1`), so that requests wait for
one another as they would without continuous batching; both servers run in turns. First token and first row: seconds from the request to the first
piece of the answer, and to the first row of the image. Outputs of both are compared: equal seeds must give equal images.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from common import RESULTS, circumstances

from unitok.scenes.world import caption, draw_scene


def prompts(count: int) -> list[str]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [caption(draw_scene(rng), rng) for _ in range(count)]


class Server:
    """`unitok serve` as a process."""

    def __init__(self, bundle: str, slots: int, threads: int):
        command = [sys.executable, "-m", "unitok", "serve", bundle, "--port", "0", "--slots", str(slots), "--queue", "1000"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        assert self.process.stdout
        found = re.search(r"http://\S+(?=/)", self.process.stdout.readline())
        assert found
        self.url = found[0]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def ask(client: httpx.Client, url: str, text: str, seed: int) -> dict[str, Any]:
    """One streamed image: seconds to the first piece, to the first row and to the end; tokens; the image."""
    body = {
        "messages": [{"role": "user", "content": text}], "roles": False, "modalities": ["image"], "seed": seed, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, times, image, tokens = time.perf_counter(), dict[str, float](), "", 0
    with client.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            times.setdefault("first", time.perf_counter() - began)
            event = json.loads(line[6:])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event["choices"]:
                for part in choice["delta"].get("parts", []):
                    times.setdefault("row", time.perf_counter() - began)
                    image = part["image_url"]["url"]
    return times | {"end": time.perf_counter() - began, "tokens": tokens, "image": image}


def load(url: str, clients: int, texts: list[str]) -> dict[str, Any]:
    """Ask for all texts with so many clients at once."""
    answers: list[dict[str, Any]] = [{} for _ in texts]
    numbers = iter(range(len(texts)))
    lock = threading.Lock()

    def work() -> None:
        with httpx.Client() as client:
            while True:
                with lock:
                    i = next(numbers, None)
                if i is None:
                    return
                answers[i] = ask(client, url, texts[i], i)

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    measured: dict[str, Any] = {"tokens_per_second": sum(a["tokens"] for a in answers) / seconds}
    for name in ("first", "row", "end"):
        values = [a[name] for a in answers]
        measured |= {f"{name}_median": median(values), f"{name}_p95": quantiles(values, n=20)[-1]}
    return measured | {"images": [a["image"] for a in answers]}


def cases(medians: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Rows of the page: both servers, by the number of clients."""
    together, alone = medians["together"], medians["one at a time"]
    rows = []
    for clients in together:
        named = f"{clients} client{'s' * (clients != '1')}"
        ours, theirs = together[clients]["tokens_per_second"], alone[clients]["tokens_per_second"]
        rows.append({"case": named, "unit": "tokens per second", "ours": ours, "theirs": theirs, "ratio": ours / theirs})
        for name, title in (("first", "first token"), ("row", "first row"), ("end", "whole image")):
            for kind in ("median", "p95"):
                ours, theirs = together[clients][f"{name}_{kind}"], alone[clients][f"{name}_{kind}"]
                rows.append(
                    {"case": named, "unit": f"{title}, s, {kind}", "ours": ours, "theirs": theirs, "ratio": theirs / ours}
                )
    return [{**row, "peer": "one at a time"} for row in rows]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", default="scenes")
    p.add_argument("--requests", type=int, default=64)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, default=2, help="of the server")
    p.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    p.add_argument("--out", type=Path, default=RESULTS / "serve.json")
    o = p.parse_args()
    texts = prompts(o.requests)
    servers = {"together": Server(o.bundle, 32, o.threads), "one at a time": Server(o.bundle, 1, o.threads)}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {str(c): [] for c in o.clients} for name in servers}
    images: dict[str, list[str]] = {}
    try:
        for server in servers.values():
            load(server.url, 4, texts[:8])  # warm up
        for _ in range(o.rounds):
            for clients in o.clients:
                for name, server in servers.items():
                    measured = load(server.url, clients, texts)
                    images[f"{name} {clients}"] = measured.pop("images")
                    runs[name][str(clients)].append(measured)
                    print(f"{name}, {clients} clients: " + ", ".join(f"{k} {v:.3g}" for k, v in measured.items()), flush=True)
    finally:
        for server in servers.values():
            server.stop()
    reference = next(iter(images.values()))
    different = {name: sum(a != b for a, b in zip(of, reference, strict=True)) for name, of in images.items()}
    medians = {
        name: {c: {key: median(run[key] for run in of) for key in of[0]} for c, of in by_clients.items()}
        for name, by_clients in runs.items()
    }
    results = circumstances("cpu") | {
        "cases": cases(medians),
        "medians": medians, "runs": runs, "different_images": different, "requests": o.requests, "threads": o.threads,
    }  # fmt: skip
    o.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(medians, indent=1))
    print("images that differ from those of the first run:", different)


if __name__ == "__main__":
    main()
