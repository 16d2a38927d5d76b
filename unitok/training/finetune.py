"""Starting from something: an earlier decoder, grown to a larger vocabulary, of which some parameters are trained."""

import difflib
import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unitok.errors import UserError
from unitok.model.decoder import Decoder, DecoderConfig
from unitok.pretrained import known_vocabulary


def start_decoder(path: Path, wanted: DecoderConfig, vocab: Any, where: str) -> tuple[Decoder, int]:
    """A decoder to go on from, grown to `wanted.vocab_size` ids; -> it, and the first of its new ids.

    Its architecture stays; dropout, back end and checkpointed activations are the wanted ones. New ids begin with the mean of
    the embeddings and zeros in the head. Errors: `UserError` where nothing says what its ids mean, or where they mean something
    else than those of `vocab`, the vocabulary of the data at `where`.
    """
    known = known_vocabulary(path)
    vocab.check_covers(type(vocab).load(known), where, str(path))
    old = Decoder.from_pretrained(path)
    size = old.config.vocab_size
    if size > wanted.vocab_size:
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
                raise UserError("train_new_tokens_only: the data has no ids that the decoder of init_from does not know")
            p.register_hook(lambda g: torch.cat([torch.zeros_like(g[:new_ids_from]), g[new_ids_from:]]))
    if not any(p.requires_grad for p in decoder.parameters()):
        raise UserError(f"freeze {freeze}: nothing is left to train")
