"""Decoding steps of one token per slot as CUDA graphs: one replay launches all kernels of a step.

Launched one by one, kernels bound the speed of a small model. A graph is captured for each number of slots and each extent of the
cache, rounded up, when it is first needed. Tested only on machines with a GPU; its speed is not measured yet.
"""

import torch
from torch import Tensor

from unitok.model.inference import Cache, InferenceDecoder


class CudaGraphs:
    """Captured decoding steps of one decoder."""

    BUCKET = 256  # extents are rounded up to a multiple of this many positions

    def __init__(self, decoder: InferenceDecoder):
        self.decoder = decoder
        self._graphs: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._cache_address = 0  # of the cache that the graphs were captured with

    def step(self, ids: Tensor, positions: Tensor, cache: Cache, extent: int, span_positions: Tensor) -> Tensor:
        """Like `InferenceDecoder.step` for tokens [B, 1]; the next call overwrites the result."""
        if self._cache_address != cache.keys.data_ptr():
            self._graphs.clear()
            self._cache_address = cache.keys.data_ptr()
        extent = min(-(-extent // self.BUCKET) * self.BUCKET, cache.length)
        key = len(ids), extent, cache.length
        if key not in self._graphs:
            self._graphs[key] = self._capture([ids.clone(), positions.clone(), span_positions.clone()], cache, extent)
        graph, inputs, output = self._graphs[key]
        for static, given in zip(inputs, (ids, positions, span_positions), strict=True):
            static.copy_(given)
        graph.replay()
        return output

    def _capture(self, inputs: list[Tensor], cache: Cache, extent: int) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        ids, positions, span_positions = inputs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a pass before the capture, in which libraries allocate their workspaces
            self.decoder.step(ids, positions, cache, extent, span_positions)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU
            output = self.decoder.step(ids, positions, cache, extent, span_positions)
        return graph, inputs, output
