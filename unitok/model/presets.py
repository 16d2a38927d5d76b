"""Decoders by name: sizes of our own, and those of published systems.

Each has a complete YAML in `configs/decoder/`, and `unitok inspect NAME` says what it costs. Ours are Qwen3's layout with
a SwiGLU of 8/3 to 3 times the width; from 100m on heads have 128 dimensions, which GPUs like, and 1b has grouped queries.
"""

from dataclasses import dataclass, field
from typing import Any

from unitok.errors import UserError
from unitok.model.decoder import DecoderConfig


@dataclass(frozen=True)
class Preset:
    """An architecture, and how many tokens its system makes of content, in words, by what content they are of."""

    config: DecoderConfig
    source: str = "unitok"  # of its numbers
    content: dict[str, str] = field(
        default_factory=lambda: {
            "an image": "1,028 ids (512 x 512 pixels, 16 a code)",
            "a second": "400 ids (speech-16khz, 50 frames of 8 levels)",
        }
    )


def _shape(
    ids: int, width: int, layers: int, mlp: int, heads: int, groups: int, head_dim: int, longest: int, **more: Any
) -> DecoderConfig:
    return DecoderConfig(ids, width, layers, mlp, heads, groups, head_dim=head_dim, max_position_embeddings=longest, **more)


_LLAMA_2 = (4096, 32, 11_008, 32, 32, 128, 4096)
_CHAMELEON: dict[str, Any] = {
    "source": "Chameleon Team 2024, table 1; 65,536 ids, of which 4 to 8195 are image codes, 8197 and 8196 begin and end an image",
    "content": {"an image": "1,026 ids (512 x 512 pixels, 16 a code)"},
}

PRESETS = {
    "tiny": Preset(_shape(0, 192, 4, 512, 3, 3, 64, 1024)),
    "10m": Preset(_shape(0, 384, 6, 1024, 6, 6, 64, 2048)),
    "25m": Preset(_shape(0, 512, 8, 1408, 8, 8, 64, 2048)),
    "100m": Preset(_shape(0, 768, 14, 2048, 6, 6, 128, 4096)),
    "350m": Preset(_shape(0, 1024, 26, 3072, 8, 8, 128, 4096)),
    "1b": Preset(_shape(0, 2048, 22, 5632, 16, 4, 128, 4096)),
    "chameleon-7b": Preset(_shape(65_536, *_LLAMA_2, rms_norm_eps=1e-5, qk_norm="layer", dropout=0.1), **_CHAMELEON),
    "chameleon-34b": Preset(
        _shape(65_536, 8192, 48, 22_016, 64, 8, 128, 4096, rms_norm_eps=1e-5, qk_norm="layer", norm_placement="after"),
        **_CHAMELEON,
    ),
    "anygpt-7b": Preset(
        _shape(49_418, *_LLAMA_2, rms_norm_eps=1e-5, qk_norm="none"),
        "Zhan et al. 2024, AnyGPT: LLaMA-2 with 32,000 text, 8,192 image, 1,024 speech and 8,192 music ids and ten markers",
        {"an image": "34 ids (224 x 224 pixels, SEED-2)", "a second": "200 ids (music, EnCodec 32 kHz; speech takes 50)"},
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name; errors: `UserError` with those that there are."""
    if name not in PRESETS:
        raise UserError(f"no decoder preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
