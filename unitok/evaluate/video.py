"""`unitok eval video-tokenizer`: quality of reconstructed videos, and codes per second.

PSNR is that of all pixels of a video, SSIM the mean over its frames (`unitok.evaluate.image`); scores are means over videos. Flicker is what changes from one frame to the next
in the reconstruction and not in the original, or the other way round: the mean absolute difference of the two changes, in steps of 8 bits.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from unitok import pages
from unitok.bundle import load_trained_part
from unitok.errors import UserError
from unitok.evaluate.image import SSIM_SIDE
from unitok.evaluate.tokenizer import Measured, Row, evaluate_tokenizer, means, timed
from unitok.media import encode_png
from unitok.modalities import modality_of
from unitok.modalities.video import FrameTokenizer, Video, VideoOptions, contact_sheet
from unitok.storage import Blob
from unitok.tokenizers.image import ImageTokenizer
from unitok.training.monitor import codebook_statistics

Scores = dict[str, float | None]


def video_scores(out: Tensor, target: Tensor) -> Scores:
    """PSNR (dB) and SSIM, and flicker (of 255) of a reconstruction against its original, both [F, 3, H, W] in [0, 1]; None for what cannot be
    measured."""
    change = (out.diff(dim=0) - target.diff(dim=0)).abs()
    return {
        "psnr_db": -10 * math.log10(max(float((out - target).square().mean()), 1e-10)),
        "ssim": float(ssim(out, target, data_range=1.0)) if min(out.shape[-2:]) >= SSIM_SIDE else None,  # type: ignore[arg-type]
        "flicker": 255 * float(change.mean()) if len(change) else None,
    }


def evaluate_video_tokenizer(
    tokenizer: Path,
    videos: Path,
    out: Path,
    fps: int = 8,
    frames: int = 64,
    area: int = 0,
    limit: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> Row:
    """Measure an image tokenizer on the videos and animations in a folder. Writes `scores.json`, `videos.jsonl` (a line per video) and
    `index.html`; returns the scores.

    tokenizer: a bundle, a tokenizer's folder, or a run. fps: frames per second that are taken. frames: of each video, from its beginning.
    area: pixels that frames are shrunk to; 0: the resolution squared. Errors: `UserError` as `evaluate_tokenizer`'s.
    """
    model = load_trained_part("image", tokenizer)[0].to(device)
    return evaluate_tokenizer(_VideoMeasure(model, fps, frames, area), videos, out, limit, 1, overwrite, progress)


class _VideoMeasure:
    kind = "video"
    also: tuple[str, ...] = ("image",)  # animations
    listing = "videos.jsonl"
    shown = 20

    def __init__(self, model: ImageTokenizer, fps: int, frames: int, area: int):
        if fps < 1:
            raise UserError(f"fps {fps}: at least 1 frame per second")
        self.model, self.options = model, VideoOptions(fps, frames, area)
        self.tokenizer = FrameTokenizer()
        self.tokenizer.bind({self.tokenizer.image: model})
        self.codes: list[Tensor] = []
        self.seconds = 0.0
        self.measured: list[Scores] = []
        self.times: dict[str, float] = {}  # seconds of computation

    def read(self, path: Path) -> Tensor:
        view = f"t=0,{self.options.frames / self.options.fps:.10g}"
        content = Blob.at(path)
        pixels = modality_of(self.kind).load(self.tokenizer, content, self.options, str(path), view).content
        if len(pixels) < 2:
            raise UserError(f"{path}: a single frame; give videos and animations")
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def measure(self, batch: Tensor) -> list[Measured]:
        with timed(self.times, "encode"):
            grids = self.model.encode_videos(list(batch))
        return [self._measured(original, codes) for original, codes in zip(batch, grids, strict=True)]

    def _measured(self, original: Tensor, codes: Tensor) -> Measured:
        frames, _, height, width = original.shape
        with timed(self.times, "decode"):
            decoded = self.model.decode_video(codes, frames)
        decoded = ((decoded[..., :height, :width] + 1) * 127.5).round().byte()
        scores = video_scores(decoded / 255, original / 255)
        self.codes.append(codes.flatten().cpu())
        self.measured.append(scores)
        self.seconds += frames / self.options.fps
        row: Row = {"frames": frames, "pixels": [height, width], **scores, "codes": codes.numel()}
        return Measured(row, scores["psnr_db"] or 0.0, lambda: self._figures(original, decoded, scores))

    def _figures(self, original: Tensor, decoded: Tensor, scores: Scores) -> list[pages.Figure]:
        """The original and its reconstruction: an animation each, and the frames side by side."""
        show, rate = modality_of(self.kind).html, self.options.fps
        made = f"{scores['psnr_db']:.2f} dB"
        figures = []
        for caption, pixels in {"original": original, made: decoded}.items():
            video = Video(pixels.float() / 127.5 - 1, rate)
            sheet = pages.image(encode_png(contact_sheet(video.frames)))
            figures += [pages.Figure(show(self.tokenizer, video), caption), pages.Figure(sheet, f"{caption}, frames")]
        return figures

    def scores(self) -> Row:
        codes, model = torch.cat(self.codes), self.model
        statistics = codebook_statistics(codes, model.codebook_size)
        return {
            "videos": len(self.measured),
            "seconds": self.seconds,
            "fps": self.options.fps,
            **means(self.measured, ("psnr_db", "ssim", "flicker")),
            **{f"codebook_{name}": value for name, value in statistics.items()},
            "codebook_size": model.codebook_size,
            "frames_per_grid": model.group,
            "codes_per_second": len(codes) / self.seconds,
            "bits_per_second": len(codes) * math.log2(model.codebook_size) / self.seconds,
            "real_time_factor_encode": self.seconds / self.times["encode"],
            "real_time_factor_decode": self.seconds / self.times["decode"],
        }
