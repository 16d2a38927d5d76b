"""`unitok fit`: LightningCLI with checkpoints by the clock, loggers, a progress bar, and errors in one line."""

import logging
import os
import re
import sys
import traceback
import warnings
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import STEP_OUTPUT

from unitok.checkpoints import (
    check_checkpoint,
    is_sharded,
    is_written_by_run,
    load_checkpoint,
    newest_checkpoint,
    write_checkpoint,
)
from unitok.configs import config_file
from unitok.data.loading import DataModule
from unitok.errors import UserError
from unitok.files import remove, remove_partials, replace_folder
from unitok.hardware import keep_large_blocks
from unitok.training.interruption import Interruption
from unitok.training.parser import FitParser
from unitok.training.run_folder import check_unused, is_first_process, old_files, run_folder
from unitok.training.shell import TrainingShell
from unitok.training.trainer_flags import check_trainer_flags

TRAINER_DEFAULTS: dict[str, object] = {
    "max_epochs": -1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Writes `step=N.ckpt` every so many seconds and keeps the newest. At the end of the training it writes `final.ckpt`, or
    `stopped.ckpt` where a limit of the Trainer or a signal ended the run earlier.

    It replaces Lightning's ModelCheckpoint, which ignores `train_time_interval` with manual optimization (2.6), and Lightning's way of
    writing, which stages files in the system's temporary folder: on another file system, moving a file is not atomic.

    Args:
        seconds: between two checkpoints. interruption: receives signals. replaced: files of an old run, which are removed when the
            first checkpoint is written. epochs: passes over the data (or over `limit_train_batches`) after which to stop. dry_run: write
            nothing.
    """

    def __init__(self, seconds: float, interruption: Interruption, replaced: list[Path], epochs: int | None, dry_run: bool):
        self.seconds, self.interruption, self.replaced, self.epochs, self.dry_run = (
            seconds,
            interruption,
            replaced,
            epochs,
            dry_run,
        )
        self.files = AtomicCheckpointIO()
        self.last: Path | None = None  # the checkpoint written last
        self.steps = 0  # of this process
        self._written = 0.0  # seconds of training at the last checkpoint

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Let `write_checkpoint` write the files."""
        assert isinstance(module, TrainingShell)
        self.module: TrainingShell[Any] = module
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            trainer.strategy.checkpoint_io = self.files

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock; from now on signals wait for the end of a step. Make none where the epochs are over already."""
        self._written = self.module.budget.elapsed
        self.interruption.makes_steps = True
        self._stop_after_epochs(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *batch: object) -> None:
        """Write a checkpoint if it is due and the run is healthy. End the run at a signal and at the end of its epochs."""
        run = self.module
        self.steps += 1
        if run.synced and any(run.gather_objects(self.interruption.signal > 0)):  # one process alone may have received it
            self._stop(trainer)
        due, over = run.now - self._written >= self.seconds, run.budget.over(run.steps_done)
        if (due or over) and run.healthy:
            self._save(trainer, ends=False)
            self._written = run.now
        self._stop_after_epochs(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *batch: object) -> None:
        """A signal ends a validation, too; one of several processes ends first, as their numbers of batches may differ."""
        if self.interruption.signal and trainer.world_size == 1:
            self._stop(trainer)

    def _stop_after_epochs(self, trainer: L.Trainer) -> None:
        if self.epochs is None:
            return
        if isinstance(trainer.limit_train_batches, int):
            done = self.module.steps_done // trainer.limit_train_batches
        else:
            data = self.module.data
            assert isinstance(data, DataModule)  # for others the Trainer counts
            done = data.epochs(self.module.samples_seen)
        if done >= self.epochs:
            trainer.should_stop = True

    def _stop(self, trainer: L.Trainer) -> NoReturn:
        message = f"stopped at step {self.module.steps_done}"
        if self.module.healthy:
            self._save(trainer, ends=True)
        else:
            message += ", whose batch was skipped; the newest checkpoint is an earlier one"
        self.interruption.end(f"{message}; go on with --resume auto")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the last checkpoint, which replaces all others."""
        if self.last is None or self.last.name != "final.ckpt":
            self._save(trainer, ends=True)

    def _save(self, trainer: L.Trainer, ends: bool) -> None:
        if self.dry_run:
            return
        done = self.module.steps_done
        name = "stopped.ckpt" if ends else f"step={done}.ckpt"
        name = "final.ckpt" if self.module.budget.over(done) else name
        folder = Path(trainer.default_root_dir) / "checkpoints"
        self.last = folder / name
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._save_sharded(trainer, self.last)
        else:
            trainer.save_checkpoint(self.last)
            if problem := trainer.strategy.broadcast(self.files.problem):  # in the first process, which writes; all stop
                raise UserError(problem)
        if trainer.is_global_zero:
            for old in {*folder.glob("*.ckpt"), *self.replaced} - {self.last}:
                passing = is_written_by_run(old) and old.name not in ("final.ckpt", "stopped.ckpt")
                if passing or (old.name, name) == ("stopped.ckpt", "final.ckpt") or old in self.replaced:
                    remove(old)
            self.replaced = []
            remove_partials(folder)

    def _save_sharded(self, trainer: L.Trainer, path: Path) -> None:
        """Every process writes its part into a folder beside `path`; the first process then renames the folder."""
        partial = path.with_name(f"{path.name}.partial")
        if trainer.is_global_zero:
            remove(partial)
        trainer.strategy.barrier()
        trainer.save_checkpoint(partial)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            replace_folder(partial, path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints in one file, written completely or not at all. `problem` is what went wrong, so that all processes can raise it."""

    problem = ""

    def save_checkpoint(self, checkpoint: dict[str, object], path: str | Path, storage_options: object | None = None) -> None:
        try:
            write_checkpoint(checkpoint, Path(path))
        except UserError as error:
            self.problem = str(error)

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, object]:
        """Read a checkpoint; the processes of a machine share its memory."""
        return load_checkpoint(Path(path))


class RunProgressBar(TQDMProgressBar):
    """Lightning's progress bar, labeled with what is trained; it counts the steps of the run, not those of an epoch."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._count_steps(module)  # a run that was stopped within an epoch goes on without a start of it

    def on_train_epoch_start(self, trainer: L.Trainer, *args: object) -> None:
        self.train_progress_bar.initial = 0  # Lightning's reset sets `n` to 0
        super().on_train_epoch_start(trainer, *args)
        self._count_steps(trainer.lightning_module)

    def _count_steps(self, module: L.LightningModule) -> None:
        if isinstance(module, TrainingShell):
            bar = self.train_progress_bar
            bar.set_description(module.kind)
            bar.total, bar.initial, bar.n = module.budget.total, module.steps_done, module.steps_done

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """Metrics under short names, so the bar fits a terminal."""
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        shorter = {"codebook_": "", "grad_norm": "grad", "discriminator": "d", "perplexity": "ppl", "_db": "", "/0": ""}
        return {re.sub("|".join(shorter), lambda part: shorter[part[0]], name): value for name, value in metrics.items()}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, index: int
    ) -> None:
        if isinstance(module, TrainingShell):
            self.train_progress_bar.total, index = module.budget.total, module.steps_done - 1
        super().on_train_batch_end(trainer, module, outputs, batch, index)


# ---- The command line -----------------------------------------------------------------------------------------------


class UnitokCLI(LightningCLI):
    """LightningCLI with `--out`, `--resume` and `--overwrite`, and with loggers, checkpoints and a progress bar."""

    def __init__(self, arguments: list[str] | None):
        self.interruption = Interruption()
        self.checkpoint: str | None = None  # from which to resume
        self.checkpoints: Checkpoints | None = None  # the callback that writes them
        with ExitStack() as self.held, self.interruption.handled():
            try:
                super().__init__(
                    TrainingShell,
                    L.LightningDataModule,
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    auto_configure_optimizers=False,
                    seed_everything_default=0,
                    save_config_kwargs={"overwrite": True},
                    parser_class=FitParser,
                    trainer_defaults=TRAINER_DEFAULTS,
                    args=arguments,
                )
            except (MisconfigurationException, RuntimeError, ValueError, ImportError) as error:
                raise _one_line(error) from None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=str, default="runs/default", help="folder for everything that the run writes")
        resume = "checkpoint to resume from, or auto: the newest one in --out, if any"
        parser.add_argument("--resume", type=str | None, default=None, help=resume)
        parser.add_argument("--checkpoint_seconds", type=float, default=30, help="seconds between two checkpoints")
        parser.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the hyperparameters of a checkpoint override the command line; ours have none."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to resume from, and refuse what cannot work before anything is built."""
        config = self.config[self.subcommand]
        out, fits = Path(config.out), self.subcommand == "fit"
        self.own_data = not (config.data and _is_ours(config.data.class_path))
        check_trainer_flags(config.trainer, TRAINER_DEFAULTS, self.own_data)
        if config.ckpt_path:
            raise UserError(f"ckpt_path {config.ckpt_path}: give it as --resume")
        self.dry_run = bool(config.trainer.fast_dev_run)  # makes a step and writes nothing
        if not fits:
            self.save_config_callback = None
        if fits and not self.dry_run and is_first_process():
            self.held.enter_context(run_folder(out, lambda: self.checkpoints is not None and self.checkpoints.steps > 0))
            check_unused(out, config.resume, config.overwrite)
        self.checkpoint = self._find_checkpoint(out, config.resume)
        self.overwrites, config.overwrite = config.overwrite, False  # the saved config must not replace anything,
        config.resume = None  # nor begin with this checkpoint
        self._check_strategy(config)
        if not fits and not self.checkpoint:
            raise UserError(f"nothing to {self.subcommand}: give --resume with a checkpoint, or auto and the --out of a run")

    def _find_checkpoint(self, out: Path, resume: str | None) -> str | None:
        if resume is None:
            return None
        if resume != "auto":
            check_checkpoint(Path(resume))
            return resume
        if newest := newest_checkpoint(out):
            return str(newest)
        if unreadable := sorted(out.glob("checkpoints/*.ckpt")):
            raise UserError(
                f"{unreadable[-1]}: no checkpoint of this run can be read; remove them to start again, or choose another --out"
            )
        if self.subcommand == "fit":
            log.info("%s: no checkpoint to resume from; a new run starts", out)
        return None

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, object]:
        """Add the checkpoint."""
        return super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": self.checkpoint}

    def _check_strategy(self, config: Namespace) -> None:
        """Raise `UserError` for a strategy that is not supported, and for a checkpoint of another kind of strategy."""
        strategy = config.trainer.strategy
        name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", "auto"))
        sharded = name.endswith("ModelParallelStrategy")
        copies = any(way in name for way in ("spawn", "fork", "notebook"))  # of a running process
        if copies or not (sharded or name == "auto" or "ddp" in name.lower()):
            raise UserError(f"trainer.strategy {name}: choose auto, ddp or lightning.pytorch.strategies.ModelParallelStrategy")
        if sharded and not str(config.model.class_path).endswith("DecoderTraining"):
            raise UserError("trainer.strategy: only decoders are sharded; train tokenizers with ddp")
        if self.checkpoint and sharded != is_sharded(Path(self.checkpoint)):
            if sharded:
                remedy = "resume without ModelParallelStrategy, or make a bundle of it and start from that with model.init_from"
            else:
                remedy = "resume with ModelParallelStrategy"
            kind = "is one file" if sharded else "has a part for each process"
            raise UserError(f"{self.checkpoint} {kind}: {remedy}")

    def instantiate_classes(self) -> None:
        """Give the model the settings of the run."""
        super().instantiate_classes()
        self.model.settings = _plain_settings(self.config[self.subcommand])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A Trainer with our loggers, checkpoints and progress bar, and the callbacks of the config."""
        config = self.config[self.subcommand]
        out = Path(config.out)
        if config.trainer.logger in (None, True) and not self.dry_run:
            folder = "metrics" if self.subcommand == "fit" else str(self.subcommand)  # the measured run may still be going on
            _keep_metrics(out / folder / "metrics.csv")
            loggers: list[Logger] = [CSVLogger(out, name="", version=folder)]
            if self.subcommand == "fit":
                loggers.append(TensorBoardLogger(out, name="", version="tensorboard"))
            kwargs["logger"] = loggers
        epochs = None
        if config.trainer.max_epochs not in (None, -1) and not self.own_data:
            epochs, kwargs["max_epochs"] = config.trainer.max_epochs, -1  # Lightning's epoch has no end here
        if not self.own_data:
            kwargs["use_distributed_sampler"] = False  # the processes share each batch already
        replaced = old_files(out) if self.overwrites else []
        given = self._get(self.config_init, "trainer").get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        self.checkpoints = Checkpoints(config.checkpoint_seconds, self.interruption, replaced, epochs, self.dry_run)
        extra: list[L.Callback] = [self.checkpoints]
        if config.trainer.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in given):
            extra.append(RunProgressBar(refresh_rate=10))
        trainer = super().instantiate_trainer(callbacks=[*given, *extra], default_root_dir=str(out), **kwargs)
        self.interruption.watch(trainer)
        return trainer

    def after_fit(self) -> None:
        """Log where the result is and what comes next."""
        last = self.checkpoints.last if self.checkpoints else None
        if self.dry_run:
            log.info("dry run: one step works; nothing was written")
        elif last is None:
            limits = ", ".join(f"trainer.{name} {getattr(self.trainer, name)}" for name in ("max_steps", "max_epochs"))
            text = "%s: %d steps are done, nothing is left to train within the Trainer's limits (%s)"
            log.info(text, self.checkpoint, self.model.steps_done, limits)
        else:
            bundle = f"unitok bundle BUNDLE --{self.model.kind.split()[0]} {last.parent.parent}"
            if self.model.kind == "decoder":
                bundle += "; a new BUNDLE needs --tokenizers, too: the bundle that made the data"
            then = f"next: {bundle}" if last.name == "final.ckpt" else "go on with --resume auto"
            log.info("%s: %d steps; %s", last, self.model.steps_done, then)


def _is_ours(class_path: str) -> bool:
    """Whether a data module is one of ours, or made of one."""
    module, _, name = class_path.rpartition(".")
    return issubclass(getattr(import_module(module), name), DataModule)


def _plain_settings(config: Namespace) -> dict[str, object]:
    """The settings of model and data as plain values, by key."""
    plain: dict[str, object] = {"precision": str(config.trainer.precision), "seed_everything": config.seed_everything}
    for name in ("model", "data"):
        for key, value in (config[name] or {}).items():
            key = f"{name}.{key.removeprefix('init_args.')}"
            plain[key] = value if isinstance(value, bool | int | float | str | None) else str(value)
    return plain


def _one_line(error: Exception) -> Exception:
    """The `UserError` for a mistake of the user, which jsonargparse may have wrapped; any other error unchanged."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__
    if "DataLoader worker" in str(error):
        return UserError(
            f"a process that reads data died ({str(error).splitlines()[0][:120]}); it may have run out of memory: lower "
            "data.workers or sequence_length, and go on with --resume auto"
        )
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = not isinstance(error, MisconfigurationException) and f"{Path(L.__file__).parent}/" not in raised_in
    return error if ours else UserError(f"trainer: {' '.join(str(error).split())[:300]}")


