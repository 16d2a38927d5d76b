"""The training of the image tokenizer; its step is that of `TokenizerTraining`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from unitok.bundle import load_trained_part
from unitok.errors import UserError
from unitok.media import save_image
from unitok.tokenizers import ImageTokenizer, ImageTokenizerConfig
from unitok.tokenizers.base import Reconstruction
from unitok.tokenizers.quantize import VectorQuantizer
from unitok.training.discriminators import PatchDiscriminator
from unitok.training.losses import adaptive_weight, gradient_loss
from unitok.training.monitor import CodebookHealth
from unitok.training.perceptual import Perceptual, choose_perceptual, perceptual_loss
from unitok.training.shell import Sums
from unitok.training.tokenizer import Adversary, Losses, TokenizerTraining

GRID_IMAGES = 8  # images in a grid of reconstructions


@dataclass
class ImageLosses:
    """Weights of the losses of an image tokenizer; a loss of weight 0 is left out.

    Args:
        l1: absolute difference of pixels. l2: squared difference of pixels.
        gradient: L1 between the differences of neighboring pixels.
        perceptual: `lpips` (needs weights on disk), `multiscale` (structural, needs none), `none`, or `auto`: lpips where its
            weights are found, else multiscale. perceptual_weight: its weight.
        lpips_weights: folder with vgg16-397923af.pth and vgg.pth; default $UNITOK_LPIPS, then torch hub's cache.
        commitment: distance of latents from their codes.
        entropy: confident codes that are used equally often (`lfq`, `vq`). entropy_temperature: of its softmax (`vq`).
    """

    l1: float = 1.0
    l2: float = 1.0
    gradient: float = 0.0
    perceptual: Perceptual = "auto"
    perceptual_weight: float = 1.0
    lpips_weights: str | None = None
    commitment: float = 0.25
    entropy: float = 0.0
    entropy_temperature: float = 0.01


class ImageTokenizerTraining(TokenizerTraining):
    """Training of an image tokenizer on images [B, 3, S, S] or videos [B, F, 3, S, S] in [-1, 1].

    Args:
        tokenizer: architecture.
        losses: weights of the losses.
        gan: the discriminator and its schedule.
        images_every: steps between grids of reconstructions, on disk and in TensorBoard; 0 for none.
        quantize_start: fraction of the run after which latents are quantized; default: 0.08, with `init_from` 0.
        init_from: an image tokenizer, its run or its bundle, whose weights it begins with; its `group` may be smaller and its codebook, too.
    """

    kind = "image tokenizer"
    config: ImageTokenizerConfig
    tokenizer: ImageTokenizer
    weights: ImageLosses
    progress_bar_metrics = (
        *("psnr_db", "codebook_usage/0", "codebook_perplexity/0", "codebook_entropy/0", "codebook_revived"),
        *("grad_norm", "grad_norm/discriminator"),
    )

    def __init__(
        self,
        tokenizer: ImageTokenizerConfig,
        losses: ImageLosses = ImageLosses(),  # noqa: B008 (jsonargparse reads the defaults from here)
        gan: Adversary = Adversary(),  # noqa: B008
        *,
        quantize_start: float | None = None,
        images_every: int = 500,
        init_from: str | None = None,
        **shared: Any,
    ):
        begins = (0.0 if init_from else 0.08) if quantize_start is None else quantize_start
        super().__init__(config=tokenizer, gan=gan, quantize_start=begins, show_every=images_every, **shared)
        self.weights, self.init_from = losses, init_from
        self._of_groups = False  # whether the batch is of videos whose frames share grids

    def build(self) -> None:
        self.tokenizer = ImageTokenizer(self.config)
        if not self.config.decodes:
            raise UserError("decodes is false: a tokenizer without a decoder cannot be trained")
        if self.init_from:
            self.tokenizer.init_from(load_trained_part("image", Path(self.init_from))[0], self.init_from)
        quantizer = self.tokenizer.quantizer
        if isinstance(quantizer, VectorQuantizer):
            quantizer.entropy_temperature = self.weights.entropy_temperature if self.weights.entropy else 0.0
        self.health = CodebookHealth(self.config.quantizer, quantizer.size)
        self._set_perceptual(self.weights.perceptual if self.weights.perceptual_weight else "none")
        if self.perceptual_kind == "none" and not (self.weights.l1 or self.weights.l2 or self.weights.gradient):
            raise UserError("losses: nothing compares the images; give l1, l2, gradient or perceptual a weight")
        if self.gan.weight:
            self.discriminator = PatchDiscriminator(self.gan.width, self.gan.layers, self.gan.norm)

    def _set_perceptual(self, name: Perceptual) -> None:
        folder = Path(self.weights.lpips_weights) if self.weights.lpips_weights else None
        self.perceptual_kind = choose_perceptual(name, folder)
        self.perceptual = perceptual_loss(self.perceptual_kind, folder)

    def part(self) -> dict[str, Any]:
        return super().part() | {"perceptual": self.perceptual_kind}

    def check_part(self, part: dict[str, Any]) -> None:
        super().check_part(part)
        if self.weights.perceptual == "auto" and part["perceptual"] != self.perceptual_kind:
            self._set_perceptual(part["perceptual"])  # a run goes on with what it began with

    def _backward(
        self, target: Tensor, semantic_target: Tensor | None, out: Reconstruction, fraction: float, adversarial: bool
    ) -> Losses:
        """Losses see the frames of videos as images."""
        self._of_groups = target.ndim == 5 and self.config.group > 1
        if target.ndim == 5:
            target, out = target.flatten(0, 1), replace(out, signal=out.signal.flatten(0, 1))
        return super()._backward(target, semantic_target, out, fraction, adversarial)

    def reconstruction_losses(self, out: Tensor, target: Tensor) -> Losses:
        """L1, L2, gradient and perceptual losses of images [B, 3, H, W]."""
        w, losses = self.weights, super().reconstruction_losses(out, target)
        if w.gradient:
            losses["gradient"] = w.gradient * gradient_loss(out, target)
        if self.perceptual is not None:
            losses["perceptual"] = w.perceptual_weight * self.perceptual(out, target)
        return losses

    def quality(self, out: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"psnr_db": _psnr((out - target).square().mean())}

    def adversarial_weight(self, losses: Losses, adversarial: Tensor) -> Tensor | float:
        if not self.gan.adaptive:
            return 1.0
        of_pixels = torch.stack([v for k, v in losses.items() if k not in ("commitment", "entropy", "codebook")]).sum()
        assert self.tokenizer.decoder is not None
        decoder = self.tokenizer.decoder
        last = decoder.group_out if self._of_groups else decoder.conv_out  # most frames of a video are of groups
        return adaptive_weight(of_pixels, adversarial, last.weight)

    def show(self, name: str, images: Tensor, pixels: Tensor, step: int) -> None:
        """Save originals above reconstructions, as a PNG in the run's folder and in TensorBoard."""
        if images.ndim == 5:
            images, pixels = images.flatten(0, 1), pixels.flatten(0, 1)
        rows = torch.stack([images[:GRID_IMAGES].float(), pixels[:GRID_IMAGES].float().clamp(-1, 1)])
        grid = rearrange(rows, "r n c h w -> c (r h) (n w)").cpu()
        save_image(self.folder(name) / f"step-{step:07d}.png", grid)
        for board in self.boards:
            board.add_image(name, (grid + 1) / 2, step)

    def measure(self, images: Tensor, show: bool) -> Sums:
        """PSNR of reconstructions of images [B, 3, H, W] or videos [B, F, 3, H, W], dB."""
        pixels = self.averaged(self.tokenizer)(images, quantize=self.quantizes_to_validate()).signal.float()
        if show:
            self.show("validation", images, pixels, self.steps_done)
        return {"psnr_db": (_psnr((pixels - images).square().flatten(1).mean(1)).sum(), len(images))}


def _psnr(error: Tensor) -> Tensor:
    """Mean squared errors of values in [-1, 1] -> PSNR in dB, at most 100."""
    return -10 * torch.log10((error / 4).clamp_min(1e-10))
