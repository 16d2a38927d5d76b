"""Which copy of a decoder generates: compiled code on a CPU where there is a compiler, else PyTorch."""

import time

import torch

from unitok.errors import UserError
from unitok.model.decoder import Decoder
from unitok.model.inference import InferenceDecoder
from unitok.model.native import library, why_not
from unitok.model.native.decoder import DTYPES, NativeDecoder

#: A decoder arranged for generation, with `read`, `step`, `head_of` and `new_cache`.
GenerationDecoder = InferenceDecoder | NativeDecoder


def copy_for_generation(decoder: Decoder, weights: str = "") -> GenerationDecoder:
    """Return a copy of a decoder's present weights, arranged for generation. It is not trained.

    weights: type of its matrices, one of `DTYPES`; "": the decoder's own. Errors: `UserError` where other types than the decoder's are not to
    be had.
    """
    if decoder.device.type == "cpu" and library() is not None:
        own = "bfloat16" if decoder.lm_head.weight.dtype == torch.bfloat16 else "float32"
        return NativeDecoder(decoder, weights or own)
    if weights:
        reason = why_not() if decoder.device.type == "cpu" else f"this one is on {decoder.device}"
        raise UserError(f"dtype {weights}: only for a decoder on a CPU with a C++ compiler; {reason}")
    return InferenceDecoder(decoder)


@torch.no_grad()
def milliseconds_per_token(decoder: Decoder, tokens: int = 40) -> dict[str, float]:
    """Time of a step by type of the weights, measured here on a decoder on a CPU: float32 alone without a compiler."""
    kinds = DTYPES if library() is not None else ["float32"]
    copies = {kind: NativeDecoder(decoder, kind) if len(kinds) > 1 else InferenceDecoder(decoder) for kind in kinds}
    ids, found = torch.zeros(1, 1, dtype=torch.int64), dict.fromkeys(copies, float("inf"))
    tokens = min(tokens, decoder.config.max_position_embeddings)
    for _ in range(3):  # in turns; the best of three
        for kind, copy in copies.items():
            cache, began = copy.new_cache(1, tokens), time.perf_counter()
            for i in range(tokens):
                copy.step(ids, torch.tensor([[i]]), cache, i + 1, torch.zeros_like(ids), i)
            found[kind] = min(found[kind], 1000 * (time.perf_counter() - began) / tokens)
    return found


def fastest_weights(decoder: Decoder) -> str:
    """Return the type of weights with which a decoder generates fastest here, by measurement; "" where there is no choice."""
    if decoder.device.type != "cpu" or library() is None:
        return ""
    found = milliseconds_per_token(decoder)
    return min(found, key=lambda kind: found[kind])
