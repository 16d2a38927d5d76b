"""The decoder for generation: the same function of the same weights, with a cache, in fewer and larger operations.

A step of one id is bound by reading the weights and, in small models, by how many operations it has. So queries, keys and values
are one product, gains of norms before a product are multiplied into it, residuals are added by it, and dimensions of each head are
reordered so that a rotation is one complex multiplication. The cache is allocated once and written in place. On a CPU matrices are
kept in oneDNN's blocked order, which for 2 to 32 rows takes 0.5 to 0.7 of the time of MKL's product (docs/notes.md). The price:
memory holds weights twice, and whoever changes a decoder's makes a new one of these. Letters as in `decoder.py`; L cache positions.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.intervals import Intervals
from unitok.model.decoder import Block, Decoder, DecoderConfig, rotary_frequencies
from unitok.model.heads import rows_of


class Cache:
    """Keys and values of past positions, [layers, B, G, L, D] each, written in place. The B slots may stand at different
    positions: what lies beyond a slot's own is never looked at, so it is rewound by writing again from an earlier one."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    @property
    def slots(self) -> int:
        """How many there is room for."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Positions of each."""
        return self.keys.shape[3]

    def part(self, start: int, stop: int) -> "Cache":
        """Some of the slots, in the same memory."""
        return Cache(self.keys[:, start:stop], self.values[:, start:stop])

    def take(self, other: "Cache", source: int, target: int, length: int) -> None:
        """Write the first `length` positions of a slot of `other`, which may be this one, over one of its own."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, target, :, :length] = theirs[:, source, :, :length]

    def grown(self, slots: int, length: int) -> "Cache":
        """A larger one with the same content."""
        old = (self.keys, self.values)
        new = [torch.zeros((k.shape[0], slots, k.shape[2], length, k.shape[4]), dtype=k.dtype, device=k.device) for k in old]
        for a, b in zip(old, new, strict=True):
            b[:, : a.shape[1], :, : a.shape[3]] = a
        return Cache(*new)


class Matrix:
    """A linear layer [out, in] for generation: x [N, in] -> [N, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = weight.T.contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product and another tensor [N, out] added."""
        added = torch.addmm(other, x, self.weight)
        return added if self.bias is None else added + self.bias


class BlockedMatrix(Matrix):
    """The same on a CPU, in oneDNN's own order of the weights, in which products of few rows are fastest."""

    ROWS = 16  # that the order is chosen for; for 1 to 64 it was as good as one of their own

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self.ROWS), bias

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product and another tensor [N, out] multiplied."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")


def matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """The linear layer that is fastest here: in oneDNN's order where that can be."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    blocked = known and weight.device.type == "cpu" and weight.dtype == torch.float32
    return BlockedMatrix(weight, bias) if blocked else Matrix(weight, bias)


class Gated:
    """SwiGLU's two products, as one: x [N, in] -> silu(gate) * up [N, width]."""

    def __init__(self, gate: tuple[Tensor, Tensor | None], up: tuple[Tensor, Tensor | None]):
        bias = None if gate[1] is None or up[1] is None else torch.cat([gate[1], up[1]])
        self.both = Matrix(torch.cat([gate[0], up[0]]), bias)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return F.silu(gate) * up


class BlockedGated(Gated):
    """The same of blocked matrices, with silu and the multiplication fused into them."""

    def __init__(self, gate: tuple[Tensor, Tensor | None], up: tuple[Tensor, Tensor | None]):
        self.gate, self.up = BlockedMatrix(*gate), BlockedMatrix(*up)

    def __call__(self, x: Tensor) -> Tensor:
        return self.up.times(x, self.gate(x, "swish"))


