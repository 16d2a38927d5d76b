"""Recordings whose words have times -> documents in which each word stands beside what is heard of it.

    {"audio": "a.wav", "words": [{"word": "Hello", "start": 0.31, "end": 0.62}, …]}     Whisper's, WhisperX's, OpenAI's verbose JSON
    {"audio": "a.wav", "words": [[0.31, 0.62, "Hello"], …]}                             the entries of aligners
    a.wav and a.json: {"segments": [{"words": […]}, …]}                                 as `whisper --word_timestamps True` writes it

A source with `interleave: words` is read so: word, its stretch of the recording, word, … (text first, to speak), or the stretch, then its
word (`order: [audio, text]`, to write down). All words but the first begin with a space, unless the field says which do. The recording is encoded as a whole and its codes are cut at frames, so that a stretch has the
codes that it has in the recording.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from unitok.bundle import Bundle
from unitok.data.prepare.recipe import SourceSpec
from unitok.document import Part, Segment
from unitok.errors import UserError
from unitok.modalities import modality_of
from unitok.storage import Blob

WORDS = "words"  # the field, and how `SourceSpec.interleave` names it
LATE = 0.1  # seconds by which a word may begin before the one before it ends, and end after its recording

Timed = tuple[str, float, float]  # a word, and its start and end in seconds


def with_words(parts: Sequence[Part], row: Mapping[str, object], spec: SourceSpec) -> tuple[list[Part], tuple[float, ...]]:
    """Return the only recording of a row and its words, one part each, instead of other texts; and `RawDocument.cuts`.

    Errors: `UserError` for no recording or several, and for words without times, or whose times are out of order.
    """
    timed = [part for part in parts if part.file is not None and "start" in modality_of(part.type).keys]
    if len(timed) != 1 or any(part.file is not None for part in parts if part is not timed[0]):
        raise UserError(
            f"interleave words: a document is one recording with its words, and this one has {len(timed)} recordings"
        )
    view = modality_of(timed[0].type).keys_of(timed[0].view)
    start, stop = float(view.get("start", 0.0)), float(view.get("end", math.inf))  # type: ignore[arg-type]
    within = [word for word in _ordered(words_of(row)) if start - LATE <= word[1] < stop]
    words = [(text, begin - start, min(end, stop) - start) for text, begin, end in within]
    if not words:
        raise UserError(
            f"interleave words: no field {WORDS!r} with words and their times, such as [{{'word': 'a', 'start': 0.1, 'end': 0.3}}]"
        )
    role, loss = spec.defaults("text")
    spaced = any(text[0].isspace() for text, _, _ in words)  # else the words have none of their own
    texts = [Part("text", text if spaced else f" {text}", role=role, loss=loss) for text, _, _ in words]
    texts[0] = replace(texts[0], value=words[0][0].lstrip())
    return [*texts, timed[0]], (*(begin for _, begin, _ in words[1:]), words[-1][2])


def words_of(row: Mapping[str, object]) -> list[Timed]:
    """Return the words of a row, of its segments, or of the JSON file beside it. Errors: `UserError` for what is no word with times."""
    record = row.get("json")
    if isinstance(record, Blob) and not {WORDS, "segments"} & row.keys():
        try:
            row = json.loads(record.read())
        except ValueError:
            raise UserError(f"{record.name}: not JSON") from None
    listed: list[object] = []
    row = row if isinstance(row, Mapping) else {}
    for holder in [row] if row.get(WORDS) else _listed(row.get("segments")):
        if isinstance(holder, Mapping):
            listed += _listed(holder.get(WORDS))
    words: list[Timed] = []
    for number, entry in enumerate(listed, 1):
        words.append(_word(entry, number, words[-1][2] if words else 0.0))
    return words


def interleaved(bundle: Bundle, segments: Sequence[Segment], cuts: Sequence[float]) -> Iterator[Segment]:
    """Yield the words of a document and the stretches of its recording in turn; the one of them that stands first begins.

    A word shorter than a frame stands with the next one. After a word comes all that is heard until the next one begins; what is heard after
    the last one stands alone at the end where stretches are first, else belongs to it. Errors: `UserError` for words after the recording's end.
    """
    (audio,) = (s for s in segments if bundle.modality(s.modality).keys)
    texts = [s for s in segments if s is not audio]
    first, seconds = segments[0] is audio, audio.codes.shape[-1] / bundle.require(audio.modality).frame_rate
    if cuts[-1] > seconds + LATE:
        raise UserError(f"{WORDS}: the last one ends at {cuts[-1]:g} s, the recording at {seconds:.3g} s; times are in seconds")
    stretches = bundle.modality(audio.modality).cut(bundle.require(audio.modality), audio, cuts if first else cuts[:-1])
    waiting: list[Segment] = []
    for text, stretch in zip(texts, stretches, strict=False):
        waiting.append(text)
        if stretch is not None:
            yield from (stretch, *waiting) if first else (*waiting, stretch)
            waiting = []
    yield from waiting
    if first and stretches[-1] is not None:
        yield stretches[-1]


def _word(entry: object, number: int, before: float) -> Timed:
    """A word with its times; where it has none, as WhisperX leaves them out of numbers, it is at `before`. Errors: `UserError`."""
    if isinstance(entry, Mapping):
        times = (entry.get("start"), entry.get("end"))
        times = (before, before) if times == (None, None) else times
        entry = [entry.get("word", entry.get("text")), *times]
    values = _listed(entry)
    texts = [x.rstrip() for x in values if isinstance(x, str) and x.strip()]
    numbers = [float(x) for x in values if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)]
    if len(values) != 3 or len(texts) != 1 or len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1]:
        raise UserError(f"{WORDS}: word {number}, {str(entry)[:60]}: no word with its start and end in seconds")
    return texts[0], numbers[0], numbers[1]


def _ordered(words: list[Timed]) -> list[Timed]:
    """The words, each beginning no earlier than the one before it. Errors: `UserError` for one that begins much earlier."""
    found: list[Timed] = []
    for number, (text, start, end) in enumerate(words, 1):
        before = found[-1][1] if found else 0.0
        if start < before - LATE:
            raise UserError(
                f"{WORDS}: word {number}, {text.strip()[:40]!r}, begins at {start:g} s, the one before it at {before:g} s"
            )
        found.append((text, max(start, before), max(end, start, before)))
    return found


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []
