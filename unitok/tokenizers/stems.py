"""What the networks of an audio codec see: patches of samples, or spectra.

A stem turns a waveform into frames, one per `patch` samples, and a head turns frames back. The frames of patches are the samples
themselves. The frames of spectra are log magnitudes of an STFT on the way in, and magnitudes and phases on the way out (Siuzdak 2023,
"Vocos"). A codec with spectral losses then need not learn a Fourier transform first: its speech is intelligible after minutes of
training (docs/notes.md).
"""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unitok.tokenizers.config import AudioTokenizerConfig

#: What each layer keeps between the pieces of a stream: the end of its input, or the hidden states of an LSTM.
State: TypeAlias = dict[nn.Module, tuple[Tensor, ...]]

OVERLAP = 4  # frames that a window of the STFT covers
GAIN = 1.5  # sum of the squares of Hann windows with that overlap
QUIETEST = 1e-6  # power that is added before the logarithm
LOUDNESS = -3.0  # log magnitude that a head which knows nothing gives: about the loudness of speech
LOUDEST = 5.0  # largest log magnitude


class PatchStem(nn.Module):
    """Audio [B, channels, T] -> patches [B, width, ceil(T / patch)], the last one padded with zeros; width = channels * patch."""

    reach = 0  # samples that a frame depends on beyond its own

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.patch, self.width = config.patch, config.channels * config.patch

    def forward(self, x: Tensor) -> Tensor:
        return self._frames(F.pad(x, (0, -x.shape[-1] % self.patch)))

    def stream(self, x: Tensor, state: State, last: bool) -> Tensor:
        """Return the frames that are complete with the next samples [B, channels, t]; with the `last` ones all that remain."""
        x = torch.cat([*state[self], x], -1) if self in state else F.pad(x, (self.reach, 0))
        x = F.pad(x, (0, -(x.shape[-1] - self.reach) % self.patch)) if last else x
        whole = x.shape[-1] - (x.shape[-1] - self.reach) % self.patch
        state[self] = (x[..., whole - self.reach :].clone(),)
        return self._frames(x[..., :whole])

    def _frames(self, x: Tensor) -> Tensor:
        """[B, channels, reach + n * patch] -> [B, width, n]."""
        return rearrange(x, "b c (n p) -> b (c p) n", p=self.patch)


class PatchHead(nn.Module):
    """Patches [B, width, N] -> audio [B, channels, N * patch]; `width` = channels * patch."""

    reach = 0

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.patch, self.width = config.patch, config.channels * config.patch

    def forward(self, y: Tensor) -> Tensor:
        return rearrange(y, "b (c p) n -> b c (n p)", p=self.patch)

    def stream(self, y: Tensor, state: State, last: bool) -> Tensor:
        """Return the samples [B, channels, t] that are complete with the next frames; with the `last` ones all that remain."""
        return self(y)


class SpectrumStem(PatchStem):
    """Audio [B, channels, T] -> log magnitudes [B, width, ceil(T / patch)]; `width` = channels * (2 * patch + 1).

    Windows of four patches around each one; causal ones end with it.
    """

    hann: Tensor

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__(config)
        self.window, self.causal = OVERLAP * config.patch, config.causal
        self.width, self.reach = config.channels * (self.window // 2 + 1), self.window - config.patch
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        right = 0 if self.causal else self.reach // 2
        return self._frames(F.pad(x, (self.reach - right, right - x.shape[-1] % -self.patch)))

    def _frames(self, x: Tensor) -> Tensor:
        if x.shape[-1] < self.window:
            return x.new_zeros(len(x), self.width, 0)
        spectrum = torch.fft.rfft(x.float().unfold(-1, self.window, self.patch) * self.hann, norm="ortho")
        power = spectrum.real.square() + spectrum.imag.square()
        return rearrange((power + QUIETEST).log() / 4 + 1, "b c n f -> b (c f) n").to(x.dtype)


class SpectrumHead(PatchHead):
    """Log magnitudes and phases [B, width, N] -> audio [B, channels, N * patch]; `width` = channels * (4 * patch + 2).

    The frames' inverse transforms are windowed and added; nothing divides by the windows, so the first and last frames fade. A window is
    around its frame's patch; in causal models it ends with the patch, as in the stem, so samples are complete three patches later.
    """

    hann: Tensor

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__(config)
        self.window, self.channels, self.causal = OVERLAP * config.patch, config.channels, config.causal
        self.width, self.reach = config.channels * (self.window + 2), self.window - config.patch
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        left = self.reach if self.causal else self.reach - self.reach // 2
        return self._overlapped(y)[..., left : left + y.shape[-1] * self.patch]

    def stream(self, y: Tensor, state: State, last: bool) -> Tensor:
        samples = self._overlapped(y)
        early = self.reach  # samples at the begin that lie before the audio
        if self in state:
            tail, left = state[self]
            samples[..., : self.reach] += tail
            early = int(left)
        stop = samples.shape[-1] if last else y.shape[-1] * self.patch
        state[self] = (samples[..., stop:].clone(), torch.tensor(max(0, early - stop)))
        return samples[..., early:stop]

    def _overlapped(self, y: Tensor) -> Tensor:
        """[B, width, n] -> float32 [B, channels, n * patch + reach]."""
        if not y.shape[-1]:
            return torch.zeros(len(y), self.channels, self.reach, device=y.device)
        magnitudes, phases = rearrange(y.float(), "b (two c f) n -> two b c n f", two=2, c=self.channels)
        spectrum = torch.polar((magnitudes + LOUDNESS).clamp(max=LOUDEST).exp(), phases)
        frames = torch.fft.irfft(spectrum, n=self.window, norm="ortho") * (self.hann / GAIN)
        parts = rearrange(frames, "b c n (k p) -> k b c n p", k=OVERLAP)
        padded = [F.pad(part, (0, 0, k, OVERLAP - 1 - k)) for k, part in enumerate(parts)]
        return rearrange(sum(padded[1:], padded[0]), "b c n p -> b c (n p)")
