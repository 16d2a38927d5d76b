"""`unitok fit`: LightningCLI with what a run needs in place: checkpoints by the clock, loggers, a progress bar, one-line errors."""

import difflib
import logging
import os
import re
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from unitok.checkpoints import (
    check_checkpoint,
    is_sharded,
    is_written_by_run,
    load_checkpoint,
    newest_checkpoint,
    write_checkpoint,
)
from unitok.configs import config_file
from unitok.errors import UserError, visible
from unitok.files import remove, remove_partials, replace_folder
from unitok.hardware import keep_large_blocks
from unitok.training.interruption import Interruption
from unitok.training.run_folder import check_unused, is_first_process, old_files, run_folder
from unitok.training.shell import TrainingShell
from unitok.training.trainer_flags import check_trainer_flags

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Writes `step=N.ckpt` every so many seconds and keeps the newest; at the end `final.ckpt`, or `stopped.ckpt` when a limit
    of the Trainer or a signal ended the training before.

    Lightning's ModelCheckpoint ignores `train_time_interval` with manual optimization (2.6), and Lightning's writing stages in the
    system's temporary folder, which may be another file system: moving the file is then no renaming.

    Args:
        seconds: between two checkpoints. interruption: which signal came. tries: write none. replaced: files of an old run, which
            go when the first checkpoint is there. epochs: passes over the data (or `limit_train_batches`) after which to stop.
    """

    def __init__(self, seconds: float, interruption: Interruption, replaced: list[Path], epochs: int | None, tries: bool):
        self.seconds, self.interruption, self.replaced, self.epochs, self.tries = seconds, interruption, replaced, epochs, tries
        self.files = WholeFiles()
        self.last: Path | None = None  # that was written
        self.steps = 0  # of this process
        self._written = 0.0

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Files are written by `write_checkpoint`."""
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            trainer.strategy.checkpoint_io = self.files

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Start the clock; signals wait for the end of a step from now on."""
        self._written = module.budget.elapsed
        self.interruption.makes_steps = True

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *batch: Any) -> None:
        """Write one if it is time, and the run is healthy; end the run if a signal came or its epochs are over."""
        self.steps += 1
        if module.looked and any(module.everywhere(self.interruption.signal > 0)):  # it may have reached one process alone
            self._stop(trainer, module)
        due, over = module.now - self._written >= self.seconds, module.budget.over(module.steps_done)
        if (due or over) and module.healthy:
            self._save(trainer, module, ends=False)
            self._written = module.now
        if self.epochs is not None and self._epochs_done(trainer, module) >= self.epochs:
            trainer.should_stop = True

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, *batch: Any) -> None:
        """A signal ends a validation, too; that of several processes, which may have different numbers of batches, ends first."""
        if self.interruption.signal and trainer.world_size == 1:
            self._stop(trainer, module)

    def _epochs_done(self, trainer: L.Trainer, module: TrainingShell) -> float:
        if isinstance(trainer.limit_train_batches, int):
            return module.steps_done / trainer.limit_train_batches
        return module.samples_seen / len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]

    def _stop(self, trainer: L.Trainer, module: TrainingShell) -> NoReturn:
        told = f"stopped at step {module.steps_done}"
        if module.healthy:
            self._save(trainer, module, ends=True)
        else:
            told += ", whose batch was skipped, so that the checkpoint before it is the newest"
        self.interruption.end(f"{told}; go on with --resume auto")

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """The last one, in place of all others."""
        if self.last is None or self.last.name != "final.ckpt":
            self._save(trainer, module, ends=True)

    def _save(self, trainer: L.Trainer, module: TrainingShell, ends: bool) -> None:
        if self.tries:
            return
        name = "stopped.ckpt" if ends else f"step={module.steps_done}.ckpt"
        name = "final.ckpt" if module.budget.over(module.steps_done) else name
        folder = Path(trainer.default_root_dir) / "checkpoints"
        self.last = folder / name
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._save_sharded(trainer, self.last)
        else:
            trainer.save_checkpoint(self.last)
            if problem := trainer.strategy.broadcast(self.files.problem):  # of the first process, which writes; all stop
                raise UserError(problem)
        if trainer.is_global_zero:
            for old in {*folder.glob("*.ckpt"), *self.replaced} - {self.last}:
                passing = is_written_by_run(old) and old.name not in ("final.ckpt", "stopped.ckpt")
                if passing or (old.name, name) == ("stopped.ckpt", "final.ckpt") or old in self.replaced:
                    remove(old)
            self.replaced = []
            remove_partials(folder)

    def _save_sharded(self, trainer: L.Trainer, path: Path) -> None:
        """Every process writes its part into a folder beside `path`, which the first then renames."""
        partial = path.with_name(f"{path.name}.partial")
        if trainer.is_global_zero:
            remove(partial)
        trainer.strategy.barrier()
        trainer.save_checkpoint(partial)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            replace_folder(partial, path)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints in one file, whole or not there. What went wrong is kept in `problem`, for all processes to hear of."""

    problem = ""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            write_checkpoint(checkpoint, Path(path))
        except UserError as error:
            self.problem = str(error)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it; processes of one machine share what they read."""
        return load_checkpoint(Path(path))


class ShareBar(TQDMProgressBar):
    """Lightning's progress bar, with what is trained as its name, counting steps up to the total once it is known."""

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(trainer.lightning_module.kind)

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """Short names, so that the bar fits a terminal."""
        found = super().get_metrics(trainer, module)
        found.pop("v_num", None)
        shorter = {"codebook_": "", "gradient_norm": "grad", "discriminator": "d", "perplexity": "ppl", "_0": ""}
        return {re.sub("|".join(shorter), lambda part: shorter[part[0]], name): value for name, value in found.items()}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if module.budget.total is not None:
            self.train_progress_bar.total = module.budget.total
        super().on_train_batch_end(trainer, module, *args)


