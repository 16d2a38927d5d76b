"""Vocabularies without tokenizers."""

from types import SimpleNamespace

from unitok.modalities import build_vocab
from unitok.vocab import Vocab


def make_vocab(
    text: int | None = None,
    image: int | None = None,
    audio: tuple[int, int] | None = None,
    illegal_text: tuple[int, ...] = (),
) -> Vocab:
    """The standard layout for `text` pieces, `image` codes and `audio` = (levels, codes per level); None leaves one out."""
    stand_ins = {
        "text": text and SimpleNamespace(size=text, illegal=illegal_text, fingerprint=str),
        "image": image and SimpleNamespace(codebook_size=image, fingerprint=str),
        "audio": audio and SimpleNamespace(num_codebooks=audio[0], codebook_size=audio[1], fingerprint=str),
    }
    return build_vocab({name: one for name, one in stand_ins.items() if one})
