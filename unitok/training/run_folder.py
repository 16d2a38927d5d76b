"""The folder of a training run: one run at a time, never overwritten, and restored where a run makes no step.

Files of an old run are replaced only with `--overwrite`, and only when the first checkpoint of the new run is written.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from unitok.checkpoints import check_checkpoint, is_written_by_run
from unitok.errors import UserError
from unitok.files import lock

WRITTEN = ("metrics", "tensorboard", "lightning_logs", "config.yaml", ".lock")  # what a run writes beside checkpoints


def is_first_process() -> bool:
    """Whether this is the process that writes: the first one on the first machine."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))  # as in Lightning's LightningEnvironment
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"


@contextmanager
def run_folder(out: Path, has_begun: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if need be; on an error before the run `has_begun`, restore the folder.

    Errors: `UserError` where another run holds the lock.
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
                    if (old_path := before.get(file.stat().st_ino)) is None:
                        file.unlink()
                    else:
                        file.rename(old_path)
                for file, content in configs.items():
                    file.write_bytes(content)
                for folder in (*(out / name for name in WRITTEN), out / "checkpoints", *made):
                    with suppress(OSError):  # not empty, missing, or a file
                        folder.rmdir()
            raise


def check_unused(out: Path, resume: str | None, overwrite: bool) -> None:
    """Raise `UserError` where a new run, or one that resumes from `resume` (`auto` or a file), would destroy an old run."""
    existing = sorted((out / "checkpoints").glob("*.ckpt"))
    if not existing:
        return
    if overwrite and resume and (resume == "auto" or Path(resume).resolve().parent == existing[0].parent.resolve()):
        raise UserError(f"--overwrite replaces the run in {out}, --resume {resume} continues it: choose one")
    if overwrite or resume == "auto":
        return
    if resume is None:
        files = ", ".join([*(file.name for file in existing[:3]), *(["…"] if len(existing) > 3 else [])])
        raise UserError(
            f"{out}: holds a run ({files}); go on with --resume auto, choose another --out, or replace it with --overwrite"
        )
    begun = check_checkpoint(Path(resume)).get("steps_done", 0)
    for file in existing:
        if file.parent.resolve() != Path(resume).resolve().parent:
            raise UserError(f"{out}: holds another run than {resume}; choose another --out, or replace it with --overwrite")
        if is_written_by_run(file) and (steps := _steps(file)) > begun:
            raise UserError(
                f"{file} is of step {steps}, {resume} of step {begun}; choose another --out to go on from the earlier one"
            )


def _steps(file: Path) -> int:
    """Steps done of a checkpoint; 0 if it cannot be read."""
    with suppress(UserError):
        return int(check_checkpoint(file).get("steps_done", 0))
    return 0


def old_files(out: Path) -> list[Path]:
    """Files of a run that another run replaces: checkpoints, metrics and TensorBoard events, but no files of the user."""
    checkpoints = [file for file in (out / "checkpoints").glob("*.ckpt") if is_written_by_run(file)]
    return [*checkpoints, *out.glob("metrics/metrics*.csv"), *out.glob("tensorboard/events.out.tfevents.*")]


def _written(out: Path) -> list[Path]:
    """Files of a run beside its checkpoints, newest first."""
    files = [file for name in WRITTEN for file in (out / name, *(out / name).rglob("*")) if file.is_file()]
    return sorted(files, key=lambda file: file.stat().st_ctime_ns, reverse=True)
