"""What the trainings of image and audio tokenizers share: the step, the start and update of the codebook, and the discriminator.

Both begin without quantization, so that k-means starts the codebook from the latents of an encoder that has learned something. Losses
are summed by name, and every logged term is one that is optimized. A batch may pass in parts (`accumulate_grad_batches`) and is shared
by all processes; the codebook learns once per step, from the whole batch. The discriminator costs nothing before `gan.start`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from einops import rearrange
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from unitok.errors import UserError, check_range
from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig, ImageTokenizer, ImageTokenizerConfig
from unitok.tokenizers.base import Reconstruction
from unitok.training.discriminators import PatchDiscriminator, STFTDiscriminator
from unitok.training.losses import discriminator_loss, feature_loss, generator_loss, lecam_loss
from unitok.training.monitor import CodebookHealth
from unitok.training.shell import TrainingShell, weight_average

Losses = dict[str, Tensor]


def adamw(
    parameters: Iterable[torch.nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices and kernels only."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


@dataclass
class Adversary:
    """A tokenizer's discriminator, and the schedule of the adversarial loss.

    Args:
        weight: of the adversarial loss; 0 for no discriminator.
        loss: `hinge`, `least-squares` or `non-saturating`.
        adaptive: image tokenizers only; multiply the weight by taming's ratio of gradients at the decoder's last layer.
        feature_matching: weight of the L1 distance between the discriminator's features of originals and reconstructions.
        lecam: weight of LeCam regularization of the discriminator.
        start: fraction of the run at which the discriminator starts to learn.
        disc_only: fraction of the run for which the discriminator then learns alone.
        ramp: fraction of the run over which the weights of the adversarial losses then rise from 0.
        lr: learning rate of the discriminator.
        width: channels of the first layer of an image discriminator (PatchGAN).
        layers: its layers after the first.
        norm: its `group` or `batch` norm.
        filters: channels of an audio discriminator (multi-scale STFT).
        windows: of its STFTs, in samples.
    """

    weight: float = 0.02
    loss: Literal["hinge", "least-squares", "non-saturating"] = "hinge"
    adaptive: bool = False
    feature_matching: float = 0.0
    lecam: float = 0.0
    start: float = 0.85
    disc_only: float = 0.05
    ramp: float = 0.05
    lr: float = 5e-4
    width: int = 32
    layers: int = 2
    norm: Literal["group", "batch"] = "group"
    filters: int = 32
    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)


class Weights(Protocol):
    """Weights that the losses of image and audio tokenizers share."""

    l1: float
    l2: float
    commitment: float


class TokenizerTraining(TrainingShell[Tensor]):
    """Training of a tokenizer. A subclass builds the networks and defines the losses and the quality of a reconstruction.

    Args:
        quantize_start: fraction of the run after which latents are quantized.
        kmeans_batches: number of last batches before that from whose latents k-means starts the codebook.
        codebook_decay: decay per batch of the codebook's moving averages.
        show_every: steps between saved reconstructions, on disk and in TensorBoard; 0 for none.
    """

    saved_attributes: tuple[str, ...] = ("_recent",)
    config: ImageTokenizerConfig | AudioTokenizerConfig
    tokenizer: ImageTokenizer | AudioTokenizer
    weights: Weights
    lr: float
    health: CodebookHealth
    usual: Tensor  # moving averages of the discriminator's logits of originals and of reconstructions, for LeCam
    discriminator: PatchDiscriminator | STFTDiscriminator

    def __init__(
        self,
        config: ImageTokenizerConfig | AudioTokenizerConfig,
        gan: Adversary,
        *,
        lr: float = 1.5e-3,
        quantize_start: float = 0.1,
        kmeans_batches: int = 8,
        codebook_decay: float = 0.95,
        show_every: int = 500,
        **shared: Any,
    ):
        super().__init__(lr=lr, tokens=None, **shared)
        if not 0 <= quantize_start < 1:
            raise UserError(f"quantize_start {quantize_start}: a fraction of the run, from 0 to below 1")
        check_range("codebook_decay", codebook_decay, 0, 1)
        check_range("kmeans_batches", kmeans_batches, 1)
        check_range("gan.width", gan.width, 1)
        for name in ("start", "disc_only", "ramp"):
            check_range(f"gan.{name}", getattr(gan, name), 0, 1)
        for name in ("weight", "feature_matching", "lecam", "lr"):
            check_range(f"gan.{name}", getattr(gan, name), 0)
        self.config, self.gan, self.show_every = config, gan, show_every
        self.quantize_start, self.kmeans_batches, self.codebook_decay = quantize_start, kmeans_batches, codebook_decay
        self.adversarial_ramp = 0.0  # factor on the weights of the adversarial losses, from 0 to 1
        self._recent: list[Tensor] = []  # latents of the last batches before the codebook starts

    # ---- What a subclass defines ---------------------------------------------------------------------------------

    def build(self) -> None:
        """Set `tokenizer`, `health` and, where `gan` has a weight, `discriminator`."""
        raise NotImplementedError

    def reconstruction_losses(self, out: Tensor, target: Tensor) -> Losses:
        """Weighted losses of a reconstruction, by name, in fp32; losses of weight 0 are left out."""
        w, d = self.weights, out - target
        losses: Losses = {}
        if w.l1:
            losses["l1"] = w.l1 * d.abs().mean()
        if w.l2:
            losses["l2"] = w.l2 * d.square().mean()
        return losses

    def quantizer_losses(self, losses: Losses) -> Losses:
        """The quantizer's losses, weighted."""
        weights = {name: getattr(self.weights, name, 1.0) for name in losses}
        return {name: weights[name] * loss for name, loss in losses.items() if weights[name]}

    def further_losses(self, out: Reconstruction, semantic_target: Tensor | None) -> Losses:
        """Weighted losses of what a tokenizer gives beside its reconstruction."""
        return {}

    def trained(self) -> torch.nn.Module:
        """What the optimizer trains: the tokenizer, and what only serves its training."""
        return self.tokenizer

    def quality(self, out: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Metrics of a reconstruction."""
        raise NotImplementedError

    def show(self, name: str, target: Tensor, out: Tensor, step: int) -> None:
        """Save a few reconstructions with their originals under `name`, on disk and in TensorBoard."""
        raise NotImplementedError

    def adversarial_weight(self, losses: Losses, adversarial: Tensor) -> Tensor | float:
        """A factor on `gan.weight`."""
        return 1.0

    def backward_of(self, losses: Losses, out: Tensor, fraction: float) -> None:
        """Add the gradients of the losses of a part of the batch. fraction: size of the part."""
        (fraction * torch.stack(list(losses.values())).sum()).backward()

    # ---- Set-up --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build everything, once: Lightning calls this for each run of the Trainer."""
        if hasattr(self, "tokenizer"):
            return
        for name, value in vars(self.weights).items():
            if isinstance(value, float):
                check_range(f"losses.{name}", value, 0)
        self.build()
        if self.tokenizer.quantizer.ema_updated:
            self.tokenizer.quantizer.decay = self.codebook_decay
        if self.ema_decay:
            self.average = weight_average(self.tokenizer, self.ema_decay)
        if self.gan.weight:
            self.register_buffer("usual", torch.zeros(2))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers: list[torch.optim.Optimizer] = [adamw(self.trained().parameters(), self.lr, self.betas, self.weight_decay)]
        if self.gan.weight:
            optimizers.append(adamw(self.discriminator.parameters(), self.gan.lr, (0.5, 0.9), 0.0))
        return optimizers

    def structure(self) -> dict[str, object]:
        return super().structure() | {"discriminator": bool(self.gan.weight)}

    def quantizes_to_validate(self) -> bool:
        """Whether validation quantizes: not before training does, because there is no codebook yet."""
        return self.trainer.state.fn != "fit" or self.progress >= self.quantize_start

    # ---- One step ------------------------------------------------------------------------------------------------

    def optimize(self, batch: Tensor) -> dict[str, Tensor | float]:
        return self.step(batch)

    def step(self, batch: Tensor, semantic_target: Tensor | None = None) -> dict[str, Tensor | float]:
        """One step of the tokenizer, the codebook and, from `gan.start` on, the discriminator. semantic_target: for `further_losses`."""
        optimizers = self.optimizer_list()
        self.set_lr(optimizers[0], self.lr)
        quantize = self.progress >= self.quantize_start
        if quantize and not self.tokenizer.quantizer.started:
            self._start_codebook(batch)
        adversarial = bool(self.gan.weight) and self.progress >= self.gan.start
        for optimizer in optimizers:
            optimizer.zero_grad()
        terms: Losses = {}
        parts: list[Reconstruction] = []
        chunks = batch.chunk(self.accumulate_grad_batches)
        targets = [None] * len(chunks) if semantic_target is None else semantic_target.chunk(self.accumulate_grad_batches)
        for part, semantic in zip(chunks, targets, strict=True):
            fraction = len(part) / len(batch)
            out = self.tokenizer(part, quantize=quantize)
            for name, value in self._backward(part, semantic, out, fraction, adversarial).items():
                terms[name] = terms.get(name, 0) + fraction * value.detach()
            parts.append(out)
        logged: dict[str, Tensor | float] = {**self._step(optimizers, adversarial)}
        if adversarial:
            self.usual.lerp_(torch.stack([self.mean_over_processes(terms.pop(side)) for side in ("real", "fake")]), 0.01)
        signal = torch.cat([out.signal.detach().float() for out in parts])
        projected = [out.projected for out in parts if out.projected is not None]
        if projected:
            logged |= self._learn_codebook(torch.cat(projected), quantize)
        if codes := [out.codes for out in parts if out.codes is not None]:
            flat = torch.cat(codes).reshape(len(batch), self.tokenizer.quantizer.levels, -1)
            self.health.add(rearrange(flat, "b k n -> (b n) k"))
        if self.due(self.log_every):
            logged |= self._health()
        if self.average:
            self.average.update_parameters(self.tokenizer)
        if self.show_every and self.due(self.show_every) and self.trainer.is_global_zero:
            self.show("reconstructions", batch, signal, self.steps_done + 1)
        total = torch.stack([value for name, value in terms.items() if name != "discriminator"]).sum()
        named = {f"loss/{name}": value for name, value in terms.items()}
        return {"loss": total, **self.quality(signal, batch), **named, **logged}

    def _backward(
        self, target: Tensor, semantic_target: Tensor | None, out: Reconstruction, fraction: float, adversarial: bool
    ) -> Losses:
        """Add the gradients of a part of the batch. Returns its losses and, with `adversarial`, the mean logits `real` and `fake`."""
        signal = out.signal.float()
        with torch.autocast(target.device.type, enabled=False):
            losses = self.reconstruction_losses(signal, target) | self.quantizer_losses(out.losses)
            losses |= self.further_losses(out, semantic_target)
            if adversarial:
                losses |= self._adversarial_losses(signal, target, losses)
        self._check_finite(losses)
        self.backward_of(losses, signal, fraction)
        if adversarial:
            of_discriminator = self._discriminator_loss(target, signal.detach())
            (fraction * of_discriminator["discriminator"]).backward()
            losses |= of_discriminator
        return losses

    def _adversarial_losses(self, out: Tensor, target: Tensor, losses: Losses) -> Losses:
        """The adversarial losses of the tokenizer, ramping up; none while the discriminator learns alone."""
        self.adversarial_ramp = min(1.0, (self.progress - self.gan.start - self.gan.disc_only) / max(self.gan.ramp, 1e-6))
        if self.adversarial_ramp <= 0:
            return {}
        self.discriminator.requires_grad_(False)
        logits, features = self.discriminator.with_features(out)
        adversarial = generator_loss(logits, self.gan.loss)
        weight = self.gan.weight * self.adversarial_ramp * self.adversarial_weight(losses, adversarial)
        result = {"adversarial": weight * adversarial}
        if self.gan.feature_matching:
            with torch.no_grad():
                real = self.discriminator.with_features(target)[1]
            result["features"] = self.gan.feature_matching * self.adversarial_ramp * feature_loss(features, real)
        self.discriminator.requires_grad_(True)
        return result

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Losses:
        """The loss of the discriminator, and the means of its logits, which LeCam needs."""
        on_real, on_fake = self.discriminator(real), self.discriminator(fake)
        with torch.autocast(real.device.type, enabled=False):
            loss = discriminator_loss(on_real, on_fake, self.gan.loss)
            if self.gan.lecam:
                loss = loss + self.gan.lecam * lecam_loss(on_real, on_fake, self.usual[0], self.usual[1])
        self._check_finite({"discriminator": loss})
        return {"discriminator": loss, "real": _mean_logit(on_real), "fake": _mean_logit(on_fake)}

    def _step(self, optimizers: list[LightningOptimizer], adversarial: bool) -> dict[str, Tensor]:
        """Clip the gradients and step the tokenizer and, with `adversarial`, the discriminator. Returns the norms before clipping."""
        networks: list[tuple[str, torch.nn.Module]] = [("grad_norm", self.trained())]
        if adversarial:
            networks.append(("grad_norm/discriminator", self.discriminator))
        norms = {}
        for name, network in networks:
            self.average_gradients(network.parameters())
            norms[name] = torch.nn.utils.clip_grad_norm_(network.parameters(), self.grad_clip or math.inf)
        self._check_finite(norms)
        optimizers[0].step()
        if adversarial:
            optimizers[1].optimizer.step()  # not the wrapper, so that Lightning's `global_step` counts batches
        return norms

    def _check_finite(self, values: Mapping[str, Tensor]) -> None:
        finite = torch.stack([value.detach().float() for value in values.values()]).isfinite().tolist()
        bad = [name for name, good in zip(values, finite, strict=True) if not good]
        if bad:
            raise UserError(
                f"step {self.steps_done + 1}: not finite: {', '.join(bad)}; the last checkpoint has earlier weights; lower the "
                "learning rate or the weight of that loss"
            )

    # ---- Codebook ------------------------------------------------------------------------------------------------

    def _gather_vectors(self, projected: Tensor) -> Tensor:
        """[B, N, d] of each process -> [total, d] of all processes, the same in each, in the order that one process would have."""
        gathered = self.all_gather(projected.float())
        assert isinstance(gathered, Tensor)
        return rearrange(gathered.reshape(-1, *projected.shape), "p b n d -> (b p n) d")

    def _start_codebook(self, batch: Tensor) -> None:
        if not self._recent:  # no warm-up
            with torch.no_grad():
                outs = [self.tokenizer(part, quantize=False) for part in batch.chunk(self.accumulate_grad_batches)]
            self._recent = [self._gather_vectors(torch.cat([out.projected for out in outs]))]
        vectors = torch.cat([recent.to(batch.device) for recent in self._recent])
        self.tokenizer.quantizer.init_codebook(vectors, seed=self.steps_done)
        self._recent = []

    def _learn_codebook(self, projected: Tensor, quantized: bool) -> dict[str, float]:
        """Update a codebook that learns by moving averages, once per step, from the whole batch; before it starts, keep the vectors."""
        if not self.tokenizer.quantizer.ema_updated:
            return {}
        vectors = self._gather_vectors(projected)
        if quantized:
            return {"codebook_revived": float(self.tokenizer.quantizer.update(vectors, seed=self.steps_done))}
        self._recent = [*self._recent, vectors][-max(1, self.kmeans_batches) :]
        return {}

    def _health(self) -> dict[str, float]:
        """Metrics of the codebooks, by level; warns when a codebook is not used."""
        self.health.check(self.steps_done + 1, last=self.budget.over(self.steps_done + 1))
        levels = enumerate(self.health.statistics())
        return {f"codebook_{name}/{level}": value for level, row in levels for name, value in row.items()}

    def folder(self, name: str) -> Path:
        """A folder in the run's folder, made if need be."""
        folder = Path(self.trainer.default_root_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _mean_logit(logits: Tensor | list[Tensor]) -> Tensor:
    logits = logits if isinstance(logits, list) else [logits]
    return torch.stack([each.detach().float().mean() for each in logits]).mean()
