"""Making bundles: parts from runs, checkpoints and folders, joined into a folder or added to one."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from unitok.bundle.bundle import Bundle, bind
from unitok.checkpoints import is_sharded, load_checkpoint, merge_lora, newest_checkpoint, training_facts
from unitok.errors import UserError
from unitok.files import Json, check_replaceable, kind_of, read_json, settle
from unitok.generation_config import GenerationConfig, combine
from unitok.hub import local
from unitok.modalities import Plain, TokenizerLike, build_vocab, modalities, modality_of
from unitok.model import Decoder
from unitok.plan import parse_plan
from unitok.pretrained import known_vocabulary, load_state
from unitok.tokenizers.base import Tokenizer
from unitok.vocab import Vocab

log = logging.getLogger("unitok")


@dataclass(frozen=True)
class Origin:
    """What the source of a part says of it. vocab: manifest of the vocabulary that a decoder was trained with. training: for people."""

    vocab: Mapping[str, object] | None = None
    training: dict[str, Json] = field(default_factory=dict)


def load_trained_part(kind: str, path: Path, trust: bool = False, name: str = "") -> tuple[Any, Origin]:
    """Read a tokenizer or decoder from its own folder, a bundle, also a built-in one, a run's folder (its newest checkpoint) or a checkpoint.
    Return it in eval mode, and what its source says of it.

    Args:
        kind: of a tokenizer, or `model`.
        trust: unpickle a checkpoint that cannot be read otherwise; that runs whatever code its author put there.
        name: which of a bundle's tokenizers, where it has several of the kind.

    Errors: `UserError` naming the path.
    """
    path = Path(path)
    settle(path)
    path = local(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir() and (path / "checkpoints").is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path / 'checkpoints'}: no checkpoint there")
        path = newest
    if not path.is_dir() or is_sharded(path):
        return _load_from_checkpoint(kind, path, trust)
    training: Json = {}
    if (path / "bundle.json").exists():
        info = read_json(path / "bundle.json", "")
        if kind != "model":
            held = Vocab.load(path / "vocab.json")
            name = name if name in held.spans else held.instance(kind)
            path = path / "tokenizers" / name
        known = info.get("training")
        training = known.get(name if kind != "model" else "model") if isinstance(known, dict) else {}
    vocab = Vocab.load(known_vocabulary(path)).to_manifest() if kind == "model" else None
    return _part_class(kind).from_pretrained(path), Origin(vocab, training if isinstance(training, dict) else {})


def _part_class(kind: str) -> type[Decoder] | type[TokenizerLike]:
    return Decoder if kind == "model" else modality_of(kind).tokenizer_class()


def _load_from_checkpoint(kind: str, path: Path, trust: bool) -> tuple[Decoder | Tokenizer, Origin]:
    """The same from a checkpoint of a training run."""
    checkpoint = load_checkpoint(path, trust)
    described = checkpoint.get("unitok", {}) if isinstance(checkpoint, dict) else {}
    wanted = "decoder" if kind == "model" else f"{kind} tokenizer"
    if described.get("kind") != wanted:
        raise UserError(f"{path}: a checkpoint of {described.get('kind') or 'another program'}, not of a {wanted}")
    part_class = _part_class(kind)
    assert issubclass(part_class, Decoder | Tokenizer)  # no other kind has checkpoints
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
    return part.prepare_for_inference(), Origin(described["part"].get("vocab"), training_facts(path, described))


def make_bundle(
    out: Path,
    paths: Mapping[str, Path],
    trust: bool = False,
    overwrite: bool = False,
    kinds: Mapping[str, str] | None = None,
    add: Iterable[str] = (),
    scores: Json = None,
    generation_config: Path | None = None,
    delayed: Iterable[str] = (),
    levels: Mapping[str, int] | None = None,
    tokenizers: Path | None = None,
) -> Bundle:
    """Put parts into a bundle, or add them to one that is there. New tokenizers make a new vocabulary; a decoder must have been
    trained on exactly the bundle's. A decoder that comes as a bundle brings its tokenizers; others are added to its vocabulary, and the
    decoder gets rows for their tokens (`Decoder.grown`).

    Args:
        out: the bundle's folder.
        paths: of parts by name: a tokenizer's, or `model`; each as for `load_trained_part`.
        trust: as for `load_trained_part`. add: kinds whose tokenizers have no weights.
        overwrite: replace whatever is at `out`, and leave out a decoder that was trained with other tokenizers.
        kinds: kinds of content of the tokenizers whose names are not their kinds.
        scores: how the bundle was measured, for its model card. Older ones are dropped where parts are new.
        generation_config: a JSON file that says how the bundle is sampled where a call does not.
        delayed: tokenizers whose level k is written k frames late (MusicGen's pattern); one that replaces another is named again.
        levels: of audio tokenizers among `paths`: how many of the first levels are used.
        tokenizers: a bundle whose tokenizers and vocabulary a new one begins with.

    Errors: `UserError` where something else is at `out`, for a delayed tokenizer that has one level or stands in the bundle without delay, for
    levels that a tokenizer does not have, or where a decoder would lose a tokenizer that it was trained with.
    """
    out, kinds = Path(out), dict(kinds or {})
    check_replaceable(out, "bundle", overwrite)
    old = Bundle.from_pretrained(out) if kind_of(out) == "bundle" else None
    for name, kind in kinds.items():
        _check_name(name, kind, old)
    if old and tokenizers:
        raise UserError(f"{out}: has tokenizers; choose another folder to begin with those of {tokenizers}")
    begin = Bundle.from_pretrained(tokenizers, parts="tokenizers") if tokenizers else None
    base = old or begin or (_bundle_of(paths["model"]) if "model" in paths else None)  # whose tokens keep their numbers
    if base:
        kinds = {name: span.kind for name, span in base.vocab.spans.items()} | kinds
    loaded = {name: load_trained_part(kinds.get(name, name), path, trust, name) for name, path in paths.items()}
    _keep_levels(loaded, levels or {})
    given = {name: part for name, (part, _) in loaded.items() if not isinstance(part, Decoder)}
    ordered = _ordered((base.tokenizers if base else {}) | given, add, kinds)
    model = loaded["model"][0] if "model" in loaded else old.model if old else None
    assert model is None or isinstance(model, Decoder)
    if not ordered and model is None:
        raise UserError("nothing to put into the bundle: give a tokenizer or a decoder")
    vocab, changed = _vocab_for(ordered, kinds, base, list(delayed))
    if old and old.model is not None and (changed or ("model" not in paths and vocab.size != old.vocab.size)):
        if not overwrite:
            other = f"another {changed[0]} tokenizer" if changed else f"{old.vocab.size} ids, not {vocab.size}"
            remedy = "choose another folder, or overwrite to leave it out"
            raise UserError(f"{out}: holds a decoder that was trained with {other}; {remedy}")
        model = model if "model" in paths else None
    if "model" in loaded and not ordered:
        remedy = "give the bundle that made its data as tokenizers (--tokenizers)"
        raise UserError(f"{out}: no tokenizers in it for the decoder {paths['model']}; {remedy}")
    if "model" in loaded and (trained_on := loaded["model"][1].vocab):
        vocab.check_covers(Vocab.from_manifest(trained_on), "the bundle", str(paths["model"]))
        assert model is not None
        model = _with_rows(model, vocab.size)
    bundle = Bundle(vocab, ordered, model, base.generation_config if base and base is not begin else None)
    bundle.facts = _facts(bundle, old, {name: origin for name, (_, origin) in loaded.items()}, scores)
    bundle.generation_config = _read_config(generation_config, bundle) if generation_config else bundle.generation_config
    bundle.save_pretrained(out, overwrite=True)
    return bundle


def _ordered(tokenizers: Mapping[str, TokenizerLike], add: Iterable[str], kinds: Mapping[str, str]) -> dict[str, TokenizerLike]:
    """Tokenizers, and those without weights of the kinds `add`, in the order of the kinds."""
    plain = {kind: _plain(kind, settings) for kind, _, settings in (given.partition(":") for given in add)}
    named = {**tokenizers, **plain}
    return {name: named[name] for name in sorted(named, key=lambda name: list(modalities()).index(kinds.get(name) or name))}


def _keep_levels(loaded: dict[str, tuple[Any, Origin]], levels: Mapping[str, int]) -> None:
    """Replace audio tokenizers by those of their first levels. Errors: `UserError` for names that are not loaded."""
    for name, count in levels.items():
        first_levels = getattr(loaded[name][0], "first_levels", None) if name in loaded else None
        if first_levels is None:
            raise UserError(f"levels: {name!r} is not among the audio tokenizers that are given")
        loaded[name] = first_levels(count), loaded[name][1]


def _with_rows(model: Decoder, size: int) -> Decoder:
    """Return a decoder with rows for all tokens of a vocabulary."""
    if model.config.vocab_size >= size:
        return model
    log.warning("the decoder gets rows for %d new tokens: train it on documents with them", size - model.config.vocab_size)
    return model.grown(size)


def _bundle_of(decoder: Path) -> Bundle | None:
    """Return the tokenizers and vocabulary that a decoder's folder has, where it is a bundle."""
    return Bundle.from_pretrained(decoder, parts="tokenizers") if kind_of(Path(decoder)) == "bundle" else None


def _read_config(file: Path, bundle: Bundle) -> GenerationConfig:
    """Return the config in a file. Errors: `UserError` that names the file, also for what this bundle has not."""
    config = GenerationConfig.from_pretrained(file)
    combine([(str(file), config)], {name: span.kind for name, span in bundle.vocab.spans.items()})
    try:
        parse_plan(str(config.modalities), bundle.vocab, bundle.rates)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def _facts(bundle: Bundle, old: Bundle | None, origins: Mapping[str, Origin], scores: Json) -> dict[str, Json]:
    """What `bundle.json` says of the training of each part that is there, and the scores; where no part is new, also all else that it said."""
    if old is not None and not origins and bundle.parts == old.parts:
        return old.facts | ({"scores": scores} if scores else {})
    before = old.facts.get("training") if old else None
    training: dict[str, Json] = dict(before) if isinstance(before, dict) else {}
    training |= {name: dict(origin.training) for name, origin in origins.items()}
    facts: dict[str, Json] = {
        "training": {name: training[name] for name in bundle.parts if training.get(name)},
        "scores": scores,
    }
    return {key: value for key, value in facts.items() if value}


def _check_name(name: str, kind: str, old: Bundle | None) -> None:
    """Raise `UserError` for a name that a tokenizer of a kind cannot have."""
    taken = name in ("model", "decoder", "vocab", "tokenizers", "generation_config", "facts") or hasattr(Bundle, name)
    reserved = [*modalities(), *(f.name for f in fields(GenerationConfig))]
    if not name.isidentifier() or taken or (name != kind and name in reserved):
        raise UserError(f"{name!r} cannot be the name of a tokenizer for {kind}; choose another word")
    if old and name in old.vocab.spans and old.vocab.spans[name].kind != kind:
        raise UserError(f"{name!r} is a tokenizer for {old.vocab.spans[name].kind} in the bundle; choose another name")


def _plain(kind: str, settings: str) -> Plain:
    """A tokenizer without weights, with settings such as `bins=64` in the place of the usual ones. Errors: `UserError`."""
    tokenizer = modality_of(kind).untrained()
    if not isinstance(tokenizer, Plain):
        raise UserError(f"{kind}: its tokenizer has weights; give one, as {kind}=PATH")
    config = dict(tokenizer.config)
    numbers = [name for name, value in config.items() if isinstance(value, int)]
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.partition("=")
        if name not in numbers or not value.isdigit() or int(value) < 1:
            known = ", ".join(numbers) or "none"
            raise UserError(f"{kind}: {setting!r} is no setting; write NAME=NUMBER, at least 1, with a name of: {known}")
        config[name] = int(value)
    return type(tokenizer)(kind, **config)


def _vocab_for(
    tokenizers: Mapping[str, TokenizerLike], kinds: Mapping[str, str], old: Bundle | None, delayed: Sequence[str]
) -> tuple[Vocab, list[str]]:
    """The old vocabulary, extended, where none of its tokenizers has changed, else a new one; and the names of the changed ones."""
    bind(tokenizers)
    spans = old.vocab.spans if old else {}
    for name in delayed:
        if name not in tokenizers:
            raise UserError(f"delayed: no tokenizer {name!r} in the bundle; it has {', '.join(tokenizers)}")
        if getattr(tokenizers[name], "num_codebooks", 1) < 2:
            raise UserError(f"delayed: {name} has one level of codes, which nothing can be later than")
    changed = [n for n, part in tokenizers.items() if n in spans and spans[n].fingerprint not in ("", part.fingerprint())]
    layouts = {name: span.layout for name, span in spans.items() if name not in changed} | dict.fromkeys(delayed, "delayed")
    if old is None or changed:
        return build_vocab(tokenizers, kinds, layouts=layouts), changed
    if fixed := [name for name in delayed if name in spans and spans[name].layout != "delayed"]:
        raise UserError(f"delayed: the codes of {fixed[0]} have their order in the bundle already; choose another folder")
    return build_vocab({name: part for name, part in tokenizers.items() if name not in spans}, kinds, old.vocab, layouts), []


def make_untrained(
    out: Path, preset: str = "tiny", seed: int = 0, overwrite: bool = False, generation_config: Path | None = None
) -> Bundle:
    """Write and return a bundle of text, images and audio with random weights, for trials and tests. Errors: as of `Bundle.save_pretrained`."""
    import torch

    from unitok.model.decoder import Decoder, DecoderConfig

    if preset != "tiny":
        raise UserError(f"preset {preset!r}: choose tiny")
    check_replaceable(out, "bundle", overwrite)
    torch.manual_seed(seed)
    made = {kind: modality.untrained() for kind, modality in modalities().items()}
    tokenizers = {kind: one for kind, one in made.items() if not isinstance(one, Plain)}
    vocab = build_vocab(tokenizers)
    decoder = Decoder(
        DecoderConfig(vocab.size, 64, 2, 128, num_attention_heads=2, num_key_value_heads=1, head_dim=32, span_positions=32)
    ).eval()
    for name, weight in decoder.named_parameters():  # weights that training starts at zero
        if name.endswith(("lm_head.weight", "o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.1)
    bundle = Bundle(vocab, tokenizers, decoder)
    if generation_config is not None:
        bundle.generation_config = _read_config(generation_config, bundle)
    bundle.save_pretrained(out, overwrite)
    return bundle
