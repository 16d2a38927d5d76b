"""What the trainings of the image and the audio tokenizer share: one step, the codebook's life, the discriminator's.

Both warm up without quantization, so that the codebook starts, by k-means, from an encoder that already says something.
Losses are summed by name; every term logged is a term optimized. A step may go through its batch in parts (`accumulate_grad_batches`),
and processes share it; the codebook learns from the whole batch, once. The discriminator costs nothing before `gan.start`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from unitok.errors import UserError
from unitok.training.losses import discriminator_loss, feature_loss, generator_loss, lecam_loss
from unitok.training.monitor import CodebookHealth
from unitok.training.shell import TrainingShell, weight_average

Losses = dict[str, Tensor]


def adamw(parameters: Iterable[torch.nn.Parameter], rate: float, betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
    """AdamW, fused, with decay on matrices and kernels only."""
    kept = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in kept if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in kept if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


@dataclass
class Adversary:
    """A tokenizer's discriminator, and when and how the generator hears of it.

    Args:
        weight: of the adversarial loss, 0 for no discriminator.
        loss: `hinge`, `least-squares` or `non-saturating`.
        adaptive: of an image tokenizer, multiply the weight by taming's ratio of gradients at the decoder's last layer.
        feature_matching: weight of the distance of the discriminator's inner features.
        lecam: weight of its LeCam regularisation.
        start: share of the run at which it starts to learn.
        disc_only: share of the run it then learns alone.
        ramp: share of the run over which the generator's weight rises from 0.
        lr: its own.
        width: channels of the first layer, of images' (PatchGAN).
        layers: its strided layers after the first.
        norm: its `group` or `batch` norm.
        filters: channels of audio's (multi-scale STFT).
        windows: of its STFTs, samples.
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


