"""The `unitok` command: one verb, one job; a verb's code is imported only when it was asked for.

A user's mistake is a `UserError`: one line on stderr, exit code 2, no traceback.
"""

import argparse
import io
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from unitok import __version__
from unitok.errors import UserError, visible
from unitok.hardware import bound_waiting, keep_large_blocks

OVERVIEW = f"""unitok {__version__}: one model that reads and writes text, pictures and sound

usage: unitok VERB [options]      (unitok VERB --help says everything about one)

  demo         everything at once, on built-in data: train, generate, score, write a report
  scenes       write the built-in data set: pictures, sounds, captions, interleaved documents
  train-text   train the SentencePiece text tokenizer
  fit          train an image tokenizer, an audio tokenizer or a decoder (LightningCLI)
  validate     measure a training run on validation data (LightningCLI); test is the same
  bundle       put vocabulary, tokenizers and a decoder into one folder
  tokenize     raw files -> token shards
  detokenize   token shards -> files
  import       a tokenizer or decoder of another project (taming, EnCodec, Chameleon, Llama, …) as ours
  export       a decoder as transformers, vLLM and SGLang load it
  inspect      what is in a data set, bundle or config; what a decoder costs; --verify, --page of samples
  sample       continue prompts of text, pictures and sounds
  eval         measure a bundle on scenes, or an image tokenizer on pictures
  doctor       what is installed, what works, what to do about the rest
"""

LIGHTNING_VERBS = ("fit", "validate", "test")


class _ArgumentParser(argparse.ArgumentParser):
    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse, but a misspelt option is told before one that is missing for it."""
        for word in takewhile(lambda word: word != "--", args):
            name = word.partition("=")[0]
            if (
                name.startswith("--")
                and " " not in name
                and not any(flag.startswith(name) for flag in self._option_string_actions)
            ):
                near = get_close_matches(name, self._option_string_actions, 1)
                self.error(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        print(f"error: {visible(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where there are any, and where the text does not tell them itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default in (None, "", False) or "(default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


def _parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    return _ArgumentParser(prog=f"unitok {verb}", description=description, formatter_class=_Help)


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


def _overwrite(parser: argparse.ArgumentParser) -> None:
    """What unitok made itself, of the same kind, is replaced without it; nothing else is."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what lies in the folder, also where it is something else"
    )


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="where to run: cpu, cuda, cuda:1, mps")


def _check_device(device: str) -> str:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: not available here ({str(error).splitlines()[0][:100]}); try cpu") from None
    return device


# ---- Verbs ----------------------------------------------------------------------------------------------------------


def demo(arguments: list[str]) -> None:
    """Everything, on built-in data: make files, train, tokenize, sample, score, write an HTML report."""
    p = _parser("demo", demo.__doc__)
    p.add_argument("--minutes", type=float, default=13.0, help="budget for all of it, minutes")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything it writes")
    p.add_argument("--eval-scenes", type=int, default=200, help="new scenes that each direction is scored on")
    p.add_argument("--seed", type=int, default=0, help="of data, training and sampling")
    o = p.parse_args(arguments)
    from unitok.scenes.demo import run_demo

    run_demo(o.out, o.minutes, o.eval_scenes, o.seed)


def scenes(arguments: list[str]) -> None:
    """Write sonified scenes as PNG, WAV, captions and interleaved JSON Lines."""
    p = _parser("scenes", scenes.__doc__)
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument("--count", type=int, default=1000, help="number of scenes")
    p.add_argument("--seed", type=int, default=0, help="the same seed writes the same bytes")
    p.add_argument("--most", type=int, default=3, choices=(1, 2, 3), help="most things in a scene")
    p.add_argument("--held-out", action="store_true", help="only scenes with colour-shape pairs that training never shows")
    p.add_argument("--size", type=int, default=32, help="side of the pictures, pixels")
    p.add_argument("--workers", type=int, default=2, help="processes that draw")
    _overwrite(p)
    o = p.parse_args(arguments)
    if o.seed < 0:
        raise UserError(f"--seed {o.seed}: it must be 0 or more")
    if o.size < 32:
        raise UserError(f"--size {o.size}: shapes need at least 32 pixels a side to be told apart")
    from unitok.scenes.world import write_scenes

    write_scenes(o.out, o.count, o.seed, o.most, o.held_out, o.size, o.workers, o.overwrite, progress=True)
    print(f"{o.out}: {o.count} scenes")


