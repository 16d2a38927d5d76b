"""`unitok export`."""

from pathlib import Path
from typing import Annotated

from unitok.cli.arguments import Input
from unitok.files import check_inputs, check_replaceable
from unitok.interop import EXPORTS


def export(kind: Annotated[str, EXPORTS], source: Input, out: Path, *, overwrite: bool = False) -> None:
    """Write a bundle's decoder in another program's format, with unitok_ids.json, which says what its tokens mean.

    Args:
        kind: format to write.
        source: a bundle, or a decoder's own folder
        out: folder to write
        overwrite: replace whatever is in the folder
    """
    from unitok.interop.decoder import export_decoder
    from unitok.model import Decoder
    from unitok.vocab import Vocab

    check_replaceable(out, "exported decoder", overwrite)
    check_inputs(out, [source])
    decoder, known = Decoder.from_pretrained(source), source / "vocab.json"
    export_decoder(kind, decoder, Vocab.load(known) if known.exists() else None, out, overwrite)
    print(f"{out}: load it with transformers' AutoModelForCausalLM.from_pretrained")
