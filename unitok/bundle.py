"""A bundle: a folder with what is needed to use a model, and the library's front door, `Unitok`.

    bundle.json   vocab.json   tokenizers/{text,image,audio}/   model/

Any part may be missing: with tokenizers alone a bundle tokenizes, with a decoder it generates.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError, first_line, read_json
from unitok.modalities import build_vocab
from unitok.pretrained import check_replaceable, kind_of, known_vocabulary, load_state, make_config, settle, whole_folder
from unitok.vocab import Vocab

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from unitok.model import Decoder
    from unitok.sample.render import Output, Score, Task
    from unitok.sample.stream import Piece
    from unitok.tokenizers import AudioTokenizer, ImageTokenizer, TextTokenizer

VERSION = 1
TOKENIZERS = ("text", "image", "audio")

#: One piece of a prompt: str (text), Path (a file), PIL.Image, (waveform [C, T], Hz), or a Document.
PromptPart = Any


class Unitok:
    """Vocabulary, tokenizers and decoder together. Parts that a bundle lacks are None."""

    def __init__(
        self,
        vocab: Vocab,
        text: "TextTokenizer | None" = None,
        image: "ImageTokenizer | None" = None,
        audio: "AudioTokenizer | None" = None,
        model: "Decoder | None" = None,
    ):
        self.vocab, self.text, self.image, self.audio, self.model = vocab, text, image, audio, model
        for name in TOKENIZERS:
            part = getattr(self, name)
            if part is not None and vocab.span(name).fingerprint not in ("", part.fingerprint()):
                raise UserError(f"the {name} tokenizer is not the one that the vocabulary was made for; build the bundle again")
        if model is not None and model.config.vocab_size != vocab.size:
            raise UserError(
                f"the decoder has {model.config.vocab_size} ids, the vocabulary {vocab.size}: they do not belong together"
            )

    # ---- Loading and saving --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu", parts: Sequence[str] = (*TOKENIZERS, "model")) -> "Unitok":
        """Read a bundle, in eval mode; `parts` limits what is loaded. Errors: `UserError` naming what is wrong."""
        path = Path(path)
        settle(path)
        info = read_json(path / "bundle.json", "make a bundle with `unitok bundle`", "version", "parts")
        if info["version"] != VERSION:
            raise UserError(f"{path}: a bundle of version {info['version']}; this unitok reads version {VERSION}")
        for where, names in (
            ("parts", [parts] if isinstance(parts, str) else parts),
            (f"{path / 'bundle.json'}", info["parts"]),
        ):
            if not isinstance(names, list | tuple) or any(name not in (*TOKENIZERS, "model") for name in names):
                raise UserError(f"{where}: {names!r}; parts are text, image, audio and model")
        wanted = [name for name in info["parts"] if name in parts]
        loaded = {name: _part_class(name).from_pretrained(path, device=device) for name in wanted}
        return cls(Vocab.load(path / "vocab.json"), **loaded)

    def save_pretrained(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a bundle, whole or not at all. Inverse of `from_pretrained`.

        Another bundle, or anything else, that lies at `path` is replaced only with `overwrite`; files in a bundle that unitok did
        not write stay. Errors: `UserError` that names what lies there.
        """
        present = [name for name in (*TOKENIZERS, "model") if getattr(self, name) is not None]
        with whole_folder(path, "bundle", overwrite) as partial:
            for name in present:
                getattr(self, name).save_pretrained(partial / ("model" if name == "model" else f"tokenizers/{name}"))
            self.vocab.save(partial / "vocab.json")
            (partial / "bundle.json").write_text(json.dumps({"version": VERSION, "parts": present}, indent=1) + "\n")

    def need(self, name: str) -> Any:
        """A part that must be there; errors: `UserError` saying how to add it."""
        part = getattr(self, name)
        if part is None:
            flag = "decoder" if name == "model" else name
            raise UserError(f"the bundle has no {flag}; add one with `unitok bundle BUNDLE --{flag} PATH`")
        return part

    # ---- Content <-> documents -----------------------------------------------------------------------------------

    def read_part(self, part: PromptPart, role: str = "none", loss: bool = True) -> list[Segment]:
        """One piece of a prompt -> its segments (a Document may hold several)."""
        from PIL.Image import Image as PILImage

        from unitok.sample import prompts

        if isinstance(part, Document):
            return list(part.segments)
        if isinstance(part, RawDocument):
            return list(self.read_raw(part).segments)
        if isinstance(part, str):
            if not part:
                raise UserError("an empty text in the prompt; leave it out")
            prompts.hint_at_file(part)
            return [Segment("text", self.need("text").encode(part), role, loss)]
        if isinstance(part, Path):
            return [self._read_file(part, role, loss)]
        if isinstance(part, PILImage):
            return [self._read_picture(part, role, loss)]
        if isinstance(part, tuple) and len(part) == 2:
            return [self._read_sound(*part, role, loss)]
        raise prompts.refuse(part)

    def _read_file(self, path: Path, role: str, loss: bool, kind: str = "") -> Segment:
        """An image or sound; kind: which of them it is to be, where a document said that. Errors: `UserError`."""
        from unitok.media import sniff
        from unitok.sample.prompts import ReadFile

        if not path.is_file():
            raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        found = sniff(path)
        if found not in ("image", "audio"):
            raise UserError(f"{path}: neither an image nor a sound")
        if found != (kind or found):
            raise UserError(f"{path}: the part's type is {kind}, the file is {found}; give the type that it has")
        codes, size = self.need(found).encode_file(path)
        return Segment(found, codes.cpu().numpy(), role, loss, str(path) if kind else ReadFile(path), size)

    def _read_picture(self, image: "Image", role: str, loss: bool) -> Segment:
        tokenizer = self.need("image")
        try:
            pixels = tokenizer.prepare(image)
        except (OSError, SyntaxError) as error:  # Pillow reads a file's pixels only now
            raise UserError(f"a prompt's image: cannot be read ({first_line(error)}); replace it or leave it out") from None
        codes = tokenizer.encode(pixels[None])[0].cpu().numpy()
        return Segment("image", codes, role, loss, size=(pixels.shape[1], pixels.shape[2]))

    def _read_sound(self, samples: "Tensor", rate: int, role: str, loss: bool) -> Segment:
        tokenizer = self.need("audio")
        wave = tokenizer.prepare(samples, rate, "a prompt's sound")
        codes = tokenizer.encode(wave[None])[0].cpu().numpy()
        return Segment("audio", codes, role, loss, size=tokenizer.size(wave))

    def read_prompt(self, parts: PromptPart | Sequence[PromptPart]) -> Document:
        """A prompt's part, or its parts -> a Document."""
        from unitok.sample.prompts import batch_of

        batch = batch_of(parts)
        if len(batch) != 1:
            raise UserError(f"prompt: {len(batch)} lists of parts; read one after the other")
        return self._document(batch[0])

    def _document(self, parts: list[PromptPart]) -> Document:
        return Document(tuple(segment for part in parts for segment in self.read_part(part)))

    def read_raw(self, raw: RawDocument) -> Document:
        """A raw document (its files are read now) -> a Document. Errors: `UserError` for a file of another type than its part's."""
        segments: list[Segment] = []
        for part in raw.content:
            if part.path is None:
                segments += self.read_part(part.text, part.role, part.loss)
            else:
                segments.append(self._read_file(part.path, part.role, part.loss, part.type))
        return Document(tuple(segments), raw.id)

    def decode_segment(self, segment: Segment) -> Any:
        """Codes -> str, picture float [3, H, W] in [-1, 1], or sound float [C, T] in [-1, 1]."""
        import torch

        if segment.modality == "text":
            return self.need("text").decode(segment.codes.tolist())
        codes = torch.from_numpy(segment.codes)
        if segment.modality == "image":
            pixels = self.need("image").decode(codes[None])[0].cpu()
            height, width = segment.size or pixels.shape[-2:]
            return pixels[:, :height, :width]
        return self.need("audio").restore(codes, segment.size).cpu()

    def write_document(self, document: Document, folder: Path, name: str, contents: list[Any] | None = None) -> RawDocument:
        """Decode a Document into files `folder/NAME-0.png`, …; -> the raw document that names them.

        contents: its segments, where they have been decoded already.
        """
        from unitok.media import save_audio, save_image

        parts = []
        for i, segment in enumerate(document.segments):
            content = self.decode_segment(segment) if contents is None else contents[i]
            if segment.modality == "text":
                parts.append(Part("text", text=content, role=segment.role, loss=segment.loss))
                continue
            path = folder / f"{name}-{i}.{'png' if segment.modality == 'image' else 'wav'}"
            if segment.modality == "image":
                save_image(path, content)
            else:
                save_audio(path, content, self.need("audio").sample_rate)
            parts.append(Part(segment.modality, path=path, role=segment.role, loss=segment.loss))
        return RawDocument(document.id or name, tuple(parts))

    # ---- Generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: PromptPart | Sequence[PromptPart] | Sequence[Sequence[PromptPart]],
        want: str | Sequence[str] = "free",
        n: int = 1,
        seed: int = 0,
        max_ids: int = 512,
        settings: Any = None,
        batch_size: int = 64,
        progress: bool = False,
        negative: PromptPart | Sequence[PromptPart] | None = None,
        **more: Any,
    ) -> "list[Output]":
        """Continue prompts.

        Args:
            prompt: a part, the parts of one prompt in a list, or a list of such lists for a batch. A part is str (text),
                Path (a file), PIL.Image, (waveform [C, T], Hz) or Document. So `["A frog.", "A dog."]` is one prompt of two
                texts, and `[["A frog."], ["A dog."]]` are two prompts.
            want: `free`, or a plan such as `text,image:8x12,audio:2s` (rows x columns of codes), also as a list.
            n: outputs for each prompt. seed: the same seed gives the same outputs.
            max_ids: most new ids of each output.
            settings: `unitok.sample.sampling.Settings` for all, or by modality: `{"image": Settings(temperature=0.5)}`, where a
                dict may stand for them; default: temperature 1 and no filters.
            batch_size: outputs that are generated together.
            negative: parts of what guidance leads away from.
            more: `keep`, `best_of`, `best_by`, `jacobi` as in `unitok.sample.render.Task`.

        Returns:
            n Outputs for each prompt, in order.

        Errors: `UserError` that names the argument.
        """
        from unitok.sample.render import generate_outputs

        documents, task = self._task(prompt, negative, want=want, n=n, seed=seed, max_ids=max_ids, settings=settings, **more)
        return generate_outputs(self, documents, task, batch_size, progress)

    def stream(
        self,
        prompt: PromptPart | Sequence[PromptPart] | Sequence[Sequence[PromptPart]],
        want: str | Sequence[str] = "free",
        negative: PromptPart | Sequence[PromptPart] | None = None,
        batch_size: int = 64,
        **more: Any,
    ) -> "Iterator[Piece | Output]":
        """`generate` while it goes on: a `unitok.sample.stream.Piece` for each new piece of text, row of a picture and chunk of
        sound, and each whole Output after its last piece. Other arguments as for `generate`, without those for progress, the
        best of several and Jacobi decoding."""
        from unitok.sample.render import begin
        from unitok.sample.stream import stream

        documents, task = self._task(prompt, negative, want=want, **more)
        if task.best_of > 1 or task.jacobi:
            raise UserError("a stream cannot choose the best of several, nor guess ahead; leave out best_of and jacobi")
        return stream(self, begin(self, documents, task), task.settings, batch_size)

    def _task(self, prompt: Any, negative: Any, settings: Any = None, **more: Any) -> "tuple[list[Document], Task]":
        """Prompts as documents, and what to do with them."""
        from unitok.sample.prompts import batch_of, check_names, settings_of
        from unitok.sample.render import Task

        names = [f.name for f in fields(Task)]
        check_names(more, ["prompt", *names, "batch_size"], "generate")
        task = Task(settings=settings_of(settings, self.vocab.spans), **more)
        documents = [self._document(parts) for parts in batch_of(prompt)]
        return documents, task if negative is None else replace(task, negative=self.read_prompt(negative))

    def score(self, documents: "Sequence[Document | PromptPart | Sequence[PromptPart]]") -> "list[Score]":
        """How likely documents are, segment by segment: `unitok.sample.render.Score`. A part, or a list of parts, stands for the
        document of them."""
        from unitok.sample.prompts import is_part
        from unitok.sample.render import score_documents

        several = [documents] if is_part(documents) else list(documents)
        return score_documents(self, [d if isinstance(d, Document) else self.read_prompt(d) for d in several])