def train_text(arguments: list[str]) -> None:
    """Train a SentencePiece BPE tokenizer with byte fallback from raw text."""
    p = _parser("train-text", train_text.__doc__)
    p.add_argument("source", type=Path, nargs="+", help="UTF-8 text files (a string a line) or interleaved .jsonl files")
    p.add_argument("--out", type=Path, required=True, help="folder to write the tokenizer to")
    p.add_argument("--size", type=int, default=8000, help="pieces, 256 of them bytes; a small corpus gives fewer")
    p.add_argument("--sample", type=int, default=5_000_000, help="strings that are used at most")
    _overwrite(p)
    o = p.parse_args(arguments)
    from unitok.data.prepare.sources import read_texts
    from unitok.files import check_inputs, check_replaceable
    from unitok.tokenizers import TextTokenizer

    check_replaceable(o.out, "text tokenizer", o.overwrite)
    check_inputs(o.out, o.source)
    tokenizer = TextTokenizer.train((t for path in o.source for t in read_texts(path)), o.size, o.sample)
    tokenizer.save_pretrained(o.out, o.overwrite)
    fewer = "" if tokenizer.size == o.size else f" of the {o.size} asked for: the text gives no more"
    print(f"{o.out}: {tokenizer.size} pieces{fewer}")


def bundle(arguments: list[str]) -> None:
    """Put vocabulary, tokenizers and a decoder into one folder, or add parts to one."""
    p = _parser("bundle", bundle.__doc__)
    p.add_argument("out", type=Path, help="the bundle's folder")
    for name in ("text", "image", "audio", "decoder"):
        p.add_argument(f"--{name}", type=Path, help=f"the {name} part: a run's folder, a checkpoint, or a part's own folder")
    p.add_argument("--add", nargs="+", default=(), metavar="KIND", help="kinds of content whose tokenizers have no weights")
    p.add_argument("--untrained", metavar="PRESET", help="a whole bundle with random weights instead; PRESET is tiny")
    p.add_argument("--trust-checkpoint", action="store_true", help="allow unpickling: only for files from people you trust")
    _overwrite(p)
    o = p.parse_args(arguments)
    from unitok.bundle import make_bundle, make_untrained

    given = {"text": o.text, "image": o.image, "audio": o.audio, "model": o.decoder}
    paths = {name: path for name, path in given.items() if path}
    if o.untrained:
        if paths:
            raise UserError("--untrained makes all parts itself: leave out the others")
        made = make_untrained(o.out, o.untrained, overwrite=o.overwrite)
    else:
        made = make_bundle(o.out, paths, o.trust_checkpoint, o.overwrite, add=o.add)
    print(f"{o.out}: {', '.join(made.parts)}; {made.vocab.size} ids")


#: How content is read: the fields of `Modality.Options` of each kind, with their types.
OPTIONS = (
    ("image-area", int, "most pixels of an image; 0: the tokenizer's resolution squared"),
    ("image-fit", str, "keep all of each image, crop its center square, or resize it to a distorted square"),
    ("image-crops", int, "additional documents per document with images, of random crops"),
    ("image-crop-scale", float, "least fraction of a side that a random crop has (default: 0.5)"),
    ("image-flip", bool, "one additional document per document with images, mirrored"),
    ("audio-segment", float, "cut audio into documents of this many seconds; 0: whole"),
)


