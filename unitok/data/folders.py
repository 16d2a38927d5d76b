"""Images and audio to train tokenizers on: samples by (epoch, index), decoded when they are needed.

A file that cannot be read does not end a run: it is named and counted, and another takes its place. Which one follows only from
(seed, epoch, index) and the list of files, never from what was found before, so that a resumed run draws the same.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from unitok.data.features import FeatureFolder
from unitok.data.media_list import list_media
from unitok.errors import UserError
from unitok.media import (
    convert_audio,
    crop_square,
    open_audio,
    open_image,
    open_video,
    read_clip,
    read_samples,
    sample_frames,
)
from unitok.modalities import modality_of

Crop = Literal["center", "random"]
log = logging.getLogger("unitok")

CACHE_BYTES = 1 << 30  # decoded files are kept in memory up to this, in each process
WHOLE_SECONDS = 60  # audio up to this long is decoded whole and kept; of longer files only the needed part is read
SHORT_BYTES = 8 << 20  # a video whose frames are no more is decoded whole and kept
LONGEST_ANIMATION = 600.0  # seconds that are read of a video whose length is not known beforehand, as that of animations
NAMED = 5  # bad files that are named; more are counted
TRIES = 100  # files in a row that cannot be read, until a sample is given up
JUDGED = 100  # least number of files that the fraction of bad ones is taken of
READ, BAD = 1, 2  # states of a file; 0: not tried yet

Kept = TypeVar("Kept", np.ndarray, Tensor)  # a decoded file in memory
Sample = Tensor | dict[str, Tensor]  # or several tensors by name


class FileDataset(Dataset, Generic[Kept]):
    """Files of one kind, decoded when first needed and kept in memory while there is room.

    paths, root, also: see `list_media`. Errors: `UserError` where there are no files.
    """

    parts = 1  # of an epoch
    replaces = True  # another file takes the place of one that cannot be read; if False, its sample is None

    def __init__(self, paths: str | Path | Sequence[str], kind: str, seed: int, root: str = "", also: tuple[str, ...] = ()):
        self.name = str(paths) if isinstance(paths, str | Path) else ", ".join(paths)  # in messages
        self.files = list_media(paths, kind, root, seed, also)
        self.kind, self.seed = kind, seed
        self.state = torch.zeros(len(self.files), dtype=torch.uint8).share_memory_()  # of each file, shared by all workers
        self._kept: dict[int, Kept] = {}
        self._bytes = 0

    def order(self, epoch: int, part: int | None = None) -> Sequence[int]:
        """The indices of an epoch, shuffled."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.files)).tolist()

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample of a file. Errors: `UserError`, `OSError` for a file that cannot be read."""
        raise NotImplementedError

    def __getitem__(self, position: tuple[int, int]) -> Sample | None:
        """The sample at an (epoch, index); None for a file that cannot be read, unless another replaces it."""
        epoch, index = position
        tried = index
        for attempt in range(1, TRIES + 1):
            sample = self._try(epoch, tried)
            if sample is not None or not self.replaces:
                return sample
            tried = int(np.random.default_rng((self.seed, epoch, index, attempt)).integers(len(self.files)))
        raise UserError(f"{self.name}: {TRIES} {self.kind} files in a row cannot be read; mend or remove them")

    def _try(self, epoch: int, index: int) -> Sample | None:
        number = index % len(self.files)
        try:
            sample = self.read(number, np.random.default_rng((self.seed, epoch, index)))
        except (UserError, OSError) as error:
            if self.state[number] != BAD:
                earlier = int((self.state == BAD).sum())
                self.state[number] = BAD
                name, message = str(self.files[number].label), str(error).splitlines()[0]
                _log_bad(earlier, message if name in message else f"{name}: {message}")
            return None
        if not self.state[number]:
            self.state[number] = READ
        return sample

    def bad_files(self) -> tuple[int, float]:
        """How many of the files tried so far are bad, and what fraction (of at least `JUDGED` files)."""
        bad, tried = int((self.state == BAD).sum()), int((self.state > 0).sum())
        return bad, bad / max(JUDGED, tried)

    def _keep(self, index: int, value: Kept, size: int) -> Kept:
        if self._bytes + size <= CACHE_BYTES:
            self._kept[index] = value
            self._bytes += size
        return value

    def __len__(self) -> int:
        return len(self.files)

    def content(self) -> str:
        """The number of files and a digest of their names, in words, to notice that the data changed."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.path}\0{file.member}\n".encode("utf-8", "surrogateescape"))
        return f"{len(self.files)} files ({digest.hexdigest()[:8]})"


