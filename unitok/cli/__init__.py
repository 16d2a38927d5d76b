"""The `unitok` command: one verb, one job. A verb's file is imported only when it was asked for; its flags are the signature
and docstring of its function (`unitok.cli.flags`).

A user's mistake is a `UserError`: one line on stderr, exit code 2, no traceback.
"""

import io
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from keyword import iskeyword
from typing import Any, NoReturn

from unitok import __version__
from unitok.errors import UserError, visible

#: Each verb in one line; its function, of the same name, is in the file of its first word.
VERBS = {
    "demo": "everything at once, on built-in data: train, generate, score, write a report",
    "scenes": "write the built-in data set: images, audio, captions, interleaved documents",
    "train-text-tokenizer": "train the SentencePiece text tokenizer",
    "bundle": "put vocabulary, tokenizers and a decoder into one folder",
    "tokenize": "raw files -> token shards",
    "detokenize": "token shards -> files",
    "import": "a tokenizer or decoder of another project (taming, EnCodec, Chameleon, Llama, ...) as ours",
    "export": "a decoder as transformers, vLLM and SGLang load it",
    "inspect": "what is in a data set, bundle or config; what a decoder costs; --verify, --page of samples",
    "sample": "continue prompts of text, images and audio",
    "eval": "measure a bundle on scenes",
    "eval documents": "measure a bundle on documents of your own",
    "eval image-tokenizer": "measure an image tokenizer on images",
    "eval audio-tokenizer": "measure an audio tokenizer on audio",
    "doctor": "what is installed, what works, what to do about the rest",
}
LIGHTNING_VERBS = {
    "fit": "train an image tokenizer, an audio tokenizer or a decoder (LightningCLI)",
    "validate": "measure a training run on validation data (LightningCLI)",
    "test": "the same on test data (LightningCLI)",
}


def overview() -> str:
    """What `unitok --help` says."""
    lines = [f"  {verb:<21} {line}" for verb, line in (VERBS | LIGHTNING_VERBS).items()]
    about = f"unitok {__version__}: one model that reads and writes text, images and audio"
    return "\n".join(
        [about, "", "usage: unitok VERB [options]      (unitok VERB --help says everything about one)", "", *lines]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, or 2 for a user's mistake."""
    for stream in (sys.stdout, sys.stderr):  # whatever a terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0 if given else 2)
    if given[0] in ("-V", "--version"):
        print(__version__)
        return
    try:
        _run(given)
    except UserError as error:
        # From a worker of a DataLoader the message comes behind that process's traceback.
        message = str(error).strip().rpartition("\nunitok.errors.UserError: ")[2]
        print(f"error: {visible(message)}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {visible(error.filename)}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; start it again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def _run(given: list[str]) -> None:
    """Run the verb that the first words name."""
    verb = " ".join(given[:2]) if " ".join(given[:2]) in VERBS else given[0]
    if verb not in VERBS | LIGHTNING_VERBS:
        raise UserError(f"no verb {verb!r}; choose one of {', '.join(VERBS | LIGHTNING_VERBS)}")
    from unitok.hardware import bound_waiting, keep_large_blocks

    bound_waiting()
    keep_large_blocks()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow's notes on odd metadata: they name no file, and cost no image
    if verb in LIGHTNING_VERBS:
        from unitok.training.fit import run_lightning

        run_lightning(given)
        return
    from unitok.cli.flags import run

    with _ended_by_sigterm():
        run(function_of(verb), f"unitok {verb}", given[len(verb.split()) :])


def function_of(verb: str) -> Any:
    """The function of a verb: `train-text-tokenizer` is `unitok.cli.train_text_tokenizer.train_text_tokenizer`, `import` is `unitok.cli.import_.import_`."""
    words = [f"{word}_" if iskeyword(word) else word for word in verb.replace("-", "_").split()]
    return getattr(import_module(f"unitok.cli.{words[0]}"), words[-1])


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A cluster that takes its machine back (SIGTERM) ends a run as Ctrl-C does."""

    def end(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
