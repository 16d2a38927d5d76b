"""Conversations with a bundle: messages in OpenAI's form in, messages of the assistant out.

What the assistant said is given back in later calls as text and data URLs. Encoding these again may give other codes than those that
were generated, so a `Chat` remembers the segments that it wrote, and the decoder's keys and values of the last conversations: each
turn costs only what is new.
"""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from mimetypes import guess_type
from pathlib import Path
from tempfile import TemporaryDirectory

from unitok.bundle import Bundle
from unitok.conversations import Media, Message, check_turns, data_url, parts_of, read_messages, text_in, text_part
from unitok.document import Document, Part, Segment
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig
from unitok.grammar import Grammar
from unitok.sample.engine import Session
from unitok.sample.outputs import Output
from unitok.sample.prefixes import PrefixCache
from unitok.sample.requests import make_drafts, sampling_of
from unitok.sample.stream import AHEAD, Chunk, stream_drafts

REMEMBERED = 256  # segments that were written

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
        self._written: dict[tuple[str, str], Segment] = {}  # by kind and text or data URL

    # ---- Messages -> documents -----------------------------------------------------------------------------------

    def document(self, messages: Sequence[MessageDict]) -> Document:
        """Return the document of messages, the last of them the user's. Errors: `UserError` that says what is wrong where."""
        if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
            raise UserError('messages: give a list such as [{"role": "user", "content": "Draw a cat."}]')
        missing = [role for role in ("user", "assistant") if f"<{role}>" not in self.bundle.vocab.specials]
        if missing:
            raise UserError(f"this bundle's vocabulary has no token for the role {missing[0]}, so it cannot chat")
        turns = check_turns(_merged(read_messages({"messages": [*messages]})), last="user")
        parts = parts_of(turns, self._part)
        return Document(tuple(segment for part in parts for segment in self._segments(part)))

    def _part(self, media: Media) -> Part:
        if media.kind not in self.bundle.types:
            raise UserError(f"messages: {media.kind}: no such content here; there is {', '.join(self.bundle.types)}")
        if not isinstance(media.content, str | Path):
            if media.content is None:
                raise UserError(f"messages: a part of type {media.kind} without content")
            return Part(media.kind, media.content)
        if (media.kind, str(media.content)) in self._written:
            return Part(media.kind, media.content)
        if isinstance(media.content, str) and (blob := data_url(media.content, f"messages: {media.kind}")):
            return Part(media.kind, path=Path(blob.name), file=blob)
        if not self.paths or "://" in str(media.content):
            raise UserError(f"messages: {media.kind}: {str(media.content)[:60]!r} is no data URL; nothing else is read")
        return Part(media.kind, path=Path(media.content))

    def _segments(self, part: Part) -> list[Segment]:
        remembered = self._written.get((part.type, part.value)) if isinstance(part.value, str) else None
        if remembered is not None:
            return [replace(remembered, role=part.role, loss=part.loss)]
        return self.bundle.read(part, part.role, part.loss)

    # ---- Documents -> messages -----------------------------------------------------------------------------------

    def message(self, output: Output) -> dict[str, object]:
        """Return an output as a message of the assistant: a text, or a list of parts."""
        parts = [self._write(segment, output.content(i)) for i, segment in enumerate(output.new.segments)]
        texts = [text for part in parts if (text := text_in(part)) is not None]
        return {"role": "assistant", "content": texts[0] if len(texts) == len(parts) == 1 else parts}

    def _write(self, segment: Segment, content: object) -> dict[str, object]:
        """A segment as a part of a message, which is remembered."""
        modality = self.bundle.modality(segment.modality)
        if modality.inline:
            text = str(content)
            part = text_part(text)
        else:
            with TemporaryDirectory() as folder:
                path = modality.save(self.bundle.require(segment.modality), content, Path(folder) / "0")
                assert path is not None
                text = f"data:{guess_type(path)[0]};base64,{b64encode(path.read_bytes()).decode()}"
            part = {"type": f"{segment.modality}_url", f"{segment.modality}_url": {"url": text}}
        self._written.pop((segment.modality, text), None)
        self._written[segment.modality, text] = segment
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
    turns: list[Message] = []
    for message in messages:
        if turns and turns[-1].role == message.role:
            message = replace(message, pieces=(*turns.pop().pieces, *message.pieces))
        turns.append(message)
    return turns
