"""Keywords that do not exist: a `UserError` that names the one that is meant, also where other libraries call it otherwise."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

from unitok.errors import UserError

#: What other libraries call our arguments, by the argument that is meant.
OTHER_NAMES = {
    "n": "num_return_sequences num_images_per_prompt num_outputs num_samples",
    "max_new_tokens": "max_length max_tokens max_completion_tokens",
    "guidance_scale": "cfg_scale cfg guidance",
    "modalities": "output outputs modality response_format",
    "generation_config": "config sampling_params params",
    "negative_prompt": "negative_prompts",
    "prompt": "prompts inputs input_ids text_prompt input messages",
    "documents": "document prompt prompts inputs input_ids input messages text texts",
    "seed": "generator random_state",
    "progress": "verbose use_tqdm",
    "dtype": "torch_dtype precision",
    "device": "device_map",
    "name": "pretrained_model_name_or_path model_id repo_id path",
    "token": "use_auth_token",
}
#: What to say of arguments that have no like here, by the argument that comes nearest.
ADVICE = {
    "temperature": ("do_sample", "for greedy decoding give temperature=0"),
    "best_of": ("num_beams", "there is no beam search; best_of keeps the best of several"),
    "dtype": ("quantization_config", 'dtype="int8" generates with one byte a weight, on a CPU'),
    "name": ("trust_remote_code", "leave it out: nothing in a bundle is executed"),
}

P = ParamSpec("P")
R = TypeVar("R")


def checks_names(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: an argument that does not exist is a `UserError` that names the one that is meant."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    hints = {other: f"did you mean {name}?" for name in names for other in OTHER_NAMES.get(name, "").split()}
    hints |= dict(ADVICE[name] for name in names if name in ADVICE)

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        check_names(keywords, names, function.__name__, hints)
        return function(*args, **keywords)

    return call


def check_names(given: Iterable[str], names: Sequence[str], where: str, hints: Mapping[str, str] | None = None) -> None:
    """Raise `UserError` for a name that does not exist, with the one that is meant. hints: what other libraries' names mean."""
    for name in given:
        if name in names:
            continue
        near = get_close_matches(str(name), names, 1, 0.6)
        meant = (hints or {}).get(name) or (f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}")
        raise UserError(f"{where}: no {name!r}; {meant}")
