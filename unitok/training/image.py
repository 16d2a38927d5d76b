"""The Lightning shell that trains the image tokenizer; its step is `TokenizerTraining`'s."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from unitok.errors import UserError
from unitok.media import save_image
from unitok.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from unitok.training.codebook_usage import CodebookHealth
from unitok.training.discriminators import PatchDiscriminator
from unitok.training.losses import adaptive_weight, gradient_loss
from unitok.training.perceptual import Perceptual, PerceptualLoss, choose_perceptual
from unitok.training.shell import Sums
from unitok.training.tokenizer import Losses, TokenizerTraining

GRID_IMAGES = 8  # pictures in a grid of reconstructions


@dataclass
class ImageLosses:
    """Weights of the losses of an image tokenizer; 0 leaves one out.

    Args:
        l1: absolute difference of pixels. l2: squared difference of pixels. gradient: L1 of neighbours' differences.
        perceptual: `lpips` (needs weights on the disk), `multiscale` (structural, needs none), `none`, or `auto`: lpips
            where its weights are found, else multiscale. perceptual_weight: its weight.
        lpips_weights: folder with vgg16-397923af.pth and vgg.pth; default $UNITOK_LPIPS, then torch hub's cache.
        commitment: latents stay near their codes. entropy: codes are sure and all used alike (`lfq`, `vq`).
        entropy_temperature: of the entropy of `vq`.
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


@dataclass
class Adversary:
    """The discriminator of an image tokenizer, and when and how the generator hears of it.

    Args:
        weight: of the adversarial loss, 0 for no discriminator. loss: `hinge` or `non-saturating`.
        adaptive: multiply the weight by taming's ratio of gradients at the decoder's last layer.
        feature_matching: weight of the distance of its inner features. lecam: weight of its LeCam regularisation.
        start: share of the run at which it starts to learn. ahead: share of the run it then learns alone.
        ramp: share of the run over which the generator's weight rises from 0.
        learning_rate: its own. width, layers, norm (`group` or `batch`): its network.
    """

    weight: float = 0.02
    loss: Literal["hinge", "non-saturating"] = "hinge"
    adaptive: bool = False
    feature_matching: float = 0.0
    lecam: float = 0.0
    start: float = 0.85
    ahead: float = 0.05
    ramp: float = 0.05
    learning_rate: float = 5e-4
    width: int = 32
    layers: int = 2
    norm: Literal["group", "batch"] = "group"


