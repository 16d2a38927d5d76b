"""Promises of the image tokenizer's training: exact resume with everything on, whole batches, a quiet discriminator."""

import csv
import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launch import run_processes
from PIL import Image

from unitok.bundle import load_trained_part
from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.configs import CONFIGS
from unitok.errors import UserError
from unitok.media import load_image
from unitok.pretrained import make_config
from unitok.tokenizers import ImageTokenizer, ImageTokenizerConfig
from unitok.tokenizers.quantize import VectorQuantizer
from unitok.training.discriminators import PatchDiscriminator
from unitok.training.fit import run_lightning
from unitok.training.image import ImageLosses, ImageTokenizerTraining
from unitok.training.losses import adaptive_weight, lecam_loss, structure_loss
from unitok.training.monitor import CodebookHealth, codebook_statistics
from unitok.training.perceptual import LPIPS, choose_perceptual, find_lpips
from unitok.training.tokenizer import Adversary

CONFIG = CONFIGS / "scenes" / "image.yaml"

#: Everything that has a state: two optimizers, averages of weights, of logits and of codes, latents waiting for k-means.
EVERYTHING = {
    "quantize_start": "0.3",
    "ema_decay": "0.9",
    "accumulate_grad_batches": "2",
    "losses.perceptual": "multiscale",
    "losses.entropy": "0.01",
    "gan.weight": "0.1",
    "gan.start": "0.4",
    "gan.disc_only": "0.1",
    "gan.ramp": "0.3",
    "gan.adaptive": "true",
    "gan.lecam": "0.01",
    "gan.feature_matching": "0.1",
}


def arguments(out: Path, scenes: Path, steps: int = 10, trainer: tuple[str, ...] = (), **options: str) -> list[str]:
    named = {"minutes": "null", "steps": str(steps), "log_every": "1", "images_every": "0"} | options
    flags = [word for name, value in named.items() for word in (f"--model.init_args.{name}", value)]
    return [
        *("fit", "--config", str(CONFIG), "--out", str(out), "--data.init_args.path", str(scenes / "images")),
        *("--data.init_args.batch_size", "4", "--trainer.enable_progress_bar", "false", *flags, *trainer),
    ]


