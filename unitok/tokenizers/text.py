"""The text tokenizer: SentencePiece BPE with byte fallback, exact for every string.

SentencePiece is configured to change nothing (no normalization, no added or removed spaces). U+2581, its own mark for a space,
is encoded as bytes, because SentencePiece cannot distinguish it from a space. Control pieces (`unk`) are never produced, and
not allowed in any sequence. Only half of a surrogate pair, which is not valid UTF-8, is refused. In training SentencePiece
skips lines silently that are too long or contain its own characters; such lines are cut first.
"""

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import sentencepiece

from unitok.errors import UserError, first_line
from unitok.files import read_json, whole_folder, write_json
from unitok.pretrained import VERSION, part_folder
from unitok.tokenizers.arguments import check_text, check_text_codes

log = logging.getLogger("unitok")

_SPACE_MARK = "\u2581"
#: SentencePiece skips lines with one of these: its marks for a space and for an unknown piece, and the end of a string.
_OWN = re.compile(f"[{_SPACE_MARK}\u2585\0]")
MAX_LINE = 4_192  # bytes of a training line: the default of SentencePiece, far below its limit for a word
_PROBE = "A ﬁ  Ｂ\té\u0301\n 𝒳\u00a0 end "  # a text that any normalization changes
#: Names of tokens that do not stand for text.
_MARK = re.compile(r"<(reserved\d+|racm3:\w+|eoss|/?s|pad|unk|mask|image)>$|IMGIMG[A-J]+Z$")


class TextTokenizer:
    """A SentencePiece model. model: its serialized bytes. size: number of codes, control pieces and bytes included."""

    _file = "tokenizer.model"

    def __init__(self, model: bytes):
        self.model = model
        self._config: dict[str, int] = {}  # additional fields of config.json
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size: int = self._processor.vocab_size()
        #: Codes of characters that SentencePiece would confuse: its mark for a space and, if no piece is a space, the space.
        spaces = self._processor.piece_to_id(_SPACE_MARK) == self._processor.unk_id()
        self._bytes = {
            character: [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
            for character in (_SPACE_MARK, " ")[: 1 + spaces]
        }
        self._confused = re.compile(f"([{''.join(self._bytes)}])")

    @property
    def vocab_size(self) -> int:
        """Same as `size`; the name in transformers' tokenizers."""
        return self.size

    def __len__(self) -> int:
        return self.size

    @property
    def illegal(self) -> tuple[int, ...]:
        """Codes that no text contains."""
        p = self._processor
        return tuple(i for i in range(self.size) if p.is_control(i) or p.is_unknown(i) or p.is_unused(i))

    def encode(self, text: str) -> list[int]:
        """Return the codes of a text. Errors: `UserError` for any other object, and for text that is not valid UTF-8."""
        check_text(text)
        codes: list[int] = []
        for part in self._confused.split(text):
            codes += self._bytes.get(part) or self._processor.encode(part)
        return codes

    def decode(self, codes: list[int]) -> str:
        """Return the text of codes. Inverse of `encode`; bytes that are not UTF-8 become U+FFFD. Errors: `UserError` for codes
        that are out of range."""
        return self._processor.decode(check_text_codes(codes, self.size))

    def fingerprint(self) -> str:
        """Return a hash of the model; tokenizers with equal fingerprints give equal codes."""
        return hashlib.sha256(self.model).hexdigest()

    def describe(self) -> dict[str, int]:
        """Return the number of pieces."""
        return {"pieces": self.size}

    def prepare_for_inference(self) -> Self:
        """Return the tokenizer itself."""
        return self

    def save_pretrained(self, folder: Path, overwrite: bool = False) -> None:
        """Write `config.json` and the model's file, `tokenizer.model` of SentencePiece or `tokenizer.json` of Hugging Face."""
        kind = "imported text tokenizer" if self._config else "text tokenizer"
        with whole_folder(folder, kind, overwrite) as partial:
            (partial / self._file).write_bytes(self.model)
            write_json(partial / "config.json", {"unitok": VERSION, "kind": "text tokenizer"} | self._config)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str = "cpu", name: str = "text", revision: str | None = None
    ) -> "TextTokenizer":
        """Read a tokenizer, also an imported one. Arguments as for the other tokenizers; `device` changes nothing."""
        folder = part_folder(path, f"tokenizers/{name}", revision)
        if (folder / ImportedTextTokenizer._file).exists():
            return ImportedTextTokenizer._load(folder)
        file = folder / cls._file
        if not file.exists():
            raise UserError(f"{file}: no such file; make one with `unitok train-text-tokenizer`")
        try:
            tokenizer = cls(file.read_bytes())
        except RuntimeError:
            raise UserError(f"{file}: not a SentencePiece model, or cut off; get it again") from None
        if tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE:
            log.warning("%s: this model normalizes text, so decoding does not return it exactly", file)
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 8_000, sample: int = 5_000_000) -> "TextTokenizer":
        """Train BPE with byte fallback.

        Args:
            texts: the corpus. Texts of more than `MAX_LINE` bytes are cut at spaces, longer words anywhere.
            size: number of pieces, at least 300 (256 of them bytes); a small corpus may give fewer.
            sample: number of texts that are used at most, the first ones.

        Errors: `UserError` for a corpus without text, or with more distinct characters than `size` pieces can hold.
        """
        if not 300 <= size < 1 << 31:
            raise UserError(f"{size} pieces: at least 300, 256 of them bytes, and under 2^31")
        if sample < 1:
            raise UserError(f"{sample} texts to train on: at least 1")
        lines: list[str] = []
        long = 0
        for _, text in zip(range(sample), texts, strict=False):
            pieces = [piece for line in _OWN.split(text) for piece in cut_line(check_text(line))]
            long += len(text) * 4 > MAX_LINE and any(len(line.encode()) > MAX_LINE for line in _OWN.split(text))
            lines += [piece for piece in pieces if piece.strip()]
        if not lines:
            raise UserError("no text to train on: there is only white space, or characters that are always encoded as bytes")
        if long:
            log.warning("%d texts of more than %d bytes were cut, at spaces if they have any", long, MAX_LINE)
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
                    max_sentence_length=MAX_LINE,
                    num_threads=1,  # the result must not depend on the machine
                    minloglevel=2,
                )
                return cls(out.getvalue())
            except RuntimeError as error:
                if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
                    what = "this text has more distinct characters than so many pieces can hold"
                    raise UserError(f"{size} pieces: {what}; give at least {needed[1]}") from None
                most = re.search(r"value <= (\d+)", str(error))  # the largest size that a small corpus allows
                if not most or int(most[1]) >= size:
                    raise UserError(f"SentencePiece could not train on this text: {first_line(error)}") from None
                size = int(most[1])


