"""Conversations with a bundle: messages in OpenAI's form in, messages of the assistant out.

What the assistant said is given back in later calls as text and data URLs. Encoding these again may give other codes than those that
were generated, so a `Chat` remembers the segments that it wrote, and the decoder's keys and values of the last conversations: each
turn costs only what is new.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from mimetypes import guess_type
from pathlib import Path
from tempfile import TemporaryDirectory

from unitok.bundle import Bundle
from unitok.conversations import (
    Message,
    check_turns,
    data_url,
    media_part,
    parts_of,
    read_messages,
    text_in,
    text_part,
    to_data_url,
)
from unitok.document import Document, Part, Segment
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig
from unitok.grammar import Grammar
from unitok.media import audio_seconds
from unitok.sample.engine import Session
from unitok.sample.outputs import Output
from unitok.sample.prefixes import PrefixCache
from unitok.sample.requests import make_drafts, sampling_of
from unitok.sample.stream import AHEAD, Chunk, stream_drafts

REMEMBERED = 256  # segments that were written
LONGEST_TOKEN = 256  # characters: a text of more per token that the decoder takes is refused before it is tokenized

#: A message such as `{"role": "user", "content": "Draw a cat."}`; content may be a list of parts.
MessageDict = Mapping[str, object]


@dataclass(repr=False, eq=False)
class Reply(Output):
    """A turn of the assistant. `message` is the turn in OpenAI's form, to be appended to the messages of the next call."""

    message: dict[str, object] = field(default_factory=dict)


