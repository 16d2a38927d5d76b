"""The text tokenizer: SentencePiece BPE with byte fallback, exact for every string.

str -> list of codes -> the same str, whatever the string. SentencePiece is set up to change nothing (no normalisation,
no added or removed spaces); the one character that it cannot tell from a space, its own U+2581, is written as the three
bytes of its UTF-8 form. Control pieces (`unk`) are never produced and are illegal in every sequence.

`ImportedTextTokenizer` is another model's own, as Hugging Face's `tokenizers` reads it.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from unitok.errors import UserError, read_json
from unitok.pretrained import VERSION, part_folder, whole_folder
from unitok.tokenizers.arguments import check_text, check_text_codes

_SPACE_MARK = "\u2581"
_MARK = re.compile(
    r"<(reserved\d+|racm3:\w+|eoss|/?s|pad|unk|mask|image)>$|IMGIMG[A-J]+Z$"
)  # names of ids that stand for something else than text


class TextTokenizer:
    """A SentencePiece model. `model`: its serialized bytes."""

    def __init__(self, model: bytes):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    @property
    def size(self) -> int:
        """Number of pieces, control pieces and bytes included."""
        return self._processor.vocab_size()

    @property
    def illegal(self) -> tuple[int, ...]:
        """Pieces that no text is made of."""
        p = self._processor
        return tuple(i for i in range(self.size) if p.is_control(i) or p.is_unknown(i) or p.is_unused(i))

    def encode(self, text: str) -> list[int]:
        """str -> codes; errors: `UserError` for what is no str or cannot be written as UTF-8."""
        codes: list[int] = []
        for i, stretch in enumerate(check_text(text).split(_SPACE_MARK)):
            codes += (self._mark if i else []) + self._processor.encode(stretch)
        return codes

    def decode(self, codes: list[int]) -> str:
        """Codes -> str. Inverse of `encode`; bytes that are not UTF-8 become U+FFFD. Errors: `UserError` for one out of range."""
        return self._processor.decode(check_text_codes(codes, self.size))

    def fingerprint(self) -> str:
        """Changes when the codes do."""
        return hashlib.sha256(self.model).hexdigest()

    def save_pretrained(self, folder: Path, overwrite: bool = False) -> None:
        """Write `config.json` and `tokenizer.model` (SentencePiece's own format)."""
        with whole_folder(folder, "text tokenizer", overwrite) as partial:
            (partial / "tokenizer.model").write_bytes(self.model)
            config = {"unitok": VERSION, "kind": "text tokenizer"}
            (partial / "config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: Path, device: str = "cpu") -> "TextTokenizer":
        """Read its own folder or a bundle's, an imported one too; `device` is there for symmetry."""
        folder = part_folder(path, "tokenizers/text")
        if (folder / "tokenizer.json").exists():
            return ImportedTextTokenizer._load(folder)
        file = folder / "tokenizer.model"
        if not file.exists():
            raise UserError(f"{file}: no such file; make one with `unitok train-text`")
        return cls(file.read_bytes())

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 8_000, sample: int = 5_000_000) -> "TextTokenizer":
        """Train BPE with byte fallback.

        Args:
            texts: the corpus, any number of strings.
            size: pieces wanted, at least 300 (256 of them bytes); a small corpus may give fewer.
            sample: strings that are used at most, the first ones.
        """
        import io

        if size < 300:
            raise UserError(f"--size {size}: at least 300 pieces are needed, 256 of them are bytes")
        lines = [text.replace(_SPACE_MARK, " ") for _, text in zip(range(sample), texts, strict=False) if text.strip()]
        if not lines:
            raise UserError("no text to train on")
        while True:
            out = io.BytesIO()
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(lines),
                    model_writer=out,
                    model_type="bpe",
                    vocab_size=size,
                    byte_fallback=True,
                    character_coverage=0.9995,
                    normalization_rule_name="identity",
                    add_dummy_prefix=False,
                    remove_extra_whitespaces=False,
                    split_digits=True,
                    allow_whitespace_only_pieces=True,
                    unk_id=0,
                    bos_id=-1,
                    eos_id=-1,
                    pad_id=-1,
                    max_sentence_length=1_000_000,
                    num_threads=1,  # so that the result does not depend on the machine
                    minloglevel=2,
                )
                return cls(out.getvalue())
            except RuntimeError as error:  # a corpus too small for `size` says which size it would allow
                most = re.search(r"value <= (\d+)", str(error))
                if not most or int(most[1]) >= size:
                    raise UserError(f"SentencePiece could not train on this text: {error}") from None
                size = int(most[1])


class ImportedTextTokenizer(TextTokenizer):
    """Another model's text tokenizer, in the format of Hugging Face's `tokenizers` (needs that package).

    Its ids from `first` on are the codes from 0 on. Names that mark something (added tokens, as `<s>`, and `IMGIMG…` of
    Chameleon's images) are never made from text, and are illegal. As exact as the file says: one that normalises text
    gives it back normalised.

    Args:
        data: the tokenizer.json. first: id of code 0. size: number of codes.
    """

    def __init__(self, data: bytes, first: int, size: int):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("this text tokenizer needs the package tokenizers: pip install 'unitok[transformers]'") from None
        self.model, self.first, self._size = data, first, size
        given = json.loads(data)
        marks = {token["content"] for token in given.get("added_tokens", [])}
        try:
            self._json = Tokenizer.from_str(json.dumps(given | {"added_tokens": [], "post_processor": None}))
        except Exception as error:  # the package raises bare Exceptions
            raise UserError(f"tokenizer.json: not one that the package tokenizers reads ({error})") from None
        names = {id: name for name, id in self._json.get_vocab(with_added_tokens=False).items()}
        self._legal = {
            id - first
            for id, name in names.items()
            if first <= id < first + size and name not in marks and not _MARK.match(name)
        }

    @property
    def size(self) -> int:
        return self._size

    @property
    def illegal(self) -> tuple[int, ...]:
        return tuple(code for code in range(self.size) if code not in self._legal)

    def encode(self, text: str) -> list[int]:
        """str -> codes; errors: `UserError` for a character that it does not know."""
        codes = [id - self.first for id in self._json.encode(check_text(text), add_special_tokens=False).ids]
        if unknown := [code for code in codes if code not in self._legal]:
            raise UserError(
                f"the text tokenizer makes id {unknown[0] + self.first} of this text, which is none of its text ids"
            )
        return codes

    def decode(self, codes: list[int]) -> str:
        """Codes -> str. Inverse of `encode`."""
        ids = [code + self.first for code in check_text_codes(codes, self.size)]
        return self._json.decode(ids, skip_special_tokens=False)

    def save_pretrained(self, folder: Path, overwrite: bool = False) -> None:
        """Write `config.json` and `tokenizer.json`."""
        with whole_folder(folder, "imported text tokenizer", overwrite) as partial:
            (partial / "tokenizer.json").write_bytes(self.model)
            config = {"unitok": VERSION, "kind": "text tokenizer", "first": self.first, "size": self.size}
            (partial / "config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")

    @classmethod
    def _load(cls, folder: Path) -> "ImportedTextTokenizer":
        config = read_json(folder / "config.json", "import it again")
        if config.get("kind") != "text tokenizer" or not {"first", "size"} <= set(config):
            raise UserError(f"{folder}: another program's tokenizer; `unitok import hf-chameleon` takes a Chameleon's along")
        return cls((folder / "tokenizer.json").read_bytes(), config["first"], config["size"])
