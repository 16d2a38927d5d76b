"""Promises of validation: it happens by itself, changes nothing, and its means are over positions and samples, not batches."""

import csv
import json
import logging
import math

import numpy as np
import pytest
import torch
from fitting import arguments, weights
from lightning.pytorch.loggers import CSVLogger

from unitok.bundle import load_trained_part
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.media import load_image
from unitok.training.fit import run_lightning


def rows(out, column):
    files = sorted((out / "metrics").glob("metrics*.csv"), key=lambda f: f.stat().st_mtime)
    found = [row for file in files for row in csv.DictReader(open(file)) if row.get(column)]
    return [(int(row["step"]), float(row[column])) for row in found]


@pytest.fixture
def measured(monkeypatch):
    """The metrics that a logger gets last."""
    told: dict[str, float] = {}
    monkeypatch.setattr(CSVLogger, "log_metrics", lambda self, metrics, step=None: told.update(metrics))
    return told


def same(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_validation_happens_by_itself_in_a_run_and_at_its_end_and_changes_nothing(tmp_path, tokens, caplog):
    run_lightning(arguments("decoder", tmp_path / "without", tokens, 6))  # with dropout
    watched = [
        "--data.init_args.val_path",
        str(tokens),
        "--data.init_args.validations",
        "3",
        "--data.init_args.val_samples",
        "7",
    ]
    with caplog.at_level(logging.INFO, logger="unitok"):
        run_lightning(arguments("decoder", tmp_path / "with", tokens, 6, *watched))
    assert [step for step, _ in rows(tmp_path / "with", "val_loss")] == [1, 3, 5]  # counted from 0, as training's are
    assert [step for step, _ in rows(tmp_path / "with", "loss")] == list(range(6))
    assert "validation: 7 of" in caplog.text
    same(tmp_path / "without", tmp_path / "with")
    own = [*watched, "--trainer.val_check_interval", "4"]
    run_lightning(arguments("decoder", tmp_path / "own", tokens, 6, *own))
    assert [step for step, _ in rows(tmp_path / "own", "val_loss")] == [3, 5]
    # epochs of the Trainer's draw on, with workers that fetch ahead, in a run that stops in the middle of one and goes on
    short = [*watched, "--trainer.limit_train_batches", "2", "--data.init_args.workers", "1"]
    run_lightning(arguments("decoder", tmp_path / "short", tokens, 6, *short, "--trainer.max_steps", "3"))
    run_lightning(arguments("decoder", tmp_path / "short", tokens, 6, *short, "--resume", "auto"))
    same(tmp_path / "without", tmp_path / "short")
    assert len(rows(tmp_path / "short", "val_loss")) == 3  # after each of the Trainer's epochs


def test_a_decoders_validation_is_the_mean_over_positions_whatever_the_batch(tmp_path, tokens, measured):
    weighted = ["--data.init_args.loss_weights", "{text: 3}", "--data.init_args.val_path", str(tokens)]
    weighted += ["--data.init_args.sequence_length", "512", "--data.init_args.max_length", "512"]  # no document in pieces
    weighted += ["--model.init_args.decoder.max_position_embeddings", "512"]
    run_lightning(arguments("decoder", tmp_path / "run", tokens, 3, *weighted))
    found = []
    for batch in ("1", "5", "16"):
        check = arguments("decoder", tmp_path / "run", tokens, 3, *weighted, "--data.init_args.batch_size", batch)
        measured.clear()
        run_lightning(["validate", *check[1:], "--resume", "auto"])
        found.append({name: float(value) for name, value in measured.items() if name.startswith("val_")})
    decoder, _ = load_trained_part("model", tmp_path / "run")
    dataset = TokenDataset(tokens)
    grammar, text = Grammar(dataset.vocab), dataset.vocab.range("text")
    total = weight = bits = letters = 0.0
    for i in range(len(dataset)):  # each document alone, every position by itself
        ids, kinds = dataset.ids(i), grammar.targets(dataset.ids(i))
        with torch.no_grad():
            span_positions = torch.from_numpy(grammar.span_positions(ids))[None]
            logits = decoder(torch.from_numpy(ids)[None], span_positions=span_positions)[0].double()
        learnt = np.full(len(ids), dataset.placed(i)[-1].loss)
        before = None
        for p in dataset.placed(i):
            learnt[p.start : p.start + p.length] = p.loss
            if before and before.loss and before.role != p.role:  # the end of a turn, which the next role's token says
                learnt[p.start] = True
            before = p
        for at, target in enumerate(ids[1:].tolist()):
            if not learnt[at + 1]:
                continue
            legal = np.concatenate([np.arange(a, b) for a, b in grammar.allowed_sets[kinds[at]]])
            factor = 3.0 if text.offset <= target < text.stop else 1.0
            normalizer = logits[at, legal].logsumexp(0)
            nll = float(normalizer - logits[at, target])
            total += factor * (nll + 1e-5 * float(normalizer) ** 2) if len(legal) > 1 else 0.0
            weight += factor
            if factor == 3.0 and len(legal) > 1:
                bits, letters = bits + nll / math.log(2), letters + 1
    for values in found:
        assert values["val_loss"] == pytest.approx(total / weight, rel=1e-5)
        assert values["val_bits_per_token/text"] == pytest.approx(bits / letters, rel=1e-5)
        assert values == pytest.approx(found[0], rel=1e-5)
    assert len(found[0]) > 10


def test_the_verb_test_measures_the_split_test_and_without_data_measuring_is_refused(tmp_path, bundle_folder, measured):
    texts = {"train": "a", "validation": "b b b", "test": "something else"}
    for name, splits in (("all", texts), ("two", ("train", "validation"))):
        lines = [json.dumps({"text": texts[split], "split": split}) for split in splits for _ in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        tokenize(Plan(str(tmp_path / f"{name}.jsonl"), str(tmp_path / name), str(bundle_folder)))
    run = [tmp_path / "run", tmp_path / "all", 3]
    run_lightning(arguments("decoder", *run))
    found = {}
    for verb, prefix in (("validate", "val"), ("test", "test")):
        measured.clear()
        run_lightning([verb, *arguments("decoder", *run)[1:], "--resume", "auto"])
        found[verb] = float(measured[f"{prefix}_padding_fraction"])
    assert found["test"] < found["validate"] - 0.1  # its texts are longer
    with pytest.raises(UserError, match="nothing to measure: give data.val_path, or data with a split 'test'"):
        run_lightning(["test", *arguments("decoder", run[0], tmp_path / "two", 3)[1:], "--resume", "auto"])


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_tokenizers_validation_is_the_mean_over_samples_whatever_the_batch(kind, tmp_path, scenes_folder, measured):
    data = scenes_folder / {"image": "images", "audio": "audio"}[kind]
    run_lightning(arguments(kind, tmp_path / "run", data, 3))
    found = []
    for batch in ("5", "24"):
        more = ["--data.init_args.batch_size", batch, "--data.init_args.val_path", str(data)]
        measured.clear()
        run_lightning(["validate", *arguments(kind, tmp_path / "run", data, 3, *more)[1:], "--resume", "auto"])
        found.append({name: float(value) for name, value in measured.items() if name.startswith("val_")})
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len(found[0]) == {"image": 2, "audio": 4}[kind]  # one for each level, all levels, bad files
    if kind == "image":
        tokenizer, _ = load_trained_part("image", tmp_path / "run")
        with torch.no_grad():
            images = [load_image(file)[None] for file in sorted(data.iterdir())]
            errors = [float((tokenizer(image).signal - image).square().mean() / 4) for image in images]
        assert found[0]["val_psnr_db"] == pytest.approx(np.mean([-10 * math.log10(e) for e in errors]), rel=1e-4)
