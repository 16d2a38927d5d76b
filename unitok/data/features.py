"""A folder of a teacher's features of audio files: an array [frames, size] per file, spread evenly over it, as HuBERT's are."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.media import promised

RATE = 50  # features per second as they are served: HuBERT's


class FeatureFolder:
    """Finds the features of `x/y/b.wav` in the folder: `x/y/b.npy`, `y/b.npy` or `b.npy`, the longest path that exists.

    size: of the features, that of the first ones that are read. Errors: `UserError` where there is no such folder.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"features {folder}: no such folder")
        self.folder, self.size = folder, 0
        self._paths: dict[Path, Path] = {}

    def open(self, label: Path) -> np.ndarray:
        """Return the features of a file, [frames, size], mapped. Errors: `UserError` that names the file or its features."""
        path = self._paths.get(label) or self._find(label)
        try:
            features: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: not an array of NumPy ({error})") from error
        if features.ndim != 2 or not features.size or features.dtype.kind != "f":
            shape = f"{features.dtype} {list(features.shape)}"
            raise UserError(f"{path}: {shape}; features are floating-point numbers [frames, size]")
        self.size = self.size or int(features.shape[1])
        if features.shape[1] != self.size:
            raise UserError(f"{path}: features of size {features.shape[1]}, the others have {self.size}")
        return features

    def _find(self, label: Path) -> Path:
        name = f"{label.stem if promised(label.name) else label.name}.npy"
        folders = [*label.parts[1:-1]]
        paths = (self.folder.joinpath(*folders[first:], name) for first in range(len(folders) + 1))
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise UserError(f"{label}: no {name} in {self.folder}")
        self._paths[label] = path
        return path

    def read(self, label: Path, features: np.ndarray, start: float, length: float, whole: float) -> Tensor:
        """Return float32 [ceil(length * RATE), size]: the features from `start` on, of a file of `whole` seconds; beyond its end zeros.

        Errors: `UserError` for numbers that are not finite.
        """
        at = start + (np.arange(-int(-length * RATE // 1)) + 0.5) / RATE
        frames = np.minimum(at / whole * len(features), len(features) - 1).astype(int)
        with np.errstate(over="ignore"):
            rows = np.where((at < whole)[:, None], features[frames], 0).astype(np.float32)
        if not np.isfinite(rows).all():
            raise UserError(f"{self._paths[label]}: features that are not finite numbers")
        return torch.from_numpy(rows)
