"""Low-rank adaptation through peft (Hu et al. 2021, "LoRA"): a fixed matrix W learns a difference B A of low rank.

Checkpoints hold W, A and B under peft's names; `checkpoints.merge_lora` makes a plain decoder's weights of them.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from unitok.errors import UserError
from unitok.model.decoder import Decoder


@dataclass
class LowRank:
    """LoRA's settings.

    Args:
        rank: of the difference. alpha: the difference is multiplied by alpha / rank.
        targets: names of the blocks' matrices that learn one.
        dropout: on their inputs.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dropout: float = 0.0


def add_lora(decoder: Decoder, lora: LowRank) -> None:
    """Put the differences in, and freeze everything else; errors: `UserError` where peft is missing or nothing matches."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("lora needs the package peft: pip install 'unitok-lm[lora]'") from None
    if lora.rank < 1:
        raise UserError(f"lora.rank {lora.rank}: it must be at least 1")
    names = {name.rpartition(".")[2] for name, module in decoder.model.layers.named_modules() if isinstance(module, nn.Linear)}
    if missing := [target for target in lora.targets if target not in names]:
        raise UserError(f"lora.targets: no matrix {missing[0]!r}; the decoder has {', '.join(sorted(names))}")
    alpha: Any = lora.alpha
    settings = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets), lora_dropout=lora.dropout)
    inject_adapter_in_model(settings, decoder)