# ---- The command line -----------------------------------------------------------------------------------------------


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: Any, ex: Exception | None = None) -> Any:
        """Of what jsonargparse tells the line that helps and its key, with the nearest key where one does not exist."""
        text = str(message if message is not None else ex)
        lines = dict.fromkeys(line.strip(" -") for line in text.splitlines() if line.strip())
        telling = [line for line in lines if not line.startswith(_FRAMES)] or list(lines)
        key = re.search(r'Parser key "([\w.]+)":', text)
        where = f"{key[1]}: " if key and telling[0][:10] != "Parser key" else ""
        told = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", "; ".join(telling[:3])).replace("a typing.Literal", "one of ")
        unknown = re.search(r"(?:[Oo]ption '|unrecognized arguments: --)([\w.]+)", text)
        near = difflib.get_close_matches(unknown[1].rpartition(".")[2], _option_names(), 1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: {where}{visible(told[:400])}{hint}", file=sys.stderr)
        raise SystemExit(2)


#: How lines begin in which jsonargparse says what it tried, and not what is wrong.
_FRAMES = (
    *("Problem with", "Parser key", "Did not", "Union", "Does not validate", "Subtypes:", "Errors:", "Given value type:"),
    *("Given value: NestedArg", "Expected a path but", "Expected a <class 'NoneType'>"),
)


def _option_names() -> list[str]:
    """Of all trainings, data modules, what they are made of, and the Trainer."""
    from unitok import training
    from unitok.data import modules as data

    parser = ArgumentParser()
    trainings = (training.DecoderTraining, training.ImageTokenizerTraining, training.AudioTokenizerTraining)
    for cls in (*trainings, data.TokenShards, data.ImageFiles, data.AudioFiles, L.Trainer):
        parser.add_class_arguments(cls, cls.__name__)
    names = {"out", "resume", "overwrite", "checkpoint_seconds", "model", "data", "trainer", "seed_everything", "init_args"}
    return sorted(names.union(*(key.split(".")[1:] for key, _ in parser.get_defaults().items())))


class UnitokCLI(LightningCLI):
    """LightningCLI with `--out`, `--resume` and `--overwrite`, and with loggers, checkpoints and a progress bar in place."""

    def __init__(self, *arguments: Any, **options: Any):
        self.interruption = Interruption()
        self.checkpoint: str | None = None  # to go on from
        self.checkpoints: Checkpoints | None = None  # that writes new ones
        with ExitStack() as self.held, self.interruption.handled():
            try:
                super().__init__(*arguments, **options)
            except (MisconfigurationException, RuntimeError, ValueError, ImportError) as error:
                raise _one_line(error) from None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=str, default="runs/default", help="folder for everything that the run writes")
        resumes = "checkpoint to go on from, or auto: the newest of --out, if any"
        parser.add_argument("--resume", type=str | None, default=None, help=resumes)
        parser.add_argument("--checkpoint_seconds", type=float, default=30, help="seconds between two checkpoints")
        parser.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyperparameters override the command line; ours has none."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to go on from, and refuse what cannot work before anything is built."""
        config = self.config[self.subcommand]
        out, fits = Path(config.out), self.subcommand == "fit"
        self.own_data = not str(config.data.class_path if config.data else "").startswith("unitok.")
        check_trainer_flags(config.trainer, TRAINER_DEFAULTS, self.own_data)
        if config.ckpt_path:
            raise UserError(f"ckpt_path {config.ckpt_path}: give it as --resume")
        self.tries = bool(config.trainer.fast_dev_run)  # whether it works, and writes nothing
        if not fits:
            self.save_config_callback = None
        if fits and not self.tries and is_first_process():
            self.held.enter_context(run_folder(out, lambda: self.checkpoints is not None and self.checkpoints.steps > 0))
            check_unused(out, config.resume, config.overwrite)
        self.checkpoint = self._find_checkpoint(out, config.resume)
        self.overwrites, config.overwrite = config.overwrite, False  # the config that is kept must not replace anything
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
        if there := sorted(out.glob("checkpoints/*.ckpt")):
            raise UserError(
                f"{there[-1]}: no checkpoint of this run reads; remove them to start again, or choose another --out"
            )
        if self.subcommand == "fit":
            log.info("%s: no checkpoint to go on from; a new run starts", out)
        return None

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """The checkpoint goes past the config, whose copy is for new runs, too."""
        return super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": self.checkpoint}

    def _check_strategy(self, config: Any) -> None:
        """Only those that were made to work; a checkpoint must be of the same kind."""
        strategy = config.trainer.strategy
        name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", "auto"))
        sharded = name.endswith("ModelParallelStrategy")
        copies = any(way in name for way in ("spawn", "fork", "notebook"))  # of a process that has begun
        if copies or not (sharded or name == "auto" or "ddp" in name.lower()):
            raise UserError(f"trainer.strategy {name}: choose auto, ddp or lightning.pytorch.strategies.ModelParallelStrategy")
        if sharded and not str(config.model.class_path).endswith("DecoderTraining"):
            raise UserError("trainer.strategy: only decoders are sharded; train tokenizers with ddp")
        if self.checkpoint and sharded != is_sharded(Path(self.checkpoint)):
            how = "without it: make a bundle of it, and give that as init_from" if sharded else "with ModelParallelStrategy"
            raise UserError(f"{self.checkpoint}: go on {how}, as it was written")

    def instantiate_classes(self) -> None:
        """Let the model know what the run is asked for."""
        super().instantiate_classes()
        self.model.settings = _plain_settings(self.config[self.subcommand])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """With our loggers, checkpoints and progress bar beside the callbacks of the config."""
        config = self.config[self.subcommand]
        out = Path(config.out)
        if config.trainer.logger in (None, True) and not self.tries:
            folder = "metrics" if self.subcommand == "fit" else str(self.subcommand)  # the run that is measured may go on
            _keep_metrics(out / folder / "metrics.csv")
            kwargs["logger"] = [CSVLogger(out, name="", version=folder)]
            if self.subcommand == "fit":
                kwargs["logger"].append(TensorBoardLogger(out, name="", version="tensorboard"))
        epochs = None
        if config.trainer.max_epochs not in (None, -1) and not self.own_data:
            epochs, kwargs["max_epochs"] = config.trainer.max_epochs, -1  # Lightning's epoch has no end here
        replaced = old_files(out) if self.overwrites else []
        given = self._get(self.config_init, "trainer").get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        self.checkpoints = Checkpoints(config.checkpoint_seconds, self.interruption, replaced, epochs, self.tries)
        extra: list[L.Callback] = [self.checkpoints]
        if config.trainer.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in given):
            extra.append(ShareBar(refresh_rate=10))
        trainer = super().instantiate_trainer(callbacks=[*given, *extra], default_root_dir=str(out), **kwargs)
        self.interruption.watch(trainer)
        return trainer

    def after_fit(self) -> None:
        """Say where the result is and what comes next."""
        last = self.checkpoints and self.checkpoints.last
        if self.tries:
            log.info("it works; nothing was written")
        if last and self.trainer.is_global_zero:
            bundle = f"unitok bundle BUNDLE --{self.model.kind.split()[0]} {last.parent.parent}"
            then = f"next: {bundle}" if last.name == "final.ckpt" else "go on with --resume auto"
            print(f"{last}: {self.model.steps_done} steps; {then}")


