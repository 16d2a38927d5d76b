"""Lightning data modules: folders of images, folders of sounds, token shards.

All three serve an endless stream of samples whose order is a pure function of (seed, epoch, index); a position in it is
a count of samples, kept in checkpoints, so a resumed run, with any number of workers or processes, goes on with exactly
the next sample. Nothing here draws from global random state.
"""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unitok.data.media import convert_audio, crop_square, find_media, open_audio, open_image, read_samples
from unitok.data.packing import LongDocuments, PackedDataset
from unitok.data.shards import TokenDataset
from unitok.errors import UserError
from unitok.vocab import Vocab

Crop = Literal["centre", "random"]

CACHE_BYTES = 1 << 30  # decoded files are kept in memory up to this, in each process
WHOLE_SECONDS = 60  # sounds up to this long are decoded whole and kept


class Ordered(Protocol):
    """A data set that is read by (epoch, index), in an order of its own for each epoch."""

    def order(self, epoch: int) -> Sequence[int]: ...

    def __getitem__(self, place: tuple[int, int]) -> Any: ...


class EndlessBatches:
    """Batch sampler over all epochs of a data set, from sample number `start` on; one process's share of each batch."""

    def __init__(self, dataset: Ordered, batch_size: int, start: int = 0, rank: int = 0, processes: int = 1):
        self.dataset, self.batch_size, self.start = dataset, batch_size, start
        self.rank, self.processes = rank, processes

    def _places(self) -> Iterator[tuple[int, int]]:
        skip, epoch = self.start, 0
        while True:
            order = self.dataset.order(epoch)
            for i in range(min(skip, len(order)), len(order)):
                yield epoch, int(order[i])
            skip = max(0, skip - len(order))
            epoch += 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        places = self._places()
        while True:
            batch = [next(places) for _ in range(self.batch_size * self.processes)]
            yield batch[self.rank :: self.processes]


class FileDataset(Dataset):
    """Files of one kind under a folder, decoded when first asked for and kept in memory while there is room."""

    def __init__(self, folder: Path, kind: str, seed: int):
        folder = Path(folder)
        if not folder.exists():
            raise UserError(f"{folder}: no such folder")
        self.folder = folder
        self.files, _ = find_media(folder, kind)
        if not self.files:
            raise UserError(f"{folder}: no {kind} files in it")
        self.seed = seed
        self._kept: dict[int, Any] = {}
        self._bytes = 0

    def order(self, epoch: int) -> Sequence[int]:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.files)).tolist()

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


