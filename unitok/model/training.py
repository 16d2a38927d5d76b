"""Lightning shell that trains the decoder on packed batches.

The loss of a position is the cross-entropy over the ids that the grammar allows there (`loss_over="allowed"`) or over all
ids; legal sets reach the model as data (`unitok.model.loss`).
"""

import difflib
import fnmatch
import json
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.model.health import NormWatch
from unitok.model.loss import Loss, next_id_loss
from unitok.model.optim import build_optimizers
from unitok.training import TrainingShell, WeightAverage, check_same, warmup_linear

log = logging.getLogger("unitok")
SETTLED = 50  # steps after which the gradient's norm is known well enough to tell what is unusual
MOST_SKIPPED = 5  # batches in a row that may be skipped


def start_decoder(path: Path, wanted: DecoderConfig, manifest: dict[str, Any]) -> tuple[Decoder, int]:
    """A decoder to go on from, grown to `wanted.vocab_size` ids; -> it, and the first of its new ids.

    Its architecture stays; dropout, back end and checkpointed activations are the wanted ones. New ids begin with the mean of
    the embeddings and zeros in the head. Errors: `UserError` where what its ids mean is not what the data's mean.
    """
    old = Decoder.from_pretrained(path)
    known, size = path / "vocab.json", old.config.vocab_size
    if known.exists():
        ranges = json.loads(known.read_text())["ranges"]
        if ranges != json.loads(json.dumps(manifest["ranges"]))[: len(ranges)]:
            raise UserError(f"{path}: its vocabulary is no beginning of the data's: tokenize the data with this bundle")
    if size > wanted.vocab_size or (size < wanted.vocab_size and not known.exists()):
        raise UserError(
            f"{path}: a decoder of {size} ids, the data has {wanted.vocab_size}: tokenize with the bundle it belongs to"
        )
    free = ("vocab_size", "dropout", "attention", "checkpoint_activations")
    decoder = Decoder(replace(old.config, **{name: getattr(wanted, name) for name in free}))
    state = old.state_dict()
    for name, start in (("model.embed_tokens.weight", old.model.embed_tokens.weight.mean(0)), ("lm_head.weight", None)):
        new = state[name].new_zeros(wanted.vocab_size - size, state[name].shape[1])
        state[name] = torch.cat([state[name], new if start is None else new + start.detach()])
    decoder.load_state_dict(state)
    return decoder, size


def choose_trained(decoder: Decoder, freeze: list[str], new_ids_from: int | None = None) -> None:
    """Freeze parameters by patterns of their names; with `new_ids_from`, all but the rows of ids from there on."""
    names = [name for name, _ in decoder.named_parameters()]
    for pattern in freeze:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, 1, 0.0)[0]
            raise UserError(f"freeze {pattern!r}: no parameter of that name; the nearest is {near}")
    rows = ("model.embed_tokens.weight", "lm_head.weight")
    for name, p in decoder.named_parameters():
        if any(fnmatch.fnmatch(name, pattern) for pattern in freeze) or (new_ids_from is not None and name not in rows):
            p.requires_grad_(False)
        elif new_ids_from is not None:
            if new_ids_from >= len(p):
                raise UserError("only_new_ids: the data has no ids that the decoder of start_from does not know")
            p.register_hook(lambda g: torch.cat([torch.zeros_like(g[:new_ids_from]), g[new_ids_from:]]))
    if not any(p.requires_grad for p in decoder.parameters()):
        raise UserError(f"freeze {freeze}: nothing is left to train")


