"""What can be imported and exported, and which module reads it. Nothing heavy is imported before it is asked for."""

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
EXPORTS = {"hf-qwen3": "loads in transformers, vLLM and SGLang as Qwen3"}

#: Options that only some kinds take: the others say the same themselves.
OPTIONS = {"config": ("taming", "chameleon-vqgan", "encodec"), "sample_rate": ("encodec",), "causal": ("encodec",)}


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
        sample_rate, causal: Hz, and whether codes do not depend on later audio: of an EnCodec that says neither itself.

    Errors: `UserError`, one line that names the file.
    """
    source = Path(source)
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}; choose one of {', '.join(KINDS)}")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    for name, value in {"config": config, "sample_rate": sample_rate, "causal": causal}.items():
        if value is not None and kind not in OPTIONS[name]:
            raise UserError(f"{name} is for {', '.join(OPTIONS[name])}; {kind} is described by its own folder or weights")
    if kind in ("encodec", "hf-encodec"):
        from unitok.interop.audio import import_audio_tokenizer

        return import_audio_tokenizer(kind, source, config, trust, sample_rate=sample_rate, causal=causal)
    if kind in ("hf-chameleon", "hf-llama", "hf-qwen3"):
        from unitok.interop.decoder import import_decoder

        return import_decoder(kind, source)
    from unitok.interop.image import import_image_tokenizer

    return import_image_tokenizer(kind, source, config, trust)


def describe(part: Any) -> str:
    """One line on what `import_checkpoint` gave."""
    from unitok.interop.decoder import ImportedDecoder
    from unitok.tokenizers import AudioTokenizer, ImageTokenizer

    if isinstance(part, AudioTokenizer):
        levels = f"{part.num_codebooks} levels of {part.codebook_size} codes"
        rates = f"{part.frame_rate:g} frames a second, {levels}, {part.bitrate / 1000:g} kbit/s"
        return f"{part.sample_rate} Hz, {'' if part.config.causal else 'not '}causal, {rates}"
    if isinstance(part, ImageTokenizer):
        only = "" if part.config.decodes else "; it encodes only"
        return f"{part.codebook_size} codes of {part.config.codebook_dim} dimensions, {part.stride} pixels a code{only}"
    decoder = part.model if isinstance(part, ImportedDecoder) else part
    count, c = sum(p.numel() for p in decoder.parameters()), decoder.config
    told = f"a decoder of {count / 1e6:.1f}M parameters, {c.num_hidden_layers} layers, {c.vocab_size} ids"
    if decoder is part:
        return f"{told}; it brings no vocabulary, so nothing says what its ids mean"
    if part.vocab is None:
        return f"{told}; ids stay plain: no names of image ids, or no image encoder"
    parts = ", ".join(part.tokenizers)
    return f"{told}; a bundle with {f'{parts} and decoder' if parts else 'the decoder and what its ids mean'}"