def _part_class(name: str) -> Any:
    if name == "model":
        from unitok.model import Decoder

        return Decoder
    import unitok.tokenizers as tokenizers

    return getattr(tokenizers, f"{name.capitalize()}Tokenizer")


# ---- Making bundles -------------------------------------------------------------------------------------------------


def load_trained_part(name: str, path: Path, trust: bool = False) -> tuple[Any, dict[str, Any]]:
    """A part from its own folder, a bundle, a run's folder (its newest checkpoint) or a checkpoint; and the checkpoint's
    description of it. Errors: `UserError` naming the path."""
    from unitok.checkpoints import is_sharded, load_checkpoint, merge_lora, newest_checkpoint

    path = Path(path)
    settle(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir() and (path / "checkpoints").is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path / 'checkpoints'}: no checkpoint there")
        path = newest
    if path.is_dir() and not is_sharded(path):
        if name != "model":
            return _part_class(name).from_pretrained(path), {}
        known = Vocab.load(known_vocabulary(path)).to_manifest()
        return _part_class(name).from_pretrained(path), {"vocab": known}
    checkpoint = load_checkpoint(path, trust)
    described = checkpoint.get("unitok", {}) if isinstance(checkpoint, dict) else {}
    kind = "decoder" if name == "model" else f"{name} tokenizer"
    if described.get("kind") != kind:
        raise UserError(f"{path}: a checkpoint of {described.get('kind') or 'another program'}, not of a {kind}")
    part = _build_part(name, described["part"]["config"])
    prefix = "decoder." if name == "model" else "tokenizer."
    if any(k.startswith("average.model.") for k in checkpoint["state_dict"]):
        prefix = "average.model."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    if "lora_scale" in described["part"]:
        state = merge_lora(state, described["part"]["lora_scale"])
    load_state(part, state, str(path))
    if any(name.endswith("initted") and not bool(value) for name, value in part.state_dict().items()):
        raise UserError(f"{path}: its codebook has not started yet (quantize_from); train longer")
    return (part.for_use() if name == "audio" else part.eval()), described["part"]


def _build_part(name: str, config: dict[str, Any]) -> Any:
    from unitok.model.decoder import Decoder, DecoderConfig
    from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig, ImageTokenizer, ImageTokenizerConfig

    if name == "model":
        return Decoder(make_config(DecoderConfig, config, "the checkpoint"))
    if name == "image":
        return ImageTokenizer(make_config(ImageTokenizerConfig, config, "the checkpoint"))
    return AudioTokenizer(make_config(AudioTokenizerConfig, config, "the checkpoint"))


def make_bundle(out: Path, paths: dict[str, Path], trust: bool = False, overwrite: bool = False) -> Unitok:
    """Put parts into a bundle, or add them to one that is there; -> it. `paths`: by `text`, `image`, `audio`, `model`.

    New tokenizers make a new vocabulary; a decoder must have been trained on exactly the bundle's. Files in the bundle that unitok
    did not write stay. Errors: `UserError` where something else lies at `out`, or where a decoder would lose a tokenizer that it
    was trained with; with `overwrite` the one is replaced, and the other left out.
    """
    out = Path(out)
    check_replaceable(out, "bundle", overwrite)
    old = Unitok.from_pretrained(out) if kind_of(out) == "bundle" else None
    parts: dict[str, Any] = {name: getattr(old, name) if old else None for name in (*TOKENIZERS, "model")}
    described: dict[str, Any] = {}
    for name, path in paths.items():
        parts[name], described[name] = load_trained_part(name, path, trust)
    if all(part is None for part in parts.values()):
        raise UserError("nothing to put into the bundle: give --text, --image, --audio or --decoder")
    vocab, changed = _vocab_for(parts, old), _changed(parts, old)
    if old and old.model is not None and (changed or ("model" not in paths and vocab.size != old.vocab.size)):
        if not overwrite:
            without = f"another {changed[0]} tokenizer" if changed else f"{old.vocab.size} ids, not {vocab.size}"
            raise UserError(
                f"{out}: holds a decoder that was trained with {without}; choose another folder, or overwrite to leave it out"
            )
        parts["model"] = parts["model"] if "model" in paths else None
    trained_on = described.get("model", {}).get("vocab")
    if trained_on:
        vocab.check_covers(Vocab.from_manifest(trained_on), "the bundle", str(paths["model"]))
    bundle = Unitok(vocab, **parts)
    bundle.save_pretrained(out, overwrite=True)
    return bundle


