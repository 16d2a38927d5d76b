"""SEANet, EnCodec's convolutional encoder and decoder for audio, with a patch stem; whole, or piece by piece if causal.

Names are EnCodec's (`model.0.conv.conv`, ...), so that its weights load; with `patch = 1` the outputs are equal
(tests/tokenizers/test_parity.py). The stem folds `patch` samples into channels: at full rate SEANet spends nearly all its time on
few channels; behind the stem the same time buys wide layers at low rates, which is what lets a codec learn in minutes on two cores
(docs/notes.md). Source: Defossez et al. 2022, "High Fidelity Neural Audio Compression"; encodec:encodec/modules/seanet.py.
"""

import math
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from unitok.tokenizers.config import AudioTokenizerConfig

#: The end of what each layer has heard of a sound that comes in pieces.
State: TypeAlias = dict[nn.Module, Any]


def fold_for_use(network: nn.Module) -> None:
    """Replace the layers' weights, in place, by plain ones of the same values laid out for inference: the only copy, never stale."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        if isinstance(module, nn.Conv1d):
            module.weight.data = _last(module.weight.data)
        elif isinstance(module, ConvTranspose) and isinstance(module.convtr.convtr, nn.ConvTranspose1d):
            module.convtr.convtr = FrameConvolution(module.convtr.convtr)


def _last(x: Tensor) -> Tensor:
    """[B, C, T] with all channels of a sample together in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class Elu(nn.Module):
    """ELU of a tensor that nothing else uses: in place where no gradient needs what was there."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x, inplace=not torch.is_grad_enabled())


class _Wrapped(nn.Module):
    """A convolution under the name `conv` or `convtr`, and its norm, as EnCodec's checkpoints have them."""

    def __init__(self, name: str, layer: nn.Module, channels: int, norm: str):
        super().__init__()
        setattr(self, name, weight_norm(layer) if norm == "weight_norm" else layer)
        self.norm = nn.GroupNorm(1, channels) if norm == "time_group_norm" else nn.Identity()


