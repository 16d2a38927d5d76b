"""`NativeDecoder`: the weights of a decoder as `decoder.cpp` reads them, and its calls.

Matrices are in panels of 16, 32 or 64 outputs, in float32, bfloat16, or int8 with one scale for each output; sums, norms and embeddings are in
float32, and so is the cache, with smaller weights in bfloat16. Letters as in `model/inference.py`.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unitok.intervals import Intervals
from unitok.model.arranged import Linear, arrange, rotation_table
from unitok.model.cache import Cache
from unitok.model.decoder import NO_SPAN_POSITIONS, Decoder
from unitok.model.heads import ids_of
from unitok.model.native import library

DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of the weights: bytes

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32


class _Matrix(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("panels", "scale", "bias")] + [
        (name, _INT) for name in ("n", "k", "bytes", "unused")
    ]


class _Layer(ctypes.Structure):
    _fields_ = [(name, _Matrix) for name in ("qkv", "out", "gate_up", "down")] + [
        (name, _POINTER) for name in ("gain", "shift", "after_attention", "after_mlp")
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, _INT)
            for name in ("layers", "width", "heads", "groups", "head_dim", "span_positions", "positions", "span_rotation")
        ),
        ("eps", ctypes.c_float),
        *((name, _POINTER) for name in ("layer", "embedding", "span_embedding", "norm", "rotation")),
        ("head", _Matrix),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [("keys", _POINTER), ("values", _POINTER)] + [
        (name, ctypes.c_int64) for name in ("layer_stride", "slot_stride", "length")
    ]
    _fields_ += [("bytes", _INT), ("unused", _INT)]


class _Tokens(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("ids", "positions", "span_positions", "slots")] + [
        ("count", _INT),
        ("once", _INT),
    ]


class _Stretch(ctypes.Structure):
    _fields_ = [(name, _INT) for name in ("count", "requests", "slots", "unused")] + [
        (name, _POINTER)
        for name in (
            "owner", "set", "set_start", "intervals", "union", "union_start", "panels", "params", "scales", "uniform", "positions",
            "span_positions", "seen", "sampled", "hidden",
        )
    ]  # fmt: skip


#: Sampling parameters of a request, as in decoder.cpp; own, none and media are its slots, the latter two equal to the one before
#: where it is not compared with another.
PARAMS = np.dtype(
    [(name, np.float32) for name in ("temperature", "top_p", "min_p", "penalty")]
    + [(name, np.int32) for name in ("top_k", "own", "none", "media")]
)


@dataclass
class Stretch:
    """Tokens to sample one after the other: `count` of them for each of B requests, from sets that are known beforehand.

    owner: int32 [slots], the request of each slot. sets: allowed sets by request and step. params: [B] of `PARAMS`. scales: float32 [count, B, 2]. uniform: float64 [count, B]. positions, span_positions: int64
    [count, slots], of the sampled tokens. seen: bool [B, V] for the repetition penalty, updated; None without. hidden: float32
    [slots, C], states before the first token; updated to those before the last.
    """

    owner: np.ndarray
    sets: list[list[Intervals]]
    params: np.ndarray
    scales: np.ndarray
    uniform: np.ndarray
    positions: np.ndarray
    span_positions: np.ndarray
    seen: np.ndarray | None
    hidden: Tensor


class NativeDecoder:
    """A copy of a decoder's present weights for generation on a CPU, with the interface of `InferenceDecoder` and `sample`.

    Args:
        weights: type of the matrices, one of `DTYPES`. compiled: another build of `decoder.cpp`.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, weights: str = "float32", compiled: ctypes.CDLL | None = None):
        found = compiled or library()
        assert found is not None, "ask unitok.model.native.library() first"
        self._library, self.weights, self._panel = found, weights, found.unitok_panel()  # outputs of a panel
        c = self.config = decoder.config
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._kept: list[Tensor] = []  # memory that C++ reads
        layers = (_Layer * c.num_hidden_layers)()
        for layer, w in zip(layers, arrange(decoder), strict=True):
            layer.qkv, layer.out, layer.down = self._matrix(*w.qkv), self._matrix(*w.out), self._matrix(*w.down)
            layer.gate_up = self._matrix(*_interleaved(w.gate, w.up, self._panel // 2))
            for name in ("gain", "shift", "after_attention", "after_mlp"):
                setattr(layer, name, self._floats(getattr(w, name)))
        model, rotation = decoder.model, rotation_table(c)
        span = model.embed_span_positions.weight if c.span_positions else None
        self._layers = layers
        self._model = _Model(
            c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.span_positions,
            len(rotation), c.span_rotation + c.grid_rotation, c.rms_norm_eps, ctypes.addressof(layers), self._floats(model.embed_tokens.weight), self._floats(span),
            self._floats(model.norm.weight), self._floats(torch.view_as_real(rotation)), self._matrix(decoder.lm_head.weight),
        )  # fmt: skip

    def _floats(self, x: Tensor | None) -> int | None:
        """Address of a copy in float32, which is kept."""
        if x is None:
            return None
        self._kept.append(x.detach().to(torch.float32, copy=True).contiguous())
        return self._kept[-1].data_ptr()

    def _matrix(self, weight: Tensor, bias: Tensor | None = None) -> _Matrix:
        """A matrix [n, k] in panels."""
        n, k = weight.shape
        padded = torch.zeros(-(-n // self._panel) * self._panel, k)
        padded[:n] = weight
        scale = None
        if self.weights == "int8":
            scale = padded.abs().amax(1).clamp_min(1e-30) / 127
            padded = (padded / scale[:, None]).round().to(torch.int8)
        panels = padded.to(getattr(torch, self.weights)).unflatten(0, (-1, self._panel)).mT.contiguous()
        self._kept.append(panels)
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(len(padded) - n)])
        return _Matrix(panels.data_ptr(), self._floats(scale), self._floats(bias), n, k, DTYPES[self.weights], 0)

    # ---- The interface of InferenceDecoder -------------------------------------------------------------------------

    def new_cache(self, slots: int, length: int) -> Cache:
        """An empty cache of so many slots, each of at most `length` positions."""
        dtype = torch.float32 if self.weights == "float32" else torch.bfloat16
        return Cache.empty(self.config, slots, length, self.device, dtype)

    def head_of(self, intervals: Intervals) -> Callable[[Tensor], Tensor]:
        """The rows of the head for a set of n tokens: hidden states [N, C] -> logits [N, n]."""
        panels, ids = self._panels((intervals,)), ids_of(intervals, self.device)
        width = -(-self.config.vocab_size // self._panel) * self._panel

        def logits(hidden: Tensor) -> Tensor:
            hidden, made = hidden.contiguous(), torch.empty(len(hidden), width)
            self._library.unitok_logits(
                ctypes.byref(self._model), _POINTER(hidden.data_ptr()), len(hidden), _POINTER(panels.ctypes.data), len(panels),
                _POINTER(made.data_ptr()), torch.get_num_threads(),
            )  # fmt: skip
            return made[:, slice(*intervals[0])] if len(intervals) == 1 else made[:, ids]

        return logits

    def step(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: Cache,
        extent: int,
        span_positions: Tensor | None = None,
        start: int | None = None,
    ) -> Tensor:
        """Tokens [B, T] at positions [B, T] -> hidden states [B, T, C], as `InferenceDecoder.step`."""
        b, t = ids.shape
        slots = torch.arange(b, dtype=torch.int32).repeat_interleave(t)
        if self.config.span_positions or self.config.span_rotation:
            assert span_positions is not None, NO_SPAN_POSITIONS
        sent = [x.contiguous() for x in (ids, positions, ids if span_positions is None else span_positions, slots)]
        return self._pass(sent, cache, t == 1).view(b, t, -1)

    def read(self, ids: list[list[int]], span_positions: list[list[int]], starts: list[int], cache: Cache) -> Tensor:
        """Tokens of B slots, any number of each from position `starts` on -> hidden states [B, C] after the last of each."""
        lengths = torch.tensor([len(x) for x in ids])
        slots = torch.arange(len(ids), dtype=torch.int32).repeat_interleave(lengths)
        positions = torch.cat([torch.arange(start, start + len(x)) for start, x in zip(starts, ids, strict=True)])
        sent = [torch.tensor([x for row in rows for x in row]) for rows in (ids, span_positions)]
        return self._pass([sent[0], positions, sent[1], slots], cache, len(ids) == len(slots))[lengths.cumsum(0) - 1]

    def _pass(self, sent: list[Tensor], cache: Cache, once: bool) -> Tensor:
        """Tokens, positions, span positions and slots, each of N tokens -> hidden states [N, C]."""
        count = sent[0].numel()
        hidden = torch.empty(count, self.config.hidden_size)
        tokens = _Tokens(*(x.data_ptr() for x in sent), count, once)
        self._library.unitok_pass(
            ctypes.byref(self._model), ctypes.byref(_cache(cache)), ctypes.byref(tokens), _POINTER(hidden.data_ptr()),
            torch.get_num_threads(),
        )  # fmt: skip
        return hidden

    # ---- Sampling ------------------------------------------------------------------------------------------------

    def sample(self, s: Stretch, cache: Cache) -> np.ndarray:
        """Sample a stretch; return int64 [count, B]. The model runs on all tokens but the last of each request."""
        count, b = s.uniform.shape
        numbers: dict[Intervals, int] = {}
        set_of = np.array([[numbers.setdefault(x, len(numbers)) for x in step] for step in zip(*s.sets, strict=True)], np.int32)
        intervals = np.array([pair for x in numbers for pair in x], np.int32)
        set_start = np.cumsum([0, *(len(x) for x in numbers)], dtype=np.int32)
        unions: dict[tuple[Intervals, ...], int] = {}
        union = np.array([unions.setdefault(step, len(unions)) for step in zip(*s.sets, strict=True)], np.int32)
        panels = [self._panels(sets) for sets in unions]
        union_start = np.cumsum([0, *map(len, panels)], dtype=np.int32)
        sampled, joined = np.zeros((count, b), np.int64), np.concatenate(panels)
        arrays = (s.owner, set_of, set_start, intervals, union, union_start, joined, s.params, s.scales, s.uniform, s.positions,
                  s.span_positions, s.seen, sampled)  # fmt: skip
        sent = [None if x is None else np.ascontiguousarray(x) for x in arrays]
        assert s.hidden.is_contiguous(), "C++ writes into it"
        stretch = _Stretch(
            count, b, len(s.owner), 0, *(None if x is None else x.ctypes.data for x in sent), s.hidden.data_ptr()
        )
        self._library.unitok_stretch(
            ctypes.byref(self._model), ctypes.byref(_cache(cache)), ctypes.byref(stretch), torch.get_num_threads()
        )
        return sampled

    def _panels(self, sets: tuple[Intervals, ...]) -> np.ndarray:
        """Panels of the head that hold the tokens of any of these sets; int32, ascending."""
        spans = {(a // self._panel, (b - 1) // self._panel + 1) for intervals in set(sets) for a, b in intervals}
        return np.unique(np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in spans]))


def _cache(cache: Cache) -> _Cache:
    keys, values = cache.keys, cache.values
    assert keys.stride() == values.stride(), "one stride for both"
    where = keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1), cache.length
    return _Cache(*where, keys.element_size(), 0)


def _interleaved(gate: Linear, up: Linear, half: int) -> Linear:
    """SwiGLU's two matrices as one, half a panel of either in turns."""

    def both(a: Tensor, b: Tensor) -> Tensor:
        n = -(-len(a) // half) * half
        parts = [torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])]).unflatten(0, (-1, half)) for x in (a, b)]
        return torch.stack(parts, 1).flatten(0, 2)

    bias = None if gate[1] is None or up[1] is None else both(gate[1], up[1])
    return both(gate[0], up[0]), bias