def _changed(parts: dict[str, Any], old: Unitok | None) -> list[str]:
    """The tokenizers that are others than those that the old vocabulary was made for."""
    spans = old.vocab.spans if old else {}
    given = {name: parts[name] for name in TOKENIZERS if parts[name] is not None and name in spans}
    return [name for name, part in given.items() if spans[name].fingerprint not in ("", part.fingerprint())]


def _vocab_for(parts: dict[str, Any], old: Unitok | None) -> Vocab:
    """The old vocabulary, extended, where all of its tokenizers are still the same; else a new one."""
    tokenizers = {name: parts[name] for name in TOKENIZERS if parts[name] is not None}
    if old is None or _changed(parts, old):
        return build_vocab(tokenizers)
    return build_vocab({n: part for n, part in tokenizers.items() if n not in old.vocab.spans}, onto=old.vocab)


def make_untrained(out: Path, preset: str = "tiny", seed: int = 0, overwrite: bool = False) -> Unitok:
    """A whole bundle with random weights, for trials and tests. Errors: as `Unitok.save_pretrained`'s."""
    import torch

    from unitok.model.decoder import Decoder, DecoderConfig
    from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig, ImageTokenizer, ImageTokenizerConfig, TextTokenizer

    if preset != "tiny":
        raise UserError(f"--untrained {preset}: choose tiny")
    check_replaceable(out, "bundle", overwrite)
    torch.manual_seed(seed)
    text = TextTokenizer.train(["a small text about nothing much, to have a few pieces"], size=300)
    image = ImageTokenizer(ImageTokenizerConfig(ch=64, ch_mult=(1,), z_channels=16, resolution=32, codebook_size=64))
    audio = AudioTokenizer(AudioTokenizerConfig(n_filters=16, dimension=32, codebook_size=32, codebook_dim=8))
    with torch.no_grad():  # codebooks begin with what the networks give for noise, so that many codes occur
        pixels, samples = torch.randn(16, 3, 32, 32).clamp(-1, 1), torch.randn(16, 1, 8000).clamp(-1, 1)
        seen: dict[Any, Any] = {
            image: image.encoder(pixels).movedim(1, -1).flatten(1, 2),
            audio: audio.encoder(samples).movedim(1, -1),
        }
    for tokenizer, latents in seen.items():
        tokenizer.train()
        low = tokenizer.quantizer.pass_through(latents).low
        assert low is not None
        tokenizer.quantizer.start(low)
        tokenizer.eval()
    vocab = build_vocab({"text": text, "image": image, "audio": audio})
    decoder = Decoder(
        DecoderConfig(vocab.size, 64, 2, 128, num_attention_heads=2, num_key_value_heads=1, head_dim=32, places=32)
    ).eval()
    for name, weight in decoder.named_parameters():  # what training begins with at zero: the head, and what blocks add
        if name.endswith(("lm_head.weight", "o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.1)
    bundle = Unitok(vocab, text, image, audio, decoder)
    bundle.save_pretrained(out, overwrite)
    return bundle


def describe(unitok: Unitok) -> dict[str, Any]:
    """What a bundle holds, for `unitok inspect`."""
    out: dict[str, Any] = {"ids": unitok.vocab.size}
    for name in (*TOKENIZERS, "model"):
        part = getattr(unitok, name)
        if part is None:
            continue
        if name == "text":
            out[name] = {"pieces": part.size}
        else:
            out[name] = {"parameters": sum(p.numel() for p in part.parameters())} | asdict(part.config)
    return out
