"""Videos: frames of image codes, after the numbers of frames per second, frames, rows and columns.

A video is encoded with the codes of the bundle's image tokenizer, so what a decoder learns about images it knows about frames: frame by
frame, which needs no training, or, where that tokenizer has a `group`, the first frame by itself and then a grid for every few. A video's
own tokenizer has no weights: it names the image tokenizer and is given it by the bundle.

PyTorch is imported in functions, so that the command line knows the options without it.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from markupsafe import Markup

from unitok import pages
from unitok.document import Segment
from unitok.errors import UserError
from unitok.modalities import Loaded, Modality, Plain, Stream, TokenizerLike, register
from unitok.modalities.audio import checked_stretch, stretch_of, stretch_starts, stretch_view, touched
from unitok.ranges import Span
from unitok.storage import FOLDER, Blob

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from unitok.media import VideoFile
    from unitok.tokenizers import ImageTokenizer

FASTEST = 60  # frames per second
LONGEST = 256  # frames of a video
SHEET = 8  # frames in a row of a contact sheet


@dataclass
class Video:
    """Frames, float [F, 3, H, W] in [-1, 1], and how many of them are seen per second; perhaps with audio, float [C, T] at `sample_rate` Hz,
    which files then have. Tokens do not: in a document audio is a part of its own."""

    frames: "Tensor"
    rate: float
    audio: "Tensor | None" = None
    sample_rate: int = 0


class FrameTokenizer(Plain):
    """Encodes videos with an image tokenizer. image: name of the image tokenizer of its bundle. fps: frames per second that are taken of files
    where nothing else is asked for. Errors: `UserError`."""

    def __init__(self, kind: str = "video", image: str = "image", fps: int = 8):
        super().__init__(kind, image=image, fps=fps)
        self.image, self.fps = image, fps
        self._frames: ImageTokenizer | None = None
        if not 1 <= fps <= FASTEST:
            raise UserError(f"{kind}: fps is {fps}; it must be 1 to {FASTEST}")

    def fingerprint(self) -> str:
        """Return a text that changes when the codes do, which do not depend on `fps`."""
        return json.dumps([self.kind, {"image": self.image}])

    def bind(self, tokenizers: Mapping[str, TokenizerLike]) -> None:
        """Take the image tokenizer from those of a bundle, if it is there."""
        self._frames = tokenizers.get(self.image)  # type: ignore[assignment]

    @property
    def frames(self) -> "ImageTokenizer":
        """The image tokenizer. Errors: `UserError` where the bundle has none."""
        if self._frames is None:
            raise UserError(
                f"{self.kind}: its frames are encoded by {self.image!r}, which is not there; add that image tokenizer"
            )
        return self._frames


@dataclass(frozen=True)
class VideoOptions:
    """How videos are read.

    Args:
        fps: frames per second that are taken, 1 to 60; a slower video repeats frames. 0: those of the bundle (`--add video:fps=4`), else 8.
        frames: most frames of a document whose only video it is, at most 256; longer ones become several documents.
        area: largest number of pixels of a frame; larger ones are shrunk. 0: the image tokenizer's resolution squared.
        fit: `keep` all of each frame in its aspect, `crop` its center square, or `resize` it to a distorted square.
    """

    fps: int = 0
    frames: int = 16
    area: int = 0
    fit: Literal["keep", "crop", "resize"] = "keep"

    def __post_init__(self) -> None:
        for name, value, least, most in (("fps", self.fps, 0, FASTEST), ("frames", self.frames, 1, LONGEST)):
            if not least <= value <= most:
                raise UserError(f"video: {name} is {value}; it must be {least} to {most}")
        if self.area < 0:
            raise UserError(f"video: area is {self.area}; it must be at least 0")
        if self.fit not in ("keep", "crop", "resize"):
            raise UserError(f"video: fit {self.fit!r}; choose keep, crop or resize")


@register
class VideoModality(Modality[FrameTokenizer, Video, VideoOptions]):
    """Content: `Video`. It is read from what FFmpeg reads, from GIF, WebP and APNG, and from folders of frames."""

    kind = "video"
    keys = ("start", "end")
    Options = VideoOptions

    def tokenizer_class(self) -> type[FrameTokenizer]:
        return FrameTokenizer

    def untrained(self) -> FrameTokenizer:
        return FrameTokenizer()

    def declare(self, name: str, tokenizer: FrameTokenizer) -> tuple[Span, dict[str, int], tuple[int, ...]]:
        """<video> fps frames rows columns codes … </video>: the codes of its image tokenizer."""
        header = ("fps", "frames", "grid", "grid")
        group, ends = tokenizer.frames.group, (f"<{name}>", f"</{name}>")
        span = Span(name, (tokenizer.image,), *ends, header, tokenizer.fingerprint(), self.kind, facts=1)
        span = replace(span, facts=2, group=group) if group > 1 else span
        return span, {"fps": FASTEST, "frames": LONGEST}, ()

    def describe(self, tokenizer: FrameTokenizer) -> Mapping[str, object]:
        group = tokenizer.frames.group
        return {"frames": f"by the tokenizer {tokenizer.image}"} | ({"frames_per_grid": group} if group > 1 else {})

    def usage(self, name: str, tokenizer: FrameTokenizer) -> dict[str, str]:
        frames, side = tokenizer.frames, tokenizer.frames.config.resolution
        codes = (side // frames.stride) ** 2
        more = f", or {frames.group} frames after the first" if frames.group > 1 else ""
        return {f"a frame of a {name}{more}": f"{codes:,} tokens ({side} x {side} pixels), and 6 for each {name}"}

    def accepts(self, content: object) -> bool:
        return isinstance(content, Video)

    def recognizes(self, head: bytes, name: str) -> bool:
        from unitok.media.formats import image_format, sniff_bytes
        from unitok.media.video_files import ANIMATIONS

        return head == FOLDER or sniff_bytes(head, name) == self.kind or image_format(head, name) in ANIMATIONS

    def view(self, given: Mapping[str, object], where: str) -> str:
        return stretch_view(given, where)

    def keys_of(self, view: str) -> dict[str, object]:
        stretch = _within(view)
        return {key: t for key, t in zip(self.keys, stretch, strict=True) if math.isfinite(t)} if view else {}

    def pieces(
        self, tokenizer: FrameTokenizer, content: Blob, options: VideoOptions, view: str = "", seconds: float = 0.0
    ) -> tuple[list[str], str]:
        start, stop = _within(view)
        fps = options.fps or tokenizer.fps
        with _opened(content, fps) as video:
            end = min(stop, video.seconds or max((f.time + f.duration for f in video.frames()), default=0.0))
        whole = max(1, math.floor((end - start) * fps + 0.5 + 1e-3))  # frames, as `sample_frames` counts
        if seconds and not 1 <= seconds * fps <= LONGEST:
            raise UserError(
                f"interleave {seconds:g}s: it must be 1 to {LONGEST} frames of the {self.kind}, of which there are {fps} per second"
            )
        firsts = stretch_starts(whole, seconds * fps if seconds else options.frames)
        if len(firsts) <= 1:
            return [], ""
        edges = [start + first / fps for first in firsts] + [end]
        return [f"t={a:.10g},{b:.10g}" for a, b in zip(edges, edges[1:], strict=False)], ""

    def load(
        self,
        tokenizer: FrameTokenizer,
        content: object,
        options: VideoOptions,
        name: str,
        view: str = "",
        chance: float = 0.0,
    ) -> Loaded:
        if isinstance(content, Video):
            frames, rate = _checked(content, name)
            return Loaded(
                frames, frames.shape[1:3], header=_header(tokenizer, rate, frames), facts={"seconds": len(frames) / rate}
            )
        assert isinstance(content, Blob)
        from unitok.media import sample_frames

        start, stop = _within(view)
        fps = options.fps or tokenizer.fps
        with _opened(content, fps, name) as video:
            width, height = video.size
            images = sample_frames(video.frames(start), fps, start, stop)
            some = itertools.islice(images, LONGEST + 1)
            fitted = [np.asarray(tokenizer.frames.fit(image, options.area or None, options.fit)) for image in some]
            if not fitted:
                raise UserError(f"{name}: {video.problem or f'it ends before {start:g} s'}")
            if len(fitted) > LONGEST:
                raise UserError(
                    f"{name}: over {LONGEST} frames at {fps} per second; give `start` and `end`, or fewer per second"
                )
            frames = np.stack(fitted)
            facts = {"width": float(width), "height": float(height), "seconds": len(frames) / fps}
            header, note = _header(tokenizer, fps, frames), "the end of a damaged video" if video.problem else ""
            return Loaded(frames, frames.shape[1:3], view, video.format, facts, bytes=video.bytes, header=header, note=note)

    def filling(self, tokenizer: FrameTokenizer, content: object, hole: object, where: str) -> "_VideoFilling":
        """hole: (start, stop) in seconds: the frames of which any part is seen then."""
        import torch

        if isinstance(content, Path):
            content = Blob.at(content)
        loaded = self.load(tokenizer, content, VideoOptions(), where)
        pixels = torch.from_numpy(loaded.content).permute(0, 3, 1, 2)
        frames = torch.as_tensor(content.frames).cpu() if isinstance(content, Video) else pixels / 127.5 - 1
        video = Video(frames, loaded.header[0])
        return _VideoFilling(video, tokenizer.frames.group, *checked_stretch(hole, len(pixels) / video.rate, where, self.kind))

    def batch_key(self, tokenizer: FrameTokenizer, loaded: Loaded) -> tuple[int, ...]:
        return tuple(-(-side // tokenizer.frames.stride) for side in loaded.size)

    def cost(self, tokenizer: FrameTokenizer, loaded: Loaded) -> float:
        return len(loaded.content)

    def encode(self, tokenizer: FrameTokenizer, batch: list[Loaded]) -> list[np.ndarray]:
        import torch

        videos = [torch.from_numpy(one.content).permute(0, 3, 1, 2) for one in batch]
        return [codes.cpu().numpy() for codes in tokenizer.frames.encode_videos(videos)]

    def decode(self, tokenizer: FrameTokenizer, segment: Segment) -> Video:
        import torch

        frames = tokenizer.frames.decode_video(torch.from_numpy(segment.codes), frames_of(segment))
        height, width = segment.size or frames.shape[-2:]
        return Video(frames[..., :height, :width], segment.facts[0])

    def save(self, tokenizer: FrameTokenizer | None, content: Video, path: Path) -> Path:
        from unitok.media import can_write_video, write_video

        path = path.with_name(f"{path.name}{'.mp4' if can_write_video() else '.gif'}")
        samples = None if content.audio is None else content.audio.cpu().numpy()
        write_video(path, frame_bytes(content), content.rate, samples, content.sample_rate)
        return path

    def stream(self, tokenizer: FrameTokenizer, span: Span) -> "Stream[FrameTokenizer, Video]":
        return _VideoStream(self, tokenizer)

    def html(self, tokenizer: FrameTokenizer, content: Video) -> Markup:
        from unitok.media import encode_gif

        return pages.image(encode_gif(frame_bytes(content), content.rate))

    def html_of_file(self, file: Path) -> Markup:
        return pages.image(file) if file.suffix == ".gif" else pages.video(file)

    def line(self, tokenizer: FrameTokenizer, segment: Segment) -> str:
        frames, rate = frames_of(segment), segment.facts[0]
        return f"{segment.modality} {segment.size[1]} x {segment.size[0]}, {frames} frames, {frames / rate:.2f} s"

    def terminal(self, tokenizer: FrameTokenizer, content: Video, done: bool, colors: bool) -> tuple[str, bool]:
        from unitok.modalities.image import half_blocks

        if colors:
            return "".join(f"{line}\n" for line in half_blocks(content.frames[-1])), True
        frames, _, height, width = content.frames.shape
        return (f"[{self.kind}, {frames} frames of {height} x {width} pixels]\n" if done else ""), False

    def log(self, board: "SummaryWriter", tag: str, tokenizer: FrameTokenizer, content: Video, step: int) -> None:
        board.add_image(tag, (contact_sheet(content.frames) + 1) / 2, step)


class _VideoStream(Stream[FrameTokenizer, Video]):
    """Returns all complete frames so far, whenever there are new ones."""

    complete = 0  # grids
    frames: "Tensor | None" = None  # of them

    def begin(self, codes: np.ndarray) -> None:
        self.complete = len(codes)

    def push(self, codes: np.ndarray, done: bool) -> Video | None:
        import torch

        if not done and len(codes) <= self.complete:
            return None
        network, decoded = (
            self.tokenizer.frames,
            0 if self.frames is None else 1 + (len(self.frames) - 1) // self.tokenizer.frames.group,
        )
        self.complete = len(codes)
        if decoded < len(codes):
            new = network.decode_video(torch.from_numpy(codes), start=decoded)
            self.frames = new if self.frames is None else torch.cat([self.frames, new])
        assert self.frames is not None
        rate, *count = self.facts
        return Video(self.frames[: count[0] if count else None], rate)


@dataclass
class _VideoFilling:
    """A video of which the frames from `start` to `stop`, in seconds, are to be made."""

    content: Video
    group: int  # frames that share a grid
    start: float
    stop: float

    def missing(self, segment: Segment) -> np.ndarray:
        grids, *sides = segment.codes.shape
        frames = touched(len(self.content.frames), self.content.rate, self.start, self.stop)
        later = np.zeros((grids - 1) * self.group, bool)
        later[: len(frames) - 1] = frames[1:]
        missing = np.concatenate([frames[:1], later.reshape(grids - 1, self.group).any(1)])
        return np.repeat(missing, math.prod(sides))

    def finish(self, made: Video) -> Video:
        """The original's own frames outside of the stretch."""
        import torch

        hole = torch.from_numpy(touched(len(made.frames), self.content.rate, self.start, self.stop))
        return Video(torch.where(hole[:, None, None, None], made.frames, self.content.frames), made.rate)


