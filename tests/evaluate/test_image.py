"""Promises of `unitok eval image-tokenizer`: true measures, under their true names."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from unitok.cli import main
from unitok.errors import UserError
from unitok.evaluate.image import evaluate_image_tokenizer, image_scores, load_fid


@pytest.mark.parametrize("shape", [(40, 56), (176, 200)])
def test_psnr_and_ssim_are_scikit_images(shape):
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a = rng.random((*shape, 3)).astype(np.float32)
    b = np.clip(a + 0.1 * rng.standard_normal(a.shape), 0, 1).astype(np.float32)
    found = image_scores(*(torch.from_numpy(x).permute(2, 0, 1) for x in (b, a)))
    assert found["psnr_db"] == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-4)
    same = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "win_size": 11}
    wanted = metrics.structural_similarity(a, b, data_range=1.0, channel_axis=-1, **same)
    assert found["ssim"] == pytest.approx(wanted, abs=5e-3)
    assert (found["ms_ssim"] is None) == (min(shape) < 161)


class Inception(torch.nn.Module):
    """In the published file's format: uint8 images to features, with `return_features`."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(img.float() / 255, 2).flatten(1)


def test_fid_is_zero_for_equal_images_and_the_shift_of_the_means_for_shifted_ones(tmp_path):
    torch.jit.script(Inception()).save(str(tmp_path / "inception.pt"))
    images = torch.randint(0, 128, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for shift, distance in ((0, 0), (51, 12 * 0.2**2)):
        fid = load_fid(tmp_path / "inception.pt", "cpu")
        fid.update(images, real=True)
        fid.update(images + shift, real=False)
        assert float(fid.compute()) == pytest.approx(distance, rel=1e-3, abs=1e-4)
    (tmp_path / "bad.pt").write_bytes(b"no")
    with pytest.raises(UserError, match=r"bad\.pt: not a TorchScript file"):
        load_fid(tmp_path / "bad.pt", "cpu")


def test_the_built_in_bundle_is_measured_and_numbers_that_make_no_sense_are_refused(scenes_folder, tmp_path, capsys):
    words = ["eval", "image-tokenizer", "scenes", str(scenes_folder / "images"), "--out", str(tmp_path / "out")]
    main([*words, "--limit", "2"])
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["images"] == 2
    for flag in ("--limit", "--size", "--area", "--batch-size"):
        with pytest.raises(SystemExit) as stop:
            main([*words, flag, "-1"])
        assert stop.value.code == 2
        assert f"{flag} -1: it must be at least" in capsys.readouterr().err


def test_a_folder_is_measured_and_bad_files_are_counted(bundle_folder, scenes_folder, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    sizes = {"one.png": (1, 1), "long.png": (3, 2000), "gray.png": (40, 33), "square.png": (32, 32)}
    for name, size in sizes.items():
        pixels = rng.integers(0, 255, size if name == "gray.png" else (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
    frames = [Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(images / "moving.gif", save_all=True, append_images=frames[1:])
    (images / "torn.png").write_bytes((images / "square.png").read_bytes()[:900])
    main(["eval", "image-tokenizer", str(bundle_folder), str(images), "--out", str(tmp_path / "out")])
    assert "bits_per_pixel" in capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["images"], scores["skipped"]) == (5, 1)
    assert "rfid" not in scores
    assert "lpips" not in scores
    rows = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    measured = [row["psnr_db"] for row in rows if "psnr_db" in row]
    assert measured == sorted(measured)  # the worst first
    assert scores["psnr_db"] == pytest.approx(np.mean(measured))
    assert "torn.png" in rows[-1]["file"]
    assert (tmp_path / "out" / "index.html").read_text().count("<article>") == 5


def test_equal_squares_have_the_bits_that_codes_and_pixels_say(bundle_folder, scenes_folder, tmp_path, capfd):
    out = evaluate_image_tokenizer(bundle_folder, scenes_folder / "images", tmp_path, size=32, limit=6)
    assert out["codes"] == 6 * 64
    assert out["bits_per_pixel"] == pytest.approx(64 * 6 / 1024)  # 64 codes of 6 bits
    assert capfd.readouterr() == ("", "")  # the library is silent; the command asks for a bar
    with pytest.raises(UserError, match="no image files in it"):
        evaluate_image_tokenizer(bundle_folder, bundle_folder, tmp_path / "none")
