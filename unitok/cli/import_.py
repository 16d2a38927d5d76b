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
    """Convert a checkpoint of another project into a tokenizer's or decoder's folder, or a bundle. Nothing in it is executed.

    Args:
        kind: format of the checkpoint.
        source: the checkpoint's file or folder
        out: folder to write
        config: its YAML or JSON configuration, if that is not beside it; for encodec also the name of a published model:
            encodec_24khz, encodec_48khz, encodec_32khz (MusicGen's), audiogen_16khz
        sample_rate: Hz, for an EnCodec whose configuration does not say it
        causal: whether it is causal, for an EnCodec whose configuration does not say it
        trust_checkpoint: allow unpickling: only for files from people you trust
        overwrite: replace whatever is in the folder
    """
    from unitok.interop import describe, import_checkpoint

    check_replaceable(out, overwrite=overwrite)
    check_inputs(out, [source])
    part = import_checkpoint(kind, source, config, trust_checkpoint, sample_rate, causal)
    part.save_pretrained(out, overwrite)
    print(f"{out}: {describe(part)}")
