"""A bundle: a folder with what is needed to use a model.

    bundle.json   vocab.json   tokenizers/NAME/   model/   generation_config.json

Any part may be missing: with tokenizers alone a bundle tokenizes, with a decoder it generates. Tokenizers have names: usually those
of their kinds (`text`, `image`, `audio`), and others where there are several of a kind (`speech`, `music`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError
from unitok.files import check_replaceable, kind_of, read_json, settle, whole_folder, write_json
from unitok.generation_config import FILE as GENERATION_CONFIG
from unitok.generation_config import GenerationConfig
from unitok.modalities import Modality, Plain, build_vocab, kind_accepting, kind_of_content, modalities, modality_of, types_of
from unitok.pretrained import known_vocabulary, load_state
from unitok.storage import Blob, Files
from unitok.vocab import Vocab

if TYPE_CHECKING:
    from unitok.model import Decoder
    from unitok.model.inference import InferenceDecoder

VERSION = 2  # of bundles
B = TypeVar("B", bound="Bundle")


class ReadFile(str):
    """A `Segment.source` whose file this process was given as a Path and read: such a file may be copied. A name that came
    with a document, from a shard or from JSON, is a plain str."""

    __slots__ = ()


class Bundle:
    """Vocabulary, tokenizers and decoder together. A tokenizer is an attribute by its name: `bundle.image`, None where there is none.
    generation_config: how it is to be sampled where a call does not say."""

    def __init__(
        self,
        vocab: Vocab,
        tokenizers: Mapping[str, Any] | None = None,
        model: "Decoder | None" = None,
        generation_config: GenerationConfig | None = None,
    ):
        self.vocab, self.tokenizers, self.model = vocab, dict(tokenizers or {}), model
        self.generation_config = generation_config or GenerationConfig()
        self._inference: tuple[Decoder, InferenceDecoder] | None = None
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

    # ---- Loading and saving --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls: type[B], path: str | Path, device: str = "cpu", parts: Iterable[str] | None = None) -> B:
        """Read a bundle, in eval mode. parts: what is loaded: names of tokenizers, `tokenizers` for all of them, and `model`.
        Errors: `UserError` naming what is wrong."""
        path = Path(path)
        settle(path)
        info = read_json(path / "bundle.json", "make a bundle with `unitok bundle`", "version", "parts")
        if info["version"] != VERSION:
            raise UserError(f"{path}: a bundle of version {info['version']}; this unitok reads version {VERSION}")
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
            .from_pretrained(path / "tokenizers" / name, device=device)
            for name in info["parts"]
            if name in wanted and name in vocab.spans
        }
        model = None
        if "model" in wanted and "model" in info["parts"]:
            from unitok.model import Decoder

            model = Decoder.from_pretrained(path, device=device)
        config = GenerationConfig.from_pretrained(path) if (path / GENERATION_CONFIG).exists() else None
        return cls(vocab, tokenizers, model, config)

    def save_pretrained(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a bundle, whole or not at all. What lies at `path` is replaced only with `overwrite`; files in a bundle that
        unitok did not write stay. Inverse of `from_pretrained`. Errors: `UserError` that names what lies there."""
        with whole_folder(path, "bundle", overwrite) as partial:
            for name, tokenizer in self.tokenizers.items():
                tokenizer.save_pretrained(partial / "tokenizers" / name)
            if self.model is not None:
                self.model.save_pretrained(partial / "model")
            self.vocab.save(partial / "vocab.json")
            if self.generation_config.given():
                self.generation_config.save_pretrained(partial)
            write_json(partial / "bundle.json", {"version": VERSION, "parts": self.parts})

    @property
    def parts(self) -> list[str]:
        """Names of the parts that are there."""
        return [*self.tokenizers, *(["model"] if self.model is not None else [])]

    def describe(self) -> dict[str, Any]:
        """What it holds, as plain types, for `unitok inspect`."""
        found = {name: self.modality(name).describe(tokenizer) for name, tokenizer in self.tokenizers.items()}
        return {"ids": self.vocab.size} | found | ({"model": self.model.describe()} if self.model is not None else {})

    @property
    def inference(self) -> "InferenceDecoder":
        """A copy of the decoder's weights, arranged for generation, made once for each `model`. Whoever changes weights in place
        makes another Bundle."""
        from unitok.model.inference import InferenceDecoder

        model = self.require("model")
        if self._inference is None or self._inference[0] is not model:
            self._inference = model, InferenceDecoder(model)
        return self._inference[1]

    # ---- Names ---------------------------------------------------------------------------------------------------

    def require(self, name: str) -> Any:
        """A part that must be there, by its name. Errors: `UserError` saying how to add it."""
        part = self.model if name == "model" else self.tokenizers.get(name)
        if part is None:
            kind = self.vocab.spans[name].kind if name in self.vocab.spans else name
            flag = f"{kind} PATH" if name == kind else f"{kind} {name}=PATH"
            if name == "model":
                name, flag = "decoder", "decoder PATH"
            elif kind in modalities() and modality_of(kind).tokenizer_class() is Plain:
                flag = f"add {kind}"
            raise UserError(f"the bundle has no {name}; add one with `unitok bundle BUNDLE --{flag}`")
        return part

    def modality(self, name: str) -> Modality:
        """The modality of the tokenizer of that name."""
        return modality_of(self.vocab.span(name).kind)

    @property
    def types(self) -> dict[str, Modality]:
        """What a part of a document may be: names of tokenizers, and kinds."""
        return types_of(self.vocab)

    def instance(self, type: str) -> str:
        """The name of the tokenizer that content of a type goes to, as `Vocab.instance` says."""
        return self.vocab.instance(type)

    @property
    def rates(self) -> dict[str, float]:
        """Frames per second of the tokenizers whose content takes time, by name."""
        found = {name: self.modality(name).rate(tokenizer) for name, tokenizer in self.tokenizers.items()}
        return {name: rate for name, rate in found.items() if rate is not None}

    # ---- Content <-> documents -----------------------------------------------------------------------------------

    def read(self, content: Any, role: str = "none", loss: bool = True) -> list[Segment]:
        """Segments of one piece of content: a str, Path, `PIL.Image`, array (an image), (waveform [C, T], Hz), Document, Segment or
        RawDocument; or a Part, which says which of several tokenizers of a kind it is for: `Part("speech", path=Path("a.wav"))`."""
        if isinstance(content, Document):
            return list(content.segments)
        if isinstance(content, Segment):
            return [content]
        if isinstance(content, RawDocument):
            return list(self.read_raw(content).segments)
        if isinstance(content, Part):
            return [self._read_part(content)]
        if isinstance(content, Path):
            return [self._read_file(content, role, loss)]
        kind = kind_accepting(content)
        if kind is None:
            known = "a str, Path, PIL.Image, array, (waveform [C, T], Hz), Document or Segment"
            raise UserError(f"prompt: a {type(content).__name__}; a piece of a prompt is {known}")
        return [self._encode(self.instance(kind), content, f"a prompt's {kind}", role, loss)]

    def read_raw(self, raw: RawDocument) -> Document:
        """A raw document as a Document; its files are read now. Errors: `UserError` for a file of another type than its part's."""
        return Document(tuple(self._read_part(part) for part in raw.content), raw.id)

    def _read_part(self, part: Part) -> Segment:
        if part.path is not None:
            return self._read_file(part.path, part.role, part.loss, part.type)
        name = self.instance(part.type)
        self.require(name)
        if not (self.modality(name).inline or self.modality(name).accepts(part.value)):
            raise UserError(
                f"a part of type {part.type} holds a {type(part.value).__name__}; give it a path or content of its kind"
            )
        return self._encode(name, part.value, f"a prompt's {part.type}", part.role, part.loss)

    def _read_file(self, path: Path, role: str, loss: bool, type: str = "") -> Segment:
        """type: what the file is to be, where a document said that."""
        if not path.is_file():
            raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        blob = Blob.of(Files("/"), str(path.absolute()))
        kind = kind_of_content(blob.head(), path.name, self.types[type].kind if type in self.types else "")
        if kind is None:
            raise UserError(f"{path}: {'neither an image nor audio' if blob.head() else 'an empty file; replace it'}")
        name = self.instance(type or kind)
        if kind != (self.vocab.span(name).kind if name in self.vocab.spans else name):
            raise UserError(f"{path}: the part's type is {type}, the file is {kind}; give the type that it has")
        return self._encode(name, blob, str(path), role, loss, str(path) if type else ReadFile(path))

    def _encode(self, name: str, content: Any, where: str, role: str, loss: bool, source: str = "") -> Segment:
        tokenizer = self.require(name)
        modality = self.modality(name)
        loaded = modality.load(tokenizer, content, modality.Options(), where)
        (codes,) = modality.encode(tokenizer, [loaded])
        return Segment(name, codes, role, loss, source, loaded.size)

    def decode(self, segment: Segment) -> Any:
        """Content of a segment: str, image float [3, H, W] in [-1, 1], audio float [C, T] in [-1, 1]. Inverse of `read`."""
        return self.modality(segment.modality).decode(self.require(segment.modality), segment)

    def write_document(self, document: Document, folder: Path, name: str, contents: list[Any] | None = None) -> RawDocument:
        """Decode a Document into files `folder/NAME-0.png`, …, and return the raw document that names them. contents: its
        segments, where they have been decoded already."""
        parts = []
        for i, segment in enumerate(document.segments):
            content = self.decode(segment) if contents is None else contents[i]
            modality, tokenizer = self.modality(segment.modality), self.require(segment.modality)
            path = modality.save(tokenizer, content, folder / f"{name}-{i}")
            parts.append(Part(segment.modality, content if path is None else "", path, segment.role, segment.loss))
        return RawDocument(document.id or name, tuple(parts))


