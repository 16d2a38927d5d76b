"""Photographs on a laptop: unitok's image tokenizer, taming's modules trained as long, and JPEG, at equal bits per pixel.

    python benchmarks/photos.py [--minutes 15] [--quick]

Measured after 15 minutes on 2 cores, at 64 codes of 10 bits for 64 x 64 pixels: 8.6 dB more than taming's Encoder,
VectorQuantizer and Decoder trained for the same time with its own loss weights (perceptual loss and GAN off for both), and 0.3 dB
less than JPEG.

The photographs are those that scikit-image and scikit-learn ship; four are kept for the test and cut into windows of 256 x 256.
unitok is `unitok fit --config image/laptop-f8-64.yaml`. The network of taming is the smallest that its group norm allows
(ch 32), at the same stride and codebook size; its learning rate is the best of three in short runs, because its own is made for
another batch and length. JPEG (Pillow, optimized, 4:2:0): the best quality whose entropy-coded data alone, without any header,
take no more bits than the codes; where even quality 1 takes more, quality 1.
"""

import argparse
import contextlib
import io
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, write_results
from PIL import Image
from torch import nn

from unitok.configs import CONFIGS
from unitok.data.folders import ImageDataset
from unitok.data.loading import EndlessBatches
from unitok.evaluate.image import image_scores
from unitok.media import image_to_tensor, save_image
from unitok.training.monitor import codebook_statistics

TRAIN = (
    *("brick", "camera", "cell", "clock_motion", "coins", "grass", "gravel", "hubble_deep_field", "ihc", "moon"),
    *("motorcycle_left", "motorcycle_right", "retina", "rocket", "flower"),
)
TEST = ("astronaut", "chelsea", "coffee", "china")
SIDE, CODES, STRIDE = 256, 1024, 8
CONFIG = CONFIGS / "image" / "laptop-f8-64.yaml"


def write_photographs(folder: Path) -> None:
    """`train` and `test` under `folder`, as PNG."""
    import skimage
    import sklearn.datasets

    shipped = [
        *(Path(skimage.__file__).parent / "data").glob("*"),
        *(Path(sklearn.datasets.__file__).parent / "images").glob("*"),
    ]
    photographs = {path.stem: path for path in shipped if path.suffix in (".png", ".jpg")}
    for which in ("train", "test"):
        (folder / which).mkdir(parents=True, exist_ok=True)
    for name in TRAIN:
        Image.open(photographs[name]).convert("RGB").save(folder / "train" / f"{name}.png")
    for name in TEST:
        image = Image.open(photographs[name]).convert("RGB")
        for top in range(0, image.height - SIDE + 1, SIDE):
            for left in range(0, image.width - SIDE + 1, SIDE):
                image.crop((left, top, left + SIDE, top + SIDE)).save(folder / "test" / f"{name}-{top}-{left}.png")


class Taming(nn.Module):
    """taming's VQModel out of its own modules, at our stride and codebook size."""

    def __init__(self) -> None:
        super().__init__()
        from taming.modules.diffusionmodules.model import Decoder, Encoder
        from taming.modules.vqvae.quantize import VectorQuantizer

        network = {"ch": 32, "out_ch": 3, "ch_mult": (1, 1, 2, 4), "num_res_blocks": 1, "attn_resolutions": (8,)}
        network |= {"in_channels": 3, "resolution": 64, "z_channels": 256, "double_z": False}
        with contextlib.redirect_stdout(io.StringIO()):
            self.encoder, self.decoder = Encoder(**network), Decoder(**network)
        self.quantize = VectorQuantizer(CODES, 256, beta=0.25)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        quantized, loss, info = self.quantize(self.quant_conv(self.encoder(images)))
        return self.decoder(self.post_quant_conv(quantized)), loss, info[2]


def train_taming(photographs: Path, seconds: float, rate: float, seed: int = 0) -> tuple[Taming, int]:
    """Its own objective: L1 + codebook loss (weight 1, beta 0.25), Adam (0.5, 0.9); batches as ours."""
    torch.manual_seed(seed)
    model = Taming()
    data = ImageDataset(photographs, 64, True, seed, "random", 2.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.5, 0.9))
    began, steps, batches = time.monotonic(), 0, iter(EndlessBatches(data, 16))
    while time.monotonic() - began < seconds:
        batch = torch.stack([data[index] for index in next(batches)])
        out, codebook, _ = model(batch)
        loss = (out - batch).abs().mean() + codebook
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return model.eval(), steps


def measure(reconstruct: Any, folder: Path) -> dict[str, float]:
    """Means over the test windows; `reconstruct`: [1, 3, H, W] in [-1, 1] -> the same and codes."""
    rows, codes = [], []
    for path in sorted(folder.glob("*.png")):
        pixels = image_to_tensor(Image.open(path))
        with torch.no_grad():
            again, image_codes = reconstruct(pixels[None])
        codes.append(image_codes.reshape(-1))
        pair = (((x + 1) / 2).clamp(0, 1).mul(255).round().div(255) for x in (again[0], pixels))
        rows.append(image_scores(*pair))
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("psnr_db", "ssim", "ms_ssim")}
    return means | {"usage": codebook_statistics(torch.cat(codes), CODES)["usage"]}


