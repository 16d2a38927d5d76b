"""`unitok inspect`: a summary of a data set, a bundle or a config; `--verify` checks a data set."""

import json
from pathlib import Path

from unitok.errors import UserError


def inspect(what: Path, verify: bool = False) -> None:
    """Print what is there; errors: `UserError` for something else, and for a data set that does not verify."""
    if (what / "dataset.json").exists():
        _inspect_dataset(what, verify)
    elif (what / "bundle.json").exists():
        from unitok.bundle import Unitok, describe

        print(json.dumps(describe(Unitok.from_pretrained(what)), indent=1))
    elif what.is_file() and what.suffix in (".yaml", ".yml"):
        _inspect_config(what)
    elif not what.exists():
        raise UserError(f"{what}: no such file or folder")
    else:
        raise UserError(f"{what}: neither a data set (dataset.json) nor a bundle (bundle.json) nor a YAML config")


def _inspect_dataset(folder: Path, verify: bool) -> None:
    from unitok.data.shards import TokenDataset

    dataset = TokenDataset(folder)
    info, lengths = dataset.info, dataset.lengths()
    print(f"{folder}: {info['documents']} documents, {info['ids']} ids, {len(info['shards'])} shards")
    for modality, count in info["ids_by_modality"].items():
        print(f"  {modality:<8}{count:>12} ids")
    print(f"  lengths: shortest {lengths.min()}, median {int(sorted(lengths)[len(lengths) // 2])}, longest {lengths.max()} ids")
    if verify:
        problems = dataset.verify()
        if problems:
            raise UserError(f"{folder}: {len(problems)} problems; the first: {problems[0]}")
        print("  verified: checksums, ranges and grammar")


def _inspect_config(path: Path) -> None:
    import yaml

    try:
        config = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())[:120]})") from None
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    print("\n".join(header))
    model = config.get("model", {})
    arguments = model.get("init_args", {})
    if model.get("class_path", "").endswith("DecoderTraining"):
        import torch

        from unitok.model.decoder import Decoder, DecoderConfig
        from unitok.pretrained import make_config

        decoder = make_config(DecoderConfig, arguments.get("decoder", {}) | {"vocab_size": 1}, str(path))
        with torch.device("meta"):
            count = sum(p.numel() for n, p in Decoder(decoder).named_parameters() if "layers" in n)
        print(f"decoder: {count / 1e6:.2f}M parameters in its blocks, {2 * decoder.hidden_size} more for each id")
