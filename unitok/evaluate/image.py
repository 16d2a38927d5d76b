"""`unitok eval image-tokenizer`: quality of reconstructed images, and use of the codebook.

Published numbers differ by their definitions. Here: the reconstruction, rounded to 8 bits, is compared with the tokenizer's
input (cropped or shrunk), with values in [0, 1]; scores are means over images. PSNR is computed from the mean squared error of
each image. SSIM has a Gaussian window of 11 pixels (sigma 1.5) and data range 1; MS-SSIM has five scales and needs images of
more than 160 pixels per side. Codebook usage is the fraction of codes that occur at all; perplexity and entropy are those of
the codes' frequencies. LPIPS (VGG) and rFID are measured only if the weights of their networks are given.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from torchmetrics.image.fid import FrechetInceptionDistance

from unitok import pages
from unitok.bundle import load_trained_part
from unitok.errors import UserError, check_range, first_line
from unitok.evaluate.tokenizer import Measured, Row, evaluate_tokenizer, means, timed
from unitok.media import encode_png, open_image
from unitok.tokenizers.image import Fit, ImageTokenizer
from unitok.training.monitor import codebook_statistics
from unitok.training.perceptual import LPIPS, find_lpips

SSIM_SIDE, MS_SSIM_SIDE = 11, 161  # least pixels per side

Scores = dict[str, float | None]


def image_scores(out: Tensor, target: Tensor) -> Scores:
    """PSNR (dB), SSIM and MS-SSIM of a reconstruction against its original, both [3, H, W] in [0, 1]; None for images that are
    too small for the measure."""
    mse = float((out - target).square().mean())
    side = min(out.shape[-2:])
    pair = (out[None], target[None])
    return {
        "psnr_db": -10 * math.log10(max(mse, 1e-10)),
        "ssim": float(ssim(*pair, data_range=1.0)) if side >= SSIM_SIDE else None,  # type: ignore[arg-type]
        "ms_ssim": float(ms_ssim(*pair, data_range=1.0)) if side >= MS_SSIM_SIDE else None,
    }


def load_fid(weights: Path, device: str) -> FrechetInceptionDistance:
    """Return the metric that gives the Fréchet distance between the Inception features of originals and of reconstructions,
    both uint8 [N, 3, H, W].

    weights: NVIDIA's TorchScript file `inception-2015-12-05.pt`: uint8 [N, 3, H, W] -> features [N, 2048]. Errors: `UserError`
    for a file that is missing or is no TorchScript.
    """
    if not weights.exists():
        raise UserError(f"inception {weights}: no such file")
    try:
        network = torch.jit.load(str(weights), map_location="cpu")
    except RuntimeError as error:
        raise UserError(f"inception {weights}: not a TorchScript file ({first_line(error)})") from None
    return FrechetInceptionDistance(_Features(network)).to(device)


class _Features(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels, return_features=True)


def evaluate_image_tokenizer(
    tokenizer: Path,
    images: Path,
    out: Path,
    size: int = 0,
    area: int = 0,
    limit: int = 0,
    batch_size: int = 16,
    lpips: Path | None = None,
    inception: Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> Row:
    """Measure an image tokenizer on the images in a folder. Writes `scores.json`, `images.jsonl` (a line per image) and
    `index.html`; returns the scores.

    tokenizer: a bundle, a tokenizer's folder, or a run. size: pixels per side of the center square that is cut out; 0: all of
    the image. area: without `size`, pixels that images are shrunk to; 0: the resolution squared. lpips: folder with the weights
    of LPIPS.
    inception: as for `load_fid`. Errors: `UserError` as `evaluate_tokenizer`'s, and for weights that are missing.
    """
    networks = find_lpips(lpips) if lpips else None
    if lpips and not networks:
        raise UserError(f"lpips {lpips}: no vgg16-397923af.pth and vgg.pth in it")
    model = load_trained_part("image", tokenizer)[0].to(device)
    measure = _ImageMeasure(model, size, area)
    measure.lpips = LPIPS.from_files(*networks).to(device) if networks else None
    measure.fid = load_fid(inception, device) if inception else None
    return evaluate_tokenizer(measure, images, out, limit, batch_size, overwrite, progress)


class _ImageMeasure:
    kind = "image"
    also: tuple[str, ...] = ()
    listing = "images.jsonl"
    shown = 40

    lpips: LPIPS | None = None
    fid: FrechetInceptionDistance | None = None

    def __init__(self, model: ImageTokenizer, size: int, area: int):
        check_range("size", size, 0)
        check_range("area", area, 0)
        self.model = model
        self.area = size**2 or area or None
        self.fit: Fit = "crop" if size else "keep"
        self.codes: list[Tensor] = []
        self.pixels = 0  # of all images
        self.measured: list[Scores] = []
        self.times: dict[str, float] = {}  # seconds of computation

    def read(self, path: Path) -> Tensor:
        return self.model.prepare(open_image(path), self.area, self.fit)

    @torch.no_grad()
    def measure(self, batch: Tensor) -> list[Measured]:
        with timed(self.times, "encode"):
            grids = self.model.encode(batch)
        with timed(self.times, "decode"):
            decoded = self.model.decode(grids)
        self.codes.append(grids.flatten().cpu())
        decoded = decoded[..., : batch.shape[-2], : batch.shape[-1]].cpu()
        pixels = [((x + 1) / 2).mul(255).round().to(torch.uint8) for x in (batch, decoded)]
        if self.fid is not None:
            for real, images in zip((True, False), pixels, strict=True):
                self.fid.update(images.to(self.model.device), real=real)
        return [self._measured(grid.numel(), a / 255, b / 255) for grid, a, b in zip(grids, *pixels, strict=True)]

    def _measured(self, codes: int, original: Tensor, out: Tensor) -> Measured:
        scores = image_scores(out, original)
        if self.lpips is not None:
            scores["lpips"] = float(self.lpips(*(2 * x[None].to(self.model.device) - 1 for x in (out, original))))
        self.measured.append(scores)
        self.pixels += original[0].numel()
        row: Row = {"pixels": list(original.shape[1:]), **scores, "codes": codes}
        similarity = "" if scores["ssim"] is None else f", SSIM {scores['ssim']:.3f}"
        captions = {"original": original, f"{scores['psnr_db']:.2f} dB{similarity}": out}
        return Measured(
            row,
            scores["psnr_db"] or 0.0,
            lambda: [pages.Figure(pages.image(encode_png(2 * x - 1)), caption) for caption, x in captions.items()],
        )

    def scores(self) -> Row:
        codes, size, count = torch.cat(self.codes), self.model.codebook_size, len(self.measured)
        scores: Row = {"images": count}
        for name, mean in means(self.measured, ("psnr_db", "ssim", "ms_ssim", "lpips")).items():
            scores |= {name: mean, f"{name}_images": sum(one[name] is not None for one in self.measured)}
        if self.fid is not None and count > 1:
            scores["rfid"] = float(self.fid.compute())
        scores |= {f"codebook_{name}": value for name, value in codebook_statistics(codes, size).items()}
        return scores | {
            "codebook_size": size,
            "codes": len(codes),
            "bits_per_pixel": len(codes) * math.log2(size) / self.pixels,
            "encode_images_per_second": count / self.times["encode"],
            "decode_images_per_second": count / self.times["decode"],
        }
