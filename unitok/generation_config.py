"""How content is generated: `SamplingParams` say how tokens are drawn, a `GenerationConfig` says everything of a call.

No PyTorch is imported: the command line makes its flags of these classes.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

from unitok.content import Prompt
from unitok.errors import UserError, type_of
from unitok.files import read_json, write_json
from unitok.keywords import check_names

FILE = "generation_config.json"

Schedule = Literal["constant", "linear", "cosine"]
RankBy = Literal["logprob", "pmi"]
SpeechUnit = Literal["sentence", "word"]
Values: TypeAlias = dict[str, Any]  # of fields, by name


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one kind of content are drawn.

    Args:
        temperature: 0 takes the likeliest token; below 1 sharpens; 1 samples as is.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability; 1 for all.
        min_p: only tokens of at least this fraction of the likeliest one's probability; 0 for all.
        repetition_penalty: log-probabilities of tokens that have come, in the prompt or since, are multiplied by it (after
            Keskar et al. 2019, "CTRL"); 1 is none.
        guidance_scale: scale s of classifier-free guidance, u + s (c - u), between log-probabilities without (u) and with the
            condition (c); 1 is none.
        media_guidance_scale: scale of the prompt's images and audio in three-way guidance (Brooks et al. 2023, "InstructPix2Pix", as
            Chameleon does it), u + media_guidance_scale (m - u) + guidance_scale (c - m), where m sees only these of the prompt.
        guidance_start: first token of an image's or audio's body with guidance; 0 is the first after begin and header.
        guidance_stop: first token of the body without guidance again; without it, guidance lasts to the end.
        guidance_schedule: `constant`, or growing from 1 at the start to the full scale at the end of that interval, `linear`
            or like a `cosine`; constant where the length is not known beforehand.

    Errors: `UserError` for a value that makes no sense, which begins with the field's name.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    guidance_scale: float = 1.0
    media_guidance_scale: float | None = None
    guidance_start: int = 0
    guidance_stop: int | None = None
    guidance_schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "guidance_schedule" or (value is None and name in ("media_guidance_scale", "guidance_stop")):
                continue
            if not isinstance(value, Real) or isinstance(value, bool):
                raise UserError(f"{name} {value!r}: it must be a number")
            if name in ("top_k", "guidance_start", "guidance_stop") and not isinstance(value, Integral):
                raise UserError(f"{name} {value!r}: it must be an integer")
        schedules = get_args(Schedule)
        for name, good, must in (
            ("temperature", 0 <= self.temperature < math.inf, "it must be 0 or more"),
            ("top_k", self.top_k >= 0, "it must be 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "it must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "it must be at least 0 and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "it must be above 0; 1 is none"),
            ("guidance_scale", math.isfinite(self.guidance_scale), "it must be a number; 1 is none"),
            ("media_guidance_scale", math.isfinite(self.media_guidance_scale or 0), "it must be a number"),
            ("guidance_start", self.guidance_start >= 0, "it must be 0 or more"),
            ("guidance_stop", self.guidance_stop is None or self.guidance_stop > 0, "it must be above 0"),
            ("guidance_schedule", self.guidance_schedule in schedules, f"choose one of {', '.join(schedules)}"),
        ):
            if not good:
                raise UserError(f"{name} {getattr(self, name)}: {must}")

    @property
    def guided(self) -> bool:
        """Whether there is any guidance."""
        return self.guidance_scale != 1.0 or self.media_guidance_scale is not None

    def guides(self, count: int) -> bool:
        """Whether guidance is on for the token at index `count` of a span's body."""
        return self.guided and self.guidance_start <= count and (self.guidance_stop is None or count < self.guidance_stop)

    def same_guidance(self, count: int) -> int:
        """For how many tokens from index `count` on guidance stays on or off, as far as a document can be long."""
        edges = (self.guidance_start, self.guidance_stop) if self.guided else ()
        return min((edge - count for edge in edges if edge is not None and edge > count), default=sys.maxsize)

    def scales(self, count: int, total: int | None) -> tuple[float, float]:
        """Return `guidance_scale` and `media_guidance_scale` for the token at index `count` of a body of `total` tokens, by the schedule."""
        stop = total if self.guidance_stop is None else min(self.guidance_stop, total or self.guidance_stop)
        fraction = 1.0  # of the full guidance
        if self.guidance_schedule != "constant" and stop is not None and stop > self.guidance_start + 1:
            fraction = (count - self.guidance_start) / (stop - 1 - self.guidance_start)
            fraction = fraction if self.guidance_schedule == "linear" else (1 - math.cos(math.pi * fraction)) / 2
        media = 1.0 if self.media_guidance_scale is None else self.media_guidance_scale
        return 1 + fraction * (self.guidance_scale - 1), 1 + fraction * (media - 1)


SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))
_KINDS = ("text", "image", "audio")  # with a field of their own; other tokenizers stand in `sampling`
#: Fields that a stream of outputs cannot obey, and the value of each that means off.
NOT_IN_STREAMS = {"best_of": 1, "jacobi_window": 0}
_EXAMPLE = '{"temperature": 0.5}'


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Everything of a call of `Unitok.generate`; a bundle keeps one in its `generation_config.json`.

    It remembers which values it was given. Where several hold (the library's defaults, the bundle's file, `generation_config=`,
    the keywords of the call), `combine` takes each value from the last one that gives it.

    Args:
        modalities: `free` (the model decides), or a plan such as `text,image:8x12,audio:2s`, with rows x columns of codes and
            seconds (default: free)
        n: outputs per prompt (default: 1)
        seed: the same seed gives the same outputs (default: 0)
        max_new_tokens: most new tokens per output (default: 512, or as many as the plan takes)
        temperature, top_k, top_p, min_p, repetition_penalty, guidance_scale, media_guidance_scale: for all content, as in `SamplingParams`
        guidance_start, guidance_stop, guidance_schedule: for all content, as in `SamplingParams`
        text, image, audio: the same fields for one kind of content: `{"temperature": 0.5}`, or `SamplingParams`, which set all fields
        edit: the same fields for images that `Unitok.edit` changes, over those of images, such as a stronger guidance
        sampling: the same by the name of a tokenizer, or by any kind: `{"speech": {"temperature": 0.7}}`
        negative_prompt: a prompt that guidance leads away from (default: an empty prompt)
        prefix_fraction: the prompt's last image or audio is a beginning: keep this fraction of its rows or frames, generate the rest
        best_of: make so many outputs for each one that is returned, and keep the best of a prompt's (default: 1)
        rank_by: what makes the best of several: `logprob`, the mean log-probability of its tokens, or `pmi`, how much likelier the
            prompt makes them (default: logprob)
        jacobi_window: guess and check so many tokens of an image in one pass, one output at a time; 0: off
        speech_unit: `Unitok.speak` and `transcribe` take a `sentence` at once, or `word` by word what is said and heard, for decoders that have
            learned such documents (default: sentence)
        edit_described: `Unitok.edit` first writes what changes, then draws it, for decoders that have learned such documents
            (default: False)
        speech_hearings: hear a recording that is transcribed word by word so many times, each begun at another part of a frame (default: 4)

    Errors: `UserError` that begins with the argument's name.
    """

    modalities: str | Sequence[str] = "free"
    n: int = 1
    seed: int = 0
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    guidance_scale: float = 1.0
    media_guidance_scale: float | None = None
    guidance_start: int = 0
    guidance_stop: int | None = None
    guidance_schedule: Schedule = "constant"
    text: Values | SamplingParams = field(default_factory=dict)
    image: Values | SamplingParams = field(default_factory=dict)
    audio: Values | SamplingParams = field(default_factory=dict)
    edit: Values | SamplingParams = field(default_factory=dict)
    sampling: Mapping[str, Values | SamplingParams] = field(default_factory=dict)
    negative_prompt: Prompt | None = None
    prefix_fraction: float | None = None
    best_of: int = 1
    rank_by: RankBy = "logprob"
    jacobi_window: int = 0
    speech_unit: SpeechUnit = field(default="sentence", metadata={"flag": False})
    speech_hearings: int = field(default=4, metadata={"flag": False})
    edit_described: bool = field(default=False, metadata={"flag": False})
    _given: frozenset[str] = field(init=False)

    def __new__(cls, **given: object) -> Self:
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    def __post_init__(self) -> None:
        for name, least in (
            ("n", 1),
            ("seed", 0),
            ("max_new_tokens", 1),
            ("best_of", 1),
            ("jacobi_window", 0),
            ("speech_hearings", 1),
        ):
            check_count(name, getattr(self, name), least)
        listed = isinstance(self.modalities, list | tuple) and all(isinstance(item, str) for item in self.modalities)
        plan = ",".join(self.modalities) if listed else self.modalities
        if not isinstance(plan, str) or not plan.strip(" ,"):
            wrong = "empty" if listed or isinstance(plan, str) else type_of(plan)
            raise UserError(f"modalities is {wrong}: give free, or a plan such as text,image:8x12,audio:2s")
        object.__setattr__(self, "modalities", plan)
        if isinstance(self.negative_prompt, Real | Mapping | Set):
            raise UserError(f"negative_prompt is {type_of(self.negative_prompt)}: give a prompt, such as a text")
        if self.rank_by not in get_args(RankBy):
            raise UserError(f"rank_by is {self.rank_by!r}: choose one of {', '.join(get_args(RankBy))}")
        if not isinstance(self.edit_described, bool):
            raise UserError(f"edit_described is {self.edit_described!r}: it must be true or false")
        if self.speech_unit not in get_args(SpeechUnit):
            raise UserError(f"speech_unit is {self.speech_unit!r}: choose one of {', '.join(get_args(SpeechUnit))}")
        fraction = self.prefix_fraction
        if fraction is not None and not (isinstance(fraction, Real) and 0 < fraction <= 1):
            raise UserError(f"prefix_fraction is {fraction!r}: it must be above 0 and at most 1")
        SamplingParams(**{name: getattr(self, name) for name in SAMPLING_FIELDS})
        if not isinstance(self.sampling, Mapping):
            form = f'{{"speech": {_EXAMPLE}}}'
            raise UserError(f"sampling is {type_of(self.sampling)}: give values by tokenizer, such as {form}")
        sampling = {str(name): _values(str(name), given) for name, given in self.sampling.items()}
        kinds = frozenset(sampling).intersection(_KINDS)  # given by `sampling=`: they are the same as those of `image=`
        for kind in _KINDS:
            object.__setattr__(self, kind, sampling.pop(kind, {}) | _values(kind, getattr(self, kind)))
        object.__setattr__(self, "edit", _values("edit", self.edit))
        if reserved := [name for name in sampling if name in type(self).__dataclass_fields__]:
            raise UserError(f"sampling: {reserved[0]!r} is no name of a tokenizer")
        object.__setattr__(self, "sampling", sampling)
        object.__setattr__(self, "_given", self._given - {"sampling"} | kinds | ({"sampling"} if sampling else set()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"

    def given(self) -> Values:
        """Return the values that it was given, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in self._given}

    def replace(self, **changes: object) -> Self:
        """Return another one with some values changed."""
        changed = changes.get("sampling")
        kept = {name: value for name, value in self.given().items() if not isinstance(changed, Mapping) or name not in changed}
        return type(self)(**{**kept, **changes})

    def overrides(self) -> dict[str, Values]:
        """Return the sampling fields for one kind or one tokenizer, by its name."""
        by_kind = {kind: getattr(self, kind) for kind in _KINDS if getattr(self, kind)}
        return {**{name: _values(name, given) for name, given in self.sampling.items()}, **by_kind}

    def sampling_values(self, name: str, kind: str) -> Values:
        """Return the sampling fields given for a tokenizer: those for all content, over them its kind's, over them its own."""
        overrides = self.overrides()
        general = {field: value for field, value in self.given().items() if field in SAMPLING_FIELDS}
        return {**general, **overrides.get(kind, {}), **overrides.get(name, {})}

    # ---- Files ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, object], where: str = "generation_config") -> Self:
        """Make one of plain values. A key that is no field is the name of a tokenizer or a kind, with sampling fields for it:
        `{"max_new_tokens": 300, "image": {"guidance_scale": 3.0}}`. Errors: `UserError` that begins with `where`."""
        if not isinstance(values, Mapping):
            raise UserError(f"{where} is {type_of(values)}: give a GenerationConfig, or a dict of its fields")
        names = [f.name for f in fields(cls) if f.init]
        named = {name: given for name, given in values.items() if name not in names and isinstance(given, Mapping)}
        known: Values = {name: given for name, given in values.items() if name not in named}
        check_names(known, names, where)
        if named and isinstance(known.get("sampling", {}), Mapping):
            known["sampling"] = {**known.get("sampling", {}), **named}
        try:
            return cls(**known)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def to_dict(self) -> Values:
        """Return the given values as plain types. Inverse of `from_dict`. Errors: `UserError` for a negative prompt that is no text."""
        values = self.given()
        values |= values.pop("sampling", {})
        if not isinstance(values.get("negative_prompt"), str | None):
            raise UserError("negative_prompt: only a text can be written into a file")
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Read a folder's `generation_config.json`, or a file of that form. Errors: `UserError` that names the file."""
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        return cls.from_dict(read_json(file, 'give a JSON file such as {"temperature": 0.9}'), str(file))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder's `generation_config.json`. Inverse of `from_pretrained`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / FILE, self.to_dict())


