"""`unitok bundle`."""

from pathlib import Path
from typing import Annotated, Literal

from unitok.cli.arguments import BundleFolder, Input, PerKind, check_part, split_name
from unitok.errors import UserError
from unitok.files import read_json


def bundle(
    out: Path,
    *,
    parts: Annotated[list[tuple[str, str]], PerKind("[NAME=]PATH")],
    add: list[str] | None = None,
    delayed: list[str] | None = None,
    levels: list[str] | None = None,
    decoder: Path | None = None,
    tokenizers: BundleFolder | None = None,
    generation_config: Input | None = None,
    scores: Input | None = None,
    untrained: Literal["tiny"] | None = None,
    trust_checkpoint: bool = False,
    overwrite: bool = False,
) -> None:
    """Put tokenizers and a decoder into one folder, with their vocabulary, or add parts to a bundle.

    Args:
        out: the bundle's folder
        parts: the {kind} tokenizer: a run's folder, a checkpoint, or a tokenizer's own folder; may be repeated with other NAMEs
        add: a kind of content whose tokenizer has no weights: box, point; with other settings than the usual as in box:bins=64; may
            be repeated
        delayed: the NAME of an audio tokenizer whose level k is written k frames late, as in MusicGen; may be repeated
        levels: NAME=K, to use only the first K levels of an audio tokenizer that is given; EnCodec has 32; may be repeated
        decoder: a run's folder, a checkpoint, or its own folder
        tokenizers: a bundle whose tokenizers and vocabulary the new one begins with: the one that made the decoder's data
        generation_config: how the bundle is sampled where a call does not say: a JSON file such as {"temperature": 0.9}
        scores: a scores.json of `unitok eval`, to stand in the model card
        untrained: make a whole bundle with random weights instead
        trust_checkpoint: allow unpickling: only for files from people you trust
        overwrite: replace whatever is in the folder
    """
    from unitok.hub import built_in
    from unitok.modalities import modalities

    paths, kinds = _named(parts)
    if decoder:
        paths["model"] = decoder
    if str(out) in built_in():
        raise UserError(
            f"{out}: the name of the built-in bundle, which stays as it is; choose another folder, and --tokenizers {out} to begin with its tokenizers"
        )
    if untrained and (paths or add or delayed or levels or scores or tokenizers):
        raise UserError("--untrained makes all parts itself: leave out the others")
    if not (untrained or paths or add or scores or generation_config or tokenizers):
        flags = ", ".join(f"--{kind}" for kind in modalities())
        raise UserError(
            f"nothing to put into the bundle: give {flags}, --add, --decoder, --tokenizers, --generation-config, --scores or --untrained"
        )
    for source in paths.values():
        check_part(source)
    from unitok.bundle import make_bundle, make_untrained

    if untrained:
        made = make_untrained(out, untrained, overwrite=overwrite, generation_config=generation_config)
    else:
        made = make_bundle(
            out,
            paths,
            trust_checkpoint,
            overwrite,
            kinds,
            add or (),
            read_json(scores, "") if scores else None,
            generation_config,
            delayed or (),
            _levels(levels or []),
            tokenizers,
        )
    print(f"{out}: {', '.join(made.parts)}; {made.vocab.size} tokens")


def _named(parts: list[tuple[str, str]]) -> tuple[dict[str, Path], dict[str, str]]:
    """Paths of tokenizers by name, and their kinds. Errors: `UserError` for a name that comes twice."""
    paths: dict[str, Path] = {}
    kinds: dict[str, str] = {}
    for kind, given in parts:
        name, path = split_name(kind, given)
        if name in paths:
            raise UserError(f"--{kind}: {name!r} is given twice; name the second one, as in NAME=PATH")
        paths[name], kinds[name] = Path(path), kind
    return paths, kinds


def _levels(given: list[str]) -> dict[str, int]:
    """The number of levels by tokenizer. Errors: `UserError`."""
    levels: dict[str, int] = {}
    for one in given:
        name, _, count = one.partition("=")
        if not count.isdecimal() or name in levels:
            raise UserError(f"--levels {one}: write NAME=K, the first K levels of the audio tokenizer NAME, once for each")
        levels[name] = int(count)
    return levels
