"""What clients send, in OpenAI's form: types, ranges and what is refused by name.

Fields of OpenAI's that change nothing here (`user`, `metadata`, …) are accepted; those that would change the answer and are not built
are refused unless they have their neutral value. Our own fields are marked as extensions.
"""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from unitok.errors import UserError, visible

MOST_OUTPUTS = 10

#: Fields that OpenAI's clients send and that change nothing here.
_HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity", "reasoning_effort"),
    *("quality", "style", "background", "moderation", "output_compression", "instructions"),
}
#: Fields that would change the answer, and the values of them that do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0, None), "presence_penalty": (0, None), "logit_bias": ({}, None), "logprobs": (False, None),
    "top_logprobs": (0, None), "stop": ([], None), "tools": ([], None), "tool_choice": ("none", "auto", None),
    "functions": ([], None), "response_format": ({"type": "text"}, None), "parallel_tool_calls": (True, False, None),
    "speed": (1, None), "output_format": ("png", None), "stream_format": ("audio", None),
}  # fmt: skip


#: Fields of forms, by endpoint; and as above those that change nothing, and values, which are texts, that do not.
_FORMS = {
    "edits": ("model", "image", "image[]", "mask", "prompt", "n", "seed", "response_format"),
    "transcriptions": ("model", "file", "response_format", "temperature", "stream"),
}
_HARMLESS_IN_FORMS = _HARMLESS | {"input_fidelity", "language", "chunking_strategy", "timestamp_granularities[]"}
_NEUTRAL_IN_FORMS = {
    "stream": ("false",),
    "partial_images": ("0",),
    "size": ("auto",),
    "output_format": ("png",),
    "prompt": ("",),
}


def check_form(endpoint: str, fields: Iterable[tuple[str, object]]) -> None:
    """Raise `UserError` for a field of an endpoint's form that does not exist, or whose value would change the answer and is not built."""
    for name, value in fields:
        if name not in _FORMS[endpoint] and name not in _HARMLESS_IN_FORMS and value not in _NEUTRAL_IN_FORMS.get(name, ()):
            wrong = "this value is not supported" if name in _NEUTRAL_IN_FORMS else "there is no such field"
            raise UserError(f"{visible(name[:40])}: {wrong}")


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str = ""

    def model_post_init(self, context: Any, /) -> None:
        for name, value in (self.__pydantic_extra__ or {}).items():
            if name not in _HARMLESS and value not in _NEUTRAL.get(name, ()):
                known = name in _NEUTRAL
                raise ValueError(f"{name}: {'this value is not supported' if known else 'there is no such field'}")


class Sampling(_Body):
    """How tokens are drawn. All but temperature, top_p and seed are extensions."""

    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=10, strict=False)
    top_p: float | None = Field(None, gt=0, le=1, strict=False)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1, strict=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, strict=False)
    guidance_scale: float | None = Field(None, ge=0, le=100, strict=False)

    def sampling(self) -> dict[str, Any]:
        """What was given of it."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "guidance_scale")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class StreamOptions(BaseModel):
    """Of a chat that streams."""

    include_usage: bool | None = None


class AudioOptions(BaseModel):
    """Of the audio in a chat: always WAV in whole answers, 16-bit samples in streams."""

    format: Literal["wav", "pcm16"] = "wav"
    voice: Any = None


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`. Extensions: `modalities` may be a plan such as `["text", "image:8x8"]`; `roles`: false for a prompt of
    contents alone, as of models that were not trained on conversations."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    modalities: list[str] | str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_OUTPUTS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    audio: AudioOptions | None = None
    roles: bool = True

    @field_validator("modalities")
    @classmethod
    def _not_empty(cls, value: list[str] | str | None) -> list[str] | str | None:
        if value is not None and not value:
            raise ValueError("give at least one")
        return value


class ImageRequest(Sampling):
    """`POST /v1/images/generations`. Extensions: `seed`, `negative_prompt` and the sampling parameters."""

    prompt: str = Field(min_length=1)
    n: int | None = Field(None, ge=1, le=MOST_OUTPUTS)
    size: str | None = None
    response_format: Literal["b64_json", None] = None
    negative_prompt: str | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=64)


MOST_SPOKEN = 60_000  # characters of a text to be spoken: more than an hour


class SpeechRequest(Sampling):
    """`POST /v1/audio/speech`. Extensions: `seconds`, and the sampling parameters. `voice` is accepted and changes nothing."""

    input: str = Field(min_length=1, max_length=MOST_SPOKEN)
    voice: Any = None
    response_format: Literal["wav", "pcm", "flac", "mp3", "opus"] = "mp3"
    seconds: float | None = Field(None, gt=0, strict=False)
