"""Starting from an earlier decoder: its vocabulary may grow, and only some of its parameters may be trained."""

import difflib
import fnmatch
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.hub import local
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.pretrained import known_vocabulary
from unitok.vocab import Vocab


def start_decoder(path: Path, config: DecoderConfig, vocab: Vocab, data: str) -> tuple[Decoder, int]:
    """The decoder of the bundle or folder `path`, or of a built-in bundle, with its vocabulary grown to `config.vocab_size`; and its first new token.

    The architecture is that of `path`; dropout, attention back end and activation checkpointing are those of `config`. New
    tokens start as `Decoder.grown` says. vocab: of the data, whose path is `data`. Errors:
    `UserError` where nothing says what the decoder's tokens mean, or where they mean something else than those of `vocab`.
    """
    path = local(path)
    known = known_vocabulary(path)
    vocab.check_covers(Vocab.load(known), data, str(path))
    old = Decoder.from_pretrained(path)
    size = old.config.vocab_size
    if size > config.vocab_size:
        raise UserError(
            f"{path}: a decoder of {size} tokens, the data has {config.vocab_size}: tokenize with the bundle it belongs to"
        )
    decoder = Decoder(
        replace(
            old.config,
            vocab_size=config.vocab_size,
            dropout=config.dropout,
            attention=config.attention,
            checkpoint_activations=config.checkpoint_activations,
        )
    )
    decoder.load_state_dict(old.grown(config.vocab_size).state_dict())
    own = vocab.ranges[0]
    return decoder, size if own.kind == "special" else own.stop  # those after an imported language model's own are new, too


def choose_trained(decoder: Decoder, freeze: list[str], first_new_token: int | None = None) -> None:
    """Freeze parameters whose names match a pattern; with `first_new_token`, everything but the rows from that token on."""
    names = [name for name, _ in decoder.named_parameters()]
    for pattern in freeze:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, 1, 0.0)[0]
            raise UserError(f"freeze {pattern!r}: no parameter of that name; the nearest is {near}")
    rows = ("model.embed_tokens.weight", "lm_head.weight")
    for name, p in decoder.named_parameters():
        if any(fnmatch.fnmatch(name, pattern) for pattern in freeze) or (first_new_token is not None and name not in rows):
            p.requires_grad_(False)
        elif first_new_token is not None:
            if first_new_token >= len(p):
                raise UserError("train_new_tokens_only: the data has no tokens that the decoder of init_from does not know")
            p.register_hook(partial(_zero_rows_before, first_new_token))
    if not any(p.requires_grad for p in decoder.parameters()):
        raise UserError(f"freeze {freeze}: nothing is left to train")


def _zero_rows_before(first: int, gradient: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(gradient[:first]), gradient[first:]])
