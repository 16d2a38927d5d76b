"""`unitok detokenize`."""

from pathlib import Path

from unitok.cli.arguments import BundleFolder, Input
from unitok.hardware import check_device


def detokenize(data: Input, out: Path, *, bundle: BundleFolder, limit: int = 0, device: str = "cpu") -> None:
    """Token shards -> files: documents.jsonl with its images and audio.

    Args:
        data: folder made by unitok tokenize
        out: folder to write
        bundle: bundle with the tokenizers
        limit: most documents to write; 0: all
        device: where to run: cpu, cuda, cuda:1, mps
    """
    from unitok.data.prepare.tokenize import detokenize as run

    print(f"{out}: {run(data, out, bundle, check_device(device), limit, progress=True)} documents")
