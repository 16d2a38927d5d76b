"""What tells early that a training goes wrong: codebooks that lie idle, norms that grow.

Chameleon diverged late in training; the norm of the last layer's output grew long before (Chameleon Team 2024, section 2.3).
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from unitok.model.decoder import Decoder

log = logging.getLogger(__name__)

# ---- Codebooks ------------------------------------------------------------------------------------------------------

_WARM_UP = "a longer warm-up without quantization (quantize_start)"
REMEDIES = {
    "vq": f"{_WARM_UP}, a lower codebook_dim (8), a smaller codebook_size or larger batches",
    "fsq": "fewer scales",
    "lfq": "a larger entropy weight (losses.entropy)",
    "simvq": "a lower learning rate or a lower codebook_dim",
    "rvq": f"{_WARM_UP}, a smaller codebook_size or larger batches",
}


def codebook_statistics(codes: Tensor, size: int) -> dict[str, float]:
    """int64 codes of one level -> `use` (share of the codebook), `perplexity` (codes), `entropy` (bits a code)."""
    counts = torch.bincount(codes.reshape(-1), minlength=size).double()
    p = counts / counts.sum().clamp_min(1)
    entropy = -float((p * p.clamp_min(1e-12).log2()).sum())
    return {"usage": float((counts > 0).sum()) / size, "perplexity": 2.0**entropy, "entropy": entropy}


class CodebookHealth:
    """Statistics of each level over the last batches, and an alarm, once, when less than half of a codebook is used.

    quantizer: `vq`, `fsq`, …; decides which remedy the alarm names. size: codes per level.
    """

    def __init__(self, quantizer: str, size: int):
        self.quantizer, self.size = quantizer, size
        self.window = 20 * size  # fewer codes could not show that all are used
        self.recent: list[Tensor] = []
        self.seen = 0
        self.warned = False

    def add(self, codes: Tensor) -> None:
        """codes: int64 [N, K] of one batch."""
        self.recent.append(codes.detach())
        self.seen += len(codes)
        while len(self.recent) > 1 and sum(len(c) for c in self.recent[1:]) >= self.window:
            self.recent.pop(0)

    def statistics(self) -> list[dict[str, float]]:
        """For each level what `codebook_statistics` says; empty before any codes were seen."""
        levels = torch.cat(self.recent).unbind(-1) if self.recent else []
        return [codebook_statistics(level, self.size) for level in levels]

    def check(self, step: int, last: bool = False) -> None:
        """Warn, once, when two windows are full and a level uses less than half of its codebook; at the `last` step of a run that
        was too short for it, when a batch uses less than a quarter of what it could use."""
        full = self.seen >= 2 * self.window
        if self.warned or not self.recent or not (full or last):
            return
        codes = torch.cat(self.recent) if full else self.recent[-1]
        enough = 0.5 if full else 0.25 * min(1.0, len(codes) / self.size)
        for level, row in enumerate(codes.unbind(-1)):
            found = codebook_statistics(row, self.size)
            if found["usage"] < enough:
                self.warned = True
                log.warning(
                    "step %d: only %.0f %% of codebook %d is in use (perplexity %.0f of %d); what helps: data that is less alike, %s",
                    *(step, 100 * found["usage"], level, found["perplexity"], self.size, REMEDIES[self.quantizer]),
                )
                return


# ---- Norms ----------------------------------------------------------------------------------------------------------


class NormWatch:
    """While open and `on`, notes root mean squares of a forward pass in `found`: queries and keys of each layer before their norm,
    and the last layer's output."""

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