# ---- Making bundles -------------------------------------------------------------------------------------------------


def load_trained_part(kind: str, path: Path, trust: bool = False, name: str = "") -> tuple[Any, dict[str, Any]]:
    """A part from its own folder, a bundle, a run's folder (its newest checkpoint) or a checkpoint; and the checkpoint's
    description of it. kind: of a tokenizer, or `model`. name: which of a bundle's tokenizers, where it has several of the kind.
    Errors: `UserError` naming the path."""
    from unitok.checkpoints import is_sharded, load_checkpoint, merge_lora, newest_checkpoint
    from unitok.model import Decoder

    path = Path(path)
    settle(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir() and (path / "checkpoints").is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path / 'checkpoints'}: no checkpoint there")
        path = newest
    part_class = Decoder if kind == "model" else modality_of(kind).tokenizer_class()
    if kind != "model" and (path / "bundle.json").exists():
        held = Vocab.load(path / "vocab.json")
        path = path / "tokenizers" / (name if name in held.spans else held.instance(kind))
    if path.is_dir() and not is_sharded(path):
        known = {} if kind != "model" else {"vocab": Vocab.load(known_vocabulary(path)).to_manifest()}
        return part_class.from_pretrained(path), known
    checkpoint = load_checkpoint(path, trust)
    described = checkpoint.get("unitok", {}) if isinstance(checkpoint, dict) else {}
    called = "decoder" if kind == "model" else f"{kind} tokenizer"
    if described.get("kind") != called:
        raise UserError(f"{path}: a checkpoint of {described.get('kind') or 'another program'}, not of a {called}")
    part = part_class.from_config(described["part"]["config"], "the checkpoint")
    prefix = "decoder." if kind == "model" else "tokenizer."
    if any(k.startswith("average.module.") for k in checkpoint["state_dict"]):
        prefix = "average.module."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    if "lora_scale" in described["part"]:
        state = merge_lora(state, described["part"]["lora_scale"])
    load_state(part, state, str(path))
    if any(name.endswith("initted") and not bool(value) for name, value in part.state_dict().items()):
        raise UserError(f"{path}: its codebook has not started yet (quantize_start); train longer")
    return part.prepare_for_inference(), described["part"]