def _keep_metrics(path: Path) -> None:
    """Number the file of an earlier part of the run, which Lightning's logger would remove."""
    if path.exists() and is_first_process():
        numbers = (re.fullmatch(r"metrics-(\d+)", other.stem) for other in path.parent.glob("metrics-*.csv"))
        last = max((int(number[1]) for number in numbers if number), default=0)
        path.rename(path.with_name(f"metrics-{last + 1}.csv"))


_EXPECTED_WARNINGS = (
    *("does not have many workers", "exists and is not empty", "LeafSpec"),
    *("args parameter is intended", "Total length of.*is zero"),
    "dataloader is not resumable",  # ours go on at the right sample
    "sync_dist=True",  # metrics are of all processes already
    "in eval mode at the start of training",  # averages and frozen parts are
)


def _with_config_files(arguments: list[str] | None) -> list[str]:
    """Return the command line with the path of each built-in configuration in place of its name."""
    words = sys.argv[1:] if arguments is None else arguments
    if not any(word.startswith(("-c", "--config", "--model", "--print", "-h")) or "help" in word for word in words):
        raise UserError("no configuration: give --config FILE, or the name of a built-in one, such as scenes/decoder.yaml")

    def path(name: str) -> str:
        return str(config_file(name)) if name.endswith((".yaml", ".yml")) else name

    return [
        path(word) if flag in ("-c", "--config") else f"--config={path(word[9:])}" if word.startswith("--config=") else word
        for flag, word in zip(["", *words], words, strict=False)
    ]


def run_lightning(arguments: list[str] | None = None) -> None:
    """`unitok fit | validate | test`: LightningCLI on the rest of the command line."""
    keep_large_blocks()
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("unitok").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where the user's own data modules are
    UnitokCLI(_with_config_files(arguments))
