"""Text: SentencePiece pieces, bare in the sequence."""

from typing import Any

import numpy as np
from markupsafe import Markup

from unitok import pages
from unitok.document import Segment
from unitok.errors import UserError, is_utf8, visible
from unitok.modalities import Loaded, Modality, Stream, register
from unitok.ranges import Span


@register
class Text(Modality):
    """A str."""

    kind = "text"
    key = "text"

    def tokenizer_class(self) -> Any:
        from unitok.tokenizers import TextTokenizer

        return TextTokenizer

    def untrained(self) -> Any:
        return self.tokenizer_class().train(["a small text about nothing much, to have a few pieces"], size=300)

    def declare(self, name: str, tokenizer: Any) -> tuple[Span, dict[str, int], tuple[int, ...]]:
        return (
            Span(name, (name,), fingerprint=tokenizer.fingerprint(), kind=self.kind),
            {name: tokenizer.size},
            tokenizer.illegal,
        )

    def describe(self, tokenizer: Any) -> dict[str, Any]:
        return {"pieces": tokenizer.size}

    def accepts(self, content: Any) -> bool:
        return isinstance(content, str)

    def check(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}: an empty or missing 'text'; fill it or remove the part")
        if not is_utf8(value):
            raise UserError(f"{where}: 'text' is not UTF-8 text (half of a surrogate pair); mend it")
        return value

    def load(self, tokenizer: Any, content: Any, options: Any, name: str, view: str = "", chance: float = 0.0) -> Loaded:
        return Loaded(content, facts={"characters": len(content)})

    def encode(self, tokenizer: Any, batch: list[Loaded]) -> list[np.ndarray]:
        return [np.asarray(tokenizer.encode(one.content), np.int32) for one in batch]

    def decode(self, tokenizer: Any, segment: Segment) -> str:
        return tokenizer.decode(segment.codes.tolist())

    def stream(self, tokenizer: Any, span: Span) -> Stream:
        return _TextStream(self, tokenizer)

    def html(self, tokenizer: Any, content: str) -> Markup:
        return pages.text(content)

    def line(self, tokenizer: Any, segment: Segment) -> str:
        text = self.decode(tokenizer, segment)
        return repr(text if len(text) <= 100 else f"{text[:100]}…")

    def terminal(self, tokenizer: Any, content: str, done: bool, colors: bool) -> tuple[str, bool]:
        return visible(content, lines=True), False

    def log(self, board: Any, tag: str, tokenizer: Any, content: str, step: int) -> None:
        board.add_text(tag, content, step)


class _TextStream(Stream):
    """The new characters; half a character waits for its other half."""

    shown = ""

    def push(self, codes: np.ndarray, done: bool) -> str | None:
        whole = self.tokenizer.decode(codes.tolist())
        whole = whole if done else whole.rstrip("\ufffd")
        new, self.shown = whole[len(self.shown) :], whole
        return new if new or done else None