def make_bundle(
    out: Path,
    paths: Mapping[str, Path],
    trust: bool = False,
    overwrite: bool = False,
    kinds: Mapping[str, str] | None = None,
    add: Iterable[str] = (),
) -> Bundle:
    """Put parts into a bundle, or add them to one that is there. New tokenizers make a new vocabulary; a decoder must have been
    trained on exactly the bundle's.

    paths: of parts by name: a tokenizer's, or `model`. kinds: of the tokenizers whose names are not their kinds. add: kinds whose
    tokenizers have no weights. Errors: `UserError` where something else lies at `out`, or where a decoder would lose a tokenizer
    that it was trained with; with `overwrite` the one is replaced, and the other left out.
    """
    out, kinds = Path(out), dict(kinds or {})
    check_replaceable(out, "bundle", overwrite)
    old = Bundle.from_pretrained(out) if kind_of(out) == "bundle" else None
    for name, kind in kinds.items():
        _check_name(name, kind, old)
    if old:
        kinds = {name: span.kind for name, span in old.vocab.spans.items()} | kinds
    loaded = {name: load_trained_part(kinds.get(name, name), path, trust, name) for name, path in paths.items()}
    tokenizers = (old.tokenizers if old else {}) | {name: part for name, (part, _) in loaded.items() if name != "model"}
    for kind in add:
        if modality_of(kind).tokenizer_class() is not Plain:
            raise UserError(f"{kind}: its tokenizer has weights; give one, as {kind}=PATH")
        tokenizers[kind] = Plain(kind)
    order = list(modalities())
    ordered = {name: tokenizers[name] for name in sorted(tokenizers, key=lambda name: order.index(kinds.get(name) or name))}
    model = loaded["model"][0] if "model" in loaded else old.model if old else None
    if not ordered and model is None:
        raise UserError("nothing to put into the bundle: give a tokenizer or a decoder")
    vocab, changed = _vocab_for(ordered, kinds, old)
    if old and old.model is not None and (changed or ("model" not in paths and vocab.size != old.vocab.size)):
        if not overwrite:
            without = f"another {changed[0]} tokenizer" if changed else f"{old.vocab.size} ids, not {vocab.size}"
            raise UserError(
                f"{out}: holds a decoder that was trained with {without}; choose another folder, or overwrite to leave it out"
            )
        model = model if "model" in paths else None
    if "model" in loaded and (trained_on := loaded["model"][1].get("vocab")):
        vocab.check_covers(Vocab.from_manifest(trained_on), "the bundle", str(paths["model"]))
    bundle = Bundle(vocab, ordered, model, old.generation_config if old else None)
    bundle.save_pretrained(out, overwrite=True)
    return bundle


