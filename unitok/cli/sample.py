"""`unitok sample`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from unitok.cli.arguments import BundleFolder, Fields, Given, Input, PerKind, check_kinds, content_of, settings_by_name
from unitok.errors import UserError, visible
from unitok.files import check_inputs, check_replaceable, write_json_lines
from unitok.hardware import check_device

if TYPE_CHECKING:
    from unitok.api import Unitok
    from unitok.document import Document
    from unitok.sample.outputs import Output


def _sampling() -> dict[str, type]:
    """SamplingParams for all kinds of content, and for each alone."""
    from unitok.modalities import modalities
    from unitok.sample.settings import SamplingParams

    return dict.fromkeys(["", *modalities()], SamplingParams)


@dataclass(frozen=True)
class Outputs:
    """What is made of each prompt, as `Unitok.generate` takes it.

    Args:
        modalities: free, or a plan such as text,image:8x12,audio:2s (rows x columns of codes)
        n: outputs per prompt
        seed: the same seed gives the same outputs
        max_new_tokens: most new ids per output
        prefix_fraction: the prompt's last image or audio is a beginning: keep this share of its rows or frames and go on from there
        best_of: make so many for each output and keep the best of all
        rank_by: the mean log-probability of an output, or how much likelier the prompt makes it
        batch_size: outputs generated together
        jacobi_window: one output at a time: guess and read so many ids of an image at once; 0: off
    """

    modalities: str = "free"
    n: int = 1
    seed: int = 0
    max_new_tokens: int = 512
    prefix_fraction: float | None = None
    best_of: int = 1
    rank_by: Literal["logprob", "pmi"] = "logprob"
    batch_size: int = 64
    jacobi_window: int = 0


def sample(
    *,
    bundle: BundleFolder,
    prompt: Annotated[list[tuple[str, str]], PerKind()],
    prompts: Input | None = None,
    root: str = "",
    negative_prompt: str | None = None,
    outputs: Annotated[Given, Fields(lambda: {"": Outputs})],
    score: bool = False,
    sampling: Annotated[Given, Fields(_sampling, "the bundle's")],
    settings: str = "",
    out: Path = Path("runs/sample"),
    overwrite: bool = False,
    live: bool = False,
    device: str = "cpu",
) -> None:
    """Continue prompts. Flags of parts may be repeated and mixed; their order is the prompt's order.

    Args:
        bundle: bundle with tokenizers and a decoder

    prompt:
        prompt: {kind} of the prompt; may be repeated; NAME=FILE where the bundle has several tokenizers for it
        prompts: interleaved .jsonl file with a prompt per line, instead of the above
        root: folder that paths in --prompts must not leave (default: the file's)
        negative_prompt: a text that guidance leads away from

    outputs:
        outputs: what is made of each prompt
        score: generate nothing: log-probabilities of the documents in --prompts, to scores.jsonl
        out: folder for files, outputs.jsonl and index.html
        overwrite: replace what lies in the folder, also where it is something else
        live: show the first output while it grows
        device: where to run: cpu, cuda, cuda:1, mps

    sampling:
        sampling: settings for all content, and for each kind alone
        settings: of tokenizers by name, where several are of a kind, as JSON: {"speech": {"temperature": 0.7}}
    """
    made = Outputs(**outputs.get("", {}))
    _check(prompt, prompts, score, live, made)
    parts = [content_of(kind, value) for kind, value in prompt]

    from unitok.api import Unitok
    from unitok.sample.outputs import save_outputs
    from unitok.sample.prompts import read_prompts

    check_kinds(prompt, parts)
    if not score:
        check_replaceable(out, "sample output", overwrite)
    unitok = Unitok.from_pretrained(bundle, device=check_device(device))
    raws = read_prompts(prompts, root, unitok.types) if prompts else []
    named = [part.path for raw in raws for part in raw.content if part.path]
    files = [part for part in parts if isinstance(part, Path)]
    check_inputs(out, [bundle, *filter(None, [prompts]), *named, *files])
    if score:
        _write_scores(unitok, [unitok.read_raw(raw) for raw in raws], out)
        return
    documents = [[raw] for raw in raws] or [parts]
    against, by_name = [negative_prompt] if negative_prompt else None, settings_by_name(unitok.vocab, sampling, settings)
    if live:
        from unitok.cli.terminal import show

        finished = show(unitok.stream(documents, negative_prompt=against, settings=by_name, **vars(made)), unitok)
    else:
        finished = unitok.generate(documents, negative_prompt=against, settings=by_name, **vars(made), progress=True)
    save_outputs(finished, out, overwrite=overwrite)
    _print(finished[: 0 if live else 8])
    print(f"{out}: {len(finished)} outputs; open {out / 'index.html'}")


def _check(prompt: list[tuple[str, str]], prompts: Path | None, score: bool, live: bool, outputs: Outputs) -> None:
    if prompts and prompt:
        raise UserError("give either --prompts or parts of one prompt")
    if score and not prompts:
        raise UserError("--score needs --prompts FILE.jsonl, the documents to score")
    if live and (outputs.best_of > 1 or outputs.jacobi_window):
        raise UserError("--live shows one output as it is drawn: leave out --best-of and --jacobi-window")


def _print(outputs: "list[Output]") -> None:
    for output in outputs:
        kinds = ", ".join(segment.modality for segment in output.new.segments) or "nothing"
        print(f"{output.index:06d}: {kinds}{f': {output.text!r}' if output.text else ''}")


def _write_scores(unitok: "Unitok", documents: "list[Document]", out: Path) -> None:
    """Write and print log-probabilities."""
    file = out / "scores.jsonl"
    if file.exists() and b'"log_probability"' not in file.read_bytes()[:1000]:
        raise UserError(f"{file}: holds something else than scores; choose another folder, or remove it")
    rows = [score.row() for score in unitok.score(documents)]
    out.mkdir(parents=True, exist_ok=True)
    write_json_lines(file, rows)
    for row in rows[:20]:
        counts = f"{row['ids']} ids, {row['bits_per_token']:.2f} bits an id"
        print(f"{visible(row['id'])}: {row['log_probability']:.2f} nats, {counts}")
    print(f"{file}: {len(rows)} documents")
