"""`unitok inspect`: summaries of data sets (with a page of samples), bundles and configurations; the costs of a decoder."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from unitok import pages
from unitok.cli.arguments import BundleFolder, check_input
from unitok.configs import config_file
from unitok.errors import UserError, visible
from unitok.files import read_json, read_yaml, settle
from unitok.hardware import HARDWARE

if TYPE_CHECKING:
    from unitok.data.shards import TokenDataset
    from unitok.model import DecoderConfig

    Costs = Callable[[DecoderConfig, Mapping[str, str]], Mapping[str, str]]


def inspect(
    what: str,
    *,
    verify: bool = False,
    page: Path | None = None,
    bundle: BundleFolder | None = None,
    samples: int = 24,
    tokens: float = 0,
    hardware: Annotated[str, tuple(HARDWARE)] = "h200",
    devices: int = 1,
    mfu: float = 0.4,
    context: int = 0,
    batch: int = 65_536,
) -> None:
    """Print what a data set, a bundle or a config holds, and what a decoder costs; --verify checks a data set.

    Args:
        what: a data set (a folder or URL), a bundle (a folder, or the built-in scenes), a decoder's folder, a YAML config (a file or a built-in one), or a preset such as 100m, chameleon-34b

    data sets:
        verify: check the checksums, counts, grammar and ranges of a data set
        page: HTML file to write, with decoded samples of a data set
        bundle: bundle whose tokenizers decode the samples
        samples: number of documents on the page

    costs of a decoder:
        tokens: tokens to train on; 0: 20 per parameter
        hardware: what it trains on
        devices: number of these
        mfu: fraction of the hardware's peak that training reaches
        context: tokens per document; 0: the decoder's maximum
        batch: tokens of a training batch on one device, for the memory of activations
    """
    if (page is None) != (bundle is None) or samples < 1:
        raise UserError("--page needs a --bundle to decode with, --samples at least 1")
    if what.endswith(".yaml"):
        what = str(config_file(what))
    if "/" in what and "://" not in what:  # no preset
        check_input(Path(what))
    from unitok.hub import built_in, find
    from unitok.model import presets
    from unitok.model.costs import cost_table

    costs = partial(cost_table, tokens=tokens, hardware=hardware, devices=devices, mfu=mfu, context=context, batch=batch)
    folder = find(what) if what in built_in() else Path(what)
    known = presets.PRESETS.get(what)
    settle(folder)
    if "://" in what or (folder / "dataset.json").exists():
        _inspect_dataset(what, verify, page, bundle, samples)
    elif page is not None or verify:
        flag = "--verify checks data sets" if verify else "so it has no samples for --page"
        raise UserError(f"{what}: no data set (dataset.json), {flag}")
    elif (folder / "bundle.json").exists():
        _inspect_bundle(folder, costs)
    elif config := _decoder_config(folder):
        _print_costs(config, {}, costs)
    elif folder.is_file() and folder.suffix in (".yaml", ".yml"):
        _inspect_config(folder, costs)
    elif known:
        print(f"{what}: {known.source}")
        _print_costs(known.config, known.content, costs)
    elif not folder.exists():
        bundles, known_presets = ", ".join(built_in()), ", ".join(presets.PRESETS)
        raise UserError(
            f"{what}: no such file or folder, no built-in bundle ({bundles}) and no preset; presets are {known_presets}"
        )
    elif (folder / "plan.json").exists():
        raise UserError(f"{what}: an unfinished data set; run its `unitok tokenize` again to finish it")
    else:
        raise UserError(f"{what}: neither a data set (dataset.json) nor a bundle (bundle.json) nor a YAML config")


def _decoder_config(folder: Path) -> "DecoderConfig | None":
    """The configuration of a decoder, given its own folder or that of an import with `model/`; None for any other folder."""
    from unitok.model import DecoderConfig
    from unitok.pretrained import load_config

    for path in (folder, folder / "model"):
        if (path / "config.json").exists() and read_json(path / "config.json", "").get("kind") == "decoder":
            return load_config(path, "decoder", DecoderConfig)
    return None


def _inspect_dataset(folder: str, verify: bool, page: Path | None, bundle: Path | None, samples: int) -> None:
    from unitok.data.prepare.summary import splits_in_words
    from unitok.data.shards import TokenDataset

    dataset = TokenDataset(folder if "://" in folder else Path(folder))
    info, lengths = dataset.info, dataset.lengths()
    left_out: Counter[str] = Counter()
    for shard in info["shards"]:
        left_out.update(shard.get("filtered", {}))
    print(f"{visible(folder)}: {info['documents']} documents, {info['tokens']} tokens, {len(info['shards'])} shards")
    if splits := splits_in_words(dataset.documents_by_split(), info.get("groups", {})):
        print(f"  splits: {visible(splits)}")
    for modality, count in info["tokens_by_modality"].items():
        print(f"  {visible(modality):<8}{count:>12} tokens  {count / info['tokens']:6.1%}")
    between = info["tokens"] - sum(info["tokens_by_modality"].values())
    print(f"  {'between':<8}{between:>12} tokens  {between / info['tokens']:6.1%} (begin and end of documents, roles)")
    skipped = sum(shard.get("skipped", 0) for shard in info["shards"])
    if skipped or left_out:
        filtered = "".join(f", {visible(name)} {count}" for name, count in sorted(left_out.items()))
        print(f"  left out: {skipped} bad{filtered}")
    print(f"  lengths: shortest {lengths.min()}, median {int(np.median(lengths))}, longest {lengths.max()} tokens")
    print(histogram(lengths))
    if page and bundle:
        write_page(dataset, page, bundle, samples)
        print(f"  samples: {page}")
    if verify:
        problems = dataset.verify()
        if problems:
            for problem in problems[:20]:
                print(f"  {visible(problem)}")
            raise UserError(f"{folder}: {len(problems)} problems; the first: {problems[0]}")
        print("  verified: checksums, counts, ranges, grammar and spans")


def histogram(lengths: np.ndarray, bars: int = 12, width: int = 50) -> str:
    """Return a bar chart of lengths as lines of text. Its bins are logarithmic where the longest is much longer than the median."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    logarithmic = high > 5 * max(1, int(np.median(lengths)))
    edges = np.geomspace(max(1, low), high, bars + 1) if logarithmic else np.linspace(low, high, bars + 1)
    edges = np.unique(np.round(edges).astype(int))
    counts, _ = np.histogram(lengths, edges)
    most = max(1, counts.max())
    lines = [
        f"  {a:>9} to {b - 1:<9} {'#' * round(width * n / most):<{width}} {n}"
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return "\n".join(lines)


def write_page(dataset: "TokenDataset", page: Path, tokenizers: Path, samples: int) -> None:
    """Write one self-contained HTML file with evenly spaced documents of a data set, decoded by a bundle's tokenizers."""
    from unitok.bundle import Bundle
    from unitok.modalities import with_layers

    pages.check_page(page)
    bundle = Bundle.from_pretrained(tokenizers, parts="tokenizers")
    bundle.vocab.check_covers(dataset.vocab, str(tokenizers), str(dataset.folder))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).round().astype(int))
    articles = []
    for index in map(int, chosen):
        document = dataset.document(index)
        figures = []
        for segment in document.segments:
            element = bundle.modality(segment.modality).html(bundle.require(segment.modality), bundle.decode(segment))
            role = "" if segment.role == "none" else segment.role
            figures.append(pages.Figure(element, f"{role} {segment.source}".strip(), "new" if segment.loss else "given"))
        kinds = [bundle.vocab.span(segment.modality).kind for segment in document.segments]
        figures = with_layers(kinds, [bundle.decode(segment) for segment in document.segments], figures)
        source = "" if document.source == document.id else f" ({document.source})"
        articles.append(pages.Article(figures, f"{index}: {document.id}{source}, {len(dataset.ids(index))} tokens"))
    title = f"{dataset.folder.name}: {len(articles)} of {len(dataset)} documents"
    lead = "Decoded from their tokens. Blue: training learns to write it. Gray: it is only read."
    pages.write_page(page, "articles.html", title=title, lead=lead, articles=articles)