def cut_line(line: str) -> list[str]:
    """Cut a line into pieces of at most `MAX_LINE` bytes, before spaces, because words of SentencePiece begin with a space."""
    data, start, pieces = line.encode(), 0, []
    while len(data) - start > MAX_LINE:
        end = data.rfind(b" ", start + 1, start + MAX_LINE + 1)
        while end > start and data[end - 1 : end] == b" ":
            end -= 1
        if end <= start:  # a single word, or only spaces: cut between two characters
            end = start + MAX_LINE
            while data[end] & 0xC0 == 0x80:
                end -= 1
        pieces.append(data[start:end].decode())
        start = end
    return [*pieces, data[start:].decode()]


class ImportedTextTokenizer(TextTokenizer):
    """Text tokenizer of another model, in the format of the package `tokenizers` of Hugging Face, which it needs.

    Special tokens (added ones such as `<s>`, and Chameleon's `IMGIMG…` of images) are never made from text, and not allowed. If
    it normalizes text, decoding returns the normalized text. data: bytes of the tokenizer.json. first: their token of code 0.
    size: number of codes.
    """

    _file = "tokenizer.json"

    def __init__(self, data: bytes, first: int, size: int):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            what = "this text tokenizer needs the package tokenizers"
            raise UserError(f"{what}: pip install 'unitok-lm[transformers]'") from None
        self.model, self.first, self.size = data, first, size
        self._config = {"first": first, "size": size}
        try:
            description = json.loads(data)
        except (ValueError, RecursionError):
            raise UserError("tokenizer.json: not JSON, or cut off; get it again") from None
        marks = {token["content"] for token in description.get("added_tokens", [])}
        try:
            self._json = Tokenizer.from_str(json.dumps(description | {"added_tokens": [], "post_processor": None}))
        except Exception as error:  # the package raises bare Exceptions
            raise UserError(f"tokenizer.json: the package tokenizers cannot read it ({error})") from None
        ids = self._json.get_vocab(with_added_tokens=False).items()
        text_codes = {id - first for name, id in ids if name not in marks and not _MARK.match(name)}
        self._text_codes = text_codes & set(range(size))

    @property
    def illegal(self) -> tuple[int, ...]:
        return tuple(code for code in range(self.size) if code not in self._text_codes)

    def encode(self, text: str) -> list[int]:
        """Return the codes of a text. Errors: `UserError` for a character that the tokenizer does not know."""
        codes = [id - self.first for id in self._json.encode(check_text(text), add_special_tokens=False).ids]
        if unknown := [code for code in codes if code not in self._text_codes]:
            id = unknown[0] + self.first
            raise UserError(f"the text tokenizer encodes this text with token {id}, which is not a token of text")
        return codes

    def decode(self, codes: list[int]) -> str:
        """Return the text of codes. Inverse of `encode`."""
        ids = [code + self.first for code in check_text_codes(codes, self.size)]
        return self._json.decode(ids, skip_special_tokens=False)

    @classmethod
    def _load(cls, folder: Path) -> "ImportedTextTokenizer":
        config = read_json(folder / "config.json", "import it again")
        if config.get("kind") != "text tokenizer" or not {"first", "size"} <= set(config):
            raise UserError(
                f"{folder}: a tokenizer of another program; `unitok import hf-chameleon` imports that of a Chameleon"
            )
        return cls((folder / cls._file).read_bytes(), config["first"], config["size"])
