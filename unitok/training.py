"""What all training runs share: the step counter, schedules, budgets in minutes, exact resume, and the command line.

Networks know nothing of this; a `TrainingShell` is a thin LightningModule around one. Choices:

- Optimisation is manual, with a counter of our own, because Lightning's `global_step` counts every optimizer's step.
- A budget in minutes becomes a number of steps after a short probe and is corrected at each tenth; the plan is kept in
  the checkpoint.
- A checkpoint holds plain types and tensors only (it loads with `weights_only=True`): weights, optimizers, counters,
  random state, and the position in the data as a count of samples.
- What the command line and YAML say wins over what a checkpoint remembers: checkpoints carry no hyperparameters.
"""

import copy
import logging
import random
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from unitok.checkpoints import load_checkpoint
from unitok.errors import UserError

PROBE_SHARE = 0.06  # of the minutes, before the number of steps is fixed
REPLANS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # shares of the run at which it is fixed anew, from the last
RESERVE_SECONDS = 2.0  # for the last checkpoint
CHECKPOINT_SECONDS = 30


class Budget:
    """How long to train: a number of steps, or minutes that become one after a probe.

    Machines do not keep their pace, and a loss that begins in the middle changes it, so the plan for minutes is made again,
    from the pace of the last stretch, at each tenth of the run. The share of the run that is over never goes back. What was planned is kept in checkpoints.
    """

    def __init__(self, steps: int | None, minutes: float | None):
        if (steps is None) == (minutes is None):
            raise UserError("give the length of the training as either steps or minutes")
        self.total, self.minutes = steps, minutes
        self.spent = 0.0  # seconds before this process
        self.floor = 0.0  # the share never falls below this
        self.replans = list(REPLANS)  # shares at which the plan is still to be made again
        self._began = 0.0
        self._mark: tuple[int, float] | None = None  # step and time at which the stretch began

    def begin(self) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def tick(self, done: int) -> None:
        """After step `done`: make the plan when the probe has seen enough, and again at each tenth."""
        if self.minutes is None:
            return
        now, seconds = time.monotonic(), self.minutes * 60
        if self._mark is None or done <= 3:  # the first steps are slow: caches, k-means, lazy initialisation
            self._mark = (done, now)
            return
        elapsed, steps = self.spent + now - self._began, done - self._mark[0]
        if self.total is None:
            due = elapsed >= PROBE_SHARE * seconds
        else:
            due = bool(self.replans) and done >= self.replans[-1] * self.total
        if due and steps >= 5:
            if self.total is not None:
                self.floor = self.share(done)
                while self.replans and self.replans[-1] <= self.floor:
                    self.replans.pop()
            pace = (now - self._mark[1]) / steps
            self.total = done + max(1, int((seconds - RESERVE_SECONDS - elapsed) / pace))
            self._mark = (done, now)

    def share(self, done: int) -> float:
        """Share of the run that is over, in [0, 1]; while the total is unknown, by the clock."""
        if self.total is not None:
            return max(self.floor, min(1.0, done / self.total))
        elapsed = self.spent + (time.monotonic() - self._began if self._began else 0.0)
        return min(PROBE_SHARE, elapsed / ((self.minutes or 1.0) * 60))

    def over(self, done: int) -> bool:
        return self.total is not None and done >= self.total

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        spent = self.spent + (time.monotonic() - self._began if self._began else 0.0)
        plan = {"total": self.total, "floor": self.floor, "replans": list(self.replans)}
        return plan | {"spent": spent, "minutes": self.minutes}

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint; steps that were asked for now win over what it remembers."""
        self.spent = float(state["spent"])
        if self.minutes is not None and self.minutes == state["minutes"]:
            self.total, self.floor, self.replans = state["total"], state["floor"], list(state["replans"])


def warmup_linear(step: int, share: float, warmup_steps: int, hold: float = 0.0, final: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up by steps, flat to `hold` of the run, then linearly down to `final`."""
    decay = 1.0 if share <= hold else final + (1 - final) * (1 - share) / (1 - hold)
    return min(1.0, (step + 1) / max(1, warmup_steps)) * decay


class WeightAverage(torch.nn.Module):
    """A moving average of a network's weights, in `model`; younger weights count more at the start."""

    def __init__(self, network: torch.nn.Module, decay: float):
        super().__init__()
        self.model: Any = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, network: torch.nn.Module, step: int) -> None:
        """After step number `step`; buffers, such as codebooks, are copied."""
        mine, theirs = list(self.model.parameters()), [p.detach() for p in network.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - min(self.decay, (1 + step) / (10 + step)))
        for to, of in zip(self.model.buffers(), network.buffers(), strict=True):
            to.copy_(of)