class ImageTokenizerTraining(TokenizerTraining):
    """Trains an image tokenizer on [B, 3, S, S] in [-1, 1].

    Args:
        tokenizer: architecture. losses: weights of the losses. gan: the discriminator.
        steps: length of the training in batches; or
        minutes: its length in minutes, which become steps after a short probe.
        accumulate: parts in which a batch goes through the networks, to save memory; the result is that of the whole.
        learning_rate: peak, reached after `warmup_steps`, held to `hold` of the run, then falling linearly to a fiftieth.
        betas, weight_decay: AdamW's. clip: largest norm of the gradient.
        ema_decay: of a moving average of the weights, which is then what is validated and bundled; 0 for none.
        quantize_from: share of the run after which codes are used. kmeans_batches: batches before that from whose
            latents the codebook starts. codebook_decay: of the codebook's moving averages, a batch.
        images_every: steps between grids of reconstructions, on disk and in TensorBoard; 0 for none.
    """

    kind = "image tokenizer"
    shown = (
        *("psnr", "codebook_use_0", "codebook_perplexity_0", "codebook_entropy_0", "codebook_revived"),
        *("gradient_norm", "gradient_norm_discriminator"),
    )

    def __init__(
        self,
        tokenizer: ImageTokenizerConfig,
        losses: ImageLosses = ImageLosses(),  # noqa: B008 (jsonargparse reads the defaults from here)
        gan: Adversary = Adversary(),  # noqa: B008
        steps: int | None = None,
        minutes: float | None = None,
        accumulate: int = 1,
        learning_rate: float = 1.5e-3,
        warmup_steps: int = 30,
        hold: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        clip: float = 1.0,
        ema_decay: float = 0.0,
        quantize_from: float = 0.08,
        kmeans_batches: int = 8,
        codebook_decay: float = 0.95,
        images_every: int = 500,
        log_every: int = 20,
    ):
        super().__init__(
            *(tokenizer, gan, steps, minutes, accumulate, learning_rate, warmup_steps, hold, betas, weight_decay, clip),
            *(ema_decay, quantize_from, kmeans_batches, codebook_decay, log_every),
        )
        self.weights, self.show_every = losses, images_every

    def configure_model(self) -> None:
        """Build the networks."""
        if hasattr(self, "tokenizer"):
            return
        self.tokenizer = ImageTokenizer(self.config)
        if not self.config.decodes:
            raise UserError("decodes is false: a tokenizer without a decoder cannot be trained")
        quantizer = self.tokenizer.quantizer
        if self.config.quantizer == "vq":
            quantizer.entropy_temperature = self.weights.entropy_temperature if self.weights.entropy else 0.0  # type: ignore[assignment]
        self.health = CodebookHealth(self.config.quantizer, quantizer.size)
        self._set_perceptual(self.weights.perceptual if self.weights.perceptual_weight else "none")
        if self.gan.weight:
            self.discriminator = PatchDiscriminator(self.gan.width, self.gan.layers, self.gan.norm)
        self.configure_common()

    def _set_perceptual(self, wanted: Perceptual) -> None:
        folder = Path(self.weights.lpips_weights) if self.weights.lpips_weights else None
        kind = self.perceptual_kind = choose_perceptual(wanted, folder)
        self.perceptual = None if kind == "none" else PerceptualLoss(kind, folder)

    def part(self) -> dict[str, Any]:
        return super().part() | {"perceptual": self.perceptual_kind}

    def check_part(self, part: dict[str, Any]) -> None:
        super().check_part(part)
        began = part.get("perceptual", self.perceptual_kind)
        if self.weights.perceptual == "auto" and began != self.perceptual_kind:
            self._set_perceptual(began)  # a run goes on with what it began with

    # ---- What a reconstruction is worth --------------------------------------------------------------------------

    def signal(self, out: Any) -> Tensor:
        return out.pixels

    def flat_codes(self, out: Any) -> Tensor:
        return out.codes.reshape(-1, 1)

    def reconstruction_losses(self, out: Tensor, target: Tensor) -> Losses:
        """L1, L2, losses of neighbours' differences and perceptual ones of [B, 3, H, W]."""
        w, d = self.weights, out - target
        losses: Losses = {}
        if w.l1:
            losses["l1"] = w.l1 * d.abs().mean()
        if w.l2:
            losses["l2"] = w.l2 * d.square().mean()
        if w.gradient:
            losses["gradient"] = w.gradient * gradient_loss(out, target)
        if self.perceptual is not None:
            losses["perceptual"] = w.perceptual_weight * self.perceptual(out, target)
        return losses

    def quantizer_losses(self, losses: Losses) -> Losses:
        weights = {"commitment": self.weights.commitment, "entropy": self.weights.entropy}
        return {k: weights.get(k, 1.0) * v for k, v in losses.items() if weights.get(k, 1.0)}

    def quality(self, out: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"psnr": _psnr((out - target).square().mean())}

    def adversarial_weight(self, losses: Losses, adversarial: Tensor) -> Tensor | float:
        if not self.gan.adaptive:
            return 1.0
        seen = torch.stack([v for k, v in losses.items() if k not in ("commitment", "entropy", "codebook")]).sum()
        last = self.tokenizer.decoder.conv_out.weight  # type: ignore[union-attr]
        return adaptive_weight(seen, adversarial, last)  # type: ignore[arg-type]

    # ---- To look at ----------------------------------------------------------------------------------------------

    def show(self, name: str, images: Tensor, pixels: Tensor, step: int) -> None:
        """Originals above reconstructions, as a PNG in the run's folder and in TensorBoard."""
        rows = torch.stack([images[:GRID_IMAGES].float(), pixels[:GRID_IMAGES].float().clamp(-1, 1)])
        grid = rearrange(rows, "r n c h w -> c (r h) (n w)").cpu()
        folder = Path(self.trainer.default_root_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        save_image(folder / f"step-{step:07d}.png", grid)
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, (grid + 1) / 2, step)

    def measure(self, images: Tensor, show: bool) -> Sums:
        """PSNR of [B, 3, H, W]."""
        tokenizer = self.average.model if self.average else self.tokenizer
        pixels = tokenizer(images, quantize=self.quantizes_to_validate()).pixels.float()
        if show:
            self.show("validation", images, pixels, self.steps_done)
        return {"psnr": (_psnr((pixels - images).square().mean(dim=(1, 2, 3))).sum(), len(images))}


def _psnr(error: Tensor) -> Tensor:
    """Mean squared errors of values in [-1, 1] -> dB, 100 at most."""
    return -10 * torch.log10((error / 4).clamp_min(1e-10))
