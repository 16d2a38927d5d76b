"""`unitok inspect`: a summary of a data set (with a page of samples) or bundle; what a decoder costs; `--verify`."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from unitok import page as pages
from unitok.errors import UserError, first_line, visible
from unitok.files import read_json, settle
from unitok.hardware import HARDWARE
from unitok.pretrained import load_config, make_config

if TYPE_CHECKING:
    from unitok.api import Unitok
    from unitok.data.shards import TokenDataset
    from unitok.document import Segment
    from unitok.model import DecoderConfig


@dataclass(frozen=True)
class Page:
    """A page of decoded samples of a data set, to look at and listen to: its file, the tokenizers, how many."""

    path: Path
    bundle: Path
    samples: int = 24


def inspect(
    what: str,
    *,
    verify: bool = False,
    page: Path | None = None,
    bundle: Path | None = None,
    samples: int = 24,
    ids: float = 0,
    hardware: Annotated[str, tuple(HARDWARE)] = "h200",
    devices: int = 1,
    mfu: float = 0.4,
    context: int = 0,
    batch: int = 65_536,
) -> None:
    """What is in a data set, a bundle or a config, and what a decoder costs.

    Args:
        what: a data set (also its URL), a bundle, a decoder's folder, a YAML config, or a preset such as 100m, chameleon-34b
        verify: check checksums, counts, grammar and ranges of a data set
        page: write a page of decoded samples of a data set
        bundle: the tokenizers for the page
        samples: documents on the page
        ids: ids to train on, for the hours; 0: 20 per parameter
        hardware: what it trains on
        devices: how many of them
        mfu: fraction of the hardware's peak that is reached
        context: ids per document; 0: the longest that the decoder takes
        batch: ids of a training batch on one device, for the activations
    """
    if (page is None) != (bundle is None) or samples < 1:
        raise UserError("--page needs a --bundle to decode with, --samples at least 1")
    from unitok.model import presets

    plan = {"ids": ids, "hardware": hardware, "devices": devices, "mfu": mfu, "context": context, "batch": batch}
    folder = Path(what)
    known = presets.PRESETS.get(what)
    settle(folder)
    if "://" in what or (folder / "dataset.json").exists():
        _inspect_dataset(what, verify, Page(page, bundle, samples) if page and bundle else None)
    elif page is not None:
        raise UserError(f"{what}: no data set (dataset.json), so there are no samples for --page")
    elif (folder / "bundle.json").exists():
        _inspect_bundle(folder, plan)
    elif config := _decoder_config(folder):
        _print_costs(config, {}, plan)
    elif folder.is_file() and folder.suffix in (".yaml", ".yml"):
        _inspect_config(folder, plan)
    elif known:
        print(f"{what}: {known.source}")
        _print_costs(known.config, known.content, plan)
    elif not folder.exists():
        raise UserError(f"{what}: no such file or folder, and no preset; presets are {', '.join(presets.PRESETS)}")
    elif (folder / "plan.json").exists():
        raise UserError(f"{what}: a data set that is not whole yet; start its `unitok tokenize` again to finish it")
    else:
        raise UserError(f"{what}: neither a data set (dataset.json) nor a bundle (bundle.json) nor a YAML config")


def _decoder_config(folder: Path) -> "DecoderConfig | None":
    """The configuration of a decoder's own folder, or of an import's with a decoder in `model/`."""
    from unitok.model import DecoderConfig

    for path in (folder, folder / "model"):
        if (path / "config.json").exists() and read_json(path / "config.json", "").get("kind") == "decoder":
            return load_config(path, "decoder", DecoderConfig)
    return None


def _inspect_dataset(folder: str, verify: bool, page: Page | None) -> None:
    from unitok.data.shards import TokenDataset

    dataset = TokenDataset(folder if "://" in folder else Path(folder))
    info, lengths = dataset.info, dataset.lengths()
    splits: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for shard in info["shards"]:
        splits[shard.get("split", "train")] += shard["documents"]
        left_out.update(shard.get("filtered", {}))
    print(f"{visible(folder)}: {info['documents']} documents, {info['ids']} ids, {len(info['shards'])} shards")
    if len(splits) > 1:
        print("  splits: " + ", ".join(f"{visible(name)} {count}" for name, count in splits.items()))
    for modality, count in info["ids_by_modality"].items():
        print(f"  {visible(modality):<8}{count:>12} ids  {count / info['ids']:6.1%}")
    between = info["ids"] - sum(info["ids_by_modality"].values())
    print(f"  {'between':<8}{between:>12} ids  {between / info['ids']:6.1%} (begin and end of documents, roles)")
    skipped = sum(shard.get("skipped", 0) for shard in info["shards"])
    if skipped or left_out:
        filtered = "".join(f", {visible(name)} {count}" for name, count in sorted(left_out.items()))
        print(f"  left out: {skipped} bad{filtered}")
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
    """One self-contained HTML file with documents from all over a data set, decoded."""
    from unitok.api import Unitok

    pages.check_page(page.path)
    unitok = Unitok.from_pretrained(page.bundle, parts="tokenizers")
    unitok.vocab.check_covers(dataset.vocab, str(page.bundle), str(dataset.folder))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(page.samples, len(dataset))).round().astype(int))
    articles = []
    for index in map(int, chosen):
        document = dataset.document(index)
        pieces = [_piece(unitok, segment) for segment in document.segments]
        where = f"{index}: {document.id}" + (f" ({document.source})" if document.source != document.id else "")
        articles.append(f"<article><h2>{pages.text(where)}, {len(dataset.ids(index))} ids</h2>{''.join(pieces)}</article>")
    title = f"{dataset.folder.name}: {len(articles)} of {len(dataset)} documents"
    lead = "<p>As they come back from their ids. Grey: read, not learnt.</p>"
    pages.write_page(page.path, title, _STYLE, lead + "".join(articles))


_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{flex-basis:100%;font-size:.85rem;font-weight:500;margin:0;color:#666;overflow-wrap:anywhere}
article{border:1px solid #ddd;border-radius:8px;padding:.8rem 1rem;margin:1rem 0;display:flex;flex-wrap:wrap;gap:1rem;align-items:center}
figure{margin:0;max-width:100%}figcaption{font-size:.75rem;color:#777;overflow-wrap:anywhere}img{min-width:96px;max-width:320px;background:#eee}
.read{opacity:.6}p{margin:0;white-space:pre-wrap}"""


