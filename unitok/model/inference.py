"""The decoder for generation in PyTorch: the same function of the same weights, with a KV cache, in fewer and larger operations.

It is what runs on GPUs, and on a CPU without a compiler; `native/` is the same in C++. A step of one token is bound by reading the
weights and by the number of operations, so it runs on arranged weights (`arranged.py`), and on a GPU in our own kernels
(`triton_layers.py`) that are launched together (`cuda_graphs.py`). The cache is allocated once and written in place. The price: memory
holds the weights twice, and after a change of the decoder's weights a new copy must be made.

Letters as in `decoder.py`, and L for the positions of the cache.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unitok.hardware import has_triton
from unitok.intervals import Intervals
from unitok.model.arranged import ArrangedBlock, Matrix, arrange, matrix, rms_normalize, rotation_table
from unitok.model.cache import Cache, common_start
from unitok.model.cuda_graphs import CudaGraphs
from unitok.model.decoder import NO_SPAN_POSITIONS, Decoder, axes_of, position_in
from unitok.model.heads import rows_of

if TYPE_CHECKING:
    from unitok.model.triton_layers import Layers

#: On a GPU a recorded step looks at a multiple of so many positions.
EXTENT = 256


@dataclass
class _Pass:
    """What all layers of one pass share. Exactly one of `start` and `rows` is given."""

    b: int
    t: int
    rotation: Tensor  # complex [(B,) T, 1, D / 2]
    extent: int  # only positions below this are read
    mask: Tensor | None  # added to the scores, [B, 1, T, extent]; None: all positions are attended to
    start: int | None  # position from which all slots write
    rows: Tensor | None  # int64 [B G T], the row to write, of the B G L rows of keys and values


class InferenceDecoder:
    """A copy of a decoder's present weights, arranged for generation. It is not trained."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder):
        c = self.config = decoder.config
        self.device, self.dtype = decoder.device, decoder.lm_head.weight.dtype
        self.head = decoder.lm_head.weight.detach().clone()
        self.embedding = decoder.model.embed_tokens.weight.detach().clone()
        self.span_positions = decoder.model.embed_span_positions.weight.detach().clone() if c.span_positions else None
        self.norm = decoder.model.norm.weight.detach().clone()
        self.blocks = [ArrangedBlock(weights, self.dtype) for weights in arrange(decoder)]
        self.rotation = rotation_table(c).to(self.device)
        self.kernels = _kernels(self)
        self.graphs = CudaGraphs() if self.device.type == "cuda" else None

    def new_cache(self, slots: int, length: int) -> Cache:
        """An empty cache of so many slots, each of at most `length` positions."""
        return Cache.empty(self.config, slots, length, self.device, self.dtype)

    def head_of(self, intervals: Intervals) -> Matrix:
        """The rows of the head for a set of tokens."""
        return matrix(rows_of(self.head, intervals))

    @torch.inference_mode()
    def read(self, ids: list[list[int]], span_positions: list[list[int]], starts: list[int], cache: Cache) -> Tensor:
        """Tokens of the first B slots, any number of each from position `starts` on -> hidden states [B, C] after the last of each.

        Shorter ones are padded on the right; later steps overwrite what the padding writes into the cache before anything attends to it.
        """
        lengths = np.array([len(x) for x in ids])
        positions = np.array(starts)[:, None] + np.arange(lengths.max())
        padded = np.zeros((2, *positions.shape), np.int64)
        for i, rows in enumerate(zip(ids, span_positions, strict=True)):
            padded[:, i, : lengths[i]] = rows
        common = common_start(positions, cache)
        extent = min(int(positions.max()) + 1, cache.length)
        arrays = (padded[0], positions.clip(max=cache.length - 1), padded[1], lengths - 1)
        sent = [torch.from_numpy(x).to(self.device, non_blocking=True) for x in arrays]
        if lengths.max() == 1:
            return self.step_once(sent[0], sent[1], cache, extent, sent[2], common)[:, 0]
        hidden = self.step(sent[0], sent[1], cache, extent, sent[2], common)
        return hidden[torch.arange(len(ids), device=self.device), sent[3]]

    @torch.inference_mode()
    def step(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: Cache,
        extent: int,
        span_positions: Tensor | None = None,
        start: int | None = None,
    ) -> Tensor:
        """Tokens [B, T] at positions [B, T] -> hidden states [B, T, C]. Reads and writes the first B slots of the cache.

        extent: how much of the cache to read; above every position. span_positions: [B, T], `Grammar.span_positions`. start: first
        position, where all slots are at the same T consecutive positions; that saves the indices and, for T = 1, the mask.
        """
        c, (b, t) = self.config, ids.shape
        x = F.embedding(ids, self.embedding)
        if self.span_positions is not None:
            assert span_positions is not None, NO_SPAN_POSITIONS
            x = x + F.embedding(position_in(span_positions).clamp(max=len(self.span_positions) - 1), self.span_positions)
        x = x.reshape(b * t, c.hidden_size)
        if t == 1 and self.kernels is not None:
            x = self.kernels(x, positions[:, 0], cache, extent)
        else:
            shared = self._prepare(positions, span_positions, cache, extent, b, t, start)
            for number, w in enumerate(self.blocks):
                x = self._attend(x, w, shared, cache.keys[number, :b], cache.values[number, :b])
                x = self._mlp(x, w)
        return F.rms_norm(x, (c.hidden_size,), self.norm, c.rms_norm_eps).view(b, t, -1)

    @torch.inference_mode()
    def step_once(
        self, ids: Tensor, positions: Tensor, cache: Cache, extent: int, span_positions: Tensor, start: int | None = None
    ) -> Tensor:
        """As `step`, of one token per slot, ids [B, 1]; on a GPU recorded, and then the next call may overwrite the result."""
        if self.graphs is None:
            return self.step(ids, positions, cache, extent, span_positions, start)
        most = min(-(-extent // EXTENT) * EXTENT, cache.length)
        key = ("step", cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.stride(), most)
        return self.graphs(key, lambda i, p, s: self.step(i, p, cache, most, s), ids, positions, span_positions)

    def _rotation(self, positions: Tensor, span_positions: Tensor | None) -> Tensor:
        """Complex [B, T, 1, D / 2]."""
        last = len(self.rotation) - 1
        rotation = self.rotation[positions.clamp(max=last)]
        if self.config.span_rotation:
            assert span_positions is not None, NO_SPAN_POSITIONS
            if not self.config.grid_rotation:
                rotation[..., 1::2] = self.rotation[position_in(span_positions).clamp(max=last)][..., 1::2]
            for k, axis in enumerate(axes_of(span_positions).unbind(-1) if self.config.grid_rotation else ()):
                rotation[..., 1 + 2 * k :: 6] = self.rotation[axis.clamp(max=last)][..., 1 + 2 * k :: 6]
        return rotation.unsqueeze(-2)

    def _prepare(
        self, positions: Tensor, span_positions: Tensor | None, cache: Cache, extent: int, b: int, t: int, start: int | None
    ) -> _Pass:
        if start is not None and t == 1:
            by_span = self.config.span_rotation
            rotation = self._rotation(positions, span_positions) if by_span else self.rotation[start][None, None]
            return _Pass(b, t, rotation, extent, None, start, None)
        visible = torch.arange(extent, device=self.device) <= positions[:, None, :, None]
        # Additive: attention on a CPU would convert a boolean mask anew in each layer.
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, -torch.inf)
        rotation = self._rotation(positions, span_positions)
        if start is not None:
            return _Pass(b, t, rotation, extent, mask, start, None)
        groups = self.config.num_key_value_heads
        first_rows = torch.arange(b * groups, device=self.device).view(b, groups, 1) * cache.length
        rows = positions[:, None] + first_rows
        return _Pass(b, t, rotation, extent, mask, None, rows.flatten())

    def _attend(self, x: Tensor, w: ArrangedBlock, shared: _Pass, keys: Tensor, values: Tensor) -> Tensor:
        c, b, t = self.config, shared.b, shared.t
        heads, groups, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        y = x if w.after_attention is not None else rms_normalize(x, c.rms_norm_eps)
        qkv = w.qkv(y).view(b, t, heads + 2 * groups, d)
        qk, v = qkv[:, :, : heads + groups], qkv[:, :, heads + groups :]
        if w.gain is not None and w.shift is not None:
            qk = torch.addcmul(w.shift, F.layer_norm(qk, (d,), eps=1e-5), w.gain)
        elif w.gain is not None:
            qk = rms_normalize(qk, c.rms_norm_eps) * w.gain
        rotated = torch.view_as_complex(qk.float().contiguous().view(b, t, heads + groups, d // 2, 2)) * shared.rotation
        qk = torch.view_as_real(rotated).flatten(-2).to(v.dtype)
        q, k = qk[:, :, :heads], qk[:, :, heads:]
        if shared.rows is None:
            assert shared.start is not None
            keys[:, :, shared.start : shared.start + t] = k.transpose(1, 2)
            values[:, :, shared.start : shared.start + t] = v.transpose(1, 2)
        else:
            keys.flatten(0, 2).index_copy_(0, shared.rows, k.transpose(1, 2).flatten(0, 2))
            values.flatten(0, 2).index_copy_(0, shared.rows, v.transpose(1, 2).flatten(0, 2))
        keys, values, grouped = keys[:, :, : shared.extent], values[:, :, : shared.extent], groups != heads
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=shared.mask, enable_gqa=grouped)
        y = y.transpose(1, 2).reshape(b * t, heads * d)
        return self._add(x, y, w.out, w.after_attention)

    def _mlp(self, x: Tensor, w: ArrangedBlock) -> Tensor:
        c = self.config
        y = x if w.after_mlp is not None else rms_normalize(x, c.rms_norm_eps)
        return self._add(x, w.gated(y), w.down, w.after_mlp)

    def _add(self, x: Tensor, y: Tensor, matrix: Matrix, after: Tensor | None) -> Tensor:
        """x plus the product of y; the product is normalized first where norm_placement is "after"."""
        if after is None:
            return matrix.plus(y, x)
        return x + F.rms_norm(matrix(y), (self.config.hidden_size,), after, self.config.rms_norm_eps)


def _kernels(decoder: InferenceDecoder) -> "Layers | None":
    """What runs a decoder's layers in steps of one token: None where PyTorch does."""
    if decoder.device.type != "cuda" or not has_triton():
        return None
    from unitok.model.triton_layers import Layers

    suits = Layers.suit(decoder.config, decoder.dtype)
    return Layers(decoder.config, decoder.blocks, decoder.rotation, decoder.dtype) if suits else None