def _tokenize_parser() -> argparse.ArgumentParser:
    """The flags of `unitok tokenize`."""
    p = _parser("tokenize", tokenize.__doc__)
    p.add_argument(
        "source",
        nargs="?",
        default="",
        help="a folder of text, images and sounds; .jsonl, .tar (WebDataset) or .parquet files, a folder or pattern (*) of them; "
        "a Hugging Face data set on disk; a local path or a URL that fsspec opens",
    )
    p.add_argument("out", help="folder for the shards")
    p.add_argument("--bundle", required=True, help="bundle with the tokenizers")
    p.add_argument(
        "--recipe", default="", metavar="FILE.yaml", help="several sources, each with its own options, instead of one"
    )
    what = p.add_argument_group("what becomes a document (a recipe says these of each of its sources)")
    what.add_argument("--template", default="", help="YAML or a file of it: the parts of a document, with {fields} of a row")
    what.add_argument("--root", default="", metavar="DIR", help="folder that paths must not leave (default: the source's)")
    what.add_argument("--order", default="", help="types in order, such as image,text; random: each document its own")
    what.add_argument(
        "--instance",
        action="append",
        default=[],
        metavar="KIND=NAME",
        help="which tokenizer files of a kind go to: audio=speech",
    )
    for flag, given, told in OPTIONS:
        kind = {"action": "store_true"} if given is bool else {"type": given, "metavar": given.__name__.upper()}
        what.add_argument(f"--{flag}", default=None, help=told, **kind)
    what.add_argument("--validation", type=float, default=0.0, help="share of the documents that make the split `validation`")
    what.add_argument("--shard-size", type=int, default=0, help="documents a shard; 0: 4096, fewer for a small source")
    what.add_argument("--seed", type=int, default=0, help="of random orders, crops and choices")
    how = p.add_argument_group("how")
    how.add_argument(
        "--workers", type=int, default=0, help="processes or Ray actors; 0: one for each core, or each GPU, fewer for little"
    )
    how.add_argument("--threads", type=int, default=1, help="threads of the networks in each process")
    how.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster")
    how.add_argument("--shard-index", type=int, metavar="I", help="do the I-th (from 0) of --num-shards parts of the work")
    how.add_argument("--num-shards", type=int, metavar="N", help="into how many parts it is shared out, as in a SLURM array")
    how.add_argument(
        "--max-error-rate",
        type=float,
        help="share of bad documents over which it stops, after 100 (default: 0.1; of fewer than 100 documents any)",
    )
    how.add_argument("--dry-run", action="store_true", help="write nothing; tell from a sample how much it will be")
    _device(p)
    return p


def tokenize(arguments: list[str]) -> None:
    """Raw files -> token shards. Bad files are skipped and listed in OUT/errors.jsonl; a run that was stopped goes on."""
    o = _tokenize_parser().parse_args(arguments)
    if o.workers < 0 or not 0 <= (o.max_error_rate or 0) <= 1:
        raise UserError("--workers must be at least 0 and --max-error-rate in [0, 1]")
    if (o.shard_index is None) != (o.num_shards is None):
        raise UserError("--shard-index and --num-shards belong together")
    if o.recipe and (o.template or o.root or o.order or o.instance):
        raise UserError("--recipe: say --template, --root, --order and --instance in it, for each source")
    from unitok.data.prepare.plan import Plan
    from unitok.data.prepare.recipe import SourceSpec, parse_template
    from unitok.data.prepare.summary import estimate_lines
    from unitok.data.prepare.tokenize import estimate
    from unitok.data.prepare.tokenize import tokenize as run

    spec = SourceSpec(
        o.source,
        template=parse_template(o.template) if o.template else (),
        order=tuple(o.order.split(",")) if o.order else (),
        root=o.root,
        instances=dict(pair.split("=", 1) if "=" in pair else (pair, "") for pair in o.instance),
    )
    options: dict[str, dict[str, Any]] = {}
    for flag, _, _ in OPTIONS:
        kind, _, name = flag.replace("-", "_").partition("_")
        if (given := getattr(o, flag.replace("-", "_"))) not in (None, False):
            options.setdefault(kind, {})[name] = given
    plan = Plan(
        *(o.source, o.out, o.bundle, o.shard_size, _check_device(o.device), o.recipe),
        *(spec, options, o.validation, o.threads, o.seed),
    )
    if o.dry_run:
        for line in estimate_lines(plan, estimate(plan)):
            print(visible(line))
    else:
        part = None if o.shard_index is None else (o.shard_index, o.num_shards)
        run(plan, o.workers, o.max_error_rate, o.engine, part, progress=True)


