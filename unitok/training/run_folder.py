"""The folder of a training run: one run at a time, never overwritten, and left as it was where nothing came of a run.

What an old run left is replaced only where that was asked for, and only when the first checkpoint of the new one is there.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from unitok.checkpoints import check_checkpoint, is_written_by_run
from unitok.errors import UserError
from unitok.files import lock

WRITTEN = ("metrics", "tensorboard", "lightning_logs", "config.yaml", ".lock")  # by a run, beside checkpoints


def is_first_process() -> bool:
    """Whether this is the process of a run that writes: the first on the first machine."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))  # as Lightning's LightningEnvironment has it
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"


@contextmanager
def run_folder(out: Path, has_begun: Callable[[], bool]) -> Iterator[None]:
    """Hold a run's folder, which is made if need be; where the run has not `has_begun`, it is left as it was found.

    Errors: `UserError` when another run is at work on the folder.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    before = {file.stat().st_ino: file for file in _written(out)}
    configs = {file: file.read_bytes() for file in before.values() if file.name == "config.yaml"}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{out}: not a folder, or not in one; choose another --out") from None
    with lock(out / ".lock", f"{out}: another `unitok fit` is at work on it; wait for it or choose another folder"):
        try:
            yield
        except BaseException:
            if not has_begun():
                for file in _written(out):
                    if (there := before.get(file.stat().st_ino)) is None:
                        file.unlink()
                    else:
                        file.rename(there)
                for file, content in configs.items():
                    file.write_bytes(content)
                for folder in (*(out / name for name in WRITTEN), out / "checkpoints", *made):
                    with suppress(OSError):  # not empty, not there, or a file
                        folder.rmdir()
            raise


def check_unused(out: Path, resume: str | None, overwrite: bool) -> None:
    """Raise `UserError` where a new run, or one that goes on from `resume` (`auto` or a file), would cost an old one."""
    there = sorted((out / "checkpoints").glob("*.ckpt"))
    if not there:
        return
    if overwrite and resume and (resume == "auto" or Path(resume).resolve().parent == there[0].parent.resolve()):
        raise UserError(f"--overwrite removes the run in {out}, --resume {resume} goes on with it: choose one")
    if overwrite or resume == "auto":
        return
    if resume is None:
        told = f"{out}: holds a run ({', '.join(file.name for file in there[:3])}{', …' if len(there) > 3 else ''})"
        raise UserError(f"{told}; go on with --resume auto, choose another --out, or replace it with --overwrite")
    begun = check_checkpoint(Path(resume)).get("steps_done", 0)
    for file in there:
        if file.parent.resolve() != Path(resume).resolve().parent:
            raise UserError(f"{out}: holds another run than {resume}; choose another --out, or replace it with --overwrite")
        if is_written_by_run(file) and (steps := _steps(file)) > begun:
            raise UserError(f"{file}: of step {steps}, {resume} is of step {begun}; choose another --out to go on from there")


def _steps(file: Path) -> int:
    """That a checkpoint has done; 0 if it does not read."""
    with suppress(UserError):
        return int(check_checkpoint(file).get("steps_done", 0))
    return 0


def old_files(out: Path) -> list[Path]:
    """What a run left that another replaces: its checkpoints, metrics and TensorBoard's events; nothing of the user's."""
    checkpoints = [file for file in (out / "checkpoints").glob("*.ckpt") if is_written_by_run(file)]
    return [*checkpoints, *out.glob("metrics/metrics*.csv"), *out.glob("tensorboard/events.out.tfevents.*")]


def _written(out: Path) -> list[Path]:
    """Files of a run beside its checkpoints, new ones first."""
    found = [file for name in WRITTEN for file in (out / name, *(out / name).rglob("*")) if file.is_file()]
    return sorted(found, key=lambda file: file.stat().st_ctime_ns, reverse=True)
