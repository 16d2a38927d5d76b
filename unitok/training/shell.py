"""What all trainings share: the step counter, schedules, means of validation, and exact resume.

Networks know nothing of training; a `TrainingShell` is a thin LightningModule around one. Optimization is manual, with our own step
counter, because Lightning's `global_step` counts the steps of every optimizer. A checkpoint holds plain types and tensors only (it
loads with `weights_only=True`), and the position in the data as a number of samples. It holds no hyperparameters: the command line
and YAML decide.
"""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from unitok.errors import UserError, check_range
from unitok.training.budget import Budget

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

#: Seconds between two agreements of several processes on the time, and most steps between them: each makes all processes wait.
SYNC_SECONDS, SYNC_STEPS = 2.0, 50


def warmup_linear(step: int, progress: float, warmup_steps: int, stable_fraction: float = 0.0, final: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, constant up to `stable_fraction` of the run, then linear decay to `final`.

    step: steps done. progress: fraction of the run that is done.
    """
    decay = 1.0 if progress <= stable_fraction else final + (1 - final) * (1 - progress) / (1 - stable_fraction)
    return min(1.0, (step + 1) / max(1, warmup_steps)) * decay


def weight_average(network: torch.nn.Module, decay: float) -> AveragedModel:
    """A moving average of a network's weights, with a lower decay in the first steps. Buffers, such as codebooks, are copied."""

    def update(average: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        # Of sharded tensors (DTensor) each process updates its own part.
        old, new = ([p.to_local() if isinstance(p, DTensor) else p for p in each] for each in (average, weights))
        torch._foreach_lerp_(old, new, weight)

    return AveragedModel(network, multi_avg_fn=update).requires_grad_(False).eval()


#: Weighted sums and sums of weights, by metric. Added up over batches and processes, they give exact means.
Sums = dict[str, tuple[Tensor | float, Tensor | float]]

Batch = TypeVar("Batch", Tensor, dict[str, Tensor])


def add_sums(sums: Sums, more: Sums) -> None:
    """Add `more` to `sums`, in place."""
    for name, (total, weight) in more.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = before[0] + total, before[1] + weight


class TrainingShell(L.LightningModule, Generic[Batch]):
    """Base of all trainings. A subclass sets `config`, steps its optimizers in `optimize`, and validates in `measure`.

    Args:
        steps: length of the run in batches. Give one of `steps`, `minutes` and `tokens`.
        minutes: length of the run in minutes, which become steps after a short probe.
        tokens: length of the run in tokens.
        accumulate_grad_batches: number of parts in which a batch passes through the networks, to save memory; the step is the same.
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up.
        stable_fraction: fraction of the run at which the learning rate starts to fall, linearly, to a fiftieth.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices and kernels.
        grad_clip: largest norm of the gradient; 0 for no limit.
        ema_decay: decay of a moving average of the weights, which validation and bundles then use; 0 for none.
        log_every: steps between two logged rows.
    """

    kind = ""
    config: "DataclassInstance"  # of what is trained
    lr: float | None
    rms_prefixes: tuple[str, ...] = ()  # metrics with these prefixes are square roots of means
    progress_bar_metrics: tuple[str, ...] = ()  # shown beside the loss
    saved_attributes: tuple[str, ...] = ()  # saved in checkpoints: plain values and tensors

    def __init__(
        self,
        *,
        steps: int | None = None,
        minutes: float | None = None,
        tokens: float | None = None,
        accumulate_grad_batches: int = 1,
        lr: float | None = None,
        warmup_steps: int = 30,
        stable_fraction: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        grad_clip: float = 1.0,
        ema_decay: float = 0.0,
        log_every: int = 20,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.budget = Budget(steps, minutes, tokens)
        for name, value, least in (
            ("accumulate_grad_batches", accumulate_grad_batches, 1), ("log_every", log_every, 1), ("lr", lr, 0),
            ("warmup_steps", warmup_steps, 0), ("weight_decay", weight_decay, 0), ("grad_clip", grad_clip, 0),
        ):  # fmt: skip
            check_range(name, value, least)
        for name, value in (("stable_fraction", stable_fraction), ("ema_decay", ema_decay)):
            check_range(name, value, 0, 1)
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise UserError(f"betas {betas[0]:g}, {betas[1]:g}: both must be from 0 to below 1")
        self.accumulate_grad_batches = accumulate_grad_batches
        self.lr, self.warmup_steps, self.stable_fraction = lr, warmup_steps, stable_fraction
        self.betas, self.weight_decay, self.grad_clip, self.ema_decay = (betas[0], betas[1]), weight_decay, grad_clip, ema_decay
        self.log_every = log_every
        self.steps_done = self.samples_seen = 0
        self.healthy = True  # whether a checkpoint of this step is worth keeping
        self.progress = 0.0  # fraction of the run that was done when the step began
        self._last_loss: Tensor | float = 0.0
        self.settings: dict[str, object] = {}  # the configuration as plain values, by key; saved in every checkpoint
        self._resumed_settings: dict[str, object] = {}  # of the checkpoint that the run resumes from
        self._resumed_random: list[dict[str, Any]] | None = None  # random states of its processes; None in a new run
        self.average: AveragedModel | None = None  # of the weights
        self.now = 0.0  # seconds spent, with those of earlier processes, as all processes agreed
        self.synced = True  # whether `now` is the time of the step that has just ended
        self._syncs = (0, 0)  # step of the last agreement, and of the next
        self._timed = (0, 0.0)  # step and time at which the pace was last measured
        self._validations = 0  # per run; 0 where the Trainer has an interval of its own
        self._sums: Sums = {}  # of the validation in progress

    def optimize(self, batch: Batch) -> dict[str, Tensor | float]:
        """Make one step on a batch. Returns the metrics to log; `loss` is one of them."""
        raise NotImplementedError

    def measure(self, batch: Batch, show: bool) -> Sums:
        """Validate on a batch. show: whether to save examples, too. Returns sums of metrics."""
        raise NotImplementedError

    @property
    def data(self) -> L.LightningDataModule:
        """The data module of the run."""
        return getattr(self.trainer, "datamodule")  # noqa: B009 (the Trainer sets it when it starts)

    @property
    def boards(self) -> "list[SummaryWriter]":
        """The run's TensorBoard writers."""
        return [logger.experiment for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger)]

    def averaged(self, network: torch.nn.Module) -> torch.nn.Module:
        """The moving average of a network, or the network itself where none is kept."""
        return network if self.average is None else self.average.module

    def optimizer_list(self) -> list[LightningOptimizer]:
        """The optimizers in Lightning's wrappers, which count their steps."""
        optimizers = self.optimizers()
        every = optimizers if isinstance(optimizers, list) else [optimizers]
        return [each for each in every if isinstance(each, LightningOptimizer)]

    def due(self, every: int) -> bool:
        """Whether the present step is the last one or a multiple of `every`."""
        return (self.steps_done + 1) % every == 0 or self.budget.over(self.steps_done + 1)

    def gather_objects(self, value: object) -> list[Any]:
        """A plain value of each process, in the order of their ranks."""
        if self.trainer.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def _sync_time(self) -> None:
        """Read the clock: one process after each step, several processes every few steps, when they agree on the time."""
        several, (last, due) = self.trainer.world_size > 1, self._syncs
        self.synced = not several or self.steps_done >= due
        if not self.synced:
            return
        before, self.now = self.now, self.budget.clock()
        if several:  # clocks differ, and all processes must decide the same
            self.now = self.gather_objects(self.now)[0]
            steps = int(SYNC_SECONDS * (self.steps_done - last) / max(self.now - before, 1e-3))
            self._syncs = (self.steps_done, self.steps_done + max(1, min(SYNC_STEPS, steps)))
        self.budget.tick(self.steps_done, self.now)

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """Call `optimize`, then count, plan, log, and stop at the end of the run."""
        self.progress = self.budget.progress(self.steps_done)
        metrics = self.optimize(batch)
        self._last_loss = metrics["loss"]
        self.steps_done += 1
        first = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
        self.samples_seen += first.shape[0] * self.trainer.world_size
        self._sync_time()
        over, progress = self.budget.over(self.steps_done), self.budget.progress(self.steps_done)
        if self._validations:
            due = over or int(progress * self._validations + 1e-9) > int(self.progress * self._validations + 1e-9)
            self.trainer.val_check_batch = 1 if due else math.inf  # Lightning reads it after each batch
        if self.steps_done % self.log_every == 0 or over:
            metrics["loss"] = self.mean_over_processes(torch.as_tensor(metrics["loss"], device=self.device))
            metrics |= {"progress": self.progress} | self._check_files() | self._pace()
            self._log({name: float(value) for name, value in metrics.items()})
            self._check_loss(metrics["loss"])
        if over:
            self.trainer.should_stop = True

    def _log(self, row: dict[str, float]) -> None:
        """Log a row once: what `self.log` gets, Lightning keeps on the device, and fetches and writes again after every step."""
        for logger in self.trainer.loggers:
            logger.log_metrics(row, self.steps_done - 1)
        for name in row.keys() & {"loss", *self.progress_bar_metrics}:
            self.log(name, row[name], prog_bar=True, logger=False)

    def _check_files(self) -> dict[str, float]:
        """The data module's counts of files that could not be read."""
        return getattr(self.data, "check_files", dict)()

    def _check_loss(self, loss: Tensor | float) -> None:
        if not np.isfinite(float(loss)):
            raise UserError(f"step {self.steps_done}: the loss is {float(loss)}; lower the learning rate")

    def validation_step(self, batch: Batch | None, batch_index: int) -> None:
        """Add the sums of one batch; None stands for a batch of which no file could be read."""
        if batch is not None:
            sums = self.measure(batch, show=batch_index == 0 and self.trainer.is_global_zero)
            add_sums(self._sums, {name: (float(total), float(weight)) for name, (total, weight) in sums.items()})

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation data of all processes; their names begin with `val_`, of `unitok test` with `test_`."""
        sums: Sums = {}
        for part in self.gather_objects(self._sums):
            add_sums(sums, part)
        self._sums = {}
        prefix = "test" if self.trainer.state.fn == "test" else "val"
        for number, (name, value) in enumerate(self.means(sums).items()):
            self.log(f"{prefix}_{name}", float(value), prog_bar=number == 0)
        for name, count in self._check_files().items():
            if name.startswith("val_"):
                self.log(name, count)

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def means(self, sums: Sums) -> dict[str, Tensor | float]:
        """Means of the sums with a weight; for names with one of `rms_prefixes` their square roots."""
        means = {name: total / weight for name, (total, weight) in sums.items() if weight}
        return {name: mean**0.5 if name.startswith(self.rms_prefixes or "\0") else mean for name, mean in means.items()}

    def mean_over_processes(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        mean = self.trainer.strategy.reduce(value.clone(), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean

    def _pace(self) -> dict[str, float]:
        """Metrics of the pace since the last call: seconds per step, those of `speed`, and the minutes that are left."""
        (step, then), now = self._timed, time.monotonic()
        self._timed = (self.steps_done, now)
        if self.steps_done <= step:
            return {}
        seconds = (now - then) / (self.steps_done - step)
        metrics = {"seconds_per_step": seconds} | self.speed(self.steps_done - step, seconds)
        left = self.budget.eta_minutes(self.steps_done, seconds)
        return metrics if left is None else metrics | {"eta_minutes": left}

    def speed(self, steps: int, seconds_per_step: float) -> dict[str, float]:
        """More metrics of the pace of the last `steps` steps."""
        return {}

    def set_lr(self, optimizer: LightningOptimizer, peak: float) -> None:
        """Set the learning rate of all groups from its peak; it never comes from a checkpoint, so the present configuration decides."""
        for group in optimizer.param_groups:
            group["lr"] = peak * warmup_linear(self.steps_done, self.progress, self.warmup_steps, self.stable_fraction)

    def on_train_start(self) -> None:
        """Start the clock. In a resumed run also apply the present settings, and restore the random states."""
        self.budget.begin()
        self.now, self._syncs = self.budget.elapsed, (self.steps_done, self.steps_done)
        self._timed = (self.steps_done, time.monotonic())
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        self.settings["processes"] = processes
        content = getattr(getattr(self.trainer.train_dataloader, "dataset", None), "content", None)
        if content is not None:
            self.settings["content of data.path"] = content()
        if self._resumed_random is not None:
            changes = self._changes(self._resumed_settings)
            log.info("resumed from %s at step %d%s", self.trainer.ckpt_path, self.steps_done, changes)
            self._apply_settings()
            if len(self._resumed_random) == processes:
                _set_random_state(self._resumed_random[rank])
            else:  # another number of processes: the data goes on in order, random numbers start anew
                torch.manual_seed(self.samples_seen + rank)
            self._resumed_random = None
        if self.budget.over(self.steps_done):
            self.trainer.should_stop = True
        fixed = (
            self.trainer.val_check_batch != math.inf
        )  # by val_check_interval, or by flags that make epochs of the endless data
        self._validations = 0 if fixed else getattr(self.data, "validations", 0)

    def _changes(self, before: Mapping[str, object]) -> str:
        """Settings that differ from those of the checkpoint, for the log."""
        changes = [f"{k} {before[k]} -> {now}" for k, now in self.settings.items() if k in before and before[k] != now]
        return f"; changed: {', '.join(changes).replace(' None', ' unset')}" if changes else ""

    def _apply_settings(self) -> None:
        """Give the optimizers the present settings in place of those that came with their state."""
        configured = self.configure_optimizers()
        assert isinstance(configured, list)
        for restored, fresh in zip(self.trainer.optimizers, configured, strict=True):
            for old, new in zip(restored.param_groups, fresh.param_groups, strict=True):
                old.update({key: value for key, value in new.items() if key != "params"})

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exact resume needs. Errors: `UserError` where the loss is not finite, so such weights are not kept."""
        self._check_loss(self._last_loss)
        checkpoint["unitok"] = {
            "kind": self.kind,
            "part": self.part(),
            "structure": self.structure(),
            "steps_done": self.steps_done,
            "samples_seen": self.samples_seen,
            "budget": self.budget.state(),
            "settings": self.settings,
            "random": self.gather_objects(_random_state()),  # each process draws its own numbers
            "extra": {name: getattr(self, name) for name in self.saved_attributes},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it. Errors: `UserError` for a checkpoint of another kind, part or structure."""
        state = checkpoint.get("unitok") or {}
        if state.get("kind") != self.kind:
            raise UserError(f"the checkpoint is of {state.get('kind') or 'another program'}, this run trains {self.kind}")
        self.check_part(state["part"])
        if self.trainer.state.fn == "fit":
            check_same(state["structure"], self.structure(), "model")
        self.steps_done, self.samples_seen = state["steps_done"], state["samples_seen"]
        self.budget.restore(state["budget"], self.steps_done)
        self.progress = self.budget.progress(self.steps_done)
        self._resumed_settings, self._resumed_random = state["settings"], state["random"]
        for name in self.saved_attributes:
            setattr(self, name, state["extra"][name])

    def part(self) -> dict[str, Any]:
        """`config`, and what else is needed to use the weights, as plain values; saved in every checkpoint."""
        return {"config": asdict(self.config)}

    def check_part(self, part: dict[str, Any]) -> None:
        """Raise `UserError` where the run cannot go on with the part of a checkpoint."""
        check_same(asdict(type(self.config)()) | part["config"], asdict(self.config), self.kind.split()[-1])

    def structure(self) -> dict[str, object]:
        """Settings that decide which tensors a checkpoint has; a run cannot go on with different ones."""
        return {"averages": bool(self.ema_decay)}

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Average gradients over all processes, after several calls of `loss.backward()`: DDP's hooks handle one per step."""
        if self.trainer.world_size > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            vector_to_parameters(self.mean_over_processes(parameters_to_vector(gradients)), gradients)


def check_same(saved: Mapping[str, object], present: Mapping[str, object], what: str, free: tuple[str, ...] = ()) -> None:
    """Raise `UserError` naming the first field in which a checkpoint differs from the present value; `free` fields may differ."""
    for key, value in present.items():
        old = saved.get(key, None if value else value)  # an option that did not exist was off
        was, now = (list(each) if isinstance(each, tuple) else each for each in (old, value))
        if key not in free and was != now:
            raise UserError(f"{what}.{key} is {value}, the checkpoint has {old}: choose another --out or the same value")


def _random_state() -> dict[str, object]:
    """State of this process's random generators, of GPUs that of its own, as plain values and tensors."""
    state = _collect_rng_states(include_cuda=False)
    name, keys, *rest = state["numpy"]
    own = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return state | own | {"numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest]}


def _set_random_state(state: dict[str, Any]) -> None:
    """Set what `_random_state` gave, here or on a machine with other GPUs, or none."""
    name, keys, *rest = state["numpy"]
    without_gpus = {key: value for key, value in state.items() if "cuda" not in key}
    _set_rng_states(without_gpus | {"numpy": (name, keys.numpy().astype(np.uint32), *rest)})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
