"""Checkpoints of any origin as plain types and tensors. Nothing in them is ever executed.

`torch.load(weights_only=True)` refuses files that also hold objects of other programs (Lightning's callbacks, an argparse
Namespace), as published checkpoints often do. Such objects are read as inert stand-ins, so that the tensors beside them come out.
What still does not read is refused, unless `trust` lets it be unpickled. Sharded checkpoints (a folder each) have one pickle of
PyTorch's own; what it names is checked first.
"""

import io
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitok.errors import UserError, first_line
from unitok.files import Json, atomic_write, read_yaml, settle

log = logging.getLogger(__name__)


def load_checkpoint(path: Path, trust: bool = False) -> Any:
    """What a checkpoint holds; objects of other programs as `Inert`. Errors: `UserError` naming the file.

    Tensors are read from the disk when they are used, where the format allows that. trust: unpickle everything, which runs
    whatever code the file's author put there.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if is_sharded(path):
        return _load_sharded(path)
    foreign: list[str] = []
    while True:
        try:
            return _load(path, trust, foreign)
        except Exception as error:  # a torn file, and what a stand-in cannot do, raise almost anything
            named = re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", str(error))  # torch names the first
            if trust or not (named or foreign):
                said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()  # torch puts advice before it, and after it
                reason = first_line(ValueError(said or str(error)))
                raise UserError(f"{path}: {_foreign(path) or f'not a checkpoint that can be read ({reason})'}") from None
            if named is None or named[1] in foreign:
                what = f"holds objects that would have to be run to be read ({', '.join(sorted(foreign)[:4])})"
                raise UserError(f"{path}: {what}; if you trust its author, pass --trust-checkpoint") from None
            foreign.append(named[1])


def _load(path: Path, trust: bool, foreign: list[str]) -> Any:
    """The checkpoint in a file, with stand-ins for the objects of the classes `foreign`."""
    with warnings.catch_warnings(), torch.serialization.safe_globals([(_stand_in(name), name) for name in foreign]):
        warnings.simplefilter("ignore")  # of a TorchScript archive, which is refused
        try:
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=True)
        except RuntimeError:  # PyTorch's format of before 2020, or a file system that maps nothing
            return torch.load(path, map_location="cpu", weights_only=not trust)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, whole or not at all. Errors: `UserError` where there is no room."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, binary=True) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError of its own where the disk is full
        remedy = "the checkpoint before it is whole: make room and go on with --resume auto"
        raise UserError(f"{path}: could not be written ({first_line(error)}); {remedy}") from None


# ---- Sharded checkpoints (FSDP2): a folder with a part for each process ------------------------------------------------

_INDEX, _REST = ".metadata", "meta.pt"
_DCP = "torch.distributed.checkpoint"
#: What an index names, module by module: plain records and nothing that acts.
_OF_AN_INDEX = {
    *("torch.Size", "torch.serialization._get_layout", f"{_DCP}.filesystem._StorageInfo"),
    *(f"{_DCP}.metadata.{name}StorageMetadata" for name in ("Bytes", "Chunk", "Tensor")),
    *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
    *(f"pathlib{where}.{kind}Path" for where in ("", "._local") for kind in ("Posix", "Windows")),  # Python 3.13: _local
}


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of parts, as Lightning's `ModelParallelStrategy` writes them."""
    return path.is_dir() and (path / _REST).exists()


class _IndexReader(pickle.Unpickler):
    """Refuses what an index of PyTorch's distributed checkpoints does not hold."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and f"{module}.{name}" not in _OF_AN_INDEX:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself (its `unitok` entry); {} for one of another program. Errors: `UserError` unless it reads.

    Weights stay on the disk.
    """
    if is_sharded(path):
        _check_index(path)
        path = path / _REST
    found = load_checkpoint(path)
    described = found.get("unitok") if isinstance(found, dict) else None
    return described if isinstance(described, dict) else {}


def _check_index(path: Path) -> None:
    """Raise `UserError` unless the parts of a sharded checkpoint are there, and none would run anything."""
    try:
        with open(path / _INDEX, "rb") as file:
            index = _IndexReader(file).load()
        for entry, where in index.storage_data.items():
            part = (path / where.relative_path).resolve()
            if not part.is_relative_to(path.resolve()):
                raise ValueError(f"{where.relative_path} lies elsewhere")
            if part.stat().st_size - where.length < where.offset:
                raise ValueError(f"{where.relative_path} is cut off")
            if type(index.state_dict_metadata[entry.fqn]).__name__ == "BytesStorageMetadata":
                with open(part, "rb") as file:
                    file.seek(where.offset)
                    data = file.read(where.length)
                torch.load(io.BytesIO(data), weights_only=True)  # PyTorch itself would unpickle it
    except Exception as error:  # a torn pickle raises almost anything
        raise UserError(f"{path}: not a sharded checkpoint that can be read ({first_line(error)})") from None


def _load_sharded(path: Path) -> dict[str, Any]:
    """Weights and what else there is, put together; the optimizer's part stays where it is."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    _check_index(path)
    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys={"state_dict"})
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
    return load_checkpoint(path / _REST) | state


class Inert:
    """Stands where a checkpoint held an object of another program: takes any arguments, keeps its state, and does nothing."""

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    __setitem__ = append = extend = __init__


def _stand_in(name: str) -> type:
    module, _, short = name.rpartition(".")
    return type(short, (Inert,), {"__module__": module})


def load_weights(path: Path, trust: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a checkpoint, by name: `{"state_dict": {"w": …}}` gives `state_dict.w`.

    Errors: `UserError` saying what the file is instead.
    """
    path = Path(path)
    if path.is_dir() and not is_sharded(path):
        raise UserError(f"{path}: a folder; give the file of the weights in it")
    if path.is_file() and is_safetensors(path):
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # a torn file raises almost anything
            raise UserError(f"{path}: {_foreign(path) or f'not a whole safetensors file ({first_line(error)})'}") from None
    return weights_in(load_checkpoint(path, trust), path)