def measure_jpeg(folder: Path, bits_per_pixel: float) -> dict[str, float]:
    """JPEG at no more bits than the codes, headers not counted."""
    rows, bits = [], []
    for path in sorted(folder.glob("*.png")):
        image = Image.open(path)
        allowed = bits_per_pixel * image.width * image.height
        best: tuple[int, bytes] | None = None
        for quality in range(1, 60):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True, subsampling="4:2:0")
            scan = len(buffer.getvalue()) - buffer.getvalue().rindex(b"\xff\xda")
            if best is not None and 8 * scan > allowed:
                break
            best = (8 * scan, buffer.getvalue())
        assert best is not None
        again = image_to_tensor(Image.open(io.BytesIO(best[1])))
        rows.append(image_scores((again + 1) / 2, (image_to_tensor(image) + 1) / 2))
        bits.append(best[0] / (image.width * image.height))
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("psnr_db", "ssim", "ms_ssim")}
    return means | {"bits_per_pixel": float(np.mean(bits))}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="half a minute of training each")
    p.add_argument("--minutes", type=float, default=15.0, help="of training, each")
    p.add_argument("--work", type=Path, default=Path("runs/photos"), help="folder for photographs and runs")
    p.add_argument("--out", type=Path, help="default: benchmarks/results/photos.json")
    o = p.parse_args()
    minutes = 0.5 if o.quick else o.minutes
    write_photographs(o.work)
    train, test = o.work / "train", o.work / "test"
    run = o.work / f"ours-{minutes:g}"
    command = ["fit", "--config", str(CONFIG), "--out", str(run), "--data.init_args.path", str(train)]
    command += ["--model.init_args.minutes", str(minutes), "--resume", "auto"]
    subprocess.run([sys.executable, "-m", "unitok", *command], check=True)
    from unitok.bundle import load_trained_part

    model = load_trained_part("image", run)[0]

    def run_ours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = model.encode(x)
        return model.decode(codes), codes

    ours = measure(run_ours, test)
    probe = 5 if o.quick else 60
    rates = {rate: measure(_run_taming(train_taming(train, probe, rate)[0]), test)["psnr_db"] for rate in (1e-4, 4e-4, 1.5e-3)}
    rate = max(rates, key=lambda r: rates[r])
    print(f"taming's learning rates after {probe} s: {rates}; takes {rate}")
    taming, steps = train_taming(train, minutes * 60, rate)
    theirs = measure(_run_taming(taming), test)
    bits = math.log2(CODES) / STRIDE**2
    jpeg = measure_jpeg(test, bits)
    cases = [
        {
            "case": f"{minutes:g} minutes: {name}",
            "unit": "dB" if "_db" in name else "",
            "ours": ours[name],
            "peer": peer,
            "theirs": scores[name],
        }
        | {"ratio": ours[name] / scores[name], "difference": ours[name] - scores[name]}
        for peer, scores in (("taming", theirs), ("jpeg", jpeg))
        for name in ("psnr_db", "ssim", "ms_ssim")
    ]
    more = {
        "bits_per_pixel": bits,
        "jpeg_bits_per_pixel": jpeg["bits_per_pixel"],
        "usage": {"ours": ours["usage"], "taming": theirs["usage"]},
    }
    more |= {"taming": {"steps": steps, "lr": rate, "probes_psnr_db": {str(k): v for k, v in rates.items()}}}
    more |= {"test_windows": len(list(test.glob("*.png"))), "training_photographs": len(list(train.glob("*.png")))}
    path = o.out.with_suffix(".png") if o.out else RESULTS / "photos.png"
    save_sheet(path, test, [run_ours, _run_taming(taming)])
    write_results("photos", cases, out=o.out, **more)


def save_sheet(path: Path, folder: Path, peers: list[Any], count: int = 4) -> None:
    """Test windows above what each peer makes of them."""
    windows = [
        image_to_tensor(Image.open(p)) for p in sorted(folder.glob("*.png"))[:: max(1, len(list(folder.glob("*"))) // count)]
    ]
    rows = [torch.cat(windows, -1)]
    for run in peers:
        with torch.no_grad():
            rows.append(torch.cat([run(x[None])[0][0].clamp(-1, 1) for x in windows], -1))
    save_image(path, torch.cat(rows, -2))


def _run_taming(model: Taming) -> Any:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, w = (-side % STRIDE for side in x.shape[-2:])
        out, _, codes = model.eval()(F.pad(x, (0, w, 0, h), mode="replicate"))
        return out[..., : x.shape[-2], : x.shape[-1]], codes

    return run


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
