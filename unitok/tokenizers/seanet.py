"""SEANet, EnCodec's convolutional encoder and decoder for audio, with a stem (`unitok.tokenizers.stems`); causal ones also process audio
incrementally.

Modules are named as in EnCodec (`model.0.conv.conv`, ...), so its weights load; with `patch = 1` the outputs are equal
(tests/tokenizers/test_parity.py). The stem folds `patch` samples into channels: at the full sample rate SEANet spends nearly
all its time on few channels; after the stem the same time allows wide layers at low rates, so that a codec can be trained in
minutes on two cores (docs/notes.md). Source: Defossez et al. 2022, "High Fidelity Neural Audio Compression";
encodec:encodec/modules/seanet.py.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from unitok.tokenizers.config import AudioTokenizerConfig
from unitok.tokenizers.stems import PatchHead, PatchStem, SpectrumHead, SpectrumStem, State


def fold_weights(network: nn.Module) -> None:
    """Replace weight norm, in place, by plain weights of equal values in the memory layout for inference."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            shared = type(module)  # with copies of the module, and what follows changes it
            own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(shared.__name__, shared.__bases__, own)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        if isinstance(module, nn.Conv1d):
            module.weight.data = _last(module.weight.data)
        elif isinstance(module, ConvTranspose) and isinstance(module.convtr.convtr, nn.ConvTranspose1d):
            module.convtr.convtr = FrameConvolution(module.convtr.convtr)


def _last(x: Tensor) -> Tensor:
    """[B, C, T] with the channels of a sample adjacent in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class Elu(nn.Module):
    """ELU, in place without gradients; nothing else may use its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x, inplace=not torch.is_grad_enabled())


class _Wrapped(nn.Module):
    """A convolution under the name `conv` or `convtr`, and its norm, as EnCodec's checkpoints name them."""

    conv: nn.Conv1d
    convtr: "nn.ConvTranspose1d | FrameConvolution"

    def __init__(self, name: str, layer: nn.Module, channels: int, norm: str):
        super().__init__()
        setattr(self, name, weight_norm(layer) if norm == "weight_norm" else layer)
        self.norm = nn.GroupNorm(1, channels) if norm == "time_group_norm" else nn.Identity()