class Conv(nn.Module):
    """Convolution over [B, C, T] that gives ceil(T / stride) frames: padded on the left only if `causal`."""

    def __init__(self, config: AudioTokenizerConfig, i: int, o: int, kernel: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        layer = nn.Conv1d(i, o, kernel, stride=stride, dilation=dilation)
        self.conv = _Wrapped("conv", layer, o, config.norm)
        self.channels, self.stride, self.causal, self.pad_mode = o, stride, config.causal, config.pad_mode
        self.extent = (kernel - 1) * dilation + 1
        self.reach = self.extent - stride  # samples of the past that the first frame looks at

    def _convolve(self, x: Tensor) -> Tensor:
        layer: Any = self.conv.conv
        if _channels_last(x):
            kernel, stride, dilation = layer.weight.unsqueeze(2), (1, *layer.stride), (1, *layer.dilation)
            y = F.conv2d(x.unsqueeze(2), kernel, layer.bias, stride, dilation=dilation)
            return self.conv.norm(y.squeeze(2))  # type: ignore[operator]
        return self.conv.norm(layer(x))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        extra = -x.shape[-1] % self.stride  # up to a whole number of frames
        left, right = (self.reach, 0) if self.causal else (self.reach - self.reach // 2, self.reach // 2)
        return self._convolve(_pad(x, left, right + extra, self.pad_mode))

    def stream(self, x: Tensor, state: State, last: bool) -> Tensor:
        """The frames that are complete with `x`; all of the rest if it is the `last` piece."""
        kept, begun = state.get(self, (x[..., :0], False))
        x = torch.cat([kept, x], -1)
        if not begun:
            if last:
                return self(x) if x.shape[-1] else x.new_zeros(x.shape[0], self.channels, 0)
            if x.shape[-1] <= (self.reach if self.pad_mode == "reflect" else 0):  # a reflection needs more
                state[self] = (x, False)
                return x.new_zeros(x.shape[0], self.channels, 0)
            x = F.pad(x, (self.reach, 0), self.pad_mode)
        if last and x.shape[-1] > self.reach:
            x = F.pad(x, (0, -(x.shape[-1] - self.reach) % self.stride), self.pad_mode)
        frames = max(0, (x.shape[-1] - self.extent) // self.stride + 1)
        state[self] = (x[..., frames * self.stride :].clone(), True)  # a view would hold on to all of `x`
        if not frames:
            return x.new_zeros(x.shape[0], self.channels, 0)
        return self._convolve(x[..., : (frames - 1) * self.stride + self.extent])


def _channels_last(x: Tensor) -> bool:
    """Whether oneDNN is to be given all channels of a sample together: on CPU it is sooner done (docs/notes.md)."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def _layout(x: Tensor) -> Tensor:
    return _last(x) if _channels_last(x) else x


def _pad(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    """`F.pad`, also for sounds shorter than a reflection needs (zeros are added first and cut after, as in EnCodec)."""
    if not left and not right:
        return x
    short = max(left, right) - x.shape[-1] + 1 if mode == "reflect" else 0
    if short <= 0:
        return F.pad(x.unsqueeze(2), (left, right, 0, 0), mode).squeeze(2)  # of four dimensions: they keep the layout
    padded = F.pad(F.pad(x, (0, short)), (left, right), mode)
    return padded[..., : padded.shape[-1] - short]


class FrameConvolution(nn.Module):
    """A transposed convolution whose kernel is twice its stride, as an ordinary one over two frames: no overlaps to be added up.

    It holds the weights of `layer`, [i, o, 2 * stride], as [stride * o, i, 1, 2]; `state_dict` and `load_state_dict` speak of those
    of `layer`, under their names.
    """

    def __init__(self, layer: nn.ConvTranspose1d):
        super().__init__()
        assert layer.bias is not None
        self.stride = layer.stride[0]
        self.kernel, self.bias = nn.Parameter(_as_frames(layer.weight.detach())), nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[B, i, 1 + n] -> the samples of the last n frames, [B, o, n * stride]."""
        return _over_frames(x, self.kernel, self.bias, self.stride)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = rearrange(self.kernel.flip(-1), "(s o) i 1 tap -> i o (tap s)", s=self.stride).contiguous()
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()
        destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        own = dict(state_dict)
        if f"{prefix}weight" in own:
            own[f"{prefix}kernel"] = _as_frames(own.pop(f"{prefix}weight"))
        super()._load_from_state_dict(own, prefix, *others)


def _as_frames(weight: Tensor) -> Tensor:
    """[i, o, 2 * stride] of a transposed convolution -> [stride * o, i, 1, 2] of an ordinary one over two frames."""
    taps = rearrange(weight, "i o (tap s) -> (s o) i 1 tap", tap=2).flip(-1)
    return taps.contiguous(memory_format=torch.channels_last)


def _over_frames(x: Tensor, kernel: Tensor, bias: Tensor, stride: int) -> Tensor:
    """[B, i, 1 + n] -> the samples of the last n frames, [B, o, n * stride]."""
    y = F.conv2d(x.unsqueeze(2), kernel, bias.repeat(stride)).squeeze(2)
    return rearrange(y, "b (s o) n -> b o (n s)", s=stride)


class ConvTranspose(nn.Module):
    """Transposed convolution, of a kernel of twice its stride, that gives exactly T * stride samples.

    A frame's samples come from it and the frame before it alone.
    """

    def __init__(self, config: AudioTokenizerConfig, i: int, o: int, stride: int):
        super().__init__()
        self.convtr = _Wrapped("convtr", nn.ConvTranspose1d(i, o, 2 * stride, stride=stride), o, config.norm)
        self.channels, self.stride, self.causal = o, stride, config.causal

    def forward(self, x: Tensor) -> Tensor:
        right = self.stride if self.causal else self.stride // 2  # samples that are cut there
        layer: Any = self.convtr.convtr
        x = _pad(x, 1, 1, "constant") if isinstance(layer, FrameConvolution) else x
        y: Tensor = self.convtr.norm(layer(x))  # type: ignore[operator]
        return y[..., self.stride - right : y.shape[-1] - right]

    def stream(self, x: Tensor, state: State, last: bool) -> Tensor:
        """The samples of `x`; its last frame is kept, because the next one's samples come from it too."""
        if not x.shape[-1]:
            return x.new_zeros(x.shape[0], self.channels, 0)
        x = torch.cat([state[self], x], -1) if self in state else _pad(x, 1, 0, "constant")
        state[self] = x[..., -1:].clone()
        layer: Any = self.convtr.convtr
        if isinstance(layer, FrameConvolution):
            return layer(x)
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
        x = torch.cat([state[self], x], -1) if self in state else x
        state[self] = x[..., y.shape[-1] :].clone()  # where the first convolution still waits for more
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
    """The layers, piece by piece; those without a memory as they are."""
    layer: Any
    for layer in layers:
        if hasattr(layer, "stream"):
            x = layer.stream(x, state, last)
        elif x.shape[-1]:
            x = layer(x)
    return x


def _residual(config: AudioTokenizerConfig, width: int) -> list[nn.Module]:
    """The residual blocks of a stage."""
    return [ResnetBlock(config, width, config.dilation_base**j) for j in range(config.n_residual_layers)]


class SEANetEncoder(nn.Module):
    """Waveform to latents."""

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        c, width = config, config.n_filters
        self.patch, self.hop = c.patch, c.patch * math.prod(c.ratios)
        layers: list[nn.Module] = [Conv(c, c.channels * c.patch, width, c.kernel_size)]
        for ratio in reversed(c.ratios):
            layers += [*_residual(c, width), Elu(), Conv(c, width, width * 2, ratio * 2, ratio)]
            width *= 2
        if c.lstm:
            layers.append(SLSTM(width, c.lstm))
        layers += [Elu(), Conv(c, width, c.dimension, c.last_kernel_size)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, T] -> [B, dimension, ceil(T / hop)]; zeros complete the last patch."""
        x = F.pad(x, (0, -x.shape[-1] % self.patch))
        return self.model(_layout(rearrange(x, "b c (t p) -> b (c p) t", p=self.patch)))

    def stream(self, x: Tensor, state: State, last: bool = False) -> Tensor:
        """[B, channels, t], the next samples -> [B, dimension, n], the frames that are complete with them (causal only)."""
        x = torch.cat([state[self], x], -1) if self in state else x
        x = F.pad(x, (0, -x.shape[-1] % self.patch)) if last else x
        whole = x.shape[-1] - x.shape[-1] % self.patch
        state[self] = x[..., whole:].clone()
        return run(self.model, _layout(rearrange(x[..., :whole], "b c (t p) -> b (c p) t", p=self.patch)), state, last)


class SEANetDecoder(nn.Module):
    """Latents to waveform: the encoder mirrored."""

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        c, self.patch = config, config.patch
        width = c.n_filters * 2 ** len(c.ratios)
        layers: list[nn.Module] = [Conv(c, c.dimension, width, c.kernel_size)]
        if c.lstm:
            layers.append(SLSTM(width, c.lstm))
        for ratio in c.ratios:
            layers += [Elu(), ConvTranspose(c, width, width // 2, ratio), *_residual(c, width // 2)]
            width //= 2
        layers += [Elu(), Conv(c, width, c.channels * c.patch, c.last_kernel_size)]
        self.model = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """[B, dimension, N] -> [B, channels, N * hop]."""
        return rearrange(self.model(_layout(z)), "b (c p) t -> b c (t p)", p=self.patch)

    def stream(self, z: Tensor, state: State, last: bool = False) -> Tensor:
        """[B, dimension, n], the next latents -> [B, channels, n * hop], less what a reflection waits for (causal only)."""
        return rearrange(run(self.model, _layout(z), state, last), "b (c p) t -> b c (t p)", p=self.patch)