def combine(
    layers: Iterable[tuple[str, GenerationConfig]], tokenizers: Mapping[str, str], edited: str = ""
) -> GenerationConfig:
    """Return one config of several, in which `sampling` holds the values of each tokenizer.

    A value of a later layer replaces an earlier one's, also where the earlier one is for one kind of content and the later one for
    all: it is what was said last. Within a layer a kind's value replaces the general one, and a tokenizer's its kind's.
    layers: where each stands, for messages, and its values. tokenizers: name -> kind. edited: the tokenizer of an image that is edited, for
    which each layer's `edit` replaces what the layer says of it otherwise. Errors: `UserError` for a name that is neither.
    """
    values: Values = {}
    sampling: dict[str, Values] = {name: {} for name in tokenizers}
    known = list(dict.fromkeys([*tokenizers, *tokenizers.values()]))
    for where, layer in layers:
        for name in layer.overrides():
            if name not in known:
                begin = f"{where}: " if where else ""
                raise UserError(f"{begin}no tokenizer {name!r}; the bundle has {', '.join(known)}")
        for name, kind in tokenizers.items():
            sampling[name] |= layer.sampling_values(name, kind)
        if edited:
            sampling[edited] |= _values("edit", layer.edit)
        values |= {name: given for name, given in layer.given().items() if name not in (*SAMPLING_FIELDS, *_KINDS, "sampling")}
    return GenerationConfig(**values, sampling=sampling)


def check_count(name: str, value: object, least: int) -> None:
    """Raise `UserError` for what is no integer of at least that."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise UserError(f"{name} is {value!r}: it must be an integer of at least {least}")


def _values(name: str, given: object) -> Values:
    """Return sampling fields as a dict, checked."""
    if isinstance(given, SamplingParams):
        return asdict(given)
    if not isinstance(given, Mapping):
        form = f"{_EXAMPLE} or SamplingParams: how it is sampled; content goes into the prompt"
        raise UserError(f"{name} is {type_of(given)}: give {form}")
    check_names(given, SAMPLING_FIELDS, name)
    try:
        SamplingParams(**given)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return dict(given)


def _plain(value: object) -> object:
    """Return a value as JSON takes it."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return list(value) if isinstance(value, tuple) else value
