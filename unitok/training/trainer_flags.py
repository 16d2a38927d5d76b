"""Flags of Lightning's Trainer that do not work with manual optimization on endless data, and what to use instead."""

import inspect
from collections.abc import Mapping

import lightning as L
from jsonargparse import Namespace

from unitok.errors import UserError

#: Flags and callbacks, and what to use instead of them.
INSTEAD = {
    **dict.fromkeys(("gradient_clip_val", "gradient_clip_algorithm"), "set model.grad_clip, the largest norm of the gradient"),
    "accumulate_grad_batches": "set model.accumulate_grad_batches, the number of parts of a batch, and a larger data.batch_size",
    **dict.fromkeys(("min_steps", "min_epochs"), "the length of a run is model.steps, minutes or tokens"),
    "reload_dataloaders_every_n_epochs": "stop the run and go on with --resume auto",
    "barebones": "turn off trainer.logger and trainer.enable_progress_bar",
    "default_root_dir": "--out is the folder of a run",
    **dict.fromkeys(("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging"), "set model.ema_decay"),
    "GradientAccumulationScheduler": "set model.accumulate_grad_batches, the number of parts of a batch",
    "BatchSizeFinder": "set data.batch_size",
    "LearningRateFinder": "set model.lr",
}

PRECISIONS = ("32-true", "bf16-mixed", "32", "bf16", "None")


def check_trainer_flags(trainer: Namespace, defaults: Mapping[str, object], own_data: bool) -> None:
    """Raise `UserError` for a flag that does not work.

    trainer: values of all flags. defaults: our defaults where they differ from Lightning's. own_data: the data module is the user's.
    """
    default_values = {name: p.default for name, p in inspect.signature(L.Trainer).parameters.items()} | dict(defaults)
    for name in default_values.keys() & INSTEAD:
        if trainer[name] not in (None, default_values[name], False) and not (own_data and name.startswith("reload")):
            raise UserError(f"trainer.{name} does not work with this training; {INSTEAD[name]}")
    if str(trainer.precision) not in PRECISIONS:
        raise UserError(
            f"trainer.precision {trainer.precision}: choose one of {', '.join(PRECISIONS)}; weights and averages stay "
            "in fp32, and bf16 needs no scaling of gradients"
        )
    if trainer.enable_checkpointing is False:
        raise UserError(
            "trainer.enable_checkpointing false: a run leaves its last checkpoint; trainer.fast_dev_run writes nothing"
        )
    for name in ("max_steps", "max_epochs"):
        if (value := trainer[name]) is not None and value != -1 and value < 1:
            raise UserError(f"trainer.{name} {value}: it must be at least 1, or -1 for no limit")
    if not own_data:
        _check_fractions(trainer)
    given = trainer.callbacks or []
    for callback in given if isinstance(given, list) else [given]:
        path = str(callback.get("class_path", ""))
        if instead := INSTEAD.get(path.rpartition(".")[2]):
            raise UserError(f"trainer.callbacks {path} does not work with this training; {instead}")


def _check_fractions(trainer: Namespace) -> None:
    """Raise `UserError` for a flag that is a fraction of the training data, which is endless; make whole numbers integers."""
    for name in ("val_check_interval", "limit_train_batches", "overfit_batches"):
        if isinstance(trainer[name], float) and trainer[name] > 1 and trainer[name].is_integer():
            trainer[name] = int(trainer[name])  # on Python 3.12 a 4 arrives as 4.0
    if isinstance(trainer.val_check_interval, float) and trainer.val_check_interval != 1.0:
        raise UserError(
            f"trainer.val_check_interval {trainer.val_check_interval}: the data is endless, so a fraction of it is not "
            "defined; give a number of steps, or set data.validations, how often in a run"
        )
    for name, none in (("limit_train_batches", 1.0), ("overfit_batches", 0.0)):
        value = none if trainer[name] is None else trainer[name]
        if value != none and (isinstance(value, float) or value < 1):
            raise UserError(
                f"trainer.{name} {value}: the data is endless, so a fraction is not defined; give a number of steps"
            )
    if (trainer.check_val_every_n_epoch or 1) != 1 and not isinstance(trainer.limit_train_batches, int):
        raise UserError(
            f"trainer.check_val_every_n_epoch {trainer.check_val_every_n_epoch}: the data is endless; give "
            "trainer.val_check_interval a number of steps"
        )
