"""Decoder sizes by name: our own, and those of published systems.

Each has a complete YAML in `unitok/configs/decoder/`, and `unitok inspect NAME` prints what it costs. Ours have Qwen3's layout and a SwiGLU
of 8/3 to 3 times the width; from 100m on, heads have 128 dimensions, which suits GPUs, and 1b has grouped queries.
"""

from dataclasses import dataclass, field, replace

from unitok.errors import UserError
from unitok.model.decoder import DecoderConfig


@dataclass(frozen=True)
class Preset:
    """An architecture, and how many tokens its system needs for each kind of content, in words."""

    config: DecoderConfig
    source: str = "unitok"  # where the numbers come from
    content: dict[str, str] = field(
        default_factory=lambda: {
            "an image": "1,028 tokens (512 x 512 pixels, 16 x 16 per code)",
            "a second": "400 tokens (speech-16khz, 50 frames of 8 levels)",
        }
    )


def _shape(width: int, layers: int, mlp: int, heads: int, groups: int, head_dim: int, longest: int) -> DecoderConfig:
    return DecoderConfig(0, width, layers, mlp, heads, groups, head_dim=head_dim, max_position_embeddings=longest)


_LLAMA_2_7B = _shape(4096, 32, 11_008, 32, 32, 128, 4096)
_CHAMELEON_7B = replace(_LLAMA_2_7B, vocab_size=65_536, rms_norm_eps=1e-5, qk_norm="layer", dropout=0.1)
_CHAMELEON_34B = replace(
    _shape(8192, 48, 22_016, 64, 8, 128, 4096), vocab_size=65_536, rms_norm_eps=1e-5, qk_norm="layer", norm_placement="after"
)
_CHAMELEON_SOURCE = (
    "Chameleon Team 2024, table 1; 65,536 tokens, of which 4 to 8195 are image codes, 8197 and 8196 begin and end an image"
)
_CHAMELEON_CONTENT = {"an image": "1,026 tokens (512 x 512 pixels, 16 x 16 per code)"}

PRESETS = {
    "tiny": Preset(_shape(192, 4, 512, 3, 3, 64, 1024)),
    "10m": Preset(_shape(384, 6, 1024, 6, 6, 64, 2048)),
    "25m": Preset(_shape(512, 8, 1408, 8, 8, 64, 2048)),
    "100m": Preset(_shape(768, 14, 2048, 6, 6, 128, 4096)),
    "350m": Preset(_shape(1024, 26, 3072, 8, 8, 128, 4096)),
    "1b": Preset(_shape(2048, 22, 5632, 16, 4, 128, 4096)),
    "chameleon-7b": Preset(_CHAMELEON_7B, _CHAMELEON_SOURCE, _CHAMELEON_CONTENT),
    "chameleon-34b": Preset(_CHAMELEON_34B, _CHAMELEON_SOURCE, _CHAMELEON_CONTENT),
    "anygpt-7b": Preset(
        replace(_LLAMA_2_7B, vocab_size=49_418, rms_norm_eps=1e-5, qk_norm="none"),
        "Zhan et al. 2024, AnyGPT: LLaMA-2 with 32,000 text, 8,192 image, 1,024 speech and 8,192 music tokens and ten markers",
        {"an image": "34 tokens (224 x 224 pixels, SEED-2)", "a second": "200 tokens (music, EnCodec 32 kHz; speech takes 50)"},
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name. Errors: `UserError` that lists the names."""
    if name not in PRESETS:
        raise UserError(f"no decoder preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
