"""What a decoder makes while it trains, to look at and to listen to: on the disk and in TensorBoard."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.distributed.tensor import DTensor

from unitok.api import Unitok
from unitok.checkpoints import merge_lora
from unitok.errors import UserError
from unitok.model import Decoder
from unitok.sample.outputs import Output, save_outputs
from unitok.sample.prompts import read_prompts
from unitok.sample.requests import Task, generate_outputs
from unitok.sample.sampling import Settings
from unitok.scenes.evaluate import Evaluation
from unitok.scenes.world import read_scenes
from unitok.training.decoder import DecoderTraining
from unitok.vocab import Vocab


class Samples(L.Callback):
    """Samples at intervals, and at the end, with the weights of the moment (their average, where there is one).

    Given in YAML or as `--trainer.callbacks+=unitok.scenes.watch.Samples --trainer.callbacks.bundle BUNDLE …`. Writes
    `samples/step=N/` in the run's folder, with a page for each direction. Draws no random numbers of the training's.

    Args:
        bundle: folder with the tokenizers that the data was made with.
        scenes: folder made by `unitok scenes`: samples in every direction, with the oracle's scores; or
        prompts: interleaved JSON Lines; each is continued by a text, a picture and a sound, as far as the bundle has them.
        every_minutes: of training, between two times. number: scenes or prompts. seed: of sampling.
        temperature: of pictures and sounds; text takes the likeliest. guidance: of pictures.
        max_ids: most new ids an output.
    """

    def __init__(
        self,
        bundle: str,
        scenes: str | None = None,
        prompts: str | None = None,
        every_minutes: float = 1.0,
        number: int = 16,
        seed: int = 0,
        temperature: float = 0.4,
        guidance: float = 1.5,
        max_ids: int = 512,
    ):
        if (scenes is None) == (prompts is None):
            raise UserError("Samples: give either scenes or prompts")
        if every_minutes <= 0 or number < 1:
            raise UserError("Samples: every_minutes must be above 0 and number at least 1")
        self.bundle, self.scenes, self.prompts = bundle, scenes, prompts
        self.every_minutes, self.number, self.seed, self.max_ids = every_minutes, number, seed, max_ids
        self.settings = {
            "text": Settings(temperature=0.0),
            "image": Settings(temperature, top_p=0.95, guidance=guidance),
            "audio": Settings(temperature, top_p=0.95),
        }
        self._unitok: Unitok | None = None
        self._last = 0.0
        self._sampled = 0  # step

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Read tokenizers and prompts, so that a mistake shows before the training does."""
        if not isinstance(module, DecoderTraining):
            raise UserError("Samples: it samples from a decoder; tokenizers show reconstructions by themselves")
        vocab = Vocab.load(Path(self.bundle) / "vocab.json")  # all processes look, so that all stop
        vocab.check_covers(module.data.vocab, self.bundle, str(module.data.path))
        if vocab.size != module.data.vocab.size:
            raise UserError(
                f"{self.bundle}: {vocab.size} ids, the data has {module.data.vocab.size}: give the bundle it was made with"
            )
        self._read()
        if trainer.is_global_zero:
            with torch.random.fork_rng(devices=[]):  # new networks draw their weights before they read them
                self._unitok = Unitok.from_pretrained(self.bundle, str(module.device), parts="tokenizers")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *batch: Any) -> None:
        """Sample if it is time."""
        due = trainer.strategy.broadcast(time.monotonic() - self._last >= 60 * self.every_minutes)
        if due and isinstance(module, DecoderTraining):
            self._sample(trainer, module)
            self._last = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Sample from what was learnt."""
        if isinstance(module, DecoderTraining) and module.steps_done != self._sampled:
            self._sample(trainer, module)

    def _read(self) -> None:
        if self.prompts:
            self._raws = read_prompts(Path(self.prompts))[: self.number]
            return
        self._rows = read_scenes(Path(self.scenes or ""))[: self.number]

    def _sample(self, trainer: L.Trainer, module: DecoderTraining) -> None:
        self._sampled = module.steps_done
        with weights_of(module) as decoder:
            if self._unitok is None or decoder is None:
                return  # another process does it
            self._unitok.model = decoder
            step, out = module.steps_done, Path(trainer.default_root_dir) / "samples" / f"step={module.steps_done}"
            scores, outputs = self._score(out) if self.scenes else ({}, self._continue(out))
            for logger in trainer.loggers:
                logger.log_metrics({f"sample.{name}": value for name, value in scores.items()}, step=step)
                if isinstance(logger, TensorBoardLogger):
                    show(logger.experiment, outputs, step, self._unitok)
            self._unitok.model = None

    def _score(self, out: Path) -> tuple[dict[str, float], dict[str, list[Output]]]:
        assert self._unitok is not None
        assert self.scenes is not None
        evaluation = Evaluation(self._unitok, out, self.seed, self.settings)
        evaluation.budget = self.max_ids
        evaluation.generate(Path(self.scenes), self._rows)
        return evaluation.scores, evaluation.kept

    def _continue(self, out: Path) -> dict[str, list[Output]]:
        unitok, found = self._unitok, {}
        assert unitok is not None
        prompts = [unitok.read_raw(raw) for raw in self._raws]
        for want in unitok.vocab.spans:
            found[want] = generate_outputs(unitok, prompts, Task(want, 1, self.seed, self.max_ids, self.settings))
            save_outputs(found[want], out / want, want)
        return found


@contextlib.contextmanager
def weights_of(module: DecoderTraining) -> Iterator[Decoder | None]:
    """The decoder to sample from, in eval mode; of a sharded one a whole copy in the first process, None in the others."""
    decoder = module.averaged(module.decoder)
    training = decoder.training
    if any(isinstance(p, DTensor) for p in decoder.parameters()):
        state = {}
        for name, tensor in decoder.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # all processes take part
            if module.trainer.is_global_zero:
                state[name] = whole.cpu()
        if module.lora is not None:
            state = merge_lora(state, module.lora.alpha / module.lora.rank)
        yield Decoder.from_state(module.config, state, "the run").to(module.device) if module.trainer.is_global_zero else None
        return
    decoder.eval()
    stance = torch.compiler.set_stance("force_eager") if module.compiles else contextlib.nullcontext()
    try:
        with stance:
            yield decoder if module.trainer.is_global_zero else None
    finally:
        decoder.train(training)


def show(board: Any, outputs: dict[str, list[Output]], step: int, unitok: Unitok, most: int = 4) -> None:
    """Put the first outputs of each direction into TensorBoard, as what they are."""
    for name, made in outputs.items():
        for i, output in enumerate(made[:most]):
            tag = f"{name}/{i}"
            if output.text:
                board.add_text(tag, output.text, step)
            for pixels in output.images[:1]:
                board.add_image(tag, ((pixels.clamp(-1, 1) + 1) / 2).cpu(), step)
            for samples in output.audios[:1]:
                board.add_audio(tag, samples.mean(0).clamp(-1, 1).cpu(), step, unitok.require("audio").sample_rate)
