"""Early signs that a training goes wrong: codebooks that are not used, norms that grow.

Chameleon diverged late in training, long after the norm of the last layer's output began to grow (Chameleon Team 2024, section 2.3).
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unitok.model.decoder import Block, Decoder

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
    """int64 codes of one level -> `usage` (fraction of the codebook), `perplexity` (codes), `entropy` (bits per code)."""
    counts = torch.bincount(codes.reshape(-1), minlength=size).double()
    p = counts / counts.sum().clamp_min(1)
    entropy = -float((p * p.clamp_min(1e-12).log2()).sum())
    return {"usage": float((counts > 0).sum()) / size, "perplexity": 2.0**entropy, "entropy": entropy}


class CodebookHealth:
    """Statistics of each level over the last batches, and one warning when less than half of a codebook is used.

    quantizer: `vq`, `fsq`, …; decides which remedy the warning names. size: codes per level.
    """

    def __init__(self, quantizer: str, size: int):
        self.quantizer, self.size = quantizer, size
        self.window = 20 * size  # codes per level; from fewer it would not show that all are used
        self.recent: list[Tensor] = []
        self.seen = 0
        self.warned = False

    def add(self, codes: Tensor) -> None:
        """Add the codes of one batch, int64 [N, K]."""
        self.recent.append(codes.detach())
        self.seen += len(codes)
        while len(self.recent) > 1 and sum(len(c) for c in self.recent[1:]) >= self.window:
            self.recent.pop(0)

    def statistics(self) -> list[dict[str, float]]:
        """`codebook_statistics` of each level; empty before the first batch of codes."""
        levels = torch.cat(self.recent).unbind(-1) if self.recent else []
        return [codebook_statistics(level, self.size) for level in levels]

    def check(self, step: int, last: bool = False) -> None:
        """Warn, once, when two windows are full and a level uses less than half of its codebook.

        In a run too short for that, warn at its `last` step when a batch uses less than a quarter of the codes that it could use.
        """
        full = self.seen >= 2 * self.window
        if self.warned or not self.recent or not (full or last):
            return
        codes = torch.cat(self.recent) if full else self.recent[-1]
        enough = 0.5 if full else 0.25 * min(1.0, len(codes) / self.size)
        for level, row in enumerate(codes.unbind(-1)):
            statistics = codebook_statistics(row, self.size)
            usage, perplexity = statistics["usage"], statistics["perplexity"]
            if usage < enough:
                self.warned = True
                text = (
                    "step %d: only %.0f %% of codebook %d is in use (perplexity %.0f of %d); what helps: more varied data, %s"
                )
                log.warning(text, step, 100 * usage, level, perplexity, self.size, REMEDIES[self.quantizer])
                return


# ---- Norms ----------------------------------------------------------------------------------------------------------


class NormWatch:
    """Context manager that records root mean squares of a forward pass in `rms`, by the name of the metric.

    Recorded are queries and keys of each layer before QK-norm and the output of the last layer. on: False records nothing.
    """

    def __init__(self, decoder: Decoder, on: bool):
        self.rms: dict[str, Tensor] = {}
        self._watched: dict[str, nn.Module] = {}
        if on:
            self._watched["output_rms"] = decoder.model.norm
            for number, layer in enumerate(decoder.model.layers):
                assert isinstance(layer, Block)
                self._watched |= {f"query_rms/{number}": layer.self_attn.q_norm, f"key_rms/{number}": layer.self_attn.k_norm}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "NormWatch":
        self._hooks = [module.register_forward_pre_hook(self._recorder(name)) for name, module in self._watched.items()]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        @torch.compiler.disable
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.rms[name] = inputs[0].detach().float().square().mean().sqrt()

        return record