def _log_bad(earlier: int, message: str) -> None:
    """Log a bad file, after `earlier` others: the first few by name, then once that the rest is counted."""
    if earlier < NAMED:
        log.warning("left out: %s", message)
    elif earlier == NAMED:
        log.warning("left out: more files, which are counted (bad_files)")


class ImageDataset(FileDataset[np.ndarray]):
    """Samples [3, S, S], float in [-1, 1]: a square of each image, half of them mirrored if `flip`; see `ImageFiles`."""

    def __init__(
        self,
        paths: str | Path | Sequence[str],
        size: int,
        flip: bool,
        seed: int,
        crop: Crop = "center",
        shrink: float = 1.0,
        root: str = "",
    ):
        super().__init__(paths, "image", seed, root)
        self.size, self.flip, self.crop, self.shrink = size, flip, crop, shrink

    def read(self, index: int, rng: np.random.Generator) -> Tensor:
        kept = self._kept.get(index)
        if kept is None:
            file = self.files[index]
            image = open_image(file.label, file.read())
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


class VideoDataset(FileDataset[np.ndarray]):
    """Samples [F, 3, S, S], float in [-1, 1]: a random stretch of each video, or F equal frames of an image; see `VideoFiles`."""

    def __init__(
        self, paths: str | Path | Sequence[str], size: int, frames: int, fps: int, flip: bool, seed: int, root: str = ""
    ):
        super().__init__(paths, "video", seed, root, also=("image",))
        self.size, self.frames, self.fps, self.flip = size, frames, fps, flip

    def read(self, index: int, rng: np.random.Generator) -> Tensor:
        pixels = self._kept.get(index)
        if pixels is None:
            pixels = self._pixels(index, rng)
        start = int(rng.integers(max(0, len(pixels) - self.frames) + 1))
        pixels = pixels[start : start + self.frames]
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], self.frames - len(pixels), 0)])
        pixels = pixels[:, :, ::-1] if self.flip and rng.random() < 0.5 else pixels
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float().div_(127.5).sub_(1)

    def _pixels(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """uint8 [F, S, S, 3]: all frames of a short video or an animation, which are kept, or those of a random stretch. Errors: `UserError`,
        `OSError`."""
        entry = self.files[index]
        data = entry.read()
        if not modality_of("video").recognizes(entry.head(), str(entry.label)):
            image = np.asarray(crop_square(open_image(entry.label, data), self.size))
            return self._keep(index, image[None], image.nbytes)
        with open_video(entry.label, data) as video:
            length, seconds = self.frames / self.fps, video.seconds
            whole = not seconds or seconds * self.fps * 3 * self.size**2 <= SHORT_BYTES or seconds <= length
            start = 0.0 if whole else float(rng.uniform(0, seconds - length))
            images = sample_frames(video.frames(start), self.fps, start, start + (LONGEST_ANIMATION if whole else length))
            frames = [np.asarray(crop_square(image, self.size)) for image in images]
            if not frames:
                raise UserError(f"{entry.label}: {video.problem or 'no frames in it'}")
        pixels = np.stack(frames)
        return self._keep(index, pixels, pixels.nbytes) if whole else pixels


class AudioDataset(FileDataset[Tensor]):
    """Samples [C, T], float in [-1, 1]: a random stretch of each file, padded with zeros; see `AudioFiles`.

    With `features`, `{"samples": [C, T], "features": [M, size]}`, M = `features.RATE` per second; zeros beyond the end of a file.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str],
        rate: int,
        channels: int,
        length: int,
        seed: int,
        gain: tuple[float, float] = (0.0, 0.0),
        flip_polarity: bool = False,
        balance: bool = False,
        root: str = "",
        features: str = "",
    ):
        super().__init__(paths, "audio", seed, root)
        self.features = FeatureFolder(Path(features)) if features else None
        self.rate, self.channels, self.length = rate, channels, length
        self.gain, self.flip_polarity, self.balance = gain, flip_polarity, balance

    def order(self, epoch: int, part: int | None = None) -> Sequence[int]:
        """The indices of an epoch, shuffled. The k-th repetition of a file has k times the number of files added to its index."""
        if not self.balance:
            return super().order(epoch, part)
        rng = np.random.default_rng((self.seed, epoch))
        folders: dict[Path, list[int]] = {}
        for index, file in enumerate(self.files):
            folders.setdefault(file.label.parent, []).append(index)
        members = list(folders.values())
        decks: list[list[int]] = [[] for _ in members]
        repeats: Counter[int] = Counter()
        order = []
        for choice in rng.integers(len(members), size=len(self.files)):
            deck = decks[choice] = decks[choice] or rng.permutation(members[choice]).tolist()
            index = deck.pop()
            order.append(index + repeats[index] * len(self.files))
            repeats[index] += 1
        return order

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        label = self.files[index].label
        features = self.features.open(label) if self.features else None
        samples, start, whole = self._stretch(index, rng)
        samples = torch.nn.functional.pad(samples, (0, self.length - samples.shape[-1]))
        if any(self.gain):
            samples = (samples * 10 ** (rng.uniform(*self.gain) / 20)).clamp(-1, 1)
        samples = -samples if self.flip_polarity and rng.random() < 0.5 else samples
        if self.features is None or features is None:
            return samples
        return {"samples": samples, "features": self.features.read(label, features, start, self.length / self.rate, whole)}

    def feature_size(self) -> int:
        """The size of the features, of which there must be some. Errors: `UserError` that says what is wrong with the first ones."""
        problem: UserError | None = None
        for file in self.files:
            try:
                return int(self.features.open(file.label).shape[1]) if self.features else 0
            except UserError as error:
                problem = problem or error
        raise problem or UserError(f"{self.name}: no files")

    def _stretch(self, index: int, rng: np.random.Generator) -> tuple[Tensor, float, float]:
        """[C, t]: a random stretch of a file, at most `length` samples; where it begins, and how long the file is, in seconds.

        Errors: `UserError`, `OSError`.
        """
        samples = self._kept.get(index)
        if samples is None:
            entry = self.files[index]
            with open_audio(entry.label, entry.read()) as file:
                rate = int(file.samplerate)
                frames = -(-self.length * rate // self.rate)
                if file.frames > max(WHOLE_SECONDS * rate, frames):
                    begin = int(rng.integers(file.frames - frames + 1))
                    part = read_samples(file, frames, begin)
                    if part.shape[-1] < frames:
                        raise UserError(f"{entry.label}: cut off: it ends before its header says")
                    samples = convert_audio(part, rate, self.rate, self.channels)[:, : self.length]
                    return samples, begin / rate, file.frames / rate
                samples = convert_audio(read_clip(file, str(entry.label)), rate, self.rate, self.channels)
            self._keep(index, samples, samples.numel() * 4)
        spare = samples.shape[-1] - self.length
        start = int(rng.integers(spare + 1)) if spare > 0 else 0
        return samples[:, start : start + self.length], start / self.rate, samples.shape[-1] / self.rate
