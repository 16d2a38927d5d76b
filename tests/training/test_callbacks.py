"""Promises of samples while training: which seed holds, and mistakes in their config stop every process."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest

from unitok.bundle import Bundle
from unitok.errors import UserError
from unitok.sample.requests import config_for
from unitok.training import DecoderTraining, Samples
from unitok.vocab import Vocab


def samples(bundle: Path, **more) -> Samples:
    return Samples(str(bundle), "prompts.jsonl", **more)


def test_the_seed_of_samples_is_the_callbacks_else_the_configs_else_the_bundles(bundle_folder):
    bundle = Bundle.from_pretrained(bundle_folder, parts=[])
    bundle.generation_config = {"seed": 3}
    own = {"seed": 4}
    for more, seed in (({}, 3), ({"generation_config": own}, 4), ({"generation_config": own, "seed": 0}, 0)):
        assert config_for(bundle, samples(bundle_folder, **more).config).seed == seed
    for name, value in (("n", 2), ("modalities", "text")):
        with pytest.raises(UserError, match=f"^Samples: generation_config: {name} is set by the callback"):
            samples(bundle_folder, generation_config={name: value})


@pytest.mark.parametrize("first", [True, False])
def test_every_process_checks_the_names_of_the_samples_config(bundle_folder, first):
    module = create_autospec(DecoderTraining, instance=True)
    module.data, module.device = SimpleNamespace(vocab=Vocab.load(bundle_folder / "vocab.json"), path="data"), "cpu"
    callback = samples(bundle_folder, generation_config={"smell": {"top_k": 2}})
    with pytest.raises(UserError, match="no tokenizer 'smell'; the bundle has text, image, audio"):
        callback.on_fit_start(SimpleNamespace(is_global_zero=first), module)