def _plain_settings(config: Any) -> dict[str, Any]:
    """What a run was asked for, of model and data, by name, as plain values."""
    plain: dict[str, Any] = {"precision": str(config.trainer.precision), "seed_everything": config.seed_everything}
    for name in ("model", "data"):
        for key, value in (config[name] or {}).items():
            key = f"{name}.{key.removeprefix('init_args.')}"
            plain[key] = value if isinstance(value, bool | int | float | str | None) else str(value)
    return plain


def _one_line(error: Exception) -> Exception:
    """A mistake of the user as a `UserError`, which jsonargparse may have wrapped in what it tried; any other error as it is."""
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
    """Lightning's logger removes the file of an earlier part of the run: it gets a number."""
    if path.exists() and is_first_process():
        number = 1 + len(list(path.parent.glob("metrics-*.csv")))
        path.rename(path.with_name(f"metrics-{number}.csv"))


_EXPECTED_WARNINGS = (
    *("does not have many workers", "exists and is not empty", "LeafSpec"),
    *("args parameter is intended", "Total length of.*is zero"),
    "sync_dist=True",  # what is logged is of all processes already
    "in eval mode at the start of training",  # averages, frozen parts
)


def _with_config_files(arguments: list[str] | None) -> list[str]:
    """Return the command line with the path of each built-in configuration in place of its name."""
    words = sys.argv[1:] if arguments is None else arguments

    def path(name: str) -> str:
        return str(config_file(name)) if name.endswith(".yaml") else name

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
        sys.path.append(os.getcwd())  # where data modules of one's own lie
    UnitokCLI(
        TrainingShell,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_class=_Parser,
        trainer_defaults=TRAINER_DEFAULTS,
        args=_with_config_files(arguments),
    )
