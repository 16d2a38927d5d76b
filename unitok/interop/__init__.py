"""Checkpoints of other projects: `unitok import KIND SRC OUT`."""

from pathlib import Path
from typing import Any

from unitok.errors import UserError

#: kind -> what SRC is
KINDS = {
    "taming": "taming-transformers' VQ-GAN: a .ckpt, with its .yaml beside it or in --config",
    "llamagen": "LlamaGen's image tokenizer: vq_ds16_c2i.pt and the like",
    "chameleon-vqgan": "Meta's vqgan.ckpt, with vqgan.yaml beside it",
    "hf-chameleon-vqvae": "a folder saved by transformers' ChameleonVQVAE or Chameleon (encodes only)",
    "encodec": "EnCodec's published encodec_24khz-….th or encodec_48khz-….th",
    "hf-encodec": "a folder saved by transformers' EncodecModel",
}


def import_checkpoint(kind: str, source: Path, config: Path | None = None, trust: bool = False) -> Any:
    """Read a checkpoint of another project -> our module, ready for `save_pretrained`. Errors: `UserError`."""
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}; choose one of {', '.join(KINDS)}")
    if not Path(source).exists():
        raise UserError(f"{source}: no such file or folder")
    if kind in ("encodec", "hf-encodec"):
        from unitok.interop import audio

        return audio.import_audio_tokenizer(kind, Path(source), trust)
    from unitok.interop import image

    return image.import_image_tokenizer(kind, Path(source), config, trust)
