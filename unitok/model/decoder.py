"""The decoder: predicts the next token, whatever modality it belongs to.

By default it has Qwen3's architecture, names and layout, so an export only renames: pre-norm RMSNorm, SwiGLU, RoPE (rotate-half),
grouped-query attention, RMS QK-norm over each head's dimensions before RoPE, no biases, an untied head. Output projections start at
zero (Yang et al. 2025, "Qwen3"; transformers:models/qwen3/modeling_qwen3.py). Fields of `DecoderConfig` turn it into Chameleon
(Chameleon Team 2024; transformers:models/chameleon/modeling_chameleon.py) or Llama. It knows nothing of modalities. Named sizes are
in `presets.py`, generation with a cache is in `inference.py`.

Letters: B rows, T positions, V tokens in the vocabulary, C = hidden_size, H query heads, G key-value heads, D = head_dim.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unitok.errors import UserError, check_range
from unitok.hardware import check_device
from unitok.model.attention import Packing, WholeRows, build_packing, choose_backend
from unitok.model.layers import RMSNorm, rotate
from unitok.pretrained import load_part, load_state, make_config, part_folder, save_part, unallocated
from unitok.span_positions import AXES, POSITION


@dataclass
class DecoderConfig:
    """Architecture of a decoder.

    Args:
        vocab_size: number of tokens, V. Training sets it from the data's vocabulary.
        hidden_size: width. num_hidden_layers: blocks. intermediate_size: width of the SwiGLU.
        num_attention_heads: query heads. num_key_value_heads: key-value heads, dividing the query heads.
        head_dim: dimensions of a head, even.
        rope_theta: base of the rotary positions. rms_norm_eps: of all RMSNorms.
        max_position_embeddings: length of the longest document it takes, in tokens.
        dropout: rate, on the outputs of attention and SwiGLU.
        attention: back end: `auto`, `sdpa`, `xformers` or `varlen`.
        span_positions: size of a table of learned embeddings of a token's position in its image or audio, added to the token's
            embedding; 0 for none, which is Qwen3's layout. It helps small models that train for minutes (docs/notes.md); a decoder
            that has it cannot be exported.
        span_rotation: whether every second pair of a head's dimensions is rotated by the token's position in its image or audio instead of
            that in the document, so that the same place in another image is always at the same distance. Not exportable either.
        grid_rotation: with `span_rotation`, whether a third of these pairs each is rotated by frame, row and column instead. It does not pay
            where all grids have one size (docs/notes.md).
        qk_norm: of queries and keys before RoPE: `rms` over a head's dimensions with one gain for all heads (Qwen3),
            `layer` with a gain and a bias for each head (Chameleon), or `none` (Llama).
        norm_placement: `before` attention and SwiGLU (pre-norm), or `after` them, inside the residual (Chameleon 34B; Liu
            et al. 2021, "Swin Transformer V2").
        attention_bias, mlp_bias: whether those projections have biases (some Llamas).
        rope_scaling: how the context was extended, with the keys of transformers' config.json: `rope_type` `linear` or `llama3` and
            their numbers; null for none.
        checkpoint_activations: in training keep only each block's input and recompute the rest in the backward pass.
    """

    vocab_size: int = 0
    hidden_size: int = 192
    num_hidden_layers: int = 4
    intermediate_size: int = 512
    num_attention_heads: int = 3
    num_key_value_heads: int = 3
    head_dim: int = 64
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1024
    dropout: float = 0.0
    attention: str = "auto"
    span_positions: int = 0
    span_rotation: bool = False
    grid_rotation: bool = False
    qk_norm: Literal["rms", "layer", "none"] = "rms"
    norm_placement: Literal["before", "after"] = "before"
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: dict[str, str | float] | None = None
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            check_range(name, getattr(self, name), 1)
        check_range("dropout", self.dropout, 0, 1)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even: rotary positions rotate pairs of dimensions")
        if self.grid_rotation and (not self.span_rotation or self.head_dim < 12):
            raise UserError(
                "grid_rotation needs span_rotation: true and a head_dim of at least 12: it divides pairs of dimensions"
            )
        if self.span_rotation and self.head_dim % 4:
            raise UserError(
                f"head_dim {self.head_dim} must be a multiple of 4 with span_rotation: every second pair has its own positions"
            )
        for name, choices in (("qk_norm", ("rms", "layer", "none")), ("norm_placement", ("before", "after"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(choices)}")


NO_SPAN_POSITIONS = "this decoder needs span positions: give span_positions (Grammar.span_positions)"


def position_in(span_positions: Tensor) -> Tensor:
    """The positions in images and audio alone, of what `Grammar.span_positions` gives."""
    return span_positions & POSITION


def axes_of(span_positions: Tensor) -> Tensor:
    """Frame, row and column of what `Grammar.span_positions` gives: [...] -> [..., 3]."""
    return torch.stack([span_positions >> at & most for at, most in AXES], -1)


class RotaryPositions(nn.Module):
    """Positions [B, T] -> cosines and sines, each [B, T, 1, D / 2].

    Frequencies stay in fp32, because rounding to half precision is an error of radians at thousands of positions. So they are not a
    buffer, which `.bfloat16()` would convert.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.frequencies = rotary_frequencies(config)
        self.by_span, self.by_grid = config.span_rotation, config.grid_rotation

    def forward(self, positions: Tensor, span_positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """span_positions: [B, T] as `Decoder.hidden` has them, where pairs rotate by them."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        if self.by_span:
            assert span_positions is not None, NO_SPAN_POSITIONS
            by_document, by_span = self.frequencies.view(-1, 2).unbind(-1)
            within = position_in(span_positions)[..., None]
            if self.by_grid:
                within = axes_of(span_positions)[..., torch.arange(len(by_span), device=positions.device) % 3]
            both = torch.stack([positions[..., None] * by_document, within * by_span], -1)  # [B, T, D / 4, 2]
            angles = both.flatten(-2).unsqueeze(2)
        else:
            angles = positions[:, :, None, None].float() * self.frequencies
        return angles.cos(), angles.sin()


def rotary_frequencies(config: DecoderConfig) -> Tensor:
    """Radians per position for each pair of dimensions, fp32 [D / 2]. Errors: `UserError` for an unknown scaling."""
    frequencies = config.rope_theta ** -(
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    )
    scaling = config.rope_scaling or {}
    kind = str(scaling.get("rope_type", "default"))
    if kind == "default":
        return frequencies
    needed = {
        "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    }
    if kind not in needed:
        raise UserError(f"rope_scaling {kind!r}: choose one of default, linear, llama3")
    if missing := [name for name in needed[kind] if name not in scaling]:
        raise UserError(f"rope_scaling {kind!r} needs {missing[0]}")
    factor, *rest = (float(scaling[name]) for name in needed[kind])
    if kind == "linear":  # Chen et al. 2023, "Extending context window of large language models via position interpolation"
        return frequencies / factor
    # Llama 3.1: slow pairs are interpolated, fast ones are not, those between are blended (transformers:modeling_rope_utils.py)
    low, high, original_length = rest
    turns = original_length * frequencies / (2 * math.pi)
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return unscaled * frequencies + (1 - unscaled) * frequencies / factor


class HeadLayerNorm(nn.Module):
    """LayerNorm over a head's dimensions with a gain and a bias for each head: [..., H, D] (Chameleon)."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * self.weight + self.bias


def _head_norm(config: DecoderConfig, heads: int) -> nn.Module:
    if config.qk_norm == "layer":
        return HeadLayerNorm(heads, config.head_dim)
    return RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm == "rms" else nn.Identity()


class Attention(nn.Module):
    """Grouped-query attention with QK-norm."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        c, bias = config, config.attention_bias
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=bias)
        self.q_norm = _head_norm(c, c.num_attention_heads)
        self.k_norm = _head_norm(c, c.num_key_value_heads)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: "_Context") -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        # Under autocast norms and rotations run in fp32, as x is, attention in half precision.
        q, k = (rotate(norm(part.to(x.dtype)), *rotary).to(v.dtype) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        return self.o_proj(context.packing.attend(q, k, v).flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, "GLU variants improve transformer")."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and SwiGLU, each with a norm and a residual connection."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_after = config.norm_placement == "after"

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: "_Context") -> Tensor:
        if self.norm_after:
            x = x + self.dropout(self.input_layernorm(self.self_attn(x, rotary, context)))
            return x + self.dropout(self.post_attention_layernorm(self.mlp(x)))
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, context))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


@dataclass
class _Context:
    """Inputs of one forward pass that all layers share."""

    packing: Packing
    positions: Tensor  # [B, T]
    span_positions: Tensor | None = None  # [B, T], position of each token in its span, 0 outside


class Trunk(nn.Module):
    """Embedding, blocks, final norm: tokens [B, T] -> hidden states [B, T, C]."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.span_positions:
            self.embed_span_positions = nn.Embedding(config.span_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = RotaryPositions(config)
        self.checkpoint_activations = config.checkpoint_activations

    def forward(self, ids: Tensor, context: _Context) -> Tensor:
        """Tokens [B, T] -> hidden states [B, T, C]."""
        x = self.embed_tokens(ids)
        if hasattr(self, "embed_span_positions"):
            assert context.span_positions is not None, NO_SPAN_POSITIONS
            within = position_in(context.span_positions).clamp(max=self.embed_span_positions.num_embeddings - 1)
            x = x + self.embed_span_positions(within)
        rotary = self.rotary(context.positions, context.span_positions)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, context, use_reentrant=False)
            else:
                x = layer(x, rotary, context)
        return self.norm(x)


class Decoder(nn.Module):
    """The next-token model: tokens [B, T] -> logits [B, T, V], where V is exactly the vocabulary's size."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise UserError("vocab_size must be set: it is the number of tokens in the vocabulary")
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        """Normal weights with std 1 / sqrt(fan in); zeros for projections into the residual and for the head, so training starts
        from the uniform distribution (cf. modded-nanogpt; LlamaGen's zero head)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 0.0 if name.endswith(("o_proj", "down_proj", "lm_head")) else module.in_features**-0.5
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)
        if self.config.span_positions:
            nn.init.normal_(self.model.embed_span_positions.weight, std=0.5)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        span_positions: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, T] -> final hidden states [B, T, C], the input of the head.

        positions: [B, T], counted from each document's start; default: from each row's start. documents: numbers [B, T]; tokens attend
        only within runs of equal numbers; default: each row is one document. span_positions: [B, T], position of each token in its span
        (`Grammar.span_positions`); only for decoders that embed them.
        """
        self._check(ids, positions)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if documents is None:
            return self.model(ids, _Context(WholeRows(), positions, span_positions))
        kind = ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.lm_head.weight.dtype
        backend = choose_backend(self.config.attention, ids.device, dtype, self.config.head_dim)
        return self.model(ids, _Context(build_packing(documents, backend), positions, span_positions))

    def _check(self, ids: Tensor, positions: Tensor | None) -> None:
        """Raise `UserError` for unknown tokens and too long documents. On a GPU values are not checked, which would wait for it."""
        most, v = self.config.max_position_embeddings, self.config.vocab_size
        longest = ids.shape[1] if positions is None else 0
        if ids.device.type == "cpu" and ids.numel():
            low, high = (int(x) for x in torch.aminmax(ids))
            if low < 0 or high >= v:
                raise UserError(f"token {low if low < 0 else high}: the decoder's vocabulary has tokens 0 to {v - 1}")
            longest = longest if positions is None else int(positions.max()) + 1
        if longest > most:
            raise UserError(f"a document of {longest} tokens: the decoder takes at most {most} (max_position_embeddings)")

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        span_positions: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, T] -> logits [B, T, V]; arguments as for `hidden`."""
        return self.lm_head(self.hidden(ids, positions, documents, span_positions))

    def save_pretrained(self, folder: Path, overwrite: bool = False) -> None:
        """Write `config.json` and `model.safetensors` into `folder`."""
        save_part(folder, "decoder", self.config, self.state_dict(), overwrite)

    def describe(self) -> dict[str, object]:
        """Number of parameters and fields of the configuration, by name."""
        return {"parameters": sum(p.numel() for p in self.parameters())} | asdict(self.config)

    def prepare_for_inference(self) -> "Decoder":
        """The decoder itself, in eval mode."""
        return self.eval()

    @classmethod
    def from_config(cls, config: dict[str, object], where: str) -> "Decoder":
        """An untrained decoder. config: fields of `DecoderConfig`. Errors: `UserError` that begins with `where`."""
        return cls(make_config(DecoderConfig, config, where))

    @classmethod
    def from_pretrained(cls, path: Path, device: str = "cpu") -> "Decoder":
        """Read a decoder's folder or a bundle; in eval mode."""
        check_device(device)
        folder = part_folder(path, "model")
        config, state = load_part(folder, "decoder", DecoderConfig)
        return cls.from_state(config, state, str(folder)).to(device)

    @torch.no_grad()
    def grown(self, vocab_size: int, seed: int = 0) -> "Decoder":
        """Return a copy with more tokens, in eval mode. Rows of the new ones in embedding and head are drawn from the normal distribution
        with the old rows' mean and standard deviation in each dimension (Hewitt 2021, "Initializing new word embeddings")."""
        state, generator = dict(self.state_dict()), torch.Generator().manual_seed(seed)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            old = state[name]
            new = torch.randn(vocab_size - len(old), old.shape[1], generator=generator).to(old)
            state[name] = torch.cat([old, old.mean(0) + old.std(0) * new])
        return Decoder.from_state(replace(self.config, vocab_size=vocab_size), state, "a decoder with more tokens")

    @classmethod
    def from_state(cls, config: DecoderConfig, state: dict[str, Tensor], where: str) -> "Decoder":
        """A decoder whose parameters are the tensors of `state`, in fp32 and not copied if they are fp32; in eval mode.

        Errors: `UserError` that begins with `where`.
        """
        with unallocated():
            model = cls(config)
        load_state(model, {name: tensor.float() for name, tensor in state.items()}, where, assign=True)
        return model.eval()
