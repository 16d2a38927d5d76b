"""Functions on a GPU as CUDA graphs: one replay launches all kernels of a step or a draw.

Launched one by one from Python, kernels bound the speed of a small model. A graph is recorded for each key and shape when it is needed
for the third time: recording takes as long as many calls, and what changes with every batch of a server never pays for it.
"""

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class CudaGraphs:
    """What was recorded, for one decoder. Threads have graphs of their own, as a graph has its inputs and output in fixed memory."""

    MOST = 128  # graphs that are kept
    CALLS = 2  # that are not recorded

    def __init__(self) -> None:
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor, object]] = {}
        self._calls: dict[Hashable, int] = {}
        self._pool: Any = None  # memory that they share, as they run one after the other; it ends with the last of them

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor, memory: object = None) -> Tensor:
        """Return function(*inputs); the next call with this key may overwrite the result.

        key: whatever else the function depends on, such as the addresses of other tensors. memory: what must live as long as the graph,
        because it reads it.
        """
        key = (threading.get_ident(), key, *(x.shape for x in inputs))
        if key not in self._recorded:
            if len(self._calls) > 100 * self.MOST:
                self._calls.clear()
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls <= self.CALLS:
                return function(*inputs)
            while len(self._recorded) >= self.MOST:
                del self._recorded[next(iter(self._recorded))]
            self._recorded[key] = (*self._record(function, [x.clone() for x in inputs]), memory)
        graph, static, output, _ = self._recorded[key]
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return output

    def _record(
        self, function: Callable[..., Tensor], inputs: list[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a pass before the capture, in which libraries allocate and kernels are compiled
            function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool if self._recorded else torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # other threads may use the GPU
            output = function(*inputs)
        return graph, inputs, output
