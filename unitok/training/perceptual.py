"""Perceptual losses: LPIPS on VGG-16 where its weights are on disk, else a structural loss, which needs no weights.

Nothing is downloaded. A file without all weights is an error, because a random network is worse than no perceptual loss.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from unitok.checkpoints import load_weights
from unitok.errors import UserError
from unitok.pretrained import load_state
from unitok.training.losses import structure_loss

log = logging.getLogger(__name__)

Perceptual = Literal["auto", "lpips", "multiscale", "none"]

TRUNK_FILES = ("vgg16-397923af.pth", "vgg16.pth", "vgg16.safetensors")  # torchvision's state dict
HEADS_FILES = ("vgg.pth", "lpips_vgg.pth", "vgg.safetensors")  # LPIPS's linear heads, keys lin0.model.1.weight, ...

#: VGG-16's convolutions by their numbers in torchvision's `features`, in five stages; LPIPS compares after each.
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_WIDTHS = (64, 128, 256, 512, 512)


class LPIPS(nn.Module):
    """Learned perceptual distance, VGG-16, version 0.1: images [B, 3, H, W] in [-1, 1] -> [B]. Weights are frozen.

    Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"; PerceptualSimilarity:lpips/lpips.py.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        before = 3
        for stage, width in zip(_STAGES, _WIDTHS, strict=True):
            for number in stage:
                self.features[str(number)] = nn.Conv2d(before, width, 3, padding=1)
                before = width
        self.lin = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in _WIDTHS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    def _stages(self, x: Tensor) -> list[Tensor]:
        x, out = (x - self.shift) / self.scale, []
        for i, stage in enumerate(_STAGES):
            if i:
                x = torch.max_pool2d(x, 2)
            for number in stage:
                x = self.features[str(number)](x).relu()
            out.append(x)
        return out

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        total = out.new_zeros(len(out), dtype=torch.float32)
        for a, b, head in zip(self._stages(out), self._stages(target), self.lin, strict=True):
            # As in the original: divided by length + 1e-10.
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a.float(), b.float()))
            total = total + head((a - b).square()).mean((1, 2, 3))
        return total

    @classmethod
    def from_files(cls, trunk: Path, heads: Path) -> "LPIPS":
        """Load torchvision's VGG-16 and LPIPS's heads, .pth or .safetensors. Errors: `UserError` for missing keys."""
        model = cls()
        state = {k: v for k, v in load_weights(trunk).items() if k.startswith("features.")}
        state |= {k.replace(".model.1.", "."): v for k, v in load_weights(heads).items()}
        state = {k.replace("lin", "lin.", 1) if k.startswith("lin") and k[3] != "." else k: v for k, v in state.items()}
        load_state(model, state, f"{trunk} and {heads}")
        return model.eval()


def lpips_folders() -> list[Path]:
    """Folders that are searched for weights: $UNITOK_LPIPS, then torch hub's cache."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    own = os.environ.get("UNITOK_LPIPS")
    return [Path(own), hub] if own else [hub]


def find_lpips(folder: Path | None = None) -> tuple[Path, Path] | None:
    """The files of trunk and heads in `folder`, by default in `lpips_folders`; None if no folder has both."""
    for each in [Path(folder)] if folder else lpips_folders():
        trunk, heads = (next((each / n for n in names if (each / n).exists()), None) for names in (TRUNK_FILES, HEADS_FILES))
        if trunk and heads:
            return trunk, heads
    return None


def choose_perceptual(name: Perceptual, folder: Path | None = None) -> Perceptual:
    """The loss to use: `auto` becomes `lpips` or `multiscale`, and is logged. Errors: `UserError` for `lpips` without weights."""
    files = find_lpips(folder) if name in ("auto", "lpips") else None
    if name == "lpips" and not files:
        searched = folder or " or ".join(map(str, lpips_folders()))
        raise UserError(
            f"perceptual: lpips needs {TRUNK_FILES[0]} and {HEADS_FILES[0]} in {searched}; "
            "put them there, name their folder in lpips_weights or $UNITOK_LPIPS, or choose multiscale"
        )
    if name != "auto":
        return name
    chosen: Perceptual = "lpips" if files else "multiscale"
    reason = f"weights in {files[0].parent}" if files else "no LPIPS weights on disk"
    log.info("perceptual loss: %s (%s)", chosen, reason)
    return chosen


def perceptual_loss(name: Perceptual, folder: Path | None = None) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The loss that `choose_perceptual` chose: two batches of images [B, 3, H, W] in [-1, 1] -> scalar; None for `none`.

    It is a function and not a module, so that checkpoints do not hold the frozen weights.
    """
    if name != "lpips":
        return structure_loss if name == "multiscale" else None
    files = find_lpips(folder)
    assert files is not None, "choose_perceptual found them"
    lpips = LPIPS.from_files(*files)
    return lambda out, target: lpips.to(out.device)(out.float(), target.float()).mean()
