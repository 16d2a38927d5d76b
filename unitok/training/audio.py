"""The training of the audio tokenizer; its step is that of `TokenizerTraining`.

Optional: EnCodec's loss balancer (`losses.balance`; Defossez et al. 2022, section 3.4). It divides each loss's gradient at the waveform
by the moving average of its norm, so a weight is the loss's fraction of the gradient, whatever the scale of the loss.
"""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from unitok.errors import UserError
from unitok.media import draw_spectrogram, save_audio, save_image
from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig
from unitok.tokenizers.base import Reconstruction
from unitok.training.clusters import FeatureDistillation, PhoneClusters
from unitok.training.discriminators import STFTDiscriminator
from unitok.training.losses import mel_loss, spectral_loss
from unitok.training.monitor import CodebookHealth
from unitok.training.shell import Sums
from unitok.training.tokenizer import Adversary, Losses, TokenizerTraining

SHOWN = 4  # reconstructions of a batch that are saved


@dataclass
class AudioLosses:
    """Weights of the losses of an audio tokenizer; a loss of weight 0 is left out.

    Args:
        l1: absolute difference of samples. l2: squared difference of samples.
        stft: multi-resolution STFT loss (`spectral_loss`). stft_windows: its windows, in samples.
        mel: multi-scale log-mel loss (`mel_loss`). mel_windows: its windows, in samples.
        spectral_from: fraction of the run at which `stft` and `mel` begin; from the start they can lead to silence.
        commitment: distance of latents from their codes.
        semantic: what is spoken, given the code of the first level alone; so that level says that, and the others the rest. Of a teacher
            if the data has `features` (`FeatureDistillation`), else cross-entropy of the cluster of each frame's MFCCs (`PhoneClusters`).
            semantic_clusters: number of clusters. semantic_classes: the features are probabilities of classes (phones, say), of which
            the cross-entropy is taken.
        balance: weights are fractions of the gradient at the waveform (EnCodec's balancer), except for `commitment` and `semantic`.
        balance_decay: decay of the moving averages of gradient norms.
    """

    l1: float = 0.1
    l2: float = 0.0
    stft: float = 0.0
    stft_windows: tuple[int, ...] = (128, 512, 1024)
    mel: float = 1.0
    mel_windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    spectral_from: float = 0.0
    commitment: float = 0.25
    semantic: float = 0.0
    semantic_clusters: int = 128
    semantic_classes: bool = False
    balance: bool = False
    balance_decay: float = 0.999


#: The default discriminator of audio, which is off until it is given a weight.
NO_DISCRIMINATOR = Adversary(weight=0.0, feature_matching=1.0, start=0.1, disc_only=0.02, lr=3e-4)


