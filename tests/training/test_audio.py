"""Promises of the audio tokenizer's training: exact resume with everything on, whole batches, levels that live, no NaN."""

import csv
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from launch import run_processes

from unitok.bundle import load_trained_part, make_bundle
from unitok.checkpoints import load_checkpoint, newest_checkpoint
from unitok.configs import CONFIGS
from unitok.data.folders import AudioDataset
from unitok.errors import UserError
from unitok.tokenizers import AudioTokenizer
from unitok.tokenizers.quantize import ResidualQuantizer
from unitok.training.audio import AudioLosses, AudioTokenizerTraining
from unitok.training.clusters import FeatureDistillation, PhoneClusters, averaged
from unitok.training.fit import run_lightning
from unitok.training.losses import discriminator_loss, generator_loss, mel_filters, mel_loss, spectral_loss
from unitok.training.tokenizer import Adversary

CONFIG = CONFIGS / "scenes" / "audio.yaml"

#: Everything that has a state: two optimizers, averages of weights, logits, codes and gradients, dropout of levels.
EVERYTHING = {
    "quantize_start": "0.3",
    "ema_decay": "0.9",
    "accumulate_grad_batches": "2",
    "losses.mel": "1.0",
    "losses.l1": "0.1",
    "losses.balance": "true",
    "tokenizer.quantizer_dropout": "0.5",
    "gan.weight": "1",
    "gan.start": "0.4",
    "gan.disc_only": "0.1",
    "gan.ramp": "0.3",
    "gan.lecam": "0.01",
    "gan.filters": "4",
    "gan.windows": "[128, 256]",
    "losses.semantic": "0.5",
}


def arguments(out: Path, scenes: Path, steps: int = 10, trainer: tuple[str, ...] = (), **options: str) -> list[str]:
    named = {
        "minutes": "null",
        "steps": str(steps),
        "log_every": "1",
        "audio_every": "0",
        "tokenizer.n_filters": "16",
    } | options
    flags = [word for name, value in named.items() for word in (f"--model.init_args.{name}", value)]
    return [
        *("fit", "--config", str(CONFIG), "--out", str(out), "--data.init_args.path", str(scenes / "audio")),
        *("--data.init_args.batch_size", "4", "--trainer.enable_progress_bar", "false", *flags, *trainer),
    ]


