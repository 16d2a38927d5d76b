"""Text: SentencePiece pieces, without begin and end tokens."""

from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from unitok import pages
from unitok.document import Segment
from unitok.errors import UserError, is_utf8, visible
from unitok.modalities import Loaded, Modality, NoOptions, Stream, register
from unitok.ranges import Span

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from unitok.tokenizers import TextTokenizer


@register
class Text(Modality["TextTokenizer", str, NoOptions]):
    """Content: a str."""

    kind = "text"
    key = "text"

    def tokenizer_class(self) -> "type[TextTokenizer]":
        from unitok.tokenizers import TextTokenizer

        return TextTokenizer

    def untrained(self) -> "TextTokenizer":
        return self.tokenizer_class().train(["a small text about nothing much, to have a few pieces"], size=300)

    def declare(self, name: str, tokenizer: "TextTokenizer") -> tuple[Span, dict[str, int], tuple[int, ...]]:
        return (
            Span(name, (name,), fingerprint=tokenizer.fingerprint(), kind=self.kind),
            {name: tokenizer.size},
            tokenizer.illegal,
        )

    def accepts(self, content: object) -> bool:
        return isinstance(content, str)

    def check(self, value: object, where: str) -> str:
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}: an empty or missing 'text'; fill it or remove the part")
        if not is_utf8(value):
            raise UserError(f"{where}: 'text' is not UTF-8 text (half of a surrogate pair); correct it")
        return value

    def load(
        self,
        tokenizer: "TextTokenizer",
        content: object,
        options: NoOptions,
        name: str,
        view: str = "",
        chance: float = 0.0,
    ) -> Loaded:
        assert isinstance(content, str)
        if not content:
            raise UserError(f"{name}: an empty text; write something, or leave it out")
        return Loaded(content, facts={"characters": len(content)})

    def encode(self, tokenizer: "TextTokenizer", batch: list[Loaded]) -> list[np.ndarray]:
        return [np.asarray(tokenizer.encode(one.content), np.int32) for one in batch]

    def decode(self, tokenizer: "TextTokenizer", segment: Segment) -> str:
        return tokenizer.decode(segment.codes.tolist())

    def stream(self, tokenizer: "TextTokenizer", span: Span) -> "_TextStream":
        return _TextStream(self, tokenizer)

    def html(self, tokenizer: "TextTokenizer", content: str) -> Markup:
        return pages.text(content)

    def line(self, tokenizer: "TextTokenizer", segment: Segment) -> str:
        text = self.decode(tokenizer, segment)
        return repr(text if len(text) <= 100 else f"{text[:100]}…")

    def terminal(self, tokenizer: "TextTokenizer", content: str, done: bool, colors: bool) -> tuple[str, bool]:
        return visible(content, lines=True), False

    def log(self, board: "SummaryWriter", tag: str, tokenizer: "TextTokenizer", content: str, step: int) -> None:
        board.add_text(tag, content, step)


class _TextStream(Stream["TextTokenizer", str]):
    """Returns the new characters; one whose bytes are not complete is returned when they are."""

    shown = ""

    def push(self, codes: np.ndarray, done: bool) -> str | None:
        whole = self.tokenizer.decode(codes.tolist())
        whole = whole if done else whole.rstrip("\ufffd")
        new, self.shown = whole[len(self.shown) :], whole
        return new if new or done else None