def _inspect_bundle(folder: Path, costs: "Costs") -> None:
    from unitok.bundle import Bundle

    bundle = Bundle.from_pretrained(folder)
    print(json.dumps(bundle.describe(), indent=1))
    content: dict[str, str] = {}
    for name, tokenizer in bundle.tokenizers.items():
        content |= bundle.modality(name).usage(name, tokenizer)
    if bundle.model is not None:
        _print_costs(bundle.model.config, content, costs)


def _inspect_config(path: Path, costs: "Costs") -> None:
    from unitok.model import DecoderConfig
    from unitok.model.presets import Preset
    from unitok.pretrained import make_config

    text = path.read_text(encoding="utf-8", errors="replace")
    model = _inner(read_yaml(path, text), "model")
    print("\n".join(visible(line) for line in text.splitlines() if line.startswith("#")))
    if str(model.get("class_path")).endswith("DecoderTraining"):
        decoder = make_config(DecoderConfig, _inner(_inner(model, "init_args"), "decoder"), str(path))
        _print_costs(decoder, Preset(decoder).content, costs)


def _inner(mapping: object, key: str) -> dict[str, Any]:
    """A mapping in a mapping, empty where it is not there."""
    inner = mapping.get(key) if isinstance(mapping, dict) else None
    return inner if isinstance(inner, dict) else {}


def _print_costs(config: "DecoderConfig", content: Mapping[str, str], costs: "Costs") -> None:
    for name, text in costs(config, content).items():
        print(f"  {name:<18}{text}")