class ImageDataset(FileDataset):
    """[3, S, S] float in [-1, 1]: a square of each picture, mirrored by chance if `flip`; see `ImageFiles`."""

    def __init__(self, folder: Path, size: int, flip: bool, seed: int, crop: Crop = "centre", shrink: float = 1.0):
        super().__init__(folder, "image", seed)
        self.size, self.flip, self.crop, self.shrink = size, flip, crop, shrink

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        epoch, index = place
        rng = np.random.default_rng((self.seed, epoch, index))
        kept = self._kept.get(index)
        if kept is None:
            image = open_image(self.files[index])
            image = crop_square(image, self.size) if self.crop == "centre" else image
            kept = self._keep(index, np.asarray(image), 3 * image.width * image.height)
        mirrored = self.flip and rng.random() < 0.5
        pixels = kept if self.crop == "centre" else self._random_square(kept, rng)
        pixels = pixels[:, ::-1] if mirrored else pixels
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div_(127.5).sub_(1)

    def _random_square(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = pixels.shape[:2]
        side = min(height, width, round(self.size * self.shrink ** rng.random()))
        top, left = (int(rng.integers(length - side + 1)) for length in (height, width))
        square = pixels[top : top + side, left : left + side]
        return square if side == self.size else np.asarray(crop_square(Image.fromarray(square), self.size))


class SoundDataset(FileDataset):
    """[C, T] float in [-1, 1]: a stretch of each sound at a random place, zeros after sounds that are shorter; `AudioFiles`.

    Of files of more than `WHOLE_SECONDS` only the stretch is read.
    """

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
        times = [0] * len(self.files)
        out = []
        for choice in rng.integers(len(groups), size=len(self.files)):
            deck = decks[choice] = decks[choice] or rng.permutation(groups[choice]).tolist()
            index = deck.pop()
            out.append(index + times[index] * len(self.files))
            times[index] += 1
        return out

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        epoch, index = place
        rng = np.random.default_rng((self.seed, epoch, index))
        piece = self._stretch(index % len(self.files), rng)
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
                if file.frames > max(WHOLE_SECONDS * rate, wanted) and file.seekable():
                    piece = read_samples(file, wanted, int(rng.integers(file.frames - wanted + 1)))
                    return convert_audio(piece, rate, self.rate, self.channels)[:, : self.length]
                samples = convert_audio(read_samples(file), rate, self.rate, self.channels)
            self._keep(index, samples, samples.numel() * 4)
        spare = samples.shape[-1] - self.length
        start = int(rng.integers(spare + 1)) if spare > 0 else 0
        return samples[:, start : start + self.length]


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and SIGTERM of a whole process group: the trainer ends its step with the batches of living workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class _Module(L.LightningDataModule):
    """What the three share: an endless loader for training that starts where the checkpoint says, a plain one to validate."""

    def __init__(self, batch_size: int, workers: int, seed: int):
        super().__init__()
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.start = 0  # samples already seen

    def training_data(self) -> Ordered:
        raise NotImplementedError

    def validation_data(self) -> Ordered | None:
        return None

    def collate(self, items: list[Any]) -> Any:
        return torch.stack(items)

    def train_dataloader(self) -> DataLoader:
        data = self.training_data()
        trainer = self.trainer
        rank, processes = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        batches = EndlessBatches(data, self.batch_size, self.start, rank, processes)
        return self._loader(data, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader | list:
        data = self.validation_data()
        if data is None:
            return []
        order = [(0, int(i)) for i in data.order(0)]
        cut = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return self._loader(data, batch_sampler=cut)

    test_dataloader = val_dataloader

    def _loader(self, data: Any, **how: Any) -> DataLoader:
        pinned = torch.cuda.is_available()
        return DataLoader(
            data,
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=pinned,
            persistent_workers=self.workers > 0,
            worker_init_fn=_leave_signals_to_the_trainer,
            **how,
        )

    def state_dict(self) -> dict[str, int]:
        """The position in the data: how many samples the model has seen."""
        module: Any = self.trainer.lightning_module if self.trainer else None
        return {"samples": int(module.samples_seen)} if module else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = int(state.get("samples", 0))


class ImageFiles(_Module):
    """Pictures under a folder, of any format and size.

    Args:
        path: folder with the training pictures. val_path: folder to validate on, or none.
        size: side of the squares, pixels. batch_size: pictures a step and process. flip: mirror half of them by chance.
        crop: `centre` cuts the middle of each picture, scaled to fit; `random` a window anywhere, of `size` pixels or up
            to `shrink` times as many a side, then scaled down. Validation always takes the centre.
        workers: processes that decode; 0 decodes in the training process. seed: of the order.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        size: int = 64,
        batch_size: int = 16,
        flip: bool = True,
        crop: Crop = "centre",
        shrink: float = 1.0,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, workers, seed)
        self.path, self.val_path, self.size, self.flip = path, val_path, size, flip
        self.crop, self.shrink = crop, shrink

    def training_data(self) -> Ordered:
        return ImageDataset(Path(self.path), self.size, self.flip, self.seed, self.crop, self.shrink)

    def validation_data(self) -> Ordered | None:
        return ImageDataset(Path(self.val_path), self.size, False, self.seed) if self.val_path else None


class AudioFiles(_Module):
    """Sounds under a folder, of any format, rate and length.

    Args:
        path: folder with the training sounds. val_path: folder to validate on, or none.
        sample_rate: Hz to convert to. channels: 1 mono, 2 stereo. seconds: length of the stretches.
        batch_size: stretches a step and process.
        gain: loudness is changed by a random number of decibels between these two. flip_polarity: turn half of them over.
        balance: draw folders alike, whatever the number of files in each. Validation has none of these three.
        workers: processes that decode; 0 decodes in the training process. seed: of the order.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        sample_rate: int = 8_000,
        channels: int = 1,
        seconds: float = 0.8,
        batch_size: int = 32,
        gain: tuple[float, float] = (0.0, 0.0),
        flip_polarity: bool = False,
        balance: bool = False,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, workers, seed)
        if gain[0] > gain[1]:
            raise UserError(f"gain {list(gain)}: the first is the lowest number of decibels")
        self.path, self.val_path = path, val_path
        self.gain, self.flip_polarity, self.balance = (gain[0], gain[1]), flip_polarity, balance
        self.sample_rate, self.channels, self.length = sample_rate, channels, round(seconds * sample_rate)

    def _data(self, path: str, *augment: Any) -> Ordered:
        return SoundDataset(Path(path), self.sample_rate, self.channels, self.length, self.seed, *augment)

    def training_data(self) -> Ordered:
        return self._data(self.path, self.gain, self.flip_polarity, self.balance)

    def validation_data(self) -> Ordered | None:
        return self._data(self.val_path) if self.val_path else None


class TokenShards(_Module):
    """Tokenized data sets, packed.

    Args:
        path: folder made by `unitok tokenize`, or a URL of one; or several, each with its share of the ids: `{folder: share, …}`.
            Of one that was split, the split `train`.
        val_path: another to validate on (all of it, or its split `validation`); by default the split `validation` of `path`.
        row_length: ids a packed row; rows of eight documents and more waste least. batch_size: rows a step and process.
        max_length: most ids of a document (default: a row's).
        long_documents: what to do with longer ones: `split` them into pieces, `cut` off the rest, `drop` or `refuse` them.
        drop_condition: share of documents trained without their condition, for guidance in sampling.
        text_weight, image_weight, audio_weight: factors on the loss of each modality.
        audio_level_weights: factors on the loss of each level of sounds, or none.
        workers: processes that pack; 0 packs in the training process. seed: of the order.
    """

    def __init__(
        self,
        path: str | dict[str, float],
        val_path: str | None = None,
        row_length: int = 1024,
        batch_size: int = 4,
        max_length: int | None = None,
        long_documents: LongDocuments = "split",
        drop_condition: float = 0.1,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        audio_weight: float = 1.0,
        audio_level_weights: list[float] | None = None,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, workers, seed)
        if row_length < 2:
            raise UserError(f"row_length {row_length}: it must be at least 2 ids")
        if max_length is not None and max_length < 2:
            raise UserError(f"max_length {max_length}: it must be at least 2 ids")
        self.path, self.val_path, self.row_length = path, val_path, row_length
        self.max_length, self.long_documents, self.drop_condition = max_length, long_documents, drop_condition
        self.weights = {"text": text_weight, "image": image_weight, "audio": audio_weight}
        self.level_weights = audio_level_weights or []
        self.weights |= {f"audio_{level}": w for level, w in enumerate(self.level_weights)}
        self._train: PackedDataset | None = None

    def _data(
        self, sets: list[TokenDataset], shares: list[float] | None, drop_condition: float, vocab: Vocab | None = None
    ) -> PackedDataset:
        how = (self.row_length, self.seed, drop_condition, self.weights, shares, self.max_length, self.long_documents)
        data = PackedDataset(sets, *how, vocab=vocab)
        levels = len(data.vocab.body("audio")) if "audio" in data.vocab.spans else 0
        if self.level_weights and len(self.level_weights) != levels:
            raise UserError(
                f"audio_level_weights: {len(self.level_weights)} numbers, the vocabulary has {levels} levels of sounds"
            )
        return data

    def training_data(self) -> PackedDataset:
        if self._train is None:
            mixture = self.path if isinstance(self.path, dict) else {self.path: 1.0}
            if not mixture:
                raise UserError("data.path: no data set; give a folder made by `unitok tokenize`")
            shares = list(mixture.values()) if len(mixture) > 1 else None
            self._train = self._data([TokenDataset(f, "train") for f in mixture], shares, self.drop_condition)
        return self._train

    def validation_data(self) -> PackedDataset | None:
        folders = [self.val_path] if self.val_path else list(self.path if isinstance(self.path, dict) else [self.path])
        whole = [TokenDataset(folder) for folder in folders]
        split = [TokenDataset(f, "validation") for f, d in zip(folders, whole, strict=True) if d.has("validation")]
        sets = split or (whole if self.val_path else [])
        return self._data(sets, None, 0.0, self.vocab) if sets else None

    @property
    def vocab(self) -> Vocab:
        return self.training_data().vocab

    def collate(self, items: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}
