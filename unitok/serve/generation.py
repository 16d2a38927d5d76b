"""From what clients send to what the engine generates, and back to contents: the work that is not the web's."""

import asyncio
import secrets
import struct
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import soundfile
import torch
import torch.nn.functional as F
from starlette.concurrency import run_in_threadpool

from unitok.api import Unitok
from unitok.conversations import TEXT
from unitok.document import Document, Part
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig
from unitok.media import audio_seconds, convert_audio, encode_gif, encode_png, open_image
from unitok.modalities.image import open_mask
from unitok.modalities.video import Video, frame_bytes
from unitok.plan import PlanItem
from unitok.sample.chat import Chat
from unitok.sample.fill import make_fill_drafts
from unitok.sample.outputs import Output
from unitok.sample.requests import Draft, config_for, edit_plan, edit_prompt, make_drafts, sampling_of
from unitok.sample.speech import PAUSE, sentence_to_speak
from unitok.sample.stream import Chunk, Detokenizer
from unitok.sample.transcribe import Transcript, transcribe
from unitok.serve.engine import BusyError, Engine, Job
from unitok.serve.metrics import Metrics
from unitok.storage import Blob

OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)  # Hz; audio of others is resampled to the last
MOST_PREPARED = 64  # requests that may wait to be read and encoded; more are refused
MOST_LISTENED = 8  # recordings that may wait to be written down word by word
MOST_SECONDS = 1800  # of one of them

SENTENCES_AT_ONCE = 4
BUSY_SECONDS = 0.1  # until a sentence that found no room is tried again

T = TypeVar("T")


