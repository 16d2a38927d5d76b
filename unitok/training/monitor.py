"""What tells early that a decoder will diverge: the size of what goes into attention and of what comes out of the last layer.

Chameleon diverged late in training, when modalities that share a softmax had pushed one another's norms up; the norm of the
last layer's output grew long before (Chameleon Team 2024, section 2.3).
"""

from typing import Any

import torch
from torch import Tensor, nn

from unitok.model.decoder import Decoder


class NormWatch:
    """While open, notes root mean squares of a forward pass in `found`: queries and keys of each layer before their norm, and
    the last layer's output. Costs nothing when `on` is false."""

    def __init__(self, decoder: Decoder, on: bool):
        self.found: dict[str, Tensor | float] = {}
        self._watched: dict[str, nn.Module] = {}
        if on:
            self._watched["output_norm"] = decoder.model.norm
            for number, layer in enumerate(decoder.model.layers):
                attention: Any = layer.self_attn
                self._watched |= {f"query_norm_{number}": attention.q_norm, f"key_norm_{number}": attention.k_norm}
        self._hooks: list[Any] = []

    def __enter__(self) -> "NormWatch":
        self._hooks = [module.register_forward_pre_hook(self._note(name)) for name, module in self._watched.items()]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str) -> Any:
        @torch.compiler.disable
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            self.found[name] = inputs[0].detach().float().square().mean().sqrt()

        return hook