class TrainingShell(L.LightningModule):
    """Base of all training modules.

    A subclass gives `optimize(batch) -> dict of named numbers to log`, does its own backward and optimizer steps there,
    and describes itself in `part()`.
    """

    kind = ""
    shown: tuple[str, ...] = ()  # what the progress bar shows beside the loss

    def __init__(self, steps: int | None, minutes: float | None, log_every: int = 20):
        super().__init__()
        self.automatic_optimization = False
        self.budget = Budget(steps, minutes)
        self.steps_done = 0
        self.samples_seen = 0
        self.log_every = log_every
        self.share = 0.0  # of the run that is over, when the step began
        self._last_loss: Tensor | float = 0.0
        self._restored: dict[str, Any] | None = None

    def optimize(self, batch: Any) -> dict[str, Tensor | float]:
        """One step on a batch; -> what to log, the first of which the progress bar shows."""
        raise NotImplementedError

    def part(self) -> dict[str, Any]:
        """`kind`, `config` and whatever else is needed to use the weights, as plain values; kept in every checkpoint."""
        raise NotImplementedError

    @property
    def data(self) -> Any:
        """The data module of the run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _agreed(self, value: Any) -> Any:
        """The first process's value, where clocks decide: all processes must do the same."""
        by_clock = self.budget.minutes is not None and self.trainer.world_size > 1
        return self.trainer.strategy.broadcast(value) if by_clock else value

    def training_step(self, batch: Any, batch_index: int) -> None:
        self.share = self._agreed(self.budget.share(self.steps_done))
        logged = self.optimize(batch)
        self._last_loss = next(iter(logged.values()))
        self.steps_done += 1
        first = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
        self.samples_seen += first.shape[0] * self.trainer.world_size
        self.budget.tick(self.steps_done)
        over = self._agreed(self.budget.over(self.steps_done))
        if self.steps_done % self.log_every == 0 or over:
            values = {name: float(value) for name, value in logged.items()}
            loss, *rest = values
            self.log(loss, values[loss], prog_bar=True)
            for name in rest:
                self.log(name, values[name], prog_bar=name in self.shown)
            self.log("learning_progress", self.share)
            if not np.isfinite(values[loss]):
                raise UserError(f"step {self.steps_done}: the {loss} is {values[loss]}; lower the learning rate")
        if over:
            self.trainer.should_stop = True

    def set_rate(self, optimizer: Any, rate: float) -> None:
        """Set the learning rate of every group; never taken from a checkpoint, so that what the user says now wins."""
        for group in optimizer.param_groups:
            group["lr"] = rate

    def on_train_start(self) -> None:
        self.budget.begin()
        if self._restored is not None:
            self._assert_settings()
            _set_random_state(self._restored)
            self._restored = None
        if self.budget.over(self.steps_done):
            self.trainer.should_stop = True

    def _assert_settings(self) -> None:
        """Give the optimizers the settings asked for now, in place of those that came with their state."""
        asked: Any = self.configure_optimizers()
        asked = asked if isinstance(asked, list) else [asked]
        actual: Any = self.optimizers(use_pl_optimizer=False)
        actual = actual if isinstance(actual, list) else [actual]
        for mine, wanted in zip(actual, asked, strict=True):
            for group, fresh in zip(mine.param_groups, wanted.param_groups, strict=True):
                group.update({key: value for key, value in fresh.items() if key != "params"})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not np.isfinite(float(self._last_loss)):
            raise UserError(f"step {self.steps_done}: the loss is {float(self._last_loss)}; lower the learning rate")
        checkpoint["unitok"] = {
            "kind": self.kind,
            "part": self.part(),
            "steps_done": self.steps_done,
            "samples_seen": self.samples_seen,
            "budget": self.budget.state(),
            "random": _random_state(),
            "extra": self.extra(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("unitok") or {}
        if state.get("kind") != self.kind:
            raise UserError(f"the checkpoint is of {state.get('kind') or 'another program'}, this run trains {self.kind}")
        self.check_part(state["part"])
        self.steps_done, self.samples_seen = state["steps_done"], state["samples_seen"]
        self.share = self.budget.share(self.steps_done)
        self.budget.restore(state["budget"])
        self._restored = state["random"]
        self.restore_extra(state.get("extra") or {})

    def extra(self) -> dict[str, Any]:
        """What else a run that goes on needs, as plain values and tensors."""
        return {}

    def restore_extra(self, extra: dict[str, Any]) -> None:
        """Inverse of `extra`."""

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Make gradients the mean over all processes.

        For steps with several backwards. They call `loss.backward()`: `manual_backward` would wake DDP's hooks, which
        know one backward a step.
        """
        if self.trainer.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.trainer.world_size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def check_part(self, part: dict[str, Any]) -> None:
        """Raise `UserError` where a checkpoint's part cannot be gone on with."""


def check_same(saved: dict[str, Any], asked: dict[str, Any], what: str, free: tuple[str, ...] = ()) -> None:
    """Raise `UserError` naming the first field in which a checkpoint's configuration differs from the one asked for.

    `free`: fields that may differ.
    """
    for key, value in asked.items():
        if key in free:
            continue
        old = saved.get(key)
        same = list(old) == list(value) if isinstance(value, list | tuple) and isinstance(old, list | tuple) else old == value
        if not same:
            raise UserError(f"{what}.{key} is {value}, the checkpoint has {old}: choose another --out or the same value")


def _random_state() -> dict[str, Any]:
    kind, keys, place, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (Lightning seeds it)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss), float(cached)],
        "python": repr(random.getstate()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    import ast

    torch.set_rng_state(state["torch"])
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))  # noqa: NPY002
    random.setstate(ast.literal_eval(state["python"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that reads whole, or None."""
    files = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in files:
        try:
            load_checkpoint(file)
        except UserError:
            continue
        return file
    return None


class Checkpoints(Checkpoint):
    """Writes `step=N.ckpt` every so many seconds and keeps the newest; at the end `final.ckpt`, or `stopped.ckpt` when a limit
    of the Trainer ended the training before.

    Lightning's ModelCheckpoint cannot: with manual optimization it pays no heed to `train_time_interval` (2.6). Files are
    written whole or not at all (Lightning writes beside and renames), and the old one goes when the new one is there.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._written = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._written = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *batch: Any) -> None:
        due = time.monotonic() - self._written >= self.seconds
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)  # clocks differ
        if due and isinstance(module, TrainingShell):
            self._save(trainer, f"step={module.steps_done}.ckpt")
            self._written = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if isinstance(module, TrainingShell):
            self._save(trainer, "final.ckpt" if module.budget.over(module.steps_done) else "stopped.ckpt")

    def _save(self, trainer: L.Trainer, name: str) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        trainer.save_checkpoint(folder / name)
        if trainer.is_global_zero:
            for old in folder.glob("step=*.ckpt"):
                if old.name != name:
                    old.unlink(missing_ok=True)


class ShareBar(TQDMProgressBar):
    """Lightning's progress bar, with what is trained as its name, counting steps up to the total once it is known."""

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(getattr(trainer.lightning_module, "kind", "train"))

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        shorter = {"codebook_": "", "gradient_norm": "grad", "discriminator": "d", "perplexity": "ppl", "_0": ""}
        found = {}
        for name, value in super().get_metrics(trainer, module).items():
            for long, short in shorter.items():
                name = name.replace(long, short)
            found[name] = value
        found.pop("v_num", None)
        return found

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if isinstance(module, TrainingShell) and module.budget.total is not None:
            self.train_progress_bar.total = module.budget.total
        super().on_train_batch_end(trainer, module, *args)


# ---- The command line -----------------------------------------------------------------------------------------------


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: Any, ex: Exception | None = None) -> Any:
        text = str(message if message is not None else ex)
        lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
        telling = [line for line in lines if not line.startswith(("Problem", "Parser key", "Did not", "Union"))]
        print(f"error: {'; '.join((telling or lines)[:3])[:400]}", file=sys.stderr)
        raise SystemExit(2)


