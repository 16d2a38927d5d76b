"""The `unitok` command. Each verb is a function in a file of its own, which is imported only when the verb is called.

The flags of a verb come from the signature and docstring of its function (`unitok.cli.flags`). A user's mistake is a `UserError`:
one line on stderr, exit code 2, no traceback.
"""

import io
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from keyword import iskeyword
from typing import NoReturn

from unitok import __version__
from unitok.errors import UserError, visible

#: Verb -> what it does. The function of a verb has its name, and is in the file named after its first word.
VERBS = {
    "demo": "do everything at once, on built-in data: train, generate, score, write a report",
    "scenes": "write the built-in data set: images, audio, captions, interleaved documents",
    "train-text-tokenizer": "train the SentencePiece text tokenizer",
    "bundle": "put the vocabulary, tokenizers and a decoder into one folder",
    "tokenize": "turn raw files into token shards",
    "detokenize": "turn token shards back into files",
    "import": "convert a tokenizer or decoder of another project (taming, EnCodec, Chameleon, Llama, ...)",
    "export": "write a decoder in the format that transformers, vLLM and SGLang load",
    "inspect": "show what is in a data set, bundle or config, and what a decoder costs; --verify, --page of samples",
    "sample": "continue prompts of text, images and audio",
    "chat": "talk with a bundle in the terminal",
    "serve": "serve a bundle behind OpenAI's endpoints, with a page",
    "eval": "measure a bundle on scenes",
    "eval documents": "measure a bundle on documents of your own",
    "eval boxes": "measure the boxes that a bundle writes",
    "eval maps": "measure the maps that a bundle draws",
    "eval image-tokenizer": "measure an image tokenizer on images",
    "eval video-tokenizer": "measure an image tokenizer on videos",
    "eval audio-tokenizer": "measure an audio tokenizer on audio",
    "doctor": "say what is installed, what works, and what to do about the rest",
}
LIGHTNING_VERBS = {
    "fit": "train an image tokenizer, an audio tokenizer or a decoder (LightningCLI)",
    "validate": "measure a training run on validation data (LightningCLI)",
    "test": "measure a training run on test data: the split test, or data.val_path (LightningCLI)",
}

#: What other projects call our verbs.
OTHER_VERBS = {
    "train": "fit",
    "generate": "sample",
    "evaluate": "eval",
    "prepare": "tokenize",
    "convert": "import",
    "info": "inspect",
}


def overview() -> str:
    """Return the text of `unitok --help`."""
    lines = [f"  {verb:<21} {line}" for verb, line in (VERBS | LIGHTNING_VERBS).items()]
    about = f"unitok {__version__}: one model that reads and writes text, images and audio"
    return "\n".join([about, "", "usage: unitok VERB [options]      (unitok VERB --help describes its options)", "", *lines])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. The exit code is 0, 2 for a user's mistake, 130 for Ctrl-C or SIGTERM, 141 where nobody reads what it prints.

    Args:
        arguments: the words after `unitok`; default: those of this process.
    """
    for stream in (sys.stdout, sys.stderr):  # escape characters that the terminal's encoding does not have
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
        sys.stdout.flush()
    except UserError as error:
        # An error in a DataLoader's worker arrives as that process's traceback, with the message at its end.
        message = str(error).strip().rpartition("\nunitok.errors.UserError: ")[2]
        print(f"error: {visible(message)}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # as with `| head`
            raise SystemExit(141) from None
        if error.filename is None:
            raise
        print(f"error: {visible(error.filename)}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, RuntimeError) as error:
        if not isinstance(error.__cause__ if isinstance(error, RuntimeError) else error, KeyboardInterrupt):
            raise  # Python 3.11 wraps an interrupt that comes while a class is made
        print("stopped; start it again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def _nobody_reads() -> bool:
    """Whether the reader of what is printed is gone; then what is still to be printed goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _run(given: list[str]) -> None:
    """Run the verb that the first one or two words name."""
    verb = " ".join(given[:2]) if " ".join(given[:2]) in VERBS else given[0]
    if verb not in VERBS | LIGHTNING_VERBS:
        near = OTHER_VERBS.get(verb) or next(iter(get_close_matches(verb, VERBS | LIGHTNING_VERBS, 1)), "")
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(VERBS | LIGHTNING_VERBS)}"
        raise UserError(f"no verb {verb!r}; {hint}")
    from unitok.hardware import bound_waiting, keep_large_blocks

    bound_waiting()
    keep_large_blocks()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd metadata; the images are read all the same
    warnings.formatwarning = _format_warning
    if verb in LIGHTNING_VERBS:
        from unitok.training.fit import run_lightning

        run_lightning(given)
        return
    from unitok.cli.flags import run

    with _ended_by_sigterm():
        run(function_of(verb), f"unitok {verb}", given[len(verb.split()) :])


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package is for who typed the command, not about a place in the code."""
    if category is UserWarning and filename.startswith(os.path.dirname(os.path.dirname(__file__))):
        return f"warning: {visible(message)}\n"
    return _format_in_python(message, category, filename, lineno, line)


_format_in_python = warnings.formatwarning


def function_of(verb: str) -> Callable[..., None]:
    """Import and return the function of a verb: of `import` it is `unitok.cli.import_.import_`."""
    words = [f"{word}_" if iskeyword(word) else word for word in verb.replace("-", "_").split()]
    function: Callable[..., None] = getattr(import_module(f"unitok.cli.{words[0]}"), words[-1])
    return function


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM, which clusters send before they stop a job, like Ctrl-C."""

    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