def detokenize(arguments: list[str]) -> None:
    """Token shards -> files: documents.jsonl with its images and sounds."""
    p = _parser("detokenize", detokenize.__doc__)
    p.add_argument("data", type=Path, help="folder made by unitok tokenize")
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument("--bundle", type=Path, required=True, help="bundle with the tokenizers")
    p.add_argument("--limit", type=int, default=0, help="documents to write; 0: all")
    _device(p)
    o = p.parse_args(arguments)
    from unitok.data.prepare.tokenize import detokenize as run

    count = run(o.data, o.out, o.bundle, _check_device(o.device), o.limit, progress=True)
    print(f"{o.out}: {count} documents")


def import_(arguments: list[str]) -> None:
    """A checkpoint of another project -> a part's folder or a bundle. Nothing in it is executed."""
    from unitok.interop import KINDS, describe, import_checkpoint

    p = _parser("import", import_.__doc__)
    p.add_argument("kind", choices=KINDS, help="; ".join(f"{kind}: {what}" for kind, what in KINDS.items()))
    p.add_argument("source", type=Path, help="the checkpoint's file or folder")
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument(
        "--config",
        type=Path,
        help="the YAML or JSON that belongs to it, if it does not lie beside it; for encodec also a published model's name: "
        "encodec_24khz, encodec_48khz, encodec_32khz (MusicGen's), audiogen_16khz",
    )
    p.add_argument("--sample-rate", type=int, metavar="HZ", help="of an EnCodec, where no configuration says it")
    p.add_argument("--causal", action=argparse.BooleanOptionalAction, help="of an EnCodec, where no configuration says it")
    p.add_argument("--trust-checkpoint", action="store_true", help="allow unpickling: only for files from people you trust")
    _overwrite(p)
    o = p.parse_args(arguments)
    from unitok.files import check_inputs, check_replaceable

    check_replaceable(o.out, overwrite=o.overwrite)
    check_inputs(o.out, [o.source])
    part = import_checkpoint(o.kind, o.source, o.config, o.trust_checkpoint, o.sample_rate, o.causal)
    part.save_pretrained(o.out, o.overwrite)
    print(f"{o.out}: {describe(part)}")


def export(arguments: list[str]) -> None:
    """A bundle's decoder -> another program's folder, with unitok_ids.json to tell what ids mean."""
    from unitok.interop import EXPORTS

    p = _parser("export", export.__doc__)
    p.add_argument("kind", choices=EXPORTS, help="; ".join(f"{kind}: {what}" for kind, what in EXPORTS.items()))
    p.add_argument("source", type=Path, help="a bundle, or a decoder's own folder")
    p.add_argument("out", type=Path, help="folder to write")
    _overwrite(p)
    o = p.parse_args(arguments)
    from unitok.files import check_inputs, check_replaceable
    from unitok.interop.decoder import export_decoder
    from unitok.model import Decoder
    from unitok.vocab import Vocab

    check_replaceable(o.out, "exported decoder", o.overwrite)
    check_inputs(o.out, [o.source])
    decoder, known = Decoder.from_pretrained(o.source), o.source / "vocab.json"
    export_decoder(o.kind, decoder, Vocab.load(known) if known.exists() else None, o.out, o.overwrite)
    print(f"{o.out}: load it with transformers' AutoModelForCausalLM.from_pretrained")


