"""A decoder's weights arranged for generation: the same function in fewer and larger operations.

Queries, keys and values are one product, gains of norms that stand before a product are multiplied into its weights, residuals are added
by the product, and the dimensions of each head are reordered so that a rotation is one complex multiplication. On a CPU, matrices are
kept in oneDNN's blocked layout, which for 2 to 32 rows takes 0.5 to 0.7 of the time of MKL's product (docs/notes.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.model.decoder import Block, Decoder, DecoderConfig, rotary_frequencies

#: Weight [out, in] and bias of a linear layer.
Linear = tuple[Tensor, Tensor | None]


class Matrix:
    """A linear layer with weight [out, in]: x [N, in] -> [N, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        # [in, out]. On a CPU in this order in memory, too; a GPU reads the rows of [out, in].
        self.weight, self.bias = weight.T if weight.is_cuda else weight.T.contiguous(), bias

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


class ArrangedBlock:
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
