"""`unitok import`."""

from pathlib import Path
from typing import Annotated

from unitok.cli.arguments import Input
from unitok.files import check_inputs, check_replaceable
from unitok.interop import KINDS


def import_(
    kind: Annotated[str, KINDS],
    source: Input,
    out: Path,
    *,
    config: Path | None = None,
    sample_rate: int | None = None,
    causal: bool | None = None,
    trust_checkpoint: bool = False,
    overwrite: bool = False,
) -> None:
    """A checkpoint of another project -> a part's folder or a bundle. Nothing in it is executed.

    Args:
        kind: what the source is.
        source: the checkpoint's file or folder
        out: folder to write
        config: the YAML or JSON that belongs to it, if it does not lie beside it; for encodec also a published model's name:
            encodec_24khz, encodec_48khz, encodec_32khz (MusicGen's), audiogen_16khz
        sample_rate: Hz, of an EnCodec, where no configuration says it
        causal: of an EnCodec, where no configuration says it
        trust_checkpoint: allow unpickling: only for files from people you trust
        overwrite: replace what lies in the folder, also where it is something else
    """
    from unitok.interop import describe, import_checkpoint

    check_replaceable(out, overwrite=overwrite)
    check_inputs(out, [source])
    part = import_checkpoint(kind, source, config, trust_checkpoint, sample_rate, causal)
    part.save_pretrained(out, overwrite)
    print(f"{out}: {describe(part)}")