def inspect(arguments: list[str]) -> None:
    """What is in a data set, a bundle or a config, and what a decoder costs; --verify checks a data set."""
    from unitok.hardware import HARDWARE

    p = _parser("inspect", inspect.__doc__)
    p.add_argument(
        "what", help="a data set, a bundle, a decoder's folder, a YAML config, or a preset such as 100m, chameleon-34b"
    )
    p.add_argument("--verify", action="store_true", help="check checksums, counts, grammar and ranges of a data set")
    p.add_argument("--page", type=Path, metavar="FILE.html", help="write a page of decoded samples of a data set")
    p.add_argument("--bundle", type=Path, help="the tokenizers for --page")
    p.add_argument("--samples", type=int, default=24, help="documents on the page")
    p.add_argument("--ids", type=float, default=0, help="ids to train on, for the hours; 0: 20 a parameter")
    p.add_argument("--hardware", choices=HARDWARE, default="h200", help="what it trains on")
    p.add_argument("--devices", type=int, default=1, help="how many of them")
    p.add_argument("--mfu", type=float, default=0.4, help="share of the hardware's peak that is reached")
    p.add_argument("--context", type=int, default=0, help="ids a document; 0: the longest that the decoder takes")
    p.add_argument("--batch", type=int, default=65_536, help="ids of a training batch on one device, for the activations")
    o = p.parse_args(arguments)
    from unitok.cli.inspect import inspect as run

    run(**vars(o))


def _sample_parser() -> argparse.ArgumentParser:
    """The flags of `unitok sample`."""
    p = _parser("sample", sample.__doc__)

    class InOrder(argparse.Action):
        def __call__(self, parser: Any, space: Any, value: Any, flag: str | None = None) -> None:
            space.prompt = [*getattr(space, "prompt", []), (flag, value if flag == "--text" else Path(value))]

    p.add_argument("--bundle", type=Path, required=True, help="bundle with tokenizers and a decoder")
    p.add_argument("--text", action=InOrder, default=argparse.SUPPRESS, help="a text of the prompt")
    p.add_argument("--image", action=InOrder, metavar="FILE", default=argparse.SUPPRESS, help="a picture of the prompt")
    p.add_argument("--audio", action=InOrder, metavar="FILE", default=argparse.SUPPRESS, help="a sound of the prompt")
    p.add_argument("--prompts", type=Path, help="interleaved .jsonl file with a prompt a line, instead of the above")
    p.add_argument(
        "--root", default="", metavar="DIR", help="folder that paths in --prompts must not leave (default: the file's)"
    )
    p.add_argument("--want", default="free", help="free, or a plan such as text,image:8x12,audio:2s (rows x columns of codes)")
    p.add_argument("--n", type=int, default=1, help="outputs a prompt")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same outputs")
    p.add_argument("--max-ids", type=int, default=512, help="most new ids an output")
    p.add_argument("--batch-size", type=int, default=64, help="outputs generated together")
    p.add_argument("--out", type=Path, default=Path("runs/sample"), help="folder for files, outputs.jsonl and index.html")
    p.add_argument("--negative", metavar="TEXT", help="a text that guidance leads away from")
    p.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="the prompt's last picture or sound is a beginning: keep this share of its rows or frames and go on from there",
    )
    p.add_argument("--best-of", type=int, default=1, help="make so many for each output and keep the best of all")
    p.add_argument(
        "--best-by",
        choices=("likelihood", "relevance"),
        default="likelihood",
        help="the mean log-probability of an output, or how much likelier the prompt makes it",
    )
    p.add_argument(
        "--jacobi",
        type=int,
        default=0,
        metavar="IDS",
        help="one at a time: guess and read so many ids of a picture at once; 0: off",
    )
    p.add_argument("--live", action="store_true", help="show the first output while it grows")
    p.add_argument(
        "--score",
        action="store_true",
        help="generate nothing: log-probabilities of the documents in --prompts, to scores.jsonl",
    )
    _sampling_flags(p)
    _overwrite(p)
    _device(p)
    return p


