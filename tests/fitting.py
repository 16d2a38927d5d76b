"""What the tests of training share: the command line of a small run, its weights, batches that go wrong."""

from pathlib import Path

import torch

from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.configs import CONFIGS


def arguments(kind: str, out: Path, data: Path, steps: int, *more: str) -> list[str]:
    small = {
        "image": ["--model.init_args.gan.start", "0.3", "--model.init_args.tokenizer.encoder", "vqgan"],
        "audio": ["--model.init_args.tokenizer.n_filters", "16", "--model.init_args.tokenizer.encoder", "seanet"],
        "decoder": ["--model.init_args.decoder.hidden_size", "32", "--model.init_args.decoder.num_hidden_layers", "1"],
    }[kind]
    if kind != "decoder":
        small += ["--model.init_args.quantize_start", "0.2"]
    else:
        small += ["--model.init_args.muon_every", "1"]
        small += ["--model.init_args.decoder.dropout", "0.1"]  # so that random state matters
        small += ["--data.init_args.sequence_length", "192"]
    return [
        *("fit", "--config", str(CONFIGS / "scenes" / f"{kind}.yaml"), "--out", str(out), "--data.init_args.path", str(data)),
        *("--model.init_args.minutes", "null", "--model.init_args.steps", str(steps), "--data.init_args.batch_size", "4"),
        *("--trainer.enable_progress_bar", "false", "--model.init_args.log_every", "1", *small, *more),
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(out)
    assert newest is not None
    return load_checkpoint(newest)["state_dict"]


class Poisoned:
    """Makes the hidden states of some steps' forward passes NaN."""

    def __init__(self, monkeypatch, steps: set[int]):
        from unitok.model.decoder import Decoder

        self.calls, real = 0, Decoder.hidden

        def hidden(decoder, *arguments, **more):
            self.calls += 1
            found = real(decoder, *arguments, **more)
            return found * float("nan") if self.calls in steps else found

        monkeypatch.setattr(Decoder, "hidden", hidden)
