"""What a decoder costs, counted from its configuration alone: parameters, FLOPs, memory, hours.

Training FLOPs count a multiplication and an addition as two, the backward pass as twice the forward pass, and attention over the
causal half: 6 x (parameters in matrices, with the head, without the embedding) + 6 x layers x H x D x context per token. Others
count the whole square (PaLM's formula has 12), so their MFU is higher for the same speed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from unitok.errors import UserError
from unitok.hardware import HARDWARE
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.pretrained import unallocated

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Costs:
    """Parameters and FLOPs of one decoder."""

    parameters: int
    in_blocks: int  # those of them in the blocks
    in_matrices: int  # those that are multiplied for each token
    flops: float  # training FLOPs per token
    flops_forward: float  # FLOPs of the forward pass per token


def count(config: DecoderConfig, context: int | None = None) -> Costs:
    """Costs at `context` tokens per document (default: the longest). Nothing is allocated."""
    with unallocated():
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
    """Approximate count of floats that one position keeps for the backward pass: inputs of norms, matrices, rotations and attention.
    With checkpointed activations those of one block are added for a while."""
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    norms = {"rms": 2, "layer": 2, "none": 0}[config.qk_norm]
    attention = (norms + 2) * (queries + keys) // 2 + 2 * (queries + 2 * keys) // 2 + 2 * queries
    per_block = 5 * config.hidden_size + attention + 4 * config.intermediate_size
    kept = config.num_hidden_layers * (config.hidden_size if config.checkpoint_activations else per_block)
    return kept + 2 * config.hidden_size


def memory_bytes(config: DecoderConfig, positions: int, rows: int, context: int, optimizer: str = "adamw") -> dict[str, int]:
    """Bytes by name: weights, gradients and optimizer state (all fp32, as in mixed precision), activations and kv_cache (bf16).

    positions: tokens of a training batch on one device. rows, context: size of the KV cache for generation. optimizer: `adamw` keeps
    two numbers per parameter, `muon` one for each parameter of the blocks (two with `muon_every` above 1).
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


def gathered(config: DecoderConfig, costs: Costs) -> int:
    """Most parameters that FSDP2 gathers at once: embedding and head for a whole step, the present block and the next one."""
    return costs.parameters - costs.in_blocks + 2 * costs.in_blocks // config.num_hidden_layers


def hours(config: DecoderConfig, tokens: float, flops_per_second: float, mfu: float, devices: int, context: int) -> float:
    """Hours to train on so many tokens at a fraction `mfu` of the hardware's peak FLOPs per second."""
    return count(config, context).flops * tokens / (flops_per_second * mfu * devices) / 3600


def cost_table(
    config: DecoderConfig,
    content: Mapping[str, str],
    tokens: float = 0,
    hardware: str = "h200",
    devices: int = 1,
    mfu: float = 0.4,
    context: int = 0,
    batch: int = 65_536,
) -> dict[str, str]:
    """What a decoder costs, in words: the lines that `unitok inspect` prints, by name.

    content: lines that say how many tokens content takes, by name. tokens: to train on; 0: 20 per parameter. hardware: one of
    `HARDWARE`. devices: number of them. mfu: fraction of their peak. context: tokens per document; 0: the longest that the decoder
    takes. batch: tokens of a training batch on one device.
    """
    if not 0 < mfu <= 1 or devices < 1 or tokens < 0 or batch < 1 or context < 0:
        raise UserError("mfu is in (0, 1], devices and batch at least 1, tokens and context at least 0")
    assumed = "" if config.vocab_size else " (assumed: the data sets it)"
    c = replace(config, vocab_size=config.vocab_size or 10_000)
    context = context or c.max_position_embeddings
    costs = count(c, context)
    tokens = tokens or 20.0 * costs.parameters
    memory = {name: size / 1e9 for name, size in memory_bytes(c, batch, 1, context).items()}
    state = memory["weights"] + memory["gradients"] + memory["optimizer"]
    time = hours(c, tokens, HARDWARE[hardware], mfu, devices, context)
    step = costs.flops * batch / (HARDWARE[hardware] * mfu)
    sharded = state / devices + BYTES["fp32"] * gathered(c, costs) / 1e9
    heads = f"{c.num_attention_heads} heads of {c.head_dim}, {c.num_key_value_heads} for keys and values"
    counts = f"{_short(costs.in_blocks)} in blocks, {_short(costs.in_matrices)} multiplied per token"
    return {
        "shape": f"{c.num_hidden_layers} layers, {c.hidden_size} wide, SwiGLU {c.intermediate_size}, {heads}",
        "vocabulary": f"{c.vocab_size:,} tokens{assumed}",
        "parameters": f"{_short(costs.parameters)}: {counts}",
        "FLOPs per token": f"{_short(costs.flops)} to train, {_short(costs.flops_forward)} to read, at {context:,} tokens per document",
        "training state": f"{state:.2f} GB: weights, gradients and AdamW in fp32, on one device",
        **(
            {"on each device": f"{sharded:.2f} GB of it with FSDP2 on {devices}: its part, and the parts that a step gathers"}
            if devices > 1
            else {}
        ),
        "checkpoint": f"{memory['weights'] + memory['optimizer']:.2f} GB: weights and AdamW's state",
        "activations": f"about {memory['activations']:.2f} GB in bf16 for {batch:,} tokens",
        "inference": f"{memory['weights'] / 2:.2f} GB of weights in bf16, {memory['kv_cache']:.3f} GB of KV cache for {context:,} tokens",
        **content,
        "step": f"{step:.2f} s for {_short(batch * devices)} tokens, {_short(batch)} on each device",
        "data": f"about {4 * tokens / 1e9:,.1f} GB of token shards (int32), if no document comes twice",
        "time": f"{time:,.1f} hours for {_short(tokens)} tokens on {devices} x {hardware} at {mfu:.0%} MFU",
    }


def _short(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in {"E": 1e18, "P": 1e15, "T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}.items():
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
