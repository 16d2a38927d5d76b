"""`unitok inspect`: a summary of a data set (with a page of samples) or bundle; what a decoder costs; `--verify`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unitok import pages
from unitok.errors import UserError, visible
from unitok.files import read_json, settle
from unitok.hardware import HARDWARE

if TYPE_CHECKING:
    from unitok.data.shards import TokenDataset


@dataclass(frozen=True)
class Budget:
    """What hours and memory are estimated for; see `unitok inspect --help`."""

    ids: float = 0
    hardware: str = "h200"
    devices: int = 1
    mfu: float = 0.4
    context: int = 0
    batch: int = 65_536


@dataclass(frozen=True)
class Page:
    """A page of decoded samples of a data set, to look at and listen to: its file, the tokenizers, how many."""

    path: Path
    bundle: Path
    samples: int = 24


def inspect(what: Path | str, verify: bool = False, budget: Budget | None = None, page: Page | None = None) -> None:
    """Print what is there; errors: `UserError` for something else, and for a data set that does not verify.

    `what` may be the URL of a data set.
    """
    from unitok.model.presets import PRESETS, Preset

    budget = budget or Budget()
    if "://" in str(what):
        _inspect_dataset(str(what), verify, page)
        return
    what = Path(what)
    settle(what)
    if (what / "dataset.json").exists():
        _inspect_dataset(what, verify, page)
    elif page is not None:
        raise UserError(f"{what}: no data set (dataset.json), so there are no samples for --page")
    elif (what / "bundle.json").exists():
        _inspect_bundle(what, budget)
    elif decoder := _decoder_folder(what):
        from unitok.model import DecoderConfig
        from unitok.pretrained import load_config

        print_costs(Preset(load_config(decoder, "decoder", DecoderConfig), ids_an_image=0, ids_a_second=0), budget)
    elif what.is_file() and what.suffix in (".yaml", ".yml"):
        _inspect_config(what, budget)
    elif str(what) in PRESETS:
        print(f"{what}: {PRESETS[str(what)].source}")
        print_costs(PRESETS[str(what)], budget)
    elif not what.exists():
        raise UserError(f"{what}: no such file or folder, and no preset; presets are {', '.join(PRESETS)}")
    elif (what / "plan.json").exists():
        raise UserError(f"{what}: a data set that is not whole yet; start its `unitok tokenize` again to finish it")
    else:
        raise UserError(f"{what}: neither a data set (dataset.json) nor a bundle (bundle.json) nor a YAML config")


def _decoder_folder(what: Path) -> Path | None:
    """A decoder's own folder, or an import's with a decoder in `model/`."""
    for folder in (what, what / "model"):
        config = folder / "config.json"
        if config.exists() and read_json(config, "").get("kind") == "decoder":
            return folder
    return None


def _inspect_dataset(folder: Path | str, verify: bool, page: Page | None) -> None:
    from unitok.data.shards import TokenDataset

    dataset = TokenDataset(folder)
    info, lengths = dataset.info, dataset.lengths()
    print(f"{visible(folder)}: {info['documents']} documents, {info['ids']} ids, {len(info['shards'])} shards")
    splits: dict[str, int] = {}
    for shard in info["shards"]:
        splits[shard.get("split", "train")] = splits.get(shard.get("split", "train"), 0) + shard["documents"]
    if len(splits) > 1:
        print("  splits: " + ", ".join(f"{visible(name)} {count}" for name, count in splits.items()))
    for modality, count in info["ids_by_modality"].items():
        print(f"  {visible(modality):<8}{count:>12} ids  {count / info['ids']:6.1%}")
    between = info["ids"] - sum(info["ids_by_modality"].values())
    print(f"  {'between':<8}{between:>12} ids  {between / info['ids']:6.1%} (begin and end of documents, roles)")
    skipped = sum(s.get("skipped", 0) for s in info["shards"])
    left_out = sorted({name for s in info["shards"] for name in s.get("filtered", {})})
    told = [f"{visible(name)} {sum(s.get('filtered', {}).get(name, 0) for s in info['shards'])}" for name in left_out]
    if skipped or told:
        print(f"  left out: {skipped} bad" + "".join(f", {t}" for t in told))
    print(f"  lengths: shortest {lengths.min()}, median {int(np.median(lengths))}, longest {lengths.max()} ids")
    print(histogram(lengths))
    if page is not None:
        write_page(dataset, page)
        print(f"  samples: {page.path}")
    if verify:
        problems = dataset.verify()
        if problems:
            for problem in problems[:20]:
                print(f"  {visible(problem)}")
            raise UserError(f"{folder}: {len(problems)} problems; the first: {problems[0]}")
        print("  verified: checksums, counts, ranges, grammar and spans")


def histogram(lengths: np.ndarray, bars: int = 12, width: int = 50) -> str:
    """Lengths as lines of a bar chart; the bars double in width where the longest is much longer than most."""
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


def write_page(dataset: "TokenDataset", page: Page) -> None:
    """Write one self-contained HTML file with documents from all over a data set, decoded."""
    from unitok.bundle import Bundle

    pages.check_page(page.path)
    bundle = Bundle.from_pretrained(page.bundle, parts="tokenizers")
    bundle.vocab.check_covers(dataset.vocab, str(page.bundle), str(dataset.folder))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(page.samples, len(dataset))).round().astype(int))
    articles = []
    for index in map(int, chosen):
        document = dataset.document(index)
        figures = []
        for segment in document.segments:
            element = bundle.modality(segment.modality).html(bundle.require(segment.modality), bundle.decode(segment))
            role = "" if segment.role == "none" else segment.role
            figures.append(pages.Figure(element, f"{role} {segment.source}".strip(), "" if segment.loss else "given"))
        source = "" if document.source == document.id else f" ({document.source})"
        articles.append(pages.Article(figures, f"{index}: {document.id}{source}, {len(dataset.ids(index))} ids"))
    title = f"{dataset.folder.name}: {len(articles)} of {len(dataset)} documents"
    lead = "As they come back from their ids. Gray: read, not learned."
    pages.write_page(page.path, "articles.html", title=title, lead=lead, articles=articles)


def _inspect_bundle(folder: Path, budget: Budget) -> None:
    from unitok.api import Unitok
    from unitok.model.presets import Preset

    bundle = Unitok.from_pretrained(folder)
    print(json.dumps(bundle.describe(), indent=1))
    if bundle.model is None:
        return
    preset = Preset(bundle.model.config, ids_an_image=0, ids_a_second=0)
    if bundle.image is not None:
        side, span = bundle.image.config.resolution, bundle.vocab.span("image")
        codes, markers = (side // bundle.image.stride) ** 2, 2 + len(span.header)
        preset = replace(preset, ids_an_image=codes + markers, image=f"{side} x {side} pixels")
    if bundle.audio is not None:
        a = bundle.audio
        rate = a.frame_rate * a.num_codebooks
        preset = replace(preset, ids_a_second=rate, sound=f"{a.frame_rate:g} frames of {a.num_codebooks} levels")
    print_costs(preset, budget)


def _inspect_config(path: Path, budget: Budget) -> None:
    import yaml

    from unitok.model import DecoderConfig
    from unitok.model.presets import Preset
    from unitok.pretrained import make_config

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())[:120]})") from None
    print("\n".join(visible(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")))
    model = config.get("model", {})
    if model.get("class_path", "").endswith("DecoderTraining"):
        decoder = make_config(DecoderConfig, model.get("init_args", {}).get("decoder", {}), str(path))
        print_costs(Preset(decoder), budget)


def print_costs(preset: Any, budget: Budget) -> None:
    """Parameters, FLOPs, memory and hours of a decoder, as a table. A vocabulary not known yet is taken as 10,000 ids."""
    from unitok.model.costs import count, hours, memory_bytes

    config = preset.config
    guessed = "" if config.vocab_size else " (not known before the data: taken as 10,000)"
    config = replace(config, vocab_size=config.vocab_size or 10_000)
    context = budget.context or config.max_position_embeddings
    costs = count(config, context)
    ids = budget.ids or 20.0 * costs.parameters
    memory = {k: v / 1e9 for k, v in memory_bytes(config, budget.batch, 1, context).items()}
    state = memory["weights"] + memory["gradients"] + memory["optimizer"]
    time = hours(config, ids, HARDWARE[budget.hardware], budget.mfu, budget.devices, context)
    heads = f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} for keys and values"
    lines = {
        "shape": f"{config.num_hidden_layers} layers, {config.hidden_size} wide, SwiGLU {config.intermediate_size}, {heads}",
        "vocabulary": f"{config.vocab_size:,} ids{guessed}",
        "parameters": f"{_short(costs.parameters)}: {_short(costs.in_blocks)} in blocks, {_short(costs.in_matrices)} multiplied an id",
        "FLOPs an id": f"{_short(costs.flops)} to train, {_short(costs.flops_forward)} to read, at {context:,} ids a document",
        "training state": f"{state:.2f} GB: weights, gradients and AdamW in fp32, on one device",
        "activations": f"{memory['activations']:.2f} GB in bf16 for {budget.batch:,} ids, about",
        "inference": f"{memory['weights'] / 2:.2f} GB of weights in bf16, {memory['kv_cache']:.3f} GB of KV cache for {context:,} ids",
        "an image": f"{preset.ids_an_image:,} ids ({preset.image})" if preset.ids_an_image else "",
        "a second": f"{preset.ids_a_second:g} ids ({preset.sound})" if preset.ids_a_second else "",
        "time": f"{time:,.1f} hours for {_short(ids)} ids on {budget.devices} x {budget.hardware} at {budget.mfu:.0%} MFU",
    }
    for name, text in lines.items():
        if text:
            print(f"  {name:<15}{text}")


def _short(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{'B' if unit == 'G' else unit}"
    return f"{number:.3g}"