def state(out: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(out)
    assert newest is not None
    return load_checkpoint(newest)["state_dict"]


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_stopping_after_any_batch_and_resuming_is_bit_for_bit_the_uncut_run(stop, tmp_path, scenes_folder, tmp_path_factory):
    uncut = tmp_path_factory.getbasetemp() / "uncut-audio"
    if not uncut.exists():
        run_lightning(arguments(uncut, scenes_folder, **EVERYTHING))
    run_lightning(arguments(tmp_path / "cut", scenes_folder, trainer=("--trainer.max_steps", str(stop)), **EVERYTHING))
    run_lightning(arguments(tmp_path / "cut", scenes_folder, trainer=("--resume", "auto"), **EVERYTHING))
    wanted, found = state(uncut), state(tmp_path / "cut")
    assert wanted.keys() == found.keys()
    assert any(k.startswith("discriminator.") for k in wanted)
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("balance", ["false", "true"])
def test_a_batch_in_parts_trains_like_the_whole(tmp_path, scenes_folder, balance):
    options = {"quantize_start": "0.3", "losses.spectral_from": "0", "tokenizer.codebook_size": "8", "losses.balance": balance}
    (tmp_path / "scenes" / "audio").mkdir(parents=True)
    for file in (scenes_folder / "audio").glob(
        "??????.wav"
    ):  # without those of conversations, which have two codes that are nearly equal
        shutil.copy(file, tmp_path / "scenes" / "audio")
    for parts in ("1", "4"):
        run_lightning(arguments(tmp_path / parts, tmp_path / "scenes", steps=4, accumulate_grad_batches=parts, **options))
    whole, parts = state(tmp_path / "1"), state(tmp_path / "4")
    for network in ("tokenizer.encoder", "tokenizer.decoder", "tokenizer.quantizer"):
        one, four = (torch.cat([v.float().flatten() for k, v in s.items() if k.startswith(network)]) for s in (whole, parts))
        assert (four - one).norm() < 5e-3 * one.norm(), network


@pytest.mark.long  # tests/test_distributed.py has two processes on every run
def test_two_processes_train_like_one_with_the_double_batch(tmp_path, scenes_folder):
    options = {"quantize_start": "0.3", "tokenizer.codebook_size": "8"}
    run_lightning(arguments(tmp_path / "one", scenes_folder, steps=6, **options))
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.init_args.batch_size", "2")
    run_processes(arguments(tmp_path / "two", scenes_folder, steps=6, trainer=two, **options))
    one, both = state(tmp_path / "one"), state(tmp_path / "two")
    for network in ("tokenizer.encoder", "tokenizer.decoder", "tokenizer.quantizer"):
        a, b = (torch.cat([v.float().flatten() for k, v in s.items() if k.startswith(network)]) for s in (one, both))
        assert (a - b).norm() < 5e-3 * a.norm(), network


def test_training_leaves_audio_spectrograms_and_scores_by_level(tmp_path, scenes_folder):
    more = ("--data.init_args.val_path", str(scenes_folder / "audio"), "--trainer.val_check_interval", "3")
    run_lightning(arguments(tmp_path, scenes_folder, 6, more, quantize_start="0.3", audio_every="3", ema_decay="0.5"))
    assert {f.name for f in (tmp_path / "reconstructions").iterdir()} >= {"step-0000003.wav", "step-0000003.png"}
    metrics = (tmp_path / "metrics" / "metrics.csv").read_text()
    for column in (
        "val_si_sdr_db/1",
        "val_si_sdr_db/2",
        "codebook_usage/1",
        "codebook_entropy/0",
        "codebook_revived",
        "snr_db",
    ):
        assert column in metrics
    part, _ = load_trained_part("audio", tmp_path)
    kept = state(tmp_path)
    name = "encoder.patch_in.weight"
    assert torch.equal(part.state_dict()[name], kept[f"average.module.{name}"])


def test_clusters_tell_sounds_apart_whatever_their_level_and_a_first_level_learns_them():
    time = torch.arange(8000) / 8000
    sounds = torch.stack([torch.sin(2 * torch.pi * f * time) + 0.3 * torch.sin(6 * torch.pi * f * time) for f in (200, 900)])
    switched = torch.where((time * 5).long() % 2 == 0, sounds[0], sounds[1])[None, None]  # five times a second
    clusters = PhoneClusters(8000, 160, 16, clusters=4)
    noise = 0.001 * torch.randn(1, 1, 8000, generator=torch.Generator().manual_seed(0))
    features = clusters.features(switched + noise)
    assert features.shape == (1, 50, 26)
    quiet = clusters.features((switched + noise) / 10)
    assert (quiet[..., :13] - features[..., :13]).abs().mean() < 0.1 * features[..., :13].abs().mean()
    for step in range(5):
        clusters.learn(features.flatten(0, 1), step)
    found = clusters.codebook.nearest((features - clusters.mean) / clusters.std)[0]
    inside = (torch.arange(50) % 10 >= 2) & (torch.arange(50) % 10 < 8)  # away from the switches
    first, second = (set(found[inside & (torch.arange(50) // 10 % 2 == side)].tolist()) for side in (0, 1))
    assert not first & second
    latents = torch.nn.functional.one_hot(found, 16)[None].float()
    optimizer = torch.optim.Adam(clusters.head.parameters(), 0.3)
    losses = []
    for _ in range(40):
        losses.append(clusters.loss(latents, switched + noise))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 < losses[0]
    with pytest.raises(UserError, match="longer than a phone"):
        PhoneClusters(8000, 1600, 16, clusters=4)


def test_a_semantic_level_needs_clusters_and_keeps_their_number(tmp_path, scenes_folder):
    with pytest.raises(UserError, match="losses.semantic needs quantize_start above 0"):
        run_lightning(arguments(tmp_path / "run", scenes_folder, steps=2, **{"quantize_start": "0", "losses.semantic": "1"}))
    some = {"quantize_start": "0.5", "losses.semantic": "1", "losses.semantic_clusters": "8"}
    run_lightning(arguments(tmp_path / "run", scenes_folder, steps=2, **some))
    for changed in ("16", "0"):
        other = some | ({"losses.semantic_clusters": changed} if changed != "0" else {"losses.semantic": "0"})
        with pytest.raises(UserError, match=f"semantic_clusters is {changed}, the checkpoint has 8"):
            run_lightning(arguments(tmp_path / "run", scenes_folder, steps=3, trainer=("--resume", "auto"), **other))


def test_a_first_level_learns_the_features_of_a_folder_and_keeps_their_size(tmp_path, scenes_folder, caplog):
    (tmp_path / "features").mkdir()
    files = sorted((scenes_folder / "audio").glob("*.wav"))
    for file in files[1:]:
        samples = soundfile.read(file)[0]
        frames = samples[: len(samples) // 160 * 160].reshape(-1, 160)  # fifty per second
        power = np.abs(np.fft.rfft(frames * np.hanning(160))) ** 2
        features = np.log(power[:, :24].reshape(len(power), 6, 4).sum(-1) + 1e-4)
        np.save(tmp_path / "features" / f"{file.stem}.npy", features.astype(np.float16))
    some = {"quantize_start": "0", "losses.semantic": "5", "accumulate_grad_batches": "2"}
    taught = ("--data.init_args.features", str(tmp_path / "features"))
    with caplog.at_level(logging.WARNING, logger="unitok"):
        run_lightning(arguments(tmp_path / "run", scenes_folder, 60, taught, **some))
    assert f"left out: {files[0]}: no {files[0].stem}.npy in {tmp_path / 'features'}" in caplog.text
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics" / "metrics.csv")))
    learned = [float(row["loss/semantic"]) / 5 for row in rows]
    assert np.mean(learned[-5:]) < np.mean(learned[:5]) - 0.05
    run_lightning(arguments(tmp_path / "run", scenes_folder, 61, (*taught, "--resume", "auto"), **some))
    validate = ["validate", *arguments(tmp_path / "run", scenes_folder, 61, ("--resume", "auto"), **some)[1:]]
    run_lightning([*validate, "--data.init_args.val_path", str(scenes_folder / "audio")])  # which needs no features
    other = some | {"quantize_start": "0.5"}
    with pytest.raises(UserError, match="model.features is 0, the checkpoint has 6"):
        run_lightning(arguments(tmp_path / "run", scenes_folder, 62, ("--resume", "auto"), **other))
    with pytest.raises(UserError, match="absent: no such folder"):
        run_lightning(arguments(tmp_path / "other", scenes_folder, 2, ("--data.init_args.features", "absent"), **some))
    with pytest.raises(UserError, match="data.features are for losses.semantic"):
        run_lightning(arguments(tmp_path / "other", scenes_folder, 2, taught))
    classes = {"losses.semantic": "1.0", "losses.semantic_classes": "true"}
    with pytest.raises(UserError, match=r"losses.semantic_classes: data.features has their probabilities"):
        run_lightning(arguments(tmp_path / "other", scenes_folder, 2, **classes))


def test_bad_features_are_named(tmp_path):
    (tmp_path / "features").mkdir()
    (tmp_path / "audio").mkdir()
    for name in ("a", "b.0001", "b.0002"):
        soundfile.write(tmp_path / "audio" / name, noise_of(0.5), 8000, format="WAV")
    good = np.ones((25, 3), np.float32)
    for array, problem in (
        (np.zeros(6, np.float32), r"float32 \[6\]; features are floating-point numbers \[frames, size\]"),
        (np.zeros((25, 3), int), r"int64 \[25, 3\]; features are"),
        (np.full((25, 3), np.nan, np.float16), "not finite numbers"),
        (np.full((25, 3), 1e300), "not finite numbers"),
        (np.ones((25, 4), np.float32), "of size 4, the others have 3"),
    ):
        np.save(tmp_path / "features" / "a.npy", good)
        data = AudioDataset(tmp_path / "audio", 8000, 1, 800, 0, features=str(tmp_path / "features"))
        index = [file.label.name for file in data.files].index("a")
        assert data.feature_size() == 3
        np.save(tmp_path / "features" / "a.npy", array)
        with pytest.raises(UserError, match=problem) as error:
            data.read(index, np.random.default_rng())
        assert "\n" not in str(error.value)
    (tmp_path / "features" / "a.npy").write_bytes(b"PK\3\4 not an array")
    with pytest.raises(UserError, match="a.npy: not an array of NumPy"):
        AudioDataset(tmp_path / "audio", 8000, 1, 800, 0, features=str(tmp_path / "features")).feature_size()
    np.save(tmp_path / "features" / "b.0002.npy", good)  # what follows the point is no suffix
    names = AudioDataset(tmp_path / "audio", 8000, 1, 800, 0, features=str(tmp_path / "features"))
    assert isinstance(names.read([file.label.name for file in names.files].index("b.0002"), np.random.default_rng()), dict)
    with pytest.raises(UserError, match="b.0001: no b.0001.npy in"):
        names.read([file.label.name for file in names.files].index("b.0001"), np.random.default_rng())


def noise_of(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, round(8000 * seconds))


def test_distillation_is_least_where_latents_say_what_the_teacher_says():
    rng = torch.Generator().manual_seed(0)
    features, noise = (torch.randn(4, 50, 3, generator=rng) for _ in range(2))
    student = FeatureDistillation(3, 3, 0.04)
    student.head.weight.data, student.head.bias.data = torch.eye(3), torch.zeros(3)
    halves = features.unflatten(1, (25, 2)).mean(2)  # of two features each
    assert student.loss(halves, features).item() == pytest.approx(np.log(1 + np.exp(-1)), abs=1e-5)
    assert student.loss(noise[:, :25], features) > 0.6


def test_classes_are_taught_by_their_cross_entropy_where_they_are_known():
    student = FeatureDistillation(3, 3, 0.04, classes=True)
    student.head.weight.data, student.head.bias.data = torch.eye(3), torch.zeros(3)
    classes = torch.tensor([0, 0, 1, 1, 2, 2])
    features = torch.nn.functional.one_hot(classes, 3)[None].float()
    latents = torch.tensor([[[2.0, 0, 0], [0, 1, 0], [0, 3, 0]]])
    wanted = torch.nn.functional.cross_entropy(latents[0], torch.tensor([0, 1, 2]))
    assert student.loss(latents, features).item() == pytest.approx(wanted.item(), abs=1e-6)
    features[0, 4:] = 0  # the class of the last frame is not known
    wanted = torch.nn.functional.cross_entropy(latents[0, :2], torch.tensor([0, 1]))
    assert student.loss(latents, features).item() == pytest.approx(wanted.item(), abs=1e-6)
    for bad in (-features, 2 * features):
        with pytest.raises(UserError, match="semantic_classes: features are not probabilities"):
            FeatureDistillation(3, 3, 0.04, classes=True).loss(latents, bad)


@pytest.mark.parametrize(("count", "width"), [(25, 2.0), (13, 4.0), (7, 3.75), (100, 0.5), (33, 1.6)])
def test_features_are_averaged_over_the_time_of_each_frame(count, width):
    features = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    fine = features.repeat_interleave(60, 1).double()  # sixtieths
    step = round(60 * width)
    fine = torch.nn.functional.pad(fine, (0, 0, 0, max(0, count * step - fine.shape[1])))[:, : count * step]
    wanted = fine.unflatten(1, (count, step)).mean(2).float()
    torch.testing.assert_close(averaged(features, count, width), wanted, atol=1e-5, rtol=0)


def test_features_are_those_of_the_stretch_that_is_drawn(tmp_path):
    """Both samples and features say when they are: a ramp from 0 to 1 over each file."""
    (tmp_path / "features" / "b").mkdir(parents=True)
    for name, seconds in (("a", 3.0), ("b/a", 70.0), ("short", 0.3)):
        (tmp_path / "sound" / name).parent.mkdir(parents=True, exist_ok=True)
        count = round(seconds * 8000)
        ramp = np.linspace(0, 1, count, endpoint=False)
        soundfile.write(tmp_path / "sound" / f"{name}.wav", ramp, 8000, subtype="FLOAT")
        frames = round(seconds * 40)  # any rate
        values = (np.arange(frames) + 0.5) / frames + (10 if name == "b/a" else 0)  # of the longest end of the path
        np.save(tmp_path / "features" / f"{name}.npy", np.stack([values, values], 1).astype(np.float32))
    data = AudioDataset(tmp_path / "sound", 8000, 1, 8000, 0, features=str(tmp_path / "features"))
    assert data.feature_size() == 2
    for index, file in enumerate(data.files):
        sample = data[0, index]
        samples, features = sample["samples"][0], sample["features"]
        assert (samples.shape, features.shape) == ((8000,), (50, 2))
        middles = samples[80::160]  # of fiftieths of a second
        known = middles > 0
        offset = 10 if file.label.parent.name == "b" else 0
        duration = {"short": 0.3, "a": 70.0 if offset else 3.0}[file.label.stem]
        assert (features[known, 0] - offset - middles[known]).abs().max() < 0.5 / 40 / duration + 1e-3
        assert (features[15:] == 0).all() == (file.label.stem == "short")


def test_finite_scalars_of_spectra_train_and_come_back(tmp_path, scenes_folder):
    how = {"domain": "spectrum", "encoder": "seanet", "patch": "160", "ratios": "[4]", "quantizer": "fsq", "scales": "[4, 4]"}
    options = {f"tokenizer.{name}": value for name, value in how.items()} | {
        "losses.mel": "1.0",
        "losses.stft": "0.0",
        "losses.semantic": "0.1",
    }
    run_lightning(arguments(tmp_path / "run", scenes_folder, steps=12, **options))
    make_bundle(tmp_path / "bundle", {"audio": tmp_path / "run"})
    audio = AudioTokenizer.from_pretrained(tmp_path / "bundle")
    assert (audio.num_codebooks, audio.codebook_size) == (1, 16)
    codes, size = audio.encode_file(next((scenes_folder / "audio").glob("*.wav")))
    assert codes.shape == (1, -(-size[0] // 640))
    assert audio.restore(codes, size).shape == (1, size[0])


def test_silence_trains_to_finite_numbers_a_word_and_a_tokenizer(tmp_path, caplog):
    for i in range(8):
        write_tone(tmp_path / "silence" / f"{i}.wav", 1.0, amplitude=0.0)
    run = arguments(tmp_path / "run", tmp_path, 10, ("--data.init_args.path", str(tmp_path / "silence")), **EVERYTHING)
    with caplog.at_level(logging.WARNING, logger="unitok"):
        run_lightning(run)
    assert caplog.text.count("is in use") == 1
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics" / "metrics.csv")))
    assert np.isfinite([float(value) for row in rows for value in row.values() if value]).all()
    tokenizer, _ = load_trained_part("audio", tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in tokenizer.state_dict().values())


@pytest.mark.parametrize("kind", ["hinge", "least-squares", "non-saturating"])
def test_adversarial_losses_are_least_where_each_side_wins(kind):
    real, fake = [torch.full((2, 1, 3, 3), 1.0)] * 2, [torch.full((2, 1, 3, 3), -1.0)] * 2
    assert discriminator_loss(real, fake, kind) < discriminator_loss(fake, real, kind)
    assert generator_loss(real, kind) < generator_loss(fake, kind)
    torch.testing.assert_close(discriminator_loss(real[0], fake[0], kind), discriminator_loss(real, fake, kind))


def test_silence_and_clipping_give_finite_losses_and_gradients():
    for target in (torch.zeros(2, 1, 4000), torch.ones(2, 1, 4000), torch.rand(2, 1, 5)):
        out = torch.zeros_like(target).requires_grad_()
        loss = mel_loss(out, target, 8000) + spectral_loss(out, target)
        (gradient,) = torch.autograd.grad(loss, out)
        assert loss.isfinite()
        assert gradient.isfinite().all()
    assert mel_loss(torch.zeros(1, 1, 4000), torch.zeros(1, 1, 4000), 8000) == 0


def test_mel_filters_cover_every_band_once():
    for window, bands in ((64, 10), (2048, 320)):
        filters = mel_filters(16_000, window, bands)
        torch.testing.assert_close(filters.sum(-1), torch.ones(bands))
        peaks = filters.argmax(-1)
        assert (peaks.diff() >= 0).all()


def test_the_balancer_makes_weights_fractions_of_the_gradient_whatever_the_losses_scale():
    module = AudioTokenizerTraining.__new__(AudioTokenizerTraining)
    torch.nn.Module.__init__(module)
    module.weights = AudioLosses(l1=3.0, l2=1.0, mel=0.0, balance=True)
    module.gan = Adversary()
    module._norms, module._step_norms, module.adversarial_ramp = {}, {}, 0.0
    module.mean_everywhere = lambda value: value
    found = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        source = torch.randn(4, 1, 50, requires_grad=True)
        out = source * 1.0
        module._norms = {}
        losses = {"l1": out.abs().mean(), "l2": scale * out.square().mean(), "commitment": 0 * out.sum()}
        module.backward_of(losses, out, 1.0)
        found.append(source.grad.clone())
    torch.testing.assert_close(*found)
    (g1,) = torch.autograd.grad(source.abs().mean(), source)
    one = g1 / g1.flatten(1).norm(dim=1).mean() / 4  # the mean over 4 items of gradients of length 1
    (g2,) = torch.autograd.grad(source.square().mean(), source)
    two = g2 / g2.flatten(1).norm(dim=1).mean() / 4
    torch.testing.assert_close(found[0], 0.75 * one + 0.25 * two, atol=1e-5, rtol=1e-4)


def test_all_levels_live_and_each_lowers_the_error():
    """EnCodec's quantizer forgets its k-means start at the first update; ours does not."""
    torch.manual_seed(0)
    rvq = ResidualQuantizer(16, levels=4, size=64, dim=0)
    data = torch.randn(4096, 16)
    rvq.init_codebook(data)
    error = [(rvq.lookup(rvq.search(data[None])[..., :k]) - data).square().mean().item() for k in (1, 2, 3, 4)]
    assert error == sorted(error, reverse=True)
    rvq.train()
    for step in range(20):
        rvq.update(rvq(data[None, step * 200 : (step + 1) * 200]).projected, seed=step)
    codes = rvq.search(data[None])[0]
    for level in codes.unbind(-1):
        assert len(level.unique()) == 64
    after = (rvq.lookup(codes[None]) - data).square().mean().item()
    assert after < 1.1 * error[-1]


def test_quantizer_dropout_trains_items_with_fewer_levels():
    torch.manual_seed(0)
    rvq = ResidualQuantizer(8, levels=4, size=32, dim=0, dropout=1.0)
    z = torch.randn(32, 20, 8)
    rvq.init_codebook(z)
    out = rvq.train()(z)
    by_level = torch.stack([rvq.lookup(out.codes[..., :k]) for k in (1, 2, 3, 4)])
    matches = (by_level - out.latents).abs().amax(dim=(2, 3)) < 1e-5  # [4, items]
    assert (matches.sum(0) == 1).all()
    assert (matches.sum(1) > 0).all()
    torch.testing.assert_close(rvq.eval()(z).latents, rvq.lookup(rvq.search(z)))


# ---- Data -----------------------------------------------------------------------------------------------------------


def write_tone(path: Path, seconds: float, rate: int = 8000, channels: int = 1, amplitude: float = 0.25) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(-amplitude, amplitude, round(seconds * rate))
    soundfile.write(path, np.repeat(ramp[:, None], channels, 1), rate, subtype="FLOAT")


def test_of_a_long_file_only_the_stretch_is_read(tmp_path, monkeypatch):
    write_tone(tmp_path / "long.wav", 600, 8000)
    data = AudioDataset(tmp_path, 8000, 1, 4000, seed=0)
    read = []
    original = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n=-1, **k: read.append(n) or original(self, n, **k))
    stretches = [data[epoch, 0] for epoch in range(4)]
    assert read == [4000] * 4
    assert all(s.shape == (1, 4000) for s in stretches)
    assert len({round(float(s[0, 0]), 4) for s in stretches}) == 4
    assert torch.equal(data[2, 0], stretches[2])


def test_folders_are_drawn_alike_and_reproducibly(tmp_path):
    for i in range(30):
        write_tone(tmp_path / "many" / f"{i}.wav", 0.1)
    for i in range(2):
        write_tone(tmp_path / "few" / f"{i}.wav", 0.1)
    data = AudioDataset(tmp_path, 8000, 1, 400, seed=0, balance=True)
    order = data.order(0)
    assert order == data.order(0) != data.order(1)
    assert len(order) == len(set(order)) == 32
    few = sum("few" in str(data.files[i % 32]) for i in order)
    assert 10 <= few <= 22
    twice = [i for i in order if i >= 32]
    assert twice
    assert not torch.equal(data[0, twice[0]], data[0, twice[0] % 32])  # another stretch of the same file


def test_loudness_and_polarity_vary_within_bounds(tmp_path):
    write_tone(tmp_path / "a.wav", 1.0)
    data = AudioDataset(tmp_path, 8000, 1, 8000, seed=0, gain=(-12, 6), flip_polarity=True)
    ends = [float(data[epoch, 0][0, -1]) for epoch in range(40)]
    assert min(abs(e) for e in ends) >= 0.25 * 10 ** (-12 / 20) - 1e-4
    assert max(abs(e) for e in ends) <= 0.25 * 10 ** (6 / 20) + 1e-4
    assert 8 < sum(e < 0 for e in ends) < 32


def test_data_of_another_rate_is_refused(tmp_path, scenes_folder):
    with pytest.raises(UserError, match="sample_rate 16000, the tokenizer 8000"):
        run_lightning(arguments(tmp_path, scenes_folder, trainer=("--data.init_args.sample_rate", "16000")))
