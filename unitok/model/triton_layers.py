"""The layers of a decoding step on a GPU, one token per slot, in five to eight kernels a layer (written in Triton).

A step of few slots is bound by reading the weights and by the kernels that wait for one another. `_attend` does what lies between two
products: norms of queries and keys, rotation, writing the cache and attention, which reads each slot's own positions and no others;
`_gate` is SwiGLU's. Up to `FEW` slots `_project` multiplies, with the norm before and the gate or the residual after it; beyond, cuBLAS
does. On Hopper a kernel begins while the one before still runs, and waits for it only when its weights, or keys and values, are there
(programmatic dependent launch): a step of 100M parameters takes 0.20 ms, without that 0.29, and 0.73 in PyTorch's own kernels (H200).
Sums are in fp32 throughout; so is the residual of few slots.

Letters as in `cache.py`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unitok.model.arranged import ArrangedBlock, Matrix
from unitok.model.cache import Cache
from unitok.model.decoder import DecoderConfig

FEW = 4  # slots up to which our kernels multiply, each slot for itself
WEIGHTS = 8192  # that a program of such a product holds at once
WARPS = 8
PROGRAMS = 128  # attention is split along the positions until about so many programs run
SPLIT = 64  # positions of a part, at least
NORMS = {"none": 0, "rms": 1, "layer": 2}


@triton.jit
def _project(
    x, w, added, out, eps, IN: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    OVERLAP: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """x [slots, IN], w [OUT (2 OUT if gated), IN] -> out [slots, OUT]: normalized, multiplied, gated, added to `added`."""
    rows, k = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    x += tl.program_id(1) * IN
    inside, at = rows < OUT, rows[:, None] * IN + k[None, :]
    ws = tl.load(w + at, mask=inside[:, None] & (k < IN)[None, :], other=0.0).to(tl.float32)
    us = ws
    if GATED:
        us = tl.load(w + OUT * IN + at, mask=inside[:, None] & (k < IN)[None, :], other=0.0).to(tl.float32)
    if OVERLAP:  # what stands before does not depend on the kernel before
        gdc_launch_dependents()
        gdc_wait()
    xs = tl.load(x + k, mask=k < IN, other=0.0).to(tl.float32)
    sums, ups, squares = ws * xs[None, :], us * xs[None, :], xs * xs
    for start in range(K, IN, K):
        mask = inside[:, None] & (start + k < IN)[None, :]
        xs = tl.load(x + start + k, mask=start + k < IN, other=0.0).to(tl.float32)
        sums += tl.load(w + at + start, mask=mask, other=0.0).to(tl.float32) * xs[None, :]
        squares += xs * xs
        if GATED:
            ups += tl.load(w + OUT * IN + at + start, mask=mask, other=0.0).to(tl.float32) * xs[None, :]
    y = tl.sum(sums, 1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares) / IN + eps)
        y *= scale
    if GATED:
        y = y * tl.sigmoid(y) * (tl.sum(ups, 1) * scale)
    place = tl.program_id(1) * OUT + rows
    if ADD:
        y += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate(both, out, WIDTH: tl.constexpr, N: tl.constexpr):
    """both [slots, 2 WIDTH] -> silu(first half) * second half, [slots, WIDTH]."""
    i = tl.program_id(1) * N + tl.arange(0, N)
    at = both + tl.program_id(0) * 2 * WIDTH + i
    gate = tl.load(at, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=i < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0) * WIDTH + i, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=i < WIDTH)


@triton.jit
def _prepared(x, gain, shift, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr):
    """One head's query or key [1, D], normalized and rotated: pairs of dimensions are neighbors."""
    d = tl.arange(0, D)[None, :]
    y = tl.load(x + d).to(tl.float32)
    if NORM == 1:
        y = y * tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None] * tl.load(gain + d).to(tl.float32)
    if NORM == 2:
        y = y - (tl.sum(y, 1) / D)[:, None]
        y = y * tl.rsqrt(tl.sum(y * y, 1) / D + 1e-5)[:, None] * tl.load(gain + d).to(tl.float32)
        y += tl.load(shift + d).to(tl.float32)
    a, b = tl.split(tl.reshape(y, [1, D // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [1, D])


@triton.jit
def _attend(
    qkv, keys, values, positions, rotation, gain, shift, out, parts, slot_stride, group_stride, last, eps, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr, L: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of one slot, over one of the parts of its positions: writes key and value, and `out` [slots, H, D], or with more
    than one part `parts` [slots, H, PARTS, D + 2]: the weighted sum, the largest score and the sum of weights.

    Each of the L rows of a tile has a softmax of its own; they are joined at the end, so that rows never wait for one another.
    """
    slot, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = head // (H // G)
    position, d, i, rows = tl.load(positions + slot), tl.arange(0, D)[None, :], tl.arange(0, D // 2)[None, :], tl.arange(0, L)
    angle = rotation + tl.minimum(position, last) * D + 2 * i
    cos, sin = tl.load(angle), tl.load(angle + 1)
    cache = slot * slot_stride + group * group_stride
    length = (position + PARTS * L - 1) // (PARTS * L) * L
    start, stop = part * length, tl.minimum(part * length + length, position)
    at = start + rows
    ks = tl.load(keys + cache + at[:, None] * D + d, mask=(at < stop)[:, None], other=0.0).to(tl.float32)
    vs = tl.load(values + cache + at[:, None] * D + d, mask=(at < stop)[:, None], other=0.0).to(tl.float32)
    if OVERLAP:  # the kernel before does not write what was loaded
        gdc_launch_dependents()
        gdc_wait()
    row = qkv + slot * (H + 2 * G) * D
    q = _prepared(row + head * D, gain + head * D, shift + head * D, cos, sin, eps, D, NORM) * scale
    k = _prepared(row + (H + group) * D, gain + (H + group) * D, shift + (H + group) * D, cos, sin, eps, D, NORM)
    k, v = k.to(keys.dtype.element_ty), tl.load(row + (H + G + group) * D + d).to(values.dtype.element_ty)
    if (part == 0) & (head % (H // G) == 0):
        tl.store(keys + cache + position * D + d, k)
        tl.store(values + cache + position * D + d, v)
    score = tl.where(at < stop, tl.sum(ks * q, 1), -1e30)
    most, total = score, tl.where(at < stop, 1.0, 0.0)
    mixed = total[:, None] * vs
    for first in range(start + L, stop, L):
        at = first + rows
        ks = tl.load(keys + cache + at[:, None] * D + d, mask=(at < stop)[:, None], other=0.0).to(tl.float32)
        vs = tl.load(values + cache + at[:, None] * D + d, mask=(at < stop)[:, None], other=0.0).to(tl.float32)
        score = tl.where(at < stop, tl.sum(ks * q, 1), -1e30)
        larger = tl.maximum(most, score)
        weight, shrink = tl.where(at < stop, tl.exp2(score - larger), 0.0), tl.exp2(most - larger)
        mixed, total, most = mixed * shrink[:, None] + weight[:, None] * vs, total * shrink + weight, larger
    own = tl.sum(tl.sum(q * k.to(tl.float32), 1), 0)  # the token itself belongs to the first part
    own, here = tl.where(part == 0, own, -1e30), tl.where(part == 0, 1.0, 0.0)
    largest = tl.maximum(own, tl.max(most))
    weight, here = tl.exp2(most - largest), here * tl.exp2(own - largest)
    result = tl.sum(mixed * weight[:, None], 0)[None, :] + here * v.to(tl.float32)
    sums = tl.sum(total * weight) + here
    if PARTS == 1:
        tl.store(out + (slot * H + head) * D + d, (result / sums).to(out.dtype.element_ty))
    else:
        place = parts + ((slot * H + head) * PARTS + part) * (D + 2)
        tl.store(place + d, result)
        tl.store(place + D, largest)
        tl.store(place + D + 1, sums)


@triton.jit
def _join(parts, out, D: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr, OVERLAP: tl.constexpr):
    """parts [slots x H, PARTS, D + 2] -> out [slots x H, D]. P: a power of 2, at least PARTS."""
    head, p, d = tl.program_id(0), tl.arange(0, P), tl.arange(0, D)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    place = parts + (head * PARTS + p) * (D + 2)
    most = tl.load(place + D, mask=p < PARTS, other=-1e30)
    weight = tl.exp2(most - tl.max(most))
    total = tl.sum(weight * tl.load(place + D + 1, mask=p < PARTS, other=0.0))
    mixed = tl.load(place[:, None] + d[None, :], mask=(p < PARTS)[:, None], other=0.0)
    tl.store(out + head * D + d, (tl.sum(weight[:, None] * mixed, 0) / total).to(out.dtype.element_ty))


class Layers:
    """The layers of a decoder, for steps of one token per slot. rotation: of all positions, complex [positions, D / 2]."""

    def __init__(self, config: DecoderConfig, blocks: list[ArrangedBlock], rotation: Tensor, dtype: torch.dtype):
        self.config, self.blocks, self.dtype = config, blocks, dtype
        self.rotation = torch.view_as_real(rotation).contiguous()  # [positions, D / 2, 2]
        hopper = rotation.is_cuda and torch.cuda.get_device_capability(rotation.device) >= (9, 0)
        self.overlap = {"OVERLAP": hopper, **({"launch_pdl": True} if hopper else {})}

    @staticmethod
    def suit(c: DecoderConfig, dtype: torch.dtype) -> bool:
        """Whether these kernels compute what such a decoder does: no biases, norms before, rotations by one position, heads of 16, 32,
        64, ... dimensions."""
        plain = c.norm_placement == "before" and not (c.attention_bias or c.mlp_bias or c.span_rotation)
        return plain and c.head_dim >= 16 and c.head_dim & (c.head_dim - 1) == 0 and dtype in (torch.float32, torch.bfloat16)

    def __call__(self, x: Tensor, positions: Tensor, cache: Cache, extent: int) -> Tensor:
        """Embedded tokens [B, C] at positions [B] -> [B, C] after the last layer. extent: above every position."""
        few, positions = len(x) <= FEW, positions.contiguous()
        x = x.float() if few else x
        for number, block in enumerate(self.blocks):
            keys, values = cache.keys[number], cache.values[number]
            if few:
                qkv = self._project(x, block.qkv, norm=True)
                y = self._attend(qkv, keys, values, positions, extent, block.gain, block.shift)
                x = self._project(y, block.out, added=x)
                x = self._project(self._project(x, block.gated.both, norm=True, gated=True), block.down, added=x)
            else:
                shape, eps = x.shape[-1:], self.config.rms_norm_eps
                qkv = block.qkv(F.rms_norm(x, shape, None, eps))
                x = block.out.plus(self._attend(qkv, keys, values, positions, extent, block.gain, block.shift), x)
                x = block.down.plus(self._gate(block.gated.both(F.rms_norm(x, shape, None, eps))), x)
        return x.to(self.dtype)

    def _project(
        self, x: Tensor, matrix: Matrix, norm: bool = False, gated: bool = False, added: Tensor | None = None
    ) -> Tensor:
        """x [B, in] -> [B, out], in fp32 where it is a residual, else in the decoder's type."""
        w = matrix.weight.T
        assert w.is_contiguous()
        wide, width = w.shape[0] // (2 if gated else 1), w.shape[1]
        out = torch.empty(len(x), wide, device=x.device, dtype=torch.float32 if added is not None else self.dtype)
        k = min(triton.next_power_of_2(width), WEIGHTS)
        n = WEIGHTS // k
        _project[(triton.cdiv(wide, n), len(x))](
            x, w, out if added is None else added, out, self.config.rms_norm_eps, IN=width, OUT=wide, NORM=norm, GATED=gated,
            ADD=added is not None, N=n, K=k, num_warps=WARPS, **self.overlap,
        )  # fmt: skip
        return out

    def _attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        extent: int,
        gain: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        """qkv [B, (H + 2 G) D] -> [B, H D]."""
        c, slots = self.config, len(qkv)
        h, g, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        parts = max(1, min(PROGRAMS // (slots * h), extent // SPLIT))
        out = torch.empty(slots, h * d, device=qkv.device, dtype=self.dtype)
        joined = torch.empty(slots * h, parts, d + 2, device=qkv.device) if parts > 1 else out
        norms = (qkv if gain is None else gain, qkv if shift is None else shift)
        scale = d**-0.5 * 1.4426950408889634  # of a power of 2
        _attend[(slots, h, parts)](
            qkv, keys, values, positions, self.rotation, *norms, out, joined, keys.stride(0), keys.stride(1),
            len(self.rotation) - 1, c.rms_norm_eps, scale, H=h, G=g, D=d, NORM=NORMS[c.qk_norm], PARTS=parts, L=SPLIT, **self.overlap,
        )  # fmt: skip
        if parts > 1:
            _join[(slots * h,)](joined, out, D=d, PARTS=parts, P=triton.next_power_of_2(parts), **self.overlap)
        return out

    def _gate(self, both: Tensor) -> Tensor:
        """[B, 2 width] -> [B, width]."""
        width = both.shape[1] // 2
        out = torch.empty(len(both), width, device=both.device, dtype=both.dtype)
        _gate[(len(both), triton.cdiv(width, 1024))](both, out, WIDTH=width, N=1024)
        return out
