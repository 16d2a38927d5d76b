"""The training of the decoder on packed batches.

The loss of a position is the cross-entropy over the ids that the grammar allows there (`loss_vocabulary="allowed"`) or over all
ids; legal sets reach the model as data (`unitok.model.loss`).
"""

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.hardware import peak_flops
from unitok.model.costs import count
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.model.loss import Loss, next_id_loss
from unitok.training.finetune import choose_trained, start_decoder
from unitok.training.lora import LowRank, add_lora
from unitok.training.monitor import NormWatch
from unitok.training.optim import Start, build_optimizers, default_rates, whole
from unitok.training.sharding import reshard, shard
from unitok.training.shell import Sums, TrainingShell, add_sums, check_same, weight_average

log = logging.getLogger("unitok")
SETTLED = 50  # steps after which the gradient's norm is known well enough to tell what is unusual
MOST_SKIPPED = 5  # batches in a row that may be skipped


class DecoderTraining(TrainingShell):
    """Trains a decoder on a `TokenShards` data module, whose vocabulary it takes over.

    Args:
        decoder: architecture; `vocab_size` comes from the data.
        optimizer: `muon` (Muon for the blocks' matrices, AdamW for the rest) or `adamw`.
        lr: peak of AdamW, by default 1e-2, or a tenth and less where training starts from weights (`default_rates`).
        muon_lr: peak of Muon, by default 0.02, or a tenth where training starts from weights.
        muon_iterations: of Newton-Schulz; where steps are small, as on a CPU, 3 of them pay.
        beta2_half_life_tokens: ids after which AdamW's second moment has forgotten half, in place of the second of `betas` (Marek et al. 2025,
            "Small batch size training for language models").
        z_loss: weight of the squared log-normalizer.
        loss_vocabulary: `allowed` (the ids that the grammar allows at each place) or `all`.
        compile: compile the blocks (torch.compile): the first steps take a minute or more, and norms are not logged.
        skip_grad_norm_ratio: a batch whose gradient's norm is not finite, or more than this many times the usual, is skipped and
            counted; after five in a row the run stops, with the last good checkpoint in place.
        init_from: a bundle, or a decoder's folder with its vocab.json, to take architecture and weights from. Its vocabulary
            must be the data's, or the beginning of it: rows of new ids are then added.
        freeze: patterns of parameter names that are not trained, as in `model.layers.*`.
        train_new_tokens_only: train only the rows of embedding and head that were added (Chern et al. 2024, "ANOLE").
        lora: train low-rank differences of matrices alone, with AdamW (needs peft); a bundle takes the sums.
    """

    kind = "decoder"
    roots = ("logsumexp_rms",)
    kept = ("usual_norm", "skipped")

    def __init__(
        self,
        decoder: DecoderConfig,
        *,
        optimizer: Literal["muon", "adamw"] = "muon",
        lr: float | None = None,
        muon_lr: float | None = None,
        muon_iterations: int = 5,
        stable_fraction: float = 0.3,
        beta2_half_life_tokens: float | None = None,
        weight_decay: float = 0.0,
        z_loss: float = 1e-5,
        loss_vocabulary: Literal["allowed", "all"] = "allowed",
        compile: bool = False,
        skip_grad_norm_ratio: float = 10.0,
        init_from: str | None = None,
        freeze: list[str] | None = None,
        train_new_tokens_only: bool = False,
        lora: LowRank | None = None,
        **shared: Any,
    ):
        super().__init__(lr=lr, stable_fraction=stable_fraction, weight_decay=weight_decay, **shared)
        self.config, self.lora, self.beta2_half_life_tokens, self.skip_grad_norm_ratio = (
            decoder,
            lora,
            beta2_half_life_tokens,
            skip_grad_norm_ratio,
        )
        self.muon_lr: Any = muon_lr
        self.optimizer_name, self.muon_iterations = optimizer, muon_iterations
        self.z_loss, self.loss_vocabulary, self.compiles = z_loss, loss_vocabulary, compile
        self.init_from, self.frozen, self.train_new_tokens_only = init_from, freeze or [], train_new_tokens_only
        if beta2_half_life_tokens is not None and beta2_half_life_tokens <= 0:
            raise UserError(f"beta2_half_life_tokens {beta2_half_life_tokens}: it must be above 0 ids")
        if lora is not None and train_new_tokens_only:
            raise UserError("lora and train_new_tokens_only train different parameters: choose one")
        if train_new_tokens_only and not init_from:
            raise UserError("train_new_tokens_only needs init_from: the decoder whose old ids stay as they are")
        self.usual_norm = 0.0  # moving average of the gradient's norm
        self.skipped, self.skipped_in_a_row = 0, 0
        self._good_loss: Tensor | float = 0.0
        self.manifest: dict[str, Any] = {}
        self._ids: Tensor | int = 0  # that were trained on since the pace was last looked at

    def configure_model(self) -> None:
        """Build the decoder for the vocabulary of the data."""
        if hasattr(self, "decoder"):
            return
        data = self.data
        if not hasattr(data, "vocab"):
            raise UserError("the decoder trains on token shards: set data.class_path to unitok.data.modules.TokenShards")
        training = data.training_data()
        vocab, grammar = data.vocab, training.grammar
        if self.config.vocab_size not in (0, vocab.size):
            raise UserError(
                f"model.decoder.vocab_size is {self.config.vocab_size}, the vocabulary of {data.path} has {vocab.size} ids: "
                "leave it out"
            )
        self.manifest, self.allowed_sets = vocab.to_manifest(), grammar.allowed_sets
        #: What is logged apart: each modality, and each level of those that have several.
        self.names = {}
        for modality in vocab.spans:
            body = [(r.offset, r.stop) for r in vocab.body(modality)]
            self.names[modality] = body
            if len(body) > 1:
                self.names |= {f"{modality}_{level}": [interval] for level, interval in enumerate(body)}
        self.config = replace(self.config, vocab_size=vocab.size)
        if self.init_from:
            self.decoder, new = start_decoder(Path(self.init_from), self.config, vocab, str(data.path))
            self.config = self.decoder.config
        else:
            self.decoder, new = Decoder(self.config), 0
        sets = [training, data.validation_data()]
        longest, most = max(d.longest for d in sets if d is not None), self.config.max_position_embeddings
        if longest > most:
            raise UserError(
                f"documents of up to {longest} ids, model.decoder.max_position_embeddings is {most}: raise it, or set "
                f"data.max_length to {most} or less"
            )
        self._set_rates()
        if self.lora is not None:
            add_lora(self.decoder, self.lora)
        choose_trained(self.decoder, self.frozen, new if self.train_new_tokens_only else None)
        if self.ema_decay:
            self.average = weight_average(self.decoder, self.ema_decay)
        if self.compiles:
            for layer in self.decoder.model.layers:
                layer.compile(dynamic=False)
        if self.device_mesh is not None:
            if self.train_new_tokens_only:
                raise UserError("train_new_tokens_only: not with sharded parameters; train with --trainer.strategy ddp")
            for decoder in dict.fromkeys((self.decoder, self.averaged(self.decoder))):
                shard(decoder, self.device_mesh)
        self.flops_per_token = count(self.config, training.mean_context).flops

    def _set_rates(self) -> None:
        """Set the learning rates that were not given to those that fit what training starts from."""
        start: Start = "scratch" if not self.init_from else "new ids" if self.train_new_tokens_only else "weights"
        start = "lora" if self.lora is not None else start
        usual, usual_muon = default_rates(self.config.hidden_size, start)
        self.lr = usual if self.lr is None else self.lr
        self.muon_lr = usual_muon if self.muon_lr is None else self.muon_lr
        if start != "scratch" and self.trainer.is_global_zero:
            has_muon = self.optimizer_name == "muon" and start == "weights"
            muon = f", Muon {self.muon_lr:g} (usual: {usual_muon:g})" if has_muon else ""
            what = {"weights": "a start from weights", "new ids": "new ids alone", "lora": "low-rank differences"}[start]
            log.info("learning rates for %s: AdamW %.2g (usual: %.2g)%s", what, self.lr, usual, muon)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        decay = 0.0 if self.train_new_tokens_only else self.weight_decay  # it would move the old rows, too
        betas = (
            self.betas
            if self.beta2_half_life_tokens is None
            else (self.betas[0], 0.5 ** (self.ids_a_step / self.beta2_half_life_tokens))
        )
        rates = self.lr, self.muon_lr
        return build_optimizers(self.decoder, self.optimizer_name, *rates, betas, decay, self.muon_iterations)

    @property
    def ids_a_step(self) -> int:
        """Of all processes, padding included."""
        return self.data.sequence_length * self.data.batch_size * self.trainer.world_size

    def on_train_start(self) -> None:
        """Lengths in ids become steps; each process draws dropout of its own."""
        self.budget.set_ids(self.steps_done, self.samples_seen * self.data.sequence_length, self.ids_a_step)
        if self.trainer.world_size > 1 and self._restored is None:
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)
        super().on_train_start()

    def speed(self, steps: int, seconds_per_step: float) -> dict[str, float]:
        """Ids that are not padding a second, of all processes; with the hardware's peak known, its share that was used."""
        rate = float(self._ids) * self.trainer.world_size / steps / seconds_per_step
        self._ids = 0
        found = {"tokens_per_second": rate, "teraflops": rate * self.flops_per_token / 1e12}
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if peak:
            found["mfu"] = rate * self.flops_per_token / (peak * self.trainer.world_size)
        return found

    def part(self) -> dict[str, Any]:
        lora = {"lora_scale": self.lora.alpha / self.lora.rank} if self.lora else {}
        return super().part() | {"vocab": self.manifest} | lora

    def check_part(self, part: dict[str, Any]) -> None:
        """Errors: `UserError` for a checkpoint of another vocabulary."""
        if part["vocab"] != self.manifest:
            raise UserError(
                f"the checkpoint was trained on another vocabulary ({part['config']['vocab_size']} ids) than {self.data.path} has "
                f"({self.config.vocab_size} ids): train on the data that fits, or choose another --out"
            )
        free = ("attention", "dropout", "checkpoint_activations")
        check_same(asdict(DecoderConfig()) | part["config"], asdict(self.config), "decoder", free)

    def optimize(self, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """One step on a packed batch; a bad one changes nothing."""
        optimizers = self.optimizer_list()
        for optimizer, peak in zip(optimizers, (self.lr, self.muon_lr), strict=False):
            self.set_rate(optimizer, peak)
        logged = self._gradients(batch, measure=self.due(self.log_every))
        norm = whole(torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self.grad_clip or math.inf))
        self.healthy = self._accept(float(norm))
        if not self.healthy:
            self.decoder.zero_grad()
        optimizers[0].step()  # without gradients it changes nothing, and is counted
        if not self.healthy:
            return logged | {"loss": self._good_loss, "gradient_norm": self.usual_norm, "skipped": float(self.skipped)}
        for o in optimizers[1:]:
            o.optimizer.step()  # raw, so that Lightning's global_step counts batches
        self._good_loss = logged["loss"]
        if self.average is not None:
            self.average.update_parameters(self.decoder)
        return logged | {"gradient_norm": norm, "skipped": float(self.skipped)}

    def _gradients(self, batch: dict[str, Tensor], measure: bool) -> dict[str, Tensor | float]:
        """Compute those of the mean loss over all positions of all processes that count; -> what to log."""
        rows = len(batch["ids"])
        if rows % self.accumulate_grad_batches:
            raise UserError(f"accumulate_grad_batches {self.accumulate_grad_batches}: it must divide data.batch_size {rows}")
        self.decoder.zero_grad()
        self._ids = self._ids + (batch["documents"] >= 0).sum()
        weight = self.mean_everywhere(batch["weights"].sum()).clamp_min(1.0)  # gradients are averaged over processes
        sums: Sums = {}
        for number in range(self.accumulate_grad_batches):
            piece = {key: value[number :: self.accumulate_grad_batches] for key, value in batch.items()}
            loss, found = self.losses(piece, measure)
            if number < self.accumulate_grad_batches - 1:
                (loss / weight).backward()  # kept in this process: DDP hears of the last one only
            else:
                self.manual_backward(loss / weight)
            add_sums(sums, found)
        total, _ = sums.pop("loss")
        return {"loss": total / weight} | self.means(sums)

    def _accept(self, norm: float) -> bool:
        """Whether to learn from a batch with a gradient of that norm, which is the same in all processes."""
        known = self.steps_done >= SETTLED
        if math.isfinite(norm) and not (
            known and self.skip_grad_norm_ratio and norm > self.skip_grad_norm_ratio * self.usual_norm
        ):
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

    def structure(self) -> dict[str, Any]:
        lora = [self.lora.rank, *sorted(self.lora.targets)] if self.lora else []
        parts = {"freeze": self.frozen, "train_new_tokens_only": self.train_new_tokens_only, "lora": lora}
        return {"optimizer": self.optimizer_name} | parts | super().structure()

    def losses(self, batch: dict[str, Tensor], measure: bool = True) -> tuple[Tensor, Sums]:
        """The sum of the losses of all positions, with the gradient; and sums of what to log: `loss`, of which forced ids are a
        part (they are right for nothing), and with `measure` bits and accuracy by modality."""
        decoder = self.decoder if self.training else self.averaged(self.decoder)
        with NormWatch(decoder, on=measure and self.training and not self.compiles) as watch:
            hidden = decoder.hidden(batch["ids"], batch["positions"], batch["documents"], batch["span_positions"])
        kinds = None if self.loss_vocabulary == "all" else self.allowed_sets
        found = next_id_loss(hidden, decoder.lm_head.weight, batch, kinds, self.z_loss, measure)
        sums: Sums = {"loss": (found.total.detach(), batch["weights"].sum())}
        if measure:
            sums |= self._by_modality(batch, found) | {name: (norm, 1.0) for name, norm in watch.found.items()}
        return found.total, sums

    def _by_modality(self, batch: dict[str, Tensor], found: Loss) -> Sums:
        """By modality and level bits per id, accuracy and root mean square of the log-normalizer; and the share of padding."""
        out: Sums = {}
        targets = batch["targets"].flatten()[found.index]
        for name, ranges in self.names.items():
            inside = torch.zeros_like(targets, dtype=torch.bool)
            for a, b in ranges:
                inside |= (targets >= a) & (targets < b)
            if count := int(inside.sum()):
                out[f"bits_{name}"] = found.nll[inside].sum() / math.log(2), count
                out[f"accuracy_{name}"] = found.right[inside].sum(), count
                out[f"log_normaliser_{name}"] = found.logsumexp_rms[inside].square().sum(), count
        empty = batch["documents"] < 0
        rows = ~empty.all(1)  # a row without documents was made to have one
        return out | {"padding": (empty[rows].sum(), empty[rows].numel())}

    def measure(self, batch: dict[str, Tensor], show: bool) -> Sums:
        """Loss, bits and accuracy, as in training."""
        _, sums = self.losses(batch)
        reshard(self.averaged(self.decoder))
        return sums
