"""`unitok tokenize`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from unitok.cli.arguments import BundleFolder, Fields, Given, Input
from unitok.errors import UserError, visible
from unitok.hardware import check_device

if TYPE_CHECKING:
    from unitok.data.prepare.recipe import SourceSpec


def _options() -> dict[str, type]:
    """Options of how content is read, by its kind."""
    from unitok.modalities import modalities

    return {kind: modality.Options for kind, modality in modalities().items()}


@dataclass(frozen=True)
class Work:
    """How the work is divided.

    Args:
        workers: processes or Ray actors; 0: one per core, or per GPU, fewer for little
        engine: this machine, or a Ray cluster
        job_index: do this part, from 0, of --num-jobs parts of the work
        num_jobs: into how many parts the work is divided, as in a SLURM array
        max_error_rate: fraction of bad documents over which it stops, after 100 (default: 0.1; of fewer than 100 documents any)
    """

    workers: int = 0
    engine: Literal["local", "ray"] = "local"
    job_index: int | None = None
    num_jobs: int | None = None
    max_error_rate: float | None = None

    def __post_init__(self) -> None:
        if self.workers < 0 or not 0 <= (self.max_error_rate or 0) <= 1:
            raise UserError("--workers must be at least 0 and --max-error-rate in [0, 1]")
        if (self.job_index is None) != (self.num_jobs is None):
            raise UserError("--job-index and --num-jobs belong together")
        if self.part and not 0 <= self.part[0] < self.part[1]:
            raise UserError(f"--job-index {self.part[0]} of --num-jobs {self.part[1]}: it counts from 0 and stays below")

    @property
    def part(self) -> tuple[int, int] | None:
        """Which part of how many."""
        return None if self.job_index is None or self.num_jobs is None else (self.job_index, self.num_jobs)


def tokenize(
    source: str | None,
    out: str,
    *,
    bundle: BundleFolder,
    recipe: Input | None = None,
    template: str = "",
    root: str = "",
    order: str = "",
    instance: list[str] | None = None,
    options: Annotated[Given, Fields(_options)],
    validation: float = 0.0,
    documents_per_shard: int = 0,
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
    dry_run: bool = False,
    work: Annotated[Given, Fields(lambda: {"": Work})],
) -> None:
    """Raw files -> token shards. Bad files are skipped and listed in OUT/errors.jsonl; a run that was stopped goes on.

    Args:
        source: a folder of text, images and audio; .jsonl, .tar (WebDataset) or .parquet files, a folder or pattern (*) of them;
            a Hugging Face data set on disk; a local path or a URL that fsspec opens
        out: folder for the shards
        bundle: bundle with the tokenizers
        recipe: YAML file of several sources, each with its own options, instead of one

    documents (a recipe says these of each of its sources):
        template: YAML or a file of it: the parts of a document, with {fields} of a row
        root: folder that paths must not leave (default: the source's)
        order: types in order, such as image,text; random: each document its own
        instance: KIND=NAME, which of the bundle's tokenizers of a kind files go to, such as audio=speech; may be repeated

    content (a recipe's sources may say otherwise):
        options: by its kind

    data set:
        validation: fraction of the documents that make the split `validation`
        documents_per_shard: documents per shard; 0: 4096, fewer for a small source
        seed: of random orders, crops and choices

    computation:
        threads: threads of the networks in each process
        device: where to run: cpu, cuda, cuda:1, mps
        dry_run: write nothing; estimate from a sample how much it will be
        work: division of the work
    """
    if bool(source) == bool(recipe):
        raise UserError("give SOURCE and OUT, or OUT and --recipe FILE" + (", not both" if source else ""))
    if recipe and (template or root or order or instance):
        raise UserError("--recipe: say --template, --root, --order and --instance in it, for each source")
    spec = _source(source or "", recipe, template, root, order, instance or [])
    from unitok.data.prepare.plan import Plan
    from unitok.data.prepare.summary import estimate_lines
    from unitok.data.prepare.tokenize import estimate
    from unitok.data.prepare.tokenize import tokenize as run

    device = check_device(device)
    plan = Plan(
        source or "", out, str(bundle), documents_per_shard, device, str(recipe or ""), spec, options, validation, threads, seed
    )
    if dry_run:
        print(*map(visible, estimate_lines(plan, estimate(plan))), sep="\n")
    else:
        w = Work(**work.get("", {}))
        run(plan, w.workers, w.max_error_rate, w.engine, w.part, progress=True)


def _source(source: str, recipe: Path | None, template: str, root: str, order: str, instance: list[str]) -> "SourceSpec":
    """The source as flags describe it. Errors: `UserError`, also where the source, or one of a recipe's, is not there."""
    from unitok.data.prepare.recipe import SourceSpec, load_recipe, parse_template
    from unitok.storage import is_remote

    instances = dict(pair.partition("=")[::2] for pair in instance)
    if not all(instances.values()):
        raise UserError("--instance: KIND=NAME, such as audio=speech")
    types = tuple(order.split(",")) if order else ()
    spec = SourceSpec(
        source, template=parse_template(template) if template else (), order=types, root=root, instances=instances
    )
    for path in [spec.path for spec in load_recipe(recipe)] if recipe else [spec.path]:
        if not is_remote(path) and "*" not in path and not os.path.exists(path.removeprefix("file://")):
            raise UserError(f"{path}: no such file or folder")
    return spec
