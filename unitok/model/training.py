"""Lightning shell that trains the decoder on packed batches.

The loss of a position is the cross-entropy over the ids that the grammar allows there (`loss_over="allowed"`) or over all
ids; legal sets reach the model as data (`unitok.model.loss`).
"""

import math
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.model.loss import Loss, next_id_loss
from unitok.model.optim import build_optimizers
from unitok.training import TrainingShell, check_same, warmup_linear


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
        log_every: int = 20,
    ):
        super().__init__(steps, minutes, log_every)
        self.config = decoder
        self.optimizer_name, self.rate, self.muon_rate = optimizer, learning_rate, muon_rate
        self.warmup_steps, self.hold, self.betas = warmup_steps, hold, (betas[0], betas[1])
        self.weight_decay, self.clip, self.z_loss, self.loss_over = weight_decay, clip, z_loss, loss_over
        self.compiles = compile
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
        self.decoder = Decoder(self.config)
        if self.compiles:
            for layer in self.decoder.model.layers:
                layer.compile(dynamic=False)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.decoder, self.optimizer_name, self.rate, self.muon_rate, self.betas, self.weight_decay)

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
        if self.clip:
            logged["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self.clip)
        optimizers[0].step()
        for o in optimizers[1:]:
            o.optimizer.step()  # raw, so that Lightning's global_step counts batches
        return logged

    def losses(self, batch: dict[str, Tensor], measure: bool = True) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss, the mean over all positions that count; and what to log: with `measure`, bits and accuracy by modality."""
        hidden = self.decoder.hidden(batch["ids"], batch["positions"], batch["documents"], batch["places"])
        kinds = None if self.loss_over == "all" else self.legal_sets
        found = next_id_loss(hidden, self.decoder.lm_head.weight, batch, kinds, self.z_loss, measure)
        loss = found.total / batch["weights"].sum().clamp_min(1.0)  # forced ids count: they are right for nothing
        logged: dict[str, Tensor | float] = {"loss": loss.detach()}
        return loss, logged | (self._by_modality(batch, found) if measure else {})

    def _by_modality(self, batch: dict[str, Tensor], found: Loss) -> dict[str, Tensor | float]:
        """Bits an id and accuracy by modality and level, the root mean square of the log-normaliser, the share of padding."""
        out: dict[str, Tensor | float] = {}
        targets = batch["targets"].flatten()[found.index]
        for name, ranges in self.names.items():
            inside = torch.zeros_like(targets, dtype=torch.bool)
            for a, b in ranges:
                inside |= (targets >= a) & (targets < b)
            if inside.any():
                out[f"bits_{name}"] = found.nll[inside].mean() / math.log(2)
                out[f"accuracy_{name}"] = found.right[inside].float().mean()
        if len(targets):
            out["log_normaliser"] = found.log_normaliser.square().mean().sqrt()
        return out | {"padding": (batch["documents"] < 0).float().mean()}

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        _, logged = self.losses(batch)
        values = {f"val_{name}": float(value) for name, value in logged.items()}
        self.log_dict(values, prog_bar=True, batch_size=batch["ids"].shape[0])

    test_step = validation_step