class DecoderTraining(TrainingShell):
    """Trains a decoder on a `TokenShards` data module, whose vocabulary it takes over.

    Args:
        decoder: architecture; `vocab_size` comes from the data.
        steps: length of the training in batches; or
        minutes: its length in minutes, which become steps after a short probe.
        optimizer: `muon` (Muon for the blocks' matrices, AdamW for the rest) or `adamw`.
        learning_rate: peak of AdamW. muon_rate: peak of Muon. Both are reached after `warmup_steps`, held for `hold` of
            the run, and fall linearly to a fiftieth. betas: AdamW's. weight_decay: on matrices.
        clip: largest norm of the gradient, 0 for none.
        z_loss: weight of the squared log-normaliser.
        loss_over: `allowed` (the ids that the grammar allows at each place) or `all`.
        compile: compile the blocks (torch.compile); the first steps then take a minute or more.
        ema_decay: of the moving average of the weights, which is what a bundle takes then; 0 for none.
        skip_above: a batch whose gradient's norm is not finite, or more than this many times the usual, is skipped and
            counted; after five in a row the run stops, with the last good checkpoint in place.
        start_from: a bundle or a decoder's folder, imported ones too, to take architecture and weights from. Its vocabulary
            must be the data's, or the beginning of it: rows of new ids are then added.
        freeze: patterns of parameter names that are not trained, as in `model.layers.*`.
        only_new_ids: train only the rows of embedding and head that were added (Chern et al. 2024, "ANOLE").
    """

    kind = "decoder"

    def __init__(
        self,
        decoder: DecoderConfig,
        steps: int | None = None,
        minutes: float | None = None,
        optimizer: Literal["muon", "adamw"] = "muon",
        learning_rate: float = 3e-3,
        muon_rate: float = 0.02,
        warmup_steps: int = 30,
        hold: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        clip: float = 1.0,
        z_loss: float = 1e-5,
        loss_over: Literal["allowed", "all"] = "allowed",
        compile: bool = False,
        ema_decay: float = 0.0,
        skip_above: float = 10.0,
        start_from: str | None = None,
        freeze: list[str] | None = None,
        only_new_ids: bool = False,
        log_every: int = 20,
    ):
        super().__init__(steps, minutes, log_every)
        self.config = decoder
        self.optimizer_name, self.rate, self.muon_rate = optimizer, learning_rate, muon_rate
        self.warmup_steps, self.hold, self.betas = warmup_steps, hold, (betas[0], betas[1])
        self.weight_decay, self.clip, self.z_loss, self.loss_over = weight_decay, clip, z_loss, loss_over
        self.compiles, self.ema_decay, self.skip_above = compile, ema_decay, skip_above
        self.start_from, self.frozen, self.only_new_ids = start_from, freeze or [], only_new_ids
        self.average: WeightAverage | None = None
        self.usual_norm = 0.0  # moving average of the gradient's norm
        self.skipped, self.skipped_in_a_row = 0, 0
        self._good_loss: Tensor | float = 0.0
        self.manifest: dict[str, Any] = {}

    def configure_model(self) -> None:
        """Build the decoder for the vocabulary of the data."""
        if hasattr(self, "decoder"):
            return
        data = self.data
        if not hasattr(data, "vocab"):
            raise UserError("the decoder trains on token shards: set data.class_path to unitok.data.module.TokenShards")
        vocab, grammar = data.vocab, data.training_data().grammar
        if self.config.vocab_size not in (0, vocab.size):
            raise UserError(
                f"model.decoder.vocab_size is {self.config.vocab_size}, the vocabulary of {data.path} has {vocab.size} ids: "
                "leave it out"
            )
        sets = [data.training_data(), data.validation_data()]
        longest, most = max(d.longest for d in sets if d), self.config.max_position_embeddings
        if longest > most:
            raise UserError(
                f"documents of up to {longest} ids, model.decoder.max_position_embeddings is {most}: raise it, or set "
                f"data.max_length to {most} or less"
            )
        self.manifest, self.legal_sets = vocab.to_manifest(), grammar.kinds
        #: What is logged apart: each modality, and each level of those that have several.
        self.names = {m: [(r.offset, r.stop) for r in vocab.body(m)] for m in vocab.spans}
        for modality in vocab.spans:
            body = vocab.body(modality)
            if len(body) > 1:
                self.names |= {f"{modality}_{level}": [(r.offset, r.stop)] for level, r in enumerate(body)}
        self.config = replace(self.config, vocab_size=vocab.size)
        if self.start_from:
            self.decoder, new = start_decoder(Path(self.start_from), self.config, self.manifest)
            self.config = self.decoder.config
        else:
            self.decoder, new = Decoder(self.config), 0
        choose_trained(self.decoder, self.frozen, new if self.only_new_ids else None)
        if self.ema_decay:
            self.average = WeightAverage(self.decoder, self.ema_decay)
        if self.compiles:
            for layer in self.decoder.model.layers:
                layer.compile(dynamic=False)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        decay = 0.0 if self.only_new_ids else self.weight_decay  # it would move the old rows, too
        return build_optimizers(self.decoder, self.optimizer_name, self.rate, self.muon_rate, self.betas, decay)

    def part(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "vocab": self.manifest}

    def check_part(self, part: dict[str, Any]) -> None:
        if part["vocab"] != self.manifest:
            raise UserError(
                f"the checkpoint was trained on another vocabulary ({part['config']['vocab_size']} ids) than "
                f"{self.data.path} has ({self.config.vocab_size} ids): train on the data that fits, or "
                "choose another --out"
            )
        check_same(
            asdict(DecoderConfig()) | part["config"],
            asdict(self.config),
            "decoder",
            free=("attention", "dropout", "checkpoint_activations"),
        )

    def optimize(self, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        factor = warmup_linear(self.steps_done, self.share, self.warmup_steps, self.hold)
        for o, peak in zip(optimizers, (self.rate, self.muon_rate), strict=False):
            self.set_rate(o, peak * factor)
        last = self.budget.over(self.steps_done + 1)
        loss, logged = self.losses(batch, measure=last or (self.steps_done + 1) % self.log_every == 0)
        for o in optimizers:
            o.zero_grad()
        self.manual_backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self.clip or math.inf)
        if not self._accept(float(norm)):
            optimizers[0].zero_grad()  # a step without gradients changes nothing, and is counted
        optimizers[0].step()
        for o in optimizers[1:]:
            if not self.skipped_in_a_row:
                o.optimizer.step()  # raw, so that Lightning's global_step counts batches
        if self.skipped_in_a_row:
            return logged | {"loss": self._good_loss, "gradient_norm": self.usual_norm, "skipped": float(self.skipped)}
        self._good_loss = logged["loss"]
        if self.average is not None:
            self.average.update(self.decoder, self.steps_done)
        return logged | {"gradient_norm": norm, "skipped": float(self.skipped)}

    def _accept(self, norm: float) -> bool:
        """Whether to learn from a batch with a gradient of that norm, which is the same in all processes."""
        known = self.steps_done >= SETTLED
        if math.isfinite(norm) and not (known and self.skip_above and norm > self.skip_above * self.usual_norm):
            share = 0.02 if known else 1 / (self.steps_done + 1)
            self.usual_norm += share * (norm - self.usual_norm)
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        step, usual = self.steps_done + 1, self.usual_norm
        log.warning("step %d: skipped a batch, its gradient's norm is %.3g (%.3g is usual)", step, norm, usual)
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"step {step}: {MOST_SKIPPED} batches in a row with gradients of norm {norm:.3g} and the like, {usual:.3g} is "
                "usual; the newest checkpoint is good: lower the learning rate and go on with --resume auto"
            )
        return False

    def extra(self) -> dict[str, Any]:
        return {"usual_norm": self.usual_norm, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def restore_extra(self, extra: dict[str, Any]) -> None:
        self.usual_norm, self.skipped = extra.get("usual_norm", 0.0), extra.get("skipped", 0)
        self.skipped_in_a_row = extra.get("skipped_in_a_row", 0)

    def losses(self, batch: dict[str, Tensor], measure: bool = True) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss, the mean over all positions that count; and what to log: with `measure`, bits and accuracy by modality."""
        decoder = self.decoder if self.average is None or self.training else self.average.model
        with NormWatch(decoder, on=measure and not self.compiles) as watch:
            hidden = decoder.hidden(batch["ids"], batch["positions"], batch["documents"], batch["places"])
        kinds = None if self.loss_over == "all" else self.legal_sets
        found = next_id_loss(hidden, decoder.lm_head.weight, batch, kinds, self.z_loss, measure)
        loss = found.total / batch["weights"].sum().clamp_min(1.0)  # forced ids count: they are right for nothing
        logged: dict[str, Tensor | float] = {"loss": loss.detach()}
        return loss, logged | (self._by_modality(batch, found) | watch.found if measure else {})

    def _by_modality(self, batch: dict[str, Tensor], found: Loss) -> dict[str, Tensor | float]:
        """By modality and level bits an id, accuracy and root mean square of the log-normaliser; and the share of padding."""
        out: dict[str, Tensor | float] = {}
        targets = batch["targets"].flatten()[found.index]
        for name, ranges in self.names.items():
            inside = torch.zeros_like(targets, dtype=torch.bool)
            for a, b in ranges:
                inside |= (targets >= a) & (targets < b)
            if inside.any():
                out[f"bits_{name}"] = found.nll[inside].mean() / math.log(2)
                out[f"accuracy_{name}"] = found.right[inside].float().mean()
                out[f"log_normaliser_{name}"] = found.log_normaliser[inside].square().mean().sqrt()
        return out | {"padding": (batch["documents"] < 0).float().mean()}

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        _, logged = self.losses(batch)
        values = {f"val_{name}": float(value) for name, value in logged.items()}
        self.log_dict(values, prog_bar=True, batch_size=batch["ids"].shape[0])

    test_step = validation_step
