"""`unitok sample`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from unitok.cli.arguments import BundleFolder, Dtype, Fields, Given, Input, PerKind, check_kinds, content_of, sampling_of_flags
from unitok.cli.flags import flag_of
from unitok.errors import UserError, visible
from unitok.files import check_inputs, check_replaceable, write_json_lines
from unitok.hardware import check_device

if TYPE_CHECKING:
    from unitok.api import Unitok
    from unitok.document import RawDocument
    from unitok.sample.outputs import Output
    from unitok.sample.score import Score


#: What stands for missing text.
BLANK = "___"

#: Fields of a call of `Unitok.generate` that filling does not have.
NOT_IN_FILLS = (
    "modalities",
    "best_of",
    "rank_by",
    "jacobi_window",
    "prefix_fraction",
    "negative_prompt",
    "repetition_penalty",
    "media_guidance_scale",
    "guidance_start",
    "guidance_stop",
    "guidance_schedule",
)


def _generation() -> dict[str, type]:
    """A call of `Unitok.generate`, and sampling parameters for each kind of content."""
    from unitok.generation_config import GenerationConfig, SamplingParams
    from unitok.modalities import modalities

    return {"": GenerationConfig, **dict.fromkeys(modalities(), SamplingParams)}


def sample(
    text: str | None = None,
    *,
    bundle: BundleFolder = Path("scenes"),
    prompt: Annotated[list[tuple[str, str]], PerKind()],
    prompts: Input | None = None,
    root: str = "",
    mask: Input | None = None,
    fill: str = "",
    score: bool = False,
    out: Path = Path("runs/sample"),
    save_map: Literal["", "labels", "depth", "edges", "normals"] = "",
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
        text: what the prompt begins with, as --text
        bundle: bundle with tokenizers and a decoder: its folder, USER/NAME[@REVISION] on the Hugging Face hub, or scenes, the built-in one

    prompt:
        prompt: {kind} of the prompt; may be repeated; NAME=FILE where the bundle has several tokenizers for it
        prompts: interleaved .jsonl file with a prompt per line, instead of the above
        root: folder that paths in --prompts must not leave (default: the file's)
        mask: make anew what is white (or transparent) in this image, and keep the rest of the --image that ends the prompt (needs data.fill_rate)
        fill: make anew 1.2s-1.9s of the --audio that ends the prompt, 0,0,32,0 pixels at left, top, right and bottom of --image, or ___ in --text

    run:
        score: generate nothing: log-probabilities of the documents in --prompts, to scores.jsonl
        out: folder for files, outputs.jsonl and index.html
        save_map: also write each generated image as the map that it shows: labels (PNG with a palette), depth (16 bits), edges, normals
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
    prompt = [*_beginning(text), *prompt]
    _check(prompt, prompts, generation if score else None, generation.get("", {}) if live else None, bool(mask) + bool(fill))
    parts = [content_of(*given) for given in prompt]
    keywords = generation.pop("", {}) | {"sampling": sampling_of_flags(generation, sampling)}

    from unitok.api import Unitok
    from unitok.generation_config import GenerationConfig
    from unitok.sample.outputs import save_outputs

    check_kinds(prompt, parts)
    keywords |= {"generation_config": generation_config and GenerationConfig.from_pretrained(generation_config)}
    if not score:
        check_replaceable(out, "sample output", overwrite)
    unitok = Unitok.from_pretrained(bundle, device=check_device(device), dtype=dtype)
    raws = _read(unitok, prompts, root, out, [bundle, generation_config, *parts])
    if score:
        _write_scores(unitok.score([unitok.read_raw(raw) for raw in raws]), out)
        return
    outputs = _generate(unitok, [[raw] for raw in raws] or [parts], keywords | {"batch_size": batch_size}, mask, fill, live)
    save_outputs(outputs, out, overwrite=overwrite, as_map=save_map)
    print(f"{out}: {len(outputs)} outputs; open {out / 'index.html'}")


def _beginning(text: str | None) -> list[tuple[str, str]]:
    """The text that a prompt begins with, as its flag gives it. Errors: `UserError` for the name of a file, also of one that is missing."""
    if text and os.path.isfile(text):  # of a long text Path.is_file raises
        raise UserError(
            f"{text} is a file: give it with the flag of its kind, such as --image; a text that is a file's name with --text"
        )
    if text and not re.search(r"\s", text):
        from unitok.media.formats import promised

        if promised(text):
            raise UserError(f"{text}: no such file; a text that looks like a file's name is given with --text")
    return [] if text is None else [("text", text)]


def _read(unitok: "Unitok", prompts: Path | None, root: str, out: Path, others: list[Any]) -> "list[RawDocument]":
    """Read the file of prompts, and check that `out` is none of the files that are read, and holds none."""
    from unitok.sample.prompts import read_prompts

    raws = read_prompts(prompts, root, unitok.types) if prompts else []
    files = [path for path in (prompts, *others) if isinstance(path, Path)]
    check_inputs(out, [*files, *(part.path for raw in raws for part in raw.content if part.path)])
    return raws


def _generate(
    unitok: "Unitok", prompts: list[list[Any]], keywords: dict[str, Any], mask: Path | None, fill: str, live: bool
) -> "list[Output]":
    """Generate, stream or fill, and print what came out."""
    from unitok.cli.terminal import show

    if live:
        return show(unitok.stream(prompts, **_of_stream(keywords)), unitok)
    if mask or fill:
        *before, content = prompts[0]
        given = {name: value for name, value in keywords.items() if name not in NOT_IN_FILLS}
        if unused := sorted(name for name in NOT_IN_FILLS if keywords.get(name) is not None):
            raise UserError(f"--{unused[0].replace('_', '-')}: a hole is filled without it; leave it out")
        outputs = unitok.fill(content, mask or parse_hole(fill), before or None, **given)
    else:
        outputs = unitok.generate(prompts, **keywords, progress=True)
    _print(outputs[:8])
    return outputs


def parse_hole(text: str) -> object:
    """Return the hole that `--fill` describes, as `Unitok.fill` takes it. Errors: `UserError` that shows the forms."""
    if text == BLANK:
        return None
    if seconds := re.fullmatch(r"(\d+(?:\.\d+)?)s?-(\d+(?:\.\d+)?)s", text):
        return float(seconds[1]), float(seconds[2])
    if re.fullmatch(r"\d{1,5}(,\d{1,5}){3}", text):
        return tuple(map(int, text.split(",")))
    raise UserError(
        f"--fill {text}: write 1.2s-1.9s of audio, 0,0,32,0 pixels around an image, or {BLANK} for text that has it"
    )


def _check(
    prompt: list[tuple[str, str]], prompts: Path | None, score: Given | None, live: Mapping[str, object] | None, holes: int = 0
) -> None:
    """Raise `UserError` for flags that do not go together. score, live: flags of generation beside `--score` or
    `--live`; None without it. holes: flags that say what is filled."""
    if prompts and prompt:
        raise UserError("give either --prompts or parts of one prompt")
    if holes > 1:
        raise UserError("--mask and --fill: give one of them")
    if holes and (prompts or not prompt or live is not None):
        raise UserError("--mask and --fill make a part of the prompt's last piece anew: give it, without --prompts and --live")
    if score is not None and not prompts:
        raise UserError("--score needs --prompts FILE.jsonl, the documents to score")
    if unused := [flag_of(*filter(None, [kind, name])) for kind, given in (score or {}).items() for name in given]:
        raise UserError(f"{unused[0]}: --score generates nothing; leave it out")
    from unitok.generation_config import NOT_IN_STREAMS

    if any(value > off for name, off in NOT_IN_STREAMS.items() if isinstance(value := (live or {}).get(name), int)):
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
