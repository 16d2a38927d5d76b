"""The parser of `unitok fit`: what is wrong with a configuration in one line, with the nearest key for one that does not exist."""

import difflib
import re
from typing import NoReturn

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from unitok.errors import UserError, visible
from unitok.training.lora import LowRank

#: Names that other projects have for our keys, where the spelling is too far for `difflib`.
OTHER_NAMES = {
    "lr": ("learning_rate", "max_lr", "peak_lr", "base_lr", "max_learning_rate"),
    "muon_lr": ("muon_learning_rate", "matrix_lr"),
    "steps": ("max_steps", "num_steps", "train_steps", "num_train_steps", "total_steps", "max_iters", "num_iterations"),
    "tokens": ("max_tokens", "num_tokens", "train_tokens", "max_train_tokens"),
    "minutes": ("max_time", "max_minutes", "max_duration"),
    "warmup_steps": ("warmup", "warmup_iters", "num_warmup_steps", "lr_warmup_steps"),
    "grad_clip": ("gradient_clip_val", "max_grad_norm", "gradient_clipping", "clip", "clip_grad", "clip_grad_norm"),
    "accumulate_grad_batches": ("gradient_accumulation_steps", "grad_accum_steps", "grad_accum", "micro_batches"),
    "stable_fraction": ("decay_start", "stable_ratio"),
    "ema_decay": ("ema", "ema_rate", "use_ema"),
    "weight_decay": ("wd", "l2_penalty"),
    "log_every": ("logging_steps", "log_interval", "log_every_n_steps", "log_freq"),
    "init_from": ("pretrained", "init_checkpoint", "finetune_from", "load_from", "pretrained_model_name_or_path"),
    "rank": ("lora_rank", "lora_r", "r"),
    "alpha": ("lora_alpha",),
    "targets": ("target_modules", "lora_target"),
    "quantize_start": ("quantization_start",),
    "disc_only": ("disc_warmup",),
    "batch_size": ("micro_batch_size", "per_device_train_batch_size", "train_batch_size", "device_batch_size"),
    "workers": ("num_workers", "dataloader_num_workers", "n_workers"),
    "sequence_length": ("block_size", "context_length", "seq_len", "seq_length", "max_seq_len", "max_seq_length", "n_ctx"),
    "condition_dropout": ("cond_drop_prob", "cfg_dropout", "class_dropout_prob", "uncond_p"),
    "path": ("data_path", "data_dir", "train_path", "train_data", "dataset"),
    "val_path": ("eval_path", "validation_path", "val_data"),
    "hidden_size": ("n_embd", "d_model", "embed_dim", "model_dim", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "depth"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_head", "n_kv_heads", "num_kv_heads", "num_query_groups"),
    "intermediate_size": ("ffn_dim", "mlp_dim", "d_ff", "ffn_hidden_size"),
    "max_position_embeddings": ("max_position", "max_positions"),
    "checkpoint_activations": ("gradient_checkpointing", "activation_checkpointing", "grad_checkpoint"),
    "codebook_size": ("n_embed", "n_codes", "num_codes", "num_embeddings", "bins"),
    "codebook_dim": ("e_dim", "code_dim"),
    "num_codebooks": ("n_q", "num_quantizers", "n_codebooks"),
    "out": ("output_dir", "out_dir", "save_dir", "default_root_dir"),
    "resume": ("resume_from_checkpoint", "ckpt", "ckpt_path"),
    "checkpoint_seconds": ("save_steps", "save_interval", "save_every"),
    "seed_everything": ("random_seed", "manual_seed"),
}  # fmt: skip

#: Beginnings of lines in which jsonargparse tells what it tried, and not what is wrong.
_CONTEXT = (
    *("Problem with", "Parser key", "Did not", "Union", "Does not validate", "Subtypes:", "Errors:", "Given value type:"),
    *("Given value: NestedArg", "Expected a path but", "Expected a <class 'NoneType'>"),
)


class FitParser(LightningArgumentParser):
    """Raises `UserError` with one line for a mistake in the configuration."""

    def error(self, message: object, ex: Exception | None = None) -> NoReturn:
        """Raise `UserError` with the key that does not exist, or with the line of jsonargparse's message that tells the cause."""
        text = str(message if message is not None else ex)
        if unknown := re.search(r"(?:[Oo]ption '|unrecognized arguments: --)([\w.]+)", text):
            near = nearest_key(unknown[1])
            hint = f"did you mean {near}?" if near else "--print_config lists all keys"
            raise UserError(f"there is no key {unknown[1]}; {hint}")
        lines = dict.fromkeys(line.strip(" -") for line in text.splitlines() if line.strip())
        causes = [line for line in lines if not line.startswith(_CONTEXT)] or list(lines)
        key = re.search(r'Parser key "([\w.]+)":', text)
        prefix = f"{key[1]}: " if key and not causes[0].startswith("Parser key") else ""
        cause = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", "; ".join(causes[:3])).replace("a typing.Literal", "one of ")
        raise UserError(f"{prefix}{visible(cause[:400])}")


def nearest_key(unknown: str) -> str | None:
    """The key that an unknown one probably stands for: by `OTHER_NAMES`, else by spelling; None where none is near."""
    name = unknown.rpartition(".")[2]
    for key, others in OTHER_NAMES.items():
        if name in others:
            return key
    return next(iter(difflib.get_close_matches(name, [key for key in known_keys() if key != name], 1)), None)


def known_keys() -> list[str]:
    """The last part of every key of trainings, data modules and the Trainer."""
    from unitok import training
    from unitok.data import modules as data

    parser = ArgumentParser()
    trainings = (training.DecoderTraining, training.ImageTokenizerTraining, training.AudioTokenizerTraining)
    for cls in (*trainings, LowRank, data.TokenShards, data.ImageFiles, data.VideoFiles, data.AudioFiles, L.Trainer):
        parser.add_class_arguments(cls, cls.__name__)
    keys = {"out", "resume", "overwrite", "checkpoint_seconds", "model", "data", "trainer", "seed_everything", "init_args"}
    return sorted(keys.union(*(key.split(".")[1:] for key, _ in parser.get_defaults().items())))
