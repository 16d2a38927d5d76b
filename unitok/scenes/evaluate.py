"""What `unitok eval` measures on scenes: the oracle reads originals, reconstructions and generated files.

A score is the fraction of files, 0 to 1, in which everything named is right. `attributes`: background, layout, and color, shape
and size of every object. `colors`: the colors of the objects, in order. `notes`: number, order, pitch and timbre. `exact`: the
text, after parsing. `drawn`: the caption of an image that the bundle drew, given its pixels. Endings of names: `.composed` and
`.systematic` for the folds that are kept out of training; `.one`, `.two`, `.three` for scenes of so many objects;
`conversation.KIND` for turns of conversations; `.best_of_4` for the best of four outputs by the pointwise mutual information with the
prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from unitok.api import Unitok
from unitok.bundle import Bundle
from unitok.data.prepare.encode import Encoder
from unitok.document import Document, Part, RawDocument, Segment
from unitok.errors import UserError, check_range
from unitok.files import write_json
from unitok.generation_config import FILE, GenerationConfig, combine
from unitok.grammar import Grammar
from unitok.media import load_audio, load_image, open_image, save_audio, save_image
from unitok.sample.outputs import Output, save_outputs
from unitok.sample.requests import edit_plan, generate_outputs
from unitok.scenes import EDITING, SAMPLING
from unitok.scenes.conversations import MOST_TURNS, Turn, draw_conversation
from unitok.scenes.evaluate_tasks import TaskEvaluation
from unitok.scenes.files import SceneRow, read_scenes
from unitok.scenes.oracle import read_audio, read_image, same_colors, same_notes, to_bytes
from unitok.scenes.world import COUNTS, Fold, parse_audio_caption, parse_caption

SHOWN = 12  # samples of each direction that are kept as files

#: Scores by name; several numbers for a score of each codebook.
Scores = dict[str, float | list[float]]
Key = Literal["caption", "audio_caption", "image", "audio", "question"]


def _shows_scene(output: Output, row: SceneRow, rate: int) -> bool:
    return read_image(to_bytes(output.images[0])) == row["scene"]


def _sounds_as_scene(output: Output, row: SceneRow, rate: int) -> bool:
    return same_notes(read_audio(output.audios[0].cpu().numpy(), rate), row["scene"])


def _answers(output: Output, row: SceneRow, rate: int) -> bool:
    return output.text.strip().rstrip(".").strip() == row["answer"]


def _is_right(output: Output, turn: Turn, rate: int) -> bool:
    """Whether an answer is the right one of a turn. rate: of the audio, Hz."""
    if turn.modality == "text":
        return output.text.strip() == turn.answer
    if turn.modality == "image":
        return read_image(to_bytes(output.images[0])) == turn.scene
    return same_notes(read_audio(output.audios[0].cpu().numpy(), rate), turn.scene)


@dataclass(frozen=True)
class Direction:
    """One task: what is given and what is generated.

    given: keys of a scene's row, whose contents make the prompt. modalities: what to generate. right: whether an output is right,
    given the row and the sample rate of its audio in Hz. score: name of the score.
    """

    name: str
    score: str
    given: tuple[Key, ...]
    modalities: str
    right: Callable[[Output, SceneRow, int], bool]


DIRECTIONS = (
    Direction("text_to_image", "attributes", ("caption",), "image", _shows_scene),
    Direction("image_to_text", "exact", ("image",), "text", lambda o, r, _: parse_caption(o.text) == r["scene"]),
    Direction("text_to_audio", "notes", ("audio_caption",), "audio", _sounds_as_scene),
    Direction("audio_to_text", "exact", ("audio",), "text", lambda o, r, _: parse_audio_caption(o.text) == r["scene"].notes()),
    Direction("image_to_audio", "notes", ("image",), "audio", _sounds_as_scene),
    Direction("questions", "exact", ("image", "question"), "text", _answers),
)


class Evaluation:
    """Measures one bundle; its methods add to `scores`. out: folder for samples; seed, config: of sampling."""

    def __init__(self, unitok: Unitok, out: Path, seed: int, config: GenerationConfig, progress: bool = False):
        self.unitok, self.out, self.seed, self.config, self.progress = unitok, out, seed, config, progress
        self.scores: Scores = {}
        self.malformed = 0  # outputs that the grammar refuses
        self.kept: dict[str, list[Output]] = {}  # the first outputs of each direction
        self.encoder = Encoder(unitok)
        self.grammar = Grammar(unitok.vocab)
        self.max_new_tokens = 256  # set from the originals

    def reconstruct(self, folder: Path, rows: list[SceneRow]) -> None:
        """Score the originals, their reconstructions and the use of the codebooks; write a few pairs of files."""
        documents = self._documents(folder, rows, ("image", "audio"))
        image, audio = self.unitok.require("image"), self.unitok.require("audio")
        measures: list[dict[str, float]] = []
        pairs = self.out / "reconstructions"
        pairs.mkdir(parents=True, exist_ok=True)
        bar = tqdm(zip(rows, documents, strict=True), "reconstruct", len(rows), unit="scene", disable=not self.progress)
        for i, (row, document) in enumerate(bar):
            scene, pixels, (waveform, rate) = row["scene"], load_image(folder / row["image"]), load_audio(folder / row["audio"])
            new_pixels, new_waveform = (self.unitok.decode(s) for s in document.segments)
            image_target = image.prepare(open_image(folder / row["image"]))  # as the tokenizers see them
            audio_target = audio.prepare(waveform, rate)
            read = read_image(to_bytes(new_pixels))
            originals = read_image(to_bytes(pixels)) == scene, read_audio(waveform.numpy(), rate) == scene.notes()
            image_error = (new_pixels - image_target).square().mean()
            audio_error = (new_waveform - audio_target).square().mean()
            measures.append(
                {
                    "oracle.originals": sum(originals) / 2,
                    "reconstruction.image.colors": same_colors(read, scene),
                    "reconstruction.image.attributes": read == scene,
                    "reconstruction.image.psnr_db": -10 * float(torch.log10(image_error / 4 + 1e-10)),
                    "reconstruction.audio.notes": same_notes(read_audio(new_waveform.numpy(), audio.sample_rate), scene),
                    "reconstruction.audio.snr_db": 10
                    * float(torch.log10(audio_target.square().mean() / (audio_error + 1e-10))),
                }
            )
            if i < SHOWN:
                save_image(pairs / f"{i:02d}-original.png", pixels)
                save_image(pairs / f"{i:02d}-reconstruction.png", new_pixels)
                save_audio(pairs / f"{i:02d}-original.wav", waveform, rate)
                save_audio(pairs / f"{i:02d}-reconstruction.wav", new_waveform, audio.sample_rate)
        self.max_new_tokens = 2 * max(len(self.unitok.vocab.encode(d)) for d in documents)
        self.scores |= {name: float(np.mean([m[name] for m in measures])) for name in measures[0]}
        image_codes = np.concatenate([d.segments[0].codes.reshape(-1) for d in documents])
        audio_codes = np.concatenate([d.segments[1].codes for d in documents], axis=1)
        self.scores["codebook.image.usage"] = len(np.unique(image_codes)) / image.codebook_size
        self.scores["codebook.audio.usage"] = [len(np.unique(level)) / audio.codebook_size for level in audio_codes]

    def generate(self, folder: Path, rows: list[SceneRow], ending: str = "", best_of: int = 1) -> None:
        """Score every direction on `rows`, and apart from one another those of one, two and three objects.

        ending: is added to the names of the scores. best_of: keep the best of so many outputs.
        """
        self.scores[f"scenes{ending}"] = len(rows)
        for count, of_count in self._by_count(rows, [True] * len(rows)).items():
            self.scores[f"scenes.{count}{ending}"] = len(of_count)
        for direction in DIRECTIONS:
            outputs, right = self.outputs(direction, folder, rows, ending, best_of)
            self._score(f"generation.{direction.name}.{direction.score}", ending, right, rows)
            if direction.modalities == "image":
                self._describe_drawn(outputs, rows, ending, best_of)
        self._interleaved(folder, rows, ending, best_of)

    def outputs(
        self, direction: Direction, folder: Path, rows: list[SceneRow], ending: str = "", best_of: int = 1
    ) -> tuple[list[Output], list[bool]]:
        """The output of each row in one direction, and whether it is right; the first ones are kept as files."""
        name, rate = f"{direction.name}{ending}", self.unitok.require("audio").sample_rate
        prompts = self._documents(folder, rows, direction.given)
        outputs = self.continue_from(prompts, direction.modalities, name, best_of=best_of)
        right = [direction.right(output, row, rate) for output, row in zip(outputs, rows, strict=True)]
        self.save_samples(name, outputs, right)
        return outputs, right

    def _describe_drawn(self, drawn: list[Output], rows: list[SceneRow], ending: str = "", best_of: int = 1) -> None:
        """Score descriptions of the images that the bundle drew, which must say what the oracle sees: each is read from its bytes, whose
        codes are not all those that were drawn."""
        images = [to_bytes(output.images[0]) for output in drawn]
        prompts = [self.unitok.read_prompt(image.round().astype(np.uint8)) for image in images]
        texts = self.continue_from(prompts, "text", f"describe_drawn{ending}", best_of=best_of)
        seen = [read_image(image) for image in images]
        right = [scene is not None and parse_caption(o.text) == scene for o, scene in zip(texts, seen, strict=True)]
        self._score("generation.image_to_text.drawn", ending, right, rows)

    def _score(self, name: str, ending: str, right: list[bool], rows: list[SceneRow]) -> None:
        """Add the fraction of right outputs, over all and by the number of objects of each row."""
        self.scores[f"{name}{ending}"] = float(np.mean(right))
        for count, of_count in self._by_count(rows, right).items():
            self.scores[f"{name}.{count}{ending}"] = float(np.mean(of_count))

    def _by_count(self, rows: list[SceneRow], values: list[bool]) -> dict[str, list[bool]]:
        """The values of rows by their number of objects, where there are several numbers."""
        found: dict[str, list[bool]] = {}
        for row, value in sorted(zip(rows, values, strict=True), key=lambda pair: len(pair[0]["scene"].objects)):
            found.setdefault(COUNTS[len(row["scene"].objects) - 1], []).append(value)
        return found if len(found) > 1 else {}

    def _interleaved(self, folder: Path, rows: list[SceneRow], ending: str = "", best_of: int = 1) -> None:
        """Score documents of caption, image, caption, image: each image must fit the caption right before it."""
        name = f"interleaved{ending}"
        others = rows[1:] + rows[:1]
        first = self.continue_from(self._documents(folder, rows, ("caption",)), "image", name, 1, best_of)
        texts = self._documents(folder, others, ("caption",))
        prompts = [Document(o.document.segments + t.segments) for o, t in zip(first, texts, strict=True)]
        second = self.continue_from(prompts, "image", name, 2, best_of)
        right = [_shows_scene(o, r, 0) for o, r in zip(first + second, rows + others, strict=True)]
        self.save_samples(name, second, [a and b for a, b in zip(right[: len(rows)], right[len(rows) :], strict=True)])
        self._score("generation.interleaved.attributes", ending, right, rows + others)

    def conversations(self, folder: Path, rows: list[SceneRow], ending: str = "") -> None:
        """Score the turns of a conversation about each row, by their kind. The history is what the bundle itself said before.

        A conversation ends early where the decoder is too short for its next turn. ending: is added to the names of the scores.
        """
        rate = self.unitok.require("audio").sample_rate
        fold = rows[0]["scene"].fold()
        talks = [
            draw_conversation(row["scene"], np.random.default_rng((self.seed, i)), lambda scene: scene.fold() == fold)
            for i, row in enumerate(rows)
        ]
        images = self._documents(folder, rows, ("image",))
        histories: list[tuple[Segment, ...]] = [()] * len(rows)
        right: dict[str, list[bool]] = {}
        model = self.unitok.require("model")
        room = model.config.max_position_embeddings - max(len(self.unitok.vocab.encode(image)) for image in images)
        for number in range(MOST_TURNS):
            for plan in dict.fromkeys(("text", "image", edit_plan(self.config), "audio")):
                of_kind = [i for i, t in enumerate(talks) if len(t) > number and self._plan_of(t[number]) == plan]
                for i in of_kind:
                    turn = talks[i][number]
                    shown = [replace(s, role="user") for s in images[i].segments] if turn.shown else []
                    histories[i] += (*shown, *self.unitok.read(Part("text", turn.text, role="user")))
                for i in [i for i in of_kind if len(self.unitok.vocab.encode(Document(histories[i]))) > room]:
                    talks[i] = talks[i][:number]
                    of_kind.remove(i)
                prompts = [Document(histories[i]) for i in of_kind]
                name = f"conversation_{number + 1}_{plan.replace(',', '_')}{ending}"
                outputs = self.continue_from(prompts, plan, name, number, turn=True) if prompts else []
                for i, output in zip(of_kind, outputs, strict=True):
                    histories[i] += output.new.segments
                    turn = talks[i][number]
                    right.setdefault(turn.kind, []).append(_is_right(output, turn, rate))
        for kind, values in right.items():
            self.scores[f"generation.conversation.{kind}{ending}"] = float(np.mean(values))
            self.scores[f"turns.{kind}{ending}"] = len(values)

    def _plan_of(self, turn: Turn) -> str:
        return edit_plan(self.config) if turn.kind == "change" else turn.modality

    def _documents(self, folder: Path, rows: list[SceneRow], keys: Sequence[Key]) -> list[Document]:
        """A document for each row, of what its keys name: files of the folder, or texts."""

        def part(row: SceneRow, key: Key) -> Part:
            return Part(key, path=folder / row[key]) if key in ("image", "audio") else Part("text", row[key])

        raws = [RawDocument(row["id"], tuple(part(row, key) for key in keys)) for row in rows]
        documents, errors = self.encoder.encode(raws)
        if errors:
            raise UserError(f"{folder}: {errors[0]['error']}")
        return documents

    def continue_from(
        self,
        prompts: list[Document],
        modalities: str,
        name: str,
        seed: int = 0,
        best_of: int = 1,
        turn: bool = False,
        config: GenerationConfig | None = None,
    ) -> list[Output]:
        """Continue each prompt once, with the parameters of `config` (default: of the evaluation). name: for the progress. turn: as the
        assistant's turn of a conversation."""
        if self.progress:
            print(f"generate {name} ({len(prompts)})", flush=True)
        config = (config or self.config).replace(
            modalities=modalities,
            n=1,
            seed=self.seed + seed,
            max_new_tokens=self.max_new_tokens,
            best_of=best_of,
            rank_by="pmi",
        )
        outputs = generate_outputs(self.unitok, prompts, config, batch_size=200, turn=turn)
        self.malformed += sum(not self._well_formed(o, turn) for o in outputs)
        return outputs

    def _well_formed(self, output: Output, turn: bool = False) -> bool:
        vocab = self.unitok.vocab
        role = [vocab.specials["<assistant>"]] if turn else []
        ids = np.concatenate([vocab.encode(output.prompt, eos=False), np.array(role, np.int64), output.ids])
        if ids[-1] in vocab.roles:  # the next turn's
            ids = ids[:-1]
        if ids[-1] != vocab.eos:
            ids = np.append(ids, vocab.eos)
        try:
            self.grammar.check(ids)
        except UserError:
            return False
        return bool(np.array_equal(vocab.encode(output.document), ids))

    def save_samples(self, name: str, outputs: list[Output], right: list[bool]) -> None:
        """Keep the first outputs as files, with which of them are right."""
        folder = self.out / "samples" / name
        self.kept[name] = outputs[:SHOWN]
        save_outputs(outputs[:SHOWN], folder, name.replace("_", " "))
        write_json(folder / "right.json", [bool(r) for r in right[:SHOWN]])