class TokenizerTraining(TrainingShell):
    """A tokenizer's training; a subclass builds the networks and says what a reconstruction's losses and quality are.

    Args:
        quantize_start: share of the run after which codes are used.
        kmeans_batches: batches before that from whose latents the codebook starts.
        codebook_decay: of the codebook's moving averages, per batch.
        show_every: steps between reconstructions to look at or listen to, on disk and in TensorBoard; 0 for none.
    """

    kept: tuple[str, ...] = ("_recent",)
    tokenizer: Any
    weights: Any  # of the losses
    health: CodebookHealth
    usual: Tensor  # moving averages of the discriminator's logits on originals and on reconstructions, for LeCam
    discriminator: Any

    def __init__(
        self,
        config: Any,
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
        self.config, self.gan, self.show_every = config, gan, show_every
        self.quantize_start, self.kmeans_batches, self.codebook_decay = quantize_start, kmeans_batches, codebook_decay
        self.heard = 0.0  # how much of its weight the adversarial loss has by now
        self._recent: list[Tensor] = []  # latents of the last batches before the codebook starts

    # ---- What a subclass says ------------------------------------------------------------------------------------

    def build(self) -> None:
        """Set `tokenizer`, `health` and, where `gan` has a weight, `discriminator`."""
        raise NotImplementedError

    def reconstruction_losses(self, out: Tensor, target: Tensor) -> Losses:
        """Losses of a reconstruction, weighted, by name; what weighs nothing is left out. In fp32."""
        w, d = self.weights, out - target
        losses: Losses = {}
        if w.l1:
            losses["l1"] = w.l1 * d.abs().mean()
        if w.l2:
            losses["l2"] = w.l2 * d.square().mean()
        return losses

    def quantizer_losses(self, losses: Losses) -> Losses:
        """The quantizer's own, weighted."""
        weights = {name: getattr(self.weights, name, 1.0) for name in losses}
        return {name: weights[name] * loss for name, loss in losses.items() if weights[name]}

    def quality(self, out: Tensor, target: Tensor) -> dict[str, Tensor]:
        """How good a reconstruction is."""
        raise NotImplementedError

    def show(self, name: str, target: Tensor, out: Tensor, step: int) -> None:
        """Put a few reconstructions beside their originals, under `name`, on the disk and into TensorBoard."""
        raise NotImplementedError

    def adversarial_weight(self, losses: Losses, adversarial: Tensor) -> Tensor | float:
        """A factor on `gan.weight`."""
        return 1.0

    def backward_of(self, losses: Losses, out: Tensor, share: float) -> None:
        """Gradients of the losses of a part of the batch, which is `share` of it."""
        (share * torch.stack(list(losses.values())).sum()).backward()

    # ---- Set-up --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build everything, once: Lightning asks for each run of the Trainer."""
        if hasattr(self, "tokenizer"):
            return
        self.build()
        if self.tokenizer.quantizer.ema_updated:
            self.tokenizer.quantizer.decay = self.codebook_decay
        if self.ema_decay:
            self.average = weight_average(self.tokenizer, self.ema_decay)
        if self.gan.weight:
            self.register_buffer("usual", torch.zeros(2))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers: list[torch.optim.Optimizer] = [adamw(self.tokenizer.parameters(), self.lr, self.betas, self.weight_decay)]
        if self.gan.weight:
            optimizers.append(adamw(self.discriminator.parameters(), self.gan.lr, (0.5, 0.9), 0.0))
        return optimizers

    def structure(self) -> dict[str, Any]:
        return super().structure() | {"discriminator": bool(self.gan.weight)}

    def quantizes_to_validate(self) -> bool:
        """Not before training does: until then there is no codebook."""
        return self.trainer.state.fn != "fit" or self.share >= self.quantize_start

    # ---- One step ------------------------------------------------------------------------------------------------

    def optimize(self, batch: Tensor) -> dict[str, Tensor | float]:
        """One batch: the tokenizer's step, the codebook's, and the discriminator's where there is one."""
        optimizers = self.optimizer_list()
        self.set_rate(optimizers[0], self.lr)
        quantize = self.share >= self.quantize_start
        if quantize and not self.tokenizer.quantizer.started:
            self._start_codebook(batch)
        judged = bool(self.gan.weight) and self.share >= self.gan.start
        for optimizer in optimizers:
            optimizer.zero_grad()
        terms: Losses = {}
        pieces, outs = batch.chunk(self.accumulate_grad_batches), []
        for piece in pieces:
            share = len(piece) / len(batch)
            out = self.tokenizer(piece, quantize=quantize)
            signal = out.signal.float()
            with torch.autocast(batch.device.type, enabled=False):
                losses = self.reconstruction_losses(signal, piece) | self.quantizer_losses(out.losses)
                if judged:
                    losses |= self._adversarial_losses(signal, piece, losses)
            self._check_finite(losses)
            self.backward_of(losses, signal, share)
            if judged:
                judgement = self._judge(piece, signal.detach())
                (share * judgement["discriminator"]).backward()
                losses |= judgement
            for name, value in losses.items():
                terms[name] = terms.get(name, 0) + share * value.detach()
            outs.append(out)
        logged: dict[str, Tensor | float] = {**self._step(optimizers, judged)}
        if judged:
            self.usual.lerp_(torch.stack([self.mean_everywhere(terms.pop(side)) for side in ("real", "fake")]), 0.01)
        signal = torch.cat([out.signal.detach().float() for out in outs])
        if outs[0].projected is not None:
            logged |= self._learn_codebook(torch.cat([out.projected for out in outs]), quantize)
        if quantize:
            codes = torch.cat([out.codes for out in outs])
            self.health.add(rearrange(codes.reshape(len(codes), self.tokenizer.quantizer.levels, -1), "b k n -> (b n) k"))
        if self.due(self.log_every):
            logged |= self._health()
        if self.average:
            self.average.update_parameters(self.tokenizer)
        if self.show_every and self.due(self.show_every) and self.trainer.is_global_zero:
            self.show("reconstructions", batch, signal, self.steps_done + 1)
        of_generator = [value for name, value in terms.items() if name != "discriminator"]
        return {"loss": torch.stack(of_generator).sum(), **self.quality(signal, batch), **terms, **logged}

    def _adversarial_losses(self, out: Tensor, target: Tensor, losses: Losses) -> Losses:
        """What the discriminator says to the generator, ramping in; nothing while it learns alone."""
        self.heard = min(1.0, (self.share - self.gan.start - self.gan.disc_only) / max(self.gan.ramp, 1e-6))
        if self.heard <= 0:
            return {}
        self.discriminator.requires_grad_(False)
        logits, features = self.discriminator.with_features(out)
        adversarial = generator_loss(logits, self.gan.loss)
        weight = self.gan.weight * self.heard * self.adversarial_weight(losses, adversarial)
        found = {"adversarial": weight * adversarial}
        if self.gan.feature_matching:
            with torch.no_grad():
                real = self.discriminator.with_features(target)[1]
            found["features"] = self.gan.feature_matching * self.heard * feature_loss(features, real)
        self.discriminator.requires_grad_(True)
        return found

    def _judge(self, real: Tensor, fake: Tensor) -> Losses:
        """The discriminator's loss; and the means of its logits, for LeCam."""
        on_real, on_fake = self.discriminator(real), self.discriminator(fake)
        with torch.autocast(real.device.type, enabled=False):
            loss = discriminator_loss(on_real, on_fake, self.gan.loss)
            if self.gan.lecam:
                loss = loss + self.gan.lecam * lecam_loss(on_real, on_fake, self.usual[0], self.usual[1])
        self._check_finite({"discriminator": loss})
        return {"discriminator": loss, "real": _mean_logit(on_real), "fake": _mean_logit(on_fake)}

    def _step(self, optimizers: list[Any], judged: bool) -> dict[str, Tensor]:
        """Clip and step the generator and, if it judged, the discriminator; -> norms of their gradients."""
        networks: list[tuple[str, torch.nn.Module]] = [("gradient_norm", self.tokenizer)]
        if judged:
            networks.append(("gradient_norm_discriminator", self.discriminator))
        norms = {}
        for name, network in networks:
            self.average_gradients(network.parameters())
            norms[name] = torch.nn.utils.clip_grad_norm_(network.parameters(), self.grad_clip or math.inf)
        self._check_finite(norms)
        optimizers[0].step()
        if judged:
            optimizers[1].optimizer.step()  # the raw one, so that Lightning's `global_step` counts batches
        return norms

    def _check_finite(self, losses: Losses) -> None:
        finite = torch.stack([value.detach().float() for value in losses.values()]).isfinite().tolist()
        bad = [name for name, good in zip(losses, finite, strict=True) if not good]
        if bad:
            raise UserError(
                f"step {self.steps_done + 1}: not a finite number: {', '.join(bad)}; the weights of the step before are in the "
                "last checkpoint; lower the learning rate or the weight of that loss"
            )

    # ---- Codebook ------------------------------------------------------------------------------------------------

    def _gather(self, low: Tensor) -> Tensor:
        """[B, N, d] of every process -> [all of them, d], the same everywhere, in the order that one process would have."""
        everywhere: Any = self.all_gather(low.float())
        return rearrange(everywhere.reshape(-1, *low.shape), "p b n d -> (b p n) d")

    def _start_codebook(self, batch: Tensor) -> None:
        if not self._recent:  # no warm-up
            with torch.no_grad():
                lows = [self.tokenizer(piece, quantize=False).projected for piece in batch.chunk(self.accumulate_grad_batches)]
            self._recent = [self._gather(torch.cat(lows))]
        self.tokenizer.quantizer.init_codebook(torch.cat([low.to(batch.device) for low in self._recent]), seed=self.steps_done)
        self._recent = []

    def _learn_codebook(self, low: Tensor, quantized: bool) -> dict[str, float]:
        """Once a batch, from all of it."""
        if not self.tokenizer.quantizer.ema_updated:
            return {}
        vectors = self._gather(low)
        if quantized:
            return {"codebook_revived": float(self.tokenizer.quantizer.update(vectors, seed=self.steps_done))}
        self._recent = [*self._recent, vectors][-max(1, self.kmeans_batches) :]
        return {}

    def _health(self) -> dict[str, float]:
        """What to log of the codebooks, by level; sounds the alarm."""
        self.health.check(self.steps_done + 1, last=self.budget.over(self.steps_done + 1))
        found = enumerate(self.health.statistics())
        return {f"codebook_{name}/{level}": value for level, row in found for name, value in row.items()}

    def folder(self, name: str) -> Path:
        """A folder of the run."""
        folder = Path(self.trainer.default_root_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _mean_logit(logits: Tensor | list[Tensor]) -> Tensor:
    logits = logits if isinstance(logits, list) else [logits]
    return torch.stack([each.detach().float().mean() for each in logits]).mean()
