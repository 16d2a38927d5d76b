"""Lightning data modules: image files, video files, audio files, token shards.

Each serves an endless stream of samples whose order is a pure function of (seed, epoch, index). Checkpoints keep the position in
it, a count of samples, so a resumed run goes on with exactly the next sample, with any number of workers or processes. Nothing here
uses the global random state, and neither does making a loader.
"""

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unitok.data.folders import NAMED, AudioDataset, Crop, FileDataset, ImageDataset, VideoDataset
from unitok.data.loading import DataModule
from unitok.data.packing import LongDocuments, PackedDataset
from unitok.data.shards import TokenDataset
from unitok.errors import UserError, check_range
from unitok.modalities.video import FASTEST
from unitok.vocab import Vocab

log = logging.getLogger("unitok")


class _Files(DataModule):
    """Shared by images, videos and audio.

    Args:
        path: what to train on: a folder, a pattern (`photos/**/*.jpg`), a JSON Lines file or table that names files, a tar archive,
            or a recipe (`.yaml`) as for `unitok tokenize`; or a list of these.
        val_path: the same to validate on, or none.
        root: another folder that paths in JSON Lines files and tables may lead into; default: they must not leave their own.
        max_bad_fraction: fraction of the files (of at least 100) that may be unreadable; with more the run ends.
    """

    def __init__(
        self,
        path: str | list[str],
        val_path: str | list[str] | None = None,
        root: str = "",
        max_bad_fraction: float = 0.1,
        **loading: Any,
    ):
        super().__init__(**loading)
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction {max_bad_fraction}: it must be in [0, 1]")
        self.path, self.val_path, self.root, self.max_bad_fraction = path, val_path, root, max_bad_fraction
        self._train: FileDataset | None = None
        self._val: FileDataset | None = None

    def _open(self, path: str | list[str], training: bool) -> FileDataset:
        """The data set of a path; for validation without random changes."""
        raise NotImplementedError

    def _open_once(self, path: str | list[str], training: bool) -> FileDataset:
        """`_open` in the first process, for all of them: hundreds that each list a million files stop a file system."""
        if self.trainer is None or self.trainer.world_size == 1:
            return self._open(path, training)
        opened: FileDataset | Exception | None = None
        if self.trainer.is_global_zero:
            try:
                opened = self._open(path, training)
            except (UserError, OSError) as error:  # the others wait for an answer
                opened = error
        opened = self.trainer.strategy.broadcast(opened)
        if isinstance(opened, Exception):
            raise opened
        assert opened is not None
        opened.state.share_memory_()  # with this process's workers
        return opened

    def training_data(self) -> FileDataset:
        if self._train is None:
            self._train = self._open_once(self.path, True)
        return self._train

    def validation_data(self) -> FileDataset | None:
        if self._val is None and self.val_path:
            self._val = self._open_once(self.val_path, False)
            self._val.replaces = False
        return self._val

    def check_files(self) -> dict[str, float]:
        """Numbers of unreadable files so far, over all processes, for the log. Errors: `UserError` where they are too many."""
        counts = {}
        for name, data in (("bad_files", self._train), ("val_bad_files", self._val)):
            if data is None:
                continue
            if self.trainer and self.trainer.world_size > 1:
                state = data.state.to(self.trainer.strategy.root_device)
                torch.distributed.all_reduce(state, torch.distributed.ReduceOp.MAX)
                data.state.copy_(torch.maximum(data.state, state.cpu()))
            bad, fraction = data.bad_files()
            if fraction > self.max_bad_fraction:
                raise UserError(
                    f"{data.name}: {bad} files cannot be read, more than max_bad_fraction {self.max_bad_fraction:g} of those "
                    "that were tried: mend or remove them, or raise it"
                )
            counts[name] = float(bad)
        return counts

    def teardown(self, stage: str) -> None:
        """Log the number of bad files, where not all were named."""
        for data in (self._train, self._val):
            if data is not None and data.bad_files()[0] > NAMED and self._processes()[0] == 0:
                log.warning("%s: %d files could not be read and were left out", data.name, data.bad_files()[0])


