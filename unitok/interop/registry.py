"""The kinds of checkpoints that can be imported and exported. The modules that read them are imported when they are needed."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from unitok.errors import UserError

if TYPE_CHECKING:
    from unitok.interop.decoder import ImportedDecoder
    from unitok.model import Decoder
    from unitok.tokenizers import AudioTokenizer, ImageTokenizer

    Imported: TypeAlias = AudioTokenizer | ImageTokenizer | Decoder | ImportedDecoder

#: Kind of checkpoint -> what its source is.
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
EXPORTS = {
    "hf-qwen3": "a folder that transformers, vLLM and SGLang load as Qwen3",
    "gguf": "a folder with a GGUF file that llama.cpp and what is built on it load",
}

#: Options that only some kinds take; the files of all others contain these values.
OPTIONS = {"config": ("taming", "chameleon-vqgan", "encodec"), "sample_rate": ("encodec",), "causal": ("encodec",)}


def import_checkpoint(
    kind: str,
    source: Path,
    config: Path | None = None,
    trust: bool = False,
    sample_rate: int | None = None,
    causal: bool | None = None,
) -> "Imported":
    """Read a checkpoint of another project. Returns our module, of which `save_pretrained` writes a folder.

    Args:
        kind: one of `KINDS`. source: its file or folder.
        config: file of its configuration, if that does not lie beside it; for EnCodec also the name of a published model.
        trust: unpickle everything, which executes any code that the file contains.
        sample_rate, causal: Hz, and whether codes are independent of later audio; for an EnCodec without a configuration.

    Errors: `UserError`, one line that names the file.
    """
    source = Path(source)
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}; choose one of {', '.join(KINDS)}")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    for name, value in {"config": config, "sample_rate": sample_rate, "causal": causal}.items():
        if value is not None and kind not in OPTIONS[name]:
            raise UserError(f"{name} is for {', '.join(OPTIONS[name])}; a source of kind {kind} contains it")
    if kind in ("encodec", "hf-encodec"):
        from unitok.interop.audio import import_audio_tokenizer

        return import_audio_tokenizer(kind, source, config, trust, sample_rate=sample_rate, causal=causal)
    if kind in ("hf-chameleon", "hf-llama", "hf-qwen3"):
        from unitok.interop.decoder import import_decoder

        return import_decoder(kind, source)
    from unitok.interop.image import import_image_tokenizer

    return import_image_tokenizer(kind, source, config, trust)


def describe(part: "Imported") -> str:
    """Return one line about the result of `import_checkpoint`."""
    from unitok.interop.decoder import ImportedDecoder
    from unitok.tokenizers import AudioTokenizer, ImageTokenizer

    if isinstance(part, AudioTokenizer):
        levels = f"{part.num_codebooks} levels of {part.codebook_size} codes"
        rates = f"{part.frame_rate:g} frames per second, {levels}, {part.bitrate / 1000:g} kbit/s"
        return f"{part.sample_rate} Hz, {'' if part.config.causal else 'not '}causal, {rates}"
    if isinstance(part, ImageTokenizer):
        only = "" if part.config.decodes else "; it encodes only"
        return f"{part.codebook_size} codes of {part.config.codebook_dim} dimensions, {part.stride} pixels per code{only}"
    decoder = part.model if isinstance(part, ImportedDecoder) else part
    count, c = sum(p.numel() for p in decoder.parameters()), decoder.config
    size = f"a decoder of {count / 1e6:.1f}M parameters, {c.num_hidden_layers} layers, {c.vocab_size} tokens"
    if not isinstance(part, ImportedDecoder):
        return f"{size}; without a vocabulary, so the meaning of its tokens is unknown"
    if part.vocab is None:
        return f"{size}; without a vocabulary: no names of image tokens, or no image encoder"
    parts = ", ".join(part.tokenizers)
    return f"{size}; a bundle with {f'{parts} and decoder' if parts else 'decoder and vocabulary'}"