def _piece(unitok: "Unitok", segment: "Segment") -> str:
    from unitok.media import encode_png, encode_wav

    content = unitok.decode(segment)
    said = " ".join(filter(None, [segment.role if segment.role != "none" else "", segment.source]))
    if segment.modality == "text":
        inner = f"<p>{pages.text(content)}</p>"
    elif segment.modality == "image":
        inner = pages.image(encode_png(content))
    else:
        inner = pages.audio(encode_wav(content, unitok.require("audio").sample_rate))
    return f'<figure class="{"" if segment.loss else "read"}">{inner}<figcaption>{pages.text(said)}</figcaption></figure>'


def _inspect_bundle(folder: Path, plan: dict[str, Any]) -> None:
    from unitok.bundle import Bundle

    bundle = Bundle.from_pretrained(folder)
    print(json.dumps(bundle.describe(), indent=1))
    content: dict[str, str] = {}
    for name, tokenizer in bundle.tokenizers.items():
        content |= bundle.modality(name).usage(name, tokenizer)
    if bundle.model is not None:
        _print_costs(bundle.model.config, content, plan)


def _inspect_config(path: Path, plan: dict[str, Any]) -> None:
    import yaml

    from unitok.model import DecoderConfig
    from unitok.model.presets import Preset

    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        model = (yaml.safe_load(text) or {}).get("model", {})
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({first_line(error)})") from None
    print("\n".join(visible(line) for line in text.splitlines() if line.startswith("#")))
    if model.get("class_path", "").endswith("DecoderTraining"):
        decoder = make_config(DecoderConfig, model.get("init_args", {}).get("decoder", {}), str(path))
        _print_costs(decoder, Preset(decoder).content, plan)


def _print_costs(config: "DecoderConfig", content: Mapping[str, str], plan: dict[str, Any]) -> None:
    """Print `cost_table`."""
    from unitok.model.costs import cost_table

    for name, text in cost_table(config, content, **plan).items():
        print(f"  {name:<15}{text}")
