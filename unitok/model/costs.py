"""What a decoder costs, counted from its configuration alone: parameters, FLOPs, memory, hours.

FLOPs of training count a multiplication and an addition as two, the backward pass as twice the forward, and attention over
the causal half: 6 x (matrix parameters, the head's included, the embedding's not) + 6 x layers x H x D x context for each
id. Others count the whole square (PaLM's formula has 12): their MFU reads higher for the same speed.
"""

from dataclasses import dataclass

import torch

from unitok.model.decoder import Decoder, DecoderConfig

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Costs:
    """Numbers of one decoder.

    Args:
        parameters: all of them; in_blocks: those of the blocks; in_matrices: those multiplied for each id.
        flops: of training, an id, at a context. flops_forward: of the forward pass alone.
    """

    parameters: int
    in_blocks: int
    in_matrices: int
    flops: float
    flops_forward: float


def count(config: DecoderConfig, context: int | None = None) -> Costs:
    """Costs at `context` ids a document (default: the longest). Nothing is allocated."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Decoder(config).named_parameters()}
    context = context or config.max_position_embeddings
    in_matrices = sum(s.numel() for n, s in shapes.items() if len(s) == 2 and n.endswith(("proj.weight", "lm_head.weight")))
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    forward = 2 * in_matrices + 2 * attention
    return Costs(
        parameters=sum(s.numel() for s in shapes.values()),
        in_blocks=sum(s.numel() for n, s in shapes.items() if ".layers." in n),
        in_matrices=in_matrices,
        flops=3 * forward,
        flops_forward=forward,
    )


def activation_floats(config: DecoderConfig) -> int:
    """Numbers that one position keeps for the backward pass, about: inputs of norms, matrices, rotations and attention.

    With checkpointed activations one block's, computed again in the backward pass, come on top for a while.
    """
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    norms = {"rms": 2, "layer": 2, "none": 0}[config.qk_norm]
    attention = (norms + 2) * (queries + keys) // 2 + 2 * (queries + 2 * keys) // 2 + 2 * queries
    a_block = 5 * config.hidden_size + attention + 4 * config.intermediate_size
    kept = config.num_hidden_layers * (config.hidden_size if config.checkpoint_activations else a_block)
    return kept + 2 * config.hidden_size


def memory_bytes(config: DecoderConfig, positions: int, rows: int, context: int, optimizer: str = "adamw") -> dict[str, int]:
    """Bytes of what is in memory.

    Args:
        positions: ids of a training batch on one device. rows, context: of a KV cache for generation.
        optimizer: `adamw` keeps two numbers a parameter, `muon` one for the matrices of the blocks.

    Returns:
        by name: weights, gradients, optimizer (fp32 all three, as in mixed precision), activations and KV cache (bf16).
    """
    n = count(config)
    states = 2 * n.parameters - (n.in_blocks if optimizer == "muon" else 0)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rows * context
    return {
        "weights": BYTES["fp32"] * n.parameters,
        "gradients": BYTES["fp32"] * n.parameters,
        "optimizer": BYTES["fp32"] * states,
        "activations": BYTES["bf16"] * activation_floats(config) * positions,
        "kv_cache": BYTES["bf16"] * cache,
    }


def hours(config: DecoderConfig, ids: float, flops_a_second: float, mfu: float, devices: int, context: int) -> float:
    """Hours to train on `ids` ids at a share `mfu` of the hardware's peak."""
    return count(config, context).flops * ids / (flops_a_second * mfu * devices) / 3600
