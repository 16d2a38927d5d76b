"""The training of the decoder on packed batches.

The loss of a position is the cross-entropy over the tokens that the grammar allows there (`loss_vocabulary="allowed"`) or over all
tokens. The sets of allowed tokens reach the model as data (`unitok.model.loss`).
"""

import logging
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unitok.data.modules import TokenShards
from unitok.errors import UserError, check_range
from unitok.hardware import peak_flops
from unitok.model.costs import count
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.model.loss import Loss, next_id_loss
from unitok.model.native import compiler
from unitok.training.finetune import choose_trained, start_decoder
from unitok.training.lora import LowRank, add_lora
from unitok.training.monitor import NormWatch
from unitok.training.optim import Start, build_optimizers, full_tensor, optimizer_defaults
from unitok.training.sharding import reshard, shard
from unitok.training.shell import Sums, TrainingShell, add_sums, check_same, weight_average
from unitok.vocab import Vocab

log = logging.getLogger("unitok")
SETTLED = 50  # steps after which the usual norm of the gradient is known
MAX_SKIPPED_IN_A_ROW = 5  # batches
DESCRIPTIONS = {
    "weights": "fine-tuning of all weights",
    "new tokens": "training of new tokens alone",
    "lora": "training of low-rank differences",
}


class DecoderTraining(TrainingShell[dict[str, Tensor]]):
    """Training of a decoder on a `TokenShards` data module, which also gives the vocabulary.

    Args:
        decoder: architecture; `vocab_size` comes from the data.
        optimizer: `muon` (Muon for the matrices of the blocks, AdamW for the rest) or `adamw`.
        lr: peak learning rate of AdamW; by default 1e-2 from scratch, and less from weights (`optimizer_defaults`).
        muon_lr: peak learning rate of Muon; by default 0.02 from scratch, and 0.002 from weights.
        muon_iterations: of Newton-Schulz; 3 pay where steps are small, as on a CPU.
        muon_every: steps per update of Muon, which is of the sum of their gradients; 4 pay where steps are small.
        stable_fraction: fraction of the run at which the learning rates start to fall, linearly, to a fiftieth; by default 0.3 from
            scratch, and 0 from weights.
        beta2_half_life_tokens: tokens after which AdamW's second moment has forgotten half; replaces the second of `betas` (Marek et
            al. 2025, "Small batch size training for language models").
        z_loss: weight of the squared log of the softmax's normalizer.
        loss_vocabulary: tokens of the softmax, `allowed` (those that the grammar allows at each position) or `all`.
        compile: compile the blocks (torch.compile): the first steps take a minute or more, and norms are not logged. On a CPU it needs a
            C++ compiler, and pays with bf16-mixed.
        skip_grad_norm_ratio: batches with a gradient norm that is not finite, or more than this many times the usual norm, are skipped
            and counted; after five in a row the run stops, and its last checkpoint is good. 0: only norms that are not finite.
        init_from: a bundle, also a built-in one, or a decoder's folder with its vocab.json, from which architecture and weights are taken. Its vocabulary
            must be the data's or the beginning of it; rows of new tokens are then added.
        freeze: patterns of parameter names that are not trained, for example `model.layers.*`.
        train_new_tokens_only: train only the added rows of embedding and head (Chern et al. 2024, "ANOLE").
        lora: train only low-rank differences of matrices, with AdamW (needs peft); a bundle gets the merged weights.
    """

    kind = "decoder"
    rms_prefixes = ("logsumexp_rms",)
    saved_attributes = ("usual_norm", "skipped")
    config: DecoderConfig

    def __init__(
        self,
        decoder: DecoderConfig,
        *,
        optimizer: Literal["muon", "adamw"] = "muon",
        lr: float | None = None,
        muon_lr: float | None = None,
        muon_iterations: int = 5,
        muon_every: int = 1,
        stable_fraction: float | None = None,
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
        super().__init__(lr=lr, weight_decay=weight_decay, **shared)
        self.config, self.lora, self.compiles = decoder, lora, compile
        check_range("muon_lr", muon_lr, 0)
        check_range("stable_fraction", stable_fraction, 0, 1)
        self.optimizer_name, self.muon_lr = optimizer, muon_lr
        self.muon_iterations, self.muon_every = muon_iterations, muon_every
        self._stable_fraction = stable_fraction
        self.beta2_half_life_tokens, self.skip_grad_norm_ratio = beta2_half_life_tokens, skip_grad_norm_ratio
        self.z_loss, self.loss_vocabulary = z_loss, loss_vocabulary
        self.init_from, self.frozen, self.train_new_tokens_only = init_from, freeze or [], train_new_tokens_only
        if beta2_half_life_tokens is not None and beta2_half_life_tokens <= 0:
            raise UserError(f"beta2_half_life_tokens {beta2_half_life_tokens}: it must be above 0 tokens")
        if muon_every < 1:
            raise UserError(f"muon_every {muon_every}: it must be at least 1 step")
        if lora is not None and train_new_tokens_only:
            raise UserError("lora and train_new_tokens_only train different parameters: choose one")
        if lora is not None and not init_from:
            raise UserError("lora needs init_from: the decoder whose weights stay as they are")
        if train_new_tokens_only and not init_from:
            raise UserError("train_new_tokens_only needs init_from: the decoder whose old tokens stay as they are")
        self.usual_norm = 0.0  # moving average of the gradient's norm
        self.skipped, self.skipped_in_a_row = 0, 0
        self._good_loss: Tensor | float = 0.0
        self.manifest: dict[str, Any] = {}
        self._tokens: Tensor | int = 0  # trained on since the pace was last logged

    @property
    def data(self) -> TokenShards:
        """The data module of the run. Errors: `UserError` for one of another kind."""
        data = super().data
        if not isinstance(data, TokenShards):
            raise UserError("the decoder trains on token shards: set data.class_path to unitok.data.modules.TokenShards")
        return data

    def configure_model(self) -> None:
        """Build the decoder for the vocabulary of the data."""
        if hasattr(self, "decoder"):
            return
        data = self.data
        training = data.training_data()
        vocab, grammar = data.vocab, training.grammar
        if self.config.vocab_size not in (0, vocab.size):
            raise UserError(
                f"model.decoder.vocab_size is {self.config.vocab_size}, the vocabulary of {data.path} has {vocab.size} tokens: "
                "leave it out"
            )
        self.manifest, self.allowed_sets, self.logged_ranges = vocab.to_manifest(), grammar.allowed_sets, _logged_ranges(vocab)
        self.config = replace(self.config, vocab_size=vocab.size)
        if self.init_from:
            given = self.config
            self.decoder, first_new = start_decoder(Path(self.init_from), given, vocab, str(data.path))
            self.config = self.decoder.config
            other = [f.name for f in fields(given) if getattr(given, f.name) not in (f.default, getattr(self.config, f.name))]
            if other and self.trainer.is_global_zero:
                which = ", ".join(f"{name} {getattr(self.config, name)}, not {getattr(given, name)}" for name in other)
                log.info("the architecture is that of %s: %s", self.init_from, which)
        else:
            self.decoder, first_new = Decoder(self.config), 0
        sets = [training, data.validation_data()]
        longest, limit = max(d.longest for d in sets if d is not None), self.config.max_position_embeddings
        if longest > limit:
            raise UserError(
                f"documents of up to {longest} tokens, model.decoder.max_position_embeddings is {limit}: raise it, or set "
                f"data.max_length to {limit} or less"
            )
        self._set_defaults()
        ours = {"span_positions": "0", "span_rotation": "false", "grid_rotation": "false"}  # and what leaves each of them out
        for name, off in ours.items() if self.trainer.is_global_zero else ():
            if value := getattr(self.config, name):
                log.info("%s %s: this decoder will not export to transformers (set %s for that)", name, value, off)
        if self.lora is not None:
            add_lora(self.decoder, self.lora)
        choose_trained(self.decoder, self.frozen, first_new if self.train_new_tokens_only else None)
        if self.ema_decay:
            self.average = weight_average(self.decoder, self.ema_decay)
        if self.compiles:
            if self.trainer.strategy.root_device.type == "cpu" and compiler() is None:
                raise UserError(
                    "model.compile true: on a CPU it needs a C++ compiler (c++, g++ or clang++); install one, or leave it out"
                )
            for layer in self.decoder.model.layers:
                layer.compile(dynamic=False)
        if self.device_mesh is not None:
            if self.train_new_tokens_only:
                raise UserError("train_new_tokens_only: not with sharded parameters; train with --trainer.strategy ddp")
            for decoder in dict.fromkeys((self.decoder, self.averaged(self.decoder))):
                assert isinstance(decoder, Decoder)
                shard(decoder, self.device_mesh)
        self.flops_per_token = count(self.config, training.mean_context).flops

    def _set_defaults(self) -> None:
        """Set learning rates and schedule where they are not configured, to what suits the start; log those of a fine-tuning."""
        start: Start = "scratch"
        if self.init_from:
            start = "new tokens" if self.train_new_tokens_only else "lora" if self.lora else "weights"
        default = optimizer_defaults(self.config.hidden_size, start)
        self.peak_lr = default.lr if self.lr is None else self.lr
        self.peak_muon_lr = default.muon_lr if self.muon_lr is None else self.muon_lr
        self.stable_fraction = default.stable_fraction if self._stable_fraction is None else self._stable_fraction
        if start != "scratch" and self.trainer.is_global_zero:
            has_muon = self.optimizer_name == "muon" and start == "weights"
            muon = f", muon_lr {self.peak_muon_lr:g} (default {default.muon_lr:g})" if has_muon else ""
            rates = f"lr {self.peak_lr:.2g} (default {default.lr:.2g}){muon}"
            log.info("%s: %s, stable_fraction %g (default 0)", DESCRIPTIONS[start], rates, self.stable_fraction)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers by name, at their peak learning rates."""
        weight_decay = 0.0 if self.train_new_tokens_only else self.weight_decay  # it would change the old rows, too
        betas = self.betas
        if self.beta2_half_life_tokens is not None:
            betas = (betas[0], 0.5 ** (self.tokens_per_step / self.beta2_half_life_tokens))
        peaks = self.peak_lr, self.peak_muon_lr
        return build_optimizers(
            self.decoder, self.optimizer_name, *peaks, betas, weight_decay, self.muon_iterations, self.muon_every
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step of all processes, with padding."""
        return self.data.sequence_length * self.data.batch_size * self.trainer.world_size

    def on_train_start(self) -> None:
        """Turn a length in tokens into steps, and let each process draw its own dropout."""
        self.budget.set_tokens(self.steps_done, self.samples_seen * self.data.sequence_length, self.tokens_per_step)
        if self.trainer.world_size > 1 and self._resumed_random is None:
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)
        super().on_train_start()

    def speed(self, steps: int, seconds_per_step: float) -> dict[str, float]:
        """Tokens per second of all processes, without padding, and FLOPs; MFU where the peak of the hardware is known."""
        tokens_per_second = float(self._tokens) * self.trainer.world_size / steps / seconds_per_step
        self._tokens = 0
        flops = tokens_per_second * self.flops_per_token
        metrics = {"tokens_per_second": tokens_per_second, "teraflops": flops / 1e12}
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if peak:
            metrics["mfu"] = flops / (peak * self.trainer.world_size)
        return metrics

    def part(self) -> dict[str, Any]:
        lora = {"lora_scale": self.lora.alpha / self.lora.rank} if self.lora else {}
        return super().part() | {"vocab": self.manifest} | lora

    def check_part(self, part: dict[str, Any]) -> None:
        """Raise `UserError` for a checkpoint of another vocabulary or architecture."""
        if part["vocab"] != self.manifest:
            raise UserError(
                f"the checkpoint was trained on another vocabulary ({part['config']['vocab_size']} tokens) than {self.data.path} "
                f"has ({self.config.vocab_size} tokens): train on the data that fits, or choose another --out"
            )
        free = ("attention", "dropout", "checkpoint_activations")
        check_same(asdict(DecoderConfig()) | part["config"], asdict(self.config), "decoder", free)

    def optimize(self, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """One step on a packed batch. A batch with an unusual gradient changes nothing."""
        optimizers = self.optimizer_list()
        for optimizer, peak in zip(optimizers, (self.peak_lr, self.peak_muon_lr), strict=False):
            self.set_lr(optimizer, peak)
        metrics = self._gradients(batch, measure=self.due(self.log_every))
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self.grad_clip or math.inf))
        self.healthy = self._accept(float(norm))
        if not self.healthy:
            self.decoder.zero_grad()
        optimizers[0].step()  # without gradients it changes nothing, and is counted
        if not self.healthy:
            return metrics | {"loss": self._good_loss, "grad_norm": self.usual_norm, "skipped_batches": float(self.skipped)}
        for o in optimizers[1:]:
            o.optimizer.step()  # not the wrapper, so that Lightning's global_step counts batches
        self._good_loss = metrics["loss"]
        if self.average is not None:
            self.average.update_parameters(self.decoder)
        return metrics | {"grad_norm": norm, "skipped_batches": float(self.skipped)}

    def _gradients(self, batch: dict[str, Tensor], measure: bool) -> dict[str, Tensor | float]:
        """Compute the gradients of the mean loss over all weighted positions of all processes. Returns the metrics to log."""
        rows = len(batch["ids"])
        if rows % self.accumulate_grad_batches:
            raise UserError(f"accumulate_grad_batches {self.accumulate_grad_batches}: it must divide data.batch_size {rows}")
        self.decoder.zero_grad()
        self._tokens = self._tokens + (batch["documents"] >= 0).sum()
        weight = self.mean_over_processes(batch["weights"].sum()).clamp_min(1.0)  # gradients are averaged over processes
        sums: Sums = {}
        for number in range(self.accumulate_grad_batches):
            part = {key: value[number :: self.accumulate_grad_batches] for key, value in batch.items()}
            loss, sums_of_part = self.losses(part, measure)
            if number < self.accumulate_grad_batches - 1:
                (loss / weight).backward()  # DDP averages gradients in the last backward pass only
            else:
                self.manual_backward(loss / weight)
            add_sums(sums, sums_of_part)
        total, _ = sums.pop("loss")
        return {"loss": total / weight} | self.means(sums)

    def _accept(self, norm: float) -> bool:
        """Whether to learn from a batch with a gradient of this norm, which is the same in all processes."""
        settled = self.steps_done >= SETTLED
        unusual = settled and self.skip_grad_norm_ratio and norm > self.skip_grad_norm_ratio * self.usual_norm
        if math.isfinite(norm) and not unusual:
            weight = 0.02 if settled else 1 / (self.steps_done + 1)
            self.usual_norm += weight * (norm - self.usual_norm)
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        step, usual = self.steps_done + 1, self.usual_norm
        log.warning("step %d: skipped a batch, its gradient's norm is %.3g (%.3g is usual)", step, norm, usual)
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"step {step}: skipped {MAX_SKIPPED_IN_A_ROW} batches in a row, the norm of the last gradient is {norm:.3g}, "
                f"{usual:.3g} is usual; the newest checkpoint is good: lower the learning rate and go on with --resume auto"
            )
        return False

    def structure(self) -> dict[str, object]:
        lora = [self.lora.rank, *sorted(self.lora.targets)] if self.lora else []
        parts = {"freeze": self.frozen, "train_new_tokens_only": self.train_new_tokens_only, "lora": lora}
        sums = {"muon_every": self.muon_every} if self.optimizer_name == "muon" and self.muon_every > 1 else {}
        return {"optimizer": self.optimizer_name} | parts | sums | super().structure()

    def losses(self, batch: dict[str, Tensor], measure: bool = True) -> tuple[Tensor, Sums]:
        """The summed loss of all positions, with its gradient, and the sums of metrics.

        The mean `loss` counts forced tokens, too, with a loss of 0; the metrics of `measure` do not.
        """
        decoder = self.decoder if self.training else self.averaged(self.decoder)
        assert isinstance(decoder, Decoder)
        with NormWatch(decoder, on=measure and self.training and not self.compiles) as watch:
            hidden = decoder.hidden(batch["ids"], batch["positions"], batch["documents"], batch["span_positions"])
        allowed_sets = None if self.loss_vocabulary == "all" else self.allowed_sets
        loss = next_id_loss(hidden, decoder.lm_head.weight, batch, allowed_sets, self.z_loss, measure)
        sums: Sums = {"loss": (loss.total.detach(), batch["weights"].sum())}
        if measure:
            sums |= self._metrics(batch, loss) | {name: (rms, 1.0) for name, rms in watch.rms.items()}
        return loss.total, sums

    def _metrics(self, batch: dict[str, Tensor], loss: Loss) -> Sums:
        """Sums of bits per token, accuracy and RMS of logsumexp of each modality and level, and of the fractions of padding and, of all
        other tokens, of those that are learned and not only read."""
        sums: Sums = {}
        targets = batch["targets"].flatten()[loss.index]
        for name, ranges in self.logged_ranges.items():
            inside = torch.zeros_like(targets, dtype=torch.bool)
            for a, b in ranges:
                inside |= (targets >= a) & (targets < b)
            if number := int(inside.sum()):
                sums[f"bits_per_token/{name}"] = loss.nll[inside].sum() / math.log(2), number
                sums[f"accuracy/{name}"] = loss.correct[inside].sum(), number
                sums[f"logsumexp_rms/{name}"] = loss.logsumexp[inside].square().sum(), number
        padding = batch["documents"] < 0
        filled = ~padding.all(1)  # a row without documents only fills up the batch of a process
        learned = (batch["weights"] > 0).sum(), (~padding).sum()
        return sums | {"padding_fraction": (padding[filled].sum(), padding[filled].numel()), "learned_fraction": learned}

    def measure(self, batch: dict[str, Tensor], show: bool) -> Sums:
        """Sums of the same metrics as in training."""
        _, sums = self.losses(batch)
        decoder = self.averaged(self.decoder)
        assert isinstance(decoder, Decoder)
        reshard(decoder)
        return sums


def _logged_ranges(vocab: Vocab) -> dict[str, list[tuple[int, int]]]:
    """Ranges of tokens whose metrics are logged, by name: each modality, and each level of modalities with several."""
    names = {}
    for modality in vocab.spans:
        body = {r.name: (r.offset, r.stop) for r in vocab.body(modality)}
        names[modality] = list(body.values())
        if len(body) > 1:
            names |= {name: [interval] for name, interval in body.items()}
    return names
