"""`unitok tokenize`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from unitok.cli.arguments import BundleFolder, Fields, Given, Input
from unitok.errors import UserError, check_range, visible
from unitok.hardware import check_device

if TYPE_CHECKING:
    from unitok.data.prepare.plan import Plan
    from unitok.data.prepare.recipe import SourceSpec


def _options() -> dict[str, type]:
    """The dataclass of options by kind of content: how it is read."""
    from unitok.modalities import modalities

    return {kind: modality.Options for kind, modality in modalities().items()}


@dataclass(frozen=True)
class Documents:
    """What makes a document.

    Args:
        template: YAML, or a file of it: the parts of a document, with {fields} of a row
        root: another folder that paths may lead into (default: they must not leave the source's own)
        order: types in order, such as image,text; random: each document in an order of its own; both: each document twice, also backwards
        interleave: words: each word beside what is heard of it, by the times in a field `words`; seconds, such as 1s: so much of each video
            and recording in turn (default: each whole)
        speakers: name: that in a field `speaker` stands before the text (default: such a field is not used)
        instance: KIND=NAME, the bundle's tokenizer for files of a kind, such as audio=speech; may be repeated
        group: field of lines and rows that names a document's group, which --validation never divides (default: group)
        group_separator: group documents by their ids up to the last of these separators, such as /
        mask_history: learn only the last turn of the assistant in a conversation (default: all of its turns)
    """

    template: str = ""
    root: str = ""
    order: str = ""
    interleave: str = ""
    speakers: str = ""
    instance: list[str] | None = None
    group: str = ""
    group_separator: str = ""
    mask_history: bool = False

    def source(self, path: str) -> "SourceSpec":
        """The source at a path. Errors: `UserError`."""
        from unitok.data.prepare.recipe import SourceSpec, parse_template

        instances = dict(pair.partition("=")[::2] for pair in self.instance or [])
        if not all(instances.values()):
            raise UserError("--instance: KIND=NAME, such as audio=speech")
        return SourceSpec(
            path,
            template=parse_template(self.template) if self.template else (),
            order=tuple(self.order.split(",")) if self.order else (),
            interleave=self.interleave,
            speakers=self.speakers,
            root=self.root,
            instances=instances,
            group=self.group,
            group_separator=self.group_separator,
            mask_history=self.mask_history,
        )


@dataclass(frozen=True)
class Work:
    """How the work is divided.

    Args:
        workers: processes or Ray actors; 0: one per core or GPU, fewer for few documents
        engine: this machine, or a Ray cluster
        job_index: number of this job, from 0, of --num-jobs jobs that divide the work
        num_jobs: number of jobs that divide the work, as in a SLURM array
        max_error_rate: fraction of bad documents over which the run stops, checked after 100 (default: 0.1, or any of fewer than 100)
    """

    workers: int = 0
    engine: Literal["local", "ray"] = "local"
    job_index: int | None = None
    num_jobs: int | None = None
    max_error_rate: float | None = None

    def __post_init__(self) -> None:
        check_range("--workers", self.workers, 0)
        check_range("--max-error-rate", self.max_error_rate, 0, 1)
        if (self.job_index is None) != (self.num_jobs is None):
            raise UserError("--job-index and --num-jobs belong together")
        if self.part and not 0 <= self.part[0] < self.part[1]:
            raise UserError(
                f"--job-index {self.part[0]} of --num-jobs {self.part[1]}: it must be at least 0 and below --num-jobs"
            )

    @property
    def part(self) -> tuple[int, int] | None:
        """(job index, number of jobs), or None."""
        return None if self.job_index is None or self.num_jobs is None else (self.job_index, self.num_jobs)


def tokenize(
    source: str | None,
    out: str,
    *,
    bundle: BundleFolder,
    recipe: Input | None = None,
    documents: Annotated[Given, Fields(lambda: {"": Documents})],
    options: Annotated[Given, Fields(_options)],
    validation: float = 0.0,
    documents_per_shard: int = 0,
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
    dry_run: bool = False,
    work: Annotated[Given, Fields(lambda: {"": Work})],
) -> None:
    """Raw files -> token shards. Bad files are skipped and listed in OUT/errors.jsonl; a run that was stopped resumes.

    Args:
        source: a folder of text, images and audio; .jsonl, .tar (WebDataset) or .parquet files, a folder or pattern (*) of them;
            a Hugging Face data set on disk; a local path or a URL that fsspec opens
        out: folder for the shards
        bundle: bundle with the tokenizers
        recipe: YAML file of several sources, each with its own options, instead of one

    documents (in a recipe, keys of each source):
        documents: what makes one

    content (a recipe's sources may differ):
        options: by its kind

    data set:
        validation: fraction of the documents (by groups) that make the split `validation`
        documents_per_shard: documents per shard; 0: 4096, fewer for a small source
        seed: of random orders, crops and choices

    computation:
        threads: threads of the networks in each process
        device: where to run: cpu, cuda, cuda:1, mps
        dry_run: write nothing; estimate from a sample how much the data will be
        work: division of the work
    """
    if bool(source) == bool(recipe):
        raise UserError("give SOURCE and OUT, or OUT and --recipe FILE" + (", not both" if source else ""))
    if recipe and (given := documents.get("")):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"--recipe: {flags}: keys of each source in it, not flags")
    spec = Documents(**documents.get("", {})).source(source or "")
    _check_paths(spec, recipe)
    from unitok.data.prepare.plan import Plan
    from unitok.data.prepare.tokenize import tokenize as run

    device = check_device(device)
    plan = Plan(
        source or "", out, str(bundle), documents_per_shard, device, str(recipe or ""), spec, options, validation, threads, seed
    )
    if dry_run:
        _estimate(plan)
    else:
        w = Work(**work.get("", {}))
        run(plan, w.workers, w.max_error_rate, w.engine, w.part, progress=True)


def _estimate(plan: "Plan") -> None:
    """Print an estimate. Errors: `UserError` where no document of the sample can be used."""
    from unitok.data.prepare.summary import estimate_lines
    from unitok.data.prepare.tokenize import estimate

    estimated = estimate(plan)
    print(*map(visible, estimate_lines(plan, estimated)), sep="\n")
    if not estimated.documents:
        reason = f"; the first: {estimated.errors[0]}" if estimated.errors else ""
        raise UserError(f"{plan.name()}: none of the {estimated.sample} documents of the sample can be used{reason}")


def _check_paths(spec: "SourceSpec", recipe: Path | None) -> None:
    """Raise `UserError` where the source, or one of a recipe's, does not exist."""
    from unitok.data.prepare.recipe import load_recipe
    from unitok.storage import is_remote

    for path in [one.path for one in load_recipe(recipe)] if recipe else [spec.path]:
        if not is_remote(path) and "*" not in path and not os.path.exists(path.removeprefix("file://")):
            raise UserError(f"{path}: no such file or folder")
