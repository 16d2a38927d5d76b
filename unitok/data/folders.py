"""Folders of images and of audio to train tokenizers on: samples by (epoch, index), decoded when they are asked for.

A file that cannot be read does not end a run: it is named and counted, and another takes its place. Which one follows from
(seed, epoch, index) and the files alone, never from what was found before, so that a resumed run draws the same.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from unitok.data.prepare.listing import folder_split_of
from unitok.errors import UserError
from unitok.media import convert_audio, crop_square, find_media, open_audio, open_image, promised, read_clip, read_samples

Crop = Literal["center", "random"]
log = logging.getLogger("unitok")

CACHE_BYTES = 1 << 30  # decoded files are kept in memory up to this, in each process
WHOLE_SECONDS = 60  # audio up to this long is decoded whole and kept; of longer files only the stretch is read
NAMED = 5  # bad files that are named; more are counted
TRIES = 100  # files one after the other that cannot be read, until a sample is given up
JUDGED = 100  # files, at least, of which the share of bad ones is taken
READ, BAD = 1, 2  # what is known of a file; 0 is nothing


class FileDataset(Dataset):
    """Files of one kind under a folder, decoded when first asked for and kept in memory while there is room."""

    replaces = True  # another file takes the place of one that cannot be read; else a sample is None

    def __init__(self, folder: Path, kind: str, seed: int):
        folder = Path(folder)
        if not folder.exists():
            raise UserError(f"{folder}: no such folder")
        found, empty = find_media(folder, kind)
        self.files = _of_training(folder, found)
        if not self.files:
            raise UserError(f"{folder}: no {kind} files in it")
        self.folder, self.kind, self.seed = folder, kind, seed
        self.state = torch.zeros(len(self.files), dtype=torch.uint8).share_memory_()  # READ, BAD; of all processes that decode
        self.unusable = _unusable(folder, found)  # empty, or of another kind than their name says
        for number, file in enumerate(self.unusable):
            _say_bad(number, f"{file}: {'an empty file' if file in empty else f'no {kind}, though its name says so'}")
        self._kept: dict[int, Any] = {}
        self._bytes = 0

    def order(self, epoch: int) -> Sequence[int]:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.files)).tolist()

    def read(self, index: int, rng: np.random.Generator) -> Tensor:
        """The sample of a file; errors: `UserError`, `OSError` for a file that cannot be read."""
        raise NotImplementedError

    def __getitem__(self, place: tuple[int, int]) -> Tensor | None:
        epoch, index = place
        at = index
        for attempt in range(1, TRIES + 1):
            found = self._try(epoch, at)
            if found is not None or not self.replaces:
                return found
            at = int(np.random.default_rng((self.seed, epoch, index, attempt)).integers(len(self.files)))
        raise UserError(f"{self.folder}: {TRIES} {self.kind} files one after the other cannot be read; mend or remove them")

    def _try(self, epoch: int, index: int) -> Tensor | None:
        number = index % len(self.files)
        try:
            found = self.read(number, np.random.default_rng((self.seed, epoch, index)))
        except (UserError, OSError) as error:
            if self.state[number] != BAD:
                before = len(self.unusable) + int((self.state == BAD).sum())
                self.state[number] = BAD
                file, said = str(self.files[number]), str(error).splitlines()[0]
                _say_bad(before, said if file in said else f"{file}: {said}")
            return None
        if not self.state[number]:
            self.state[number] = READ
        return found

    def share_bad(self) -> tuple[int, float]:
        """How many files are bad, as far as they were tried, and which share; of `JUDGED` files at least."""
        bad, tried = int((self.state == BAD).sum()), int((self.state > 0).sum())
        listed = len(self.unusable) / max(JUDGED, len(self.files) + len(self.unusable))
        return bad + len(self.unusable), listed + bad / max(JUDGED, tried)

    def _keep(self, index: int, value: Any, size: int) -> Any:
        if self._bytes + size <= CACHE_BYTES:
            self._kept[index] = value
            self._bytes += size
        return value

    def __len__(self) -> int:
        return len(self.files)

    def content(self) -> str:
        """What is there: a number, and a digest of names and sizes."""
        sizes = [(file.relative_to(self.folder).as_posix(), file.stat().st_size) for file in self.files]
        return f"{len(sizes)} files ({hashlib.sha256(repr(sizes).encode()).hexdigest()[:8]})"


def _of_training(folder: Path, files: list[Path]) -> list[Path]:
    """The files without those of the splits `validation` and `test`, where folders are called so and one is called `train`."""
    splits = [folder_split_of(f.relative_to(folder).as_posix()) for f in files]
    left_out = Counter(split for split in splits if split in ("validation", "test"))
    if "train" not in splits or not left_out:
        return files
    said = ", ".join(f"{n} files of the split {s}" for s, n in left_out.items())
    log.warning("left out: %s; name such a folder itself to use it", said)
    return [f for f, split in zip(files, splits) if split not in left_out]


def _unusable(folder: Path, files: list[Path]) -> list[Path]:
    """What is called as most of the `files` of a folder are, but is none of them; hidden ones left out."""
    promises = Counter(filter(None, (promised(f.name) for f in files)))
    usual = max(promises, key=promises.__getitem__, default="")
    suffixes, usable = {f.suffix.lower() for f in files if usual and promised(f.name) == usual}, set(files)
    called = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in suffixes and f not in usable and f.is_file()]
    return [f for f in called if not any(part.startswith(".") for part in f.relative_to(folder).parts)]


def _say_bad(before: int, message: str) -> None:
    """One line for a bad file, after `before` others; after a few, one for all that come."""
    if before < NAMED:
        log.warning("left out: %s", message)
    elif before == NAMED:
        log.warning("left out: more files, which are counted (bad_files)")


class ImageDataset(FileDataset):
    """[3, S, S] float in [-1, 1]: a square of each picture, mirrored by chance if `flip`; see `ImageFiles`."""

    def __init__(self, folder: Path, size: int, flip: bool, seed: int, crop: Crop = "center", shrink: float = 1.0):
        super().__init__(folder, "image", seed)
        self.size, self.flip, self.crop, self.shrink = size, flip, crop, shrink

    def read(self, index: int, rng: np.random.Generator) -> Tensor:
        kept = self._kept.get(index)
        if kept is None:
            image = open_image(self.files[index])
            image = crop_square(image, self.size) if self.crop == "center" else image
            kept = self._keep(index, np.asarray(image), 3 * image.width * image.height)
        mirrored = self.flip and rng.random() < 0.5
        pixels = kept if self.crop == "center" else self._random_square(kept, rng)
        pixels = pixels[:, ::-1] if mirrored else pixels
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div_(127.5).sub_(1)

    def _random_square(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = pixels.shape[:2]
        side = min(height, width, round(self.size * self.shrink ** rng.random()))
        top, left = (int(rng.integers(length - side + 1)) for length in (height, width))
        square = pixels[top : top + side, left : left + side]
        return square if side == self.size else np.asarray(crop_square(Image.fromarray(square), self.size))


class SoundDataset(FileDataset):
    """[C, T] float in [-1, 1]: a stretch of each sound at a random place, zeros after shorter ones; see `AudioFiles`."""

    def __init__(
        self,
        folder: Path,
        rate: int,
        channels: int,
        length: int,
        seed: int,
        gain: tuple[float, float] = (0.0, 0.0),
        flip_polarity: bool = False,
        balance: bool = False,
    ):
        super().__init__(folder, "audio", seed)
        self.rate, self.channels, self.length = rate, channels, length
        self.gain, self.flip_polarity, self.balance = gain, flip_polarity, balance

    def order(self, epoch: int) -> Sequence[int]:
        """Files by index; the k-th time in an epoch that a file comes, its index has k times their number added."""
        if not self.balance:
            return super().order(epoch)
        rng = np.random.default_rng((self.seed, epoch))
        folders: dict[Path, list[int]] = {}
        for index, file in enumerate(self.files):
            folders.setdefault(file.parent, []).append(index)
        groups = list(folders.values())
        decks: list[list[int]] = [[] for _ in groups]
        times: Counter[int] = Counter()
        out = []
        for choice in rng.integers(len(groups), size=len(self.files)):
            deck = decks[choice] = decks[choice] or rng.permutation(groups[choice]).tolist()
            index = deck.pop()
            out.append(index + times[index] * len(self.files))
            times[index] += 1
        return out

    def read(self, index: int, rng: np.random.Generator) -> Tensor:
        piece = self._stretch(index, rng)
        piece = torch.nn.functional.pad(piece, (0, self.length - piece.shape[-1]))
        if any(self.gain):
            piece = (piece * 10 ** (rng.uniform(*self.gain) / 20)).clamp(-1, 1)
        return -piece if self.flip_polarity and rng.random() < 0.5 else piece

    def _stretch(self, index: int, rng: np.random.Generator) -> Tensor:
        samples = self._kept.get(index)
        if samples is None:
            with open_audio(self.files[index]) as file:
                rate = int(file.samplerate)
                wanted = -(-self.length * rate // self.rate)
                if file.frames > max(WHOLE_SECONDS * rate, wanted):
                    piece = read_samples(file, wanted, int(rng.integers(file.frames - wanted + 1)))
                    if piece.shape[-1] < wanted:
                        raise UserError(f"{self.files[index]}: cut off: it ends before its header says")
                    return convert_audio(piece, rate, self.rate, self.channels)[:, : self.length]
                samples = convert_audio(read_clip(file, str(self.files[index])), rate, self.rate, self.channels)
            self._keep(index, samples, samples.numel() * 4)
        spare = samples.shape[-1] - self.length
        start = int(rng.integers(spare + 1)) if spare > 0 else 0
        return samples[:, start : start + self.length]
