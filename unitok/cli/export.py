"""`unitok export`."""

from pathlib import Path
from typing import Annotated, Literal

from unitok.cli.arguments import Written, find_bundle
from unitok.files import check_inputs, check_replaceable
from unitok.interop import EXPORTS


def find_source(name: Written) -> Path:
    """Return a folder that exists, else the bundle of that name. Raises `UserError` if there is none."""
    return Path(name) if Path(name).exists() else find_bundle(name)


def export(
    kind: Annotated[str, EXPORTS],
    source: Annotated[Path, find_source],
    out: Path,
    *,
    weights: Literal["f32", "f16", "q8_0"] = "f32",
    overwrite: bool = False,
) -> None:
    """Write a bundle's decoder in another program's format, with unitok_ids.json, which says what its tokens mean, where that is known.

    Args:
        kind: format to write.
        source: a bundle (its folder, or a name as for sample), or a decoder's own folder
        out: folder to write
        weights: for gguf: type of the weights, of 4, 2 or 1 byte
        overwrite: replace whatever is in the folder
    """
    from unitok.interop.decoder import export_decoder
    from unitok.model import Decoder
    from unitok.pretrained import find_vocabulary
    from unitok.tokenizers import TextTokenizer
    from unitok.vocab import Vocab

    check_replaceable(out, "exported decoder", overwrite)
    check_inputs(out, [source])
    decoder, known = Decoder.from_pretrained(source), find_vocabulary(source)
    vocab = Vocab.load(known) if known else None
    text = vocab.bare if vocab and kind == "gguf" else None
    tokenizer = TextTokenizer.from_pretrained(known.parent, name=text) if known and text else None
    export_decoder(kind, decoder, vocab, out, overwrite, tokenizer, weights)
    use = (
        f"llama-cli -m {out / f'decoder-{weights}.gguf'}"
        if kind == "gguf"
        else "transformers' AutoModelForCausalLM.from_pretrained"
    )
    print(f"{out}: load it with {use}")
    if vocab is None:
        print(f"{source}: has no vocabulary, so nothing says what the tokens mean; export the bundle for that")
