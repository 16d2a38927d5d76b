"""Decoders by name: sizes of our own, and those of published systems.

Each has a complete YAML in `configs/decoder/`, and `unitok inspect NAME` says what it costs. Ours are Qwen3's layout with
a SwiGLU of 8/3 to 3 times the width; from 100m on heads have 128 dimensions, which GPUs like, and 1b has grouped queries.
"""

from dataclasses import dataclass
from typing import Literal

from unitok.errors import UserError
from unitok.model.decoder import DecoderConfig

Placement = Literal["before", "after"]


@dataclass(frozen=True)
class Preset:
    """An architecture, and the ids that its system's tokenizers make.

    Args:
        config: the decoder. source: where its numbers come from.
        ids_an_image: ids of one image, markers included, and `image`: which image that is; 0: it knows none.
        ids_a_second: ids of a second of sound, and `sound`: which tokenizer that is; 0: it knows none.
    """

    config: DecoderConfig
    source: str = "unitok"
    ids_an_image: int = 32 * 32 + 4
    image: str = "512 x 512 pixels, 16 a code"
    ids_a_second: float = 50 * 8
    sound: str = "speech-16khz, 50 frames of 8 levels"


def _ours(hidden: int, layers: int, mlp: int, heads: int, groups: int, head_dim: int, longest: int) -> Preset:
    return Preset(
        DecoderConfig(0, hidden, layers, mlp, heads, groups, head_dim=head_dim, max_position_embeddings=longest, dropout=0.0)
    )


def _chameleon(hidden: int, layers: int, mlp: int, heads: int, groups: int, dropout: float, placement: Placement) -> Preset:
    config = DecoderConfig(
        vocab_size=65_536,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        dropout=dropout,
        qk_norm="layer",
        norm_placement=placement,
    )
    return Preset(
        config,
        "Chameleon Team 2024, table 1; 65,536 ids, of which 4 to 8195 are image codes, 8197 and 8196 begin and end an image",
        ids_an_image=32 * 32 + 2,
        ids_a_second=0,
    )


PRESETS = {
    "tiny": _ours(192, 4, 512, 3, 3, 64, 1024),
    "10m": _ours(384, 6, 1024, 6, 6, 64, 2048),
    "25m": _ours(512, 8, 1408, 8, 8, 64, 2048),
    "100m": _ours(768, 14, 2048, 6, 6, 128, 4096),
    "350m": _ours(1024, 26, 3072, 8, 8, 128, 4096),
    "1b": _ours(2048, 22, 5632, 16, 4, 128, 4096),
    "chameleon-7b": _chameleon(4096, 32, 11_008, 32, 32, 0.1, "before"),
    "chameleon-34b": _chameleon(8192, 48, 22_016, 64, 8, 0.0, "after"),
    "anygpt-7b": Preset(
        DecoderConfig(
            vocab_size=49_418,
            hidden_size=4096,
            num_hidden_layers=32,
            intermediate_size=11_008,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            qk_norm="none",
        ),
        "Zhan et al. 2024, AnyGPT: LLaMA-2 with 32,000 text, 8,192 image, 1,024 speech and 8,192 music ids and ten markers",
        ids_an_image=34,
        image="224 x 224 pixels, SEED-2",
        ids_a_second=200,
        sound="music, EnCodec 32 kHz; speech takes 50",
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name; errors: `UserError` with those that there are."""
    if name not in PRESETS:
        raise UserError(f"no decoder preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
