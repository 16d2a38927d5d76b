"""`unitok sample`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from unitok.cli.arguments import BundleFolder, Fields, Input, PerKind, check_kinds, content_of, read_json_flag
from unitok.errors import UserError, visible
from unitok.files import check_inputs, check_replaceable, write_json_lines
from unitok.hardware import check_device

if TYPE_CHECKING:
    from unitok.api import Unitok
    from unitok.document import Document

Given = dict[str, dict[str, Any]]


def _sampling() -> dict[str, type]:
    """Settings for all kinds of content, and for each alone."""
    from unitok.modalities import modalities
    from unitok.sample.settings import Settings

    return dict.fromkeys(["", *modalities()], Settings)


def sample(
    *,
    bundle: BundleFolder,
    prompt: Annotated[list[tuple[str, str]], PerKind()],
    prompts: Input | None = None,
    root: str = "",
    negative: str | None = None,
    want: str = "free",
    n: int = 1,
    seed: int = 0,
    max_ids: int = 512,
    keep: float | None = None,
    best_of: int = 1,
    best_by: Literal["likelihood", "relevance"] = "likelihood",
    score: bool = False,
    sampling: Annotated[Given, Fields(_sampling, "the bundle's")],
    settings: str = "",
    out: Path = Path("runs/sample"),
    overwrite: bool = False,
    live: bool = False,
    batch_size: int = 64,
    jacobi: int = 0,
    device: str = "cpu",
) -> None:
    """Continue prompts. --text, --image and --audio may be repeated and mixed; their order is the prompt's order.

    Args:
        bundle: bundle with tokenizers and a decoder

    prompt:
        prompt: {kind} of the prompt; may be repeated
        prompts: interleaved .jsonl file with a prompt per line, instead of the above
        root: folder that paths in --prompts must not leave (default: the file's)
        negative: a text that guidance leads away from

    outputs:
        want: free, or a plan such as text,image:8x12,audio:2s (rows x columns of codes)
        n: outputs per prompt
        seed: the same seed gives the same outputs
        max_ids: most new ids per output
        keep: the prompt's last image or audio is a beginning: keep this share of its rows or frames and go on from there
        best_of: make so many for each output and keep the best of all
        best_by: the mean log-probability of an output, or how much likelier the prompt makes it
        score: generate nothing: log-probabilities of the documents in --prompts, to scores.jsonl
        out: folder for files, outputs.jsonl and index.html
        overwrite: replace what lies in the folder, also where it is something else
        live: show the first output while it grows

    computation:
        batch_size: outputs generated together
        jacobi: one output at a time: guess and read so many ids of an image at once; 0: off
        device: where to run: cpu, cuda, cuda:1, mps

    sampling:
        sampling: settings for all content, and for each kind alone
        settings: of tokenizers by name, where several are of a kind, as JSON: {"speech": {"temperature": 0.7}}
    """
    if prompts and prompt:
        raise UserError("give either --prompts or --text, --image and --audio")
    if score and not prompts:
        raise UserError("--score needs --prompts FILE.jsonl, the documents to score")
    if live and (best_of > 1 or jacobi):
        raise UserError("--live shows one output as it is drawn: leave out --best-of and --jacobi")
    parts = [content_of(kind, value) for kind, value in prompt]

    from unitok.api import Unitok
    from unitok.sample.outputs import save_outputs
    from unitok.sample.prompts import read_prompts

    check_kinds(prompt, parts)
    if not score:
        check_replaceable(out, "sample output", overwrite)
    unitok = Unitok.from_pretrained(bundle, device=check_device(device))
    raws = read_prompts(prompts, root, unitok.types) if prompts else []
    files = [part for part in parts if isinstance(part, Path)] + [
        part.path for raw in raws for part in raw.content if part.path
    ]
    check_inputs(out, [bundle, *([prompts] if prompts else []), *files])
    if score:
        _write_scores(unitok, [unitok.read_raw(raw) for raw in raws], out)
        return
    documents = [[raw] for raw in raws] or [parts]
    options: dict[str, Any] = {"want": want, "n": n, "seed": seed, "max_ids": max_ids, "keep": keep, "batch_size": batch_size}
    options |= {"negative": [negative] if negative else None, "settings": _settings(unitok, sampling, settings)}
    if live:
        from unitok.cli.terminal import show

        outputs = show(unitok.stream(documents, **options), unitok)
    else:
        outputs = unitok.generate(documents, **options, best_of=best_of, best_by=best_by, jacobi=jacobi, progress=True)
    save_outputs(outputs, out, overwrite=overwrite)
    for output in [] if live else outputs[:8]:
        kinds = ", ".join(segment.modality for segment in output.new.segments) or "nothing"
        print(f"{output.index:06d}: {kinds}{f': {output.text!r}' if output.text else ''}")
    print(f"{out}: {len(outputs)} outputs; open {out / 'index.html'}")


def _settings(unitok: "Unitok", sampling: Given, by_name: str) -> Given:
    """What flags say of each tokenizer's content: for all, for its kind, for its name."""
    made = {name: sampling.get("", {}) | sampling.get(span.kind, {}) for name, span in unitok.vocab.spans.items()}
    named = read_json_flag(by_name or "{}", "settings")
    if not isinstance(named, dict) or not all(isinstance(given, dict) for given in named.values()):
        raise UserError('--settings: JSON such as {"speech": {"temperature": 0.7}}')
    return made | {name: made.get(name, {}) | given for name, given in named.items()}


def _write_scores(unitok: "Unitok", documents: "list[Document]", out: Path) -> None:
    """Write and print log-probabilities."""
    file = out / "scores.jsonl"
    if file.exists() and b'"log_probability"' not in file.read_bytes()[:1000]:
        raise UserError(f"{file}: holds something else than scores; choose another folder, or remove it")
    rows = [score.row() for score in unitok.score(documents)]
    out.mkdir(parents=True, exist_ok=True)
    write_json_lines(file, rows)
    for row in rows[:20]:
        counts = f"{row['ids']} ids, {row['bits_an_id']:.2f} bits an id"
        print(f"{visible(row['id'])}: {row['log_probability']:.2f} nats, {counts}")
    print(f"{file}: {len(rows)} documents")
