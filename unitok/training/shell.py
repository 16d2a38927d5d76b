"""What all training runs share: the step counter, schedules, means of validation, and exact resume.

Networks know nothing of this; a `TrainingShell` is a thin LightningModule around one. Optimization is manual, with a counter
of our own, because Lightning's `global_step` counts every optimizer's step. A checkpoint holds plain types and tensors only
(it loads with `weights_only=True`), and the position in the data as a count of samples. It has no hyperparameters: what the
command line and YAML say wins.
"""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from unitok.errors import UserError
from unitok.training.budget import Budget

log = logging.getLogger(__name__)

#: Seconds after which several processes agree on the time again, and most steps between: each time holds all of them up.
LOOK_SECONDS, LOOK_STEPS = 2.0, 50


def warmup_linear(step: int, share: float, warmup_steps: int, stable_fraction: float = 0.0, final: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up by steps, flat to `stable_fraction` of the run, then linearly down to `final`."""
    decay = 1.0 if share <= stable_fraction else final + (1 - final) * (1 - share) / (1 - stable_fraction)
    return min(1.0, (step + 1) / max(1, warmup_steps)) * decay


def weight_average(network: torch.nn.Module, decay: float) -> AveragedModel:
    """A moving average of a network's weights; younger ones count more at the start. Buffers, such as codebooks, are copied."""

    def move(average: Any, weights: Any, count: Any) -> None:
        share = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        # Of sharded tensors (DTensor) each process moves its own part.
        old, new = ([p.to_local() if isinstance(p, DTensor) else p for p in each] for each in (average, weights))
        torch._foreach_lerp_(old, new, share)

    return AveragedModel(network, multi_avg_fn=move).requires_grad_(False).eval()


#: By name, sums of what is to be averaged and of the weights that this has: means of parts of any size come out right.
Sums = dict[str, tuple[Tensor | float, Tensor | float]]


def add_sums(sums: Sums, more: Sums) -> None:
    """Add `more` to `sums`, in place."""
    for name, (total, weight) in more.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = before[0] + total, before[1] + weight


class TrainingShell(L.LightningModule):
    """Base of all training modules. A subclass sets `config`, steps its optimizers in `optimize`, and validates in `measure`.

    Args:
        steps: length of the training in batches. Give one of the three.
        minutes: its length in minutes, which become steps after a short probe.
        tokens: its length in tokens.
        accumulate_grad_batches: parts in which a batch goes through the networks, to save memory; the result is that of the whole.
        lr: peak, which then falls linearly to a fiftieth.
        warmup_steps: steps until the learning rate has its peak.
        stable_fraction: share of the run until which it stays there.
        betas: AdamW's.
        weight_decay: AdamW's, on matrices and kernels.
        grad_clip: largest norm of the gradient, 0 for none.
        ema_decay: of a moving average of the weights, which is then what is validated and bundled; 0 for none.
        log_every: steps between two lines of the log.
    """

    kind = ""
    config: Any  # of what is trained, a dataclass
    roots: tuple[str, ...] = ()  # how the names of metrics begin that are roots of means
    shown: tuple[str, ...] = ()  # what the progress bar shows beside the loss
    kept: tuple[str, ...] = ()  # attributes that go into checkpoints: plain values and tensors

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
        if accumulate_grad_batches < 1:
            raise UserError(f"accumulate_grad_batches {accumulate_grad_batches} must be at least 1")
        self.lr: Any = lr
        self.accumulate_grad_batches, self.warmup_steps, self.stable_fraction = (
            accumulate_grad_batches,
            warmup_steps,
            stable_fraction,
        )
        self.betas, self.weight_decay, self.grad_clip, self.ema_decay = (betas[0], betas[1]), weight_decay, grad_clip, ema_decay
        self.log_every = log_every
        self.steps_done = self.samples_seen = 0
        self.healthy = True  # whether a checkpoint of this moment is worth keeping
        self.share = 0.0  # of the run that is over, when the step began
        self._last_loss: Tensor | float = 0.0
        self.settings: dict[str, Any] = {}  # what the run was asked for, by name, as plain values; kept in every checkpoint
        self._restored: dict[str, Any] | None = None  # `settings` and `random` of the checkpoint it goes on from
        self.average: AveragedModel | None = None  # of the weights
        self.now = 0.0  # seconds spent, those of earlier processes included, as all processes know it
        self.looked = True  # whether `now` is of the step that has just ended
        self._looks = (0, 0)  # step at which it was last agreed on, and is the next time
        self._timed = (0, 0.0)  # step and time at which the pace was last looked at
        self._validates = 0  # how often in the run, unless the Trainer has an interval of its own
        self._measured: Sums = {}  # in the validation that goes on

    def optimize(self, batch: Any) -> dict[str, Tensor | float]:
        """One step on a batch; -> what to log, `loss` first."""
        raise NotImplementedError

    @property
    def data(self) -> Any:
        """The data module of the run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def boards(self) -> list[Any]:
        """The run's TensorBoard writers."""
        return [logger.experiment for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger)]

    def averaged(self, network: torch.nn.Module) -> Any:
        """A network whose weights are averaged, with the average; any other as it is."""
        return network if self.average is None else self.average.module

    def optimizer_list(self) -> list[Any]:
        """The optimizers as Lightning wraps them, which counts their steps."""
        found: Any = self.optimizers()
        return found if isinstance(found, list) else [found]

    def due(self, every: int) -> bool:
        """Whether the step that goes on is the last, or one of each `every`."""
        return (self.steps_done + 1) % every == 0 or self.budget.over(self.steps_done + 1)

    def everywhere(self, value: Any) -> list[Any]:
        """A plain value of each process, in their order."""
        if self.trainer.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def _look(self) -> None:
        """Agree on the time: one process after each step, several every few steps."""
        several, (last, due) = self.trainer.world_size > 1, self._looks
        self.looked = not several or self.steps_done >= due
        if not self.looked:
            return
        before, self.now = self.now, self.budget.clock()
        if several:  # clocks differ, and all processes must do the same
            self.now = self.everywhere(self.now)[0]
            steps = int(LOOK_SECONDS * (self.steps_done - last) / max(self.now - before, 1e-3))
            self._looks = (self.steps_done, self.steps_done + max(1, min(LOOK_STEPS, steps)))
        self.budget.tick(self.steps_done, self.now)

    def training_step(self, batch: Any, batch_index: int) -> None:
        """One step of the subclass, with what all share around it: counting, planning, logging, stopping."""
        self.share = self.budget.share(self.steps_done)
        logged = self.optimize(batch)
        self._last_loss = logged["loss"]
        self.steps_done += 1
        first = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
        self.samples_seen += first.shape[0] * self.trainer.world_size
        self._look()
        over, share = self.budget.over(self.steps_done), self.budget.share(self.steps_done)
        if self._validates:
            due = over or int(share * self._validates + 1e-9) > int(self.share * self._validates + 1e-9)
            self.trainer.val_check_batch = 1 if due else math.inf  # Lightning looks at it after each batch
        if self.steps_done % self.log_every == 0 or over:
            logged["loss"] = self.mean_everywhere(torch.as_tensor(logged["loss"], device=self.device))
            logged |= {"learning_progress": self.share} | self._check_files() | self._pace()
            for name, value in logged.items():
                self.log(name, float(value), prog_bar=name == "loss" or name in self.shown)
            self._check_loss(logged["loss"])
        if over:
            self.trainer.should_stop = True

    def _check_files(self) -> dict[str, float]:
        """What the data module has to log of files that could not be read."""
        return getattr(self.data, "check_files", dict)()

    def _check_loss(self, loss: Tensor | float) -> None:
        if not np.isfinite(float(loss)):
            raise UserError(f"step {self.steps_done}: the loss is {float(loss)}; lower the learning rate")

    def measure(self, batch: Any, show: bool) -> Sums:
        """What validation says of a batch; `show`: whether to leave something to look at, too."""
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Add a batch to what is measured. There is none where none of its files could be read."""
        if batch is not None:
            found = self.measure(batch, show=batch_index == 0 and self.trainer.is_global_zero)
            add_sums(self._measured, {name: (float(total), float(weight)) for name, (total, weight) in found.items()})

    def on_validation_epoch_end(self) -> None:
        """Log means over all that was measured, by all processes, under names that begin with `val_`."""
        sums: Sums = {}
        for part in self.everywhere(self._measured):
            add_sums(sums, part)
        self._measured = {}
        for number, (name, value) in enumerate(self.means(sums).items()):
            self.log(f"val_{name}", float(value), prog_bar=number == 0)
        for name, count in self._check_files().items():
            if name.startswith("val_"):
                self.log(name, count)

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def means(self, sums: Sums) -> dict[str, Tensor | float]:
        """Of sums that have a weight; of those in `roots` the roots of it."""
        found = {name: total / weight for name, (total, weight) in sums.items() if weight}
        return {name: mean**0.5 if name.startswith(self.roots or "\0") else mean for name, mean in found.items()}

    def mean_everywhere(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        return self.trainer.strategy.reduce(value.clone(), reduce_op="mean")

    def _pace(self) -> dict[str, float]:
        """Since it was last asked: seconds a step, what `speed` makes of them, and the minutes that are left."""
        (step, then), now = self._timed, time.monotonic()
        self._timed = (self.steps_done, now)
        if self.steps_done <= step:
            return {}
        seconds = (now - then) / (self.steps_done - step)
        found = {"seconds_per_step": seconds} | self.speed(self.steps_done - step, seconds)
        left = self.budget.eta_minutes(self.steps_done, seconds)
        return found if left is None else found | {"eta_minutes": left}

    def speed(self, steps: int, seconds_per_step: float) -> dict[str, float]:
        """What else to log of the pace of the last `steps` steps."""
        return {}

    def set_rate(self, optimizer: Any, peak: float) -> None:
        """Set the learning rate of every group; never taken from a checkpoint, so that what the user says now wins."""
        for group in optimizer.param_groups:
            group["lr"] = peak * warmup_linear(self.steps_done, self.share, self.warmup_steps, self.stable_fraction)

    def on_train_start(self) -> None:
        """Start the clock; on resume, make settings and random numbers what they should be."""
        self.budget.begin()
        self.now, self._looks = self.budget.elapsed, (self.steps_done, self.steps_done)
        self._timed = (self.steps_done, time.monotonic())
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        self.settings["processes"] = processes
        data: Any = getattr(self.trainer.train_dataloader, "dataset", None)
        if hasattr(data, "content"):
            self.settings["content of data.path"] = data.content()
        if self._restored is not None:
            told = self._changes(self._restored["settings"])
            log.info("resumed from %s at step %d%s", self.trainer.ckpt_path, self.steps_done, told)
            self._assert_settings()
            if len(self._restored["random"]) == processes:
                _set_random_state(self._restored["random"][rank])
            else:  # another number of processes: the data goes on in order, random numbers start anew
                torch.manual_seed(self.samples_seen + rank)
            self._restored = None
        if self.budget.over(self.steps_done):
            self.trainer.should_stop = True
        given = self.trainer.val_check_batch != math.inf  # by val_check_interval, or by what makes epochs of the endless data
        self._validates = 0 if given else getattr(self.data, "validations", 0)

    def _changes(self, before: dict[str, Any]) -> str:
        """What is asked for now that was not when the checkpoint was written, for people."""
        told = [f"{k} {before[k]} -> {now}" for k, now in self.settings.items() if k in before and before[k] != now]
        return f"; changed: {', '.join(told).replace(' None', ' unset')}" if told else ""

    def _assert_settings(self) -> None:
        """Give the optimizers the settings asked for now, in place of those that came with their state."""
        asked: Any = self.configure_optimizers()
        for mine, wanted in zip(self.trainer.optimizers, asked, strict=True):
            for group, fresh in zip(mine.param_groups, wanted.param_groups, strict=True):
                group.update({key: value for key, value in fresh.items() if key != "params"})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exact resume needs; errors: `UserError` where the loss is no number, so that no such weights are kept."""
        self._check_loss(self._last_loss)
        checkpoint["unitok"] = {
            "kind": self.kind,
            "part": self.part(),
            "structure": self.structure(),
            "steps_done": self.steps_done,
            "samples_seen": self.samples_seen,
            "budget": self.budget.state(),
            "settings": self.settings,
            "random": self.everywhere(_random_state()),  # each draws numbers of its own
            "extra": {name: getattr(self, name) for name in self.kept},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back; errors: `UserError` for a checkpoint of another kind, part or structure."""
        state = checkpoint.get("unitok") or {}
        if state.get("kind") != self.kind:
            raise UserError(f"the checkpoint is of {state.get('kind') or 'another program'}, this run trains {self.kind}")
        self.check_part(state["part"])
        if self.trainer.state.fn == "fit":
            check_same(state["structure"], self.structure(), "model")
        self.steps_done, self.samples_seen = state["steps_done"], state["samples_seen"]
        self.budget.restore(state["budget"], self.steps_done)
        self.share = self.budget.share(self.steps_done)
        self._restored = state
        for name in self.kept:
            setattr(self, name, state["extra"][name])

    def part(self) -> dict[str, Any]:
        """`config`, and what else is needed to use the weights, as plain values; kept in every checkpoint."""
        return {"config": asdict(self.config)}

    def check_part(self, part: dict[str, Any]) -> None:
        """Raise `UserError` where a run cannot go on with a checkpoint's part."""
        check_same(part["config"], asdict(self.config), self.kind.split()[-1])

    def structure(self) -> dict[str, Any]:
        """Settings that decide which tensors a checkpoint has; a run cannot go on with others."""
        return {"averages": bool(self.ema_decay)}

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Make gradients the mean over all processes, after several `loss.backward()`: DDP's hooks know one per step."""
        if self.trainer.world_size > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            vector_to_parameters(self.mean_everywhere(parameters_to_vector(gradients)), gradients)


def check_same(saved: dict[str, Any], asked: dict[str, Any], what: str, free: tuple[str, ...] = ()) -> None:
    """Raise `UserError` naming the first field, but for `free` ones, in which a checkpoint differs from what is asked for."""
    for key, value in asked.items():
        old = saved.get(key)
        was, now = (list(each) if isinstance(each, tuple) else each for each in (old, value))
        if key not in free and was != now:
            raise UserError(f"{what}.{key} is {value}, the checkpoint has {old}: choose another --out or the same value")


def _random_state() -> dict[str, Any]:
    """Of this process's generators, as plain values and tensors."""
    state = _collect_rng_states()
    name, keys, *rest = state["numpy"]
    return state | {"numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest]}


def _set_random_state(state: dict[str, Any]) -> None:
    name, keys, *rest = state["numpy"]
    _set_rng_states(state | {"numpy": (name, keys.numpy().astype(np.uint32), *rest)})