def config_of_scenes(bundle: Bundle, config: GenerationConfig, edited: str = "") -> GenerationConfig:
    """The parameters of `config`, else those of the bundle, else those of the demo. edited: see `combine`."""
    tokenizers = {name: span.kind for name, span in bundle.vocab.spans.items()}
    sampling = {kind: values for kind, values in SAMPLING.items() if kind in tokenizers.values()}
    demo = GenerationConfig(sampling=sampling, edit=EDITING)
    return combine([("", demo), (FILE, bundle.generation_config), ("", config)], tokenizers, edited)


def _sampling(guidance_scale: float | None, temperature: float | None) -> dict[str, dict[str, float]]:
    """Sampling parameters by kind, those that are given."""
    image = {"guidance_scale": guidance_scale, "temperature": temperature}
    given = {"image": image, "audio": {"temperature": temperature}}
    return {kind: {name: value for name, value in values.items() if value is not None} for kind, values in given.items()}


def evaluate_bundle(
    bundle: Path,
    scenes: Path,
    out: Path,
    count: int,
    seed: int,
    folds: Mapping[Fold, Path] = MappingProxyType({}),
    best_of: int = 1,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: bool = False,
) -> Scores:
    """Measure a bundle on scenes; writes `scores.json` and samples.

    Args:
        bundle: folder of the bundle.
        scenes: folder of scenes. Reconstructions and codebooks use all of them, generation the first `count`.
        out: folder to write.
        count: scenes for each direction.
        seed: of sampling.
        folds: folders of scenes of other folds, whose scores are reported apart; of tasks and conversations for those made with tasks.
        best_of: also score the best of so many outputs; 1: not.
        guidance_scale: of images. Default: the bundle's own, else the demo's.
        temperature: of images and audio. Default: the bundle's own, else the demo's.
        device: where the networks run. dtype: of the weights that generate, as for `Bundle.from_pretrained`.
        progress: print progress.

    Returns: scores by name.
    """
    check_range("count", count, 1)
    check_range("best_of", best_of, 1)
    unitok = Unitok.from_pretrained(bundle, device=device, dtype=dtype)
    rows = read_scenes(scenes, count)
    rows_of_folds = {fold: read_scenes(folder, count)[:count] for fold, folder in folds.items()}
    for fold, of_fold in rows_of_folds.items():
        if others := {row["scene"].fold() for row in of_fold} - {fold}:
            raise UserError(f"{folds[fold]}: has {others.pop()} scenes; make it with `unitok scenes OUT --fold {fold}`")
    asked = GenerationConfig(sampling=_sampling(guidance_scale, temperature))
    edited = config_of_scenes(unitok, asked, unitok.instance("image"))
    evaluation = Evaluation(unitok, Path(out), seed, config_of_scenes(unitok, asked), progress)

    def measure(folder: Path, rows: list[SceneRow], ending: str = "") -> None:
        evaluation.generate(folder, rows, ending)
        tasks = bool(rows[0]["boxes"])
        if "<assistant>" in unitok.vocab.specials and (tasks or not ending):
            evaluation.conversations(folder, rows, ending)
        if "box" in unitok.vocab.spans and tasks:
            TaskEvaluation(evaluation, folder, rows, edited, ending).run()

    evaluation.reconstruct(scenes, rows)
    measure(scenes, rows[:count])
    if best_of > 1:
        evaluation.generate(scenes, rows[:count], f".best_of_{best_of}", best_of)
    for fold, rows_of_fold in rows_of_folds.items():
        measure(folds[fold], rows_of_fold, f".{fold}")
    evaluation.scores["malformed"] = evaluation.malformed
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "scores.json", evaluation.scores)
    return evaluation.scores


def interval(fraction: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a fraction of `count` trials (Wilson 1927), in [0, 1]."""
    z, n = 1.96, max(count, 1)
    middle = (fraction + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (fraction * (1 - fraction) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def print_scores(scores: Mapping[str, float | list[float]]) -> None:
    """Print scores as a table."""
    for name, value in sorted(scores.items()):
        shown = (
            ", ".join(f"{v:.3f}" for v in value)
            if isinstance(value, list)
            else f"{value:.3f}"
            if isinstance(value, float)
            else str(value)
        )
        print(f"{name:<56}{shown:>10}")
