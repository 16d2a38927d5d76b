"""`unitok sample`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unitok.cli.arguments import BundleFolder, Dtype, Fields, Given, Input, PerKind, check_kinds, content_of, sampling_of_flags
from unitok.errors import UserError, visible
from unitok.files import check_inputs, check_replaceable, write_json_lines
from unitok.hardware import check_device

if TYPE_CHECKING:
    from unitok.sample.outputs import Output
    from unitok.sample.score import Score


def _generation() -> dict[str, type]:
    """A call of `Unitok.generate`, and sampling parameters for each kind of content."""
    from unitok.generation_config import GenerationConfig, SamplingParams
    from unitok.modalities import modalities

    return {"": GenerationConfig, **dict.fromkeys(modalities(), SamplingParams)}


def sample(
    *,
    bundle: BundleFolder = Path("scenes"),
    prompt: Annotated[list[tuple[str, str]], PerKind()],
    prompts: Input | None = None,
    root: str = "",
    score: bool = False,
    out: Path = Path("runs/sample"),
    overwrite: bool = False,
    live: bool = False,
    batch_size: int = 64,
    device: str = "cpu",
    dtype: Dtype = "float32",
    generation_config: Input | None = None,
    generation: Annotated[Given, Fields(_generation, "the bundle's")],
    sampling: str = "",
) -> None:
    """Continue prompts. Flags of parts may be repeated and mixed; their order is the prompt's order.

    Args:
        bundle: bundle with tokenizers and a decoder: its folder, USER/NAME[@REVISION] on the Hugging Face hub, or scenes, the built-in one

    prompt:
        prompt: {kind} of the prompt; may be repeated; NAME=FILE where the bundle has several tokenizers for it
        prompts: interleaved .jsonl file with a prompt per line, instead of the above
        root: folder that paths in --prompts must not leave (default: the file's)

    run:
        score: generate nothing: log-probabilities of the documents in --prompts, to scores.jsonl
        out: folder for files, outputs.jsonl and index.html
        overwrite: replace what lies in the folder, also where it is something else
        live: show the first output while it grows
        batch_size: outputs that are generated together
        device: where to run: cpu, cuda, cuda:1, mps
        dtype: of the weights that generate; int8: on a CPU; auto: the fastest here

    generation:
        generation_config: JSON file such as {"temperature": 0.9, "image": {"top_k": 50}}: goes before the bundle's own, flags before it
        generation: for all content, and for each kind alone
        sampling: sampling parameters by tokenizer, where several are of a kind, as JSON: {"speech": {"temperature": 0.7}}
    """
    _check(prompt, prompts, score, generation.get("", {}) if live else {})
    parts = [content_of(*given) for given in prompt]
    keywords = generation.pop("", {}) | {"sampling": sampling_of_flags(generation, sampling)}

    from unitok.api import Unitok
    from unitok.cli.terminal import show
    from unitok.generation_config import GenerationConfig
    from unitok.sample.outputs import save_outputs
    from unitok.sample.prompts import read_prompts

    check_kinds(prompt, parts)
    if not score:
        check_replaceable(out, "sample output", overwrite)
    config = GenerationConfig.from_pretrained(generation_config) if generation_config else None
    unitok = Unitok.from_pretrained(bundle, device=check_device(device), dtype=dtype)
    raws = read_prompts(prompts, root, unitok.types) if prompts else []
    files = [path for path in (prompts, generation_config, *parts) if isinstance(path, Path)]
    check_inputs(out, [bundle, *files, *(part.path for raw in raws for part in raw.content if part.path)])
    if score:
        _write_scores(unitok.score([unitok.read_raw(raw) for raw in raws]), out)
        return
    documents, keywords = [[raw] for raw in raws] or [parts], keywords | {"generation_config": config, "batch_size": batch_size}
    if live:
        outputs = show(unitok.stream(documents, **_of_stream(keywords)), unitok)
    else:
        outputs = unitok.generate(documents, **keywords, progress=True)
        _print(outputs[:8])
    save_outputs(outputs, out, overwrite=overwrite)
    print(f"{out}: {len(outputs)} outputs; open {out / 'index.html'}")


def _check(prompt: list[tuple[str, str]], prompts: Path | None, score: bool, live: Mapping[str, object]) -> None:
    """Raise `UserError` for flags that do not go together. live: what is generated with `--live`."""
    if prompts and prompt:
        raise UserError("give either --prompts or parts of one prompt")
    if score and not prompts:
        raise UserError("--score needs --prompts FILE.jsonl, the documents to score")
    from unitok.generation_config import NOT_IN_STREAMS

    if any(value > off for name, off in NOT_IN_STREAMS.items() if isinstance(value := live.get(name), int)):
        raise UserError("--live shows an output while it is generated: leave out --best-of and --jacobi-window")


def _of_stream(keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a stream, without those of the flags that are off."""
    from unitok.generation_config import NOT_IN_STREAMS

    return {name: value for name, value in keywords.items() if name not in (*NOT_IN_STREAMS, "rank_by")}


def _print(outputs: "list[Output]") -> None:
    for output in outputs:
        kinds = ", ".join(segment.modality for segment in output.new.segments) or "nothing"
        print(f"{output.index:06d}: {kinds}{f': {output.text!r}' if output.text else ''}")


def _write_scores(scores: "list[Score]", out: Path) -> None:
    """Write and print log-probabilities."""
    file = out / "scores.jsonl"
    if file.exists() and b'"log_probability"' not in file.read_bytes()[:1000]:
        raise UserError(f"{file}: holds something else than scores; choose another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    write_json_lines(file, [score.row() for score in scores])
    for score in scores[:20]:
        counts = f"{score.tokens} tokens, {score.bits_per_token:.2f} bits per token"
        print(f"{visible(score.document.id)}: {score.log_probability:.2f} nats, {counts}")
    print(f"{file}: {len(scores)} documents")
