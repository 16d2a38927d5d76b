"""Samples of a decoder while it trains, on disk and in TensorBoard."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from unitok.bundle import Bundle
from unitok.checkpoints import merge_lora
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig, Values
from unitok.modalities import types_of
from unitok.model import Decoder
from unitok.sample.outputs import Output, save_outputs
from unitok.sample.prompts import read_prompts
from unitok.sample.requests import config_for, generate_outputs
from unitok.training.decoder import DecoderTraining
from unitok.vocab import Vocab

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SHOWN = 4  # outputs of each page that TensorBoard gets

#: Outputs by the name of their page, and scores by name.
Made = tuple[dict[str, list[Output]], dict[str, float]]


class Samples(L.Callback):
    """Sample at intervals and at the end of the training, with the present weights or, where one is kept, their average.

    Writes `samples/step=N/` in the run's folder, with a page for each modality. Does not use the training's random numbers.

    Args:
        bundle: folder with the tokenizers that the data was made with.
        prompts: interleaved JSON Lines.
        modalities: those with which each prompt is continued; default: all of the bundle.
        every_minutes: minutes of training between samples.
        number: how many prompts to use, from the first on.
        seed: of sampling; default: that of `generation_config`, else the bundle's, else 0.
        max_new_tokens: most new tokens per output; default: the bundle's, else 512.
        generation_config: how to sample, over the bundle's own: fields of `unitok.GenerationConfig`, such as `image: {temperature: 0.5}`. `modalities` and
            `n` are not among them.
    """

    def __init__(
        self,
        bundle: str,
        prompts: str,
        *,
        modalities: list[str] | None = None,
        every_minutes: float = 1.0,
        number: int = 16,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        generation_config: Values | None = None,
    ):
        if every_minutes <= 0 or number < 1:
            raise UserError(f"{type(self).__name__}: every_minutes must be above 0 and number at least 1")
        self.folder, self.prompts, self.modalities = Path(bundle), Path(prompts), modalities
        self.every_minutes, self.number = every_minutes, number
        where = f"{type(self).__name__}: generation_config"
        config = GenerationConfig.from_dict({} if generation_config is None else generation_config, where)
        if fixed := config.given().keys() & {"modalities", "n"}:
            raise UserError(f"{where}: {min(fixed)} is set by the callback: an output per prompt and page; leave it out")
        own = {"seed": seed, "max_new_tokens": max_new_tokens}
        self.config = config.replace(**{name: value for name, value in own.items() if value is not None})
        self._bundle: Bundle | None = None  # in the first process
        self._last = 0.0  # seconds of training at the last samples
        self._sampled = 0  # step of the last samples

    # ---- Sampling ------------------------------------------------------------------------------------------------

    def read(self, vocab: Vocab) -> None:
        """Read the prompts. Errors: `UserError`."""
        self._raws = read_prompts(self.prompts, types=types_of(vocab))[: self.number]

    def make(self, bundle: Bundle, out: Path) -> Made:
        """Sample from a bundle and write pages into a folder. Returns outputs and scores by name."""
        made, prompts, config = {}, [bundle.read_raw(raw) for raw in self._raws], config_for(bundle, self.config)
        for name in self.modalities or bundle.vocab.spans:
            made[name] = generate_outputs(bundle, prompts, config.replace(modalities=name, n=1))
            save_outputs(made[name], out / name, name)
        return made, {}

    # ---- Hooks ---------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Read tokenizers and prompts, so mistakes show before the training starts."""
        if not isinstance(module, DecoderTraining):
            raise UserError("Samples: it samples from a decoder; tokenizers save reconstructions without it")
        checked = Bundle.from_pretrained(self.folder, parts=[])  # all processes check, so that all stop
        config_for(checked, self.config)
        vocab = checked.vocab
        vocab.check_covers(module.data.vocab, str(self.folder), str(module.data.path))
        if vocab.size != module.data.vocab.size:
            raise UserError(
                f"{self.folder}: {vocab.size} tokens, the data has {module.data.vocab.size}: give the bundle it was made with"
            )
        if unknown := [name for name in self.modalities or () if name not in vocab.spans]:
            raise UserError(f"Samples: modalities: {unknown[0]!r} is none of {', '.join(vocab.spans)}")
        self.read(vocab)
        if trainer.is_global_zero:
            with torch.random.fork_rng(devices=[]):  # new networks draw random weights before they load them
                self._bundle = Bundle.from_pretrained(self.folder, str(module.device), parts="tokenizers")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        assert isinstance(module, DecoderTraining)
        self._last = module.budget.elapsed

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *batch: object) -> None:
        """Sample if it is time."""
        assert isinstance(module, DecoderTraining)
        if module.now - self._last >= 60 * self.every_minutes:
            self._sample(trainer, module)
            self._last = module.now

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Sample from the final weights."""
        assert isinstance(module, DecoderTraining)
        if module.steps_done != self._sampled:
            self._sample(trainer, module)

    def _sample(self, trainer: L.Trainer, module: DecoderTraining) -> None:
        self._sampled = step = module.steps_done
        with weights_of(module) as decoder:
            if self._bundle is None or decoder is None:
                return  # the first process samples
            bundle = Bundle(self._bundle.vocab, self._bundle.tokenizers, decoder, self._bundle.generation_config)
            made, scores = self.make(bundle, Path(trainer.default_root_dir) / "samples" / f"step={step}")
            for logger in trainer.loggers:
                logger.log_metrics({f"sample/{name}": value for name, value in scores.items()}, step=step)
            for board in module.boards:
                for name, outputs in made.items():
                    for i, output in enumerate(outputs[:SHOWN]):
                        _show(board, f"{name}/{i}", output, step)


@contextlib.contextmanager
def weights_of(module: DecoderTraining) -> Iterator[Decoder | None]:
    """The decoder to sample from, in eval mode, in the first process; None in the others. A sharded one is gathered into a copy."""
    decoder = module.averaged(module.decoder)
    assert isinstance(decoder, Decoder)
    training = decoder.training
    if any(isinstance(p, DTensor) for p in decoder.parameters()):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_model_state_dict(decoder, options=options)  # all processes take part, the first gets it
        state = {name: value for name, value in gathered.items() if isinstance(value, Tensor)}
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


def _show(board: "SummaryWriter", tag: str, output: Output, step: int) -> None:
    """Write the first content of each modality to TensorBoard, as text, image or audio."""
    names = [segment.modality for segment in output.new.segments]
    for name in dict.fromkeys(names):
        content = output.content(names.index(name))
        output.bundle.modality(name).log(board, tag, output.bundle.require(name), content, step)