def unit(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, without a gain. On a CPU F.rms_norm is nine operations; this is four."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], None, eps)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(torch.tensor(eps), length, length, value=1 / x.shape[-1]).rsqrt_()


@dataclass
class _Weights:
    """Of one block."""

    qkv: Matrix
    gain: Tensor | None  # [H + G, D] of the QK-norm
    shift: Tensor | None
    out: Matrix
    gated: Gated
    down: Matrix
    after_attention: Tensor | None  # gains of norms that stand after (norm_placement)
    after_mlp: Tensor | None


@dataclass
class _Where:
    """What all layers of one pass share. Of `at` and `flat` one is given."""

    b: int
    t: int
    turns: Tensor  # complex [(B,) T, 1, D / 2]
    extent: int  # positions below this are looked at
    seen: Tensor | None  # added to the scores, [B, 1, T, extent]; None: all are seen
    at: int | None  # where all slots write
    flat: Tensor | None  # int64 [B G T], where each writes among the B G L rows


class InferenceDecoder:
    """A copy of a decoder's weights as they are now, arranged for generation. It never learns."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder):
        c = self.config = decoder.config
        self.device, self.dtype = decoder.device, decoder.lm_head.weight.dtype
        self.head = decoder.lm_head.weight.detach().clone()
        self.embedding = decoder.model.embed_tokens.weight.detach().clone()
        self.span_positions = decoder.model.embed_span_positions.weight.detach().clone() if c.span_positions else None
        self.norm = decoder.model.norm.weight.detach().clone()
        self.blocks = [_arrange(cast(Block, block), c) for block in decoder.model.layers]
        angles = torch.arange(c.max_position_embeddings)[:, None].float() * rotary_frequencies(c)
        self.turns = torch.polar(torch.ones_like(angles), angles).to(self.device)  # complex [positions, D / 2]

    def new_cache(self, slots: int, length: int) -> Cache:
        """An empty cache for so many slots of at most `length` positions."""
        c = self.config
        shape = (c.num_hidden_layers, slots, c.num_key_value_heads, length, c.head_dim)
        return Cache(*(torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in range(2)))

    def head_of(self, intervals: Intervals) -> Matrix:
        """The head for a set of tokens alone."""
        return matrix(rows_of(self.head, intervals))

    @torch.inference_mode()
    def step(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: Cache,
        extent: int,
        span_positions: Tensor | None = None,
        at: int | None = None,
    ) -> Tensor:
        """ids [B, T] at positions [B, T] -> hidden states [B, T, C]; reads and writes the cache's first B slots. extent: more than
        every position; how much of the cache to look at. span_positions: [B, T], `Grammar.span_positions`. at: the first position, where all
        slots stand at the same T ones in a row: that saves the indices and, for T = 1, the mask."""
        c, (b, t) = self.config, ids.shape
        x = F.embedding(ids, self.embedding)
        if self.span_positions is not None:
            assert span_positions is not None, "this decoder has place embeddings: give span_positions (Grammar.span_positions)"
            x = x + F.embedding(span_positions.clamp(max=len(self.span_positions) - 1), self.span_positions)
        x = x.reshape(b * t, c.hidden_size)
        where = self._where(positions, cache, extent, b, t, at)
        for number, w in enumerate(self.blocks):
            x = self._attend(x, w, where, cache.keys[number, :b], cache.values[number, :b])
            x = self._mlp(x, w)
        return F.rms_norm(x, (c.hidden_size,), self.norm, c.rms_norm_eps).view(b, t, -1)

    def _where(self, positions: Tensor, cache: Cache, extent: int, b: int, t: int, at: int | None) -> _Where:
        if at is not None and t == 1:
            return _Where(b, t, self.turns[at][None, None], extent, None, at, None)
        seen = torch.arange(extent, device=self.device) <= positions[:, None, :, None]
        # Added, not true or false: attention on a CPU would turn it into numbers in each layer anew.
        added = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, -torch.inf)
        turns = self.turns[positions.clamp(max=len(self.turns) - 1)].unsqueeze(-2)
        if at is not None:
            return _Where(b, t, turns, extent, added, at, None)
        groups = self.config.num_key_value_heads
        rows = torch.arange(b * groups, device=self.device).view(b, groups, 1) * cache.length
        flat = positions[:, None] + rows
        return _Where(b, t, turns, extent, added, None, flat.flatten())

    def _attend(self, x: Tensor, w: _Weights, where: _Where, keys: Tensor, values: Tensor) -> Tensor:
        c, b, t = self.config, where.b, where.t
        heads, groups, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        y = x if w.after_attention is not None else unit(x, c.rms_norm_eps)
        qkv = w.qkv(y).view(b, t, heads + 2 * groups, d)
        qk, v = qkv[:, :, : heads + groups], qkv[:, :, heads + groups :]
        if w.gain is not None and w.shift is not None:
            qk = torch.addcmul(w.shift, F.layer_norm(qk, (d,), eps=1e-5), w.gain)
        elif w.gain is not None:
            qk = unit(qk, c.rms_norm_eps) * w.gain
        turned = torch.view_as_complex(qk.float().contiguous().view(b, t, heads + groups, d // 2, 2)) * where.turns
        qk = torch.view_as_real(turned).flatten(-2).to(v.dtype)
        q, k = qk[:, :, :heads], qk[:, :, heads:]
        if where.flat is None:
            assert where.at is not None
            keys[:, :, where.at : where.at + t] = k.transpose(1, 2)
            values[:, :, where.at : where.at + t] = v.transpose(1, 2)
        else:
            keys.flatten(0, 2).index_copy_(0, where.flat, k.transpose(1, 2).flatten(0, 2))
            values.flatten(0, 2).index_copy_(0, where.flat, v.transpose(1, 2).flatten(0, 2))
        grouped: dict[str, Any] = {"enable_gqa": True} if groups != heads else {}
        keys, values = keys[:, :, : where.extent], values[:, :, : where.extent]
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=where.seen, **grouped)
        y = y.transpose(1, 2).reshape(b * t, heads * d)
        return self._add(x, y, w.out, w.after_attention)

    def _mlp(self, x: Tensor, w: _Weights) -> Tensor:
        c = self.config
        y = x if w.after_mlp is not None else unit(x, c.rms_norm_eps)
        return self._add(x, w.gated(y), w.down, w.after_mlp)

    def _add(self, x: Tensor, y: Tensor, matrix: Matrix, after: Tensor | None) -> Tensor:
        """x + the product; with a norm in between where it stands after."""
        if after is None:
            return matrix.plus(y, x)
        return x + F.rms_norm(matrix(y), (self.config.hidden_size,), after, self.config.rms_norm_eps)


def _effective(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear layer, with the difference that LoRA has learnt."""
    base = getattr(layer, "base_layer", layer)
    weight = base.weight.detach()
    if base is not layer:
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).detach()
    return weight, None if base.bias is None else base.bias.detach().clone()


