"""Lightning shell that trains the decoder on packed batches.

The loss of a position is the cross-entropy over the ids that the grammar allows there (`loss_over="allowed"`) or over
all ids. Legal sets reach the model as data: `kinds` in the batch index a list of id intervals, so that for each kind
only its rows of the head are multiplied, and a forced id costs nothing. The z-loss keeps the log of each softmax's
normaliser near 0 (Chowdhery et al. 2022, "PaLM"; 1e-5 as in Chameleon).
"""

from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.model.optim import build_optimizers
from unitok.training import TrainingShell, check_same, warmup_linear

Intervals = tuple[tuple[int, int], ...]


def head_rows(weight: Tensor, intervals: Intervals) -> Tensor:
    """The rows of a head [V, C] that belong to some ids, in ascending order of ids."""
    return torch.cat([weight[a:b] for a, b in intervals])


def places(targets: Tensor, intervals: Intervals) -> Tensor:
    """Ids -> their places among the ids of `intervals`, in ascending order."""
    out = torch.full_like(targets, -1)
    before = 0
    for a, b in intervals:
        out = torch.where((targets >= a) & (targets < b), targets - a + before, out)
        before += b - a
    return out


def allowed_loss(
    hidden: Tensor, weight: Tensor, batch: dict[str, Tensor], kinds: list[Intervals], over_all: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and squared log-normaliser of every position that counts.

    Args:
        hidden: [B, T, C]. weight: the head, [V, C]. kinds: legal sets, indexed by `batch["kinds"]`.
        over_all: take the softmax over all V ids instead.

    Returns:
        nll [N] in nats, squared log-normaliser [N], and the flat index [N] of each into the batch's B * T positions.
    """
    flat = {key: batch[key].flatten() for key in ("targets", "weights", "kinds")}
    states = hidden.flatten(0, 1)
    nll, squared, index = [], [], []
    if over_all:
        groups: list[Intervals] = [((0, weight.shape[0]),)]
        chosen = [(flat["weights"] > 0).nonzero().flatten()]
    else:
        groups = kinds
        chosen = [((flat["kinds"] == kind) & (flat["weights"] > 0)).nonzero().flatten() for kind in range(len(kinds))]
    for intervals, where in zip(groups, chosen, strict=True):
        if where.numel() == 0 or sum(b - a for a, b in intervals) < 2:
            continue  # nothing here, or nothing to choose
        logits = (states[where] @ head_rows(weight, intervals).T).float()
        normaliser = logits.logsumexp(-1)
        target = places(flat["targets"][where], intervals)
        nll.append(normaliser - logits.gather(1, target[:, None]).squeeze(1))
        squared.append(normaliser.square())
        index.append(where)
    if not nll:
        zero = states.sum() * 0
        return zero[None], zero[None], torch.zeros(1, dtype=torch.long, device=states.device)
    return torch.cat(nll), torch.cat(squared), torch.cat(index)


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
        log_every: int = 20,
    ):
        super().__init__(steps, minutes, log_every)
        self.config = decoder
        self.optimizer_name, self.rate, self.muon_rate = optimizer, learning_rate, muon_rate
        self.warmup_steps, self.hold, self.betas = warmup_steps, hold, (betas[0], betas[1])
        self.weight_decay, self.clip, self.z_loss, self.loss_over = weight_decay, clip, z_loss, loss_over
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
        self.manifest, self.legal_sets = vocab.to_manifest(), grammar.kinds
        self.names = {m: [(r.offset, r.stop) for r in vocab.body(m)] for m in vocab.spans}
        self.config = replace(self.config, vocab_size=vocab.size)
        self.decoder = Decoder(self.config)

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
        check_same(part["config"], asdict(self.config), "decoder", free=("attention", "dropout"))

    def optimize(self, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        factor = warmup_linear(self.steps_done, self.share, self.warmup_steps, self.hold)
        for o, peak in zip(optimizers, (self.rate, self.muon_rate), strict=False):
            self.set_rate(o, peak * factor)
        loss, logged = self.losses(batch)
        for o in optimizers:
            o.zero_grad()
        self.manual_backward(loss)
        if self.clip:
            logged["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self.clip)
        optimizers[0].step()
        for o in optimizers[1:]:
            o.optimizer.step()  # raw, so that Lightning's global_step counts batches
        return logged

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss, and what to log: bits an id, overall and by modality."""
        hidden = self.decoder.hidden(batch["ids"], batch["positions"], batch["documents"], batch["places"])
        nll, squared, index = allowed_loss(hidden, self.decoder.lm_head.weight, batch, self.legal_sets, self.loss_over == "all")
        weights = batch["weights"].flatten()[index]
        total = batch["weights"].sum().clamp_min(1.0)  # forced ids count: they are right for nothing
        loss = ((nll + self.z_loss * squared) * weights).sum() / total
        logged: dict[str, Tensor | float] = {"loss": loss.detach()}
        targets = batch["targets"].flatten()[index]
        bits = nll.detach() / torch.log(torch.tensor(2.0))
        for modality, ranges in self.names.items():
            inside = torch.zeros_like(targets, dtype=torch.bool)
            for a, b in ranges:
                inside |= (targets >= a) & (targets < b)
            if inside.any():
                logged[f"bits_{modality}"] = bits[inside].mean()
        return loss, logged

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        _, logged = self.losses(batch)
        values = {f"val_{name}": float(value) for name, value in logged.items()}
        self.log_dict(values, prog_bar=True, batch_size=batch["ids"].shape[0])

    test_step = validation_step
