"""`unitok eval`, `unitok eval image-tokenizer`, `unitok eval audio-tokenizer`."""

from pathlib import Path

from unitok.cli.arguments import BundleFolder, Input
from unitok.hardware import check_device


def eval(
    *,
    bundle: BundleFolder,
    scenes: Input,
    held_out: Input | None = None,
    out: Path = Path("runs/eval"),
    count: int = 200,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    device: str = "cpu",
) -> None:
    """Measure a bundle on scenes: reconstructions, codebooks and generations; JSON and a table.

    `unitok eval image-tokenizer` measures an image tokenizer on images, `unitok eval audio-tokenizer` one on audio.

    Args:
        bundle: bundle with tokenizers and a decoder
        scenes: folder made by unitok scenes
        held_out: folder made by unitok scenes --held-out, reported apart
        out: folder for scores.json and the samples
        count: scenes that each direction is scored on
        seed: of sampling
        guidance_scale: guidance of images (default: the bundle's own, else the demo's)
        temperature: temperature of images and audio (default: the bundle's own, else the demo's)
        device: where to run: cpu, cuda, cuda:1, mps
    """
    from unitok.scenes.evaluate import evaluate_bundle, print_scores

    device = check_device(device)
    scores = evaluate_bundle(bundle, scenes, held_out, out, count, seed, guidance_scale, temperature, device, progress=True)
    print_scores(scores)


def image_tokenizer(
    tokenizer: Input,
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
        tokenizer: a bundle, an image tokenizer's folder, or the folder of a run
        images: folder of images
        out: folder for scores.json, images.jsonl, index.html
        size: cut the center square, this many pixels per side; 0: all of each image
        area: without --size: shrink to this many pixels; 0: the resolution squared
        limit: images to measure, the first by name; 0: all
        batch_size: images of equal size that go through together
        lpips: folder with LPIPS's weights (vgg16-397923af.pth and vgg.pth): also measure LPIPS
        inception: NVIDIA's inception-2015-12-05.pt: also measure rFID
        overwrite: replace what lies in the folder, also where it is something else
        device: where to run: cpu, cuda, cuda:1, mps
    """
    from unitok.evaluate.image import evaluate_image_tokenizer
    from unitok.evaluate.tokenizer import print_table

    device = check_device(device)
    print_table(
        evaluate_image_tokenizer(
            tokenizer, images, out, size, area, limit, batch_size, lpips, inception, device, overwrite, progress=True
        )
    )
    print(f"open {out / 'index.html'}")


def audio_tokenizer(
    tokenizer: Input,
    sounds: Input,
    *,
    out: Path = Path("runs/eval-audio"),
    seconds: float = 0.0,
    limit: int = 0,
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Reconstruct audio and measure, by number of levels: JSON, a table, and a page to listen to.

    Args:
        tokenizer: a bundle, an audio tokenizer's folder, or the folder of a run
        sounds: folder of audio files
        out: folder for scores.json, sounds.jsonl, index.html
        seconds: measure the first seconds of each file; 0: all of it
        limit: files to measure, the first by name; 0: all
        overwrite: replace what lies in the folder, also where it is something else
        device: where to run: cpu, cuda, cuda:1, mps
    """
    from unitok.evaluate.audio import evaluate_audio_tokenizer
    from unitok.evaluate.tokenizer import print_table

    print_table(
        evaluate_audio_tokenizer(tokenizer, sounds, out, seconds, limit, check_device(device), overwrite, progress=True)
    )
    print(f"open {out / 'index.html'}")
