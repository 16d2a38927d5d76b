"""The endpoints, as OpenAI's clients call them: chat completions, images, speech, transcriptions; and a page at `/`."""

import asyncio
import json
import logging
import time
import uuid
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from unitok.conversations import media_part, parts_in, to_data_url
from unitok.errors import UserError
from unitok.sample.outputs import Output
from unitok.sample.requests import Draft
from unitok.sample.speech import joined, sentences
from unitok.sample.stream import Chunk
from unitok.sample.transcribe import Transcript
from unitok.serve.errors import ClientLeftError, handle_errors
from unitok.serve.generation import Generation, encoded, gif, pcm16, png, wav_header
from unitok.serve.guard import error_body
from unitok.serve.schemas import MOST_OUTPUTS, ChatRequest, ImageRequest, SpeechRequest, check_form

PAGE = Path(__file__).parent / "page"
PICTURES: dict[str, tuple[Callable[[Any], bytes], str]] = {"image": (png, "image/png"), "video": (gif, "image/gif")}
MIME = {"wav": "audio/wav", "pcm": "audio/pcm", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg"}

MOST_SENTENCES = 500  # of one request

T = TypeVar("T")
log = logging.getLogger("unitok")


def make_app(generation: Generation, name: str) -> FastAPI:
    """Return the application. name: of the model, as clients call it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        generation.engine.start()
        yield
        await run_in_threadpool(generation.engine.stop)

    app = FastAPI(title="unitok", version=version("unitok-lm"), lifespan=lifespan, docs_url=None, redoc_url=None)
    handle_errors(app)
    endpoints = _Endpoints(generation, name)
    app.get("/v1/models")(endpoints.models)
    app.get("/v1/models/{model:path}")(endpoints.model)
    app.post("/v1/chat/completions")(endpoints.chat_completions)
    app.post("/v1/images/generations")(endpoints.image_generations)
    app.post("/v1/images/edits")(endpoints.image_edits)
    app.post("/v1/audio/speech")(endpoints.speech)
    app.post("/v1/audio/transcriptions")(endpoints.transcriptions)
    app.get("/healthz", include_in_schema=False)(endpoints.health)
    app.get("/about", include_in_schema=False)(endpoints.about)
    app.get("/metrics", include_in_schema=False)(
        lambda: PlainTextResponse(generation.metrics.text(), media_type="text/plain; version=0.0.4")
    )
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


class _Endpoints:
    """The endpoints of one bundle."""

    def __init__(self, generation: Generation, name: str):
        self.generation, self.bundle, self.name = generation, generation.bundle, name
        self.created = int(time.time())

    def _check_model(self, model: str) -> None:
        if model and model != self.name:
            raise HTTPException(404, f"model: there is no {model[:60]!r}; this server has {self.name!r}")

    def health(self) -> JSONResponse:
        """`GET /healthz`: 503 once nothing can be generated any more."""
        alive = self.generation.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    # ---- Models --------------------------------------------------------------------------------------------------

    def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        return {"object": "list", "data": [self.model(self.name)]}

    def model(self, model: str) -> dict[str, Any]:
        """`GET /v1/models/{model}`."""
        self._check_model(model)
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "unitok"}

    def about(self) -> dict[str, Any]:
        """What the page needs to know."""
        bundle = self.bundle
        rates = {name: bundle.require(name).sample_rate for name, span in bundle.vocab.spans.items() if span.kind == "audio"}
        facts = bundle.facts.get("world")
        world = facts if isinstance(facts, dict) else {}
        return {
            "model": self.name, "version": version("unitok-lm"), "sample_rates": rates,
            "modalities": {name: span.kind for name, span in bundle.vocab.spans.items()},
            "can_chat": "<assistant>" in bundle.vocab.specials and bool(world.get("chats", not world)),
            "examples": world.get("examples") or ([{"prompt": world["example"], "modalities": [name for name, span in bundle.vocab.spans.items() if span.begin]}] if "example" in world else []),
            "generation_config": bundle.generation_config.to_dict(),
            "max_new_tokens": self.generation.max_new_tokens,
        }  # fmt: skip

    # ---- Chat ----------------------------------------------------------------------------------------------------

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        self._check_model(body.model)
        given: dict[str, Any] = body.sampling() | {"modalities": body.modalities or "free"}
        if most := body.max_completion_tokens or body.max_tokens:
            given["max_new_tokens"] = most

        def prepare() -> list[Draft]:
            prompt = self.generation.chat.document(body.messages, body.roles)
            return self.generation.drafts(prompt, given, body.n or 1, body.seed, turn=body.roles)

        drafts = await self.generation.prepared(prepare)
        id = f"chatcmpl-{uuid.uuid4().hex}"
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return await _events(request, self._chat_events(drafts, id, with_usage))
        outputs = await _unless_left(request, self.generation.outputs(drafts))
        choices = await run_in_threadpool(lambda: [self._choice(*pair) for pair in zip(outputs, drafts, strict=True)])
        return JSONResponse(self._completion(id, "chat.completion", choices) | {"usage": _usage(drafts, outputs)})

    def _completion(self, id: str, object: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": id, "object": object, "created": int(time.time()), "model": self.name, "choices": choices}

    def _choice(self, output: Output, draft: Draft) -> dict[str, Any]:
        """An output as a choice. `content` has its text; `audio` its audio; `parts` all of it in order, which continues a conversation."""
        message = self.generation.chat.message(output)
        answer: dict[str, Any] = {
            "role": "assistant",
            "content": output.text or None,
            "refusal": None,
            "parts": parts_in(message["content"]),
        }
        if output.audios:
            data = encoded(output.audios[0], self._rate(output, "audio"), "wav")
            answer["audio"] = {
                "id": f"audio-{uuid.uuid4().hex}",
                "data": b64encode(data).decode(),
                "transcript": "",
                "expires_at": int(time.time()) + 3600,
            }
        return {"index": draft.index, "message": answer, "logprobs": None, "finish_reason": self._finish_reason(output, draft)}

    def _finish_reason(self, output: Output, draft: Draft) -> str:
        return "length" if self.generation.was_cut(output, draft) else "stop"

    def _rate(self, output: Output, kind: str) -> int:
        names = [s.modality for s in output.new.segments if self.bundle.vocab.span(s.modality).kind == kind]
        return int(self.bundle.require(names[0]).sample_rate)

    async def _chat_events(self, drafts: list[Draft], id: str, with_usage: bool) -> AsyncGenerator[dict[str, Any]]:
        def event(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
            return self._completion(
                id, "chat.completion.chunk", [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}]
            )

        outputs: list[Output] = []
        begun = False
        async with aclosing(self.generation.chunks(drafts)) as chunks:
            async for chunk in chunks:
                for draft in [] if begun else drafts:
                    yield event(draft.index, {"role": "assistant", "content": ""})
                begun = True
                if isinstance(chunk, Output):
                    outputs.append(chunk)
                    whole = event(chunk.index, {}, self._finish_reason(chunk, drafts[chunk.index]))
                    message = await run_in_threadpool(self.generation.chat.message, chunk)
                    whole["choices"][0]["message"] = message  # what continues the conversation with exactly these tokens
                    yield whole
                else:
                    yield event(chunk.index, await run_in_threadpool(self._delta, chunk))
        if with_usage:
            yield self._completion(id, "chat.completion.chunk", []) | {"usage": _usage(drafts, outputs)}

    def _delta(self, chunk: Chunk) -> dict[str, Any]:
        """A piece of content: text, the rows of an image or the frames of a video so far, new samples of audio, or what stands in the document itself, such as
        boxes. `segment` numbers the contents of the turn."""
        kind = self.bundle.vocab.span(chunk.modality).kind
        if kind == "text":
            return {"content": chunk.content, "segment": chunk.span}
        if kind in PICTURES:
            write, mime = PICTURES[kind]
            part = media_part(kind, to_data_url(write(chunk.content), mime))
            return {"parts": [part | {"done": chunk.done}], "segment": chunk.span}
        if self.bundle.modality(chunk.modality).inline:
            part = {"type": chunk.modality, **self.bundle.modality(chunk.modality).row(chunk.content)}
            return {"parts": [part], "segment": chunk.span}
        rate = int(self.bundle.require(chunk.modality).sample_rate)
        data = b64encode(pcm16(chunk.content)).decode()
        return {
            "audio": {
                "data": data,
                "format": "pcm16",
                "sample_rate": rate,
                "channels": chunk.content.shape[0],
                "done": chunk.done,
            },
            "segment": chunk.span,
        }

    # ---- Images --------------------------------------------------------------------------------------------------

    async def image_generations(self, body: ImageRequest, request: Request) -> Response:
        """`POST /v1/images/generations`."""
        self._check_model(body.model)
        image = self.bundle.instance("image")
        given: dict[str, Any] = body.sampling() | {"modalities": f"{image}{self._grid(body.size, image)}"}
        if body.negative_prompt:
            given["negative_prompt"] = self.generation.text(body.negative_prompt, "negative_prompt")
        drafts = await self.generation.prepared(
            lambda: self.generation.drafts(self.generation.text(body.prompt, "prompt"), given, body.n or 1, body.seed)
        )
        if body.stream:
            return await _events(request, self._image_events(drafts, body.partial_images or 0))
        outputs = await _unless_left(request, self.generation.outputs(drafts))
        return await self._images(drafts, outputs)

    async def image_edits(
        self,
        request: Request,
        image: Annotated[UploadFile | None, File()] = None,
        images: Annotated[list[UploadFile] | None, File(alias="image[]")] = None,
        prompt: Annotated[str, Form()] = "",
        mask: Annotated[UploadFile | None, File()] = None,
        model: Annotated[str, Form()] = "",
        n: Annotated[int, Form(ge=1, le=MOST_OUTPUTS)] = 1,
        seed: Annotated[int | None, Form()] = None,
        response_format: Annotated[str, Form()] = "b64_json",
    ) -> Response:
        """`POST /v1/images/edits`: what the mask shows transparent (or white) is made anew; without a mask the prompt says what to change."""
        self._check_model(model)
        check_form("edits", (await request.form()).multi_items())
        if response_format != "b64_json":
            raise UserError("response_format: it is b64_json; files are not stored")
        given = [*([image] if image else []), *(images or [])]
        if len(given) != 1:
            raise UserError(f"image: {len(given)} images; one is edited at a time")
        data, hole = await given[0].read(), await mask.read() if mask is not None else None
        drafts = await self.generation.prepared(lambda: self.generation.edits(data, hole, prompt, n, seed))
        outputs = await _unless_left(request, self.generation.outputs(drafts))
        return await self._images(drafts, outputs)

    async def _images(self, drafts: list[Draft], outputs: list[Output]) -> Response:
        """The answer that holds the images of outputs."""

        def rows() -> list[dict[str, Any]]:
            encoded = (b64encode(png(output.images[0])).decode() for output in outputs)
            return [{"b64_json": one, "url": None, "revised_prompt": None} for one in encoded]

        data = await run_in_threadpool(rows)
        return JSONResponse({"created": int(time.time()), "data": data, "usage": _image_usage(drafts, outputs)})

    def _grid(self, size: str | None, image: str) -> str:
        """`:8x8` for a size `64x64`, in codes; "" for `auto`. Errors: `UserError` for a size that no grid has."""
        if size in (None, "auto"):
            return ""
        stride = self.bundle.require(image).stride
        width, _, height = str(size)[:20].partition("x")
        if (
            not (width.isdecimal() and height.isdecimal() and int(width) and int(height))
            or int(width) % stride
            or int(height) % stride
        ):
            raise UserError(f"size: {str(size)[:40]!r} must be WIDTHxHEIGHT in pixels, both multiples of {stride}")
        return f":{int(height) // stride}x{int(width) // stride}"

    async def _image_events(self, drafts: list[Draft], partial: int) -> AsyncGenerator[dict[str, Any]]:
        """Partial images, evenly spaced over the rows, and the complete one."""
        sent, shapes = [0] * len(drafts), {"background": "opaque", "output_format": "png", "quality": "auto", "size": "auto"}
        async with aclosing(self.generation.chunks(drafts)) as chunks:
            async for chunk in chunks:
                now = {"created_at": int(time.time())} | shapes
                if isinstance(chunk, Output):
                    image = b64encode(await run_in_threadpool(lambda output=chunk: png(output.images[0]))).decode()  # type: ignore[misc]
                    yield {
                        "type": "image_generation.completed",
                        "b64_json": image,
                        "usage": _image_usage(drafts, [chunk]),
                    } | now
                elif not chunk.done and sent[chunk.index] < partial:
                    tokenizer, plan = self.bundle.require(chunk.modality), drafts[chunk.index].request.plan
                    grid = plan[0].grid if plan else ()
                    height = grid[0] * tokenizer.stride if grid else tokenizer.config.resolution
                    due = (sent[chunk.index] + 1) * height // (partial + 1)
                    if chunk.content.shape[1] >= due:
                        image = b64encode(await run_in_threadpool(png, chunk.content, height)).decode()
                        event = {
                            "type": "image_generation.partial_image",
                            "b64_json": image,
                            "partial_image_index": sent[chunk.index],
                        }
                        sent[chunk.index] += 1
                        yield event | now

    # ---- Audio ---------------------------------------------------------------------------------------------------

    async def speech(self, body: SpeechRequest, request: Request) -> Response:
        """`POST /v1/audio/speech`."""
        self._check_model(body.model)
        audio = self.bundle.instance("audio")
        given = body.sampling() | {"modalities": f"{audio}:{body.seconds:g}s" if body.seconds else audio}
        given.setdefault("max_new_tokens", self.generation.max_new_tokens)
        texts = [body.input] if body.seconds else sentences(body.input) or [body.input]
        if len(texts) > MOST_SENTENCES:
            raise UserError(f"input: {len(texts)} sentences are more than {MOST_SENTENCES}; send them in several requests")
        by_words = self.bundle.generation_config.speech_unit == "word" and not body.seconds

        def drafts_of(number: int, text: str) -> list[Draft]:
            seed = None if body.seed is None else body.seed + number
            if by_words:
                return self.generation.to_speak(text, given, seed)
            return self.generation.drafts(self.generation.text(text, "input"), given, 1, seed)

        drafts = await self.generation.prepared(
            lambda: [draft for number, text in enumerate(texts) for draft in drafts_of(number, text)]
        )
        tokenizer, format = self.bundle.require(audio), body.response_format
        if format in ("wav", "pcm"):
            head = wav_header(tokenizer.sample_rate, tokenizer.config.channels) if format == "wav" else b""
            return await _stream(request, self.generation.samples(drafts, head, audio), MIME[format])
        outputs = await _unless_left(request, self.generation.spoken(drafts))
        data = await run_in_threadpool(lambda: encoded(joined(outputs, tokenizer.sample_rate), tokenizer.sample_rate, format))
        return Response(data, media_type=MIME[format])

    async def transcriptions(
        self,
        request: Request,
        file: Annotated[UploadFile, File()],
        model: Annotated[str, Form()] = "",
        response_format: Annotated[str, Form()] = "json",
        temperature: Annotated[float, Form(ge=0, le=10)] = 0.0,
        stream: Annotated[bool, Form()] = False,
    ) -> Response:
        """`POST /v1/audio/transcriptions`."""
        self._check_model(model)
        check_form("transcriptions", (await request.form()).multi_items())
        if response_format not in ("json", "text", "verbose_json"):
            raise UserError(f"response_format: {response_format[:40]!r} must be json, text or verbose_json")
        if stream:
            raise UserError("stream: transcriptions are not streamed")
        data = await file.read()
        if self.bundle.generation_config.speech_unit == "word":
            transcript, seconds = await _unless_left(request, self.generation.transcript(data))
        else:
            recording = await self.generation.prepared(lambda: self.generation.read("audio", data, "file"))
            seconds = recording.segments[0].size[0] / self.bundle.require(recording.segments[0].modality).sample_rate
            given = {"modalities": self.bundle.instance("text"), "temperature": temperature}
            drafts = await self.generation.prepared(lambda: self.generation.drafts(recording, given))
            (output,) = await _unless_left(request, self.generation.outputs(drafts))
            transcript = Transcript(output.text)
        if response_format == "text":
            return PlainTextResponse(transcript.text)
        words = [{"word": word.text, "start": word.start, "end": word.end} for word in transcript.words]
        verbose = {"task": "transcribe", "language": "", "duration": seconds, "words": words}
        return JSONResponse((verbose if response_format == "verbose_json" else {}) | {"text": transcript.text})


def _usage(drafts: list[Draft], outputs: list[Output]) -> dict[str, int]:
    prompt, new = len(drafts[0].request.prompt), sum(len(output.ids) for output in outputs)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _image_usage(drafts: list[Draft], outputs: list[Output]) -> dict[str, Any]:
    usage = _usage(drafts, outputs)
    vocab = drafts[0].bundle.vocab
    _, placed = vocab.encode_placed(drafts[0].prompt, eos=False)
    text = 1 + sum(span.length for span in placed if span.modality == vocab.bare)  # bos, too
    details = {"image_tokens": usage["prompt_tokens"] - text, "text_tokens": text}
    return {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
        "input_tokens_details": details,
    }


# ---- Answers while they grow ------------------------------------------------------------------------------------------


async def _events(request: Request, events: AsyncGenerator[dict[str, Any]]) -> Response:
    """Server-sent events, one per dictionary; images' carry their type as the event's name. What fails after the first is an event."""

    async def lines() -> AsyncGenerator[bytes]:
        begun = False
        async with aclosing(events):
            try:
                async for event in events:
                    begun = True
                    name = f"event: {event['type']}\n" if "type" in event else ""
                    yield f"{name}data: {json.dumps(event)}\n\n".encode()
            except Exception as error:
                if not begun:
                    raise
                log.exception("a stream failed: %s", error)
                yield f"data: {json.dumps(error_body('the server failed; its log says why', 'server_error'))}\n\n".encode()
        yield b"data: [DONE]\n\n"

    return await _stream(request, lines(), "text/event-stream")


async def _stream(request: Request, pieces: AsyncGenerator[bytes], mime: str) -> Response:
    """An answer that begins with its first piece, so that an error before it has a status of its own."""
    try:
        first = await _unless_left(request, anext(pieces, b""))
    except BaseException:
        await pieces.aclose()
        raise

    async def all_pieces() -> AsyncGenerator[bytes]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return StreamingResponse(all_pieces(), media_type=mime, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """The result of work, which ends when the client leaves. Errors: `ClientLeftError`."""

    async def leaves() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)

    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(leaves())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientLeftError
        result: T = tasks[0].result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(BaseException):
                await task