class AudioTokenizerTraining(TokenizerTraining):
    """Training of an audio tokenizer on audio [B, C, T] in [-1, 1].

    Args:
        tokenizer: architecture.
        losses: weights of the losses.
        gan: the discriminator and its schedule.
        audio_every: steps between saved reconstructions and spectrograms, on disk and in TensorBoard; 0 for none.
    """

    kind = "audio tokenizer"
    config: AudioTokenizerConfig
    tokenizer: AudioTokenizer
    weights: AudioLosses
    saved_attributes = ("_recent", "_norms")
    progress_bar_metrics = ("snr_db", "codebook_usage/0", "codebook_perplexity/0", "codebook_revived", "grad_norm")

    def __init__(
        self,
        tokenizer: AudioTokenizerConfig,
        losses: AudioLosses = AudioLosses(),  # noqa: B008 (jsonargparse reads the defaults from here)
        gan: Adversary = NO_DISCRIMINATOR,
        *,
        quantize_start: float = 0.15,
        audio_every: int = 500,
        **shared: Any,
    ):
        super().__init__(config=tokenizer, gan=gan, quantize_start=quantize_start, show_every=audio_every, **shared)
        self.weights = losses
        self.semantic: FeatureDistillation | PhoneClusters | None = None  # in a run that trains
        self._norms: dict[str, tuple[Tensor, float]] = {}  # of gradients at the waveform: weighted sum, sum of weights
        self._step_norms: dict[str, Tensor] = {}  # norms of the parts of the present step

    def build(self) -> None:
        for name in ("sample_rate", "channels"):
            of_data, of_tokenizer = getattr(self.data, name, None), getattr(self.config, name)
            if of_data not in (None, of_tokenizer):
                raise UserError(f"the data has {name} {of_data}, the tokenizer {of_tokenizer}: they must agree")
        w = self.weights
        if not (w.l1 or w.l2 or ((w.stft or w.mel) and not w.spectral_from)):
            begin = (
                f", or let stft and mel begin at once (spectral_from {w.spectral_from:g})"
                if w.stft or w.mel
                else ", stft or mel"
            )
            raise UserError(f"losses: nothing compares the audio from the first step on; give l1 or l2 a weight{begin}")
        self.tokenizer = AudioTokenizer(self.config)
        self.health = CodebookHealth(self.config.quantizer, self.tokenizer.codebook_size)
        if getattr(self.data, "features", None) and not self.weights.semantic:
            raise UserError("data.features are for losses.semantic: give it a weight, or leave the features out")
        if self.weights.semantic_classes and not getattr(self.data, "features", None):
            raise UserError("losses.semantic_classes: data.features has their probabilities; give it, or leave the classes out")
        fit = self.trainer.state.fn == "fit"
        self.semantic = self._build_semantic() if self.weights.semantic and fit else None
        if self.gan.weight:
            self.discriminator = STFTDiscriminator(self.config.channels, self.gan.filters, tuple(self.gan.windows))

    def _build_semantic(self) -> FeatureDistillation | PhoneClusters:
        c, hop = self.config, self.tokenizer.hop_length
        data: Any = self.data
        if getattr(data, "features", None):
            return FeatureDistillation(c.dimension, data.feature_size(), hop / c.sample_rate, self.weights.semantic_classes)
        if not self.quantize_start:
            raise UserError("losses.semantic needs quantize_start above 0: its clusters are learned until quantization begins")
        return PhoneClusters(c.sample_rate, hop, c.dimension, self.weights.semantic_clusters)

    def reconstruction_losses(self, out: Tensor, target: Tensor) -> Losses:
        """Waveform, log-mel and STFT losses of audio [B, C, T]."""
        w, losses = self.weights, super().reconstruction_losses(out, target)
        if self.progress >= w.spectral_from:
            if w.stft:
                losses["stft"] = w.stft * spectral_loss(out, target, tuple(w.stft_windows))
            if w.mel:
                losses["mel"] = w.mel * mel_loss(out, target, self.config.sample_rate, tuple(w.mel_windows))
        return losses

    def structure(self) -> dict[str, object]:
        semantic = self.semantic
        size = semantic.head.out_features if isinstance(semantic, FeatureDistillation) else 0
        clusters = semantic.head.out_features if isinstance(semantic, PhoneClusters) else 0
        return super().structure() | {"features": size, "semantic_clusters": clusters}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.semantic is None:  # it only serves training
            for name in [name for name in checkpoint["state_dict"] if name.startswith("semantic.")]:
                del checkpoint["state_dict"][name]

    def trained(self) -> nn.Module:
        return self.tokenizer if self.semantic is None else nn.ModuleList([self.tokenizer, self.semantic.head])

    def optimize(self, batch: Tensor | dict[str, Tensor]) -> dict[str, Tensor | float]:
        if isinstance(batch, dict):
            return self.step(batch["samples"], batch["features"])
        if isinstance(self.semantic, PhoneClusters) and self.progress < self.quantize_start:  # afterwards they stay as they are
            self.semantic.learn(self._gather_vectors(self.semantic.features(batch)), seed=self.steps_done)
        return self.step(batch, batch)

    def further_losses(self, out: Reconstruction, semantic_target: Tensor | None) -> Losses:
        if self.semantic is None or out.first is None or semantic_target is None:
            return {}
        return {"semantic": self.weights.semantic * self.semantic.loss(out.first, semantic_target)}

    def quality(self, out: Tensor, target: Tensor) -> dict[str, Tensor]:
        error = (out - target).square().mean().clamp_min(1e-10)
        return {"snr_db": 10 * torch.log10(target.square().mean().clamp_min(1e-10) / error)}

    def backward_of(self, losses: Losses, out: Tensor, fraction: float) -> None:
        """With the balancer, the norm of a loss's gradient for each item is the loss's fraction of the weights."""
        if not self.weights.balance:
            super().backward_of(losses, out, fraction)
            return
        w, ramp = self.weights, self.adversarial_ramp
        weights = {"l1": w.l1, "l2": w.l2, "stft": w.stft, "mel": w.mel}
        weights |= {"adversarial": ramp * self.gan.weight, "features": ramp * self.gan.feature_matching}
        at_waveform = {name: value for name, value in losses.items() if name in weights}
        total = sum(weights[name] for name in at_waveform)
        gradient = torch.zeros_like(out)
        for name, value in at_waveform.items():
            (g,) = torch.autograd.grad(value, out, retain_graph=True)
            g = g * (
                len(out) / weights[name]
            )  # of one item, with weight 1: independent of the size of the part and of the ramp
            norm = g.flatten(1).norm(dim=1).mean()
            self._step_norms[name] = self._step_norms.get(name, 0) + fraction * norm
            before = self._norms.get(name)
            usual = before[0] / before[1] if before else norm
            gradient += (weights[name] / total) * g / (usual + 1e-12)
        rest = [value for name, value in losses.items() if name not in weights]
        if rest:
            (fraction * torch.stack(rest).sum()).backward(retain_graph=True)
        out.backward(fraction / len(out) * gradient)

    def _step(self, optimizers: list[LightningOptimizer], adversarial: bool) -> dict[str, Tensor]:
        for name, norm in self._step_norms.items():
            total, weight = self._norms.get(name, (torch.zeros_like(norm), 0.0))
            decay = self.weights.balance_decay
            self._norms[name] = (total.to(norm) * decay + self.mean_over_processes(norm), weight * decay + 1.0)
        self._step_norms = {}
        return super()._step(optimizers, adversarial)

    def show(self, name: str, target: Tensor, out: Tensor, step: int) -> None:
        """Save originals and reconstructions in turn as WAV, and their spectrograms as PNG, originals above."""
        pairs = list(zip(target[:SHOWN].float().cpu(), out[:SHOWN].float().clamp(-1, 1).cpu(), strict=True))
        sample_rate = self.config.sample_rate
        samples = torch.cat([torch.cat(pair, -1) for pair in pairs], -1)
        rows = [torch.cat([draw_spectrogram(pair[i], sample_rate) for pair in pairs], -1) for i in (0, 1)]
        image = torch.cat(rows, -2)
        folder = self.folder(name)
        save_audio(folder / f"step-{step:07d}.wav", samples, sample_rate)
        save_image(folder / f"step-{step:07d}.png", image)
        for board in self.boards:
            board.add_audio(name, samples.mean(0, keepdim=True), step, sample_rate=sample_rate)
            board.add_image(f"{name}-spectrograms", (image + 1) / 2, step)

    def measure(self, samples: Tensor, show: bool) -> Sums:
        """SI-SDR of reconstructions of audio [B, C, T] in dB, with all levels, and by the number of levels."""
        tokenizer = self.averaged(self.tokenizer)
        assert isinstance(tokenizer, AudioTokenizer)
        if not self.quantizes_to_validate():
            outs = {"si_sdr_db": tokenizer(samples, quantize=False).signal}
        else:
            codes, scales = tokenizer.encode(samples), tokenizer.scales(samples)
            by_levels = [tokenizer.decode(codes[:, : k + 1], samples.shape[-1], scales) for k in range(codes.shape[1])]
            outs = {"si_sdr_db": by_levels[-1]} | {f"si_sdr_db/{k + 1}": out for k, out in enumerate(by_levels)}
        if show:
            self.show("validation", samples, outs["si_sdr_db"], self.steps_done)
        quality = {
            name: scale_invariant_signal_distortion_ratio(out.float(), samples, zero_mean=True).clamp(-50, 100)
            for name, out in outs.items()
        }
        return {name: (value.sum(), value.numel()) for name, value in quality.items()}