def _arrange(block: Block, c: DecoderConfig) -> _Weights:
    """One block's weights."""
    a, m, before = block.self_attn, block.mlp, c.norm_placement == "before"
    # Pairs side by side: dot products do not depend on the order, as long as queries and keys have the same.
    order = torch.arange(c.head_dim).view(2, -1).T.flatten().to(block.input_layernorm.weight.device)

    def after_norm(layer: nn.Module, norm: nn.RMSNorm) -> tuple[Tensor, Tensor | None]:
        weight, bias = _effective(layer)
        return weight * norm.weight if before else weight, bias

    def paired(x: Tensor) -> Tensor:
        """Reorders each head's dimensions in the rows of queries and keys."""
        qk = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
        return torch.cat([x[:qk].unflatten(0, (-1, c.head_dim))[:, order].flatten(0, 1), x[qk:]])

    parts = [after_norm(layer, block.input_layernorm) for layer in (a.q_proj, a.k_proj, a.v_proj)]
    qkv_weight = paired(torch.cat([weight for weight, _ in parts]))
    biases = [bias for _, bias in parts if bias is not None]
    gain = shift = None
    if c.qk_norm != "none":
        norms: Any = ((a.q_norm, c.num_attention_heads), (a.k_norm, c.num_key_value_heads))
        gain = torch.cat([norm.weight.expand(heads, -1) for norm, heads in norms])[:, order]
        if c.qk_norm == "layer":
            shift = torch.cat([norm.bias for norm, _ in norms])[:, order]
    gate, up = (after_norm(layer, block.post_attention_layernorm) for layer in (m.gate_proj, m.up_proj))
    qkv = matrix(qkv_weight, paired(torch.cat(biases)) if biases else None)
    return _Weights(
        qkv=qkv,
        gain=gain,
        shift=shift,
        out=matrix(*_effective(a.o_proj)),
        gated=(BlockedGated if isinstance(qkv, BlockedMatrix) else Gated)(gate, up),
        down=matrix(*_effective(m.down_proj)),
        after_attention=None if before else block.input_layernorm.weight.detach().clone(),
        after_mlp=None if before else block.post_attention_layernorm.weight.detach().clone(),
    )
