"""`unitok eval`, `unitok eval documents`, `unitok eval boxes`, `unitok eval maps`, `unitok eval image-tokenizer`, `unitok eval video-tokenizer`,
`unitok eval audio-tokenizer`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from unitok.cli.arguments import BundleFolder, Dtype, Input, PartFolder
from unitok.files import check_inputs, check_replaceable
from unitok.hardware import check_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from unitok.api import Unitok


def eval(
    *,
    bundle: BundleFolder,
    scenes: Input,
    composed: Input | None = None,
    systematic: Input | None = None,
    best_of: int = 1,
    out: Path = Path("runs/eval"),
    count: int = 200,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Measure a bundle on scenes: reconstructions, codebooks and generations; JSON and a table.

    On data of your own, `unitok eval documents` measures a bundle on documents, `unitok eval image-tokenizer` an image
    tokenizer on images, `unitok eval video-tokenizer` one on videos, and `unitok eval audio-tokenizer` an audio tokenizer on audio.

    Args:
        bundle: bundle with tokenizers and a decoder
        scenes: folder made by unitok scenes --fold seen
        composed: folder made by unitok scenes --fold composed (--tasks: for tasks and conversations, too), reported apart
        systematic: folder made by unitok scenes --fold systematic, reported apart
        best_of: also score the best of N outputs by pmi, in rows of their own
        out: folder for scores.json and the samples
        count: scenes per direction
        seed: random seed of sampling
        guidance_scale: guidance of images (default: the bundle's own, else the demo's)
        temperature: temperature of images and audio (default: the bundle's own, else the demo's)
        device: where to run: cpu, cuda, cuda:1, mps
        dtype: of the weights that generate; int8: on a CPU; auto: the fastest here
    """
    from unitok.scenes.evaluate import evaluate_bundle, print_scores
    from unitok.scenes.world import Fold

    device = check_device(device)
    folds: dict[Fold, Path] = {}
    if composed:
        folds["composed"] = composed
    if systematic:
        folds["systematic"] = systematic
    scores = evaluate_bundle(
        bundle, scenes, out, count, seed, folds, best_of, guidance_scale, temperature, device, dtype, progress=True
    )
    print_scores(scores)


