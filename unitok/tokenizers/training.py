"""Lightning shells that train the image and the audio tokenizer.

Both warm up without quantisation (the codebook then starts, by k-means, from an encoder that already says something),
quantise from `quantize_from` of the run on, and sum their losses by name; every term logged is a term optimised.

Of images: a step may go through its batch in parts (`accumulate`), and processes share it; the codebook learns from the
whole batch, once. Gradients are averaged over processes here and not by DDP, whose hooks know one backward pass a step.
The discriminator costs nothing before `gan.start`; then it learns alone for `gan.ahead` of the run, and the generator
hears of it by a weight that ramps up over `gan.ramp`.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from unitok.data.media import save_image
from unitok.errors import UserError
from unitok.tokenizers.audio import AudioTokenizer, AudioTokenizerConfig
from unitok.tokenizers.discriminators import LogitAverages, PatchDiscriminator
from unitok.tokenizers.health import CodebookHealth
from unitok.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from unitok.tokenizers.losses import (
    adaptive_weight,
    discriminator_loss,
    feature_loss,
    generator_loss,
    gradient_loss,
    lecam_loss,
    spectral_loss,
)
from unitok.tokenizers.perceptual import Perceptual, PerceptualLoss, choose_perceptual
from unitok.training import TrainingShell, WeightAverage, check_same, warmup_linear

GRID_IMAGES = 8  # pictures in a grid of reconstructions


def adamw(parameters: Iterable[torch.nn.Parameter], rate: float, betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
    """AdamW, fused, with decay on matrices and kernels only."""
    kept = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in kept if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in kept if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


class _TokenizerTraining(TrainingShell):
    """What the two share. `quantize_from`: share of the run after which codes are used."""

    quantize_from: float
    health: CodebookHealth

    def quantizes_to_validate(self) -> bool:
        """Not before training does: until then there is no codebook."""
        return self.trainer.state.fn != "fit" or self.share >= self.quantize_from

    def _logs_next(self) -> bool:
        return (self.steps_done + 1) % self.log_every == 0

    def _health(self) -> dict[str, float]:
        """What there is to log of the codebooks, one number a level; sounds the alarm."""
        self.health.check(self.steps_done + 1)
        found = enumerate(self.health.statistics())
        return {f"codebook_{name}_{level}": value for level, row in found for name, value in row.items()}

    def _check_finite(self, losses: dict[str, Tensor]) -> None:
        bad = [name for name, value in losses.items() if not torch.isfinite(value)]
        if bad:
            raise UserError(
                f"step {self.steps_done + 1}: not a finite number: {', '.join(bad)}; the weights of the step before are in the "
                "last checkpoint; lower the learning rate or the weight of that loss"
            )


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


class ImageTokenizerTraining(_TokenizerTraining):
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
        super().__init__(steps, minutes, log_every)
        self.config, self.weights, self.gan = tokenizer, losses, gan
        self.accumulate, self.rate, self.warmup_steps, self.hold = accumulate, learning_rate, warmup_steps, hold
        self.betas, self.weight_decay, self.clip = (betas[0], betas[1]), weight_decay, clip
        self.ema_decay, self.quantize_from, self.kmeans_batches = ema_decay, quantize_from, kmeans_batches
        self.codebook_decay, self.images_every = codebook_decay, images_every
        self._recent: list[Tensor] = []  # latents of the last batches before the codebook starts

    def configure_model(self) -> None:
        """Build the networks."""
        if hasattr(self, "tokenizer"):
            return
        self.tokenizer = ImageTokenizer(self.config)
        if not self.config.decodes:
            raise UserError("decodes is false: a tokenizer without a decoder cannot be trained")
        quantizer = self.tokenizer.quantizer
        if self.config.quantizer == "vq":
            quantizer.decay = self.codebook_decay  # type: ignore[assignment]
            quantizer.entropy_temperature = self.weights.entropy_temperature if self.weights.entropy else 0.0  # type: ignore[assignment]
        self.health = CodebookHealth(self.config.quantizer, quantizer.size)
        self.average = WeightAverage(self.tokenizer, self.ema_decay) if self.ema_decay else None
        folder = Path(self.weights.lpips_weights) if self.weights.lpips_weights else None
        wanted = self.weights.perceptual if self.weights.perceptual_weight else "none"
        self._set_perceptual(choose_perceptual(wanted, folder))
        if self.gan.weight:
            self.discriminator = PatchDiscriminator(self.gan.width, self.gan.layers, self.gan.norm)
            self.usual = LogitAverages()

    def _set_perceptual(self, kind: Perceptual) -> None:
        folder = Path(self.weights.lpips_weights) if self.weights.lpips_weights else None
        self.perceptual_kind = kind
        self.perceptual = None if kind == "none" else PerceptualLoss(kind, folder)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers: list[torch.optim.Optimizer] = [adamw(self.tokenizer.parameters(), self.rate, self.betas, self.weight_decay)]
        if self.gan.weight:
            optimizers.append(adamw(self.discriminator.parameters(), self.gan.learning_rate, (0.5, 0.9), 0.0))
        return optimizers

    def part(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "perceptual": self.perceptual_kind}

    def check_part(self, part: dict[str, Any]) -> None:
        check_same(part["config"], asdict(self.config), "tokenizer")
        began = part.get("perceptual", self.perceptual_kind)
        if self.weights.perceptual == "auto" and began != self.perceptual_kind:
            folder = Path(self.weights.lpips_weights) if self.weights.lpips_weights else None
            self._set_perceptual(choose_perceptual(began, folder))  # a run goes on with what it began with

    def extra(self) -> dict[str, Any]:
        return {"recent": self._recent}

    def restore_extra(self, extra: dict[str, Any]) -> None:
        self._recent = [low.to(self.device) for low in extra["recent"]]

    # ---- One step ------------------------------------------------------------------------------------------------

    def optimize(self, images: Tensor) -> dict[str, Tensor | float]:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.set_rate(optimizers[0], self.rate * warmup_linear(self.steps_done, self.share, self.warmup_steps, self.hold))
        quantize = self.share >= self.quantize_from
        if quantize and not self.tokenizer.quantizer.started:
            self._start_codebook(images)
        judged = bool(self.gan.weight) and self.share >= self.gan.start
        for optimizer in optimizers:
            optimizer.zero_grad()
        terms: dict[str, Tensor] = {}
        pieces, outs = images.chunk(self.accumulate), []
        for piece in pieces:
            weight = len(piece) / len(images)
            out = self.tokenizer(piece, quantize=quantize)
            with torch.autocast(images.device.type, enabled=False):
                losses = self._reconstruction_losses(out.pixels.float(), piece, out.losses)
                if judged:
                    losses |= self._adversarial_losses(out.pixels.float(), piece, losses)
            self._check_finite(losses)
            (weight * torch.stack(list(losses.values())).sum()).backward()
            if judged:
                judgement = self._judge(piece, out.pixels.detach())
                (weight * judgement["discriminator"]).backward()
                losses |= judgement
            for name, value in losses.items():
                terms[name] = terms.get(name, 0) + weight * value.detach()
            outs.append(out)
        norms = self._step(optimizers, judged)
        logged: dict[str, Tensor | float] = dict(norms)
        if judged:
            self.usual.update(self._mean(terms.pop("real")), self._mean(terms.pop("fake")))
        pixels = torch.cat([out.pixels.detach() for out in outs])
        if outs[0].low is not None:
            logged |= self._learn_codebook(torch.cat([out.low for out in outs]), quantize)
        if quantize:
            self.health.add(torch.cat([out.codes for out in outs]).reshape(-1, 1))
        if self._logs_next():
            logged |= self._health()
        if self.average:
            self.average.update(self.tokenizer, self.steps_done)
        self._maybe_show(images, pixels)
        of_generator = [value for name, value in terms.items() if name != "discriminator"]
        psnr = -10 * torch.log10((pixels.float() - images).square().mean() / 4)
        return {"loss": torch.stack(of_generator).sum(), "psnr": psnr, **terms, **logged}

    def _reconstruction_losses(self, out: Tensor, target: Tensor, quantizer: dict[str, Tensor]) -> dict[str, Tensor]:
        """All that does not need the discriminator, weighted, by name; what weighs nothing is left out."""
        w, d = self.weights, out - target
        losses: dict[str, Tensor] = {}
        if w.l1:
            losses["l1"] = w.l1 * d.abs().mean()
        if w.l2:
            losses["l2"] = w.l2 * d.square().mean()
        if w.gradient:
            losses["gradient"] = w.gradient * gradient_loss(out, target)
        if self.perceptual is not None:
            losses["perceptual"] = w.perceptual_weight * self.perceptual(out, target)
        weights = {"commitment": w.commitment, "entropy": w.entropy}
        return losses | {k: weights.get(k, 1.0) * v for k, v in quantizer.items() if weights.get(k, 1.0)}

    def _adversarial_losses(self, out: Tensor, target: Tensor, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the discriminator says to the generator, ramping in; nothing while it learns alone."""
        heard = (self.share - self.gan.start - self.gan.ahead) / max(self.gan.ramp, 1e-6)
        if heard <= 0:
            return {}
        self.discriminator.requires_grad_(False)
        logits, features = self.discriminator.with_features(out)
        adversarial = generator_loss(logits, self.gan.loss)
        weight: Tensor | float = self.gan.weight * min(1.0, heard)
        if self.gan.adaptive:
            seen = torch.stack([v for k, v in losses.items() if k not in ("commitment", "entropy", "codebook")]).sum()
            last = self.tokenizer.decoder.conv_out.weight  # type: ignore[union-attr]
            weight = weight * adaptive_weight(seen, adversarial, last)  # type: ignore[arg-type]
        found = {"adversarial": weight * adversarial}
        if self.gan.feature_matching:
            with torch.no_grad():
                real = self.discriminator.with_features(target)[1]
            found["features"] = self.gan.feature_matching * min(1.0, heard) * feature_loss(features, real)
        self.discriminator.requires_grad_(True)
        return found

    def _judge(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The discriminator's loss; and the means of its logits, for LeCam."""
        on_real, on_fake = self.discriminator(real), self.discriminator(fake)
        with torch.autocast(real.device.type, enabled=False):
            loss = discriminator_loss(on_real, on_fake, self.gan.loss)
            if self.gan.lecam:
                loss = loss + self.gan.lecam * lecam_loss(on_real, on_fake, self.usual.real, self.usual.fake)
        self._check_finite({"discriminator": loss})
        return {"discriminator": loss, "real": on_real.detach().float().mean(), "fake": on_fake.detach().float().mean()}

    def _step(self, optimizers: list[Any], judged: bool) -> dict[str, Tensor]:
        """Clip and step the generator and, if it judged, the discriminator; -> norms of their gradients."""
        networks: list[tuple[str, torch.nn.Module]] = [("gradient_norm", self.tokenizer)]
        if judged:
            networks.append(("gradient_norm_discriminator", self.discriminator))
        norms = {}
        for name, network in networks:
            self.average_gradients(network.parameters())
            norms[name] = torch.nn.utils.clip_grad_norm_(network.parameters(), self.clip)
        self._check_finite(norms)
        optimizers[0].step()
        if judged:
            optimizers[1].optimizer.step()  # the raw one, so that Lightning's `global_step` counts batches
        return norms

    # ---- Codebook ------------------------------------------------------------------------------------------------

    def _gather(self, low: Tensor) -> Tensor:
        """[B, N, d] of every process -> [all of them, d], the same everywhere, in the order that one process would have."""
        everywhere: Any = self.all_gather(low.float())
        return rearrange(everywhere.reshape(-1, *low.shape), "p b n d -> (b p n) d")

    def _mean(self, value: Tensor) -> Tensor:
        everywhere: Any = self.all_gather(value)
        return everywhere.mean()

    def _start_codebook(self, images: Tensor) -> None:
        if not self._recent:  # no warm-up
            with torch.no_grad():
                pieces = images.chunk(self.accumulate)
                lows = [self.tokenizer(piece, quantize=False).low for piece in pieces]
            self._recent = [self._gather(torch.cat(lows))]
        self.tokenizer.quantizer.start(torch.cat(self._recent), seed=self.steps_done)
        self._recent = []

    def _learn_codebook(self, low: Tensor, quantized: bool) -> dict[str, float]:
        """Once a batch, from all of it."""
        if not self.tokenizer.quantizer.learns_by_update:
            return {}
        vectors = self._gather(low)
        if quantized:
            return {"codebook_revived": float(self.tokenizer.quantizer.update(vectors, seed=self.steps_done))}
        self._recent = [*self._recent[-self.kmeans_batches + 1 :], vectors] if self.kmeans_batches > 1 else [vectors]
        return {}

    # ---- To look at ----------------------------------------------------------------------------------------------

    def _maybe_show(self, images: Tensor, pixels: Tensor) -> None:
        over = self.budget.over(self.steps_done + 1)
        due = bool(self.images_every) and ((self.steps_done + 1) % self.images_every == 0 or over)
        if due and self.trainer.is_global_zero:
            self._show("reconstructions", images, pixels, self.steps_done + 1)

    def _show(self, name: str, images: Tensor, pixels: Tensor, step: int) -> None:
        """Originals above reconstructions, as a PNG in the run's folder and in TensorBoard."""
        rows = torch.stack([images[:GRID_IMAGES].float(), pixels[:GRID_IMAGES].float().clamp(-1, 1)])
        grid = rearrange(rows, "r n c h w -> c (r h) (n w)").cpu()
        folder = Path(self.trainer.default_root_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        save_image(folder / f"step-{step:07d}.png", grid)
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, (grid + 1) / 2, step)

    def validation_step(self, images: Tensor, batch_index: int) -> None:
        tokenizer = self.average.model if self.average else self.tokenizer
        out = tokenizer(images, quantize=self.quantizes_to_validate())
        mse = (out.pixels.float() - images).square().mean(dim=(1, 2, 3)) / 4
        self.log("val_psnr", (-10 * torch.log10(mse)).mean(), prog_bar=True, batch_size=len(images), sync_dist=True)
        if batch_index == 0 and self.trainer.is_global_zero:
            self._show("validation", images, out.pixels, self.steps_done)

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
        self.health = CodebookHealth("rvq", self.tokenizer.codebook_size)

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
        losses = {"time": self.time_weight * error} | {name: 0.25 * value for name, value in out.losses.items()}
        if self.spectral_weight and share >= self.spectral_from:
            losses["spectral"] = self.spectral_weight * spectral_loss(out.samples, samples)
        self._check_finite(losses)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.clip)
        optimizer.step()
        if out.codes is not None:
            self.health.add(out.codes.transpose(1, 2).reshape(-1, out.codes.shape[1]))
        logged: dict[str, Tensor | float] = {
            "gradient_norm": norm,
            "snr_db": 10 * torch.log10(samples.square().mean() / error.detach()),
        }
        if self._logs_next():
            logged |= self._health()
        return {"loss": loss.detach()} | {k: v.detach() for k, v in losses.items()} | logged

    def validation_step(self, samples: Tensor, batch_index: int) -> None:
        out = self.tokenizer(samples, quantize=self.quantizes_to_validate())
        error = (out.samples.float() - samples).square().mean(dim=(1, 2)).clamp_min(1e-10)
        power = samples.square().mean(dim=(1, 2)).clamp_min(1e-10)
        self.log("val_snr_db", (10 * torch.log10(power / error)).mean(), prog_bar=True, batch_size=len(samples))

    test_step = validation_step
