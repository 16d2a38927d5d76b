"""Speaking texts of any length: sentence by sentence, because a decoder has learned to speak what is about as long as its recordings."""

import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from unitok.bundle import Bundle
from unitok.document import Document
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig
from unitok.sample.outputs import Output
from unitok.sample.prompts import read_one
from unitok.sample.requests import generate_outputs

log = logging.getLogger("unitok")
LONGEST = 120  # characters that are spoken at once, about 8 seconds
PAUSE = 0.15  # seconds between sentences

SHORTEST = 20  # characters; what is shorter is spoken with what comes after it, such as "Dr." and "Yes."

_ENDS = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)])\s+|(?<=[。！？])(?![”’」』）])|(?<=[。！？][”’」』）])|\s*\n+\s*")


def sentences(text: str, longest: int = LONGEST) -> list[str]:
    """Return the sentences of a text, short ones with the next; longer ones than `longest` characters are divided at a comma, or else
    between words."""
    found: list[str] = []
    for sentence in filter(None, map(str.strip, _ENDS.split(text))):
        if found and len(found[-1]) < SHORTEST and len(found[-1]) + len(sentence) < longest:
            sentence = f"{found.pop()} {sentence}"
        while len(sentence) > longest:
            head = sentence[:longest]
            commas = [m.end() for m in re.finditer(r"[,;:](?=\s)|[、，；]", head)]
            cut = commas[-1] if commas else head.rfind(" ") + 1 or longest
            found.append(sentence[:cut].strip())
            sentence = sentence[cut:].strip()
        if sentence:
            found.append(sentence)
    return found


def prompts_to_speak(bundle: Bundle, text: str, voice: object = None) -> list[Document]:
    """Return a prompt for each sentence of a text. voice: a recording of the speaker, which stands before each.

    Errors: `UserError` for a text without words, and a voice that is no audio.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError("text: give a text to speak")
    before = () if voice is None else read_one(bundle, voice, "voice").segments
    if any(bundle.vocab.span(segment.modality).kind != bundle.vocab.span(bundle.instance("audio")).kind for segment in before):
        raise UserError("voice: give a recording of the speaker, a Path or (waveform, Hz)")
    return [Document((*before, *read_one(bundle, sentence, "text").segments)) for sentence in sentences(text)]


def joined(outputs: Sequence[Output], sample_rate: int) -> Tensor:
    """Return the audio of outputs one after the other, with a pause between them: [C, T]."""
    waveforms = [output.audios[0] for output in outputs]
    pause = waveforms[0].new_zeros(waveforms[0].shape[0], round(PAUSE * sample_rate))
    return torch.cat([part for waveform in waveforms for part in (pause, waveform)][1:], -1)


def speak(bundle: Bundle, text: str, voice: object, config: GenerationConfig, batch_size: int) -> Tensor:
    """Return the audio of a text, [C, T]. Arguments and errors: see `Unitok.speak`."""
    audio, prompts = bundle.instance("audio"), prompts_to_speak(bundle, text, voice)
    config = config.replace(modalities=audio, n=1, prefix_fraction=None)
    if "max_new_tokens" not in config.given():
        config = config.replace(
            max_new_tokens=bundle.require("model").config.max_position_embeddings
        )  # whatever the prompt leaves
    outputs = generate_outputs(bundle, prompts, config, batch_size)
    limit = bundle.require("model").config.max_position_embeddings
    for prompt, output in zip(prompts, outputs, strict=True):
        length = len(bundle.vocab.encode(prompt, eos=False))
        if len(output.ids) >= min(config.max_new_tokens, limit - length):
            log.warning("cut off after %d tokens: %s", len(output.ids), bundle.decode(prompt.segments[-1]))
    return joined(outputs, bundle.require(audio).sample_rate)