def sample(arguments: list[str]) -> None:
    """Continue prompts. --text, --image and --audio may be repeated and mixed; their order is the prompt's order."""
    o = _sample_parser().parse_args(arguments)
    from unitok.api import Unitok
    from unitok.cli.flags import settings_from
    from unitok.files import check_inputs, check_replaceable
    from unitok.media import sniff
    from unitok.sample.outputs import save_outputs
    from unitok.sample.prompts import read_prompts

    if not o.score:
        check_replaceable(o.out, "sample output", o.overwrite)
    settings = settings_from(vars(o))
    prompt = getattr(o, "prompt", [])
    if o.prompts and prompt:
        raise UserError("give either --prompts or --text, --image and --audio")
    if o.score and not o.prompts:
        raise UserError("--score needs --prompts FILE.jsonl, the documents to score")
    if o.live and (o.best_of > 1 or o.jacobi):
        raise UserError("--live shows one output as it is drawn: leave out --best-of and --jacobi")
    raws = read_prompts(o.prompts, o.root) if o.prompts else []
    if not o.score:
        named = [part.path for raw in raws for part in raw.content if part.path]
        check_inputs(
            o.out, [o.bundle, *filter(None, [o.prompts]), *named, *(part for flag, part in prompt if flag != "--text")]
        )
    for flag, part in prompt:
        if flag == "--text":
            continue
        if not part.exists():
            raise UserError(f"{part}: no such file")
        other = "image" if flag == "--audio" else "audio"
        if sniff(part) == other:
            raise UserError(f"{flag} {part}: holds an {other}; give it with --{other}")
    u = Unitok.from_pretrained(o.bundle, device=_check_device(o.device))
    if o.score:
        _score(u, [u.read_raw(raw) for raw in raws], o.out)
        return
    prompts = [[u.read_raw(raw)] for raw in raws] or [[part for _, part in prompt]]
    task = {"want": o.want, "n": o.n, "seed": o.seed, "max_ids": o.max_ids, "settings": settings, "keep": o.keep}
    negative = [o.negative] if o.negative else None
    if o.live:
        from unitok.cli.terminal import show

        pieces = u.stream(prompts, negative=negative, batch_size=o.batch_size, **task)
        outputs = show(pieces, u.audio.sample_rate if u.audio else 1)
    else:
        choice = {"best_of": o.best_of, "best_by": o.best_by, "jacobi": o.jacobi}
        outputs = u.generate(prompts, batch_size=o.batch_size, progress=True, negative=negative, **task, **choice)
    save_outputs(outputs, o.out, overwrite=o.overwrite)
    for output in [] if o.live else outputs[:8]:
        kinds = ", ".join(s.modality for s in output.new.segments) or "nothing"
        print(f"{output.index:06d}: {kinds}{f': {output.text!r}' if output.text else ''}")
    print(f"{o.out}: {len(outputs)} outputs; open {o.out / 'index.html'}")