def weights_in(checkpoint: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of what `load_checkpoint` gave, by name as in `load_weights`; errors: `UserError` where there are none."""
    found = {name: tensor for name, tensor in _tensors(checkpoint, "") if name}
    if not found:
        raise UserError(f"{path}: no weights in it")
    return found


def _tensors(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, Inert) and isinstance(node.state, dict):  # a whole module, as `torch.save(model)` writes it
        for kind in ("_parameters", "_buffers", "_modules"):
            yield from _tensors(node.state.get(kind), name)
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _tensors(child, f"{name}.{key}" if name else str(key))


def merge_lora(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights with peft's layers -> plain ones: W + scale x B A. `scale` is alpha / rank."""
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, a in state.items():
        if found := re.fullmatch(r"(.*)\.lora_A\.default\.weight", name):
            b = state[f"{found[1]}.lora_B.default.weight"]
            weight = plain[f"{found[1]}.weight"]
            plain[f"{found[1]}.weight"] = (weight.float() + scale * b.float() @ a.float()).to(weight.dtype)
    return plain


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors by its first bytes, or is at least called so."""
    with open(path, "rb") as file:
        head = file.read(9)
    header = head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32  # its length, then JSON
    return header or path.suffix == ".safetensors"


#: How files begin that people take for weights, and what to tell them.
_HEADS = {
    b"": "an empty file; get it again",
    b"version https://git-lfs": "a Git LFS pointer, not the weights themselves; get them with `git lfs pull`",
    b"<": "a web page, not weights; download the file itself",
    b"GGUF": "a GGUF file, whose weights are quantized; give the model's safetensors or checkpoint",
    b"\x93NUMPY": "a NumPy array (.npy), not a checkpoint",
    b"\x89HDF": "an HDF5 file (Keras or TensorFlow), not a checkpoint of PyTorch",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
}


def _foreign(path: Path) -> str:
    """What a file is that holds no weights that can be read, and what to do; "" where nothing can be told of it."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        head = file.read(200)
    for magic, told in _HEADS.items():
        if head.lstrip().startswith(magic) if magic else not head:
            return told
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript archive (code and weights); save the model's state_dict() instead"
        if names and all(name.endswith(".npy") for name in names):
            return "NumPy arrays (.npz), not a checkpoint"
        if not any(name.endswith("data.pkl") for name in names):
            return "a zip archive; unpack it first"
        return "a checkpoint of PyTorch's, not safetensors; rename it to .ckpt" if path.suffix == ".safetensors" else ""
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) > len(head) - 4 and all(c.isprintable() or c.isspace() for c in text):
        return f"a text file, not weights; it begins {text[:40]!r}"
    return ""


def training_facts(path: Path, described: Mapping[str, Any]) -> dict[str, Json]:
    """What is known of the training that wrote a checkpoint, for people: `data` (names of data sets, without their folders), `steps`,
    `samples`, for a decoder `tokens`, `minutes`.

    path: of the checkpoint; its run's `config.yaml` names the data. described: the checkpoint's `unitok` entry.
    """
    facts: dict[str, Json] = {}
    run = path.absolute().parent.parent
    config = next((file for file in (run / "metrics" / "config.yaml", run / "config.yaml") if file.is_file()), None)
    data = ((read_yaml(config) or {}).get("data") or {}).get("init_args") or {} if config else {}
    paths = data.get("path") or []
    names = [Path(str(one)).name for one in ([paths] if isinstance(paths, str) else paths)]
    facts |= {"data": ", ".join(names)} if names else {}
    facts |= {
        name: int(described[key]) for name, key in (("steps", "steps_done"), ("samples", "samples_seen")) if key in described
    }
    if "samples_seen" in described and isinstance(data.get("sequence_length"), int):
        facts["tokens"] = int(described["samples_seen"]) * int(data["sequence_length"])
    if spent := (described.get("budget") or {}).get("spent"):
        facts["minutes"] = round(float(spent) / 60, 1)
    return facts


_LAST = ("stopped.ckpt", "final.ckpt")  # of a run, the later one last


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a run with the most steps, of those that read, or None; those that the run named come first.

    What does not read is told. Times of files do not count: a backup may be younger.
    """
    for old in (folder / "checkpoints").glob(".*.ckpt.unitok-old"):  # a sharded one that was being replaced
        settle(old.with_name(old.name[1:].removesuffix(".unitok-old")))
    torn: list[UserError] = []
    for _ in range(2):  # a run that is going on may remove what was listed
        torn, found = [], []
        for file in (folder / "checkpoints").glob("*.ckpt"):
            try:
                steps = int(check_checkpoint(file).get("steps_done", 0))
            except UserError as error:
                torn += [error] if file.exists() else []
                continue
            found.append((is_written_by_run(file), steps, _LAST.index(file.name) if file.name in _LAST else -1, file))
        if found:
            break
    for problem in torn:
        log.warning("%s: passed over", problem)
    return max(found)[-1] if found else None


def is_written_by_run(file: Path) -> bool:
    """Whether a checkpoint's name is one that a run gives, and not one of the user's."""
    return file.name in _LAST or re.fullmatch(r"step=\d+\.ckpt", file.name) is not None