def _check_name(name: str, kind: str, old: Bundle | None) -> None:
    """Raise `UserError` for a name that a tokenizer of a kind cannot have."""
    taken = name in ("model", "decoder", "vocab", "tokenizers", "generation_config") or hasattr(Bundle, name)
    reserved = [*modalities(), *(f.name for f in fields(GenerationConfig))]
    if not name.isidentifier() or taken or (name != kind and name in reserved):
        raise UserError(f"{name!r} cannot be the name of a tokenizer for {kind}; choose another word")
    if old and name in old.vocab.spans and old.vocab.spans[name].kind != kind:
        raise UserError(f"{name!r} is a tokenizer for {old.vocab.spans[name].kind} in the bundle; choose another name")


def _vocab_for(tokenizers: Mapping[str, Any], kinds: Mapping[str, str], old: Bundle | None) -> tuple[Vocab, list[str]]:
    """The old vocabulary, extended, where all of its tokenizers are still the same, else a new one; and those that are not."""
    spans = old.vocab.spans if old else {}
    changed = [n for n, part in tokenizers.items() if n in spans and spans[n].fingerprint not in ("", part.fingerprint())]
    if old is None or changed:
        return build_vocab(tokenizers, kinds), changed
    return build_vocab({name: part for name, part in tokenizers.items() if name not in spans}, kinds, old.vocab), []


def make_untrained(out: Path, preset: str = "tiny", seed: int = 0, overwrite: bool = False) -> Bundle:
    """A whole bundle with random weights, for trials and tests. Errors: as `Bundle.save_pretrained`'s."""
    import torch

    from unitok.model.decoder import Decoder, DecoderConfig

    if preset != "tiny":
        raise UserError(f"preset {preset!r}: choose tiny")
    check_replaceable(out, "bundle", overwrite)
    torch.manual_seed(seed)
    tokenizers = {kind: modality.untrained() for kind, modality in modalities().items()}
    vocab = build_vocab(tokenizers)
    decoder = Decoder(
        DecoderConfig(vocab.size, 64, 2, 128, num_attention_heads=2, num_key_value_heads=1, head_dim=32, span_positions=32)
    ).eval()
    for name, weight in decoder.named_parameters():  # what training begins with at zero: the head, and what blocks add
        if name.endswith(("lm_head.weight", "o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.1)
    bundle = Bundle(vocab, tokenizers, decoder)
    bundle.save_pretrained(out, overwrite)
    return bundle
