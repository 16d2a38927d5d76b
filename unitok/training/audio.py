"""The training of the audio tokenizer; its step is `TokenizerTraining`'s.

Optional: EnCodec's loss balancer (`losses.balance`; Defossez et al. 2022, section 3.4). Each loss's gradient at the waveform
is divided by the moving average of its norm, so that a weight is this loss's share of the gradient, whatever its scale.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from unitok.errors import UserError
from unitok.media import draw_spectrogram, save_audio, save_image
from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig
from unitok.training.discriminators import STFTDiscriminator
from unitok.training.losses import mel_loss, spectral_loss
from unitok.training.monitor import CodebookHealth
from unitok.training.shell import Sums
from unitok.training.tokenizer import Adversary, Losses, TokenizerTraining

SHOWN_SOUNDS = 4


@dataclass
class AudioLosses:
    """Weights of the losses of an audio tokenizer; 0 leaves one out.

    Args:
        l1: absolute difference of samples. l2: squared difference of samples.
        stft: multi-resolution STFT loss (`spectral_loss`). stft_windows: its windows, samples.
        mel: multi-scale log-mel loss (`mel_loss`). mel_windows: its windows, samples.
        spectral_from: share of the run at which `stft` and `mel` begin: from the start they can lead to silence.
        commitment: latents stay near their codes.
        balance: weights are shares of the gradient at the waveform (EnCodec's balancer); `commitment` stays outside.
        balance_decay: of the moving averages of the gradients' norms.
    """

    l1: float = 0.1
    l2: float = 0.0
    stft: float = 0.0
    stft_windows: tuple[int, ...] = (128, 512, 1024)
    mel: float = 1.0
    mel_windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    spectral_from: float = 0.0
    commitment: float = 0.25
    balance: bool = False
    balance_decay: float = 0.999


#: The discriminator of audio, off unless it is given a weight.
QUIET = Adversary(weight=0.0, feature_matching=1.0, start=0.1, disc_only=0.02, lr=3e-4)


class AudioTokenizerTraining(TokenizerTraining):
    """Trains an audio tokenizer on [B, C, T] in [-1, 1].

    Args:
        tokenizer: architecture.
        losses: weights of the losses.
        gan: the discriminator.
        sounds_every: steps between reconstructions and their spectrograms, on disk and in TensorBoard; 0 for none.
    """

    kind = "audio tokenizer"
    kept = ("_recent", "_norms")
    shown = ("snr_db", "codebook_usage/0", "codebook_perplexity/0", "codebook_revived", "gradient_norm")

    def __init__(
        self,
        tokenizer: AudioTokenizerConfig,
        losses: AudioLosses = AudioLosses(),  # noqa: B008 (jsonargparse reads the defaults from here)
        gan: Adversary = QUIET,
        *,
        quantize_start: float = 0.15,
        sounds_every: int = 500,
        **shared: Any,
    ):
        super().__init__(config=tokenizer, gan=gan, quantize_start=quantize_start, show_every=sounds_every, **shared)
        self.weights = losses
        self._norms: dict[str, tuple[Tensor, float]] = {}  # of gradients at the waveform: weighted sum, sum of weights
        self._seen: dict[str, Any] = {}  # the same of the step's parts so far

    def build(self) -> None:
        for name in ("sample_rate", "channels"):
            given, wanted = getattr(self.data, name, None), getattr(self.config, name)
            if given not in (None, wanted):
                raise UserError(f"the data has {name} {given}, the tokenizer {wanted}: they must agree")
        self.tokenizer = AudioTokenizer(self.config)
        self.health = CodebookHealth("rvq", self.tokenizer.codebook_size)
        if self.gan.weight:
            self.discriminator = STFTDiscriminator(self.config.channels, self.gan.filters, tuple(self.gan.windows))

    def reconstruction_losses(self, out: Tensor, target: Tensor) -> Losses:
        """Waveform, log-mel and STFT losses of [B, C, T]."""
        w, losses = self.weights, super().reconstruction_losses(out, target)
        if self.share >= w.spectral_from:
            if w.stft:
                losses["stft"] = w.stft * spectral_loss(out, target, tuple(w.stft_windows))
            if w.mel:
                losses["mel"] = w.mel * mel_loss(out, target, self.config.sample_rate, tuple(w.mel_windows))
        return losses

    def quality(self, out: Tensor, target: Tensor) -> dict[str, Tensor]:
        error = (out - target).square().mean().clamp_min(1e-10)
        return {"snr_db": 10 * torch.log10(target.square().mean().clamp_min(1e-10) / error)}

    def backward_of(self, losses: Losses, out: Tensor, share: float) -> None:
        """With the balancer each item's gradient is, for each loss, of the length of its share of the weights."""
        if not self.weights.balance:
            super().backward_of(losses, out, share)
            return
        w, heard = self.weights, self.heard
        weights = {"l1": w.l1, "l2": w.l2, "stft": w.stft, "mel": w.mel}
        weights |= {"adversarial": heard * self.gan.weight, "features": heard * self.gan.feature_matching}
        at_waveform = {name: value for name, value in losses.items() if name in weights}
        total = sum(weights[name] for name in at_waveform)
        gradient = torch.zeros_like(out)
        for name, value in at_waveform.items():
            (g,) = torch.autograd.grad(value, out, retain_graph=True)
            g = g * (len(out) / weights[name])  # of one item and of weight 1, however large the part and far the ramp
            norm = g.flatten(1).norm(dim=1).mean()
            self._seen[name] = self._seen.get(name, 0) + share * norm
            before = self._norms.get(name)
            usual = before[0] / before[1] if before else norm
            gradient += (weights[name] / total) * g / (usual + 1e-12)
        rest = [value for name, value in losses.items() if name not in weights]
        if rest:
            (share * torch.stack(rest).sum()).backward(retain_graph=True)
        out.backward(share / len(out) * gradient)

    def _step(self, optimizers: list[Any], judged: bool) -> dict[str, Tensor]:
        for name, norm in self._seen.items():
            total, weight = self._norms.get(name, (torch.zeros_like(norm), 0.0))
            decay = self.weights.balance_decay
            self._norms[name] = (total.to(norm) * decay + self.mean_everywhere(norm), weight * decay + 1.0)
        self._seen = {}
        return super()._step(optimizers, judged)

    def show(self, name: str, target: Tensor, out: Tensor, step: int) -> None:
        """Originals and reconstructions one after the other as WAV; their spectrograms, originals above, as PNG."""
        pairs = list(zip(target[:SHOWN_SOUNDS].float().cpu(), out[:SHOWN_SOUNDS].float().clamp(-1, 1).cpu(), strict=True))
        rate = self.config.sample_rate
        heard = torch.cat([torch.cat(pair, -1) for pair in pairs], -1)
        rows = [torch.cat([draw_spectrogram(pair[i], rate) for pair in pairs], -1) for i in (0, 1)]
        seen = torch.cat(rows, -2)
        folder = self.folder(name)
        save_audio(folder / f"step-{step:07d}.wav", heard, rate)
        save_image(folder / f"step-{step:07d}.png", seen)
        for board in self.boards:
            board.add_audio(name, heard.mean(0, keepdim=True), step, sample_rate=rate)
            board.add_image(f"{name}-spectrograms", (seen + 1) / 2, step)

    def measure(self, samples: Tensor, show: bool) -> Sums:
        """SI-SDR of [B, C, T] by number of levels, and with all of them."""
        tokenizer = self.averaged(self.tokenizer)
        if not self.quantizes_to_validate():
            found = {"si_sdr_db": tokenizer(samples, quantize=False).signal}
        else:
            codes, scales = tokenizer.encode(samples), tokenizer.scales(samples)
            levels = codes.shape[1]
            outs = [tokenizer.decode(codes[:, : k + 1], samples.shape[-1], scales) for k in range(levels)]
            found = {"si_sdr_db": outs[-1]} | {f"si_sdr_db_{k + 1}": out for k, out in enumerate(outs)}
        if show:
            self.show("validation", samples, found["si_sdr_db"], self.steps_done)
        quality = {
            name: scale_invariant_signal_distortion_ratio(out.float(), samples, zero_mean=True).clamp(-50, 100)
            for name, out in found.items()
        }
        return {name: (value.sum(), value.numel()) for name, value in quality.items()}
