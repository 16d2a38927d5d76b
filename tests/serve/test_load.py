"""Two thousand requests, a tenth of them malformed, a tenth of whose clients hang up: no slot and no memory is lost, and every good one is
answered."""

import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving import running

HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40}
REQUESTS, CLIENTS = 2000, 8


def memory_of(server) -> int:
    """Resident bytes of its process."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def outputs(server) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    values = [
        line.split()[1] for line in text.splitlines() if line.startswith(("unitok_outputs_running ", "unitok_outputs_waiting "))
    ]
    return sum(map(float, values))


@pytest.mark.long
def test_two_thousand_requests_lose_nothing(bundle_folder):
    with running(bundle_folder, "--slots", "4", "--queue", "64") as server:
        url, counts, lock = f"{server.url}/v1/chat/completions", {"good": 0, "bad": 0, "left": 0}, threading.Lock()

        def work(numbers) -> None:
            with httpx.Client(timeout=60) as client:
                for i in numbers:
                    kind = {0: "bad", 1: "left"}.get(i % 10, "good")
                    if kind == "bad":
                        broken = [b"{", b'{"messages": 7}', b"\xff" * 50, b'{"messages": [{"role": "user"}]}'][i // 10 % 4]
                        assert client.post(url, content=broken).status_code == 400
                    elif kind == "left":
                        with client.stream("POST", url, json=HI | {"stream": True, "max_tokens": 400, "seed": i}) as answer:
                            if i % 20 == 1:
                                next(answer.iter_bytes())
                    else:
                        answer = client.post(url, json=HI | {"seed": i, "stream": i % 3 == 0})
                        assert answer.status_code == 200
                        assert "choices" in answer.text
                    with lock:
                        counts[kind] += 1

        def round_of(numbers) -> None:
            shares = [list(itertools.islice(iter(numbers), k, None, CLIENTS)) for k in range(CLIENTS)]
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(work, shares))

        round_of(range(400))  # what is allocated once
        before = memory_of(server)
        round_of(range(400, REQUESTS))
        for _ in range(200):
            if outputs(server) == 0:
                break
            time.sleep(0.05)
        assert outputs(server) == 0
        assert counts == {"good": REQUESTS * 8 // 10, "bad": REQUESTS // 10, "left": REQUESTS // 10}
        assert memory_of(server) - before < 30e6
        assert server.stop() == 0
