"""Low-rank adaptation through peft (Hu et al. 2021, "LoRA"): a frozen matrix W learns a difference B A of low rank.

Checkpoints hold W, A and B under peft's names; `checkpoints.merge_lora` merges them into the weights of a plain decoder.
"""

from dataclasses import dataclass

from torch import nn

from unitok.errors import UserError, check_range
from unitok.model.decoder import Decoder


@dataclass
class LowRank:
    """LoRA's configuration.

    Args:
        rank: of the difference. alpha: the difference is multiplied by alpha / rank.
        targets: names of the matrices of the blocks that learn one.
        dropout: rate, on their inputs.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dropout: float = 0.0


def add_lora(decoder: Decoder, lora: LowRank) -> None:
    """Add the low-rank differences and freeze everything else. Errors: `UserError` where peft or a target is missing."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("lora needs the package peft: pip install 'unitok-lm[lora]'") from None
    if lora.rank < 1:
        raise UserError(f"lora.rank {lora.rank}: it must be at least 1")
    check_range("lora.dropout", lora.dropout, 0, 1)
    if not lora.targets:
        raise UserError("lora.targets: name at least one matrix, such as q_proj")
    names = {name.rpartition(".")[2] for name, module in decoder.model.layers.named_modules() if isinstance(module, nn.Linear)}
    if missing := [target for target in lora.targets if target not in names]:
        raise UserError(f"lora.targets: no matrix {missing[0]!r}; the decoder has {', '.join(sorted(names))}")
    config = LoraConfig(r=lora.rank, target_modules=list(lora.targets), lora_dropout=lora.dropout)
    vars(config)["lora_alpha"] = lora.alpha  # declared as an int, but only a factor
    inject_adapter_in_model(config, decoder)