class ImageFiles(_Files):
    """Images of any format and size.

    Args:
        size: side of the squares, pixels. flip: mirror half of them, chosen at random.
        crop: `center` cuts the middle of each image, scaled to fit; `random` a window anywhere, of `size` pixels or up
            to `shrink` times as many per side, then scaled down. Validation always takes the center.
        loading: arguments of all media files (`_Files`) and of all data modules (`DataModule`).
    """

    def __init__(
        self,
        path: str | list[str],
        val_path: str | list[str] | None = None,
        size: int = 64,
        batch_size: int = 16,
        flip: bool = True,
        crop: Crop = "center",
        shrink: float = 1.0,
        **loading: Any,
    ):
        super().__init__(path, val_path, batch_size=batch_size, **loading)
        check_range("size", size, 1)
        check_range("shrink", shrink, 1)
        self.size, self.flip, self.crop, self.shrink = size, flip, crop, shrink

    def _open(self, path: str | list[str], training: bool) -> FileDataset:
        crop, shrink = (self.crop, self.shrink) if training else ("center", 1.0)
        return ImageDataset(path, self.size, self.flip and training, self.seed, crop, shrink, self.root)


class VideoFiles(_Files):
    """Videos and animations of any format, size and length, and images, which stand still.

    Args:
        size: side of the squares that the middle of each frame is scaled to, pixels. frames: of a sample, one more than a multiple of the
            tokenizer's `group`; shorter videos end with their last frame. fps: frames per second. flip: mirror half of the samples.
        loading: as for `ImageFiles`.
    """

    def __init__(
        self,
        path: str | list[str],
        val_path: str | list[str] | None = None,
        size: int = 64,
        frames: int = 9,
        fps: int = 8,
        batch_size: int = 8,
        flip: bool = True,
        **loading: Any,
    ):
        super().__init__(path, val_path, batch_size=batch_size, **loading)
        for name, value, most in (("size", size, math.inf), ("frames", frames, math.inf), ("fps", fps, FASTEST)):
            check_range(name, value, 1, most)
        self.size, self.frames, self.fps, self.flip = size, frames, fps, flip

    def _open(self, path: str | list[str], training: bool) -> FileDataset:
        return VideoDataset(path, self.size, self.frames, self.fps, self.flip and training, self.seed, self.root)


class AudioFiles(_Files):
    """Audio of any format, rate and length.

    Args:
        sample_rate: Hz to convert to. channels: 1 mono, 2 stereo. seconds: length of the samples.
        gain: change the loudness by a random number of decibels between these two. flip_polarity: negate half of the samples.
        balance: draw every folder equally often, whatever the number of files in it.
        features: folder of a teacher's features for the first level (`losses.semantic`): for `a/b.wav` an array [frames, size], spread evenly
            over the file, as `a/b.npy` or `b.npy`. Validation has none of these four.
        loading: as for `ImageFiles`.
    """

    def __init__(
        self,
        path: str | list[str],
        val_path: str | list[str] | None = None,
        sample_rate: int = 8_000,
        channels: int = 1,
        seconds: float = 0.8,
        batch_size: int = 32,
        gain: tuple[float, float] = (0.0, 0.0),
        flip_polarity: bool = False,
        balance: bool = False,
        features: str = "",
        **loading: Any,
    ):
        super().__init__(path, val_path, batch_size=batch_size, **loading)
        self.features = features
        check_range("sample_rate", sample_rate, 1)
        check_range("seconds", seconds, 1 / sample_rate)
        if gain[0] > gain[1]:
            raise UserError(f"gain {list(gain)}: the first is the lowest number of decibels")
        self.gain, self.flip_polarity, self.balance = (gain[0], gain[1]), flip_polarity, balance
        self.sample_rate, self.channels, self.length = sample_rate, channels, round(seconds * sample_rate)

    def _open(self, path: str | list[str], training: bool) -> FileDataset:
        gain, flip, balance = (self.gain, self.flip_polarity, self.balance) if training else ((0.0, 0.0), False, False)
        features = self.features if training else ""
        return AudioDataset(
            path, self.sample_rate, self.channels, self.length, self.seed, gain, flip, balance, self.root, features
        )

    def feature_size(self) -> int:
        """The size of the teacher's features; 0 without one. Errors: `UserError`."""
        data = self.training_data() if self.features else None
        return data.feature_size() if isinstance(data, AudioDataset) else 0