def _sampling_flags(p: argparse.ArgumentParser) -> None:
    """The fields of `Settings`, for all modalities and for each alone."""
    flags: list[tuple[str, Any, str]] = [
        ("temperature", float, "0 takes the likeliest id, 1 samples as is"),
        ("top-k", int, "only the k likeliest ids; 0 all"),
        ("top-p", float, "only the likeliest ids of this total probability"),
        ("min-p", float, "only ids of this share of the likeliest one's probability; 0 all"),
        ("repetition-penalty", float, "log-probabilities of ids that have come are multiplied by it; 1 none"),
        ("guidance", float, "classifier-free guidance scale; 1 none"),
        (
            "guidance-media",
            float,
            "three-way guidance: the scale of the prompt's pictures and sounds, --guidance that of its text",
        ),
        ("guidance-start", int, "guide from this id of a span on; the first after begin and header is 0"),
        ("guidance-stop", int, "guide up to before this id of a span"),
        ("guidance-schedule", str, "constant, or growing from 1 over that interval: linear, cosine"),
    ]
    for modality in ("", "text-", "image-", "audio-"):
        which = f"of {modality[:-1]}" if modality else "of all modalities"
        for name, kind, meaning in flags:
            p.add_argument(f"--{modality}{name}", type=kind, help=f"{which}: {meaning}")


def _score(u: Any, documents: list[Any], out: Path) -> None:
    """Write and print log-probabilities."""
    from unitok.files import write_json_lines

    file = out / "scores.jsonl"
    if file.exists() and b'"log_probability"' not in file.read_bytes()[:1000]:
        raise UserError(f"{file}: holds something else than scores; choose another folder, or remove it")
    scores = u.score(documents)
    out.mkdir(parents=True, exist_ok=True)
    write_json_lines(file, (score.row() for score in scores))
    for score in scores[:20]:
        row = score.row()
        name, bits = visible(row["id"]), row["bits_an_id"]
        print(f"{name}: {row['log_probability']:.2f} nats, {row['ids']} ids, {bits:.2f} bits an id")
    print(f"{file}: {len(scores)} documents")


def evaluate_image_tokenizer(arguments: list[str]) -> None:
    """Reconstruct pictures and measure: JSON, a table, and a page with the worst ones first."""
    p = _parser("eval image-tokenizer", evaluate_image_tokenizer.__doc__)
    p.add_argument("tokenizer", type=Path, help="a bundle, an image tokenizer's folder, or the folder of a run")
    p.add_argument("images", type=Path, help="folder of pictures")
    p.add_argument("--out", type=Path, default=Path("runs/eval-image"), help="folder for scores.json, images.jsonl, index.html")
    p.add_argument("--size", type=int, default=0, help="cut the centre square, this many pixels a side; 0: all of each picture")
    p.add_argument("--area", type=int, default=0, help="without --size: shrink to this many pixels; 0: the resolution squared")
    p.add_argument("--limit", type=int, default=0, help="pictures to measure, the first by name; 0: all")
    p.add_argument("--batch-size", type=int, default=16, help="pictures of equal size that go through together")
    p.add_argument(
        "--lpips", type=Path, help="folder with LPIPS's weights (vgg16-397923af.pth and vgg.pth): also measure LPIPS"
    )
    p.add_argument("--inception", type=Path, help="NVIDIA's inception-2015-12-05.pt: also measure rFID")
    _overwrite(p)
    _device(p)
    o = p.parse_args(arguments)
    from unitok.evaluate.image import evaluate_image_tokenizer as run
    from unitok.evaluate.tokenizer import print_table

    scores = run(
        *(o.tokenizer, o.images, o.out, o.size, o.area, o.limit, o.batch_size, o.lpips, o.inception),
        *(_check_device(o.device), o.overwrite),
        progress=True,
    )
    print_table(scores)
    print(f"open {o.out / 'index.html'}")


