"""Conversations as the field's data sets write them -> the parts of a document, a role each.

    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}, …]}, …]}   OpenAI, TRL
    {"messages": [{"role": "user", "content": "<image>What is it?"}, …], "images": ["cat.png"]}      ms-swift, LLaMA-Factory
    {"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, …], "image": "cat.png"}   LLaVA, ShareGPT
    {"conversations": […], "input_image": "cat.png", "output_audio": "meow.wav"}                     NExT-GPT
    {"instruction": "Say hello.", "input": "", "output": "Hello.", "history": [], "system": ""}      Alpaca

Which one it is follows from the keys. A text with `<image>`, `<audio>` or `<video>` takes the next file of that kind; one line break
beside such a tag goes with it. What the assistant says is learned, the rest is read. What does not agree is an error, never skipped:
tags without files, files without tags, roles that do not alternate, messages without content, tools.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from unitok.document import Part
from unitok.errors import UserError, type_of
from unitok.modalities import modalities
from unitok.storage import Blob

#: Keys that hold the list of messages.
_LISTS = ("messages", "conversations", "conversation")

#: Who says a message, by the names that formats have for it.
_ROLES = dict.fromkeys(("system", "developer"), "system") | dict.fromkeys(("user", "human"), "user")
_ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")

#: Keys of a row that hold its files, by kind.
_FILES = {kind: (kind, f"{kind}s") for kind in ("image", "audio", "video")}

#: The kind whose tag is also one of HTML.
_HTML = "video"

#: Types of parts that hold text, in OpenAI's two forms of messages, and the key that it has in them.
TEXT = "text"
_TEXTS = (TEXT, "input_text", "output_text")

_TAG = re.compile(r"<(image|audio|video)>\n|\n<(image|audio|video)>\Z|<(image|audio|video)>")
_OBJECT = re.compile(r"<(ref-object|bbox)>")

Row = Mapping[str, object]


@dataclass(frozen=True)
class Media:
    """A piece of a message that is not text.

    Args:
        kind: `image`, `audio`, …
        content: the name of a file, a data URL, or what a table holds; None for the next file of the row, a number for the file of that
            number; of boxes what stands in the row itself.
        text: what stands for it where boxes are not read as such.
    """

    kind: str
    content: object
    text: str = ""


@dataclass(frozen=True)
class Message:
    """What one side says in one turn.

    Args:
        role: `system`, `user` or `assistant`. loss: whether it is learned.
        pieces: texts and media in order. A piece `Media(kind, None)` takes the next file of the row.
        tagged: whether tags in its texts stand for files.
    """

    role: str
    pieces: tuple[str | Media, ...]
    loss: bool
    tagged: bool = True


def is_conversation(row: Row) -> bool:
    """Whether a row is a conversation in one of the formats above."""
    return _list_of(row) is not None or (isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str))


def read_conversation(row: Row, make: Callable[[Media], Part], mask_history: bool = False) -> list[Part]:
    """Return the parts of a conversation, in order.

    row: one of the formats above. make: makes the part of an image or audio. mask_history: only the last turn of the assistant is
    learned.

    Errors: `UserError` that names the message and what is wrong.
    """
    messages = check_turns(read_messages(row))
    if mask_history:
        last = len(messages) - 1
        messages = [replace(m, loss=m.loss and i == last) for i, m in enumerate(messages)]
    if not any(m.loss for m in messages):
        raise UserError("nothing of this conversation is learned: each message of the assistant has weight 0")
    return parts_of(_with_files(messages, row), make)


def parts_of(messages: Sequence[Message], make: Callable[[Media], Part]) -> list[Part]:
    """Return the parts of messages whose media are known. make: makes the part of an image or audio."""
    parts: list[Part] = []
    for message in messages:
        for piece in message.pieces:
            part = Part(TEXT, piece) if isinstance(piece, str) else make(piece)
            last = parts[-1] if parts and piece is not message.pieces[0] else None
            if last and last.type == part.type == TEXT:  # a text instead of boxes
                part = replace(part, value=f"{parts.pop().value}{part.value}")
            parts.append(replace(part, role=message.role, loss=message.loss))
    return parts


def texts_of(row: Row) -> list[str]:
    """Return the texts of a conversation, without its files. Errors: `UserError` as `read_conversation`."""
    tagless = (piece for message in read_messages(row) for piece in _split_tags(message, row))
    return [piece for piece in tagless if isinstance(piece, str)]


def files_of(row: Row) -> Iterator[str]:
    """Yield the names of files in the messages of a row, as far as they can be read, and in fields that only conversations have."""
    if not is_conversation(row):
        return
    for prefix in ("input_", "output_"):
        yield from (name for kind in _FILES for name in _listed(row, prefix, kind) if isinstance(name, str))
    try:
        pieces = [piece for message in read_messages(row) for piece in message.pieces]
    except UserError:
        return
    for piece in pieces:
        if isinstance(piece, Media) and isinstance(piece.content, str) and not piece.content.startswith("data:"):
            yield piece.content


def check_turns(messages: list[Message], last: str = "assistant") -> list[Message]:
    """Return the messages, which must be a system message or none, then turns of user and assistant.

    last: the role of the last one. Errors: `UserError`.
    """
    if not messages:
        raise UserError("a conversation without messages")
    start = int(messages[0].role == "system")
    for number, message in enumerate(messages[start:], start + 1):
        expected = ("user", "assistant")[(number - start - 1) % 2]
        if message.role != expected:
            said = "the system's message must be the first" if message.role == "system" else f"the {expected}'s turn is missing"
            raise UserError(f"message {number} is of the {message.role}: {said}; user and assistant must alternate")
    if messages[-1].role != last:
        raise UserError(f"the last message is of the {messages[-1].role}; it must be of the {last}")
    return messages


# ---- Formats -> messages ----------------------------------------------------------------------------------------------


def read_messages(row: Row) -> list[Message]:
    """Return the messages of a conversation as they stand, with tags in their texts. Errors: `UserError`."""
    if row.get("tools") not in (None, "", [], "[]"):
        raise UserError("tools: calls of tools are not supported; leave the conversation out")
    found = _list_of(row)
    if found is None:
        messages = _of_alpaca(row)
    else:
        messages = [_message(entry, number) for number, entry in enumerate(found, 1) if not _is_empty_system(entry)]
    system = row.get("system")
    if system and not isinstance(system, str):
        raise UserError(f"system: {type_of(system)}; it must be a text")
    if isinstance(system, str) and system.strip():
        messages.insert(0, Message("system", (system,), False))
    return messages


def _list_of(row: Row) -> list[object] | None:
    """The list of messages in a row; None where it has none."""
    found = next((value for key in _LISTS if isinstance(value := row.get(key), list)), None)
    return found if found is not None and all(isinstance(entry, Mapping) for entry in found) else None


def _of_alpaca(row: Row) -> list[Message]:
    history = row.get("history") or []
    pairs = [(str(row["instruction"]), str(row.get("input") or "")), (str(row["output"]), "")]
    if not isinstance(history, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise UserError("history: it must be a list of pairs, an instruction and its output")
    texts = [str(text) for turn in history for text in turn] + ["\n".join(filter(None, pair)) for pair in pairs]
    roles = ("user", "assistant")
    return [Message(roles[i % 2], _texts(text, f"message {i + 1}"), i % 2 == 1) for i, text in enumerate(texts)]


def _is_empty_system(entry: object) -> bool:
    """Whether an entry is a system message without content, which many data sets have in every row."""
    assert isinstance(entry, Mapping)
    said = entry.get("content") if entry.get("content") is not None else entry.get("value")
    return _ROLES.get(str(entry.get("role") or entry.get("from")).lower()) == "system" and said in (None, "", [])


def _message(entry: object, number: int) -> Message:
    where = f"message {number}"
    assert isinstance(entry, Mapping)
    name = next((entry[key] for key in ("role", "from") if entry.get(key) is not None), None)
    if not isinstance(name, str) or name.lower() not in _ROLES:
        hint = "; tools are not supported" if name in ("tool", "function", "function_call", "observation", "ipython") else ""
        raise UserError(f"{where}: role {name!r}; it must be one of {', '.join(_ROLES)}{hint}")
    role = _ROLES[name.lower()]
    if entry.get("tool_calls") or entry.get("function_call"):
        raise UserError(f"{where}: a call of a tool; tools are not supported")
    content = next((entry[key] for key in ("parts", "content", "value") if entry.get(key) is not None), None)
    tagged = not isinstance(content, list)
    if isinstance(content, str):
        pieces: tuple[str | Media, ...] = _texts(content, where) if content.strip() or not entry.get("audio") else ()
    elif isinstance(content, list):
        pieces = tuple(piece for i, part in enumerate(content, 1) if (piece := _piece(part, f"{where}, part {i}")) != "")
    elif content is None and entry.get("audio"):
        pieces = ()
    else:
        raise UserError(f"{where}: content must be a text or a list of parts")
    if isinstance(audio := entry.get("audio"), Mapping) and not entry.get("parts"):  # what OpenAI's models answer
        if audio.get("data"):
            pieces = (*pieces, Media("audio", f"data:audio/wav;base64,{audio['data']}"))
        elif audio.get("id"):
            raise UserError(f"{where}: audio by its id: answers are not kept; send the message with its parts, or audio.data")
    if not pieces:
        raise UserError(f"{where}: it is empty")
    return Message(role, pieces, role == "assistant" and _is_learned(entry, where), tagged)


def _texts(text: str, where: str) -> tuple[str, ...]:
    if not text.strip():
        raise UserError(f"{where}: it is empty")
    return (text,)


def _is_learned(entry: Row, where: str) -> bool:
    """Whether a message of the assistant is learned: `weight` (OpenAI) or `loss` (ms-swift) may say that it is not."""
    values = [entry[key] for key in ("weight", "loss") if entry.get(key) is not None]
    if any(value not in (0, 1) for value in values):
        raise UserError(f"{where}: weight and loss must be 0 or 1")
    return all(values)


def text_in(part: object) -> str | None:
    """Return the text of a part of a message; None for a part of another type."""
    text = part.get(TEXT) if isinstance(part, Mapping) and part.get("type") in _TEXTS else None
    return text if isinstance(text, str) else None


def text_part(text: str) -> dict[str, object]:
    """Return a text as a part of a message."""
    return {"type": TEXT, TEXT: text}


def parts_in(content: object) -> list[dict[str, object]]:
    """Return the parts of a message's content, also where it is a text."""
    return [text_part(content)] if isinstance(content, str) else [*content]  # type: ignore[misc]