class TokenShards(DataModule):
    """Tokenized data sets, packed into sequences.

    Args:
        path: folder made by `unitok tokenize`, or a URL of one; or several with weights, in proportion to their tokens in an epoch:
            `{folder: weight, …}`. Of a data set with splits, the split `train`.
        val_path: another to validate on (its split `validation`, or all of it); default: the split `validation` of `path`. `unitok test`
            measures the split `test` instead.
        sequence_length: tokens per packed sequence; at least eight documents long, it wastes little.
        max_length: most tokens of a document; default: `sequence_length`.
        long_documents: longer documents: `split` them into pieces, `cut` them off, `drop` them, or stop with an `error`.
        condition_dropout: fraction of documents that are trained without their condition, for guidance in sampling.
        fill_rate: fraction of documents that get random holes in what they teach, and are trained to fill them instead: for `Unitok.fill`.
        loss_weights: weights in the loss by kind, instance or range: `{text: 3, speech: 0.5, audio.0: 2}`, where `audio.0` is the
            first level of audio. The weights that apply to a token are multiplied.
        prompt_loss_weight: weights, by the same names, of what a document only gives, as a fraction of the above: `{image: 0.2}` also
            learns, a little, to continue images that are prompts. Default: what is given is not learned.
        loading: arguments of all data modules (`DataModule`).
    """

    def __init__(
        self,
        path: str | dict[str, float],
        val_path: str | None = None,
        sequence_length: int = 1024,
        batch_size: int = 4,
        max_length: int | None = None,
        long_documents: LongDocuments = "split",
        condition_dropout: float = 0.1,
        loss_weights: dict[str, float] | None = None,
        prompt_loss_weight: dict[str, float] | None = None,
        fill_rate: float = 0.0,
        **loading: Any,
    ):
        super().__init__(batch_size, **loading)
        for name, length in (("sequence_length", sequence_length), ("max_length", max_length)):
            if length is not None and length < 2:
                raise UserError(f"{name} {length}: it must be at least 2 tokens")
        self.path, self.val_path, self.sequence_length = path, val_path, sequence_length
        self.max_length, self.long_documents, self.condition_dropout = max_length, long_documents, condition_dropout
        self.loss_weights, self.prompt_loss_weight = loss_weights or {}, prompt_loss_weight or {}
        check_range("fill_rate", fill_rate, 0, 1)
        check_range("condition_dropout", condition_dropout, 0, 1)
        self.fill_rate = fill_rate
        self._train: PackedDataset | None = None
        self._measured: dict[str, PackedDataset] = {}  # by split

    def _packed(
        self,
        sets: list[TokenDataset],
        weights: list[float] | None,
        dropout: float,
        vocab: Vocab | None,
        training: bool = False,
    ) -> PackedDataset:
        return PackedDataset(
            sets,
            self.sequence_length,
            self.seed,
            dropout,
            self.loss_weights,
            weights,
            self.max_length,
            self.long_documents,
            vocab,
            self.prompt_loss_weight if training else None,
            self.fill_rate if training else 0.0,
        )

    def training_data(self) -> PackedDataset:
        """The packed documents to train on, read once."""
        if self._train is None:
            mixture = self.path if isinstance(self.path, dict) else {self.path: 1.0}
            if not mixture:
                raise UserError("data.path: no data set; give a folder made by `unitok tokenize`")
            weights = list(mixture.values()) if len(mixture) > 1 else None
            sets = [TokenDataset(folder, "train") for folder in mixture]
            self._train = self._packed(sets, weights, self.condition_dropout, None, training=True)
        return self._train

    def validation_data(self) -> PackedDataset | None:
        split = "test" if self.trainer and self.trainer.state.fn == "test" else "validation"
        if split not in self._measured:
            folders = [self.val_path] if self.val_path else list(self.path if isinstance(self.path, dict) else [self.path])
            whole = [TokenDataset(folder) for folder in folders]
            chosen = [TokenDataset(f, split) for f, d in zip(folders, whole, strict=True) if d.has(split)]
            sets = chosen or (whole if self.val_path else [])
            if sets:
                self._measured[split] = self._packed(sets, None, 0.0, self.vocab)
        return self._measured.get(split)

    @property
    def vocab(self) -> Vocab:
        """The vocabulary of the training data."""
        return self.training_data().vocab

    def collate(self, items: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        """A batch, arrays [B, T]. Without samples it is one row of padding, because all processes must make equally many passes."""
        items = items or [self.training_data().padding()]
        return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}
