"""Speaking texts of any length: sentence by sentence, because a decoder has learned to speak what is about as long as its recordings.

A decoder of documents in which each word stands before what is heard of it (`interleave: words`) is given a sentence so, too: the plan of its
output has the words, and the decoder speaks each after it has come.
"""

import logging
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unitok.bundle import Bundle
from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig
from unitok.plan import PlanItem
from unitok.sample.outputs import Output
from unitok.sample.prompts import read_one
from unitok.sample.requests import generate_outputs

log = logging.getLogger("unitok")
LONGEST = 120  # characters that are spoken at once, about 8 seconds
PAUSE = 0.15  # seconds between sentences

SHORTEST = 20  # characters; what is shorter is spoken with what comes after it, such as "Dr." and "Yes."

Spoken = tuple[Document, list[PlanItem]]  # a prompt to be spoken, and the plan of the output

_ENDS = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)])\s+|(?<=[。！？])(?![”’」』）])|(?<=[。！？][”’」』）])|\n+")

_FIRST = re.compile(r"\S|\Z")


def sentences(text: str, longest: int = LONGEST) -> list[str]:
    """Return the sentences of a text, short ones with the next; longer ones than `longest` characters are divided at a comma, or else
    between words."""
    found: list[str] = []
    for sentence in filter(None, map(str.strip, _ENDS.split(text))):
        if found and len(found[-1]) < SHORTEST and len(found[-1]) + len(sentence) < longest:
            sentence = f"{found.pop()} {sentence}"
        start = 0
        while len(sentence) - start > longest:
            head = sentence[start : start + longest]
            commas = [m.end() for m in re.finditer(r"[,;:](?=\s)|[、，；]", head)]
            cut = commas[-1] if commas else head.rfind(" ") + 1 or longest
            found.append(head[:cut].strip())
            start = _FIRST.search(sentence, start + cut).start()  # type: ignore[union-attr]
        found.append(sentence[start:])
    return found


def prompts_to_speak(bundle: Bundle, text: str, voice: object = None, words: bool = False) -> list[Spoken]:
    """Return a prompt for each sentence of a text, and the plan of what follows it.

    voice: a recording of the speaker, which stands before each. words: see `sentence_to_speak`. Errors: `UserError` for a text without words,
    and a voice that is no audio.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError("text: give a text to speak")
    before = () if voice is None else read_one(bundle, voice, "voice").segments
    if any(bundle.vocab.span(segment.modality).kind != bundle.vocab.span(bundle.instance("audio")).kind for segment in before):
        raise UserError("voice: give a recording of the speaker, a Path or (waveform, Hz)")
    return [sentence_to_speak(bundle, sentence, before, words) for sentence in sentences(text)]


def sentence_to_speak(bundle: Bundle, sentence: str, before: Sequence[Segment] = (), words: bool = False) -> Spoken:
    """Return a sentence as a prompt, and its plan: audio. words: the prompt is the first word, and the plan gives each further one after
    what is heard of the one before it."""
    plan = [spoken := PlanItem(bundle.instance("audio"))]
    if not words:
        return Document((*before, *read_one(bundle, sentence, "text").segments)), plan
    name = bundle.instance("text")

    def segment(word: str) -> Segment:
        return Segment(name, np.asarray(bundle.require(name).encode(word)))

    first, *further = sentence.split() or [""]
    if not first:
        raise UserError("input: give a text to speak")
    for word in further:
        ids = tuple(bundle.vocab.encode(Document((segment(f" {word}"),)), eos=False)[1:].tolist())
        plan += [PlanItem(name, repeats=len(ids), given=ids), spoken]
    return Document((*before, segment(first))), plan


def waveform_of(output: Output) -> Tensor:
    """Return the audio of an output, [C, T]: what is heard of one word after the other is decoded as a whole."""
    segments = [segment for segment in output.new.segments if output.bundle.vocab.span(segment.modality).begin]
    codes = np.concatenate([segment.codes for segment in segments], 1)
    waveform: Tensor = output.bundle.decode(Segment(segments[0].modality, codes))
    return waveform


def joined(outputs: Sequence[Output], sample_rate: int) -> Tensor:
    """Return the audio of outputs one after the other, with a pause between them: [C, T]."""
    waveforms = [waveform_of(output) for output in outputs]
    pause = waveforms[0].new_zeros(waveforms[0].shape[0], round(PAUSE * sample_rate))
    return torch.cat([part for waveform in waveforms for part in (pause, waveform)][1:], -1)


def speak(bundle: Bundle, text: str, voice: object, config: GenerationConfig, batch_size: int) -> Tensor:
    """Return the audio of a text, [C, T]. Arguments and errors: see `Unitok.speak`."""
    audio, spoken = bundle.instance("audio"), prompts_to_speak(bundle, text, voice, config.speech_unit == "word")
    prompts, plans = [prompt for prompt, _ in spoken], [plan for _, plan in spoken]
    config = config.replace(n=1, prefix_fraction=None)
    if "max_new_tokens" not in config.given():
        config = config.replace(
            max_new_tokens=bundle.require("model").config.max_position_embeddings
        )  # whatever the prompt leaves
    outputs = generate_outputs(bundle, prompts, config, batch_size, plans=plans)
    limit = bundle.require("model").config.max_position_embeddings
    for prompt, output in zip(prompts, outputs, strict=True):
        length = len(bundle.vocab.encode(prompt, eos=False))
        if len(output.ids) >= min(config.max_new_tokens, limit - length):
            log.warning("cut off after %d tokens: %s", len(output.ids), bundle.decode(prompt.segments[-1]))
    return joined(outputs, bundle.require(audio).sample_rate)
