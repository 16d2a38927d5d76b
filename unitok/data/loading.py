"""What all data modules share: the endless order of samples, its place in a checkpoint, and the loaders."""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import lightning as L
import torch
from torch.utils.data import DataLoader, default_collate

from unitok.errors import UserError, check_range

log = logging.getLogger("unitok")

AHEAD = 64  # batches that may be fetched ahead

Sample = TypeVar("Sample", covariant=True)


class Ordered(Protocol[Sample]):
    """A data set that is read by (epoch, index), in an order of its own for each of the `parts` of each epoch."""

    parts: int

    def order(self, epoch: int, part: int | None = None) -> Sequence[int]: ...

    def __getitem__(self, position: tuple[int, int], /) -> Sample: ...


class PartStart(NamedTuple):
    """Where a part of an epoch begins: the number of its first sample since the start of training."""

    sample: int
    epoch: int
    part: int


class EndlessBatches:
    """Batch sampler over all epochs of a data set; yields the part of each batch that belongs to one process.

    start: the number of the first sample, or a function that returns it. It is called whenever iteration begins: Lightning begins
    again for each epoch of its own (`limit_train_batches`). known: a beginning of a part at or before it, as `part_of` gave it.
    """

    def __init__(
        self,
        dataset: Ordered[object],
        batch_size: int,
        start: int | Callable[[], int] = 0,
        rank: int = 0,
        processes: int = 1,
        known: "PartStart | None" = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: at least 1")
        self.dataset, self.batch_size, self.start = dataset, batch_size, start
        self.rank, self.processes = rank, processes
        self._known = [PartStart(0, 0, 0), *([known] if known and known.part < dataset.parts else [])]

    def part_of(self, sample: int) -> "PartStart":
        """Return the last known beginning of a part at or before a sample."""
        return max(known for known in self._known if known.sample <= sample)

    def _positions(self) -> Iterator[tuple[int, int]]:
        first = self.start() if callable(self.start) else self.start
        sample, epoch, part = self.part_of(first)
        empty = 0  # parts without a sample, one after another
        while True:
            order = self.dataset.order(epoch, part)
            for i in range(max(0, first - sample), len(order)):
                yield epoch, int(order[i])
            sample, part, empty = sample + len(order), part + 1, 0 if len(order) else empty + 1
            if empty == self.dataset.parts:
                raise UserError("there are no samples to train on")
            if part == self.dataset.parts:
                epoch, part = epoch + 1, 0
            self._remember(PartStart(sample, epoch, part))

    def _remember(self, new: "PartStart") -> None:
        """Note a beginning; forget those that lie before all that is fetched ahead, but the very first, for a start before all others."""
        edge = new.sample - AHEAD * self.batch_size * self.processes
        later = [known for known in self._known[1:] if known.sample > edge]
        self._known = [self._known[0], *[known for known in self._known[1:] if known.sample <= edge][-1:], *later, new]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        positions = self._positions()
        while True:
            batch = [next(positions) for _ in range(self.batch_size * self.processes)]
            yield batch[self.rank :: self.processes]


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM of the process group once: the trainer still needs batches to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class DataModule(L.LightningDataModule):
    """Shared by all data modules: an endless loader for training that resumes where the model is, and a plain one to validate.

    Args:
        batch_size: samples per step and process.
        workers: processes that decode or pack; 0: the training process does; default: 4 where there is a GPU, else 0.
        seed: of the order.
        validations: how often a run validates, at equal intervals, the last time at its end; 0: at its end alone. An interval of
            the Trainer (val_check_interval, limit_train_batches) replaces it.
        val_samples: most samples that a run validates on; `unitok validate` takes all.
    """

    def __init__(
        self, batch_size: int, workers: int | None = None, seed: int = 0, validations: int = 10, val_samples: int = 1000
    ):
        super().__init__()
        counts = {"batch_size": (batch_size, 1), "val_samples": (val_samples, 1), "validations": (validations, 0)}
        for name, (value, least) in (counts | {"workers": (workers, 0), "seed": (seed, 0)}).items():
            check_range(name, value, least)
        self.batch_size, self.seed = batch_size, seed
        self.workers = (4 if torch.cuda.is_available() else 0) if workers is None else workers
        self.validations, self.val_samples = validations, val_samples
        self.start = 0  # samples that a checkpoint says were seen
        self._part = PartStart(0, 0, 0)  # that the next of them is in, or an earlier one
        self._batches: EndlessBatches | None = None

    def training_data(self) -> Ordered[object]:
        """The data set to train on. Errors: `UserError`."""
        raise NotImplementedError

    def validation_data(self) -> Ordered[object] | None:
        """The data set to validate on, or None. Errors: `UserError`."""
        return None

    def check_files(self) -> dict[str, float]:
        """Counts of bad files to log, over all processes, each of which must call this. Errors: `UserError` for too many."""
        return {}

    def collate(self, items: list[Any]) -> Any:
        """A batch of the samples that could be read; None if there are none."""
        samples = [item for item in items if item is not None]
        return default_collate(samples) if samples else None

    def _seen(self) -> int:
        """The number of samples that the model has seen; more may have been fetched for it."""
        trainer: Any = self.trainer
        seen = int(getattr(trainer.lightning_module, "samples_seen", self.start)) if trainer else self.start
        if trainer and trainer.overfit_batches:  # Lightning's flag to repeat the same batches
            seen %= int(trainer.overfit_batches) * self.batch_size * trainer.world_size
        return seen

    def epochs(self, samples: int) -> int:
        """The number of passes over the data that this many samples complete; what the model has seen, or a little less."""
        return self._batches.part_of(samples).epoch if self._batches else self._part.epoch

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader:
        data = self.training_data()
        self._batches = EndlessBatches(data, self.batch_size, self._seen, *self._processes(), known=self._part)
        return self._loader(data, batch_sampler=self._batches)

    def val_dataloader(self) -> DataLoader | list:
        """This process's part of the samples, in equally many batches per process; in a run, of the first `val_samples`."""
        data = self.validation_data()
        if data is None:
            if self.trainer and self.trainer.state.fn in ("validate", "test"):
                split = "test" if self.trainer.state.fn == "test" else "validation"
                raise UserError(f"there is nothing to measure: give data.val_path, or data with a split {split!r}")
            return []
        rank, processes = self._processes()
        fit = bool(self.trainer and self.trainer.state.fn == "fit")
        order: list[tuple[int, int]] = []
        for part in range(data.parts):  # a run packs no more than it looks at
            order += [(0, int(i)) for i in data.order(0, part)]
            if fit and len(order) >= self.val_samples:
                break
        if fit:
            if rank == 0:
                more = " or more" if part + 1 < data.parts else ""
                log.info("validation: %d of %d%s samples", min(len(order), self.val_samples), len(order), more)
            order = order[: self.val_samples]
        size = self.batch_size * processes
        return self._loader(data, batch_sampler=[order[i : i + size][rank::processes] for i in range(0, len(order), size)])

    test_dataloader = val_dataloader

    def _loader(self, data: Any, **options: Any) -> DataLoader:
        return DataLoader(
            data,
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator().manual_seed(self.seed),  # for the workers' seeds, to leave the global state alone
            **options,
        )

    def state_dict(self) -> dict[str, Any]:
        """The position in the data: the number of samples that the model has seen, and the part of the data that the next one is in."""
        module: Any = self.trainer.lightning_module if self.trainer else None
        if not module:
            return {}
        seen = int(module.samples_seen)
        return {"samples": seen, "part": list(self._batches.part_of(seen) if self._batches else self._part)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self._part = int(state.get("samples", 0)), PartStart(*state.get("part", (0, 0, 0)))
