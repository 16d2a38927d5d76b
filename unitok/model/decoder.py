"""The decoder: predicts the next id, whatever modality it belongs to.

Pre-norm RMSNorm, SwiGLU, RoPE (rotate-half), grouped-query attention, RMS QK-norm over each head's dimensions before
RoPE, no biases, an untied head, zero-initialised output projections. Names and layout are Qwen3's, unfused, so that
export is renaming (Yang et al. 2025, "Qwen3"; transformers:models/qwen3/modeling_qwen3.py).

Letters: B rows, T positions, V ids, C = hidden_size, H query heads, G key-value heads, D = head_dim.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.errors import UserError
from unitok.model.attention import Packing, attention, choose_backend
from unitok.pretrained import load_part, load_state, part_folder, save_part


@dataclass
class DecoderConfig:
    """Architecture of a decoder.

    Args:
        vocab_size: number of ids, V. Set from the data's vocabulary in training.
        hidden_size: width. num_hidden_layers: blocks. intermediate_size: width of the SwiGLU.
        num_attention_heads: query heads. num_key_value_heads: key-value heads, dividing the query heads.
        head_dim: dimensions of a head, even.
        rope_theta: base of the rotary positions. rms_norm_eps: of all norms.
        max_position_embeddings: longest document it is trained on, in ids.
        dropout: on the outputs of attention and SwiGLU.
        attention: back end, `auto`, `sdpa` or `xformers`.
        places: size of a table of learned embeddings of how far into its image or sound an id stands, added to its own
            embedding; 0 is none, which is Qwen3's layout. It tells small models trained for minutes where in a grid
            they are (docs/notes.md); such a decoder cannot be exported by renaming.
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
    places: int = 0

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs of dimensions")


class Cache:
    """Keys and values of past positions, [layers, B, G, T, D] each, written by position.

    Rows may stand at different positions: what lies beyond a row's own position is never looked at, so rows are
    rewound by simply writing again from an earlier one.
    """

    def __init__(self, config: DecoderConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, extent: int) -> tuple[Tensor, Tensor]:
        """Write k, v [B, G, T, D] at positions [B, T]; -> all keys and values of positions below `extent`."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.keys[layer][rows, :, positions] = k.transpose(1, 2)
        self.values[layer][rows, :, positions] = v.transpose(1, 2)
        b = k.shape[0]
        return self.keys[layer, :b, :, :extent], self.values[layer, :b, :, :extent]


class RotaryPositions(nn.Module):
    """Cosines and sines by position, in fp32: [B, T] -> two of [B, 1, T, D]."""

    frequencies: Tensor

    def __init__(self, config: DecoderConfig):
        super().__init__()
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("frequencies", config.rope_theta**-half, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, :, None].float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last dimension as pairs (rotate-half; Su et al. 2021, "RoFormer")."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        c = self.config = config
        self.layer = layer
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: "_Context") -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        b, t, _ = x.shape
        q, k, v = (
            part(x).view(b, t, -1, self.config.head_dim).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        if context.cache is None:
            y = attention(q, k, v.to(q.dtype), context.packing)
        else:
            k, v = context.cache.update(self.layer, k, v, context.positions, context.extent)
            grouped = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=context.visible, **grouped)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and SwiGLU, each behind its norm and around a residual."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: "_Context") -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, context))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


@dataclass
class _Context:
    """What all layers of one pass share."""

    packing: Packing
    positions: Tensor  # [B, T]
    places: Tensor | None = None  # [B, T], how far into its span each id stands, 0 outside
    cache: Cache | None = None
    extent: int = 0  # positions below this are looked at
    visible: Tensor | None = None  # bool [B, 1, T, extent]


class Trunk(nn.Module):
    """Embedding, blocks, final norm: ids [B, T] -> hidden states [B, T, C]."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.places:
            self.embed_places = nn.Embedding(config.places, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = RotaryPositions(config)

    def forward(self, ids: Tensor, context: _Context) -> Tensor:
        x = self.embed_tokens(ids)
        if hasattr(self, "embed_places"):
            assert context.places is not None, "this decoder has place embeddings: give places (Grammar.places)"
            x = x + self.embed_places(context.places.clamp(max=self.embed_places.num_embeddings - 1))
        rotary = self.rotary(context.positions)
        for layer in self.layers:
            x = layer(x, rotary, context)
        return self.norm(x)


class Decoder(nn.Module):
    """The next-id model: ids [B, T] -> logits [B, T, V], V exactly the vocabulary's size."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise UserError("vocab_size must be set: it is the size of the vocabulary that the ids belong to")
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of std 1 / sqrt(fan in); zeros for what writes to the residual and for the head, so that
        training starts from the uniform distribution (cf. modded-nanogpt; LlamaGen's zero head)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 0.0 if name.endswith(("o_proj", "down_proj", "lm_head")) else module.in_features**-0.5
                nn.init.normal_(module.weight, std=std)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)
        if self.config.places:
            nn.init.normal_(self.model.embed_places.weight, std=0.5)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """ids [B, T] -> final hidden states [B, T, C], before the head.

        positions: [B, T], counted from each document's start (default: from the row's). documents: numbers [B, T] that
        differ between neighbouring documents, which then cannot see one another (default: one a row). places: [B, T],
        how far into its span each id stands (`Grammar.places`); only for decoders with place embeddings.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        kind = ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.lm_head.weight.dtype
        backend = choose_backend(self.config.attention, ids.device, dtype, self.config.head_dim)
        return self.model(ids, _Context(Packing.build(documents, backend), positions, places))

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """ids [B, T] -> logits [B, T, V]; arguments as for `hidden`."""
        return self.lm_head(self.hidden(ids, positions, documents, places))

    def new_cache(self, rows: int, length: int) -> Cache:
        """An empty cache for `rows` rows of at most `length` positions."""
        return Cache(self.config, rows, length, self.device, self.lm_head.weight.dtype)

    def step(self, ids: Tensor, positions: Tensor, cache: Cache, extent: int, places: Tensor | None = None) -> Tensor:
        """ids [B, T] at positions [B, T] -> hidden states [B, T, C], reading and writing the cache's first B rows.

        extent: more than every position; how much of the cache to look at.
        """
        visible = torch.arange(extent, device=ids.device) <= positions[:, None, :, None]
        return self.model(ids, _Context(Packing(), positions, places, cache, extent, visible))

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_part(folder, "decoder", self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, path: Path, device: str = "cpu") -> "Decoder":
        """Read its own folder or a bundle's; in eval mode."""
        folder = part_folder(path, "model")
        config, state = load_part(folder, "decoder", DecoderConfig)
        model = cls(config)
        load_state(model, state, str(folder))
        return model.eval().to(device)
