"""A bundle: vocabulary, tokenizers and decoder in one folder, which is all that is needed to use a model.

    bundle.json   vocab.json   tokenizers/NAME/   model/   generation_config.json

Each part may be missing: with tokenizers alone a bundle tokenizes, with a decoder it generates. Tokenizers have names: usually those
of their kinds (`text`, `image`, `audio`), and others where there are several of a kind (`speech`, `music`).
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from unitok import hub
from unitok.bundle.checksums import check_files
from unitok.bundle.reading import read_contents
from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError
from unitok.files import Json, read_json, settle, whole_folder, write_json
from unitok.generation_config import FILE as GENERATION_CONFIG
from unitok.generation_config import GenerationConfig
from unitok.hardware import check_device
from unitok.keywords import checks_names
from unitok.modalities import (
    AnyModality,
    Plain,
    TokenizerLike,
    modalities,
    modality_of,
    types_of,
)
from unitok.vocab import Vocab

if TYPE_CHECKING:
    from unitok.model import Decoder
    from unitok.model.copies import GenerationDecoder

VERSION = 2  # of bundles
FACTS = (
    "training",
    "scores",
    "world",
)  # what bundle.json may say of the parts' training, how it was measured, and what it knows


def bind(tokenizers: Mapping[str, TokenizerLike]) -> None:
    """Give tokenizers that use others of a bundle those others."""
    for tokenizer in tokenizers.values():
        if hasattr(tokenizer, "bind"):
            tokenizer.bind(tokenizers)


class Bundle:
    """Vocabulary, tokenizers and decoder. A tokenizer is an attribute by its name: `bundle.image`, None where there is none.

    generation_config: how it is to be sampled where a call does not say; also a dict of its fields. facts: for the model
    card: `training`, of each part by its name, and `scores`; and `world`, an `example` of a prompt and all `words` that it knows."""

    def __init__(
        self,
        vocab: Vocab,
        tokenizers: Mapping[str, TokenizerLike] | None = None,
        model: "Decoder | None" = None,
        generation_config: GenerationConfig | Mapping[str, object] | None = None,
        facts: Mapping[str, Json] | None = None,
    ):
        self.vocab, self.model = vocab, model
        self.tokenizers: dict[str, TokenizerLike] = dict(tokenizers or {})
        self.generation_config = {} if generation_config is None else generation_config
        self._folder: Path | None = None  # that it was read from
        self.facts = dict(facts or {})
        self._inference: tuple[Decoder, GenerationDecoder] | None = None
        self._weights = ""  # type of the weights that generate; "": the decoder's
        bind(self.tokenizers)
        for name, part in self.tokenizers.items():
            if vocab.span(name).fingerprint not in ("", part.fingerprint()):
                raise UserError(f"the {name} tokenizer is not the one that the vocabulary was made for; build the bundle again")
        if model is not None and model.config.vocab_size != vocab.size:
            raise UserError(
                f"the decoder has {model.config.vocab_size} ids, the vocabulary {vocab.size}: they do not belong together"
            )

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("tokenizers", {}):
            return self.tokenizers[name]
        if name in modalities():
            return None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def generation_config(self) -> GenerationConfig:
        """How the bundle is to be sampled where a call does not say. A dict of its fields may be assigned."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig | Mapping[str, object]) -> None:
        self._generation_config = config if isinstance(config, GenerationConfig) else GenerationConfig.from_dict(config)

    # ---- Loading and saving --------------------------------------------------------------------------------------

    @classmethod
    @checks_names
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        parts: Iterable[str] | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Self:
        """Read a bundle, in eval mode.

        Args:
            name: a folder, a repository of the Hugging Face hub (`user/name`), or the name of a built-in bundle (`scenes`).
            device: where it computes, such as `cpu` or `cuda:1`.
            parts: what is loaded: names of tokenizers, `tokenizers` for all of them, and `model`. Default: everything.
            dtype: of the decoder's weights, such as `torch.bfloat16`. Default: float32. `int8`: one byte for each weight that
                generates, on a CPU; `auto`: what generates fastest here, by a measurement; with both, training and `score` keep the
                decoder's own. Tokenizers always compute in float32: their codes are defined there, and in a smaller type the nearest code is
                often another.
            revision: branch, tag or commit of a repository.
            cache_dir: where repositories are kept. Default: the hub's own cache.
            local_files_only: download nothing.
            token: for private and gated repositories. Default: the one of `hf auth login`.

        Errors: `UserError` that says what is wrong.
        """
        device, dtype = _checked_device("device", device), dtype if dtype in (None, "auto") else _checked_dtype("dtype", dtype)
        path = hub.find(name, revision, cache_dir, local_files_only, token)
        settle(path)
        info = read_json(path / "bundle.json", "make a bundle with `unitok bundle`", "version", "parts")
        if info["version"] != VERSION:
            raise UserError(f"{path}: a bundle of version {info['version']}; this unitok reads version {VERSION}")
        if "sha256" in info:
            check_files(path, info["sha256"])
        vocab = Vocab.load(path / "vocab.json")
        known = [*vocab.spans, "model"]
        wanted = known if parts is None else [parts] if isinstance(parts, str) else list(parts)
        wanted += vocab.spans if "tokenizers" in wanted else []
        for where, names in (("parts", wanted), (f"{path / 'bundle.json'}", info["parts"])):
            if not isinstance(names, list) or any(n not in (*known, *modalities(), "tokenizers") for n in names):
                raise UserError(f"{where}: {names!r}; parts are {', '.join(known)}")
        tokenizers = {
            name: modality_of(vocab.span(name).kind)
            .tokenizer_class()
            .from_pretrained(path / "tokenizers" / name, device=str(device))
            for name in info["parts"]
            if name in wanted and name in vocab.spans
        }
        model = None
        if "model" in wanted and "model" in info["parts"]:
            from unitok.model import Decoder

            model = Decoder.from_pretrained(path, device=str(device))
        facts = {key: info[key] for key in FACTS if key in info}
        config = GenerationConfig.from_pretrained(path) if (path / GENERATION_CONFIG).exists() else None
        bundle = cls(vocab, tokenizers, model, config, facts)
        bundle._folder = path
        return bundle if dtype is None else bundle.to(dtype=dtype)

    def save_pretrained(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a bundle's folder, completely or not at all. Inverse of `from_pretrained`.

        Anything else at `path` is replaced only with `overwrite`; files in a bundle that unitok did not write stay.
        Errors: `UserError` that says what is there.
        """
        with whole_folder(path, "bundle", overwrite) as partial:
            for name, tokenizer in self.tokenizers.items():
                tokenizer.save_pretrained(partial / "tokenizers" / name)
            if self.model is not None:
                self.model.save_pretrained(partial / "model")
            self.vocab.save(partial / "vocab.json")
            if self.generation_config.given():
                self.generation_config.save_pretrained(partial)
            write_json(partial / "bundle.json", {"version": VERSION, "parts": self.parts, **self.facts})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        card: Mapping[str, str] | None = None,
    ) -> str:
        """Make a repository of the Hugging Face hub hold this bundle and its model card; return the URL of the commit.

        Args:
            repo_id: `user/name`, made if need be. Parts that the bundle there has and this one lacks are removed from it.
            private: whether a new repository is private.
            revision: the branch, made if need be. Default: `main`.
            commit_message: of the commit.
            token: that may write there. Default: the one of `hf auth login`.
            card: texts of the model card, as for `model_card`. Without it a README.md stays: the one of the repository, else the one of
                the folder that the bundle was read from. A card is written where there is neither, and always with `card={}`.

        Errors: `UserError` with the hub's reason.
        """
        own = self._folder / "README.md" if self._folder is not None and card is None else None
        text = own.read_text(encoding="utf-8") if own is not None and own.is_file() else self.model_card(repo_id, card)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "bundle")
            (Path(folder) / "bundle" / "README.md").write_text(text, encoding="utf-8")
            return hub.upload(Path(folder) / "bundle", repo_id, private, revision, commit_message, token, card is None)

    def model_card(self, name: str, card: Mapping[str, str] | None = None) -> str:
        """Return the model card of this bundle as Markdown. What is not known is said to be not stated.

        Args:
            name: the repository, `user/name`.
            card: texts that only its author can say, by the fields of `unitok.hub.CardTexts`: `license`, `intended_use`, `limits`, ….
        """
        texts = hub.make_card_texts(card or {})
        parts = []
        for part, tokenizer in self.tokenizers.items():
            tokens = sum(r.size for r in self.vocab.body(part))
            kind = f"{self.vocab.span(part).kind} tokenizer"
            parts.append(hub.PartFacts(part, kind, _count_parameters(tokenizer), tokens))
        if self.model is not None:
            parts.append(hub.PartFacts("model", "decoder", _count_parameters(self.model)))
        kinds = list(dict.fromkeys(span.kind for span in self.vocab.spans.values()))
        training = self.facts.get("training")
        known = training if isinstance(training, dict) else {}
        return hub.model_card(name, kinds, self.vocab.size, parts, known, self.facts.get("scores"), texts)

    # ---- Device and type ------------------------------------------------------------------------------------------

    def to(
        self,
        *where: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Self:
        """Move all parts to a device, and turn the decoder's weights into a type; in place, as `nn.Module.to`. Return the bundle.
        `u.to("cuda")`, `u.to(torch.bfloat16)`, `u.to("cuda", torch.bfloat16)`, `u.to(device="cuda", dtype="bfloat16")`. Tokenizers stay
        in float32, as `from_pretrained` says, also of `int8` and `auto`. Errors: `UserError` for what is neither, and for a device that is not there.
        """
        named = [] if dtype is None else [dtype]
        types = ["auto" if x == "auto" else _checked_dtype("dtype", x) for x in (*where, *named) if x in named or _is_type(x)]
        places = [] if device is None else [_checked_device("device", device)]
        wrong = "neither a device, such as cuda, nor a type, such as bfloat16"
        for place in [*(_checked_device("to", x, wrong) for x in where if not _is_type(x)), *places]:
            for part in (*self.tokenizers.values(), self.model):
                if isinstance(part, nn.Module):
                    part.to(place)
        for kind in types:
            if isinstance(kind, str) and self.model is not None:
                from unitok.model.copies import fastest_weights

                self._weights = fastest_weights(self.model)
            elif isinstance(kind, torch.dtype):
                self._weights = "int8" if kind == torch.int8 else ""
                if self.model is not None and not self._weights:
                    self.model.to(kind)
        self._inference = None
        return self

    @property
    def device(self) -> torch.device:
        """Where the decoder computes; without one where the tokenizers do."""
        for part in (self.model, *self.tokenizers.values()):
            if isinstance(part, nn.Module):
                return next(part.parameters()).device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder's weights that generate; without a decoder float32, in which tokenizers compute."""
        own = torch.float32 if self.model is None else self.model.lm_head.weight.dtype
        return _dtype_of(self._weights) or own

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_inference": None}  # made anew where it is needed

    # ---- Parts -----------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> list[str]:
        """Names of its tokenizers, and `model` where it has a decoder."""
        return [*self.tokenizers, *(["model"] if self.model is not None else [])]

    def describe(self) -> dict[str, object]:
        """Return what it holds, as plain types, for `unitok inspect`: number of tokens, tokenizers, decoder."""
        facts: dict[str, object] = {"tokens": self.vocab.size}
        facts |= {name: self.modality(name).describe(tokenizer) for name, tokenizer in self.tokenizers.items()}
        return facts | ({} if self.model is None else {"model": self.model.describe()})

    @property
    def inference(self) -> "GenerationDecoder":
        """The decoder for generation: a copy of its weights in another order, made once per `model`.

        It does not follow changes of the weights in place; make another Bundle after such a change.
        """
        from unitok.model.copies import copy_for_generation

        model = self.require("model")
        if self._inference is None or self._inference[0] is not model:
            self._inference = model, copy_for_generation(model, self._weights)
        return self._inference[1]

    # ---- Names ---------------------------------------------------------------------------------------------------

    def require(self, name: str) -> Any:
        """Return a tokenizer by its name, or `model`. Errors: `UserError` that says how to add a missing one."""
        part = self.model if name == "model" else self.tokenizers.get(name)
        if part is None:
            kind = self.vocab.spans[name].kind if name in self.vocab.spans else name
            flag = f"{kind} PATH" if name == kind else f"{kind} {name}=PATH"
            if name == "model":
                name, flag = "decoder", "decoder PATH"
            elif kind in modalities() and issubclass(modality_of(kind).tokenizer_class(), Plain):
                flag = f"add {kind}"
            raise UserError(f"the bundle has no {name}; add one with `unitok bundle BUNDLE --{flag}`")
        return part

    def may_lack(self, type: str) -> bool:
        """Return whether files of a type are bad documents, not the end of a run: the bundle lacks a tokenizer that needs no weights."""
        lacks = type in modalities() and all(span.kind != type for span in self.vocab.spans.values())
        return lacks and not modality_of(type).inline and issubclass(modality_of(type).tokenizer_class(), Plain)

    def modality(self, name: str) -> AnyModality:
        """Return the modality of the tokenizer of that name."""
        return modality_of(self.vocab.span(name).kind)

    @property
    def types(self) -> dict[str, AnyModality]:
        """The types that a part of a document may have, with their modalities: names of tokenizers, and kinds of content."""
        return types_of(self.vocab)

    def instance(self, type: str) -> str:
        """Return the name of the tokenizer that encodes content of a type; see `Vocab.instance`."""
        return self.vocab.instance(type)

    @property
    def rates(self) -> dict[str, float]:
        """Frames per second of the tokenizers whose content has a duration, by name."""
        rates = {name: self.modality(name).rate(tokenizer) for name, tokenizer in self.tokenizers.items()}
        return {name: rate for name, rate in rates.items() if rate is not None}

    # ---- Content <-> documents -----------------------------------------------------------------------------------

    def read(self, *contents: object, role: str = "none", loss: bool = True) -> list[Segment]:
        """Return the segments of pieces of content, in order: a str, Path, `PIL.Image`, array (an image), (waveform [C, T], Hz), `Boxes`,
        `Points`, Document, Segment or RawDocument; or a Part, which says which of several tokenizers of a kind it is for:
        `Part("speech", path=Path("a.wav"))`. What is about other content, as boxes are about an image, finds it among them."""
        return read_contents(self, contents, role, loss)

    def read_raw(self, raw: RawDocument) -> Document:
        """Encode a raw document, whose files are read now. Errors: `UserError` for a file of another type than its part has."""
        return Document(tuple(self.read(*raw.content)), raw.id)

    def decode(self, segment: Segment) -> Any:
        """Return the content of a segment: a str; an image, float [3, H, W] in [-1, 1]; audio, float [C, T] in [-1, 1]. Inverse of `read`."""
        return self.modality(segment.modality).decode(self.require(segment.modality), segment)

    def write_document(
        self, document: Document, folder: Path, name: str, contents: Sequence[object] | None = None
    ) -> RawDocument:
        """Decode a document into files `folder/NAME-0.png`, …, and return the raw document that names them.

        contents: the decoded content of its segments, where that exists already.
        """
        parts = []
        for i, segment in enumerate(document.segments):
            content = self.decode(segment) if contents is None else contents[i]
            modality, tokenizer = self.modality(segment.modality), self.require(segment.modality)
            path = modality.save(tokenizer, content, folder / f"{name}-{i}")
            parts.append(Part(segment.modality, content if path is None else "", path, segment.role, segment.loss))
        return RawDocument(document.id or name, tuple(parts))


def _dtype_of(value: object) -> torch.dtype | None:
    """Return the type that a value is or names, None if it does neither."""
    named = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    return named if isinstance(named, torch.dtype) else None


def _is_type(value: object) -> bool:
    return value == "auto" or _dtype_of(value) is not None


def _checked_dtype(argument: str, value: object) -> torch.dtype:
    """Return the type of an argument. Errors: `UserError` for what is no type of weights."""
    dtype = _dtype_of(value)
    if dtype is None or not (dtype.is_floating_point or dtype == torch.int8):
        raise UserError(f"{argument} {value}: give a type of floating point, such as torch.bfloat16, or int8 or auto")
    return dtype


def _checked_device(argument: str, value: object, wrong: str = "no device; give one such as cpu or cuda:1") -> torch.device:
    """Return the device of an argument. Errors: `UserError` for what is none (`wrong` says so), and for one that is not there."""
    try:
        device = torch.device(str(value))
    except RuntimeError:
        raise UserError(f"{argument} {value!r}: {wrong}") from None
    check_device(str(device))
    return device


def _count_parameters(part: object) -> int:
    """Number of weights; 0 for what is no network."""
    return sum(weight.numel() for weight in part.parameters()) if isinstance(part, nn.Module) else 0
