"""Shared fixtures: a small data set and an untrained bundle, made once. Everything is hermetic and tiny."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")  # with `-n 2` a core each

from unitok.hardware import bound_waiting

bound_waiting()  # before PyTorch loads, as the command line does

import numpy as np
import pytest
import torch
from vocabularies import make_vocab

from unitok.api import Unitok
from unitok.bundle import make_untrained
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import tokenize
from unitok.document import Document, Segment
from unitok.scenes.files import write_scenes
from unitok.vocab import Vocab

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 24, seed=5, max_objects=2, workers=1)
    return folder


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    make_untrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory, scenes_folder: Path, bundle_folder: Path) -> Path:
    """The small data set as token shards."""
    out = tmp_path_factory.mktemp("data") / "tokens"
    tokenize(Plan(str(scenes_folder), str(out), str(bundle_folder)))
    return out


@pytest.fixture(scope="session")
def tiny(bundle_folder: Path) -> Unitok:
    return Unitok.from_pretrained(bundle_folder)


@pytest.fixture(scope="session")
def vocab() -> Vocab:
    return make_vocab(text=300, image=64, audio=(3, 16), illegal_text=(0,))


@pytest.fixture
def random_document(vocab: Vocab):
    """Makes random documents of every modality, role and length."""

    def make(rng: np.random.Generator, roles: bool = True) -> Document:
        segments = []
        for _ in range(int(rng.integers(1, 6))):
            modality = str(rng.choice(["text", "image", "audio"]))
            role = str(rng.choice(["none", "system", "user", "assistant"])) if roles else "none"
            codes = {
                "text": lambda: rng.integers(1, 300, rng.integers(1, 9)),
                "image": lambda: rng.integers(0, 64, rng.integers(1, 5, 2)),
                "audio": lambda: rng.integers(0, 16, (3, int(rng.integers(1, 6)))),
            }[modality]()
            source = "" if modality == "text" else f"{rng.integers(100)}.bin"
            size = tuple(int(v) for v in rng.integers(1, 99, codes.ndim)) if modality == "image" else ()
            segments.append(Segment(modality, codes, role, bool(rng.integers(2)), source, size))
        return Document(tuple(segments))

    return make


def pytest_make_parametrize_id(val: object) -> str | None:
    """Ids of tests that do not change from process to process: values that print an address or random numbers by their type."""
    return None if val is None or isinstance(val, str | bytes | int | float | type) or callable(val) else type(val).__name__