def media_part(kind: str, url: str) -> dict[str, object]:
    """Return a file's data URL as a part of a message."""
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def _piece(part: object, where: str) -> str | Media:
    """A part of a message's content: OpenAI's, or `{"type": "image", "image": …}` as transformers writes it."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or not isinstance(kind := part.get("type"), str):
        raise UserError(f"{where}: it must be an object with a type")
    if kind in _TEXTS:
        if (text := text_in(part)) is None:
            raise UserError(f"{where}: text must be a text")
        return text
    if kind == "input_audio":
        audio = part.get("input_audio")
        if not isinstance(audio, Mapping) or not isinstance(audio.get("data"), str):
            raise UserError(f'{where}: input_audio must be {{"data": base64, "format": "wav"}}')
        return Media("audio", f"data:audio/{audio.get('format', 'wav')};base64,{audio['data']}")
    if kind in modalities() and modalities()[kind].inline:  # such as boxes: {"type": "box", "boxes": […]}
        return Media(kind, {name: value for name, value in part.items() if name != "type"})
    kind, key = kind.removeprefix("input_").removesuffix("_url"), kind
    value = next((part[name] for name in (key, kind, "url", "path") if part.get(name) is not None), None)
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    if key.endswith("_url") and not isinstance(value, str):
        raise UserError(f'{where}: {key} must be {{"url": a data URL or the name of a file}}')
    return Media(kind, part["index"] if value is None and isinstance(part.get("index"), int) else value)


# ---- Files ------------------------------------------------------------------------------------------------------------


def _with_files(messages: list[Message], row: Row) -> list[Message]:
    """Put the files of a row in the place of the tags of its messages. Errors: `UserError` where their numbers differ."""
    sided = [prefix + key for prefix in ("input_", "output_") for keys in _FILES.values() for key in keys]
    by_side = any(row.get(key) for key in sided)  # as NExT-GPT
    sides = {"assistant": "output_"} if by_side else {}
    before = "input_" if by_side else ""
    files = {(prefix, kind): _listed(row, prefix, kind) for prefix in {before, *sides.values()} for kind in _FILES}
    split = [(message, list(_split_tags(message, row))) for message in messages]
    for (prefix, kind), found in files.items():
        side = [(m, pieces) for m, pieces in split if sides.get(m.role, before) == prefix]
        waiting = [piece for _, pieces in side for piece in pieces if isinstance(piece, Media) and piece.kind == kind]
        tags = [piece for piece in waiting if piece.content is None]
        numbered = any(isinstance(piece.content, int) for piece in waiting)
        if by_side and found and not tags and side:  # NExT-GPT: what is given stands before all, what is made after all
            pieces = side[0][1] if prefix == "input_" else side[-1][1]
            at = 0 if prefix == "input_" else len(pieces)
            pieces[at:at] = [Media(kind, None)] * len(found)
        elif len(tags) != len(found) and not numbered:
            raise UserError(f"{len(tags)} {kind} tags in the messages, but {len(found)} files in {prefix}{kind}")
    left = {key: list(found) for key, found in files.items()}
    objects = _objects(row)
    done = []
    for message, pieces in split:
        taken: list[str | Media] = []
        for piece in pieces:
            if isinstance(piece, Media):
                piece = _taken(piece, files, left, sides.get(message.role, before))
            elif objects is not None and message.tagged:
                taken += _with_objects(piece, objects)
                continue
            taken.append(piece)
        done.append(replace(message, pieces=tuple(taken)))
    if objects and (more := [f"{len(values)} {name}" for name, values in objects.items() if values]):
        raise UserError(f"objects: {' and '.join(more)} more than there are tags in the messages")
    return done


def _taken(
    piece: Media, files: Mapping[tuple[str, str], list[object]], left: Mapping[tuple[str, str], list[object]], prefix: str
) -> Media:
    """A piece with its file: one that has none takes the next one, or that of its number."""
    if isinstance(piece.content, int):
        found = files.get((prefix, piece.kind), [])
        if not 0 <= piece.content < len(found):
            raise UserError(f"{piece.kind} {piece.content}: there are {len(found)} in {prefix}{piece.kind}s")
        return Media(piece.kind, found[piece.content])
    if piece.content is None:
        if not left.get((prefix, piece.kind)):
            raise UserError(f"a part of type {piece.kind} without content")
        return Media(piece.kind, left[prefix, piece.kind].pop(0))
    return piece


def _split_tags(message: Message, row: Row) -> Iterator[str | Media]:
    """The pieces of a message, its texts divided at their tags. `<video>` is a tag where the row has videos, else a word of HTML."""
    has_videos = any(row.get(key) for key in _FILES[_HTML])
    for piece in message.pieces:
        if isinstance(piece, Media) or not message.tagged:
            yield piece
            continue
        at = 0
        for match in _TAG.finditer(piece):
            if (match[1] or match[2] or match[3]) == _HTML and not has_videos:
                continue
            if match.start() > at:
                yield piece[at : match.start()]
            yield Media(match[1] or match[2] or match[3], None)
            at = match.end()
        if at < len(piece):
            yield piece[at:]


def _listed(row: Row, prefix: str, kind: str) -> list[object]:
    """The files of a kind that a row names, in order."""
    found: list[object] = []
    for key in _FILES[kind]:
        value = row.get(prefix + key)
        found += [one for one in (value if isinstance(value, list) else [value]) if one is not None and one != ""]
    return found


def _objects(row: Row) -> dict[str, list[object]] | None:
    """What `<ref-object>` and `<bbox>` stand for, in order (ms-swift): names, and boxes in the image of their number."""
    objects = row.get("objects")
    if not objects:
        return None
    if not isinstance(objects, Mapping):
        raise UserError('objects: it must be {"ref": [names], "bbox": [boxes]}')
    boxes, unit, images = list(objects.get("bbox") or []), objects.get("bbox_type", "real"), objects.get("image_id")
    of_images = images if isinstance(images, list) and len(images) == len(boxes) else [None] * len(boxes)
    pieces = [Media("box", (box, unit, image), str(box)) for box, image in zip(boxes, of_images, strict=True)]
    return {"ref-object": list(objects.get("ref") or []), "bbox": [*pieces]}


def _with_objects(text: str, objects: dict[str, list[object]]) -> Iterator[str | Media]:
    """A text with its names filled in, and the boxes between its parts."""
    before = ""
    for number, piece in enumerate(_OBJECT.split(text)):  # text, tag, text, …
        if number % 2 == 0:
            before += piece
            continue
        if not objects[piece]:
            raise UserError(f"objects: fewer than there are <{piece}> in the messages")
        value = objects[piece].pop(0)
        if isinstance(value, Media):
            yield from ([before] if before else [])
            before = ""
            yield value
        else:
            before += str(value)
    if before:
        yield before


def to_data_url(data: bytes, mime: str | None) -> str:
    """Return the data URL of a file's bytes. mime: its media type; None: unknown."""
    return f"data:{mime or 'application/octet-stream'};base64,{base64.b64encode(data).decode()}"


def data_url(text: str, name: str) -> Blob | None:
    """The content of a data URL, or of base64 alone; None for other texts. Errors: `UserError` for a broken data URL."""
    from unitok.media import sniff_bytes  # imports PyTorch

    header, _, coded = text.partition(";base64,") if text.startswith("data:") else ("", "", text)
    if not header and (len(text) < 64 or not re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text)):
        return None
    try:
        data = base64.b64decode("".join(coded.split()), validate=True)
    except ValueError:  # also for characters that are not ASCII
        data = b""
    if header and not data:
        raise UserError(f"{name}: a data URL that is not base64; mend it")
    media = [kind for kind, modality in modalities().items() if not modality.inline]
    is_media = data and sniff_bytes(data[:4096]) in media
    place = int.from_bytes(hashlib.sha256(data).digest()[:7], "big")  # tells apart contents of fields of the same name
    return Blob(name, data, offset=place) if header or is_media else None
