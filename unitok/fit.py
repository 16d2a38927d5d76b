"""`unitok fit`: LightningCLI with what a run needs in place: checkpoints by the clock, loggers, a progress bar, one-line errors."""

import dataclasses
import difflib
import inspect
import logging
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from unitok.checkpoints import check_checkpoint, is_sharded, newest_checkpoint, write_checkpoint
from unitok.errors import UserError, visible
from unitok.training import TrainingShell

CHECKPOINT_SECONDS = 30
PRECISIONS = ("32-true", "bf16-mixed", "32", "bf16", "None")


class Checkpoints(Checkpoint):
    """Writes `step=N.ckpt` every so many seconds and keeps the newest; at the end `final.ckpt`, or `stopped.ckpt` when a limit
    of the Trainer ended the training before.

    Lightning's ModelCheckpoint cannot: with manual optimization it pays no heed to `train_time_interval` (2.6). A checkpoint is
    written beside its place and renamed, and the old one goes when the new one is there. (Lightning's own writing stages in
    the system's temporary folder, which may be another file system: moving the file is then no renaming.)
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.files = WholeFiles()
        self._written = 0.0

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Files are written by `write_checkpoint`."""
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            trainer.strategy.checkpoint_io = self.files

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self._written = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *batch: Any) -> None:
        """Write one if it is time, and the run is healthy."""
        if not isinstance(module, TrainingShell):
            return
        due = time.monotonic() - self._written >= self.seconds
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)  # clocks differ
        if due and module.healthy:
            self._save(trainer, f"step={module.steps_done}.ckpt")
            self._written = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The last one, in place of all others."""
        if isinstance(module, TrainingShell):
            self._save(trainer, "final.ckpt" if module.budget.over(module.steps_done) else "stopped.ckpt")

    def _save(self, trainer: L.Trainer, name: str) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._save_sharded(trainer, folder / name)
        else:
            trainer.save_checkpoint(folder / name)
            problem = trainer.strategy.broadcast(self.files.problem)  # of the first process, which writes; all stop
            if problem:
                raise UserError(problem)
        if trainer.is_global_zero:
            for old in folder.glob("*.ckpt"):
                if old.name != name and (old.name.startswith("step=") or (old.name, name) == ("stopped.ckpt", "final.ckpt")):
                    _remove(old)

    def _save_sharded(self, trainer: L.Trainer, path: Path) -> None:
        """Every process writes its part into a folder beside `path`, which the first then renames."""
        partial = path.with_name(f"{path.name}.partial")
        if trainer.is_global_zero:
            _remove(partial)
        trainer.strategy.barrier()
        trainer.save_checkpoint(partial)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            _remove(path)
            partial.rename(path)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints in one file, whole or not there. What went wrong is kept in `problem`, for all processes to hear of."""

    problem = ""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it."""
        try:
            write_checkpoint(checkpoint, Path(path))
        except UserError as error:
            self.problem = str(error)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class ShareBar(TQDMProgressBar):
    """Lightning's progress bar, with what is trained as its name, counting steps up to the total once it is known."""

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(getattr(trainer.lightning_module, "kind", "train"))

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """Short names, so that the bar fits a terminal."""
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
        """Of what jsonargparse tells the line that helps, with the nearest key where one does not exist."""
        text = str(message if message is not None else ex)
        lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
        telling = [line for line in lines if not line.startswith(("Problem", "Parser key", "Did not", "Union"))]
        unknown = re.search(r"(?:[Oo]ption '|unrecognized arguments: -*)([\w.]+)", text)
        near = difflib.get_close_matches(unknown[1].rpartition(".")[2], _option_names(), 1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: {visible('; '.join((telling or lines)[:3])[:400])}{hint}", file=sys.stderr)
        raise SystemExit(2)


def _option_names() -> list[str]:
    """Of all trainings, data modules, what they are made of, and the Trainer."""
    from unitok.data import module as data
    from unitok.model.training import DecoderTraining
    from unitok.tokenizers.training import AudioTokenizerTraining, ImageTokenizerTraining

    names = {"out", "resume", "checkpoint_seconds", "model", "data", "trainer", "seed_everything", "init_args"}
    trainings = (DecoderTraining, ImageTokenizerTraining, AudioTokenizerTraining)
    waiting: list[Any] = [*trainings, data.TokenShards, data.ImageFiles, data.AudioFiles, L.Trainer]
    for cls in waiting:
        names |= set(inspect.signature(cls).parameters)
        hints = get_type_hints(cls.__init__) if cls is not L.Trainer else {}
        inner = [kind for hint in hints.values() for kind in (hint, *get_args(hint))]
        waiting += [kind for kind in inner if dataclasses.is_dataclass(kind) and kind not in waiting]
    return sorted(names)


class UnitokCLI(LightningCLI):
    """LightningCLI with `--out` and `--resume`, and with loggers, checkpoints and a progress bar in place."""

    fresh_out: Path | None = None  # the run's folder, if this run makes it

    def _run_subcommand(self, subcommand: str) -> None:
        """A run that fails on a user's mistake before its first checkpoint leaves nothing behind."""
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that reads data died ({str(error).splitlines()[0][:120]}); it may have run out of memory: lower "
                "data.workers or row_length, and go on with --resume auto"
            ) from None
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
        """Find the checkpoint to go on from, and refuse what cannot work before anything is built."""
        config = self.config[self.subcommand]
        out = Path(config.out)
        self.fresh_out = out if not out.exists() else None
        config.trainer.default_root_dir = str(out)
        if str(config.trainer.precision) not in PRECISIONS:
            raise UserError(
                f"trainer.precision {config.trainer.precision}: choose one of {', '.join(PRECISIONS)}; weights and averages stay "
                "in fp32, and bf16 needs no scaling of gradients"
            )
        if config.resume == "auto":
            newest = newest_checkpoint(out)
            if newest is None and (there := sorted(out.glob("checkpoints/*.ckpt"))):
                raise UserError(
                    f"{there[-1]}: no checkpoint of this run reads; remove them to start again, or choose another --out"
                )
            config.ckpt_path = str(newest) if newest else None
        elif config.resume:
            check_checkpoint(Path(config.resume))
            config.ckpt_path = config.resume
        self._check_strategy(config)
        if self.subcommand in ("validate", "test") and not config.ckpt_path:
            raise UserError(f"nothing to {self.subcommand}: give --resume with a checkpoint, or auto and the --out of a run")

    def _check_strategy(self, config: Any) -> None:
        """Only those that were made to work; a checkpoint must be of the same kind."""
        strategy = config.trainer.strategy
        name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", "auto"))
        sharded = name.endswith("ModelParallelStrategy")
        if not (sharded or name == "auto" or "ddp" in name.lower()):
            raise UserError(f"trainer.strategy {name}: choose auto, ddp or lightning.pytorch.strategies.ModelParallelStrategy")
        if sharded and not str(config.model.class_path).endswith("DecoderTraining"):
            raise UserError("trainer.strategy: only decoders are sharded; train tokenizers with ddp")
        if config.ckpt_path and sharded != is_sharded(Path(config.ckpt_path)):
            how = (
                "with ModelParallelStrategy" if not sharded else "without it: make a bundle of it, and give that as start_from"
            )
            raise UserError(f"{config.ckpt_path}: go on {how}, as it was written")

    def instantiate_classes(self) -> None:
        """A `UserError` of a constructor comes out as it is: jsonargparse wraps it in what it tried."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__
            raise (cause or error) from None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """With our loggers, checkpoints and progress bar beside the callbacks of the config."""
        config = self.config[self.subcommand]
        out = Path(config.out)
        if config.trainer.logger is None:
            _keep_metrics(out / "metrics" / "metrics.csv")
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


def _keep_metrics(path: Path) -> None:
    """Lightning's logger removes the file of an earlier part of the run: it gets a number."""
    if path.exists() and getattr(rank_zero_only, "rank", 0) == 0:
        number = 1 + len(list(path.parent.glob("metrics-*.csv")))
        path.rename(path.with_name(f"metrics-{number}.csv"))


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
