"""`unitok eval image-tokenizer`: how well pictures come back, and what the codebook does.

Definitions, because published numbers differ by theirs: everything is measured on values in [0, 1], reconstructions
rounded to 8 bits, against the picture as the tokenizer got it (after cropping or shrinking); a number is the mean over
pictures, not over batches. PSNR is of the mean squared error over a picture. SSIM has a Gaussian window of 11 (sigma 1.5)
and data range 1; MS-SSIM five scales, for pictures of more than 160 pixels a side. Codebook use is the share of codes
that occurs at all in the pictures measured; perplexity and entropy are of the codes' frequencies. LPIPS (VGG) and rFID
appear only where their networks' own weights were given.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure as ms_ssim,
)
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from tqdm import tqdm

from unitok import page
from unitok.bundle import load_trained_part
from unitok.errors import UserError
from unitok.files import check_replaceable, whole_folder, write_json, write_json_lines
from unitok.media import encode_png, find_media, open_image
from unitok.storage import printable
from unitok.tokenizers.image import ImageTokenizer
from unitok.training.monitor import codebook_statistics
from unitok.training.perceptual import LPIPS, find_lpips

SHOWN = 40  # pairs on the page
SSIM_SIDE, MS_SSIM_SIDE = 11, 161  # pixels a side that the measures need


def picture_scores(out: Tensor, target: Tensor) -> dict[str, float | None]:
    """PSNR (dB), SSIM and MS-SSIM of one picture against another, [3, H, W] in [0, 1]; None where it is too small."""
    mse = float((out - target).square().mean())
    side = min(out.shape[-2:])
    pair = (out[None], target[None])
    return {
        "psnr_db": -10 * math.log10(max(mse, 1e-10)),
        "ssim": float(ssim(*pair, data_range=1.0)) if side >= SSIM_SIDE else None,  # type: ignore[arg-type]
        "ms_ssim": float(ms_ssim(*pair, data_range=1.0)) if side >= MS_SSIM_SIDE else None,
    }


class Fid:
    """Fréchet distance between Inception's features of originals and of reconstructions.

    weights: NVIDIA's TorchScript file `inception-2015-12-05.pt`: uint8 [N, 3, H, W] -> features [N, 2048].
    """

    def __init__(self, weights: Path, device: str):
        if not weights.exists():
            raise UserError(f"--inception {weights}: no such file")
        try:
            self.network = torch.jit.load(str(weights), map_location=device).eval()
        except RuntimeError as error:
            raise UserError(f"--inception {weights}: not a TorchScript file ({str(error).splitlines()[0][:80]})") from None
        self.device = device
        self.features: dict[str, list[np.ndarray]] = {"original": [], "again": []}

    @torch.no_grad()
    def add(self, which: str, picture: Tensor) -> None:
        """[3, H, W] in [0, 1]."""
        pixels = (picture * 255).round().to(torch.uint8)[None].to(self.device)
        self.features[which].append(self.network(pixels, return_features=True).double().cpu().numpy()[0])

    def distance(self) -> float:
        a, b = (np.stack(rows) for rows in self.features.values())
        (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
        root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
        return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


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
) -> dict[str, Any]:
    """Measure; writes `scores.json`, `images.jsonl` (a line a picture) and `index.html`; -> the scores.

    Errors: `UserError` where something else lies in `out`, unless `overwrite` is set.
    """
    check_replaceable(out, "image evaluation", overwrite)
    part, _ = load_trained_part("image", tokenizer)
    model: ImageTokenizer = part.to(device)
    if not images.is_dir():
        raise UserError(f"{images}: no such folder")
    everything, empty = find_media(images, "image")
    files = everything[: limit or None]
    if not files:
        raise UserError(f"{images}: no pictures in it")
    if lpips and not find_lpips(lpips):
        raise UserError(f"--lpips {lpips}: no vgg16-397923af.pth and vgg.pth there")
    distance = LPIPS.from_files(*find_lpips(lpips)).to(device) if lpips else None  # type: ignore[misc]
    measured = _Measured(model, images, distance, Fid(inception, device) if inception else None)
    skipped = [{"file": printable(str(path)), "error": printable(f"{path}: an empty file")} for path in empty]
    waiting: dict[tuple[int, ...], list[tuple[Path, Tensor]]] = {}
    for path in tqdm(files, desc="reconstruct", unit="image"):
        try:
            pixels = model.prepare(open_image(path), size**2 or area or None, "crop" if size else "keep")
        except UserError as error:
            skipped.append({"file": printable(str(path)), "error": printable(str(error))})
            continue
        batch = waiting.setdefault(tuple(pixels.shape), [])
        batch.append((path, pixels))
        if len(batch) >= batch_size:
            measured.add(waiting.pop(tuple(pixels.shape)))
    for batch in waiting.values():
        measured.add(batch)
    if not measured.rows:
        raise UserError(f"{images}: none of its {len(files)} pictures can be read; the first: {skipped[0]['error']}")
    scores = measured.scores() | {"skipped": len(skipped)}
    _write(out, scores, sorted(measured.rows, key=lambda r: r["psnr_db"]), skipped)
    return scores


class _Measured:
    """Pictures, their reconstructions, and what is known of them: a row each."""

    def __init__(self, model: ImageTokenizer, images: Path, distance: LPIPS | None, fid: Fid | None):
        self.model, self.images, self.distance, self.fid = model, images, distance, fid
        self.rows: list[dict[str, Any]] = []
        self.codes: list[Tensor] = []
        self.seconds = {"encode": 0.0, "decode": 0.0}

    def add(self, batch: list[tuple[Path, Tensor]]) -> None:
        """Reconstruct pictures of one size and add their rows."""
        originals = torch.stack([pixels for _, pixels in batch])
        grids = timed(self.seconds, "encode", lambda: self.model.encode(originals))
        again = timed(self.seconds, "decode", lambda: self.model.decode(grids)).cpu()
        self.codes.append(grids.reshape(-1).cpu())
        again = again[..., : originals.shape[-2], : originals.shape[-1]]
        again, originals = (((x + 1) / 2).mul(255).round().div(255) for x in (again, originals))
        for (path, _), a, o, grid in zip(batch, again, originals, grids, strict=True):
            file = printable(path.relative_to(self.images).as_posix())
            row: dict[str, Any] = {"file": file, "pixels": [o.shape[1], o.shape[2]]}
            row |= picture_scores(a, o) | {"codes": grid.numel()}
            if self.distance is not None:
                with torch.no_grad():
                    row["lpips"] = float(self.distance(*(2 * x[None].to(self.model.device) - 1 for x in (a, o))))
            if self.fid:
                self.fid.add("original", o)
                self.fid.add("again", a)
            self.rows.append(row | {"_pair": (o, a)})
            if len(self.rows) > 2 * SHOWN:  # only the worst are kept to be shown
                for best in sorted((r for r in self.rows if "_pair" in r), key=lambda r: r["psnr_db"])[SHOWN:]:
                    del best["_pair"]

    def scores(self) -> dict[str, Any]:
        """Of all pictures together."""
        all_codes, size = torch.cat(self.codes), self.model.codebook_size
        scores: dict[str, Any] = {"images": len(self.rows)}
        for name in ("psnr_db", "ssim", "ms_ssim", "lpips"):
            values = [row[name] for row in self.rows if row.get(name) is not None]
            scores |= {name: float(np.mean(values)), f"{name}_images": len(values)} if values else {}
        if self.fid:
            scores["rfid"] = self.fid.distance()
        scores |= {f"codebook_{k}": v for k, v in codebook_statistics(all_codes, size).items()}
        pixels_in_all = sum(math.prod(row["pixels"]) for row in self.rows)
        return scores | {
            "codebook_size": size,
            "codes": len(all_codes),
            "bits_per_pixel": len(all_codes) * math.log2(size) / pixels_in_all,
            "encode_images_per_second": len(self.rows) / self.seconds["encode"],
            "decode_images_per_second": len(self.rows) / self.seconds["decode"],
        }


def timed(seconds: dict[str, float], name: str, run: Any) -> Tensor:
    """Run, and add the seconds it took to `seconds[name]`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] += time.perf_counter() - began
    return result


