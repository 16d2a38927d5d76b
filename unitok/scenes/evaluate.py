"""What `unitok eval` measures on scenes: the oracle's reading of originals, reconstructions and generations.

A score is a share of files, between 0 and 1, in which everything named is right: `attributes` is background, layout and
every thing's colour, shape and size; `colours` the things' colours in order; `notes` number, order, pitch and timbre of
all notes; `exact` compares parsed attributes, not spelling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from unitok.api import Unitok
from unitok.data.prepare.encode import Encoder
from unitok.document import Document, Part, RawDocument
from unitok.errors import UserError
from unitok.files import write_json
from unitok.grammar import Grammar
from unitok.media import load_audio, load_image, open_image, save_audio, save_image
from unitok.sample.defaults import settings_of
from unitok.sample.outputs import Output, save_outputs
from unitok.sample.requests import Task, generate_outputs
from unitok.sample.sampling import Settings
from unitok.scenes import SAMPLING
from unitok.scenes.oracle import read_picture, read_sound
from unitok.scenes.world import Note, Scene, parse_caption, parse_sound_caption, read_scenes

SHOWN = 12  # samples of each direction that are kept as files


def same_notes(read: tuple[Note, ...], scene: Scene) -> bool:
    """Number, order, pitch and timbre of all notes."""
    return [(n.pitch, n.timbre) for n in read] == [(n.pitch, n.timbre) for n in scene.notes()]


def same_colours(read: Scene | None, scene: Scene) -> bool:
    """The things' colours, in order."""
    return read is not None and [t.colour for t in read.things] == [t.colour for t in scene.things]


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """float [3, H, W] in [-1, 1] -> float [H, W, 3] in [0, 255], as the oracle reads it."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).cpu().numpy()


@dataclass
class Direction:
    """One way between modalities: its prompt, what is wanted, and when an output is right."""

    name: str
    score: str
    want: str
    prompt: Callable[[dict], list[Part]]
    right: Callable[[Output, dict], bool]


def _text(text: str) -> Part:
    return Part("text", text)


def _picture_right(output: Output, row: dict) -> bool:
    return read_picture(to_bytes(output.images[0])) == row["scene"]


def _sound_right(unitok: Unitok) -> Callable[[Output, dict], bool]:
    return lambda output, row: same_notes(
        read_sound(output.audios[0].cpu().numpy(), unitok.require("audio").sample_rate), row["scene"]
    )


def directions(unitok: Unitok, folder: Path) -> list[Direction]:
    """All single-step directions over the scenes of a folder."""

    def image(row: dict) -> Part:
        return Part("image", path=folder / row["image"])

    def audio(row: dict) -> Part:
        return Part("audio", path=folder / row["audio"])

    def question(row: dict) -> tuple[str, str]:
        asked = row["questions"]
        return asked[int(row["id"]) % len(asked)]

    return [
        Direction("text_to_image", "attributes", "image", lambda r: [_text(r["caption"])], _picture_right),
        Direction("image_to_text", "exact", "text", lambda r: [image(r)], lambda o, r: parse_caption(o.text) == r["scene"]),
        Direction("text_to_audio", "notes", "audio", lambda r: [_text(r["sound_caption"])], _sound_right(unitok)),
        Direction(
            "audio_to_text",
            "exact",
            "text",
            lambda r: [audio(r)],
            lambda o, r: parse_sound_caption(o.text) == r["scene"].notes(),
        ),
        Direction("image_to_audio", "notes", "audio", lambda r: [image(r)], _sound_right(unitok)),
        Direction(
            "questions",
            "exact",
            "text",
            lambda r: [image(r), _text(f" {question(r)[0]}")],
            lambda o, r: o.text.strip().rstrip(".").strip() == question(r)[1],
        ),
    ]


class Evaluation:
    """Measures one bundle; `scores` fills up as it goes."""

    def __init__(self, unitok: Unitok, out: Path, count: int, seed: int, settings: dict[str, Settings]):
        self.unitok, self.out, self.count, self.seed, self.settings = unitok, out, count, seed, settings
        self.scores: dict[str, Any] = {"malformed": 0}
        self.kept: dict[str, list[Output]] = {}  # a few outputs of each direction
        self.encoder = Encoder(unitok)
        self.grammar = Grammar(unitok.vocab)
        self.budget = 256  # ids a generation may take; set from the originals

    # ---- Tokenizers ----------------------------------------------------------------------------------------------

    def reconstruct(self, folder: Path, rows: list[dict]) -> None:
        """Oracle on the originals and on their reconstructions; use of the codebooks; a few pairs as files."""
        raws = [
            RawDocument(r["id"], (Part("image", path=folder / r["image"]), Part("audio", path=folder / r["audio"])))
            for r in rows
        ]
        documents, errors = self.encoder.encode(raws)
        if errors:
            raise UserError(f"{folder}: {errors[0]['error']}")
        image, audio = self.unitok.require("image"), self.unitok.require("audio")
        hits: dict[str, list[bool]] = {name: [] for name in ("originals", "colours", "attributes", "notes")}
        psnr, snr = [], []
        pairs = self.out / "reconstructions"
        pairs.mkdir(parents=True, exist_ok=True)
        for i, (row, document) in enumerate(tqdm(list(zip(rows, documents, strict=True)), desc="reconstruct", unit="scene")):
            picture, (sound, rate) = load_image(folder / row["image"]), load_audio(folder / row["audio"])
            scene = row["scene"]
            hits["originals"] += [
                read_picture(to_bytes(picture)) == scene,
                read_sound(sound.numpy(), rate) == scene.notes(),
            ]
            again, heard = (self.unitok.decode(s) for s in document.segments)
            read = read_picture(to_bytes(again))
            hits["colours"].append(same_colours(read, scene))
            hits["attributes"].append(read == scene)
            hits["notes"].append(same_notes(read_sound(heard.numpy(), audio.sample_rate), scene))
            target = image.prepare(open_image(folder / row["image"]))  # as the tokenizers saw them
            psnr.append(-10 * float(torch.log10((again - target).square().mean() / 4 + 1e-10)))
            wave = audio.prepare(sound, rate)
            snr.append(10 * float(torch.log10(wave.square().mean() / ((heard - wave).square().mean() + 1e-10))))
            if i < SHOWN:
                save_image(pairs / f"{i:02d}-original.png", picture)
                save_image(pairs / f"{i:02d}-again.png", again)
                save_audio(pairs / f"{i:02d}-original.wav", sound, rate)
                save_audio(pairs / f"{i:02d}-again.wav", heard, audio.sample_rate)
        self.budget = 2 * max(len(self.unitok.vocab.encode(d)) for d in documents)
        mean = {name: float(np.mean(values)) for name, values in hits.items()}
        grids = np.concatenate([d.segments[0].codes.reshape(-1) for d in documents])
        frames = np.concatenate([d.segments[1].codes for d in documents], axis=1)
        self.scores |= {
            "oracle.originals": mean["originals"],
            "reconstruction.image.colours": mean["colours"],
            "reconstruction.image.attributes": mean["attributes"],
            "reconstruction.image.psnr_db": float(np.mean(psnr)),
            "reconstruction.audio.notes": mean["notes"],
            "reconstruction.audio.snr_db": float(np.mean(snr)),
            "codebook.image.use": len(np.unique(grids)) / image.codebook_size,
            "codebook.audio.use": [len(np.unique(level)) / audio.codebook_size for level in frames],
        }

    # ---- Generations ---------------------------------------------------------------------------------------------

    def generate(self, folder: Path, rows: list[dict], suffix: str) -> None:
        """Every direction on `rows`; `suffix` is added to the names of the scores."""
        for direction in directions(self.unitok, folder):
            prompts = self._prompts(folder, [direction.prompt(row) for row in rows])
            outputs = self._continue(prompts, direction.want, f"{direction.name}{suffix}")
            right = [direction.right(o, row) for o, row in zip(outputs, rows, strict=True)]
            self._keep(f"{direction.name}{suffix}", outputs, right)
            self.scores[f"generation.{direction.name}.{direction.score}{suffix}"] = float(np.mean(right))
        self._interleaved(folder, rows, suffix)

    def _interleaved(self, folder: Path, rows: list[dict], suffix: str) -> None:
        """text -> picture, text -> picture: both pictures must fit the text right before them."""
        name = f"interleaved{suffix}"
        others = rows[1:] + rows[:1]
        first = self._continue(self._prompts(folder, [[_text(r["caption"])] for r in rows]), "image", name, seed=1)
        texts = self._prompts(folder, [[_text(r["caption"])] for r in others])
        prompts = [Document(o.document.segments + t.segments) for o, t in zip(first, texts, strict=True)]
        second = self._continue(prompts, "image", name, seed=2)
        right = [_picture_right(o, r) for o, r in zip(first, rows, strict=True)]
        right += [_picture_right(o, r) for o, r in zip(second, others, strict=True)]
        self._keep(name, second, [a and b for a, b in zip(right[: len(rows)], right[len(rows) :], strict=True)])
        self.scores[f"generation.interleaved.attributes{suffix}"] = float(np.mean(right))

    def _prompts(self, folder: Path, contents: list[list[Part]]) -> list[Document]:
        raws = [RawDocument(f"{i:06d}", tuple(content)) for i, content in enumerate(contents)]
        documents, errors = self.encoder.encode(raws)
        if errors:
            raise UserError(f"{folder}: {errors[0]['error']}")
        return documents

    def _continue(self, prompts: list[Document], want: str, what: str, seed: int = 0) -> list[Output]:
        print(f"generate {what} ({len(prompts)})", flush=True)
        outputs = generate_outputs(
            self.unitok, prompts, Task(want, 1, self.seed + seed, self.budget, self.settings), batch_size=200
        )
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


def evaluate_bundle(
    bundle: Path,
    scenes: Path,
    held_out: Path | None,
    out: Path,
    count: int,
    seed: int,
    guidance: float,
    temperature: float,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure a bundle; writes and returns the flat scores. Reconstructions and codebooks use all scenes of the folder."""
    unitok = Unitok.from_pretrained(bundle, device=device)
    image = SAMPLING["image"] | {"temperature": temperature, "guidance": guidance}
    settings = settings_of(unitok, SAMPLING | {"image": image, "audio": SAMPLING["audio"] | {"temperature": temperature}})
    rows = _rows(scenes, count)
    evaluation = Evaluation(unitok, Path(out), count, seed, settings)
    evaluation.reconstruct(scenes, rows)
    evaluation.generate(scenes, rows[:count], "")
    if held_out:
        evaluation.generate(held_out, _rows(held_out, count)[:count], ".held_out")
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "scores.json", evaluation.scores)
    return evaluation.scores


def _rows(folder: Path, count: int) -> list[dict]:
    if not (folder / "scenes.jsonl").exists():
        raise UserError(f"{folder}: no scenes there (no scenes.jsonl); make some with `unitok scenes`")
    rows = read_scenes(folder)
    if len(rows) < count:
        raise UserError(f"{folder}: {len(rows)} scenes, --count {count} asks for more")
    return rows


def print_scores(scores: dict[str, Any]) -> None:
    """A table for people."""
    for name, value in sorted(scores.items()):
        shown = ", ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:.3f}"
        print(f"{name:<48}{shown:>10}")
