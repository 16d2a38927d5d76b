"""Checkpoints of other projects as ours and back: `unitok import KIND SRC OUT`, `unitok export KIND BUNDLE OUT`."""

from unitok.interop.registry import EXPORTS, KINDS, describe, import_checkpoint

__all__ = ["EXPORTS", "KINDS", "describe", "import_checkpoint"]
