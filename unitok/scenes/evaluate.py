"""What `unitok eval` measures on scenes: the oracle's reading of originals, reconstructions and generations.

A score is the share of files, 0 to 1, in which all is right: of `attributes` background, layout and every thing's color, shape
and size; of `colors` the things' in order; of `notes` number, order, pitch and timbre; `exact` compares what is parsed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from unitok.api import Unitok
from unitok.bundle import Bundle
from unitok.data.prepare.encode import Encoder
from unitok.document import Document, Part, RawDocument
from unitok.errors import UserError
from unitok.files import write_json
from unitok.generation_config import FILE, GenerationConfig, combine
from unitok.grammar import Grammar
from unitok.media import load_audio, load_image, open_image, save_audio, save_image
from unitok.sample.outputs import Output, save_outputs
from unitok.sample.requests import generate_outputs
from unitok.scenes import SAMPLING
from unitok.scenes.oracle import read_picture, read_sound
from unitok.scenes.world import Note, Scene, parse_caption, parse_sound_caption, read_scenes

SHOWN = 12  # samples of each direction that are kept as files


def same_notes(read: tuple[Note, ...], scene: Scene) -> bool:
    """Number, order, pitch and timbre of all notes."""
    return [(n.pitch, n.timbre) for n in read] == [(n.pitch, n.timbre) for n in scene.notes()]


def same_colors(read: Scene | None, scene: Scene) -> bool:
    """The things' colors, in order."""
    return read is not None and [t.color for t in read.things] == [t.color for t in scene.things]


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """float [3, H, W] in [-1, 1] -> float [H, W, 3] in [0, 255], as the oracle reads it."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).cpu().numpy()


def _shows_scene(output: Output, row: dict, rate: int) -> bool:
    return read_picture(to_bytes(output.images[0])) == row["scene"]


def _sounds_as_scene(output: Output, row: dict, rate: int) -> bool:
    return same_notes(read_sound(output.audios[0].cpu().numpy(), rate), row["scene"])


def _answers(output: Output, row: dict, rate: int) -> bool:
    return output.text.strip().rstrip(".").strip() == row["answer"]


@dataclass(frozen=True)
class Direction:
    """One way between modalities. given: keys of a scene's row that make the prompt; modalities: the plan of outputs.

    right: whether an output is right, given its row and the rate of its audio in Hz.
    """

    name: str
    score: str
    given: tuple[str, ...]
    modalities: str
    right: Callable[[Output, dict, int], bool]


DIRECTIONS = (
    Direction("text_to_image", "attributes", ("caption",), "image", _shows_scene),
    Direction("image_to_text", "exact", ("image",), "text", lambda o, r, _: parse_caption(o.text) == r["scene"]),
    Direction("text_to_audio", "notes", ("sound_caption",), "audio", _sounds_as_scene),
    Direction("audio_to_text", "exact", ("audio",), "text", lambda o, r, _: parse_sound_caption(o.text) == r["scene"].notes()),
    Direction("image_to_audio", "notes", ("image",), "audio", _sounds_as_scene),
    Direction("questions", "exact", ("image", "question"), "text", _answers),
)


class Evaluation:
    """Measures one bundle; `scores` fills up as it goes. out: folder for samples; seed, config: of sampling."""

    def __init__(self, unitok: Unitok, out: Path, seed: int, config: GenerationConfig, progress: bool = False):
        self.unitok, self.out, self.seed, self.config, self.progress = unitok, out, seed, config, progress
        self.scores: dict[str, Any] = {"malformed": 0}
        self.kept: dict[str, list[Output]] = {}  # a few outputs of each direction
        self.encoder = Encoder(unitok)
        self.grammar = Grammar(unitok.vocab)
        self.budget = 256  # ids a generation may take; set from the originals

    def reconstruct(self, folder: Path, rows: list[dict]) -> None:
        """Oracle on the originals and on their reconstructions; use of the codebooks; a few pairs as files."""
        documents = self._documents(folder, rows, ("image", "audio"))
        image, audio = self.unitok.require("image"), self.unitok.require("audio")
        measures: list[dict[str, float]] = []
        pairs = self.out / "reconstructions"
        pairs.mkdir(parents=True, exist_ok=True)
        bar = tqdm(zip(rows, documents, strict=True), "reconstruct", len(rows), unit="scene", disable=not self.progress)
        for i, (row, document) in enumerate(bar):
            scene, picture, (sound, rate) = row["scene"], load_image(folder / row["image"]), load_audio(folder / row["audio"])
            again, heard = (self.unitok.decode(s) for s in document.segments)
            target = image.prepare(open_image(folder / row["image"]))  # as the tokenizers saw them
            wave = audio.prepare(sound, rate)
            read = read_picture(to_bytes(again))
            originals = read_picture(to_bytes(picture)) == scene, read_sound(sound.numpy(), rate) == scene.notes()
            error, noise = (again - target).square().mean(), (heard - wave).square().mean()
            measures.append(
                {
                    "oracle.originals": sum(originals) / 2,
                    "reconstruction.image.colors": same_colors(read, scene),
                    "reconstruction.image.attributes": read == scene,
                    "reconstruction.image.psnr_db": -10 * float(torch.log10(error / 4 + 1e-10)),
                    "reconstruction.audio.notes": same_notes(read_sound(heard.numpy(), audio.sample_rate), scene),
                    "reconstruction.audio.snr_db": 10 * float(torch.log10(wave.square().mean() / (noise + 1e-10))),
                }
            )
            if i < SHOWN:
                save_image(pairs / f"{i:02d}-original.png", picture)
                save_image(pairs / f"{i:02d}-again.png", again)
                save_audio(pairs / f"{i:02d}-original.wav", sound, rate)
                save_audio(pairs / f"{i:02d}-again.wav", heard, audio.sample_rate)
        self.budget = 2 * max(len(self.unitok.vocab.encode(d)) for d in documents)
        self.scores |= {name: float(np.mean([m[name] for m in measures])) for name in measures[0]}
        grids = np.concatenate([d.segments[0].codes.reshape(-1) for d in documents])
        frames = np.concatenate([d.segments[1].codes for d in documents], axis=1)
        self.scores["codebook.image.use"] = len(np.unique(grids)) / image.codebook_size
        self.scores["codebook.audio.use"] = [len(np.unique(level)) / audio.codebook_size for level in frames]

    def generate(self, folder: Path, rows: list[dict], suffix: str = "") -> None:
        """Every direction on `rows`; `suffix` is added to the names of the scores."""
        rate = self.unitok.require("audio").sample_rate
        for direction in DIRECTIONS:
            name = f"{direction.name}{suffix}"
            outputs = self._continue(self._documents(folder, rows, direction.given), direction.modalities, name)
            right = [direction.right(output, row, rate) for output, row in zip(outputs, rows, strict=True)]
            self._keep(name, outputs, right)
            self.scores[f"generation.{direction.name}.{direction.score}{suffix}"] = float(np.mean(right))
        self._interleaved(folder, rows, suffix)

    def _interleaved(self, folder: Path, rows: list[dict], suffix: str) -> None:
        """text -> picture, text -> picture: both pictures must fit the text right before them."""
        name = f"interleaved{suffix}"
        others = rows[1:] + rows[:1]
        first = self._continue(self._documents(folder, rows, ("caption",)), "image", name, seed=1)
        texts = self._documents(folder, others, ("caption",))
        prompts = [Document(o.document.segments + t.segments) for o, t in zip(first, texts, strict=True)]
        second = self._continue(prompts, "image", name, seed=2)
        right = [_shows_scene(o, r, 0) for o, r in zip(first + second, rows + others, strict=True)]
        self._keep(name, second, [a and b for a, b in zip(right[: len(rows)], right[len(rows) :], strict=True)])
        self.scores[f"generation.interleaved.attributes{suffix}"] = float(np.mean(right))

    def _documents(self, folder: Path, rows: list[dict], keys: Sequence[str]) -> list[Document]:
        """A document per row, of what stands under the keys: files of the folder, or texts."""

        def part(row: dict, key: str) -> Part:
            return Part(key, path=folder / row[key]) if key in ("image", "audio") else Part("text", row[key])

        raws = [RawDocument(row["id"], tuple(part(row, key) for key in keys)) for row in rows]
        documents, errors = self.encoder.encode(raws)
        if errors:
            raise UserError(f"{folder}: {errors[0]['error']}")
        return documents

    def _continue(self, prompts: list[Document], modalities: str, what: str, seed: int = 0) -> list[Output]:
        if self.progress:
            print(f"generate {what} ({len(prompts)})", flush=True)
        config = self.config.replace(modalities=modalities, n=1, seed=self.seed + seed, max_new_tokens=self.budget)
        outputs = generate_outputs(self.unitok, prompts, config, batch_size=200)
        self.scores["malformed"] += sum(not self._well_formed(o) for o in outputs)
        return outputs

    def _well_formed(self, output: Output) -> bool:
        vocab = self.unitok.vocab
        ids = np.concatenate([vocab.encode(output.prompt, eos=False), output.ids])
        if ids[-1] != vocab.eos:
            ids = np.append(ids, vocab.eos)
        try:
            self.grammar.check(ids)
        except UserError:
            return False
        return bool(np.array_equal(vocab.encode(output.document), ids))

    def _keep(self, name: str, outputs: list[Output], right: list[bool]) -> None:
        folder = self.out / "samples" / name
        self.kept[name] = outputs[:SHOWN]
        save_outputs(outputs[:SHOWN], folder, name.replace("_", " "))
        write_json(folder / "right.json", [bool(r) for r in right[:SHOWN]])


def config_of_scenes(bundle: Bundle, config: GenerationConfig) -> GenerationConfig:
    """A config over the bundle's own, and that over the demo's."""
    tokenizers = {name: span.kind for name, span in bundle.vocab.spans.items()}
    demo = GenerationConfig(sampling={kind: values for kind, values in SAMPLING.items() if kind in tokenizers.values()})
    return combine([("", demo), (FILE, bundle.generation_config), ("", config)], tokenizers)


def _sampling(guidance_scale: float | None, temperature: float | None) -> dict[str, Any]:
    image = {"guidance_scale": guidance_scale, "temperature": temperature}
    given = {"image": image, "audio": {"temperature": temperature}}
    return {kind: {name: value for name, value in values.items() if value is not None} for kind, values in given.items()}


def evaluate_bundle(
    bundle: Path,
    scenes: Path,
    held_out: Path | None,
    out: Path,
    count: int,
    seed: int,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a bundle; writes and returns the flat scores. Reconstructions and codebooks use all scenes of the folder.

    guidance_scale, temperature: of images, and of images and audio; None: the bundle's own, else the demo's.
    """
    unitok = Unitok.from_pretrained(bundle, device=device)
    rows = read_scenes(scenes, count)
    config = config_of_scenes(unitok, GenerationConfig(**_sampling(guidance_scale, temperature)))
    evaluation = Evaluation(unitok, Path(out), seed, config, progress)
    evaluation.reconstruct(scenes, rows)
    evaluation.generate(scenes, rows[:count])
    if held_out:
        evaluation.generate(held_out, read_scenes(held_out, count)[:count], ".held_out")
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "scores.json", evaluation.scores)
    return evaluation.scores


def print_scores(scores: dict[str, Any]) -> None:
    """A table for people."""
    for name, value in sorted(scores.items()):
        shown = ", ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:.3f}"
        print(f"{name:<48}{shown:>10}")
