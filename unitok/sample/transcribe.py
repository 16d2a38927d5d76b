"""Recordings -> words with their times, for decoders that have learned what is heard and the word for it in turn.

In such documents (`interleave: words`, docs/speech.md) each stretch of audio ends where a word does. So the decoder says after every frame how
likely a word ends there, and then which one it was. Several divisions of the frames so far are kept: what is decided early is revised by
what is heard later. And a recording is heard several times, begun at other parts of a frame: its codes differ each time, what is said does not.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unitok.bundle import Bundle
from unitok.bundle.reading import load_contents
from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig
from unitok.location import located
from unitok.media import read_audio_blocks
from unitok.model.cache import Cache
from unitok.sample.prompts import naming, read_one
from unitok.sample.requests import generate_outputs
from unitok.storage import Blob

WIDTH = 6  # divisions that are kept
CHOICES = 3  # words that are tried for one stretch
UNLIKELY = math.log(0.02)  # ends and words below this log-probability are not tried
MOST = 12  # tokens of text of one stretch
BLOCK = 50  # frames between two looks at whether somebody still waits
SPARE = 64  # positions that a cache has more than are needed now
SECONDS = 10.0  # of a recording that are read at once
CONTEXT = 6.0  # seconds; the first word that ends after so long is the last one of its document


@dataclass(frozen=True)
class Word:
    """A word of a recording, and the stretch of it that ends with the word, in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording. words: in order, with their times; empty from decoders that write whole texts only."""

    text: str
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class _Said:
    """A word of a path: its text tokens, the frame at which it ends, whether it begins a document, and the word before it.

    key: a hash of the tokens of all words up to here.
    """

    tokens: tuple[int, ...]
    end: int
    opens: bool
    before: "_Said | None"
    key: int


@dataclass(frozen=True)
class _Path:
    """One division of the frames so far.

    read: tokens in its slot of the cache. begun, first: the frames at which its document and its open stretch begin. score: in nats.
    said: its last word.
    """

    read: int = 0
    begun: int = 0
    first: int = 0
    score: float = 0.0
    said: "_Said | None" = None


ONGOING = (-1,)  # instead of words: the stretch has not ended
_Named = tuple[_Path, int, tuple[int, ...]]  # a path, the number of the one it continues, the text tokens of its last word


class WordSearch:
    """Finds words in the codes of one recording, which are pushed as they come. name: of the audio tokenizer. hearings: of the recording, S.

    Each path has S slots of a cache, one for each hearing; decisions are made by the mean of their hidden states, that is of their logits.

    Errors: `UserError` for codes that are not written frame by frame.
    """

    def __init__(self, bundle: Bundle, name: str, hearings: int = 1):
        vocab, self.decoder, self.hearings = bundle.vocab, bundle.inference, hearings
        span = vocab.span(name)
        if span.layout != "interleaved":
            raise UserError(f"{name}: its codes are written {span.layout}; words are found only in interleaved ones")
        self.vocab, self.name, self.span, self.levels = vocab, name, span, len(span.body)
        self.begin, self.end = (vocab.specials[token or ""] for token in (span.begin, span.end))
        text, level = vocab.body(bundle.instance("text"))[0], vocab.body(name)[0]
        self._text, self._text_stop = text.offset, text.stop
        self._after_frame = self.decoder.head_of(((self.end, self.end + 1), (level.offset, level.stop)))
        self._after_word = {
            stop: self.decoder.head_of(((stop, stop + 1), (text.offset, text.stop))) for stop in (self.begin, vocab.eos)
        }
        self.context = round(CONTEXT * bundle.require(name).frame_rate)
        self.room = min(3 * self.context * self.levels, bundle.require("model").config.max_position_embeddings)
        self.frame, self.cache = 0, self._room_for([_Path()])
        self.paths, self.hidden = self._read([_Path()], self.cache, [[vocab.bos, self.begin]] * hearings)

    def push(self, codes: np.ndarray) -> None:
        """Take further frames [S, K, N]."""
        spans = (Document((Segment(self.name, heard),)) for heard in codes)
        ids = np.stack([self.vocab.encode(span, eos=False)[2:-1].reshape(-1, self.levels) for span in spans], 1)
        for frames in ids.tolist():
            if self.frame:
                self._divide(last=False)
            self.frame += 1
            if max(path.read for path in self.paths) + self.levels > self.cache.length:
                self.cache = self.cache.grown(self.cache.slots, self.cache.length + SPARE)
            self.paths, self.hidden = self._read(self.paths, self.cache, frames * len(self.paths))

    def finish(self) -> list[_Said]:
        """End the recording. Returns: its words."""
        self._divide(last=True)
        words: list[_Said] = []
        said = max(self.paths, key=lambda path: path.score).said
        while said is not None:
            words.append(said)
            said = said.before
        return words[::-1]

    def _divide(self, last: bool) -> None:
        """Let stretches end at the newest frame where that is likely, with the likeliest words for them. last: all of them end."""
        logits = self._after_frame(self.hidden).float()
        chances = torch.log_softmax(torch.stack([logits[:, 0], logits[:, 1:].logsumexp(-1)], -1), -1).tolist()
        going: list[tuple[_Path, int]] = []
        ending: list[tuple[_Path, int]] = []
        for i, (path, (stop, on)) in enumerate(zip(self.paths, chances, strict=True)):
            forced = last or path.read + self.levels + MOST + 2 > self.room
            if forced or stop > UNLIKELY:
                ending.append((replace(path, score=path.score + (0.0 if forced else stop)), i))
            if not forced:
                going.append((replace(path, score=path.score + on), i))
        if not ending:
            self.paths = [path for path, _ in going]
            return
        cache = self._copied(self.cache, ending)
        ended, hidden = self._read([path for path, _ in ending], cache, [[self.end]] * (len(ending) * self.hearings))
        self._keep(going, self._named(ended, cache, hidden, last), cache)

    def _named(self, ended: list[_Path], cache: Cache, hidden: Tensor, last: bool) -> list[_Named]:
        """The likeliest words of stretches that have ended. Each comes with the number of its path in `ended`."""
        head = self._after_word[self.vocab.eos if last else self.begin]
        done: list[_Named] = []
        waiting: list[_Named] = [(path, i, ()) for i, path in enumerate(ended)]
        while waiting:
            grown: list[_Named] = []
            for (path, i, words), row in zip(waiting, head(hidden).float(), strict=True):
                if not words and not last:
                    row[0] = -math.inf  # each stretch but the last has a word
                chances, columns = torch.log_softmax(row, -1).topk(1 if words else CHOICES)
                for chance, column in zip(chances.tolist(), columns.tolist(), strict=True):
                    if chance < UNLIKELY and chance < chances[0]:
                        break
                    scored = replace(path, score=path.score + chance)
                    if column == 0:
                        done.append((scored, i, words))
                    else:
                        grown.append((scored, i, (*words, self._text + column - 1)))
            done += [one for one in grown if len(one[2]) == MOST]
            waiting = [one for one in grown if len(one[2]) < MOST]
            if waiting:
                scratch = self._copied(cache, [(ended[i], i) for _, i, _ in waiting])
                rows = [list(words) for _, _, words in waiting for _ in range(self.hearings)]
                _, hidden = self._read([ended[i] for _, i, _ in waiting], scratch, rows)
        return done

    def _keep(self, going: list[tuple[_Path, int]], named: list[_Named], ended: Cache) -> None:
        """Keep the best of the paths that go on and of those with a new word, and read what begins the next stretch of these."""
        best: dict[tuple[object, ...], _Named] = {}
        for path, i, words in [*named, *((path, i, ONGOING) for path, i in going)]:
            if words is not ONGOING:
                before, opens = path.said, path.first == path.begun
                said = _Said(words, self.frame, opens, before, hash((before and before.key, words))) if words else before
                path = replace(path, first=self.frame, said=said)
            key = path.first, path.said and path.said.key  # of equal words, whose divisions differ, the best
            if key not in best or best[key][0].score < path.score:
                best[key] = path, i, words
        kept = sorted(best.values(), key=lambda one: -one[0].score)[:WIDTH]
        kept.sort(key=lambda one: one[2] is ONGOING)  # those that read something stand first
        old, self.cache = self.cache, self._room_for([path for path, _, _ in kept])
        self.paths, tokens = [], []
        for slot, (path, i, words) in enumerate(kept):
            if words is ONGOING:
                self.cache.take(old, i * self.hearings, slot * self.hearings, path.read, self.hearings)
            elif self.frame - path.begun >= self.context or path.read + 2 * (self.levels + MOST + 2) > self.room:
                path = replace(path, read=0, begun=self.frame)
                tokens += [[self.vocab.bos, self.begin]] * self.hearings
            else:
                self.cache.take(ended, i * self.hearings, slot * self.hearings, path.read, self.hearings)
                tokens += [[*words, self.begin]] * self.hearings
            self.paths.append(path)
        if tokens:
            begun = len(tokens) // self.hearings
            self.paths[:begun], _ = self._read(self.paths[:begun], self.cache, tokens)

    def _room_for(self, paths: list[_Path]) -> Cache:
        cache: Cache = self.decoder.new_cache(len(paths) * self.hearings, max(path.read for path in paths) + SPARE)
        return cache

    def _copied(self, cache: Cache, slots: Sequence[tuple[_Path, int]]) -> Cache:
        """A cache with what these paths have read, from the slots of another."""
        copy = self._room_for([path for path, _ in slots])
        for i, (path, slot) in enumerate(slots):
            copy.take(cache, slot * self.hearings, i * self.hearings, path.read, self.hearings)
        return copy

    def _read(self, paths: list[_Path], cache: Cache, tokens: list[list[int]]) -> tuple[list[_Path], Tensor]:
        """Read tokens of paths, which have the first slots of a cache: a row for each slot.

        Returns: the paths after them, and hidden states [B, C].
        """
        slots = [path for path in paths for _ in range(self.hearings)]
        places = [self._places(path, row) for path, row in zip(slots, tokens, strict=True)]
        hidden = self.decoder.read(tokens, places, [path.read for path in slots], cache)
        read = [replace(path, read=path.read + len(row)) for path, row in zip(paths, tokens[:: self.hearings], strict=True)]
        return read, hidden.view(len(paths), self.hearings, -1).mean(1)

    def _places(self, path: _Path, tokens: list[int]) -> list[int]:
        """Positions of tokens in their span, as `Grammar.span_positions` has them."""
        after = 2 + (self.frame - path.first) * self.levels  # of the newest frame
        if tokens[0] == self.end:
            positions = [after]
        elif tokens[-1] == self.begin or self._text <= tokens[0] < self._text_stop:
            return [int(token == self.begin) for token in tokens]
        else:
            positions = list(range(after - self.levels, after))
        return [located(self.span, position, ()) for position in positions]


def transcribe(
    bundle: Bundle,
    recording: object,
    config: GenerationConfig,
    stopped: Callable[[], bool] = lambda: False,
    argument: str = "recording",
) -> Transcript:
    """Write down what is said in a recording. Arguments and errors: see `Unitok.transcribe`.

    stopped: whether nobody waits for it any more. argument: the recording's name in messages; `prompt` adds none.
    """
    if config.speech_unit == "word":
        return _word_by_word(bundle, recording, config.speech_hearings, stopped, argument)
    document = read_one(bundle, recording, argument)
    _check_audio(bundle, [segment.modality for segment in document.segments], argument)
    text = bundle.instance("text")
    (output,) = generate_outputs(bundle, [document], config.replace(modalities=text, n=1, prefix_fraction=None))
    return Transcript(output.text.strip())


def _check_audio(bundle: Bundle, names: Sequence[str], argument: str) -> None:
    kinds = [bundle.vocab.span(name).kind for name in names]
    if kinds != [bundle.vocab.span(bundle.instance("audio")).kind]:
        raise UserError(f"{argument}: give one recording, a Path or (waveform, Hz)")


def _word_by_word(bundle: Bundle, recording: object, hearings: int, stopped: Callable[[], bool], argument: str) -> Transcript:
    with naming(argument):
        contents = load_contents(bundle, recording)
    _check_audio(bundle, [name for name, _ in contents], argument)
    ((name, content),) = contents
    tokenizer, text = bundle.require(name), bundle.instance("text")
    search = WordSearch(bundle, name, 1 if isinstance(content, Segment) else hearings)
    if isinstance(content, Segment):
        codes = content.codes[None]
    else:
        blocks = (block for number, block in enumerate(_blocks(tokenizer, content)) if not (number and stopped()))
        codes = tokenizer.encode_shifted(blocks, hearings).cpu().numpy()
    for first in range(0, codes.shape[-1], BLOCK):
        if stopped():
            break
        search.push(codes[..., first : first + BLOCK])
    said, offset, rate = search.finish(), bundle.vocab.body(text)[0].offset, tokenizer.frame_rate
    texts = [bundle.decode(Segment(text, np.asarray(word.tokens) - offset)) for word in said]
    spaced = any(part[:1].isspace() for part in texts)  # but for the first word of a document
    whole = "".join(f" {part}" if spaced and word.opens else part for part, word in zip(texts, said, strict=True))
    ends = [0.0, *(word.end / rate for word in said)]
    words = (Word(part.strip(), *times) for part, times in zip(texts, itertools.pairwise(ends), strict=True))
    return Transcript(whole.strip(), tuple(words))


def _blocks(tokenizer: Any, content: Tensor | Blob) -> Iterator[Tensor]:
    """Yield samples [C, T] at the tokenizer's rate, or those of a long file, in blocks [C, t]."""
    if isinstance(content, Tensor):
        yield from torch.split(content, round(SECONDS * tokenizer.sample_rate), -1)
        return
    with content.local() as path:
        data, rate = None if path else content.read(), tokenizer.sample_rate
        yield from read_audio_blocks(path or Path(content.name), rate, tokenizer.config.channels, SECONDS, data)
