"""Lightning shells that train the image and the audio tokenizer.

Both warm up without quantisation (the codebook then starts, by k-means, from an encoder that already says something),
quantise from `quantize_from` of the run on, and sum their losses by name; every term logged is a term optimised. The
discriminator costs nothing before `discriminator_from`; then it learns alone for `discriminator_ahead` of the run before
the generator hears of it, by a weight that ramps up as long again.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.tokenizers.audio import AudioTokenizer, AudioTokenizerConfig
from unitok.tokenizers.discriminators import PatchDiscriminator
from unitok.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from unitok.tokenizers.losses import (
    gradient_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    pixel_loss,
    spectral_loss,
)
from unitok.tokenizers.vqgan import downsampling
from unitok.training import TrainingShell, check_same, warmup_linear


def adamw(parameters: Iterable[torch.nn.Parameter], rate: float, betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
    """AdamW, fused, with decay on matrices and kernels only."""
    kept = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in kept if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in kept if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


class CodebookUse:
    """Share of each level's codes that were used over the last `window` codes."""

    def __init__(self, window: int = 20_000):
        self.window = window
        self.recent: list[Tensor] = []

    def add(self, codes: Tensor) -> None:
        """codes: int64 [N, K]."""
        self.recent.append(codes.detach().cpu())
        while len(self.recent) > 1 and sum(len(c) for c in self.recent[1:]) >= self.window:
            self.recent.pop(0)

    def shares(self, size: int) -> list[float]:
        """One share a level; empty before any codes were seen."""
        if not self.recent:
            return []
        return [len(level.unique()) / size for level in torch.cat(self.recent).unbind(-1)]


class _TokenizerTraining(TrainingShell):
    """What the two share. `quantize_from`: share of the run after which codes are used."""

    quantize_from: float

    def quantizes_to_validate(self) -> bool:
        """Not before training does: the first batch that is quantised starts the codebook."""
        return self.trainer.state.fn != "fit" or self.share >= self.quantize_from

    def _logs_next(self) -> bool:
        return (self.steps_done + 1) % self.log_every == 0