def evaluate_audio_tokenizer(arguments: list[str]) -> None:
    """Reconstruct sounds and measure, by number of levels: JSON, a table, and a page to listen to."""
    p = _parser("eval audio-tokenizer", evaluate_audio_tokenizer.__doc__)
    p.add_argument("tokenizer", type=Path, help="a bundle, an audio tokenizer's folder, or the folder of a run")
    p.add_argument("sounds", type=Path, help="folder of sounds")
    p.add_argument("--out", type=Path, default=Path("runs/eval-audio"), help="folder for scores.json, sounds.jsonl, index.html")
    p.add_argument("--seconds", type=float, default=0.0, help="measure the first seconds of each sound; 0: all of it")
    p.add_argument("--limit", type=int, default=0, help="sounds to measure, the first by name; 0: all")
    _overwrite(p)
    _device(p)
    o = p.parse_args(arguments)
    from unitok.evaluate.audio import evaluate_audio_tokenizer as run
    from unitok.evaluate.tokenizer import print_table

    print_table(run(o.tokenizer, o.sounds, o.out, o.seconds, o.limit, _check_device(o.device), o.overwrite, progress=True))
    print(f"open {o.out / 'index.html'}")


def evaluate(arguments: list[str]) -> None:
    """Measure a bundle on scenes: reconstructions, codebooks and generations; JSON and a table.

    `unitok eval image-tokenizer` measures an image tokenizer on pictures, `unitok eval audio-tokenizer` one on sounds.
    """
    for name, run in (("image-tokenizer", evaluate_image_tokenizer), ("audio-tokenizer", evaluate_audio_tokenizer)):
        if arguments[:1] == [name]:
            run(arguments[1:])
            return
    p = _parser("eval", evaluate.__doc__)
    p.add_argument("--bundle", type=Path, required=True, help="bundle with tokenizers and a decoder")
    p.add_argument("--scenes", type=Path, required=True, help="folder made by unitok scenes")
    p.add_argument("--held-out", type=Path, help="folder made by unitok scenes --held-out, reported apart")
    p.add_argument("--out", type=Path, default=Path("runs/eval"), help="folder for scores.json and the samples")
    p.add_argument("--count", type=int, default=200, help="scenes that each direction is scored on")
    p.add_argument("--seed", type=int, default=0, help="of sampling")
    p.add_argument("--guidance", type=float, help="guidance of images; default: the bundle's own")
    p.add_argument("--temperature", type=float, help="temperature of images and audio; default: the bundle's own")
    _device(p)
    o = p.parse_args(arguments)
    from unitok.scenes.evaluate import evaluate_bundle, print_scores

    scores = evaluate_bundle(
        o.bundle, o.scenes, o.held_out, o.out, o.count, o.seed, o.guidance, o.temperature, _check_device(o.device), True
    )
    print_scores(scores)


def doctor(arguments: list[str]) -> None:
    """What is installed, what works, and what to do about the rest."""
    p = _parser("doctor", doctor.__doc__)
    p.parse_args(arguments)
    from unitok.cli.doctor import report

    raise SystemExit(report())


VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "scenes": scenes,
    "train-text": train_text,
    "bundle": bundle,
    "tokenize": tokenize,
    "detokenize": detokenize,
    "import": import_,
    "export": export,
    "inspect": inspect,
    "sample": sample,
    "eval": evaluate,
    "doctor": doctor,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, or 2 for a user's mistake."""
    for stream in (sys.stdout, sys.stderr):  # whatever a terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        print(OVERVIEW)
        raise SystemExit(0 if given else 2)
    if given[0] in ("-V", "--version"):
        print(__version__)
        return
    verb = given[0]
    bound_waiting()
    keep_large_blocks()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow's notes on odd metadata: they name no file, and cost no image
    try:
        if verb in LIGHTNING_VERBS:
            from unitok.training.fit import run_lightning

            run_lightning(arguments)
        elif verb in VERBS:
            with _ended_by_sigterm():
                VERBS[verb](given[1:])
        else:
            raise UserError(f"no verb {verb!r}; choose one of {', '.join((*VERBS, *LIGHTNING_VERBS))}")
    except UserError as error:
        # From a worker of a DataLoader the message comes behind that process's traceback.
        told = str(error).strip().rpartition("\nunitok.errors.UserError: ")[2]
        print(f"error: {visible(told)}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {visible(error.filename)}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; start it again to go on", file=sys.stderr)
        raise SystemExit(130) from None