class Conv(nn.Module):
    """Convolution over [B, C, T] that returns ceil(T / stride) frames; if `causal`, it is padded on the left alone."""

    def __init__(self, config: AudioTokenizerConfig, i: int, o: int, kernel: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        layer = nn.Conv1d(i, o, kernel, stride=stride, dilation=dilation)
        self.conv = _Wrapped("conv", layer, o, config.norm)
        self.channels, self.stride, self.causal, self.pad_mode = o, stride, config.causal, config.pad_mode
        self.extent = (kernel - 1) * dilation + 1
        self.reach = self.extent - stride  # samples before the first one that the first frame depends on

    def _convolve(self, x: Tensor, zeros: int = 0) -> Tensor:
        """zeros: before and after `x`."""
        layer = self.conv.conv
        if _channels_last(x):
            kernel, stride, dilation = layer.weight.unsqueeze(2), (1, *layer.stride), (1, *layer.dilation)
            y = F.conv2d(x.unsqueeze(2), kernel, layer.bias, stride, (0, zeros), dilation)
            return self.conv.norm(y.squeeze(2))
        return self.conv.norm(F.conv1d(x, layer.weight, layer.bias, layer.stride, zeros, layer.dilation))

    def forward(self, x: Tensor) -> Tensor:
        extra = -x.shape[-1] % self.stride  # completes the last frame
        left, right = (self.reach, 0) if self.causal else (self.reach - self.reach // 2, self.reach // 2)
        if self.pad_mode == "constant" and left == right + extra:
            return self._convolve(x, left)  # without a copy
        return self._convolve(_pad(x, left, right + extra, self.pad_mode))

    def stream(self, x: Tensor, state: State, last: bool) -> Tensor:
        """Return the frames that are complete with the piece `x`; with the `last` one all that remain."""
        waiting = state.pop(self.conv, ())  # the first samples, until they can be padded
        x = torch.cat([*waiting, *state.get(self, ()), x], -1)
        if self not in state:
            if last:
                return self(x) if x.shape[-1] else x.new_zeros(x.shape[0], self.channels, 0)
            if x.shape[-1] <= (self.reach if self.pad_mode == "reflect" else 0):  # too short to reflect
                state[self.conv] = (x,)
                return x.new_zeros(x.shape[0], self.channels, 0)
            x = F.pad(x, (self.reach, 0), self.pad_mode)
        if last and x.shape[-1] > self.reach:
            x = F.pad(x, (0, -(x.shape[-1] - self.reach) % self.stride), self.pad_mode)
        frames = max(0, (x.shape[-1] - self.extent) // self.stride + 1)
        state[self] = (x[..., frames * self.stride :].clone(),)  # cloned: a view would keep all of `x` alive
        if not frames:
            return x.new_zeros(x.shape[0], self.channels, 0)
        return self._convolve(x[..., : (frames - 1) * self.stride + self.extent])


def _channels_last(x: Tensor) -> bool:
    """Whether the channels of a sample are adjacent in memory, which makes oneDNN faster on CPU (docs/notes.md)."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def _layout(x: Tensor) -> Tensor:
    return _last(x) if _channels_last(x) else x


def _pad(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    """`F.pad`, also for audio that is too short to reflect (zeros are added before and cut off after, as in EnCodec)."""
    if not left and not right:
        return x
    short = max(left, right) - x.shape[-1] + 1 if mode == "reflect" else 0
    if short <= 0:
        return F.pad(x.unsqueeze(2), (left, right, 0, 0), mode).squeeze(2)  # four dimensions keep the memory layout
    padded = F.pad(F.pad(x, (0, short)), (left, right), mode)
    return padded[..., : padded.shape[-1] - short]


class FrameConvolution(nn.Module):
    """A transposed convolution with a kernel of twice its stride, computed as an ordinary one over two frames (no overlap-add).

    It keeps the weights of `layer`, [i, o, 2 * stride], as [stride * o, i, 1, 2]; `state_dict` and `load_state_dict` use the
    names and shapes of `layer`.
    """

    def __init__(self, layer: nn.ConvTranspose1d):
        super().__init__()
        assert layer.bias is not None
        self.stride = layer.stride[0]
        self.kernel, self.bias = nn.Parameter(_as_frames(layer.weight.detach())), nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the samples of the last n frames: [B, i, 1 + n] -> [B, o, n * stride]."""
        return _over_frames(x, self.kernel, self.bias, self.stride)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        weight = rearrange(self.kernel.flip(-1), "(s o) i 1 tap -> i o (tap s)", s=self.stride).contiguous()
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()
        destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: object) -> None:
        own = dict(state_dict)
        if f"{prefix}weight" in own:
            own[f"{prefix}kernel"] = _as_frames(own.pop(f"{prefix}weight"))
        super()._load_from_state_dict(own, prefix, *others)


def _as_frames(weight: Tensor) -> Tensor:
    """[i, o, 2 * stride] of a transposed convolution -> [stride * o, i, 1, 2] of an ordinary one over two frames."""
    taps = rearrange(weight, "i o (tap s) -> (s o) i 1 tap", tap=2).flip(-1)
    return taps.contiguous(memory_format=torch.channels_last)


def _over_frames(x: Tensor, kernel: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Return the samples of the last n frames: [B, i, 1 + n] -> [B, o, n * stride]."""
    y = F.conv2d(x.unsqueeze(2), kernel, bias.repeat(stride)).squeeze(2)
    return rearrange(y, "b (s o) n -> b o (n s)", s=stride)


class ConvTranspose(nn.Module):
    """Transposed convolution with a kernel of twice its stride: T frames -> exactly T * stride samples.

    The samples of a frame depend on it and on the frame before it.
    """

    def __init__(self, config: AudioTokenizerConfig, i: int, o: int, stride: int):
        super().__init__()
        self.convtr = _Wrapped("convtr", nn.ConvTranspose1d(i, o, 2 * stride, stride=stride), o, config.norm)
        self.channels, self.stride, self.causal = o, stride, config.causal

    def forward(self, x: Tensor) -> Tensor:
        right = self.stride if self.causal else self.stride // 2  # samples that are cut off on the right
        layer = self.convtr.convtr
        x = _pad(x, 1, 1, "constant") if isinstance(layer, FrameConvolution) else x
        y: Tensor = self.convtr.norm(layer(x))
        return y[..., self.stride - right : y.shape[-1] - right]

    def stream(self, x: Tensor, state: State, last: bool) -> Tensor:
        """Return the samples of the frames `x`. The last frame is kept, because the samples of the next one depend on it."""
        if not x.shape[-1]:
            return x.new_zeros(x.shape[0], self.channels, 0)
        x = torch.cat([*state[self], x], -1) if self in state else _pad(x, 1, 0, "constant")
        state[self] = (x[..., -1:].clone(),)
        layer = self.convtr.convtr
        if isinstance(layer, FrameConvolution):
            return layer(x)
        assert layer.bias is not None
        return _over_frames(x, _as_frames(layer.weight), layer.bias, self.stride)


class ResnetBlock(nn.Module):
    """ELU, dilated convolution to half the width, ELU, 1x1 back, around a shortcut (1x1, or the identity: `true_skip`)."""

    def __init__(self, config: AudioTokenizerConfig, width: int, dilation: int):
        super().__init__()
        hidden = width // config.compress
        wide = Conv(config, width, hidden, config.residual_kernel_size, dilation=dilation)
        self.block = nn.Sequential(nn.ELU(), wide, Elu(), Conv(config, hidden, width, 1))
        self.shortcut = nn.Identity() if config.true_skip else Conv(config, width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, shortcut = self.block(x), self.shortcut(x)
        return y + shortcut if torch.is_grad_enabled() else y.add_(shortcut)

    def stream(self, x: Tensor, state: State, last: bool) -> Tensor:
        y = run(self.block, x, state, last)
        x = torch.cat([*state[self], x], -1) if self in state else x
        state[self] = (x[..., y.shape[-1] :].clone(),)  # samples for which the first convolution lacks what follows
        return y + self.shortcut(x[..., : y.shape[-1]]) if y.shape[-1] else y


class SLSTM(nn.Module):
    """LSTM over time with a skip: [B, C, T] -> [B, C, T]."""

    def __init__(self, dimension: int, layers: int):
        super().__init__()
        self.lstm = nn.LSTM(dimension, dimension, layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.stream(x, {}, last=True)

    def stream(self, x: Tensor, state: State, last: bool) -> Tensor:
        if not x.shape[-1]:
            return x
        y, state[self] = self.lstm(rearrange(x, "b c t -> t b c"), state.get(self))
        return rearrange(y, "t b c -> b c t") + x


def run(layers: nn.Sequential, x: Tensor, state: State, last: bool) -> Tensor:
    """Apply layers to one piece of a stream; layers without a state as usual."""
    for layer in layers:
        if isinstance(layer, Conv | ConvTranspose | ResnetBlock | SLSTM):
            x = layer.stream(x, state, last)
        elif x.shape[-1]:
            x = layer(x)
    return x


def _residual(config: AudioTokenizerConfig, width: int) -> list[nn.Module]:
    """Return the residual blocks of a stage."""
    return [ResnetBlock(config, width, config.dilation_base**j) for j in range(config.n_residual_layers)]


class SEANetEncoder(nn.Module):
    """Encoder: waveform to latents."""

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        c, width = config, config.n_filters
        self.hop = c.patch * math.prod(c.ratios)
        self.stem = SpectrumStem(c) if c.domain == "spectrum" else PatchStem(c)
        layers: list[nn.Module] = [Conv(c, self.stem.width, width, c.kernel_size)]
        for ratio in reversed(c.ratios):
            layers += [*_residual(c, width), Elu(), Conv(c, width, width * 2, ratio * 2, ratio)]
            width *= 2
        if c.lstm:
            layers.append(SLSTM(width, c.lstm))
        layers += [Elu(), Conv(c, width, c.dimension, c.last_kernel_size)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, T] -> [B, dimension, ceil(T / hop)]; the last patch is padded with zeros."""
        return self.model(_layout(self.stem(x)))

    def stream(self, x: Tensor, state: State, last: bool = False) -> Tensor:
        """Return the latents [B, dimension, n] that are complete with the next samples [B, channels, t]; causal encoders
        only."""
        return run(self.model, _layout(self.stem.stream(x, state, last)), state, last)


class SEANetDecoder(nn.Module):
    """Decoder: latents to waveform, the encoder mirrored."""

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        c = config
        self.head = SpectrumHead(c) if c.domain == "spectrum" else PatchHead(c)
        width = c.n_filters * 2 ** len(c.ratios)
        layers: list[nn.Module] = [Conv(c, c.dimension, width, c.kernel_size)]
        if c.lstm:
            layers.append(SLSTM(width, c.lstm))
        for ratio in c.ratios:
            layers += [Elu(), ConvTranspose(c, width, width // 2, ratio), *_residual(c, width // 2)]
            width //= 2
        layers += [Elu(), Conv(c, width, self.head.width, c.last_kernel_size)]
        self.model = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """[B, dimension, N] -> [B, channels, N * hop]."""
        return self.head(self.model(_layout(z)))

    def stream(self, z: Tensor, state: State, last: bool = False) -> Tensor:
        """Return the samples [B, channels, t] that are complete with the next latents [B, dimension, n]: n * hop of them, unless
        `pad_mode: reflect` or spectra make them come later. Causal decoders only."""
        return self.head.stream(run(self.model, _layout(z), state, last), state, last)