def _write(out: Path, scores: dict[str, Any], rows: list[dict[str, Any]], skipped: list[dict[str, str]]) -> None:
    pairs = [(row, row["_pair"]) for row in rows if "_pair" in row][:SHOWN]
    kept = [{k: v for k, v in row.items() if k != "_pair"} for row in rows]
    with whole_folder(out, "image evaluation", overwrite=True) as new:
        write_json_lines(new / "images.jsonl", [*kept, *skipped])
        page.write_page(new / "index.html", "Image tokenizer", _STYLE, _body(scores, pairs))
        write_json(new / "scores.json", scores)


_STYLE = """body{font:15px sans-serif;margin:2em}img{image-rendering:pixelated;margin-right:4px}
figure{display:inline-block;margin:8px}td{padding:2px 12px 2px 0}"""


def _body(scores: dict[str, Any], pairs: list[tuple[dict[str, Any], tuple[Tensor, Tensor]]]) -> str:
    def figure(row: dict[str, Any], pair: tuple[Tensor, Tensor]) -> str:
        width = max(160, row["pixels"][1])
        tags = "".join(page.image(encode_png(2 * x - 1), f'width="{width}" alt="picture"') for x in pair)
        ssim = "" if row["ssim"] is None else f", SSIM {row['ssim']:.3f}"
        return f"<figure>{tags}<figcaption>{page.text(row['file'])}: {row['psnr_db']:.2f} dB{ssim}</figcaption></figure>"

    table = "".join(f"<tr><td>{name}<td>{format_number(value)}" for name, value in scores.items())
    figures = "\n".join(figure(row, pair) for row, pair in pairs)
    return f"<table>{table}</table><h2>Originals and reconstructions, the worst first</h2>\n{figures}"


def format_number(value: Any) -> str:
    """For tables: four digits, integers whole, nothing for None."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def print_table(scores: dict[str, Any]) -> None:
    """A table for people."""
    for name, value in scores.items():
        print(f"{name:<32}{format_number(value):>12}")