def state(out: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(out)
    assert newest is not None
    return load_checkpoint(newest)["state_dict"]


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_stopping_after_any_batch_and_resuming_is_bit_for_bit_the_uncut_run(stop, tmp_path, scenes_folder, tmp_path_factory):
    uncut = tmp_path_factory.getbasetemp() / "uncut-image"
    if not uncut.exists():
        run_lightning(arguments(uncut, scenes_folder, **EVERYTHING))
    run_lightning(arguments(tmp_path / "cut", scenes_folder, trainer=("--trainer.max_steps", str(stop)), **EVERYTHING))
    run_lightning(arguments(tmp_path / "cut", scenes_folder, trainer=("--resume", "auto"), **EVERYTHING))
    wanted, found = state(uncut), state(tmp_path / "cut")
    assert wanted.keys() == found.keys()
    assert any(k.startswith("average.") for k in wanted)
    assert any(k.startswith("discriminator.") for k in wanted)
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name


def test_the_average_of_the_weights_is_what_a_bundle_takes(tmp_path, scenes_folder):
    run_lightning(arguments(tmp_path, scenes_folder, steps=4, ema_decay="0.9", quantize_start="0.3"))
    part, _ = load_trained_part("image", tmp_path)
    kept = state(tmp_path)
    name = "encoder.patch_in.weight"
    assert torch.equal(part.state_dict()[name], kept[f"average.module.{name}"])
    assert not torch.equal(kept[f"tokenizer.{name}"], kept[f"average.module.{name}"])


@pytest.mark.parametrize("quantize_start", ["0", "0.3"])
def test_a_batch_in_parts_trains_like_the_whole(tmp_path, scenes_folder, quantize_start):
    """Gradients, clipping and the codebook, which sees the batch once."""
    encoder = {"tokenizer.encoder": "vqgan"}  # equal patches tie in k-means, and rounding decides which code they go to
    options = encoder | {"quantize_start": quantize_start, "gan.start": "0.2", "gan.disc_only": "0", "gan.weight": "0.1"}
    for parts in ("1", "4"):
        run_lightning(arguments(tmp_path / parts, scenes_folder, steps=4, accumulate_grad_batches=parts, **options))
    whole, parts = state(tmp_path / "1"), state(tmp_path / "4")
    for network in ("tokenizer.encoder", "tokenizer.decoder", "tokenizer.quantizer", "discriminator"):
        # Adam makes steps of noise where a gradient is nearly nothing, so all weights of a network are compared at once
        one, four = (torch.cat([v.float().flatten() for k, v in s.items() if k.startswith(network)]) for s in (whole, parts))
        assert (four - one).norm() < 2e-3 * one.norm(), network
    name = "tokenizer.quantizer.codebook.cluster_size"
    torch.testing.assert_close(parts[name], whole[name], atol=0.2, rtol=0)


@pytest.mark.long  # tests/test_distributed.py has two processes on every run
def test_two_processes_train_like_one_with_the_double_batch(tmp_path, scenes_folder):
    options = {"quantize_start": "0.3", "gan.start": "0.4", "gan.disc_only": "0", "gan.weight": "0.1", "gan.lecam": "0.01"}
    options["tokenizer.encoder"] = (
        "vqgan"  # of patches alone, equal ones have equal latents, and rounding decides which code is nearest
    )
    run_lightning(arguments(tmp_path / "one", scenes_folder, steps=6, **options))
    two = arguments(
        tmp_path / "two",
        scenes_folder,
        steps=6,
        trainer=("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.init_args.batch_size", "2"),
        **options,
    )
    run_processes(two)
    one, both = state(tmp_path / "one"), state(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(both[name].float(), tensor.float(), atol=1e-3, rtol=1e-2, msg=name)


def test_the_discriminator_costs_nothing_before_it_starts_and_learns_alone_before_its_loss_counts(
    tmp_path, scenes_folder, monkeypatch
):
    calls = []
    original = PatchDiscriminator.with_features

    def counted(self, pixels):
        calls.append("heard")
        return original(self, pixels)

    forward = PatchDiscriminator.forward
    monkeypatch.setattr(PatchDiscriminator, "with_features", counted)
    monkeypatch.setattr(PatchDiscriminator, "forward", lambda self, pixels: (calls.append("judged"), forward(self, pixels))[1])
    options = {"quantize_start": "0.1", "gan.start": "0.5", "gan.disc_only": "0.2", "gan.ramp": "0.2", "gan.weight": "0.1"}
    run_lightning(arguments(tmp_path / "run", scenes_folder, **options))
    # of 10 steps the last 5 judge (originals and reconstructions); of these the first 3 (shares 0.5, 0.6, 0.7) are alone
    assert calls.count("judged") == 10
    assert calls.count("heard") == 2
    assert calls.index("heard") == 6 + 0


def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_leaves_the_good_checkpoint(tmp_path, scenes_folder, monkeypatch):
    from unitok.training import image as image_training

    run_lightning(arguments(tmp_path, scenes_folder, trainer=("--trainer.max_steps", "3"), **{"losses.gradient": "1"}))
    good = state(tmp_path)
    monkeypatch.setattr(image_training, "gradient_loss", lambda out, target: out.sum() * float("nan"))
    with pytest.raises(UserError, match="step 4: not finite: gradient;"):
        run_lightning(arguments(tmp_path, scenes_folder, trainer=("--resume", "auto"), **{"losses.gradient": "1"}))
    assert all(torch.equal(tensor, good[name]) for name, tensor in state(tmp_path).items())


def test_grids_of_originals_over_reconstructions_are_written(tmp_path, scenes_folder):
    run_lightning(arguments(tmp_path, scenes_folder, steps=4, images_every="3"))
    files = sorted((tmp_path / "reconstructions").glob("*.png"))
    assert [f.name for f in files] == ["step-0000003.png", "step-0000004.png"]
    assert load_image(files[0]).shape == (3, 64, 128)  # four pictures of 32 pixels, two rows
    assert list((tmp_path / "tensorboard").glob("events*"))


# ---- Health ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 8])
def test_equal_images_train_to_finite_numbers_a_word_and_a_tokenizer(tmp_path, caplog, number):
    (tmp_path / "gray").mkdir()
    for i in range(number):
        Image.new("RGB", (32, 32), (128, 128, 128)).save(tmp_path / "gray" / f"{i}.png")
    options = {"quantize_start": "0.2", "gan.start": "0.4", "gan.disc_only": "0.1", "gan.lecam": "0.01", "tokenizer.ch": "32"}
    run = arguments(tmp_path / "run", tmp_path, 10, ("--data.init_args.path", str(tmp_path / "gray")), **options)
    with caplog.at_level(logging.WARNING, logger="unitok"):
        run_lightning(run)
    assert caplog.text.count("of codebook 0 is in use") == 1
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics" / "metrics.csv")))
    numbers = [float(value) for row in rows for value in row.values() if value]
    assert len(rows) == 10
    assert np.isfinite(numbers).all()
    tokenizer, _ = load_trained_part("image", tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in tokenizer.state_dict().values())


@pytest.mark.parametrize("normalize", [True, False])
def test_a_codebook_draws_by_its_seed_alone_and_revives_what_is_dead(normalize):
    made = []
    for other in (1, 2):
        torch.manual_seed(0)
        codebook, vectors = VectorQuantizer(8, size=32, dim=4, normalize=normalize), torch.randn(200, 4)
        torch.manual_seed(other)  # what the model draws meanwhile
        before = torch.get_rng_state()
        codebook.init_codebook(vectors, seed=3)
        batch = vectors[:1].repeat(40, 1) + 0.01 * vectors[:40]  # so near one another that most codes lie idle
        revived = [codebook.update(batch, seed=step) for step in range(120)]
        assert torch.equal(torch.get_rng_state(), before)
        assert sum(revived) > 20
        made.append(codebook.codebook.embed.clone())
    assert torch.equal(*made)
    assert len(made[0].unique(dim=0)) == 32
    near = torch.nn.functional.normalize(batch, dim=-1) if normalize else batch
    assert torch.cdist(made[0], near).min(1).values.max() < 0.5


def test_statistics_of_a_codebook():
    found = codebook_statistics(torch.tensor([0, 0, 1, 1]), 8)
    assert found == {"usage": 0.25, "perplexity": pytest.approx(2.0), "entropy": pytest.approx(1.0)}


def test_an_idle_codebook_is_warned_of_once_and_names_the_remedy(caplog):
    health = CodebookHealth("vq", size=10)
    with caplog.at_level(logging.WARNING, logger="unitok"):
        for step in range(20):
            health.add(torch.randint(0, 4, (50, 1)))
            health.check(step)
    assert len(caplog.records) == 1
    assert "only 40 % of codebook 0 is in use" in caplog.text
    assert "codebook_dim" in caplog.text
    caplog.clear()
    health = CodebookHealth("vq", size=10)
    for step in range(20):
        health.add(torch.randint(0, 10, (50, 1)))
        health.check(step)
    assert not caplog.records


# ---- Losses ---------------------------------------------------------------------------------------------------------


def test_the_adaptive_weight_balances_gradients_and_is_finite_whatever_they_are():
    last = torch.nn.Parameter(torch.ones(3))
    loss, small = (4 * last).sum(), (last * 0.5).sum()
    assert adaptive_weight(loss, small, last) == pytest.approx(8, rel=1e-3)
    for bad in (float("nan"), float("inf")):
        assert torch.isfinite(adaptive_weight(bad * last.sum(), small, last))
        assert torch.isfinite(adaptive_weight(loss, bad * last.sum(), last))
    assert adaptive_weight(loss, 0 * last.sum(), last) == 1e4


def test_lecam_is_zero_where_logits_are_where_the_other_side_usually_is():
    near, far = torch.zeros(4), torch.full((4,), 3.0)
    assert lecam_loss(near, near, near[0], near[0]) == 0
    assert lecam_loss(far, near, near[0], near[0]) == 9


def test_the_structural_loss_is_zero_for_equal_images_and_larger_for_blur_than_for_brightness():
    torch.manual_seed(0)
    a = torch.rand(2, 3, 40, 28) * 2 - 1
    assert structure_loss(a, a) == pytest.approx(0, abs=1e-6)
    blurred = torch.nn.functional.avg_pool2d(a, 3, 1, 1)
    assert structure_loss(blurred, a) > 3 * structure_loss((a + 0.1).clamp(-1, 1), a)
    assert torch.isfinite(structure_loss(a[..., :1, :1], a[..., :1, :1]))


# ---- The perceptual loss --------------------------------------------------------------------------------------------


@pytest.fixture
def lpips_folder(tmp_path) -> Path:
    """Weights in the two published files' layout: torchvision's VGG-16 (with its classifier) and LPIPS's heads."""
    torch.manual_seed(0)
    model = LPIPS()
    trunk = {k: v for k, v in model.state_dict().items() if k.startswith("features.")}
    heads = {f"lin{k[4]}.model.1.weight": v.abs() for k, v in model.state_dict().items() if k.startswith("lin.")}
    folder = tmp_path / "lpips"
    folder.mkdir()
    torch.save(trunk | {"classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16-397923af.pth")
    torch.save(heads, folder / "vgg.pth")
    return folder


def test_auto_takes_lpips_where_its_weights_lie_and_says_which(tmp_path, lpips_folder, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("UNITOK_LPIPS", raising=False)
    with caplog.at_level(logging.INFO, logger="unitok"):
        assert choose_perceptual("auto") == "multiscale"
        assert choose_perceptual("auto", lpips_folder) == "lpips"
        monkeypatch.setenv("UNITOK_LPIPS", str(lpips_folder))
        assert choose_perceptual("auto") == "lpips"
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [
        "perceptual loss: multiscale",
        "perceptual loss: lpips",
        "perceptual loss: lpips",
    ]
    monkeypatch.delenv("UNITOK_LPIPS")
    with pytest.raises(UserError, match=r"perceptual: lpips needs vgg16-397923af.pth and vgg.pth in .*nothing"):
        choose_perceptual("lpips")


def test_nothing_is_fetched_when_networks_and_losses_are_built(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))

    def refuse(*args, **kwargs):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    module = ImageTokenizerTraining(ImageTokenizerConfig(), ImageLosses(perceptual="auto"), Adversary(weight=0.1), steps=1)
    module.configure_model()
    assert module.perceptual_kind == "multiscale"
    LPIPS()


@pytest.mark.parametrize(
    ("name", "stride", "codes", "millions"),
    [
        ("vqgan-f16-256", 16, 16384, 72),
        ("vqgan-f8-256", 8, 16384, 70),
        ("vqgan-f16-512", 16, 8192, 66),
        ("laptop-f8-64", 8, 1024, 4),
    ],
)
def test_the_presets_are_the_networks_that_they_say(name, stride, codes, millions):
    path = CONFIG.parent.parent / "image" / f"{name}.yaml"
    asked = yaml.safe_load(path.read_text())["model"]["init_args"]["tokenizer"]
    with torch.device("meta"):
        model = ImageTokenizer(make_config(ImageTokenizerConfig, asked, name))
    assert (model.stride, model.codebook_size) == (stride, codes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1.5)


def test_lpips_is_a_distance_and_weights_that_lack_a_key_are_an_error(lpips_folder):
    model = LPIPS.from_files(*find_lpips(lpips_folder))
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(model(a, a), torch.zeros(2))
    assert (model(a, b) > 0).all()
    torch.testing.assert_close(model(a, b), model(b, a))
    trunk = torch.load(lpips_folder / "vgg16-397923af.pth")
    del trunk["features.21.bias"]
    torch.save(trunk, lpips_folder / "vgg16-397923af.pth")
    with pytest.raises(UserError, match=r"features\.21\.bias"):
        LPIPS.from_files(*find_lpips(lpips_folder))


def test_a_run_trains_with_lpips_and_goes_on_with_what_it_began_with(tmp_path, scenes_folder, lpips_folder, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    options = {"losses.perceptual": "auto", "quantize_start": "0.3"}
    run_lightning(arguments(tmp_path / "run", scenes_folder, 4, ("--trainer.max_steps", "2"), **options))
    kept = load_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert kept["unitok"]["part"]["perceptual"] == "multiscale"
    monkeypatch.setenv("UNITOK_LPIPS", str(lpips_folder))  # weights that appear later do not change the run
    run_lightning(arguments(tmp_path / "run", scenes_folder, 4, ("--resume", "auto"), **options))
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["unitok"]["part"]["perceptual"] == "multiscale"
    run_lightning(arguments(tmp_path / "new", scenes_folder, 2, **options))
    checkpoint = load_checkpoint(newest_checkpoint(tmp_path / "new"))
    assert checkpoint["unitok"]["part"]["perceptual"] == "lpips"
    assert not any("perceptual" in name for name in checkpoint["state_dict"])  # frozen weights do not fill checkpoints