class UnitokCLI(LightningCLI):
    """LightningCLI with `--out` and `--resume`, and with loggers, checkpoints and a progress bar in place."""

    fresh_out: Path | None = None  # the run's folder, if this run makes it

    def _run_subcommand(self, subcommand: str) -> None:
        """A run that fails on a user's mistake before its first checkpoint leaves nothing behind."""
        try:
            super()._run_subcommand(subcommand)
        except UserError:
            if self.fresh_out and not any(self.fresh_out.glob("checkpoints/*.ckpt")):
                shutil.rmtree(self.fresh_out, ignore_errors=True)
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=str, default="runs/default", help="folder for everything that the run writes")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="checkpoint to go on from, or auto: the newest of --out, if any"
        )
        parser.add_argument(
            "--checkpoint_seconds", type=float, default=CHECKPOINT_SECONDS, help="seconds between two checkpoints"
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyperparameters override the command line; ours has none."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        out = Path(config.out)
        self.fresh_out = out if not out.exists() else None
        config.trainer.default_root_dir = str(out)
        if config.resume == "auto":
            newest = newest_checkpoint(out)
            config.ckpt_path = str(newest) if newest else None
        elif config.resume:
            load_checkpoint(Path(config.resume))
            config.ckpt_path = config.resume
        if self.subcommand in ("validate", "test") and not config.ckpt_path:
            raise UserError(f"nothing to {self.subcommand}: give --resume with a checkpoint, or auto and the --out of a run")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        out = Path(config.out)
        if config.trainer.logger is None:
            kwargs["logger"] = [
                CSVLogger(out, name="", version="metrics"),
                TensorBoardLogger(out, name="", version="tensorboard"),
            ]
        extra: list[L.Callback] = [Checkpoints(config.checkpoint_seconds)]
        if config.trainer.enable_progress_bar is not False:
            extra.append(ShareBar(refresh_rate=10))
        given = self._get(self.config_init, "trainer").get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        return super().instantiate_trainer(callbacks=[*given, *extra], **kwargs)


def run_lightning(arguments: list[str] | None = None) -> None:
    """`unitok fit | validate | test`: LightningCLI on the rest of the command line."""
    import warnings

    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*args parameter is intended.*")
    warnings.filterwarnings("ignore", message=".*Total length of.*is zero.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # averages, frozen parts
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("unitok").setLevel(logging.INFO)
    UnitokCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_class=_Parser,
        trainer_defaults={
            "max_epochs": -1,
            "use_distributed_sampler": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
        args=arguments,
    )
