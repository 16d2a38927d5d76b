"""Steps of one id as CUDA graphs: a replay launches all kernels of a step at once, which one by one bound a small model.

A graph is recorded the first time that so many slots look at so many positions of a cache, rounded up. Not measured yet, and
tested only where there is a GPU.
"""

import torch
from torch import Tensor

from unitok.model.inference import Cache, InferenceDecoder


class CudaGraphs:
    """Steps of a decoder that are recorded when they are first needed."""

    BUCKET = 256  # positions that are looked at are rounded up to a multiple of it

    def __init__(self, decoder: InferenceDecoder):
        self.decoder = decoder
        self._graphs: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._memory = 0  # address of the cache that the graphs were recorded with

    def step(self, ids: Tensor, positions: Tensor, cache: Cache, extent: int, span_positions: Tensor) -> Tensor:
        """As `InferenceDecoder.step`, of ids [B, 1]; the result is overwritten by the next call."""
        if self._memory != cache.keys.data_ptr():
            self._graphs.clear()
            self._memory = cache.keys.data_ptr()
        extent = min(-(-extent // self.BUCKET) * self.BUCKET, cache.length)
        key = len(ids), extent, cache.length
        if key not in self._graphs:
            self._graphs[key] = self._record([ids.clone(), positions.clone(), span_positions.clone()], cache, extent)
        graph, inputs, output = self._graphs[key]
        for kept, given in zip(inputs, (ids, positions, span_positions), strict=True):
            kept.copy_(given)
        graph.replay()
        return output

    def _record(self, inputs: list[Tensor], cache: Cache, extent: int) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        ids, positions, span_positions = inputs
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # once outside the graph, so that libraries have set up what they need
            self.decoder.step(ids, positions, cache, extent, span_positions)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.decoder.step(ids, positions, cache, extent, span_positions)
        return graph, inputs, output
