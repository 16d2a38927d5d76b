"""Checkpoints of other projects as ours and back: `unitok import KIND SRC OUT`, `unitok export KIND BUNDLE OUT`."""

from pathlib import Path
from typing import Any

from unitok.errors import UserError

#: kind -> what SRC is
KINDS = {
    "taming": "taming-transformers' VQ-GAN: a .ckpt, with its .yaml beside it or in --config",
    "llamagen": "LlamaGen's image tokenizer: vq_ds16_c2i.pt and the like",
    "chameleon-vqgan": "Meta's vqgan.ckpt, with vqgan.yaml beside it",
    "hf-chameleon-vqvae": "a folder saved by transformers' ChameleonVQVAE or Chameleon (encodes only)",
    "encodec": "EnCodec's published encodec_24khz-….th or encodec_48khz-….th; audiocraft's compression_state_dict.bin",
    "hf-encodec": "a folder saved by transformers' EncodecModel, or by its MusicGen",
    "hf-chameleon": "a folder saved by transformers' Chameleon: decoder and image encoder",
    "hf-llama": "a folder saved by transformers' LlamaForCausalLM",
    "hf-qwen3": "a folder saved by transformers' Qwen3ForCausalLM",
}


DECODER_KINDS = ("hf-chameleon", "hf-llama", "hf-qwen3")
EXPORTS = {"hf-qwen3": "loads in transformers, vLLM and SGLang as Qwen3"}


def import_checkpoint(
    kind: str,
    source: Path,
    config: Path | None = None,
    trust: bool = False,
    sample_rate: int | None = None,
    causal: bool | None = None,
) -> Any:
    """Read a checkpoint of another project -> our module, ready for `save_pretrained`.

    Args:
        kind: one of `KINDS`. source: its file or folder.
        config: the file that describes it, where that does not lie beside it; of an EnCodec also a published model's name.
        trust: unpickle everything, which runs whatever code the file's author put there.
        sample_rate, causal: Hz, and whether codes do not depend on later sound: of an EnCodec that says neither itself.

    Errors: `UserError`, one line that names the file.
    """
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}; choose one of {', '.join(KINDS)}")
    if not Path(source).exists():
        raise UserError(f"{source}: no such file or folder")
    if kind != "encodec" and (sample_rate is not None or causal is not None):
        raise UserError(f"sample_rate and causal are for kind encodec, not {kind}, which says them itself")
    if config is not None and kind not in (described := ("taming", "chameleon-vqgan", "encodec")):
        raise UserError(f"config is for {', '.join(described)}; {kind} is described by its own folder or weights")
    if kind in ("encodec", "hf-encodec"):
        from unitok.interop import audio

        return audio.import_audio_tokenizer(kind, Path(source), config, trust, sample_rate=sample_rate, causal=causal)
    if kind in DECODER_KINDS:
        from unitok.interop import decoder

        return decoder.import_decoder(kind, Path(source))
    from unitok.interop import image

    return image.import_image_tokenizer(kind, Path(source), config, trust)


def describe(part: Any) -> str:
    """One line on an imported part."""
    from unitok.tokenizers import AudioTokenizer, ImageTokenizer

    if isinstance(part, AudioTokenizer):
        levels = f"{part.num_codebooks} levels of {part.codebook_size} codes"
        rates = f"{part.frame_rate:g} frames a second, {levels}, {part.bitrate / 1000:g} kbit/s"
        return f"{part.sample_rate} Hz, {'' if part.config.causal else 'not '}causal, {rates}"
    if isinstance(part, ImageTokenizer):
        only = "" if part.config.decodes else "; it encodes only"
        return f"{part.codebook_size} codes of {part.config.codebook_dim} dimensions, {part.stride} pixels a code{only}"
    from unitok.interop import decoder

    return decoder.describe(part)