def with_audio(contents: Sequence[object], sample_rate: int) -> Video | None:
    """Return videos and the waveforms beside them, in turn or one after the other, as one video with audio.

    None where one of the two is missing, and for videos of several sizes or rates. sample_rate: of the waveforms, Hz.
    """
    import torch

    videos = [content for content in contents if isinstance(content, Video)]
    waves = [content for content in contents if isinstance(content, torch.Tensor)]
    kinds = {(video.frames.shape[1:], video.rate) for video in videos}
    if len(kinds) != 1 or not waves or len({len(wave) for wave in waves}) != 1:
        return None
    return Video(torch.cat([v.frames for v in videos]), videos[0].rate, torch.cat(waves, -1), sample_rate)


def contact_sheet(frames: "Tensor") -> "Tensor":
    """Lay out frames [F, 3, H, W] in rows of `SHEET`: [3, h, w]; what remains of the last row is black."""
    import torch
    from einops import rearrange

    rows = -(-len(frames) // SHEET)
    blank = frames.new_full((rows * min(SHEET, len(frames)) - len(frames), *frames.shape[1:]), -1.0)
    return rearrange(torch.cat([frames, blank]), "(r n) c h w -> c (r h) (n w)", r=rows)


def _header(tokenizer: FrameTokenizer, fps: int, frames: np.ndarray) -> tuple[int, ...]:
    """The facts of a video's header."""
    return (fps, len(frames)) if tokenizer.frames.group > 1 else (fps,)


def frames_of(segment: Segment) -> int:
    """Return the number of frames of a video's segment."""
    return segment.facts[1] if len(segment.facts) > 1 else len(segment.codes)


def _opened(content: Blob, fps: int, name: str = "") -> "VideoFile":
    """fps: frames per second of a folder of frames."""
    from unitok.media import open_video

    with content.local() as path:
        return open_video(path or Path(name or content.name), None if path else content.read(), fps)


def _within(view: str) -> tuple[float, float]:
    """Where a view begins and stops, in seconds."""
    start, stop = stretch_of(view) or (0.0, None)
    return start, math.inf if stop is None else stop


def _checked(video: Video, name: str) -> tuple[np.ndarray, int]:
    """Frames uint8 [F, H, W, 3] and their whole number per second. Errors: `UserError`."""
    import torch

    from unitok.tokenizers.arguments import as_tensor, check_range

    expected = f"1 to {LONGEST} frames [F, 3, H, W], float in [-1, 1] or uint8"
    frames = as_tensor(f"{name}: frames", video.frames, expected).detach().cpu()
    if frames.ndim != 4 or frames.shape[1] != 3 or not 1 <= len(frames) <= LONGEST or not frames.numel():
        raise UserError(f"{name}: frames {list(frames.shape)}; give {expected}")
    if not isinstance(video.rate, int | float) or video.rate != round(video.rate) or not 1 <= video.rate <= FASTEST:
        raise UserError(f"{name}: {video.rate} frames per second; give a whole number, 1 to {FASTEST}")
    if frames.dtype != torch.uint8:
        if not frames.dtype.is_floating_point:
            raise UserError(f"{name}: frames of {str(frames.dtype).removeprefix('torch.')}; give {expected}")
        check_range(frames, 1.001, f"{name}: float frames are in [-1, 1]")
        frames = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return frames.permute(0, 2, 3, 1).numpy(), int(video.rate)


def frame_bytes(video: Video) -> Iterator[np.ndarray]:
    """The frames, uint8 [H, W, 3] each."""
    for frame in video.frames:
        yield ((frame.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