class Generation:
    """A bundle that generates for a server. max_new_tokens: most that a request may ask for; 0: what the decoder takes."""

    def __init__(self, bundle: Unitok, slots: int = 16, queue: int = 64, max_new_tokens: int = 0):
        self.bundle, self.chat = bundle, Chat(bundle, paths=False)
        self.engine = Engine(bundle, slots, queue, self.chat.prefixes)
        self.metrics = Metrics(self.engine)
        self._waiting = 0  # requests that are being prepared
        self._preparing = ThreadPoolExecutor(2, "prepare")  # so few, because an image may be large until it is encoded
        self._listened, self._listening = 0, ThreadPoolExecutor(1, "listen")  # apart, because it takes long
        self.max_new_tokens = max_new_tokens or self.chat.longest

    # ---- Requests -> drafts --------------------------------------------------------------------------------------

    async def prepared(self, prepare: Callable[[], T]) -> T:
        """Return what a function prepares in one of the threads that read and encode contents."""
        if self._waiting >= MOST_PREPARED:
            raise BusyError
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._preparing, prepare)
        finally:
            self._waiting -= 1

    def text(self, text: str, argument: str) -> Document:
        """Return a text as a prompt. Errors: `UserError` that begins with the argument's name."""
        return Document(tuple(self.chat.segments(Part(TEXT, text), argument)))

    def drafts(
        self,
        prompt: Document,
        given: Mapping[str, Any],
        n: int = 1,
        seed: int | None = None,
        turn: bool = False,
        plan: list[PlanItem] | None = None,
    ) -> list[Draft]:
        """Return n drafts for a prompt. given: fields of a `GenerationConfig`. turn, plan: see `make_drafts`. Errors: `UserError`."""
        if given.get("max_new_tokens", 0) > self.max_new_tokens:
            raise UserError(
                f"max_tokens: {given['max_new_tokens']} are more than the {self.max_new_tokens} that a request may ask for"
            )
        config = self._config(given, n, seed)
        return self._checked(make_drafts(self.bundle, [prompt], config, turn, [plan] if plan else ()), config)

    def _config(self, given: Mapping[str, Any], n: int, seed: int | None, edited: str = "") -> GenerationConfig:
        """The config of a request. given: fields of a `GenerationConfig`. seed: None for a random one. edited: see `combine`."""
        seeded = GenerationConfig(**given, seed=secrets.randbelow(2**31) if seed is None else seed % 2**63, n=n)
        config = config_for(self.bundle, seeded, edited=edited)
        return config.replace(best_of=1, prefix_fraction=None)

    def _checked(self, drafts: list[Draft], config: GenerationConfig) -> list[Draft]:
        """Drafts with their sampling parameters and no more tokens than a request may ask for, which the engine can run. Errors:
        `UserError`."""
        sampling = sampling_of(self.bundle, config)
        for draft in drafts:
            draft.request.sampling = sampling
            draft.request.max_new_tokens = min(draft.request.max_new_tokens, self.max_new_tokens)
        self.engine.check(drafts)
        return drafts

    def edits(self, image: bytes, mask: bytes | None, prompt: str, n: int = 1, seed: int | None = None) -> list[Draft]:
        """Return n drafts of an image that is filled under a mask, or changed as a prompt says. Errors: `UserError`."""
        opened = open_image(Path("image"), image)
        if mask is None:
            document, plan = edit_prompt(self.bundle, opened, prompt)
            config = self._config({}, n, seed, document.segments[0].modality)
            config = config.replace(modalities=edit_plan(config, plan))
            return self._checked(make_drafts(self.bundle, [document], config), config)
        config = self._config({}, n, seed)
        before = self.text(prompt, "prompt") if prompt.strip() else None
        drafts: list[Draft] = [*make_fill_drafts(self.bundle, opened, open_mask("mask", mask), before, config)]
        return self._checked(drafts, config)

    async def transcript(self, data: bytes) -> tuple[Transcript, float]:
        """Return what is said in a recording that was uploaded, word by word, and its length in seconds. Who leaves ends the search.

        Errors: `BusyError`, `UserError`.
        """
        if self._listened >= MOST_LISTENED:
            raise BusyError
        stopped = threading.Event()

        def listen() -> tuple[Transcript, float]:
            if not data:
                raise UserError("file: an empty file")
            seconds = audio_seconds(Path("file"), data)
            if seconds > MOST_SECONDS:
                raise UserError(f"file: {seconds:.0f} s of audio; send at most {MOST_SECONDS} s at once")
            recording = Part("audio", path=Path("file"), file=Blob("file", data))
            return transcribe(self.bundle, recording, self.bundle.generation_config, stopped.is_set, "prompt"), seconds

        self._listened += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._listening, listen)
        finally:
            stopped.set()
            self._listened -= 1

    def to_speak(self, sentence: str, given: Mapping[str, Any], seed: int | None) -> list[Draft]:
        """Return the draft of a sentence that is spoken word by word. Errors: `UserError`."""
        prompt, plan = sentence_to_speak(self.bundle, sentence, words=True)
        return self.drafts(prompt, given, 1, seed, plan=plan)

    def read(self, kind: str, data: bytes, name: str) -> Document:
        """Return a prompt of one file that was uploaded. Errors: `UserError`."""
        if not data:
            raise UserError(f"{name}: an empty file")
        return Document(tuple(self.chat.segments(Part(kind, path=Path(name), file=Blob(name, data)), name)))

    # ---- Drafts -> outputs ---------------------------------------------------------------------------------------

    async def tokens(self, drafts: list[Draft]) -> AsyncGenerator[tuple[int, list[int], bool]]:
        """Yield (index of the draft, new tokens, whether they are its last) as they come. Who stops reading lets the drafts go.

        Errors: `BusyError` and `UserError`, before any work; `RuntimeError` where generation failed.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, list[int] | None, bool]]()

        def emit_to(index: int, ids: list[int] | None, done: bool) -> None:
            with suppress(RuntimeError):  # the loop may be closed already
                loop.call_soon_threadsafe(events.put_nowait, (index, ids, done))

        jobs = [Job(draft, lambda ids, done, i=i: emit_to(i, ids, done)) for i, draft in enumerate(drafts)]  # type: ignore[misc]
        self.engine.submit(jobs)
        began, left = loop.time(), len(jobs)
        try:
            while left:
                index, ids, done = await events.get()
                if ids is None:
                    raise RuntimeError("generation failed")
                if began:
                    self.metrics.first.observe(loop.time() - began)
                    began = 0.0
                left -= done
                yield index, ids, done
        finally:
            self.engine.cancel(jobs)

    async def outputs(self, drafts: list[Draft]) -> list[Output]:
        """Return the finished outputs."""
        new: list[list[int]] = [[] for _ in drafts]
        async with aclosing(self.tokens(drafts)) as tokens:
            async for index, ids, _ in tokens:
                new[index] += ids
        return await run_in_threadpool(lambda: [draft.finish(ids) for draft, ids in zip(drafts, new, strict=True)])

    async def chunks(self, drafts: list[Draft]) -> AsyncGenerator[Chunk | Output]:
        """Yield pieces of content as they come, and each output after its last piece."""
        detokenizers = await run_in_threadpool(
            lambda: [Detokenizer(self.bundle, self.engine.grammar, draft) for draft in drafts]
        )
        async with aclosing(self.tokens(drafts)) as tokens:
            async for index, ids, done in tokens:
                for chunk in await run_in_threadpool(lambda i=index, new=ids: list(detokenizers[i].push(new))):  # type: ignore[misc]
                    chunk.index = index
                    yield chunk
                if done:
                    yield await run_in_threadpool(drafts[index].finish, detokenizers[index].ids)

    async def spoken(self, drafts: list[Draft]) -> list[Output]:
        """The outputs of drafts, some at a time."""
        outputs: list[Output] = []
        at_once = SENTENCES_AT_ONCE
        while len(outputs) < len(drafts):
            try:
                outputs += await self.outputs(drafts[len(outputs) : len(outputs) + at_once])
            except BusyError:
                if at_once > 1:
                    at_once = 1
                elif outputs and not self.engine.stopping:
                    await asyncio.sleep(BUSY_SECONDS)  # what is begun is ended
                else:
                    raise
        return outputs

    async def samples(self, drafts: list[Draft], head: bytes, audio: str) -> AsyncGenerator[bytes]:
        """The samples of one draft after the other, with a pause between them. audio: name of their tokenizer."""
        tokenizer = self.bundle.require(audio)
        pause = pcm16(torch.zeros(tokenizer.config.channels, round(PAUSE * tokenizer.sample_rate)))
        for number, draft in enumerate(drafts):
            head = head or (pause if number else b"")
            waits = True
            while waits:
                try:
                    async with aclosing(self.chunks([draft])) as chunks:
                        async for chunk in chunks:
                            if isinstance(chunk, Chunk) and chunk.modality == audio:
                                yield head + pcm16(chunk.content)
                                head = b""
                    waits = False
                except BusyError:  # before any chunk
                    if not number or self.engine.stopping:
                        raise
                    await asyncio.sleep(BUSY_SECONDS)

    def was_cut(self, output: Output, draft: Draft) -> bool:
        """Whether an output ended because it may not be longer."""
        return len(output.ids) >= min(draft.request.max_new_tokens, self.chat.longest - len(draft.request.prompt))


# ---- Contents -> bytes ------------------------------------------------------------------------------------------------


def png(image: torch.Tensor, height: int = 0) -> bytes:
    """Return an image, float [3, h, W] in [-1, 1], as PNG. height: of the whole image in pixels; rows that are to come are gray."""
    return encode_png(F.pad(image, (0, 0, 0, max(0, height - image.shape[1]))))


def gif(video: Video) -> bytes:
    """Return a video as GIF, which plays again and again."""
    return encode_gif(frame_bytes(video), video.rate)


def pcm16(waveform: torch.Tensor) -> bytes:
    """Return audio, float [C, T] in [-1, 1], as little-endian 16-bit samples."""
    samples = (waveform.detach().cpu().clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    return samples.T.astype("<i2").tobytes()


def encoded(waveform: torch.Tensor, rate: int, format: str) -> bytes:
    """Return audio as a file of a format that libsndfile writes: `wav`, `flac`, `mp3` or `opus`. Errors: `UserError`."""
    containers = {
        "wav": ("WAV", "PCM_16"),
        "flac": ("FLAC", "PCM_16"),
        "mp3": ("MP3", "MPEG_LAYER_III"),
        "opus": ("OGG", "OPUS"),
    }
    container, subtype = containers[format]
    if not soundfile.check_format(container, subtype):
        raise UserError(f"response_format: this machine cannot write {format}; choose wav, flac or pcm")
    if format == "opus" and rate not in OPUS_RATES:
        waveform, rate = convert_audio(waveform.detach().cpu(), rate, OPUS_RATES[-1], waveform.shape[0]), OPUS_RATES[-1]
    buffer = BytesIO()
    soundfile.write(buffer, waveform.detach().cpu().clamp(-1, 1).numpy().T, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def wav_header(rate: int, channels: int) -> bytes:
    """Return the header of a WAV file of 16-bit samples whose length is not known yet."""
    riff = struct.pack(
        "<4sI4s4sIHHIIHH", b"RIFF", 0xFFFFFFFF, b"WAVE", b"fmt ", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16
    )
    return riff + struct.pack("<4sI", b"data", 0xFFFFFFFF)
