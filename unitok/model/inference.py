"""The decoder for generation in PyTorch: the same function of the same weights, with a KV cache, in fewer and larger operations.

It is what runs on GPUs, and on a CPU without a compiler; `native/` is the same in C++. A step of one token is bound by reading the
weights and by the number of operations. So queries, keys and values are one product, gains of norms that stand before a product are
multiplied into its weights, residuals are added by the product, and the dimensions of each head are reordered so that a rotation is one
complex multiplication. The cache is allocated once and written in place. On a CPU, matrices are kept in oneDNN's blocked layout, which
for 2 to 32 rows takes 0.5 to 0.7 of the time of MKL's product (docs/notes.md). The price: memory holds the weights twice, and after a
change of the decoder's weights a new copy must be made.

Letters as in `decoder.py`, and L for the positions of the cache. A slot is the room of one document in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.intervals import Intervals
from unitok.model.decoder import Block, Decoder, DecoderConfig, rotary_frequencies
from unitok.model.heads import rows_of

#: Weight [out, in] and bias of a linear layer.
Linear = tuple[Tensor, Tensor | None]


class Cache:
    """Keys and values of past positions, each [layers, B, G, L, D], written in place.

    The B slots may be at different positions. What lies beyond a slot's position is never read, so a slot is rewound by writing again
    from an earlier position.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    @classmethod
    def empty(cls, c: DecoderConfig, slots: int, length: int, device: torch.device, dtype: torch.dtype) -> "Cache":
        """A cache of a decoder with so many slots, each of at most `length` positions."""
        shape = (c.num_hidden_layers, slots, c.num_key_value_heads, length, c.head_dim)
        return cls(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))

    @property
    def slots(self) -> int:
        """Number of slots, B."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Number of positions of each slot, L."""
        return self.keys.shape[3]

    def part(self, start: int, stop: int) -> "Cache":
        """The slots from `start` to `stop`, in the same memory."""
        return Cache(self.keys[:, start:stop], self.values[:, start:stop])

    def take(self, other: "Cache", source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` of `other`, which may be this cache, into slot `target`."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, target, :, :length] = theirs[:, source, :, :length]

    def grown(self, slots: int, length: int) -> "Cache":
        """A larger cache with the same content."""
        old = (self.keys, self.values)
        new = [torch.zeros((k.shape[0], slots, k.shape[2], length, k.shape[4]), dtype=k.dtype, device=k.device) for k in old]
        for a, b in zip(old, new, strict=True):
            b[:, : a.shape[1], :, : a.shape[3]] = a
        return Cache(*new)


def common_start(positions: np.ndarray, cache: Cache) -> int | None:
    """Return the first of positions [slots, T] if all slots share it and the cache has room for all T; else None."""
    first = int(positions[0, 0])
    return first if (positions[:, 0] == first).all() and first + positions.shape[1] <= cache.length else None


class Matrix:
    """A linear layer with weight [out, in]: x [N, in] -> [N, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = weight.T.contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The layer's output plus `other` [N, out]."""
        added = torch.addmm(other, x, self.weight)
        return added if self.bias is None else added + self.bias


class BlockedMatrix(Matrix):
    """A linear layer on a CPU, with the weight in oneDNN's blocked layout, which is fastest for few rows."""

    ROWS = 16  # the layout is chosen for this many; for 1 to 64 rows it was as fast as a layout of their own

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self.ROWS), bias

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The layer's output times `other` [N, out]."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")


def matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """The fastest linear layer for this device and dtype: `BlockedMatrix` where oneDNN can run it."""
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    blocked = available and weight.device.type == "cpu" and weight.dtype == torch.float32
    return BlockedMatrix(weight, bias) if blocked else Matrix(weight, bias)


class Gated:
    """SwiGLU's two products as one: x [N, in] -> silu(gate) * up [N, width]."""

    def __init__(self, gate: Linear, up: Linear):
        bias = None if gate[1] is None or up[1] is None else torch.cat([gate[1], up[1]])
        self.both = Matrix(torch.cat([gate[0], up[0]]), bias)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return F.silu(gate) * up


class BlockedGated(Gated):
    """SwiGLU of blocked matrices, with silu and the multiplication fused into the products."""

    def __init__(self, gate: Linear, up: Linear):
        self.gate, self.up = BlockedMatrix(*gate), BlockedMatrix(*up)

    def __call__(self, x: Tensor) -> Tensor:
        return self.up.times(x, self.gate(x, "swish"))


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, without a gain. On a CPU F.rms_norm takes nine operations; this takes four."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], None, eps)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(torch.tensor(eps), length, length, value=1 / x.shape[-1]).rsqrt_()


@dataclass
class Arranged:
    """Weights of one block in fewer and larger matrices: gains of norms before products are multiplied into them, and the two dimensions
    of a rotated pair are neighbors."""

    qkv: Linear
    gain: Tensor | None  # of the QK-norm, [H + G, D]
    shift: Tensor | None  # its bias
    out: Linear
    gate: Linear
    up: Linear
    down: Linear
    after_attention: Tensor | None  # gain of the norm, where norm_placement is "after"
    after_mlp: Tensor | None


class _Block:
    """One block as layers of this device and type."""

    def __init__(self, w: Arranged, dtype: torch.dtype):
        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        def linear(x: Linear) -> Linear:
            return x[0].to(dtype), cast(x[1])

        self.gain, self.shift = cast(w.gain), cast(w.shift)
        self.after_attention, self.after_mlp = cast(w.after_attention), cast(w.after_mlp)
        self.qkv, self.out, self.down = (matrix(*linear(x)) for x in (w.qkv, w.out, w.down))
        self.gated = (BlockedGated if isinstance(self.qkv, BlockedMatrix) else Gated)(linear(w.gate), linear(w.up))


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
        self.blocks = [_Block(weights, self.dtype) for weights in arrange(decoder)]
        self.rotation = rotation_table(c).to(self.device)

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
            assert span_positions is not None, (
                "this decoder embeds span positions: give span_positions (Grammar.span_positions)"
            )
            x = x + F.embedding(span_positions.clamp(max=len(self.span_positions) - 1), self.span_positions)
        x = x.reshape(b * t, c.hidden_size)
        shared = self._prepare(positions, cache, extent, b, t, start)
        for number, w in enumerate(self.blocks):
            x = self._attend(x, w, shared, cache.keys[number, :b], cache.values[number, :b])
            x = self._mlp(x, w)
        return F.rms_norm(x, (c.hidden_size,), self.norm, c.rms_norm_eps).view(b, t, -1)

    def _prepare(self, positions: Tensor, cache: Cache, extent: int, b: int, t: int, start: int | None) -> _Pass:
        if start is not None and t == 1:
            return _Pass(b, t, self.rotation[start][None, None], extent, None, start, None)
        visible = torch.arange(extent, device=self.device) <= positions[:, None, :, None]
        # Additive: attention on a CPU would convert a boolean mask anew in each layer.
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, -torch.inf)
        rotation = self.rotation[positions.clamp(max=len(self.rotation) - 1)].unsqueeze(-2)
        if start is not None:
            return _Pass(b, t, rotation, extent, mask, start, None)
        groups = self.config.num_key_value_heads
        first_rows = torch.arange(b * groups, device=self.device).view(b, groups, 1) * cache.length
        rows = positions[:, None] + first_rows
        return _Pass(b, t, rotation, extent, mask, None, rows.flatten())

    def _attend(self, x: Tensor, w: _Block, shared: _Pass, keys: Tensor, values: Tensor) -> Tensor:
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

    def _mlp(self, x: Tensor, w: _Block) -> Tensor:
        c = self.config
        y = x if w.after_mlp is not None else rms_normalize(x, c.rms_norm_eps)
        return self._add(x, w.gated(y), w.down, w.after_mlp)

    def _add(self, x: Tensor, y: Tensor, matrix: Matrix, after: Tensor | None) -> Tensor:
        """x plus the product of y; the product is normalized first where norm_placement is "after"."""
        if after is None:
            return matrix.plus(y, x)
        return x + F.rms_norm(matrix(y), (self.config.hidden_size,), after, self.config.rms_norm_eps)


def rotation_table(config: DecoderConfig) -> Tensor:
    """Rotations of all positions, complex [positions, D / 2]."""
    angles = torch.arange(config.max_position_embeddings)[:, None].float() * rotary_frequencies(config)
    return torch.polar(torch.ones_like(angles), angles)


def arrange(decoder: Decoder) -> Iterator[Arranged]:
    """Yield the weights of each block in float32, arranged for generation, with what LoRA has learned."""
    for block in decoder.model.layers:
        assert isinstance(block, Block)
        yield _arranged(block, decoder.config)


def _effective(layer: nn.Module) -> Linear:
    """A linear layer, with the difference that LoRA has learned."""
    base = getattr(layer, "base_layer", layer)
    assert isinstance(base, nn.Linear)
    weight = base.weight.detach().float()
    for adapter in getattr(layer, "active_adapters", ()):  # peft's layers have them
        weight = weight + getattr(layer, "get_delta_weight")(adapter).detach()  # noqa: B009
    return weight, None if base.bias is None else base.bias.detach().float().clone()


def _arranged(block: Block, c: DecoderConfig) -> Arranged:
    """The weights of one block, arranged for generation."""
    a, m, before = block.self_attn, block.mlp, c.norm_placement == "before"
    # The two dimensions of a rotated pair become neighbors. Dot products do not change, as queries and keys have the same order.
    order = torch.arange(c.head_dim).view(2, -1).T.flatten().to(block.input_layernorm.weight.device)

    def after_norm(layer: nn.Module, norm: nn.RMSNorm) -> Linear:
        weight, bias = _effective(layer)
        return weight * norm.weight.float() if before else weight, bias

    def paired(x: Tensor) -> Tensor:
        """Reorder each head's dimensions in the rows of queries and keys."""
        qk = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
        return torch.cat([x[:qk].unflatten(0, (-1, c.head_dim))[:, order].flatten(0, 1), x[qk:]])

    parts = [after_norm(layer, block.input_layernorm) for layer in (a.q_proj, a.k_proj, a.v_proj)]
    qkv_weight = paired(torch.cat([weight for weight, _ in parts]))
    biases = [bias for _, bias in parts if bias is not None]
    gain = shift = None
    if c.qk_norm != "none":
        norms = ((a.q_norm, c.num_attention_heads), (a.k_norm, c.num_key_value_heads))
        gain = torch.cat([norm.get_parameter("weight").float().expand(heads, -1) for norm, heads in norms])[:, order]
        if c.qk_norm == "layer":
            shift = torch.cat([norm.get_parameter("bias").float() for norm, _ in norms])[:, order]
    gate, up = (after_norm(layer, block.post_attention_layernorm) for layer in (m.gate_proj, m.up_proj))
    return Arranged(
        qkv=(qkv_weight, paired(torch.cat(biases)) if biases else None),
        gain=gain,
        shift=shift,
        out=_effective(a.o_proj),
        gate=gate,
        up=up,
        down=_effective(m.down_proj),
        after_attention=None if before else block.input_layernorm.weight.detach().clone(),
        after_mlp=None if before else block.post_attention_layernorm.weight.detach().clone(),
    )
