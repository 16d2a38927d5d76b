"""Import checkpoints of other projects, and export ours: `unitok import KIND SOURCE OUT`, `unitok export KIND BUNDLE OUT`."""

from unitok.interop.registry import EXPORTS, KINDS, describe, import_checkpoint

__all__ = ["EXPORTS", "KINDS", "describe", "import_checkpoint"]