class ImageTokenizerTraining(_TokenizerTraining):
    """Trains an image tokenizer on [B, 3, S, S] in [-1, 1].

    Args:
        tokenizer: architecture.
        steps: length of the training in batches; or
        minutes: its length in minutes, which become steps after a short probe.
        learning_rate: peak, reached after `warmup_steps` and falling linearly to a fiftieth. betas, weight_decay: AdamW's.
        clip: largest norm of the gradient.
        quantize_from: share of the run after which codes are used.
        gradient_weight: weight of the loss on differences of neighbouring pixels.
        gan_weight: weight of the adversarial loss, 0 for none. discriminator_from: share of the run at which the
            discriminator starts. discriminator_ahead: share of the run it learns alone, and then ramps in.
        discriminator_rate: its learning rate.
    """

    kind = "image tokenizer"

    def __init__(
        self,
        tokenizer: ImageTokenizerConfig,
        steps: int | None = None,
        minutes: float | None = None,
        learning_rate: float = 1.5e-3,
        warmup_steps: int = 30,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        clip: float = 1.0,
        quantize_from: float = 0.08,
        gradient_weight: float = 0.0,
        gan_weight: float = 0.02,
        discriminator_from: float = 0.85,
        discriminator_ahead: float = 0.05,
        discriminator_rate: float = 5e-4,
        log_every: int = 20,
    ):
        super().__init__(steps, minutes, log_every)
        self.config = tokenizer
        self.rate, self.betas, self.weight_decay = learning_rate, (betas[0], betas[1]), weight_decay
        self.warmup_steps, self.clip, self.quantize_from = warmup_steps, clip, quantize_from
        self.gradient_weight = gradient_weight
        self.gan_weight, self.discriminator_rate = gan_weight, discriminator_rate
        self.discriminator_from, self.discriminator_ahead = discriminator_from, discriminator_ahead
        self.use = CodebookUse()

    def configure_model(self) -> None:
        """Build the networks, when the data module's batch size is known."""
        if hasattr(self, "tokenizer"):
            return
        stride = downsampling(tuple(self.config.ch_mult), self.config.patch)
        batch = getattr(self.data, "batch_size", 16) * self.trainer.world_size
        side = getattr(self.data, "size", self.config.resolution)
        self.tokenizer = ImageTokenizer(self.config, vectors=batch * (-(-side // stride)) ** 2)
        if self.gan_weight:
            self.discriminator = PatchDiscriminator()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers: list[torch.optim.Optimizer] = [adamw(self.tokenizer.parameters(), self.rate, self.betas, self.weight_decay)]
        if self.gan_weight:
            optimizers.append(adamw(self.discriminator.parameters(), self.discriminator_rate, (0.5, 0.9), 0.0))
        return optimizers

    def part(self) -> dict[str, Any]:
        return {"config": asdict(self.config)}

    def check_part(self, part: dict[str, Any]) -> None:
        check_same(part["config"], asdict(self.config), "tokenizer")

    def optimize(self, images: Tensor) -> dict[str, Tensor | float]:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        share = self.share
        self.set_rate(optimizers[0], self.rate * warmup_linear(self.steps_done, share, self.warmup_steps))
        out = self.tokenizer(images, quantize=share >= self.quantize_from)
        losses = {"pixel": pixel_loss(out.pixels, images), "commitment": out.commitment.float()}
        if self.gradient_weight:
            losses["gradient"] = self.gradient_weight * gradient_loss(out.pixels, images)
        judged = bool(self.gan_weight) and share >= self.discriminator_from
        logged: dict[str, Tensor | float] = {}
        if judged:
            ahead = max(self.discriminator_ahead, 1e-6)
            ramp = min(1.0, max(0.0, (share - self.discriminator_from - ahead) / ahead))
            logged["discriminator"] = self._train_discriminator(optimizers[1], images, out.pixels.detach())
            if ramp > 0:
                self.discriminator.requires_grad_(False)
                losses["adversarial"] = self.gan_weight * ramp * hinge_generator_loss(self.discriminator(out.pixels))
                self.discriminator.requires_grad_(True)
        loss = torch.stack(list(losses.values())).sum()
        optimizers[0].zero_grad()
        self.manual_backward(loss)
        logged["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.clip)
        optimizers[0].step()
        if out.codes is not None:
            self.use.add(out.codes.reshape(-1, 1))
        if self._logs_next():
            logged |= {f"codebook_use_{k}": u for k, u in enumerate(self.use.shares(self.tokenizer.codebook_size))}
        psnr = -10 * torch.log10((out.pixels.detach().float() - images).square().mean() / 4)
        return {"loss": loss.detach(), "psnr": psnr} | {k: v.detach() for k, v in losses.items()} | logged

    def _train_discriminator(self, optimizer: Any, real: Tensor, fake: Tensor) -> Tensor:
        """One step; on the raw optimizer, so that Lightning's `global_step` counts batches."""
        raw = optimizer.optimizer
        loss = hinge_discriminator_loss(self.discriminator(real), self.discriminator(fake))
        raw.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.clip)
        raw.step()
        return loss.detach()

    def validation_step(self, images: Tensor, batch_index: int) -> None:
        out = self.tokenizer(images, quantize=self.quantizes_to_validate())
        mse = (out.pixels.float() - images).square().mean(dim=(1, 2, 3)) / 4
        self.log("val_psnr", (-10 * torch.log10(mse)).mean(), prog_bar=True, batch_size=len(images))

    test_step = validation_step


class AudioTokenizerTraining(_TokenizerTraining):
    """Trains an audio tokenizer on [B, C, T] in [-1, 1].

    Args:
        tokenizer: architecture.
        steps: length of the training in batches; or
        minutes: its length in minutes, which become steps after a short probe.
        learning_rate: peak, reached after `warmup_steps` and falling linearly to a fiftieth. betas, weight_decay: AdamW's.
        clip: largest norm of the gradient.
        quantize_from: share of the run after which codes are used.
        time_weight: weight of the mean squared error of the waveform.
        spectral_weight: weight of the multi-resolution spectral loss; it starts at `spectral_from` of the run, because
            from the start it leads to silence.
    """

    kind = "audio tokenizer"

    def __init__(
        self,
        tokenizer: AudioTokenizerConfig,
        steps: int | None = None,
        minutes: float | None = None,
        learning_rate: float = 1.5e-3,
        warmup_steps: int = 30,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        clip: float = 1.0,
        quantize_from: float = 0.15,
        time_weight: float = 50.0,
        spectral_weight: float = 0.5,
        spectral_from: float = 0.5,
        log_every: int = 20,
    ):
        super().__init__(steps, minutes, log_every)
        self.config = tokenizer
        self.rate, self.betas, self.weight_decay = learning_rate, (betas[0], betas[1]), weight_decay
        self.warmup_steps, self.clip, self.quantize_from = warmup_steps, clip, quantize_from
        self.time_weight, self.spectral_weight, self.spectral_from = time_weight, spectral_weight, spectral_from
        self.use = CodebookUse()

    def configure_model(self) -> None:
        """Build the networks, when the data module's batch size is known."""
        if hasattr(self, "tokenizer"):
            return
        data = self.data
        rate = getattr(data, "sample_rate", self.config.sample_rate)
        if rate != self.config.sample_rate:
            raise UserError(f"the data has sample_rate {rate}, the tokenizer {self.config.sample_rate}: they must agree")
        if getattr(data, "channels", self.config.channels) != self.config.channels:
            raise UserError(f"the data has {data.channels} channels, the tokenizer {self.config.channels}: they must agree")
        frames = -(-getattr(data, "length", rate) // (self.config.patch * math.prod(self.config.ratios)))
        batch = getattr(data, "batch_size", 32) * self.trainer.world_size
        self.tokenizer = AudioTokenizer(self.config, vectors=batch * frames)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.tokenizer.parameters(), self.rate, self.betas, self.weight_decay)

    def part(self) -> dict[str, Any]:
        return {"config": asdict(self.config)}

    def check_part(self, part: dict[str, Any]) -> None:
        check_same(part["config"], asdict(self.config), "tokenizer")

    def optimize(self, samples: Tensor) -> dict[str, Tensor | float]:
        optimizer: Any = self.optimizers()
        share = self.share
        self.set_rate(optimizer, self.rate * warmup_linear(self.steps_done, share, self.warmup_steps))
        out = self.tokenizer(samples, quantize=share >= self.quantize_from)
        error = (out.samples.float() - samples).square().mean()
        losses = {"time": self.time_weight * error, "commitment": out.commitment.float()}
        if self.spectral_weight and share >= self.spectral_from:
            losses["spectral"] = self.spectral_weight * spectral_loss(out.samples, samples)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.clip)
        optimizer.step()
        if out.codes is not None:
            self.use.add(out.codes.transpose(1, 2).reshape(-1, out.codes.shape[1]))
        logged: dict[str, Tensor | float] = {
            "gradient_norm": norm,
            "snr_db": 10 * torch.log10(samples.square().mean() / error.detach()),
        }
        if self._logs_next():
            logged |= {f"codebook_use_{k}": u for k, u in enumerate(self.use.shares(self.tokenizer.codebook_size))}
        return {"loss": loss.detach()} | {k: v.detach() for k, v in losses.items()} | logged

    def validation_step(self, samples: Tensor, batch_index: int) -> None:
        out = self.tokenizer(samples, quantize=self.quantizes_to_validate())
        error = (out.samples.float() - samples).square().mean(dim=(1, 2)).clamp_min(1e-10)
        power = samples.square().mean(dim=(1, 2)).clamp_min(1e-10)
        self.log("val_snr_db", (10 * torch.log10(power / error)).mean(), prog_bar=True, batch_size=len(samples))

    test_step = validation_step