class Chat:
    """Conversations with one bundle.

    paths: whether messages may name files of this machine, besides holding data URLs.
    """

    def __init__(self, bundle: Bundle, paths: bool = True):
        self.bundle, self.paths = bundle, paths
        self.prefixes = PrefixCache()
        self._written: dict[bytes, Segment] = {}  # by a digest of the modality and the text or data URL
        self._lock = threading.Lock()

    # ---- Messages -> documents -----------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Tokens that the decoder takes in all."""
        return int(self.bundle.require("model").config.max_position_embeddings)

    def document(self, messages: Sequence[MessageDict], roles: bool = True) -> Document:
        """Return the document of messages, the last of them the user's; without roles their contents alone, one after another. Errors:
        `UserError` that says what is wrong where."""
        if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
            raise UserError('messages: give a list such as [{"role": "user", "content": "Draw a cat."}]')
        missing = [role for role in ("user", "assistant") if f"<{role}>" not in self.bundle.vocab.specials]
        if missing and roles:
            raise UserError(f"this bundle's vocabulary has no token for the role {missing[0]}, so it cannot chat")
        turns = check_turns(_merged(read_messages({"messages": [*messages]})), last="user")
        segments: list[Segment] = []
        tokens = 0
        for part in parts_of(turns, lambda media: Part(media.kind, media.content)):
            segments += self.segments(part)
            tokens += segments[-1].codes.size
            if tokens > self.longest:  # before the rest is encoded for nothing
                raise UserError(
                    f"messages: more than {self.longest} tokens, which the decoder takes in all; begin a new conversation"
                )
        return Document(tuple(segments if roles else (replace(segment, role="none") for segment in segments)))

    def segments(self, part: Part, argument: str = "messages") -> list[Segment]:
        """Return the segments of a part, whose value may name a file or be a data URL. Errors: `UserError`, which begins with `argument`, also
        for content that is longer than the decoder takes, before it is encoded for nothing."""
        if part.role == "assistant" and isinstance(part.value, str):
            with self._lock:
                remembered = self._written.get(_key(part.type, part.value))
            if remembered is not None:
                return [replace(remembered, role=part.role, loss=part.loss)]
        if part.type not in self.bundle.types:
            raise UserError(f"{argument}: {part.type}: no such content here; there is {', '.join(self.bundle.types)}")
        if self.bundle.types[part.type].inline:
            if isinstance(part.value, str) and len(part.value) > LONGEST_TOKEN * self.longest:
                most = f"the decoder takes {self.longest} tokens in all"
                raise UserError(f"{argument}: a text of {len(part.value)} characters; {most}")
            return self.bundle.read(part)
        if part.value is None or isinstance(part.value, int):
            raise UserError(f"{argument}: a part of type {part.type} without content")
        if part.file is None and isinstance(part.value, str | Path):
            part = self._file(part)
        self._check_length(part, argument)
        return self.bundle.read(part)

    def _file(self, part: Part) -> Part:
        """A part whose value names a file or is a data URL, as one that can be read."""
        if isinstance(part.value, str) and (blob := data_url(part.value, f"messages: {part.type}")):
            return replace(part, value="", path=Path(blob.name), file=blob)
        if not self.paths or "://" in str(part.value):
            raise UserError(f"messages: {part.type}: {str(part.value)[:60]!r} is no data URL; nothing else is read")
        return replace(part, value="", path=Path(str(part.value)))

    def _check_length(self, part: Part, argument: str) -> None:
        """Raise `UserError` for audio of more frames than the decoder takes, before it is encoded for nothing."""
        name = self.bundle.instance(part.type)
        rate = self.bundle.modality(name).rate(self.bundle.require(name))
        if rate is None or part.path is None or (part.file is None and not part.path.is_file()):
            return
        seconds = audio_seconds(part.path, part.file.read() if part.file else None)
        if seconds * rate > self.longest:
            most = f"the decoder takes {self.longest} tokens in all"
            raise UserError(f"{argument}: {seconds:.0f} s of {part.type} are {seconds * rate:.0f} frames; {most}")

    # ---- Documents -> messages -----------------------------------------------------------------------------------

    def message(self, output: Output) -> dict[str, object]:
        """Return an output as a message of the assistant: a text, or a list of parts."""
        parts = [self._write(segment, output.content(i)) for i, segment in enumerate(output.new.segments)]
        texts = [text for part in parts if (text := text_in(part)) is not None]
        return {"role": "assistant", "content": texts[0] if len(texts) == len(parts) == 1 else parts}

    def _write(self, segment: Segment, content: object) -> dict[str, object]:
        """A segment as a part of a message, which is remembered."""
        modality = self.bundle.modality(segment.modality)
        if modality.inline and not isinstance(content, str):
            return {"type": segment.modality, **modality.row(content)}
        if modality.inline:
            text = str(content)
            part = text_part(text)
        else:
            with TemporaryDirectory() as folder:
                path = modality.save(self.bundle.require(segment.modality), content, Path(folder) / "0")
                assert path is not None
                text = to_data_url(path.read_bytes(), guess_type(path)[0])
            part = media_part(segment.modality, text)
        with self._lock:
            self._written.pop(_key(segment.modality, text), None)
            self._written[_key(segment.modality, text)] = segment
            while len(self._written) > REMEMBERED:
                del self._written[next(iter(self._written))]
        return part

    # ---- Turns ---------------------------------------------------------------------------------------------------

    def stream(self, messages: Sequence[MessageDict], config: GenerationConfig) -> Iterator[Chunk | Reply]:
        """Yield the chunks of the assistant's next turn, then the whole `Reply`. Errors: `UserError`, before any work."""
        bundle = self.bundle
        config = config.replace(n=1, best_of=1, prefix_fraction=None)
        drafts = make_drafts(bundle, [self.document(messages)], config, turn=True)
        session = Session(
            bundle.inference, Grammar(bundle.vocab), sampling_of(bundle, config), ahead=AHEAD, prefixes=self.prefixes
        )
        session.check(draft.request for draft in drafts)
        return self._replies(stream_drafts(bundle, session, drafts, 1))

    def _replies(self, chunks: Iterator[Chunk | Output]) -> Iterator[Chunk | Reply]:
        for chunk in chunks:
            if isinstance(chunk, Output):
                reply = Reply(chunk.bundle, chunk.prompt, chunk.new, chunk.ids)
                reply.message = self.message(reply)
                yield reply
            else:
                yield chunk


def _merged(messages: list[Message]) -> list[Message]:
    """Neighboring messages of one role as one turn, as OpenAI's servers take them."""
    groups = [list(group) for _, group in groupby(messages, key=lambda message: message.role)]
    return [replace(group[0], pieces=tuple(piece for message in group for piece in message.pieces)) for group in groups]


def _key(modality: str, text: str) -> bytes:
    return hashlib.sha256(f"{modality}\0{text}".encode("utf-8", "surrogatepass")).digest()
