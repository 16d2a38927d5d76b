"""What image and audio tokenizers have in common: a configuration, a folder, a fingerprint."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from unitok.pretrained import load_part, load_state, make_config, part_folder, save_part, state_fingerprint


@dataclass
class Reconstruction:
    """What a forward pass gives."""

    signal: Tensor  # [B, 3, H, W] or [B, C, T]
    codes: Tensor | None  # [B, h, w] or [B, K, N], None without quantisation
    losses: dict[str, Tensor]  # the quantizer's, by name
    projected: Tensor | None  # the vectors that it learns from


class Tokenizer(nn.Module):
    """A tokenizer that is a network. A subclass says its `kind` and the dataclass of its configuration."""

    kind: ClassVar[str]
    Config: ClassVar[Any]
    config: Any

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> Self:
        """An untrained one from plain values. Errors: `UserError` that begins with `where`."""
        return cls(make_config(cls.Config, config, where))

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu", name: str = "", revision: str | None = None) -> Self:
        """Read a tokenizer, ready `prepare_for_inference`. Errors: `UserError` that says what is wrong.

        path: its own folder or a bundle's; a built-in bundle; a repository of the Hugging Face hub (`user/name`), at a `revision`.
        device: where it computes, such as `cpu` or `cuda:1`. name: that it has in the bundle; by default its kind's.
        """
        folder = part_folder(path, f"tokenizers/{name or cls.kind}", revision)
        config, state = load_part(folder, f"{cls.kind} tokenizer", cls.Config)
        model = cls(config)
        load_state(model, state, str(folder))
        return model.prepare_for_inference().to(device)

    def save_pretrained(self, folder: Path, overwrite: bool = False) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_part(folder, f"{self.kind} tokenizer", self.config, self.state_dict(), overwrite)

    def prepare_for_inference(self) -> Self:
        """Itself, ready for inference."""
        return self.eval()

    def fingerprint(self) -> str:
        """Changes when the codes do: a hash of configuration and weights."""
        return state_fingerprint(self.config, self.state_dict())

    def describe(self) -> dict[str, Any]:
        """Its number of parameters, and its configuration."""
        return {"parameters": sum(p.numel() for p in self.parameters())} | asdict(self.config)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
