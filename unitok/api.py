"""The library's front door: `Unitok`, a bundle that generates, streams and scores."""

from __future__ import annotations  # so that `help(u.generate)` shows the names of types

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from unitok.bundle import Bundle
from unitok.content import Content, Prompt, Prompts
from unitok.document import Document
from unitok.generation_config import GenerationConfig, RankBy, SamplingParams, Schedule, Values
from unitok.keywords import checks_names
from unitok.sample.chat import Chat, MessageDict, Reply
from unitok.sample.fill import fill_content
from unitok.sample.outputs import Output
from unitok.sample.prompts import read_documents, read_one, read_prompts_of
from unitok.sample.requests import config_for, edit_plan, edit_prompt, generate_outputs
from unitok.sample.score import Score, score_documents
from unitok.sample.speech import speak
from unitok.sample.stream import Chunk, check_stream, stream_outputs
from unitok.sample.transcribe import Transcript, transcribe

if TYPE_CHECKING:
    from torch import Tensor

Override = Mapping[str, object] | SamplingParams | None


class Unitok(Bundle):
    """Vocabulary, tokenizers and decoder, and what they do together."""

    def __repr__(self) -> str:
        parameters = "no decoder"
        if self.model is not None:
            parameters = f"decoder of {sum(p.numel() for p in self.model.parameters()):,} parameters"
        tokenizers = ", ".join(self.tokenizers) or "none"
        return f"<{type(self).__name__}: tokenizers {tokenizers}; vocabulary of {self.vocab.size:,} tokens; {parameters}>"

    @checks_names
    def generate(
        self,
        prompt: Prompts,
        modalities: str | Sequence[str] | None = None,
        n: int | None = None,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        guidance_scale: float | None = None,
        media_guidance_scale: float | None = None,
        guidance_start: int | None = None,
        guidance_stop: int | None = None,
        guidance_schedule: Schedule | None = None,
        text: Override = None,
        image: Override = None,
        audio: Override = None,
        sampling: Mapping[str, Override] | None = None,
        negative_prompt: Prompt | None = None,
        prefix_fraction: float | None = None,
        best_of: int | None = None,
        rank_by: RankBy | None = None,
        jacobi_window: int | None = None,
        generation_config: GenerationConfig | Mapping[str, object] | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> list[Output]:
        """Continue prompts with text, images and audio.

        Args:
            prompt: a str (text), Path (a file), PIL.Image, array (an image), (waveform [C, T], Hz), Document or Segment; a list of
                these is one prompt, and a list of such lists is a batch: `[["A frog."], ["A dog."]]` are two prompts.
            modalities: `free`, or a plan such as `text,image:8x12,audio:2s` (rows x columns of codes, seconds), also as a list.
            n, seed, max_new_tokens: outputs per prompt; the same seed gives the same outputs; most new tokens per output.
            temperature, top_k, top_p, min_p, repetition_penalty, guidance_scale, media_guidance_scale, guidance_start, guidance_stop,
                guidance_schedule: how tokens of all content are drawn; see `SamplingParams`.
            text, image, audio, sampling: the same for one kind of content, `image={"temperature": 0.5}`, and by name of a tokenizer.
            negative_prompt, prefix_fraction, best_of, rank_by, jacobi_window: see `GenerationConfig`.
            generation_config: a `GenerationConfig`, or a dict of its fields, for arguments that are left out. What it does not say
                either, the bundle's own config says, else the library's defaults hold.
            batch_size: outputs that are generated together. progress: whether to show a progress bar.

        Returns: n `Output`s per prompt, in order. Errors: `UserError` that names the argument.
        """
        given = {name: value for name, value in locals().items() if name in _CONFIG_FIELDS and value is not None}
        config = self._config(generation_config, given)
        return generate_outputs(self, read_prompts_of(self, prompt), config, batch_size, progress)

    @checks_names
    def stream(
        self,
        prompt: Prompts,
        modalities: str | Sequence[str] | None = None,
        n: int | None = None,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        guidance_scale: float | None = None,
        media_guidance_scale: float | None = None,
        guidance_start: int | None = None,
        guidance_stop: int | None = None,
        guidance_schedule: Schedule | None = None,
        text: Override = None,
        image: Override = None,
        audio: Override = None,
        sampling: Mapping[str, Override] | None = None,
        negative_prompt: Prompt | None = None,
        prefix_fraction: float | None = None,
        generation_config: GenerationConfig | Mapping[str, object] | None = None,
        batch_size: int = 64,
    ) -> Iterator[Chunk | Output]:
        """Yield outputs while they are generated; the arguments are those of `generate`.

        Yields: a `unitok.sample.stream.Chunk` for each new piece of text, row of an image or chunk of audio, and each whole `Output`
        after its last chunk. Errors: `UserError` that names the argument, before any work.
        """
        given = {name: value for name, value in locals().items() if name in _CONFIG_FIELDS and value is not None}
        if generation_config is not None:
            check_stream(_as_config(generation_config))
        config = self._config(generation_config, given)
        return stream_outputs(self, read_prompts_of(self, prompt), config, batch_size)

    @checks_names
    def fill(
        self,
        content: Content,
        hole: object = None,
        prompt: Prompt | None = None,
        n: int | None = None,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_scale: float | None = None,
        text: Override = None,
        image: Override = None,
        audio: Override = None,
        sampling: Mapping[str, Override] | None = None,
        generation_config: GenerationConfig | Mapping[str, object] | None = None,
        batch_size: int = 64,
    ) -> list[Output]:
        """Fill the holes of a text, an image, audio or a video. The decoder must have been trained to, with `data.fill_rate`.

        Args:
            content: a str with `___` where text is missing, an image, audio or a video, as in `generate`.
            hole: of an image a mask of its size, above 0 (white, True) where pixels are to be made, of any shape; or pixels to add at its
                (left, top, right, bottom). Of audio and videos (start, stop) in seconds.
            prompt: what stands before, such as a caption.
            n, seed, max_new_tokens, temperature, top_k, top_p, min_p, guidance_scale, text, image, audio, sampling, generation_config,
                batch_size: as in `generate`.

        Returns: n `Output`s, whose text, image or audio is the whole. Outside of the hole an image has its own pixels and audio its own
        samples, blended over a few at the seam. Errors: `UserError` that names the argument.
        """
        given = {name: value for name, value in locals().items() if name in _CONFIG_FIELDS and value is not None}
        return fill_content(self, content, hole, prompt, self._config(generation_config, given), batch_size)

    @checks_names
    def edit(
        self,
        image: Content,
        instruction: str,
        n: int | None = None,
        seed: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_scale: float | None = None,
        media_guidance_scale: float | None = None,
        generation_config: GenerationConfig | Mapping[str, object] | None = None,
        batch_size: int = 64,
    ) -> list[Output]:
        """Change an image as a text says; the outputs' images have its grid of codes.

        The decoder must have learned documents of an image, an instruction and the edited image. Guidance is three-way where
        `media_guidance_scale`, how closely the image is kept, is given beside `guidance_scale`, how closely the instruction is followed.
        Where a bundle's `generation_config` has values for `edit`, they are the defaults; with `edit_described` in it, outputs begin with a text,
        what the edited image shows, as documents of an image, an instruction, a caption and the edited image teach.

        Args:
            image: a Path, PIL.Image or array. instruction: what to change, such as "make the circle blue".
            n, seed, temperature, top_k, top_p, min_p, guidance_scale, media_guidance_scale, generation_config, batch_size: as in `generate`.

        Returns: n `Output`s. Errors: `UserError` that names the argument.
        """
        given = {name: value for name, value in locals().items() if name in _CONFIG_FIELDS and value is not None}
        given.pop("image")
        prompt, plan = edit_prompt(self, image, instruction)
        configs = _as_config({} if generation_config is None else generation_config), GenerationConfig(**given)
        config = config_for(self, *configs, edited=prompt.segments[0].modality)
        return generate_outputs(self, [prompt], config.replace(modalities=edit_plan(config, plan)), batch_size)

    @checks_names
    def speak(
        self,
        text: str,
        voice: Content | None = None,
        seed: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        generation_config: GenerationConfig | Mapping[str, object] | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Speak a text of any length, sentence by sentence. The decoder must have learned documents of a text and its recording.

        Args:
            text: what to say.
            voice: a recording of the speaker, which stands before each sentence; for decoders that have learned such documents.
            seed, temperature, top_k, top_p, guidance_scale, generation_config, batch_size: as in `generate`.

        Returns: float [C, T] in [-1, 1] at the sample rate of the audio tokenizer. Errors: `UserError` that names the argument.
        """
        given = {name: value for name, value in locals().items() if name in _CONFIG_FIELDS and value is not None}
        given.pop("text")
        return speak(self, text, voice, self._config(generation_config, given), batch_size)

    @checks_names
    def transcribe(
        self,
        recording: Content,
        *,
        temperature: float | None = None,
        generation_config: GenerationConfig | Mapping[str, object] | None = None,
    ) -> Transcript:
        """Write down what is said in a recording. The decoder must have learned documents of a recording and its text.

        With `speech_unit="word"` in the config (or the bundle's), for decoders of documents in which what is heard and the word for it stand in turn,
        recordings may have any length, and each word has its times; `temperature` then changes nothing.

        Args:
            recording: a Path, or (waveform [C, T], Hz).
            temperature, generation_config: as in `generate`, but the likeliest tokens are taken (0) where neither says another temperature.

        Returns: a `Transcript`. Errors: `UserError` that names the argument.
        """
        given: Values = {} if temperature is None else {"temperature": temperature}
        return transcribe(self, recording, self._config(generation_config, given, GenerationConfig(temperature=0.0)))

    @checks_names
    def chat(
        self,
        messages: Sequence[MessageDict],
        modalities: str | Sequence[str] | None = None,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        guidance_scale: float | None = None,
        text: Override = None,
        image: Override = None,
        audio: Override = None,
        sampling: Mapping[str, Override] | None = None,
        generation_config: GenerationConfig | Mapping[str, object] | None = None,
    ) -> Reply:
        """Generate the assistant's next turn of a conversation.

        Args:
            messages: in OpenAI's form, the last one the user's: `[{"role": "user", "content": "Draw a cat."}]`. Content is a text or a
                list of parts: `{"type": "text", "text": …}`, `{"type": "image_url", "image_url": {"url": a data URL or a file}}`,
                `{"type": "input_audio", "input_audio": {"data": base64, "format": "wav"}}`, `{"type": "image", "image": an object}`.
            modalities: what the turn shall have, as in `generate`; default `free`: what the model says until it ends its turn.
            seed, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, guidance_scale, text, image, audio, sampling,
                generation_config: as in `generate`.

        Returns: a `Reply`, an `Output` whose `message` continues the conversation: `messages.append(reply.message)`. What earlier turns
        have in common with those of the last calls is not computed again. Errors: `UserError` that names the argument or message.
        """
        given = {name: value for name, value in locals().items() if name in _CONFIG_FIELDS and value is not None}
        config = self._config(generation_config, given, GenerationConfig(modalities="free"))
        *_, reply = self.chats.stream(messages, config)
        assert isinstance(reply, Reply)
        return reply

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in super().__getstate__().items() if name != "chats"}

    @functools.cached_property
    def chats(self) -> Chat:
        """What is remembered of conversations; `chats.stream` yields a turn while it is generated."""
        return Chat(self)

    def _config(
        self, config: GenerationConfig | Mapping[str, object] | None, given: Values, usual: GenerationConfig | None = None
    ) -> GenerationConfig:
        """Return the config of a call from its arguments. usual: what holds where neither says otherwise, over the bundle's own."""
        return config_for(
            self, usual or GenerationConfig(), _as_config({} if config is None else config), GenerationConfig(**given)
        )

    def read_prompt(self, prompt: Prompt) -> Document:
        """Return the Document of one prompt: of a piece, or of a list of pieces."""
        return read_one(self, prompt)

    @checks_names
    def score(self, documents: Prompts) -> list[Score]:
        """Score documents: log-probabilities of their tokens, segment by segment.

        documents: one piece of a prompt, or a list of documents, each a piece or a list of pieces: `["A frog.", "A dog."]` are two.
        Errors: `UserError` for a document longer than the decoder takes.
        """
        return score_documents(self, read_documents(self, documents))


def _as_config(config: GenerationConfig | Mapping[str, object]) -> GenerationConfig:
    """Return the config of an argument that may be a dict of its fields."""
    return config if isinstance(config, GenerationConfig) else GenerationConfig.from_dict(config)


_CONFIG_FIELDS = [name for name in inspect.signature(GenerationConfig.__init__).parameters if name != "self"]
