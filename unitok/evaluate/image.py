"""`unitok eval image-tokenizer`: how well images come back, and what the codebook does.

Published numbers differ by their definitions: here values in [0, 1], reconstructions rounded to 8 bits, are compared with the
image as the tokenizer got it (cropped or shrunk), and a number is the mean over images. PSNR is of an image's mean squared
error. SSIM has a Gaussian window of 11 (sigma 1.5) and data range 1; MS-SSIM five scales, for images of more than 160 pixels a
side. Codebook use is the share of codes that occurs at all; perplexity and entropy are of the codes' frequencies. LPIPS (VGG)
and rFID appear only where their networks' own weights were given.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from torchmetrics.image.fid import FrechetInceptionDistance

from unitok import pages
from unitok.bundle import load_trained_part
from unitok.errors import UserError, first_line
from unitok.evaluate.tokenizer import Measured, evaluate_tokenizer, means, timed
from unitok.media import encode_png, open_image
from unitok.training.monitor import codebook_statistics
from unitok.training.perceptual import LPIPS, find_lpips

SSIM_SIDE, MS_SSIM_SIDE = 11, 161  # pixels a side that the measures need


def picture_scores(out: Tensor, target: Tensor) -> dict[str, float | None]:
    """PSNR (dB), SSIM and MS-SSIM of one image against another, [3, H, W] in [0, 1]; None where it is too small."""
    mse = float((out - target).square().mean())
    side = min(out.shape[-2:])
    pair = (out[None], target[None])
    return {
        "psnr_db": -10 * math.log10(max(mse, 1e-10)),
        "ssim": float(ssim(*pair, data_range=1.0)) if side >= SSIM_SIDE else None,  # type: ignore[arg-type]
        "ms_ssim": float(ms_ssim(*pair, data_range=1.0)) if side >= MS_SSIM_SIDE else None,
    }


def load_fid(weights: Path, device: str) -> FrechetInceptionDistance:
    """The Fréchet distance between Inception's features of originals and of reconstructions, uint8 [N, 3, H, W].

    weights: NVIDIA's TorchScript file `inception-2015-12-05.pt`: uint8 [N, 3, H, W] -> features [N, 2048]. Errors: `UserError`.
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
) -> dict[str, Any]:
    """Measure; writes `scores.json`, `images.jsonl` (a line per image) and `index.html`; returns the scores.

    size: pixels a side of the center square that is cut. area: pixels to shrink to, without `size`; 0: the resolution
    squared. lpips, inception: weights. Errors: `UserError` as `evaluate_tokenizer`'s.
    """
    networks = find_lpips(lpips) if lpips else None
    if lpips and not networks:
        raise UserError(f"lpips {lpips}: no vgg16-397923af.pth and vgg.pth there")
    model = load_trained_part("image", tokenizer)[0].to(device)
    measure = _ImageMeasure(model, size, area)
    measure.lpips = LPIPS.from_files(*networks).to(device) if networks else None
    measure.fid = load_fid(inception, device) if inception else None
    return evaluate_tokenizer(measure, images, out, limit, batch_size, overwrite, progress)


class _ImageMeasure:
    kind = "image"
    listing = "images.jsonl"
    shown = 40

    lpips: LPIPS | None = None
    fid: FrechetInceptionDistance | None = None

    def __init__(self, model: Any, size: int, area: int):
        self.model = model
        self.area, self.fit = size**2 or area or None, "crop" if size else "keep"
        self.codes: list[Tensor] = []
        self.seconds: dict[str, float] = {}

    def read(self, path: Path) -> Tensor:
        return self.model.prepare(open_image(path), self.area, self.fit)

    @torch.no_grad()
    def measure(self, batch: Tensor) -> list[Measured]:
        with timed(self.seconds, "encode"):
            grids = self.model.encode(batch)
        with timed(self.seconds, "decode"):
            again = self.model.decode(grids)
        self.codes.append(grids.flatten().cpu())
        again = again[..., : batch.shape[-2], : batch.shape[-1]].cpu()
        pixels = [((x + 1) / 2).mul(255).round().to(torch.uint8) for x in (batch, again)]
        if self.fid is not None:
            for real, images in zip((True, False), pixels, strict=True):
                self.fid.update(images.to(self.model.device), real=real)
        return [self._measured(grid.numel(), a / 255, b / 255) for grid, a, b in zip(grids, *pixels, strict=True)]

    def _measured(self, codes: int, original: Tensor, out: Tensor) -> Measured:
        scores = picture_scores(out, original)
        row = {"pixels": list(original.shape[1:])} | scores | {"codes": codes}
        if self.lpips is not None:
            row["lpips"] = float(self.lpips(*(2 * x[None].to(self.model.device) - 1 for x in (out, original))))
        similarity = "" if scores["ssim"] is None else f", SSIM {scores['ssim']:.3f}"
        captions = {"original": original, f"{scores['psnr_db']:.2f} dB{similarity}": out}
        return Measured(
            row,
            scores["psnr_db"] or 0.0,
            lambda: [pages.Figure(pages.image(encode_png(2 * x - 1)), caption) for caption, x in captions.items()],
        )

    def scores(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        codes, size = torch.cat(self.codes), self.model.codebook_size
        scores: dict[str, Any] = {"images": len(rows)}
        for name, mean in means(rows, ("psnr_db", "ssim", "ms_ssim", "lpips")).items():
            scores |= {name: mean, f"{name}_images": sum(row[name] is not None for row in rows)}
        if self.fid is not None and len(rows) > 1:
            scores["rfid"] = float(self.fid.compute())
        scores |= {f"codebook_{name}": value for name, value in codebook_statistics(codes, size).items()}
        return scores | {
            "codebook_size": size,
            "codes": len(codes),
            "bits_per_pixel": len(codes) * math.log2(size) / sum(math.prod(row["pixels"]) for row in rows),
            "encode_images_per_second": len(rows) / self.seconds["encode"],
            "decode_images_per_second": len(rows) / self.seconds["decode"],
        }