def documents(
    data: str,
    *,
    bundle: BundleFolder,
    out: Path = Path("runs/eval-documents"),
    split: str = "",
    root: str = "",
    count: int = 200,
    candidates: int = 16,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Measure a bundle on documents of your own: bits per token, errors of the texts it writes, retrieval; JSON, tables, and a
    page with the worst documents first.

    Args:
        data: tokenized data set, interleaved .jsonl file, or folder with a documents.jsonl
        bundle: bundle with tokenizers and a decoder
        out: folder for scores.json, scores.jsonl, index.html
        split: of a data set: train, validation or test (default: validation, else test, else all)
        root: folder that paths in a .jsonl file must not leave (default: the file's)
        count: number of documents, drawn at random; 0: all
        candidates: documents that the true one is chosen from in retrieval; 0: no retrieval
        max_new_tokens: most tokens of a text that the decoder writes; 0: no texts
        temperature: of these texts; 0: always the likeliest token
        top_k: of these texts, only the k likeliest tokens; 0: all
        top_p: of these texts, only the likeliest tokens that together have this probability; 1: all
        seed: random seed of the documents drawn, of the candidates and of sampling
        overwrite: replace what lies in the folder, also where it is something else
        device: where to run: cpu, cuda, cuda:1, mps
    """
    from unitok.evaluate.documents import KIND, evaluate_documents, read_documents, write_scores
    from unitok.generation_config import SamplingParams

    sampling = SamplingParams(temperature, top_k, top_p)
    unitok = _open_bundle(bundle, data, out, KIND, overwrite, device)
    drawn = read_documents(unitok, data, count, seed, split, root)
    scores = evaluate_documents(unitok, drawn, candidates, max_new_tokens, sampling, seed, progress=True)
    write_scores(scores, unitok, out)
    _show(scores.summary(), out)


def _show(scores: "Mapping[str, object]", page: Path) -> None:
    """Print scores, and where the page is that shows what they are of."""
    from unitok.evaluate.tokenizer import print_scores

    print_scores(scores)
    print(f"open {page / 'index.html'}")


def _open_bundle(bundle: Path, data: str, out: Path, kind: str, overwrite: bool, device: str) -> "Unitok":
    """Load the bundle that is measured on documents. Raises `UserError` where `out` may not be replaced or holds what is read."""
    from unitok.api import Unitok

    check_replaceable(out, kind, overwrite)
    check_inputs(out, [bundle, *([] if "://" in data else [Path(data)])])
    return Unitok.from_pretrained(bundle, device=check_device(device))


def boxes(
    data: str,
    *,
    bundle: BundleFolder,
    out: Path = Path("runs/eval-boxes"),
    split: str = "",
    root: str = "",
    count: int = 200,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Measure how well a bundle finds things: IoU, accuracy at 0.5 and mAP of the boxes that it writes; JSON, and a page that draws them.

    Args:
        data: tokenized data set, interleaved .jsonl file, or folder with a documents.jsonl, whose answers hold boxes
        bundle: bundle with tokenizers, box among them, and a decoder
        out: folder for scores.json, boxes.jsonl, samples/index.html
        split: of a data set: train, validation or test (default: validation, else test, else all)
        root: folder that paths in a .jsonl file must not leave (default: the file's)
        count: number of documents, drawn at random; 0: all
        max_new_tokens: most tokens of an answer
        temperature: of the answers; 0: always the likeliest token
        top_k: only the k likeliest tokens; 0: all
        top_p: only the likeliest tokens that together have this probability; 1: all
        seed: random seed of the documents drawn and of sampling
        overwrite: replace what lies in the folder, also where it is something else
        device: where to run: cpu, cuda, cuda:1, mps
    """
    from unitok.evaluate.boxes import KIND, box_scores, evaluate_boxes, write_scores
    from unitok.evaluate.documents import read_documents
    from unitok.generation_config import SamplingParams

    sampling = SamplingParams(temperature, top_k, top_p)
    unitok = _open_bundle(bundle, data, out, KIND, overwrite, device)
    unitok.require("box")
    results = evaluate_boxes(unitok, read_documents(unitok, data, count, seed, split, root), sampling, seed, max_new_tokens)
    scores = box_scores(results)
    write_scores(results, scores, out)
    _show(scores, out / "samples")
    if "map" not in scores:
        print("mAP needs pycocotools: pip install 'unitok-lm[eval]'")


def maps(
    data: Input,
    *,
    bundle: BundleFolder,
    map: Literal["labels", "depth"] = "labels",
    out: Path = Path("runs/eval-maps"),
    root: str = "",
    count: int = 200,
    far: float = 0.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance_scale: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Measure the maps that a bundle draws: mean IoU of labels, absolute relative error of depth; JSON, and a page.

    Args:
        data: interleaved .jsonl file, or folder with a documents.jsonl, whose answers are maps
        bundle: bundle with tokenizers and a decoder
        map: kind of the maps
        out: folder for scores.json, maps.jsonl, samples/index.html
        root: folder that paths in the file must not leave (default: the file's)
        count: number of documents, drawn at random; 0: all
        far: of depth, the depth that is white, in the files' unit (default: 65535 for 16 bits, 255 for 8 bits, 1 for fractions)
        temperature: of the maps; 0: always the likeliest token
        top_k: only the k likeliest tokens; 0: all
        top_p: only the likeliest tokens that together have this probability; 1: all
        guidance_scale: of the maps; 1: none
        seed: random seed of the documents drawn and of sampling
        overwrite: replace what lies in the folder, also where it is something else
        device: where to run: cpu, cuda, cuda:1, mps
    """
    from unitok.evaluate.documents import read_raw_documents
    from unitok.evaluate.maps import KIND, evaluate_maps, map_scores, write_scores
    from unitok.generation_config import SamplingParams

    sampling = SamplingParams(temperature, top_k, top_p, guidance_scale=guidance_scale)
    unitok = _open_bundle(bundle, str(data), out, KIND, overwrite, device)
    results = evaluate_maps(unitok, read_raw_documents(unitok, data, count, seed, root), map, sampling, seed, far)
    scores = map_scores(results, map)
    write_scores(results, map, scores, out)
    _show(scores, out / "samples")


def image_tokenizer(
    tokenizer: PartFolder,
    images: Input,
    *,
    out: Path = Path("runs/eval-image"),
    size: int = 0,
    area: int = 0,
    limit: int = 0,
    batch_size: int = 16,
    lpips: Input | None = None,
    inception: Input | None = None,
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Reconstruct images and measure: JSON, a table, and a page with the worst ones first.

    Args:
        tokenizer: a bundle (a folder, or scenes, the built-in one), an image tokenizer's folder, or the folder of a run
        images: folder of images
        out: folder for scores.json, images.jsonl, index.html
        size: cut out the center square, of this many pixels per side; 0: all of each image
        area: without --size: shrink to this many pixels; 0: the resolution squared
        limit: images to measure, the first by name; 0: all
        batch_size: images of equal size that are reconstructed together
        lpips: folder with LPIPS's weights (vgg16-397923af.pth and vgg.pth): also measure LPIPS
        inception: NVIDIA's inception-2015-12-05.pt: also measure rFID
        overwrite: replace what lies in the folder, also where it is something else
        device: where to run: cpu, cuda, cuda:1, mps
    """
    from unitok.evaluate.image import evaluate_image_tokenizer

    device = check_device(device)
    check_replaceable(out, "image evaluation", overwrite)
    check_inputs(out, filter(None, [tokenizer, images, lpips, inception]))
    scores = evaluate_image_tokenizer(
        tokenizer, images, out, size, area, limit, batch_size, lpips, inception, device, overwrite, progress=True
    )
    _show(scores, out)


def video_tokenizer(
    tokenizer: PartFolder,
    videos: Input,
    *,
    out: Path = Path("runs/eval-video"),
    fps: int = 8,
    frames: int = 64,
    area: int = 0,
    limit: int = 0,
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Reconstruct videos and measure: JSON, a table, and a page with the worst ones first.

    Args:
        tokenizer: a bundle (a folder, or scenes, the built-in one), an image tokenizer's folder, or the folder of a run
        videos: folder of videos and animations
        out: folder for scores.json, videos.jsonl, index.html
        fps: frames per second that are taken, 1 to 60
        frames: frames to measure of each video, from its beginning, at most 256
        area: shrink frames to this many pixels; 0: the resolution squared
        limit: videos to measure, the first by name; 0: all
        overwrite: replace what lies in the folder, also where it is something else
        device: where to run: cpu, cuda, cuda:1, mps
    """
    from unitok.evaluate.video import evaluate_video_tokenizer

    device = check_device(device)
    check_replaceable(out, "video evaluation", overwrite)
    check_inputs(out, [tokenizer, videos])
    _show(evaluate_video_tokenizer(tokenizer, videos, out, fps, frames, area, limit, device, overwrite, progress=True), out)


def audio_tokenizer(
    tokenizer: PartFolder,
    audio: Input,
    *,
    out: Path = Path("runs/eval-audio"),
    seconds: float = 0.0,
    limit: int = 0,
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Reconstruct audio and measure, by number of levels: JSON, a table, and a page to listen to.

    Args:
        tokenizer: a bundle (a folder, or scenes, the built-in one), an audio tokenizer's folder, or the folder of a run
        audio: folder of audio files
        out: folder for scores.json, audio.jsonl, index.html
        seconds: measure the first seconds of each file; 0: all of it
        limit: files to measure, the first by name; 0: all
        overwrite: replace what lies in the folder, also where it is something else
        device: where to run: cpu, cuda, cuda:1, mps
    """
    from unitok.evaluate.audio import evaluate_audio_tokenizer

    check_replaceable(out, "audio evaluation", overwrite)
    check_inputs(out, [tokenizer, audio])
    device = check_device(device)
    _show(evaluate_audio_tokenizer(tokenizer, audio, out, seconds, limit, device, overwrite, progress=True), out)
