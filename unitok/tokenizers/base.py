"""Base class of image and audio tokenizers: configuration, folder, fingerprint."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from unitok.hardware import check_device
from unitok.pretrained import load_part, load_state, make_config, part_folder, save_part, state_fingerprint
from unitok.tokenizers.config import AudioTokenizerConfig, ImageTokenizerConfig

TokenizerConfig = ImageTokenizerConfig | AudioTokenizerConfig
F = TypeVar("F", bound=Callable[..., Any])


def in_float32(method: F) -> F:
    """Let a method of what has a `device` compute in float32, in which codes are defined, also where its caller uses autocast."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(F, run)


@dataclass
class Reconstruction:
    """Result of a tokenizer's forward pass."""

    signal: Tensor  # images [B, 3, H, W] or audio [B, C, T]
    codes: Tensor | None  # [B, h, w] or [B, K, N]; None without quantization
    losses: dict[str, Tensor]  # of the quantizer, by name
    projected: Tensor | None  # vectors that the codebook learns from
    first: Tensor | None = None  # as `Quantized.first`


class Tokenizer(nn.Module):
    """A tokenizer that is a neural network. A subclass sets `kind` and `Config`, the dataclass of its configuration."""

    kind: ClassVar[str]
    Config: ClassVar[type[TokenizerConfig]]
    config: TokenizerConfig

    @classmethod
    def from_config(cls, config: Mapping[str, object], where: str) -> Self:
        """Return an untrained tokenizer. config: fields of `Config`. Errors: `UserError` that begins with `where`."""
        return cls(make_config(cls.Config, dict(config), where))

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu", name: str = "", revision: str | None = None) -> Self:
        """Read a tokenizer, ready `prepare_for_inference`. Errors: `UserError` that says what is wrong.

        path: its own folder or a bundle's; a repository of the Hugging Face hub (`user/name`), at a `revision`; a built-in bundle, such as `scenes`.
        device: where it computes, such as `cpu` or `cuda:1`. name: that it has in the bundle; by default its kind's.
        """
        check_device(device)
        folder = part_folder(path, f"tokenizers/{name or cls.kind}", revision)
        config, state = load_part(folder, f"{cls.kind} tokenizer", cls.Config)
        model = cls(config)
        load_state(model, state, str(folder))
        return model.prepare_for_inference().to(device)

    def save_pretrained(self, folder: Path, overwrite: bool = False) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_part(folder, f"{self.kind} tokenizer", self.config, self.state_dict(), overwrite)

    def prepare_for_inference(self) -> Self:
        """Return the tokenizer itself in eval mode."""
        return self.eval()

    def fingerprint(self) -> str:
        """Return a hash of configuration and weights; tokenizers with equal fingerprints give equal codes."""
        return state_fingerprint(self.config, self.state_dict())

    def describe(self) -> dict[str, object]:
        """Return the number of parameters, and the configuration."""
        return {"parameters": sum(p.numel() for p in self.parameters())} | asdict(self.config)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
